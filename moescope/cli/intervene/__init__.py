"""`moescope intervene`: change a model while it runs, and measure what the change does."""

from __future__ import annotations

import typer

from moescope.cli.command import command
from moescope.cli.intervene.contrast import contrast
from moescope.cli.intervene.edits import edits
from moescope.cli.intervene.effect import effect
from moescope.cli.intervene.sweep import sweep

group = typer.Typer(
    no_args_is_help=True,
    help="Change a model while it runs, and measure what the change does against controls.\n\n"
    'Example: moescope intervene effect demo --edit "ablate layer=3 experts=5" --store runs.duckdb',
)
command(group, effect)
command(group, sweep)
command(group, contrast)
command(group, edits)
