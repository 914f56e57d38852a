"""Training rows of the demo model: which 512 tokens stand in row number i, as a pure function of seed and i.

Nothing is kept between rows, so a resumed training run reads exactly what an unbroken one reads.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from moescope.probes.demo.domains import Document
from moescope.probes.demo.sources import digest

TOKENS_A_DOMAIN_CAP = 1_200_000

Tokens = NDArray[np.int64]
Documents = dict[str, list[Tokens]]


def tokenize_documents(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, *, cap: int = TOKENS_A_DOMAIN_CAP
) -> Documents:
    """``<bos>`` document ``<eos>`` in token ids by domain, documents in a fixed pseudo-random order.

    A domain ends with the document that passes `cap` tokens: more than training reads would be tokenized in
    vain.
    """
    tokens: Documents = {}
    counts: dict[str, int] = {}
    for document in sorted(documents, key=lambda d: digest(d.source)):
        if counts.get(document.domain, 0) >= cap:
            continue
        ids = tokenizer(document.text, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
        tokens.setdefault(document.domain, []).append(np.asarray(ids, dtype=np.int64))
        counts[document.domain] = counts.get(document.domain, 0) + len(ids)
    return tokens


class RowSource:
    """Rows of `length` tokens that start with ``<bos>`` and hold one domain each, domains in equal shares.

    A domain's documents are shuffled anew each epoch and laid end to end; a row is the next stretch of that
    stream, so no position is padding. Ten rows in a row hold the ten domains, in an order drawn anew each
    time.
    """

    def __init__(self, documents: Documents, *, seed: int, length: int, bos: int) -> None:
        self.documents = documents
        self.domains = sorted(documents)
        self.seed, self.length, self.bos = seed, length, bos
        sizes = {domain: sum(map(len, documents[domain])) for domain in self.domains}
        self.rows_an_epoch = {domain: (size - 1) // (length - 1) for domain, size in sizes.items()}
        for domain, n_rows in self.rows_an_epoch.items():
            if n_rows < 1:
                raise ValueError(f"{domain} has {sizes[domain]} tokens: fewer than one row of {length}")
        self._stream = lru_cache(maxsize=2 * len(self.domains))(self._shuffled_stream)

    def _shuffled_stream(self, domain: str, epoch: int) -> Tokens:
        generator = np.random.default_rng([self.seed, self.domains.index(domain), epoch])
        order = generator.permutation(len(self.documents[domain]))
        return np.concatenate([self.documents[domain][i] for i in order])

    def row(self, index: int) -> Tokens:
        """Row number `index`, int64 of shape ``[length]``."""
        turn, place = divmod(index, len(self.domains))
        order = np.random.default_rng([self.seed, turn]).permutation(len(self.domains))
        domain = self.domains[order[place]]
        epoch, row = divmod(turn, self.rows_an_epoch[domain])
        start = row * (self.length - 1)
        stretch = self._stream(domain, epoch)[start : start + self.length]
        if stretch[0] == self.bos:
            return stretch
        return np.concatenate([np.asarray([self.bos], dtype=np.int64), stretch[:-1]])

    def batch(self, step: int, *, rows: int) -> Tokens:
        """The rows of training step `step` (from 0), int64 of shape ``[rows, length]``."""
        return np.stack([self.row(step * rows + i) for i in range(rows)])
