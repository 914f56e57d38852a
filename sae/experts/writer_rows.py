"""Rows of what experts write along latents, with interval and null."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.statistics import permutation_p
from moescope.sae.experts.intervals import with_interval
from moescope.sae.experts.pair_rows import Rows, Setting, kept_pairs
from moescope.sae.experts.passes import PairSums, Sums
from moescope.sae.experts.subject import Router

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LENGTH = "length along the decoder"
NULL_KIND = "mean size along decoder rows of latents of nearest frequency"
_ROOM = 1 << 23


def excess(along: Floats, everywhere: Floats, active: Floats, rows: Floats) -> Floats:
    """Mean over active rows less mean over the others."""
    found: Floats = along / active - (everywhere - along) / (rows - active)
    return found


def writer_pairs(sums: Sums, at: Router, alive: Ints, top: int, strongest: int) -> PairSums:
    """The pairs of a router's experts that are kept, by `writes_excess`."""
    tally = sums.writers[at]
    along, everywhere = (t.cpu().numpy() for t in (tally.along["writes"], tally.everywhere("writes")))
    with np.errstate(divide="ignore", invalid="ignore"):
        score = excess(along, everywhere, sums.active[None], np.array(float(sums.rows)))
    return PairSums(*kept_pairs(score, alive, top, strongest))


def writer_rows(rows: Rows, setting: Setting, at: Router, n_choices: int) -> None:
    """Add every metric of a router's kept pairs."""
    pairs = setting.groups.writers[at]
    if not len(pairs.feature):
        return
    assert pairs.chosen is not None
    active, whole = setting.active(pairs.feature), setting.groups.rows[:, None]
    block = setting.groups.block[at][:, pairs.feature]
    expert = np.where(
        pairs.expert < n_choices, pairs.expert, n_choices - 1 - pairs.expert
    )  # shared experts from −1 down
    n, options = active.sum(0), {"draws": setting.draws, "seed": setting.seed}
    along, everywhere = pairs.along["writes"], pairs.everywhere["writes"]
    mean = with_interval(lambda a, n: a / n, [along, active], **options)
    more = with_interval(excess, [along, everywhere, active, whole], **options)
    chosen = with_interval(lambda a, n: a / n, [along, pairs.chosen], **options)
    share = with_interval(lambda a, b: np.where(b > 0, a / b, np.nan), [along, block], **options)
    null_mean, null_more = _null(setting, at, pairs)
    null = NULL_KIND if null_mean.shape[1] else None

    def add(metric: str, unit: str, found: tuple[Floats, Floats, Floats], n: Floats, drawn: Floats | None) -> None:
        size = None if drawn is None or not drawn.shape[1] else np.abs(drawn).mean(1)
        rows.add(
            at, metric, unit, pairs.feature, expert, found[0], n=n, low=found[1], high=found[2],
            null=size, null_kind=None if size is None else null,
        )  # fmt: skip

    add("writes", LENGTH, mean, n, null_mean)
    add("writes_chosen", LENGTH, chosen, pairs.chosen.sum(0), None)
    add("writes_share", "share", share, n, None)
    add("writes_excess", LENGTH, more, n, null_more)
    if null is not None:
        p = permutation_p(np.abs(more[0]), np.abs(null_more).T).astype(np.float64)
        rows.add(at, "writes_excess_p", "p", pairs.feature, expert, p, n=n, null_kind=NULL_KIND)
    if "writes_encoder" in pairs.along:
        read = with_interval(lambda a, n: a / n, [pairs.along["writes_encoder"], active], **options)
        add("writes_encoder", "length along the encoder", read, n, None)


def _null(setting: Setting, at: Router, pairs: PairSums) -> tuple[Floats, Floats]:
    """[pair, other] `writes` and `writes_excess` of the same tokens and experts along other latents' decoder rows."""
    assert pairs.vectors is not None
    subject, device = setting.subject, pairs.vectors.device
    near = setting.neighbours()
    place = np.searchsorted(setting.alive, pairs.feature)
    other = torch.from_numpy(setting.alive[near[place]]).to(device)
    totals = setting.sums.writers[at].whole
    active = torch.from_numpy(setting.sums.active[pairs.feature]).to(device)[:, None]
    mean, more = (np.zeros((len(pairs.feature), other.shape[1])) for _ in range(2))
    step = max(1, _ROOM // max(1, other.shape[1] * subject.directions.shape[1]))
    for start in range(0, len(pairs.feature), step):
        at_pairs = slice(start, start + step)
        rows = subject.directions[other[at_pairs]].double()  # [pair, other, d_model]
        mine = pairs.vectors[at_pairs].double()
        everywhere = totals[torch.from_numpy(pairs.expert[at_pairs]).to(device)]
        along, whole = (torch.einsum("pod,pd->po", rows, v) for v in (mine, everywhere))
        on = active[at_pairs]
        mean[at_pairs] = (along / on).cpu().numpy()
        more[at_pairs] = (along / on - (whole - along) / (setting.sums.rows - on)).cpu().numpy()
    return mean, more
