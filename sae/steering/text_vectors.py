"""One vector a text: what passes some sites at its last token, or on average, from live passes or from a run's records."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.probes.batches import BatchPlan
from moescope.probes.corpus import Corpus
from moescope.probes.live_model import LiveModel
from moescope.sae.data.live import site_vectors
from moescope.store.run import Run
from moescope.store.vectors import vector_shards

At = Literal["last", "mean"]

_TOKENS = """
    SELECT t.token, s.document_id, s.label
    FROM tokens t
    JOIN sequences s ON s.run_id = t.run_id AND s.sequence_id = t.sequence_id
    WHERE t.run_id = $run AND t.phase = 'prefill' AND t.position >= $first
    ORDER BY t.token
"""


def text_vectors(
    model: LiveModel,
    texts: Sequence[str],
    sites: Collection[Site],
    *,
    at: At = "last",
    batch_size: int = 8,
    max_length: int = 512,
) -> dict[Site, Float[torch.Tensor, "text component"]]:
    """Site → one vector a text, in float32 on the host; heads side by side.

    Args:
        model: what runs; edits in force take part.
        texts: each counts once, however long.
        sites: of the stream, of sublayers, or of heads.
        at: `last`, the text's last token; `mean`, all its tokens but the first, whose vector tells little of the text.
        batch_size, max_length: of the passes; longer texts are cut into parts.

    Raises:
        InputError: no text, or a site that the model does not have.
    """
    if isinstance(texts, str) or not len(texts):
        raise InputError("steering by contrast needs texts", expected="a list of texts", found=repr(texts)[:60])
    plan = BatchPlan(
        Corpus.load(list(texts)), model.tokenizer, batch_size, min(max_length, model.context or max_length),
        model.anatomy.vocabulary,
    )  # fmt: skip
    sums: dict[Site, torch.Tensor] = {}
    n = torch.zeros(len(texts), dtype=torch.float64)
    for batch in plan:
        found = site_vectors(model, batch, sites)
        counts = _counting(found.sequence, found.position, at)
        rows = torch.from_numpy(np.flatnonzero(counts))
        document = torch.from_numpy(found.document[counts])
        last = at == "last"  # of a text in several parts the last one's stands
        n = (
            n.index_fill(0, document, 1.0)
            if last
            else n.index_add(0, document, torch.ones(len(rows), dtype=torch.float64))
        )
        for site in sites:
            vectors = found[site].vectors.index_select(0, rows.to(found[site].vectors.device)).double().cpu()
            held = sums.setdefault(site, torch.zeros(len(texts), vectors.shape[-1], dtype=torch.float64))
            sums[site] = held.index_copy(0, document, vectors) if last else held.index_add(0, document, vectors)
    if not bool(n.all()):
        raise InputError(f"text {int((n == 0).int().argmax())} has no token that counts", fix="give longer texts")
    return {site: (total / n[:, None]).float() for site, total in sums.items()}


def label_vectors(
    run: Run, site: Site, label: str | None, *, other_than: str | None = None, first: int = 1
) -> Float[NDArray[np.float32], "document component"]:
    """One vector a document of a label: the mean of what a run recorded at a site over its tokens.

    Args:
        run: with vectors at the site.
        site: not inside experts.
        label: of the documents; None for all labels but `other_than`.
        other_than: a label to leave out.
        first: tokens before this position do not count.

    Raises:
        InputError: no vectors there, or no document of the label.
    """
    rows = run.sql(_TOKENS, {"first": first}).fetchnumpy()
    labels = np.asarray(rows["label"], dtype=object)
    wanted = labels == label if label is not None else labels != other_than
    document = np.asarray(rows["document_id"], np.int64)
    tokens = np.asarray(rows["token"], np.int64)
    known = sorted({str(name) for name in labels if isinstance(name, str)})
    if not wanted.any():
        raise InputError(f"run {run.name!r} has no document of label {label!r}", expected=", ".join(known) or "labels")
    chosen, place = np.unique(document[wanted], return_inverse=True)
    of_token = dict(zip(tokens[wanted].tolist(), place.tolist(), strict=True))
    sums: NDArray[np.float64] | None = None
    n = np.zeros(len(chosen))
    for shard in vector_shards(run, str(site)):
        at = np.array([of_token.get(int(token), -1) for token in shard.token])
        vectors = shard.float32().reshape(len(at), -1)[at >= 0]
        sums = np.zeros((len(chosen), vectors.shape[1])) if sums is None else sums
        np.add.at(sums, at[at >= 0], vectors)
        np.add.at(n, at[at >= 0], 1)
    if sums is None or not n.any():
        raise InputError(f"run {run.name!r} kept no vector of label {label!r} at {site}")
    return (sums[n > 0] / n[n > 0, None]).astype(np.float32)


def _counting(sequence: NDArray[np.int64], position: NDArray[np.int64], at: At) -> NDArray[np.bool_]:
    """Which tokens of a pass count."""
    if at == "mean":
        return position >= 1
    ends = np.append(sequence[1:] != sequence[:-1], True)
    return np.asarray(ends, bool)
