"""Gives hostile inputs to their readers, one after the other, and tells what became of each: a program of its own.

A reader that kills the process, or never comes back, takes only this one with it: the test that started it sees which case it
was. Each line on stdout is one case, as JSON: its number, and `accepted`, `refused` or what went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostile_cases import Case, case

from moescope.core.errors import MoescopeError

SECONDS = (
    10.0  # a case may take so long on a processor; a reader that sleeps is found by the test, which waits for a word
)
BYTES = 3 << 30  # a case may take so much address space beside what the process has
EVERY_CLI = 17  # each so many-th case goes through the command line too
EVERY_RECORD = 200  # … and each so many-th, a corpus, through a whole recording of it


class Slow(BaseException):
    """A case took too long. Not an `Exception`: no reader may swallow it."""


class Wrong(AssertionError):
    """A reader did what no reader may do."""


def main() -> None:
    """Cases `--first` up to `--stop`."""
    asked = argparse.ArgumentParser()
    for name in ("seed", "first", "stop"):
        asked.add_argument(f"--{name}", type=int, required=True)
    asked.add_argument("--folder", type=Path, required=True)
    given = asked.parse_args()
    child = Child(given.folder.resolve(), given.seed)
    for number in range(given.first, given.stop):
        print(json.dumps({"case": number, "came": child.came_of(number)}), flush=True)  # noqa: T201  what the parent reads
    child.store.close()


class Child:
    """A store to import into, a folder for inputs, a folder for temporary files."""

    def __init__(self, folder: Path, seed: int) -> None:
        from moescope.store.store import Store

        self.folder, self.seed = folder, seed
        for name in ("inputs", "temporary", "stores", "here"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = str(folder / "temporary")
        os.environ["TMPDIR"] = tempfile.tempdir
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(
            folder / "stores" / "torch"
        )  # a cache of torch's own, made when it loads
        os.chdir(folder / "here")
        self.path = folder / "stores" / f"{os.getpid()}.duckdb"
        self.store = Store(self.path)
        self.made = 0
        self.beside = _listing(folder)
        signal.signal(signal.SIGPROF, _too_slow)
        self._read("trace", case(4, _fresh(folder / "inputs"), seed=seed))  # libraries load before memory is limited
        self._read("corpus", case(0, _fresh(folder / "inputs"), seed=seed))
        _keep_demo()
        gc.freeze()  # what is loaded stays: it need not be looked through each time
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, resource.RLIM_INFINITY))

    def came_of(self, number: int) -> str:
        """Read one case in every way; `accepted`, `refused`, or what went wrong."""
        inputs = _fresh(self.folder / "inputs")
        one = case(number, inputs, seed=self.seed)
        before = _listing(inputs)
        rows = self._rows() if one.reader == "trace" else None
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            came = self._read(one.reader, one)
            if number % EVERY_CLI == 0:
                signal.setitimer(signal.ITIMER_PROF, 6 * SECONDS)
                self._by_command(one)
            if number % EVERY_RECORD == 0 and one.reader == "corpus":
                self._recorded(one)
        except Slow:
            return f"took over {SECONDS:g} s: {one}"
        except BaseException as error:  # noqa: BLE001  whatever it is, it is what this program looks for
            where = "".join(traceback.format_tb(error.__traceback__)[-3:])
            return f"{type(error).__name__}: {str(error)[:300]}\n{where}\n{str(one)[:400]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if number % 50 == 0:
            gc.collect()
        if _listing(inputs) != before:
            return f"changed or left files beside its input: {one}"
        if came == "refused" and one.reader == "trace" and self._rows() != rows:
            return f"refused, and left rows behind: {one}"
        if _listing(self.folder) != self.beside:
            return f"left files: {sorted(_listing(self.folder) ^ self.beside)}: {one}"
        return came

    def _read(self, reader: str, one: Case) -> str:
        try:
            getattr(self, f"_read_{reader}")(one)
        except MoescopeError as refused:
            told = str(refused)
            if len(told) > 5000:
                raise Wrong(f"a message of {len(told)} characters") from refused
            return "refused"
        return "accepted"

    def _read_corpus(self, one: Case) -> None:
        from moescope.core.json_data import to_json
        from moescope.core.text import whole_characters
        from moescope.probes.corpus import BadRecord, Corpus

        for document in Corpus.load(one.path, skip_bad_lines=True).documents():
            if not isinstance(document, BadRecord):
                for text in (
                    document.text,
                    document.label or "",
                    document.source or "",
                    whole_characters(to_json(document.metadata)),
                ):
                    text.encode()
        Corpus.load(one.path).facts()

    def _read_trace(self, one: Case) -> None:
        from moescope.store.importing.import_trace import import_trace

        self.made += 1
        run = import_trace(self.store, one.path, name=f"run{self.made}", **one.options)
        if run.status not in ("complete", "incomplete"):
            raise Wrong(f"a run that is {run.status}")
        run.coverage.table.to_pylist()
        self.store.delete_run(run.name)

    def _read_edit(self, one: Case) -> None:
        from moescope.core.edit_text import read_edit, write_edit
        from moescope.core.intervention import Intervention

        edit = read_edit(one.text)
        repr(edit)
        with contextlib.suppress(MoescopeError):  # vectors for several experts stand in no line
            if read_edit(write_edit(edit)) != edit:
                raise Wrong(f"{edit} is not what its own words say")
        if Intervention.from_json(Intervention(edit).to_json()).edits != (edit,):
            raise Wrong(f"{edit} is not what its own JSON says")

    def _read_intervention(self, one: Case) -> None:
        from moescope.core.intervention import Intervention

        read = Intervention.load(one.path or "")
        read.to_json().encode()
        if Intervention.from_json(read.to_json()) != read:
            raise Wrong(f"{read} is not what its own JSON says")

    def _read_thresholds(self, one: Case) -> None:
        from moescope.report.thresholds.rules import read_rules

        read_rules(one.path or "")

    def _read_config(self, one: Case) -> None:
        from moescope.cli.app import app
        from moescope.cli.config import read_config
        from moescope.cli.parser import commands

        assert one.path is not None
        read_config(one.path, "profile", {found.name: found.flags for found in commands(app)})

    def _by_command(self, one: Case) -> None:
        """The same through the command line: 0, 2 or 3, never a traceback, and no store where nothing came into one."""
        store = self.folder / "stores" / "command.duckdb"
        asked: list[str]
        if one.reader == "trace":
            plain = {name: value for name, value in one.options.items() if name not in ("layers", "probabilities")}
            flags = [f"--{name.replace('_', '-')}={value}" for name, value in plain.items()]
            asked = ["import", str(one.path), "--store", str(store), "--name", "run", *flags]
        elif one.reader == "corpus":
            asked = ["plan", "demo", "--data", str(one.path), "--store", str(store)]
        elif one.reader == "edit":
            asked = ["intervene", "effect", str(self.folder / "no-model"), "--store", str(store), "--edit", one.text]
        elif one.reader == "config":
            asked = ["runs", "list", str(store), "--config", str(one.path)]
        elif one.reader == "thresholds":
            asked = ["report", str(self.path) + ".no", "--thresholds", str(one.path)]
        else:
            asked = [
                "intervene",
                "effect",
                str(self.folder / "no-model"),
                "--store",
                str(store),
                "--intervention",
                str(one.path),
            ]
        self._command(asked, store)

    def _recorded(self, one: Case) -> None:
        store = self.folder / "stores" / "recorded.duckdb"
        asked = ["profile", "demo", "--data", str(one.path), "--store", str(store), "--probe", "tokens", "--max-length", "16",
                 "--skip-bad-lines"]  # fmt: skip
        signal.setitimer(signal.ITIMER_PROF, 6 * SECONDS)
        self._command(asked, store)

    def _command(self, asked: list[str], store: Path) -> None:
        try:
            code, said = _command(asked)
            if code not in (0, 2, 3) or "Traceback" in said or "internal error" in said:
                raise Wrong(f"`moescope {asked[0]}` left with {code}: {said[-600:]}")
            if code == 2 and store.exists():
                raise Wrong(f"`moescope {asked[0]}` refused its input and left a store")
        finally:
            _remove(store)

    def _rows(self) -> list[tuple[Any, ...]]:
        from moescope.store.schema import TABLES

        counts = ", ".join(f'(SELECT count(*) FROM "{table.name}")' for table in TABLES)
        return self.store.fetch(f"SELECT {counts}")


def _keep_demo() -> None:
    """Load the bundled model once, for every command that asks for it."""
    import moescope.probes.loading as module

    plain, kept = module.load, module.load("demo")
    module.load = lambda model, **options: kept if model == "demo" else plain(model, **options)


def _command(arguments: list[str]) -> tuple[int, str]:
    from moescope.cli.app import run

    sys.argv = ["moescope", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run()
    return code, err.getvalue() + out.getvalue()


def _remove(store: Path) -> None:
    for path in store.parent.glob(f"{store.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _fresh(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


def _listing(folder: Path) -> set[tuple[str, int]]:
    """Files below a folder; of inputs with their sizes."""
    return set(_entries(folder))


def _entries(folder: Path) -> Iterator[tuple[str, int]]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("inputs", "stores") or Path(root) != folder]
        for name in (*folders, *files):
            path = Path(root) / name
            yield str(path.relative_to(folder)), path.lstat().st_size if name in files else 0


def _too_slow(*_: object) -> None:
    raise Slow


if __name__ == "__main__":
    main()
