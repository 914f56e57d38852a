"""Whether this program runs in a notebook."""

from __future__ import annotations

import sys


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel, which shows more than text; IPython in a terminal is none.

    Example:
        >>> in_notebook()
        False
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def without_widget_notices() -> None:
    """Load tqdm, which transformers brings, without its notice on stderr that a notebook has no widgets."""
    if not in_notebook():
        return
    import contextlib
    import importlib
    import warnings

    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.filterwarnings("ignore", message="IProgress not found")
        importlib.import_module("tqdm.auto")
