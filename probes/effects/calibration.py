"""Means that edits put in the place of what they take out: of experts' outputs, of channels of the stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moescope.core.edit import Edit
from moescope.core.edit_kinds.experts import Ablate, as_tuple
from moescope.core.edit_kinds.stream import SetChannel, StreamSite
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.sites import EXPERT_OUT, RESID_POST, Site
from moescope.probes.batches import BatchPlan
from moescope.probes.corpus import Corpus
from moescope.probes.forward import DeviceBatch, logits_of, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.taps import tapped

Key = tuple[int, str]


@dataclass(frozen=True)
class ExpertMean:
    """Mean output of one expert.

    Attributes:
        layer, block, expert: which.
        mean: of its output before the routing weight, over the tokens that chose it; d_model numbers.
        n: how many tokens those are.
    """

    layer: int
    block: str
    expert: int
    mean: tuple[float, ...]
    n: int


@dataclass(frozen=True)
class ChannelMeans:
    """Mean values of channels of one stream, of starting tokens and of all others apart.

    Attributes:
        layer, site: of the stream.
        channels: which.
        starting, others: mean of each channel, in activation units, over the first tokens of sequences and over the rest;
            None for a channel that no such token counted for.
        n_starting, n_others: tokens that counted for each channel.
        above: only where |x| exceeds it; None where all tokens counted.
    """

    layer: int
    site: str
    channels: tuple[int, ...]
    starting: tuple[float | None, ...]
    others: tuple[float | None, ...]
    n_starting: tuple[int, ...]
    n_others: tuple[int, ...]
    above: float | None = None

    def edits(self) -> tuple[SetChannel, ...]:
        """Edits that set the channels to their means: at starting tokens to theirs, at other tokens to theirs."""
        found = []
        for positions, means in (("0:1", self.starting), ("1:", self.others)):
            known = [(c, m) for c, m in zip(self.channels, means, strict=True) if m is not None]
            if known:
                channels, values = zip(*known, strict=True)
                site: Any = self.site
                found.append(
                    SetChannel(
                        layer=self.layer,
                        site=site,
                        channels=channels,
                        values=values,
                        above=self.above,
                        positions=positions,
                    )
                )
        return tuple(found)


def expert_means(
    model: LiveModel,
    corpus: Any,
    experts: Mapping[int, Sequence[int]] | Mapping[Key, Sequence[int]],
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> list[ExpertMean]:
    """What experts put out on average, over the tokens of a corpus that chose them; nothing is kept but sums.

    Args:
        model: a loaded model, as it is (edits in force are in force here too).
        corpus: a `Corpus`, or anything `Corpus.load` takes.
        experts: layer, or (layer, block), → ids of routed experts.
        batch_size, max_length: how the corpus is cut.

    Returns:
        One mean an expert, in the order asked for. Sums over a batch are in float32, over batches in float64.

    Raises:
        InputError: a layer without experts or whose experts' outputs cannot be read, or an expert that no token chose.

    Example:
        >>> import moescope as ms
        >>> corpus = ms.Corpus.from_token_ids([range(5, 405)])
        >>> [(mean.expert, len(mean.mean)) for mean in expert_means(ms.load("demo"), corpus, {2: [0, 1]})]
        [(0, 192), (1, 192)]
    """
    asked = {(at if isinstance(at, tuple) else (at, "mlp")): as_tuple(ids) for at, ids in experts.items()}
    sums: dict[Key, torch.Tensor] = {}
    counts: dict[Key, torch.Tensor] = {}

    def reduce(site: Site, tensors: dict[str, torch.Tensor], batch: DeviceBatch) -> None:
        key = site.layer, site.block
        out, ids = tensors["out"], tensors["indices"]
        wanted = torch.tensor(asked[key]).to(ids.device, non_blocking=True)
        real = batch.mask.reshape(-1, 1, 1).to(ids.device)
        hit = ((ids[..., None] == wanted) & real).float()  # [token, k, expert]
        _add(sums, key, torch.einsum("tke,tkd->ed", hit, torch.where(real, out.float(), 0.0)))
        _add(counts, key, hit.sum((0, 1)))

    sites = [Site(layer, block, EXPERT_OUT) for layer, block in asked]
    _pass_over(model, corpus, sites, reduce, batch_size=batch_size, max_length=max_length)
    found = []
    for (layer, block), ids in asked.items():
        n = [round(count) for count in counts[layer, block].tolist()]
        if never := [e for e, count in zip(ids, n, strict=True) if not count]:
            raise InputError(
                f"expert {never[0]} of layer {layer} has no mean output",
                found="no token of the calibration corpus chose it",
                fix="pass a larger corpus, or leave it out",
            )
        means = sums[layer, block] / counts[layer, block][:, None]
        found += [
            ExpertMean(layer, block, e, tuple(mean), count)
            for e, mean, count in zip(ids, means.tolist(), n, strict=True)
        ]
    return found


def with_means(
    model: LiveModel, corpus: Any, intervention: Intervention, *, batch_size: int = 8, max_length: int = 512
) -> Intervention:
    """The same intervention with the means that its `Ablate(how="mean")` edits leave out, calibrated on a corpus.

    One pass over the corpus serves them all; an edit of several layers becomes one edit a layer.

    Raises:
        InputError: as `expert_means`.
    """
    edits = [edit for one in intervention.edits for edit in _by_layer(one, model)]
    asked: defaultdict[Key, dict[int, None]] = defaultdict(dict)
    for edit in edits:
        if (key := _lacks_means(edit)) is not None:
            asked[key] |= dict.fromkeys(edit.ids)  # type: ignore[attr-defined]  # an Ablate
    if not asked:
        return intervention
    wanted: dict[Key, Sequence[int]] = {key: tuple(ids) for key, ids in asked.items()}
    found = expert_means(model, corpus, wanted, batch_size=batch_size, max_length=max_length)
    means = {(m.layer, m.block, m.expert): m.mean for m in found}

    def filled(edit: Edit) -> Edit:
        key = _lacks_means(edit)
        if key is None or not isinstance(edit, Ablate):
            return edit
        return replace(edit, means=tuple(means[(*key, e)] for e in edit.ids))

    return Intervention(map(filled, edits), name=intervention.name, anatomy=intervention.anatomy)


def channel_means(
    model: LiveModel,
    corpus: Any,
    *,
    layer: int,
    channels: Sequence[int] | int,
    site: StreamSite = RESID_POST,  # type: ignore[assignment]  # a constant of this value
    above: float | None = None,
    batch_size: int = 8,
    max_length: int = 512,
) -> ChannelMeans:
    """Mean value of channels of a stream over a corpus, of starting tokens (the first of each sequence) and others apart.

    The mean to which massive activations are set, with separate means for starting and other tokens, as in
    bluorion-com/refine_massive_activations (arXiv 2503.22329), which calibrates on 100 sequences. Theirs counts the tokens
    where the activation is massive; `above` says from which magnitude on.

    Args:
        model: a loaded model.
        corpus: a `Corpus`, or anything `Corpus.load` takes.
        layer, site: which stream.
        channels: of it, 0 to d_model − 1.
        above: count a token for a channel only where |x| exceeds it, in activation units; None for everywhere.
        batch_size, max_length: how the corpus is cut.

    Raises:
        InputError: a site or channel that the model does not have, or channels that exceed `above` nowhere.

    Example:
        >>> import moescope as ms
        >>> means = channel_means(ms.load("demo"), ["A text.", "Another one."], layer=1, channels=[3])
        >>> means.n_starting, [edit.positions for edit in means.edits()]
        ((2,), ['0:1', '1:'])
    """
    asked = as_tuple(channels)
    if not asked or not all(0 <= c < model.anatomy.d_model for c in asked):
        raise InputError(
            "there is no such channel", expected=f"channels 0 to {model.anatomy.d_model - 1}", found=f"{asked}"
        )
    sums: dict[str, torch.Tensor] = {}

    def reduce(_site: Site, tensors: dict[str, torch.Tensor], batch: DeviceBatch) -> None:
        stream = next(iter(tensors.values()))
        values = stream[..., torch.tensor(asked).to(stream.device, non_blocking=True)].float()
        mask = batch.mask.to(stream.device)
        counted = mask[..., None] & (values.abs() > (-1.0 if above is None else above))
        first = (mask.long().cumsum(-1) == 1)[..., None]
        for name, where in (("starting", counted & first), ("others", counted & ~first)):
            _add(sums, name, torch.where(where, values, 0.0).sum((0, 1)))
            _add(sums, f"n_{name}", where.sum((0, 1)))

    place = Site(layer, "", site)
    _pass_over(model, corpus, [place], reduce, batch_size=batch_size, max_length=max_length)
    counts = {name: tuple(int(n) for n in sums[f"n_{name}"].tolist()) for name in ("starting", "others")}
    if not any((*counts["starting"], *counts["others"])):
        raise InputError(
            f"no token has a magnitude above {above} there", found=f"channels {asked} at {place}", fix="lower `above`"
        )
    means = {
        name: tuple(total / n if n else None for total, n in zip(sums[name].tolist(), counts[name], strict=True))
        for name in counts
    }
    return ChannelMeans(
        layer, site, asked, means["starting"], means["others"], counts["starting"], counts["others"], above
    )


def _lacks_means(edit: Edit) -> Key | None:
    """Layer and block of an edit whose means are to be found; None for any other."""
    if not isinstance(edit, Ablate) or edit.how != "mean" or edit.means is not None:
        return None
    assert isinstance(edit.layer, int)
    return edit.layer, edit.block


def _by_layer(edit: Edit, model: LiveModel) -> list[Edit]:
    """An edit that lacks means once for each of its layers; any other as it is."""
    if not isinstance(edit, Ablate) or edit.how != "mean" or edit.means is not None:
        return [edit]
    layers = edit.layers or tuple(s.layer for s in model.anatomy.moe if s.block == edit.block)
    return [replace(edit, layer=layer) for layer in layers]


Reduce = Callable[[Site, dict[str, torch.Tensor], DeviceBatch], None]


def _pass_over(
    model: LiveModel, corpus: Any, sites: Collection[Site], reduce: Reduce, *, batch_size: int, max_length: int
) -> None:
    """Run a corpus and hand what passes the sites to `reduce`, with the batch that runs."""
    corpus = corpus if isinstance(corpus, Corpus) else Corpus.load(corpus)
    length = min(max_length, model.context or max_length)
    running: list[DeviceBatch] = []
    with (
        torch.no_grad(),
        tapped(model.module, model.anatomy, sites, lambda site, tensors: reduce(site, tensors, running[0])),
    ):
        for batch in BatchPlan(corpus, model.tokenizer, batch_size, length, model.anatomy.vocabulary):
            running[:] = [to_device(batch, model)]
            logits_of(model, running[0])
    if not running:
        raise InputError("the calibration corpus has no text")


def _add(sums: dict[Any, torch.Tensor], key: Any, more: torch.Tensor) -> None:
    wide = more.double() if more.device.type != "mps" else more  # which has no float64
    sums[key] = sums[key] + wide if key in sums else wide
