"""What a newcomer installs: the lists agree, the pins fit them, the Makefile and CI run what they say."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins():
    lines = (ROOT / "constraints.txt").read_text().split()
    return {line.partition("==")[0].lower().replace("_", "-"): line.partition("==")[2] for line in lines}


def test_conda_users_get_the_same_packages(project):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *plain, pip = environment["dependencies"]
    assert plain == [f"python{project['requires-python']}", "pip"] and list(pip) == ["pip"]
    assert pip["pip"] == [*project["dependencies"], *project["optional-dependencies"]["test"], "-e ."]


def test_every_package_has_a_range_and_a_pin_inside_it(project, pins):
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        requirement = Requirement(text)
        assert any(clause.operator == ">=" for clause in requirement.specifier), f"{text} has no lower bound"
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text


def test_pins_are_exact_and_hold_on_every_machine(pins):
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values()), "no local builds, no paths"


@pytest.mark.parametrize("target", ["demo", "test", "test-all", "lint"])
def test_the_makefile_knows_its_targets(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_continuous_integration_runs_every_tier():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script and "make test " in script
    assert re.search(r"^test:.*\n.*tests/unit tests/smoke", (ROOT / "Makefile").read_text(), re.M)
    tiers = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"unit", "smoke", "fixtures", "__pycache__"}
    assert all(f"tests/{tier}" in script for tier in tiers)
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")]).returncode == 0


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_code_and_notebooks_keep_the_style(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "--quiet", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"make lint says:\n{done.stdout[-3000:]}"


def test_no_file_of_the_repository_names_a_persons_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    texts = [
        path
        for name in tracked
        if (path := ROOT / name).is_file() and path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".ipynb"}
    ]
    words = re.compile("|".join(["/" + "home/", "/" + "Users/", "/" + "root/", "/" + "work/"]))
    assert [str(path) for path in texts if words.search(path.read_text())] == []
