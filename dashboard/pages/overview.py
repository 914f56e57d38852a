"""What was run, and whether all of it was recorded."""

from __future__ import annotations

import json
import math
from typing import Any

import dash_mantine_components as dmc

from moescope.core.errors import InputError
from moescope.core.pages import Page, pages
from moescope.core.sites import Site
from moescope.dashboard import cards, grids, notices, numbers
from moescope.dashboard.records import Router, layer_of, routers
from moescope.dashboard.url_state import Layer, ViewState, link
from moescope.store.run import Run


def layout(run: Run, state: ViewState) -> Any:
    """Value cards, the facts of the run, its coverage ledger and the anatomy of its model."""
    info = run.info
    plain = ViewState(run=run.name)
    known = routers(run)
    return dmc.Stack(
        [
            dmc.SimpleGrid(_cards(run, info, known, plain), cols={"base": 2, "sm": 3, "lg": 5}, spacing="md"),
            _ledger(run, known, plain),
            dmc.SimpleGrid(
                [
                    cards.section("Run", cards.facts(_facts(run, info))),
                    cards.section("Versions and settings", cards.facts(_surroundings(info))),
                ],
                cols={"base": 1, "lg": 2},
                spacing="xl",
            ),
            _anatomy(run, known, plain),
        ],
        gap="xl",
    )


def _cards(run: Run, info: dict[str, Any], known: list[Router], plain: ViewState) -> list[Any]:
    tokens, sequences, predicted, nll = run.store.fetch(
        """
        SELECT
            (SELECT count(*) FROM tokens WHERE run_id = $run),
            (SELECT count(*) FROM sequences WHERE run_id = $run),
            count(nll),
            avg(nll::DOUBLE)
        FROM tokens
        WHERE run_id = $run
        """,
        {"run": run.run_id},
    )[0]
    layers = run.store.fetch("SELECT count(DISTINCT layer) FROM layers WHERE run_id = ?", [run.run_id])[0][0]
    seconds = info["summary"].get("seconds")
    speed = info["summary"].get("tokens_per_second")
    measured = not numbers.absent(nll)
    return [
        cards.value_card(
            "Tokens",
            numbers.short_count(tokens),
            f"in {numbers.count(sequences)} sequences",
            href=link("/tokens", plain),
            title=numbers.count(tokens),
        ),
        cards.value_card(
            "Mean NLL",
            f"{nll:.3f} nats" if measured else numbers.MISSING,
            f"perplexity {math.exp(min(nll, 700)):,.1f} · n = {numbers.count(predicted)}"
            if measured
            else "not recorded",
            href=link("/tokens", plain.but(mode="nll")) if measured else None,
        ),
        cards.value_card(
            "Layers",
            numbers.count(layers),
            f"{len(known)} with a router" if known else "none with a router",
            href=link("/tokens", plain),
        ),
        cards.value_card(
            "Experts",
            _experts(known),
            f"a layer, {known[0].top_k} chosen a token" if known else "a dense model has none",
            href=link("/experts", plain) if known else None,
        ),
        cards.value_card(
            "Recording speed",
            numbers.short_count(speed) if speed is not None else numbers.MISSING,
            f"tokens/s · {_duration(seconds)}" if seconds is not None else "tokens/s, not recorded",
        ),
    ]


def _experts(known: list[Router]) -> str:
    sizes = sorted({router.experts for router in known})
    return "0" if not sizes else str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"


def _facts(run: Run, info: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = [
        ("Name", info["name"]),
        ("Model", info["model"]),
        ("Revision", info["revision"]),
        ("Architecture", info["architecture"]),
        ("Parameters", numbers.count(info["anatomy"].get("parameters"))),
        ("Corpus", info["settings"].get("corpus")),
        ("Corpus fingerprint", info["corpus_fingerprint"]),
        ("Seed", info["seed"]),
        ("Intervention", json.dumps(info["intervention"], ensure_ascii=False) if info["intervention"] else "none"),
        ("Begun", _time(info["started_at"])),
        ("Ended", _time(info["finished_at"])),
        ("Run id", str(info["run_id"])),
    ]
    if stopped := info["summary"].get("stopped"):
        rows.append(("Stopped", stopped))
    return [(name, numbers.MISSING if value is None else str(value)) for name, value in rows]


def _surroundings(info: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = [(name, str(version)) for name, version in info["versions"].items()]
    rows += [
        (name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in info["settings"].items()
        if name != "corpus"
    ]
    return rows or [("Versions", "not recorded")]


def _ledger(run: Run, known: list[Router], plain: ViewState) -> Any:
    coverage = run.coverage
    rows = [
        {
            **row,
            "missing": row["expected"] - row["recorded"],
            "state": ("✓ " if row["status"] == "complete" else "▲ ") + row["status"],
            "recorded_href": _site_link(row["site"], known, plain),
        }
        for row in coverage.table.to_pylist()
    ]
    if not rows:
        return cards.section(
            "Coverage ledger",
            notices.empty(
                "No ledger",
                "The ledger is written when a run ends; this one did not end in order. Committed batches are whole.",
            ),
            identity="coverage",
        )
    columns = [
        grids.text_column("site", "Site", width=330),
        {
            "field": "state",
            "headerName": "Status",
            "minWidth": 112,
            "width": 130,
            "cellClassRules": {"cell-problem": {"function": "params.data.status != 'complete'"}},
        },
        grids.number_column("expected", "Expected", ",d", width=130),
        grids.link_column(
            "recorded",
            "Recorded",
            type="rightAligned",
            width=130,
            valueFormatter={"function": "d3.format(',d')(params.value)"},
        ),
        grids.number_column("missing", "Missing", ",d", width=100),
        grids.text_column(
            "detail",
            "What it means",
            width=300,
            valueFormatter={"function": "params.value == null ? '' : params.value"},
        ),
    ]
    return cards.section(
        "Coverage ledger",
        grids.grid("coverage-grid", columns, rows, height=250),
        note=coverage.title + ".",
        identity="coverage",
    )


def _site_link(site: str, known: list[Router], plain: ViewState) -> str:
    """Where a site's events are: its layer in the token view, or the token view as it is."""
    try:
        place = Site.parse(site)
    except InputError:
        return link("/tokens", plain)
    router = next((r for r in known if (r.layer, r.block) == (place.layer, place.block)), None)
    if router is not None:
        return link("/tokens", plain.but(layer=layer_of(router, known)))
    return link("/tokens", plain.but(layer=Layer(place.layer), mode="norm"))


def _anatomy(run: Run, known: list[Router], plain: ViewState) -> Any:
    found = (
        run.sql("SELECT * EXCLUDE (run_id) FROM layers WHERE run_id = $run ORDER BY layer, block")
        .to_arrow_table()
        .to_pylist()
    )
    if not found:
        return cards.section("Anatomy", dmc.Text("Not recorded.", className="muted"))
    places = {(r.layer, r.block): r for r in known}
    rows = []
    for row in found:
        router = places.get((row["layer"], row["block"]))
        rows.append(
            {
                **row,
                "rule": _rule(row["routing_rule"]),
                "n_experts_href": link("/experts", plain.but(layer=layer_of(router, known))) if router else None,
            }
        )
    whole = ",d"
    columns = [
        grids.number_column("layer", "Layer", whole, width=80),
        grids.text_column("block", "Block", width=90),
        grids.text_column("kind", "Kind", width=100),
        grids.link_column("n_experts", "Experts", type="rightAligned", width=90),
        grids.number_column("top_k", "Chosen", whole, width=90),
        grids.number_column("n_shared", "Shared", whole, width=90),
        grids.number_column("n_null", "Null", whole, width=80),
        grids.number_column("d_expert", "Neurons", whole, width=100),
        grids.text_column("rule", "Routing rule", width=520),
    ]
    return cards.section(
        "Anatomy",
        grids.grid("anatomy-grid", columns, rows, height=420),
        note=f"{len(found)} sublayers, found by looking at the model.",
    )


def _rule(text: str | None) -> str | None:
    return (
        None
        if not text
        else ", ".join(
            f"{key.replace('_', ' ')}: {value}" for key, value in json.loads(text).items() if value is not None
        )
    )


def _time(moment: Any) -> str:
    return numbers.MISSING if moment is None else f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


pages.add("overview", Page("Overview", "/", "Run", 10, "What was run, and whether all of it was recorded.", layout))
