"""Retrieval heads: which heads look at the needle's token when it is copied into the answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from moescope.core.errors import InputError
from moescope.probes.generation import check_can_generate
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.head_map import HeadMap, head_map
from moescope.probes.phenomena.head_run import HeadRun, Kept
from moescope.probes.phenomena.head_scores import HeadMetric, HeadScores
from moescope.probes.phenomena.needle_grid import DEPTHS, check_room, needle_cost, needle_grid
from moescope.probes.phenomena.needle_prompts import NeedlePrompt
from moescope.probes.phenomena.needle_trials import Trial, run_trial
from moescope.probes.phenomena.needles import Needle
from moescope.probes.progress import RunProgress
from moescope.store.store import Store

SCORE, ONCE, ACTIVE = "retrieval score", "retrieval score, each place once", "retrieval activation"
GIVEN = "retrieval score, answer given"
CHANCE, CHANCE_ONCE = "even choice of key", "even choice of key, each place once"
CHANCE_ACTIVE, CHANCE_GIVEN = "even choice of key, activation", "even choice of key, answer given"
THRESHOLD, STRONG = 0.1, 0.5  # of a retrieval head, and of a strong one
_NULLS = {SCORE: CHANCE, ONCE: CHANCE_ONCE, ACTIVE: CHANCE_ACTIVE, GIVEN: CHANCE_GIVEN}
_PARTS = {
    SCORE: "score", ONCE: "once", CHANCE: "chance", CHANCE_ONCE: "chance_once", CHANCE_ACTIVE: "chance_active"
}  # fmt: skip


def retrieval_heads(
    model: LiveModel,
    corpus: Any = None,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    needles: int | Sequence[Needle] = 2,
    prompts: Sequence[NeedlePrompt] | None = None,
    steps: int = 50,
    chat: bool | None = None,
    given: bool = True,
    minimum: int = 5,
    store: Store | None = None,
    run_name: str = "retrieval heads",
    progress: bool = True,
) -> HeadScores:
    """The retrieval score of every head, by the needle-in-a-haystack protocol.

    A needle (one sentence with a fact) is hidden in a long text and asked for. While the model answers greedily, with its cache,
    a head scores 1/n in a step if the key its query attends to most lies among the n tokens of the answer in the prompt, and
    the token written is the one there. A trial counts if over half of the answer's words are in the response (ROUGE-1 recall);
    the score is the mean over trials that count. A retrieval head has at least 0.1, a strong one 0.5.

    * `retrieval score`: as published; a place credited in several steps counts several times, so that it can exceed 1;
    * `retrieval score, each place once`: share of the answer's tokens that the head copied;
    * `retrieval activation`: share of counted trials in which the head scored at all;
    * `retrieval score, answer given`: ours, and no published score: the needle's own answer is fed after the prompt, so that
      models too weak to answer can be looked at; every trial counts. Never compare it with the others.

    The chance level is the score of a head whose top key is drawn evenly from all it can see.

    Where this differs from the authors' code: an answer's place is told by the tokenizer's offsets (theirs searches for a window
    with 0.9 of the answer's ids and scores 0 in silence where the tokenizer splits it differently; `authors_span` tells what it
    finds); an answer that begins with a line break goes on; recall compares whole words, without stemming.

    Args:
        model: a causal language model that generates with a cache.
        corpus: texts to hide needles in, anything `Corpus.load` takes; None for a bundled text in the public domain.
        lengths: tokens of prompts; None for 2,048 (or what the context leaves) and half of it.
        depths: shares of the text before the needle, moved back to the end of a sentence.
        needles: how many of the bundled ones, or one's own. There are lengths × depths × needles trials, 12 by default.
        prompts: the trials themselves, instead of all that.
        steps: tokens of an answer at most.
        chat: use the tokenizer's chat template; None for where it has one.
        given: the variant with the answer fed.
        minimum: counted trials below which scores are withheld.
        store: where to keep them: a run of its own, whose sequences are the prompts (tables `heads`, `head_sequences`).
        run_name: its name.
        progress: tell the cost before it begins, and draw a bar, on stderr.

    Raises:
        InputError: no attention or cache, no tokenizer, a context too short for a needle, a needle whose tokens cannot be told.

    Source: arXiv 2404.15574, and its authors' code.

    Example:
        >>> import moescope as ms
        >>> found = retrieval_heads(ms.load("demo"), lengths=[160], depths=[0.5], needles=1, steps=4, progress=False)
        >>> found.withheld["retrieval score"].split(":")[0]
        '0 of 1 trials counted'
    """
    if steps < 1 or minimum < 1:
        raise InputError("steps and minimum are at least 1", found=f"steps {steps}, minimum {minimum}")
    check_can_generate(model)
    heads = head_map(model)
    if prompts is None:
        prompts = needle_grid(model, corpus, lengths=lengths, depths=depths, needles=needles, steps=steps, chat=chat)
    if not prompts:
        raise InputError("there is no prompt to run")
    check_room(model, prompts, steps)
    settings = {"protocol": "needles", "trials": len(prompts), "steps": steps, "given": given, "minimum": minimum}
    with HeadRun.open(model, store, run_name, settings, seed=0) as run:
        if progress:
            Console(stderr=True).print(f"{needle_cost(model, prompts, heads, steps=steps, given=given)}.")
        trials = run_trials(model, prompts, heads, steps=steps, given=given, progress=progress)
        found = scores_of(heads, trials, minimum=minimum, given=given)
        kept: list[Kept] = [(list(t.prompt.ids), t.prompt.text, f"needle {t.prompt.number}") for t in trials]
        return run.kept(found, kept, summary={"counted_trials": sum(t.response.counted for t in trials)})


def run_trials(
    model: LiveModel,
    prompts: Sequence[NeedlePrompt],
    heads: HeadMap | None,
    *,
    steps: int = 50,
    given: bool = True,
    progress: bool = False,
) -> list[Trial]:
    """Answer every prompt in turn; see `moescope.probes.phenomena.needle_trials.run_trial`."""
    trials: list[Trial] = []
    total = sum(len(prompt.ids) for prompt in prompts)
    started, done = time.perf_counter(), 0
    with RunProgress("needle trials", total, shown=progress) as bar:
        for prompt in prompts:
            trials.append(run_trial(model, prompt, heads, steps=steps, given=given))
            done += len(prompt.ids)
            bar.advance_to(done, done, time.perf_counter() - started)
    return trials


def scores_of(heads: HeadMap, trials: Sequence[Trial], *, minimum: int = 5, given: bool = True) -> HeadScores:
    """The scores that trials give, withheld where too few of them count."""
    free = [trial.free for trial in trials]
    assert all(credit is not None for credit in free), "trials that read attention"
    counted = np.array([int(trial.response.counted) for trial in trials])
    metrics = {
        name: HeadMetric(name, np.stack([getattr(c, part) for c in free]) * counted[:, None], counted)
        for name, part in _PARTS.items()
    }
    metrics[ACTIVE] = HeadMetric(ACTIVE, (metrics[SCORE].sums > 0).astype(float), counted)
    withheld = {}
    if counted.sum() < minimum:
        reason = (
            f"{counted.sum()} of {len(trials)} trials counted: fewer than {minimum}; the model answers too rarely. Ask for shorter "
            f"prompts (lengths) or more needles, or read {GIVEN!r}"
        )
        withheld = dict.fromkeys(metrics, reason)
    if given:
        ones = np.ones(len(trials), np.int64)
        told = [trial.given for trial in trials]
        for name, part in ((GIVEN, "score"), (CHANCE_GIVEN, "chance")):
            metrics[name] = HeadMetric(name, np.stack([getattr(c, part) for c in told]), ones)
    return HeadScores(heads, metrics, _NULLS, tuple(map(_facts, trials)), withheld, tuple(_notes(heads, trials)))


def _facts(trial: Trial) -> dict[str, Any]:
    prompt = trial.prompt
    return {
        "needle": prompt.number,
        "answer": prompt.needle.answer if prompt.needle else None,
        "length": prompt.length or len(prompt.ids),
        "depth": prompt.depth,
        "span": list(prompt.span),
        "authors_span": list(prompt.authors_span),
        "response": trial.response.text or list(trial.response.ids),
        "recall": round(trial.response.recall, 4),
        "counted": trial.response.counted,
        "exact": trial.response.exact,
        "hidden_layers": list(trial.hidden_layers),
    }


def _notes(heads: HeadMap, trials: Sequence[Trial]) -> list[str]:
    counted = sum(trial.response.counted for trial in trials)
    notes = [f"{counted} of {len(trials)} trials counted (ROUGE-1 recall over 50 %)."]
    hidden = sorted({layer for trial in trials for layer in trial.hidden_layers})
    if hidden:
        touched = sum(bool(trial.hidden_layers) for trial in trials)
        notes.append(
            f"In {touched} trials the needle lay beyond the sliding window of {len(hidden)} layers (the first is {hidden[0]}): their "
            "heads cannot see it and score 0 there."
        )
    texts = [trial for trial in trials if trial.prompt.needle is not None]
    lost = sum(trial.prompt.authors_span == (-1, -1) for trial in texts)
    if lost:
        notes.append(
            f"In {lost} of {len(texts)} prompts the search of the authors' code finds no answer, and would score 0 in silence: this "
            "tokenizer splits it differently in its context."
        )
    return notes + [f"Not looked at: {reason}" for reason in heads.refused]
