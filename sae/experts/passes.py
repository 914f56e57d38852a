"""The two passes over a run: sums over all pairs of latent and expert, then sums by document of the pairs that are kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.probes.live_model import LiveModel
from moescope.probes.progress import RunProgress
from moescope.sae.data.live import LivePass, site_vectors
from moescope.sae.experts.decisions import Decisions, decisions_tapped
from moescope.sae.experts.router_readings import RouterReading
from moescope.sae.experts.run_text import RunText
from moescope.sae.experts.stream_parts import StreamParts
from moescope.sae.experts.subject import MLP_IN, Router, Subject
from moescope.sae.experts.tally import GateTally, Slots, WriterTally, centred_choices, slots_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """What one batch showed.

    Attributes:
        active: [row, feature] 1 where a latent is active; rows are tokens, or token · slot.
        document: [row] document of each row, on the host.
        slots: router → what its experts add, with the same rows as `active`.
        gates: router → centred logits, decisions, and the router's rows (None where they are not known).
    """

    active: torch.Tensor
    document: Ints
    slots: Mapping[Router, Slots]
    gates: Mapping[Router, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


@dataclass
class Walk:
    """Passes over the text of a run, with what the writers and the gates need."""

    model: LiveModel
    subject: Subject
    text: RunText
    writers: list[Router]
    gates: list[Router]
    first: int
    batch_size: int
    progress: bool
    parts: dict[Router, StreamParts] = field(init=False)
    readings: dict[Router, RouterReading] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = {at: StreamParts(self.model, *at) for at in self.writers}
        self.readings = {at: RouterReading(self.model, *at) for at in self.gates}

    @property
    def device(self) -> torch.device:
        """Where latents are."""
        return self.subject.directions.device

    def steps(self, label: str) -> Iterator[Step]:
        """Run the text, batch by batch."""
        sites = [self.subject.autoencoder.site]
        sites += [site for part in self.parts.values() for site in part.sites]
        sites += [reading.logits for reading in self.readings.values()]
        asked = list(dict.fromkeys(sites))
        done, started = 0, time.perf_counter()
        with RunProgress(label, self.text.tokens, shown=self.progress) as bar:
            for batch in self.text.batches(self.batch_size):
                with self._watched() as decisions:
                    found = site_vectors(self.model, batch, asked, first=self.first)
                if len(found):
                    yield self._step(found, decisions)
                done += batch.tokens
                bar.advance_to(done, done, time.perf_counter() - started)

    @torch.no_grad()
    def _step(self, found: LivePass, decisions: Decisions) -> Step:
        active = (self.subject.activity(found) > 0).float()
        direct = self.subject.written_at.tensor == MLP_IN
        slots = {}
        for at, part in self.parts.items():
            if self.subject.by_slot:
                given = found[part.out]
                assert given.expert is not None
                out = given.vectors.float()
                slots[at] = Slots(out[:, None], given.expert.long()[:, None], out)
            else:
                slots[at] = slots_of(part.of(found), part.n_choices)
        gates = {}
        for at, reading in self.readings.items():
            logits = found[reading.logits].vectors
            pair = centred_choices(logits, decisions.at(at, found), reading.sublayer.n_choices, self.device)
            gates[at] = (*pair, reading.rows(found, direct=direct))
        per_token = len(active) // len(found)
        return Step(active, found.document.repeat(per_token), slots, gates)

    @contextmanager
    def _watched(self) -> Iterator[Decisions]:
        with ExitStack() as stack:
            decisions = stack.enter_context(decisions_tapped(self.model, self.gates))
            for reading in self.readings.values():
                stack.enter_context(reading.watched())
            yield decisions


@dataclass
class Sums:
    """What the first pass counts.

    Attributes:
        active: [feature] rows on which a latent is active, of `rows` in all.
        documents: [feature] documents in which it is.
        writers, gates: router → sums.
    """

    active: Floats
    documents: Floats
    rows: int
    writers: dict[Router, WriterTally]
    gates: dict[Router, GateTally]


def whole_sums(walk: Walk, directions: Mapping[str, torch.Tensor]) -> Sums:
    """The first pass: sums over all tokens, for every latent and expert."""
    features = len(walk.subject.features)
    writers = {at: WriterTally(dict(directions), part.n_choices + part.has_shared) for at, part in walk.parts.items()}
    gates = {at: GateTally(features, r.sublayer.n_choices, walk.device) for at, r in walk.readings.items()}
    many = 1 << 10  # documents are counted apart up to so many
    active = torch.zeros(walk.text.n_groups(many), features, dtype=torch.float32, device=walk.device)
    rows = 0
    for step in walk.steps("latents × experts"):
        rows += len(step.active)
        group = torch.from_numpy(walk.text.groups(step.document, many)).to(walk.device)
        active.index_add_(0, group, step.active)
        for at, slots in step.slots.items():
            writers[at].add(slots, step.active)
        for at, (logits, chosen, known) in step.gates.items():
            gates[at].add(logits, chosen, step.active, known)
    counted = active.double().sum(0).cpu().numpy()
    return Sums(counted, (active > 0).double().sum(0).cpu().numpy(), rows, writers, gates)


@dataclass
class PairSums:
    """Sums by group of documents, of the pairs of one router that are kept.

    Attributes:
        feature, expert: of each pair: place of the latent in the subject, id of the expert (shared experts: the last id).
        along: direction set → [group, pair] contribution over active tokens; `everywhere` over all tokens.
        chosen: [group, pair] active tokens that chose the expert.
        vectors: [pair, d_model] sum of what the expert adds over active tokens.
        logits, lifts: [group, pair] sums of centred logits and of decisions on active tokens; `all_logits`, `all_chosen` on all.
    """

    feature: Ints
    expert: Ints
    along: dict[str, Floats] = field(default_factory=dict)
    everywhere: dict[str, Floats] = field(default_factory=dict)
    chosen: Floats | None = None
    vectors: torch.Tensor | None = None
    logits: Floats | None = None
    lifts: Floats | None = None
    all_logits: Floats | None = None
    all_chosen: Floats | None = None
    sampled: Floats | None = None  # [group, sampled feature, choice] sums of centred logits over active tokens


@dataclass
class GroupSums:
    """What the second pass counts: by group of documents.

    Attributes:
        rows: [group] rows; active: [group, feature] active ones; block: router → [group, feature] the block along the decoder.
        writers, gates: router → sums of its pairs.
    """

    rows: Floats
    active: Floats
    block: dict[Router, Floats]
    writers: dict[Router, PairSums]
    gates: dict[Router, PairSums]


def group_sums(
    walk: Walk,
    directions: Mapping[str, torch.Tensor],
    writers: dict[Router, PairSums],
    gates: dict[Router, PairSums],
    sample: Ints,
    *,
    most_groups: int,
) -> GroupSums:
    """The second pass: sums by group of documents, for the pairs that are kept.

    Args:
        walk: the same as for the first.
        directions: name → [feature, d_model].
        writers, gates: router → pairs, to be filled.
        sample: latents whose whole rows of gates are kept by group.
        most_groups: documents are joined into so many groups at most.
    """
    n_groups = walk.text.n_groups(most_groups)
    features, device = len(walk.subject.features), walk.device
    on_device = _OnDevice(directions, writers, gates, sample, n_groups, device)
    rows = np.zeros(n_groups)
    active = torch.zeros(n_groups, features, dtype=torch.float32, device=device)
    main = next(iter(directions.values()))
    block = {at: torch.zeros(n_groups, features, device=device) for at in writers}
    for step in walk.steps("by document"):
        number = walk.text.groups(step.document, most_groups)
        group = torch.from_numpy(number).to(device)
        rows += np.bincount(number, minlength=n_groups)
        active.index_add_(0, group, step.active)
        for at, slots in step.slots.items():
            block[at].index_add_(0, group, (slots.added.to(device) @ main.T) * step.active)
            on_device.add_slots(at, slots, step.active, group)
        for at, (logits, chosen, _) in step.gates.items():
            on_device.add_gates(at, logits, chosen, step.active, number)
    on_device.fill(writers, gates)
    shown = {at: t.double().cpu().numpy() for at, t in block.items()}
    return GroupSums(rows, active.double().cpu().numpy(), shown, writers, gates)


class _OnDevice:
    """The second pass's accumulators."""

    def __init__(
        self,
        directions: Mapping[str, torch.Tensor],
        writers: Mapping[Router, PairSums],
        gates: Mapping[Router, PairSums],
        sample: Ints,
        groups: int,
        device: torch.device,
    ) -> None:
        self.directions, self.device, self.sample = directions, device, torch.from_numpy(sample).to(device)
        self.feature: dict[tuple[str, Router], torch.Tensor] = {}
        self.expert: dict[tuple[str, Router], torch.Tensor] = {}
        for kind, side in (("writes", writers), ("gates", gates)):
            for at, pairs in side.items():
                self.feature[kind, at] = torch.from_numpy(pairs.feature).to(device)
                self.expert[kind, at] = torch.from_numpy(pairs.expert).to(device)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, device=device)

        width = next(iter(directions.values())).shape[1]
        size = {at: len(pairs.feature) for at, pairs in writers.items()}
        self.along = {(at, name): zeros(groups, n) for at, n in size.items() for name in directions}
        self.everywhere = {key: torch.zeros_like(t) for key, t in self.along.items()}
        self.chosen = {at: zeros(groups, n) for at, n in size.items()}
        self.vectors = {at: zeros(n, width) for at, n in size.items()}
        self.logits = {at: zeros(groups, len(pairs.feature)) for at, pairs in gates.items()}
        self.lifts = {at: torch.zeros_like(t) for at, t in self.logits.items()}
        self.all_logits: dict[Router, torch.Tensor] = {}
        self.all_chosen: dict[Router, torch.Tensor] = {}
        self.sampled: dict[Router, torch.Tensor] = {}
        self.groups = groups

    def add_slots(self, at: Router, slots: Slots, active: torch.Tensor, group: torch.Tensor) -> None:
        """Count what experts add, expert by expert."""
        pair_expert, pair_feature = self.expert["writes", at], self.feature["writes", at]
        ids = slots.experts.to(self.device)
        vectors = slots.vectors.to(self.device)
        for expert in torch.unique(pair_expert).tolist():
            pairs = (pair_expert == expert).nonzero()[:, 0]
            row, slot = (ids == expert).nonzero(as_tuple=True)
            if not len(row):
                continue
            mine, features = vectors[row, slot], pair_feature[pairs]
            on = active.index_select(0, row).index_select(1, features)
            self.vectors[at].index_add_(0, pairs, on.T @ mine)
            into = group[row]
            self.chosen[at][:, pairs] += _by_group(on, into, self.groups)
            for name, rows in self.directions.items():
                given = mine @ rows.index_select(0, features).T
                self.along[at, name][:, pairs] += _by_group(given * on, into, self.groups)
                self.everywhere[at, name][:, pairs] += _by_group(given, into, self.groups)

    def add_gates(
        self, at: Router, logits: torch.Tensor, chosen: torch.Tensor, active: torch.Tensor, number: Ints
    ) -> None:
        """Count what a router does, group by group."""
        feature, expert = self.feature["gates", at], self.expert["gates", at]
        if at not in self.sampled:
            self.sampled[at] = torch.zeros(self.groups, len(self.sample), logits.shape[1], device=self.device)
            self.all_logits[at] = torch.zeros(self.groups, logits.shape[1], device=self.device)
            self.all_chosen[at] = torch.zeros_like(self.all_logits[at])
        for group in np.unique(number):
            rows = torch.from_numpy(np.flatnonzero(number == group)).to(self.device)
            on = active.index_select(0, rows).T
            mine, taken = logits.index_select(0, rows), chosen.index_select(0, rows)
            by_logit, by_choice = on @ mine, on @ taken
            self.logits[at][group] += by_logit[feature, expert]
            self.lifts[at][group] += by_choice[feature, expert]
            self.sampled[at][group] += by_logit.index_select(0, self.sample)
            self.all_logits[at][group] += mine.sum(0)
            self.all_chosen[at][group] += taken.sum(0)

    def fill(self, writers: Mapping[Router, PairSums], gates: Mapping[Router, PairSums]) -> None:
        """Bring everything to the host."""
        for at, pairs in writers.items():
            pairs.along = {name: _host(self.along[at, name]) for name in self.directions}
            pairs.everywhere = {name: _host(self.everywhere[at, name]) for name in self.directions}
            pairs.chosen, pairs.vectors = _host(self.chosen[at]), self.vectors[at]
        for at, pairs in gates.items():
            pairs.logits, pairs.lifts = _host(self.logits[at]), _host(self.lifts[at])
            pairs.sampled = _host(self.sampled[at])
            pairs.all_logits, pairs.all_chosen = _host(self.all_logits[at]), _host(self.all_chosen[at])


def _by_group(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    return torch.zeros(groups, values.shape[1], device=values.device).index_add_(0, group, values)


def _host(tensor: torch.Tensor) -> Floats:
    found: Floats = tensor.double().cpu().numpy()
    return found
