"""Paths of modules as names of sites: `model.layers.3.mlp.gate`, in the spelling of transformers or of nnsight.

A path means something only in one model, so it is looked up in that model's anatomy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Protocol

from moescope.core.sites import (
    ATTN_OUT,
    DENSE_POST,
    EXPERT_INDICES,
    EXPERT_OUT,
    EXPERT_WEIGHTS,
    HEAD_K,
    HEAD_Q,
    HEAD_V,
    HEAD_Z,
    MLP_IN,
    MLP_OUT,
    RESID_POST,
    RESID_PRE,
    ROUTER_LOGITS,
    SHARED_OUT,
    Site,
)

# Modules inside a sublayer, by the names that most families share, and the side of them that is a site.
_INNER = {
    ("attention", "q_proj", "output"): HEAD_Q,
    ("attention", "k_proj", "output"): HEAD_K,
    ("attention", "v_proj", "output"): HEAD_V,
    ("attention", "o_proj", "input"): HEAD_Z,
    ("dense", "down_proj", "input"): DENSE_POST,
    ("moe", "shared_expert", "output"): SHARED_OUT,
    ("moe", "shared_experts", "output"): SHARED_OUT,
    ("moe", "shared_mlp", "output"): SHARED_OUT,
}

_SIDE = re.compile(r"(?P<path>.*?)(?:\.(?P<side>inputs?|outputs?))?(?P<index>(?:\[\d+\])*)")


class SublayerPaths(Protocol):
    """What is asked of one sublayer: where it stands in the model and what it is."""

    @property
    def layer(self) -> int:
        """0-based index of the block."""

    @property
    def block(self) -> str:
        """Name in sites: `mlp`, `attn`, `mlp.1`, …."""

    @property
    def kind(self) -> str:
        """`moe`, `dense`, `attention` or `ssm`."""

    @property
    def path(self) -> str:
        """Path of its module."""

    @property
    def n_shared(self) -> int | None:
        """Shared experts."""

    @property
    def logits_path(self) -> str | None:
        """Path of the module whose output holds the router's logits."""

    @property
    def experts_path(self) -> str | None:
        """Path of the module that computes the experts."""

    @property
    def router_logits_index(self) -> int:
        """Which element of the router's output is the logits."""


class ModelPaths(Protocol):
    """What is asked of a model: the paths of its blocks and sublayers. `moescope.probes.anatomy.Anatomy` has them."""

    @property
    def block_paths(self) -> tuple[str, ...]:
        """Paths of the transformer blocks, in order."""

    @property
    def sublayers(self) -> Sequence[SublayerPaths]:
        """Every sublayer."""


def site_of_path(text: str, model: ModelPaths) -> Site | None:
    """The site that a path means in a model; None where it means none.

    Brackets and dots are alike (`layers[3]`, `layers.3`), and nnsight's root, called `model` too, may stand before it.
    """
    known = paths(model)
    path = plain_path(text)
    found = (known.get(spelling) for spelling in (path, path.removeprefix("model."), f"model.{path}"))
    return next((site for site in found if site is not None), None)


def sublayer_kind(model: ModelPaths, layer: int, block: str) -> str | None:
    """What stands in a place of a model: `moe`, `dense`, `attention`, `ssm`, or None."""
    return next((s.kind for s in model.sublayers if (s.layer, s.block) == (layer, block)), None)


def plain_path(text: str) -> str:
    """`layers[3].mlp.output[0]` as `layers.3.mlp.output[0]`: the form in which paths are kept."""
    match = _SIDE.fullmatch(re.sub(r"\[(\d+)\](?=\.)", r".\1", text))
    if match is None:  # cannot be: the pattern takes any text of one line
        return text
    path, side, index = match["path"], match["side"], match["index"]
    if side is None and index:
        path, index = path + index.replace("[", ".").replace("]", ""), ""
    return f"{path}.{side}{index}" if side else path


def paths(model: ModelPaths) -> dict[str, Site]:
    """Every path that names a site in a model, with the side that is meant, and its site."""
    known: dict[str, Site] = {}
    for layer, path in enumerate(model.block_paths):
        block = _without_wrappers(path)
        known[f"{block}.input"] = Site(layer, "", RESID_PRE)
        known |= dict(_output(block, Site(layer, "", RESID_POST)))
    for sublayer in model.sublayers:
        for path, site in _sublayer_paths(sublayer):
            known.setdefault(path, site)  # experts right in the block do not take the block's own path
    return known


def _sublayer_paths(sublayer: SublayerPaths) -> Iterator[tuple[str, Site]]:
    layer, block = sublayer.layer, sublayer.block
    path = _without_wrappers(sublayer.path)
    if sublayer.kind == "attention":
        yield from _output(path, Site(layer, "" if block == "attn" else block, ATTN_OUT))
    elif sublayer.kind in ("moe", "dense"):
        yield from _output(path, Site(layer, "" if block == "mlp" else block, MLP_OUT))
        yield f"{path}.input", Site(layer, block, MLP_IN)
    for (kind, module, side), tensor in _INNER.items():
        if kind == sublayer.kind and (tensor != SHARED_OUT or sublayer.n_shared):
            site = Site(layer, block, tensor)
            yield f"{path}.{module}.{side}", site
            if side == "output":
                yield f"{path}.{module}", site
    if sublayer.logits_path is not None:
        router, index = _without_wrappers(sublayer.logits_path), sublayer.router_logits_index
        logits = Site(layer, block, ROUTER_LOGITS)
        yield router, logits
        yield f"{router}.output", logits
        yield f"{router}.output[{index}]", logits
        if index == 0:  # (logits, weights, ids): families whose order differs put the logits elsewhere too
            yield f"{router}.output[1]", Site(layer, block, EXPERT_WEIGHTS)
            yield f"{router}.output[2]", Site(layer, block, EXPERT_INDICES)
    if sublayer.experts_path is not None:
        experts = _without_wrappers(sublayer.experts_path)
        yield experts, Site(layer, block, EXPERT_OUT)
        # nnsight's `inputs` are (positional, named); experts take (hidden states, ids, weights) by position.
        yield f"{experts}.inputs[0][1]", Site(layer, block, EXPERT_INDICES)
        yield f"{experts}.inputs[0][2]", Site(layer, block, EXPERT_WEIGHTS)


def _output(path: str, site: Site) -> Iterator[tuple[str, Site]]:
    for side in ("", ".output", ".output[0]"):
        yield path + side, site


def _without_wrappers(path: str) -> str:
    """A path as it was before a TransformerLens bridge wrapped the modules on it."""
    return path.replace("._original_component", "")
