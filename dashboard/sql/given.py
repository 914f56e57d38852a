"""Values for the parameters of a query, from the text of an address."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moescope.core.errors import InputError

PREFIX = "p_"
"""Before the name of a query's parameter in the address."""


def values_for(names: Sequence[str], given: Mapping[str, str], *, run_id: str | None) -> dict[str, Any]:
    """The value of every parameter of a query.

    Args:
        names: of its parameters.
        given: what the address or the fields hold, as text: numbers, true, false, null and lists in brackets are read as
            such; any other text is text.
        run_id: for `run`, where nothing else is given.

    Raises:
        InputError: a parameter has no value.

    Example:
        >>> values_for(["layer", "label"], {"layer": "3", "label": "code"}, run_id=None)
        {'layer': 3, 'label': 'code'}
    """
    values: dict[str, Any] = {}
    for name in names:
        text = given.get(name, "")
        if text == "" and name == "run" and run_id is not None:
            values[name] = run_id
        elif text == "":
            raise InputError(
                f"the query needs a value for ${name}",
                found="a store without runs" if name == "run" else "an empty field",
                fix=f"fill the field {name} below the query",
            )
        else:
            values[name] = read(text)
    return values


def read(text: str) -> Any:
    """A number, truth, null, list or text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, dict) else value
