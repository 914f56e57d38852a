"""Finding a model's anatomy by looking at its modules rather than by a list of names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from moescope.core.errors import InputError
from moescope.probes.anatomy import Anatomy, Kind, Sublayer
from moescope.probes.block_outputs import why_no_stream
from moescope.probes.custom_layers import custom_layer
from moescope.probes.expert_access import neurons_reachable, why_unreachable
from moescope.probes.special_families import LOGITS_CHILD, SpecialRouting, special_routings

_ROUTER = re.compile(r"Router|TopK|Gate$|Gating|Gate[A-Z]")
_ROUTES = re.compile(r"Experts|Router|TopK|SparseMoe|MoE(Block|Layer)?$|Moe(Block|Layer)?$")
_MIXER = re.compile(
    r"mamba|ssm|conv|linear_attn|delta|lightning|recurrent|rwkv|kda|mixer|attn|attention|temporal", re.I
)
_BESIDE = re.compile(r"mamba|ssm", re.IGNORECASE)  # state space beside attention in one block
_MLP = re.compile(r"mlp|ffn|feed_forward|fc_block", re.I)
_SHARED = re.compile(r"shared_experts?|shared_mlp|shared_transition")
_HYPER = re.compile(r"_hc$|hyper_connection")  # they mix copies of the residual stream: neither mixer nor feed-forward
_NORM = re.compile(r"norm|ln_|layernorm", re.I)


def look_at(model: nn.Module) -> Anatomy:
    """Look at a model and say what it is made of.

    Routers are found through the class that transformers names for recording router logits, or by their own class's name;
    experts as modules that take (hidden states, expert ids, weights); special families through their table.

    Raises:
        InputError: no stack of transformer blocks, or routed experts whose routing cannot be read.
    """
    config = text_config(model)
    blocks = _blocks(model, config)
    if not blocks:
        raise InputError(
            f"moescope does not know the anatomy of {type(model).__name__}",
            expected="a causal language model of transformers: a stack of transformer blocks",
            found="no module list of blocks",
            fix="load a transformers causal language model, or announce your own MoE layer with register_moe",
        )
    finder = _Finder(model, config)
    sublayers = tuple(s for layer, block in enumerate(blocks) for s in finder.sublayers(layer, block))
    routing = sorted(
        {type(m).__name__ for block in blocks for m in block.modules() if _ROUTES.search(type(m).__name__)}
    )
    if routing and not any(s.kind == "moe" for s in sublayers):
        raise InputError(
            f"{type(model).__name__} has experts that moescope cannot reach",
            expected="experts as a module that takes (hidden states, expert ids, weights)",
            found=f"modules of other kinds: {', '.join(routing)}",
            fix="use a family listed by `moescope doctor --families`, or announce the layer with register_moe",
        )
    embeddings = _embeddings(model)
    return Anatomy(
        architecture=type(model).__name__,
        d_model=_first(config, "hidden_size", "d_model", "n_embd") or int(getattr(embeddings, "embedding_dim", 0)),
        vocabulary=_first(config, "vocab_size") or int(getattr(embeddings, "num_embeddings", 0)),
        parameters=sum(p.numel() for p in model.parameters()),
        context=_context(config),
        block_paths=tuple(finder.names[id(block)] for block in blocks),
        sublayers=sublayers,
        no_stream=next((reason for block in blocks if (reason := why_no_stream(block)) is not None), None),
    )


class _Finder:
    """What one model's blocks are made of."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.config = config
        self.names = {id(module): name for name, module in model.named_modules()}
        self.attention = tuple(recordable(model, "attentions"))
        self.routers = recordable(model, "router_logits")

    def sublayers(self, layer: int, block: nn.Module) -> Iterator[Sublayer]:
        """The sublayers of one block."""
        name = self.names[id(block)]
        self.layer, self.block = layer, block
        self.stack = "encoder" if "encoder" in name.split(".") else "decoder"
        attention = [m for m in block.modules() if self.attention and isinstance(m, self.attention)]
        attention = [m for m in attention if not any(m is not a and m in list(a.modules()) for a in attention)]
        routed = list(self._routed(block))
        inside = {id(m) for owner in [*attention, *(m for m, _ in routed)] for m in owner.modules()}
        mlps = list(self._dense(block, inside, {id(m) for m, _ in routed} | {id(block)}, shared=bool(routed)))
        taken = inside | {id(m) for mlp in mlps for m in mlp.modules()}
        mixers = list(self._mixers(block, taken, _BESIDE if attention else _MIXER))
        for number, module in enumerate([*attention, *mixers]):
            kind: Kind = "attention" if module in attention or _is_attention(module) else "ssm"
            yield Sublayer(layer, _numbered("attn", number), self.stack, kind, self.names[id(module)])
        used: dict[str, int] = {}
        for _, found in routed:
            for s in found:
                used[s.block] = used.get(s.block, 0) + 1
                yield s
        for number, mlp in enumerate(mlps, used.get("mlp", 0)):
            width = _dense_width(mlp, self.config)
            yield Sublayer(layer, _numbered("mlp", number), self.stack, "dense", self.names[id(mlp)], d_expert=width)

    def _routed(self, block: nn.Module) -> Iterator[tuple[nn.Module, list[Sublayer]]]:
        """Modules that route, each with its routers."""
        used: dict[str, int] = {}
        inside: set[int] = set()

        def block_name(base: str) -> str:
            used[base] = used.get(base, 0) + 1
            return _numbered(base, used[base] - 1)

        for module in block.modules():
            if id(module) in inside:
                continue
            if specials := special_routings(module):
                yield module, [self._special(module, special, block_name(special.block)) for special in specials]
                inside |= {id(m) for m in module.modules()}
            elif custom_layer(module):
                yield module, [self._custom(module, block_name("mlp"))]
                inside |= {id(m) for m in module.modules()}
            elif is_experts_module(module):
                owner = next((m for m in block.modules() if any(c is module for c in m.children())), block)
                yield owner if owner is not block else module, [self._moe(owner, module, block_name("mlp"))]
                inside |= {id(m) for m in module.modules()}

    def _moe(self, owner: nn.Module, experts: nn.Module, block: str) -> Sublayer:
        router, index = self._router(owner, experts)
        logits, index = (router, index) if router is not None else (None, 0)
        if router is not None and type(router).__name__ in LOGITS_CHILD:
            logits, index = getattr(router, LOGITS_CHILD[type(router).__name__]), 0
        total, null = _experts(experts, router)
        return Sublayer(
            self.layer,
            block,
            self.stack,
            "moe",
            self.names[id(owner)],
            n_experts=total,
            top_k=_top_k(owner, router, self.config),
            n_shared=self._shared(owner),
            n_null=null,
            d_expert=_expert_width(experts),
            router_path=self.names[id(router)] if router is not None else None,
            experts_path=self.names[id(experts)],
            logits_path=self.names[id(logits)] if logits is not None else None,
            router_logits_index=index,
            unreachable=why_unreachable(experts),
            neurons=neurons_reachable(experts),
        )

    def _special(self, owner: Any, special: SpecialRouting, block: str) -> Sublayer:
        child: dict[str, Any] = dict(owner.named_children())
        path = self.names[id(owner)]
        unreachable = special.unreachable or (why_unreachable(owner.experts) if special.experts else None)
        n_experts = next(
            int(getattr(m, "num_experts"))  # noqa: B009  a module's attribute of unknown type
            for m in (child.get("experts"), child.get("router"), owner)
            if isinstance(getattr(m, "num_experts", None), int)
        )
        return Sublayer(
            self.layer,
            block,
            self.stack,
            "moe",
            path,
            n_experts=n_experts,
            top_k=int(special.top_k(owner)),
            n_shared=self._shared(owner),
            n_null=special.n_null,
            d_expert=special.d_expert(owner),
            router_path=f"{path}.{special.router}" if special.router else None,
            experts_path=f"{path}.{special.experts}" if special.experts else None,
            logits_path=f"{path}.{special.logits}" if special.logits else None,
            router_logits_index=special.logits_index,
            reader=special.reader,
            unreachable=unreachable,
            neurons=unreachable is None and neurons_reachable(owner.experts),
            note=special.note,
        )

    def _custom(self, owner: nn.Module, block: str) -> Sublayer:
        layer = custom_layer(owner)
        assert layer is not None
        path = self.names[id(owner)]
        numbers = [n if isinstance(n, int) else int(getattr(owner, n)) for n in (layer.n_experts, layer.top_k)]
        return Sublayer(
            self.layer,
            block,
            self.stack,
            "moe",
            path,
            n_experts=numbers[0],
            top_k=numbers[1],
            n_shared=0,
            n_null=0,
            router_path=f"{path}.{layer.router}" if layer.router else None,
            logits_path=f"{path}.{layer.router}" if layer.router else None,
            reader="registered",
            unreachable="it is a layer of your own, of which only the decision was announced",
        )

    def _router(self, owner: nn.Module, experts: nn.Module) -> tuple[nn.Module | None, int]:
        """The router beside an experts module, and which element of its output is the logits."""
        near = [m for m in owner.modules() if m is not experts]
        for kind, index in self.routers.items():
            if found := next((m for m in near if isinstance(m, kind)), None):
                return found, index
        named = [c for c in owner.children() if c is not experts and _ROUTER.search(type(c).__name__)]
        return (named[0], 0) if named else (None, 0)

    def _shared(self, owner: nn.Module) -> int:
        """Shared experts: inside the module that routes, or beside it in the block."""
        names = [*(name.rsplit(".", 1)[-1] for name, _ in owner.named_modules()), *dict(self.block.named_children())]
        if not any(_SHARED.fullmatch(name) for name in names):
            return 0
        return int(_first(self.config, "n_shared_experts", "num_shared_experts", "moe_num_shared_experts") or 1)

    def _dense(self, block: nn.Module, inside: set[int], owners: set[int], *, shared: bool) -> Iterator[nn.Module]:
        """Feed-forward children of a block outside attention and routed experts: by name, or the largest.

        With `shared`, what is named after shared experts is theirs; in a block without experts it is a feed-forward.
        """
        children = [
            (name, child)
            for top, direct in block.named_children()
            for name, child in ([(top, c) for c in direct] if isinstance(direct, nn.ModuleList) else [(top, direct)])
            if id(child) not in inside | owners
            and not any(id(m) in inside for m in child.modules())
            and not (shared and _SHARED.fullmatch(name))
            and any(p.ndim == 2 for p in child.parameters())
        ]
        children = [(name, c) for name, c in children if not _HYPER.search(name)]
        named = [c for name, c in children if _MLP.search(name) or _MLP.search(type(c).__name__)]
        if named or owners - {id(block)}:
            yield from named
            return
        rest = [c for name, c in children if not _NORM.search(name) and not _is_mixer(name, c)]
        largest = max(rest, key=_matrices, default=None)
        if largest is not None:
            yield largest

    def _mixers(self, block: nn.Module, taken: set[int], pattern: re.Pattern[str]) -> Iterator[nn.Module]:
        for name, child in block.named_children():
            mixer = not _HYPER.search(name) and _is_mixer(name, child, pattern)
            if mixer and not any(id(m) in taken for m in child.modules()):
                yield child


def _embeddings(model: nn.Module) -> Any:
    if hasattr(model, "get_input_embeddings"):
        return model.get_input_embeddings()  # type: ignore[operator]  # a method of transformers models
    return next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)


def recordable(model: nn.Module, key: str) -> dict[type[nn.Module], int]:
    """Classes that transformers names for recording `key` in a model's language stack, with the index into their output."""
    found: dict[type[nn.Module], int] = {}
    for module in _language_modules(model):
        named = (getattr(type(module), "_can_record_outputs", None) or {}).get(key)
        for entry in named if isinstance(named, (list, tuple)) else [named] if named is not None else []:
            kind = getattr(entry, "target_class", entry)
            if isinstance(kind, type):
                found.setdefault(kind, int(getattr(entry, "index", 0) or 0))
    return found


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module computes experts and takes (hidden states, expert ids, weights)."""
    named = type(module).__name__.endswith("Experts")
    if not named and not any(p.ndim == 3 for p in module.parameters(recurse=False)):
        return False
    parameters = list(inspect.signature(module.forward).parameters.values())
    return len([p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]) >= 3


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's language part; an empty one for a module of no library."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _language_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules of the language stack: a model that also sees or hears names classes of its other towers."""
    whole = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    decoder = None if whole or not hasattr(model, "get_decoder") else model.get_decoder()  # type: ignore[operator]  # transformers
    start = decoder if isinstance(decoder, nn.Module) and decoder is not model else model
    yield model
    yield from start.modules()


def _blocks(model: nn.Module, config: Any) -> list[nn.Module]:
    classes = tuple(recordable(model, "hidden_states"))
    found = [m for m in _language_modules(model) if classes and isinstance(m, classes)]
    if found:
        return list(dict.fromkeys(found))
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    kinds = [(blocks, {type(block) for block in blocks}) for blocks in lists]
    stacks = [blocks for blocks, types in kinds if len(types) == 1 and len(list(blocks[0].children())) >= 2]
    longest = max(stacks, key=len, default=[])
    return longest if config is not None or any(custom_layer(m) for b in longest for m in b.modules()) else []


def _experts(experts: nn.Module, router: nn.Module | None) -> tuple[int, int]:
    """Experts that compute, and pseudo-experts that do not."""
    null = getattr(experts, "zero_expert_num", 0) or 0
    # Under expert parallelism the experts module counts its own share only; the router counts all.
    owners = (router, experts) if getattr(experts, "_is_expert_parallel", False) else (experts, router)
    for name in ("num_routed_experts", "num_experts"):
        for owner in owners:
            if isinstance(value := getattr(owner, name, None), int):
                return value, null
    return next(int(p.shape[0]) for p in experts.parameters() if p.ndim == 3), null


def _expert_width(experts: Any) -> int | None:
    down = getattr(experts, "down_proj", None)
    if down is None or getattr(down, "ndim", 0) != 3:
        return _first(experts, "ffn_hidden_size", "intermediate_size", "intermediate_dim")
    return int(down.shape[1 if getattr(experts, "is_transposed", False) else 2])


def _top_k(owner: nn.Module, router: nn.Module | None, config: Any) -> int | None:
    names = ("top_k", "topk", "num_experts_per_tok", "moe_topk", "top_k_experts", "moe_top_k", "num_experts_per_token")
    for holder in (router, owner, config):
        value = _first(holder, *names)
        if value is not None:
            return value
    return None


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def _is_mixer(name: str, module: nn.Module, pattern: re.Pattern[str] = _MIXER) -> bool:
    return bool(pattern.search(name) or pattern.search(type(module).__name__)) and not _NORM.search(name)


def _is_attention(module: nn.Module) -> bool:
    """Whether a token mixer of a model that does not name its attention is attention, going by its class."""
    name = type(module).__name__
    return "Attention" in name and not re.search("Linear|Lightning|Delta|Recurrent", name)


def _dense_width(mlp: nn.Module, config: Any) -> int | None:
    hidden = _first(config, "hidden_size", "d_model", "n_embd")
    for name in ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2", "wo", "output_linear"):
        weight = next((m.weight for n, m in mlp.named_modules() if n.rsplit(".", 1)[-1] == name), None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2:
            return int(next((size for size in weight.shape if size != hidden), weight.shape[0]))
    return _first(config, "intermediate_size")


def _numbered(name: str, number: int) -> str:
    return f"{name}.{number}" if number else name


def _first(owner: Any, *names: str) -> int | None:
    return next((v for n in names if isinstance(v := getattr(owner, n, None), int) and not isinstance(v, bool)), None)


def _context(config: Any) -> int | None:
    value = _first(config, "max_position_embeddings", "n_positions")
    return value if value and value > 0 else None
