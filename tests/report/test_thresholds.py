"""Thresholds: what a file may say, and that no rule passes that is about nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.report.thresholds.judging import exit_code, judge
from moescope.report.thresholds.rules import Rules, read_rules
from moescope.store.run import Run
from moescope.store.store import Store

FIRST, SECOND = 2.0, 2.5


@pytest.fixture(scope="module")
def runs(planted: ModuleType, store: Store) -> list[Run]:
    """NLL of exactly 2 nats in one run and 2.5 in the other; router 0 gives three quarters of its choices to expert 0."""
    made = []
    for name, nll in (("first", FIRST), ("second", SECOND)):
        experts = np.array([[0], [0], [0], [1]] * 30)
        plan = planted.Plan(
            lengths=[20] * 6, labels=["code", "law"] * 3, nll=np.full(120, nll), routers=[planted.Router(experts, 4)]
        )
        made.append(planted.plant(store, plan, name=name))
    return made


def _rules(folder: Path, text: str) -> Rules:
    path = folder / "limits.yaml"
    path.write_text(text, encoding="utf-8")
    return read_rules(path)


@pytest.mark.parametrize(
    ("bounds", "states"),
    [
        ("max: 2.2", ["pass", "fail"]),
        ("max: 2", ["pass", "fail"]),
        ("min: 2.2", ["fail", "pass"]),
        ("{max: 3, min: 1}", ["pass", "pass"]),
        ("max_change: 0.6", ["pass"]),
        ("max_change: 0.4", ["fail"]),
        ("max_change: 30 %", ["pass"]),
        ("max_change: 20 %", ["fail"]),
        ("max_rise: 0.4", ["fail"]),
        ("max_fall: 0", ["pass"]),
        ("{judge: ci_high, max: 2.2}", ["pass", "fail"]),
    ],
)
def test_bounds_hold_or_break_as_arithmetic_says(
    runs: list[Run], tmp_path: Path, bounds: str, states: list[str]
) -> None:
    lines = bounds.strip("{}").split(", ")
    text = "rules:\n  - analysis: nll\n    metric: mean NLL\n    where: {label: code}\n"
    found = judge(_rules(tmp_path, text + "".join(f"    {line}\n" for line in lines)), runs)
    assert [one.status for one in found] == states, found
    assert exit_code(found) == int("fail" in states)


def test_baseline_may_be_named_and_is_not_judged_against_itself(runs: list[Run], tmp_path: Path) -> None:
    text = "baseline: second\nrules:\n  - {analysis: nll, metric: mean NLL, where: {label: law}, max_fall: 0.1}\n"
    (found,) = judge(_rules(tmp_path, text), runs)
    assert (found.run, found.status, found.found) == ("first", "fail", pytest.approx(FIRST - SECOND))


def test_rule_of_two_runs_compares_them(runs: list[Run], tmp_path: Path) -> None:
    text = "rules:\n  - {analysis: compare_measures, metric: mean NLL, max: 0.1}\n"
    (found,) = judge(_rules(tmp_path, text), runs)
    assert (found.run, found.status, found.found) == ("second", "fail", pytest.approx(SECOND - FIRST))


def test_worst_number_is_told_with_its_place(runs: list[Run], tmp_path: Path) -> None:
    text = "rules:\n  - {analysis: load, max: 0.5, run: first, where: {expert: [0, 1]}}\n"
    (found,) = judge(_rules(tmp_path, text), runs)
    # Three quarters of the choices on one of four experts: log2(0.75 × 4).
    assert found.found == pytest.approx(np.log2(3))
    assert "expert 0" in found.where
    assert (found.status, found.over) == ("fail", 1)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("{analysis: nll, max: 3, where: {label: klingon}, metric: mean NLL}", "no row has label 'klingon'"),
        ("{analysis: nll, max: 3, where: {planet: 1}, metric: mean NLL}", "no column 'planet'"),
        ("{analysis: nll, max: 3, metric: perplexion}", "no metric 'perplexion'"),
        ("{analysis: nll, max: 3, metric: mean NLL, judge: nothing}", "no column 'nothing'"),
        ("{analysis: nll, max: 3, metric: mean NLL, run: third}", "none is called third"),
        ("{analysis: nll, max_change: 3, metric: mean NLL, baseline: third}", "no run called 'third'"),
        ("{analysis: residual_norms, max: 3}", "residual_norms needs records"),
        ("{analysis: compare_measures, metric: mean NLL, max_change: 1}", "compares two runs already"),
    ],
)
def test_rule_about_nothing_is_an_error_and_never_a_pass(
    runs: list[Run], tmp_path: Path, rule: str, words: str
) -> None:
    found = judge(_rules(tmp_path, f"rules:\n  - {rule}\n"), runs)
    assert {one.status for one in found} == {"error"}
    assert words in found[0].detail
    assert exit_code(found) == 2


def test_missing_records_may_be_skipped_but_do_not_pass(runs: list[Run], tmp_path: Path) -> None:
    found = judge(_rules(tmp_path, "rules:\n  - {analysis: residual_norms, max: 3, missing: skip}\n"), runs)
    assert {one.status for one in found} == {"skipped"}
    # Only missing records may be skipped: a misspelt selector stays an error.
    text = "rules:\n  - {analysis: nll, metric: mean NLL, max: 3, missing: skip, where: {label: klingon}}\n"
    assert {one.status for one in judge(_rules(tmp_path, text), runs)} == {"error"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["line 1", "mapping"]),
        ("- 1\n", ["line 1", "mapping"]),
        ("rules: []\n", ["line 1", "list of rules"]),
        ("rules:\n  - {analysis: nll, max: 3}\nlimit: 3\n", ["line 3", "'limit'", "baseline, rules"]),
        ("rules:\n  - analysis: nll\n    maximum: 3\n", ["line 3", "'maximum'", "max"]),
        ("rules:\n  - analysis: nill\n    max: 3\n", ["line 2", "'nill'", "--list"]),
        ("rules:\n  - max: 3\n", ["line 2", "names an analysis"]),
        ("rules:\n  - analysis: nll\n", ["line 2", "no bound"]),
        ("rules:\n  - analysis: nll\n    max: high\n", ["line 3", "max cannot be 'high'"]),
        ("rules:\n  - analysis: nll\n    max: .nan\n", ["line 3", "max cannot be nan"]),
        ("rules:\n  - analysis: nll\n    max: true\n", ["line 3", "max cannot be True"]),
        ("rules:\n  - analysis: nll\n    max_change: -1\n", ["line 3", "at least 0"]),
        ("rules:\n  - analysis: nll\n    max: 1\n    min: 2\n", ["line 4", "never hold"]),
        ("rules:\n  - analysis: nll\n    max: 1\n    max: 2\n", ["line 4", "twice"]),
        ("rules:\n  - analysis: nll\n    max: 1\n    where: 3\n", ["line 4", "where is a mapping"]),
        ("rules:\n  - analysis: nll\n    max: 1\n    missing: ignore\n", ["line 4", "error or skip"]),
        ("rules:\n  - analysis: local_consistency\n    max: 1\n    parameters:\n      segmnt: 3\n", ["line 5", "'segmnt'", "segment"]),
        ("rules:\n  - analysis: local_consistency\n    max: 1\n    parameters:\n      segment: x\n", ["line 5", "'x'", "whole number"]),
        ("rules:\n  - [\n", ["not YAML"]),
        ("a: &x [1]\nb: *x\n", ["line 2", "references"]),
        ("rules: !!python/object/apply:os.system [true]\n", ["line 1", "tags"]),
        ("rules: !!python/name:os.system\n", ["line 1", "tags"]),
    ],
)  # fmt: skip
def test_mistake_in_the_file_is_named_with_its_line(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        _rules(tmp_path, text)
    for word in words:
        assert word in str(refused.value)
    assert "limits.yaml" in str(refused.value)


def test_rules_survive_json(tmp_path: Path) -> None:
    text = "baseline: base\nrules:\n  - {analysis: nll, max_change: 5 %, where: {label: [code, law]}, run: [a, b]}\n"
    rules = _rules(tmp_path, text)
    assert Rules.from_data(json.loads(json.dumps(rules.data()))) == rules


def test_shipped_example_is_read_and_is_the_one_of_the_page() -> None:
    docs = Path(__file__).parents[2] / "docs"
    example = docs / "examples" / "limits.yaml"
    assert f"```yaml\n{example.read_text(encoding='utf-8')}```" in (docs / "reports.md").read_text(encoding="utf-8")
    rules = read_rules(example)
    assert len(rules.rules) == 3
    assert rules.baseline == "base"


def test_shipped_example_judges_runs_of_its_shape(runs: list[Run]) -> None:
    rules = read_rules(Path(__file__).parents[2] / "docs" / "examples" / "limits.yaml")
    found = judge(Rules(rules.rules, "first"), runs)
    states = {(one.rule.analysis, one.run): one.status for one in found}
    assert states["nll", "second"] == "fail"
    assert states["compare_measures", "second"] == "fail"


def test_run_that_is_named_but_not_judged_is_an_error_beside_the_others(runs: list[Run], tmp_path: Path) -> None:
    text = "rules:\n  - {analysis: nll, metric: mean NLL, max: 3, run: [first, typo]}\n"
    found = judge(_rules(tmp_path, text), runs)
    assert [(one.run, one.status) for one in found] == [("", "error"), ("first", "pass")]
    assert "none is called typo" in found[0].detail
    assert exit_code(found) == 2
    text = "rules:\n  - {analysis: nll, metric: mean NLL, max_change: 3, run: first}\n"
    (found_one,) = judge(_rules(tmp_path, text), runs)
    assert (found_one.status, found_one.detail) == ("error", "no run besides the baseline")


def test_incomplete_baseline_is_told(planted: ModuleType, store: Store, runs: list[Run], tmp_path: Path) -> None:
    plan = planted.Plan(lengths=[20] * 6, labels=["code", "law"] * 3, nll=np.full(120, FIRST))
    planted.plant(store, plan, name="half", status="incomplete")
    text = "baseline: half\nrules:\n  - {analysis: nll, metric: mean NLL, max_change: 3}\n"
    found = judge(_rules(tmp_path, text), runs)
    assert {(one.status, one.incomplete) for one in found} == {("pass", "half")}
    assert all("baseline half is incomplete" in one.detail for one in found)


def test_rule_of_the_example_finds_an_expert_without_tokens(runs: list[Run]) -> None:
    """Experts 2 and 3 of the planted router are never chosen: their share is 0, and that fails instead of being no number."""
    rules = read_rules(Path(__file__).parents[2] / "docs" / "examples" / "limits.yaml")
    (rule,) = [one for one in rules.rules if one.analysis == "load"]
    one_layer = dataclasses.replace(rule, where=dict(rule.where) | {"layer": (0,)}, run=("first",))
    (found,) = judge(Rules((one_layer,)), runs)
    assert (found.status, found.found, found.over) == ("fail", 0.0, 2)


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        ("{analysis: nll, max: 3, where: {label: .nan}}", "where takes"),
        ("{analysis: nll, max: 3, where: {label: [code, .inf]}}", "where takes"),
        ("{analysis: nll, max: 3, where: {label: {a: 1}}}", "where takes"),
        ("{analysis: nll, max: 3, where: {label: 2020-01-01}}", "where takes"),
        ('{analysis: nll, max: 3, where: {label: "\\ud800"}}', "where takes"),
        ('{analysis: nll, max: 3, where: {"\\ud800": 1}}', "where takes"),
        ('{analysis: nll, max: 3, name: "\\ud800"}', "name is text"),
        ('{analysis: nll, max: 3, run: ["\\udfff"]}', "run is the name"),
        ("{analysis: nll, max: 1" + "0" * 400 + "}", "max cannot be"),
        ("{analysis: nll, max: 1e999}", "max cannot be"),
    ],
)
def test_value_that_no_report_could_hold_is_refused_with_its_line(tmp_path: Path, rule: str, word: str) -> None:
    with pytest.raises(InputError, match=f"line 2: {word}") as refused:
        _rules(tmp_path, f"rules:\n  - {rule}\n")
    str(refused.value).encode()


def test_powers_of_ten_are_numbers_and_true_is_not_1(runs: list[Run], tmp_path: Path) -> None:
    (rule,) = _rules(tmp_path, "rules:\n  - {analysis: nll, max: 1e3, min: 1e-3}\n").rules
    assert (rule.max, rule.min) == (1000.0, 0.001)
    text = "rules:\n  - {analysis: load, max: 3, run: first, where: {expert: true}}\n"
    (found,) = judge(_rules(tmp_path, text), runs)
    assert (found.status, "no row has expert True" in found.detail) == ("error", True)
