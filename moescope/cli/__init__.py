"""The command line: one file a command. Data goes to stdout, news and progress to stderr."""

from __future__ import annotations


def main() -> None:
    """Run the command line and leave with its exit code.

    0 done, 1 a finding over a threshold, 2 usage or bad input, 3 incomplete coverage, 4 the run failed, 130 interrupted.
    """
    from moescope.cli.app import run

    raise SystemExit(run())
