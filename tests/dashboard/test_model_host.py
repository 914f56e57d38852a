"""The model behind the lab: order, replacement, stopping, failures, change of model."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from moescope.core.errors import InputError, RunError
from moescope.dashboard.model_host import ModelHost
from moescope.dashboard.model_loading import from_hub
from moescope.dashboard.model_requests import Replaced, Stopped


@pytest.fixture
def host() -> ModelHost:
    return ModelHost("demo")


class Blocked:
    """A request that holds the model until it is let go."""

    def __init__(self) -> None:
        self.begun, self.let_go = threading.Event(), threading.Event()

    def __call__(self, _model: Any) -> str:
        self.begun.set()
        assert self.let_go.wait(20)
        return "blocked"


class Asked(threading.Thread):
    """A thread that asks, and what it was answered."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.ask, self.answer, self.failure = ask, None, None
        self.start()

    def run(self) -> None:
        try:
            self.answer = self.ask()
        except BaseException as failure:  # noqa: BLE001  the test looks at it
            self.failure = failure


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def asked(host: ModelHost, request: Any, who: str) -> Asked:
    """Ask from another thread, and wait until the request stands in the line or runs."""
    before = host.status().waiting
    thread = Asked(lambda: host.ask(request, who=who))
    until(lambda: host.status().waiting > before or not thread.is_alive() or host._running is not None)
    return thread


def test_requests_run_in_the_order_in_which_they_were_asked(host: ModelHost) -> None:
    order: list[int] = []
    blocked = Blocked()
    first = Asked(lambda: host.ask(blocked, who="first"))
    assert blocked.begun.wait(30)
    rest = []
    for number in range(5):
        rest.append(Asked(lambda number=number: host.ask(lambda _m: order.append(number), who=f"asker {number}")))
        until(lambda number=number: host.status().waiting == number + 1)
    assert host.status().state == "busy"
    blocked.let_go.set()
    for thread in (first, *rest):
        thread.join(20)
    assert order == [0, 1, 2, 3, 4]
    assert first.answer == "blocked"
    assert host.status().waiting == 0


def test_a_newer_request_of_the_same_asker_replaces_one_that_waits(host: ModelHost) -> None:
    ran: list[str] = []
    blocked = Blocked()
    first = Asked(lambda: host.ask(blocked, who="page"))
    assert blocked.begun.wait(30)
    old = Asked(lambda: host.ask(lambda _m: ran.append("old"), who="page"))
    until(lambda: host.status().waiting == 1)
    other = Asked(lambda: host.ask(lambda _m: ran.append("other"), who="work"))
    until(lambda: host.status().waiting == 2)
    new = Asked(lambda: host.ask(lambda _m: ran.append("new"), who="page"))
    old.join(20)
    assert isinstance(old.failure, Replaced)
    assert host.status().waiting == 2
    blocked.let_go.set()
    for thread in (first, other, new):
        thread.join(20)
    assert ran == ["new", "other"]
    assert first.answer == "blocked"  # what runs is not replaced


def _endless(model: Any) -> None:
    import torch

    while True:
        model.module(input_ids=torch.tensor([[5, 6, 7]]))


def test_what_runs_can_be_stopped_between_blocks_and_the_model_is_usable_again(host: ModelHost) -> None:
    import torch

    ids = torch.tensor([[5, 6, 7]])
    before = host.ask(lambda m: m.module(input_ids=ids).logits, who="page")
    stuck = Asked(lambda: host.ask(_endless, who="page"))
    until(lambda: host.status().state == "busy")
    host.stop()
    stuck.join(20)
    assert isinstance(stuck.failure, Stopped)
    after = host.ask(lambda m: m.module(input_ids=ids).logits, who="page")
    assert torch.equal(before, after)
    hooks = host.ask(lambda m: [p for p, x in m.module.named_modules() if x._forward_pre_hooks], who="page")
    assert len(hooks) == 1 + len(host.model.anatomy.block_paths)  # of the request that counts them, and no others


def test_a_long_generation_can_be_stopped(host: ModelHost) -> None:
    import torch

    def write(model: Any) -> Any:
        from transformers import GenerationConfig

        endless = GenerationConfig(max_new_tokens=100_000, pad_token_id=0, do_sample=False)
        return model.module.generate(torch.tensor([[5, 6, 7]]), generation_config=endless)

    long = Asked(lambda: host.ask(write, who="page"))
    until(lambda: host.status().state == "busy")
    host.stop()
    long.join(20)
    assert isinstance(long.failure, Stopped)


def test_an_asker_that_no_longer_wants_its_answer_leaves_the_line_or_stops_the_model(host: ModelHost) -> None:
    class Cancelled(BaseException):
        pass

    unwanted = threading.Event()

    def still() -> None:
        if unwanted.is_set():
            raise Cancelled

    blocked = Blocked()
    first = Asked(lambda: host.ask(blocked, who="page"))
    assert blocked.begun.wait(30)
    waits = Asked(lambda: host.ask(_endless, who="work", still=still))
    until(lambda: host.status().waiting == 1)
    unwanted.set()
    waits.join(20)
    assert isinstance(waits.failure, Cancelled)
    assert host.status().waiting == 0
    blocked.let_go.set()
    first.join(20)
    unwanted.clear()
    runs = Asked(lambda: host.ask(_endless, who="work", still=still))
    until(lambda: host.status().state == "busy")
    unwanted.set()
    runs.join(20)
    assert isinstance(runs.failure, Cancelled)
    assert host.ask(lambda _m: "usable", who="page") == "usable"


def test_failures_become_messages_and_the_next_request_has_its_turn(host: ModelHost) -> None:
    def broken(_model: Any) -> None:
        raise ZeroDivisionError("of nothing")

    def refused(_model: Any) -> None:
        raise InputError("layer 3 has no expert 99")

    with pytest.raises(RunError, match="ZeroDivisionError: of nothing"):
        host.ask(broken, who="page")
    with pytest.raises(InputError, match="no expert 99"):
        host.ask(refused, who="page")
    assert host.ask(lambda _m: "usable", who="page") == "usable"


def test_a_model_that_cannot_be_loaded_says_why_until_another_is_chosen(tmp_path: Any) -> None:
    host = ModelHost(str(tmp_path))
    with pytest.raises(InputError):
        host.ask(lambda _m: None, who="page")
    status = host.status()
    assert status.state == "failed"
    assert status.problem is not None
    assert status.problem.fix
    with pytest.raises(InputError):  # told again at once, without another try
        host.ask(lambda _m: None, who="page")
    host.choose("demo")
    assert host.status().state == "unloaded"
    assert host.ask(lambda m: m.name, who="page") == "demo"


def test_without_a_model_it_says_what_to_choose() -> None:
    host = ModelHost()
    assert host.status().state == "none"
    with pytest.raises(InputError, match="no model is chosen"):
        host.ask(lambda _m: None, who="page")


def test_unloading_lets_go_of_the_model_and_the_next_request_loads_it_again() -> None:
    loads: list[str] = []

    def load(source: str) -> Any:
        import moescope as ms

        loads.append(source)
        return ms.load("demo")

    host = ModelHost("one", load=load)
    assert host.ask(lambda _m: 1, who="page") == host.ask(lambda _m: 1, who="page")
    assert host.status().memory > 1_000_000
    host.unload()
    until(lambda: host.status().state == "unloaded")
    host.ask(lambda _m: 1, who="page")
    host.choose("other")
    until(lambda: host.status().state == "unloaded")
    host.ask(lambda _m: 1, who="page")
    assert loads == ["one", "one", "other"]


def test_a_request_that_waits_for_one_model_is_not_run_on_another(host: ModelHost) -> None:
    blocked = Blocked()
    first = Asked(lambda: host.ask(blocked, who="page"))
    assert blocked.begun.wait(30)
    waits = Asked(lambda: host.ask(lambda m: m.name, who="work"))
    until(lambda: host.status().waiting == 1)
    host.choose("other")
    blocked.let_go.set()
    first.join(20)
    waits.join(20)
    assert isinstance(waits.failure, InputError)


def test_work_may_ask_another_model_and_the_chosen_one_is_back_for_the_page() -> None:
    import moescope as ms

    loads: list[str] = []

    def load(source: str) -> Any:
        loads.append(source)
        if source == "broken":
            raise OSError("no such file")
        return ms.load("demo")

    host = ModelHost("lab's", load=load)
    host.ask(lambda _m: None, who="page")
    host.ask(lambda _m: None, who="work", source="work's")
    assert host.model is None  # the page's pickers read nothing of a model that is not theirs
    with pytest.raises(InputError, match="no such file"):
        host.ask(lambda _m: None, who="work", source="broken")
    assert host.status().problem is None
    host.ask(lambda _m: None, who="page")
    assert loads == ["lab's", "work's", "broken", "lab's"]
    assert host.status().state == "ready"


def test_an_interrupt_comes_out_as_it_is(host: ModelHost) -> None:
    def interrupted(_model: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.ask(interrupted, who="work")
    assert host.ask(lambda _m: "usable", who="page") == "usable"


def test_a_load_that_hangs_is_left_behind() -> None:
    hang = threading.Event()

    def load(source: str) -> Any:
        import moescope as ms

        if source == "far away":
            hang.wait(20)
            raise OSError("it never came")
        return ms.load("demo")

    host = ModelHost("far away", load=load)
    stuck = Asked(lambda: host.ask(lambda m: m.name, who="page"))
    until(lambda: host.status().state == "loading")
    host.stop()
    stuck.join(20)
    assert isinstance(stuck.failure, Stopped)
    host.choose("demo")
    assert host.ask(lambda m: m.name, who="page") == "demo"
    hang.set()


def test_what_a_request_leaves_on_the_model_is_off_it_for_those_that_do_not_keep_it(host: ModelHost) -> None:
    closed: list[str] = []
    host.ask(lambda _m: host.keep_open(lambda: closed.append("lab")), who="lab", keeps=True)
    host.ask(lambda _m: None, who="lab", keeps=True)
    assert closed == []
    host.ask(lambda _m: None, who="work")
    assert closed == ["lab"]


def test_requests_give_way_to_one_that_goes_before_them(host: ModelHost) -> None:
    slow = Asked(lambda: host.ask(_endless, who="slow"))
    until(lambda: host.status().state == "busy")
    waits = Asked(lambda: host.ask(_endless, who="slow too"))
    until(lambda: host.status().waiting == 1)
    assert host.ask(lambda _m: "at once", who="quick", before=("slow", "slow too")) == "at once"
    for thread in (slow, waits):
        thread.join(20)
        assert isinstance(thread.failure, Replaced)


def test_a_request_may_ask_again(host: ModelHost) -> None:
    assert host.ask(lambda _m: host.ask(lambda m: m.name, who="inner"), who="outer") == "demo"


def test_only_what_is_not_on_this_disk_counts_as_from_the_hub(tmp_path: Any) -> None:
    assert [from_hub(source) for source in ("demo", str(tmp_path), "allenai/OLMoE-1B-7B-0924")] == [False, False, True]


def _failing() -> None:
    raise ZeroDivisionError("it does not come off")


def test_a_model_from_which_edits_do_not_come_off_is_loaded_anew(host: ModelHost) -> None:
    first = host.ask(lambda m: m, who="lab")
    host.ask(lambda _m: host.keep_open(_failing), who="lab", keeps=True)
    again = Asked(lambda: host.ask(lambda m: m, who="work"))
    again.join(20)
    assert again.failure is None
    assert again.answer is not None
    assert again.answer is not first


def test_an_asker_is_told_when_its_edits_do_not_come_off_either(host: ModelHost) -> None:
    def request(_model: Any) -> None:
        host.keep_open(_failing)
        raise ValueError("planted")

    failed = Asked(lambda: host.ask(request, who="lab", keeps=True))
    failed.join(20)
    assert isinstance(failed.failure, RunError)
    assert host.ask(lambda _m: "usable", who="work") == "usable"


def test_a_model_from_which_edits_do_not_come_off_can_be_let_go(host: ModelHost) -> None:
    host.ask(lambda _m: host.keep_open(_failing), who="lab", keeps=True)
    host.unload()
    until(lambda: host.model is None)
    assert host.ask(lambda m: m.name, who="work") == "demo"


def test_a_thread_that_died_is_replaced(host: ModelHost) -> None:
    dead = threading.Thread(target=lambda: None)
    dead.start()
    dead.join()
    host._thread = dead
    asked_then = Asked(lambda: host.ask(lambda m: m.name, who="page"))
    asked_then.join(20)
    assert asked_then.answer == "demo"


def test_a_request_that_was_left_behind_touches_nothing_of_the_new_model(
    host: ModelHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moescope.dashboard.model_host._PATIENCE", 0.0)
    closed: list[str] = []
    begun, end, over = threading.Event(), threading.Event(), threading.Event()

    def stuck(_model: Any) -> None:
        begun.set()
        end.wait(20)
        host.let_go()
        host.keep_open(lambda: closed.append("of the old model"))
        over.set()

    left = Asked(lambda: host.ask(stuck, who="lab", keeps=True))
    assert begun.wait(30)
    host.stop()
    time.sleep(0.01)
    host.stop()
    left.join(20)
    assert isinstance(left.failure, Stopped)
    host.ask(lambda _m: host.keep_open(lambda: closed.append("of the new model")), who="lab", keeps=True)
    end.set()
    assert over.wait(20)
    assert closed == ["of the old model"]
    host.ask(lambda _m: None, who="work")
    assert closed == ["of the old model", "of the new model"]


def test_a_load_that_failed_keeps_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("moescope.dashboard"), "disabled", True)  # pytest keeps what is logged

    class Model:
        pass

    parts: list[weakref.ref[Model]] = []

    def load(_source: str) -> Any:
        part = Model()
        parts.append(weakref.ref(part))
        raise RuntimeError("no weights")

    host = ModelHost("broken", load=load)
    with pytest.raises(InputError, match="no weights"):
        host.ask(lambda _m: None, who="page")
    gc.collect()
    assert parts[0]() is None
    assert host.status().state == "failed"


def test_a_query_that_is_bound_does_not_bind_the_model(host: ModelHost) -> None:
    import resource

    from moescope.dashboard.sql.memory_bound import bounded_memory

    def limit(_model: Any = None) -> int:
        return resource.getrlimit(resource.RLIMIT_DATA)[0]

    free = limit()
    with bounded_memory(1 << 30):
        assert limit() != free
        assert host.ask(limit, who="page") == free
        until(lambda: limit() != free)  # bound again once the request has ended
    assert limit() == free
