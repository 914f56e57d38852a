from __future__ import annotations

import threading

import pytest

from moescope.core.progress import tell, watched


def test_what_is_told_inside_is_heard_and_outside_is_not() -> None:
    heard: list[tuple[str, float, float, str]] = []
    tell("before", 1, 2)
    with watched(lambda *told: heard.append(told)):
        tell("inside", 1, 2, "fast")
    tell("after", 2, 2)
    assert heard == [("inside", 1, 2, "fast")]


def test_the_inner_listener_hears_and_the_outer_one_hears_again_after_it() -> None:
    heard: list[str] = []
    with watched(lambda what, *_: heard.append(f"outer {what}")):
        with watched(lambda what, *_: heard.append(f"inner {what}")):
            tell("a", 0, 1)
        tell("b", 0, 1)
    assert heard == ["inner a", "outer b"]


def test_another_thread_is_not_listened_to() -> None:
    heard: list[str] = []
    with watched(lambda what, *_: heard.append(what)):
        other = threading.Thread(target=tell, args=("elsewhere", 0, 1))
        other.start()
        other.join()
    assert heard == []


def test_a_listener_may_stop_the_work() -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(stop):
        tell("work", 1, 2)
    tell("work", 2, 2)
