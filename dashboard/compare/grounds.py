"""What can be said of two runs together, what cannot, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import dash_mantine_components as dmc
from dash import html

from moescope.core.analysis import PROBE_OF_TABLE, Analysis, analyses
from moescope.core.registry import Registry
from moescope.dashboard import numbers
from moescope.dashboard.browser import HIDDEN
from moescope.dashboard.records import Router, routers
from moescope.routing.comparison.paired_sequences import GENERATED_LEFT_OUT, SAME_SEQUENCES, generated, pair_parameters
from moescope.store.run import Run

Holds = Literal["yes", "partly", "no"]
_ICONS: dict[Holds, str] = {"yes": "✓", "partly": "▲", "no": "✕"}
_WORDS: dict[Holds, str] = {"yes": "holds", "partly": "in part", "no": "does not hold"}
_COUNT = "\n".join(("WITH", SAME_SEQUENCES, "SELECT count(*), coalesce(sum(n_tokens), 0)::BIGINT FROM same_sequences"))
_TEXTS = "SELECT count(*) FROM sequences WHERE run_id = ?"
_NLL = "SELECT 1 FROM tokens WHERE run_id = ? AND nll IS NOT NULL LIMIT 1"


@dataclass(frozen=True)
class Ground:
    """One ground of comparison: whether it holds, and what follows."""

    holds: Holds
    words: str


@dataclass(frozen=True)
class Grounds:
    """All of them, with what the page needs of them.

    Attributes:
        told: in the order they are shown.
        pairs: sequences that are in both runs.
        likelihoods: whether both have NLL.
        routed: whether both have decisions of a router of the same place and size.
    """

    told: list[Ground]
    pairs: int
    likelihoods: bool
    routed: bool


def grounds(run: Run, other: Run) -> Grounds:
    """Corpus, model, likelihoods and routers of two runs."""
    pairs, tokens = run.store.fetch(_COUNT, pair_parameters(run, other))[0]
    likelihoods = [bool(r.store.fetch(_NLL, [r.run_id])) for r in (run, other)]
    routing, routed = _routing(run, other)
    told = [_corpus(run, other, pairs, tokens), _model(run, other), _likelihoods(run, other, likelihoods), routing]
    if run.run_id == other.run_id:
        told.insert(0, Ground("no", "Both are the same run: every difference is nothing by construction."))
    told += [_unfinished(r) for r in (run, other) if not r.complete]
    return Grounds(told, pairs, all(likelihoods), routed)


def grounds_list(known: Grounds) -> Any:
    """The grounds as a list, each with its icon and word."""
    return html.Ul(
        [
            html.Li(
                [
                    html.Span(_ICONS[ground.holds], className="cmp-icon", **HIDDEN),
                    html.Span(_WORDS[ground.holds] + ": ", className="cmp-unseen"),
                    html.Span(ground.words, className="foreign"),
                ],
                className=f"cmp-ground cmp-{ground.holds}",
            )
            for ground in known.told
        ],
        className="cmp-grounds",
    )


def comparisons(run: Run, other: Run) -> tuple[list[Analysis], list[tuple[str, str]]]:
    """Analyses of two runs that these two have the records for, and the others with what is missing."""
    registry: Registry[Analysis] = analyses
    able, unable = [], []
    for analysis in sorted((a for a in registry if a.runs == 2), key=lambda a: (a.order, a.name)):
        lacking = {r.name: analysis.missing(r) for r in (run, other)}
        if not any(lacking.values()):
            able.append(analysis)
            continue
        words = "; ".join(
            f"{name} has no {', '.join(tables)} (--probe {','.join(sorted({PROBE_OF_TABLE.get(t, t) for t in tables}))})"
            for name, tables in lacking.items()
            if tables
        )
        unable.append((analysis.summary, words))
    return able, unable


def unable_list(unable: list[tuple[str, str]]) -> Any:
    """Questions that these two runs cannot answer, with the reason."""
    if not unable:
        return None
    items = [
        html.Li([html.Span(question + " "), dmc.Text(why, span=True, className="muted foreign")])
        for question, why in unable
    ]
    return html.Div(
        [dmc.Title("What cannot be asked of these two", order=3, className="cmp-small-title"), html.Ul(items)]
    )


def _corpus(run: Run, other: Run, pairs: int, tokens: int) -> Ground:
    counts = [r.store.fetch(_TEXTS, [r.run_id])[0][0] for r in (run, other)]
    also = f" {GENERATED_LEFT_OUT}" if pairs and generated(run, other) else ""
    if pairs and pairs == counts[0] == counts[1]:
        return Ground(
            "yes",
            f"Same texts: all {numbers.count(pairs)} sequences ({numbers.count(tokens)} tokens) are token for token the same, "
            "so differences are paired and tokens can be laid side by side." + also,
        )
    if pairs:
        return Ground(
            "partly",
            f"Shared texts: {numbers.count(pairs)} sequences are in both, of {numbers.count(counts[0])} and "
            f"{numbers.count(counts[1])}. Differences are over these alone.{also}",
        )
    return Ground(
        "no",
        "Different texts: no sequence is in both, so a difference may come from the texts. Means are compared unpaired, and "
        "no token can be laid beside its like. Record both on the same corpus with the same tokenizer and lengths.",
    )


def _model(run: Run, other: Run) -> Ground:
    first, second = run.info, other.info
    shapes = [i["anatomy"].get("digest") for i in (first, second)]
    unnamed = [r.name for r in (run, other) if r.info["model"] in (None, "", "unknown")]
    if unnamed and not all(shapes):
        return Ground(
            "partly",
            f"Which model it is of is not recorded in {' and '.join(unnamed)}: whether both are of the same one is not known, "
            "and expert 7 of one need not be expert 7 of the other.",
        )
    same_shape = shapes[0] == shapes[1] if all(shapes) else first["architecture"] == second["architecture"]
    if not same_shape:
        return Ground(
            "no", "Different anatomies: layers and experts of equal number are not the same thing in the two models."
        )
    if first["revision"] != second["revision"] or first["model"] != second["model"]:
        return Ground(
            "partly",
            "Same anatomy, other weights or another name: expert 7 of one need not be expert 7 of the other "
            "unless one was trained on from the other.",
        )
    if first["intervention"] != second["intervention"]:
        return Ground("yes", "Same model; what differs between them is the intervention.")
    return Ground("yes", "Same model, with the same intervention or none.")


def _likelihoods(run: Run, other: Run, have: list[bool]) -> Ground:
    if all(have):
        return Ground("yes", "Both have likelihoods: NLL and predictions can be compared.")
    without = " and ".join(r.name for r, has in zip((run, other), have, strict=True) if not has)
    return Ground(
        "no", f"No likelihoods in {without}: nothing can be said of NLL. Record whole passes with --probe tokens."
    )


def _routing(run: Run, other: Run) -> tuple[Ground, bool]:
    have = [bool(r.table("routing").limit(1).fetchall()) for r in (run, other)]
    if not all(have):
        without = " and ".join(r.name for r, has in zip((run, other), have, strict=True) if not has)
        return Ground(
            "no", f"No decisions in {without}: routing cannot be compared. Record with --probe routing."
        ), False
    first, second = _places(run), _places(other)
    common = [place for place in first if second.get(place) == first[place]]
    if not common:
        return Ground("no", "No router of one is at the same layer with as many experts in the other."), False
    if len(common) == len(first) == len(second):
        return Ground("yes", f"Same routers: {len(common)} at the same layers with as many experts."), True
    return Ground("partly", f"{len(common)} routers are in both, of {len(first)} and {len(second)}."), True


def _places(run: Run) -> dict[tuple[int, str], int]:
    known: list[Router] = routers(run)
    return {(r.layer, r.block): r.experts for r in known}


def _unfinished(run: Run) -> Ground:
    return Ground("partly", f"{run.name} is {run.status}: its numbers rest on part of what it should hold.")
