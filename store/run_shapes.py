"""What decides how large a run's records are: numbers of its corpus, its model and its plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RouterShape:
    """One router.

    Attributes:
        top_k: experts that a token takes.
        choices: experts that there are, null experts included.
        logits: whether the router's logits can be read.
        inside: whether the inside of its experts can be read.
        shared: whether it has shared experts, which are one row of `experts`.
    """

    top_k: int
    choices: int
    logits: bool = True
    inside: bool = True
    shared: bool = False


@dataclass(frozen=True)
class VectorShape:
    """Vectors kept at one site.

    Attributes:
        site: its name.
        width: components of a vector.
        itemsize: bytes of one.
        per_token: vectors of a sampled token: k inside experts.
        with_experts: whether the expert of each is noted.
    """

    site: str
    width: int
    itemsize: int
    per_token: int = 1
    with_experts: bool = False


@dataclass(frozen=True)
class RunShape:
    """What decides the size of a run's records.

    Attributes:
        tokens: unmasked tokens, generated ones included; `generated` those alone.
        sequences, batches, longest: of the plan, and the most tokens of a sequence.
        layers, d_model, vocabulary: of the model.
        routers: one for each sublayer with experts.
        distinct: token ids that occur, also as predictions; 0 without a tokenizer.
        labels, labels_a_batch: labels of the corpus, and how many a batch holds on average.
        text_bytes: UTF-8 bytes of texts, sources and metadata.
        vectors, sampled: sites at which vectors are kept, and how many tokens the sample takes.
        heads: query heads of each attention whose pattern is reduced.
        batches_a_chunk: batches that are recorded in the half minute that a transaction lasts at most; None for enough.

    Example:
        >>> RunShape(tokens=1000, sequences=4, batches=1, longest=250, layers=2, d_model=64, vocabulary=512).batch_tokens
        1000.0
    """

    tokens: int
    sequences: int
    batches: int
    longest: int
    layers: int
    d_model: int
    vocabulary: int
    routers: tuple[RouterShape, ...] = ()
    distinct: int = 0
    generated: int = 0
    labels: int = 1
    labels_a_batch: float = 1.0
    text_bytes: int = 0
    vectors: tuple[VectorShape, ...] = ()
    sampled: int = 0
    heads: tuple[int, ...] = ()
    batches_a_chunk: int | None = None

    @property
    def batch_tokens(self) -> float:
        """Tokens of a batch, on average."""
        return self.tokens / max(1, self.batches)
