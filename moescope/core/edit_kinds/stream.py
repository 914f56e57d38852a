"""Edits of the residual stream, of sublayers and of attention heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moescope.core.edit import Edit, edit
from moescope.core.edit_kinds.experts import as_tuple
from moescope.core.sites import RESID_POST

StreamSite = Literal[
    "hook_resid_pre",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "mlp.hook_post",
    "mlp.hook_in",
    "attn.hook_q",
    "attn.hook_z",
]


@dataclass(frozen=True, kw_only=True)
class StreamEdit(Edit):
    """An edit of one stream of vectors.

    Attributes:
        site: which: what the block is given or hands on, what attention or the MLP adds, the neurons of a dense MLP, what the
            MLP or the experts are given, or, heads laid end to end, queries as their projection gives them and head outputs
            as the output projection is given them.
    """

    site: StreamSite = RESID_POST  # type: ignore[assignment]  # a constant of this value


@dataclass(frozen=True, kw_only=True)
class AlongVector(StreamEdit):
    """An edit along a direction.

    Attributes:
        vector: as many numbers as the stream is wide: d_model; for the neurons of an MLP their number; for heads their number times
            d_head.
    """

    vector: Sequence[float] = ()


@edit("add")
@dataclass(frozen=True, kw_only=True)
class Add(AlongVector):
    """Add strength · vector."""


@edit("project_out")
@dataclass(frozen=True, kw_only=True)
class ProjectOut(AlongVector):
    """Take the component along the vector out."""


@edit("clamp")
@dataclass(frozen=True, kw_only=True)
class Clamp(AlongVector):
    """Hold the component along the unit vector between two bounds.

    Attributes:
        low, high: bounds in units of activation; None for none.
    """

    low: float | None = None
    high: float | None = None


@edit("set_channel")
@dataclass(frozen=True, kw_only=True)
class SetChannel(StreamEdit):
    """Set channels of the stream to given values.

    Attributes:
        channels: which.
        values: one a channel; None for 0. (A calibrated mean is a value: `moescope.probes.effects.calibration` finds it.)
        above: only where |x| exceeds it; None for everywhere.
    """

    channels: Sequence[int] | int = ()
    values: Sequence[float] | None = None
    above: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "channels", as_tuple(self.channels))


@edit("mask_head")
@dataclass(frozen=True, kw_only=True)
class MaskHead(Edit):
    """Take attention heads out.

    Attributes:
        heads: query heads.
        how: `zero`: the head's output is 0; `uniform`: it attends to every key it can see alike (its query is 0).
        block: which attention of a layer, as in sites.
    """

    heads: Sequence[int] | int = ()
    how: Literal["zero", "uniform"] = "zero"
    block: str = "attn"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "heads", as_tuple(self.heads))


@edit("skip")
@dataclass(frozen=True, kw_only=True)
class Skip(Edit):
    """Leave out a whole block, or what its attention or its MLP adds.

    Attributes:
        part: which.
    """

    part: Literal["block", "attn", "mlp"] = "block"


@edit("patch")
@dataclass(frozen=True, kw_only=True)
class Patch(StreamEdit):
    """Put in vectors recorded in another run of the same texts, at every token that run kept there.

    Attributes:
        run: name of the run, with vectors recorded at the site (`record(..., sites=...)`); `model.edited(…, sources={name: run})`
            needs the `Run`, `ms.effect` finds it in its store.
    """

    run: str = ""
