"""Passes that begin where an edit does: what runs before it hands on what a plain pass left there.

A plain pass keeps the stream that enters a block, and what the attention of that block puts out. A resumed pass calls the
model as always; the `forward` of the blocks before is overridden on the instance for the time, and so is that attention's.
Nothing else changes, so that masks, positions, hooks and the head are the model's own. Where a model does not come out
the same (blocks that read more than the stream, or hand on more than one), `Prefix.check` says so.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn

from moescope.core.errors import InputError
from moescope.probes.block_outputs import changes_in_place, why_no_stream
from moescope.probes.decision_readers import READERS
from moescope.probes.forward import DeviceBatch, logits_of
from moescope.probes.live_model import LiveModel

Router = tuple[int, str]
# How far logits of a resumed pass may lie from the plain ones, as a share of the largest: rounding, and no more.
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-6}
_CLOSE_NARROW = 2e-2


@dataclass
class Kept:
    """What a plain pass over a batch left behind.

    Attributes:
        rows: how many sequences.
        logits: the plain ones.
        given: layer → the stream that enters its block.
        outputs: path of a block or sublayer → its whole output.
        routed: router → ids of the experts that each token took [row, position, k].
    """

    rows: int
    logits: Float[torch.Tensor, "row position vocabulary"] | None = None
    given: dict[int, Float[torch.Tensor, "row position d_model"]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    routed: dict[Router, Int[torch.Tensor, "row position k"]] = field(default_factory=dict)


class Prefix:
    """Plain passes that keep what is needed, and passes that begin there.

    Args:
        model: whose blocks are skipped.

    Example:
        >>> import torch, moescope as ms
        >>> prefix = Prefix(ms.load("demo"))
        >>> ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
        >>> batch = DeviceBatch(ids, torch.ones_like(ids).bool())
        >>> kept = prefix.plain(batch, layers=[4])
        >>> with torch.no_grad(), prefix.resumed(4, kept):
        ...     bool(torch.equal(logits_of(prefix.model, batch), kept.logits))
        True
    """

    def __init__(self, model: LiveModel) -> None:
        self.model = model
        anatomy = model.anatomy
        self.blocks = [model.module.get_submodule(path) for path in anatomy.block_paths]
        stacks = {s.layer: s.stack for s in anatomy.sublayers}
        self._stack = [stacks.get(layer, "decoder") for layer in range(anatomy.n_layers)]
        self._checked: dict[int, str | None] = {}

    def plain(self, batch: DeviceBatch, *, layers: Iterable[int], routers: Iterable[Router] = ()) -> Kept:
        """Run a batch as the model is.

        Args:
            batch: on the model's device.
            layers: where later passes are to begin.
            routers: (layer, block) of the routers whose decisions are to be kept.
        """
        kept = Kept(len(batch.ids))
        with ExitStack() as stack, torch.no_grad():
            for layer in sorted(set(layers)):
                self._keep_before(layer, kept, stack)
            for layer, block in dict.fromkeys(routers):
                self._keep_decision(layer, block, kept, stack, batch.ids.shape[1])
            kept.logits = logits_of(self.model, batch)
        return kept

    @contextmanager
    def resumed(
        self,
        layer: int,
        kept: Kept,
        rows: Int[torch.Tensor, " row"] | None = None,
        *,
        attention: bool = True,
    ) -> Iterator[None]:
        """Passes of this thread begin at a block while the context lasts.

        Args:
            layer: the block.
            kept: of a plain pass that kept it.
            rows: row of the plain pass that each row of the batch is; None for the same batch.
            attention: begin behind the attention of that block, for edits of its experts; otherwise at the block.
        """
        thread = threading.get_ident()
        with ExitStack() as stack:
            for earlier in range(layer):
                module = self.blocks[earlier]
                out = partial(self._skipped, earlier, layer, kept, rows)
                _override(stack, module, _instead(module, thread, out))
            for path in self._attention(layer) if attention else ():
                if path in kept.outputs:
                    module = self.model.module.get_submodule(path)
                    _override(stack, module, _instead(module, thread, partial(_put, kept, path, rows)))
            yield

    def why_not(self, layer: int, batch: DeviceBatch) -> str | None:
        """Why passes cannot begin at a block, None where they can: tried once a block, against plain passes of `batch`."""
        if layer not in self._checked:
            self._checked[layer] = self._tried(layer, batch)
        return self._checked[layer]

    def _tried(self, layer: int, batch: DeviceBatch) -> str | None:
        reasons = (why_no_stream(block) for block in self.blocks[: layer + 1])
        if reason := next((r for r in reasons if r is not None), None):
            return reason
        batch = _few(batch)
        backwards = torch.arange(len(batch.ids) - 1, -1, -1, device=batch.ids.device)
        turned = rows_of(batch, backwards)
        try:
            kept = self.plain(batch, layers=[layer])
            assert kept.logits is not None
            with torch.no_grad():
                with self.resumed(layer, kept):
                    same = logits_of(self.model, batch)
                with self.resumed(layer, kept, backwards):
                    other = logits_of(self.model, turned)
        except (InputError, TypeError, ValueError, IndexError, AttributeError, KeyError, RuntimeError) as error:
            return f"a pass that begins at block {layer} fails: {error}"
        close = _CLOSE.get(kept.logits.dtype, _CLOSE_NARROW)
        scale = float(kept.logits.abs().max())
        if not float((same - kept.logits).abs().max()) <= close * scale:
            return f"a pass that begins at block {layer} does not give the logits of a whole one"
        if not float((other - kept.logits[backwards]).abs().max()) <= 10 * close * scale:
            return f"a pass that begins at block {layer} does not give the logits of a whole one, with its rows in another order"
        return None

    def _keep_before(self, layer: int, kept: Kept, stack: ExitStack) -> None:
        """Hooks that keep what a pass beginning at `layer` needs."""
        module = self.blocks[layer]
        copied = changes_in_place(module)

        def entering(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            stream = _stream_given(inputs, named)
            kept.given[layer] = stream.clone() if copied else stream

        stack.callback(module.register_forward_pre_hook(entering, with_kwargs=True).remove)
        for earlier in range(layer):
            path = self.model.anatomy.block_paths[earlier]
            # Of a block whose stream is handed on by the next, only what comes beside it is needed; the end of a stack whole.
            stack.callback(self.blocks[earlier].register_forward_hook(self._ending(earlier, path, kept)).remove)
        self._keep_attention(layer, kept, stack)

    def _ending(self, layer: int, path: str, kept: Kept) -> Any:
        ends = layer + 1 == len(self._stack) or self._stack[layer + 1] != self._stack[layer]

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept.outputs[path] = output if ends or not isinstance(output, tuple) else (None, *output[1:])
            if not ends and isinstance(output, torch.Tensor):
                kept.outputs[path] = None

        return hook

    def _keep_attention(self, layer: int, kept: Kept, stack: ExitStack) -> None:
        """Outputs of the block's attention that stand before its experts begin."""
        begun: list[int] = []
        experts = [s.path for s in self.model.anatomy.moe if s.layer == layer]

        def begins(*_: Any) -> None:
            begun.append(layer)

        def ends(_module: nn.Module, _inputs: Any, output: Any, path: str = "") -> None:
            if not begun:
                kept.outputs[path] = output

        for path in experts:
            stack.callback(self.model.module.get_submodule(path).register_forward_pre_hook(begins).remove)
        for path in self._attention(layer) if experts else ():
            hook = partial(ends, path=path)
            stack.callback(self.model.module.get_submodule(path).register_forward_hook(hook).remove)

    def _attention(self, layer: int) -> list[str]:
        """Modules of a block that mix positions and route nothing."""
        sublayers = self.model.anatomy.sublayers
        return [s.path for s in sublayers if s.layer == layer and s.kind in ("attention", "ssm")]

    def _keep_decision(self, layer: int, block: str, kept: Kept, stack: ExitStack, width: int) -> None:
        s = self.model.anatomy.moe_at(layer, block)
        if s is None:
            return

        def give(ids: torch.Tensor, _weights: torch.Tensor) -> None:
            kept.routed[layer, block] = ids.reshape(kept.rows, width, -1)

        for handle in READERS[s.reader](self.model.module, s, give):
            stack.callback(handle.remove)

    def _skipped(
        self, layer: int, begins: int, kept: Kept, rows: torch.Tensor | None, args: tuple[Any, ...], named: Any
    ) -> Any:
        """What a skipped block hands on."""
        output = kept.outputs[self.model.anatomy.block_paths[layer]]
        if layer + 1 == begins and self._stack[layer] == self._stack[begins]:
            stream = _rows(kept.given[begins], rows, kept.rows)
        elif self._stack[layer + 1] != self._stack[layer]:
            return _rows(output, rows, kept.rows)
        else:
            stream = _stream_given(args, named)
        return (stream, *_rows(output[1:], rows, kept.rows)) if isinstance(output, tuple) else stream


def rows_of(batch: DeviceBatch, rows: Int[torch.Tensor, " row"]) -> DeviceBatch:
    """Rows of a batch, in any order and any number of times."""
    positions = None if batch.positions is None else batch.positions[rows]
    return DeviceBatch(batch.ids[rows], batch.mask[rows], positions)


def _few(batch: DeviceBatch) -> DeviceBatch:
    """Two rows that differ, of at most 16 columns: enough to see whether two passes are one."""
    ids = batch.ids[:2, :16]
    if len(ids) == 1 or bool((ids[0] == ids[1]).all()):
        ids = torch.stack([ids[0], ids[0].roll(1)]) if bool((ids[0] != ids[0].roll(1)).any()) else ids
    return DeviceBatch(ids, torch.ones_like(ids, dtype=torch.bool), None)


def _stream_given(inputs: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    found = inputs[0] if inputs else named.get("hidden_states")
    if not isinstance(found, torch.Tensor):
        raise InputError("a block is not given its stream as its first argument")
    return found


def _rows(value: Any, rows: torch.Tensor | None, held: int) -> Any:
    """The asked rows of every tensor that has one for each sequence."""
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(part, rows, held) for part in value)
    if isinstance(value, torch.Tensor):
        whole = rows is None or value.dim() == 0 or value.shape[0] != held
        return value if whole else value.index_select(0, rows.to(value.device))  # type: ignore[union-attr]  # not None here
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise InputError(f"a block hands on a {type(value).__name__}")


def _put(kept: Kept, path: str, rows: torch.Tensor | None, _args: tuple[Any, ...], _named: Any) -> Any:
    return _rows(kept.outputs[path], rows, kept.rows)


def _instead(module: nn.Module, thread: int, out: Any) -> Any:
    """A `forward` that gives `out(args, named)` to this thread, and to any other what the module computes."""
    plain = module.forward

    def forward(*args: Any, **named: Any) -> Any:
        return out(args, named) if threading.get_ident() == thread else plain(*args, **named)

    return forward


def _override(stack: ExitStack, module: nn.Module, forward: Any) -> None:
    """Set `forward` of this instance alone; what stood there, or nothing, stands there again at the end."""
    held = vars(module)

    found, before = "forward" in held, held.get("forward")

    def put_back() -> None:
        if found:
            held["forward"] = before
        else:
            held.pop("forward", None)

    held["forward"] = forward
    stack.callback(put_back)
