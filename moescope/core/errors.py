"""The one family of exceptions that moescope raises on purpose."""

from __future__ import annotations

import traceback
from types import TracebackType

from moescope.core.text import printable

_RED, _PLAIN = "\x1b[1;31m", "\x1b[0m"
_LONGEST = 2000  # characters of a part: what a hostile file holds is not repeated whole


class MoescopeError(Exception):
    """Base of every error moescope raises on purpose.

    The message says what is wrong, what was expected, what was found and what to do; the command line prints it
    as it stands, without a traceback, and exits with `exit_code`.

    Args:
        problem: what is wrong, one sentence without a full stop.
        expected: what would have been right.
        found: what was there instead.
        fix: what the reader can do now.

    Example:
        >>> import moescope as ms
        >>> print(ms.InputError("the corpus has no text", found="0 documents", fix="pass a file with some"))
        the corpus has no text. Found: 0 documents. What to do: pass a file with some.
    """

    exit_code = 4

    def __init__(
        self, problem: str, *, expected: str | None = None, found: str | None = None, fix: str | None = None
    ) -> None:
        self.problem, self.expected, self.found, self.fix = problem, expected, found, fix
        parts = [problem]
        parts += [f"Expected: {expected}"] if expected else []
        parts += [f"Found: {found}"] if found else []
        parts += [f"What to do: {fix}"] if fix else []
        self._parts = [part if part.endswith((".", "?", "!")) else part + "." for part in map(_cut, parts)]
        super().__init__(" ".join(self._parts))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: the line of the user's own code, and the message, a part a line."""
        told = [*self._parts, *_caused_by(self)]
        return [*_asked_in(self.__traceback__), _RED + type(self).__name__ + _PLAIN, *map(printable, told)]


def _cut(part: str) -> str:
    return part if len(part) <= _LONGEST else part[: _LONGEST - 1] + "…"


class InputError(MoescopeError):
    """Something the caller gave cannot be used: a file, a name, a parameter, a model.

    The command line exits with 2.

    Example:
        >>> import moescope as ms
        >>> try:
        ...     ms.edits.Ablate(layer=-1)
        ... except ms.InputError as refused:
        ...     refused.expected
        '0-based layers, or None for all'
    """

    exit_code = 2


class NotRecordedError(InputError):
    """A question needs records that the run does not have; another recording could have them."""


class StoreError(InputError):
    """A store cannot be opened, read or written as asked.

    It is an `InputError` too.

    Example:
        >>> import moescope as ms
        >>> try:
        ...     ms.Store("no/such/folder/runs.duckdb")
        ... except ms.StoreError as refused:
        ...     refused.found
        'no such folder'
    """


class IncompleteError(MoescopeError):
    """A run lacks records that it should have.

    Raised by `ms.analyze` where the ledger of a run is not full, unless `allow_incomplete=True`; the command line exits with 3.

    Example:
        >>> import moescope as ms
        >>> issubclass(ms.IncompleteError, ms.MoescopeError), ms.IncompleteError.exit_code
        (True, 3)
    """

    exit_code = 3


class RunError(MoescopeError):
    """Recording failed on the way: disk, model or device.

    What was committed before stays, and `resume=True` goes on after it. The command line exits with 4.

    Example:
        >>> import moescope as ms
        >>> print(ms.RunError("the disk is full", fix="free some space, then record with resume=True"))
        the disk is full. What to do: free some space, then record with resume=True.
    """


def _asked_in(raised: TracebackType | None) -> list[str]:
    """The last line outside moescope before it was asked."""
    asked = None
    for frame, line in traceback.walk_tb(raised):
        if str(frame.f_globals.get("__name__", "")).split(".")[0] == "moescope":
            break
        asked = frame, line
    if asked is None:
        return []
    summary = traceback.StackSummary.extract([asked])[0]
    return [f"Line {summary.lineno}: {summary.line}"] if summary.line else []


def _caused_by(error: BaseException) -> list[str]:
    """What another library raised, where that led to the error and the message is not of the user's making."""
    cause = error.__cause__
    if not isinstance(error, RunError) or cause is None or isinstance(cause, MoescopeError):
        return []
    return [f"Caused by {type(cause).__name__}: {cause}"]
