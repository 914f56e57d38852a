"""`moescope sae`: sparse autoencoders over recorded vectors."""

from __future__ import annotations

import typer

from moescope.cli.command import command
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
command(group, study)
command(group, record)
command(group, train)
command(group, list_, "list")
command(group, import_, "import")
command(group, export, "export")
command(group, delete)
command(group, judge)
command(group, read)
command(group, features)
command(group, probe)
command(group, describe)
command(group, experts)
command(group, steer)
command(group, students)
command(group, circuit)
