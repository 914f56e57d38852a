"""`Anatomy`: what a model is made of, layer by layer; `find_anatomy` finds it by looking at the modules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from moescope.core.errors import InputError
from moescope.core.notebook_html import box, grid, heading
from moescope.core.tabular import Tabular

if TYPE_CHECKING:
    import pyarrow as pa

    from moescope.probes.routing_rule import RoutingRule

Kind = Literal["moe", "dense", "attention", "ssm"]


_LINES = 40  # rows that are shown: a model whose layers all differ has one each


def no_live_model() -> InputError:
    """The refusal of an anatomy whose model is not there, or not there any more."""
    return InputError(
        "a routing rule is found by running a model, and this anatomy has none",
        fix="keep the model: model = moescope.load(…); model.anatomy.routing_rule",
    )


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


@dataclass(frozen=True, repr=False)
class Anatomy(Tabular):
    """What a model is made of.

    Attributes:
        architecture: class name of the model.
        d_model: width of the residual stream, in channels.
        vocabulary: token ids that have logits.
        parameters: numbers that were trained.
        context: longest sequence the model was made for, in tokens; None where it does not say.
        no_stream: why this model has no residual stream of one vector a token; None where it has.
        block_paths: names of the transformer blocks' modules, in order.
        sublayers: every sublayer found, by layer.
        rules: finds the rule of every router by running the model once; None where there is no model to run.

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
    rules: Callable[[], Mapping[tuple[int, str], RoutingRule]] | None = field(default=None, compare=False)

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

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: without the way back to the model."""
        return {**self.__dict__, "rules": None}

    @cached_property
    def routing_rule(self) -> str | None:
        """How routers turn logits into a decision, in words, and how many decisions it reproduces; None in a dense model.

        Found by running the model once on 1,024 random tokens, the first time it is asked for. A rule that does not reproduce
        at least 99.9 % of the decisions is called unverified: what needs the rule then refuses. Where layers differ, each rule
        has a line with its layers.

        Raises:
            InputError: this anatomy has no live model, which a rule is found and verified on.

        Example:
            >>> import moescope as ms
            >>> model = ms.load("demo")
            >>> model.anatomy.routing_rule
            'top-k of softmax, weights softmax, renormalised (verified: 100.0 % of 1,024 tokens)'
        """
        if not self.moe:
            return None
        if self.rules is None:
            raise no_live_model()
        found = self.rules()
        told: dict[str, list[int]] = {}
        for s in self.moe:
            rule = found.get((s.layer, s.block))
            told.setdefault("unknown: no module shows its logits" if rule is None else _verdict(rule), []).append(
                s.layer
            )
        if len(told) == 1:
            return next(iter(told))
        return "\n".join(f"layers {', '.join(map(str, layers))}: {text}" for text, layers in told.items())

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

    _repr_pretty_ = Tabular._repr_pretty_  # IPython looks for it beside `__repr__`

    def __repr__(self) -> str:
        return f"Anatomy({self._head()})"

    def __str__(self) -> str:
        lines = ["  ".join(cells) for cells in self._cells()]
        more = [f"… {len(lines) - _LINES} more rows: .df()"] if len(lines) > _LINES + 1 else []
        return "\n".join([self._head(), *(lines[:_LINES] if more else lines), *more])

    def _head(self) -> str:
        return (
            f"{self.architecture}: {self.n_layers} layers, width {self.d_model}, {self.parameters / 1e6:,.1f} M parameters, "
            f"vocabulary {self.vocabulary:,}, context {self.context or 'not stated'}"
        )

    def _repr_html_(self) -> str:
        columns, *rows = ([cell.strip() for cell in row] for row in self._cells())
        more = f"<p>{len(rows) - _LINES:,} more rows: <code>.df()</code></p>" if len(rows) > _LINES else ""
        title, facts = self._head().split(": ", 1)
        return box(heading(title, facts), grid(rows[:_LINES], columns, numbers=columns[3:]), more)

    def arrow(self) -> pa.Table:
        """Every sublayer as a row: layer, block, kind, experts, top-k, widths, names of its modules."""
        import pyarrow as pa

        return pa.Table.from_pylist([asdict(sublayer) for sublayer in self.sublayers])

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


def _verdict(rule: RoutingRule) -> str:
    return f"{rule} ({'verified' if rule.verified else 'unverified'}: {100 * rule.agreement:.1f} % of {rule.tokens:,} tokens)"


def _shape(s: Sublayer) -> tuple[Any, ...]:
    return s.kind, s.n_experts, s.top_k, s.n_shared, s.n_null, s.d_expert


def find_anatomy(model: nn.Module) -> Anatomy:
    """Look at a model and say what it is made of; see `moescope.probes.introspection`."""
    from moescope.probes.introspection import look_at

    return look_at(model)
