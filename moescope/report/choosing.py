"""Runs by name, from one store or several."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from moescope.core.errors import InputError
from moescope.store.run import Run
from moescope.store.store import Store


def chosen_runs(path: Path, names: Sequence[str], stack: ExitStack) -> list[Run]:
    """The runs named: of the store at `path`, or of another as `other.duckdb:name`; without names the only one there is.

    Args:
        path: the store.
        names: of runs; what is before a colon is another store, where it is a file, unless the first store has a run of the whole name.
        stack: closes the stores.

    Raises:
        InputError: no such store or run, a run named twice, or no name where the store holds several runs.
    """
    opened = {path.resolve(): stack.enter_context(Store(path, read_only=True))}
    first = opened[path.resolve()]
    known = {run.name: run for run in first.runs()}
    if not names:
        if len(known) == 1:
            return list(known.values())
        told = ", ".join(known) or "no runs yet"
        raise InputError("which runs?", expected="the name of one or more", found=f"{path} holds: {told}")
    runs = [known[name] if name in known else _elsewhere(name, first, opened, stack) for name in names]
    twice = [run.name for number, run in enumerate(runs) if run.run_id in {one.run_id for one in runs[:number]}]
    if twice:
        raise InputError(f"run {twice[0]!r} is named twice", fix="name each run once")
    return runs


def _elsewhere(name: str, first: Store, opened: dict[Path, Store], stack: ExitStack) -> Run:
    # Both a path and a run's name may hold colons: the longest part that is a file is the store.
    parts = name.split(":")
    splits = ((":".join(parts[:at]), ":".join(parts[at:])) for at in range(len(parts) - 1, 0, -1))
    other, run = next(((path, rest) for path, rest in splits if path and Path(path).is_file()), ("", ""))
    if not other:
        return first.run(name)  # by its id, or told what there is
    place = Path(other).resolve()
    if place not in opened:
        opened[place] = stack.enter_context(Store(Path(other), read_only=True))
    return opened[place].run(run)
