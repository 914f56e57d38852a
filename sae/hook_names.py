"""Names of hooks in SAELens' files, read as sites; and why some of them name no place that is recorded here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moescope.core.errors import InputError
from moescope.core.site_names import read_site
from moescope.core.site_paths import ModelPaths
from moescope.core.sites import Site

# TransformerLens' name after `blocks.L.` → what is seen there, for those that are no site of ours.
_ELSEWHERE = {
    "ln1.hook_normalized": "the stream after attention's norm and before that norm's gain",
    "ln2.hook_normalized": (
        "the stream after the MLP's norm and before that norm's gain: not what the MLP is given, unless the gain is 1"
    ),
    "hook_resid_mid": "the residual stream between attention and the MLP, which is not recorded",
    "hook_mlp_in": "the residual stream between attention and the MLP, before its norm, which is not recorded",
    "hook_attn_in": "a copy of the residual stream for each head",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def site_of_hook(name: str, model: ModelPaths | None = None) -> Site:
    """The site that a hook's name means.

    Args:
        name: as SAELens stores it: TransformerLens' names, or paths of modules.
        model: the anatomy, in which paths are looked up.

    Raises:
        InputError: it means no site, with the reason and what to do.

    Example:
        >>> str(site_of_hook("blocks.8.hook_resid_pre"))
        'blocks.8.hook_resid_pre'
        >>> str(site_of_hook("blocks.3.attn.hook_z"))
        'blocks.3.attn.hook_z'
    """
    match = _BLOCK.fullmatch(name)
    if match and (seen := _ELSEWHERE.get(match[2])):
        near = f"blocks.{match[1]}.mlp.hook_in" if "MLP" in seen else f"blocks.{match[1]}.hook_resid_pre"
        raise InputError(
            f"{name} is no site of moescope",
            found=seen,
            fix=f"if its vectors are those of a site in your model, say which: site='{near}'",
        )
    if name == "hook_embed":
        raise InputError(
            "hook_embed is no site of moescope",
            found="embeddings before positions are added or scaled",
            fix="where your model does neither, say site='blocks.0.hook_resid_pre'",
        )
    return read_site(name, model)


def sites_of_metadata(
    metadata: Mapping[str, Any], model: ModelPaths | None = None, *, site: str | Site | None = None
) -> tuple[Site, Site | None, int | None]:
    """Site, target site and head that the metadata of a SAELens folder name.

    Args:
        metadata: of its configuration.
        model: the anatomy, in which paths are looked up.
        site: where its vectors are read, over what the metadata say.

    Raises:
        InputError: they name none.
    """
    given = metadata.get("hook_name") or metadata.get("hf_hook_name")
    if site is None and not given:
        raise InputError(
            "its configuration does not say where its vectors are read",
            expected="metadata with a hook_name",
            fix="say where: site='blocks.8.hook_resid_pre'",
        )
    chosen = read_site(site, model) if site is not None else site_of_hook(str(given), model)
    head = metadata.get("hook_head_index")
    out = metadata.get("hook_name_out") or metadata.get("hf_hook_name_out")
    target = site_of_hook(str(out), model) if out else None
    return chosen, None if target == chosen else target, None if head is None else int(head)
