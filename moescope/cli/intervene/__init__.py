"""`moescope intervene`: change a model while it runs, and measure what the change does."""

from __future__ import annotations

import typer

group = typer.Typer(
    no_args_is_help=True, help="Change a model while it runs, and measure what the change does against controls."
)
