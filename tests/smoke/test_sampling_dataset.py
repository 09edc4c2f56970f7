"""Sampling, labelling, scoring and searching a data set: resumable, sharded, the same whatever the batch; files as the official ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PhiConfig, PhiForCausalLM

from lab.data.examples import Dataset
from lab.errors import CheckpointError, DataError, RunError, SettingsError
from lab.files import append_line
from lab.latent.draws import Keyed
from lab.latent.loop import Budget, Prompt
from lab.methods.coconut.model import CoconutModel
from lab.methods.colar import toy as colar
from lab.methods.colar.config import ColarSettings
from lab.methods.latenttts import toy
from lab.methods.latenttts.checkpoint import export_release
from lab.methods.latenttts.config import RewardTraining
from lab.methods.latenttts.model import RewardModel
from lab.methods.latenttts.objective import RewardLoss, collate, recalls, train
from lab.models.layouts import load
from lab.sampling.beam import Beam, beam_search
from lab.sampling.curves import against_vote, curves, passes
from lab.sampling.labels import Labelling, label
from lab.sampling.pool import Evaluated, Pool, sample
from lab.sampling.records import Asked, Layout, dropped_in, read, write
from lab.sampling.sampler import Sampler, thinker
from lab.sampling.search import search, tree_trace
from lab.train import TrainSettings

BUDGET = {"max_new_tokens": 3, "chunk": 4}
NOISE = Sampler(by="noise", strength=2.0)
FIXTURES = Path(__file__).parents[1] / "fixtures" / "latenttts"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy.generator(3, tmp_path_factory.mktemp("generator"), steps=30, stop_at=0.4)[0].eval()


@pytest.fixture(scope="module")
def data():
    return toy.questions("test", 10, 0)


@pytest.fixture(scope="module")
def pool(model, data, tmp_path_factory):
    return sample(model, data, NOISE, 6, tmp_path_factory.mktemp("pool"), **BUDGET)


def same(a, b):
    for one, two in zip(a, b, strict=True):
        assert (one.number, one.prompt, one.texts, one.answers) == (two.number, two.prompt, two.texts, two.answers)
        torch.testing.assert_close(one.thoughts, two.thoughts, atol=5e-5, rtol=0)


@pytest.mark.parametrize("sampler", [NOISE, Sampler(by="dropout", strength=0.3), Sampler(by="dropout", strength=0.3, regime="vote")])
def test_fewer_samples_are_the_first_of_many_and_the_batch_does_not_matter(model, data, tmp_path, sampler):
    many = sample(model, data, sampler, 5, tmp_path / "many", **BUDGET)
    few = sample(model, data, sampler, 2, tmp_path / "few", batch=3, **{**BUDGET, "chunk": 7})
    same(few.asked, many.first(2))
    assert (many.asked[0].thoughts[0] - many.asked[0].thoughts[1]).abs().max() > 1e-3


def test_shards_and_a_killed_run_give_the_same_samples(model, data, pool, tmp_path):
    for shard in ((0, 2), (1, 2)):
        sample(model, data, NOISE, 6, tmp_path, shard=shard, **BUDGET)
    same(Pool(tmp_path).asked, pool.asked)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors") if path != gone}
    gone.unlink()
    assert not Pool(tmp_path).complete
    same(sample(model, data, NOISE, 6, tmp_path, **BUDGET).asked, pool.asked)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}, "finished files are not made again"


def test_a_folder_of_other_samples_is_left_alone(model, data, pool):
    with pytest.raises(RunError, match="another n"):
        sample(model, data, NOISE, 7, pool.folder, **BUDGET)
    with pytest.raises(SettingsError, match="holds 6 samples a question; sample again"):
        pool.first(7)
    with pytest.raises(SettingsError, match="makes all samples equal"):
        Sampler.check(by="noise", strength=0.0)
    with pytest.raises(SettingsError, match="makes all samples equal"):
        Sampler.check(by="dropout", strength=-0.1)


def test_curves_are_monotone_in_coverage_and_end_at_pass_at_n(pool):
    rows = {(row["subset"], row["measure"], row["n"]): row for row in curves(pool)}
    covered = [rows["all", "coverage", n]["mean"] for n in (1, 2, 4, 6)]
    assert covered == sorted(covered) and covered[-1] > covered[0]
    assert covered[-1] == pytest.approx(passes(pool, [6])[0]["mean"])
    assert rows["mixed", "coverage", 6]["mean"] == 1.0 and 0 < rows["mixed", "mean", 6]["mean"] < 1


def test_a_perfect_score_makes_best_of_n_the_coverage(pool):
    perfect = {question.number: question.corrects.float().tolist() for question in pool.asked}
    rows = {(row["subset"], row["measure"], row["n"]): row["mean"] for row in curves(pool, scores=perfect)}
    assert all(rows["all", "best of N", n] == rows["all", "coverage", n] for n in (1, 2, 4, 6))
    worst = {number: [-value for value in values] for number, values in perfect.items()}
    assert against_vote(pool, worst).mean <= against_vote(pool, perfect).mean


HOW = Labelling(rollouts=3, drop_all_wrong=False, drop_all_right=False, answer=3)


@pytest.mark.parametrize("sampler", [NOISE, Sampler(by="dropout", strength=0.3, regime="annotation")])
def test_labels_do_not_depend_on_the_batch_and_agree_with_the_verdict_at_the_end(model, pool, tmp_path, sampler):
    wide = label(model, pool, sampler, HOW, tmp_path / "wide")
    narrow = label(model, pool, sampler, Labelling(**{**vars(HOW), "batch": 3}), tmp_path / "narrow", shard=(0, 1))
    for a, b in zip(wide, narrow, strict=True):
        torch.testing.assert_close(a.labels, b.labels)
        assert a.labels.shape == (6, 3) and set((a.labels * 3).round(decimals=4).flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0}
        if sampler is NOISE:
            torch.testing.assert_close(a.labels[:, -1], a.corrects.float())


def test_completions_draw_what_the_samples_draw(model, pool, data, tmp_path):
    """Words at a temperature, or CoLaR's own thoughts and end: labels between 0 and 1, at the last thought too."""
    drawn, how = Sampler(by="own", temperature=1.5), Labelling(**{**vars(HOW), "rollouts": 8})
    labels = torch.cat([q.labels for q in label(model, pool, drawn, how, tmp_path / "words")])
    assert bool(((labels[:, -1] > 0) & (labels[:, -1] < 1)).any())
    thinks = colar.untrained("toy:llama", 0, ColarSettings.check(lora_r=0, max_compression_factor=3, lp_intermediate_size=32))
    own = sample(thinks, colar.examples("test", 4, 0), Sampler(by="own"), 3, tmp_path / "pool", thoughts=6, max_new_tokens=3)
    seen = []

    class Seen(Sampler):
        def wrap(self, policy):
            seen.append((policy.latent_temperature, policy.end_temperature))
            return super().wrap(policy)

    label(thinks, own, Seen(by="own"), HOW, tmp_path / "thoughts")
    assert set(seen) == {(1.0, 1.0)}
    with pytest.raises(SettingsError, match="temperature above 0"):
        sample(model, data, Sampler(by="own"), 2, tmp_path / "equal")
    with pytest.raises(SettingsError, match="makes them all alike"):
        search(model, RewardModel.start(model), pool.asked, drawn, 2, 2, tmp_path, rule="latenttts-coconut")


def test_completions_of_the_annotation_regime_are_answered_under_dropout(model, pool, tmp_path):
    heavy = [Sampler(by="dropout", strength=0.6, regime=regime) for regime in ("annotation", "annotation-rollouts")]
    ours, official = (label(model, pool, sampler, HOW, tmp_path / sampler.regime) for sampler in heavy)
    assert ours and all(torch.equal(a.labels, b.labels) for a, b in zip(ours, official, strict=True))


def test_shards_and_a_killed_annotation_give_the_same_labels(model, pool, tmp_path):
    whole = label(model, pool, NOISE, HOW, tmp_path / "whole")
    for shard in ((0, 2), (1, 2)):
        parts = label(model, pool, NOISE, HOW, tmp_path / "parts", shard=shard)
    gone = sorted((tmp_path / "parts").glob("*.safetensors"))[1]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.safetensors") if path != gone}
    gone.unlink()
    again = label(model, pool, NOISE, HOW, tmp_path / "parts")
    assert kept == {path: path.stat().st_mtime_ns for path in kept}, "finished files are not made again"
    for one, two, three in zip(whole, parts, again, strict=True):
        torch.testing.assert_close(one.labels, two.labels)
        torch.testing.assert_close(one.labels, three.labels)
    with pytest.raises(RunError, match="another labelling"):
        label(model, pool, NOISE, Labelling(**{**vars(HOW), "rollouts": 2}), tmp_path / "parts")


def test_a_piece_is_the_same_whatever_the_others_have_sampled_already(model, pool, tmp_path):
    for path in (pool.folder / "sampling.json", *pool.folder.glob("[02]_on*")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    plain = Labelling(0, drop_all_right=False, drop_all_wrong=False)
    assert [q.number for q in label(model, Pool(tmp_path), NOISE, plain, tmp_path / "labels", shard=(0, 2))] == [0, 1, 2, 3, 8, 9]


def test_questions_that_teach_nothing_leave_a_mark(model, pool, tmp_path):
    kept = label(model, pool, NOISE, Labelling(rollouts=2, answer=3), tmp_path)
    assert {q.number for q in kept} == {q.number for q in pool.asked if q.mixed}
    assert sorted(dropped_in(tmp_path) + [q.number for q in kept]) == list(range(10))


def test_files_of_the_official_code_are_read(pool, tmp_path):
    ours = load_file(next(iter(sorted(pool.folder.glob("*.safetensors")))))
    bare = {name: value for name, value in ours.items() if not name.endswith("counts")}
    save_file({**bare, "77.input_ids": torch.zeros((), dtype=torch.long)}, tmp_path / "3_on0.safetensors")
    latent = toy.untrained(3).config.latent_id
    with pytest.raises(DataError, match="latent="):
        list(read(tmp_path / "3_on0.safetensors"))
    again = list(read(tmp_path / "3_on0.safetensors", latent))
    assert [q.prompt for q in again] == [q.prompt for q in pool.asked[:4]] and dropped_in(tmp_path) == [77]
    assert all(bool((one.corrects == two.corrects).all()) for one, two in zip(again, pool.asked[:4], strict=True))


def test_rows_are_cut_behind_the_first_end_and_the_official_loss_divides_by_that_width(tmp_path):
    said = {"answers": [None] * 3, "texts": [""] * 3, "ids": [[7, 8], [9], [5, 6, 7, 8]], "facts": {"finish": ["stop", "stop", "length"]}}
    asked = Asked(4, [1, 2, 3], torch.zeros(3, 2, 8), torch.full((3,), 2), torch.ones(3, dtype=torch.bool), **said)
    path = write(tmp_path / "0_on0.safetensors", [asked], Layout(latent=63, closing=(62,), pad=60))
    begin = [1, 2, 3, 63, 63, 62]
    assert load_file(path)["4.input_ids"].tolist() == [[*begin, 7, 8], [*begin, 9, 60], [*begin, 5, 6]]
    again = next(read(path))
    assert again.ids == asked.ids and collate([again]).length == 8


@pytest.fixture(scope="module")
def judged(model, pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    reward = RewardModel.start(model, seed=1)
    settings = TrainSettings.check(steps=6, global_batch=4, lr=3e-3, save_every=0, device="cpu")
    asked = label(model, pool, NOISE, HOW, folder / "labels")
    result = train(reward, asked, asked, settings, RewardTraining(evals_per_epoch=1), folder)
    assert result.best["score"] >= recalls(RewardModel.start(model, seed=1), asked)["test_n_4_recall_at_1"] - 1
    return reward, asked


def test_the_same_samples_are_the_same_bytes(tmp_path):
    asked = Asked(0, [1, 2], torch.randn(2, 3, 4), torch.tensor([3, 3]), torch.tensor([True, False]), ids=[[5], [6]])
    contents = {write(tmp_path / "0_on0.safetensors", [asked], Layout(latent=9)).read_bytes() for _ in range(20)}
    assert len(contents) == 1


def test_training_changes_every_part_and_not_the_generator(model, judged):
    reward, asked = judged
    fresh = RewardModel.start(model, seed=1)
    assert not torch.equal(fresh.parts.classifier.weight, reward.parts.classifier.weight)
    assert torch.equal(fresh.backbone.get_input_embeddings().weight, model.backbone.get_input_embeddings().weight)
    scores = reward.score(asked)
    alone = reward.score(asked[2:3], batch=2)[0]
    torch.testing.assert_close(scores[2], alone, atol=5e-5, rtol=0)


def test_the_generators_dropout_is_off_while_its_reward_model_learns(pool):
    reward = RewardModel.start(toy.untrained(3, dropout=0.3)).train()
    batch = collate(pool.asked[:2])
    one, two = (RewardLoss()(reward, batch)[0] for _ in range(2))
    assert one.requires_grad and torch.equal(one, two)


def test_short_chains_are_scored_as_if_they_were_alone(model, judged):
    reward, asked = judged
    question = asked[0].first(2)
    question.counts = torch.tensor([3, 1])
    scores, batch = reward.score([question])[0], collate([question])
    assert scores[1, 1:].isnan().all() and batch.labels[0, 1, 1:].isnan().all()
    torch.testing.assert_close(scores[:, 0], reward.score([asked[0]])[0][:2, 0], atol=5e-5, rtol=0)


def test_reward_models_come_back_from_both_layouts(judged, tmp_path):
    reward, asked = judged
    want = reward.score(asked)
    for folder in (reward.save(tmp_path / "own"), export_release(reward, tmp_path / "release")):
        found = load(folder)
        assert found.method == "latenttts"
        for a, b in zip(found.score(asked), want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    with pytest.raises(SettingsError, match="answers nothing"):
        found.generate(["1 max 2"])


def test_the_released_reward_model_loads(tmp_path):
    state = load_file(FIXTURES / "rm_state.safetensors")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((FIXTURES / "rm_config.json").read_text())
    reward = load(tmp_path)
    assert reward.config.generator == "coconut" and reward.config.fingerprint == ""
    torch.testing.assert_close(reward.parts.classifier.weight, state["classifier.weight"])
    assert json.loads((FIXTURES / "rm_config.json").read_text())["n_embd"] == reward.scorer.classifier.in_features


def test_beam_search_over_a_data_set_resumes(model, judged, pool, tmp_path):
    reward, _ = judged
    told = {"rule": "latenttts-coconut", "answer": 3}
    whole = search(model, reward, pool.asked, NOISE, 2, 3, tmp_path / "a", batch=100, **told)
    search(model, reward, pool.asked[:4], NOISE, 2, 3, tmp_path / "b", batch=7, **told)
    parts = search(model, reward, pool.asked, NOISE, 2, 3, tmp_path / "b", batch=7, **told)
    assert [(line["number"], line["text"]) for line in whole] == [(line["number"], line["text"]) for line in parts]
    samples = tree_trace(whole[0], pool.asked[0]).samples
    assert samples["parent"].tolist()[:2] == [-1, -1] and len(samples) == 6
    assert set(samples["parent"].tolist()[2:]) <= {0, 1, 2, 3} and samples["answer"].tolist().count("") >= 5


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_a_beam_is_worth_what_its_thoughts_are_as_a_sample(model, pool, loss):
    reward, asked = RewardModel.start(model, loss, seed=1).eval(), pool.asked[:3]
    with torch.no_grad():
        reward.parts.classifier.weight.mul_(50)
    policy = NOISE.wrap(thinker(model, 3))
    prompt, draws = (
        Prompt.of_ids(model.decoder, [q.prompt for q in asked]),
        Keyed.of(0, torch.arange(3).repeat_interleave(6), torch.arange(18)),
    )
    how = Beam(beams=2, candidates=3, thoughts=3)
    found = beam_search(model.decoder, policy, reward.scorer, prompt, draws, how, Budget(thoughts=3, answer=3))
    kept = [
        Asked(q.number, q.prompt, paths, torch.tensor([3, 3]), torch.zeros(2).bool())
        for q, paths in zip(asked, found.thoughts, strict=True)
    ]
    sums = torch.stack([steps.sum(-1) for steps in reward.score(kept)])
    torch.testing.assert_close(found.scores, sums, atol=1e-4, rtol=1e-5)
    assert bool((sums < 0).all()) or loss == "ce", "log-sigmoids"


def test_a_reward_model_of_another_generator_is_refused(judged):
    reward, _ = judged
    with pytest.raises(CheckpointError, match="with other weights"):
        reward.check_for(toy.untrained(4))
    with pytest.raises(CheckpointError, match="another backbone"):
        reward.check_for(toy.untrained(3, operators=2, hidden=32))


def test_training_without_labels_says_so(model, tmp_path):
    with pytest.raises(DataError, match="all were dropped"):
        train(RewardModel.start(model), [], [], TrainSettings.check(steps=1), RewardTraining(), tmp_path)


def test_thoughts_cut_by_their_budget_are_answered_marked_and_told_of(tmp_path, caplog):
    thinker = colar.untrained("toy:llama", 0, ColarSettings.check(max_compression_factor=2, lp_intermediate_size=16, lora_r=0)).eval()
    asked = colar.examples("test", 3, 0)
    pool = sample(thinker, asked, Sampler(by="noise", strength=0.01), 2, tmp_path, thoughts=2, max_new_tokens=4)
    assert all(q.facts["capped"] == [True, True] and q.counts.tolist() == [2, 2] and all(q.ids) for q in pool.asked)
    assert "6 of 6 samples in" in caplog.text and "budget of thoughts was spent" in caplog.text


def test_a_spent_answer_budget_is_marked_and_nothing_is_lost(model, data, tmp_path):
    short = Dataset("maxmin", "test", tuple(data[:2]), "")
    pool = sample(model, short, NOISE, 2, tmp_path, max_new_tokens=1)
    assert all(q.facts["finish"] == ["length", "length"] and q.answers == [None, None] for q in pool.asked)
    assert {row["mean"] for row in curves(pool) if row["measure"] == "vote"} == {0.0}


def test_votes_and_coverage_of_an_evaluation_of_any_method(tmp_path):
    verdicts = {"a": [True, False, False], "b": [False, True, True], "c": [False, False, False]}
    for name, row in verdicts.items():
        for place, right in enumerate(row):
            line = {"id": name, "sample": place, "problem": name, "output": "", "correct_answer": "1", "is_correct": right}
            append_line(tmp_path / "samples.jsonl", line | {"predicted_answer": "1" if right else "2"})
    rows = {(row["subset"], row["measure"], row["n"]): row["mean"] for row in curves(Evaluated(tmp_path))}
    assert rows["all", "coverage", 3] == pytest.approx(2 / 3) and rows["all", "vote", 3] == pytest.approx(1 / 3)
    assert rows["mixed", "coverage", 1] == 0.5
    append_line(tmp_path / "samples.jsonl", line | {"sample": 3, "predicted_answer": None})
    with pytest.raises(DataError, match="to its end"):
        Evaluated(tmp_path)


def test_dropout_where_there_is_nothing_to_drop_is_refused(data, tmp_path):
    config = PhiConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    elsewhere = CoconutModel(PhiForCausalLM(config), toy.untrained(3).tokenizer, toy.untrained(3).config).eval()
    with pytest.raises(SettingsError, match="'phi' has no dropout sites that lab can reach; use noise instead"):
        sample(elsewhere, data, Sampler(by="dropout", strength=0.2), 2, tmp_path / "dropout", **BUDGET)
    assert not (tmp_path / "dropout").exists(), "refused before anything is made"
    assert sample(elsewhere, data[:2], NOISE, 2, tmp_path / "noise", **BUDGET).complete
