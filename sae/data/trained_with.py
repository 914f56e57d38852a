"""What training left out, as an autoencoder's row tells it: every later measure leaves out the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.sae.data.split import held_out
from moescope.store.run import Run


@dataclass(frozen=True)
class TrainedWith:
    """What training left out; the defaults are those of training, for autoencoders that say nothing of it.

    Attributes:
        run_id, corpus_fingerprint: the run it was trained on, and its texts; "" where they are not known.
        skip_first: first tokens of each sequence.
        held_out_share, split_seed: the documents held out, by `held_out`.
        max_norm_ratio: vectors of more than so many times the median norm; None for none.
    """

    run_id: str = ""
    corpus_fingerprint: str = ""
    skip_first: int = 1
    held_out_share: float = 0.1
    split_seed: int = 0
    max_norm_ratio: float | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> TrainedWith:
        """As a row of `saes` says it.

        Example:
            >>> TrainedWith.of({"settings": {"skip_first": 4}}).skip_first
            4
        """
        told = row.get("settings") or {}
        ratio, share = told.get("max_norm_ratio"), told.get("held_out_share")
        return cls(
            str(row.get("trained_on") or ""),
            str(row.get("corpus_fingerprint") or ""),
            int(told.get("skip_first", 1)),
            0.1 if share is None else float(share),
            int(told.get("split_seed", 0)),
            None if ratio is None else float(ratio),
        )

    def saw(self, run: Run) -> bool:
        """Whether it was trained on this run, or on another of the same texts."""
        texts = str(run.info["corpus_fingerprint"] or "")
        return run.run_id == self.run_id or bool(texts and texts == self.corpus_fingerprint)

    def left_out(self, documents: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """[document] whether training did not see it, where it saw the run."""
        return held_out(documents, share=self.held_out_share, seed=self.split_seed)
