"""The shipped weights are small, rounded, better than the baselines, and have no dead expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

from moescope.probes.demo import CURVES_PATH, DOMAINS, EVIDENCE_PATH, MODEL_DIR
from moescope.probes.demo.heldout import Reading, load_passages, mean_nll_nats, read_passages
from moescope.probes.demo.specialization import passage_counts

PASSAGES_A_DOMAIN = 5


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def readings(model: Qwen3MoeForCausalLM) -> list[Reading]:
    passages = load_passages(AutoTokenizer.from_pretrained(MODEL_DIR))
    subset = [p for d in DOMAINS for p in [p for p in passages if p.label == d][:PASSAGES_A_DOMAIN]]
    return read_passages(model, subset)


@pytest.fixture(scope="module")
def evidence() -> dict[str, Any]:
    return dict(json.loads(EVIDENCE_PATH.read_text(encoding="utf-8")))


def test_weights_file_is_at_most_16_million_bytes() -> None:
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 16_000_000


def test_default_load_is_float32_holding_bfloat16_values(model: Qwen3MoeForCausalLM) -> None:
    stored = load_file(MODEL_DIR / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.bfloat16().float()), name


def test_every_domain_is_below_both_baselines(readings: list[Reading], evidence: dict[str, Any]) -> None:
    nll = mean_nll_nats(readings)
    for domain in DOMAINS:
        quoted = evidence["nll"][domain]
        assert nll[domain] < quoted["bigram_nats"] < quoted["unigram_nats"], domain


def test_quoted_nll_is_that_of_the_shipped_weights(
    readings: list[Reading], evidence: dict[str, Any], model: Qwen3MoeForCausalLM
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    passages = [p for p in load_passages(tokenizer) if p.label == "bible"]
    assert mean_nll_nats(read_passages(model, passages))["bible"] == pytest.approx(
        evidence["nll"]["bible"]["nll_nats"], abs=1e-3
    )


def test_no_expert_is_dead(readings: list[Reading]) -> None:
    counts = passage_counts(readings, n_experts=16).sum(axis=0)
    assert counts.shape == (6, 16)
    assert counts.min() > 0


def test_experts_know_the_domain_better_than_permuted_labels(evidence: dict[str, Any]) -> None:
    for layer in evidence["layers"]:
        assert layer["information_bits"] > layer["control_p99_bits"]
        assert np.isfinite(layer["control_mean_bits"])


def test_card_quotes_the_evidence(evidence: dict[str, Any]) -> None:
    card = Path(MODEL_DIR / "README.md").read_text(encoding="utf-8")
    for label, entry in evidence["nll"].items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {label} ") and "**" in line)
        for name in ("nll_nats", "unigram_nats", "bigram_nats", "own_bigram_nats"):
            assert f"{entry[name]:.3f}" in row


def test_curves_end_at_the_fixed_number_of_steps(evidence: dict[str, Any]) -> None:
    curves = [json.loads(line) for line in CURVES_PATH.read_text(encoding="utf-8").splitlines()]
    steps = [point["step"] for point in curves]
    assert steps == sorted(set(steps))
    assert steps[-1] == evidence["training"]["steps"]
    assert "heldout" in curves[-1]
