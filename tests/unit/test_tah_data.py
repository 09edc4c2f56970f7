"""Records, masks, labels and examples of Think-at-Hard, against the official numbers where there are some."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.errors import DataError, SettingsError
from lab.methods.tah.data import (
    ExampleSettings,
    LabelStrategy,
    assistant_mask,
    binned_counts,
    build_example,
    build_examples,
    choose_generation,
    collate,
    hard_marks,
    keeps,
    mismatches,
    render,
    shard_range,
    split,
)

OFFICIAL = json.loads((Path(__file__).parents[1] / "fixtures" / "tah" / "data_pipeline.json").read_text())
ROW = {
    "data_id": 3,
    "real_token": [5, 6, 7, 8, 9, 10],
    "mask": [0, 0, 1, 1, 1, 1],
    "mismatch": [1, 0, 1, 0, 1, 0],
    "entropy": [9, 9, 0.1, 0.4, 0.3, 0.2],
    "cross_entropy": [9, 9, 1.0, 0.5, 4.0, 0.0],
}


@pytest.mark.parametrize("case", OFFICIAL["format_prompt"])
def test_records_are_rendered_as_officially(case):
    wanted = case["rendered_call"]
    assert render(case["sample"]) == (wanted if wanted is None else (wanted["messages"], wanted["kwargs"]))


@pytest.mark.parametrize("case", OFFICIAL["assistant_mask"])
def test_everything_from_the_first_think_token_is_supervised(case):
    assert assistant_mask(case["input_ids"], 151667) == case["mask"]


def test_mismatches_stop_at_the_border_of_a_sample():
    case = OFFICIAL["mismatch"]
    assert mismatches(case["predictions"], case["real_tokens"], case["data_ids"]) == case["mismatch"]


@pytest.mark.parametrize("case", OFFICIAL["build_sft_example"])
def test_examples_are_built_as_officially(case):
    assert build_example(**case["args"]) == case["result"]


def test_random_counts_depend_on_the_seed_alone():
    built = [build_example([1] * 50, [1] * 50, [1] * 50, max_iter=4, seed=seed)["iter_count_labels"] for seed in (1, 1, 2)]
    assert built[0] == built[1] != built[2] and set(built[0]) == {2, 3, 4}


@pytest.mark.parametrize(
    ("strategy", "marks"),
    [
        ({"name": "mismatch"}, [1, 0, 1, 0, 1, 0]),
        ({"name": "nonmismatch"}, [0, 1, 0, 1, 0, 1]),
        ({"name": "all"}, [1] * 6),
        ({"name": "maxiter"}, [2] * 6),
        ({"name": "top_entropy", "top_entropy_ratio": 0.5}, [0, 0, 0, 1, 1, 0]),
        ({"name": "top_ce", "top_ce_ratio": 0.5}, [0, 0, 1, 0, 1, 0]),
    ],
)
def test_strategies(strategy, marks):
    assert hard_marks(ROW, LabelStrategy.check(**strategy), max_iter=3) == marks


def test_the_random_strategy_marks_a_share_of_supervised_tokens():
    marks = hard_marks(ROW, LabelStrategy.check(name="random", random_token_ratio=0.5), seed=1)
    assert (
        sum(marks) == 2
        and not any(marks[:2])
        and marks == hard_marks(ROW, LabelStrategy.check(name="random", random_token_ratio=0.5), seed=1)
    )


def test_a_missing_column_is_named():
    with pytest.raises(DataError, match="'ds_divergence'"):
        hard_marks(ROW, LabelStrategy.check(name="ds_divergence"))


def test_the_hardest_tokens_get_the_most_passes():
    assert binned_counts([1, 1, 1, 1, 0], [0.1, 4.0, 2.0, 1.0, 9.0], max_iter=3) == [1, 2, 2, 1, 0]


def test_rows_without_a_supervised_mismatch_are_dropped_and_none_left_is_an_error():
    assert keeps(ROW) and not keeps(ROW, max_length=2) and not keeps({**ROW, "mismatch": [1, 1, 0, 0, 0, 0]})
    easy = {**ROW, "mismatch": [0] * 6}
    assert len(build_examples([ROW, easy], ExampleSettings())) == 1
    with pytest.raises(DataError, match="Not a single hard token in 2"):
        build_examples([easy, easy], ExampleSettings())


@pytest.mark.parametrize("side", ["left", "right"])
def test_collation_pads_each_column_with_its_own_value(side):
    batch = collate([build_example([5, 6, 7], [0, 1, 1], [0, 1, 0]), build_example([8], [1], [0])], pad_id=9, side=side)
    short = slice(0, 2) if side == "left" else slice(1, 3)
    assert [batch[name][1, short].tolist() for name in batch] == [[9, 9], [0, 0], [-100, -100], [-100, -100]]


@given(st.integers(0, 200), st.integers(1, 20))
def test_shards_cover_everything_once(total, shards):
    ranges = [shard_range(total, shards, index) for index in range(shards)]
    assert [i for start, end in ranges for i in range(start, end)] == list(range(total))
    sizes = [end - start for start, end in ranges]
    assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1


def test_a_shard_that_does_not_exist_is_refused():
    with pytest.raises(SettingsError, match="Shard 4"):
        shard_range(10, 4, 4)


def test_the_shortest_verified_generation_is_kept():
    record = {"problem": "P", "generations": ["aaaa", "bb", "c"], "correctness_math_verify": [True, True, False], "correctness_llama": None}
    assert choose_generation(record, len) == {"question": "P", "generation": "bb", "num_tokens": 2}
    assert (
        choose_generation({**record, "correctness_math_verify": [False] * 3, "correctness_llama": [False, False, True]}, len)["generation"]
        == "c"
    )
    assert choose_generation(record, len, limit=2) is None
    assert choose_generation({**record, "correctness_math_verify": []}, len) is None


def test_a_split_loses_nothing():
    train, rest = split([{"i": i} for i in range(200)])
    assert len(train) == 198 and sorted(r["i"] for r in train + rest) == list(range(200))
