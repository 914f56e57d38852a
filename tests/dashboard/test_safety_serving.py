from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moescope.core.errors import InputError, MoescopeError, StoreError
from moescope.dashboard import guards
from moescope.dashboard.access import Access, checked_token, cookie_name, new_token
from moescope.dashboard.app import create_app
from moescope.dashboard.model_requests import Stopped
from moescope.dashboard.serve import open_store, serve, url
from moescope.dashboard.services import services_of
from moescope.store.locking import is_locked
from moescope.store.store import Store

TOKEN = "a token for the tests, long"
HERE = {"Host": "10.0.0.7:8050"}


@pytest.fixture
def path(store_of: Callable[..., Store], Plan: Any) -> Path:
    store = store_of(Plan())
    store.close()
    return store.path


@pytest.fixture
def guarded(store_of: Callable[..., Store], Plan: Any) -> Any:
    app = create_app(store_of(Plan()))
    guards.open_to(app.server, Access(TOKEN.replace(" ", "-"), names=("lab",)))
    return app.server.test_client()


def test_the_store_is_opened_for_writing_and_locked(path: Path) -> None:
    store, why = open_store(path)
    with store:
        assert not store.read_only
        assert why == ""
        assert is_locked(store.connection)
        assert services_of(create_app(store)).writable


def test_read_only_is_what_was_asked_for_and_said(path: Path) -> None:
    store, why = open_store(path, read_only=True)
    with store:
        assert store.read_only
        assert "--read-only" in why
        services = services_of(create_app(store, why_not=why))
        assert not services.writable
        assert services.why_not == why


@contextmanager
def held(path: Path, mode: str) -> Iterator[int]:
    """Another process that has the file open."""
    hold = "import duckdb, sys; c = duckdb.connect(sys.argv[1], read_only=sys.argv[2] == 'r'); print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(path), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
    finally:
        process.communicate("")


def test_a_store_that_another_reads_is_opened_for_reading(path: Path) -> None:
    with held(path, "r") as pid:
        store, why = open_store(path)
        with store:
            assert store.read_only
            assert store.run("planted").complete
    assert "is in use" in why
    assert str(pid) in why


def test_a_store_that_another_writes_is_refused(path: Path) -> None:
    with held(path, "w") as pid, pytest.raises(StoreError, match=f"process {pid}"):
        open_store(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_that_may_not_be_written_is_opened_for_reading(path: Path) -> None:
    path.parent.chmod(0o555)
    try:
        store, why = open_store(path)
        store.close()
        assert store.read_only
        assert "cannot write" in why
    finally:
        path.parent.chmod(0o755)


def test_a_missing_store_is_made_only_when_asked(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="--new"):
        open_store(tmp_path / "new.duckdb")
    assert list(tmp_path.iterdir()) == []
    store, _ = open_store(tmp_path / "new.duckdb", new=True)
    with store:
        assert store.runs() == []


@pytest.mark.parametrize("read_only", [True, False])
def test_an_older_store_is_left_as_it_is_with_the_command_that_upgrades_it(path: Path, read_only: bool) -> None:
    with Store(path) as store:
        store.connection.execute("UPDATE store_info SET value = '3' WHERE key = 'schema_version'")
    with pytest.raises(StoreError, match="moescope runs upgrade"):
        open_store(path, read_only=read_only)


def test_a_request_without_the_token_gets_the_page_that_takes_it(guarded: Any) -> None:
    for address in ("/", "/sql", "/_dash-layout", "/assets/sql.js"):
        answer = guarded.get(address, headers=HERE)
        assert answer.status_code == 401
        assert "needs its token" in answer.get_data(as_text=True)
        assert "Set-Cookie" not in answer.headers


def test_the_token_sets_a_strict_cookie_and_leaves_the_address(guarded: Any) -> None:
    answer = guarded.get(f"/tokens?layer=3&token={TOKEN.replace(' ', '-')}", headers=HERE)
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert TOKEN.replace(" ", "-") not in cookie
    page = answer.get_data(as_text=True)
    assert "url=/tokens?layer=3'" in page
    assert "token=" not in page
    value = re.match(r"moescope_8050=(\w+);", cookie)
    assert value is not None
    again = guarded.get("/", headers={**HERE, "Cookie": f"moescope_8050={value[1]}"})
    assert again.status_code == 200


@pytest.mark.parametrize(
    "given", ["", "x", TOKEN, "a-token-for-the-tests,-lonG", "a-token-for-the-tests,-long2", "é" * 30]
)
def test_a_wrong_token_or_cookie_is_refused(guarded: Any, given: str) -> None:
    client = guarded.application.test_client()
    assert client.get("/", query_string={"token": given}, headers=HERE).status_code == 401
    client.set_cookie(cookie_name(8050), given, domain="10.0.0.7")
    assert client.get("/", headers=HERE).status_code == 401


def test_the_page_after_the_token_never_leads_elsewhere(guarded: Any) -> None:
    right = TOKEN.replace(" ", "-")
    page = guarded.get(f"//evil.example/?token={right}&x='><script>", headers=HERE).get_data(as_text=True)
    assert "url=//" not in page
    assert "<script>" not in page


@pytest.mark.parametrize("host", ["10.0.0.7:8050", "192.168.1.5", "[::1]:8050", "localhost:9000", "lab:8050", "LAB"])
def test_addresses_and_given_names_are_answered(guarded: Any, host: str) -> None:
    assert guarded.get("/", headers={"Host": host}).status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "lab.evil.example:8050", "10.0.0.7.evil.example", "", "lab@evil.example", "[::1"]
)
def test_other_names_are_refused_whatever_they_show(guarded: Any, host: str) -> None:
    cookie = f"{cookie_name(8050)}={Access(TOKEN.replace(' ', '-')).cookie()}"
    assert guarded.get("/", headers={"Host": host, "Cookie": cookie}).status_code == 403


@pytest.mark.parametrize("path", ["/_dash-update-component", "/sql/file"])
@pytest.mark.parametrize("origin", ["http://evil.example", "http://10.0.0.8:8050", "null", None])
def test_a_post_of_another_origin_is_refused_even_with_the_cookie(guarded: Any, path: str, origin: str | None) -> None:
    cookie = {"Cookie": f"{cookie_name(8050)}={Access(TOKEN.replace(' ', '-')).cookie()}"}
    headers = {**HERE, **cookie, **({} if origin is None else {"Origin": origin})}
    assert guarded.post(path, json={}, headers=headers).status_code == 403
    assert guarded.post(path, json={}, headers={**HERE, "Origin": "http://10.0.0.7:8050"}).status_code == 401


@pytest.mark.parametrize("token", ["", "short", "with a space in it", "ümlaut-ümlaut-ümlaut", "line\nline\nline\nline"])
def test_a_token_that_can_be_guessed_or_not_typed_is_refused(path: Path, token: str) -> None:
    with pytest.raises(InputError, match="token"):
        serve(path, host="127.0.0.1", port=0, token=token)


def test_made_tokens_are_long_and_never_the_same() -> None:
    made = {checked_token(new_token()) for _ in range(50)}
    assert len(made) == 50
    assert min(map(len, made)) >= 32


def test_the_address_to_open_names_a_machine_and_carries_the_token() -> None:
    assert url("127.0.0.1", 8050, None) == "http://127.0.0.1:8050/"
    assert url("::1", 80, "a&b") == "http://[::1]:80/?token=a%26b"
    assert url("0.0.0.0", 8050, None) == f"http://{socket.gethostname()}:8050/"


def test_it_listens_elsewhere_with_a_token_and_ends_cleanly(path: Path) -> None:
    seen: dict[str, Any] = {}
    up = threading.Event()

    def ready(url: str, server: Any) -> None:
        seen.update(url=url, server=server)
        up.set()

    wanted = {"host": "0.0.0.0", "port": 0, "token": new_token(), "ready": ready}
    thread = threading.Thread(target=serve, args=(path,), kwargs=wanted)
    thread.start()
    assert up.wait(60)
    try:
        port = seen["server"].socket.getsockname()[1]
        address = f"http://127.0.0.1:{port}/"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address)
        assert urllib.request.urlopen(f"{address}?token={wanted['token']}").status == 200
    finally:
        seen["server"].shutdown()
        thread.join(20)
    assert not thread.is_alive()
    with Store(path) as store:
        assert store.runs(), "the file is free again"


def test_work_that_is_under_way_ends_in_order_before_the_store_is_closed(path: Path) -> None:
    seen: dict[str, Any] = {}
    up, begun = threading.Event(), threading.Event()

    def ready(_url: str, server: Any) -> None:
        seen["server"] = server
        up.set()

    def task(job: Any) -> str | None:
        begun.set()
        try:
            while True:
                job.tell(0)
                threading.Event().wait(0.02)
        finally:
            seen["rows"] = seen["store"].fetch("SELECT count(*) FROM runs")

    def create(store: Store, **options: Any) -> Any:
        app = create_app(store, **options)
        seen.update(store=store, work=services_of(app).work)
        return app

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moescope.dashboard.serve.create_app", create)
        thread = threading.Thread(target=serve, args=(path,), kwargs={"port": 0, "ready": ready})
        thread.start()
        assert up.wait(60)
    job = seen["work"].start("endless", task)
    assert begun.wait(20)
    seen["server"].shutdown()
    thread.join(30)
    assert job.state == "cancelled"
    assert seen["rows"] == [(1,)]


def test_a_model_that_loads_is_stopped_at_the_end_and_that_is_said(path: Path) -> None:
    seen: dict[str, Any] = {}
    up, loading, end = threading.Event(), threading.Event(), threading.Event()
    told: list[str] = []

    def ready(_url: str, server: Any) -> None:
        seen["server"] = server
        up.set()

    def load(_source: str) -> Any:
        loading.set()
        end.wait(40)
        raise RuntimeError("too late")

    def create(store: Store, **options: Any) -> Any:
        app = create_app(store, **options)
        seen["models"] = services_of(app).models
        return app

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moescope.dashboard.serve.create_app", create)
        patch.setattr("moescope.dashboard.model_host.load_model", load)
        options = {"port": 0, "ready": ready, "model": "demo", "tell": told.append}
        thread = threading.Thread(target=serve, args=(path,), kwargs=options)
        thread.start()
        assert up.wait(60)
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            seen["models"].ask(lambda _m: None, who="page")
        except MoescopeError as failure:
            failed.append(failure)

    asker = threading.Thread(target=ask)
    asker.start()
    assert loading.wait(20)
    seen["server"].shutdown()
    thread.join(15)
    asker.join(5)
    end.set()
    assert not thread.is_alive()
    assert isinstance(failed[0], Stopped)
    assert told == ["stopping the model"]
