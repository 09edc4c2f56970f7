"""What the processes of a launch write, sorted, and what is made of the death of one."""

import itertools

import pytest

from lab import launch
from lab.errors import OutOfMemory
from lab.running import memory


@pytest.fixture
def lines():
    shown, rows = [], []
    made = launch._Lines(shown.append, rows.append)
    made.shown, made.rows = shown, rows
    return made


def test_a_row_is_found_behind_what_another_process_has_begun(lines):
    for line in ("a text\n", '\x1erow {"a": 1}\n', 'half a line\x1erow {"a": 2}\n'):
        lines(line)
    assert lines.rows == [{"a": 1}, {"a": 2}] and lines.shown == ["a text\n", "half a line"]


def test_only_what_the_system_ended_for_want_of_memory_is_out_of_memory(lines, monkeypatch):
    monkeypatch.setattr(memory, "kills", itertools.count(1).__next__)
    assert not isinstance(lines.death(1), OutOfMemory) and "died (exit status 1)" in str(lines.death(1))
    lines("    traceback : Signal 9 (SIGKILL) received by PID 12\n")
    assert isinstance(lines.death(1), OutOfMemory) and "ended by Linux for want of memory" in str(lines.death(1))
    monkeypatch.setattr(memory, "kills", lambda: 0)
    assert not isinstance(lines.death(1), OutOfMemory) and "killed (SIGKILL)" in str(lines.death(1))


def test_the_counters_of_both_kinds_of_cgroup_and_of_the_machine_count(tmp_path, monkeypatch):
    (tmp_path / "events").write_text("low 0\noom 4\noom_kill 2\n")
    (tmp_path / "vmstat").write_text("pgfault 7\noom_kill 3\n")
    monkeypatch.setattr(memory, "_COUNTERS", [str(tmp_path / name) for name in ("events", "vmstat", "absent")])
    assert memory.kills() == 5
