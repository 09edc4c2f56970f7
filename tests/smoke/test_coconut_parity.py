"""COCONUT against the official code's numbers: forward, loss, gradients, generation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lab.latent.plan import IGNORE, Row, collate
from lab.methods.coconut.config import CoconutSettings
from lab.methods.coconut.model import CoconutModel
from lab.methods.coconut.objective import loss, run
from lab.methods.coconut.policy import generate
from lab.models.backbones import new_backbone
from lab.models.loading import load_exact, part

FIXTURES = Path(__file__).parents[1] / "fixtures" / "coconut"
CASES = json.loads((FIXTURES / "cases.json").read_text())
NUMBERS = load_file(FIXTURES / "cases.safetensors")
LATENT, START, END, EOS = 95, 93, 94, 92


@pytest.fixture(scope="module")
def model() -> CoconutModel:
    from transformers import GPT2Config

    backbone = new_backbone(GPT2Config(**json.loads((FIXTURES / "config.json").read_text())))
    load_exact(backbone, part(load_file(FIXTURES / "state_dict.safetensors"), "base_causallm."))
    settings = CoconutSettings(start_id=START, end_id=END, latent_id=LATENT, eos_id=EOS)
    return CoconutModel(backbone, None, settings).eval()


def row_of(features: dict) -> Row:
    """A fixture row as ours: what stands before the latents, how many there are, what stands after."""
    ids, labels = features["input_ids"], features["labels"]
    count = ids.count(LATENT)
    cut = ids.index(LATENT) if count else labels.index(next(label for label in labels if label != IGNORE))
    return Row(tuple(ids[:cut]), tuple(ids[cut + count :]), tuple(labels[:cut] + labels[cut + count :]), count)


@pytest.mark.parametrize("case", CASES["forward"])
def test_forward_loss_and_gradients(model: CoconutModel, case: str):
    rows = [row_of(features) for features in CASES["forward"][case]["features_in"]]
    model.zero_grad()
    plan = collate(rows)
    value, _ = loss(model, plan)
    value.backward()
    torch.testing.assert_close(value.detach()[None], NUMBERS[f"{case}.loss"], rtol=0, atol=1e-5)
    for name, parameter in model.backbone.named_parameters():
        if f"{case}.grad.{name}" in NUMBERS:
            torch.testing.assert_close(parameter.grad, NUMBERS[f"{case}.grad.{name}"], atol=1e-4, rtol=1e-3)
    done = run(model, plan)
    for index, row in enumerate(rows):
        real = NUMBERS[f"{case}.attention_mask"][index].bool()
        states = (done.prompt[index, done.prompt.shape[1] - len(row.prompt) :], done.states[index, : row.thoughts], done.after[index])
        logits = model.decoder.logits(torch.cat((*states[:2], states[2][: len(row.after)])))
        torch.testing.assert_close(logits, NUMBERS[f"{case}.logits"][index][real], atol=1e-4, rtol=0)
        inputs = NUMBERS[f"{case}.inputs_embeds"][index][real]
        begin = len(row.prompt)
        torch.testing.assert_close(done.inputs[index, : row.thoughts], inputs[begin : begin + row.thoughts], atol=1e-4, rtol=0)


def test_forward_makes_one_call_more_than_the_longest_chain(model: CoconutModel, monkeypatch):
    rows = [row_of(features) for features in CASES["forward"]["ragged_mixed"]["features_in"]]
    calls = []
    decoder = model.decoder
    monkeypatch.setitem(model.__dict__, "decoder", _Counting(decoder, calls))
    run(model, collate(rows))
    assert len(calls) == CASES["forward"]["ragged_mixed"]["forward_count"] == 4


class _Counting:
    def __init__(self, decoder, calls: list):
        self._decoder, self._calls = decoder, calls

    def __getattr__(self, name: str):
        return getattr(self._decoder, name)

    def __call__(self, *args, **kwargs):
        self._calls.append(args[0].shape[1])
        return self._decoder(*args, **kwargs)


@pytest.mark.parametrize("name", [name for name in CASES["generate"] if name.startswith("g")])
def test_generation(model: CoconutModel, name: str):
    case = CASES["generate"][name]
    ids = case["input_ids"]
    count = ids.count(LATENT)
    prompt = ids[: ids.index(START) + 1]
    found = generate(model, [prompt], thoughts=count, max_new_tokens=case["max_new_tokens"], compat="coconut", vectors=True)
    assert [*prompt, *[LATENT] * count, END, *found.rows[0].ids] == case["output_ids"]
    want = NUMBERS[f"gen{name[1:]}.final_embeds_latent_rows"]
    torch.testing.assert_close(found.vectors[0], want, atol=1e-4, rtol=0)


def test_official_stop_keeps_an_end_token_at_the_first_place(model: CoconutModel):
    free = CASES["generate"]["g2"]
    prompt, first = free["input_ids"][:12], free["output_ids"][15]
    moved = CoconutModel(model.backbone, None, model.config.but(eos_id=first))
    official = generate(moved, [prompt], thoughts=2, max_new_tokens=6, compat="coconut").rows[0].ids
    assert official[0] == first and len(official) == 1  # the second token is the end token too, and that one is tested
    assert generate(moved, [prompt], thoughts=2, max_new_tokens=6).rows[0].ids == []


def test_ragged_batch_equals_single_rows(model: CoconutModel):
    prompts = [CASES["generate"][f"g{i}"]["input_ids"][: 8 + i] for i in range(3)] * 2
    together = generate(model, prompts, thoughts=3, max_new_tokens=9, vectors=True)
    for index, prompt in enumerate(prompts):
        alone = generate(model, [prompt], thoughts=3, max_new_tokens=9, vectors=True)
        assert alone.rows[0].ids == together.rows[index].ids
        torch.testing.assert_close(alone.vectors[0], together.vectors[index], atol=1e-5, rtol=1e-5)


def test_own_tokens_are_never_said(model: CoconutModel):
    free = generate(model, [CASES["generate"]["g1"]["input_ids"][:11]], thoughts=1, max_new_tokens=12, compat="coconut").rows[0].ids
    assert END in free
    ours = generate(model, [CASES["generate"]["g1"]["input_ids"][:11]], thoughts=1, max_new_tokens=12).rows[0].ids
    assert not {START, END, LATENT} & set(ours)
