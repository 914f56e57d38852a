"""`Anatomy`: what a model is made of, layer by layer; `find_anatomy` finds it by looking at the modules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import nn

from moescope.core.text import escaped

Kind = Literal["moe", "dense", "attention", "ssm"]


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of one transformer block.

    Attributes:
        layer: 0-based index of the block; in an encoder-decoder model the encoder's come first.
        block: its name in sites: `mlp` or `attn`, numbered from the second of a kind (`mlp.1`).
        stack: `decoder` or `encoder`.
        kind: `moe`, `dense`, `attention` or `ssm` (state-space, linear attention and other recurrent mixers).
        path: name of its module in the model.
        n_experts, top_k: routed experts and how many each token takes; None where there are none.
        n_shared, n_null: shared and null experts.
        d_expert: neurons of one expert, or of the dense MLP.
        router_path, experts_path: names of the modules that route and compute; None where there are none.
        logits_path: name of the module whose output holds the router's logits; None where none shows them.
        router_logits_index: which element of that output is the logits.
        reader: how the decision is read (`moescope.probes.decision_readers`).
        unreachable: why the inside of the experts cannot be read; None where it can.
        neurons: whether the neurons of the chosen experts can be read too.
        note: what a reader of the records must know about this router; None where there is nothing unusual.
    """

    layer: int
    block: str
    stack: str
    kind: Kind
    path: str
    n_experts: int | None = None
    top_k: int | None = None
    n_shared: int | None = None
    n_null: int | None = None
    d_expert: int | None = None
    router_path: str | None = None
    experts_path: str | None = None
    logits_path: str | None = None
    router_logits_index: int = 0
    reader: str = "experts"
    unreachable: str | None = None
    neurons: bool = False
    note: str | None = None

    @property
    def has_logits(self) -> bool:
        """Whether some module shows the router's logits."""
        return self.logits_path is not None

    @property
    def n_choices(self) -> int:
        """Routed and null experts: ids run from 0 to one less."""
        return (self.n_experts or 0) + (self.n_null or 0)


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of.

    Attributes:
        architecture: class name of the model.
        d_model, vocabulary, parameters: width, vocabulary size, number of parameters.
        context: longest sequence the model was made for; None where it does not say.
        no_stream: why this model has no residual stream of one vector a token; None where it has.
        block_paths: names of the transformer blocks' modules, in order.
        sublayers: every sublayer found, by layer.

    Example:
        >>> import moescope as ms
        >>> ms.load("demo").anatomy.moe_layers
        [0, 1, 2, 3, 4, 5]
    """

    architecture: str
    d_model: int
    vocabulary: int
    parameters: int
    context: int | None
    block_paths: tuple[str, ...]
    sublayers: tuple[Sublayer, ...] = field(repr=False)
    no_stream: str | None = None

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.block_paths)

    @property
    def moe(self) -> tuple[Sublayer, ...]:
        """Sublayers with a router."""
        return tuple(s for s in self.sublayers if s.kind == "moe")

    def moe_at(self, layer: int, block: str) -> Sublayer | None:
        """The router called `block` in a layer; None where there is none."""
        return next((s for s in self.moe if (s.layer, s.block) == (layer, block)), None)

    @property
    def moe_layers(self) -> list[int]:
        """Indices of blocks with a router."""
        return sorted({s.layer for s in self.moe})

    @property
    def n_experts(self) -> int | None:
        """Routed experts of a layer: the largest where layers differ, None in a dense model."""
        return max((s.n_experts or 0 for s in self.moe), default=None)

    @property
    def top_k(self) -> int | None:
        """Experts a token takes: the largest where layers differ, None in a dense model."""
        return max((s.top_k or 0 for s in self.moe), default=None)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that tell models of different make apart, alike in every process.

        They cover what edits name: class, widths, blocks, and each sublayer's kind, place and experts. Two checkpoints of one
        make have the same; so has a model in another dtype or on other devices.

        Example:
            >>> import moescope as ms
            >>> len(ms.load("demo").anatomy.digest)
            16
        """
        parts = [(s.layer, s.block, s.stack, *_shape(s)) for s in self.sublayers]
        text = json.dumps([self.architecture, self.d_model, self.vocabulary, self.n_layers, parts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        """Numbers of the whole model, for the store."""
        return {
            "architecture": self.architecture,
            "d_model": self.d_model,
            "vocabulary": self.vocabulary,
            "parameters": self.parameters,
            "context": self.context,
            "n_layers": self.n_layers,
            "digest": self.digest,
        }

    def __str__(self) -> str:
        rows = [
            f"{self.architecture}: {self.n_layers} layers, width {self.d_model}, {self.parameters / 1e6:,.1f} M parameters, "
            f"vocabulary {self.vocabulary:,}, context {self.context or 'not stated'}"
        ]
        return "\n".join([*rows, *("  ".join(cells) for cells in self._cells())])

    def _repr_html_(self) -> str:
        head, *body = self._cells()
        header = "".join(f"<th>{escaped(c.strip())}</th>" for c in head)
        rows = "".join("<tr>" + "".join(f"<td>{escaped(c.strip())}</td>" for c in row) + "</tr>" for row in body)
        return f"<div><p>{escaped(str(self).split(chr(10), 1)[0])}</p><table><tr>{header}</tr>{rows}</table></div>"

    def _cells(self) -> Iterator[tuple[str, ...]]:
        """Rows for reading: runs of equal layers on one line."""
        yield "layers ", "block", "kind     ", "experts", "top-k", "shared", "neurons"
        for first, last, s in self._runs():
            layers = f"{first}" if first == last else f"{first}–{last}"
            numbers = (s.n_experts, s.top_k, s.n_shared, s.d_expert)
            cells = [f"{'—' if n is None else f'{n:,}':>{w}}" for n, w in zip(numbers, (7, 5, 6, 7), strict=True)]
            yield f"{layers:<7}", f"{s.block:<5}", f"{s.kind:<9}", *cells

    def _runs(self) -> list[tuple[int, int, Sublayer]]:
        runs: list[tuple[int, int, Sublayer]] = []
        for block in dict.fromkeys(s.block for s in self.sublayers):
            for s in (s for s in self.sublayers if s.block == block):
                same = (
                    runs
                    and runs[-1][2].block == block
                    and runs[-1][1] == s.layer - 1
                    and _shape(runs[-1][2]) == _shape(s)
                )
                if same:
                    runs[-1] = (runs[-1][0], s.layer, runs[-1][2])
                else:
                    runs.append((s.layer, s.layer, s))
        return sorted(runs, key=lambda run: (run[0], run[2].block))


def _shape(s: Sublayer) -> tuple[Any, ...]:
    return s.kind, s.n_experts, s.top_k, s.n_shared, s.n_null, s.d_expert


def find_anatomy(model: nn.Module) -> Anatomy:
    """Look at a model and say what it is made of; see `moescope.probes.introspection`."""
    from moescope.probes.introspection import look_at

    return look_at(model)
