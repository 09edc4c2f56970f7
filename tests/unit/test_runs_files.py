"""Writes are whole or absent, logs have no torn lines, locks die with their holder."""

import errno
import os
import subprocess

import pytest

from lab import files
from lab.errors import RunError


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = files.write_text(tmp_path / "note.txt", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"Cannot write .*note\.txt: no space is left on the disk; free some"):
        files.write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("number", "words"), [(errno.EROFS, "read-only"), (errno.EACCES, "permission is denied"), (errno.EDQUOT, "quota")])
def test_each_refusal_of_the_system_has_its_sentence(tmp_path, monkeypatch, number, words):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RunError, match=words):
        files.write_json(tmp_path / "a.json", {})


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        files.write_text(disk / "kept.txt", "small")
        with pytest.raises(RunError, match="no space is left"):
            files.write_text(disk / "kept.txt", "x" * 200_000)
        with pytest.raises(RunError, match="no space is left"):
            for number in range(200_000):
                files.append_line(disk / "log.jsonl", {"step": number})
        assert (disk / "kept.txt").read_text() == "small"
        lines = files.read_lines(disk / "log.jsonl")
        assert [line["step"] for line in lines] == list(range(len(lines)))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting read-only needs root")
def test_a_read_only_file_system(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        with pytest.raises(RunError, match="read-only"):
            files.write_text(disk / "run" / "manifest.json", "{}")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_line_torn_by_a_kill_is_not_read_and_cut_off_by_the_next_write(tmp_path):
    log = tmp_path / "metrics.jsonl"
    files.append_line(log, {"step": 0})
    with open(log, "a") as file:
        file.write('{"step": 1, "lo')
    assert files.read_lines(log) == [{"step": 0}]
    files.append_line(log, {"step": 1})
    assert files.read_lines(log) == [{"step": 0}, {"step": 1}]


def test_a_log_that_is_one_torn_line(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"st')
    assert files.read_lines(log) == []
    files.append_line(log, {"step": 0})
    assert files.read_lines(log) == [{"step": 0}]


def test_a_lock_is_refused_while_it_is_held_and_free_afterwards(tmp_path):
    held = files.lock(tmp_path / ".lock", "in use")
    with pytest.raises(RunError, match=rf"in use \(process {os.getpid()} on "):
        files.lock(tmp_path / ".lock", "in use")
    held.close()
    files.lock(tmp_path / ".lock", "in use").close()


def test_numbers_of_numpy_and_torch_become_plain():
    import numpy
    import torch

    given = {"a": numpy.float32(0.5), "b": torch.tensor([1, 2]), 3: {None}, "c": numpy.int64(4), "d": torch.tensor(True)}
    assert files.plain(given) == {"a": 0.5, "b": [1, 2], "3": [None], "c": 4, "d": True}
    assert files.plain({"c", 2, "a", None, "b"}) == ["a", "b", "c", 2, None], "in the same order in every process"


def test_the_digest_of_a_folder_sees_names_and_content(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = files.file_digest(tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    second = files.file_digest(tmp_path)
    (tmp_path / "b.txt").write_text("two")
    assert len({first, second, files.file_digest(tmp_path)}) == 3


def test_a_large_file_is_known_by_size_head_and_tail(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"a" * (3 << 20))
    first = files.file_digest(path, whole_below=1 << 20)
    path.write_bytes(b"a" * (3 << 20) + b"b")
    assert files.file_digest(path, whole_below=1 << 20) != first
