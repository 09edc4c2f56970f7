"""LTA-Thinker on benchmark files: train two steps, answer, vote, for every task; real files where they are."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from test_lta_prompting import TOKENIZERS

from lab.data.examples import Dataset, Example
from lab.errors import CheckpointError, DataError, SettingsError
from lab.evaluate import Decoding, Output
from lab.methods.lta import evaluate, stages, tasks
from lab.methods.lta.checkpoint import export_official
from lab.models.backbones import load_backbone
from lab.running import papers

TASKS = ("gsm8k", "strategyqa", "math", "aqua")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The benchmarks in the shapes of the published repository."""
    folder = tmp_path_factory.mktemp("data")
    note = "Sum? ** He has <<{0}+2={1}>>.\n#### {1}"
    gsm = [{"question": f"Tom has {i} pens and buys 2. How many?", "answer": note.format(i, i + 2)} for i in range(6)]
    for split in ("train", "test"):
        write(folder / "gsm8k" / f"{split}_socratic.jsonl", gsm)
    facts = "Two divides evens.\nIt is a number."
    yesno = [{"qid": f"{i}", "question": f"Is {i} even?", "answer": i % 2 == 0, "facts": facts} for i in range(6)]
    for name in ("train", "dev"):
        write(folder / "strategyqa" / f"strategyqa_{name}.jsonl", yesno)
    text = "Add them.\nThen look.\n\nThe sum is {0}.\n\n#### {0}"
    sums = [{"question": f"What is {i}+{i}?", "answer": text.format(2 * i)} for i in range(6)]
    for name in ("math_gsmstyle", "math500_gsm"):
        write(folder / "math" / f"{name}.jsonl", sums)
    letters = [{"question": f"Pick {i}.\nA ) {i} B ) 9 C ) 8", "answer": f"It is {i}.\n#### A"} for i in range(6)]
    for split in ("train", "test"):
        write(folder / "aqua" / f"gsm_style_{split}.jsonl", letters)
    dates = [f"0{i}/02/2021" for i in range(1, 7)]
    ask = "Today is {0}. Which day is it in MM/DD/YYYY?\n(A) {0}\n(B) 01/01/1999\n(C) 12/31/2020"
    du = [{"question": ask.format(date), "answer": f"The day is\n{date}\n#### A"} for date in dates]
    write(folder / "date_understanding" / "date_understanding_gsm_style.jsonl", du)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Qwen3 with a chat template, as a folder whose name says what it is."""
    folder, tokenizer = tmp_path_factory.mktemp("base") / "tiny-qwen3", copy.deepcopy(TOKENIZERS["qwen3"])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    shape = {"hidden": 32, "heads": 4, "kv_heads": 2, "layers": 2, "max_positions": 4096}
    load_backbone("toy:qwen3", vocab_size=len(tokenizer), **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def values_of(base, folder, task, **more):
    asked = {"large_model_id": base, "task_name": task, "data": str(folder), "dtype": "float32"}
    asked |= {"k_shot": "6", "held_out": "2", "steps": "2"}
    asked |= {"num_thought_tokens": "3", "train_thoughts": "[1, 3]", "batch_size": "2", "questions": "3", "max_new_tokens": "4"}
    asked |= {"evaluate.num_thought_tokens": "0", "thoughts": "[1, 3]", "num_return_sequences": "3", "stop_early": "true", **more}
    return {step.step: step.values for step in papers.plan("lta", "smoke", asked)}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_answers_and_votes(task, base, files, tmp_path):
    _check(values_of(base, files, task), task, tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_reads_the_real_files(task, base, tmp_path):
    if not os.environ.get("LAB_DATA"):
        pytest.skip("LAB_DATA names no folder with real benchmark data")
    _check(values_of(base, Path(os.environ["LAB_DATA"]), task), task, tmp_path)


def _check(values, task, folder):
    found = stages.run(str(folder), values["train"])
    assert found["steps"] == 2 and found["examples"] > 0
    model, given = stages.trained(folder, values["evaluate"]), values["evaluate"]
    data = tasks.dataset(task, "test", given["data"], given["questions"], given["seed"])
    table, rows = evaluate.answer(model, data, folder, given)
    assert [row["thoughts"] for row in table] == [1, 3] and {row["questions"] for row in table} == {3}
    assert 6 <= len(rows) <= 9 and all(0 <= row["vote_strict"] <= 1 and 0 < row["majority"] <= 1 for row in table)
    assert set(table[0]) >= {"strict", "lenient", "vote_strict", "vote_lenient"}


class Told:
    """Answers given beforehand, and which were asked for."""

    facts = {"backend": "told"}

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def generate(self, requests, decoding):
        for request in requests:
            self.asked.append((request.number, request.sample))
            yield request, Output(f"It is {self.answers[request.number][request.sample]}.", 1, "stop")


def test_a_vote_that_is_settled_is_not_asked_on_and_stays_what_it_was(tmp_path):
    answers = [[1, 1, 1, 2, 3], [2, 1, 1, 2, 2], [3, 2, 1, 1, 1], [1, 2, 2, 2, 1]]
    data = Dataset("gsm8k", "test", tuple(Example(f"q{i}", "?", answer=str(gold)) for i, gold in enumerate((1, 2, 1, 1))), "")
    asked = {"benchmark": "gsm8k", "decoding": Decoding(), "rule": "lta-gsm8k"}
    full, early = Told(answers), Told(answers)
    _, whole = evaluate._answered(full, data, asked | {"folder": tmp_path / "whole"}, 5, False)
    first, rows = evaluate._answered(early, data, asked | {"folder": tmp_path / "early"}, 5, True)
    assert evaluate.voted(rows) == evaluate.voted(whole) == {"strict": 0.75, "lenient": 0.75}
    assert len(full.asked) == 20 and len(early.asked) == 18 and (0, 3) not in early.asked and first.samples == 12
    assert len(early.asked) == len(set(early.asked)), "the second wave goes on where the first ended"


def test_what_the_base_learns_of_each_task(base, files):
    told = {}
    for task in TASKS:
        model = stages.start(values_of(base, files, task)["train"])
        row = stages.prompts(model, tasks.dataset(task, "train", str(files), 1, 0), "train").rows[0][-1].row
        ids = [*row.prompt, *row.after]
        assert [label for label in row.labels if label >= 0] == ids[len(ids) - sum(label >= 0 for label in row.labels) :]
        told[task] = model.tokenizer.decode([label for label in row.labels if label >= 0])
    assert told["gsm8k"].startswith("\n<|im_start|>assistant") and "## Step 2: 2" in told["gsm8k"] and "boxed{2}" in told["gsm8k"]
    assert told["strategyqa"].startswith("<|im_start|>assistant") and "It is a number." in told["strategyqa"]
    assert "So the answer is Yes." in told["strategyqa"]
    assert "## Step 1: Add them.\nThen look.\n## Step 2: The sum is 0." in told["math"]


def test_date_understanding_is_shuffled_judged_against_the_majority_and_never_trained_on(base, files):
    data = tasks.dataset("du", "test", str(files), 0, 3)
    assert evaluate.majority_baseline(data) < 1.0, "the published file has the right option first everywhere"
    for example in data:
        right = example.options[example.answer == "B" or 2 * (example.answer == "C")]
        assert right in example.question.split(".")[0] and f"({example.answer}) {right}" in example.question
    assert [row.question for row in tasks.dataset("du", "test", str(files), 0, 3)] == [row.question for row in data]
    with pytest.raises(DataError, match="no training split; train on gsm8k"):
        tasks.dataset("du", "train", str(files), 0, 0)


def test_bad_input_of_a_training_gets_one_sentence(base, files, tmp_path):
    def refused(kind, words, **more):
        values = values_of(base, files, "gsm8k", **more)["train"]
        with pytest.raises(kind, match=words):
            stages.run(str(tmp_path), values)

    write(tmp_path / "plain" / "gsm8k" / "train.jsonl", [{"question": "2+2?", "steps": [], "answer": "4"}])
    refused(DataError, "no reasoning steps to learn from", data=str(tmp_path / "plain"))
    refused(SettingsError, "num_thought_tokens from 1 on", num_thought_tokens="0", train_thoughts="[]")
    refused(DataError, "cuts off the thoughts", max_len="30")
    refused(SettingsError, "needs the small model; name it with small_model_id", use_assistant_model="true")
    refused(SettingsError, "tune_assistant_model needs generator: assistant", tune_assistant_model="true")
    refused(SettingsError, "SoftCoT learns from cross-entropy alone", method="softcot")
    refused(DataError, "may not be used commercially", task_name="asdiv-aug")
    refused(SettingsError, "prompt family", large_model_id="mistralai/Mistral-7B-v0.1")


def test_the_published_evaluation_command_is_understood():
    asked = {"base_model_id": "Qwen/Qwen3-8B-Instruct", "assistant_model_id": "Qwen/Qwen3-0.6B-Instruct", "num_thought_tokens": "2"}
    asked |= {"params_file_name": "run/projection.bin", "att_file_name": "run/TransformerBlock.bin", "batch_size": "4"}
    asked |= {"num_return_sequences": "10", "print_response": "true", "task_name": "gsm8k"}
    values = {step.step: step.values for step in papers.plan("lta", "gsm8k-qwen3-8b", {f"evaluate.{k}": v for k, v in asked.items()})}
    given = stages.published(values["evaluate"])
    assert (given["large_model_id"], given["thoughts"]) == ("Qwen/Qwen3-8B-Instruct", [2])
    assert stages.hub_name(given["large_model_id"]) == ("Qwen/Qwen3-8B", stages.hub_name("Qwen/Qwen3-8B-Instruct")[1])
    with pytest.raises(SettingsError, match="into one folder"):
        stages.published(values["evaluate"] | {"att_file_name": "elsewhere/TransformerBlock.bin"})
    with pytest.raises(SettingsError, match="into one folder"):
        stages.published(values["evaluate"] | {"params_file_name": ""})


def test_a_training_starts_from_published_weights(base, files, tmp_path):
    values = values_of(base, files, "gsm8k")["train"]
    first = stages.start(values)
    export_official(first, tmp_path / "official")
    named = {"params_file_name": str(tmp_path / "official" / "projection.bin"), "seed": 5}
    again = stages.start(values | named | {"att_file_name": str(tmp_path / "official" / "TransformerBlock.bin")})
    assert all(torch.equal(a, b) for a, b in zip(first.parts.parameters(), again.parts.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="block.linear1"):
        stages.start(values | named)
