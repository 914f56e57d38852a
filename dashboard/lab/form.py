"""The form that puts an edit together: fields made from the kind's own, written into the line that is added."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from dataclasses import dataclass
from typing import Any, Literal

import dash_mantine_components as dmc

from moescope.core.edit import edits
from moescope.core.edit_values import field_types
from moescope.dashboard.model_host import ModelHost
from moescope.store.run import Run
from moescope.store.store import Store

_LATER = (
    "strength",
    "block",
    "means",
)  # a slider has the first; the second is rare and can be typed; the third comes from JSON
_HINTS = {
    "experts": "for instance 5,9 or 0-7",
    "heads": "for instance 0,3",
    "channels": "for instance 17",
    "latents": "numbers, for instance 12,40",
    "values": "one a channel or latent, or one for all",
    "positions": "all, prompt, generated, 0:1 or token:13",
    "vector": "numbers with commas; long ones from JSON",
}
_MOST_CHOICES = 512

_RUNS_LAYERS = """
    SELECT max(layer) + 1, max(n_experts + n_null)
    FROM layers
    WHERE run_id = ?
"""


@dataclass(frozen=True)
class Extent:
    """How far layers, experts and heads count; None where nothing is known."""

    layers: int | None = None
    experts: int | None = None
    heads: int | None = None


def extent(host: ModelHost, run: Run | None) -> Extent:
    """Of the loaded model, else of the run's."""
    if (model := host.model) is not None:
        experts = max((s.n_choices for s in model.anatomy.moe), default=0)
        heads = getattr(getattr(model.module, "config", None), "num_attention_heads", None)
        return Extent(model.anatomy.n_layers, experts, heads if isinstance(heads, int) else None)
    if run is None:
        return Extent()
    ((layers, experts),) = run.store.fetch(_RUNS_LAYERS, [run.run_id])
    return Extent(layers, experts)


def kinds(*, moe: bool = True) -> list[dict[str, str]]:
    """The kinds of edits for the picker; those of experts are left out for a dense model."""
    from moescope.core.edit_kinds.experts import ExpertEdit

    listed = [kind for kind in edits if moe or not issubclass(kind, ExpertEdit)]
    return [{"value": kind.kind, "label": kind.kind.replace("_", " ")} for kind in listed]


def about(kind: str) -> str:
    """What a kind does, in a sentence or two."""
    return " ".join((inspect.getdoc(edits[kind]) or "").partition("\n\n")[0].split())


def fields(kind: str, limits: Extent, store: Store) -> list[Any]:
    """One control a field, each named `{"lab-field": name}`."""
    types, defaults = field_types(edits[kind]), {f.name: f.default for f in dataclasses.fields(edits[kind])}
    order = sorted((name for name in types if name not in _LATER), key=lambda name: name == "positions")
    return [_control(name, types[name], defaults[name], limits, store) for name in order]


def _control(name: str, hint: Any, default: Any, limits: Extent, store: Store) -> Any:
    shared = {"id": {"lab-field": name}, "label": name.replace("_", " "), "size": "xs"}
    several = {"layer": ("L", limits.layers), "experts": ("E", limits.experts), "heads": ("H", limits.heads)}
    if name in several:
        letter, count = several[name]
        if count and count <= _MOST_CHOICES:
            data = [{"value": str(n), "label": f"{letter}{n}"} for n in range(count)]
            hint_text = "every layer" if name == "layer" else "choose"
            return dmc.MultiSelect(
                data=data, value=[], searchable=True, clearable=True, placeholder=hint_text, **shared
            )
    if typing.get_origin(hint) is Literal:
        return dmc.Select(data=list(typing.get_args(hint)), value=default, allowDeselect=False, **shared)
    if hint is bool:
        return dmc.Select(data=["false", "true"], value=str(default).lower(), allowDeselect=False, **shared)
    if name in ("sae", "run"):
        return dmc.Select(data=_names(store, name), searchable=True, placeholder="choose", **shared)
    shown = "" if default in ((), "", None, dataclasses.MISSING) or isinstance(default, tuple) else str(default)
    return dmc.TextInput(value=shown, placeholder=_HINTS.get(name, ""), **shared)


def _names(store: Store, kind: str) -> list[str]:
    query = (
        "SELECT name FROM saes ORDER BY created_at DESC"
        if kind == "sae"
        else "SELECT name FROM runs ORDER BY started_at"
    )
    return [str(name) for (name,) in store.fetch(query)]


def defaults_of(kind: str) -> dict[str, str]:
    """Field → the value that need not be written."""
    found = {f.name: f.default for f in dataclasses.fields(edits[kind])}
    plain = {n: v for n, v in found.items() if isinstance(v, (str, int, float))}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in plain.items()}
