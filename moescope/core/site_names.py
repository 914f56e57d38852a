"""Other spellings of sites: TransformerLens, its bridge, transformers and nnsight, each read as one `Site`.

Names that start at `blocks.` say everything themselves. Paths of modules (`model.layers.3.mlp.gate`) mean something only
in one model, so they are looked up in its anatomy.
"""

from __future__ import annotations

import difflib
import re

from moescope.core.errors import InputError
from moescope.core.site_paths import ModelPaths, paths, plain_path, site_of_path, sublayer_kind
from moescope.core.sites import (
    ATTN_OUT,
    DENSE_POST,
    EXPERT_INDICES,
    EXPERT_OUT,
    EXPERT_POST,
    EXPERT_WEIGHTS,
    HEAD_K,
    HEAD_Q,
    HEAD_V,
    HEAD_Z,
    MLP_IN,
    MLP_OUT,
    PATTERN,
    RESID_POST,
    RESID_PRE,
    ROUTER_LOGITS,
    SHARED_OUT,
    Site,
)

_HEADS = (PATTERN, HEAD_Z, HEAD_Q, HEAD_K, HEAD_V)
_ROUTED = (ROUTER_LOGITS, EXPERT_INDICES, EXPERT_WEIGHTS, EXPERT_OUT, EXPERT_POST, SHARED_OUT)
_OWN = {
    "": (RESID_PRE, RESID_POST, ATTN_OUT, MLP_OUT),
    "mlp": (*_ROUTED, DENSE_POST, MLP_IN),
    "attn": (*_ROUTED, *_HEADS),
}

# Inside a block: sublayer kind, name there → tensor. "" is the block itself.
_IN_BLOCK = {
    ("", "hook_in"): RESID_PRE,
    ("", "hook_out"): RESID_POST,
    ("mlp", "hook_out"): MLP_OUT,
    ("mlp", "hook_mlp_out"): MLP_OUT,
    ("attn", "hook_out"): ATTN_OUT,
    ("attn", "hook_attn_out"): ATTN_OUT,
    ("mlp", "gate.hook_out"): ROUTER_LOGITS,
    ("mlp", "router.hook_out"): ROUTER_LOGITS,
    ("mlp", "shared_experts.hook_out"): SHARED_OUT,
    ("mlp", "out.hook_in"): DENSE_POST,
    ("attn", "o.hook_in"): HEAD_Z,
    ("attn", "q.hook_out"): HEAD_Q,
    ("attn", "k.hook_out"): HEAD_K,
    ("attn", "v.hook_out"): HEAD_V,
} | {(kind, tensor): tensor for kind, tensors in _OWN.items() for tensor in tensors}

# Names that leave the block to a number: resid_post3, resid_post.3, ("resid_post", 3).
_SHORT = {
    "resid_pre": ("", RESID_PRE),
    "resid_post": ("", RESID_POST),
    "attn_out": ("", ATTN_OUT),
    "mlp_out": ("", MLP_OUT),
    "mlp_output": ("", MLP_OUT),
    "router_logits": ("mlp", ROUTER_LOGITS),
    "expert_weights": ("mlp", EXPERT_WEIGHTS),
    "expert_indices": ("mlp", EXPERT_INDICES),
    "expert_idx": ("mlp", EXPERT_INDICES),
    "expert_output": ("mlp", EXPERT_OUT),
    "expert_activation": ("mlp", EXPERT_POST),
    "shared_expert_output": ("mlp", SHARED_OUT),
    "post": ("mlp", DENSE_POST),
    "mlp_post": ("mlp", DENSE_POST),
    "pattern": ("attn", PATTERN),
    "attn": ("attn", PATTERN),
    "attn_probs": ("attn", PATTERN),
    "z": ("attn", HEAD_Z),
    "q": ("attn", HEAD_Q),
    "query": ("attn", HEAD_Q),
    "k": ("attn", HEAD_K),
    "key": ("attn", HEAD_K),
    "v": ("attn", HEAD_V),
    "value": ("attn", HEAD_V),
}

_BLOCK_NAME = re.compile(r"blocks\.(?P<layer>\d+)\.(?P<rest>.+)")
_SUBLAYER = re.compile(r"(?P<block>(?P<kind>mlp|attn)(?:\.\d+)?)\.(?P<name>.+)")
_NUMBERED = re.compile(r"(?P<name>[a-z_]+?)[._]?(?P<layer>\d+)(?:\.?(?:a|m|attn|mlp))?")


def read_site(name: str | Site | tuple[str, int] | tuple[str, int, str], model: ModelPaths | None = None) -> Site:
    """The site that a name of any accepted spelling means.

    Accepted, with 3 for the layer:
        this package's own names (`blocks.3.mlp.hook_router_logits`), which are TransformerLens' where it has one;
        names of a TransformerLens bridge: `blocks.3.hook_out`, `blocks.3.mlp.gate.hook_out`, `blocks.3.attn.q.hook_out`;
        short names: `resid_post3`, `resid_post.3`, `("resid_post", 3)`, with `-1` for the last layer given the anatomy;
        paths of modules, `model.layers.3.mlp.gate` or `model.layers[3].mlp.gate.output[0]`, given the model's anatomy.
    A module's path alone means its output; for the experts' module, each slot's output.

    One name means different tensors in two libraries: in a `HookedTransformer`, `hook_expert_weights` sees the softmax
    over all experts; here, and in the site read, the k weights used.

    Args:
        name: the spelling; a `Site` is given back as it is.
        model: the anatomy, in which paths of modules are looked up.

    Raises:
        InputError: no site, with the nearest spelling that is one.

    Example:
        >>> str(read_site("blocks.3.mlp.gate.hook_out"))
        'blocks.3.mlp.hook_router_logits'
        >>> str(read_site(("resid_post", 0)))
        'blocks.0.hook_resid_post'
    """
    if isinstance(name, Site):
        return name
    if isinstance(name, tuple):
        layer = name[1] + len(model.block_paths) if model is not None and name[1] < 0 else name[1]
        name = f"{name[0]}.{layer}"
    text = name.strip()
    site = _of_block(text, model) or _of_short(text) or (site_of_path(text, model) if model is not None else None)
    if site is None:
        raise _unknown(text, model)
    return site


def spellings(site: Site, model: ModelPaths | None = None) -> list[str]:
    """Every accepted spelling of a site: its own first, then TransformerLens', then paths in `model`.

    Example:
        >>> spellings(Site(0, "", "hook_resid_post"))
        ['blocks.0.hook_resid_post', 'blocks.0.hook_out', 'resid_post0', 'resid_post.0']
    """
    kind = site.block.partition(".")[0]
    found = [str(site)]
    for (in_kind, name), tensor in _IN_BLOCK.items():
        block = site.block or in_kind
        if tensor == site.tensor and in_kind == (kind or in_kind):
            middle = f"{block}." if in_kind else ""
            found.append(f"blocks.{site.layer}.{middle}{name}")
    if "." not in site.block:
        for name, meant in _SHORT.items():
            found += [f"{name}{site.layer}", f"{name}.{site.layer}"] if meant == (site.block, site.tensor) else []
    if model is not None:
        found += [path for path, meant in paths(model).items() if meant == site]
    return list(dict.fromkeys(found))


def _of_block(text: str, model: ModelPaths | None) -> Site | None:
    match = _BLOCK_NAME.fullmatch(text)
    if match is None:
        return None
    layer, rest = int(match["layer"]), match["rest"]
    inner = _SUBLAYER.fullmatch(rest)
    block, kind, name = (inner["block"], inner["kind"], inner["name"]) if inner else ("", "", rest)
    tensor = _IN_BLOCK.get((kind, name))
    if tensor is None:
        return None
    if name == "gate.hook_out" and model is not None and sublayer_kind(model, layer, block) == "dense":
        raise InputError(
            f"{text} is no router: layer {layer} of this model has a dense MLP",
            found="the gate of a gated MLP, whose output is not recorded",
            fix=f"use {Site(layer, block, DENSE_POST)} for its neurons",
        )
    # The first sublayer of a kind writes to the stream by the block's own name.
    return Site(layer, "" if tensor in _OWN[""] and "." not in block else block, tensor)


def _of_short(text: str) -> Site | None:
    match = _NUMBERED.fullmatch(text)
    if match is None or match["name"] not in _SHORT:
        return None
    return Site(int(match["layer"]), *_SHORT[match["name"]])


def _unknown(text: str, model: ModelPaths | None) -> InputError:
    problem, path = f"{text!r} is not a site", plain_path(text)
    expected = "for instance blocks.3.mlp.hook_router_logits, resid_post3, or a path of a module"
    if re.fullmatch(r"blocks\.\d+\.mlp\.experts\.\d+\..+", text):
        fix = "use blocks.{L}.mlp.experts.hook_out and keep the slots of that expert"
        return InputError(problem, expected="a site of all experts of a layer", fix=fix)
    by_path = paths(model) if model is not None else {}
    if re.search(r"\.inputs?(\[\d+\])*$", path) and (site := by_path.get(re.sub(r"\.inputs?(\[\d+\])*$", "", path))):
        nearest = f"use {site} for its output, or {Site(site.layer, '', RESID_PRE)}"
        return InputError(problem, found="the input of a module, which is not recorded", fix=nearest)
    if model is None and "." in text and not text.startswith("blocks."):
        return InputError(problem, expected=expected, fix="a path of a module needs the model's anatomy")
    layer = next(iter(re.findall(r"\d+", text)), "3")
    known = [f"blocks.{layer}.{kind}{'.' if kind else ''}{name}" for kind, name in _IN_BLOCK]
    known += [*(f"{name}{layer}" for name in _SHORT), *by_path]
    nearest = "".join(difflib.get_close_matches(path, known, n=1, cutoff=0.5))
    return InputError(problem, expected=expected, fix=f"did you mean {nearest}?" if nearest else None)
