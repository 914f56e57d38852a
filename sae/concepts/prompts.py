"""What describers and judges are asked, and how their answers are read, however they are dressed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moescope.core.text import undirected
from moescope.sae.concepts.windows import CLOSE, OPEN

LONGEST = 400  # characters of a description that are kept
_ANSWER = 20_000  # characters of an answer that are read
_QUOTES = ('""', "''", "“”", "«»", "「」")
_WORDS = {"yes": True, "true": True, "y": True, "1": True, "no": False, "false": False, "n": False, "0": False}
_ITEM = re.compile(r"(?<![\w−-])(\d{1,3}) ?[\])}.:=–—-]+ ?(yes|no|true|false|y|n|1|0)\b(?!\.\d)", re.I)
_LABEL = re.compile(r"description\s*\**\s*[:：]\s*\**", re.I)


def describe_prompt(passages: Sequence[str], kind: str) -> str:
    """Ask for a description of what the marked tokens share."""
    return (
        f"Each passage below is from a text that a language model read. The tokens on which one {kind} of the model is active "
        f"stand between {OPEN} and {CLOSE}. The first passages show its strongest activity. ↵ is a line break.\n\n"
        + _listed(passages)
        + "\nWhat do the marked tokens, or what comes just before them, have in common? Be specific and short: one phrase of at "
        "most 20 words. If nothing is in common, say what kind of text it is.\nAnswer with one line that begins with "
        "DESCRIPTION:\n"
    )


def detection_prompt(description: str, passages: Sequence[str]) -> str:
    """Ask in which passages something that fits the description occurs."""
    return (
        f"A part of a language model becomes active on this: {description}\n\n"
        "For each passage below, say whether it would become active anywhere in it.\n\n" + _listed(passages) + _ASK
    )


def fuzzing_prompt(description: str, passages: Sequence[str]) -> str:
    """Ask in which passages the marked tokens are those that the description is of."""
    return (
        f"A part of a language model becomes active on this: {description}\n\n"
        f"In each passage below some tokens stand between {OPEN} and {CLOSE}. Say for each passage whether these are the tokens on "
        "which it would be active; in some passages wrong tokens were marked.\n\n" + _listed(passages) + _ASK
    )


def tokens_prompt(description: str) -> str:
    """Ask which words the described part makes more likely."""
    return (
        f"A part of a language model becomes active on this: {description}\n\n"
        "Where it is active, which words or pieces of words become more likely to be written next because of it? Give up to ten, "
        "separated by commas, on one line that begins with WORDS:\n"
    )


AGAIN = "\nYour last answer could not be read. Keep exactly to the form that is asked for.\n"
_ASK = "\nAnswer with one line a passage: its number, a colon, and yes or no.\n"


def _listed(passages: Sequence[str]) -> str:
    return "".join(f"{number}. {passage}\n" for number, passage in enumerate(passages, 1))


def _levelled(answer: str) -> str:
    """An answer without empty lines and runs of blanks: with them, a search could take quadratic time."""
    return "\n".join(" ".join(line.split()) for line in undirected(answer[:_ANSWER]).splitlines() if line.strip())


def read_description(answer: str) -> str | None:
    """The description in an answer; None where there is none: no letter, or nothing but what was asked.

    Example:
        >>> read_description("Sure! **DESCRIPTION:** `digits of years`")
        'digits of years'
        >>> read_description("...") is None
        True
    """
    text = _levelled(answer)
    labels = list(_LABEL.finditer(text))
    tail = text[labels[-1].end() :] if labels else text
    line = next((one for one in tail.splitlines() if any(c.isalnum() for c in one)), "")
    found = " ".join("".join(c for c in line if c.isprintable()).split()).lstrip("#> ").strip(" *_`")
    if found[:1] + found[-1:] in _QUOTES:
        found = found[1:-1].strip()
    return found[:LONGEST] if any(c.isalpha() for c in found) else None


def read_judgements(answer: str, count: int) -> list[bool | None]:
    """Yes or no for each passage, None where the answer has none; of several for one passage the last counts.

    Example:
        >>> read_judgements("1: yes\\n2) No\\n**3** - maybe", 3)
        [True, False, None]
        >>> read_judgements("Yes.", 1)
        [True]
    """
    text = " ".join(re.sub(r"[*_`\"'|]", "", undirected(answer[:_ANSWER])).split())
    found: list[bool | None] = [None] * count
    for number, word in _ITEM.findall(text):
        if 1 <= int(number) <= count:
            found[int(number) - 1] = _WORDS[word.lower()]
    bare = re.fullmatch(r"\W*(yes|no|true|false)\W*", text, re.I)
    if count == 1 and found[0] is None and bare:
        found[0] = _WORDS[bare[1].lower()]
    return found


def read_words(answer: str) -> list[str]:
    """Up to ten words of an answer, in its order, without doubles.

    Example:
        >>> read_words("WORDS: cat, 'dog' , cat, the end")
        ['cat', 'dog', 'the end']
    """
    text = _levelled(answer)
    marked = list(re.finditer(r"words\s*\**\s*[:：]\s*\**", text, re.I))
    tail = text[marked[-1].end() :] if marked else text
    line = next((one for one in tail.splitlines() if one.strip()), "")
    parts = (part.strip(" \t*_`\"'“”«».") for part in re.split(r"[,;、，]", line))
    return list(dict.fromkeys(part for part in parts if part and len(part) <= 40))[:10]
