"""Registries: found without a list, one owner a name, near misses named, reloads harmless."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from moescope.core.errors import InputError
from moescope.core.registry import Registry

PACKAGE = "moescope_tests_colours"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with two modules, one nested, that register functions in `registry`."""
    folder = tmp_path / PACKAGE
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").write_text(
        f"from moescope.core.registry import Registry\nregistry = Registry('colour', '{PACKAGE}')\n"
    )
    (folder / "deep" / "__init__.py").write_text("")
    for place, name in (("red", "red"), ("deep/blue", "blue")):
        text = f"from {PACKAGE} import registry\ndef {name}(): return '{name}'\nregistry.add('{name}', {name})\n"
        (folder / f"{place}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def _package() -> ModuleType:
    return importlib.import_module(PACKAGE)


def test_items_are_found_in_every_module_without_a_list(package: Path) -> None:
    assert _package().registry.names() == ["blue", "red"]


def test_nothing_is_imported_before_the_first_question(package: Path) -> None:
    registry = _package().registry
    assert f"{PACKAGE}.red" not in sys.modules
    assert "red" in registry
    assert f"{PACKAGE}.deep.blue" in sys.modules


def test_a_new_file_is_a_new_item(package: Path) -> None:
    (package / "green.py").write_text((package / "red.py").read_text().replace("red", "green"))
    assert [item() for item in _package().registry] == ["blue", "green", "red"]


def test_a_broken_module_is_heard_not_skipped(package: Path) -> None:
    (package / "broken.py").write_text("raise RuntimeError('half written')\n")
    registry = _package().registry
    for _ in range(2):
        with pytest.raises(RuntimeError, match="half written"):
            registry.names()


def test_reloading_a_module_replaces_its_own_item(package: Path) -> None:
    registry = _package().registry
    before = registry["red"]
    importlib.reload(sys.modules[f"{PACKAGE}.red"])
    assert registry["red"] is not before
    assert registry["red"]() == "red"


def test_a_name_taken_by_another_item_is_refused_with_both_places(package: Path) -> None:
    (package / "rouge.py").write_text(f"from {PACKAGE} import registry\ndef rouge(): ...\nregistry.add('red', rouge)\n")
    with pytest.raises(InputError, match=r"colour 'red' is registered twice.*red\.red.*rouge\.rouge"):
        _package().registry.names()


def test_unknown_name_lists_what_there_is_and_suggests_the_nearest() -> None:
    registry = Registry[int]("analysis")
    for number, name in enumerate(("load", "nll", "local_consistency", "router_entropy")):
        registry.add(name, number)
    with pytest.raises(InputError) as refused:
        registry["local_consistancy"]
    assert "there is no analysis called 'local_consistancy'" in str(refused.value)
    assert "did you mean 'local_consistency'?" in str(refused.value)
    assert "load, local_consistency, nll, router_entropy" in str(refused.value)


def test_name_like_no_other_gets_no_suggestion() -> None:
    registry = Registry[int]("analysis")
    registry.add("load", 1)
    with pytest.raises(InputError) as refused:
        registry["zzzzzz"]
    assert refused.value.fix is None


def test_empty_registry_says_so() -> None:
    with pytest.raises(InputError, match="none installed"):
        Registry[int]("page")["start"]


def test_items_and_names_come_sorted() -> None:
    registry = Registry[str]("colour")
    for name in ("teal", "amber", "grey"):
        registry.add(name, name.upper())
    assert registry.names() == ["amber", "grey", "teal"]
    assert list(registry) == ["AMBER", "GREY", "TEAL"]
    assert "amber" in registry
    assert "pink" not in registry
