"""`moescope sae`: sparse autoencoders over recorded vectors."""

from __future__ import annotations

import typer

from moescope.cli.sae.circuit import circuit
from moescope.cli.sae.delete import delete
from moescope.cli.sae.describe import describe
from moescope.cli.sae.experts import experts
from moescope.cli.sae.export_ import export
from moescope.cli.sae.features import features
from moescope.cli.sae.import_ import import_
from moescope.cli.sae.judge import judge
from moescope.cli.sae.list_ import list_
from moescope.cli.sae.probe import probe
from moescope.cli.sae.read import read
from moescope.cli.sae.record import record
from moescope.cli.sae.steer import steer
from moescope.cli.sae.students import students
from moescope.cli.sae.study import study
from moescope.cli.sae.train import train

group = typer.Typer(
    no_args_is_help=True,
    help="Sparse autoencoders over recorded vectors: train, judge, read, join to experts, steer.\n\n"
    "Example: moescope sae study demo --site blocks.3.hook_mlp_out --store sae.duckdb --report sae.html",
)
group.command()(study)
group.command()(record)
group.command()(train)
group.command("list")(list_)
group.command("import")(import_)
group.command("export")(export)
group.command()(delete)
group.command()(judge)
group.command()(read)
group.command()(features)
group.command()(probe)
group.command()(describe)
group.command()(experts)
group.command()(steer)
group.command()(students)
group.command()(circuit)
