"""Trained students as rows: their errors, their gains over dense ones, and how their routers sort tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from moescope.sae.students.fitting import Fitted, Parts
from moescope.sae.students.measures import Estimate, Units, agreement
from moescope.sae.students.networks import DenseStudent, ExpertStudent, dense_neurons
from moescope.sae.students.teacher import Pairs, Teacher

if TYPE_CHECKING:
    from moescope.sae.autoencoder import Autoencoder

StudentKind = Literal["moe", "moe_low_rank", "dense", "linear", "mean"]
Inputs = Literal["real", "gaussian"]
BETWEEN = "gaussian − real"


@dataclass(frozen=True)
class StudentRow:
    """One number of one student, as in the table `mlp_students`."""

    student: str
    inputs: str
    experts: int | None
    active: int
    share: float
    router_rank: int | None
    metric: str
    value: float
    ci_low: float | None
    ci_high: float | None
    n: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """One student to train."""

    kind: StudentKind
    active: int
    experts: int | None = None
    rank: int | None = None

    def make(self, width_in: int, width_out: int, activation: str) -> Callable[[int, torch.Tensor], nn.Module]:
        """A function from seed and inputs to a fresh one."""
        if self.kind == "dense":
            return lambda seed, _: DenseStudent(width_in, width_out, self.active, activation=activation, seed=seed)
        assert self.experts is not None
        experts = self.experts
        return lambda seed, x: ExpertStudent(
            width_in, width_out, self.active, experts=experts, router_rank=self.rank, examples=x,
            activation=activation, seed=seed,
        )  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """A trained student with its error."""

    asked: Asked
    fitted: Fitted
    fvu: Estimate
    parts: Parts
    units: Units
    test: Pairs | None

    @property
    def parameters(self) -> int:
        """That work on one token."""
        if self.fitted.modules:
            return int(self.fitted.modules[0].active_parameters)  # type: ignore[arg-type]  # both classes have it
        width_in, width_out = self.parts.train[0].shape[1], self.parts.train[1].shape[1]
        return width_out if self.asked.kind == "mean" else width_out * (width_in + 1)


def rows_of(
    done: dict[str, list[Scored]], teacher: Teacher, sae: Autoencoder | None, seed: int
) -> Iterator[StudentRow]:
    """Every row of the table `mlp_students`.

    Args:
        done: kind of inputs → trained students.
        teacher: whose parameters a share is of.
        sae: whose largest latents are compared with the routers' first choice; None for no comparison.
        seed: of shuffling latents.
    """
    gains: dict[tuple[str, str, Asked], Estimate] = {}
    for inputs, scored in done.items():
        dense = {s.asked.active: s.fvu for s in scored if s.asked.kind == "dense"}
        for s in scored:
            yield _row(s, inputs, "fvu", s.fvu, teacher, s.fitted.settings | {"seeds_fvu": _by_seed(s)})
            if s.asked.experts is None:
                continue
            width_in, width_out = s.parts.train[0].shape[1], s.parts.train[1].shape[1]
            equal = dense_neurons(s.parameters, width_in, width_out)
            for metric, other in (("gain", s.asked.active), ("gain_equal_share", equal)):
                if other in dense:
                    gains[inputs, metric, s.asked] = dense[other] - s.fvu
                    yield _row(s, inputs, metric, dense[other] - s.fvu, teacher, {"dense_neurons": other})
            yield from _of_routing(s, inputs, teacher, sae, seed)
    if set(done) < set(get_args(Inputs)):
        return
    real = {s.asked: s for s in done["real"]}
    for s in done["gaussian"]:
        yield _row(s, BETWEEN, "fvu", s.fvu - real[s.asked].fvu, teacher, {})
        for metric in ("gain", "gain_equal_share"):
            if ("real", metric, s.asked) in gains:
                between = gains["gaussian", metric, s.asked] - gains["real", metric, s.asked]
                yield _row(s, BETWEEN, metric, between, teacher, {})


def _of_routing(s: Scored, inputs: str, teacher: Teacher, sae: Autoencoder | None, seed: int) -> Iterator[StudentRow]:
    """How many experts are ever chosen; and whether tokens of one expert share their largest latent."""
    student = s.fitted.modules[0]
    assert isinstance(student, ExpertStudent)
    with torch.no_grad():
        ids = student.chosen(s.parts.test[0])[1].numpy()
    used = len(np.unique(ids)) / len(student.router)
    yield _row(s, inputs, "experts_used", Estimate(used, np.array([])), teacher, {})
    if sae is None or s.test is None or s.test.other is None:
        return
    latent = sae.encode(s.test.other.to(sae.device)).argmax(-1).cpu().numpy()
    weights = s.units.weights[:200, s.units.place]
    first = ids[:, 0]
    shuffled = np.random.default_rng(seed).permutation(latent)
    for metric, other in (("nmi", latent), ("nmi_shuffled", shuffled)):
        draws = np.array([agreement(first, other, w) for w in weights])
        yield _row(s, inputs, metric, Estimate(agreement(first, other), draws), teacher, {"sae": sae.name})


def _row(
    s: Scored, inputs: str, metric: str, found: Estimate, teacher: Teacher, settings: dict[str, Any]
) -> StudentRow:
    low, high = found.interval
    one = s.asked
    student = "moe" if one.experts is not None else one.kind
    return StudentRow(
        student, inputs, one.experts, one.active, s.parameters / teacher.parameters, one.rank, metric, found.value, low, high,
        len(s.units.place), {"active_parameters": s.parameters, **settings},
    )  # fmt: skip


def _by_seed(s: Scored) -> list[float]:
    return [float(row.sum() / s.units.spread.sum()) for row in s.fitted.errors]
