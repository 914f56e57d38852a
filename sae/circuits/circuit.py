"""The heads of a task, from discrete codes of their outputs, and what the task loses and keeps by them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.head_map import HeadMap
from moescope.probes.phenomena.head_run import HeadRun
from moescope.probes.phenomena.head_scores import HeadScores
from moescope.probes.phenomena.induction import INDUCTION, induction_heads
from moescope.probes.progress import RunProgress
from moescope.sae.circuits.ablation import Ablation, ablated, means_of
from moescope.sae.circuits.codes import HeadCoder, train_coder
from moescope.sae.circuits.head_outputs import head_outputs
from moescope.sae.circuits.keeping import facts_of, labelled, write_cuts, write_heads
from moescope.sae.circuits.prompts import CircuitTask, Prompt, circuit_task
from moescope.sae.circuits.scores import CodeScores, code_scores
from moescope.sae.ticker import ticker
from moescope.store.run import Run
from moescope.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
_SHARE = 0.05  # of the heads, where no rule is given


@dataclass(frozen=True)
class CircuitOutcome:
    """A circuit of heads.

    Attributes:
        run: whose sequences are the prompts; None without a store.
        task: what it was asked for.
        heads: every head; arrays are in its order.
        scores: from codes.
        member: [head] whether it is of the circuit.
        known: [head] what is known of it otherwise (induction scores); None where nothing is.
        coder: the autoencoder whose latents are the codes.
        codes: [prompt, head], positives first, of the prompts that scores come from.
        ablation: on other prompts; None where no head or every head is of the circuit.
        effects: ids of the two effects stored: the circuit cut, and all else cut.
        seconds: how long it took.
    """

    run: Run | None
    task: str
    heads: HeadMap
    scores: CodeScores
    member: NDArray[np.bool_]
    known: Floats | None
    coder: HeadCoder
    codes: NDArray[np.int64]
    ablation: Ablation | None
    effects: tuple[str, ...]
    seconds: float = field(compare=False)

    @property
    def members(self) -> list[tuple[int, str, int]]:
        """Heads of the circuit: layer, block, head."""
        places = [self.heads.at(int(column)) for column in np.flatnonzero(self.member)]
        return [(place.layer, place.block, head) for place, head in places]

    def df(self) -> pd.DataFrame:
        """One row a head: layer, block, head, count, null, score, p, q, member, known."""
        import pandas as pd

        s = self.scores
        at = [self.heads.at(column) for column in range(self.heads.total)]
        return pd.DataFrame(
            {
                "layer": [p.layer for p, _ in at], "block": [p.block for p, _ in at], "head": [h for _, h in at],
                "count": s.count, "null": s.null, "score": s.score, "p": s.p, "q": s.q, "member": self.member,
                "known": np.nan if self.known is None else self.known,
            }
        )  # fmt: skip


def head_circuit(
    model: LiveModel,
    store: Store | None,
    *,
    task: Any = "ioi",
    examples: int = 25,
    test_prompts: int = 25,
    codes: int = 128,
    sparsity: float = 0.3,
    steps: int = 500,
    threshold: float | None = None,
    size: int | None = None,
    fdr: float | None = None,
    positions: Literal["last", "all"] = "last",
    controls: int = 10,
    shuffles: int = 1000,
    seed: int = 0,
    run_name: str | None = None,
    progress: bool = True,
) -> CircuitOutcome:
    """Which heads does a task need, told from codes of their outputs that only its prompts have, and confirmed by cutting them?

    One small sparse autoencoder is trained on the outputs z of all heads at the last token of positive and negative prompts. A head's
    code on a prompt is its largest latent; its count the distinct codes that only positives have, |C⁺∖C⁻|; its score the softmax
    over heads of count ÷ positives. The circuit are the heads whose score, times the number of heads, is over `threshold`; or the
    first `size`; or those whose count is over that of shuffled sides at a false-discovery rate of `fdr`, which may be none.

    Confirmation is on prompts that scores never saw: the difference of logits between right and wrong answers (log-sum-exp over
    several) with the circuit's heads at their mean over the negatives, and with all other heads there, against random heads, as many
    in each layer. Traps: codes read at the last token cannot show heads that work at earlier ones; `positions="last"` cuts there
    alone, `"all"` everywhere (the mean is then over all tokens). A count grows with how varied a head's outputs are: so the shuffled
    sides. What is not known of a task is not made up: precision and recall are told for `induction` alone, against heads that
    attend to what came after a token before.

    Stored: a run of its own, whose sequences are the prompts (codes in their metadata); `heads` with metrics `circuit_score`,
    `circuit_codes`, `circuit_codes_null`, `circuit_p`, `circuit_member` and, where known, `circuit_known`, under the condition of the
    task's name; the two cuts as effects of the run, metrics `delta_logit_difference` and `base_logit_difference`.

    Args:
        model: the live model.
        store: where to keep it; None for nowhere.
        task: `ioi`, `greater_than`, `induction`, or (positive prompts, negative prompts); see `circuit_task`.
        examples: prompts of each kind that scores come from.
        test_prompts: positives that the cuts are measured on; of prompts given, the last so many positives, a half at most.
        codes: latents of the autoencoder.
        sparsity, steps: of its training.
        threshold: score × heads, 1 where all heads are alike; None for another rule.
        size: so many heads, by count, ties by how far it is over that of shuffled sides; with no rule given, 5 % of all heads.
        fdr: false-discovery rate; None for another rule.
        positions: where heads are cut.
        controls: random sets of heads.
        shuffles: of sides, for the chance level.
        seed: of everything random.
        run_name: None for `circuit of …`.
        progress: show a bar.

    Returns:
        Scores, members and logit differences; the analysis `head_circuit` tells and draws them.

    Raises:
        InputError: no such task, no heads whose outputs can be read, numbers out of range, a run's name that is taken.

    Source: O'Neill and Bui, arXiv 2405.12522.

    Example:
        >>> import moescope as ms
        >>> small = {"examples": 4, "test_prompts": 4, "steps": 5, "size": 2, "controls": 2}
        >>> found = head_circuit(ms.load("demo"), None, task="induction", **small, progress=False)
        >>> len(found.members)
        2
    """
    _check(examples, test_prompts, codes, threshold, size, fdr, controls, shuffles, steps, sparsity, positions)
    started = time.perf_counter()
    fit, test = _split(model, task, examples, test_prompts, seed)
    known = _known(model, fit.name, seed)
    name = run_name or f"circuit of {fit.name}"
    settings = {
        "protocol": "head circuit", "task": fit.name, "codes": codes, "sparsity": sparsity, "steps": steps, "threshold": threshold,
        "size": size, "fdr": fdr, "positions": positions, "controls": controls, "shuffles": shuffles,
    }  # fmt: skip
    prompts = [*fit.positives, *fit.negatives]
    sets = 2 * controls + 4
    tokens = sum(len(p.ids) for p in prompts) + sets * sum(len(p.ids) for p in test)
    with HeadRun.open(model, store, name, settings, seed=seed) as run:
        with RunProgress("head circuit", tokens, shown=progress) as bar:
            tick = ticker(bar)
            outputs = head_outputs(model, prompts, tick=tick)
            coder = train_coder(outputs.last, codes=codes, sparsity=sparsity, steps=steps, seed=seed)
            coded = coder(outputs.last)
            positive = np.arange(len(prompts)) < len(fit.positives)
            scores = code_scores(coded, positive, shuffles=shuffles, seed=seed)
            member = _members(scores, threshold, size, fdr)
            means = means_of(model, fit.negatives, outputs, len(fit.positives), positions)
            ablation = None
            if member.any() and not member.all():
                ablation = ablated(model, test, outputs, member, means, positions, controls, seed, tick)
        lined = None if known is None else _lined(known, outputs.heads)
        effects: tuple[str, ...] = ()
        summary = {
            "fvu_of_codes": coder.fvu, "active_of_codes": coder.active, "members": int(member.sum()),
            "positives": len(fit.positives), "negatives": len(fit.negatives), "test_prompts": len(test),
        }  # fmt: skip
        kept = run.kept(
            HeadScores(outputs.heads, {}, sequences=tuple(facts_of(fit, test, coded, ablation))),
            [(list(p.ids), p.text, label) for p, label in labelled(fit, test)],
            summary=summary,
        )
        if kept.run is not None and store is not None:
            write_heads(store, kept.run, run.condition, fit.name, outputs.heads, scores, member, lined)
            if ablation is not None:
                effects = write_cuts(store, kept.run, ablation, len(prompts), seed)
    return CircuitOutcome(
        kept.run,
        fit.name,
        outputs.heads,
        scores,
        member,
        lined,
        coder,
        coded,
        ablation,
        effects,
        time.perf_counter() - started,
    )


def _split(
    model: LiveModel, task: Any, examples: int, test_prompts: int, seed: int
) -> tuple[CircuitTask, list[Prompt]]:
    """Prompts that scores come from, and positives that cuts are measured on."""
    whole = circuit_task(model, task, count=examples + test_prompts, seed=seed)
    own = not isinstance(task, str)
    out = min(test_prompts, len(whole.positives) // 2) if own else test_prompts
    stop = len(whole.positives) - out
    fit = CircuitTask(whole.name, whole.positives[:stop], whole.negatives if own else whole.negatives[:examples])
    return fit, list(whole.positives[stop:])


def _known(model: LiveModel, task: str, seed: int) -> HeadScores | None:
    """Heads known otherwise: for induction, by where they attend in other random tokens that repeat."""
    if task != "induction":
        return None
    return induction_heads(model, segment=24, repeats=2, draws=4, seed=seed + 1000)


def _lined(known: HeadScores, heads: HeadMap) -> Floats:
    """[head] the same, in the order of the outputs' heads; NaN where attention could not be read."""
    found = np.full(heads.total, np.nan)
    values = known.value(INDUCTION)
    for place, part in known.heads.split(values):
        if (place.layer, place.block) in heads.slices:
            found[heads.slices[place.layer, place.block]] = part
    return found


def _members(scores: CodeScores, threshold: float | None, size: int | None, fdr: float | None) -> NDArray[np.bool_]:
    heads = len(scores.count)
    if threshold is not None:
        over: NDArray[np.bool_] = scores.score * heads > threshold
        return over
    if fdr is not None:
        called: NDArray[np.bool_] = (scores.q <= fdr) & (scores.count > scores.null)
        return called
    first = math.ceil(_SHARE * heads) if size is None else min(size, heads)
    order = np.lexsort((-(scores.count - scores.null), -scores.count))[:first]
    return np.isin(np.arange(heads), order)


def _check(
    examples: int, test_prompts: int, codes: int, threshold: float | None, size: int | None, fdr: float | None, controls: int,
    shuffles: int, steps: int, sparsity: float, positions: str,
) -> None:  # fmt: skip
    """Refuse what makes no sense, before anything runs."""
    least = {
        "examples": (examples, 4), "test_prompts": (test_prompts, 2), "codes": (codes, 2), "controls": (controls, 2),
        "shuffles": (shuffles, 20), "steps": (steps, 1), "size": (1 if size is None else size, 1),
    }  # fmt: skip
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise InputError(f"{name} cannot be {value}", expected=f"a whole number, at least {minimum}")
    rules = [name for name, rule in (("threshold", threshold), ("size", size), ("fdr", fdr)) if rule is not None]
    if len(rules) > 1:
        raise InputError("a circuit has one rule", found=" and ".join(rules), fix="give one of them")
    if threshold is not None and threshold <= 0:
        raise InputError(
            f"threshold cannot be {threshold:g}", expected="over 0; 1 is the score of heads that are all alike"
        )
    if fdr is not None and not 0 < fdr < 1:
        raise InputError(f"fdr cannot be {fdr:g}", expected="a false-discovery rate between 0 and 1")
    if sparsity < 0:
        raise InputError(f"sparsity cannot be {sparsity:g}", expected="0 or more")
    if positions not in ("last", "all"):
        raise InputError(f"positions cannot be {positions!r}", expected="last or all")
