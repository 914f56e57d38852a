"""Interventions in words: what they do, as the subject of a sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moescope.core.edit import Edit
from moescope.core.intervention import Intervention

_MOST = 6


def in_words(intervention: Intervention) -> str:
    """What an intervention does, in a few words.

    Example:
        >>> from moescope.core.edit_kinds.experts import Ablate
        >>> in_words(Intervention([Ablate(layer=3, experts=5)]))
        'Removing L3E5'
    """
    told = [_of(edit) for edit in intervention.edits]
    first = told[:2] + ([f"{len(told) - 2} more edits"] if len(told) > 2 else [])
    return " and ".join([text if n == 0 else text[:1].lower() + text[1:] for n, text in enumerate(first)]) or "No edit"


def _of(edit: Edit) -> str:
    words = _WORDS.get(edit.kind)
    said = f"The edit {edit.kind}" if words is None else words(edit)
    said += "" if edit.strength == 1 else f" (strength {edit.strength:g})"
    return said + ("" if edit.positions == "all" else f" at {edit.positions}")


def _experts(edit: Any, verb: str) -> str:
    ids = edit.ids
    if isinstance(edit.layer, int) and len(ids) <= _MOST:
        return f"{verb} {_listed([f'L{edit.layer}E{e}' for e in ids])}"
    named = f"expert{'s' * (len(ids) != 1)} {_listed(ids)}" if len(ids) <= _MOST else f"{len(ids)} experts"
    return f"{verb} {named}{_where(edit)}"


def _where(edit: Edit) -> str:
    if edit.layers is None:
        return " of every layer"
    if len(edit.layers) > _MOST:
        return f" of {len(edit.layers)} layers"
    return f" of layer{'s' * (len(edit.layers) != 1)} {_listed(edit.layers)}"


def _listed(things: Sequence[Any]) -> str:
    return ", ".join(map(str, things))


def _ablate(edit: Any) -> str:
    how = {"zero": "", "route_around": " (routed around)", "renormalise": " (others renormalised)"}
    return _experts(edit, "Removing") + how.get(edit.how, f" ({edit.how} in its place)")


def _several(names: Any) -> tuple[int, ...]:
    return (names,) if isinstance(names, int) else tuple(names)


def _heads(edit: Any) -> str:
    heads = _several(edit.heads)
    named = _listed(heads) if len(heads) <= _MOST else str(len(heads))
    return f"{'Zeroing' if edit.how == 'zero' else 'Flattening'} head{'s' * (len(heads) != 1)} {named}{_where(edit)}"


def _channels(edit: Any) -> str:
    channels = _several(edit.channels)
    named = _listed(channels) if len(channels) <= _MOST else str(len(channels))
    return f"Setting channel{'s' * (len(channels) != 1)} {named}{_where(edit)}"


def _skip(edit: Any) -> str:
    part = {"block": "", "attn": " attention", "mlp": " the MLP"}[edit.part]
    return f"Skipping{part}{_where(edit)}" if part else f"Skipping{_where(edit).removeprefix(' of')}"


def _latents(edit: Any) -> str:
    several = len(edit.ids) != 1
    named = f"latent{'s' * several} {_listed(edit.ids)}" if len(edit.ids) <= _MOST else f"{len(edit.ids)} latents"
    verbs = {"add": "Adding to", "set": "Setting", "scale": "Scaling" if any(edit.values) else "Removing"}
    return f"{verbs[edit.how]} {named} of {edit.sae}{_where(edit)}"


_WORDS: dict[str, Callable[[Any], str]] = {
    "ablate": _ablate,
    "force": lambda e: _experts(e, "Forcing"),
    "bias": lambda e: _experts(e, f"A bias of {e.value:+g} for"),
    "scale": lambda e: _experts(e, f"Scaling by {e.factor:g}"),
    "keep": lambda e: _experts(e, "Keeping only"),
    "fake_quant": lambda e: _experts(e, f"Rounding to {e.bits} bits"),
    "set_routing": lambda e: f"Replaying the routing of {e.run}{_where(e)}",
    "mix_routing": lambda e: f"Mixing in {e.share:.0%} of given routing{_where(e)}",
    "rank_routing": lambda e: f"Routing to rank {_listed(_several(e.ranks))}{_where(e)}",
    "top_k": lambda e: f"Top-{e.k} routing{_where(e)}",
    "top_p": lambda e: f"Top-p routing (p = {e.p:g}){_where(e)}",
    "random_routing": lambda e: f"Random routing{_where(e)}",
    "swap_experts": lambda e: f"Swapping experts {e.first} and {e.second}{_where(e)}",
    "add": lambda e: f"Adding a vector to {e.site}{_where(e)}",
    "project_out": lambda e: f"Projecting a direction out of {e.site}{_where(e)}",
    "clamp": lambda e: f"Clamping a direction of {e.site}{_where(e)}",
    "set_channel": _channels,
    "mask_head": _heads,
    "skip": _skip,
    "patch": lambda e: f"Patching {e.site} from {e.run}{_where(e)}",
    "splice": lambda e: f"Putting what {e.sae} reconstructs into {e.site}{_where(e)}",
    "latents": _latents,
    "descend": lambda e: f"Descending in the code of {e.sae} at {e.site}{_where(e)}",
}
