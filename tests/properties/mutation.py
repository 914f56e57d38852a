"""Mutation run: changes the core measures one place at a time, and counts how many changes their tests notice.

    .venv/bin/python tests/properties/mutation.py [--most N] [--json FILE] [MODULE…]

Each changed module is run against its tests in a process of its own that ends at the first failure; a change that no test
notices is a survivor and is printed. Nothing in the checkout is changed: the process is given the changed code when it imports the
module. Compiled kernels are left out, since Numba keeps their compiled code beside the source.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # a mutant that takes longer runs for ever, and counts as noticed
_PROPERTIES = "tests/properties/test_spread_properties.py", "tests/properties/test_rank_and_sum_properties.py"
_SPREAD, _SUMS = (_PROPERTIES[0],), (_PROPERTIES[1],)
_TEXTS = ("tests/properties/test_text_properties.py",)
# Module → the tests that must notice its changes.
MODULES: dict[str, tuple[str, ...]] = {
    "moescope.core.statistics": ("tests/core/test_statistics.py", *_SUMS),
    "moescope.core.text": ("tests/core/test_text.py", *_TEXTS),
    "moescope.core.json_data": ("tests/core/test_json_data.py", *_TEXTS),
    "moescope.core.positions": ("tests/properties/test_position_properties.py",),
    "moescope.routing.balance.measures": _SPREAD,
    "moescope.routing.comparison.set_overlap": _SPREAD,
    "moescope.routing.specialization.divergence": _SPREAD,
    "moescope.routing.specialization.chance_pairs": _SPREAD,
    "moescope.routing.specialization.resampling": _SUMS,
    "moescope.routing.pathways.estimates": _SUMS,
    "moescope.routing.pathways.path_codes": _SUMS,
    "moescope.routing.pathways.power_law": _SUMS,
    "moescope.routing.effects.document_p_values": _SUMS,
    "moescope.routing.importance.rank_correlation": (*_SUMS, "tests/routing/importance/test_rank_correlation.py"),
    "moescope.routing.serving.replicas": _SUMS,
    "moescope.routing.caching.steps": ("tests/properties/test_cache_properties.py",),
}


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module other code than its file has."""

    def __init__(self, name: str, code: str) -> None:
        self.name, self.code = name, code

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's place, with this as its loader."""
        return importlib.util.spec_from_loader(name, self, origin=str(source_of(name))) if name == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        """Run the changed code."""
        module.__file__ = str(source_of(self.name))
        exec(compile(self.code, str(source_of(self.name)), "exec"), module.__dict__)


def source_of(name: str) -> Path:
    """The file of a module of moescope."""
    parts = name.split(".")
    return ROOT / Path(*(parts if parts[1] == "core" else parts[1:])).with_suffix(".py")


def noticed(name: str, code: str, tests: Sequence[str]) -> bool:
    """Whether a test fails when the module has this code."""
    child = os.fork()
    if not child:
        _child(name, code, tests)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _child(name: str, code: str, tests: Sequence[str]) -> None:
    """Run the tests and leave with 0 where all pass."""
    import pytest
    from hypothesis import HealthCheck, settings

    try:
        with open(os.devnull, "w") as nowhere, tempfile.TemporaryDirectory() as folder:
            for stream in (1, 2):
                os.dup2(nowhere.fileno(), stream)
            sys.meta_path.insert(0, _Changed(name, code))
            calm = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
            settings.register_profile("mutation", **calm)
            settings.load_profile("mutation")
            quiet = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder}/tests"]
            code_ = int(pytest.main([*quiet, *(str(ROOT / test) for test in tests)]))
    except BaseException:  # noqa: BLE001  whatever a changed module raises, it was noticed
        code_ = 1
    os._exit(code_)


def run(modules: Sequence[str], *, most: int | None, seed: int = 0) -> dict[str, tuple[int, list[Mutant]]]:
    """Module → how many mutants were tried, and those that no test noticed.

    Args:
        modules: names of `MODULES`.
        most: mutants of each module, drawn at random; None for all.
        seed: of the draw.

    Raises:
        RuntimeError: the tests fail without any change.
    """
    # Loaded once, for every child: what is not moescope's own.
    for heavy in [
        "numpy",
        "pandas",
        "pyarrow",
        "duckdb",
        "scipy.stats",
        "scipy.special",
        "hypothesis",
        "pytest",
        "numba",
        "plotly.graph_objects",
    ]:
        importlib.import_module(heavy)
    found = {}
    for name in modules:
        source = source_of(name).read_text(encoding="utf-8")
        if noticed(name, source, MODULES[name]):
            raise RuntimeError(f"the tests of {name} fail without any change: {MODULES[name]}")
        every = list(mutants(source))
        drawn = every if most is None or len(every) <= most else random.Random(f"{seed} {name}").sample(every, most)
        survivors = [mutant for mutant in drawn if not noticed(name, mutant.code, MODULES[name])]
        found[name] = len(drawn), survivors
        print(f"{name}: {len(drawn) - len(survivors)} of {len(drawn)} noticed (of {len(every)} possible)", flush=True)  # noqa: T201  a program
        for mutant in survivors:
            print(f"    line {mutant.line}: {mutant.change}", flush=True)  # noqa: T201  a program
    return found


def main() -> None:
    """Run the modules that are named, or all."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("modules", nargs="*")
    asked.add_argument("--most", type=int, help="mutants of each module; all where left out")
    asked.add_argument("--json", type=Path, help="also write the counts here")
    given = asked.parse_args()
    os.chdir(ROOT)
    found = run(given.modules or list(MODULES), most=given.most)
    tried, left = sum(count for count, _ in found.values()), sum(len(survivors) for _, survivors in found.values())
    print(f"in all: {tried - left} of {tried} noticed, {(tried - left) / max(tried, 1):.1%}")  # noqa: T201  a program
    if given.json:
        counts = {name: {"tried": count, "survived": len(survivors)} for name, (count, survivors) in found.items()}
        with contextlib.suppress(FileNotFoundError):
            given.json.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
