"""`moescope sae probe`: how few neurons, latents or experts tell a concept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moescope.cli.export import only_run
from moescope.cli.flags import DryRun, InStore, Json, OneRun, Seed, UseSae
from moescope.cli.output import as_json, facts, news, said, table
from moescope.cli.sae.asked import tell_plan
from moescope.cli.store_check import check_store
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.sae.concepts.sparse_probes import SparseProbes

_Units = Annotated[str, typer.Option(help="What a unit is: neuron, latent, expert or router_logit.")]
_Site = Annotated[
    str | None,
    typer.Option(
        help="Where neurons are read, or one router: blocks.3.mlp.hook_post, ….", show_default="the only one of the run"
    ),
]
_Concepts = Annotated[
    list[str] | None,
    typer.Option(
        "--concept",
        help='A label, "class: word" or "next class: word"; repeatable.',
        show_default="every label",
    ),
]
_Level = Annotated[str, typer.Option(help="What is told apart: token, or document for the mean over its tokens.")]
_Ranking = Annotated[
    list[str],
    typer.Option("--ranking", help="How units are ranked: mean_difference, f, mutual_information or l1; repeatable."),
]
_K = Annotated[
    list[int] | None,
    typer.Option("--k", min=1, help="Units a probe may read; repeatable.", show_default="1, 2, 4 … 256"),
]
_Values = Annotated[str, typer.Option(help="What is read of experts: chosen (1 or 0) or weight.")]
_TrainShare = Annotated[float, typer.Option(min=0, max=1, help="Share of the documents that probes are fitted on.")]
_Tokens = Annotated[int, typer.Option(min=4, help="Tokens read at most.")]
_Skip = Annotated[int, typer.Option(min=0, help="Leave out so many first tokens of each sequence.")]
_Least = Annotated[int, typer.Option(min=2, help="Tokens of a concept that either part must have.")]
_Controls = Annotated[int, typer.Option(min=1, help="Permutations of labels, and draws of random units.")]
_Draws = Annotated[int, typer.Option(min=2, help="Bootstrap resamples of documents.")]


def probe(
    store: InStore = Path("runs.duckdb"),
    run: OneRun = None,
    units: _Units = "neuron",
    site: _Site = None,
    sae: UseSae = None,
    concept: _Concepts = None,
    level: _Level = "token",
    ranking: _Ranking = ["mean_difference"],  # noqa: B006  typer reads it and never changes it
    k: _K = None,
    values: _Values = "chosen",
    dense: Annotated[bool, typer.Option("--dense/--no-dense", help="Also probe with all units together.")] = True,
    train_share: _TrainShare = 0.7,
    tokens: _Tokens = 10_000,
    skip_first: _Skip = 1,
    least: _Least = 10,
    controls: _Controls = 3,
    draws: _Draws = 500,
    seed: Seed = 0,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Probe for concepts with few units, on documents that no probe has seen.

    Example: moescope sae probe --store runs.duckdb --run base --units expert --k 1 --k 8
    """
    from moescope.sae.concepts.sparse_probes import KS, sparse_probes
    from moescope.store.store import Store

    for name, value, known in (
        ("units", units, ("neuron", "latent", "expert", "router_logit")),
        ("level", level, ("token", "document")),
        ("values", values, ("chosen", "weight")),
    ):
        if value not in known:
            raise InputError(f"--{name} cannot be {value!r}", expected=", ".join(known))
    check_store(store)
    if dry_run:
        tell_plan(store, run=run, saes=[] if sae is None else [sae], model=None, json=json, units=units, tokens=tokens)
        return
    with Store(store) as opened:
        found = only_run(opened, run)
        autoencoder = None
        if sae is not None:
            from moescope.sae.loading import load_autoencoder

            autoencoder = load_autoencoder(opened, sae)
        outcome = sparse_probes(
            found, opened, units=units, site=site, sae=autoencoder, concepts=concept or None, level=level,  # type: ignore[arg-type]  # checked above
            ranking=ranking, k=k or KS, values=values, dense=dense, train_share=train_share, tokens=tokens,  # type: ignore[arg-type]  # checked above and there
            skip_first=skip_first, least=least, controls=controls, draws=draws, seed=seed, progress=not json,
        )  # fmt: skip
    if json:
        as_json(dataclasses.asdict(outcome))
    else:
        _print(outcome)
    for note in outcome.notes:
        news(note)


def _print(outcome: SparseProbes) -> None:
    """F1 of every probe, with its interval and nulls."""
    facts(
        {
            "run": outcome.run, "units": f"{outcome.units:,} ({outcome.unit_kind}, {outcome.site})",
            "trained on": outcome.train, "tested on": f"{outcome.test:,}, of {outcome.test_documents:,} documents",
        }
    )  # fmt: skip
    said("")
    shown: dict[str, list[object]] = {}
    for row in outcome.rows:
        if row["metric"] != "F1":
            continue
        low, high = row["ci_low"], row["ci_high"]
        span = f"{low:.3f} to {high:.3f}" if low is not None else "—"
        line = shown.setdefault(
            row["probe_id"],
            [row["concept"], row["ranking"], row["k"] or "all", f"{row['value']:.3f}", span, "—", "—"],
        )
        null = row["null_value"]
        line[6 if row["null_kind"] == "random units" else 5] = "—" if null is None else f"{null:.3f}"
    columns = ["concept", "ranking", "k", "F1", "95 % interval", "permuted", "random"]
    rows = list(shown.values())
    if len({row[1] for row in rows} - {"all"}) == 1:  # nothing to tell apart
        columns, rows = [columns[0], *columns[2:]], [[row[0], *row[2:]] for row in rows]
    table(columns, rows)
    news("permuted: F1 with labels permuted; random: F1 of as many random units")
