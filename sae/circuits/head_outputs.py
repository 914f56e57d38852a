"""Outputs of every head at the last token of prompts, and logits there with heads at their mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.core.edit_kinds.stream import SetChannel
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.sites import HEAD_Z, Site
from moescope.probes.batches import Batch
from moescope.probes.batches import Sequence as Row
from moescope.probes.corpus import Document
from moescope.probes.edits.session import edited
from moescope.probes.forward import inputs_of, logits_in, named_arguments, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.head_map import HeadMap, HeadPlace
from moescope.probes.taps import sites_of, tapped
from moescope.sae.circuits.prompts import Prompt

_ROWS = 32


@dataclass(frozen=True)
class HeadOutputs:
    """What heads put out.

    Attributes:
        heads: which there are.
        last: [prompt, head, d_head] at each prompt's last token; heads of less width filled up with 0.
        mean: [head, d_head] mean over all tokens of the prompts.
        widths: [head] their own d_head.
    """

    heads: HeadMap
    last: Float[torch.Tensor, "prompt head d_head"]
    mean: Float[torch.Tensor, "head d_head"]
    widths: NDArray[np.int64]


def head_outputs(
    model: LiveModel, prompts: Sequence[Prompt], *, tick: Callable[[int], None] = lambda _: None
) -> HeadOutputs:
    """Read them in plain passes, prompts of one length together.

    Args:
        model: any with attention heads whose outputs pass its output projection.
        prompts: as token ids.
        tick: told tokens after every pass.

    Raises:
        InputError: no such heads; a prompt longer than the context.
    """
    sites = [s for s in sites_of(model.module, model.anatomy) if s.tensor == HEAD_Z and s.block == "attn"]
    if not sites:
        raise InputError(f"{model.name} has no heads whose outputs can be told apart", expected="the site attn.hook_z")
    seen: dict[Site, torch.Tensor] = {}
    last: dict[int, torch.Tensor] = {}
    total: torch.Tensor | int = 0
    tokens, widths, counts = 0, np.zeros(0, np.int64), []

    def receive(site: Site, tensors: dict[str, torch.Tensor]) -> None:
        seen[site] = tensors["z"]

    with torch.no_grad(), tapped(model.module, model.anatomy, sites, receive):
        for numbers in of_one_length(prompts):
            run_last(model, [prompts[n].ids for n in numbers])
            each = [seen[site].float().cpu() for site in sites]
            widest = max(z.shape[-1] for z in each)
            whole = torch.cat([torch.nn.functional.pad(z, (0, widest - z.shape[-1])) for z in each], 2)
            total = total + whole.double().sum((0, 1))
            tokens += whole.shape[0] * whole.shape[1]
            last |= dict(zip(numbers, whole[:, -1], strict=True))
            counts = [z.shape[2] for z in each]
            widths = np.concatenate([np.full(z.shape[2], z.shape[3]) for z in each])
            tick(whole.shape[0] * whole.shape[1])
    assert isinstance(total, torch.Tensor)
    places = tuple(HeadPlace(s.layer, s.block, n, n) for s, n in zip(sites, counts, strict=True))
    ordered = torch.stack([last[n] for n in range(len(prompts))])
    return HeadOutputs(HeadMap(places), ordered, (total / tokens).float(), widths)


def at_mean(
    outputs: HeadOutputs,
    heads: NDArray[np.bool_],
    means: Float[torch.Tensor, "head d_head"],
    *,
    positions: str,
    name: str,
) -> Intervention:
    """The intervention that puts given numbers in the place of heads' outputs.

    Args:
        outputs: tells heads and widths.
        heads: [head] which.
        means: what they then put out.
        positions: where, as edits name it.
        name: of the intervention.
    """
    edits = []
    for place in outputs.heads.places:
        columns = outputs.heads.slices[place.layer, place.block]
        chosen = np.flatnonzero(heads[columns])
        width = int(outputs.widths[columns.start])
        channels = [int(h) * width + i for h in chosen for i in range(width)]
        values = [float(v) for h in chosen for v in means[columns.start + int(h), :width]]
        if channels:
            edits.append(
                SetChannel(layer=place.layer, site="attn.hook_z", channels=channels, values=values, positions=positions)
            )
    return Intervention(edits, name=name)


def last_logits(
    model: LiveModel,
    prompts: Sequence[Prompt],
    made: Callable[[str], list[Intervention]],
    *,
    positions: str,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[int, int, Float[torch.Tensor, " vocabulary"]]]:
    """Logits after each prompt under each intervention.

    Args:
        model: the live model.
        prompts: as token ids.
        made: positions → the interventions; called for every length of prompt.
        positions: `last` for the prompt's last token alone, or `all`.
        progress: told tokens after every pass.

    Yields:
        Number of the intervention, number of the prompt, logits in float32.
    """
    for numbers in of_one_length(prompts):
        length = len(prompts[numbers[0]].ids)
        interventions = made(f"{length - 1}:{length}" if positions == "last" else "all")
        with torch.no_grad(), edited(model, interventions) as session:
            for which in range(len(interventions)):
                session.assign([which] * len(numbers))
                logits = run_last(model, [prompts[n].ids for n in numbers])
                progress(length * len(numbers))
                for n, row in zip(numbers, logits, strict=True):
                    yield which, n, row


def of_one_length(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Numbers of prompts of the same length, so many at once as one pass takes."""
    lengths = np.array([len(p.ids) for p in prompts])
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length).tolist()
        yield from (same[start : start + _ROWS] for start in range(0, len(same), _ROWS))


def run_last(model: LiveModel, rows: Sequence[Sequence[int]]) -> Float[torch.Tensor, "row vocabulary"]:
    """Logits of the last token of rows of one length, in float32 on the CPU.

    Raises:
        InputError: rows longer than the context.
    """
    if model.context is not None and len(rows[0]) > model.context:
        raise InputError(
            "a prompt is too long", expected=f"at most {model.context:,} tokens", found=f"{len(rows[0]):,}"
        )
    taken = named_arguments(model.module)
    less = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
    cache = {"use_cache": False} if "use_cache" in taken else {}
    blank = Document("", None, "")
    batch = Batch(0, tuple(Row(n, n, blank, 0, "", np.array(ids, np.int64)) for n, ids in enumerate(rows)), 0)
    with torch.no_grad():
        logits = logits_in(model.module(**inputs_of(model, to_device(batch, model)), **less, **cache))
    return logits[:, -1].float().cpu()
