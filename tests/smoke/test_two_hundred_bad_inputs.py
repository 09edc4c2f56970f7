"""Two hundred and more bad inputs, counted: parameters, recipes, data files, checkpoints, command lines.

Each is answered with one sentence, never a traceback, and nothing is written or overwritten.
"""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest

import lab
from lab import cli
from lab.data.benchmarks import load_benchmark
from lab.errors import CheckpointError, DataError, LabError, SettingsError
from lab.files import file_digest
from lab.models.loading import read_state, read_torch
from lab.running import papers, runs
from lab.running.parameters import parameters_of

PARAMETERS = [
    *(
        (name, "1")
        for name in ("", " ", "cuont", "Count", "count ", "draw.", ".count", "drwa.count", "count.draw", "a.b.c", "run", "draw.run")
    ),
    *((name, "1") for name in ("double.count", "extra.factor", "-p", "séed", "seed\n", "count=", "__class__", "draw.draw.count")),
    *(
        ("count", text)
        for text in ("x", "1.5", "[1]", "{a: 1}", "null", "true", "--", "1,2", "'1'", "", "0x", "1e3", "[", "a: b: c", "\x00")
    ),
    *(("seed", text) for text in ("none", "1.0", "seed", "[0]", "~", "0,1", "2 3", "!!python/object:os.system x")),
    *(("pause_s", text) for text in ("x", "[]", "yes", "1,5", "null", "1 s", "{}", "1..0")),
    *(("more", text) for text in ("2", "maybe", "[true]", "'yes'", "1.0", "tru", "")),
    *(("double.factor", text) for text in ("two", "[2]", "2x", "true", "null", "--2")),
]

RECIPES = [
    b"\xff\xfe",
    b"count: [",
    b"count: 1\n  seed: 2",
    b"{",
    b"- count",
    b"count",
    b"42",
    b"[1, 2]",
    b"count: 1: 2",
    b"\tcount: 1",
    b"count: *a",
    b"a: &a [*a]",
    b"!!python/object/apply:os.system ['touch broken']",
    b"count: !!python/name:os.system",
    b"%YAML 9",
    b"count: 'x",
    b'count: "\\q"',
    b"? [a]\n: 1",
    b"1: 2",
    b"null: 1",
    *(f"{name}: 1".encode() for name in ("cuont", "run", "Count", "draw.count", "recipe", "paper", "notebook", "steps", "true")),
    *(f"count: {value}".encode() for value in ("x", "1.5", "[1]", "null", "'3'", "{}", "1e-4", "2026-01-01", "yes", "0o8", "1:30:0x")),
    *(f"pause_s: {value}".encode() for value in ("1e-4", "soon", "[]", "'0.1'")),
    *(f"{line}: x\n{line}: y".encode() for line in ("more", "seed")),
]

LINE = '{"question": "1+1?", "answer": "2", "steps": []}\n'
DATA = [
    *(
        ("gsm8k", "test.jsonl", text)
        for text in (
            "",
            "\n\n",
            "{",
            "[]",
            "null",
            "3",
            '"text"',
            "{}",
            '{"question": "q"}',
            '{"answer": "1"}',
            '{"question": "", "answer": "1"}',
            '{"question": "q", "answer": ""}',
            '{"question": "q", "answer": null}',
            '{"question": null, "answer": "1"}',
            '{"question": "q", "answer": "1", "id": 1}\n{"question": "r", "answer": "1", "id": 1}',
            LINE + "{",
            LINE + "rubbish",
            LINE + "[1, 2]",
            LINE + '{"question": "q"',
            '{"conversations": []}',
            '{"conversations": [1, 2]}',
            '{"conversations": [{"from": "human"}]}',
            '{"messages": [{"role": "assistant", "content": "4"}]}',
            '{"messages": [{"role": "user", "content": "4?"}]}',
            '{"lSolutions": [], "sQuestion": "q"}',
            '{"Body": 3, "Question": "q", "Answer": 1}',
            '{"question": "q", "options": {"text": ["a"]}, "answer": "A"}',
            '{"question": "q", "choices": {"label": ["A"], "text": ["x"]}, "answer": "Z"}',
            '{"question": "q", "choices": ["a", "b"], "answer": 77}',
            '{"question": "q", "Correct Answer": "x"}',
            '{"question": "q", "multiple_choice_targets": ["a"], "multiple_choice_scores": []}',
            '{"question": "q", "answer": "1"}{"question": "r", "answer": "2"}',
            '{"question": "q" "answer": "1"}',
            "question,answer\nq,1",
            "\x00\x01",
        )
    ),
    *(("gsm8k", "test.jsonl", content) for content in (b"\xff\xfe\x00", b"\x80abc", b'{"question": "\xe9", "answer": "1"}')),
    *(("gsm8k_aug", "train.txt", text) for text in ("", "no bars", "q||no answer", "||", "q|| ####", b"\xff")),
    *(("prontoqa", "test.json", text) for text in ("", "[]", "{}", "[1]", "[", '{"example1": {}}', '{"a": [1]}', "null", '"x"')),
    ("gsm8k", "test.jsonl.gz", b"not gzip"),
    ("gsm8k", "test.jsonl.gz", b"\x1f\x8b\x08\x00broken"),
    ("gsm8k", "other.jsonl", LINE),
    ("gsm9k", "test.jsonl", LINE),
    ("", "test.jsonl", LINE),
]


class Evil:
    def __reduce__(self):
        return (os.system, (f"touch {os.environ['LAB_EVIL']}",))


def changed(name, change):
    """A damage to the JSON file `name` of a checkpoint."""

    def damage(folder):
        path = folder / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def replaced(name, content):
    def damage(folder):
        path = folder / name
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return damage


def removed(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def tensors(change):
    def damage(folder):
        from safetensors.torch import load_file, save_file

        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")

    return damage


def evil(name, protocol):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Evil(), protocol))

    return damage


def first(state):
    return sorted(state)[0]


RUBBISH = (b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe", b"\x00" * 64)
CHECKPOINTS = [
    *(replaced("lab.json", content) for content in RUBBISH),
    *(replaced("config.json", content) for content in RUBBISH),
    *(replaced("model.safetensors", content) for content in RUBBISH),
    *(replaced("tokenizer.json", content) for content in RUBBISH),
    *(replaced("model.safetensors", lambda content, cut=cut: content[: int(len(content) * cut)]) for cut in (0.001, 0.1, 0.5, 0.9, 0.999)),
    replaced("model.safetensors", lambda content: content[:8] + b"\xff" * 100 + content[108:]),
    replaced("model.safetensors", lambda content: b"\xff" * 8 + content[8:]),
    removed("model.safetensors"),
    removed("config.json"),
    removed("lab.json", "config.json"),
    changed("lab.json", lambda found: {**found, "method": "unheard"}),
    changed("lab.json", lambda found: {**found, "method": 3}),
    changed("lab.json", lambda found: {**found, "format": 99}),
    changed("lab.json", lambda found: {"format": 1}),
    changed("config.json", lambda found: {**found, "model_type": "unheard"}),
    changed("config.json", lambda found: {**found, "n_embd": 48}),
    changed("config.json", lambda found: {**found, "n_layer": 9}),
    changed("config.json", lambda found: {**found, "vocab_size": 5}),
    changed("config.json", lambda found: {**found, "n_embd": "wide"}),
    tensors(lambda state: {name: value for name, value in state.items() if name != first(state)}),
    tensors(lambda state: {**state, "stray.weight": state[first(state)].clone()}),
    tensors(lambda state: {**state, first(state): state[first(state)][:1].clone()}),
    tensors(lambda state: {f"other.{name}": value for name, value in state.items()}),
    tensors(lambda state: {}),
    *(evil(name, protocol) for name in ("pytorch_model.bin", "checkpoint_1") for protocol in (0, 2, 4)),
]

COMMANDS = [
    *(["run", paper] for paper in ("mni", "", " ", "MINI", "../mini", "mini/", "tah codi", "-", "'", "\u202emini", "a" * 300)),
    *(["run", "mini", "--recipe", name] for name in ("toi", "toy.yaml", "../toy", " ", "toy-double", "TOY", "toy,long")),
    *(["run", "mini", "-p", text] for text in ("count", "=3", "", "cuont=3", "count=x", "draw.=1", "run=here", "double.count=1", "seed=[")),
    *(["run", "mini", "--from", step] for step in ("drwa", "draw", " ")),
    ["run", "mini", "--resume"],
    ["run", "mini", "--run", "file.txt"],
    ["run", "mini", "--run", "thesis"],
    ["run", "mini", "--run", "file.txt/below"],
    ["run", "mini", "--run", "thesis", "--resume"],
    *(["sweep", "mini", "--recipe", "toy", "-p", text] for text in ("seed=", "seed=a,b", "sed=0,1", "seed=[0", "seed", "count={", "=1")),
    *(["sweep", "mini", "--recipe", "toy", *more] for more in (["--engine", "slrum"], ["-o", "gpus=1"], ["-o", "a=["])),
    *(
        ["sweep", "mini", "--recipe", "toy", *more]
        for more in (["--points", "file.txt"], ["--points", "none.yaml"], ["--memory", "1e9"], ["--gpus", "999"])
    ),
    *(["sweep", "mini", "--recipe", "toy", *more] for more in (["--devices", "99"], ["--engine", "ray", "--devices", "0"])),
    *(["sweep", name] for name in (",", "mni", "mini,mni")),
    *([command, path] for command in ("verify", "rerun", "report", "figures") for path in ("nowhere", "thesis", "file.txt")),
    ["figures", "thesis", "--size", "huge"],
]
WRONG_OPTIONS = [
    ["rnu"],
    ["run"],
    ["run", "--"],
    ["run", "mini", "--resme"],
    ["run", "mini", "mini"],
    ["run", "mini", "--recipe"],
    ["sweep", "mini", "--jobs", "0"],
    ["sweep", "mini", "--jobs", "many"],
    ["sweep", "mini", "--retries", "-1"],
    ["sweep", "mini", "--timeout", "soon"],
    ["rerun", "a", "--tolerance", "x"],
    ["demo", "--jobs", "-3"],
    ["--loud", "papers"],
    ["report"],
]


def check_refused(call, kind=LabError):
    """What `call` is refused with: one line that a person can read."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert text.strip() and len(text.strip().splitlines()) == 1 and "Traceback" not in text, text


def each(cases, check):
    """Checks every case, so that one failure does not hide the others."""
    wrong = []
    for number, case in enumerate(cases):
        try:
            check(number, case)
        except (Exception, pytest.fail.Exception) as error:
            wrong.append(f"{number} {case!r}: {type(error).__name__}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)


def test_there_are_two_hundred_and_more():
    kinds = {"parameters": PARAMETERS, "recipes": RECIPES, "data": DATA, "checkpoints": CHECKPOINTS, "commands": COMMANDS + WRONG_OPTIONS}
    counts = {kind: len(cases) for kind, cases in kinds.items()}
    assert sum(counts.values()) >= 200 and min(counts.values()) >= 40, counts


def test_bad_parameters(bench, outputs):
    each(PARAMETERS, lambda _, case: check_refused(lambda: papers.plan("mini", "toy", dict([case])), SettingsError))
    assert not outputs.exists()


def test_bad_recipes(bench, outputs, monkeypatch):
    path = bench / "papers" / "mini" / "recipes" / "toy.yaml"
    monkeypatch.chdir(bench)

    def check(_, content):
        path.write_bytes(content)
        check_refused(lambda: papers.plan("mini", "toy"), SettingsError)
        assert path.read_bytes() == content

    each(RECIPES, check)
    assert not outputs.exists() and not (bench / "broken").exists()


def test_bad_data(tmp_path):
    def check(number, case):
        name, file, content = case
        path = tmp_path / str(number) / file
        path.parent.mkdir()
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        check_refused(lambda: load_benchmark(name, "test", path.parent if file == "other.jsonl" else path), (DataError, SettingsError))

    each(DATA, check)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model with no method, as `save` writes it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    lab.load("toy:gpt2-micro").save(folder)
    return folder


def test_bad_checkpoints(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_EVIL", str(tmp_path / "executed"))

    def check(number, damage):
        folder = tmp_path / str(number)
        shutil.copytree(checkpoint, folder)
        damage(folder)
        before = file_digest(folder)
        check_refused(lambda: lab.load(folder), (CheckpointError, SettingsError))
        assert file_digest(folder) == before

    each(CHECKPOINTS, check)
    assert not (tmp_path / "executed").exists()


def test_a_pickle_that_would_run_a_command_is_refused_wherever_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_EVIL", str(tmp_path / "executed"))
    import torch

    torch.save({"weights": Evil()}, tmp_path / "zip.bin")
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Evil()))
    for path in (tmp_path / "zip.bin", tmp_path / "bare.bin"):
        for read in (read_torch, read_state):
            check_refused(lambda read=read, path=path: read(path), CheckpointError)
    assert not (tmp_path / "executed").exists()
    os.system(f"touch {os.environ['LAB_EVIL']}")
    assert (tmp_path / "executed").exists(), "the command itself works"


def test_bad_command_lines(bench, outputs, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    (work / "thesis").mkdir(parents=True)
    (work / "thesis" / "chapter.txt").write_text("years of work")
    (work / "file.txt").write_text("a file")
    monkeypatch.chdir(work)
    before = file_digest(work)

    def check(_, arguments):
        monkeypatch.setattr(sys, "argv", ["lab", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert stop.value.code in (2, 3) and out == "" and "Traceback" not in err
        assert arguments in WRONG_OPTIONS or (err.startswith("lab: ") and len(err.strip().splitlines()) == 1), err

    each(COMMANDS + WRONG_OPTIONS, check)
    assert file_digest(work) == before and not outputs.exists()


def test_a_notebook_is_read_and_not_run(tmp_path):
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "x: int = __import__('os').system('touch executed')"}
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"cells": [cell]}))
    check_refused(lambda: parameters_of(path), SettingsError)
    assert not Path("executed").exists()


def test_a_manifest_is_read_and_not_run(tmp_path):
    (tmp_path / "manifest.json").write_bytes(pickle.dumps({"paper": "mini"}))
    check_refused(lambda: runs.Run.open(tmp_path, "mini"))
