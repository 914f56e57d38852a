"""Where units are active on the tokens of a run: latents, experts, neurons and heads, behind one face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.sites import DENSE_POST, EXPERT_POST, HEAD_Z, Site
from moescope.sae.concepts.document_split import untrained
from moescope.sae.concepts.token_table import TokenTable, read_tokens
from moescope.sae.concepts.unit_reading import Budget, read_units
from moescope.store.vector_sampling import token_hash
from moescope.store.vectors import vector_shards, vector_sites

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel
    from moescope.sae.autoencoder import Autoencoder
    from moescope.store.run import Run

Described = Literal["latent", "expert", "neuron", "head"]
_HIGH = 0.95  # quantile over which neurons and heads, which are never quite silent, count as active
_MEMORY = 1 << 30

_EXPERT_SQL = """
    SELECT r.token, r.weights[list_position(r.experts, $unit)] * coalesce(o.norms[list_position(r.experts, $unit)], 1)
    FROM routing r
    LEFT JOIN expert_outputs o
        ON o.run_id = r.run_id AND o.token = r.token AND o.layer = r.layer AND o.block = r.block
    WHERE r.run_id = $run AND r.layer = $layer AND r.block = $block AND list_contains(r.experts, $unit)
    ORDER BY r.token
"""
_ROUTER_SQL = """
    SELECT n_experts + coalesce(n_null, 0)
    FROM layers
    WHERE run_id = $run AND layer = $layer AND block = $block AND kind = 'moe'
"""


@dataclass(frozen=True)
class Activity:
    """What some units do on some documents of a run.

    Attributes:
        tokens: all tokens of those documents.
        known: [token] whether the units' activity is known there.
        places, values: unit → places of the tokens where it is active, ascending, and how much.
        site: where they are read; for experts and heads the layer's block.
    """

    tokens: TokenTable
    known: NDArray[np.bool_]
    places: Mapping[int, NDArray[np.int64]]
    values: Mapping[int, NDArray[np.float64]]
    site: str


def read_activity(
    run: Run,
    kind: Described,
    units: Sequence[int],
    *,
    sae: Autoencoder | None,
    layer: int | None,
    block: str,
    model: LiveModel | None,
    most: int,
    seed: int,
) -> Activity:
    """Where units are active. Latents: over 0. Experts: where chosen, by weight × norm of the output (weight alone where
    norms were not recorded). Neurons: values over their 95th percentile. Heads: norm of the output over its 95th percentile.

    Args:
        run: whose tokens.
        kind: of the units.
        units: which; neuron i of expert e is e · d_expert + i.
        sae: of the latents. Where it was trained on this run, only documents held out are read.
        layer, block: of experts, neurons and heads.
        model: reads latents live where the run kept no vectors.
        most: tokens to read, in whole documents by hash.
        seed: of the hash.

    Raises:
        InputError: nothing was recorded there, or there is no such unit.
    """
    tokens = _documents(read_tokens(run), run, sae, most, seed)
    if kind == "latent":
        if sae is None:
            raise InputError("latents need their autoencoder", fix="pass sae=…")
        _in_range(units, sae.d_sae, "latent")
        return _of_latents(run, tokens, units, sae, model)
    if layer is None:
        raise InputError(f"which layer's {kind}s?", fix="pass layer=…")
    if kind == "expert":
        return _of_experts(run, tokens, units, layer, block)
    dense = _of_heads(run, tokens, layer) if kind == "head" else _of_neurons(run, tokens, layer, block, units)
    return _over_quantile(tokens, units, *dense)


def _documents(tokens: TokenTable, run: Run, sae: Autoencoder | None, most: int, seed: int) -> TokenTable:
    only = untrained(run, sae, tokens)
    documents, sizes = np.unique(tokens.document, return_counts=True)
    allowed = np.ones(len(documents), bool) if only is None else np.isin(documents, only)
    order = np.argsort(token_hash(seed, documents, 1), kind="stable")
    order = order[allowed[order]]
    fit = np.cumsum(sizes[order]) <= most
    fit[:2] = True
    return tokens.rows(np.isin(tokens.document, documents[order[fit]]))


def _in_range(units: Sequence[int], count: int, kind: str) -> None:
    if wrong := [unit for unit in units if not 0 <= unit < count]:
        raise InputError(f"there is no {kind} {wrong[0]}", expected=f"numbers from 0 to {count - 1:,}")


def _of_latents(
    run: Run, tokens: TokenTable, units: Sequence[int], sae: Autoencoder, model: LiveModel | None
) -> Activity:
    from moescope.sae.reading.activations import activations
    from moescope.sae.reading.run_text import run_text
    from moescope.sae.reading.vectors import kept_vectors, live_pieces, recorded_pieces

    if not kept_vectors(run, sae) and model is None:
        raise InputError(
            f"run {run.name!r} kept no vectors at {sae.site}",
            found=", ".join(vector_sites(run)[:6]) or "none",
            fix=f"pass the model, or record with --probe activations --site {sae.site}",
        )

    def pieces(text: Any) -> Any:
        if kept_vectors(run, sae):
            return recorded_pieces(run, sae, text, rows=4096)
        assert model is not None
        return live_pieces(model, sae, text, batch_size=4)

    found = activations(sae, run_text(run, np.unique(tokens.document)), pieces)
    order = np.searchsorted(tokens.token, found.text.token)
    known = np.zeros(len(tokens), bool)
    known[order[found.encoded]] = True
    places, values = {}, {}
    for unit in units:
        place, value = found.of(unit)
        at = order[place]
        ascending = np.argsort(at)
        places[unit], values[unit] = at[ascending], value[ascending].astype(np.float64)
    return Activity(tokens, known, places, values, str(sae.site))


def _of_experts(run: Run, tokens: TokenTable, units: Sequence[int], layer: int, block: str) -> Activity:
    found = run.sql(_ROUTER_SQL, {"layer": layer, "block": block}).fetchall()
    if not found or not run.rows("routing"):
        raise InputError(
            f"run {run.name!r} has no routing of layer {layer}, {block}", fix="record with the probe routing"
        )
    _in_range(units, int(found[0][0]), "expert")
    places, values = {}, {}
    for unit in units:
        rows = run.sql(_EXPERT_SQL, {"layer": layer, "block": block, "unit": unit}).fetchnumpy()
        token, value = (np.ma.filled(column, 0) for column in rows.values())
        at = np.minimum(np.searchsorted(tokens.token, token), len(tokens) - 1)
        inside = tokens.token[at] == token
        places[unit], values[unit] = at[inside], value[inside].astype(np.float64)
    return Activity(tokens, np.ones(len(tokens), bool), places, values, f"blocks.{layer}.{block}")


def _of_neurons(
    run: Run, tokens: TokenTable, layer: int, block: str, units: Sequence[int]
) -> tuple[Any, NDArray[np.bool_], str]:
    kept = vector_sites(run)
    sites = [Site(layer, block, tensor) for tensor in (DENSE_POST, EXPERT_POST)]
    site = next((one for one in sites if str(one) in kept), sites[0])
    read = read_units(
        run, tokens, "neuron", site=str(site), sae=None, values="chosen", budget=Budget(len(tokens), _MEMORY, 0)
    )
    _in_range(units, read.width, "neuron")
    known = np.isin(tokens.token, read.tokens.token)
    values = np.zeros((len(tokens), max(units) + 1))
    values[np.ix_(known, np.array(units))] = read.columns(np.array(units))
    return values, known, str(site)


def _of_heads(run: Run, tokens: TokenTable, layer: int) -> tuple[Any, NDArray[np.bool_], str]:
    site = Site(layer, "attn", HEAD_Z)
    known = np.zeros(len(tokens), bool)
    values: Any = None
    for shard in vector_shards(run, str(site)):
        token = np.asarray(shard.token)
        at = np.minimum(np.searchsorted(tokens.token, token), len(tokens) - 1)
        rows = np.flatnonzero(tokens.token[at] == token)
        norms = np.linalg.norm(shard.float32()[rows], axis=-1)
        values = np.zeros((len(tokens), norms.shape[1])) if values is None else values
        values[at[rows]], known[at[rows]] = norms, True
    return values, known, str(site)


def _over_quantile(
    tokens: TokenTable, units: Sequence[int], values: Any, known: NDArray[np.bool_], site: str
) -> Activity:
    _in_range(units, values.shape[1], "unit")
    places, strengths = {}, {}
    for unit in units:
        column = values[:, unit]
        seen = column[known]
        limit = max(float(np.quantile(seen, _HIGH)), 0.0) if len(seen) else 0.0
        at = np.flatnonzero(known & (column > limit))
        places[unit], strengths[unit] = at, column[at]
    return Activity(tokens, known, places, strengths, site)
