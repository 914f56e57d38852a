"""Needles: facts to hide in a long text, with the question that asks for them, and how an answer is judged."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from moescope.core.errors import InputError

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Words of a text in small letters, without punctuation."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Needle:
    """One fact that no other text tells.

    Attributes:
        text: the sentence put into the long text.
        answer: the part of it that is looked for: letter by letter in `text`, once.
        question: asks for the answer.

    Raises:
        InputError: the answer is not in the text, or more than once; an empty question.

    Example:
        >>> Needle("The key lies under the red stone.", "under the red stone", "Where does the key lie?").answer
        'under the red stone'
    """

    text: str
    answer: str
    question: str

    def __post_init__(self) -> None:
        if not self.question.strip() or not words(self.answer):
            raise InputError("a needle needs a question and an answer with words", found=repr(self))
        if self.text.count(self.answer) != 1:
            raise InputError(
                "the answer of a needle must be in its text, letter by letter, once",
                found=f"{self.answer!r} {self.text.count(self.answer)} times in {self.text!r}",
            )


NEEDLES = (
    Needle(
        "The baker of Ashcombe keeps the spare key of her shop inside a cracked blue teapot behind the flour sacks.",
        "inside a cracked blue teapot behind the flour sacks",
        "Where does the baker of Ashcombe keep the spare key of her shop?",
    ),
    Needle(
        "Captain Orlova crossed the northern strait with eleven goats, a brass telescope and two barrels of lemon juice.",
        "eleven goats, a brass telescope and two barrels of lemon juice",
        "With what did Captain Orlova cross the northern strait?",
    ),
    Needle(
        "To wake the old clock of Tarn Hill, turn the copper wheel three times and whistle towards the river.",
        "turn the copper wheel three times and whistle towards the river",
        "What must one do to wake the old clock of Tarn Hill?",
    ),
    Needle(
        "The violin maker Benedikt varnishes his finest instruments with honey, walnut ash and the rain of April mornings.",
        "honey, walnut ash and the rain of April mornings",
        "With what does the violin maker Benedikt varnish his finest instruments?",
    ),
)


def chosen_needles(needles: int | Sequence[Needle]) -> tuple[Needle, ...]:
    """The first so many of the bundled needles, or those given.

    Raises:
        InputError: none, more than are bundled, or something that is no `Needle`.
    """
    if isinstance(needles, int):
        if not 1 <= needles <= len(NEEDLES):
            raise InputError(
                f"there are no {needles} bundled needles",
                expected=f"1 to {len(NEEDLES)}",
                fix="pass your own: Needle(text, answer, question)",
            )
        return NEEDLES[:needles]
    if not needles or not all(isinstance(needle, Needle) for needle in needles):
        raise InputError("these are not needles", expected="Needle(text, answer, question), at least one")
    return tuple(needles)


def unigram_recall(answer: Sequence[Hashable], response: Sequence[Hashable]) -> float:
    """ROUGE-1 recall: share of the answer's units that the response holds, each as often as it is there at most.

    Example:
        >>> unigram_recall(words("a red stone, a key"), words("A stone."))
        0.4
    """
    have: Counter[Any] = Counter(response)
    want: Counter[Any] = Counter(answer)
    return sum((have & want).values()) / max(len(answer), 1)
