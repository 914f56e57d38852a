"""The registry of analyses: one decorated function, its parameters read from its signature."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, get_args, get_origin

from moescope.core.errors import IncompleteError, InputError, NotRecordedError
from moescope.core.registry import Registry
from moescope.core.result import Result

Section = Literal[
    "overview",
    "predictions",
    "routing",
    "balance",
    "consistency",
    "caching",
    "experts",
    "specialization",
    "pathways",
    "serving",
    "counterfactuals",
    "importance",
    "neurons",
    "features",
    "residual",
    "phenomena",
    "effects",
    "comparison",
]
SECTION_TITLES: dict[Section, str] = {
    "overview": "Overview",
    "predictions": "Predictions",
    "routing": "Routing",
    "balance": "Balance and certainty of routers",
    "consistency": "Consistency of routing",
    "caching": "Expert caches",
    "experts": "Experts",
    "specialization": "Specialization",
    "pathways": "Pathways",
    "serving": "Serving",
    "counterfactuals": "Other routers on the same logits",
    "importance": "Importance of experts",
    "neurons": "Neurons",
    "features": "Sparse autoencoders and their features",
    "residual": "Residual stream",
    "phenomena": "Phenomena",
    "effects": "Effects of interventions",
    "comparison": "Comparison of runs",
}


class AnalysableRun(Protocol):
    """What the registry needs to know of a run; `moescope.Run` is one."""

    @property
    def name(self) -> str:
        """The user's name for it."""

    @property
    def complete(self) -> bool:
        """Whether its ledger is full."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where a number from it comes from."""

    def rows(self, table: str) -> int:
        """How many rows of `table` belong to this run."""


@dataclass(frozen=True)
class AtLeast:
    """The smallest value a parameter may take, for `Annotated`."""

    value: int


Count = Annotated[int, AtLeast(1)]
Natural = Annotated[int, AtLeast(0)]


@dataclass(frozen=True)
class Parameter:
    """One parameter of an analysis: its name, its type as annotated, its default, the smallest value it may take."""

    name: str
    annotation: Any
    default: Any
    minimum: int | None = None

    def parse(self, value: Any) -> Any:
        """Check a value, converting text from the command line; raises `InputError` naming what is expected."""
        for candidate in _alternatives(self.annotation):
            converted = _convert(value, candidate)
            if converted is _MISFIT or (
                self.minimum is not None and converted is not None and converted < self.minimum
            ):
                continue
            return converted
        raise InputError(f"parameter {self.name!r} cannot be {value!r}", expected=self.describe())

    def describe(self) -> str:
        """The values it takes, in words."""
        words = [
            "none"
            if a is type(None)
            else " or ".join(map(repr, get_args(a)))
            if get_origin(a) is Literal
            else {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(a, str(a))
            for a in _alternatives(self.annotation)
        ]
        least = "" if self.minimum is None else f", at least {self.minimum}"
        return " or ".join(words) + least


@dataclass(frozen=True)
class Analysis:
    """A registered analysis.

    Attributes:
        name: what it is called in `ms.analyze`, on the command line and in pages.
        function: takes the run (or runs) and the parameters, gives a `Result`.
        runs: how many runs it takes.
        needs: tables that must hold rows for each run.
        source: the paper or code that defines it.
        section: where a report shows it; None leaves it out of reports.
        order: its place within the section.
    """

    name: str
    function: Callable[..., Result]
    runs: int
    needs: tuple[str, ...]
    source: str
    section: Section | None
    order: int

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Keyword-only parameters of the function, in order."""
        hints = typing.get_type_hints(self.function, include_extras=True)
        signature = inspect.signature(self.function).parameters.values()
        return {p.name: _parameter(p, hints[p.name]) for p in signature if p.kind is p.KEYWORD_ONLY}

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def missing(self, run: AnalysableRun) -> list[str]:
        """Tables it needs that hold nothing for `run`."""
        return [table for table in self.needs if run.rows(table) == 0]

    def __call__(
        self, runs: Sequence[AnalysableRun], parameters: Mapping[str, Any], *, allow_incomplete: bool = False
    ) -> Result:
        """Check runs and parameters, compute, and complete the result with where it comes from."""
        if len(runs) != self.runs:
            raise InputError(f"{self.name} compares {self.runs} run{'s' * (self.runs > 1)}", found=f"{len(runs)}")
        for run in runs:
            self._check(run, allow_incomplete)
        given = self._parse(parameters)
        result = self.function(*runs, **given)
        defaults = {name: p.default for name, p in self.parameters.items()}
        return dataclasses.replace(
            result,
            name=self.name,
            source=self.source,
            parameters=defaults | given,
            provenance=_provenance(runs),
            incomplete=not all(run.complete for run in runs),
        )

    def _check(self, run: AnalysableRun, allow_incomplete: bool) -> None:
        if missing := self.missing(run):
            raise NotRecordedError(
                f"{self.name} needs records that run {run.name!r} does not have",
                expected=f"rows in {', '.join(missing)}",
                fix=_how_to_get(self.name, missing),
            )
        if not run.complete and not allow_incomplete:
            raise IncompleteError(
                f"run {run.name!r} is not complete, so {self.name} would rest on part of the corpus",
                fix="look at run.coverage; to analyse it as it is, pass allow_incomplete=True (--allow-incomplete)",
            )

    def _parse(self, given: Mapping[str, Any]) -> dict[str, Any]:
        known = self.parameters
        for name in given:
            if name not in known:
                listing = "; ".join(f"{p.name}: {p.describe()} (default {p.default!r})" for p in known.values())
                raise InputError(f"{self.name} has no parameter {name!r}", expected=listing or "no parameters")
        return {name: known[name].parse(value) for name, value in given.items()}


def _how_to_get(analysis: str, missing: Sequence[str]) -> str:
    """What to do for tables to have the rows that an analysis reads."""
    if "effects" in missing:
        return (
            "measure an intervention against this run: moescope intervene effect (one), intervene sweep (many) or sae steer (doses); "
            "ms.effect, ms.sweep, ms.sae.dose_response"
        )
    if verb := _VERB_OF_ANALYSIS.get(analysis):
        return f"measure it: moescope sae {verb}"
    if set(missing) <= {"heads", "head_sequences"}:
        return "run the protocol that writes it (moescope phenomena MODEL, ms.phenomena), or record with the probe: attention"
    if verbs := [verb for table, verb in _SAE_VERBS.items() if table in missing]:
        return f"measure it: moescope sae {verbs[0]}"
    probes = sorted({PROBE_OF_TABLE.get(table, table) for table in missing})
    one = len(missing) == 1
    return (
        f"record with the probe{'s' * (not one)} that write{'s' * one} {'it' if one else 'them'} "
        f"(on a model that has them): {', '.join(probes)}"
    )


# Which verb of `moescope sae` writes which table; what comes first must be done first.
_SAE_VERBS = {
    "features": "read",
    "feature_contexts": "read",
    "feature_labels": "read",
    "feature_links": "read",
    "sae_measures": "judge",
    "feature_experts": "experts",
    "sparse_probes": "probe",
    "descriptions": "describe",
    "description_scores": "describe",
    "mlp_students": "students",
}

# Analyses that read rows which another verb than their table's writes.
_VERB_OF_ANALYSIS = {
    "feature_association": "read",
    "expert_sparsity_routing": "experts --sparsity",
    "neurons_against_sae": "experts --neurons",
    "head_circuit": "circuit",
}

# Which probe writes which table, for messages that say what to record.
PROBE_OF_TABLE = {
    "loads": "routing",
    "expert_outputs": "expert_outputs",
    "router_logits": "router_logits",
    "residual_sequences": "residual",
    "massive_activations": "residual",
    "heads": "attention",
    "head_sequences": "attention",
    "sequences": "tokens",
}

analyses: Registry[Analysis] = Registry("analysis", "moescope.routing")


def analysis(
    *,
    name: str,
    runs: int = 1,
    needs: tuple[str, ...] = (),
    source: str,
    section: Section | None = None,
    order: int = 50,
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register the decorated function as an analysis; the function itself is returned as it was."""

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        analyses.add(name, Analysis(name, function, runs, needs, source, section, order))
        return function

    return register


_MISFIT = object()


def _parameter(declared: inspect.Parameter, hint: Any) -> Parameter:
    limits = [extra for part in _parts(hint) if get_origin(part) is Annotated for extra in part.__metadata__]
    minimum = next((limit.value for limit in limits if isinstance(limit, AtLeast)), None)
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return Parameter(declared.name, plain, declared.default, minimum)


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (types.UnionType, typing.Union) else (annotation,)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return tuple(get_args(part)[0] if get_origin(part) is Annotated else part for part in _parts(annotation))


def _convert(value: Any, kind: Any) -> Any:
    """`value` as `kind`, read from text where it is text; `_MISFIT` where it is none."""
    if get_origin(kind) is Literal:
        same = (
            choice
            for choice in get_args(kind)
            if (type(value) is type(choice) and value == choice) or str(choice) == value
        )
        return next(same, _MISFIT)
    if kind is type(None):
        return None if value is None or value == "none" else _MISFIT
    if kind is bool:
        return {"true": True, "false": False}.get(str(value).lower(), _MISFIT)
    if kind in (int, float) and not isinstance(value, bool):
        return _number(value, kind)
    return value if kind is Any or (isinstance(value, kind) and not isinstance(value, bool)) else _MISFIT


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    if kind is int and isinstance(value, float) and not value.is_integer():
        return _MISFIT
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        return _MISFIT


def _provenance(runs: Sequence[AnalysableRun]) -> dict[str, Any]:
    if len(runs) == 1:
        return dict(runs[0].provenance)
    return {"run": " → ".join(run.name for run in runs), "runs": [dict(run.provenance) for run in runs]}
