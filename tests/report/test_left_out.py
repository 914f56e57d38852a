"""What would fill what a report leaves out: commands that the command line takes, of the run and for the analysis."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer

from moescope.core.analysis import Analysis, analyses
from moescope.report.left_out import command_for
from moescope.store.run import Run
from moescope.store.store import Store
from moescope.sweep_api import ANSWERS

NAME = "the run's name"
NEEDS = [
    (entry, missing)
    for entry in analyses
    for missing in dict.fromkeys((*((table,) for table in entry.needs), entry.needs))
]
IDS = [f"{entry.name}-{'-'.join(missing)}" for entry, missing in NEEDS]


@pytest.fixture(scope="module")
def run(store: Store) -> Run:
    return store.begin_run(name=NAME, model="some/model")


def _command(run: Run, entry: Analysis, missing: tuple[str, ...]) -> str:
    return command_for(entry.name, missing, run, "my runs.duckdb")


def _parsed(line: str) -> tuple[str, dict[str, Any]]:
    """What the command line makes of it, without running it; words for the reader's own stand for numbers where it needs some."""
    from moescope.cli.app import app

    words = shlex.split(line.replace("LAYER", "3").replace("NUMBER", "7"))
    assert words[0] == "moescope"
    command: Any = typer.main.get_command(app)
    context = command.make_context("moescope", words[1:])
    called = []
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
        called.append(name)
    return " ".join(called), context.params


@pytest.mark.parametrize(("entry", "missing"), NEEDS, ids=IDS)
def test_every_command_is_one_that_the_command_line_takes(run: Run, entry: Analysis, missing: tuple[str, ...]) -> None:
    if not missing:
        assert not _command(run, entry, missing)
        return
    called, given = _parsed(_command(run, entry, missing))
    assert str(given["store"]) == "my runs.duckdb"
    assert given.get("model") in (None, "some/model")
    if called in ("profile", "phenomena", "sae circuit"):  # each records a run of its own
        assert given["name"] != NAME
    else:
        assert given["base" if "base" in given else "run"] == NAME


@pytest.mark.parametrize(("kind", "analysis"), ANSWERS.items())
def test_a_sweep_is_of_the_kind_that_the_analysis_reads(run: Run, kind: str, analysis: str) -> None:
    called, given = _parsed(_command(run, analyses[analysis], ("effects",)))
    assert called == "intervene sweep"
    assert ANSWERS[given["kind"]] == analysis
    assert bool(given["edit"]) == (kind == "dose")


@pytest.mark.parametrize(
    ("analysis", "missing", "called", "given"),
    [
        ("effects", ("effects",), "intervene effect", {"edit": ["ablate layer=3 experts=5"]}),
        ("score_agreement", ("routing", "effects"), "intervene sweep", {"kind": "experts"}),
        ("score_agreement", ("routing",), "profile", {"probe": ["routing"]}),
        ("steering_dose", ("effects",), "sae steer", {"feature": ["7=+5"]}),
        ("sae_quality", ("sae_measures",), "sae judge", {}),
        ("feature_association", ("sae_measures",), "sae read", {}),
        ("expert_sparsity_routing", ("sae_measures",), "sae experts", {"sparsity": True}),
        ("neurons_against_sae", ("features", "sae_measures"), "sae experts", {"neurons": True}),
        ("expert_features", ("feature_experts",), "sae experts", {"sparsity": False, "neurons": False}),
        ("head_circuit", ("heads",), "sae circuit", {}),
        ("descriptions", ("descriptions",), "sae describe", {"unit": [7], "command": "COMMAND"}),
        ("mlp_students", ("mlp_students",), "sae students", {"layer": 3}),
    ],
)
def test_an_analysis_is_led_to_the_command_that_writes_what_it_reads(
    run: Run, analysis: str, missing: tuple[str, ...], called: str, given: dict[str, Any]
) -> None:
    found, parsed = _parsed(_command(run, analyses[analysis], missing))
    assert found == called
    assert {name: parsed[name] for name in given} == given


def test_a_command_that_the_command_line_does_not_take_would_be_found() -> None:
    refused: Any = typer.BadParameter.__base__
    for line in ("moescope sae describe --command x", "moescope sae judge --sae NAME --no-such-flag"):
        with pytest.raises(refused):
            _parsed(line)
