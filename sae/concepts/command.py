"""A program as a completion function: the prompt on its standard input, the answer on its standard output."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable

from moescope.core.errors import InputError, RunError


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
            done = subprocess.run(  # noqa: S603  no shell; the words are the user's own
                words, input=prompt.encode(), capture_output=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as slow:
            raise RunError(f"{words[0]} gave no answer within {timeout:g} seconds") from slow
        except OSError as refused:
            raise RunError(f"{words[0]} cannot be run", found=str(refused)) from refused
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip()[-300:]
            raise RunError(f"{words[0]} failed", found=f"exit code {done.returncode}: {said}")
        return done.stdout.decode("utf-8", "replace")

    return complete
