"""`analyze` and `analyses`: questions to recorded runs, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moescope.core.analysis import analyses as registry
from moescope.core.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from moescope.store.run import Run


def analyze(runs: Run | Sequence[Run], name: str, *, allow_incomplete: bool = False, **parameters: Any) -> Result:
    """Ask one question of one run, or of several.

    Args:
        runs: a run, or as many as the analysis compares.
        name: of the analysis; `ms.analyses()` lists them.
        allow_incomplete: analyse a run whose ledger is not full; every figure then says so.
        parameters: of the analysis.

    Raises:
        InputError: no such analysis or parameter, a value of the wrong kind, or records the run does not have.
        IncompleteError: the run is not complete and `allow_incomplete` is not set.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     ms.analyze(run, "load").n_unit
        'decisions'
    """
    chosen = list(runs) if isinstance(runs, Sequence) else [runs]
    return registry[name](chosen, parameters, allow_incomplete=allow_incomplete)


def analyses() -> pd.DataFrame:
    """Every analysis, as a pandas DataFrame with a row each.

    Returns:
        Columns: `name`, for `ms.analyze`; `answers`, its question; `section` of a report, empty where it is in none; `needs`,
        the tables that must hold records; `runs`, how many it takes; `parameters` with their defaults and what they take;
        `source`, the paper or code that defines it. A notebook shows it by section.

    Example:
        >>> import moescope as ms
        >>> listed = ms.analyses()
        >>> listed.set_index("name").loc["load", ["answers", "needs"]].tolist()
        ["How evenly is each layer's work shared among its experts?", 'loads']
    """
    from moescope.core.analysis_frame import AnalysisFrame

    return AnalysisFrame(
        [
            {
                "name": a.name,
                "answers": a.summary,
                "section": a.section or "",
                "needs": ", ".join(a.needs),
                "runs": a.runs,
                "parameters": ", ".join(f"{p.name}={p.default!r} ({p.describe()})" for p in a.parameters.values()),
                "source": a.source,
            }
            for a in registry
        ]
    )
