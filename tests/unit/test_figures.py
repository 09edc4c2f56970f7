"""Run: pytest tests/unit/test_figures.py"""

import itertools
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from lab import figures, steps
from lab.errors import DataError, SettingsError
from lab.figures import again, cards
from lab.running import papers, provenance, runs

PARAMETERS = {"count": 1, "data": "", "pause_s": 0.0, "more": False, "fail": False}
CURVE = pd.DataFrame(
    {"step": [0, 1, 2, 1, 2, 3], "value": [3.0, 2.0, 9.0, 2.0, 1.5, 1.0], "discarded": [False, True, True, False, False, False]}
)
EVENTS = pd.DataFrame([{"kind": "rollback", "step": 2, "onset": 2, "resumed": 0, "rule": "spike"}, {"kind": "skipped", "step": 3}])


def intervals(**columns):
    table = pd.DataFrame(columns)
    return table.assign(low=table["mean"] - 0.1, high=table["mean"] + 0.05)


TABLES = {
    "ablation": pd.DataFrame(
        {
            "intervention": ["as they are", "zeroed", "layer 1, corrupted into clean", "layer 1, clean into corrupted"],
            "kind": ["own", "vector", "corrupted into clean", "clean into corrupted"],
            "layer": [-1, -1, 1, 1],
            "accuracy": [0.9, 0.2, 0.4, 0.5],
            "low": [0.8, 0.1, 0.3, 0.4],
            "high": [0.95, 0.3, 0.5, 0.6],
            "other": [np.nan, np.nan, 0.4, 0.3],
        }
    ),
    "accuracy_against_passes": intervals(
        policy=["decider", "decider", "never"], passes=[1.1, 1.3, 1.0], mean=[0.8, 0.9, 0.3], threshold=[0.9, 0.5, np.nan]
    ),
    "accuracy_against_cost": intervals(method=["codi", "lta", "cot"], passes=[8.0, 8.0, 9.0], mean=[0.9, 0.88, 1.0]),
    "accuracy_against_thoughts": intervals(method=["codi", "codi", "coconut"], thoughts=[0, 6, 0], mean=[0.2, 0.8, 0.1]),
    "divergence_events": CURVE,
    "gate_histogram": pd.DataFrame(
        {"span": ["inside"] * 2 + ["outside"] * 2, "low": [0, 0.5] * 2, "high": [0.5, 1] * 2, "share": [0.1, 0.9, 0.8, 0.2]}
    ),
    "hard_tokens": pd.DataFrame(
        {"text": ["a", "$\n"], "tokens": [1000, 2], "hard_share": [0.1, 0.5], "ce_1": [1.0, np.nan], "ce_2": [0.5, np.nan]}
    ),
    "iteration_histogram": pd.DataFrame({"group": ["easy", "easy", "hard"], "iterations": [1, 2, 1], "share": [0.75, 0.25, 1.0]}),
    "learning_curves": CURVE.rename(columns={"value": "mean"}).assign(arm="tah", low=0.5, high=4.0),
    "loss_components": CURVE.assign(component="ce"),
    "method_comparison": intervals(method=["tah", "codi"], mean=[0.8, 0.7], n=[5, 5], reported=[np.nan, 0.75]),
    "pruning": pd.DataFrame({"layer": [0, 1, 2], "delta_ppl": [500.0, 1.0, np.inf], "dropped": [False, True, False]}),
    "scaling": intervals(measure=["vote"] * 3 + ["beam"] * 2, n=[1, 4, 16, 1, 4], mean=[0.3, 0.4, 0.5, 0.3, 0.45]),
    "thought_map": pd.DataFrame({"x": [0.0, 1.0], "y": [0.0, 1.0], "step": [0, 1], "sample": [0, 0], "correct": [True, False]}),
    "token_strip": pd.DataFrame({"question": 0, "sample": 0, "role": "answer", "text": ["a", "$b"], "gate": [0.0, 1.0]}),
    "thoughts_against_gold_steps": pd.DataFrame({"gold_steps": [1, 1, 2], "thoughts": [1, 2, 2], "share": [0.5, 0.5, 1.0]}),
}


def draw(name, **options):
    more = {"events": EVENTS} if name == "divergence_events" else {}
    return getattr(figures, name)(TABLES[name], **more, **options)


def texts(fig):
    fig.canvas.draw()
    axis = fig.axes[0]
    entries = axis.get_legend().get_texts() if axis.get_legend() else []
    return [text.get_text() for text in [*axis.texts, *axis.get_xticklabels(), *axis.get_yticklabels(), *entries]]


def test_every_figure_has_a_table_here():
    assert set(TABLES) == set(dir(figures)) - {"save", "redraw"}


@pytest.mark.parametrize("name", TABLES)
def test_a_figure_is_drawn_saved_and_the_same_again(name, tmp_path):
    for folder in ("one", "two"):
        paths = figures.save(draw(name), TABLES[name], tmp_path / folder, name)
    assert [path.suffix for path in paths] == [".pdf", ".svg", ".png", ".csv"]
    assert all(path.read_bytes() == (tmp_path / "one" / path.name).read_bytes() for path in paths)
    pd.testing.assert_frame_equal(pd.read_csv(paths[-1]), TABLES[name], check_dtype=False)
    axis = draw(name).axes[0]
    assert axis.get_xlabel() or not axis.axison


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_column_and_an_empty_table_are_named(name):
    for column in TABLES[name].columns[TABLES[name].columns.isin(["step", "mean", "share", "delta_ppl", "hard_share"])][:1]:
        with pytest.raises(DataError, match=f"{name} needs the columns {column}"):
            getattr(figures, name)(TABLES[name].drop(columns=column))
    with pytest.raises(DataError, match="empty table"):
        getattr(figures, name)(TABLES[name].head(0))


def test_what_a_csv_makes_of_names_is_drawn_all_the_same(tmp_path):
    everywhere = pd.DataFrame({"group": ["", ""], "iterations": [1, 2], "share": [0.9, 0.1]})
    words = pd.DataFrame({"text": ["NA", "null", "7"], "tokens": [3, 2, 1], "hard_share": [1.0, 0.5, 0.1]})
    for name, table in {"iteration_histogram": everywhere, "hard_tokens": words}.items():
        *_, path = figures.save(getattr(figures, name)(table), table, tmp_path, name)
        drawn = getattr(figures, name)(again.read(path))
        assert texts(drawn) == texts(getattr(figures, name)(table)), name


def test_sizes_and_names_are_checked():
    assert tuple(draw("scaling", size="slide").get_size_inches()) == (10.0, 5.6)
    assert tuple(draw("scaling").get_size_inches()) == (3.35, 2.45)
    with pytest.raises(SettingsError, match="Did you mean 'column'"):
        draw("scaling", size="colum")
    with pytest.raises(AttributeError, match="scalling"):
        _ = figures.scalling


def test_intervals_are_drawn_where_the_columns_say():
    (segments,) = [part.get_segments() for part in draw("accuracy_against_thoughts").axes[0].collections[:1]]
    assert np.allclose([segment[:, 1] for segment in segments], [[0.1, 0.25], [0.7, 0.85]])
    rows = draw("method_comparison").axes[0].collections[0].get_segments()
    assert np.allclose(sorted(tuple(segment[:, 0]) for segment in rows), [(0.6, 0.75), (0.7, 0.85)])


@pytest.mark.filterwarnings("error")
def test_a_single_run_has_a_dot_and_no_interval():
    for table in (TABLES["accuracy_against_thoughts"], TABLES["method_comparison"]):
        alone = table.assign(low=None, high=None)
        fig = (figures.method_comparison if "reported" in table else figures.accuracy_against_thoughts)(alone)
        fig.canvas.draw()
        assert len(fig.axes[0].get_lines()[0].get_xydata()) >= 1


@pytest.mark.parametrize("size", ["column", "wide"])
def test_names_cover_neither_a_dot_nor_each_other_and_each_method_has_one(size):
    names = ["start", "no_cot", "cot", "coconut", "codi", "adaptive", "colar", "tah", "dtt", "softcot", "lta"]
    passes = [8.0, 2.0, 8.0, 5.0, 8.0, 8.0, 6.0, 8.01, 9.0, 8.0, 8.0]
    table = intervals(method=names, passes=passes, mean=[0.676, 0.173, 0.979, 0.909, 0.162, 0.183, 0.998, 1.0, 1.0, 0.777, 0.682])
    fig = figures.accuracy_against_cost(table, size=size, xlabel="passes an answer")
    fig.canvas.draw()
    (axis,) = fig.axes
    boxes = {text.get_text(): text.get_window_extent() for text in axis.texts}
    assert len(boxes) == len(names) and axis.get_xlabel() == "passes an answer"
    dots = axis.transData.transform(table[["passes", "mean"]].to_numpy())
    assert not [(name, dot) for name, box in boxes.items() for dot in dots if box.contains(*dot)]
    assert not [(one, other) for one, other in itertools.combinations(boxes, 2) if boxes[one].overlaps(boxes[other])]
    assert all(axis.get_window_extent().x0 < box.x0 and box.x1 < fig.bbox.x1 for box in boxes.values())


def test_a_loss_that_begins_anew_is_not_joined_to_its_first_part():
    table = pd.DataFrame({"step": [1, 2, 1, 2], "component": "ce", "value": [3.0, 2.0, 5.0, 4.0]})
    (line,) = figures.loss_components(table).axes[0].get_lines()
    assert np.isnan(line.get_ydata()[2]) and line.get_ydata()[3] == 5.0


@pytest.mark.parametrize("name", ["m", "a rather long name, ", "WWWWWWWWWW"])
def test_a_legend_of_many_stands_below_axes_that_keep_their_size(name):
    table = pd.DataFrame([{"measure": f"{name}{index}", "n": n, "mean": index / 9} for index in range(7) for n in (1, 2)])
    fig = figures.scaling(table)
    fig.canvas.draw()
    (axis,), (legend,) = fig.axes, fig.legends
    frame, box = axis.get_window_extent(), legend.get_window_extent()
    assert box.y1 <= frame.y0 and box.x0 >= 0 and box.x1 <= fig.bbox.x1
    few = figures.scaling(table[table["measure"] < f"{name}2"])
    few.canvas.draw()
    assert frame.width > 0.95 * few.axes[0].get_window_extent().width and frame.height > 0.9 * few.axes[0].get_window_extent().height
    assert [text.get_text() for text in legend.get_texts()] == [f"{name}{index}" for index in range(7)]


def test_parts_of_an_arm_share_its_colour_and_differ_in_dash():
    table = pd.DataFrame([{"arm": f"{arm}: {part}", "step": s, "mean": s} for arm in "ab" for part in "xy" for s in (1, 2)])
    lines = figures.learning_curves(table).axes[0].get_lines()
    assert [line.get_color() for line in lines[::2]] == [line.get_color() for line in lines[1::2]]
    assert lines[0].get_color() != lines[2].get_color() and [line.get_linestyle() for line in lines] == ["-", "--"] * 2


def strip(texts, **columns):
    rows = [{"question": 0, "sample": 0, "role": "prompt" if place < 2 else "answer", "text": text} for place, text in enumerate(texts)]
    return pd.DataFrame(rows).assign(**columns)


def test_tokens_of_a_strip_stay_within_its_column_and_off_each_other():
    table = strip(["Hello", " $x_1$", "<b>", "\n", "שלום", "a" * 99, ""] * 5, prob=np.linspace(0, 1, 35))
    fig = figures.token_strip(table)
    fig.canvas.draw()
    (axis,) = fig.axes
    boxes = [patch.get_window_extent() for patch in axis.patches]
    assert all(box.x0 >= 0 and box.x1 <= fig.bbox.x1 and box.y0 >= 0 for box in boxes)
    assert not [1 for one, other in itertools.combinations(boxes, 2) if one.shrunk(0.98, 0.98).overlaps(other.shrunk(0.98, 0.98))]
    written = [text.get_text() for text in axis.texts]
    assert {" $x_1$", "<b>", "↵", "∅", "prompt", "answer", "probability"} <= set(written) and written.count("0.50") == 1


def test_a_strip_is_drawn_again_from_its_csv(tmp_path):
    table = strip(["7", "12", "", "x"], iterations=[1.0, 3.0, 2.0, np.nan])
    first = figures.save(figures.token_strip(table), table, tmp_path, "a")
    again = pd.read_csv(tmp_path / "a.csv")
    second = figures.save(figures.token_strip(again), again, tmp_path, "b")
    assert first[1].read_bytes() == second[1].read_bytes()
    shown = [text.get_text() for text in figures.token_strip(table).axes[0].texts]
    assert "2" in shown and "3" in shown and "passes" in shown


def test_discarded_stretches_are_grey_and_apart():
    lines = draw("learning_curves").axes[0].get_lines()
    kept, lost = (line.get_xydata().tolist() for line in lines)
    assert kept == [[0, 3.0], [1, 2.0], [2, 1.5], [3, 1.0]] and lost == [[1, 2.0], [2, 9.0]]
    assert lines[1].get_linestyle() == "--" and lines[1].get_label() == "discarded"


def test_methods_keep_their_colour_and_name_everywhere():
    alone = figures.accuracy_against_thoughts(TABLES["accuracy_against_thoughts"].tail(1)).axes[0].get_lines()[0]
    beside = draw("accuracy_against_thoughts").axes[0].get_lines()[1]
    assert alone.get_color() == beside.get_color() and beside.get_label() == "COCONUT"
    assert "CODI (n=5)" in texts(draw("method_comparison"))


def test_no_two_lines_of_a_figure_look_the_same():
    names = ["sft", "tah", "cot", "codi", "none"]
    table = pd.DataFrame([{"method": name, "thoughts": n, "mean": 0.5} for name in names for n in (1, 2)])
    lines = figures.accuracy_against_thoughts(table).axes[0].get_lines()
    assert len({line.get_color() for line in lines}) == len(names)
    alone = figures.accuracy_against_thoughts(table[table["method"] == "codi"]).axes[0].get_lines()[0]
    assert alone.get_color() == lines[names.index("codi")].get_color()


def test_odd_texts_and_infinite_values_are_shown():
    assert r"“\$↵”" in texts(draw("hard_tokens")) and "∞" in texts(draw("pruning"))
    assert "1,000 ×   CE 1.00 → 0.50" in texts(draw("hard_tokens")) and "2 ×" in texts(draw("hard_tokens"))


def test_a_figure_shows_itself_as_a_picture():
    assert draw("scaling")._repr_png_().startswith(b"\x89PNG")


def test_nothing_global_changes_and_pyplot_stays_out():
    code = (
        "import sys, matplotlib as m, pandas as pd; before = dict(m.rcParams)\n"
        "from lab import figures\n"
        "figures.pruning(pd.DataFrame({'layer': [0], 'delta_ppl': [1.0]}))\n"
        "assert dict(m.rcParams) == before and 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the pictures of the cards ------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(bench, tmp_path):
    """A sweep of two seeds whose step drew a figure and saved a view."""
    for seed, shift in ((0, 0.0), (1, 0.2)):
        folder = provenance.outputs() / "mini" / "sweep-toy" / f"seed={seed}"
        runs.Run.open(folder, "mini", recipe="toy").close()
        step = steps.begin("mini", "draw", str(folder), PARAMETERS | {"seed": seed})
        table = pd.DataFrame({"method": "codi", "thoughts": [0, 6], "mean": [0.2 + shift, 0.8], "low": 0.0, "high": 1.0})
        named_otherwise = table.rename(columns={"mean": "score"})  # what was drawn is kept all the same
        step.save_figure(figures.accuracy_against_thoughts(table), "accuracy", named_otherwise)
        step.save_view("<section class=lab-view>hello</section>", "tokens")
        step.finish(x=1.0)
    return {"picture": "papers/mini/figures/accuracy", "paper": "mini", "recipe": "toy", "step": "draw", "figure": "accuracy"}


def test_a_cards_picture_is_drawn_from_the_runs_alone_with_intervals_over_seeds(drawn, tmp_path):
    paths = cards.make(cards.Card.check(**drawn, by=["method", "thoughts"]), tmp_path)
    assert sorted(path.suffix for path in paths) == [".csv", ".pdf", ".png", ".svg"] and paths[-1].suffix == ".png"
    table = pd.read_csv(tmp_path / "papers-mini-figures-accuracy.csv")
    assert table["mean"].tolist() == pytest.approx([0.3, 0.8]) and table["n_runs"].tolist() == [2, 2]
    assert table["low"][0] < 0.2 and table["high"][1] == pytest.approx(0.8)


def test_what_has_no_run_figure_or_column_is_said_with_the_command(drawn, tmp_path):
    wrong = [{"paper": "codi", "recipe": "toy"}, {"figure": "acuracy"}, {"by": ["arm"]}]
    made, missing = cards.make_all([cards.Card.check(**drawn | change | {"picture": str(n)}) for n, change in enumerate(wrong)], tmp_path)
    assert not made and "make one with: lab run codi --recipe toy" in missing["0"]
    assert "no figures/acuracy.json; there is accuracy" in missing["1"] and "no column 'arm'" in missing["2"]


def test_a_picture_is_put_where_its_card_shows_it(drawn, bench, tmp_path):
    card = cards.Card.check(**drawn)
    placed = cards.place(card, cards.make(card, tmp_path))
    assert {path.relative_to(bench).as_posix() for path in placed} == {
        "papers/mini/figures/accuracy.png",
        "papers/mini/figures/accuracy.csv",
    }


def test_every_listed_picture_names_a_paper_a_recipe_and_a_step():
    for card in cards.cards():
        assert card.recipe in papers.recipes(card.paper) and papers.pipeline(card.paper).spec(card.step)
        assert bool(card.figure) != bool(card.view)


def test_pictures_in_the_cards_are_listed_and_listed_ones_that_exist_are_shown():
    home = provenance.home()
    shown = set()
    for page in [home / "README.md", *(home / "papers").glob("*/README.md")]:
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page} shows {target}"
            shown.add((page.parent / target).relative_to(home).with_suffix("").as_posix())
    listed = {card.picture for card in cards.cards()}
    assert shown <= listed and {name for name in listed if (home / f"{name}.png").exists()} <= shown
