"""How many tokens, sequences and batches a corpus gives: counted where that is quick, else estimated from a sample."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moescope.core.errors import InputError
from moescope.probes.batches import Batch, BatchPlan
from moescope.probes.corpus import Corpus, Document
from moescope.probes.corpus_files import BadRecord, Record

_SECONDS = 3.0
_SAMPLE = 1_000


@dataclass(frozen=True)
class CorpusCounts:
    """What a corpus gives to a recording, before anything is generated.

    Attributes:
        tokens, sequences, batches: how many; `longest` the most tokens of a sequence.
        distinct: token ids that occur.
        labels_a_batch: labels in a batch, on average.
        text_bytes: UTF-8 bytes of texts, sources and metadata.
        seen: the batches that were counted, all of them or those of the sample; each stands for `each` batches.
        each: batches of the corpus ÷ batches seen.
        error: relative standard error of `tokens`, 0 where every text was counted.
    """

    tokens: int
    sequences: int
    batches: int
    longest: int
    distinct: int
    labels_a_batch: float
    text_bytes: int
    seen: tuple[Batch, ...]
    each: float = 1.0
    error: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether every text was counted."""
        return self.each == 1.0


def count_tokens(plan: BatchPlan, *, seconds: float = _SECONDS, sample: int = _SAMPLE, seed: int = 0) -> CorpusCounts:
    """Tokenise the corpus of a plan; where that takes longer than so many seconds, as many of its documents as `sample`.

    The sample is drawn evenly from all documents and keeps their order; tokens are then estimated as characters × tokens of
    the sample ÷ characters of the sample (Cochran, Sampling Techniques, 3rd ed. 1977, section 6.4, gives the error).

    Raises:
        InputError: no text gives a token; what the plan raises on texts that cannot be read.
    """
    ends = time.monotonic() + seconds
    batches = []
    for batch in plan:
        batches.append(batch)
        if time.monotonic() > ends:
            return _estimated(plan, sample, seed)
    return _counted(plan, batches)


def _counted(plan: BatchPlan, batches: Sequence[Batch]) -> CorpusCounts:
    if not batches:
        raise InputError(
            f"no text of {plan.corpus.name} gives a token", fix="check that the tokenizer belongs to the model"
        )
    rows = [s for batch in batches for s in batch.sequences]
    ids = np.unique(np.concatenate([np.unique(s.token_ids) for s in rows]))
    return CorpusCounts(
        tokens=sum(b.tokens for b in batches),
        sequences=len(rows),
        batches=len(batches),
        longest=max(int(b.lengths.max()) for b in batches),
        distinct=len(ids),
        labels_a_batch=sum(len({s.document.label for s in b.sequences}) for b in batches) / len(batches),
        text_bytes=sum(_bytes(s.text, s.document.source, s.metadata_json) for s in rows),
        seen=tuple(batches),
    )


def _estimated(plan: BatchPlan, size: int, seed: int) -> CorpusCounts:
    facts = plan.corpus.facts()
    drawn = _drawn(plan.corpus, size, seed)
    part = _counted(plan, list(replace(plan, corpus=_corpus_of(drawn, plan.corpus.name))))
    tokens = np.zeros(len(drawn))
    for batch in part.seen:
        for sequence in batch.sequences:
            tokens[sequence.document_id] += len(sequence.token_ids)
    characters = np.array([len(d.text) or len(d.token_ids or ()) for d in drawn])
    ratio = tokens.sum() / characters.sum()
    spread = float(np.std(tokens - ratio * characters, ddof=1)) if len(drawn) > 1 else float(tokens.mean())
    left = 1 - len(drawn) / facts.documents
    times = facts.characters / characters.sum()
    estimated = float(ratio * facts.characters)
    error = facts.documents * spread * (left / len(drawn)) ** 0.5 / estimated
    sequences = max(facts.documents, round(part.sequences * facts.documents / len(drawn)))
    batches = -(-sequences // plan.batch_size)
    return replace(
        part,
        tokens=round(estimated),
        sequences=sequences,
        batches=batches,
        text_bytes=round(part.text_bytes * times),
        each=batches / part.batches,
        error=error,
    )


def _drawn(corpus: Corpus, size: int, seed: int) -> list[Document]:
    """So many documents, each as likely as any other, in their order (reservoir sampling)."""
    chance = random.Random(seed)  # noqa: S311  a sample, not a secret
    kept: list[tuple[int, Document]] = []
    for number, document in enumerate(corpus):
        if len(kept) < size:
            kept.append((number, document))
        elif (place := chance.randrange(number + 1)) < size:
            kept[place] = (number, document)
    return [document for _, document in sorted(kept, key=lambda pair: pair[0])]


def _corpus_of(documents: Sequence[Document], name: str) -> Corpus:
    def records() -> Iterator[Record | BadRecord]:
        for d in documents:
            given = {"text": d.text} if d.token_ids is None else {"token_ids": d.token_ids}
            label = {} if d.label is None else {"label": d.label}
            yield Record(d.source or "", {**d.metadata, **given, **label, "source": d.source})

    return Corpus(records, name=name)


def _bytes(*texts: str | None) -> int:
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts if text)
