"""Cuts the shipped corpus out of the held-out documents: labelled passages of whole paragraphs.

    python -m moescope.probes.demo.corpus --cache FOLDER

No passage is longer than a context window with its BOS token, and no two passages share a longer line or
sentence.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moescope.probes.demo import CORPUS_PATH, DOMAINS, MODEL_DIR
from moescope.probes.demo.domains import UNCLEAR_LICENSE, Document
from moescope.probes.demo.packages import DEFAULT_CACHE
from moescope.probes.demo.sources import load_documents, pieces

logger = logging.getLogger(__name__)

CORPUS_SEED = 7
TOKENS_A_DOMAIN = 6000
MIN_PASSAGES = 24
MIN_TOKENS, MAX_TOKENS = 100, 510
TARGET_TOKENS = (130, 380)
_MAX_ROUNDS = 30
_ENGLISH = re.compile(r"\b(?:the|of|is|are|and|this|that|to|if|with|be|for|it|as|by|when|which)\b", re.IGNORECASE)
_CJK = re.compile(r"[\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]")
_MIN_CJK_SHARE = 0.3


def reads_as_labelled(text: str, domain: str) -> bool:
    """Whether a passage is in its label's language: translated manuals keep some stretches of English."""
    if domain in ("german", "french", "spanish"):
        paragraphs = text.split("\n\n")
        return all(len(_ENGLISH.findall(p)) * 8 < max(24, len(p.split())) for p in paragraphs)
    cjk_share = len(_CJK.findall(text)) / len(re.sub(r"\s", "", text))
    return cjk_share >= _MIN_CJK_SHARE if domain in ("japanese", "chinese") else cjk_share < 0.05


def cut_passage(document: Document, tokenizer: PreTrainedTokenizerBase, draw: random.Random) -> str | None:
    """Whole paragraphs (for verses and entries: whole lines) from a random start to a random length."""
    separator = "\n" if document.domain in ("bible", "dictionary") else "\n\n"
    blocks = document.text.split(separator)
    start = draw.randrange(len(blocks)) if draw.random() < 0.7 else 0
    target, text = draw.randint(*TARGET_TOKENS), ""
    for block in blocks[start:]:
        longer = text + separator + block if text else block
        n_tokens = len(tokenizer(longer, add_special_tokens=False)["input_ids"])
        if n_tokens > MAX_TOKENS:
            break
        text = longer
        if n_tokens >= target:
            break
    n_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    usable = n_tokens >= MIN_TOKENS and 2 * len(re.findall(r"\w", text)) >= len(text)
    return text if usable and reads_as_labelled(text, document.domain) else None


def build_corpus(
    heldout: list[Document], tokenizer: PreTrainedTokenizerBase, *, seed: int = CORPUS_SEED
) -> list[dict[str, str]]:
    """Passages of every domain until it has `TOKENS_A_DOMAIN` tokens and `MIN_PASSAGES` passages.

    Documents whose licence is unclear are passed over; the others take turns, so that no long one fills a
    domain by itself. Raises ValueError where a domain's held-out documents do not give enough.
    """
    corpus: list[dict[str, str]] = []
    for domain in DOMAINS:
        draw = random.Random(f"{seed}|{domain}")  # noqa: S311  not for secrets
        documents = [d for d in heldout if d.domain == domain and d.license != UNCLEAR_LICENSE]
        taken: set[int] = set()
        n_passages = n_tokens = 0
        for _ in range(_MAX_ROUNDS):
            draw.shuffle(documents)
            for document in documents:
                if n_passages >= MIN_PASSAGES and n_tokens >= TOKENS_A_DOMAIN:
                    break
                text = cut_passage(document, tokenizer, draw)
                if text is None or not taken.isdisjoint(pieces(text)):
                    continue
                taken |= pieces(text)
                n_passages += 1
                n_tokens += len(tokenizer(text, add_special_tokens=False)["input_ids"])
                corpus.append({"text": text, "label": domain, "source": document.source, "license": document.license})
        if n_passages < MIN_PASSAGES or n_tokens < TOKENS_A_DOMAIN:
            raise ValueError(
                f"{domain}: {n_passages} passages with {n_tokens} tokens could be cut, {MIN_PASSAGES} with "
                f"{TOKENS_A_DOMAIN} are needed: raise HELDOUT_SHARE in sources.py"
            )
        logger.info("%-11s %3d passages %5d tokens", domain, n_passages, n_tokens)
    return corpus


def main() -> None:
    """Command line: cut and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder with the collected text")
    parser.add_argument("--out", type=Path, default=CORPUS_PATH, help="file to write")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    corpus = build_corpus(load_documents(arguments.cache / "heldout.jsonl"), tokenizer)
    with arguments.out.open("w", encoding="utf-8") as file:
        for passage in corpus:
            file.write(json.dumps(passage, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
