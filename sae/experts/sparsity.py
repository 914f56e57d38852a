"""Experts by how few of their neurons a token would turn on: expected from weights alone, counted, and held against the router."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.sites import MLP_IN, ROUTER_LOGITS, Site
from moescope.core.statistics import bootstrap_ratio
from moescope.probes.claim import claimed
from moescope.probes.live_model import LiveModel
from moescope.probes.progress import RunProgress
from moescope.sae.data.live import site_vectors
from moescope.sae.experts.decisions import decisions_tapped
from moescope.sae.experts.expert_matrices import ExpertMatrices, expert_matrices
from moescope.sae.experts.neurons import neurons_as_features, register_neurons
from moescope.sae.experts.run_text import RunText, run_text
from moescope.sae.experts.swapped_routers import swapped_routers
from moescope.store.run import Run
from moescope.store.sae_rows import write_rows
from moescope.store.store import Store

Floats = NDArray[np.float64]
METRICS = ("routing_spearman", "routing_recall", "l0_spearman", "l0_chosen", "l0_not_chosen", "l0", "swap_delta_nll")
_GROUPS = 2000


@torch.no_grad()
def expected_l0(
    x: Float[torch.Tensor, "token d_model"], matrices: ExpertMatrices
) -> Float[torch.Tensor, "token expert"]:
    """How many neurons of each expert a token is expected to turn on, by the mean and spread of the experts' rows.

    With W the rows [neuron, d_model] of an expert's gate, μ = x · mean over neurons of W, σ² = Σ x_i² · Var over neurons of W_i:
    expected L0 = d_expert · ½ (1 + erf(μ ÷ (σ √2))), as if the components of the rows were independent and normal
    (MoE-X, arXiv 2503.07639). A bias is one more component that is always 1.

    Example:
        >>> from moescope.sae.experts.expert_matrices import ExpertMatrices
        >>> rows = torch.tensor([[[1.0], [-1.0]]])
        >>> expected_l0(torch.ones(1, 1), ExpertMatrices(rows, None, rows, True)).tolist()
        [[1.0]]
    """
    rows = matrices.gate
    mean = x @ rows.mean(1).T
    spread = x.square() @ rows.var(1, unbiased=False).T
    if matrices.gate_bias is not None:
        mean = mean + matrices.gate_bias.mean(1)
        spread = spread + matrices.gate_bias.var(1, unbiased=False)
    return matrices.d_expert * 0.5 * (1 + torch.erf(mean / (spread.clamp(min=1e-30).sqrt() * math.sqrt(2))))


@torch.no_grad()
def counted_l0(
    x: Float[torch.Tensor, "token d_model"], matrices: ExpertMatrices
) -> Float[torch.Tensor, "token expert"]:
    """How many neurons of each expert have a gate over 0 before its activation function, whether it was chosen or not."""
    found = []
    for expert in range(matrices.n_experts):
        before = x @ matrices.gate[expert].T
        if matrices.gate_bias is not None:
            before = before + matrices.gate_bias[expert]
        found.append((before > 0).sum(-1).float())
    return torch.stack(found, -1)


@dataclass(frozen=True)
class SparsityRouting:
    """What was measured and stored.

    Attributes:
        run_id: on what.
        layers: routers, (layer, block).
        tokens, documents: behind the numbers.
        rows: rows of `sae_measures`.
        notes: what was left out.
    """

    run_id: str
    layers: tuple[tuple[int, str], ...]
    tokens: int
    documents: int
    rows: int
    notes: tuple[str, ...]


def expert_sparsity(
    model: LiveModel,
    run: Run,
    store: Store,
    *,
    layers: Sequence[int] | None = None,
    tokens: int | None = 20_000,
    swap_tokens: int = 4_000,
    skip_first: int = 1,
    draws: int = 1000,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> SparsityRouting:
    """Hold a router's choices against a router that takes the experts of fewest active neurons.

    For each token and expert: the expected L0 (`expected_l0`) and the counted one. Rows of `sae_measures`, by layer, of the
    layer's neurons (`neurons_as_features`): `routing_spearman`, the mean over tokens of the rank correlation of the router's logits
    with −L0 over the experts (condition `expected_l0` and `counted_l0`; by chance 0); `routing_recall`, the share of the chosen
    experts among the k of lowest L0 (by chance k ÷ E); `l0_spearman`, expected against counted; `l0_chosen` and `l0_not_chosen`, counted
    neurons of chosen and of other experts; by expert `l0`, counted on the tokens that chose it. With `swap_tokens`,
    `swap_delta_nll`: nats by which the NLL rises when one layer takes the k experts of lowest expected L0, the router's own rule
    giving their weights, beside k random experts.

    A neuron counts as on where its gate is over 0: in a rectified expert that is where it is not 0. In a gated one (SwiGLU) the
    others are small, not 0.

    Args:
        model: with experts.
        run: whose sequences are run again.
        store: open for writing.
        layers: None for all with a router.
        tokens: about how many, of documents drawn at random; None for all.
        swap_tokens: about how many for the swapped router; 0 leaves it out.
        skip_first: leave out so many first tokens of each sequence.
        draws, seed: of the resampling of documents.
        batch_size: sequences a forward pass.
        progress: show how far it is, on stderr.

    Raises:
        InputError: a dense model, layers without routers, or no router whose experts' matrices are known.

    Example:
        >>> import moescope as ms
        >>> def measured(store: ms.Store) -> SparsityRouting:
        ...     return expert_sparsity(ms.load("demo"), store.run("base"), store, layers=[2])
    """
    if store.read_only:
        raise InputError(f"{store.path} is open for reading only", fix="open it with Store(path)")
    routers, notes = _routers(model, layers)
    text = run_text(run, tokens=tokens)
    with claimed(model.module, "sparsity of experts"):
        walk = _Walk(model, text, routers, skip_first, batch_size, progress)
        walk.run()
        rows = [row for at in routers for row in walk.rows(at, draws, seed)]
        if swap_tokens:
            swapped, why = swapped_routers(
                model, run_text(run, tokens=swap_tokens), list(routers),
                lambda x, at: -expected_l0(x, routers[at]), batch_size=batch_size, draws=draws, seed=seed, progress=progress,
            )  # fmt: skip
            rows += swapped
            notes += why
    names = {at: neurons_as_features(model, at[0], block=at[1]) for at in routers}
    for neurons in names.values():
        register_neurons(store, neurons)
    told = [
        {**{k: v for k, v in row.items() if k != "at"}, "run_id": run.run_id, "sae_id": names[row["at"]].sae_id}
        for row in rows
    ]
    over = [
        ("sae_measures", {"run_id": run.run_id, "sae_id": neurons.sae_id, "metric": metric})
        for neurons in names.values()
        for metric in METRICS
    ]
    write_rows(store, {"sae_measures": told}, over=over)
    return SparsityRouting(run.run_id, tuple(routers), walk.tokens, text.n_documents, len(told), tuple(notes))


def _routers(model: LiveModel, layers: Sequence[int] | None) -> tuple[dict[tuple[int, str], ExpertMatrices], list[str]]:
    known = [s for s in model.anatomy.moe if s.block.startswith("mlp") and s.has_logits]
    if not known:
        raise InputError(f"{model.name} has no router whose logits show", expected="a mixture-of-experts model")
    if layers is not None and (wrong := sorted(set(layers) - {s.layer for s in known})):
        raise InputError(f"layer {wrong[0]} has no router", expected=f"some of layers {sorted(s.layer for s in known)}")
    found: dict[tuple[int, str], ExpertMatrices] = {}
    notes: list[str] = []
    for s in known:
        if layers is None or s.layer in layers:
            try:
                neurons_as_features(model, s.layer, block=s.block)
                found[s.layer, s.block] = expert_matrices(model, s.layer, s.block)
            except InputError as refused:
                notes.append(f"Layer {s.layer} is left out: {refused.found or refused.problem}.")
    if not found:
        raise InputError("no layer's experts are told apart neuron by neuron", found=" ".join(notes))
    return found, notes


class _Walk:
    """One pass, with sums by document."""

    def __init__(
        self, model: LiveModel, text: RunText, routers: dict[tuple[int, str], ExpertMatrices], first: int, batch_size: int,
        progress: bool,
    ) -> None:  # fmt: skip
        self.model, self.text, self.routers = model, text, routers
        self.first, self.batch_size, self.progress = first, batch_size, progress
        groups = text.n_groups(_GROUPS)
        self.count = np.zeros(groups)
        self.sums: dict[tuple[tuple[int, str], str], Floats] = {}
        self.by_expert = {at: np.zeros((groups, 2, m.n_experts)) for at, m in routers.items()}
        self.k: dict[tuple[int, str], int] = {}

    @property
    def tokens(self) -> int:
        """Counted so far."""
        return int(self.count.sum())

    @torch.no_grad()
    def run(self) -> None:
        sites = [Site(*at, name) for at in self.routers for name in (MLP_IN, ROUTER_LOGITS)]
        done, started = 0, time.perf_counter()
        with RunProgress("experts by sparsity", self.text.tokens, shown=self.progress) as bar:
            for batch in self.text.batches(self.batch_size):
                with decisions_tapped(self.model, self.routers) as decisions:
                    found = site_vectors(self.model, batch, sites, first=self.first)
                if len(found):
                    group = self.text.groups(found.document, _GROUPS)
                    self.count += np.bincount(group, minlength=len(self.count))
                    for at, matrices in self.routers.items():
                        chosen = decisions.at(at, found)
                        x, logits = (found[Site(*at, name)].vectors.float() for name in (MLP_IN, ROUTER_LOGITS))
                        self._add(at, x, logits[:, : matrices.n_experts], chosen, matrices, group)
                done += batch.tokens
                bar.advance_to(done, done, time.perf_counter() - started)

    def _add(
        self, at: tuple[int, str], x: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor, matrices: ExpertMatrices,
        group: NDArray[np.int64],
    ) -> None:  # fmt: skip
        expected, counted = expected_l0(x, matrices), counted_l0(x, matrices)
        k = self.k[at] = chosen.shape[1]
        picked = torch.zeros(len(x), matrices.n_experts + 1, device=x.device)
        picked = picked.scatter(1, chosen.clamp(max=matrices.n_experts), 1.0)[:, :-1]
        for name, l0 in (("expected_l0", expected), ("counted_l0", counted)):
            self._sum(at, f"routing_spearman {name}", rank_correlation(logits, -l0), group)
            lowest = torch.zeros_like(picked).scatter(1, (-l0).topk(k, dim=1).indices, 1.0)
            self._sum(at, f"routing_recall {name}", (lowest * picked).sum(1) / k, group)
        self._sum(at, "l0_spearman expected_l0", rank_correlation(expected, counted), group)
        mine = picked.sum(1).clamp(min=1)
        others = (1 - picked).sum(1).clamp(min=1)
        self._sum(at, "l0_chosen counted_l0", (counted * picked).sum(1) / mine, group)
        self._sum(at, "l0_not_chosen counted_l0", (counted * (1 - picked)).sum(1) / others, group)
        for number, part in enumerate((counted * picked, picked)):
            np.add.at(self.by_expert[at][:, number], group, part.double().cpu().numpy())

    def _sum(self, at: tuple[int, str], name: str, values: torch.Tensor, group: NDArray[np.int64]) -> None:
        into = self.sums.setdefault((at, name), np.zeros(len(self.count)))
        into += np.bincount(group, values.double().cpu().numpy(), len(into))

    def rows(self, at: tuple[int, str], draws: int, seed: int) -> list[dict[str, Any]]:
        """Rows of one router."""
        there = self.count > 0
        matrices = self.routers[at]
        found: list[dict[str, Any]] = []
        chance = {"routing_spearman": 0.0, "routing_recall": self.k[at] / matrices.n_experts}
        units = {"routing_spearman": "correlation", "l0_spearman": "correlation", "routing_recall": "share"}
        same = {"at": at, "group_kind": "layer", "group_value": str(at[0]) if at[1] == "mlp" else f"{at[0]} {at[1]}"}
        for (place, key), sums in self.sums.items():
            if place != at:
                continue
            metric, condition = key.split()
            value, low, high = bootstrap_ratio(sums[there], self.count[there], draws=draws, seed=seed)
            unit, n = units.get(metric, "neurons"), self.tokens
            found.append(
                {**same, "metric": metric, "condition": condition, **_bounded(value, low, high), "n": n, "unit": unit}
            )
        for metric, by_chance in chance.items():
            found.append(
                {
                    **same,
                    "metric": metric,
                    "condition": "random",
                    "value": by_chance,
                    "n": self.tokens,
                    "unit": units[metric],
                }
            )
        l0, tokens = self.by_expert[at][there, 0], self.by_expert[at][there, 1]
        value, low, high = bootstrap_ratio(l0, tokens, draws=draws, seed=seed)
        for expert in np.flatnonzero(tokens.sum(0)):
            bounded = _bounded(value[expert], low[expert], high[expert])
            found.append(
                {"at": at, "group_kind": "expert", "group_value": str(expert), "metric": "l0", "condition": "counted_l0",
                 **bounded, "n": int(tokens[:, expert].sum()), "unit": "neurons"}
            )  # fmt: skip
        return found


def _bounded(value: Any, low: Any, high: Any) -> dict[str, float | None]:
    numbers = {"value": value, "ci_low": low, "ci_high": high}
    return {name: float(number) if np.isfinite(number) else None for name, number in numbers.items()}


def rank_correlation(
    one: Float[torch.Tensor, "token expert"], other: Float[torch.Tensor, "token expert"]
) -> Float[torch.Tensor, " token"]:
    """Spearman's correlation over experts, for each token; ties share their mean rank, and a constant row gives 0.

    Example:
        >>> rank_correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5.0, 5.0, 9.0]])).round(decimals=3).tolist()
        [0.8659999966621399]
    """
    a, b = (_ranks(t) for t in (one, other))
    size = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(size > 0, (a * b).sum(1) / size.clamp(min=1e-12), torch.zeros_like(size))


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks less their mean, ties at the mean of theirs: half of (smaller − larger)."""
    smaller = (values[:, :, None] > values[:, None, :]).float().sum(-1)
    larger = (values[:, :, None] < values[:, None, :]).float().sum(-1)
    return (smaller - larger) / 2
