"""Generation of Think-at-Hard: the same numbers whatever the batch, the padding, the schedule or the interruption."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lab.models.layouts as layouts
from lab.errors import DataError, SettingsError
from lab.methods.tah.config import OracleSettings
from lab.methods.tah.deciders import AlwaysDecider, NeverDecider, OracleDecider, Seen
from lab.methods.tah.model import TahModel
from lab.methods.tah.policy import OFFICIAL, decider_for_policy, decode, generate
from lab.methods.tah.reference import Reference

FOLDER = Path(__file__).parents[1] / "fixtures" / "tah"
INPUTS = load_file(FOLDER / "model_inputs.safetensors")
PROMPTS = [row[mask.bool()].tolist() for row, mask in zip(INPUTS["prompt_ids"], INPUTS["prompt_mask"], strict=True)]
FORCED = INPUTS["forced_tokens"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def model() -> TahModel:
    return layouts.load(FOLDER / "checkpoint_official_layout")


def variant(model: TahModel, mode: str, passes: int) -> TahModel:
    other = model.reconfigure(
        iter_attention_mode=mode, max_iter=passes, iter_decider_kwargs={**model.tah.iter_decider_kwargs, "max_iter": passes}
    )
    other.decider.load_state_dict(model.decider.state_dict())
    other.set_threshold(0.5)
    return other.eval()


@pytest.mark.parametrize("passes", [2, 3])
@pytest.mark.parametrize("mode", ["duo", "root", "same_iter"])
def test_prefill_and_steps_equal_one_forward(model, mode, passes):
    deep = variant(model, mode, passes)
    done = decode(deep, PROMPTS, forced=FORCED, keep_logits=True)
    assert int(done.iterations.max()) == passes
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt + FORCED[row].tolist()])
        with torch.no_grad():
            whole = deep(ids, return_logits=True)
        torch.testing.assert_close(done.logits[row], whole.logits[0, len(prompt) - 1 :], **CLOSE)
        assert done.iterations[row, : ids.shape[1]].tolist() == whole.iterations[0].tolist()


def test_an_adapter_of_other_settings_is_another_adapter(model):
    kept, made = (model.reconfigure(adapter_kwargs={**model.tah.adapter_kwargs, **more}) for more in ({}, {"r": 3}))
    assert kept.lora is model.lora and made.lora.rank == 3


def test_the_mode_of_attention_matters(model):
    runs = [decode(variant(model, mode, 2), PROMPTS, forced=FORCED, keep_logits=True).logits for mode in ("duo", "root", "same_iter")]
    assert all(
        not torch.allclose(first, second, atol=1e-2) for first, second in ((runs[0], runs[1]), (runs[0], runs[2]), (runs[1], runs[2]))
    )


def test_padding_on_either_side_changes_nothing(model):
    ids, mask = INPUTS["prompt_ids"], INPUTS["prompt_mask"]
    with torch.no_grad():
        left = model(ids, mask, return_logits=True)
        right = model(ids.flip(1), mask.flip(1), return_logits=True)
        for row, prompt in enumerate(PROMPTS):
            alone = model(torch.tensor([prompt]), return_logits=True)
            torch.testing.assert_close(left.logits[row, mask[row].bool()], alone.logits[0], **CLOSE)
            assert left.iterations[row, mask[row].bool()].tolist() == alone.iterations[0].tolist()
            backwards = model(torch.tensor([prompt[::-1]]), return_logits=True)
            torch.testing.assert_close(right.logits[row, : len(prompt)], backwards.logits[0], **CLOSE)


def test_greedy_generation_equals_recomputing_everything(model):
    done = decode(model, PROMPTS, max_new_tokens=12)
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), return_logits=True).logits[0, -1].argmax()))
        assert done.tokens[row].tolist() == ids[len(prompt) :]


@pytest.mark.parametrize("policy", ["decider", "never", "always", "oracle"])
@pytest.mark.parametrize("sampling", [None, OFFICIAL])
def test_answers_do_not_depend_on_the_batch(model, policy, sampling):
    reference = Reference(changed(model))
    options = {"sampling": sampling, "max_new_tokens": 10, "policy": policy, "reference": reference, "seed": 3}
    together = generate(model, PROMPTS, 2, **options)
    for number, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], 2, first=number, **options)
        assert [row.ids for row in alone.rows] == [row.ids for row in together.rows[2 * number : 2 * number + 2]]
        assert [row.iterations for row in alone.rows] == [row.iterations for row in together.rows[2 * number : 2 * number + 2]]


def changed(model: TahModel):
    other = copy.deepcopy(model.backbone)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    return other


def test_the_oracle_continues_where_the_reference_disagrees(model):
    reference = Reference(changed(model))
    decider = decider_for_policy(model, "oracle", reference)
    run = generate(model, PROMPTS, policy="oracle", reference=reference, max_new_tokens=10)
    assert 1 < run.passes_per_token < 2
    for row in run.rows:
        ids = torch.tensor([row.prompt + row.ids])
        with torch.no_grad():
            one = decider_for_policy(model, "never")
            first = model(ids, decider=one, return_logits=True).logits.argmax(-1)
            assert model(ids, decider=decider).iterations[0, :-1].tolist() == row.iterations[:-1]
        assert row.iterations[:-1] == (1 + (first != reference.tokens(ids)).long())[0, :-1].tolist()


def test_the_oracle_of_a_recipe_loads_its_reference(model, tmp_path):
    changed(model).save_pretrained(tmp_path)
    kwargs = {"eval_iter_decider": "OracleDynamicIterDecider", "eval_iter_decider_kwargs": {"model": str(tmp_path)}}
    named = generate(model.reconfigure(**kwargs).eval(), PROMPTS, max_new_tokens=6)
    given = generate(model, PROMPTS, policy="oracle", reference=Reference(changed(model)), max_new_tokens=6)
    assert [row.ids for row in named.rows] == [row.ids for row in given.rows] and named.passes_per_token == given.passes_per_token > 1


def test_an_oracle_errs_at_the_rates_it_is_given(model):
    settings = OracleSettings(max_iter=2, false_positive_rate=0.3, false_negative_rate=0.2)
    n, decider = 20000, OracleDecider(settings)
    wrong = torch.arange(n) % 2 == 0
    again, _ = decider(Seen(1, n, guess=wrong.long(), wanted=torch.zeros(n, dtype=torch.long)))
    assert float(again[wrong].float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float(again[~wrong].float().mean()) == pytest.approx(0.3, abs=0.02)


def test_rows_do_not_wait_for_each_other(model):
    done = decode(model, PROMPTS, max_new_tokens=20)
    needed = [int(done.iterations[row, len(prompt) : len(prompt) + 19].sum()) for row, prompt in enumerate(PROMPTS)]
    assert done.steps == max(needed), "a batch takes the passes of its longest row"


def test_stop_tokens_end_rows_and_are_not_kept(model):
    free = decode(model, PROMPTS, max_new_tokens=16)
    stop = int(free.tokens[0, 5])
    done = decode(model, PROMPTS, max_new_tokens=16, stops=[stop])
    for row in range(3):
        said = free.tokens[row].tolist()
        wanted = said[: said.index(stop)] if stop in said else said
        assert done.answers()[row] == wanted and int(done.finish[row]) == (stop not in said)


def test_always_and_never_bound_the_passes(model):
    never, always = (
        decode(model, PROMPTS, decider=NeverDecider(), max_new_tokens=6),
        generate(model, PROMPTS, policy="always", max_new_tokens=6),
    )
    assert set(never.iterations.unique().tolist()) <= {0, 1} and always.passes_per_token == 2
    assert isinstance(decider_for_policy(model, "always"), AlwaysDecider)


def test_the_trace_holds_every_pass(model):
    run = generate(model, PROMPTS, sampling=OFFICIAL, max_new_tokens=8, candidates=5)
    trace = run.trace()
    read = trace.tokens.dropna(subset=["iterations"])
    assert len(trace.passes) == int(read.iterations.sum())
    deep = trace.passes[trace.passes.depth == 2].set_index(["question", "sample", "pos"]).index
    assert set(read[read.iterations == 2].set_index(["question", "sample", "pos"]).index) == set(deep)
    threshold = trace.meta["threshold"]
    assert ((read.decider_prob > threshold) == (read.iterations == 2)).all()
    assert trace.passes.top_probs.map(len).eq(5).all()


def test_unusable_requests_are_refused(model):
    with pytest.raises(SettingsError, match="Did you mean 'always'"):
        generate(model, PROMPTS, policy="allways")
    with pytest.raises(SettingsError, match="reference model"):
        generate(model, PROMPTS, policy="oracle")
    with pytest.raises(DataError, match="without a single token"):
        generate(model, [[]])
