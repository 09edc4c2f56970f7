"""LTA-Thinker's notebooks on benchmark files, assistant mode: from training to votes and a look at the thoughts."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "smoke"))

from test_lta_data import base, files  # noqa: F401

from lab.pipeline import run_recipe
from lab.running.records import results_of


def test_the_notebooks_go_from_training_to_votes_on_a_benchmark(base, files, tmp_path):  # noqa: F811
    asked = {"large_model_id": base, "small_model_id": base, "use_assistant_model": "true", "data": str(files), "dtype": "float32"}
    asked |= {"k_shot": "4", "held_out": "0", "steps": "2", "batch_size": "2", "num_thought_tokens": "2", "questions": "2"}
    asked |= {"evaluate.num_thought_tokens": "2", "num_return_sequences": "2", "max_new_tokens": "3", "print_input": "true"}
    folder = run_recipe("lta", "smoke", asked | {"print_response": "true", "shown": "1", "evaluate.task_name": "du"}, tmp_path / "run")
    scores = results_of(folder)["evaluate"]["2 thoughts"]
    assert scores["questions"] == 2 and {"strict", "lenient", "vote_strict", "vote_lenient", "majority"} <= set(scores)
    assert (folder / "report.html").stat().st_size > 10_000
