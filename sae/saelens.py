"""SAELens, which trains and opens autoencoders: whether it is there."""

from __future__ import annotations

import importlib.util

from moescope.core.errors import InputError


def need_saelens() -> None:
    """Raise `InputError` naming the extra where SAELens is not installed.

    Example:
        >>> need_saelens()
    """
    if importlib.util.find_spec("sae_lens") is None:
        raise InputError(
            "autoencoders need SAELens, which is not installed",
            expected="the extra sae",
            fix="pip install 'moescope[sae]'",
        )
