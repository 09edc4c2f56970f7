"""`import lab` is quick, drags nothing heavy in, and every public name is there when asked for."""

import subprocess
import sys

import pytest

import lab

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "matplotlib", "pandas", "numpy", "ipywidgets", "pydantic")


def test_import_lab_imports_nothing_heavy():
    code = f"import sys, lab; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_import_lab_takes_a_fraction_of_a_second():
    report = subprocess.run([sys.executable, "-X", "importtime", "-c", "import lab"], capture_output=True, text=True, check=True).stderr
    (line,) = [line for line in report.splitlines() if line.split("|")[-1].strip() == "lab"]
    assert int(line.split("|")[1]) < 200_000


@pytest.mark.parametrize("name", [*lab._OBJECTS, *lab._MODULES])
def test_every_public_name_resolves(name):
    assert getattr(lab, name) is not None and name in dir(lab)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        lab.laod  # noqa: B018
