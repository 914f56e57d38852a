"""How evenly the demo model's experts are used, and how much an expert's choice tells about the domain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.probes.demo.heldout import Reading

CONTROL_DRAWS = 200

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class LayerUse:
    """One layer's figures on the corpus; shares are of (token, slot) pairs, information is in bits."""

    layer: int
    min_share: float
    max_share: float
    n_unused: int
    information_bits: float
    control_mean_bits: float
    control_p99_bits: float


def passage_counts(readings: list[Reading], *, n_experts: int) -> Counts:
    """How often each passage chose each expert in each layer, ``[passages, layers, experts]``.

    The ``<bos>`` position is left out: it is the same in every passage.
    """
    return np.stack(
        [
            np.stack([np.bincount(layer[1:].ravel(), minlength=n_experts) for layer in reading.experts])
            for reading in readings
        ]
    )


def mutual_information_bits(joint: Counts) -> float:
    """The plug-in mutual information of rows and columns of a table of counts, in bits."""
    p = joint / joint.sum()
    independent = p.sum(axis=1, keepdims=True) * p.sum(axis=0, keepdims=True)
    seen = p > 0
    return float((p[seen] * np.log2(p[seen] / independent[seen])).sum())


def layer_use(readings: list[Reading], *, n_experts: int, draws: int = CONTROL_DRAWS, seed: int = 0) -> list[LayerUse]:
    """Load and specialization of every layer.

    Specialization is the mutual information between a (token, slot) pair's expert and its passage's label.
    The control permutes labels over whole passages `draws` times: what is left then is what passages of one
    domain would share by chance, token by token dependence within a passage included.
    """
    counts = passage_counts(readings, n_experts=n_experts)
    labels = np.asarray([reading.label for reading in readings])
    names = np.unique(labels)

    def information(layer: int, permuted: NDArray[np.str_]) -> float:
        return mutual_information_bits(np.stack([counts[permuted == name, layer].sum(axis=0) for name in names]))

    generator = np.random.default_rng(seed)
    permutations = [generator.permutation(labels) for _ in range(draws)]
    figures = []
    for layer in range(counts.shape[1]):
        total = counts[:, layer].sum(axis=0)
        share = total / total.sum()
        control = np.asarray([information(layer, permuted) for permuted in permutations])
        figures.append(
            LayerUse(
                layer=layer,
                min_share=float(share.min()),
                max_share=float(share.max()),
                n_unused=int((total == 0).sum()),
                information_bits=information(layer, labels),
                control_mean_bits=float(control.mean()),
                control_p99_bits=float(np.quantile(control, 0.99)),
            )
        )
    return figures
