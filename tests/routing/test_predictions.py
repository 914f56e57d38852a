"""Runs without predictions are told apart by why they have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.importing.import_trace import import_trace
from moescope.store.run import Run
from moescope.store.store import Store


@pytest.mark.parametrize("name", ["nll", "passages"])
def test_an_imported_trace_has_no_nll(name: str, store: Store) -> None:
    rows = {"sequence_id": [0] * 40, "position": list(range(40)), "layer": [0] * 40, "experts": [[0]] * 40}
    run = import_trace(store, pa.table(rows), name=f"imported for {name}", n_experts=2)
    with pytest.raises(InputError, match=r"has no NLL.*record the texts from a live model"):
        analyze(run, name, allow_incomplete=True)


@pytest.mark.parametrize("name", ["nll", "passages"])
def test_sequences_of_one_token_are_told_as_such(name: str, plant: Callable[..., Run]) -> None:
    fields: dict[str, Any] = {"lengths": [1, 1], "nll": np.full(2, np.nan)}
    with pytest.raises(InputError, match="only sequences of one token"):
        analyze(plant(**fields), name)
