"""COCONUT's curriculum as tables, and the official code's rows for six configurations."""

import json
from pathlib import Path

import pytest

from lab.data.examples import Example
from lab.errors import DataError, SettingsError
from lab.methods.coconut.config import CoconutSettings, Schedule, drawn_stage, dropped_and_latents, segments, stage_of, thoughts_at
from lab.methods.coconut.data import StagedRows, Tokenized, flat_ids, prepare, prompt_of, training_row

CURRICULUM = json.loads((Path(__file__).parents[1] / "fixtures" / "coconut" / "curriculum.json").read_text())
EXAMPLES = [
    Tokenized(tuple(row["question_tokenized"]), tuple(map(tuple, row["steps_tokenized"])), tuple(row["answer_tokenized"]))
    for row in CURRICULUM["tokenized"]
]


def settings_of(case: dict) -> CoconutSettings:
    config = dict(case["config"])
    mode = "no_cot" if config.pop("no_cot") else "no_thoughts" if case.get("no_special_marker") else "coconut"
    return CoconutSettings(mode=mode, start_id=93, end_id=94, latent_id=95, eos_id=92, **config)


class Replay:
    """The recorded draws of the official code, in order."""

    def __init__(self, calls: list):
        self.calls = list(calls)

    def random(self) -> float:
        name, value = self.calls.pop(0)
        assert name == "random"
        return value

    def choice(self, options: list[int]) -> int:
        name, seen, value = self.calls.pop(0)
        assert name == "choice" and seen == options
        return value


@pytest.mark.parametrize("case", CURRICULUM["cases"], ids=lambda case: f"{case['name']}-{case['scheduled_stage']}-{case.get('rep', 0)}")
def test_rows_are_the_official_ones(case: dict):
    s, chance = settings_of(case), Replay(case.get("random_calls", [["random", 1.0]] * 9))
    for row, want in zip(EXAMPLES, case["train"], strict=True):
        ours = training_row(row, drawn_stage(case["scheduled_stage"], len(row.steps), s, chance), s)
        assert flat_ids(ours, s.latent_id) == want["input_ids"]
        places = [label for label in want["labels"]]
        latent = len(ours.prompt)
        assert list(ours.labels) == places[:latent] + places[latent + ours.thoughts :]
        assert list(range(len(ours))) == want["position_ids"]
    for row, want in zip(EXAMPLES, case.get("valid_gen", []), strict="valid_gen" in case):
        ids, count = prompt_of(row.question, case["scheduled_stage"], len(row.steps), s)
        closing = [s.end_id] if s.markers else []
        assert [*ids, *[s.latent_id] * count, *closing] == want["input_ids"]


def test_pause_reads_the_latent_token_where_thoughts_would_be():
    think = training_row(EXAMPLES[0], 2, CoconutSettings(start_id=93, end_id=94, latent_id=95, c_thought=2))
    pause = training_row(EXAMPLES[0], 2, CoconutSettings(mode="pause", start_id=93, end_id=94, latent_id=95, c_thought=2))
    assert pause.thoughts == 0 and think.thoughts == 4
    assert flat_ids(pause, 95) == flat_ids(think, 95)


@pytest.mark.parametrize(
    ("mode", "stage", "steps", "pad", "want"),
    [
        ("coconut", 0, 3, True, (0, 0)),
        ("coconut", 2, 3, True, (2, 4)),
        ("coconut", 2, 1, True, (2, 4)),  # as many thoughts as the stage says, even for fewer steps
        ("coconut", 3, 5, True, (3, 6)),
        ("coconut", 4, 1, True, (10**9, 6)),
        ("coconut", 4, 1, False, (10**9, 2)),
        ("pause", 2, 3, True, (2, 4)),
        ("no_thoughts", 2, 3, True, (2, 0)),
        ("cot", 0, 3, True, (0, 0)),
        ("no_cot", 0, 3, True, (10**9, 0)),
    ],
)
def test_what_a_stage_drops_and_adds(mode, stage, steps, pad, want):
    assert dropped_and_latents(stage, steps, CoconutSettings(mode=mode, pad_latent_to_max=pad)) == want


@pytest.mark.parametrize(
    ("stage", "steps", "pad", "thoughts", "want"),
    [
        (0, 3, True, None, 0),
        (2, 1, True, None, 4),
        (9, 1, True, None, 6),
        (9, 1, False, None, 2),
        (9, None, False, None, 6),
        (0, 3, True, 5, 5),
    ],
)
def test_thoughts_at_inference(stage, steps, pad, thoughts, want):
    assert thoughts_at(stage, steps, CoconutSettings(pad_latent_to_max=pad, thoughts=thoughts)) == want


def test_stages_follow_the_epoch():
    s = CoconutSettings(epochs_per_stage=3)
    assert [stage_of(epoch, s) for epoch in (0, 2, 3, 11, 12, 15)] == [0, 0, 1, 3, 4, 5]
    assert stage_of(20, s.but(mode="cot")) == stage_of(20, s.but(mode="no_cot")) == 0


@pytest.mark.parametrize(
    ("reset", "want"),
    [("never", [(3, 25)]), ("stage", [(3, 6), (6, 9), (9, 12), (12, 25)]), ("epoch", [(epoch, epoch + 1) for epoch in range(3, 25)])],
)
def test_the_optimizer_starts_anew_per_stage_per_epoch_or_never(reset, want):
    found = segments(Schedule(epochs=25, resume=3, reset_optimizer=reset), CoconutSettings(epochs_per_stage=3, max_latent_stage=3))
    assert [(part.start, part.stop) for part in found] == want


def test_contradictory_schedules_are_refused():
    with pytest.raises(SettingsError, match="leaves nothing"):
        Schedule.check(epochs=3, resume=3)
    with pytest.raises(SettingsError, match="reset_optimizer"):
        Schedule.check(switch_at=0.9, reset_optimizer="never")
    with pytest.raises(SettingsError, match="epochs_per_stage"):
        CoconutSettings.check(epoch_per_stage=3)


def test_staged_rows_depend_on_seed_and_place_only():
    s = CoconutSettings(epochs_per_stage=1, c_thought=1, uniform_prob=0.5, start_id=93, end_id=94, latent_id=95)
    rows = StagedRows(EXAMPLES, s, range(0, 6), seed=3)
    forwards = [rows[i] for i in range(len(rows))]
    assert len(rows) == 24 and forwards == [rows[i] for i in reversed(range(24))][::-1]
    for epoch in range(6):
        assert sorted(row.prompt for row in forwards[4 * epoch : 4 * epoch + 4]) == sorted((*e.question, 93) for e in EXAMPLES)
    assert len({row.thoughts for row in forwards[:4]}) > 1 or len({row.thoughts for row in forwards[4:8]}) > 1
    assert [StagedRows(EXAMPLES, s.but(uniform_prob=0.0), range(6), stage=2)[i].thoughts for i in range(3)] == [2, 2, 2]


def test_unusable_examples_are_dropped_and_counted(caplog):
    from lab.models.tokenizers import byte_tokenizer

    good = Example("a", "One?", ("1+1=2",), "2")
    bad = [Example("b", "Two?", (), " "), Example("c", "Three?", ("### 4",), "4"), Example("d", "x" * 400, (), "4")]
    kept = prepare([good, *bad], byte_tokenizer(), max_tokens=300)
    assert kept.ids == ["a"] and sorted(sum(kept.dropped.values(), [])) == ["b", "c", "d"]
    assert "3 of 4" in kept.note() and "3 of 4" in caplog.text
    with pytest.raises(DataError, match="No example can be used"):
        prepare(bad, byte_tokenizer(), max_tokens=300)
