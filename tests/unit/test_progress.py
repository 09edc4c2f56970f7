"""Progress: counts, time left, and how often it draws."""

import json
import time

import pytest

from lab import progress as shown
from lab.progress import Display, Progress, clock, progress


class Kept(Display):
    """Keeps what it would have drawn."""

    def __init__(self, every=0.0):
        super().__init__(every)
        self.drawn, self.ended = [], []

    def draw(self, text, force=True):
        self._last = time.monotonic()
        if force:
            self.drawn.append(text)

    def end(self, text):
        self.ended.append(text)


def test_the_items_come_through_unchanged():
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    assert list(progress(iter("ab"), "letters")) == ["a", "b"]


def test_the_time_left_follows_the_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    with Progress("work", 10, Kept()) as bar:
        assert bar.seconds_left is None
        now[0] = 4.0
        bar.advance(2)
        assert bar.seconds_left == pytest.approx(16.0)
        assert bar.text() == "work 2/10 20% · 0:16 left"
        bar.advance(note="loss 0.5")
        assert bar.text().endswith("left · loss 0.5")


def test_items_done_before_a_resume_do_not_make_it_look_faster(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    with Progress("work", 100, Kept()) as bar:
        bar.start_at(90)
        now[0] = 5.0
        bar.advance(5)
        assert bar.seconds_left == pytest.approx(5.0)


def test_headless_lines_are_rare_and_the_last_one_is_always_there():
    display = Kept(every=3600.0)
    list(progress_on(display, 1000))
    assert display.drawn == [] and display.ended == ["work 1000/1000 100% · in 0:00"]


def progress_on(display, count):
    with Progress("work", count, display) as bar:
        for item in range(count):
            bar.advance()
            yield item


def test_a_loop_that_raises_says_where_it_stopped():
    display = Kept()
    with pytest.raises(ValueError), Progress("work", 5, display) as bar:
        bar.advance(2)
        raise ValueError
    assert display.ended == ["work 2/5 40% · stopped after 0:00"]


def test_inside_a_run_the_state_is_left_for_the_command_to_show(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_PROGRESS", str(tmp_path / "p.json"))
    with Progress("scoring", 4, Kept()) as bar:
        bar.advance(3, "accuracy 0.5")
    state = json.loads((tmp_path / "p.json").read_text())
    assert (state["label"], state["done"], state["total"], state["note"]) == ("scoring", 3, 4, "accuracy 0.5")


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (723, "12:03"), (3723, "1:02:03"), (59.6, "1:00")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_table_in_a_terminal_is_drawn_over_the_one_before(monkeypatch, capsys):
    monkeypatch.setattr(shown, "_size", lambda: (12, 5))
    terminal = shown.Terminal()
    terminal.draw("count 1/3\na row that is too long\nb")
    terminal.draw("count 2/3\nb")
    terminal.end("b done")
    terminal.draw("\n".join("abcdefgh"))
    first, second, last, tall = capsys.readouterr().err.split("\x1b[J")[1:]
    assert first == "count 1/3\na row that \nb\r\x1b[2A" and second == "count 2/3\nb\r\x1b[1A"
    assert last == "b done\n\r" and tall == "a\nb\nc\nd", "no higher than the terminal"
