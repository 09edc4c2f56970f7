"""COCONUT on every backbone, its stages in training, its files, and LatentTTS's release of it."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lab.data.examples import Example
from lab.errors import CheckpointError, SettingsError
from lab.latent.plan import IGNORE, collate
from lab.methods.coconut.checkpoint import export_official
from lab.methods.coconut.config import CoconutSettings, Schedule
from lab.methods.coconut.data import prepare, training_row
from lab.methods.coconut.model import CoconutModel
from lab.methods.coconut.objective import exact, labelled, loss, run
from lab.methods.coconut.policy import generate
from lab.methods.coconut.train import train
from lab.models.backbones import load_backbone
from lab.models.layouts import load, load_arms
from lab.models.tokenizers import byte_tokenizer
from lab.train import TrainSettings

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXAMPLES = [Example(str(i), f"{i}+{i + 1}+{i}?", (f"{2 * i + 1}", f"{3 * i + 1}"), str(3 * i + 1)) for i in range(8)]


def fresh(arch: str = "gpt2", **settings) -> CoconutModel:
    tokenizer = byte_tokenizer()
    return CoconutModel.start(load_backbone(f"toy:{arch}-micro", vocab_size=len(tokenizer)), tokenizer, CoconutSettings(**settings)).eval()


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2", "qwen3"])
def test_padded_batch_equals_single_rows(arch: str):
    model = fresh(arch, c_thought=2, pad_latent_to_max=False)
    kept = prepare(EXAMPLES, model.tokenizer).rows
    rows = [training_row(kept[i], stage, model.config) for i, stage in ((0, 0), (3, 2), (5, 1), (7, 4))]
    whole, together = collate(rows), 0.0
    value, _ = loss(model, whole)
    value.backward()
    padded = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row in rows:
        single = collate([row])
        part = loss(model, single)[0] * labelled(single) / labelled(whole)
        part.backward()
        together += part.item()
    assert together == pytest.approx(value.item(), rel=1e-6)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, padded[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_thoughts_in_training_are_those_of_inference(arch: str):
    model = fresh(arch, c_thought=2, stage=2)
    kept = prepare(EXAMPLES[:4], model.tokenizer).rows
    done = run(model, collate([training_row(row, 2, model.config) for row in kept]))
    found = generate(model, EXAMPLES[:4], max_new_tokens=2, vectors=True)
    torch.testing.assert_close(torch.stack(found.vectors), done.inputs.detach(), atol=2e-5, rtol=2e-5)


def test_new_tokens_start_as_copies_in_the_official_order():
    model = fresh()
    s, table = model.config, model.backbone.get_input_embeddings().weight
    assert (s.start_id, s.end_id, s.latent_id) == tuple(len(model.tokenizer) - 3 + i for i in range(3))
    torch.testing.assert_close(table[s.start_id], table[: s.start_id].mean(0), atol=1e-6, rtol=0)
    copied = CoconutModel.start(load_backbone("toy:gpt2-micro", vocab_size=257), byte_tokenizer(), CoconutSettings(), like="<")
    table = copied.backbone.get_input_embeddings().weight
    assert torch.equal(table[copied.config.latent_id], table[ord("<")])
    assert fresh(mode="cot").backbone.get_input_embeddings().weight.shape[0] == 258


def small(**settings) -> TrainSettings:
    return TrainSettings(**{"steps": 1, "global_batch": 4, "lr": 3e-3, "schedule": "constant", "save_every": 0, **settings})


def test_stages_and_optimizers_follow_the_schedule(tmp_path: Path):
    model = fresh(c_thought=1, epochs_per_stage=2, max_latent_stage=1)
    kept = prepare(EXAMPLES, model.tokenizer).rows
    log = []
    found = train(model, kept, kept[:2], Schedule(epochs=6), small(log_every=1), tmp_path, lambda **row: log.append(row))
    assert [(part.stage, part.steps) for part in found] == [(0, 4), (1, 4), (2, 4)]
    assert model.config.stage == 2 and found[-1].loss < found[0].loss
    assert [row["stage"] for row in log if "loss" in row] == [0] * 4 + [1] * 4 + [2] * 4
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 13))
    assert generate(model, EXAMPLES[:2], max_new_tokens=2).rows[0].thoughts == 1


def test_a_stage_ends_early_when_it_is_learned(tmp_path: Path):
    model = fresh(mode="coconut", c_thought=1, epochs_per_stage=300, max_latent_stage=0)
    kept = prepare(EXAMPLES[:2], model.tokenizer).rows
    schedule = Schedule(epochs=300, switch_at=1.0)
    found = train(model, kept, kept, schedule, small(global_batch=2, eval_every=20), tmp_path)
    assert found[0].exact == 1.0 == exact(model, [training_row(row, 0, model.config) for row in kept])
    assert found[0].steps < 300 and found[0].steps % 20 == 0


def test_a_killed_training_ends_as_an_unbroken_one(tmp_path: Path):
    def go(folder: Path, model: CoconutModel) -> CoconutModel:
        kept = prepare(EXAMPLES, model.tokenizer).rows
        train(model, kept, kept[:2], Schedule(epochs=4), small(save_every=2), folder)
        return model

    settings = dict(c_thought=1, epochs_per_stage=2, max_latent_stage=1, uniform_prob=0.3)
    unbroken = go(tmp_path / "a", fresh(**settings))

    class Killed(Exception):
        pass

    def kill(**row):
        if row["step"] == 6:
            raise Killed

    model = fresh(**settings)
    kept = prepare(EXAMPLES, model.tokenizer).rows
    with pytest.raises(Killed):
        train(model, kept, kept[:2], Schedule(epochs=4), small(save_every=2, log_every=1), tmp_path / "b", kill)
    resumed = go(tmp_path / "b", fresh(**settings))
    for ours, theirs in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_saved_model_is_the_same(tmp_path: Path):
    model = fresh(c_thought=2, stage=3)
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.config == model.config and again.method == "coconut"
    want, found = (generate(m, EXAMPLES[:3], max_new_tokens=5) for m in (model, again))
    assert [row.ids for row in found.rows] == [row.ids for row in want.rows] and found.rows[0].thoughts == 6


@pytest.mark.parametrize("mode", ["coconut", "cot"])
def test_official_layout_round_trip(mode: str, tmp_path: Path):
    model = fresh(mode=mode, thoughts=2 if mode == "coconut" else None)
    path = export_official(model, tmp_path / "checkpoint_7")
    keys = set(torch.load(path, weights_only=True))
    assert ("embedding.weight" in keys) == (mode == "coconut") == all(key.startswith(("base_causallm.", "embedding")) for key in keys)
    known = dict(thoughts=2) if mode == "coconut" else {}
    for place in (path, tmp_path):
        again = load(place, heads=2, tokenizer=model.tokenizer, **known)
        assert again.config.mode == mode
        assert [again.config.start_id, again.config.latent_id] == [model.config.start_id, model.config.latent_id]
        want, found = (generate(m, EXAMPLES[:2], max_new_tokens=5) for m in (model, again))
        assert [row.ids for row in found.rows] == [row.ids for row in want.rows]


def test_official_state_dict_of_the_fixture(caplog):
    with caplog.at_level(logging.WARNING):
        model = load(FIXTURES / "coconut" / "state_dict.safetensors", heads=4)
    s = model.config
    assert (s.start_id, s.end_id, s.latent_id, s.eos_id, s.thoughts) == (93, 94, 95, 92, 6) and "thoughts" in caplog.text
    case = json.loads((FIXTURES / "coconut" / "cases.json").read_text())["generate"]["g2"]
    found = generate(model, [case["input_ids"][:12]], thoughts=2, max_new_tokens=12, compat="coconut")
    assert [*case["input_ids"], *found.rows[0].ids] == case["output_ids"]


def test_files_that_are_wrong_are_refused(tmp_path: Path):
    state = load_file(FIXTURES / "coconut" / "state_dict.safetensors")
    with pytest.raises(SettingsError, match="heads"):
        load(FIXTURES / "coconut" / "state_dict.safetensors", thoughts=6)
    save_file(state | {"embedding.weight": state["base_causallm.transformer.wte.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"embedding.weight"):
        load(tmp_path, heads=4, thoughts=6)
    state.pop("base_causallm.transformer.h.1.ln_1.bias")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"h.1.ln_1.bias"):
        load(tmp_path, heads=4, thoughts=6)


def test_a_checkpoint_that_would_run_code_is_not_opened(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"base_causallm.x": Evil()}, tmp_path / "checkpoint_1")
    with pytest.raises(CheckpointError, match="would run code"):
        load(tmp_path / "checkpoint_1")
    assert not (tmp_path / "owned").exists()


def test_latent_tts_release_generates_as_its_own_code(tmp_path: Path):
    (tmp_path / "config.json").write_text((FIXTURES / "latenttts" / "coconut_config.json").read_text())
    save_file(load_file(FIXTURES / "latenttts" / "coconut_state.safetensors"), tmp_path / "model.safetensors")
    model = load(tmp_path, thoughts=6)
    numbers = load_file(FIXTURES / "latenttts" / "coconut_generation.safetensors")
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(numbers["input_ids"], numbers["attention_mask"], strict=True)]
    found = generate(model, prompts, max_new_tokens=13, vectors=True)
    torch.testing.assert_close(torch.stack(found.vectors), numbers["det.latent_thoughts"], atol=5e-5, rtol=0)
    for row, want in zip(found.rows, numbers["det.sequences"][:, 10:].tolist(), strict=True):
        said = [63] * 6 + [62, *row.ids, *([60] if row.finish == "stop" else [])]
        assert said == want[: len(said)]
    with pytest.raises(CheckpointError, match="vocabulary"):
        config = json.loads((tmp_path / "config.json").read_text()) | {"latent_id": -1}
        (tmp_path / "config.json").write_text(json.dumps(config))
        load(tmp_path, thoughts=6)


def test_trace_tells_thoughts_and_candidates():
    model = fresh(c_thought=1, stage=2, max_latent_stage=2)
    trace = generate(model, EXAMPLES[:3], samples=2, max_new_tokens=4, top=5).trace(EXAMPLES[:3])
    assert len(trace.samples) == 6 and set(trace.samples["gold"]) == {e.answer for e in EXAMPLES[:3]}
    first = trace.thoughts[(trace.thoughts["question"] == 0) & (trace.thoughts["sample"] == 0)]
    assert list(first["step"]) == [0, 1, 2] and all(len(texts) == 5 for texts in first["top_texts"])
    assert first["norm"].iloc[:2].gt(0).all() and first["norm"].iloc[2:].isna().all()
    assert first["similarity"].isna().tolist() == [True, False, True] and abs(first["similarity"].iloc[1]) <= 1
    roles = trace.tokens[(trace.tokens["question"] == 1) & (trace.tokens["sample"] == 0)]["role"].tolist()
    assert roles.count("thought") == 2 and roles.index("thought") > roles.index("prompt")


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_rows_with_different_numbers_of_thoughts_share_a_batch(arch: str):
    model = fresh(arch, c_thought=1, max_latent_stage=3, stage=9, pad_latent_to_max=False)
    ragged = [Example(str(i), "q " * (1 + 3 * i), tuple("s" * i), "1") for i in (0, 3, 1, 5, 2)]
    together = generate(model, ragged, max_new_tokens=6, vectors=True)
    assert [row.thoughts for row in together.rows] == [3, 3, 1, 3, 2]  # without written steps nothing says how many: as many as stages
    for index, example in enumerate(ragged):
        alone = generate(model, [example], max_new_tokens=6, vectors=True)
        assert alone.rows[0].ids == together.rows[index].ids
        torch.testing.assert_close(alone.vectors[0], together.vectors[index], atol=1e-5, rtol=1e-5)


def test_samples_share_their_prompt_and_do_not_depend_on_the_batch():
    from lab.latent.sampling import Sampling

    model = fresh(c_thought=1, stage=2, max_latent_stage=2)
    ask = dict(sampling=Sampling(temperature=1.0), max_new_tokens=5, seed=3)
    many = generate(model, EXAMPLES[:3], samples=6, batch=64, **ask)
    few = generate(model, EXAMPLES[:3], samples=2, batch=2, **ask)
    chosen = [row.ids for row in many.rows if row.sample < 2]
    assert chosen == [row.ids for row in few.rows] and len({tuple(row.ids) for row in many.rows[:6]}) > 1
    later = generate(model, EXAMPLES[2:3], samples=2, first=2, **ask)
    assert [row.ids for row in later.rows] == chosen[4:] and later.rows[0].question == 2


def test_gradient_checkpointing_is_refused(tmp_path: Path):
    model = fresh(c_thought=1)
    kept = prepare(EXAMPLES, model.tokenizer).rows
    with pytest.raises(SettingsError, match="fed back"):
        train(model, kept, kept, Schedule(epochs=1), small(gradient_checkpointing=True), tmp_path)


@pytest.mark.parametrize("arm", ["cot", "no_thoughts"])
def test_the_written_and_the_thoughtless_arm_train_and_answer(arm: str, tmp_path: Path):
    """cot keeps every step and has no stage; no_thoughts drops steps stage by stage and puts nothing in their place."""
    from lab.data.source import Source
    from lab.methods.coconut import stages

    source = Source.check(benchmark="permutations", hops=2, train_problems=64, test_problems=20, seed=0)
    problems = source.train()
    s, schedule = CoconutSettings(c_thought=1, epochs_per_stage=1, max_latent_stage=2), Schedule(epochs=4)
    how, rows = TrainSettings(steps=1, global_batch=16, save_every=0), []
    toy = dict(layers=1, initializer_range=0.1)
    found = stages.run_arm(
        arm, source, problems, s, schedule, how, tmp_path, lambda **row: rows.append(row), backbone="toy:gpt2-micro", **toy
    )
    assert found["steps"] == 16 and [row["stage"] for row in rows][-1] == (3 if arm == "no_thoughts" else 0)
    model = load_arms(tmp_path, stages.ARMS)[arm]
    assert model.config.mode == arm and model.config.start_id == -1
    answers = model.generate(source.held_out()[:4], max_new_tokens=8)
    assert all(row.thoughts == 0 and len(row.ids) <= 8 for row in answers.rows)
    row = prepare(problems, model.tokenizer).rows[0]
    labels = training_row(row, model.config.stage, model.config).labels
    written = sum(map(len, row.steps)) + len(row.answer) if arm == "cot" else len(row.answer)
    assert sum(label != IGNORE for label in labels) == written
