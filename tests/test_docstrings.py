"""Docstrings: every example runs, every public name says what it does."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

import moescope

PACKAGES = ("moescope.core", "moescope.store", "moescope.probes", "moescope.routing", "moescope.sae", "moescope.report")
ALONE = (
    "moescope", "moescope.analysis_api", "moescope.contrast_api", "moescope.edit_page", "moescope.edits",
    "moescope.effect_api", "moescope.phenomena_api", "moescope.sae_api", "moescope.sae_study", "moescope.sweep_api",
)  # fmt: skip
LEFT_OUT = "moescope.probes.demo"  # scripts that rebuild the bundled model from Debian packages


def _modules() -> list[str]:
    names = list(ALONE)
    for package in PACKAGES:
        names.append(package)
        names += [
            m.name for m in pkgutil.walk_packages(importlib.import_module(package).__path__, prefix=f"{package}.")
        ]
    return [name for name in names if not name.startswith(LEFT_OUT)]


def _examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in _modules() for test in finder.find(importlib.import_module(name), name)]
    return [test for test in found if test.examples]


EXAMPLES = _examples()


def test_examples_are_found() -> None:
    assert len(EXAMPLES) >= 15
    assert "moescope.store.store.Store" in {test.name for test in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name.removeprefix("moescope."))
def test_example_gives_what_it_says(example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # examples leave their files to the system
    runner = doctest.DocTestRunner(verbose=False)
    said: list[str] = []
    outcome = runner.run(example, out=said.append)
    assert outcome.attempted > 0
    assert outcome.failed == 0, "".join(said)


@pytest.mark.parametrize("name", moescope.__all__)
def test_public_name_says_what_it_is(name: str) -> None:
    value = getattr(moescope, name)
    own = value.__dict__.get("__doc__") if isinstance(value, type) else value.__doc__
    assert own
    assert inspect.cleandoc(own).split("\n")[0].rstrip().endswith((".", "?"))


def _public_methods(owner: type) -> list[tuple[str, object]]:
    members = [(name, value) for name, value in vars(owner).items() if not name.startswith("_")]
    return [(name, value) for name, value in members if callable(value) or isinstance(value, property)]


@pytest.mark.parametrize("name", [n for n in moescope.__all__ if isinstance(getattr(moescope, n), type)])
def test_public_methods_and_properties_say_what_they_do(name: str) -> None:
    for method, value in _public_methods(getattr(moescope, name)):
        assert inspect.getdoc(value), f"{name}.{method}"


@pytest.mark.parametrize("name", [n for n in moescope.__all__ if inspect.isfunction(getattr(moescope, n))])
def test_public_function_describes_every_parameter_and_names_its_errors(name: str) -> None:
    function = getattr(moescope, name)
    docstring = inspect.getdoc(function) or ""
    parameters = inspect.signature(function).parameters
    for parameter in parameters:
        assert f"{parameter}:" in docstring or f"{parameter}, " in docstring, f"{name}({parameter}) is not described"
    if parameters:
        assert "Raises:" in docstring


@pytest.mark.parametrize("name", _modules())
def test_module_says_what_it_is_for(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    assert module.__doc__
