"""Toy backbones build from a seed and behave; saved ones reload exactly or say what is wrong; new tokens get rows."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lab.errors import CheckpointError, DeviceError, SettingsError
from lab.models.backbones import ARCHS, SIZES, check_device, load_backbone, load_config, parameter_count
from lab.models.latent_model import LatentModel
from lab.models.tokenizers import add_tokens, byte_tokenizer

IDS = torch.tensor([[5, 7, 11, 13]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("size", SIZES.keys() - {"mid"})
def test_sizes_run_and_stay_between_ten_thousand_and_a_million(arch, size):
    model = load_backbone(f"toy:{arch}-{size}")
    assert 10_000 <= parameter_count(model) <= 1_000_000
    assert model.config._attn_implementation == "sdpa" and not model.training
    assert logits(model).shape == (1, 4, SIZES[size]["vocab_size"])


def test_benchmark_shape():
    config = load_config("toy:qwen3-mid")
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (6, 384, 6, 2)
    assert config.vocab_size == 32000
    config = load_config("toy:gpt2-mid")
    assert (config.n_layer, config.n_embd, config.n_head, config.vocab_size) == (6, 384, 6, 50257)


def test_seed_decides_the_weights_and_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, again, other = (load_backbone("toy:llama", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(logits(first), logits(again)) and not torch.equal(logits(first), logits(other))


def test_explicit_settings_override_the_preset():
    shape = dict(layers=1, hidden=96, intermediate=2, heads=2, head_dim=32, tied=False, initializer_range=0.2)
    model = load_backbone("toy:qwen3", vocab_size=83, **shape)
    layer = model.model.layers[0]
    assert layer.self_attn.k_proj.weight.shape == (64, 96) and layer.mlp.up_proj.weight.shape == (2, 96)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.lm_head.weight.std().item() == pytest.approx(0.2, rel=0.05)
    gpt2 = load_backbone("toy:gpt2", dropout=0.3, extra={"attn_pdrop": 0.0})
    assert (gpt2.config.resid_pdrop, gpt2.config.attn_pdrop) == (0.3, 0.0)


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("toy:qwen4", {}, "qwen3"),
        ("toy:llama-tyni", {}, "tiny"),
        ("toy:llama", {"layer": 3}, "layers"),
        ("toy:llama", {"layers": "3"}, "layers = '3'"),
        ("toy:llama", {"hidden": 30, "heads": 4}, "multiple"),
        ("toy:gpt2", {"kv_heads": 2}, "GPT-2"),
        ("toy:llama", {"dtype": "fp32"}, "float32"),
        ("no such/folder/here", {}, "toy:<arch>"),
        ("owner/model", {"layers": 3}, "toy backbones only"),
    ],
)
def test_bad_requests_are_answered_before_anything_is_built(name, settings, word):
    with pytest.raises(SettingsError, match=word):
        load_backbone(name, **settings)


def test_a_device_that_is_not_there():
    for name in ("cuda:99", "gpu", "cpu:3"):
        with pytest.raises(DeviceError):
            check_device(name)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_folder_reloads_exactly(tmp_path, arch, tied):
    model = load_backbone(f"toy:{arch}-micro", tied=tied, seed=4)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_backbone(str(tmp_path))), logits(model))
    assert load_backbone(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16


def test_saving_shows_no_bar(tmp_path, capfd):
    LatentModel(load_backbone("toy:gpt2-tiny"), None).save(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists() and "Writing" not in "".join(capfd.readouterr())


def test_loading_is_quiet_and_leaves_transformers_as_it_was(tmp_path, capfd):
    from transformers.utils import logging as theirs

    load_backbone("toy:llama-micro").save_pretrained(tmp_path)
    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    capfd.readouterr()
    load_backbone(str(tmp_path))
    assert "".join(capfd.readouterr()) == "" and before == (theirs.get_verbosity(), theirs.is_progress_bar_enabled())


@pytest.fixture
def saved(tmp_path):
    load_backbone("toy:llama-micro").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda w: w.pop("model.norm.weight"), "1 missing .model.norm.weight"),
        (lambda w: w.update({"model.extra.weight": torch.zeros(2)}), "1 unexpected .model.extra.weight"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight: found .3,., wanted .32,."),
    ],
)
def test_weights_that_do_not_fit_are_named(saved, change, word):
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=word):
        load_backbone(str(saved))


def test_truncated_file_and_missing_config(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="Cannot load the weights") as caught:
        load_backbone(str(saved))
    assert len(str(caught.value).splitlines()) == 1
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no config.json"):
        load_backbone(str(saved))


def test_a_checkpoint_with_code_of_its_own_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "evil.py").write_text("raise SystemExit('code was executed')")
    with pytest.raises(CheckpointError, match="code of its own"):
        load_backbone(str(saved))


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_get_rows_and_old_rows_stay(arch, tied):
    tokenizer = byte_tokenizer()
    model = load_backbone(f"toy:{arch}-micro", vocab_size=len(tokenizer), tied=tied)
    before = [w.weight.detach().clone() for w in (model.get_input_embeddings(), model.get_output_embeddings())]
    ids = add_tokens(tokenizer, model, ["<a>", "<b>"], like="<eos>")
    mean = add_tokens(tokenizer, model, ["<c>", "<a>"])
    assert ids == [258, 259] and mean == [260, 258]
    for old, new in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert torch.equal(new.weight[:258], old)
        assert torch.equal(new.weight[258], old[257]) and torch.equal(new.weight[259], old[257])
        torch.testing.assert_close(new.weight[260], new.weight[:260].mean(0))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.vocab_size == 261 and logits(model).shape[-1] == 261


def test_spare_rows_are_used_not_shrunk():
    tokenizer = byte_tokenizer()
    model = load_backbone("toy:llama-micro", vocab_size=300)
    (new,) = add_tokens(tokenizer, model, ["<a>"], like="a")
    table = model.get_input_embeddings().weight
    assert table.shape[0] == 300 and torch.equal(table[new], table[ord("a")])
    with pytest.raises(SettingsError, match="not one token"):
        add_tokens(tokenizer, model, ["<d>"], like="<nothing>")
