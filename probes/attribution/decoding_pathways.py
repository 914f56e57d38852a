"""Routing of a prompt mixed with that of its neighbours among reference prompts, at its last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.edit_kinds.experts import MixRouting
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.sites import RESID_POST, ROUTER_LOGITS, Site
from moescope.probes.anatomy import Sublayer
from moescope.probes.attribution.decoding_prompts import prompt_ids, prompts_of
from moescope.probes.edits.router_rules import rule_for
from moescope.probes.live_model import LiveModel
from moescope.probes.taps import tapped

Array = NDArray[np.float64]
Place = tuple[int, str]

LAYERS = 5
NEIGHBOURS = 3
# Bandwidths tried, in units of the median distance between reference prompts.
_BANDWIDTHS = tuple(2.0**power for power in np.arange(-4, 3.5, 0.5))


@dataclass(frozen=True)
class Pathways:
    """How prompts were routed at their last token, and where they lie.

    Attributes:
        places: (layer, block) of the routers.
        shares: one a router: [prompt, expert] the router's scores at the last token, summing to 1 over experts.
        vectors: [prompt, component] what prompts are compared by.
        site: where the vectors were read; None where the caller gave them.
    """

    places: tuple[Place, ...]
    shares: tuple[Array, ...]
    vectors: Array
    site: str | None

    @property
    def prompts(self) -> int:
        """How many."""
        return len(self.vectors)


def pathways(
    model: LiveModel, prompts: Any, *, layers: int = LAYERS, site_layer: int | None = None, vectors: Any = None
) -> Pathways:
    """Run prompts and keep how their last token is routed in the last layers with experts.

    C3PO's references are prompts that the model answers well; choosing those is the caller's part. Prompts are compared by
    sentence embeddings in the paper (all-MiniLM-L6-v2); here by the model's own mean hidden state, unless vectors are given.

    Args:
        model: with verified routing rules.
        prompts: a text, a list of token ids, or a list of either.
        layers: how many routers to keep, counted from the last; fewer where the model has fewer.
        site_layer: block at whose output hidden states are averaged over the prompt; the one before the first router kept,
            where not given.
        vectors: [prompt, component] to compare prompts by instead.

    Raises:
        InputError: no experts, a router without a verified rule, a block that is not there, vectors of another number or
            that are not finite.

    Example:
        >>> import moescope as ms
        >>> found = pathways(ms.load("demo"), ["First.", "The second."], layers=2)
        >>> found.places, found.shares[0].shape
        (((4, 'mlp'), (5, 'mlp')), (2, 16))
    """
    if layers < 1:
        raise InputError("at least one layer is needed", found=f"layers={layers}")
    routers = model.anatomy.moe[-layers:]
    if not routers:
        raise InputError(f"{model.name} has no experts", expected="a mixture-of-experts model")
    rules = [rule_for(model, s) for s in routers]
    layer = max(routers[0].layer - 1, 0) if site_layer is None else site_layer
    if not 0 <= layer < model.anatomy.n_layers:
        raise InputError(f"there is no block {layer}", expected=f"0 to {model.anatomy.n_layers - 1}")
    given = [prompt_ids(model, prompt) for prompt in prompts_of(prompts)]
    read = [_read(model, ids, routers, layer) for ids in given]
    shares = tuple(
        torch.cat([rule.shares(logits[number]) for logits, _ in read]).double().cpu().numpy()
        for number, rule in enumerate(rules)
    )
    if vectors is None:
        own = torch.stack([vector for _, vector in read]).double().cpu().numpy()
        return Pathways(tuple((s.layer, s.block) for s in routers), shares, own, str(Site(layer, "", RESID_POST)))
    found = np.asarray(vectors, dtype=np.float64)
    if found.ndim != 2 or len(found) != len(given) or not np.isfinite(found).all():
        raise InputError(
            "these vectors do not belong to the prompts",
            expected=f"{len(given)} rows of finite numbers",
            found=f"shape {found.shape}",
        )
    return Pathways(tuple((s.layer, s.block) for s in routers), shares, found, None)


def neighbour_weights(
    references: Array,
    query: Array,
    *,
    how: Literal["nearest", "kernel"] = "nearest",
    neighbours: int = NEIGHBOURS,
    bandwidth: float | None = None,
) -> Array:
    """How much each reference counts for a query; weights sum to 1.

    Args:
        references: [prompt, component]; query: [component].
        how: `nearest`, the nearest few by cosine, each weighted by its cosine (the released code); `kernel`, all of them by
            exp(−d² / 2h²), d the distance of the vectors at length 1 (the paper).
        neighbours: how many are nearest.
        bandwidth: h of the kernel.

    Raises:
        InputError: nothing to weigh by: a vector of length 0, no neighbour with a cosine above 0, no bandwidth above 0.

    Example:
        >>> neighbour_weights(np.eye(3), np.array([1.0, 1.0, 0.0]), neighbours=2).tolist()
        [0.5, 0.5, 0.0]
    """
    near = _unit(references) @ _unit(query[None])[0]
    if how == "kernel":
        if bandwidth is None or not bandwidth > 0:
            raise InputError("the kernel has no bandwidth", expected="a number above 0", found=f"{bandwidth}")
        squared = np.maximum(2 - 2 * near, 0)
        weights = np.exp(-(squared - squared.min()) / (2 * bandwidth**2))
        return np.asarray(weights / weights.sum())
    if not 1 <= neighbours <= len(near):
        raise InputError("so many neighbours there are not", expected=f"1 to {len(near)}", found=f"{neighbours}")
    weights = np.zeros(len(near))
    chosen = np.argsort(-near, kind="stable")[:neighbours]
    weights[chosen] = np.maximum(near[chosen], 0)
    if not weights.sum() > 0:
        raise InputError("no reference prompt is like this one", found="cosines of 0 and below")
    return np.asarray(weights / weights.sum())


def best_bandwidth(references: Pathways) -> float:
    """The kernel's bandwidth that predicts each reference's routing best from the others (leave one out, squared error).

    Tried are powers of the root of 2 times the median distance between references.

    Raises:
        InputError: fewer than three references, or all at one place.
    """
    unit = _unit(references.vectors)
    squared = np.maximum(2 - 2 * unit @ unit.T, 0)
    apart = squared[np.triu_indices(len(unit), 1)]
    if len(unit) < 3 or not np.median(apart) > 1e-12:
        raise InputError(
            "a bandwidth cannot be chosen from these references",
            expected="at least three prompts that differ",
            found=f"{len(unit)}",
            fix='give bandwidth=…, or how="nearest"',
        )
    routed = np.concatenate(references.shares, axis=1)
    far = squared + np.where(np.eye(len(unit)) > 0, np.inf, 0.0)  # nobody predicts itself
    errors = []
    tried = [float(np.sqrt(np.median(apart)) * factor) for factor in _BANDWIDTHS]
    for width in tried:
        weights = np.exp(-(far - far.min(1, keepdims=True)) / (2 * width**2))
        predicted = weights / weights.sum(1, keepdims=True) @ routed
        errors.append(float(((predicted - routed) ** 2).sum()))
    return tried[int(np.argmin(errors))]


def remix(
    model: LiveModel,
    references: Pathways,
    prompt: str | Sequence[int],
    *,
    how: Literal["nearest", "kernel"] = "nearest",
    neighbours: int = NEIGHBOURS,
    bandwidth: float | None = None,
    share: float = 1.0,
    vector: Any = None,
) -> Intervention:
    """An intervention that mixes a prompt's routing with its neighbours', from its last token on (C3PO, arXiv 2504.07964).

    At each router of the references, the scores at the prompt's last token, and at every token generated after it, become
    (1 − share) · own + share · Σ weight · reference, and the router takes its top-k of these.

    Trap: the released code takes the three nearest with share 1; the paper's kernel regression, with a share of its own,
    is `how="kernel"`. Neither chooses experts by loss (the paper's gradient descent does).

    Args:
        model: the references were read from.
        references: of `pathways`.
        prompt: a text or token ids.
        how, neighbours, bandwidth: as in `neighbour_weights`; the bandwidth is `best_bandwidth` where not given.
        share: of the references, 0 to 1.
        vector: of the prompt, where the references came with vectors of the caller.

    Returns:
        one `MixRouting` a router, at positions from the prompt's last token on; for this prompt alone.

    Example:
        >>> import moescope as ms
        >>> model = ms.load("demo")
        >>> references = pathways(model, ["In the beginning", "for (i = 0;", "def f(x):"])
        >>> cut = remix(model, references, "In the end")
        >>> len(cut.edits), cut.edits[0].positions
        (5, '3:')
    """
    ids = prompt_ids(model, prompt)
    own = {(s.layer, s.block): s for s in model.anatomy.moe}
    for place, shares in zip(references.places, references.shares, strict=True):
        if place not in own or own[place].n_experts != shares.shape[1]:
            raise InputError(
                "these references are of another model",
                found=f"a router of {shares.shape[1]} experts in layer {place[0]}",
            )
    if vector is None:
        if references.site is None:
            raise InputError("the references came with vectors of their own", fix="give the prompt's: vector=…")
        routers = [own[place] for place in references.places]
        layer = int(references.site.split(".")[1])
        vector = _read(model, ids, routers, layer)[1].double().cpu().numpy()
    query = np.asarray(vector, dtype=np.float64)
    if query.shape != references.vectors.shape[1:]:
        raise InputError(
            "the prompt's vector is of another width",
            expected=f"{references.vectors.shape[1]} numbers",
            found=f"shape {query.shape}",
        )
    if how == "kernel" and bandwidth is None:
        bandwidth = best_bandwidth(references)
    kept = min(neighbours, references.prompts)
    weights = neighbour_weights(references.vectors, query, how=how, neighbours=kept, bandwidth=bandwidth)
    edits = []
    for (layer, block), shares in zip(references.places, references.shares, strict=True):
        mixed = weights @ shares
        edits.append(
            MixRouting(
                layer=layer,
                block=block,
                reference=tuple(mixed / mixed.sum()),
                share=share,
                positions=f"{len(ids) - 1}:",
            )
        )
    return Intervention(edits, name="mixed with its neighbours", anatomy=model.anatomy.digest)


def _read(
    model: LiveModel, ids: Sequence[int], routers: Sequence[Sublayer], layer: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits of each router at the last token, [1, expert], and the mean hidden state of the prompt."""
    sites = [Site(s.layer, s.block, ROUTER_LOGITS) for s in routers]
    stream = Site(layer, "", RESID_POST)
    seen: dict[Site, torch.Tensor] = {}

    def receive(site: Site, tensors: dict[str, torch.Tensor]) -> None:
        found = tensors["resid"][0].float().mean(0) if site == stream else tensors["logits"][-1:]
        seen[site] = found.clone()

    fed = torch.tensor([list(ids)], dtype=torch.int64).to(model.device)
    with torch.no_grad(), tapped(model.module, model.anatomy, [*sites, stream], receive):
        model.module(input_ids=fed, attention_mask=torch.ones_like(fed), use_cache=False)
    return [seen[site] for site in sites], seen[stream]


def _unit(vectors: Array) -> Array:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not (length > 0).all():
        raise InputError("a prompt's vector has length 0", fix="compare by another layer, or give vectors")
    return np.asarray(vectors / length)
