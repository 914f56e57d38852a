"""Concepts: yes-or-no questions about tokens, or about whole documents, that probes are asked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.sae.concepts.token_table import TokenTable

_CLASS, _NEXT = "class: ", "next class: "


@dataclass(frozen=True)
class Concept:
    """One concept.

    Attributes:
        name: what tables and figures call it.
        holds: takes the tokens of a run, gives whether the concept holds on each.
        of_documents: whether it is the same for all tokens of a document.

    Example:
        >>> ends = Concept("before the letter e", lambda tokens: tokens.next_id == 68)
        >>> ends.name
        'before the letter e'
    """

    name: str
    holds: Callable[[TokenTable], NDArray[np.bool_]]
    of_documents: bool = False

    def on(self, tokens: TokenTable) -> NDArray[np.bool_]:
        """Whether it holds on each token; raises `InputError` where `holds` does not give one answer a token."""
        found = np.asarray(self.holds(tokens))
        if found.shape != (len(tokens),) or found.dtype != np.bool_:
            raise InputError(
                f"concept {self.name!r} does not answer yes or no for every token",
                expected=f"an array of {len(tokens):,} booleans",
                found=f"shape {found.shape} of {found.dtype}",
            )
        return found


def of_label(label: str) -> Concept:
    """The token's document has this label.

    Example:
        >>> of_label("python").of_documents
        True
    """
    return Concept(label, lambda tokens: tokens.label == label, of_documents=True)


def of_token_class(name: str) -> Concept:
    """The token is of this class: word, fragment, space, punctuation, digit or mixed."""
    return Concept(_CLASS + name, lambda tokens: tokens.token_class == name)


def of_next_class(name: str) -> Concept:
    """The token that follows is of this class.

    Args:
        name: of the class, as in the table `tokens`.
    """
    return Concept(_NEXT + name, lambda tokens: tokens.next_class == name)


def of_token_ids(name: str, ids: Collection[int]) -> Concept:
    """The token is one of these ids.

    Args:
        name: what the concept is called.
        ids: token ids.

    Example:
        >>> of_token_ids("vowels", [1, 5]).name
        'vowels'
    """
    listed = np.array(sorted(ids), np.int64)
    return Concept(name, lambda tokens: np.isin(tokens.token_id, listed))


def read_concepts(asked: Sequence[str | Concept] | None, tokens: TokenTable) -> list[Concept]:
    """Concepts as asked for: objects as they are; a label of the corpus; `class: word`; `next class: word`.

    None takes every label of the corpus; where there are fewer than two, every class of token.

    Raises:
        InputError: a name that is none of these, one that is given twice, or a corpus that has nothing to ask about.
    """
    labels = sorted({label for label in tokens.label if label is not None})
    classes = sorted({name for name in tokens.token_class if name})
    if asked is None:
        found = [of_label(label) for label in labels] if len(labels) > 1 else [of_token_class(name) for name in classes]
    else:
        found = [one if isinstance(one, Concept) else _named(one, labels, classes) for one in asked]
    names = [concept.name for concept in found]
    if not found or (twice := {name for name in names if names.count(name) > 1}):
        raise InputError(
            f"concept {min(twice)!r} is given twice" if found else "there are no concepts to probe for",
            fix="give each a name of its own" if found else "label the corpus, or pass concepts=[Concept(…), …]",
        )
    return found


def _named(name: str, labels: list[str], classes: list[str]) -> Concept:
    if name in labels:
        return of_label(name)
    for start, make in ((_NEXT, of_next_class), (_CLASS, of_token_class)):
        if name.startswith(start.strip()) and name.removeprefix(start.strip()).strip() in classes:
            return make(name.removeprefix(start.strip()).strip())
    shown = ", ".join([*labels[:12], *[_CLASS + one for one in classes], *[_NEXT + one for one in classes]])
    raise InputError(f"{name!r} is no concept of this run", expected=shown)
