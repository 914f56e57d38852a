"""The one family of exceptions that moescope raises on purpose."""

from __future__ import annotations


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
        >>> print(InputError("the corpus has no text", found="0 documents", fix="pass a file with some"))
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
        super().__init__(" ".join(part if part.endswith((".", "?", "!")) else part + "." for part in parts))


class InputError(MoescopeError):
    """Something the caller gave cannot be used: a file, a name, a parameter, a model."""

    exit_code = 2


class NotRecordedError(InputError):
    """A question needs records that the run does not have; another recording could have them."""


class StoreError(InputError):
    """A store cannot be opened, read or written as asked."""


class IncompleteError(MoescopeError):
    """A run lacks records that it should have."""

    exit_code = 3


class RunError(MoescopeError):
    """Recording failed on the way: disk, model or device."""
