"""What a run has, and whether what the address asks for is among it."""

from __future__ import annotations

from dataclasses import dataclass

from moescope.core.errors import InputError
from moescope.dashboard.url_state import Layer, ViewState
from moescope.routing.grid import layer_name
from moescope.store.run import Run
from moescope.store.store import Store


@dataclass(frozen=True)
class Router:
    """One router of a run's model: where it is, and how many experts it has.

    Attributes:
        layer, block: where it is.
        experts: how many it chooses from, null experts among them.
        top_k: how many it chooses.
        shared: experts beside them that every token goes through.
        null: how many of `experts` compute nothing.
    """

    layer: int
    block: str
    experts: int
    top_k: int
    shared: int = 0
    null: int = 0

    @property
    def real(self) -> int:
        """Experts that have weights: to be held, moved, copied or placed."""
        return self.experts - self.null

    @property
    def name(self) -> str:
        """`L3`, or `L3 attn`."""
        return layer_name(self.layer, self.block)

    def expert_name(self, expert: int) -> str:
        """`L3·E7`; shared experts, whose ids are negative, are `L3·S1`, `L3·S2`, …"""
        return f"{self.name}·{expert_name(expert)}"


def expert_name(expert: int) -> str:
    """`E7`, or `S1` for the first shared expert."""
    return f"E{expert}" if expert >= 0 else f"S{-expert}"


def find_run(store: Store, state: ViewState) -> Run | None:
    """The run the address names, else the newest complete one, else the newest; None for a store without runs.

    Raises:
        InputError: no run has the name.
    """
    if state.run is not None:
        return store.run(state.run)
    runs = store.runs()
    return next((run for run in reversed(runs) if run.complete), runs[-1] if runs else None)


def routers(run: Run) -> list[Router]:
    """The run's routers by layer, the MLP's before others of the same layer; empty for a dense model."""
    rows = run.store.fetch(
        """
        SELECT layer, block, n_experts + coalesce(n_null, 0), coalesce(top_k, 1), coalesce(n_shared, 0),
            coalesce(n_null, 0)
        FROM layers
        WHERE run_id = ? AND n_experts IS NOT NULL
        ORDER BY layer, block != 'mlp', block
        """,
        [run.run_id],
    )
    return [Router(*row) for row in rows]


def find_router(run: Run, state: ViewState, known: list[Router]) -> Router:
    """The router the address means, the first one where it names no layer.

    Raises:
        InputError: the model has no routers, none in that layer, or no such expert.
    """
    if not known:
        raise InputError(f"run {run.name!r} has no experts", found="a dense model: no layer has a router")
    chosen = known[0] if state.layer is None else _at(known, state.layer)
    if chosen is None:
        raise InputError(
            f"run {run.name!r} has no router at layer {state.layer}",
            found="routers at " + ", ".join(router.name for router in known),
            fix="choose one of these layers",
        )
    for expert in (*state.pins, *([] if state.expert is None else [state.expert])):
        if not -chosen.shared <= expert < chosen.experts:
            raise InputError(
                f"{chosen.name} has no expert {expert}",
                found=f"experts 0 to {chosen.experts - 1}",
                fix="choose one of these",
            )
    return chosen


def choices(run: Run) -> int:
    """Choices of the run by its loads: tokens × routers × k; 0 without loads."""
    rows = run.store.fetch(
        """
        SELECT coalesce(sum(tokens), 0)::BIGINT
        FROM loads
        WHERE run_id = ? AND expert >= 0
        """,
        [run.run_id],
    )
    return int(rows[0][0])


def model_layers(run: Run) -> list[int]:
    """The layers of the run's model, of every kind."""
    rows = run.store.fetch("SELECT DISTINCT layer FROM layers WHERE run_id = ? ORDER BY layer", [run.run_id])
    return [int(layer) for (layer,) in rows]


def labels(run: Run) -> list[tuple[str, int]]:
    """Labels of the run's texts with their tokens; texts without a label are left out."""
    return run.store.fetch(
        """
        SELECT label, sum(n_tokens)::BIGINT
        FROM sequences
        WHERE run_id = ? AND label IS NOT NULL
        GROUP BY label
        ORDER BY label
        """,
        [run.run_id],
    )


def _at(known: list[Router], layer: Layer) -> Router | None:
    matching = [r for r in known if r.layer == layer.number and layer.block in (None, r.block)]
    return matching[0] if matching else None


def layer_of(router: Router, known: list[Router]) -> Layer:
    """The address of a router: its block is written only where the layer has another router before it."""
    first = next(r for r in known if r.layer == router.layer)
    return Layer(router.layer, None if first == router else router.block)
