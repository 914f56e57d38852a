"""Ending a forward pass after the last block that is needed: what follows is never computed."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from moescope.core.errors import InputError, RunError
from moescope.core.sites import Site
from moescope.probes.block_outputs import runs_again
from moescope.probes.forward import DeviceBatch, is_encoder_decoder, logits_of
from moescope.probes.live_model import LiveModel
from moescope.probes.taps import tapped


class _Enough(Exception):  # noqa: N818  it is no error
    """The last block that is needed has run. An `Exception`, so that hooks of `always_call` are called on the way out."""


def run_until(model: LiveModel, batch: DeviceBatch, layer: int) -> None:
    """Run a batch through the blocks up to and with `layer`, and no further: no later block, no final norm, no logits.

    Taps that are on when this is called see what they would see in a whole pass, as far as it goes.

    Raises:
        RunError: the model came to its end without running that block as a module.

    Example:
        >>> import moescope as ms
        >>> model = ms.load("demo")
        >>> batch = DeviceBatch(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool))
        >>> ran = []
        >>> hooks = [
        ...     block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        ...     for layer, block in enumerate(model.module.model.layers)
        ... ]
        >>> run_until(model, batch, 2)
        >>> ran
        [0, 1, 2]
        >>> for hook in hooks:
        ...     hook.remove()
    """
    block = model.module.get_submodule(model.anatomy.block_paths[layer])
    thread, enough = threading.get_ident(), _Enough()

    def stop(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        if threading.get_ident() == thread:  # somebody else may be using the model
            raise enough

    handle = block.register_forward_hook(stop)  # now, so that it comes after the hooks of every tap
    try:
        logits_of(model, batch)
    except _Enough as reached:
        if reached is not enough:
            raise
        enough.with_traceback(None)  # its frames would keep the tensors of the pass alive
    else:
        raise RunError(
            f"a pass cannot be stopped after block {layer}",
            expected=f"the model to run {model.anatomy.block_paths[layer]} as a module",
            found="a pass that came to its end",
            fix="leave out stop_after",
        )
    finally:
        handle.remove()


def check_stop(model: LiveModel, layer: int) -> None:
    """Raise `InputError` for a block after which no pass of this model can be stopped."""
    anatomy = model.anatomy
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < anatomy.n_layers:
        raise InputError(
            f"{model.name} has no block {layer} to stop after",
            expected=f"stop_after from 0 to {anatomy.n_layers - 1}",
            found=repr(layer),
        )
    if reason := why_no_stop(model):
        raise InputError(
            f"{model.name} cannot stop a pass after a block",
            found=reason,
            fix="leave out stop_after",
        )


def why_no_stop(model: LiveModel) -> str | None:
    """Why passes of this model cannot be stopped after a block; None where they can."""
    if is_encoder_decoder(model.module):
        return "an encoder-decoder model runs two stacks in one pass"
    blocks = [model.module.get_submodule(path) for path in model.anatomy.block_paths]
    if any(runs_again(block) for block in blocks) or len({id(block) for block in blocks}) < len(blocks):
        return "its blocks run several times in one pass"
    return None


def check_reached(sites: Iterable[tuple[str, Site]], layer: int) -> None:
    """Raise `InputError` for a site behind the block after which passes stop; `sites` are pairs of a probe and its site."""
    for probe, site in sites:
        if site.layer > layer:
            raise InputError(
                f"the probe {probe} needs block {site.layer}, and passes stop after block {layer}",
                found=str(site),
                fix=f"stop later (stop_after={site.layer} or more), or leave the probe or the site out",
            )


def check_same(model: LiveModel, batch: DeviceBatch, sites: Iterable[Site], layer: int) -> None:
    """Run a batch whole and stopped under taps; raises `RunError` unless the taps saw the same, bit by bit."""
    wanted = list(dict.fromkeys(sites))
    seen: list[tuple[Site, dict[str, torch.Tensor]]] = []

    def receive(site: Site, tensors: dict[str, torch.Tensor]) -> None:
        seen.append((site, {name: tensor.detach().clone() for name, tensor in tensors.items()}))

    with torch.no_grad(), tapped(model.module, model.anatomy, wanted, receive):
        logits_of(model, batch)
        whole, seen = seen, []
        run_until(model, batch, layer)
    for site in wanted:
        if not _identical([t for s, t in whole if s == site], [t for s, t in seen if s == site]):
            raise RunError(
                f"passes stopped after block {layer} give other vectors at {site} than whole passes",
                fix="leave out stop_after, and please report it",
            )


def _identical(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> bool:
    """Bit-identical, a NaN being equal to a NaN."""
    return len(first) == len(second) and all(
        a.keys() == b.keys()
        and all(
            a[name].shape == b[name].shape
            and bool(((a[name] == b[name]) | ((a[name] != a[name]) & (b[name] != b[name]))).all())
            for name in a
        )
        for a, b in zip(first, second, strict=True)
    )
