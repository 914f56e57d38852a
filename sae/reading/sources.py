"""Which vectors of a run features are read on: those that training left out, as it took them, recorded or live."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from moescope.core.errors import InputError
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.data.trained_with import TrainedWith
from moescope.sae.reading.run_text import RunText, run_text
from moescope.sae.reading.vectors import Piece, kept_vectors, live_pieces, recorded_pieces
from moescope.store.run import Run
from moescope.store.store import Store

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel

_ROWS = 4096
_COVERED = """
    SELECT sum(tokens), (SELECT count(*) FROM tokens WHERE run_id = $run)
    FROM activations
    WHERE run_id = $run AND site = $site
"""


def check_stored(autoencoder: Autoencoder, store: Store) -> None:
    """Refuse an autoencoder that the store does not hold: its rows would be of nothing.

    Raises:
        InputError: with how to put it there.
    """
    if not store.fetch("SELECT 1 FROM saes WHERE sae_id = $sae", {"sae": autoencoder.sae_id}):
        raise InputError(
            f"the autoencoder {autoencoder.name!r} is not in {store.path}",
            fix="load it into the store first: from_disk(folder, store=store) or published(release, sae_id, store=store)",
        )


def chosen_text(autoencoder: Autoencoder, run: Run, documents: str) -> RunText:
    """The documents to read: all, or where training saw its texts and `held_out` is asked, those that it left out.

    Raises:
        InputError: another word, or no document was left out.
    """
    if documents not in ("held_out", "all"):
        raise InputError(f"documents cannot be {documents!r}", expected="held_out or all")
    text_ids = run.store.fetch("SELECT DISTINCT document_id FROM sequences WHERE run_id = ? ORDER BY 1", [run.run_id])
    ids = np.array([number for (number,) in text_ids], np.int64)
    trained = TrainedWith.of(autoencoder.row)
    if documents == "all" or not trained.saw(run) or not len(ids):
        return run_text(run)
    out = trained.left_out(ids)
    if not out.any():
        raise InputError(
            f"no document of run {run.name!r} was held out of training",
            found=f"{len(ids):,} documents",
            fix="read all of them: documents='all' (--documents all)",
        )
    return run_text(run, ids[out])


def source_of(
    autoencoder: Autoencoder, run: Run, model: LiveModel | None, text: RunText
) -> tuple[Callable[[RunText], Iterable[Piece]], bool]:
    """Where vectors come from, and whether that is the live model."""
    site = str(autoencoder.site)
    kept = kept_vectors(run, autoencoder)
    have, all_tokens = run.store.fetch(_COVERED, {"run": run.run_id, "site": site})[0]
    if kept and (model is None or (have or 0) >= all_tokens):
        return lambda wanted: recorded_pieces(run, autoencoder, wanted, rows=_ROWS), False
    if model is None:
        raise InputError(
            f"run {run.name!r} kept no vectors at {site}",
            fix=f"pass the model to read them live, or record them (sites=['{site}'])",
        )
    batch = int(run.info["settings"].get("batch_size") or 8)
    return lambda wanted: live_pieces(model, autoencoder, wanted, batch_size=batch), True
