"""A file of thresholds: what its keys are, and how it is read."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moescope.core.analysis import Analysis, analyses
from moescope.core.errors import InputError
from moescope.core.text import whole_characters
from moescope.report.thresholds.yaml_lines import Lines, read_yaml

Missing = Literal["error", "skip"]
BOUNDS = ("max", "min", "max_change", "max_rise", "max_fall")
_CHANGES = BOUNDS[2:]
_FILE_KEYS = ("baseline", "rules")


@dataclass(frozen=True)
class Rule:
    """One threshold.

    Attributes:
        name: what it is called in the table of verdicts.
        analysis: whose result is judged.
        parameters: of the analysis; the others at their defaults.
        metric: which measure of the result; needed where its table has several.
        where: column → value, or several values, that rows must have: `{"layer": [2, 3]}`.
        judge: the column that is judged: `value`, or a bound of its interval, `ci_low` or `ci_high`; any other of numbers.
        max, min: bounds of the column itself.
        max_change, max_rise, max_fall: bounds of its change against the baseline run: a number in the unit of the column, or
            text like `5 %`, of the baseline's number.
        baseline: the run that changes are measured against; None for the file's.
        run: judge these runs only; empty for all.
        missing: what becomes of a rule whose analysis lacks its records: an error, or skipped.
        line: where the rule begins in its file; 0 where it is from none.
    """

    name: str
    analysis: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    metric: str | None = None
    where: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    judge: str = "value"
    max: float | None = None
    min: float | None = None
    max_change: float | str | None = None
    max_rise: float | str | None = None
    max_fall: float | str | None = None
    baseline: str | None = None
    run: tuple[str, ...] = ()
    missing: Missing = "error"
    line: int = 0

    @property
    def of_change(self) -> bool:
        """Whether it bounds a change against a baseline."""
        return any(getattr(self, name) is not None for name in _CHANGES)

    @property
    def bound(self) -> str:
        """The bounds in words: `at most 3, at least 1`."""
        words = {
            "max": "at most {}", "min": "at least {}", "max_change": "change at most {}", "max_rise": "rise at most {}",
            "max_fall": "fall at most {}",
        }  # fmt: skip
        given = {name: getattr(self, name) for name in BOUNDS}
        return ", ".join(
            words[name].format(bound if isinstance(bound, str) else f"{bound:.6g}")
            for name, bound in given.items()
            if bound is not None
        )


@dataclass(frozen=True)
class Rules:
    """The rules of one file, and the run that changes are measured against."""

    rules: tuple[Rule, ...]
    baseline: str | None = None
    source: str = ""

    def data(self) -> dict[str, Any]:
        """The rules as JSON data; `from_data` reads them back."""
        return {
            "source": self.source,
            "baseline": self.baseline,
            "rules": [dataclasses.asdict(rule) for rule in self.rules],
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Rules:
        """Rules from `data()`, also after a way through JSON."""
        rules = [
            Rule(**{**rule, "where": {k: tuple(v) for k, v in rule["where"].items()}, "run": tuple(rule["run"])})
            for rule in data["rules"]
        ]
        return cls(tuple(rules), data["baseline"], data["source"])


def read_rules(path: str | Path) -> Rules:
    """Read a file of thresholds.

    Raises:
        InputError: no such file, no YAML, a key or a value that is none; the message names file, line and key.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "limits.yaml"
        >>> _ = file.write_text("rules:\\n  - analysis: nll\\n    metric: mean\\n    max: 3\\n")
        >>> read_rules(file).rules[0].bound
        'at most 3'
    """
    data, lines = read_yaml(Path(path))
    if not isinstance(data, dict):
        raise _wrong(path, 1, "a file of thresholds is a mapping", expected="baseline (if any) and rules")
    _known_keys(path, data, lines, (), _FILE_KEYS)
    listed = data.get("rules")
    if not isinstance(listed, list) or not listed:
        raise _wrong(
            path, lines.at("rules"), "a file of thresholds has a list of rules", expected="rules: with one or more"
        )
    baseline = data.get("baseline")
    if baseline is not None and not isinstance(baseline, str):
        raise _wrong(path, lines.at("baseline"), "baseline is the name of a run", found=repr(baseline))
    rules = tuple(_rule(path, entry, lines, number) for number, entry in enumerate(listed))
    return Rules(rules, baseline, str(path))


def _rule(path: str | Path, entry: Any, lines: Lines, number: int) -> Rule:
    place = ("rules", number)
    line = lines.at(*place)
    if not isinstance(entry, dict):
        raise _wrong(path, line, "a rule is a mapping", expected="analysis, metric and a bound", found=repr(entry))
    known = [f.name for f in dataclasses.fields(Rule) if f.name != "line"]
    _known_keys(path, entry, lines, place, known)
    name = entry.get("analysis")
    if not isinstance(name, str) or name not in {a.name for a in analyses}:
        raise _wrong(
            path, lines.at(*place, "analysis"), "a rule names an analysis", expected="one that `moescope analyze --list` shows",
            found=repr(name) if name is not None else "no analysis",
        )  # fmt: skip
    given = {
        key: _value(path, key, value, lines.at(*place, key)) for key, value in entry.items() if key != "parameters"
    }
    given["parameters"] = _parameters(path, analyses[name], entry.get("parameters") or {}, lines, place)
    given.setdefault("name", " ".join([name, *([entry["metric"]] if "metric" in entry else [])]))
    rule = Rule(**given, line=line)
    if not rule.bound:
        raise _wrong(path, line, f"rule {rule.name!r} has no bound", expected=f"one or more of {', '.join(BOUNDS)}")
    if rule.max is not None and rule.min is not None and rule.min > rule.max:
        raise _wrong(path, lines.at(*place, "min"), f"rule {rule.name!r} can never hold: min is above max")
    return rule


def _value(path: str | Path, key: str, value: Any, line: int) -> Any:
    """One value of a rule, checked."""
    if key in ("name", "analysis", "metric", "judge", "baseline"):
        if isinstance(value, str) and value.strip() and _is_whole(value):
            return value
        raise _wrong(path, line, f"{key} is text", found=repr(value))
    if key == "missing":
        if value in ("error", "skip"):
            return value
        raise _wrong(path, line, "missing is error or skip", found=repr(value))
    if key == "run":
        runs = value if isinstance(value, list) else [value]
        if runs and all(isinstance(run, str) and _is_whole(run) for run in runs):
            return tuple(runs)
        raise _wrong(path, line, "run is the name of a run, or a list of names", found=repr(value))
    if key == "where":
        if isinstance(value, dict) and value:
            wanted = {str(k): tuple(v) if isinstance(v, list) else (v,) for k, v in value.items()}
            if odd := [one for k, values in wanted.items() for one in (k, *values) if not _is_selector(one)]:
                raise _wrong(path, line, "where takes text, finite numbers, true or false", found=repr(odd[0]))
            return wanted
        raise _wrong(path, line, "where is a mapping of column to value, or to a list of values", found=repr(value))
    return _bound(path, key, value, line)


def _is_selector(value: Any) -> bool:
    """Whether a cell of a table can be equal to it, and JSON can hold it."""
    if isinstance(value, str):
        return _is_whole(value)
    return value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))


def _is_whole(text: str) -> bool:
    return whole_characters(text) == text


def _bound(path: str | Path, key: str, value: Any, line: int) -> float | str:
    if key in _CHANGES and isinstance(value, str) and value.strip().endswith("%"):
        try:
            share = float(value.strip()[:-1])
        except ValueError:
            share = math.nan
        if math.isfinite(share) and share >= 0:
            return f"{share:g} %"
    number = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):  # YAML 1.1 takes 1e3 for text
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    if math.isfinite(number) and (key not in _CHANGES or number >= 0):
        return number
    expected = "a number of at least 0, or a share of the baseline like 5 %" if key in _CHANGES else "a number"
    raise _wrong(path, line, f"{key} cannot be {value!r}", expected=expected)


def _parameters(
    path: str | Path, analysis: Analysis, given: Any, lines: Lines, place: tuple[str | int, ...]
) -> dict[str, Any]:
    known = analysis.parameters
    if not isinstance(given, dict):
        raise _wrong(path, lines.at(*place, "parameters"), "parameters is a mapping", found=repr(given))
    parsed = {}
    for key, value in given.items():
        line = lines.at(*place, "parameters", key)
        if key not in known:
            listing = ", ".join(known) or "none"
            raise _wrong(path, line, f"{analysis.name} has no parameter {key!r}", expected=listing)
        if isinstance(value, str) and not _is_whole(value):
            raise _wrong(path, line, f"{key} is text", found=repr(value))
        try:
            parsed[key] = known[key].parse(value)
        except InputError as wrong:
            raise _wrong(path, line, wrong.problem, expected=wrong.expected) from wrong
    return parsed


def _known_keys(
    path: str | Path,
    given: Mapping[Any, Any],
    lines: Lines,
    place: tuple[str | int, ...],
    known: tuple[str, ...] | list[str],
) -> None:
    for key in given:
        if key not in known:
            raise _wrong(path, lines.at(*place, key), f"there is no key {key!r} here", expected=", ".join(known))


def _wrong(
    path: str | Path, line: int, problem: str, *, expected: str | None = None, found: str | None = None
) -> InputError:
    return InputError(f"{path}, line {line}: {problem}", expected=expected, found=found)
