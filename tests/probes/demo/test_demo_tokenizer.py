"""The shipped tokenizer gives every text back and marks its beginning."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moescope.probes.demo import MODEL_DIR

HOSTILE = [
    "",
    " ",
    "  two  spaces and\ttabs\t\n\n\r\n",
    "no trailing newline\n",
    "\x00\x01\x7f\u0080\ufeff\ufffe",
    "日本語と简体中文, 한국어, العربية, עברית",
    "🙂👩\u200d👩\u200d👧 combining e\u0301 \u202eright to left",
    "\U0010ffff\U000e0001",
    "don't I'm it's 'quoted' \"double\" 1234567890 1,000.5",
    "< bos > <bo s> ▁ Ġ Ċ ##",
    "    def f(x):\n        return x ** 2  # half\n",
    "\\fBroff\\fP =head1 B<pod> .. rst::",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.mark.parametrize("text", HOSTILE)
def test_decoding_gives_the_text_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_every_code_point_of_the_basic_plane_survives(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "".join(chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000)
    assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"], skip_special_tokens=True) == text


def test_bos_comes_first_and_once(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("some text")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer("", add_special_tokens=False)["input_ids"] == []


def test_special_tokens_are_three_different_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(ids) == 3
    assert (len(tokenizer), tokenizer.model_max_length) == (4096, 512)
