"""Reading records, the published file shapes, splits and notes, and what is said about bad files."""

import gzip
import json
import os
from pathlib import Path

import pytest

from lab.data import BENCHMARKS, Dataset, Example, benchmark, load_benchmark, read_records, write_jsonl
from lab.errors import DataError, SettingsError


def put(path: Path, *records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def one(path: Path, name: str = "gsm8k", split: str = "test") -> Example:
    return load_benchmark(name, split, path)[0]


PLAIN = {"id": "a", "question": "q", "steps": ["s"], "answer": "1"}


def test_lines_end_at_newline_only(tmp_path):
    record = {**PLAIN, "question": "a\u2028b\u0085c\x0bd"}
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert [found for _, found in read_records(path)] == [record]
    assert one(path).question == "a\u2028b\u0085c\x0bd"


def test_written_examples_come_back_and_bytes_repeat(tmp_path):
    examples = [Example("a", "q\u2028", ("s",), "1", ("x", "y"), {"n": 3}), Example("b", "r", (), "2")]
    first, second = write_jsonl(tmp_path / "x.jsonl.gz", examples), write_jsonl(tmp_path / "y.jsonl.gz", examples)
    assert first.read_bytes() == second.read_bytes()
    back = load_benchmark("gsm8k", "test", first)
    assert list(back) == examples and back.fingerprint == Dataset("", "", tuple(examples)).fingerprint
    assert back.fingerprint != back[:1].fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"question": "q"}\n{"a": ', "line 2 is not JSON"),
        (b"[1]\n", "line 1 is a JSON list"),
        (b'\n{"question": "\xff"}\n', "line 2 is not UTF-8"),
        (b'{"question": "q", "answer": ""}\n', "line 1: no 'answer'"),
        (b'{"answer": "3"}\n', "line 1: no 'question'"),
        (b'{"id": "a", "question": "q", "answer": "1"}\n' * 2, "stands more than once"),
        (b'{"question": "q", "choices": {"text": ["x"]}, "answer": "A"}\n', "line 1 has no known shape"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_benchmark("arc_e", "test", path)
    assert message == "stands more than once" or "bad.jsonl" in str(caught.value)


def test_cut_off_gzip_and_absent_file(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(PLAIN).encode() * 50)[:-9])
    with pytest.raises(DataError, match="cut off"):
        load_benchmark("gsm8k", "test", path)
    with pytest.raises(DataError, match="no file or folder"):
        load_benchmark("gsm8k", "test", tmp_path / "none")


def test_names():
    with pytest.raises(SettingsError, match="Did you mean 'math500'"):
        benchmark("math50")
    for name in ("humaneval", "mbpp", "livecodebench"):
        with pytest.raises(DataError, match="execute model-written code"):
            load_benchmark(name)
    assert {"gpqa", "arc_c", "minerva", "openr1_math", "gsm_hard"} <= BENCHMARKS.keys()
    with pytest.raises(DataError, match="data=PATH"):
        load_benchmark("prosqa")


SHAPES = [
    ("gsm8k", {"question": "q", "answer": "a <<1+1=2>>2\nb\n#### 1,234"}, ("a <<1+1=2>>2", "b"), "1234"),
    ("gsm8k", {"question": "q", "answer": "how? ** so 2\n#### -3"}, ("how? ** so 2",), "-3"),
    ("gsm8k_aug", {"question": "q", "cot": "<<1+1=2>> <<2*3=6>>", "answer": "6"}, ("<<1+1=2>>", "<<2*3=6>>"), "6"),
    ("gsm8k_aug", {"question": "q", "cot": "He has 5. So 6.", "answer": "6"}, ("He has 5.", "So 6."), "6"),
    ("aime24", {"ID": "2024-I-1", "Problem": "q", "Solution": "x", "Answer": "025"}, ("x",), "25"),
    (
        "math",
        {"problem": "q", "solution": "a\n\nso \\boxed{\\frac{1}{2}}.", "level": 3},
        ("a", "so \\boxed{\\frac{1}{2}}."),
        "\\frac{1}{2}",
    ),
    ("math", {"problem": "q", "solution": "work", "answer": "7"}, ("work",), "7"),
    ("multiarith", {"sQuestion": "q", "lSolutions": [39.0], "lEquations": ["X=1"]}, ("X=1",), "39"),
    ("multiarith", {"question": "q", "final_ans": "8"}, (), "8"),
    ("svamp", {"question_concat": "q", "Answer": "51.0"}, (), "51"),
    ("gsm_hard", {"input": "q", "code": "c", "target": -9867630.0}, (), "-9867630"),
    ("gsm_hard", {"instruction": "q", "response": 2.5}, (), "2.5"),
    ("strategyqa", {"qid": "1", "question": "q", "answer": True, "facts": "f\ng"}, ("f", "g"), "yes"),
    ("prosqa", {"question": "q", "answer": "Tom is a lempus.", "steps": ["s"], "edges": [[0, 1]]}, ("s",), "Tom is a lempus."),
    ("date_understanding", {"question": "q (A) x", "answer": "Let us see\n05/01/2021\nA"}, (), "A"),
    ("openr1_math", {"problem": "q", "solution": "s", "answer": "\\pi", "generations": ["g"]}, ("s",), "\\pi"),
    ("math", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<think>t</think>so \\boxed{4}"}]}, ("t",), "4"),
    ("gsm8k", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "w\n#### 9"}]}, (), "9"),
]


@pytest.mark.parametrize(("name", "record", "steps", "answer"), SHAPES)
def test_published_shapes(tmp_path, name, record, steps, answer):
    example = one(put(tmp_path / "x.jsonl", record), name)
    assert (example.question[0], example.steps, example.answer) == ("q", steps, answer)


def test_text_lines_of_gsm8k_aug(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("How many?||<<1+1=2>> <<2+2=4>> #### 1,004\nNone?||#### 3\n")
    first, second = load_benchmark("gsm8k_aug", "test", path)
    assert (first.steps, first.answer, second.steps, second.answer) == (("<<1+1=2>>", "<<2+2=4>>"), "1004", (), "3")
    path.write_text("no bar #### 3\n")
    with pytest.raises(DataError, match="line 1"):
        load_benchmark("gsm8k_aug", "test", path)


def test_prontoqa_shapes(tmp_path):
    proof = [f"s{i}." for i in range(11)]
    inner = {"question": "c", "query": "True or false: q.", "chain_of_thought": proof, "answer": "True"}
    path = tmp_path / "gen.json"
    path.write_text(json.dumps({f"example{i}": {"test_example": {**inner, "answer": str(i >= 9200)}} for i in range(9203)}))
    assert [len(load_benchmark("prontoqa", split, path)) for split in ("train", "validation", "test")] == [9000, 200, 3]
    example = load_benchmark("prontoqa", "test", path)[0]
    assert example.question == "c True or false: q." and len(example.steps) == 6 and example.answer == "True"
    logic = {"id": "P", "context": "c", "question": "q?", "options": ["A) True", "B) False"], "answer": "B"}
    example = one(put(tmp_path / "x.jsonl", logic), "prontoqa")
    assert (example.question, example.options, example.answer) == ("c q?", ("True", "False"), "False")


def test_multiple_choice_shapes(tmp_path):
    mmlu = {"question": "q", "choices": ["w", "x", "y", "z"], "answer": 2}
    arc = {"question": "q", "choices": {"text": ["w", "x"], "label": ["1", "2"]}, "answerKey": "2"}
    aqua = {"question": "q", "options": ["A)1", "B)2", "C)3"], "rationale": "r\ns", "correct": "C"}
    found = [one(put(tmp_path / f"{i}.jsonl", record), "aqua") for i, record in enumerate((mmlu, arc, aqua))]
    assert [example.answer for example in found] == ["C", "B", "C"]
    assert found[2].options == ("1", "2", "3") and found[2].steps == ("r", "s")
    assert found[2].question == "q\n(A) 1\n(B) 2\n(C) 3"
    again = write_jsonl(tmp_path / "again.jsonl", found[2:])
    assert one(again, "aqua").question == found[2].question, "options are shown once"
    assert load_benchmark("aqua", "test", tmp_path / "2.jsonl", show_options=False)[0].question == "q"


def test_right_answer_first_is_shuffled_and_followed(tmp_path):
    gpqa = [{"Question": f"q{i}", "Correct Answer": "right"} | {f"Incorrect Answer {k}": f"w{k}" for k in (1, 2, 3)} for i in range(40)]
    dates = [{"inputs": f"q{i}", "multiple_choice_targets": ["right", "x", "y"], "multiple_choice_scores": [1, 0, 0]} for i in range(40)]
    for name, rows in (("gpqa", gpqa), ("date_understanding", dates)):
        examples = load_benchmark(name, "test", put(tmp_path / f"{name}.jsonl", *rows))
        assert all(example.options["ABCD".index(example.answer)] == "right" for example in examples)
        assert {example.answer for example in examples} >= set("ABC")
        assert list(examples) == list(load_benchmark(name, "test", tmp_path / f"{name}.jsonl"))


def test_layouts_splits_and_notes(tmp_path):
    put(tmp_path / "gsm8k_aug" / "train_no_aug.jsonl", PLAIN)
    stand_in = load_benchmark("gsm8k_aug", "train", tmp_path)
    assert len(stand_in.notes) == 1 and "385,620" in stand_in.notes[0] and stand_in[:1].notes == stand_in.notes
    put(tmp_path / "gsm8k_aug" / "train.jsonl", {**PLAIN, "id": "full"})
    full = load_benchmark("gsm8k_aug", "train", tmp_path / "gsm8k_aug")
    assert full[0].id == "full" and not full.notes
    assert "'train' is used" in load_benchmark("gsm8k_aug", "test", tmp_path).notes[0]
    put(tmp_path / "coconut" / "gsm_valid.json", PLAIN)
    assert load_benchmark("gsm8k_aug", "validation", tmp_path / "coconut").notes == ()
    put(tmp_path / "lta" / "test_socratic.jsonl", PLAIN)
    assert len(load_benchmark("gsm8k", "test", tmp_path / "lta")) == 1
    put(tmp_path / "tah" / "minerva.jsonl", PLAIN)
    assert len(load_benchmark("minerva", "test", tmp_path / "tah")) == 1
    with pytest.raises(DataError, match="svamp/test.jsonl"):
        load_benchmark("svamp", "test", tmp_path)


def test_ranges_ids_and_shuffles(tmp_path):
    path = put(tmp_path / "x.jsonl", *({**PLAIN, "id": str(i)} for i in range(20)))

    def ids(**options):
        return [example.id for example in load_benchmark("gsm8k", "test", path, **options)]

    assert ids(start=3, limit=2) == ["3", "4"] and ids(ids=["7", "2"]) == ["7", "2"]
    # the seed-42 order of `datasets.shuffle`, by which the published slices are cut
    assert ids(shuffle_seed=42) == list(map(str, [15, 9, 14, 7, 12, 10, 6, 19, 3, 0, 16, 5, 11, 18, 2, 4, 17, 1, 13, 8]))
    with pytest.raises(DataError, match="none at or after 20"):
        ids(start=20)
    with pytest.raises(DataError, match="no example '99'"):
        ids(ids=["99"])
    with pytest.raises(SettingsError, match="limit"):
        ids(limit=0)


def test_hub_rows_go_through_the_same_door(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([{"ID": "2024-I-4", "Problem": "q", "Solution": "s", "Answer": 33}])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: {"train": rows}[split])
    found = load_benchmark("aime24")
    assert found[0] == Example("2024-I-4", "q", ("s",), "33", (), found[0].extra) and not found.notes
    assert load_benchmark("minerva").notes == ("minerva has no 'test' split on the hub; 'train' is used",)

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="math-ai/minervamath.*data=PATH"):
        load_benchmark("minerva")


@pytest.mark.skipif(not os.environ.get("LAB_DATA"), reason="LAB_DATA names no folder with real benchmark data")
def test_real_counts():
    counts = {
        "gsm8k": 1319,
        "gsm_hard": 1319,
        "multiarith": 600,
        "svamp": 1000,
        "prosqa": 500,
        "prontoqa": 500,
        "math500": 500,
        "aime24": 30,
    }
    counts |= {"date_understanding": 369, "aqua": 254, "mmlu_redux": 5700, "mmlu_stem": 3018, "olympiadbench": 675, "amc23": 40}
    for name, count in counts.items():
        assert len(load_benchmark(name, "test", os.environ["LAB_DATA"])) == count
