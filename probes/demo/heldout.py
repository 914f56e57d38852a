"""Runs the demo model over the shipped corpus: NLL of every token and the experts it chose."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, Qwen3MoeForCausalLM

from moescope.probes.demo import CORPUS_PATH


@dataclass(frozen=True)
class Passage:
    """One held-out passage: its label, its size in bytes and its token ids with ``<bos>`` in front."""

    label: str
    n_bytes: int
    ids: NDArray[np.int64]


@dataclass(frozen=True)
class Reading:
    """What the model did on one passage of n tokens after ``<bos>``.

    `nll_nats` is ``[n]``; `experts` is ``[layers, n + 1, top_k]``, the ``<bos>`` position first.
    """

    label: str
    n_bytes: int
    nll_nats: NDArray[np.float64]
    experts: NDArray[np.int64]


def load_passages(tokenizer: PreTrainedTokenizerBase, path: Path = CORPUS_PATH) -> list[Passage]:
    """Every passage of the corpus file, tokenized."""
    passages = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            ids = np.asarray(tokenizer(entry["text"])["input_ids"], dtype=np.int64)
            passages.append(Passage(entry["label"], len(entry["text"].encode("utf-8")), ids))
    return passages


@torch.no_grad()
def read_passages(model: Qwen3MoeForCausalLM, passages: list[Passage]) -> list[Reading]:
    """One forward pass for each passage by itself: no padding, so nothing to mask."""
    readings = []
    was_training = model.training
    model.train(False)
    for passage in passages:
        ids = torch.from_numpy(passage.ids)
        output = model(input_ids=ids[None], output_router_logits=True, use_cache=False)
        log_probabilities = output.logits[0, :-1].double().log_softmax(dim=-1)
        nll_nats = -log_probabilities.gather(1, ids[1:, None])[:, 0].numpy()
        top_k = model.config.num_experts_per_tok
        experts = torch.stack([logits.topk(top_k, dim=-1).indices for logits in output.router_logits]).numpy()
        readings.append(Reading(passage.label, passage.n_bytes, nll_nats, experts))
    model.train(was_training)
    return readings


def mean_nll_nats(readings: list[Reading]) -> dict[str, float]:
    """Mean NLL per token by label, in nats; ``all`` is the mean over every token."""
    means = {
        label: float(np.concatenate([r.nll_nats for r in readings if r.label == label]).mean())
        for label in sorted({r.label for r in readings})
    }
    return means | {"all": float(np.concatenate([r.nll_nats for r in readings]).mean())}
