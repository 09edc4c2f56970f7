"""Headlines become rows: arms, groups, intervals over seeds."""

import pytest

from lab.tables import arms, cell_text, rows_of, shown, table_text


def test_nested_headlines_name_arms():
    found = arms({"steps": 3, "tah": {"hard": 0.9, "easy": 1.0}, "base": {"oracle": {"hard": 1.0}}})
    assert found == {"": {"steps": 3}, "tah": {"hard": 0.9, "easy": 1.0}, "base/oracle": {"hard": 1.0}}


def test_runs_that_differ_in_the_seed_only_are_one_row_with_an_interval():
    runs = [({"seed": str(s), "lr": lr}, {"eval": {"accuracy": value}}) for lr, s, value in [("1", 0, 0.2), ("1", 1, 0.4), ("2", 0, 0.9)]]
    first, second = rows_of(runs)
    assert (first["lr"], second["lr"]) == ("1", "2")
    assert first["accuracy"]["mean"] == pytest.approx(0.3) and first["accuracy"]["n"] == 2
    half = 12.706 * (0.02**0.5) / 2**0.5
    assert first["accuracy"]["high"] - first["accuracy"]["mean"] == pytest.approx(half, rel=1e-3)
    assert second["accuracy"] == {"mean": 0.9, "low": None, "high": None, "n": 1}


def test_a_count_that_is_the_same_in_all_runs_stays_one():
    (row,) = rows_of([({"seed": str(s)}, {"eval": {"questions": 500, "steps": 3 + s, "score": 1.0}}) for s in range(2)])
    assert [cell_text(row[name]) for name in ("questions", "steps", "score")] == ["500", "3.500 ± 6.353 (2)", "1.000 ± 0.000 (2)"]


def test_limits_of_its_own_belong_to_a_single_run():
    told = {"evaluate": {"tah": {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "passes": 2.0}}}
    (one,), (two,) = rows_of([({"seed": "0"}, told)]), rows_of([({"seed": "0"}, told), ({"seed": "1"}, told)])
    assert cell_text(one["accuracy"]) == "0.500 [0.400, 0.600]" and list(one) == list(two) == ["step", "arm", "accuracy", "passes"]
    assert cell_text(two["accuracy"]) == "0.500 ± 0.000 (2)"


def test_a_notebook_shows_limits_in_the_cell_of_their_measure():
    row = {"method": "tah", "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "other_share": float("nan"), "steps": 3}
    assert shown([row]).to_dict("records") == [{"method": "tah", "accuracy": "0.500 [0.400, 0.600]", "other share": "–", "steps": "3"}]


def test_words_and_undefined_numbers():
    (row,) = rows_of([({"seed": "0"}, {"eval": {"best": "tah", "loss": "nan"}}), ({"seed": "1"}, {"eval": {"best": "sft", "loss": 1.0}})])
    assert row["best"] == "tah, sft"
    assert row["loss"]["mean"] != row["loss"]["mean"] and row["loss"]["n"] == 2


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ({"mean": 0.80333, "low": 0.77333, "high": 0.83333, "n": 5}, "0.803 ± 0.030 (5)"),
        ({"mean": 0.5, "low": None, "high": None, "n": 1}, "0.500"),
        (1e-5, "1.00e-05"),
        (0.0, "0.000"),
        (123456.0, "1.23e+05"),
        (12, "12"),
        (None, ""),
        ("word", "word"),
        (float("nan"), "–"),
        ("nan", "–"),
        (True, "yes"),
    ],
)
def test_cells_as_text(cell, text):
    assert cell_text(cell) == text


def test_a_table_lines_up_and_leaves_out_empty_columns():
    text = table_text([{"arm": "a", "x": 1.0, "none": None}, {"arm": "bbb", "x": 10.0, "none": None}])
    assert text.splitlines() == ["arm       x", "-----------", "a     1.000", "bbb  10.000"]
