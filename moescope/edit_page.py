"""`docs/edits.md`: every kind of edit with its fields, written from the registry."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moescope.core.edit import Edit, edits

_HEAD = """# Edits

An edit changes one thing in a model while it runs. In Python each kind is a class of `ms.edits`; on the command line it is
`--edit "kind field=value …"`; in a file it is JSON that `Intervention.load` reads. Several edits make an `Intervention`, and act
in their order.

```python
import moescope as ms

model = ms.load("demo")
cut = ms.Intervention([ms.edits.Ablate(layer=3, experts=[5, 9], how="route_around")])
with model.edited(cut):
    ...  # anything run in here is edited; outside, nothing remains
```

Every kind also has

- `layer` = none: a layer, several (`3,4`), or none for every layer that has what the edit changes
- `positions` = `all`: `all`, `prompt`, `generated`, a span such as `0:1` (the end excluded), or `token:13` (a token id)
- `strength` = `1.0`: 0 changes nothing, not even rounding; 1 is the edit as it stands. Most edits of decisions (`force`, `keep`,
  `top_k`, `rank_routing`, `top_p`, `random_routing`, `swap_experts`, `set_routing`, `ablate how=route_around`) are done or not
  done: 0 or 1. `clamp`, `fake_quant`, `mask_head`, `project_out`, `set_channel`, `skip` and `splice` take 0 to 1, the others any number.

`moescope intervene edits --format markdown` prints this page.
"""


def edits_page() -> str:
    """The page as Markdown.

    Example:
        >>> edits_page().splitlines()[0]
        '# Edits'
    """
    return "".join([_HEAD, *(_entry(kind) for kind in sorted(edits, key=lambda kind: kind.kind))])


def _entry(kind: type[Edit]) -> str:
    shared = {field.name for field in dataclasses.fields(Edit)}
    own = [field for field in dataclasses.fields(kind) if field.name not in shared]
    said, hints = _told(kind), get_type_hints(kind)
    what = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())
    parts = [f"\n## `{kind.kind}`\n\n{what} In Python `ms.edits.{kind.__name__}`.\n", "\n" if own else ""]
    for field in own:
        words, text = _values(hints[field.name]), said.get(field.name, "")
        listed = f"one of {', '.join(words)}; " if words and not all(word in text for word in words) else ""
        parts.append(f"- `{field.name}` = {_default(field)}: {listed}{text}\n")
    return "".join(parts)


def _told(kind: type[Edit]) -> dict[str, str]:
    """What the docstrings of a kind and its bases say of each field."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        _, _, attributes = inspect.cleandoc(owner.__doc__ or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?= {4}\w)", attributes.partition("\n\n")[0]):
            names, colon, text = entry.strip().partition(": ")
            if colon:
                found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default in ((), "", dataclasses.MISSING):
        return "required"
    if field.default is None:
        return "none"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _values(hint: Any) -> list[str]:
    """The words a field may be, where it is one of a few."""
    return [f"`{word}`" for word in get_args(hint)] if get_origin(hint) is Literal else []
