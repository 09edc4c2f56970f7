"""CODI against the official code's numbers: preprocessing, forward, losses, gradients, generation, probing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lab.data.examples import Example
from lab.latent.plan import Row, collate_pairs
from lab.methods.codi.config import CodiSettings
from lab.methods.codi.data import official_example, prepare
from lab.methods.codi.objective import loss, run
from lab.methods.codi.policy import generate
from lab.models.layouts import load
from lab.models.tokenizers import load_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "codi"
FORWARD = json.loads((FIXTURES / "forward.json").read_text())["gpt2"]
NUMBERS = load_file(FIXTURES / "forward.safetensors")
TEXTS = json.loads((FIXTURES / "preprocess.json").read_text())
GENERATION = json.loads((FIXTURES / "generation.json").read_text())
PROBE = load_file(FIXTURES / "probe.safetensors")


@pytest.fixture(scope="module")
def wrapped():
    return load(FIXTURES / "gpt2_state_dict.safetensors", lora_alpha=8, num_latent=3, heads=2, eos_id=0, keep_lora=True)


@pytest.fixture(scope="module")
def merged():
    return load(FIXTURES / "gpt2_state_dict.safetensors", lora_alpha=8, num_latent=3, heads=2, tokenizer=str(FIXTURES / "tok_gpt2"))


def batch_of(indices: tuple[int, ...], latents: int) -> tuple:
    """The fixture's collated rows as (teacher, student) pairs."""
    pairs = []
    for i in indices:
        question = NUMBERS["gpt2/batch/encoder_input_ids"][i][NUMBERS["gpt2/batch/encoder_attention_mask"][i].bool()].tolist()[:-1]
        ref = NUMBERS["gpt2/batch/ref_input_ids"][i][NUMBERS["gpt2/batch/ref_attention_mask"][i].bool()].tolist()
        decoder = NUMBERS["gpt2/batch/labels"][i]
        decoder = decoder[decoder != -100].tolist()
        places = [int(NUMBERS[f"gpt2/batch/{side}_answer_position"][i]) - 1 for side in ("ref", "model")]
        after = tuple(ref[len(question) :])
        teacher = Row(tuple(question), after, (-100,) * len(question) + after, target=places[0] - len(question))
        student = Row((321,), tuple(decoder), (-100, -100, *decoder[1:]), latents, target=places[1])
        pairs.append((teacher, student))
    return collate_pairs(pairs, pad=320)


VARIANTS = {
    "default": {},
    "no_div_std": {"distill_loss_div_std": False},
    "l2": {"distill_loss_type": "l2"},
    "factor20_ref0.5": {"distill_loss_factor": 20.0, "ref_loss_factor": 0.5},
    "fix_attn_mask": {"fix_attn_mask": True},
    "num_latent1": {"num_latent": 1},
    "num_latent6": {"num_latent": 6},
    "no_prj": {"use_prj": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_in_compat_mode(wrapped, name: str):
    want = FORWARD["variants"][name]
    settings = dict(wrapped.settings)
    projection = wrapped.parts.prj
    try:
        wrapped.settings = wrapped.config.but(compat="codi", **VARIANTS[name]).model_dump(mode="json")
        if name == "no_prj":
            wrapped.parts.prj = torch.nn.Identity()
        check_step(wrapped, batch_of((0, 1, 2, 3), wrapped.config.num_latent), want, 2e-3 if name == "l2" else 1e-3)
    finally:
        wrapped.settings, wrapped.parts.prj = settings, projection


def test_losses_and_gradients_in_default_mode_where_nothing_is_padded(wrapped):
    check_step(wrapped, batch_of((0, 0), 3), FORWARD["no_padding_batch"], 1e-3)


def check_step(model, batch, want: dict, tolerance: float):
    model.zero_grad()
    value, parts = loss(model, batch)
    value.backward()
    assert value.item() == pytest.approx(want["loss"], rel=1e-5)
    for ours, theirs in (("ce", "ce_loss"), ("distill", "distill_loss_weighted"), ("ref_ce", "ref_ce_loss_weighted")):
        assert parts[ours].item() == pytest.approx(want[theirs], rel=1e-5), ours
    found = {name.replace("backbone.", "codi.").replace("parts.", ""): p for name, p in model.named_parameters() if p.requires_grad}
    for name, norm in want.get("grad_norms", {}).items():
        if name in found:
            assert float(found[name].grad.norm()) == pytest.approx(norm, rel=tolerance, abs=1e-6), name
    assert set(want.get("grad_norms", {})) <= set(found) or isinstance(model.parts.prj, torch.nn.Identity)


@pytest.mark.parametrize("variant", ["default", "fix_attn_mask"])
def test_logits_and_thoughts(wrapped, variant: str):
    settings = dict(wrapped.settings)
    try:
        wrapped.settings = wrapped.config.but(compat="codi", fix_attn_mask=variant != "default").model_dump(mode="json")
        done = run(wrapped, batch_of((0, 1, 2, 3), 3)).student
    finally:
        wrapped.settings = settings
    torch.testing.assert_close(wrapped.decoder.logits(done.after), NUMBERS[f"gpt2/{variant}/logits"], atol=1e-4, rtol=0)
    for step in range(3):
        torch.testing.assert_close(done.inputs[:, step], NUMBERS[f"gpt2/{variant}/prj_out_{step}"][:, 0], atol=1e-4, rtol=0)
        torch.testing.assert_close(done.before_thought()[:, step], NUMBERS[f"gpt2/{variant}/prj_in_{step}"][:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(wrapped.feedback(done.last_state()), NUMBERS[f"gpt2/{variant}/prj_out_3"][:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("run_name", [name for name in GENERATION["runs"] if "probe" not in name])
def test_generation(merged, run_name: str):
    want = GENERATION["runs"][run_name]
    extra = dict(zip(want["extra"][::2], want["extra"][1::2], strict=True))
    settings, projection = dict(merged.settings), merged.parts.prj
    keep_eos = extra.get("--remove_eos") == "False"
    try:
        compat = "" if run_name.endswith("no_padding") else "codi"
        merged.settings = merged.config.but(compat=compat, remove_eos=not keep_eos).model_dump(mode="json")
        if "--use_prj" in extra:
            merged.parts.prj = torch.nn.Identity()
        thoughts = int(extra.get("--inf_latent_iterations", 3))
        questions = want.get("questions") or GENERATION["questions"]
        found = generate(merged, questions, thoughts=thoughts, max_new_tokens=16, batch=want["batch_size"])
    finally:
        merged.settings, merged.parts.prj = settings, projection
    if compat or "no_padding" in run_name:
        assert [row.ids for row in found.rows][: len(want["pred_tokens"])] == want["pred_tokens"]


def test_probing_thoughts(merged):
    settings = dict(merged.settings)
    try:
        merged.settings = merged.config.but(compat="codi").model_dump(mode="json")
        found = generate(merged, GENERATION["questions"], max_new_tokens=16, batch=5, top=5)
    finally:
        merged.settings = settings
    probs = torch.tensor([[step[1] for step in row.top] for row in found.rows])
    torch.testing.assert_close(probs, PROBE["gpt2/probe_top5_values"], atol=1e-4, rtol=0)
    texts = [[step[0] for step in row.top] for row in found.rows]
    want = [[merged.tokenizer.convert_ids_to_tokens(step) for step in row] for row in PROBE["gpt2/probe_top5_indices"].tolist()]
    agree = [
        ours == merged.tokenizer.convert_tokens_to_string([t])
        for a, b in zip(texts, want, strict=True)
        for x, y in zip(a, b, strict=True)
        for ours, t in zip(x, y, strict=True)
        if t
    ]
    assert len(agree) >= 95 and all(agree)


SETTINGS = {
    "icot_remove_eos": {},
    "icot_keep_eos": {"remove_eos": False},
    "icot_include_last": {"include_last_cot": True},
    "icot_full": {"data_name": "icot-full"},
    "icot_full_include_last": {"data_name": "icot-full", "include_last_cot": True},
    "commonsense": {"data_name": "commonsense"},
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", SETTINGS)
def test_preprocessing(family: str, name: str):
    want = TEXTS["outputs"][f"tiny-{family}/{name}"]
    rows = TEXTS["rows_nl" if "full" in name else "rows_commonsense" if name == "commonsense" else "rows_math"]
    tokenizer = load_tokenizer(str(FIXTURES / f"tok_{family}"))
    ids = dict(pad_id=want["pad_token_id"], bot_id=want["bot_id"], eot_id=want["eot_id"], eos_id=want["eos"])
    examples = [
        Example(str(i), r["question"], (), "" if r["answer"] is None else r["answer"], (), {"cot": r["cot"]}) for i, r in enumerate(rows)
    ]
    for compat in ("", "codi"):
        s = CodiSettings(compat=compat, **ids, **SETTINGS[name])
        kept = prepare(examples, tokenizer, s, family)
        assert len(kept) == len(want["examples"])
        for pair, official in zip(kept.rows, want["examples"], strict=True):
            ours = official_example(pair, s)
            assert {key: official[key] for key in ours} == ours
            check_target(pair, official, family, tokenizer, compat or name != "commonsense")


def check_target(pair, official: dict, family: str, tokenizer, as_official: bool):
    """The compared token: the official one for numbers, and in general the one whose next token begins the answer."""
    teacher, student = pair
    assert teacher.after[teacher.target] == student.after[student.target]
    if as_official:
        shift = -1 + (family == "llama")
        assert len(teacher.prompt) + teacher.target == official["ref_answer_position"] + shift
        assert student.target == official["model_answer_position"] + shift
    else:  # the official shift may land on a letter answer itself; ours never does
        assert tokenizer.decode(student.after[student.target + 1 : -1]).strip() in ("A", "B")
