"""`phenomena`: massive activations, attention sinks, super experts and retrieval heads of a model, and the chain between them cut."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.core.result import Result

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel
    from moescope.probes.phenomena.chain_cuts import Cut
    from moescope.probes.phenomena.head_scores import HeadScores
    from moescope.probes.phenomena.massive import MassivePlaces
    from moescope.probes.phenomena.protocol import Asked, Prepared
    from moescope.probes.phenomena.super_experts import Expert
    from moescope.probes.phenomena.writers import Part
    from moescope.store.run import Run
    from moescope.store.store import Store

_LEADING = 5  # heads that are cut, and whose score is read under other cuts
_THRESHOLD = 0.1
_NAME = "phenomena"
_PROMPTS = 6


def phenomena(
    model: Any,
    corpus: Any = None,
    store: Store | str | Path | None = None,
    *,
    name: str | None = None,
    texts: int = 16,
    max_length: int = 128,
    batch_size: int = 4,
    cut_texts: int = 8,
    controls: int = 5,
    needles: bool = True,
    full_grid: bool = False,
    trials: int | None = None,
    generate: int = 24,
    seed: int = 0,
    progress: bool = True,
    tell: Callable[[str], None] | None = None,
) -> Result:
    """Which phenomena does a model have, and what is left of each once the one before it is cut?

    The texts are recorded; massive activations, attention sinks, super experts (every published rule), induction and
    retrieval heads are looked for; the writer of the massive activation is found by taking its value apart (in models with
    experts: the super experts by the paper's rule, where it names any); then each link is cut, and beside each cut the same
    is cut at random. Everything lands in the store: `massive_activations`, `super_experts`, `heads`, `effects` and
    `effect_sequences`; the induction and needle protocols are runs of their own.

    Args:
        model: from `moescope.load`, or what it takes.
        corpus: anything `Corpus.load` takes; None for the bundled one. Needles are hidden in it too.
        store: a `Store`, or the path of one; None to keep nothing but the result.
        name: of the run; None for `phenomena`, numbered.
        texts: documents, spread evenly over the corpus; max_length: tokens of each at most.
        batch_size: sequences a forward pass.
        cut_texts: how many of them are run under each cut.
        controls: random cuts beside each.
        needles: run needle trials.
        full_grid: the whole grid of them: 20 lengths × 10 depths × 3 needles.
        trials: of the needle protocol; None for about 12.
        generate: tokens written greedily after each of 6 prompts under the writer's cut, for repetition; 0 for none.
        seed: of everything random.
        progress: draw bars, on stderr or in the notebook.
        tell: called with what it will cost before it begins, and with each step; None for nobody.

    Returns:
        The result of analysis `phenomena_chain`.

    Raises:
        InputError: a corpus or numbers that make no sense, a name that is taken, a model without a residual stream.
        RunError: the model failed.

    Example:
        >>> import moescope as ms
        >>> found = ms.phenomena(ms.load("demo"), ["Hello world, how are you?", "The sea was calm."], texts=2, max_length=16,
        ...                   needles=False, generate=0, controls=1, progress=False)
        >>> found.name
        'phenomena_chain'
    """
    from moescope.probes.loading import load
    from moescope.probes.phenomena.protocol import Asked, prepared

    asked = Asked(texts, max_length, batch_size, cut_texts, controls, needles, full_grid, trials, generate, seed)
    asked.check()
    live: LiveModel = load(model) if isinstance(model, (str, Path)) else model
    say = tell or (lambda _: None)
    with _opened(store) as opened:
        called = _free_name(opened, name)
        ready = prepared(live, corpus, asked)
        for line in ready.cost.lines():
            say(line)
        return _Phenomena(live, ready, asked, opened, called, progress=progress, say=say).run()


class _Phenomena:
    """One call of `phenomena`."""

    def __init__(
        self, model: LiveModel, ready: Prepared, asked: Asked, store: Store, name: str, *,
        progress: bool, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.model, self.ready, self.asked, self.store, self.name = model, ready, asked, store, name
        self.progress, self.say = progress, say
        self.notes = list(ready.notes)

    def run(self) -> Result:
        from moescope.probes.phenomena.massive import massive_places
        from moescope.probes.phenomena.protocol import recorded
        from moescope.routing.phenomena.layer_ranges import layer_ranges
        from moescope.routing.phenomena.massive_records import forming_layers

        self.say("recording the texts")
        run = recorded(self.model, self.ready, self.asked, self.store, self.name, progress=self.progress)
        self._other_beginning()
        heads = self._heads(run)
        named = write_rules(run) if self.model.anatomy.moe and run.rows("experts") else {}
        forming = forming_layers(run)
        places = massive_places(run, layer=forming[0] if forming else None)
        if forming and len(forming) > 1:
            self.notes.append(
                f"Massive activations form in blocks {layer_ranges(forming)}; they are cut after the first of these."
            )
        cuts = self._cuts(run, places, named, heads)
        if cuts:
            self._measure(run, cuts, places, heads)
        result = analyze(run, "phenomena_chain", allow_incomplete=True, uncut=True)
        return dataclasses.replace(result, notes=(*result.notes, *self.notes))

    def _other_beginning(self) -> None:
        from moescope.probes.phenomena.massive import massive_places
        from moescope.probes.phenomena.protocol import first_condition, other_beginning
        from moescope.routing.phenomena.massive_records import forming_layers

        if self.model.tokenizer is None:
            self.notes.append("Without a tokenizer texts have no token for their beginning to be added or left out.")
            return
        other, said = first_condition(self.model)
        if other is None:
            self.notes.append(said)
            return
        self.say(f"recording texts {other}")
        run = other_beginning(self.model, self.ready.corpus, other, self.asked, self.store, f"{self.name}, {other}")
        forming = forming_layers(run)
        found = massive_places(run, layer=forming[0] if forming else None)
        told = (
            "no massive activation"
            if found is None
            else f"massive activations in channel {found.channel} from block {found.layer} on, |x| up to {found.peak:,.5g}, in "
            f"{len(found.places)} of {run.rows('sequences')} texts"
        )
        self.notes.append(f"{said} {other[:1].upper()}{other[1:]}: {told}.")

    def _heads(self, run: Run) -> list[tuple[int, str, int]]:
        """Heads that lead, by retrieval score or else by induction score; all scores are kept beside the run's."""
        from moescope.probes.phenomena.chain import fitting
        from moescope.probes.phenomena.induction import ECHO, INDUCTION, induction_heads
        from moescope.probes.phenomena.protocol import (
            INDUCTION_DRAWS,
            INDUCTION_REPEATS,
            INDUCTION_SEGMENT,
            keep_scores,
        )
        from moescope.probes.phenomena.retrieval import GIVEN, ONCE, SCORE, retrieval_heads

        self.say("induction heads")
        leading: list[tuple[int, str, int]] = []
        try:
            segment, repeats = fitting(self.model, INDUCTION_SEGMENT, INDUCTION_REPEATS)
            found = induction_heads(
                self.model, segment=segment, repeats=repeats, draws=INDUCTION_DRAWS, seed=self.asked.seed,
                store=self.store, run_name=f"{self.name}, induction heads",
            )  # fmt: skip
        except InputError as refused:
            self.notes.append(f"No induction heads: {refused}")
            return []
        keep_scores(run, found, (INDUCTION, ECHO))
        leading = _leading(found, INDUCTION)
        if self.ready.prompts:
            self.say("needle trials")
            try:
                trials = retrieval_heads(
                    self.model, prompts=self.ready.prompts, store=self.store, run_name=f"{self.name}, retrieval heads",
                    progress=self.progress,
                )  # fmt: skip
            except InputError as refused:
                self.notes.append(f"No needle trials: {refused}")
            else:
                keep_scores(run, trials, (SCORE, ONCE, GIVEN))
                if SCORE in trials.withheld:
                    self.notes.append(f"The {SCORE} is withheld: {trials.withheld[SCORE]}")
        if not leading:
            self.notes.append(f"No head has an induction score of {_THRESHOLD:g}: no heads are cut.")
        return leading

    def _cuts(
        self,
        run: Run,
        places: MassivePlaces | None,
        named: dict[str, list[Expert]],
        heads: Sequence[tuple[int, str, int]],
    ) -> list[Cut]:
        from moescope.probes.effects.controls import loads_of
        from moescope.probes.phenomena.chain import chosen_batches
        from moescope.probes.phenomena.chain_cuts import expert_cut, heads_cut, massive_cuts, part_cut, part_name
        from moescope.probes.phenomena.massive import stream_means
        from moescope.probes.phenomena.writers import Place, take_apart

        draws, seed = self.asked.controls, self.asked.seed
        loads = loads_of(run) or None
        batches, calibration = chosen_batches(
            self.ready.plan, texts=self.asked.cut_texts, batch_size=self.asked.batch_size
        )
        self._batches = batches
        cuts: list[Cut] = []
        experts = _routed(named.get("paper", []))
        if any(expert < 0 for found in named.values() for _, _, expert in found):
            self.notes.append(
                "Shared experts are named too; they fill no slot that could be put at zero, and are not cut."
            )
        parts: tuple[Part, ...] = ()
        if places is not None:
            self.say("taking the massive activation apart")
            at = [
                Place(s.sequence_id, places.layer, places.places[s.sequence_id], places.channel)
                for batch in batches for s in batch.sequences
                if places.places.get(s.sequence_id, len(s.token_ids)) < len(s.token_ids)
            ]  # fmt: skip
            if at:
                origin = take_apart(self.model, batches, at)
                parts = origin.writers()
                told = ", ".join(f"{part_name(part)} {part.share:.0%}" for part in parts)
                self.notes.append(
                    f"The massive activation taken apart, mean of {origin.sequences} texts: {told or 'no single writer'} of "
                    f"{origin.value:,.5g} after block {origin.layer} in channel {origin.channel}."
                )
        if not experts and places is None:
            experts = sorted({e for found in named.values() for e in _routed(found)})
            if experts:
                self.notes.append(
                    "No rule that asks for massive activations names an expert; those that relative rules name are cut."
                )
        try:
            if experts:
                cuts.append(expert_cut(self.model, experts, loads, draws=draws, seed=seed))
            elif parts:
                cuts.append(part_cut(self.model, parts, loads, draws=draws, seed=seed))
        except InputError as refused:
            self.notes.append(f"The writer is not cut: {refused}")
        if places is not None:
            means = stream_means(self.model, calibration, places.layer, places.other_channels)
            cuts += massive_cuts(self.model, places, means, draws=draws, seed=seed)
        if heads:
            cuts.append(heads_cut(self.model, heads, draws=draws, seed=seed))
        self.notes += [f"{cut.link}: {note}" for cut in cuts for note in cut.notes]
        return cuts

    def _measure(
        self, run: Run, cuts: list[Cut], places: MassivePlaces | None, heads: Sequence[tuple[int, str, int]]
    ) -> None:
        from moescope.probes.phenomena.chain import cut_links, passes_of, stored
        from moescope.probes.phenomena.chain_health import with_repetition
        from moescope.probes.progress import RunProgress
        from moescope.store.effects import write_effects

        self.say("cutting links")
        total = passes_of(cuts) * (len(self._batches) + (2 if heads else 0))
        done = 0
        with RunProgress(f"cutting {len(cuts)} link{'s' * (len(cuts) > 1)}", total, shown=self.progress) as bar:

            def advance() -> None:
                nonlocal done
                done += 1
                bar.advance_to(done, 0, 0.0)

            effects, sums = cut_links(
                self.model, self._batches, cuts, places=places, heads=heads, seed=self.asked.seed, tell=advance
            )
        if self.asked.generate:
            self.say("generating under the writer's cut")
            effects, note = with_repetition(
                self.model, self.ready.plan, effects, tokens=self.asked.generate, prompts=_PROMPTS, seed=self.asked.seed
            )
            self.notes += [note] if note else []
        write_effects(self.store, stored(effects, sums, run))


def write_rules(run: Run) -> dict[str, list[Expert]]:
    """Hold a run's experts against every published rule, and write what they name into `super_experts`.

    Returns:
        Rule → (layer, block, expert) of those it names.
    """
    from moescope.routing.phenomena.expert_outputs import expert_outputs
    from moescope.routing.phenomena.super_expert_rules import RULES, judge
    from moescope.store.phenomena_rows import SuperExpertRow, write_super_experts

    outputs = expert_outputs(run)
    found: dict[str, list[Expert]] = {}
    rows = []
    for rule in RULES:
        ruled = judge(outputs, rule, percentile=99.5, fraction=0.1, share=0.75)
        chosen = outputs.frame[ruled.chosen] if ruled is not None else outputs.frame[:0]
        found[rule] = [(int(r.layer), str(r.block), int(r.expert)) for r in chosen.itertuples()]
        if ruled is not None:
            rows += [
                SuperExpertRow(rule, *e, float(v), ruled.threshold)
                for e, v in zip(found[rule], chosen["value"], strict=True)
            ]
    write_super_experts(run, list(RULES), rows)
    return found


def _routed(experts: Sequence[Expert]) -> list[Expert]:
    return [expert for expert in experts if expert[2] >= 0]


def _leading(scores: HeadScores, metric: str) -> list[tuple[int, str, int]]:
    values = scores.value(metric)
    null = scores.nulls.get(metric)
    over = (values >= _THRESHOLD) & (values > 2 * scores.value(null) if null is not None else True)
    return scores.top(metric, min(_LEADING, int(over.sum())))


@contextlib.contextmanager
def _opened(store: Store | str | Path | None) -> Iterator[Store]:
    from moescope.store.store import Store as OpenedStore

    if store is None:
        with tempfile.TemporaryDirectory() as folder, OpenedStore(Path(folder) / "phenomena.duckdb") as opened:
            yield opened
    elif isinstance(store, (str, Path)):
        with OpenedStore(store) as opened:
            yield opened
    else:
        yield store


def _free_name(store: Store, name: str | None) -> str:
    """The name asked for, if it is free; or the first free one."""
    taken = {run.name for run in store.runs()}
    if name is None:
        numbered = (_NAME if n == 1 else f"{_NAME}-{n}" for n in range(1, len(taken) + 2))
        return next(n for n in numbered if n not in taken)
    if name in taken:
        raise InputError(f"{store.path} already has a run called {name!r}", fix="choose another name")
    return name
