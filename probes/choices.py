"""What a recording was asked for, checked before anything is run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from moescope.core.errors import InputError, RunError
from moescope.core.probe import ProbeEntry
from moescope.core.probe import probes as probe_registry
from moescope.core.sites import Site
from moescope.probes.live_model import LiveModel
from moescope.store.store import Store

_VECTORS = "activations"
_LEAST_ROOM = 64 << 20


def chosen_probes(
    model: LiveModel, names: Sequence[str] | None, sites: Sequence[Site] = ()
) -> tuple[list[ProbeEntry], dict[str, str]]:
    """The probes a run records: those named, or the default ones that this model has a use for; with sites, vectors too.

    Returns:
        The probes, and the default ones left out, each with the reason.

    Raises:
        InputError: a probe that does not exist, one that the model has nothing for, vectors without a site.
    """
    if names is None:
        entries = [entry for entry in probe_registry if entry.default]
    else:
        entries = [probe_registry[name] for name in dict.fromkeys(["tokens", *names])]
    chosen = {entry.name for entry in entries}
    if sites and _VECTORS not in chosen:
        entries.append(probe_registry[_VECTORS])
    if _VECTORS in chosen and not sites:
        raise InputError(
            "the probe activations keeps vectors at sites, and none was named",
            fix="name one (--site blocks.3.hook_resid_post)",
        )
    useless = {entry.name: reason for entry in entries if (reason := entry.function.no_use(model.anatomy)) is not None}
    if names is not None and useless:
        raise InputError(
            f"{model.name} has nothing for the probe {next(iter(useless))}",
            found=next(iter(useless.values())),
            fix="leave it out, or leave the choice of probes to moescope",
        )
    return [entry for entry in entries if entry.name not in useless], useless


def check_sizes(batch_size: int, max_length: int, generate: int, sample: float, padding: str | None) -> None:
    """Raise `InputError` for numbers that make no sense."""
    if batch_size < 1 or max_length < 2:
        raise InputError(
            "batch_size must be at least 1 and max_length at least 2", found=f"{batch_size} and {max_length}"
        )
    if generate < 0:
        raise InputError("generate is a number of tokens", expected="0 or more", found=str(generate))
    if not 0 < sample <= 1:
        raise InputError("sample is a share of the tokens", expected="more than 0, at most 1", found=str(sample))
    if padding not in (None, "left", "right"):
        raise InputError(f"there is no padding at {padding!r}", expected="left or right")
    if generate and padding == "right":
        raise InputError(
            "texts that are continued must be padded at the left",
            found="padding at the right",
            fix="leave padding out, or generate",
        )


def check_part(batches: range | None, *, resume: bool) -> None:
    """Raise `InputError` for batches that are no part of a plan."""
    if batches is None:
        return
    if batches.step != 1 or batches.start < 0 or not batches:
        raise InputError("batches are a range of their numbers", expected="range(first, end)", found=str(batches))
    if resume:
        raise InputError("a part of a plan is not resumed", fix="record it again, in smaller parts if it is long")


def longest(model: LiveModel, max_length: int, generate: int) -> int:
    """Tokens of the longest prompt: room is left in the model's context for what it generates."""
    if model.context is None:
        return max_length
    room = model.context - generate
    if room < 2:
        raise InputError(
            f"{model.name} has no room for so long an answer",
            expected=f"at most {model.context - 2:,} tokens to generate: its context is {model.context:,}",
            found=f"generate={generate:,}",
            fix="lower generate (--generate)",
        )
    return min(max_length, room)


def check_room(store: Store) -> None:
    """Raise `RunError` where the disk of a store has next to no room."""
    free = shutil.disk_usage(store.path.parent).free
    if free < _LEAST_ROOM:
        raise RunError(
            f"there is no room on the disk of {store.path}",
            expected=f"at least {_LEAST_ROOM >> 20} MiB",
            found=f"{free / 2**20:.0f} MiB",
            fix="free some space, or put the store elsewhere",
        )
