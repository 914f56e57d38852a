"""`attention_reduced`: a model's attention patterns, handed out in slices of queries while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.probes.anatomy import Anatomy
from moescope.probes.attention_slices import PatternSlices
from moescope.probes.attention_taps import PATTERN_SLICES, attention_refusals, tap_attention
from moescope.probes.live_model import LiveModel

ReceiveSlices = Callable[[Site, PatternSlices], None]

_NOT_CAUSAL = "it is the encoder's, which is not causal: what is said of sinks is said of causal attention"
_LINEAR = "it is a state-space or linear layer, which has no attention weights"


@contextmanager
def attention_reduced(
    model: LiveModel, layers: Collection[int] | None, receive: ReceiveSlices
) -> Iterator[Mapping[Site, str]]:
    """Hand the attention pattern of every layer to `receive`, in slices of queries, at every forward pass inside.

    Never all of [head, query, key] at once: memory grows linearly with the length. The slices are computed while `receive`
    goes over them (`for pattern, first in slices: …`), on the device, in float32; a layer whose slices it does not ask for
    costs nothing. Edits in force are seen, whether `model.edited(…)` was entered before or after.

    Args:
        model: from `moescope.load`.
        layers: 0-based numbers of the blocks; None for all.
        receive: called once a layer and pass with its site and its `PatternSlices`, after the layer's own attention ran. It
            must not read from the device if passes are to stay asynchronous.

    Yields:
        Sites that are left out, with the reason: layers without attention weights, compressed keys, encoders.

    Raises:
        InputError: a layer that is not there, none that has a pattern, an attention implementation other than sdpa and eager.

    Example:
        >>> import torch
        >>> import moescope as ms
        >>> model, largest = ms.load("demo"), {}
        >>> def receive(site, slices):
        ...     for pattern, first in slices:
        ...         largest[site.layer, first] = pattern[0].amax(dim=-1)
        >>> with torch.no_grad(), attention_reduced(model, [0, 3], receive):
        ...     _ = model.module(input_ids=torch.tensor([[5, 6, 7]]))
        >>> {place: tuple(found.shape) for place, found in largest.items()}
        {(0, 0): (6, 3), (3, 0): (6, 3)}
    """
    chosen, left_out = pattern_places(model, layers)

    def give(site: Site, tensors: dict[str, Any]) -> None:
        receive(site, cast("PatternSlices", tensors["slices"]))

    with tap_attention(model.module, model.anatomy, chosen, give):
        yield left_out


def pattern_places(model: LiveModel, layers: Collection[int] | None = None) -> tuple[list[Site], dict[Site, str]]:
    """Sites of patterns that can be read in slices, and those that are left out with the reason.

    Raises:
        InputError: a layer that is not there, or none that has a pattern.
    """
    anatomy = model.anatomy
    wanted = range(anatomy.n_layers) if layers is None else sorted(set(layers))
    if bad := [layer for layer in wanted if not 0 <= layer < anatomy.n_layers]:
        raise InputError(
            f"{model.name} has no layer {bad[0]}", expected=f"layers 0 to {anatomy.n_layers - 1}", fix="name others"
        )
    sites, left_out = attention_places(anatomy)
    refused = {Site(s.layer, s.block, PATTERN_SLICES): r for s, r in attention_refusals(model.module, anatomy).items()}
    left_out |= {site: reason for site, reason in refused.items() if site not in left_out}
    left_out = {site: reason for site, reason in left_out.items() if site.layer in wanted}
    chosen = [site for site in sites if site.layer in wanted and site not in left_out]
    if not chosen:
        raise no_pattern(model.name, left_out)
    return chosen, left_out


def attention_places(anatomy: Anatomy) -> tuple[list[Site], dict[Site, str]]:
    """What the anatomy alone tells: sites of attention that may show a pattern, and mixers that cannot, with the reason."""
    sites, left_out = [], {}
    for s in anatomy.sublayers:
        site = Site(s.layer, s.block, PATTERN_SLICES)
        if s.kind == "ssm":
            left_out[site] = _LINEAR
        elif s.kind == "attention" and s.stack == "encoder":
            left_out[site] = _NOT_CAUSAL
        elif s.kind == "attention":
            sites.append(site)
    return sites, left_out


def query_heads(model: LiveModel) -> tuple[int, ...]:
    """Query heads of every attention that may show a pattern, as the configuration counts them; for plans.

    Example:
        >>> import moescope as ms
        >>> query_heads(ms.load("demo"))
        (6, 6, 6, 6, 6, 6)
    """
    heads = []
    for site in attention_places(model.anatomy)[0]:
        path = next(s.path for s in model.anatomy.sublayers if (s.layer, s.block) == (site.layer, site.block))
        attention: Any = model.module.get_submodule(path)
        config = getattr(attention, "config", None) or getattr(model.module, "config", None)
        heads.append(int(getattr(config, "num_attention_heads", 1)))
    return tuple(heads)


def no_pattern(name: str, left_out: Mapping[Site, str]) -> InputError:
    """The refusal of a model of which no layer shows an attention pattern."""
    reasons = list(dict.fromkeys(left_out.values()))
    return InputError(
        f"{name} shows no attention pattern in any of these layers",
        found="; ".join(reasons[:3]) or "no attention",
        fix="leave attention out, or choose another model",
    )
