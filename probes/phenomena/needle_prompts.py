"""Prompts of the needle-in-a-haystack protocol: a needle in a long text, the question after it, and where its answer stands."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from moescope.core.errors import InputError
from moescope.probes.phenomena.haystack import Haystack
from moescope.probes.phenomena.needles import Needle

_ASK = "Based on the text above, answer in the words of the text. Question: "
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s|$)|[。！？]|\n")
_LEAST_HAY = 32  # tokens of text around a needle, below which nothing hides it
_OVERLAP = 0.9  # of the authors' search


@dataclass(frozen=True)
class NeedlePrompt:
    """One prompt, ready for the model.

    Attributes:
        ids: token ids, special tokens included.
        span: places of the answer's tokens, 0-based, the end excluded.
        needle: what is hidden; None where only ids are known.
        text: what was tokenised.
        length: tokens asked for; `ids` are as many or a few less.
        depth: share of the text before the needle, as asked for.
        authors_span: what the search of the authors' code finds: (−1, −1) where it finds nothing, and its score would be 0.
        number: which needle of the grid.
    """

    ids: tuple[int, ...]
    span: tuple[int, int]
    needle: Needle | None = None
    text: str = ""
    length: int = 0
    depth: float = 0.0
    authors_span: tuple[int, int] = (-1, -1)
    number: int = 0

    def __post_init__(self) -> None:
        start, stop = self.span
        if not 0 <= start < stop < len(self.ids):
            raise InputError(
                "the answer of a needle must lie inside its prompt, before the last token",
                expected=f"a span within 0 to {len(self.ids) - 1}",
                found=f"{start} to {stop}",
            )


def needle_prompt(
    tokenizer: Any, hay: Haystack, needle: Needle, *, length: int, depth: float, first: int, chat: bool, number: int = 0
) -> NeedlePrompt:
    """Hide a needle in at most `length` tokens.

    The needle goes to a share `depth` of the text, moved back to the end of the sentence before; the question comes last.

    Args:
        tokenizer: the model's.
        hay, first: what text, from which passage on.
        needle: what to hide.
        length: tokens of the whole prompt at most.
        depth: 0 (before the text) to 1 (after it).
        chat: put it into the tokenizer's chat template, as the user's message.
        number: of the needle.

    Raises:
        InputError: no room for a text around the needle, a text that tells the needle by itself, or a tokenizer that joins
            the ends of the answer to what stands beside it, so that no tokens are the answer.
    """
    room = length - len(_encoded(tokenizer, _framed(tokenizer, needle.text, needle, chat), chat)[0])
    if room < _LEAST_HAY:
        raise InputError(
            f"a context of {length:,} tokens is too short for a needle",
            expected=f"{length - room + _LEAST_HAY:,} tokens at least, for needle, question and a text around them",
            fix="ask for longer prompts (lengths), or give shorter needles",
        )
    plenty = hay.text(first, 16 * length)
    for _ in range(6):
        text = _cut(tokenizer, plenty, room)
        hidden = _with_needle(text, needle.text, depth)
        rendered = _framed(tokenizer, hidden, needle, chat)
        ids, offsets = _encoded(tokenizer, rendered, chat)
        if len(ids) <= length:
            break
        room -= len(ids) - length
    if rendered.count(needle.text) != 1:
        raise InputError(
            "a needle must stand in its prompt once",
            found=f"{rendered.count(needle.text)} times {needle.text!r}",
            fix="the text tells it already, or the chat template changes it: take another needle, or chat=False",
        )
    start = rendered.index(needle.text) + needle.text.index(needle.answer)
    span = answer_span(tokenizer, rendered, ids, offsets, needle.answer, start)
    return NeedlePrompt(
        tuple(ids), span, needle, rendered, length, depth, _authors_span(tokenizer, ids, needle.answer), number
    )


def answer_span(
    tokenizer: Any, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]] | None, answer: str, start: int
) -> tuple[int, int]:
    """Places of the tokens of an answer that begins at character `start`: by offsets, or by searching for its ids.

    Raises:
        InputError: they cannot be told: the tokenizer splits the answer differently in its context.
    """
    if offsets is None:
        return _searched(tokenizer, ids, answer)
    stop = start + len(answer)
    inside = [i for i, (a, b) in enumerate(offsets) if a < b and a < stop and b > start]
    if not inside:
        raise _undetermined(answer, "no token covers it")
    first, last = inside[0], inside[-1]
    beside = text[offsets[first][0] : start] + text[stop : offsets[last][1]]
    if beside.strip():
        raise _undetermined(answer, f"a token that covers {beside.strip()!r} beside it")
    read = tokenizer.decode(list(ids[first : last + 1]))
    if _bare(answer) not in _bare(read):
        raise _undetermined(answer, f"the tokens there read {read!r}")
    return first, last + 1


def _searched(tokenizer: Any, ids: Sequence[int], answer: str) -> tuple[int, int]:
    """Without offsets: the answer's ids, as they are with or without a space before; else what the authors' search finds."""
    ways = [_ids_of(tokenizer, way) for way in (f" {answer}", answer)]
    for way in ways:
        for at in range(len(ids) - len(way) + 1):
            if list(ids[at : at + len(way)]) == way:
                return at, at + len(way)
    for way in ways:
        if (found := overlapping_window(ids, way)) != (-1, -1):
            return found
    raise _undetermined(answer, "its ids are nowhere in the prompt")


def overlapping_window(ids: Sequence[int], needle: Sequence[int]) -> tuple[int, int]:
    """The search of the authors' code: the first window as long as the needle that holds over 0.9 of its different ids.

    Returns:
        First place and one past the last, or (−1, −1).

    Example:
        >>> overlapping_window([9, 9, 1, 2, 3, 9], [1, 2, 3])
        (2, 5)
    """
    wanted = set(needle)
    for at in range(len(ids) - len(needle) + 1):
        if len(wanted & set(ids[at : at + len(needle)])) / len(wanted) > _OVERLAP:
            return at, at + len(needle)
    return -1, -1


def sentence_end(text: str, before: int) -> int:
    """Where the last sentence that ends at `before` or earlier ends; 0 where none does.

    Example:
        >>> sentence_end("It is so. Then 3.5 men", 18)
        9
    """
    ends = [m.end() for m in _SENTENCE_END.finditer(text) if m.end() <= before]
    return ends[-1] if ends else 0


def _with_needle(text: str, needle: str, depth: float) -> str:
    at = len(text) if depth >= 1 else sentence_end(text, round(depth * len(text)))
    before, after = text[:at].rstrip(" "), text[at:].lstrip(" ")
    between = "" if not before or before.endswith("\n") else " "
    return f"{before}{between}{needle}{'' if not after or after.startswith(chr(10)) else ' '}{after}"


def _cut(tokenizer: Any, text: str, tokens: int) -> str:
    """So many tokens of a text, back to the end of a sentence where that costs little."""
    if tokenizer.is_fast:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        cut = text[: offsets[tokens][0]] if len(offsets) > tokens else text
    else:
        cut = tokenizer.decode(_ids_of(tokenizer, text)[:tokens])
    end = sentence_end(cut, len(cut))
    return cut[:end].rstrip() if end >= 0.9 * len(cut) else cut


def _framed(tokenizer: Any, text: str, needle: Needle, chat: bool) -> str:
    asked = f"{text}\n\n{_ASK}{needle.question}"
    if not chat:
        return f"{asked}\nAnswer:"
    message = [{"role": "user", "content": asked}]
    try:
        return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except (ValueError, TypeError, TemplateError) as refused:
        raise InputError(
            "the tokenizer's chat template does not take a single message of a user",
            found=f"{type(refused).__name__}: {refused}",
            fix="chat=False",
        ) from refused


def _encoded(tokenizer: Any, text: str, chat: bool) -> tuple[list[int], list[tuple[int, int]] | None]:
    fast = bool(tokenizer.is_fast)
    options = {"return_offsets_mapping": True} if fast else {}
    made = tokenizer(text, add_special_tokens=not chat, verbose=False, **options)
    return list(made["input_ids"]), [tuple(o) for o in made["offset_mapping"]] if fast else None


def _authors_span(tokenizer: Any, ids: Sequence[int], answer: str) -> tuple[int, int]:
    return overlapping_window(ids, _ids_of(tokenizer, answer))


def _ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _bare(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _undetermined(answer: str, found: str) -> InputError:
    return InputError(
        f"the tokens of the answer {answer!r} cannot be told in its prompt",
        expected="a tokenizer that splits the answer from the text around it",
        found=found,
        fix="take another needle, whose answer ends where words end",
    )
