"""Edits through a sparse autoencoder: its reconstruction put in, its latents changed, its code moved towards a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moescope.core.edit import edit
from moescope.core.edit_kinds.experts import refuse
from moescope.core.edit_kinds.stream import StreamEdit
from moescope.core.errors import InputError
from moescope.core.sites import RESID_POST

SpliceSite = Literal[
    "hook_resid_pre",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "mlp.hook_post",
    "mlp.hook_in",
    "attn.hook_q",
    "attn.hook_z",
    "mlp.experts.hook_out",
]

_MOST_RATE = 0.5  # at which one step arrives at a target code


@dataclass(frozen=True, kw_only=True)
class FeatureEdit(StreamEdit):
    """An edit through a sparse autoencoder.

    Attributes:
        sae: name of the autoencoder; `model.edited(…, sources={name: autoencoder})` needs the object, `ms.effect` and
            `ms.sweep` find it in their store.
        forced: use it also at another place than it reads, or in another model than it was trained for.
    """

    sae: str = ""
    forced: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sae:
            raise refuse(self, "sae", "the name of an autoencoder")


@edit("splice")
@dataclass(frozen=True, kw_only=True)
class Splice(FeatureEdit):
    """Put an autoencoder's reconstruction in the place of what it reads: x + strength · (x̂ − x); a transcoder's, in the place
    of what it predicts.

    Attributes:
        site: as for other edits of the stream; or `mlp.experts.hook_out`, what every chosen expert puts out before its weight
            (only the slots of the one expert that the autoencoder is of, where it is of one).
        keep_error: add x − x̂ again, so that nothing changes: the test that what was spliced in is all that differs.
    """

    site: SpliceSite = RESID_POST  # type: ignore[assignment]  # a constant of this value; one site more than the others
    keep_error: bool = False

    @property
    def how(self) -> str:
        """Which way it is put in: `slots` for outputs of experts, else "stream"."""
        return "slots" if self.site == "mlp.experts.hook_out" else "stream"


@edit("latents")
@dataclass(frozen=True, kw_only=True)
class Latents(FeatureEdit):
    """Change latents of an autoencoder by what they write: x + strength · Σ (z′ᵢ − zᵢ) dᵢ, z the activations, dᵢ decoder rows;
    what the autoencoder does not reconstruct stays.

    Attributes:
        latents: which.
        how: `add`: z′ = z + value; `set`: z′ = value; `scale`: z′ = value · z, 0 to take a latent out.
        values: one a latent, in units of activation (a factor for `scale`); one number for all alike.
        only_active: only at tokens where the latent is over 0 (LF-Steering, arXiv 2501.11036).
    """

    latents: Sequence[int] | int = ()
    how: Literal["add", "set", "scale"] = "add"
    values: Sequence[float] | float = ()
    only_active: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = _ids(self, "latents", self.latents)
        values = (self.values,) * len(ids) if isinstance(self.values, float) else tuple(self.values)
        object.__setattr__(self, "latents", ids)
        object.__setattr__(self, "values", values)
        if not ids:
            raise refuse(self, "latents", "one or more numbers of latents, from 0 on")
        if len(values) != len(ids):
            raise InputError(
                f"latents: {len(values)} values for {len(ids)} latents",
                expected="one value a latent, in their order, or one for all",
            )

    @property
    def ids(self) -> tuple[int, ...]:
        """The latents, as a tuple."""
        return _ids(self, "latents", self.latents)


@edit("descend")
@dataclass(frozen=True, kw_only=True)
class Descend(FeatureEdit):
    """Move the code by gradient descent, and put in what that writes: x + strength · (Dec(z_N) − Dec(z)), z_N after N steps
    (arXiv 2502.18644).

    Towards a target code: z ← z − rate · ∇‖z − target‖², which after N steps is target + (1 − 2 rate)ᴺ (z − target). With a
    logistic probe: z ← z + rate · ∇ log σ(weights · z + bias). Activations do not fall below 0.

    Attributes:
        target: a code, one number a latent.
        weights: of a logistic probe of the code, one number a latent; instead of `target`.
        bias: of the probe.
        latents: those that `target` or `weights` are of, which alone are moved; none for all.
        steps: N.
        rate: length of a step; with `target` over 0, up to 0.5, at which one step arrives.
        keep: of all latents, those of largest activation after the steps that stay over 0; none for all.
        replace: put in Dec(z_N) itself, without what the autoencoder did not reconstruct.
    """

    target: Sequence[float] | None = None
    weights: Sequence[float] | None = None
    bias: float = 0.0
    latents: Sequence[int] | int | None = None
    steps: int = 10
    rate: float = 0.05
    keep: int | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents is not None:
            object.__setattr__(self, "latents", _ids(self, "latents", self.latents))
        if (self.target is None) == (self.weights is None):
            raise InputError("descend: target or weights, and only one of them, says where to")
        given = len(self.numbers)
        if not given or (self.ids is not None and len(self.ids) != given):
            wanted = "one number a latent" if self.ids is None else f"{len(self.ids)} numbers, one a latent named"
            raise InputError(f"descend: {given} numbers to go towards", expected=wanted)
        if self.target is not None and min(self.target) < 0:
            raise refuse(self, "target", "activations, from 0 on")
        if self.steps < 0 or (self.keep is not None and self.keep < 1):
            raise refuse(self, "steps" if self.steps < 0 else "keep", "0 or more" if self.steps < 0 else "1 or more")
        if self.rate <= 0 or (self.target is not None and self.rate > _MOST_RATE):
            raise refuse(self, "rate", "over 0, with a target up to 0.5, at which one step arrives")

    @property
    def ids(self) -> tuple[int, ...] | None:
        """The latents that are moved, None for all."""
        return None if self.latents is None else _ids(self, "latents", self.latents)

    @property
    def numbers(self) -> tuple[float, ...]:
        """The target, or the probe's weights."""
        return tuple(self.target if self.target is not None else self.weights or ())


def _ids(edit: FeatureEdit, field: str, given: Sequence[int] | int) -> tuple[int, ...]:
    found = (given,) if isinstance(given, int) else tuple(given)
    if len(set(found)) != len(found) or (found and min(found) < 0):
        raise refuse(edit, field, "different numbers, from 0 on")
    return found
