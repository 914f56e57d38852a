"""The steps by which the phenomena of a model are recorded: texts, with and without a first special token, heads."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moescope.core.errors import InputError
from moescope.core.probe import probes as probe_registry
from moescope.probes.batches import Batch, BatchPlan
from moescope.probes.corpus import Corpus, Document
from moescope.probes.forward import logits_of, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.chain import REPEATS, SEGMENT, SEQUENCES
from moescope.probes.phenomena.head_map import head_map
from moescope.probes.phenomena.head_scores import HeadScores
from moescope.probes.phenomena.needle_grid import needle_cost, needle_grid
from moescope.probes.phenomena.needle_prompts import NeedlePrompt
from moescope.probes.record import record
from moescope.store.phenomena_rows import HeadRows, write_heads
from moescope.store.run import Run
from moescope.store.store import Store

_CHARACTERS = 4  # of a text, for each token wanted: languages and code differ
_GRID_LONGEST, _GRID_LENGTHS, _GRID_DEPTHS, _GRID_NEEDLES = 5_000, 20, 10, 3
_TRIALS = 12
_BOS_TEXTS = 8
INDUCTION_DRAWS, INDUCTION_SEGMENT, INDUCTION_REPEATS = 8, 64, 4
_MOST_CUTS = 4


@dataclass(frozen=True)
class Asked:
    """What the phenomena of a model are looked for with.

    Attributes:
        texts, max_length: documents of the corpus, spread evenly, and tokens of each at most.
        batch_size: sequences a forward pass.
        cut_texts: how many of the texts are run under every cut.
        controls: random cuts beside each.
        needles: whether to run needle trials.
        full_grid: 20 lengths × 10 depths × 3 needles in place of about 12 trials.
        trials: of the needle protocol; None for 12.
        generate: tokens written after each prompt under the writer's cut; 0 to leave that out.
        seed: of everything random.
    """

    texts: int = 16
    max_length: int = 128
    batch_size: int = 4
    cut_texts: int = 8
    controls: int = 5
    needles: bool = True
    full_grid: bool = False
    trials: int | None = None
    generate: int = 24
    seed: int = 0

    def check(self) -> None:
        """Raise `InputError` for numbers that make no sense."""
        for name, least in (("texts", 2), ("max_length", 8), ("batch_size", 1), ("cut_texts", 2), ("controls", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}", found=str(getattr(self, name)))
        if self.generate < 0:
            raise InputError("generate is a number of tokens", expected="0 or more", found=str(self.generate))
        if self.trials is not None and self.trials < 1:
            raise InputError("trials must be at least 1", found=str(self.trials), fix="needles=False (--no-needles)")
        if self.full_grid and not self.needles:
            raise InputError("a full grid is one of needle trials", fix="leave out one of full_grid and needles=False")
        if self.full_grid and self.trials is not None:
            raise InputError("a full grid has its own number of trials", fix="leave out one of full_grid and trials")


@dataclass(frozen=True)
class Cost:
    """What it will take, told before it begins.

    Attributes:
        steps: step → about how many tokens go through the model, and seconds.
        notes: what will be left out, and why.
    """

    steps: dict[str, tuple[int, float]]
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """All steps together."""
        return sum(seconds for _, seconds in self.steps.values())

    def lines(self) -> list[str]:
        """A line a step, the sum last."""
        told = [f"{step}: about {tokens:,} tokens, {_clock(seconds)}" for step, (tokens, seconds) in self.steps.items()]
        return [*told, f"all together about {_clock(self.seconds)}", *self.notes]


@dataclass
class Prepared:
    """What is to be run, before anything is kept.

    Attributes:
        corpus: the texts.
        plan: cut into batches.
        prompts: of needle trials.
        cost: what it will take.
        notes: what is left out, and why.
    """

    corpus: Corpus
    plan: BatchPlan
    prompts: list[NeedlePrompt]
    cost: Cost
    notes: list[str] = field(default_factory=list)


def prepared(model: LiveModel, corpus: Any, asked: Asked) -> Prepared:
    """Choose texts and prompts, and time a pass.

    Raises:
        InputError: numbers that make no sense, a corpus that cannot be read, a model without a residual stream.
    """
    asked.check()
    if model.anatomy.no_stream is not None:
        raise InputError(f"{model.name} has no residual stream to look at", found=model.anatomy.no_stream)
    chosen = chosen_texts(Corpus.load("demo" if corpus is None else corpus), asked.texts, asked.max_length)
    longest = min(asked.max_length, model.context or asked.max_length)
    plan = BatchPlan(chosen, model.tokenizer, asked.batch_size, longest, model.anatomy.vocabulary)
    notes: list[str] = []
    prompts = _prompts(model, corpus, asked, notes) if asked.needles else []
    return Prepared(chosen, plan, prompts, _cost(model, plan, prompts, asked, notes), notes)


def chosen_texts(corpus: Corpus, texts: int, max_length: int) -> Corpus:
    """So many documents of a corpus, spread evenly over it, each cut to about so many tokens."""
    documents = list(corpus)
    if not documents:
        raise InputError(f"the corpus {corpus.name} has no text")
    places = np.unique(np.linspace(0, len(documents) - 1, min(texts, len(documents))).round().astype(int))
    return Corpus.load([_cut(documents[place], max_length) for place in places])


def first_condition(model: LiveModel) -> tuple[str | None, str]:
    """How a tokenizer begins a text by itself: the other way of doing it, and a sentence.

    Returns:
        `with BOS` or `without BOS`, what else is to be recorded; None where the tokenizer has no such token.
    """
    bos = getattr(model.tokenizer, "bos_token_id", None)
    if bos is None:
        return None, "The tokenizer has no token for the beginning of a text: there is no run with and without it."
    begins = list(model.tokenizer("a", verbose=False)["input_ids"])[:1] == [bos]
    default, other = ("with", "without") if begins else ("without", "with")
    return f"{other} BOS", f"The tokenizer begins texts {default} its token {bos}; run again {other} it."


def other_beginning(model: LiveModel, corpus: Corpus, condition: str, asked: Asked, store: Store, name: str) -> Run:
    """Record the first texts with the tokenizer's token for the beginning, or without it."""
    bos = [int(model.tokenizer.bos_token_id)] if condition == "with BOS" else []
    longest = min(asked.max_length, model.context or asked.max_length)
    ids = []
    for document in list(corpus)[:_BOS_TEXTS]:
        bare = model.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(bare):
            ids.append([*bos, *map(int, bare)][:longest])
    return record(
        model,
        Corpus.from_token_ids(ids),
        store,
        name=name,
        probes=("tokens", "residual"),
        batch_size=asked.batch_size,
        max_length=longest,
        progress=False,
    )


def recorded(model: LiveModel, ready: Prepared, asked: Asked, store: Store, name: str, *, progress: bool) -> Run:
    """Record the texts: routing and experts where there are any, the residual stream, attention."""
    names = [entry.name for entry in probe_registry if entry.default or entry.name == "attention"]
    usable = [n for n in names if probe_registry[n].function.no_use(model.anatomy) is None]
    options: dict[str, Any] = {"batch_size": asked.batch_size, "max_length": ready.plan.max_length, "seed": asked.seed}
    return record(model, ready.corpus, store, name=name, probes=usable, progress=progress, **options)


def keep_scores(run: Run, scores: HeadScores, metrics: Iterable[str]) -> None:
    """Write metrics of heads that another protocol found beside what the run itself has of them."""
    rows = []
    for name in metrics:
        metric = scores.metrics.get(name)
        if metric is None or name in scores.withheld:
            continue
        for place, values in scores.heads.split(metric.value):
            rows.append(HeadRows(place.layer, place.block, name, values, int(metric.n.sum()), metric.condition))
    if rows:
        write_heads(run, rows)


def _cut(document: Document, max_length: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"label": document.label, "source": document.source}
    if document.token_ids is not None:
        return fields | {"token_ids": list(document.token_ids[:max_length])}
    return fields | {"text": document.text[: _CHARACTERS * max_length]}


def _prompts(model: LiveModel, corpus: Any, asked: Asked, notes: list[str]) -> list[NeedlePrompt]:
    """The prompts of the needle trials; none, and a note, where this model or corpus has no room for any."""
    try:
        if asked.full_grid:
            longest = min(_GRID_LONGEST, (model.context or _GRID_LONGEST) - 128)
            lengths = sorted({int(n) for n in np.linspace(min(1_000, longest), longest, _GRID_LENGTHS)})
            depths = [float(d) for d in np.linspace(0, 1, _GRID_DEPTHS)]
            return needle_grid(model, corpus, lengths=lengths, depths=depths, needles=_GRID_NEEDLES)
        trials = asked.trials or _TRIALS
        grid = needle_grid(model, corpus, needles=max(1, min(3, -(-trials // 6))))
    except InputError as refused:
        notes.append(f"No needle trials: {refused}")
        return []
    if len(grid) <= trials:
        return grid
    kept = np.unique(np.linspace(0, len(grid) - 1, trials).round().astype(int))
    return [grid[place] for place in kept]


def _cost(
    model: LiveModel, plan: Iterable[Batch], prompts: Sequence[NeedlePrompt], asked: Asked, notes: Sequence[str]
) -> Cost:
    batches = list(plan)
    tokens = sum(batch.tokens for batch in batches)
    a_token = _seconds(model, batches[0]) / max(1, int(batches[0].lengths.max()) * len(batches[0].sequences))
    cut_tokens = tokens * min(1.0, asked.cut_texts / asked.texts) + 2 * SEQUENCES * SEGMENT * REPEATS
    passes = 1 + _MOST_CUTS * (1 + asked.controls)
    counts = {
        "recording the texts": int(3 * tokens),
        "induction heads": INDUCTION_DRAWS * INDUCTION_SEGMENT * INDUCTION_REPEATS,
        f"cutting up to {_MOST_CUTS} links, {asked.controls} random cuts beside each": int(passes * cut_tokens),
    }
    steps = {step: (count, count * a_token * 1.3) for step, count in counts.items()}
    if prompts:
        try:
            found = needle_cost(model, prompts, head_map(model), steps=50, given=True)
        except InputError as refused:
            return Cost(steps, (*notes, f"No needle trials: {refused}"))
        steps[f"{found.trials} needle trials"] = (found.tokens, found.seconds)
    return Cost(steps, tuple(notes))


def _seconds(model: LiveModel, batch: Batch) -> float:
    given = to_device(batch, model)
    best = float("inf")
    with torch.no_grad():
        for _ in range(2):  # the first also pays for what is done once
            started = time.perf_counter()
            logits_of(model, given)
            best = min(best, time.perf_counter() - started)
    return best


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def trial_shape(prompts: Sequence[NeedlePrompt]) -> str:
    """How many trials of which lengths, in words."""
    lengths = sorted({len(prompt.ids) for prompt in prompts})
    return f"{len(prompts)} trials of {lengths[0]:,} to {lengths[-1]:,} tokens" if lengths else "none"
