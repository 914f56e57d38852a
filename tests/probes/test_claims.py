"""One recording a model at a time, two models at a time; and nothing stays on a model that was recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moescope as ms
from moescope.core.sites import RESID_POST, Site
from moescope.probes.claim import claimed
from moescope.probes.recorders.routing import RoutingProbe
from moescope.probes.taps import tapped

LENGTHS = (7, 3, 12, 4, 9, 2, 5, 8)


def left_behind(module: Any) -> list[str]:
    """Hooks, instance attributes and implementations that a fresh model of the kind does not have."""
    found = [
        f"{name}.{kind}"
        for name, m in module.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        if getattr(m, kind)
    ]
    found += [
        f"{name}.{key}"
        for name, m in module.named_modules()
        for key in vars(m)
        if "moescope" in key or key == "forward"
    ]
    return [*found, f"experts: {module.config._experts_implementation}"]


@pytest.fixture
def corpus(token_ids: Callable[..., Any]) -> Any:
    return ms.Corpus.from_token_ids(token_ids(LENGTHS))


def test_a_second_recording_inside_the_first_is_refused(
    store: Any, tmp_path: Path, corpus: Any, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny_model("qwen3_moe")
    plain, refused = RoutingProbe.tap, []

    def nesting(self: Any, site: Any, tensors: Any) -> Any:
        if not refused:
            with ms.Store(tmp_path / "inner.duckdb") as inner, pytest.raises(ms.InputError) as error:
                ms.record(ms.load(module), corpus, inner, name="inner", progress=False)
            refused.append(str(error.value))
        return plain(self, site, tensors)

    monkeypatch.setattr(RoutingProbe, "tap", nesting)
    before = left_behind(module)
    run = ms.record(ms.load(module), corpus, store, name="outer", progress=False)
    assert "already being recorded" in refused[0]
    assert "'outer' is under way" in refused[0]
    assert run.status == "complete"
    assert left_behind(module) == before


def test_the_same_model_in_two_threads_is_refused_to_the_second(
    store: Any, tmp_path: Path, corpus: Any, tiny_model: Callable[..., Any]
) -> None:
    module = tiny_model("qwen3_moe")
    first_is_in, second_is_out = threading.Event(), threading.Event()
    plain = module.model.norm.forward

    def waiting(hidden: Any) -> Any:
        first_is_in.set()
        assert second_is_out.wait(30)
        return plain(hidden)

    module.model.norm.forward = waiting
    runs: list[Any] = []
    thread = threading.Thread(
        target=lambda: runs.append(ms.record(ms.load(module), corpus, store, name="first", progress=False))
    )
    thread.start()
    assert first_is_in.wait(30)
    with ms.Store(tmp_path / "second.duckdb") as second:
        with pytest.raises(ms.InputError, match=r"already being recorded.*'first' is under way"):
            ms.record(ms.load(module), corpus, second, name="second", progress=False)
        assert second.runs() == []
    second_is_out.set()
    thread.join(60)
    assert [run.status for run in runs] == ["complete"]


def test_two_models_are_recorded_at_once_into_two_stores(
    tmp_path: Path, corpus: Any, tiny_model: Callable[..., Any]
) -> None:
    """Each run holds what the model gives when it is recorded alone, and both were under way at the same time."""
    both = threading.Barrier(2, timeout=30)
    found: dict[str, list[Any]] = {}
    query = "SELECT token, layer, experts, weights FROM routing ORDER BY ALL"

    def record(seed: int, name: str, *, together: bool) -> None:
        module = tiny_model("qwen3_moe", seed=seed)
        plain, calls = module.model.norm.forward, []

        def meeting(hidden: Any) -> Any:
            calls.append(1)
            if together and len(calls) in (4, 5):
                both.wait()
            return plain(hidden)

        module.model.norm.forward = meeting
        with ms.Store(tmp_path / f"{name}.duckdb") as store:
            run = ms.record(ms.load(module), corpus, store, name=name, batch_size=2, progress=False)
            assert run.status == "complete"
            found[name] = store.fetch(query)

    threads = [threading.Thread(target=record, args=(n, f"together-{n}"), kwargs={"together": True}) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for seed in (0, 1):
        record(seed, f"alone-{seed}", together=False)
        assert found[f"together-{seed}"] == found[f"alone-{seed}"]
    assert found["alone-0"] != found["alone-1"]


def test_another_threads_pass_is_not_recorded(
    store: Any, corpus: Any, tiny_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    """Somebody uses the model in another thread while it is recorded: their tokens are not ours."""
    import torch

    module = tiny_model("qwen3_moe")
    alone = ms.record(ms.load(tiny_model("qwen3_moe")), corpus, store, name="alone", progress=False)
    model = ms.load(module)
    plain, calls = module.model.norm.forward, []

    def with_a_guest(hidden: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            ids = torch.tensor(token_ids((6, 6), seed=5))
            thread = threading.Thread(target=lambda: module.model(input_ids=ids, use_cache=False))
            thread.start()
            thread.join(30)
        return plain(hidden)

    module.model.norm.forward = with_a_guest
    run = ms.record(model, corpus, store, name="with a guest", progress=False)
    assert run.status == "complete"
    for table in ("tokens", "routing", "residual"):
        rows = [
            store.fetch(f"SELECT * EXCLUDE run_id FROM {table} WHERE run_id = ? ORDER BY ALL", [r.run_id])
            for r in (alone, run)
        ]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("generate", [0, 3])
@pytest.mark.parametrize("call", [1, 2, 3, 5, 7])
def test_nothing_is_left_on_a_model_whatever_ends_the_recording(
    call: int,
    generate: int,
    error: type[BaseException],
    store: Any,
    corpus: Any,
    tiny_model: Callable[..., Any],
) -> None:
    """The n-th pass breaks: while rules are found, while taps are tried, in a batch, while decoding."""
    module = tiny_model("qwen3_moe")
    settings = module.generation_config
    before = left_behind(module)
    calls = []

    def breaking(*_given: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise error("in the model")

    hook = module.model.layers[1].self_attn.register_forward_pre_hook(breaking)
    model = ms.load(module)
    with pytest.raises((ms.MoescopeError, KeyboardInterrupt)):
        ms.record(model, corpus, store, name="broken", batch_size=2, generate=generate, progress=False)
    hook.remove()
    assert left_behind(module) == before
    assert module.generation_config is settings
    good = ms.record(model, corpus, store, name="good", batch_size=2, generate=generate, progress=False)
    assert good.status == "complete"
    assert left_behind(module) == before


def test_taps_by_hand_beside_a_recording_see_what_it_sees(
    store: Any, corpus: Any, tiny_model: Callable[..., Any]
) -> None:
    module = tiny_model("qwen3_moe")
    model = ms.load(module)
    seen = []
    with tapped(
        module, model.anatomy, [Site(0, "", RESID_POST)], lambda _site, tensors: seen.append(tensors["resid"].shape)
    ):
        run = ms.record(model, corpus, store, name="run", batch_size=4, progress=False)
    assert run.status == "complete"
    assert [tuple(shape[:2]) for shape in seen][-2:] == [(4, 12), (4, 9)]


def test_a_claim_is_given_up_however_it_ends(tiny_model: Callable[..., Any]) -> None:
    module, other = tiny_model("llama"), tiny_model("llama")

    def breaking() -> None:
        with claimed(module, "run"), claimed(other, "run"):
            with pytest.raises(ms.InputError), claimed(module, "run"):
                raise AssertionError
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaking()
    with claimed(module, "run"), claimed(other, "run"):
        pass
