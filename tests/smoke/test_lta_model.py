"""The whole way of a thought: prompt, generator, training, answering, files; for every generator."""

import pytest
import torch
from test_lta_prompting import TOKENIZERS

import lab
from lab.data.examples import Example
from lab.errors import CheckpointError, SettingsError
from lab.latent.sampling import Sampling
from lab.methods.lta import objective
from lab.methods.lta.checkpoint import export_official
from lab.methods.lta.config import LtaSettings
from lab.methods.lta.model import ThoughtModel
from lab.methods.lta.objective import info_nce, loss
from lab.methods.lta.policy import generate, make_all, prompted, to_batch
from lab.methods.lta.prompting import build
from lab.methods.softcot.model import SoftcotModel
from lab.models.backbones import load_backbone

EXAMPLES = [
    Example("a", "Tom has 3 pens and buys 4. How many?", ("3+4=7",), "7"),
    Example("b", "A cow eats 5, then 6, then 7 apples. How many in all?", ("5+6=11", "11+7=18"), "18"),
]
GREEDY = {"sampling": Sampling(), "max_new_tokens": 6}


def base(seed=0, hidden=32):
    return load_backbone("toy:qwen3", vocab_size=272, seed=seed, hidden=hidden, heads=4, kv_heads=2, layers=2, initializer_range=0.2)


def model(kind="block", cls=ThoughtModel, **settings):
    tokenizer = TOKENIZERS["qwen3"]
    settings = LtaSettings.check(**{"generator": kind, "num_thought_tokens": 3, "family": "qwen3", "inner": 48, **settings})
    torch.manual_seed(1)
    return cls.start(base(), tokenizer, settings, assistant=base(5, 24) if kind == "assistant" else None)


def batch(m, split="train", n=3):
    where = {"family": "qwen3", "task": "gsm8k", "split": split, "distinct": m.config.distinct_slots}
    return to_batch(m, [build(example, n, tokenizer=m.tokenizer, **where) for example in EXAMPLES])


@pytest.mark.parametrize("kind", ["block", "assistant", "static"])
def test_only_the_generator_learns(kind):
    m = model(kind).train()
    value, parts = loss(m, batch(m))
    value.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for name, p in m.parts.named_parameters() if "in_proj_bias" not in name)
    assert all(p.grad is None for p in m.backbone.parameters())
    assert set(parts) == ({"sft", "con", "kl"} if kind == "block" else {"sft"})


def test_hiding_the_solution_is_the_same_as_not_showing_it():
    shown, hidden = model(gold_steps="visible"), model(gold_steps="masked")
    hidden.parts.load_state_dict(shown.parts.state_dict())
    with torch.no_grad():
        train, test = batch(hidden), batch(hidden, "test")
        torch.testing.assert_close(hidden.make(train), hidden.make(test), atol=1e-5, rtol=1e-5)
        assert (shown.make(train) - shown.make(test)).abs().max() > 1e-3


def test_the_repaired_focus_loss_has_a_gradient_and_the_published_one_has_none(caplog):
    objective._warned.clear()
    sizes = {}
    for where in ("step_mean", "turn_end"):
        m = model(focus_positions=where, gold_steps="visible").train()
        _, parts = loss(m, batch(m))
        parts["con"].backward()
        sizes[where] = max(float(p.grad.abs().max()) for p in m.parts.parameters() if p.grad is not None)
    assert sizes["step_mean"] > 1e-4 and sizes["turn_end"] < 1e-6
    assert "no gradient" in caplog.text


@pytest.mark.parametrize("kind", ["block", "assistant", "static", "unknown", "none"])
def test_a_batch_answers_as_its_rows_do(kind):
    m = model(kind).eval()
    together = m.generate(EXAMPLES, samples=2, sampling=Sampling(temperature=1.0, top_k=20), max_new_tokens=6)
    alone = [
        m.generate([example], samples=2, first=i, sampling=Sampling(temperature=1.0, top_k=20), max_new_tokens=6)
        for i, example in enumerate(EXAMPLES)
    ]
    assert [row.ids for row in together.rows] == [row.ids for one in alone for row in one.rows]


def test_sets_of_thoughts_are_further_samples():
    m = SoftcotModel.start(
        base(),
        TOKENIZERS["qwen3"],
        LtaSettings.check(generator="assistant", num_thought_tokens=3, num_scaling_times=4, nce=True),
        assistant=base(5, 24),
    )
    m.use_assistant(m.assistant, start_ids=[40, 41, 42, 43])
    made = make_all(m, [prompted(m, example) for example in EXAMPLES])
    assert made.shape == (8, 3, 32) and (made[0] - made[1]).abs().max() > 1e-3
    found = m.generate(EXAMPLES, samples=2, **GREEDY)
    assert [(row.question, row.sample) for row in found.rows] == [(q, s) for q in range(2) for s in range(8)]
    value, parts = loss(m.train(), batch(m))
    assert set(parts) == {"sft", "nce"} and value.isfinite()


def test_info_nce_by_hand():
    sets = torch.eye(3)[None]
    keep = torch.full((1, 3, 3), 2.0)
    want = -torch.log_softmax(20 * torch.eye(3), -1).diagonal().mean() / 3
    torch.testing.assert_close(info_nce(sets, keep), want)


@pytest.mark.parametrize("kind", ["block", "assistant"])
def test_files_round_trip(kind, tmp_path):
    m = model(kind, SoftcotModel if kind == "assistant" else ThoughtModel).eval()
    want = [row.ids for row in m.generate(EXAMPLES, **GREEDY).rows]
    m.backbone.save_pretrained(tmp_path / "base")
    export_official(m, tmp_path / "official")
    answers = {"backbone": m.backbone, "tokenizer": m.tokenizer, "num_thought_tokens": 3, "family": "qwen3"}
    if kind == "assistant":
        answers["assistant"] = m.assistant
    again = lab.load(tmp_path / "official", **answers)
    assert again.method == ("lta" if kind == "block" else "softcot")
    again.settings = {**again.settings, "distinct_slots": m.config.distinct_slots}
    assert [row.ids for row in again.generate(EXAMPLES, **GREEDY).rows] == want
    own = lab.load(m.save(tmp_path / "own"))
    own.use_assistant(m.assistant)
    assert [row.ids for row in own.generate(EXAMPLES, **GREEDY).rows] == want


def test_files_that_lack_something_say_so(tmp_path):
    m = model("block")
    export_official(m, tmp_path / "official")
    (tmp_path / "official" / "TransformerBlock.bin").unlink()
    with pytest.raises(CheckpointError, match="TransformerBlock"):
        lab.load(tmp_path / "official", backbone=m.backbone, tokenizer=m.tokenizer, family="qwen3")
    with pytest.raises(SettingsError, match="backbone="):
        lab.load(tmp_path / "official")
    with pytest.raises(CheckpointError, match="width"):
        lab.load(tmp_path / "official", backbone=base(hidden=16), family="qwen3")
    with pytest.raises(SettingsError, match="small model"):
        ThoughtModel.start(base(), TOKENIZERS["qwen3"], LtaSettings.check(generator="assistant"))


def test_leaving_one_thought_out_changes_what_is_read():
    m = model("block").eval()
    whole = make_all(m, [prompted(m, example) for example in EXAMPLES])
    assert whole.shape == (2, 3, 32)
    with pytest.raises(SettingsError, match="leave_out"):
        generate(m, EXAMPLES, leave_out=3, **GREEDY)
    assert len(generate(m, EXAMPLES, leave_out=1, **GREEDY).rows) == 2
