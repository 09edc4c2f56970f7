"""The report: one page, nothing fetched, everything escaped, seeds together."""

import re

import pandas as pd
import pytest

from lab import figures, report, runs, steps
from lab.errors import RunError, SettingsError

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


def test_the_papers_own_numbers_stand_beside_with_their_source(make, bench, tmp_path):
    (bench / "papers" / "mini" / "reported.yaml").write_text("- {claim: total, values: {all: 1.5}, source: 'table 2'}\n")
    page = report.write([make(x=1.0)], tmp_path / "r.html").read_text()
    assert "What the paper reports" in page and "all 1.500" in page and "table 2" in page
    (bench / "papers" / "mini" / "reported.yaml").write_text("- {claim: total}\n")
    with pytest.raises(SettingsError, match="reported.yaml: Reported: source"):
        report.write([make(1, x=1.0)], tmp_path / "r.html")


def test_what_did_not_finish_is_said(make, tmp_path):
    folder = make(x=1.0)
    runs.open_run(folder).record(double={"status": "failed", "error": "ValueError in cell 3"})
    assert "double did not finish: ValueError in cell 3" in report.write([folder], tmp_path / "r.html").read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path, bench):
    with pytest.raises(RunError, match="is not a run folder"):
        report.write([tmp_path / "nothing"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
