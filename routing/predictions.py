"""Why a run has no predictions to judge: it was imported, or its texts are too short."""

from __future__ import annotations

from moescope.core.errors import InputError
from moescope.store.run import Run

_LONGEST = "SELECT coalesce(max(n_tokens), 0) FROM sequences WHERE run_id = ?"


def require_predictions(run: Run) -> None:
    """Raise `InputError` with the reason where no token of the run has an NLL."""
    found = run.store.fetch("SELECT 1 FROM tokens WHERE run_id = ? AND nll IS NOT NULL LIMIT 1", [run.run_id])
    if found:
        return
    if (stop := run.info["settings"].get("stop_after")) is not None:
        raise InputError(
            f"run {run.name!r} has no NLL",
            found=f"passes that stopped after block {stop}",
            fix="record the texts with whole passes (leave out stop_after)",
        )
    if run.store.fetch(_LONGEST, [run.run_id])[0][0] > 1:
        raise InputError(
            f"run {run.name!r} has no NLL",
            found="decisions alone, as an imported trace has them",
            fix="record the texts from a live model",
        )
    raise InputError(
        f"run {run.name!r} has no predicted tokens", found="only sequences of one token", fix="record longer texts"
    )
