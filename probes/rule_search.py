"""Which rule a router follows: every known rule is held against decisions that the model took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import nn

from moescope.core.sites import EXPERT_INDICES, ROUTER_LOGITS, Site
from moescope.probes.anatomy import Sublayer
from moescope.probes.batches import Batch
from moescope.probes.forward import logits_of, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.routing_rule import (
    BoundRule,
    Groups,
    Ids,
    Logits,
    RoutingRule,
    Score,
    Vector,
    Weights,
    same_weights,
)
from moescope.probes.taps import tapped

_MOST_TOKENS = 1024
_MEASURED = {"agreement", "choice_agreement", "weight_agreement", "tokens"}


def find_rules(model: LiveModel, batch: Batch) -> dict[tuple[int, str], BoundRule]:
    """Run one batch and find the rule of every router that gives its logits: (layer, block) → rule."""
    seen: dict[Site, dict[str, torch.Tensor]] = {}
    routers = [s for s in model.anatomy.moe if s.has_logits]
    sites = [Site(s.layer, s.block, tensor) for s in routers for tensor in (ROUTER_LOGITS, EXPERT_INDICES)]
    if not sites:
        return {}
    on_device = to_device(batch, model)
    with (
        torch.no_grad(),
        tapped(model.module, model.anatomy, sites, lambda site, tensors: seen.update({site: tensors})),
    ):
        logits_of(model, on_device)
    real = on_device.mask.flatten()
    found: dict[tuple[int, str], BoundRule] = {}
    likely: list[RoutingRule] = []
    for s in routers:
        decision = seen.get(Site(s.layer, s.block, EXPERT_INDICES))
        scores = seen.get(Site(s.layer, s.block, ROUTER_LOGITS))
        if decision is None or scores is None:
            continue
        rows = real.to(decision["indices"].device)
        logits, ids, weights = (
            t.reshape(len(real), -1)[rows][:_MOST_TOKENS]
            for t in (scores["logits"], decision["indices"], decision["weights"])
        )
        bound = find_rule(logits, ids, weights, router_vectors(model.module, s), _settings(model.module, s), likely)
        found[s.layer, s.block] = bound
        if bound.rule.verified and not any(same_form(bound.rule, rule) for rule in likely):
            likely = [bound.rule, *likely]
    return found


def find_rule(
    logits: Logits,
    ids: Ids,
    weights: Weights,
    vectors: Mapping[str, Vector] | None = None,
    settings: Mapping[str, Any] | None = None,
    likely: list[RoutingRule] | None = None,
) -> BoundRule:
    """The rule that agrees most with decisions; of those that agree alike, the simplest.

    Args:
        logits: the router's output before any softmax, sigmoid or bias.
        ids, weights: the decisions, as given to the experts.
        vectors: name → vector of one number an expert that the router may add to its scores or multiply its weights by.
        settings: `n_group`, `topk_group`, `jitter`, `hash`: what the router's own attributes say.
        likely: rules to try first; one that agrees everywhere ends the search.

    Returns:
        The rule with its agreement measured, whatever that is: `rule.verified` says whether it may be relied upon.
    """
    vectors = vectors or {}
    # A vector may have entries for experts that do no computation, or the logits may: only equal lengths can be added.
    fitting = {name: v for name, v in vectors.items() if v.numel() == logits.shape[-1]}
    best: BoundRule | None = None
    table = bool(settings and settings.get("hash"))
    likely = [rule for rule in likely or [] if (rule.choice == "hash") == table]
    for rule in [*likely, *_candidates(fitting, settings or {}, logits.dtype, vectors)]:
        if any(name not in vectors for name in (rule.bias, rule.scale_by) if name):
            continue
        tried = _measured(BoundRule(rule, vectors.__getitem__), logits, ids, weights)
        if best is None or _merit(tried) > _merit(best):
            best = tried
        if tried.rule.agreement == 1.0 and rule in likely:
            break
    assert best is not None
    return best


def router_vectors(module: nn.Module, s: Sublayer) -> dict[str, Vector]:
    """Parameters and buffers of a router, or of the block it is in, that hold one number for each of its choices."""
    found: dict[str, Vector] = {}
    sizes = {s.n_experts, (s.n_experts or 0) + (s.n_null or 0)}
    places = [(s.router_path, True), (s.path, False)]
    for path, deep in places:
        if path is None:
            continue
        owner = module.get_submodule(path)
        named = [*owner.named_parameters(recurse=deep), *owner.named_buffers(recurse=deep)]
        # Weights that are brought in only while a module runs cannot be read here.
        found |= {f"{path}.{name}": t.detach().flatten() for name, t in named if t.numel() in sizes and not t.is_meta}
    return found


def _candidates(
    vectors: Mapping[str, Vector], settings: Mapping[str, Any], dtype: torch.dtype, factors: Mapping[str, Vector]
) -> Iterator[RoutingRule]:
    """Known rules, the simplest first."""
    if settings.get("hash"):
        for score in ("sqrtsoftplus", "sigmoid", "softmax"):
            yield from (RoutingRule(score, "hash", renormalise=r) for r in (True, False))
        return
    number, kept = settings.get("n_group") or 1, settings.get("topk_group") or 1
    limits: list[Groups | None] = [None]
    if number > 1 and kept < number:
        limits += [Groups(number, kept, by, others) for by in ("top2", "max") for others in ("-inf", "zero")]
    scores: tuple[Score, ...] = ("softmax", "sigmoid", "sqrtsoftplus")
    dtypes = ("float32",) if dtype == torch.float32 else ("float32", "logits", "mixed")
    biases: list[str | None] = [None, *vectors]
    for groups, bias, kind, score in product(limits, biases, dtypes, scores):
        if kind == "mixed" and not bias:
            continue
        for choice in ("score", "logits") if bias and not groups else ("score",):
            for renormalise in (True, False):
                yield RoutingRule(score, choice, bias, groups, renormalise, dtype=kind)  # type: ignore[arg-type]  # literals
    for name, score in product(factors, scores):
        yield from (RoutingRule(score, renormalise=r, scale_by=name) for r in (True, False))
    if jitter := settings.get("jitter"):
        yield RoutingRule("sparsemixer", "logits", jitter=float(jitter))


def _measured(bound: BoundRule, logits: Logits, ids: Ids, weights: Weights) -> BoundRule:
    """The rule with its scale fitted and its agreement counted."""
    rule, given = bound.rule, weights.float()
    # Slots that went to no expert, or to one that computes nothing, may have lost their weight.
    nothing = (given == 0) | (ids >= logits.shape[-1])
    base = bound.with_rule(scale=1.0).weights(logits, ids).float()
    scale = float((given / base)[~nothing].median()) if bool((~nothing).any()) else 1.0
    if not torch.isfinite(torch.tensor(scale)):
        scale = 1.0
    scale = round(scale, 4) if abs(scale - round(scale, 4)) < 2e-4 * abs(scale) else scale
    fits = (same_weights(base * scale, weights) | nothing).all(-1)
    same_set = bound.agrees(logits, ids) if rule.choice != "hash" else torch.ones_like(fits)
    return bound.with_rule(
        scale=scale,
        agreement=float((same_set & fits).float().mean()),
        choice_agreement=float(same_set.float().mean()),
        weight_agreement=float(fits.float().mean()),
        tokens=len(ids),
    )


def _merit(bound: BoundRule) -> tuple[float, float, float]:
    rule = bound.rule
    return rule.agreement, rule.choice_agreement + rule.weight_agreement, rule.weight_agreement


def _settings(module: nn.Module, s: Sublayer) -> dict[str, Any]:
    router = module.get_submodule(s.router_path) if s.router_path else nn.Module()
    config = getattr(module, "config", None)
    text: Any = config.get_text_config(decoder=True) if config is not None else None

    def first(*names: str) -> Any:
        owners = (router, text)
        return next((v for o in owners for n in names if isinstance(v := getattr(o, n, None), (int, float))), None)

    return {
        "n_group": first("num_group", "n_group"),
        "topk_group": first("topk_group"),
        "jitter": getattr(router, "router_jitter_noise", None) if hasattr(router, "input_jitter_noise") else None,
        "hash": hasattr(router, "tid2eid"),
    }


def same_form(a: RoutingRule, b: RoutingRule) -> bool:
    """Whether two rules are the same, whatever their measured agreement."""
    one, other = ({k: v for k, v in vars(rule).items() if k not in _MEASURED} for rule in (a, b))
    return one == other
