"""JSON and YAML that are well formed and say what they should not: wrong types, huge numbers, deep nests, lone surrogates."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any


def _deep(depth: int, kind: type) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


# Made anew for each use, since some are large.
HOSTILE: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: True, lambda: False, lambda: 0, lambda: -1, lambda: 0.5, lambda: 1e308, lambda: float("nan"),
    lambda: float("inf"), lambda: float("-inf"), lambda: 2**31, lambda: 2**63, lambda: -(2**63), lambda: 10**30,
    lambda: 10**400, lambda: 65_536, lambda: "", lambda: " ", lambda: "x", lambda: "\ud800", lambda: "\udfff\ud800",
    lambda: "\x00", lambda: "\ufeff", lambda: "\u202e", lambda: "'; DROP TABLE runs; --", lambda: "<script>", lambda: "9" * 5000,
    lambda: "[red]", lambda: "../../etc/passwd", lambda: "x" * 100_000, list, dict, lambda: [[]], lambda: [None],
    lambda: {"a": {}}, lambda: [0, "x"], lambda: [[1, 2], [3]], lambda: [1.5], lambda: [True], lambda: [10**30], lambda: [-1],
    lambda: _deep(200, list), lambda: _deep(200, dict), lambda: _deep(900, list), lambda: list(range(3000)),
    lambda: {"float64": "AAAA", "shape": [10**12]}, lambda: {"float64": "////////", "shape": [1]}, lambda: {"\ud800": 1},
    lambda: {"float64": "AAAAAAAA8D8=", "shape": [-1, -1]}, lambda: {"float64": "AAAAAAAA+H8=", "shape": [1]}, lambda: "none",
)  # fmt: skip


def hostile(tree: Any, dice: random.Random) -> Any:
    """A copy of a tree with one to four places changed."""
    tree = copy.deepcopy(tree)
    for _ in range(dice.choice((1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            return dice.choice(HOSTILE)()
        _change(*dice.choice(places), dice)
    return dice.choice(HOSTILE)() if dice.random() < 0.02 else tree


def as_json(tree: Any, dice: random.Random) -> bytes:
    """A tree as JSON text, in one of several spellings; lone surrogates are escapes or bytes that are no UTF-8."""
    try:
        text = json.dumps(tree, ensure_ascii=dice.random() < 0.7)
    except RecursionError:
        text = "[" * 5000
    if dice.random() < 0.05 and text.startswith("{"):
        text = text[0] + '"text": 1, "text": "twice", ' + text[1:]
    if dice.random() < 0.03:
        return text.encode(dice.choice(("utf-16", "utf-32", "utf-16-le")), "surrogatepass")
    return (b"\xef\xbb\xbf" if dice.random() < 0.05 else b"") + text.encode("utf-8", "surrogatepass")


def _places(tree: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every container of a tree with each of its keys."""
    if depth > 12 or not isinstance(tree, (list, dict)):
        return
    for key in list(range(len(tree)) if isinstance(tree, list) else tree)[:40]:
        yield tree, key
        yield from _places(tree[key], depth + 1)


def _change(holder: Any, key: Any, dice: random.Random) -> None:
    kind = dice.random()
    if kind < 0.6:
        holder[key] = dice.choice(HOSTILE)()
    elif kind < 0.7:
        del holder[key]
    elif kind < 0.8:
        holder[key] = [holder[key]]
    elif kind < 0.9 and isinstance(holder, dict):
        holder[dice.choice(("text", "token_ids", "label", "layer", "kind", "x", "\ud800", "", "a.b"))] = holder.pop(key)
    elif isinstance(holder, list):
        holder.insert(dice.randrange(len(holder) + 1), holder[key])
    else:
        holder[str(key) * 2] = holder[key]
