from __future__ import annotations

import time
from pathlib import Path

import brotli
import pytest
from flask import Flask, Response

from moescope.dashboard.squeezed import squeeze

SCRIPT = b"window.moescope = { change() { return 'a text that repeats itself'; } };\n" * 200
BR = {"Accept-Encoding": "gzip, br"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def served(folder: Path | None) -> Flask:
    server = Flask("squeezed")
    server.add_url_rule("/assets/a.js", "a", lambda: Response(SCRIPT, mimetype="text/javascript"))
    server.add_url_rule("/assets/small.js", "b", lambda: Response(b"1", mimetype="text/javascript"))
    server.add_url_rule("/assets/a.png", "c", lambda: Response(SCRIPT, mimetype="image/png"))
    server.add_url_rule("/data", "d", lambda: Response(SCRIPT, mimetype="text/javascript"))
    squeeze(server, folder)
    return server


def kept(folder: Path) -> Path:
    """The one file that is kept, once it is there."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if found := list(folder.glob("*.br")):
            return found[0]
        time.sleep(0.02)
    raise AssertionError("nothing was kept")


def test_a_script_is_sent_small_to_those_who_read_it(folder: Path) -> None:
    client = served(folder).test_client()
    small = client.get("/assets/a.js", headers=BR)
    assert small.headers["Content-Encoding"] == "br"
    assert "Accept-Encoding" in small.headers["Vary"]
    assert brotli.decompress(small.data) == SCRIPT
    assert client.get("/assets/a.js").data == SCRIPT


@pytest.mark.parametrize("path", ["/assets/small.js", "/assets/a.png", "/data"])
def test_everything_else_is_left_alone(folder: Path, path: str) -> None:
    assert "Content-Encoding" not in served(folder).test_client().get(path, headers=BR).headers


def test_the_best_form_is_kept_for_the_next_start(folder: Path) -> None:
    served(folder).test_client().get("/assets/a.js", headers=BR)
    content = kept(folder).read_bytes()
    assert brotli.decompress(content) == SCRIPT
    again = served(folder).test_client().get("/assets/a.js", headers=BR)
    assert again.data == content


@pytest.mark.parametrize("damage", [b"", b"not brotli", brotli.compress(b"alert('another script')")])
def test_a_kept_file_that_holds_something_else_is_not_sent(folder: Path, damage: bytes) -> None:
    served(folder).test_client().get("/assets/a.js", headers=BR)
    kept(folder).write_bytes(damage)
    again = served(folder).test_client().get("/assets/a.js", headers=BR)
    assert brotli.decompress(again.data) == SCRIPT


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    client = served(tmp_path / "file" / "kept").test_client()
    for _ in range(2):
        assert brotli.decompress(client.get("/assets/a.js", headers=BR).data) == SCRIPT


def test_a_user_without_a_home_has_no_folder_and_gets_scripts_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    client = served(None).test_client()
    sizes = []
    end = time.monotonic() + 30
    while len(set(sizes)) < 2 and time.monotonic() < end:
        answer = client.get("/assets/a.js", headers=BR)
        assert brotli.decompress(answer.data) == SCRIPT
        sizes.append(len(answer.data))
    assert len(set(sizes)) == 2, "the best form is kept in memory"
