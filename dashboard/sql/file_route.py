"""Where the page fetches a result as a file from."""

from __future__ import annotations

from typing import cast

from flask import Flask, Response, jsonify, request, send_file

from moescope.core.errors import InputError, MoescopeError
from moescope.dashboard.sql.asking import Asking
from moescope.dashboard.sql.files import FILE_KINDS, FileKind

PATH = "/sql/file"
_TYPES = {"csv": "text/csv", "parquet": "application/vnd.apache.parquet"}


def add_route(server: Flask, asking: Asking) -> None:
    """Answer posts of `{"ask": …, "run": name, "kind": "csv"}`; a page of another origin cannot make one."""

    @server.post(PATH)
    def sql_file() -> tuple[Response, int] | Response:
        try:
            asked = request.get_json(silent=True)
            if (
                not isinstance(asked, dict)
                or asked.get("kind") not in FILE_KINDS
                or not isinstance(asked.get("ask"), dict)
            ):
                raise InputError("that is no query", expected="ask, run and kind as JSON")
            kind = cast("FileKind", asked["kind"])
            file = asking.file(asked["ask"], asked.get("run"), kind)
        except MoescopeError as refused:
            return jsonify(problem=str(refused)), 400
        return send_file(file, mimetype=_TYPES[kind], as_attachment=True, download_name=f"query.{kind}")
