"""A user's mistake in IPython: the line that asked and the message, no traceback of moescope's inside."""

from __future__ import annotations

import pytest

import moescope as ms


def _shown(code: str) -> list[str]:
    import linecache

    linecache.cache["<cell>"] = (len(code), None, code.splitlines(keepends=True), "<cell>")
    with pytest.raises(ms.MoescopeError) as raised:
        exec(compile(code, "<cell>", "exec"), {"ms": ms, "__name__": "__main__"})
    lines: list[str] = raised.value._render_traceback_()
    return lines


def test_the_users_line_and_the_parts_of_the_message_and_nothing_else() -> None:
    shown = _shown("a = 1\nms.edits.Ablate(layer=-1)\n")
    assert shown[0] == "Line 2: ms.edits.Ablate(layer=-1)"
    assert "InputError" in shown[1]
    assert shown[2:] == ["ablate: layer cannot be -1.", "Expected: 0-based layers, or None for all."]


def test_the_line_inside_a_function_of_the_user_is_named() -> None:
    shown = _shown("def cut(layer):\n    return ms.edits.Ablate(layer=layer)\n\ncut(-1)\n")
    assert shown[0] == "Line 2: return ms.edits.Ablate(layer=layer)"


def test_what_another_library_said_is_told_where_recording_failed() -> None:
    shown = _shown(
        "try:\n    raise OSError('disk on fire')\nexcept OSError as e:\n    raise ms.RunError('it failed') from e\n"
    )
    assert shown[-1] == "Caused by OSError: disk on fire"


def test_text_from_outside_cannot_move_the_cursor_or_turn_the_line() -> None:
    shown = _shown("raise ms.InputError('a\\x1b[2Jb\\u202ec', found='\\x07')")
    told = "".join(shown[2:])
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert "\x07" not in told


def test_ipython_shows_it_in_place_of_a_traceback() -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    told: list[str] = []
    shell._showtraceback = lambda kind, value, lines: told.extend(lines)  # type: ignore[method-assign]  # what a kernel sends
    shell.run_cell("import moescope as ms\nms.edits.Ablate(layer=-1)")
    assert any("layer cannot be -1" in line for line in told)
    assert not any("Traceback" in line for line in told)
    assert len(told) <= 5
