"""Failures that are kept to be shown, without what was at hand when they happened."""

from __future__ import annotations


def without_frames(failure: BaseException) -> None:
    """Let go of everything that the functions held in which it was raised: a model, for instance, which its traceback keeps.

    Example:
        >>> try:
        ...     1 / 0
        ... except ZeroDivisionError as failure:
        ...     without_frames(failure)
        ...     failure.__traceback__ is None
        True
    """
    waiting: list[BaseException | None] = [failure]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.__traceback__ = None
        waiting += [one.__cause__, one.__context__]
