"""The MLP that students imitate: what it is given and gives on a run's own tokens, and what it gives for any other input."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import nn

from moescope.core.errors import InputError, RunError
from moescope.core.sites import Site
from moescope.probes.anatomy import Sublayer
from moescope.probes.batches import Batch, Sequence
from moescope.probes.corpus import Document
from moescope.probes.forward import to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.progress import RunProgress
from moescope.probes.stopping import run_until
from moescope.probes.taps import tapped
from moescope.store.run import Run

_SEQUENCES_SQL = """
    SELECT s.sequence_id, s.document_id, list(t.token_id ORDER BY t.token) AS ids
    FROM tokens t
    JOIN sequences s ON s.run_id = t.run_id AND s.sequence_id = t.sequence_id
    WHERE t.run_id = $run AND t.phase = 'prefill'
    GROUP BY s.sequence_id, s.document_id
    ORDER BY s.sequence_id
"""
_ROWS = 8
_CHUNK = 1024


@dataclass(frozen=True)
class Pairs:
    """What an MLP is given and gives, token by token.

    Attributes:
        x, y: [vector, component] in float32.
        document: [vector] document of each token.
        other: [vector, component] of the same tokens at another site; None where none was asked for.
    """

    x: Float[torch.Tensor, "vector component"]
    y: Float[torch.Tensor, "vector component"]
    document: NDArray[np.int64]
    other: Float[torch.Tensor, "vector component"] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def at(self, chosen: NDArray[np.bool_]) -> Pairs:
        """Those of some tokens."""
        mask = torch.from_numpy(chosen)
        other = None if self.other is None else self.other[mask]
        return Pairs(self.x[mask], self.y[mask], self.document[chosen], other)


class Teacher:
    """One MLP of a model, dense or mixture of experts, as a function of its input.

    Args:
        model: the live model.
        layer, block: which of its MLPs.

    Raises:
        InputError: no such MLP.

    Example:
        >>> import moescope as ms
        >>> Teacher(ms.load("demo"), 5, "mlp").parameters > 0
        True
    """

    def __init__(self, model: LiveModel, layer: int, block: str = "mlp") -> None:
        known = [s for s in model.anatomy.sublayers if s.kind in ("dense", "moe")]
        found = next((s for s in known if (s.layer, s.block) == (layer, block)), None)
        if found is None:
            places = sorted({f"{s.layer} {s.block}" for s in known}, key=lambda name: (len(name), name))
            raise InputError(
                f"{model.name} has no MLP {block!r} in layer {layer}",
                expected=f"one of {', '.join(places[:3])} … {places[-1]}" if places else "a model with MLPs",
            )
        self.model = model
        self.sublayer: Sublayer = found
        self.module: nn.Module = model.module.get_submodule(found.path)
        self.parameters = _active_parameters(self.module, found, model.module)

    @torch.no_grad()
    def __call__(self, x: Float[torch.Tensor, "vector component"]) -> Float[torch.Tensor, "vector component"]:
        """What the MLP gives for these inputs, each on its own, in float32 on the CPU.

        Raises:
            InputError: the MLP of this family needs more than its input.
        """
        parts = []
        for start in range(0, len(x), _CHUNK):
            given = x[start : start + _CHUNK].to(self.model.device, self.model.dtype)
            try:
                out = _first(self.module(given[None]))
            except (TypeError, RuntimeError) as refused:
                raise InputError(
                    f"the MLP {self.sublayer.path} cannot be asked for outputs of other inputs",
                    found=str(refused).splitlines()[0],
                    fix='leave the Gaussian inputs out: inputs=("real",)',
                ) from refused
            parts.append(out.reshape(len(given), -1).float().cpu())
        return torch.cat(parts)

    def pairs(
        self, run: Run, *, vectors: int, skip: int = 4, also: Site | None = None, seed: int = 0, progress: bool = True
    ) -> Pairs:
        """Inputs and outputs on a run's own sequences, whole documents in an order drawn by `seed`.

        Args:
            run: with its tokens.
            vectors: about how many; all of a batch are kept, then as many are cut.
            skip: leave out so many positions at the start of each sequence (massive activations stand there).
            also: another site, whose vectors of the same tokens are wanted too.
            seed: of the order of sequences.
            progress: show a bar.

        Raises:
            InputError: a run without tokens, or with too few of them.
            RunError: the MLP was not passed, or gave numbers that are not finite.
        """
        rows = run.store.fetch(_SEQUENCES_SQL, {"run": run.run_id})
        if not rows:
            raise InputError(
                f"run {run.name!r} has no tokens", fix='record it with the probe "tokens", or pass a corpus'
            )
        order = np.random.default_rng(seed).permutation(len(rows))
        parts: list[tuple[torch.Tensor, ...]] = []
        documents: list[NDArray[np.int64]] = []
        found, started = 0, time.perf_counter()
        with RunProgress("MLP inputs", vectors, shown=progress) as bar:
            for start in range(0, len(order), _ROWS):
                chosen = [rows[i] for i in order[start : start + _ROWS] if len(rows[i][2]) > skip]
                if not chosen:
                    continue
                parts.append(self._batch([ids for _, _, ids in chosen], skip, also))
                documents += [np.full(len(ids) - skip, document) for _, document, ids in chosen]
                found += len(parts[-1][0])
                bar.advance_to(min(found, vectors), found, time.perf_counter() - started)
                if found >= vectors:
                    break
        if found < 64:
            raise InputError(f"run {run.name!r} has too few tokens", expected="at least 64 vectors", found=str(found))
        tensors = [torch.cat(kept)[:vectors] for kept in zip(*parts, strict=True)]
        if not all(bool(t.isfinite().all()) for t in tensors):
            raise RunError(f"{self.sublayer.path} gave numbers that are not finite", fix="load the model in float32")
        return Pairs(
            tensors[0], tensors[1], np.concatenate(documents)[:vectors], tensors[2] if also is not None else None
        )

    @torch.no_grad()
    def _batch(self, sequences: list[list[int]], skip: int, also: Site | None) -> tuple[torch.Tensor, ...]:
        """[vector, component] inputs, outputs and those at the other site, of one padded batch."""
        blank = Document("", None, "")
        rows = [Sequence(n, n, blank, 0, "", np.array(ids, np.int64)) for n, ids in enumerate(sequences)]
        on_device = to_device(Batch(0, tuple(rows), 0), self.model)
        positions = torch.arange(on_device.ids.shape[1], device=on_device.mask.device)
        wanted = (on_device.mask & (positions >= skip)).cpu()
        seen: dict[str, torch.Tensor] = {}
        with self._watched(seen, also):
            run_until(self.model, on_device, max(self.sublayer.layer, 0 if also is None else also.layer))
        names = ["x", "y", *(["other"] if also is not None else [])]
        if missing := [name for name in names if name not in seen]:
            raise RunError(
                f"a pass did not give {missing[0]} of {self.sublayer.path}", found="a module that was not called"
            )
        return tuple(seen[name].reshape(*wanted.shape, -1)[wanted] for name in names)

    @contextmanager
    def _watched(self, seen: dict[str, torch.Tensor], also: Site | None) -> Iterator[None]:
        """Keep what passes."""

        def keep(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            seen["x"] = (inputs[0] if inputs else next(iter(named.values()))).float().cpu()
            seen["y"] = _first(output).float().cpu()

        def receive(_site: Site, tensors: dict[str, torch.Tensor]) -> None:
            seen["other"] = next(iter(tensors.values())).float().cpu()

        with ExitStack() as stack:
            stack.callback(self.module.register_forward_hook(keep, with_kwargs=True).remove)
            if also is not None:
                stack.enter_context(tapped(self.model.module, self.model.anatomy, [also], receive))
            yield


def _active_parameters(module: nn.Module, sublayer: Sublayer, model: nn.Module) -> int:
    """Parameters that work on one token: all of a dense MLP; of a mixture, its router, chosen and shared experts."""
    total = sum(p.numel() for p in module.parameters())
    if sublayer.kind != "moe" or not sublayer.n_experts or not sublayer.experts_path:
        return total
    experts = sum(p.numel() for p in model.get_submodule(sublayer.experts_path).parameters())
    return total - experts + round(experts * (sublayer.top_k or 0) / sublayer.n_experts)


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return tensor
