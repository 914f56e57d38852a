"""`Anatomy`: what a model is made of, found by looking at its modules rather than by a list of names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from moescope.core.errors import InputError
from moescope.core.text import escaped

Kind = Literal["moe", "dense", "attention", "ssm"]


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of one transformer block.

    Attributes:
        layer: 0-based index of the block.
        block: its name in sites: `mlp` or `attn`.
        stack: `decoder` (or `encoder`).
        kind: `moe`, `dense`, `attention` or `ssm`.
        path: name of its module in the model.
        n_experts, top_k: routed experts and how many each token takes; None where there are none.
        n_shared, n_null: shared and null experts.
        d_expert: neurons of one expert, or of the dense MLP.
        router_path, experts_path: names of the modules that route and compute; None where there are none.
        router_logits_index: which element of the router's output is the logits.
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
    router_logits_index: int = 0


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of.

    Attributes:
        architecture: class name of the model.
        d_model, vocabulary, parameters: width, vocabulary size, number of parameters.
        context: longest sequence the model was made for; None where it does not say.
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

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.block_paths)

    @property
    def moe(self) -> tuple[Sublayer, ...]:
        """Sublayers with a router."""
        return tuple(s for s in self.sublayers if s.kind == "moe")

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

    def facts(self) -> dict[str, Any]:
        """Numbers of the whole model, for the store."""
        return {
            "architecture": self.architecture,
            "d_model": self.d_model,
            "vocabulary": self.vocabulary,
            "parameters": self.parameters,
            "context": self.context,
            "n_layers": self.n_layers,
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
    """Look at a model and say what it is made of.

    Routers are found through the class that transformers names for recording router logits; experts as modules that
    hold their weights as 3-D parameters and take (hidden states, expert ids, weights).

    Raises:
        InputError: no stack of transformer blocks, or a router whose experts cannot be reached.
    """
    names = {id(module): name for name, module in model.named_modules()}
    blocks = _blocks(model)
    if not blocks:
        raise InputError(
            f"moescope does not know the anatomy of {type(model).__name__}",
            expected="a causal language model of transformers: a stack of transformer blocks of one kind",
            found="no module list of blocks",
            fix="load a transformers causal language model",
        )
    config = _text_config(model)
    sublayers: list[Sublayer] = []
    for layer, block in enumerate(blocks):
        sublayers += _sublayers(model, layer, block, names, config)
    if _config_experts(config) and not any(s.kind == "moe" for s in sublayers):
        raise InputError(
            f"{type(model).__name__} has experts that moescope cannot reach",
            expected="experts as one module with 3-D weights that takes (hidden states, expert ids, weights)",
            found=f"{_config_experts(config)} experts in the configuration and no such module",
            fix="use a family listed by `moescope doctor`",
        )
    return Anatomy(
        architecture=type(model).__name__,
        d_model=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        parameters=sum(p.numel() for p in model.parameters()),
        context=_context(config),
        block_paths=tuple(names[id(block)] for block in blocks),
        sublayers=tuple(sublayers),
    )


def recordable_classes(model: nn.Module, key: str) -> tuple[tuple[type[nn.Module], ...], int]:
    """Classes transformers names for recording `key`, and the index into their output."""
    for module in model.modules():
        named = getattr(type(module), "_can_record_outputs", None) or {}
        if key in named:
            entries = named[key] if isinstance(named[key], (list, tuple)) else [named[key]]
            classes: list[Any] = [getattr(entry, "target_class", entry) for entry in entries]
            return tuple(c for c in classes if isinstance(c, type)), int(getattr(entries[0], "index", 0) or 0)
    return (), 0


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module holds experts as 3-D weights and takes (hidden states, expert ids, weights)."""
    if not any(p.ndim == 3 for p in module.parameters(recurse=False)):
        return False
    parameters = list(inspect.signature(module.forward).parameters.values())
    return len([p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]) >= 3


def _blocks(model: nn.Module) -> list[nn.Module]:
    classes, _ = recordable_classes(model, "hidden_states")
    found = [m for m in model.modules() if classes and isinstance(m, classes)]
    if found:
        return found
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    kinds = [(blocks, {type(block) for block in blocks}) for blocks in lists]
    stacks = [blocks for blocks, types in kinds if len(types) == 1 and len(list(blocks[0].children())) >= 2]
    return max(stacks, key=len, default=[])


def _sublayers(
    model: nn.Module, layer: int, block: nn.Module, names: dict[int, str], config: Any
) -> Iterator[Sublayer]:
    attention_classes, _ = recordable_classes(model, "attentions")
    attention = [m for m in block.modules() if attention_classes and isinstance(m, attention_classes)]
    for number, module in enumerate(attention):
        yield Sublayer(layer, "attn" + (f".{number}" if number else ""), "decoder", "attention", names[id(module)])
    experts = [m for m in block.modules() if is_experts_module(m)]
    if experts:
        for number, module in enumerate(experts):
            yield _moe_sublayer(model, layer, number, block, module, names, config)
        return
    mlp = _dense_mlp(block, attention)
    if mlp is not None:
        yield Sublayer(layer, "mlp", "decoder", "dense", names[id(mlp)], d_expert=_dense_width(mlp, config))


def _moe_sublayer(
    model: nn.Module, layer: int, number: int, block: nn.Module, experts: nn.Module, names: dict[int, str], config: Any
) -> Sublayer:
    router_classes, index = recordable_classes(model, "router_logits")
    routers = [m for m in block.modules() if router_classes and isinstance(m, router_classes)]
    router = routers[number] if number < len(routers) else None
    shapes = [p.shape for p in experts.parameters(recurse=False) if p.ndim == 3]
    down = getattr(experts, "down_proj", None)
    transposed = bool(getattr(experts, "is_transposed", False))
    shared = [
        m
        for name, m in block.named_modules()
        if name.rsplit(".", 1)[-1] in ("shared_expert", "shared_experts", "shared_mlp")
    ]
    return Sublayer(
        layer,
        "mlp" + (f".{number}" if number else ""),
        "decoder",
        "moe",
        names[id(_parent(block, experts))],
        n_experts=int(shapes[0][0]),
        top_k=_top_k(router, config),
        n_shared=int(getattr(config, "n_shared_experts", None) or 1) if shared else 0,
        n_null=0,
        d_expert=int(down.shape[1 if transposed else 2]) if down is not None else None,
        router_path=names[id(router)] if router is not None else None,
        experts_path=names[id(experts)],
        router_logits_index=index,
    )


def _parent(block: nn.Module, child: nn.Module) -> nn.Module:
    return next((m for m in block.modules() if any(c is child for c in m.children())), block)


def _top_k(router: nn.Module | None, config: Any) -> int | None:
    for owner, names in (
        (router, ("top_k", "topk", "num_experts_per_tok")),
        (config, ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "num_experts_per_token")),
    ):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


def _dense_mlp(block: nn.Module, attention: list[nn.Module]) -> nn.Module | None:
    """The child of a block, outside attention, that holds the most weights in matrices."""
    inside = {id(m) for a in attention for m in a.modules()}
    children = [c for c in block.children() if id(c) not in inside and not any(id(m) in inside for m in c.modules())]
    sizes = [(sum(p.numel() for p in c.parameters() if p.ndim == 2), c) for c in children]
    size, largest = max(sizes, key=lambda pair: pair[0], default=(0, None))
    return largest if size else None


def _dense_width(mlp: nn.Module, config: Any) -> int | None:
    for name in ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2", "wo"):
        weight = getattr(getattr(mlp, name, None), "weight", None)
        if weight is not None and weight.ndim == 2:
            return int(next((size for size in weight.shape if size != config.hidden_size), config.hidden_size))
    width = getattr(config, "intermediate_size", None)
    return int(width) if isinstance(width, int) else None


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise InputError(
            f"moescope does not know the anatomy of {type(model).__name__}",
            found="a module without a transformers config",
            fix="load a transformers causal language model",
        )
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _config_experts(config: Any) -> int:
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            return value
    return 0


def _context(config: Any) -> int | None:
    value = getattr(config, "max_position_embeddings", None)
    return int(value) if isinstance(value, int) and value > 0 else None
