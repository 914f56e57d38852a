"""Vectors at an autoencoder's site, in pieces: from a run's shards, or while the model runs over the run's own sequences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.reading.run_text import Ints, RunText
from moescope.store.run import Run
from moescope.store.vectors import vector_shards, vector_sites

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel

Piece = tuple[Float[torch.Tensor, "row component"], Ints]
"""Vectors in float32 on the host, and where the token of each stands in the `RunText`."""


def kept_vectors(run: Run, autoencoder: Autoencoder) -> bool:
    """Whether a run kept vectors at an autoencoder's site."""
    return str(autoencoder.site) in vector_sites(run)


def recorded_pieces(run: Run, autoencoder: Autoencoder, text: RunText, *, rows: int) -> Iterator[Piece]:
    """The vectors that a run kept of some documents, `rows` tokens or slots at a time.

    Raises:
        InputError: none kept at the site, another width, or no expert where the autoencoder is of one.
        StoreError: a shard that is missing or damaged.
    """
    for shard in vector_shards(run, str(autoencoder.site), verify=True):
        place = text.places(np.asarray(shard.token))
        mine = place >= 0
        if autoencoder.expert is not None:
            if shard.expert is None:
                raise InputError(f"{autoencoder.name} is of one expert, and the vectors at {autoencoder.site} of none")
            mine &= np.asarray(shard.expert) == autoencoder.expert
        wanted = np.flatnonzero(mine)
        for start in range(0, len(wanted), rows):
            part = wanted[start : start + rows]
            yield fitted(torch.from_numpy(_floats(shard.raw[part], shard.dtype)), place[part], autoencoder)


def live_pieces(model: LiveModel, autoencoder: Autoencoder, text: RunText, *, batch_size: int) -> Iterator[Piece]:
    """The vectors of every token while the model runs over the sequences of a run again; no further than the site.

    Raises:
        InputError: a site that the model does not have, or another width.
    """
    from moescope.probes.batches import Batch, Sequence
    from moescope.probes.corpus import Document
    from moescope.sae.data.live import site_vectors

    starts = text.starts(text.sequence_id)
    spans = list(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
    for first in range(0, len(spans), batch_size):
        part = spans[first : first + batch_size]
        sequences = tuple(
            Sequence(n, n, Document("", None), 0, "", text.token_id[start:end].astype(np.int64))
            for n, (start, end) in enumerate(part)
        )
        passed = site_vectors(model, Batch(0, sequences, 0), [autoencoder.site])
        at_site = passed[autoencoder.site].of_expert(autoencoder.expert).of_head(getattr(autoencoder, "head", None))
        place = np.array([start for start, _ in part])[passed.sequence] + passed.position
        yield fitted(at_site.vectors.float().cpu(), place[at_site.token.cpu().numpy()], autoencoder)


def fitted(vectors: torch.Tensor, place: Ints, autoencoder: Autoencoder) -> Piece:
    """Vectors as an autoencoder takes them: the heads of a token side by side, or the one head that it is of.

    Raises:
        InputError: another width, or components that are no numbers.
    """
    if vectors.dim() == 3 and (head := getattr(autoencoder, "head", None)) is not None:
        vectors = vectors[:, head]
    vectors = vectors.flatten(1)
    if vectors.shape[1] != autoencoder.d_in:
        raise InputError(
            f"{autoencoder.name} does not fit the vectors at {autoencoder.site}",
            expected=f"{autoencoder.d_in:,} components",
            found=f"{vectors.shape[1]:,}",
            fix="choose a run of the model that it belongs to",
        )
    if not bool(torch.isfinite(vectors).all()):
        raise InputError(
            f"the vectors at {autoencoder.site} hold NaN or infinity", fix="record them in another dtype (float32)"
        )
    return vectors, place


def _floats(raw: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Components in float32; bfloat16 lies in the shards as its bits."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32)
