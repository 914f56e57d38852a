"""`SaeSpec`: what to train, as plain data: the form, its size, its sparsity, its rate. `topk:d=4096,k=32` on the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from moescope.core.errors import InputError

# Form → what decides its sparsity, and what that is where nothing is said.
_BY_COUNT, _BY_L1, _BY_L0 = "k", "l1", "l0"
ARCHITECTURES: Mapping[str, str] = {
    "topk": _BY_COUNT,
    "batchtopk": _BY_COUNT,
    "matryoshka": _BY_COUNT,
    "jumprelu": _BY_L0,
    "standard": _BY_L1,
    "gated": _BY_L1,
    "transcoder": _BY_L1,
    "skip_transcoder": _BY_L1,
    "jumprelu_transcoder": _BY_COUNT,
    "jumprelu_skip_transcoder": _BY_COUNT,
}
NORMALISING = {
    "none": "none",
    "scale": "expected_average_only_in",
    "whiten": "covariance_whitening",
    "layer_norm": "layer_norm",
}
CENTRES = ("geometric_median", "mean", "zero")
_DEFAULT_EXPANSION = 8.0
# Text of the command line → field.
_SHORT = {"d": "d_sae", "x": "expansion"}


@dataclass(frozen=True)
class SaeSpec:
    """One autoencoder to train.

    Attributes:
        architecture: `topk`, `batchtopk`, `matryoshka`, `jumprelu`, `standard`, `gated`; and between two sites `transcoder`,
            `skip_transcoder` (ReLU with an L1 penalty), `jumprelu_transcoder`, `jumprelu_skip_transcoder` (trained by BatchTopK).
        d_sae: latents.
        expansion: latents for each component of a vector, instead of `d_sae`; 8 where neither is given.
        k: latents active on a vector: exactly at most (topk), or on average over a batch. 32 where nothing is given.
        l1: coefficient of the L1 penalty (standard, gated, transcoders).
        l0: coefficient of the L0 penalty (jumprelu): what one more active latent costs, in squared error of a vector.
        target_l0: instead of `l0`, active latents that jumprelu is pulled to by a quadratic penalty.
        aux: coefficient of the loss by which latents that are dead learn what the living leave over (forms with `k`).
        widths: of the nested autoencoders of a matryoshka, growing; None for an eighth, a quarter, a half and all.
        lr: rate of Adam; None for 2e-4 · sqrt(2^14 / d_sae), which falls as the root of the width does (Gao et al. 2024), but
            at most 1e-3.
        warm_up: share of the steps in which the rate, and the penalty's coefficient, grow from 0.
        decay: share of the steps at the end in which the rate falls to 0.
        normalise: `scale` multiplies all vectors by the one number that makes their mean norm sqrt(d), `whiten` by the matrix
            that makes their covariance 1, `layer_norm` gives each vector mean 0 and deviation 1, `none` leaves them. Scale and
            matrix are folded into the weights at the end.
        centre: where the decoder's bias begins: `geometric_median` of a sample (Gao et al. 2024), its `mean`, or `zero`, which
            is SAELens' own.
        dead_after: vectors on which a latent has to be silent to be dead; None for 10 million (Gao et al. 2024), or a tenth
            of the training where that is less.
        seed: of the first weights; None for the training's.

    Example:
        >>> spec = SaeSpec.parse("topk:d=4096,k=32")
        >>> spec.d_sae, spec.k, str(spec)
        (4096, 32, 'topk:d=4096,k=32')
    """

    architecture: str = "topk"
    d_sae: int | None = None
    expansion: float | None = None
    k: float | None = None
    l1: float | None = None
    l0: float | None = None
    target_l0: float | None = None
    aux: float = 1.0
    widths: tuple[int, ...] | None = None
    lr: float | None = None
    warm_up: float = 0.05
    decay: float = 0.2
    normalise: str = "scale"
    centre: str = "geometric_median"
    dead_after: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _one_of("architecture", self.architecture, tuple(ARCHITECTURES))
        _one_of("normalise", self.normalise, tuple(NORMALISING))
        _one_of("centre", self.centre, CENTRES)
        if self.d_sae is not None and self.expansion is not None:
            raise InputError("d_sae and expansion both say how many latents there are", fix="give one of them")
        for name in ("d_sae", "expansion", "k", "target_l0", "lr", "dead_after"):
            _check(name, getattr(self, name), low=0.0, strict=True)
        for name in ("l1", "l0", "aux"):
            _check(name, getattr(self, name), low=0.0, strict=False)
        for name in ("warm_up", "decay"):
            _check(name, getattr(self, name), low=0.0, strict=False)
        if self.warm_up + self.decay > 1:
            raise InputError("warm_up and decay are shares of the steps", found=f"{self.warm_up} + {self.decay} over 1")
        self._check_sparsity()
        self._check_normalising()

    def _check_sparsity(self) -> None:
        kind = ARCHITECTURES[self.architecture]
        fits = {_BY_COUNT: ("k",), _BY_L1: ("l1",), _BY_L0: ("l0", "target_l0")}[kind]
        wrong = [n for n in ("k", "l1", "l0", "target_l0") if getattr(self, n) is not None and n not in fits]
        if wrong:
            raise InputError(
                f"{self.architecture} has no {wrong[0]}",
                expected=f"its sparsity by {' or '.join(fits)}",
                fix="leave it out",
            )
        if self.l0 is not None and self.target_l0 is not None:
            raise InputError("l0 and target_l0 are two ways to ask for sparsity", fix="give one of them")
        if self.architecture == "topk" and self.k is not None and self.k != int(self.k):
            raise InputError(
                "topk keeps a whole number of latents", found=f"k={self.k:g}", fix="use batchtopk, or round it"
            )
        if self.widths is not None and self.architecture != "matryoshka":
            raise InputError(f"{self.architecture} has no nested widths", fix="use matryoshka, or leave widths out")
        growing = self.widths is None or all(a < b for a, b in zip((0, *self.widths), self.widths, strict=False))
        if not growing:
            raise InputError("the nested widths of a matryoshka grow", found=str(self.widths))

    def _check_normalising(self) -> None:
        if self.normalise == "layer_norm" and ARCHITECTURES[self.architecture] == _BY_COUNT:
            raise InputError(
                f"{self.architecture} cannot be trained on vectors that are normalised one by one",
                found="its loss for dead latents compares what they give with the vector as it was",
                fix="use normalise=scale",
            )
        if self.is_transcoder and self.normalise not in ("none", "scale"):
            raise InputError(f"{self.architecture} is trained with normalise=none or scale", found=self.normalise)

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts one site from another."""
        return self.architecture.endswith("transcoder")

    def latents(self, width: int) -> int:
        """How many latents it has over vectors of `width` components.

        Raises:
            InputError: fewer than are to be active, or than the nested widths need.
        """
        count = self.d_sae if self.d_sae is not None else round((self.expansion or _DEFAULT_EXPANSION) * width)
        active = self.sparsity if ARCHITECTURES[self.architecture] == _BY_COUNT else (self.target_l0 or 0)
        if count < 1 or active > count:
            raise InputError(
                f"{self} has {count:,} latents, of which {active:g} are to be active",
                fix="give it more, or fewer active",
            )
        if self.widths is not None and self.widths[-1] > count:
            raise InputError(f"{self} has {count:,} latents", found=f"a nested width of {self.widths[-1]:,}")
        return count

    @property
    def sparsity(self) -> float:
        """The number that decides sparsity: `k`, `l1`, `l0` or `target_l0`, with its default."""
        given = {"k": self.k, "l1": self.l1, "l0": self.target_l0 if self.l0 is None else self.l0}
        kind = ARCHITECTURES[self.architecture]
        found = given[kind]
        return float(found) if found is not None else {"k": 32.0, "l1": 5.0, "l0": 1.0}[kind]

    def rate(self, d_sae: int) -> float:
        """The rate of Adam.

        Example:
            >>> SaeSpec(lr=None).rate(2**16)
            0.0001
        """
        return self.lr if self.lr is not None else min(1e-3, 2e-4 * math.sqrt(2**14 / d_sae))

    def name(self, width: int) -> str:
        """A name for it, of form, size and sparsity.

        Example:
            >>> SaeSpec(d_sae=512, k=16).name(64)
            'topk-512-k16'
        """
        what = "target-l0-" if self.target_l0 is not None else ARCHITECTURES[self.architecture]
        return f"{self.architecture}-{self.latents(width)}-{what}{self.sparsity:g}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SaeSpec:
        """Read from plain data.

        Raises:
            InputError: a field it does not have.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise InputError(f"an autoencoder has no setting {unknown[0]!r}", expected=", ".join(sorted(known)))
        widths = data.get("widths")
        return cls(**{**data, "widths": tuple(widths) if widths else None})

    @classmethod
    def parse(cls, text: str) -> SaeSpec:
        """Read `form:setting=value,…`; `d` is `d_sae`, `x` is `expansion`, nested widths are joined by `+`.

        Raises:
            InputError: no such form or setting, or a value that is none.

        Example:
            >>> SaeSpec.parse("matryoshka:d=1024,k=16,widths=128+512").widths
            (128, 512)
        """
        form, _, rest = text.strip().partition(":")
        data: dict[str, Any] = {"architecture": form}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            name = _SHORT.get(key.strip(), key.strip())
            if not equals:
                raise InputError(
                    f"{part!r} in {text!r} is no setting", expected="setting=value, as in topk:d=4096,k=32"
                )
            if name in data:
                raise InputError(f"{text!r} says {key.strip()} twice")
            data[name] = _value(name, value.strip(), text)
        return cls.from_dict(data)

    def __str__(self) -> str:
        """The text it is read from, with what differs from the defaults."""
        names = {field: short for short, field in _SHORT.items()}
        said = []
        for field in fields(self):
            value = getattr(self, field.name)
            default = None if field.default is MISSING else field.default
            if field.name == "architecture" or value == default:
                continue
            shown = "+".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if _number(value) else value
            said.append(f"{names.get(field.name, field.name)}={shown if not isinstance(value, int) else value}")
        return f"{self.architecture}:{','.join(said)}" if said else self.architecture


_WHOLE = ("d_sae", "dead_after", "seed")
_WORDS = ("normalise", "centre", "architecture")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _value(name: str, text: str, whole: str) -> Any:
    if name in _WORDS:
        return text
    try:
        if name == "widths":
            return tuple(int(part) for part in text.split("+"))
        number = int(text) if name in _WHOLE else float(text)
    except ValueError as failed:
        raise InputError(f"{name}={text} in {whole!r} is no number") from failed
    return int(number) if name == "k" and float(number).is_integer() else number


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"there is no {name} {value!r}", expected=", ".join(known))


def _check(name: str, value: Any, *, low: float, strict: bool) -> None:
    if value is None:
        return
    wrong = not _number(value) or not math.isfinite(value) or value < low or (strict and value == low)
    if wrong:
        raise InputError(f"{name} is a number over {low:g}" + ("" if strict else ", or that"), found=repr(value))
