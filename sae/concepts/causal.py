"""The causal score: whether the words that a description foretells become less likely when the unit is taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.statistics import bootstrap_ratio
from moescope.sae.concepts.activity import Activity, Described
from moescope.sae.concepts.judging import Score
from moescope.sae.concepts.windows import Window

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel
    from moescope.sae.autoencoder import Autoencoder

_NAME = "described"
_LONGEST = 1024  # tokens of a sequence that are run


def taken_out(kind: Described, unit: int, *, sae: Autoencoder | None, layer: int | None, block: str) -> Intervention:
    """The edit that takes a unit out: a latent's own part of the vector, an expert's output, a head's output.

    Raises:
        InputError: neurons, which no edit takes out one by one inside experts.
    """
    from moescope.core.edit_kinds.experts import Ablate
    from moescope.core.edit_kinds.features import Latents
    from moescope.core.edit_kinds.stream import MaskHead

    if kind == "latent":
        assert sae is not None
        place = sae.target_site or sae.site
        site: Any = f"{place.block}.{place.tensor}" if place.block else place.tensor
        return Intervention(
            [Latents(layer=place.layer, site=site, sae=_NAME, latents=[unit], how="scale", values=[0.0])]
        )
    assert layer is not None
    if kind == "expert":
        return Intervention([Ablate(layer=layer, block=block, experts=[unit], how="zero")])
    if kind == "head":
        return Intervention([MaskHead(layer=layer, heads=[unit])])
    raise InputError("neurons have no causal score", fix="leave causal out of scores")


def token_ids(model: LiveModel, words: Sequence[str]) -> NDArray[np.int64]:
    """Ids with which words may begin, after a space and without one."""
    found = []
    for word in words:
        for text in (" " + word, word):
            ids = model.tokenizer.encode(text, add_special_tokens=False)
            found += ids[:1]
    return np.unique(np.array(found, np.int64))


def log_p_lost(
    model: LiveModel,
    activity: Activity,
    windows: Sequence[Window],
    cut: Intervention,
    lists: Mapping[int, NDArray[np.int64]],
    *,
    sources: Mapping[str, Any] | None,
    batch_size: int = 4,
) -> tuple[dict[int, NDArray[np.float64]], NDArray[np.int64], NDArray[np.int64]]:
    """For every list of token ids and window: sum over the window's active tokens of the mean over the list of
    log p(id next | as it is) − log p(id next | unit taken out), nats.

    Returns:
        list → [window] sums; [window] active tokens; [window] documents.
    """
    usable = [one for one in windows if one.first + len(one.ids) <= _LONGEST and one.active.any()]
    sums = {name: np.zeros(len(usable)) for name in lists}
    with torch.no_grad(), model.edited([Intervention(), cut], sources=sources) as session:
        for start in range(0, len(usable), batch_size):
            part = usable[start : start + batch_size]
            texts = [_text(activity, one) for one in part]
            width = max(map(len, texts))
            ids = torch.full((2 * len(part), width), model.pad_id, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(texts):
                for both in (row, row + len(part)):
                    ids[both, : len(text)] = torch.from_numpy(text)
                    mask[both, : len(text)] = 1
            session.assign([0] * len(part) + [1] * len(part))
            out = model.module(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
            ).logits
            for row, window in enumerate(part):
                at = torch.from_numpy(window.first + np.flatnonzero(window.active))
                as_is, without = (out[r, at].float().log_softmax(-1) for r in (row, row + len(part)))
                lost = (as_is - without).double().cpu().numpy()
                for name, listed in lists.items():
                    sums[name][start + row] = lost[:, listed].mean(1).sum() if len(listed) else 0.0
    counts = np.array([int(one.active.sum()) for one in usable], np.int64)
    return sums, counts, np.array([one.document for one in usable], np.int64)


def causal_score(
    sums: NDArray[np.float64], counts: NDArray[np.int64], documents: NDArray[np.int64], *, draws: int, seed: int
) -> Score:
    """Mean over active tokens with a bootstrap interval over documents."""
    if not counts.sum():
        return Score(None, None, None, 0, 0)
    known, of = np.unique(documents, return_inverse=True)
    numerator, denominator = (
        np.bincount(of, weights=x, minlength=len(known)).astype(np.float64) for x in (sums, counts)
    )
    value, low, high = (float(x) for x in bootstrap_ratio(numerator, denominator, draws=draws, seed=seed))
    bounded = bool(np.isfinite([low, high]).all())
    return Score(value, low if bounded else None, high if bounded else None, int(counts.sum()), 0)


def _text(activity: Activity, window: Window) -> NDArray[np.int64]:
    """The window's sequence from its beginning to the window's end."""
    t = activity.tokens
    first = int(np.searchsorted(t.sequence, window.sequence))
    return t.token_id[first : first + window.first + len(window.ids)]
