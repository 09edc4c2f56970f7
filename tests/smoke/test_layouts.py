"""`load` knows what a folder is, says so when it does not, and what is saved comes back the same or not at all."""

import errno
import json
import resource
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from lab.errors import CheckpointError, LabError, RunError, SettingsError
from lab.latent.sampling import Sampling
from lab.models import layouts
from lab.models.backbones import load_backbone
from lab.models.latent_model import LatentModel, model_class
from lab.models.layouts import FolderFiles, Layout, load, recognise, useful
from lab.models.tokenizers import byte_tokenizer

QUESTIONS = ["1+1?", "a much longer question about nothing", "3?"]


def toy(seed=0, **settings):
    tokenizer = byte_tokenizer(chat=True)
    settings = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "seed": seed} | settings
    return LatentModel(load_backbone("toy:qwen3-micro", **settings), tokenizer)


def logits(model):
    with torch.no_grad():
        return model.backbone(torch.tensor([[5, 7, 11]])).logits


@pytest.fixture
def plain_folder(tmp_path):
    model = toy()
    model.backbone.save_pretrained(tmp_path / "plain")
    model.tokenizer.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


class Known:
    """A recogniser of folders that hold `<mark>.json`."""

    def __init__(self, method, mark):
        self.name, self.method, self.mark = f"{method} folder ({mark}.json)", method, mark

    def recognise(self, files):
        return Layout(self.method, self.name, files.json(f"{self.mark}.json")) if files.has(f"{self.mark}.json") else None

    def load(self, folder, layout, alpha=None, **answers):
        if alpha is None:
            raise SettingsError("The file does not say alpha; pass alpha=….")
        return LatentModel(load_backbone(str(folder)), settings={"alpha": alpha, **layout.found})


@pytest.fixture
def known(monkeypatch):
    mine, real = (Known("one", "mark"), Known("two", "mark"), Known("three", "other")), layouts.recognisers
    monkeypatch.setattr(layouts, "recognisers", lambda only="": real(only) if only else mine)


def test_a_plain_checkpoint_is_method_none_and_computes_the_same(plain_folder):
    model = load(plain_folder)
    assert model.method == "none" and not model.training
    assert torch.equal(logits(model), logits(toy()))
    assert model.tokenizer.chat_template == toy().tokenizer.chat_template
    assert load(plain_folder, dtype="bfloat16").backbone.dtype == torch.bfloat16


def test_a_toy_needs_nothing():
    model = load("toy:llama-micro", seed=3)
    assert torch.equal(logits(model), logits(load("toy:llama-micro", seed=3)))
    assert model.generate(["hi"], max_new_tokens=3).rows[0].prompt == model.prompt_ids("hi")


def test_saved_in_our_format_it_comes_back(tmp_path):
    model = toy(seed=5)
    model.settings = {"note": [1, 2]}
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model)) and again.settings == {"note": [1, 2]}
    assert again.generate(QUESTIONS, max_new_tokens=6).texts == model.generate(QUESTIONS, max_new_tokens=6).texts


class Gated(LatentModel):
    method = "gated"

    @classmethod
    def build(cls, backbone, tokenizer, settings, source=""):
        torch.manual_seed(1)
        return cls(
            backbone, tokenizer, settings, nn.Sequential(nn.Linear(backbone.config.hidden_size, settings["width"]), nn.Tanh()), source
        )


@pytest.fixture
def gated(monkeypatch):
    package, module = ModuleType("lab.methods.gated"), ModuleType("lab.methods.gated.checkpoint")
    module.MODEL = Gated
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    model = Gated.build(toy().backbone, byte_tokenizer(), {"width": 3})
    nn.init.normal_(model.parts[0].weight)
    return model


def test_a_methods_own_weights_and_settings_come_back(tmp_path, gated):
    gated.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert isinstance(again, Gated) and again.settings == {"width": 3}
    assert torch.equal(again.parts[0].weight, gated.parts[0].weight)


def test_parts_that_do_not_fit_or_are_gone_are_named(tmp_path, gated):
    gated.save(tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved/lab.json").read_text())
    (tmp_path / "saved/lab.json").write_text(json.dumps(manifest | {"settings": {"width": 4}}))
    with pytest.raises(CheckpointError, match=r"0.weight: found .3, 32., wanted .4, 32."):
        load(tmp_path / "saved")
    (tmp_path / "saved/parts.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no parts.safetensors"):
        load(tmp_path / "saved")


def test_a_frozen_backbone_may_stay_where_it_is(tmp_path, plain_folder):
    model = load(plain_folder)
    model.save(tmp_path / "small", with_backbone=False)
    assert not (tmp_path / "small/model.safetensors").exists()
    assert torch.equal(logits(load(tmp_path / "small")), logits(model))
    with pytest.raises(SettingsError, match="no name"):
        toy().save(tmp_path / "other", with_backbone=False)


def test_an_unknown_format_or_method_is_refused(tmp_path):
    toy().save(tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved/lab.json").read_text())
    for change, word in [({"format": 99}, "format 99"), ({"method": "later"}, "'later'")]:
        (tmp_path / "saved/lab.json").write_text(json.dumps(manifest | change))
        with pytest.raises(CheckpointError, match=word):
            load(tmp_path / "saved")
    del manifest["settings"]
    (tmp_path / "saved/lab.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="lacks settings"):
        load(tmp_path / "saved")


def test_one_recogniser_wins_and_gets_the_answers(known, plain_folder):
    (plain_folder / "other.json").write_text('{"K": 3}')
    assert load(plain_folder, alpha=32).settings == {"alpha": 32, "K": 3}
    with pytest.raises(SettingsError, match="alpha"):
        load(plain_folder)


def test_a_tie_is_an_error_until_the_method_is_named(known, plain_folder):
    (plain_folder / "mark.json").write_text("{}")
    with pytest.raises(CheckpointError, match="method='one'.*method='two'"):
        load(plain_folder, alpha=1)
    assert recognise(FolderFiles(plain_folder), "two")[1].method == "two"
    with pytest.raises(CheckpointError, match="as method 'three'"):
        recognise(FolderFiles(plain_folder), "three")


def test_nothing_recognised_lists_what_is_there_and_what_is_known(known, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds notes.txt.*one folder \(mark.json\).*transformers checkpoint"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no file or folder"):
        load(tmp_path / "nowhere")


def test_a_plain_checkpoint_takes_no_answers(plain_folder):
    with pytest.raises(SettingsError, match="alpha"):
        load(plain_folder, alpha=3)


def test_one_file_can_be_a_checkpoint(tmp_path):
    torch.save({"base.weight": torch.ones(2, 3)}, tmp_path / "checkpoint_28")
    (tmp_path / "beside.json").write_text("{}")
    files = FolderFiles(tmp_path / "checkpoint_28")
    assert files.names == ("checkpoint_28",) and files.shapes() == {"base.weight": (2, 3)} and files.config == {}


def test_what_is_fetched_from_a_repository():
    names = ["config.json", "model-1.safetensors", "pytorch_model-1.bin", "pytorch_model.bin.index.json", "lora/adapter_model.safetensors"]
    names += ["iter_decider.bin", "tf_model.h5", "modeling_evil.py", "optimizer.pt", "old/pytorch_model.bin"]
    assert useful(names) == [
        "config.json",
        "model-1.safetensors",
        "lora/adapter_model.safetensors",
        "iter_decider.bin",
        "old/pytorch_model.bin",
    ]


def test_every_installed_method_names_its_layouts():
    for recogniser in layouts.recognisers() + layouts.recognisers("none"):
        assert recogniser.name and recogniser.recognise(FolderFiles(Path(__file__).parent)) is None
    assert model_class("none") is LatentModel


def test_nothing_is_overwritten_unasked(tmp_path):
    toy(seed=1).save(tmp_path / "saved")
    with pytest.raises(RunError, match="overwrite=True"):
        toy(seed=2).save(tmp_path / "saved")
    toy(seed=2).save(tmp_path / "saved", overwrite=True)
    assert torch.equal(logits(load(tmp_path / "saved")), logits(toy(seed=2)))
    assert [item.name for item in tmp_path.iterdir()] == ["saved"]


def test_a_file_system_that_takes_no_more_leaves_the_old_checkpoint_whole(tmp_path):
    toy(seed=1).save(tmp_path / "saved")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(LabError, match="Cannot write .*saved: File too large"):
            toy(seed=2).save(tmp_path / "saved", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [item.name for item in tmp_path.iterdir()] == ["saved"]
    assert torch.equal(logits(load(tmp_path / "saved")), logits(toy(seed=1)))


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = toy()
    monkeypatch.setattr(model.backbone, "save_pretrained", full)
    with pytest.raises(RunError, match="no space is left"):
        model.save(tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_answers_do_not_depend_on_the_batch_and_prefix_the_longer_run():
    model, how = toy(), Sampling(temperature=1.0, top_k=20)
    together = model.generate(QUESTIONS, 4, sampling=how, max_new_tokens=8, seed=7)
    alone = [
        row
        for i, question in enumerate(QUESTIONS)
        for row in model.generate([question], 4, sampling=how, max_new_tokens=8, seed=7, first=i).rows
    ]
    fewer = model.generate(QUESTIONS, 2, sampling=how, max_new_tokens=8, seed=7, batch=1)
    assert [row.ids for row in together.rows] == [row.ids for row in alone]
    assert [row.ids for row in together.rows if row.sample < 2] == [row.ids for row in fewer.rows]
    assert len({tuple(row.ids) for row in together.rows}) > len(QUESTIONS)


def test_greedy_answers_are_those_of_transformers_and_the_trace_holds_them():
    model = toy()
    prompt = model.prompt_ids(QUESTIONS[1])
    answers = model.generate([QUESTIONS[1]], max_new_tokens=8)
    wanted = model.backbone.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(prompt) :].tolist()
    assert answers.rows[0].ids == wanted[: len(answers.rows[0].ids)] and len(answers.rows[0].ids) in (8, len(wanted) - 1)
    trace = answers.trace()
    assert trace.tokens["id"].tolist() == prompt + answers.rows[0].ids
    scores = logits_of(model, prompt + answers.rows[0].ids).softmax(-1)
    place = len(prompt)
    assert trace.tokens["prob"][place] == pytest.approx(scores[0, place - 1, answers.rows[0].ids[0]].item(), rel=1e-4)


def logits_of(model, ids):
    with torch.no_grad():
        return model.backbone(torch.tensor([ids])).logits


def test_text_needs_a_tokenizer_ids_do_not():
    model = LatentModel(toy().backbone)
    with pytest.raises(SettingsError, match="no tokenizer"):
        model.generate(["hi"])
    assert len(model.generate([[5, 6]], max_new_tokens=4).rows[0].ids) == 4
