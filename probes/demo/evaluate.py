"""Measures the shipped demo model on the shipped corpus and writes the evidence and the model card.

    python -m moescope.probes.demo.evaluate --cache FOLDER

Everything is measured on the weights as shipped, rounded to bfloat16 and loaded the default way. The cache
folder is needed for the training text, on which the baselines are fitted, and for the last checkpoint's wall
time.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeForCausalLM

from moescope.probes.demo import CORPUS_PATH, CURVES_PATH, EVIDENCE_PATH, MODEL_DIR
from moescope.probes.demo.baselines import baseline_nll_nats
from moescope.probes.demo.card import write_card
from moescope.probes.demo.heldout import Passage, Reading, load_passages, mean_nll_nats, read_passages
from moescope.probes.demo.packages import DEFAULT_CACHE
from moescope.probes.demo.rows import Documents, RowSource, tokenize_documents
from moescope.probes.demo.sources import load_documents
from moescope.probes.demo.specialization import layer_use
from moescope.probes.demo.train import TrainConfig

logger = logging.getLogger(__name__)


def nll_evidence(
    readings: list[Reading], passages: list[Passage], documents: Documents, *, n_tokens: int
) -> dict[str, dict[str, Any]]:
    """Every number of the card's NLL table, by label and for ``all``."""
    model = mean_nll_nats(readings)
    baselines = baseline_nll_nats(documents, passages, n_tokens=n_tokens)
    table: dict[str, dict[str, Any]] = {}
    for label in model:
        chosen = [reading for reading in readings if label in (reading.label, "all")]
        nll_bits = sum(float(reading.nll_nats.sum()) for reading in chosen) / math.log(2)
        table[label] = {
            "passages": len(chosen),
            "tokens": sum(len(reading.nll_nats) for reading in chosen),
            "nll_nats": model[label],
            "bits_per_byte": nll_bits / sum(reading.n_bytes for reading in chosen),
            "unigram_nats": baselines["unigram"][label],
            "bigram_nats": baselines["bigram"][label],
            "own_bigram_nats": baselines["own_bigram"][label],
        }
    return table


def text_evidence(documents: Documents, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How much text training drew on and how often it went through it, by domain."""
    rows = RowSource(documents, seed=config.seed, length=config.row_length, bos=tokenizer.bos_token_id)
    rows_a_domain = config.steps * config.rows_a_step / len(rows.domains)
    return {
        domain: {
            "documents": len(documents[domain]),
            "tokens": sum(map(len, documents[domain])),
            "epochs": rows_a_domain / rows.rows_an_epoch[domain],
        }
        for domain in rows.domains
    }


def parameter_counts(model: Qwen3MoeForCausalLM) -> dict[str, int]:
    """All parameters (tied embeddings once), and those that take part in one token's forward pass."""
    total = sum(p.numel() for p in model.parameters())
    in_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    config = model.config
    return {
        "total": total,
        "active": total - in_experts + in_experts * config.num_experts_per_tok // config.num_experts,
    }


def corpus_licenses(path: Path = CORPUS_PATH) -> dict[str, dict[str, int]]:
    """How many passages of each label stand under each licence."""
    counts: dict[str, Counter[str]] = {}
    with path.open(encoding="utf-8") as file:
        for entry in map(json.loads, file):
            counts.setdefault(entry["label"], Counter())[entry["license"]] += 1
    return {label: dict(sorted(counts[label].items())) for label in sorted(counts)}


def gather_evidence(cache: Path) -> dict[str, Any]:
    """Measure everything the card says."""
    config = TrainConfig()
    torch.set_num_threads(config.threads)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = Qwen3MoeForCausalLM.from_pretrained(MODEL_DIR)
    passages = load_passages(tokenizer)
    readings = read_passages(model, passages)
    documents = tokenize_documents(load_documents(cache / "train.jsonl"), tokenizer)
    progress = torch.load(cache / "checkpoint.pt", weights_only=True)["progress"]
    return {
        "architecture": json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8")),
        "training": asdict(config) | {"tokens_seen": config.steps * config.rows_a_step * config.row_length},
        "wall_minutes": progress["wall_seconds"] / 60,
        "parameters": parameter_counts(model),
        "weight_bytes": (MODEL_DIR / "model.safetensors").stat().st_size,
        "packages": json.loads((cache / "packages.json").read_text(encoding="utf-8")),
        "text": text_evidence(documents, config, tokenizer),
        "corpus_licenses": corpus_licenses(),
        "nll": nll_evidence(readings, passages, documents, n_tokens=len(tokenizer)),
        "layers": [asdict(use) for use in layer_use(readings, n_experts=model.config.num_experts)],
        "curves": [json.loads(line) for line in CURVES_PATH.read_text(encoding="utf-8").splitlines()],
    }


def main() -> None:
    """Command line: measure, and write the evidence file and the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder with train.jsonl and the checkpoint")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    evidence = gather_evidence(arguments.cache)
    write_card(evidence, MODEL_DIR / "README.md")
    kept = {name: evidence[name] for name in ("nll", "layers", "text", "packages", "training", "wall_minutes")}
    EVIDENCE_PATH.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    logger.info("%s", json.dumps(evidence["nll"]["all"]))


if __name__ == "__main__":
    main()
