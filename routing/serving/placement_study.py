"""Placements fitted on half of the documents, and what they cost on the other half."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.routing.pathways.estimates import quotient
from moescope.routing.pathways.held_out import Halves
from moescope.routing.pathways.pairs import GROUPS, add_pairs
from moescope.routing.serving.batches import cut
from moescope.routing.serving.devices import Devices, at_random, contiguous, device_loads
from moescope.routing.serving.solvers import aligned, apart, by_load, stays
from moescope.routing.trace import Router, Trace

Floats = NDArray[np.float64]
Pairs = Literal["first", "all"]


@dataclass(frozen=True)
class Plan:
    """A placement of all layers, and how it was found: [layer][expert] device."""

    devices: list[Devices]
    solver: str


class FittedHalf:
    """What the solvers may look at: loads of batches and joint counts of consecutive routers, of the fitted documents."""

    def __init__(
        self, trace: Trace, routers: Sequence[Router], halves: Halves, *, devices: int, batch: int, pairs: Pairs
    ) -> None:
        self.routers, self.devices = routers, devices
        batches = cut(trace, batch, halves.fitted)
        self.loads = [batches.loads(router) for router in routers]
        self.experts = [loads.shape[1] for loads in self.loads]
        everyone = np.zeros(len(halves.fitted), np.int32)
        self.joints = [
            joint[0, :here, :there].astype(np.float64)
            for joint, here, there in zip(
                joint_steps(routers, halves.fitted, everyone, 1, pairs), self.experts, self.experts[1:], strict=False
            )
        ]

    def contiguous(self) -> Plan:
        """Experts in order of their ids."""
        return Plan([contiguous(size, self.devices) for size in self.experts], "in order of ids")

    def at_random(self, generator: np.random.Generator) -> Plan:
        """Experts drawn at random."""
        return Plan([at_random(size, self.devices, generator) for size in self.experts], "at random")

    def by_load(self) -> Plan:
        """Equal mean loads."""
        found = [by_load(loads.mean(0), self.devices) for loads in self.loads]
        return Plan(found, "largest load first, to the least loaded device")

    def apart(self, seconds: float) -> Plan:
        """Experts loaded in the same batches on different devices."""
        until = time.monotonic() + seconds
        found = [apart(loads, self.devices, until=until) for loads in self.loads]
        late = f", stopped after {seconds:g} s" if time.monotonic() > until else ""
        return Plan(found, f"swaps of two experts while the mean squared load of devices falls{late}")

    def aligned(self, seconds: float, seed: int, solver: Literal["local", "milp"]) -> Plan:
        """Experts that follow each other on one device."""
        until = time.monotonic() + seconds
        found, settled = aligned(self.joints, self.experts, self.devices, starts=4, until=until, seed=seed)
        words = "layer by layer with scipy.optimize.linear_sum_assignment, best of up to 4 starts"
        local = Plan(found, words + ("" if settled else f", stopped after {seconds:g} s"))
        if solver == "local":
            return local
        from moescope.routing.serving.integer_program import solve

        answer = solve(self.joints, self.experts, self.devices, seconds=seconds)
        if answer is None:
            return Plan(found, f"scipy.optimize.milp found none in {seconds:g} s; {local.solver}")
        placements, proved = answer
        if stays(self.joints, placements) < stays(self.joints, found):
            return Plan(found, f"scipy.optimize.milp found nothing better in {seconds:g} s; {local.solver}")
        ended = "optimal on the fitted half" if proved else f"best after {seconds:g} s, not proved optimal"
        return Plan(placements, f"scipy.optimize.milp, {ended}")


class JudgedHalf:
    """What a placement costs on the other documents."""

    def __init__(
        self, trace: Trace, routers: Sequence[Router], halves: Halves, *, devices: int, batch: int, pairs: Pairs
    ) -> None:
        self.batches = cut(trace, batch, halves.judged)
        self.loads = [self.batches.loads(router) for router in routers]
        self.groups = min(halves.documents, GROUPS)
        group = (halves.document * self.groups // halves.documents).astype(np.int32)
        self.tokens = np.bincount(group, minlength=self.groups).astype(np.float64)
        self.joints = [
            (joint.reshape(self.groups, -1).astype(np.float32), joint.shape[1:])
            for joint in joint_steps(routers, halves.judged, group, self.groups, pairs)
        ]
        self.each = [
            1.0 if pairs == "first" else float(here.top_k * there.top_k) for here, there in itertools.pairwise(routers)
        ]
        self.devices = devices

    def crossings(self, plans: Sequence[Plan]) -> Floats:
        """[plan, group of documents] crossings from layer to layer, summed over tokens and steps."""
        total = np.zeros((len(plans), self.groups))
        for step, (joint, shape) in enumerate(self.joints):
            crossed = np.ones((len(plans), *shape), np.float32)
            for number, plan in enumerate(plans):
                here, there = plan.devices[step], plan.devices[step + 1]
                crossed[number, : len(here), : len(there)] = here[:, None] != there[None, :]
                # null experts lie on no device: nothing travels to or from them
                crossed[number, len(here) :] = 0
                crossed[number, :, len(there) :] = 0
            total += crossed.reshape(len(plans), -1) @ joint.T / self.each[step]
        return total

    def slowness(self, plan: Plan) -> Floats:
        """[batch] Σ over layers of the busiest device's load over Σ of the mean load."""
        busiest, mean = np.zeros(self.batches.count), np.zeros(self.batches.count)
        for loads, placement in zip(self.loads, plan.devices, strict=True):
            held = device_loads(loads, placement)
            busiest += held.max(1)
            mean += loads.sum(1) / self.devices
        return quotient(busiest, mean)


def joint_steps(
    routers: Sequence[Router], rows: NDArray[np.int64], group: NDArray[np.int32], groups: int, pairs: Pairs
) -> list[NDArray[Any]]:
    """For each step from router to router, [group, i, j] how often experts i and j are met by one token."""
    found = []
    experts = [router.experts[rows] for router in routers]
    for number in range(len(routers) - 1):
        counts = np.zeros((groups, routers[number].n_experts, routers[number + 1].n_experts), np.int32)
        add_pairs(experts[number], experts[number + 1], group, counts, pairs)
        found.append(counts)
    return found
