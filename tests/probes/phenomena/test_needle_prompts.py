"""Needle prompts: where the needle goes, which tokens are its answer, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moescope.core.errors import InputError
from moescope.probes.demo import CORPUS_PATH
from moescope.probes.phenomena.haystack import Haystack, bundled_haystack, haystack
from moescope.probes.phenomena.needle_grid import needle_grid
from moescope.probes.phenomena.needle_prompts import answer_span, needle_prompt, overlapping_window, sentence_end
from moescope.probes.phenomena.needles import NEEDLES, Needle, chosen_needles, unigram_recall, words

NEEDLE = Needle("The pen of Ada is made of green glass.", "made of green glass", "What is the pen of Ada made of?")
HAY = Haystack("short sentences", tuple(f"The {n}th day was calm and dry. Nobody came by." for n in range(300)))


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_needle_stands_after_a_sentence_near_its_depth_and_the_span_reads_as_its_answer(
    demo_model: Any, depth: float
) -> None:
    tokenizer = demo_model.tokenizer
    prompt = needle_prompt(tokenizer, HAY, NEEDLE, length=300, depth=depth, first=0, chat=False)
    assert 270 <= len(prompt.ids) <= 300
    assert tokenizer.decode(list(prompt.ids[slice(*prompt.span)])).strip() == "made of green glass"
    hay, _, rest = prompt.text.partition(NEEDLE.text)
    assert hay.rstrip() == "" or hay.rstrip()[-1] == ".", "a sentence ends before it"
    after = rest.partition("Based on")[0]
    share = len(hay) / (len(hay) + len(after))
    assert depth - 0.1 <= share <= depth + 0.03
    assert NEEDLE.question in rest
    # What the model is given is what the whole text tokenises to.
    assert list(prompt.ids) == tokenizer(prompt.text)["input_ids"]


def test_a_chat_template_frames_the_prompt(demo_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}<model>"
    monkeypatch.setattr(demo_model.tokenizer, "chat_template", template)
    prompt = needle_prompt(demo_model.tokenizer, HAY, NEEDLE, length=200, depth=0.5, first=0, chat=True)
    assert prompt.text.startswith("<user>")
    assert prompt.text.endswith("</user><model>")
    assert demo_model.tokenizer.decode(list(prompt.ids[slice(*prompt.span)])).strip() == NEEDLE.answer
    changes = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    monkeypatch.setattr(demo_model.tokenizer, "chat_template", changes)
    with pytest.raises(InputError, match="0 times"):
        needle_prompt(demo_model.tokenizer, HAY, NEEDLE, length=200, depth=0.5, first=0, chat=True)
    monkeypatch.setattr(demo_model.tokenizer, "chat_template", "{{ raise_exception('a system message first') }}")
    with pytest.raises(InputError, match="a system message first"):
        needle_prompt(demo_model.tokenizer, HAY, NEEDLE, length=200, depth=0.5, first=0, chat=True)


def test_sentence_ends_are_those_of_sentences() -> None:
    text = 'He paid 3.50 for it. "Why?" she asked! 終わり。次'
    ends = sorted({sentence_end(text, at) for at in range(len(text) + 1)})
    assert [text[:end][-2:] for end in ends[1:]] == ["t.", '?"', "d!", "り。"]


class Characters:
    """A tokenizer of one id a character, whose tokens join the letters given in `joins`; offsets or none."""

    def __init__(self, *joins: str, fast: bool = True) -> None:
        self.joins, self.is_fast, self.pieces = joins, fast, [""]

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        ids, offsets, at = [], [], 0
        while at < len(text):
            piece = next((j for j in self.joins if text.startswith(j, at)), text[at])
            if piece not in self.pieces:
                self.pieces.append(piece)
            ids.append(self.pieces.index(piece))
            offsets.append((at, at + len(piece)))
            at += len(piece)
        return {"input_ids": ids, "offset_mapping": offsets}

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


def test_a_token_that_joins_the_answer_to_its_neighbours_is_refused() -> None:
    """`s.` as one token: no tokens are the answer alone."""
    hay = Haystack("dots", ("A dry day. " * 200,))
    with pytest.raises(InputError, match=r"cannot be told.*covers '\.'"):
        needle_prompt(Characters("s."), hay, NEEDLE, length=300, depth=0.5, first=0, chat=False)
    prompt = needle_prompt(Characters(" m"), hay, NEEDLE, length=300, depth=0.5, first=0, chat=False)
    assert prompt.span[1] - prompt.span[0] == len(NEEDLE.answer), "a space joined before is no neighbour"


def test_without_offsets_the_answer_is_searched_by_its_ids_or_by_the_authors_window() -> None:
    tokenizer = Characters(fast=False)
    text = "Here it is made of green glass, see."
    ids = tokenizer(text)["input_ids"]
    start, stop = answer_span(tokenizer, text, ids, None, NEEDLE.answer, 11)
    assert tokenizer.decode(ids[start:stop]).strip() == NEEDLE.answer
    with pytest.raises(InputError, match="nowhere in the prompt"):
        answer_span(Characters("gl", fast=False), "quite another story", [1, 2, 3], None, NEEDLE.answer, 0)


def test_the_authors_search_needs_over_nine_tenths_of_the_different_ids() -> None:
    needle = list(range(10))
    assert overlapping_window([99, *needle, 99], needle) == (1, 11)
    assert overlapping_window([99, 50, *needle[1:], 99], needle) == (-1, -1), "9 of 10 is not over 0.9"
    eleven = list(range(11))
    assert overlapping_window([99, 50, *eleven[1:], 99], eleven) == (1, 12)


def test_recall_counts_each_word_as_often_as_it_is_there() -> None:
    assert unigram_recall(words("The key, the door."), words("the door")) == 0.5
    assert unigram_recall(words("red red red blue"), words("Red, red!")) == 0.5
    assert unigram_recall([1, 2, 3], []) == 0


def test_bundled_needles_and_text_are_whole() -> None:
    assert len(chosen_needles(len(NEEDLES))) == 4
    text = "\n".join(bundled_haystack().passages)
    assert len(text) > 15_000
    assert not any(needle.answer in text for needle in NEEDLES)
    passages = [json.loads(line) for line in CORPUS_PATH.read_text(encoding="utf-8").splitlines()]
    licences = {passage["license"] for passage in passages if passage["text"] in bundled_haystack().passages}
    assert licences == {"public-domain"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lengths": [60]}, "too short for a needle"),
        ({"lengths": [5000]}, "do not fit into this model's context"),
        ({"lengths": []}, "lengths are numbers"),
        ({"depths": [1.5]}, "shares of the text"),
        ({"depths": []}, "shares of the text"),
        ({"needles": 9}, "no 9 bundled needles"),
        ({"needles": []}, "not needles"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_bad_grids_are_refused_with_what_to_do(demo_model: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        needle_grid(demo_model, **options)


def test_bad_needles_and_haystacks_are_refused(demo_model: Any) -> None:
    with pytest.raises(InputError, match="letter by letter"):
        Needle("The pen is green.", "blue", "Which colour?")
    with pytest.raises(InputError, match="question"):
        Needle("The pen is green.", "green", " ")
    import moescope as ms

    with pytest.raises(InputError, match="this corpus has none"):
        haystack(ms.Corpus.from_token_ids([[1, 2, 3]]))
    telling = [f"{NEEDLE.text} Nobody came by. Nobody left either. " * 30]
    with pytest.raises(InputError, match="must stand in its prompt once"):
        needle_grid(demo_model, telling, lengths=[200], needles=[NEEDLE])


def test_a_grid_has_every_cell_and_begins_each_with_another_passage(demo_model: Any) -> None:
    prompts = needle_grid(demo_model, lengths=[200, 300], depths=[0.1, 0.9], needles=2)
    assert [(p.length, p.depth, p.number) for p in prompts] == [
        (length, depth, number) for length in (200, 300) for depth in (0.1, 0.9) for number in (0, 1)
    ]
    hays = [p.text.partition("Based on")[0].replace(p.needle.text, "").strip() for p in prompts if p.needle]
    assert len({hay[:40] for hay in hays}) == len(prompts)
