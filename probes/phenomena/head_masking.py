"""Masking retrieval heads: does the answer go when they attend evenly, and stay when as many other heads do?"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.edit_kinds.stream import MaskHead
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.statistics import bootstrap_ratio
from moescope.probes.edits.session import edited
from moescope.probes.forward import logits_in
from moescope.probes.likelihood import token_nll
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.haystack import haystack
from moescope.probes.phenomena.head_map import HeadMap, head_map
from moescope.probes.phenomena.needle_decoding import AnswerEnds, decoded, prefilled
from moescope.probes.phenomena.needle_prompts import NeedlePrompt
from moescope.probes.phenomena.needle_trials import response_of
from moescope.probes.progress import RunProgress

if TYPE_CHECKING:
    import pandas as pd

Head = tuple[int, str, int]  # layer, block, head

UNITS = {
    "needle recall": "share of the answer's words",
    "needle found": "share of trials",
    "needle exact": "share of trials",
    "answer NLL": "nats a token",
    "text NLL": "nats a token",
}


@dataclass(frozen=True)
class HeadMasking:
    """What masking heads did.

    Attributes:
        target: heads that were masked.
        controls: the random heads of each draw.
        interventions: the base (no edits), the target, the draws; as run on the needles.
        sums, n: metric → [condition, sequence] sums and observations; sequences are trials, or texts for `text NLL`.
    """

    target: tuple[Head, ...]
    controls: tuple[tuple[Head, ...], ...]
    interventions: tuple[Intervention, ...]
    sums: dict[str, NDArray[np.float64]]
    n: dict[str, NDArray[np.int64]]

    @property
    def conditions(self) -> list[str]:
        """`base`, `mask top K`, `mask random K, draw 0`, …."""
        return ["base", *(str(i.name) for i in self.interventions[1:])]

    def df(self, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
        """One row a condition and metric, and for the target against the mean of the controls.

        Columns: condition, kind (base, target, control, target − controls), draw, metric, value, ci_low, ci_high, change (from
        the base), change_low, change_high, n, unit. Intervals resample trials (for `text NLL`: texts), the same in every condition.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for metric, sums in self.sums.items():
            n = self.n[metric].astype(np.float64)
            for number, condition in enumerate(self.conditions):
                value, low, high = bootstrap_ratio(sums[number], n, draws=draws, seed=seed)
                change, less, more = bootstrap_ratio(sums[number] - sums[0], n, draws=draws, seed=seed)
                kind = "base" if number == 0 else "target" if number == 1 else "control"
                draw = number - 2 if kind == "control" else None
                at_base = [np.nan] * 3 if number == 0 else [float(change), float(less), float(more)]
                rows.append(_row(condition, kind, draw, metric, [float(value), float(low), float(high)], at_base, n))
            contrast = sums[1] - sums[2:].mean(0)
            value, low, high = bootstrap_ratio(contrast, n, draws=draws, seed=seed)
            three = [float(value), float(low), float(high)]
            name = f"{self.conditions[1]}, less its controls"
            rows.append(_row(name, "target − controls", None, metric, [np.nan] * 3, three, n))
        frame = pd.DataFrame(rows)
        frame["draw"] = frame["draw"].astype("Int64")
        return frame

    def __str__(self) -> str:
        found = self.df()
        found = found[found["metric"] == "needle recall"].set_index("condition")
        base, top = (found.loc[name, "value"] for name in self.conditions[:2])
        random = found[found["kind"] == "control"]["value"]
        last = found.iloc[-1]
        return (
            f"Masking {len(self.target)} heads takes needle recall from {base:.0%} to {top:.0%}; as many random heads: "
            f"{random.mean():.0%} ({random.min():.0%} to {random.max():.0%} over {len(random)} draws); difference "
            f"{last['change']:+.2f} [{last['change_low']:+.2f}, {last['change_high']:+.2f}]"
        )


def mask_heads(
    model: LiveModel,
    target: Sequence[Head],
    prompts: Sequence[NeedlePrompt],
    *,
    never: Collection[Head] = (),
    draws: int = 5,
    layer_matched: bool = False,
    texts: Any = None,
    text_tokens: int = 256,
    text_count: int = 4,
    steps: int = 50,
    seed: int = 0,
    progress: bool = True,
) -> HeadMasking:
    """Mask heads while answers are written, against as many random heads, and on plain text.

    A masked head attends to every key it can see alike (its query is 0). On needles this holds in decode steps only, from the
    prompt's last token on, as in the authors' code; the prompt runs unmasked. On plain text it holds for every token.

    * `needle recall`: ROUGE-1 recall of the answer; `needle found`: whether it is over 50 %; `needle exact`: word by word;
    * `answer NLL`: of the needle's own answer, fed after the prompt;
    * `text NLL`: of the first tokens of some texts.

    The random heads are drawn from all but `target` and `never`. (The authors' code means to leave retrieval heads out of its
    random draws, and does not: it compares a tuple with a list.)

    Args:
        model: a causal language model.
        target: (layer, block, head), for instance `scores.top("retrieval score", 10)`.
        prompts: from `needle_grid`.
        never: heads that random draws leave out besides: all retrieval heads.
        draws: random sets, at least 5.
        layer_matched: draw as many heads in each layer as the target has there.
        texts: for `text NLL`, anything `Corpus.load` takes; None for a bundled text.
        text_tokens, text_count: how long and how many.
        steps: tokens of an answer at most.
        seed: of the draws.
        progress: draw a bar on stderr.

    Raises:
        InputError: no heads or prompts, fewer than 5 draws, not enough other heads, or a model whose heads cannot be masked.

    Source: arXiv 2404.15574, and its authors' code.

    Example:
        >>> import moescope as ms
        >>> from moescope.probes.phenomena.needle_grid import needle_grid
        >>> model = ms.load("demo")
        >>> prompts = needle_grid(model, lengths=[160], depths=[0.5], needles=1)
        >>> found = mask_heads(model, [(3, "attn", 1)], prompts, steps=2, text_count=1, progress=False)
        >>> found.conditions[:2]
        ['base', 'mask top 1']
    """
    heads = head_map(model)
    known = {(p.layer, p.block, h) for p in heads.places for h in range(p.heads)}
    if not target or not set(target) <= known or len(set(target)) != len(target) or not prompts:
        raise InputError(
            "masking needs heads that the model has, each once, and prompts", found=f"{list(target)[:3]} …"
        )
    if draws < 5:
        raise InputError("too few random controls", expected="at least 5 draws", found=str(draws))
    controls = random_heads(heads, target, never, draws=draws, layer_matched=layer_matched, seed=seed)
    names = [f"mask top {len(target)}", *(f"mask random {len(target)}, draw {d}" for d in range(draws))]
    sets = [tuple(target), *controls]
    decode = [masking(h, positions="generated", name=name) for h, name in zip(sets, names, strict=True)]
    everywhere = [masking(h, positions="all", name=name) for h, name in zip(sets, names, strict=True)]
    sums, n = _on_needles(model, prompts, [Intervention(), *decode], steps, progress=progress)
    ids = _texts(model, texts, text_tokens, text_count)
    if ids:
        sums["text NLL"], n["text NLL"] = _on_texts(model, ids, [Intervention(), *everywhere])
    return HeadMasking(tuple(target), tuple(controls), (Intervention(), *decode), sums, n)


def masking(heads: Sequence[Head], *, positions: str, name: str) -> Intervention:
    """The intervention that lets heads attend evenly."""
    places: dict[tuple[int, str], list[int]] = {}
    for layer, block, head in sorted(heads):
        places.setdefault((layer, block), []).append(head)
    edits = [
        MaskHead(layer=layer, block=block, heads=tuple(numbers), how="uniform", positions=positions)
        for (layer, block), numbers in places.items()
    ]
    return Intervention(edits, name=name)


def random_heads(
    heads: HeadMap,
    target: Sequence[Head],
    never: Collection[Head],
    *,
    draws: int,
    layer_matched: bool,
    seed: int,
) -> list[tuple[Head, ...]]:
    """As many heads as the target has, drawn without the target and without `never`.

    Raises:
        InputError: there are not enough others.
    """
    out = {*target, *never}
    pools: list[tuple[list[Head], int]] = []
    everywhere = [
        (p.layer, p.block, h) for p in heads.places for h in range(p.heads) if (p.layer, p.block, h) not in out
    ]
    if layer_matched:
        pools += [
            ([h for h in everywhere if h[:2] == at], sum(head[:2] == at for head in target))
            for at in sorted({head[:2] for head in target})
        ]
    else:
        pools.append((everywhere, len(target)))
    for pool, count in pools:
        if len(pool) < count:
            raise InputError(
                "there are not enough other heads for a random control",
                expected=f"{count} besides the target and those left out",
                found=f"{len(pool)}" + (f" in layer {pool[0][0]}" if layer_matched and pool else ""),
                fix="mask fewer heads" + (", or layer_matched=False" if layer_matched else ""),
            )
    random = np.random.default_rng(seed)
    return [
        tuple(sorted(pool[i] for pool, count in pools for i in random.choice(len(pool), count, replace=False)))
        for _ in range(draws)
    ]


def _on_needles(
    model: LiveModel,
    prompts: Sequence[NeedlePrompt],
    interventions: Sequence[Intervention],
    steps: int,
    *,
    progress: bool,
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.int64]]]:
    """Answer every prompt under every intervention; a prompt runs once, since they hold in decode steps only."""
    shape = (len(interventions), len(prompts))
    sums = {name: np.zeros(shape) for name in UNITS if name != "text NLL"}
    n = {name: np.ones(len(prompts), np.int64) for name in sums}
    n["answer NLL"] = np.array([prompt.span[1] - prompt.span[0] for prompt in prompts])
    ended = AnswerEnds(model)
    total, done, started = sum(len(prompt.ids) for prompt in prompts), 0, time.perf_counter()
    bar = RunProgress("masking heads", total, shown=progress)
    with bar, torch.no_grad(), edited(model, interventions) as session:
        for column, prompt in enumerate(prompts):
            ids = torch.tensor([prompt.ids], device=model.device)
            answer = ids[:, slice(*prompt.span)]
            session.assign([0])
            cache = prefilled(model, ids[:, :-1])
            for row in range(len(interventions)):
                session.assign([row])
                fed = torch.cat([ids[:, -1:], answer], 1)
                out = model.module(input_ids=fed, past_key_values=copy.deepcopy(cache), use_cache=True)
                nll, _ = token_nll(logits_in(out), fed)
                steps_done = decoded(model, None, ids[:, -1:], copy.deepcopy(cache), ids.shape[1] - 1, steps, ended)
                response = response_of(model, prompt, steps_done.written.tolist(), ended)
                found = (response.recall, response.counted, response.exact, float(nll[0, 1:].double().sum()))
                for name, value in zip(sums, found, strict=True):
                    sums[name][row, column] = value
            done += len(prompt.ids)
            bar.advance_to(done, done, time.perf_counter() - started)
    return sums, n


def _on_texts(
    model: LiveModel, texts: Sequence[Sequence[int]], interventions: Sequence[Intervention]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    sums = np.zeros((len(interventions), len(texts)))
    with torch.no_grad(), edited(model, interventions) as session:
        for column, text in enumerate(texts):
            ids = torch.tensor([list(text)], device=model.device)
            for row in range(len(interventions)):
                session.assign([row])
                nll, _ = token_nll(logits_in(model.module(input_ids=ids)), ids)
                sums[row, column] = float(nll[0, 1:].double().sum())
    return sums, np.array([len(text) - 1 for text in texts])


def _texts(model: LiveModel, texts: Any, tokens: int, count: int) -> list[list[int]]:
    if model.tokenizer is None:
        return []
    longest = tokens if model.context is None else min(tokens, model.context)
    passages = haystack(texts).passages[:count]
    found = [list(model.tokenizer(text, verbose=False)["input_ids"])[:longest] for text in passages]
    return [ids for ids in found if len(ids) > 1]


def _row(
    condition: str,
    kind: str,
    draw: int | None,
    metric: str,
    value: list[float],
    change: list[float],
    n: NDArray[np.float64],
) -> dict[str, Any]:
    names = ("value", "ci_low", "ci_high", "change", "change_low", "change_high")
    facts = {"condition": condition, "kind": kind, "draw": draw, "metric": metric}
    return facts | dict(zip(names, [*value, *change], strict=True)) | {"n": int(n.sum()), "unit": UNITS[metric]}
