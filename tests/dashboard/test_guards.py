from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moescope.dashboard.app import create_app
from moescope.dashboard.guards import allowed_hosts
from moescope.store.store import Store

HOST = {"Host": "127.0.0.1:8050"}
OWN = {**HOST, "Origin": "http://127.0.0.1:8050"}
OUTPUTS = [
    ("page", "children"),
    ("palette-run", "data"),
    ("run-bar", "children"),
    ("run-status", "children"),
    ("run-picker", "data"),
    ("run-picker", "value"),
    ("active", "data"),
]
CALL: dict[str, Any] = {
    "output": f"..{'...'.join('.'.join(output) for output in OUTPUTS)}..",
    "outputs": [{"id": name, "property": part} for name, part in OUTPUTS],
    "inputs": [{"id": "frame-key", "property": "data", "value": {"path": "/", "run": ""}}],
    "state": [{"id": "url", "property": "search", "value": ""}],
    "changedPropIds": ["frame-key.data"],
}


@pytest.fixture
def client(store_of: Callable[..., Store], Plan: Any) -> Any:
    return create_app(store_of(Plan())).server.test_client()


@pytest.mark.parametrize("host", ["127.0.0.1:8050", "localhost:8050", "LOCALHOST:8050"])
def test_its_own_address_is_answered(client: Any, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8050",
        "127.0.0.1:8051",
        "127.0.0.1",
        "127.0.0.1.evil.example:8050",
        "0.0.0.0:8050",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/", "/_dash-layout", "/_dash-dependencies", "/assets/tokview.js"])
def test_another_host_is_refused_everywhere(client: Any, host: str, path: str) -> None:
    assert client.get(path, headers={"Host": host}).status_code == 403


def test_a_post_from_its_own_page_is_answered(client: Any) -> None:
    answer = client.post("/_dash-update-component", json=CALL, headers=OWN)
    assert answer.status_code == 200
    assert "planted-model" in answer.get_data(as_text=True)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "https://127.0.0.1:8050"},
        {"Referer": "http://evil.example/127.0.0.1:8050"},
        {},
    ],
)
def test_a_post_from_elsewhere_is_refused(client: Any, headers: dict[str, str]) -> None:
    assert client.post("/_dash-update-component", json=CALL, headers={**HOST, **headers}).status_code == 403


def test_pages_may_load_and_call_nothing_but_the_app(client: Any) -> None:
    policy = client.get("/", headers=HOST).headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    scripts = next(part for part in policy.split("; ") if part.startswith("script-src"))
    assert "'unsafe-inline'" not in scripts
    assert "'unsafe-eval'" not in scripts


def test_the_index_names_no_other_host(client: Any) -> None:
    page = client.get("/", headers=HOST).get_data(as_text=True)
    assert 'src="http' not in page
    assert "//cdn" not in page


def test_nothing_answers_that_runs_tools_of_the_framework(client: Any) -> None:
    assert "mcp" not in client.get("/_mcp", headers=HOST).get_data(as_text=True)


def test_answers_are_compressed(client: Any) -> None:
    answer = client.get("/_dash-layout", headers={**HOST, "Accept-Encoding": "gzip, br"})
    assert answer.headers.get("Content-Encoding") in {"br", "gzip"}


def test_a_failure_is_told_in_words_without_a_traceback(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("planted <b>failure</b>")

    monkeypatch.setattr("moescope.dashboard.shell.frame", broken)
    answer = client.post("/_dash-update-component", json=CALL, headers=OWN)
    told = answer.get_data(as_text=True)
    assert answer.status_code == 200
    assert "This view could not be made" in told
    assert "ZeroDivisionError: planted" in told
    assert "Traceback" not in told


def test_browsers_leave_out_the_port_that_http_has_by_itself() -> None:
    assert allowed_hosts(80) == {"127.0.0.1", "localhost", "127.0.0.1:80", "localhost:80"}
    assert allowed_hosts(8050) == {"127.0.0.1:8050", "localhost:8050"}


def test_a_page_at_port_80_is_answered_and_may_post(store_of: Callable[..., Store], Plan: Any) -> None:
    client = create_app(store_of(Plan()), port=80).server.test_client()
    own = {"Host": "localhost", "Origin": "http://localhost"}
    assert client.get("/", headers=own).status_code == 200
    assert client.post("/_dash-update-component", json=CALL, headers=own).status_code == 200
