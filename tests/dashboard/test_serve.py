from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from moescope.core.errors import InputError, StoreError
from moescope.dashboard.serve import serve
from moescope.store.store import Store


@pytest.fixture
def path(store_of: Callable[..., Store], Plan: Any) -> Any:
    store = store_of(Plan())
    store.close()
    return store.path


def test_it_listens_on_this_machine_only_and_says_where(path: Any) -> None:
    seen: dict[str, Any] = {}
    up = threading.Event()

    def ready(url: str, server: Any) -> None:
        seen.update(url=url, server=server)
        up.set()

    thread = threading.Thread(target=serve, args=(path,), kwargs={"port": 0, "ready": ready})
    thread.start()
    assert up.wait(30)
    try:
        assert seen["url"].startswith("http://127.0.0.1:")
        assert seen["server"].socket.getsockname()[0] == "127.0.0.1"
        assert urllib.request.urlopen(seen["url"]).status == 200
    finally:
        seen["server"].shutdown()
        thread.join(10)
    assert not thread.is_alive()


def test_a_busy_port_is_explained(path: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=r"in use.*--port"):
        serve(path, port=taken.getsockname()[1])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "localhost", "192.168.0.1"])
def test_no_other_address_is_bound(path: Any, host: str) -> None:
    with pytest.raises(InputError, match=r"127\.0\.0\.1"):
        serve(path, host=host)


@pytest.mark.parametrize("port", [-1, 70000])
def test_an_impossible_port_is_explained(path: Any, port: int) -> None:
    with pytest.raises(InputError, match="65535"):
        serve(path, port=port)


def test_a_missing_store_is_explained(tmp_path: Any) -> None:
    with pytest.raises(StoreError, match="no store"):
        serve(tmp_path / "none.duckdb")
