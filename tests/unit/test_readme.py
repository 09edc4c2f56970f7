"""What the README tells people to type is what there is."""

import re
import shlex
from pathlib import Path

import pytest

from lab import cli
from lab.running import papers

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"`(lab [^`]+)`", README)))


def value_of(words, option):
    return [words[place + 1] for place, word in enumerate(words) if word == option]


@pytest.mark.parametrize("text", COMMANDS)
def test_commands_recipes_and_parameters_exist(text):
    _, command, *words = shlex.split(text.replace("…", "").replace("[", "").replace("]", ""))
    assert command in {registered.callback.__name__ for registered in cli.app.registered_commands}
    if command not in ("run", "sweep") or not words or words[0] not in papers.papers():
        return
    overrides = dict(item.split("=", 1) for item in value_of(words, "-p"))
    recipe = (value_of(words, "--recipe") or ["toy"])[0]
    single = {name: value.split(",")[0] for name, value in overrides.items()}
    assert papers.plan(words[0], recipe, single)
    for step in value_of(words, "--from"):
        papers.pipeline(words[0]).spec(step)


def test_make_targets_and_files_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([\w-]+)", README)) - {"on", "are"} <= targets
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
