"""What a run, and the protocols run beside it, hold of phenomena."""

from __future__ import annotations

from dataclasses import dataclass

from moescope.store.run import Run

PARTS = ("residual", "residual_sequences", "massive_activations", "experts", "super_experts", "heads", "head_sequences")

# Which metric tells that a protocol was run.
_PROTOCOLS = {
    "induction_heads": "induction",
    "retrieval_heads": "retrieval score, answer given",
    "head_roles": "recovered mass, special",
    "attention": "mass_first",
}
_RETRIEVAL = "retrieval score"
_MEASURED = """
    SELECT DISTINCT r.name, h.metric
    FROM head_sequences h
    JOIN runs r ON r.run_id = h.run_id
    JOIN runs mine ON mine.run_id = $run
    WHERE list_contains($metrics, h.metric) AND (h.run_id = $run OR (r.anatomy ->> 'digest') = (mine.anatomy ->> 'digest'))
"""
_HOLDERS = """
    WITH counted AS (
        SELECT run_id, count(*) AS n, 'head scores' AS what FROM heads GROUP BY run_id
        UNION ALL
        SELECT run_id, count(*), 'super experts' FROM super_experts GROUP BY run_id
        UNION ALL
        SELECT base_run_id, count(*), 'cuts of the chain' FROM effects
        WHERE starts_with(intervention ->> 'name', 'chain, ')
        GROUP BY base_run_id
    )
    SELECT r.name, list(c.what ORDER BY c.what)
    FROM counted c
    JOIN runs r ON r.run_id = c.run_id
    WHERE c.n > 0 AND r.run_id <> $run
    GROUP BY r.name, r.started_at
    ORDER BY r.started_at DESC
    LIMIT 8
"""


@dataclass(frozen=True)
class Recorded:
    """What there is to show.

    Attributes:
        rows: table → rows of the run.
        protocols: analysis of heads → the run that holds what it reads: the run itself, or a protocol run beside it.
    """

    rows: dict[str, int]
    protocols: dict[str, str]

    def has(self, *tables: str) -> bool:
        """Whether the run has rows in all of these."""
        return all(self.rows.get(table, 0) > 0 for table in tables)

    @property
    def nothing(self) -> bool:
        """Whether the run holds none of it."""
        return not any(self.rows.values())


def recorded(run: Run) -> Recorded:
    """What a run holds of phenomena; protocols of heads also from runs of the same model, its own first."""
    rows = {table: run.rows(table) for table in PARTS}
    found = run.store.fetch(_MEASURED, {"run": run.run_id, "metrics": [*_PROTOCOLS.values(), _RETRIEVAL]})
    protocols: dict[str, str] = {}
    for analysis, metric in _PROTOCOLS.items():
        wanted = {metric, _RETRIEVAL} if analysis == "retrieval_heads" else {metric}
        names = sorted({str(name) for name, measured in found if measured in wanted})
        if analysis == "attention":
            names = [name for name in names if name == run.name]
        if names:
            protocols[analysis] = min(
                names, key=lambda name: (name != run.name, not name.startswith(f"{run.name}, "), name)
            )
    return Recorded(rows, protocols)


def other_holders(run: Run) -> list[tuple[str, list[str]]]:
    """Other runs of the store that hold phenomena, the newest first, and what they hold."""
    return [(str(name), [str(w) for w in what]) for name, what in run.store.fetch(_HOLDERS, {"run": run.run_id})]
