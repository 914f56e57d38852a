"""One word for one thing: flags against parameters of Python, columns of tables, and the code that reads them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

from moescope.cli.app import app
from moescope.cli.parser import Described, Flag, commands
from moescope.store import schema, views

ALL = {each.name: each for each in commands(app)}

LOAD = "moescope.probes.loading:load"
CORPUS = "moescope.probes.corpus:Corpus.load"
SAE = "moescope.sae_study:study"
# The Python functions that a command stands for: the first does its work, the others make what it is given.
TWINS = {
    "plan": ("moescope.probes.planning:plan", LOAD, CORPUS),
    "profile": ("moescope.probes.record:record", LOAD, CORPUS),
    "phenomena": ("moescope.phenomena_api:phenomena", LOAD, CORPUS),
    "intervene effect": ("moescope.effect_api:effect", LOAD, CORPUS),
    "intervene sweep": ("moescope.sweep_api:sweep", LOAD, CORPUS),
    "intervene contrast": ("moescope.contrast_api:contrast", LOAD, CORPUS),
    "import": ("moescope.store.importing.import_trace:import_trace",),
    "export": ("moescope.store.exporting.export_run:export_run",),
    "merge": ("moescope.store.merging:merge",),
    "sae study": ("moescope.sae_study:study", LOAD, CORPUS),
    "sae record": ("moescope.sae.recording:record_vectors", LOAD, CORPUS),
    "sae train": ("moescope.sae.training.train:train",),
    "sae judge": ("moescope.sae.judging.judge:judge", LOAD, CORPUS),
    "sae read": ("moescope.sae.reading.read:read_features", LOAD),
    "sae probe": ("moescope.sae.concepts.sparse_probes:sparse_probes",),
    "sae describe": ("moescope.sae.concepts.describe:describe", "moescope.sae.concepts.command:completion_command", LOAD),
    "sae experts": (
        "moescope.sae.experts.feature_experts:feature_experts", "moescope.sae.experts.ablate_writers:ablate_writers", LOAD,
    ),
    "sae steer": ("moescope.sae.steering.dose:dose_response", LOAD, CORPUS),
    "sae students": ("moescope.sae.students.study:mlp_students", LOAD, CORPUS),
    "sae circuit": ("moescope.sae.circuits.circuit:head_circuit", LOAD),
}  # fmt: skip

# Flags of the command line alone, and why Python has none.
ONLY_FLAGS = {
    "json": "a form of printing",
    "dry_run": "a check before the work; Python has ms.plan, sweep_cost and the like",
    "report": "ms.write_report",
    "thresholds": "write_report's findings, held against a file",
    "output": "Result.save",
    "edit": "an edit in words; in Python an Edit",
    "save_intervention": "Intervention.save",
    "data": "what Corpus.load is given: source",
    "workers": "moescope.probes.workers.record_with_workers",
    "ray_address": "the same",
    "time_plain": "moescope.probes.forward.time_plain",
    "trust_remote_code": "of ms.load",
    "yes": "a question on the terminal",
}
ONLY_FLAGS_OF = {
    "export": {"store": "the run of it is an object in Python"},
    "intervene effect": {"name": "Intervention.named"},
    "sae judge": {"documents": "held_out=True is documents held_out; the word of the other commands is kept"},
    "sae describe": {"command": "complete, any function; completion_command makes one of a program"},
    "sae experts": {
        "sparsity": "moescope.sae.experts.sparsity", "neurons": "moescope.sae.experts.compare_neurons",
        "ablate": "top of ablate_writers, whose --top is that of feature_experts", "ablate_tokens": "its tokens",
    },
    "sae steer": {
        "feature": "an edit in words; in Python latent_edit", "only_active": "latent_edit", "contrast": "contrastive_mean",
        "top": "feature_set", "layer": "contrastive_mean", "towards": "descend_to", "steps": "descend_to", "rate": "descend_to",
        "target_feature": "LatentTarget", "on": "a parameter of the analysis steering_dose",
        "sae": "the autoencoder of latents and targets, an object in Python",
    },
    "sae students": {"data": "the corpus that Python is given in place of the run"},
    "sae circuit": {"positives": "task, a pair of lists", "negatives": "the same"},
}  # fmt: skip

# One thing that a flag and a parameter name differently, and why.
RENAMED = {
    "sae": ("autoencoder", "the flag names one; Python is given the object"),
    "name": ("run_name", "the circuit has a task for its name in Python"),
}

# Parameters of Python alone.
ONLY_PYTHON = {
    "progress": "shown unless --json", "tell": "the same", "tokenizer": "for a live model object", "sources": "objects",
    "runs": "the runs", "facts": "of shards", "stopped": "of shards", "corpus": "--data", "source": "--data",
    "batches": "one part of a plan, for programs that share it out", "stop_after": "for programs that look on",
    "run": "an object in Python", "model": "an object in Python", "complete": "--command",
}  # fmt: skip
ONLY_PYTHON_OF = {
    "intervene contrast": {
        "draws": "bootstrap resamples; the default is enough for every interval shown", "label_field": "the sets are the labels",
    },
    "sae judge": {"held_out": "--documents"},
    "sae read": {
        "bins": "of a histogram", "skip_first": "as in training", "most": "a bound on memory, in vectors",
    },
    "sae probe": {"memory": "a bound, in bytes"},
    "sae describe": {
        "tokens": "a bound on reading", "draws": "bootstrap resamples", "argv": "--command",
        "describer": "named after the command where it is not given",
    },
    "sae experts": {
        "draws": "bootstrap resamples", "layer": "found", "store": "opened", "how": "zero", "batch_size": "the run's",
        "others": "latents of the null", "skip_first": "as in training",
        "strongest": "as the study has it",
    },
    "sae students": {
        "students": "all kinds", "inputs": "both", "skip_first": "as the study has it", "batch": "of training",
        "activation": "as the study has it",
    },
    "sae circuit": {"sparsity": "of training", "steps": "of training", "shuffles": "of sides"},
    "sae steer": {"batch_size": "the base run's", "max_length": "the base run's"},
}  # fmt: skip

# Defaults that differ, and why.
DEFAULTS = {
    ("sae steer", "strengths"): "the command line begins at 0, the unsteered model",
    ("sae describe", "describer"): "the command",
    ("phenomena", "store"): "Python may do without one",
    ("import", "name"): "the file's",
    ("profile", "name"): "the model's, numbered",
    ("sae record", "store"): "a file",
    ("merge", "run"): "the only one",
    ("sae train", "checkpoint_every"): "a tenth",
}


def _function(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _twin_parameters(name: str) -> dict[str, inspect.Parameter]:
    found: dict[str, inspect.Parameter] = {}
    for where in TWINS[name]:
        for parameter in inspect.signature(_function(where)).parameters.values():
            found.setdefault(parameter.name, parameter)
    return found


def _twin_of(flag: Flag, known: dict[str, inspect.Parameter]) -> str | None:
    renamed = RENAMED.get(flag.variable, ("", ""))[0]
    spelt = (flag.variable, f"{flag.variable}s" if flag.repeatable else "", renamed)
    return next((name for name in spelt if name in known), None)


def _plain(value: Any) -> Any:
    """A default as the command line and Python would both write it."""
    if isinstance(value, str) and re.fullmatch(r"[\d.e+-]+(,[\d.e+-]+)+", value):
        value = [float(part) for part in value.split(",")]
    if isinstance(value, str) and "," in value:
        value = value.split(",")
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value] or None
    return str(value) if not isinstance(value, (int, float, type(None))) else value


@pytest.mark.parametrize("name", TWINS)
def test_flags_are_named_as_parameters_and_have_their_defaults(name: str) -> None:
    known = _twin_parameters(name)
    alone = ONLY_FLAGS | ONLY_FLAGS_OF.get(name, {})
    for flag in ALL[name].flags:
        twin = _twin_of(flag, known)
        if flag.variable in ONLY_FLAGS_OF.get(name, {}) or twin is None:
            assert flag.variable in alone, f"{name} --{flag.name}: Python has no such parameter among {sorted(known)}"
            continue
        default = known[twin].default
        if default is inspect.Parameter.empty or flag.required or (name, flag.variable) in DEFAULTS:
            continue
        words = isinstance(flag.source.show_default, str) and flag.default is None
        single = isinstance(default, str) and flag.repeatable
        given = _plain([default]) if single else _plain(default)
        assert words or _plain(flag.default) == given, f"{name} --{flag.name}: {flag.default!r}, in Python {default!r}"


@pytest.mark.parametrize("name", TWINS)
def test_parameters_of_python_have_a_flag_or_a_reason(name: str) -> None:
    known = _twin_parameters(name)
    told = {twin for flag in ALL[name].flags if (twin := _twin_of(flag, known)) is not None}
    missing = set(known) - told - set(ONLY_PYTHON) - set(ONLY_PYTHON_OF.get(name, {}))
    assert not missing, f"{name} has no flag for {sorted(missing)}"


def test_every_reason_is_still_needed() -> None:
    for name, reasons in ONLY_FLAGS_OF.items():
        variables = {flag.variable for flag in ALL[name].flags}
        assert set(reasons) <= variables, name
    for name, reasons in ONLY_PYTHON_OF.items():
        assert set(reasons) - {"argv"} <= set(_twin_parameters(name)) | {"argv"}, name
    for name, variable in DEFAULTS:
        assert variable in {flag.variable for flag in ALL[name].flags}


def test_one_flag_is_of_one_type_everywhere() -> None:
    """Apart from those whose word the commands' Python functions use for different things."""
    several = {
        "tokens": "a number with k or M, a number, or which tokens count", "feature": "a number, or an edit of one in words",
        "format": "of a trace, and of what is printed", "label": "of a class",
        "model": "an argument where a command is about one", "store": "the same", "name": "one for each --spec of sae train",
        "run": "two for analyze, several for reports", "sae": "several for judge", "site": "one for a study", "score": "measures",
        "layers": "numbers in text", "spec": "forms", "words": "text",
        "contrast": "two files", "source": "a path, or a release on the Hub", "values": "a word",
    }  # fmt: skip
    seen: dict[str, dict[Any, str]] = {}
    for each in ALL.values():
        for flag in each.flags:
            seen.setdefault(flag.name, {}).setdefault((flag.kind, flag.repeatable), each.name)
    mixed = {name: kinds for name, kinds in seen.items() if len(kinds) > 1}
    assert set(mixed) <= set(several), {name: kinds for name, kinds in mixed.items() if name not in several}


def test_the_same_thing_is_not_spelt_two_ways() -> None:
    names = {flag.name for each in ALL.values() for flag in each.flags}
    for one, *others in (
        ("data", "corpus", "dataset", "text", "file"), ("probe", "probes"), ("site", "sites", "hook", "layer-site"),
        ("batch-size", "batch", "bs"), ("max-length", "length", "max-len"), ("device", "gpu"), ("output", "out-file", "save"),
        ("save-intervention", "save"), ("dry-run", "dryrun", "check-only"), ("text-field", "field", "text-column"),
        ("label-field", "label-column"), ("trust-remote-code", "trust"), ("seed", "random-seed"), ("format", "markdown", "csv"),
        ("controls", "n-controls"), ("prompts-a", "a"), ("documents", "all-documents"), ("sae", "autoencoder"),
        ("sample", "share"), ("feature", "latent"), ("target-feature", "target-latent"),
    ):  # fmt: skip
        assert one in names
        assert not names & set(others), f"--{one} is also spelt {sorted(names & set(others))}"


def test_flags_that_name_a_column_are_spelt_as_the_column() -> None:
    """`label`, `layer`, `expert`, `head`, `block`, `site`, `feature`, `top_k`, `n_experts`: one word with the tables."""
    columns = {column.name for table in schema.TABLES for column in table.columns}
    for word in (
        "label",
        "layer",
        "expert",
        "head",
        "block",
        "site",
        "feature",
        "top_k",
        "n_experts",
        "target_site",
        "unit_kind",
    ):
        assert word in columns, f"no table has a column {word}"
    assert "latent" not in columns
    spelt = {flag.variable for each in ALL.values() for flag in each.flags}
    near = {"layer_index", "expert_id", "head_id", "n_expert", "k_experts", "feature_id", "block_name"}
    assert not spelt & near


def test_tables_and_columns_that_help_names_exist() -> None:
    known = {table.name for table in schema.TABLES} | {view.name for view in views.VIEWS}
    for each in ALL.values():
        said = " ".join([each.help, *(flag.help for flag in each.flags)])
        for name in re.findall(r"(?:table|view|FROM) `([a-z_]+)`", said):
            assert name in known, f"{each.name} speaks of a table {name}"


def test_units_ride_in_numbers_that_could_be_misread() -> None:
    units = re.compile(
        r"bytes|seconds|nats|tokens?|share|times|logits|factor|number|steps|sequences|documents|experts|latents|heads|port|"
        r"vectors|prompts|texts|rows|layers?|students|workers|rank|windows|quantiles|examples|draws|permutations|resamples|"
        r"sets|activations|controls|cuts|trials|units|pairs|neurons|score|rate|length|seed|decides|dimension|models?|how many",
        re.IGNORECASE,
    )
    for each in ALL.values():
        for flag in each.flags:
            if flag.kind in (int, float):
                assert units.search(flag.help), f"{each.name} --{flag.name} does not say of what: {flag.help!r}"


@pytest.mark.parametrize("each", ALL.values(), ids=lambda each: each.name)
def test_every_flag_is_read_by_its_command(each: Described) -> None:
    """The variable of every flag is used in the body of its command, and what is passed on is not thrown away there."""
    (function,) = ast.parse(inspect.getsource(each.function)).body
    assert isinstance(function, ast.FunctionDef)
    read = {
        node.id
        for statement in function.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    unused = {flag.variable for flag in each.flags} - read
    assert not unused, f"{each.name} takes {sorted(unused)} and does nothing with it"
