"""What interventions and sweeps cost on the demo model, beside plain passes in the same process.

    .venv/bin/python benchmarks/interventions.py [--sequences 16] [--length 256] [--batch-size 8] [--threads N] [--repeats 20]
                                                 [--only edits sweeps]

Two tables, in Markdown. The first: a pass under 100 edits of experts over a plain pass of the same batch, taken in turn; the
median of the ratios. The second: every expert of every layer alone, from the edited layer on, over one whole pass an expert of
the same batches, layer by layer in turn; the bound, which is a whole pass over what remains of it on average; the largest
difference between the two; and the screening, one forward and one backward pass for all experts, with its rank correlation.
Both sweeps compare every pass with the plain one (ΔNLL, KL, flips), which is part of their time. Model and texts are bundled;
entering a session of edits is part of the sweeps' time, and is told apart in the first table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import moescope as ms
from moescope.core.edit_kinds.experts import Ablate, Bias, Scale
from moescope.core.intervention import Intervention
from moescope.core.statistics import document_weights
from moescope.probes.batches import Batch, BatchPlan
from moescope.probes.edits.session import edited
from moescope.probes.forward import DeviceBatch, logits_of, to_device
from moescope.probes.sweeps.cost import cost_of
from moescope.probes.sweeps.passes import SweepPasses
from moescope.probes.sweeps.plans import every_expert
from moescope.probes.sweeps.screening import Screened, screen
from moescope.probes.sweeps.variants import grouped
from moescope.routing.importance.rank_correlation import spearman


def main() -> None:
    given = _arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    model = ms.load("demo")
    batches = _batches(model, given)
    tokens = sum(batch.tokens for batch in batches)
    print(
        f"{model!r}; {tokens:,} tokens in {len(batches)} batches of {given.batch_size}, {torch.get_num_threads()} threads.\n"
    )
    if "edits" in given.only:
        _edits(model, to_device(batches[0], model), given.repeats)
    if "sweeps" in given.only:
        _sweeps(model, batches, given.batch_size)


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sequences", 16), ("length", 256), ("batch-size", 8), ("threads", 0), ("repeats", 20)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--only", nargs="*", default=["edits", "sweeps"], choices=["edits", "sweeps"])
    return options.parse_args()


def _batches(model: Any, given: argparse.Namespace) -> list[Batch]:
    """Texts of equal length: the bundled corpus cut into pieces."""
    plan = BatchPlan(ms.Corpus.load("demo"), model.tokenizer, 64, 512)
    ids = [token for batch in plan for sequence in batch.sequences for token in sequence.token_ids[1:].tolist()]
    step = len(ids) // given.sequences
    cut = [ids[i * step : i * step + given.length] for i in range(given.sequences)]
    return list(BatchPlan(ms.Corpus.from_token_ids(cut), None, given.batch_size, given.length))


def _edits(model: Any, batch: DeviceBatch, repeats: int) -> None:
    """Passes under many edits, each beside a plain pass."""
    print("## A pass under edits over a plain pass\n")
    print("| edits | plain, ms | edited, ms | ratio, median | 5 % to 95 % | entering, ms |\n|---|---|---|---|---|---|")
    layers, experts = model.anatomy.n_layers, model.anatomy.n_experts
    places = [(layer, expert) for layer in range(layers) for expert in range(experts)][:100]
    hundred = [Scale(layer=layer, experts=e, factor=0.5) for layer, e in places]
    hundred += [Scale(layer=0, experts=e, factor=2.0) for e in range(100 - len(hundred))]
    rows = DeviceBatch(batch.ids[:1, :64].repeat(100, 1), torch.ones(100, 64, dtype=torch.bool))
    alone = [Intervention([Ablate(layer=layer, experts=e)]) for layer, e in places]
    alone += [Intervention([Ablate(layer=0, experts=[e, e + 1])]) for e in range(100 - len(alone))]
    around = [Intervention([Ablate(layer=layer, experts=e, how="route_around")]) for layer, e in places[:96]]
    around += [Intervention([Bias(layer=0, experts=e, value=1.0)]) for e in range(100 - len(around))]
    cases = (
        ("100 edits of experts in one intervention", [Intervention(hundred)], batch, None),
        ("100 rows, each with an expert of its own taken out (zero)", alone, rows, list(range(100))),
        ("100 rows, each with another edit of the router's choice", around, rows, list(range(100))),
    )
    for name, interventions, fed, assigned in cases:
        started = time.perf_counter()
        with edited(model, interventions):
            entering = time.perf_counter() - started
        plain, cut = [], []
        with torch.no_grad():
            for _ in range(repeats + 2):
                plain.append(_timed(lambda fed=fed: logits_of(model, fed)))
                with edited(model, interventions) as session:
                    if assigned:
                        session.assign(assigned)
                    cut.append(_timed(lambda fed=fed: logits_of(model, fed)))
        ratios = [b / a for a, b in zip(plain[2:], cut[2:], strict=True)]
        low, high = np.quantile(ratios, [0.05, 0.95])
        print(
            f"| {name} | {1e3 * statistics.median(plain[2:]):.1f} | {1e3 * statistics.median(cut[2:]):.1f} | "
            f"{statistics.median(ratios):.3f} | {low:.3f} to {high:.3f} | {1e3 * entering:.1f} |",
            flush=True,
        )
    print()


def _sweeps(model: Any, batches: list[Batch], pass_size: int) -> None:
    """The exact sweep beside whole passes, and beside the screening."""
    groups = list(grouped(every_expert(model.anatomy)))
    begun, whole = SweepPasses(model, pass_size), SweepPasses(model, pass_size, resume=False)
    cost = cost_of(begun, groups, batches, draws=5)
    begun.run(groups[:1], batches[:1])
    screen(model, batches[:1])
    seconds = {"from the edited layer": 0.0, "whole passes": 0.0}
    screened, found, differences = [], [], []
    for group in groups:
        first, seconds_begun = _kept(lambda group=group: begun.run([group], batches))
        second, seconds_whole = _kept(lambda group=group: whole.run([group], batches))
        estimates, seconds_screened = _kept(lambda: screen(model, batches))
        seconds["from the edited layer"] += seconds_begun
        seconds["whole passes"] += seconds_whole
        screened.append(seconds_screened)
        found.append(first[0])
        differences.append(float(np.abs(first[0].sums - second[0].sums).max()))
    exact, plain = seconds["from the edited layer"], seconds["whole passes"]
    once = statistics.median(screened)
    experts = sum(len(group.variants) for group in groups)
    print(f"## Every one of {experts} experts alone\n")
    print("| sweep | seconds | over the exact one | |\n|---|---|---|---|")
    print(f"| whole passes, one an expert | {plain:.2f} | {plain / exact:.2f}× slower | |")
    print(
        f"| exact, from the edited layer | {exact:.2f} | 1 | bound {cost.bound:.2f}× (a whole pass over what remains); largest "
        f"difference of a sequence's sum {max(differences):.1e} |"
    )
    rho, low, high = _agreement(found, estimates)
    print(
        f"| screened | {once:.3f} | {exact / once:.1f}× faster | Spearman's ρ of estimate and exact {rho:.3f} ({low:.3f} to {high:.3f}, "
        "documents resampled); largest first |"
    )
    by_layer = ", ".join(f"L{g.group.layer} {_agreement([g], estimates)[0]:.2f}" for g in found)
    print(
        f"\nρ within layers: {by_layer}. Every layer's sweep runs its own plain pass here; the sweep in a store shares it."
    )


def _agreement(found: list[Any], estimates: Screened) -> tuple[float, float, float]:
    """ρ between exact and estimated effects of experts, with a bootstrap over sequences."""
    exact = np.concatenate([g.sums[:, 0] for g in found])
    first = np.concatenate([estimates.estimates[g.group.layer, "mlp"] for g in found])
    pairs = np.stack([exact, first])
    rho = float(spearman(pairs.sum(-1))[0, 1])
    weights = document_weights(pairs.shape[-1], draws=1000, seed=0).astype(float)
    low, high = np.quantile(spearman(np.einsum("bd,ped->bpe", weights, pairs))[:, 0, 1], [0.025, 0.975])
    return rho, float(low), float(high)


def _timed(work: Callable[[], object]) -> float:
    return _kept(work)[1]


def _kept(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    main()
