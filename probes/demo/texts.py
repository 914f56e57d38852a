"""A balanced sample of the demo text as a labelled corpus, larger than the bundled one.

    python -m moescope.probes.demo.texts --out texts.jsonl --characters 8000000 --domain bible --domain kernel

Collects the text where the cache has none yet (`moescope.probes.demo.sources`). Every domain gives the same share of the
characters, or all it has; documents come in the order of a hash of their source, domains in turn, so that any first part of the
file is balanced too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moescope.core.atomic import written_whole
from moescope.core.errors import InputError
from moescope.probes.demo.packages import DEFAULT_CACHE
from moescope.probes.demo.sources import digest
from moescope.probes.demo.sources import main as collect

LONGEST = 40_000
"""Characters of a document at most; the rest of it is left out, so that no single text fills a domain."""


def sample(cache: Path, domains: Sequence[str], characters: int) -> Iterator[dict[str, str]]:
    """Documents as {"text", "label", "source"}, domains in turn, until each has its share of the characters.

    Args:
        cache: folder with `train.jsonl`.
        domains: which; none for all there are.
        characters: of the whole sample, at most.

    Raises:
        InputError: a domain that the text has not.
    """
    with (cache / "train.jsonl").open(encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    known = sorted({document["domain"] for document in documents})
    if wrong := set(domains) - set(known):
        raise InputError(f"the demo text has no domain {min(wrong)!r}", expected=", ".join(known))
    chosen = tuple(domains) or tuple(known)
    queues = {
        name: sorted((d for d in documents if d["domain"] == name), key=lambda d: digest(d["source"] + d["text"][:200]))
        for name in chosen
    }
    room = dict.fromkeys(chosen, characters // len(chosen))
    while any(queues.values()):
        for name in chosen:
            if (made := _next(queues[name], room[name])) is None:
                queues[name] = []
                continue
            room[name] -= len(made["text"])
            yield made


def _next(queue: list[dict[str, Any]], room: int) -> dict[str, str] | None:
    """The first document of a queue that there is room for."""
    while queue:
        document = queue.pop(0)
        text = document["text"][:LONGEST]
        if len(text) <= room:
            return {"text": text, "label": document["domain"], "source": document["source"]}
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sample."""
    parser = argparse.ArgumentParser(description="Writes a balanced, labelled sample of the demo text.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of packages and text")
    parser.add_argument("--out", type=Path, required=True, help="the corpus to write, .jsonl")
    parser.add_argument("--characters", type=int, default=8_000_000, help="size of the sample")
    parser.add_argument("--domain", action="append", default=[], help="take these domains alone")
    asked = parser.parse_args(arguments)
    if not (asked.cache / "train.jsonl").exists():
        collect(["--cache", str(asked.cache)])
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(asked.out) as partial, partial.open("w", encoding="utf-8") as file:
        for document in sample(asked.cache, asked.domain, asked.characters):
            file.write(json.dumps(document, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
