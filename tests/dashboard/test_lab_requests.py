"""What the lab's requests do at their edges: numbers that fit nowhere, a model that was left behind, edits that name runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.edit_text import read_edit
from moescope.core.intervention import Intervention
from moescope.dashboard.app import create_app
from moescope.dashboard.lab.asking import Asking
from moescope.dashboard.lab.bench import Bench
from moescope.dashboard.lab.measuring import Asked, Measuring
from moescope.dashboard.model_host import ModelHost
from moescope.dashboard.model_requests import Stopped
from moescope.dashboard.services import services_of
from moescope.store.store import Store

PROMPTS = ["And God said unto him, Arise, and go up to the mountain.", "def f(x): return x + 1"]


@pytest.fixture(scope="module")
def host() -> ModelHost:
    return ModelHost("demo")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("requests") / "runs.duckdb") as opened:
        yield opened


@pytest.fixture
def asking(host: ModelHost, store: Store) -> Asking:
    return Asking(host, Bench(host, store))


def ask(line: str = "", **more: Any) -> dict[str, Any]:
    plain = {"tab": "t", "prompt": "\n".join(PROMPTS), "edits": [line] if line else [], "row": 0, "at": None}
    return {**plain, "tokens": 2, "temperature": 0, "seed": 0, "stamp": 1, **more}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.module(input_ids=torch.tensor([[5, 6, 7]])).logits
    return found


def test_edits_work_on_the_model_that_is_loaded_after_one_was_left_behind(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moescope.dashboard.model_host._PATIENCE", 0.0)
    fresh = ModelHost("demo")
    asking = Asking(fresh, Bench(fresh, store))
    lines = ("skip layer=3", "skip layer=3 strength=0.5")
    before = [asking.answer(ask(line))["summary"] for line in lines]
    assert before[0]["kl"] > before[1]["kl"] > 0
    begun, end = threading.Event(), threading.Event()

    def stuck(_model: Any) -> None:
        begun.set()
        end.wait(20)

    def left() -> None:
        with pytest.raises(Stopped):
            fresh.ask(stuck, who="lab t", keeps=True)

    thread = threading.Thread(target=left)
    thread.start()
    assert begun.wait(20)
    fresh.stop()
    time.sleep(0.01)
    fresh.stop()
    thread.join(20)
    # The strength alone differs from the edit that lay on the model which is gone.
    assert [asking.answer(ask(line))["summary"] for line in reversed(lines)] == before[::-1]
    end.set()
    assert torch.equal(fresh.ask(logits, who="work"), logits(ms.load("demo")))


def test_a_session_that_was_closed_is_not_changed_where_it_lay(host: ModelHost, asking: Asking) -> None:
    lines = ("ablate layer=3 experts=0-7", "ablate layer=3 experts=0-7 strength=0.5")
    found = []
    for line in (*lines, lines[0]):
        found.append(asking.answer(ask(line))["summary"]["kl"])
        host.ask(lambda _m: None, who="work")
    assert found[0] == found[2] > found[1] > 0


@pytest.mark.parametrize(
    ("asked", "row", "at"),
    [({"row": -9}, 0, None), ({"row": 99}, 1, None), ({"at": -999}, 0, 0), ({"row": 1, "at": 10**9}, 1, None)],
)
def test_places_beyond_the_prompts_are_the_nearest_that_there_are(
    asking: Asking, asked: dict[str, Any], row: int, at: int | None
) -> None:
    found = asking.answer(ask(**asked))
    assert found["row"] == row
    assert found["at"] == (len(found["prompts"][row]["pieces"]) - 1 if at is None else at)
    assert asking.writes(ask(**asked))["row"] == row


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-40},
        {"temperature": "hot"},
        {"seed": 2**70},
        {"seed": float("inf")},
        {"row": "first"},
        {"tokens": [1]},
    ],
    ids=str,
)
def test_a_request_of_nonsense_is_refused_and_not_a_failure_of_the_model(asking: Asking, wrong: dict[str, Any]) -> None:
    found = asking.writes(ask(**wrong))
    assert found["state"] == "refused"
    assert next(iter(wrong)) in found["problem"]["problem"]


@pytest.mark.parametrize(("tokens", "n"), [(-1, 1), (0, 1), (10**9, 4)])
def test_the_tokens_that_are_written_are_between_one_and_the_most(
    asking: Asking, tokens: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moescope.dashboard.lab.writing.MAX_WRITTEN", 4)
    assert len(asking.writes(ask(tokens=tokens))["base"]) == n


def test_controls_of_an_edit_that_names_a_run_are_measured_from_the_stores_run(tmp_path: Path) -> None:
    intervention = Intervention([read_edit("patch layer=3 site=hook_mlp_out run=planted")])
    with Store(tmp_path / "named.duckdb", locked=True) as opened:
        ms.record(ms.load("demo"), PROMPTS, opened, name="planted", sites=("blocks.3.hook_mlp_out",), probes=_PROBES)
        services = services_of(create_app(opened, model="demo"))
        measuring = Measuring(services, Bench(services.models, opened))
        job = measuring.controls(Asked(intervention, tuple(PROMPTS), 0, 0, "demo"))
        end = time.monotonic() + 30
        while not job.over and time.monotonic() < end:
            time.sleep(0.02)
        assert job.problem is None
        assert measuring.result(job.number) is not None
        assert [run.name for run in opened.runs()] == ["planted"]


_PROBES = ("tokens", "routing", "activations")
