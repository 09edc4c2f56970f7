"""The report: one page, nothing fetched, everything escaped, seeds together."""

import re

import pandas as pd
import pytest

from lab import figures, report, reported, steps
from lab.errors import RunError, SettingsError
from lab.running import runs

HOSTILE = "<script>alert(1)</script>\"'&"
PARAMETERS = {"count": 1, "data": "", "pause_s": 0.0, "more": False, "fail": False}


@pytest.fixture
def make(bench, tmp_path):
    def run(seed=0, **headline):
        folder = tmp_path / f"seed={seed}"
        runs.Run.open(folder, "mini", recipe="toy", overrides={"seed": str(seed)}).close()
        step = steps.begin("mini", "draw", str(folder), {"seed": seed, **PARAMETERS})
        table = pd.DataFrame({"iterations": [1, 2], "share": [0.9, 0.1]})
        step.save_figure(figures.iteration_histogram(table), "histogram", table)
        step.table("tokens", [{"token": HOSTILE, "count": 3}])
        step.save_view("<style>.x{}</style><p>a view</p>", "view")
        for index in range(5):
            step.log(step=index, loss=1.0 / (index + 1))
        step.warn(f"cut off {HOSTILE}")
        step.finish(**headline)
        return folder

    return run


def test_a_page_holds_everything_and_fetches_nothing(make, tmp_path):
    folder = make(tah={"hard": 0.81}, threshold=0.43)
    page = report.write([folder], tmp_path / "r.html").read_text()
    for part in ("0.810", "0.430", "data:image/svg+xml;base64", "a view", "loss", "Manifest", "cut off", "prefers-color-scheme"):
        assert part in page, part
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page) and "@import" not in page and "url(http" not in page


def test_text_from_data_is_escaped(make, tmp_path):
    page = report.write([make(note=HOSTILE)], tmp_path / "r.html").read_text()
    assert "<script>alert" not in page and page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3


def test_long_tables_and_curves_are_folded(make, tmp_path):
    page = report.write([make(**{f"arm {n:02d}": {"x": float(n)} for n in range(30)})], tmp_path / "r.html").read_text()
    folded = "".join(re.findall(r"<details>.*?</details>", page, flags=re.S))
    assert "Curves of what was logged" in folded and "arm 29" in folded and page.count("arm 29") == folded.count("arm 29")
    assert "arm 11" in page.split('id="run-')[0].replace(folded, "") and "18 more rows" in folded  # results show how they begin
    assert "&lt;script&gt;" in page.replace(folded, "")  # a short table stands open


def test_styles_that_views_share_are_kept_once(make, tmp_path):
    folders = [make(seed, x=1.0) for seed in range(3)]
    assert report.write(folders, tmp_path / "r.html").read_text().count("<style>.x{}</style>") == 1


def test_runs_that_differ_in_the_seed_are_one_row_with_an_interval(make, tmp_path):
    folders = [make(seed, tah={"hard": value}) for seed, value in enumerate([0.7, 0.8, 0.9])]
    assert "0.800 ± 0.248 (3)" in report.text(folders)
    page = report.write(folders, tmp_path / "r.html").read_text()
    assert "0.800 ± 0.248 (3)" in page and page.count("<details><summary>A pipeline for tests") == 2


def test_a_sweeps_folder_stands_for_its_runs(make, tmp_path):
    folders = [make(seed, x=1.0) for seed in range(2)]
    assert report.expand([tmp_path]) == folders


def test_the_papers_own_numbers_stand_beside_with_what_differs(make, bench, tmp_path):
    path = bench / "papers" / "mini" / "reported.yaml"
    path.write_text("- {claim: total, setting: {backbone: gpt2, dataset: world}, values: {all: 1.5}, source: 'table 2'}\n")
    page = report.write([make(x=1.0)], tmp_path / "r.html").read_text()
    assert "none was measured on the data set of this run" in page and "1.500" in page and "table 2" in page
    assert "backbone: gpt2, here not recorded; dataset: world, here not recorded" in page
    path.write_text("- {claim: total}\n")
    with pytest.raises(SettingsError, match="reported.yaml: Reported: source"):
        report.write([make(1, x=1.0)], tmp_path / "r.html")


OURS = {"backbone": "openai-community/gpt2", "dataset": "gsm8k", "split": "test", "decoding": "greedy"}
CELL = {"mean": 0.34, "low": 0.30, "high": 0.38, "n": 5}


def against(line, bench, ours=OURS):
    (bench / "papers" / "mini" / "reported.yaml").write_text(f"- {{claim: c, source: s, scale: 100, arm: a, {line}}}\n")
    return reported.compared("mini", ours, {"a": {"accuracy": CELL, "tokens": 8.0}})


def test_ours_stands_beside_a_number_of_the_same_data_set_in_the_papers_unit(bench):
    rows = against("setting: {backbone: GPT-2, split: test, decoding: greedy}, values: {gsm8k: 34.1, gsm8k_tokens: 8.2, math: 3.0}", bench)
    assert [row["measure"] for row in rows] == ["gsm8k accuracy", "gsm8k tokens", "math accuracy"]
    assert [row["ours"] for row in rows] == ["34.000 ± 4.000 (5)", "8.000", ""]
    assert [row["what differs"] for row in rows] == ["nothing it states", "nothing it states", "dataset: math, here gsm8k"]


def test_every_setting_that_differs_is_listed_and_silence_is_said(bench):
    (row,) = against("setting: {backbone: Qwen/Qwen3-8B, dataset: gsm8k, decoding: temperature 1}, values: {accuracy: 90.9}", bench)
    assert row["ours"] == "34.000 ± 4.000 (5)"
    assert row["what differs"] == "backbone: Qwen/Qwen3-8B, here openai-community/gpt2; decoding: temperature 1, here greedy"
    (row,) = against("setting: {note: a figure}, values: {gain: 7.3}", bench)
    assert row["ours"] == "" and row["what differs"] == "the source does not say" and row["note"] == "a figure"


def test_our_setting_is_read_from_the_parameters_of_the_steps():
    told = {"backbone": "toy:gpt2", "benchmark": "permutations", "temperature": 0.0}
    assert reported.of_parameters(told) == {"backbone": "toy:gpt2", "dataset": "permutations", "split": "test", "decoding": "greedy"}
    told = {"large_model_id": "Qwen/Qwen3-8B", "task_name": "gsm8k", "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    assert reported.of_parameters(told)["decoding"] == "temperature 0.7, top_p 0.8, top_k 20"
    assert reported.of_parameters({"val_config_options": "gsm8k-aug-test/latent_thinking"})["dataset"] == "gsm8k-aug"


def test_a_headline_with_many_measures_lies_on_its_side_and_sentences_stay_out(make, tmp_path):
    wide = {f"measure_{index}": float(index) for index in range(12)}
    page = report.write([make(one=wide, two=wide)], tmp_path / "r.html").read_text()
    assert '<th scope="col">measure</th>' in page and "<td>measure 11</td>" in page
    page = report.write([make(1, one={"x": 1.0, "story": "a" * 40})], tmp_path / "s.html").read_text()
    assert "a" * 40 not in page.split('id="run-')[0]


def test_what_did_not_finish_is_said(make, tmp_path):
    folder = make(x=1.0)
    runs.open_run(folder).record(double={"status": "failed", "error": "ValueError in cell 3"})
    assert "double did not finish: ValueError in cell 3" in report.write([folder], tmp_path / "r.html").read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path, bench):
    with pytest.raises(RunError, match="is not a run folder"):
        report.write([tmp_path / "nothing"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
