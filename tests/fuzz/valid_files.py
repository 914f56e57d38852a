"""Files as they should be, one of each kind that is read: what the hostile ones are made from."""

from __future__ import annotations

import base64
import io
import pickle
from collections import Counter, OrderedDict, defaultdict
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

E, K, LAYERS, TOKENS = 8, 3, 3, 6


@cache
def decisions() -> np.ndarray[Any, Any]:
    """[token, layer, k] Different experts in every slot."""
    random = np.random.default_rng(0)
    return np.argsort(random.random((TOKENS, LAYERS, E)), axis=2)[:, :, :K]


def records() -> list[dict[str, Any]]:
    """Records of a corpus."""
    return [
        {"text": "Am Anfang schuf Gott Himmel und Erde.", "label": "german", "source": "a book", "year": 1534},
        {"text": "def add(a, b):\n    return a + b\n", "label": "python", "tags": ["code", {"deep": 1.5}]},
        {"token_ids": [5, 9, 300, 7], "label": None},
    ]


def corpus_table() -> pa.Table:
    """A corpus as a table."""
    return pa.table({"text": ["one two", "three four", "five"], "label": ["a", "b", None], "year": [1, 2, 3]})


def corpus_rows() -> list[list[str]]:
    """A corpus as lines of cells."""
    return [["text", "label", "year"], ["one two", "a", "1"], ['three, "four"', "b", "2"], ["five\nsix", "", "3"]]


def trace_table() -> pa.Table:
    """A trace in the neutral form."""
    random = np.random.default_rng(1)
    rows = [(t // 3, t % 3, layer) for t in range(TOKENS) for layer in range(LAYERS)]
    return pa.table(
        {
            "sequence_id": [r[0] for r in rows],
            "position": [r[1] for r in rows],
            "layer": [r[2] for r in rows],
            "experts": [decisions()[t, layer].tolist() for t in range(TOKENS) for layer in range(LAYERS)],
            "weights": random.random((len(rows), K)).astype(np.float32).tolist(),
            "label": ["a" if r[0] else "b" for r in rows],
            "phase": ["prefill"] * len(rows),
            "token_id": [100 + r[0] * 3 + r[1] for r in rows],
            "logits": random.random((len(rows), E)).astype(np.float32).tolist(),
        }
    )


def trace_rows() -> list[list[str]]:
    """The same as lines of cells, without some columns."""
    table = trace_table().select(["sequence_id", "position", "layer", "experts", "phase"])
    return [table.column_names, *[[str(value) for value in row.values()] for row in table.to_pylist()]]


def llama_rows(layout: int) -> list[list[str]]:
    """A trace of llama.cpp, in one of its four layouts."""
    ids = decisions()
    each = [(t, layer, slot) for t in range(TOKENS) for layer in range(LAYERS) for slot in range(K)]
    if layout == 0:
        head = ["turn", "phase", "step", "layer", "slot", "expert", "weight", "residency"]
        return [["# route_trace v1"], ["# model=/a b.gguf n_layer=3 n_expert=8 n_expert_used=3"], head] + [
            ["0", str(int(t > 3)), str(t), str(layer), str(s), str(ids[t, layer, s]), "0.25", "1"]
            for t, layer, s in each
        ]
    if layout == 1:
        return [["phase", "token", "layer", "rank", "expert"]] + [
            ["prefill" if t < 4 else "decode", str(t), str(layer), str(s), str(ids[t, layer, s])]
            for t, layer, s in each
        ]
    if layout == 2:
        return [[str(t - 4), str(layer), *map(str, ids[t, layer])] for t in range(TOKENS) for layer in range(LAYERS)]
    return [["layer", "expert"], *[[str(layer), str(ids[t, layer, s])] for t, layer, s in each]]


def vllm_answers() -> list[dict[str, Any]]:
    """Responses of vLLM's server: nested lists, and an .npy file in base64."""
    out = io.BytesIO()
    np.save(out, decisions()[4:].astype(np.int16))
    packed = base64.b64encode(out.getvalue()).decode()
    return [
        {"prompt_routed_experts": decisions()[:4].tolist(), "prompt_token_ids": [1, 2, 3, 4],
         "choices": [{"routed_experts": packed, "token_ids": [5, 6]}, {"routed_experts": packed}]},
        {"choices": [{"routed_experts": decisions().tolist(), "prompt_token_ids": [1, 2], "token_ids": [3, 4, 5, 6]}]},
    ]  # fmt: skip


def olmoe_lines() -> list[dict[str, Any]]:
    """Lines of the OLMoE analysis."""
    return [
        {
            "exp_ids": decisions().transpose(0, 2, 1).tolist(),
            "input_ids": list(range(TOKENS)),
            "predicted_token_ids": [1],
        }
    ]


def olmoe_values() -> list[Any]:
    """What the OLMoE analysis pickles: counters, tables of tokens, ids, scores."""
    counters = [Counter(decisions()[:, layer].ravel().tolist()) for layer in range(3)]
    tables = [defaultdict(Counter, {1: Counter({5: 2}), 3: Counter({6: 1})}) for _ in range(2)]
    scores = [np.random.default_rng(layer).random((TOKENS, E)).astype(np.float32) for layer in range(2)]
    return [counters, tables, {"exp_ids": decisions().transpose(0, 2, 1), "input_ids": list(range(TOKENS))}, scores,
            OrderedDict(a=1), decisions(), [np.float64(1.5), b"x", {1, 2}, frozenset({3}), (4,), "\ud800"]]  # fmt: skip


def pickled(value: Any, protocol: int) -> bytes:
    """A pickle of it."""
    return pickle.dumps(value, protocol)


def score_arrays() -> dict[str, np.ndarray[Any, Any]]:
    """Router scores as transformers returns them."""
    scores = np.random.default_rng(3).normal(size=(LAYERS, TOKENS, E)).astype(np.float32)
    return {"router_logits": scores, "attention_mask": np.ones((2, 3), int), "input_ids": np.arange(6).reshape(2, 3)}


def neutral_arrays() -> dict[str, np.ndarray[Any, Any]]:
    """The neutral form as arrays."""
    table = trace_table()
    found = {
        name: np.array(table.column(name).to_pylist()) for name in ("sequence_id", "position", "layer", "token_id")
    }
    return {
        **found,
        "experts": np.array(table.column("experts").to_pylist()),
        "weights": np.array(table.column("weights").to_pylist()),
    }


@cache
def sglang_dump(*, counted: bool) -> bytes:
    """A dump of SGLang's recorder, written by torch."""
    import torch

    if counted:
        dump: Any = {"logical_count": torch.tensor(np.arange(LAYERS * E).reshape(1, LAYERS, E))}
    else:
        ids = np.full((LAYERS, 4, 8), -1)
        ids[:, :, :K] = decisions()[:4].transpose(1, 0, 2)
        record = {
            "forward_pass_id": 1, "rank": 0, "input_ids": [1, 2, 3, 4], "positions": [0, 1, 2, 3], "extend_seq_lens": [4],
            "forward_mode": 1, "topk_ids_of_layer": torch.tensor(ids, dtype=torch.int32),
            "global_physical_count": torch.zeros((LAYERS, E), dtype=torch.int32),
        }  # fmt: skip
        dump = {"records": [record], "last_physical_to_logical_map": torch.tensor(np.tile(np.arange(E), (LAYERS, 1)))}
    out = io.BytesIO()
    torch.save(dump, out)
    return out.getvalue()


# One edit of every kind, in words.
EDITS = (
    "ablate layer=3 experts=5,9 how=route_around positions=generated", "ablate layer=0-2 experts=1 how=mean",
    "force layer=1 experts=2 weight=0.5", "bias experts=3 value=-2.5", "scale experts=0-3 factor=2", "keep layer=0 experts=0-7",
    "set_routing run=base weights=own", "mix_routing reference=0.25,0.75 share=0.3", "top_k k=3", "rank_routing ranks=2,3",
    "top_p p=0.7 renormalise=false", "random_routing seed=4", "swap_experts first=2 second=5", "fake_quant experts=1 bits=4",
    "add layer=2 vector=0.5,1,-1 strength=3", "project_out vector=1,0,0 site=hook_mlp_out", "clamp vector=0,1 low=-1 high=none",
    "set_channel channels=1,2 values=0,1 above=3", "mask_head heads=0-2 how=uniform", "skip part=mlp layer=5", "patch run=base",
    "splice sae=a keep_error=true", "latents sae=a latents=4,5 how=scale values=0.5 only_active=true",
    "descend sae=a target=0,1 steps=3 rate=0.1 positions=0:10", "descend sae=a weights=1,2 bias=0.1 positions=token:13",
)  # fmt: skip

# A file of thresholds and a file of options, as data; and YAML that grows, names code or holds itself.
THRESHOLDS: dict[str, Any] = {
    "rules": [
        {"analysis": "nll", "metric": "NLL", "max": 3.5},
        {"analysis": "load", "metric": "CV", "layer": 1, "max": 0.8, "parameters": {"by": "layer"}},
    ]
}
OPTIONS: dict[str, Any] = {
    "batch-size": 4,
    "max_length": 128,
    "probe": ["tokens", "routing"],
    "store": "a.duckdb",
    "profile": {"seed": 3},
}
YAML_TRAPS = (
    b"a: &a [1]\n" + b"".join(b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % (i + 1, i + 1, *[i] * 8) for i in range(97, 117)),
    b"a: !!python/object/apply:os.system ['touch owned']\n", b"a: &a [*a]\n", b"? [1, 2]\n: 3\n", b"a: 1\na: 2\n",
    b"- " * 3000 + b"1\n", b"{" * 3000, b"a: 2001-99-99\n", b"a: !!binary x\n", b"--- 1\n--- 2\n",
    b"%YAML 9.9\n--- a\n", b"a: |\n" + b" x\n" * 500_000,
    b"a: 0o9\n", b"a: 1:60:60:60\n", b"<<: 5\n", b"<<: *x\n", b"\t- a\n", b"a: " + b"9" * 5000 + b"\n", b"a: ~\n", b"!!set {a, b}\n", b"",
)  # fmt: skip
