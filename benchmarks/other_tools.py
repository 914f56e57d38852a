"""Routing recorded by other means, over the same batches: each gives how many decisions it kept.

A decision is one slot of one unmasked token at one router. What a tool keeps beyond these (padding) is not counted for it,
and what it keeps of less (counts of a window) is counted as it is.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moescope.probes.forward import DeviceBatch, logits_of
from moescope.probes.live_model import LiveModel

Method = Callable[[Iterable[DeviceBatch], Path], int]


def output_router_logits(model: LiveModel) -> Method:
    """transformers' own `output_router_logits`, ids and weights by top-k, one .npy file a batch."""
    config = model.module.config

    def run(batches: Iterable[DeviceBatch], folder: Path) -> int:
        kept = 0
        for number, batch in enumerate(batches):
            with torch.no_grad():
                output = model.module(
                    input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False, output_router_logits=True
                )
            # Every row is there, padding too: the mask has to be put back by hand.
            real = batch.mask.flatten()
            logits = torch.stack([layer[real] for layer in output.router_logits]).float()
            weights, ids = logits.softmax(-1).topk(config.num_experts_per_tok, dim=-1)
            kept += ids.numel()
            _save(folder / f"{number}.npy", ids, weights)
        return kept

    return run


def plain_hooks(model: LiveModel) -> Method:
    """A forward pre-hook on every experts module, one .npy file a batch."""

    def run(batches: Iterable[DeviceBatch], folder: Path) -> int:
        kept, seen = 0, []
        paths = [s.experts_path for s in model.anatomy.moe]
        handles = [
            model.module.get_submodule(path).register_forward_pre_hook(lambda _m, given: seen.append(given[1:3]))
            for path in paths
        ]
        try:
            for number, batch in enumerate(batches):
                seen.clear()
                with torch.no_grad():
                    logits_of(model, batch)
                real = batch.mask.flatten()
                ids, weights = (torch.stack([pair[i][real] for pair in seen]) for i in (0, 1))
                kept += ids.numel()
                _save(folder / f"{number}.npy", ids, weights)
        finally:
            for handle in handles:
                handle.remove()
        return kept

    return run


def nnsight_trace(model: LiveModel) -> Method:
    """An nnsight trace that saves what the experts were given, one .npy file a batch."""
    import nnsight

    wrapper = nnsight.NNsight(model.module)

    def run(batches: Iterable[DeviceBatch], folder: Path) -> int:
        kept = 0
        for number, batch in enumerate(batches):
            chosen, weights = [], []
            with torch.no_grad(), wrapper.trace(batch.ids, attention_mask=batch.mask.long(), use_cache=False):
                for layer in wrapper.model.layers:
                    given = layer.mlp.experts.inputs[0]
                    chosen.append(given[1])
                    weights.append(given[2])
                chosen = torch.stack(chosen).save()
                weights = torch.stack(weights).save()
            real = batch.mask.flatten()
            kept += chosen[:, real].numel()
            _save(folder / f"{number}.npy", chosen[:, real], weights[:, real])
        return kept

    return run


def transformer_lens(model: LiveModel) -> Method:
    """TransformerLens' `run_with_cache` on a bridge of the same weights: it shows router logits, not the decision."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    module = copy.deepcopy(model.module)
    module.config.architectures = [type(module).__name__]
    words = {"<unk>": 0, "<eos>": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="<eos>",
        bos_token="<eos>",
        pad_token="<eos>",
        add_bos_token=True,
        name_or_path="",
    )
    bridge = TransformerBridge.boot_transformers("bridge", hf_model=module, tokenizer=tokenizer, device="cpu")
    names = [f"blocks.{layer}.mlp.gate.hook_out" for layer in range(module.config.num_hidden_layers)]

    def run(batches: Iterable[DeviceBatch], folder: Path) -> int:
        kept = 0
        for number, batch in enumerate(batches):
            with torch.no_grad():
                _, cache = bridge.run_with_cache(
                    batch.ids, attention_mask=batch.mask.long(), names_filter=names, use_cache=False
                )
            real = batch.mask.flatten()
            logits = torch.stack([cache[name].reshape(-1, cache[name].shape[-1])[real] for name in names])
            weights, ids = logits.softmax(-1, dtype=torch.float).topk(module.config.num_experts_per_tok, dim=-1)
            kept += ids.numel()
            _save(folder / f"{number}.npy", ids, weights)
        return kept

    return run


def moewatch(model: LiveModel) -> Method:
    """moewatch at its highest fidelity, one step a batch; keeps counts of a rolling window in memory."""
    from moewatch import MoEWatch, WatchConfig
    from moewatch.config import OutputMode

    def run(batches: Iterable[DeviceBatch], folder: Path) -> int:
        watcher = MoEWatch(model.module, WatchConfig(output=OutputMode.SILENT, sample_every=1))
        watcher.start()
        collector = watcher._collector
        try:
            for number, batch in enumerate(batches):
                with torch.no_grad():
                    logits_of(model, batch)
                watcher.step(number)
            return int(sum(int(s.expert_counts.sum()) for s in collector.get_all_stats().values()))
        finally:
            watcher.stop()

    return run


def plumb(model: LiveModel) -> Method:
    """plumb-moe's hooks and counter with their defaults; they keep counts of a rolling window in memory.

    Its `Session` would do, but for the package `numa_topology`, which it imports and does not depend on.
    """
    from plumb.counter import ActivationCounter
    from plumb.hook import ProfilingHooks, _flush_drain

    def run(batches: Iterable[DeviceBatch], folder: Path) -> int:
        counter = ActivationCounter()
        hooks = ProfilingHooks(counter)
        hooks.attach(model.module, top_k=int(model.anatomy.top_k or 1))
        try:
            for batch in batches:
                with torch.no_grad():
                    logits_of(model, batch)
            _flush_drain()
            return sum(counter.snapshot().values())
        finally:
            hooks.detach()

    return run


# name → (module that must be installed, what makes the method)
OTHERS: dict[str, tuple[str | None, Callable[[LiveModel], Method]]] = {
    "hooks to .npy": (None, plain_hooks),
    "output_router_logits to .npy": (None, output_router_logits),
    "nnsight trace to .npy": ("nnsight", nnsight_trace),
    "TransformerLens run_with_cache to .npy": ("transformer_lens", transformer_lens),
    "moewatch (counts)": ("moewatch", moewatch),
    "plumb-moe (counts)": ("plumb", plumb),
}


def available(model: LiveModel) -> tuple[dict[str, Method], dict[str, str]]:
    """Methods that can run here, and why the others cannot."""
    found: dict[str, Method] = {}
    absent: dict[str, str] = {}
    for name, (library, make) in OTHERS.items():
        if library and importlib.util.find_spec(library) is None:
            absent[name] = f"{library} is not installed"
            continue
        try:
            found[name] = make(model)
        except Exception as error:  # noqa: BLE001  another tool may fail in any way; the table says how
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return found, absent


def _save(path: Path, ids: Any, weights: Any) -> None:
    with path.open("wb") as file:
        np.save(file, ids.cpu().numpy().astype(np.uint16))
        np.save(file, weights.float().cpu().numpy())
