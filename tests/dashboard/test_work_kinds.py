from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moescope.core.errors import InputError
from moescope.dashboard.app import create_app
from moescope.dashboard.pages.work import begin, form
from moescope.dashboard.services import services_of
from moescope.dashboard.work_kinds import KINDS, Kind, checked, command_line
from moescope.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store(tmp_path / "my runs.duckdb") as opened:
        yield opened


def _filled(kind: Kind) -> dict[str, Any]:
    values: dict[str, Any] = {field.name: field.default for field in kind.fields}
    return {"model": "demo", "data": "", "name": "", **values}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_command_beside_a_form_is_one_that_the_command_line_takes(
    kind: Kind, store: Store, parsed: Callable[[str], dict[str, Any]]
) -> None:
    values = _filled(kind) | {"data": "a b.jsonl", "name": "mine", "edit": "ablate layer=3 experts=5; top_k k=1"}
    read = parsed(command_line(kind, store, values))
    assert read["model"] == "demo"
    assert read["data"] == "a b.jsonl"
    assert read["store"] == store.path
    if kind.named:
        assert read["name"] == "mine"
    if kind.name == "effect":
        assert read["edit"] == ["ablate layer=3 experts=5", "top_k k=1"]
    if kind.name == "study":
        assert (read["site"], read["spec"]) == ("blocks.3.hook_mlp_out", ["topk:d=1024,k=16"])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_field_that_differs_from_its_default_is_in_the_command(
    kind: Kind, store: Store, parsed: Callable[[str], dict[str, Any]]
) -> None:
    for field in kind.fields:
        value = {
            "number": 7, "switch": True, "several": ["routing"],
            "text": {"edit": "top_k k=1", "spec": "topk:d=64,k=4", "site": "blocks.1.hook_mlp_out"}.get(field.name, "x"),
        }[field.form]  # fmt: skip
        read = parsed(command_line(kind, store, _filled(kind) | {field.name: value}))
        expected = [value] if field.name in ("edit", "spec") else value
        assert str(read[field.name]) == str(expected), field.name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": " "}, "no model"),
        ({"batch_size": "many"}, "whole number"),
        ({"max_length": 1}, "2 or more"),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_started(given: dict[str, Any], said: str, store: Store) -> None:
    with pytest.raises(InputError, match=said):
        checked(KINDS[0], _filled(KINDS[0]) | given, store)


def test_a_name_that_is_taken_is_refused_at_once(store: Store) -> None:
    run = store.begin_run(name="base", model="demo")
    with pytest.raises(InputError, match="already"):
        checked(KINDS[0], _filled(KINDS[0]) | {"name": "base"}, store)
    assert checked(KINDS[0], _filled(KINDS[0]) | {"name": "base", "resume": True}, store)["name"] == run.name


def test_a_store_opened_for_reading_takes_no_work_and_says_why(store: Store) -> None:
    path = store.path
    store.close()
    with Store(path, read_only=True) as reading:
        services = services_of(create_app(reading, why_not="another program reads it"))
        assert "another program reads it" in str(form(KINDS[0], "demo", "", services))
        assert "Start" not in str(form(KINDS[0], "demo", "", services))
        with pytest.raises(InputError, match="another program reads it"):
            begin(services, KINDS[0], _filled(KINDS[0]))
        assert services.work.jobs() == []
