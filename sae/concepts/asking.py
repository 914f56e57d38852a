"""Asking a completion function: once more where its answer cannot be read, and an end where it answers nothing at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from moescope.core.errors import MoescopeError, RunError
from moescope.sae.concepts.prompts import AGAIN

Complete = Callable[[str], str]
_IN_A_ROW = 4  # failures after which the function is taken to be out of order
Read = TypeVar("Read")


@dataclass
class Asker:
    """A completion function with a count of what it did.

    Attributes:
        complete: prompt → text.
        calls, retries: how often it was called, and how often again.
        unread: questions whose answer could not be read even then.
        errors: what it raised, the last few.
    """

    complete: Complete
    calls: int = 0
    retries: int = 0
    unread: int = 0
    errors: list[str] = field(default_factory=list)
    _failed: int = 0

    def ask(self, prompt: str, read: Callable[[str], Read], good: Callable[[Read], bool]) -> Read | None:
        """What `read` finds in the answer; asked again once unless it is `good`. None where there was no answer at all.

        Raises:
            RunError: the function failed several times in a row.
        """
        best: Read | None = None
        for attempt in range(2):
            answer = self._call(prompt + (AGAIN if attempt and best is not None else ""))
            self.retries += attempt
            if answer is None:
                continue
            found = read(answer)
            if good(found):
                return found
            best = found
        self.unread += 1
        return best

    def _call(self, prompt: str) -> str | None:
        self.calls += 1
        try:
            answer = self.complete(prompt)
            if not isinstance(answer, str):
                raise TypeError(f"it gave {type(answer).__name__}, not text")
        except Exception as failed:  # a program of others may fail in any way; several in a row end the work
            self.errors = [*self.errors[-4:], _told(failed)]
            self._failed += 1
            if self._failed >= _IN_A_ROW:
                raise RunError(
                    f"the completion function failed {self._failed} times in a row",
                    found=self.errors[-1],
                    fix="see that it answers; what was described before is stored, and the same call goes on from there",
                ) from failed
            return None
        self._failed = 0
        return answer


def _told(failed: Exception) -> str:
    return (str(failed) if isinstance(failed, MoescopeError) else f"{type(failed).__name__}: {failed}")[:500]
