"""Each kind of work, done on the bundled model as the Work page does it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from moescope.dashboard.app import create_app
from moescope.dashboard.pages.work import begin
from moescope.dashboard.services import services_of
from moescope.dashboard.url_state import decode
from moescope.dashboard.work_kinds import KINDS
from moescope.store.store import Store


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    words = ["cat", "dog", "cow", "hen", "fox", "owl", "bee", "ant"]
    lines = [{"text": f"The {w} sat on the mat. The {w} looked at the {w}. " * 3, "label": w[0]} for w in words]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


GIVEN: dict[str, dict[str, Any]] = {
    "profile": {"name": "mine", "probe": ["tokens", "routing"]},
    "phenomena": {"texts": 4, "controls": 1},
    "sweep": {"screen": 2},
    "effect": {"edit": "ablate layer=3 experts=5; top_k layer=1 k=1"},
}


@pytest.mark.parametrize("name", GIVEN)
def test_work_leaves_its_records_and_a_link_to_them(name: str, texts: Path, tmp_path: Path) -> None:
    kind = next(kind for kind in KINDS if kind.name == name)
    values = {
        "model": "demo",
        "data": str(texts),
        "name": "",
        **{f.name: f.default for f in kind.fields},
        **GIVEN[name],
    }
    with Store(tmp_path / "runs.duckdb") as store:
        services = services_of(create_app(store))
        job = begin(services, kind, values)
        end = time.monotonic() + 120
        while not job.over and time.monotonic() < end:
            time.sleep(0.05)
        assert (job.state, str(job.problem)) == ("done", "None")
        path, search = str(job.link).split("?")
        run = store.run(str(decode(search).run))
        assert run.complete
        table = {"profile": "routing", "phenomena": "heads", "sweep": "effects", "effect": "effects"}[name]
        assert run.rows(table) > 0
        assert path in ("/", "/phenomena", "/experts")
        services.models.unload()
