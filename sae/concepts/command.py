"""A program as a completion function: the prompt on its standard input, the answer on its standard output."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress

from moescope.core.errors import InputError, RunError

_MOST = 16 << 20  # bytes of an answer
_LOOK = 0.02  # seconds between looks whether it has ended


def completion_command(command: str, *, timeout: float = 120) -> Callable[[str], str]:
    """A completion function that runs a program once for every prompt.

    Args:
        command: the program with its arguments, quoted as in a shell; no shell takes part.
        timeout: seconds an answer may take.

    Raises:
        InputError: no program, or one that is not there. The function itself raises `RunError` where the program fails,
            takes too long, or writes what is not text.

    Example:
        >>> completion_command("cat")("yes")
        'yes'
    """
    try:
        words = shlex.split(command)
    except ValueError as wrong:
        raise InputError(f"the command {command!r} cannot be read", found=str(wrong)) from wrong
    if not words or shutil.which(words[0]) is None:
        raise InputError(
            f"there is no program {words[0]!r}" if words else "the command is empty",
            fix="name one that reads a prompt on its standard input and writes the answer",
        )

    def complete(prompt: str) -> str:
        try:
            code, answer, said = _run(words, prompt.encode(), timeout)
        except OSError as refused:
            raise RunError(f"{words[0]} cannot be run", found=str(refused)) from refused
        if code:
            raise RunError(f"{words[0]} failed", found=f"exit code {code}: {said.strip()[-300:]}")
        return answer

    return complete


def _run(words: list[str], prompt: bytes, timeout: float) -> tuple[int, str, str]:
    """Exit code, answer and complaints of a program in a process group of its own, which ends with it."""
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        asked.write(prompt)
        asked.seek(0)
        process = subprocess.Popen(  # noqa: S603  no shell; the words are the user's own
            words, stdin=asked, stdout=out, stderr=err, start_new_session=True
        )
        end = time.monotonic() + timeout
        try:
            while process.poll() is None:
                if time.monotonic() > end:
                    raise RunError(f"{words[0]} gave no answer within {timeout:g} seconds")
                if max(os.fstat(file.fileno()).st_size for file in (out, err)) > _MOST:
                    raise _endless(words[0])
                time.sleep(_LOOK)
        finally:
            with suppress(ProcessLookupError):  # none of the group is left
                os.killpg(process.pid, signal.SIGKILL)  # what the program started, too
            process.wait()
        if max(os.fstat(file.fileno()).st_size for file in (out, err)) > _MOST:
            raise _endless(words[0])
        out.seek(0)
        err.seek(0)
        return (
            process.returncode,
            out.read(_MOST).decode("utf-8", "replace"),
            err.read(_MOST).decode("utf-8", "replace"),
        )


def _endless(program: str) -> RunError:
    return RunError(f"{program} writes without end", found=f"over {_MOST >> 20} MiB")
