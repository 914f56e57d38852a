"""Reading units from a store: vectors from their shards, experts and router logits from their tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.sites import DENSE_POST, EXPERT_INDICES, EXPERT_POST, EXPERT_WEIGHTS, ROUTER_LOGITS, Site
from moescope.sae.concepts.token_table import TokenTable
from moescope.sae.concepts.units import UnitKind, Units
from moescope.store.run import Run
from moescope.store.vector_sampling import token_hash
from moescope.store.vectors import VectorShard, vector_shards, vector_sites

if TYPE_CHECKING:
    from moescope.sae.autoencoder import Autoencoder

_ROUTERS_SQL = """
    SELECT layer, block, n_experts + coalesce(n_null, 0)
    FROM layers
    WHERE run_id = $run AND kind = 'moe'
    ORDER BY layer, block
"""
_ROUTING_SQL = """
    SELECT token, experts, weights
    FROM routing
    WHERE run_id = $run AND layer = $layer AND block = $block
    ORDER BY token
"""
_LOGITS_SQL = """
    SELECT token, logits
    FROM router_logits
    WHERE run_id = $run AND layer = $layer AND block = $block
    ORDER BY token
"""
_ENCODED = 1 << 25


@dataclass(frozen=True)
class Budget:
    """How much is read.

    Attributes:
        rows: tokens at most, those of smallest hash.
        memory: bytes that the values may take; fewer tokens are read where they would take more.
        seed: of the hash.
    """

    rows: int
    memory: int
    seed: int

    def picked(self, tokens: TokenTable, bytes_a_row: float) -> tuple[TokenTable, tuple[str, ...]]:
        """The tokens that fit, in the order of the run, and what to say of the others."""
        fits = max(1, int(self.memory / max(bytes_a_row, 1)))
        most = min(self.rows, fits)
        if len(tokens) <= most:
            return tokens, ()
        order = np.argsort(token_hash(self.seed, tokens.sequence, tokens.position), kind="stable")
        why = f" (more would take over {self.memory >> 20:,} MiB)" if fits < self.rows else ""
        return tokens.rows(np.sort(order[:most])), (f"{most:,} of {len(tokens):,} tokens are read{why}.",)


def read_units(
    run: Run,
    tokens: TokenTable,
    kind: UnitKind,
    *,
    site: str | None,
    sae: Autoencoder | None,
    values: Literal["chosen", "weight"],
    budget: Budget,
) -> Units:
    """Units of one kind on the tokens of a run.

    Raises:
        InputError: nothing of the kind was recorded there; the message names what to record.
    """
    if kind == "latent":
        if sae is None:
            raise InputError("latents need their autoencoder", fix="pass sae=…")
        if site is not None and site != str(sae.site):
            raise InputError(
                f"autoencoder {sae.name!r} does not read {site}", expected=str(sae.site), fix="leave site out"
            )
        return _latents(run, tokens, sae, budget)
    if kind == "neuron":
        return _neurons(run, tokens, _neuron_site(run, site), budget)
    return _of_routers(run, tokens, kind, site, values, budget)


def _neuron_site(run: Run, site: str | None) -> Site:
    kept = [Site.parse(name) for name in vector_sites(run)]
    neurons = [one for one in kept if one.tensor in (DENSE_POST, EXPERT_POST)]
    if site is not None:
        return Site.parse(site)
    if len(neurons) == 1:
        return neurons[0]
    raise InputError(
        f"run {run.name!r} kept neurons at {len(neurons)} sites",
        found=", ".join(map(str, neurons[:8])) or ", ".join(map(str, kept[:8])) or "no vectors",
        fix="name one with site=…"
        if neurons
        else "record with --probe activations --site blocks.L.mlp.hook_post (experts: blocks.L.mlp.experts.hook_post)",
    )


def _neurons(run: Run, tokens: TokenTable, site: Site, budget: Budget) -> Units:
    shards = list(vector_shards(run, str(site)))
    width = int(np.prod(shards[0].raw.shape[1:], dtype=np.int64))
    slots = shards[0].expert is not None
    kept = _recorded(shards, tokens, run, site)
    if not slots:
        tokens, notes = budget.picked(kept, 4 * width)
        values = np.zeros((len(tokens), width), np.float32)
        for shard in shards:
            rows, at = _rows(shard, tokens)
            values[at] = _finite(_vectors(shard, rows), site)
        return Units("neuron", str(site), values, tokens, notes=notes)
    a_token = sum(len(shard.token) for shard in shards) / max(len(kept), 1)
    tokens, notes = budget.picked(kept, 16 * width * a_token)  # twice: as triplets and as columns
    experts = 1 + max(int(np.max(shard.expert, initial=0)) for shard in shards if shard.expert is not None)
    parts = []
    for shard in shards:
        rows, at = _rows(shard, tokens)
        assert shard.expert is not None
        first = np.asarray(shard.expert)[rows].astype(np.int64) * width
        parts.append((_finite(_vectors(shard, rows), site), at, first))
    return Units("neuron", str(site), _slot_columns(parts, len(tokens), experts * width), tokens, notes=notes)


def _slot_columns(
    parts: list[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]], rows: int, width: int
) -> Any:
    """Neurons of the chosen experts as sparse columns: expert · neurons an expert + neuron."""
    from scipy.sparse import csc_array

    data = np.concatenate([values.ravel() for values, _, _ in parts])
    row = np.concatenate([np.repeat(at, values.shape[1]) for values, at, _ in parts]).astype(np.int32)
    column = np.concatenate([(first[:, None] + np.arange(values.shape[1])).ravel() for values, _, first in parts])
    return csc_array((data, (row, column)), shape=(rows, width))


def _latents(run: Run, tokens: TokenTable, sae: Autoencoder, budget: Budget) -> Units:
    from scipy.sparse import csr_array

    shards = list(vector_shards(run, str(sae.site)))
    head = getattr(sae, "head", None)
    width = int(np.prod(shards[0].raw.shape[1 if head is None else 2 :], dtype=np.int64))
    if width != sae.d_in:
        raise InputError(
            f"autoencoder {sae.name!r} does not fit the vectors of run {run.name!r} at {sae.site}",
            expected=f"{sae.d_in} components",
            found=f"{width}",
        )
    kept = _recorded(shards, tokens, run, sae.site, expert=sae.expert)
    rows, _ = _rows(shards[0], kept, expert=sae.expert)
    trial = _encoded(sae, _vectors(shards[0], rows[:256], head))
    filled = float((trial != 0).sum(1).mean()) if len(trial) else 1.0
    repeats = sum(len(_rows(shard, kept, expert=sae.expert)[0]) for shard in shards) / max(len(kept), 1)
    tokens, notes = budget.picked(kept, 24 * max(filled, 1) * repeats)
    data, row, column = [], [], []
    for shard in shards:
        rows, at = _rows(shard, tokens, expert=sae.expert)
        for start in range(0, len(rows), max(16, _ENCODED // sae.d_sae)):
            part = slice(start, start + max(16, _ENCODED // sae.d_sae))
            acts = _encoded(sae, _finite(_vectors(shard, rows[part], head), sae.site))
            where = np.nonzero(acts)
            data.append(acts[where])
            row.append(at[part][where[0]])
            column.append(where[1])
    triplets = tuple(np.concatenate(found) for found in (data, row, column))
    values = csr_array((triplets[0], (triplets[1], triplets[2])), shape=(len(tokens), sae.d_sae)).tocsc()
    return Units("latent", str(sae.site), values, tokens, sae.sae_id, notes)


def _encoded(sae: Autoencoder, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    import torch

    found: NDArray[np.float32] = sae.encode(torch.from_numpy(vectors).to(sae.device)).cpu().numpy()
    return found


def _of_routers(
    run: Run, tokens: TokenTable, kind: UnitKind, site: str | None, values: Literal["chosen", "weight"], budget: Budget
) -> Units:
    logits = kind == "router_logit"
    tensor = ROUTER_LOGITS if logits else EXPERT_WEIGHTS if values == "weight" else EXPERT_INDICES
    routers = [(int(layer), block, int(n)) for layer, block, n in run.sql(_ROUTERS_SQL).fetchall()]
    if site is not None:
        wanted = Site.parse(site)
        routers = [one for one in routers if one[:2] == (wanted.layer, wanted.block or "mlp")]
    table = "router_logits" if logits else "routing"
    if not routers or not run.rows(table):
        raise InputError(
            f"run {run.name!r} has no {table.replace('_', ' ')}" + (f" at {site}" if site else ""),
            fix=f"record a mixture-of-experts model with the probe {table}",
        )
    width = sum(n for _, _, n in routers)
    filled = 4 * width if logits else 32 * len(routers) * 8
    tokens, notes = budget.picked(tokens, filled)
    read = _logit_values(run, tokens, routers) if logits else _expert_values(run, tokens, routers, values)
    where = f"{Site(routers[0][0], routers[0][1], tensor)}" if site is not None else tensor
    return Units(kind, where, read, tokens, notes=notes)


def _expert_values(
    run: Run, tokens: TokenTable, routers: Iterable[tuple[int, str, int]], values: Literal["chosen", "weight"]
) -> Any:
    from scipy.sparse import csr_array

    data, row, column, first = [], [], [], 0
    for layer, block, experts in routers:
        found = run.sql(_ROUTING_SQL, {"layer": layer, "block": block}).to_arrow_table()
        at, inside = _at(found["token"].to_numpy(), tokens)
        ids, sizes = _flat(found["experts"])
        keep = np.repeat(inside, sizes)
        row.append(np.repeat(at, sizes)[keep])
        column.append(first + ids[keep].astype(np.int64))
        chosen = _flat(found["weights"])[0] if values == "weight" else np.ones(len(ids), np.float32)
        data.append(chosen[keep].astype(np.float32))
        first += experts
    triplets = tuple(np.concatenate(found) for found in (data, row, column))
    return csr_array((triplets[0], (triplets[1], triplets[2])), shape=(len(tokens), first)).tocsc()


def _logit_values(run: Run, tokens: TokenTable, routers: list[tuple[int, str, int]]) -> NDArray[np.float32]:
    values = np.zeros((len(tokens), sum(n for _, _, n in routers)), np.float32)
    first = 0
    for layer, block, experts in routers:
        found = run.sql(_LOGITS_SQL, {"layer": layer, "block": block}).to_arrow_table()
        at, inside = _at(found["token"].to_numpy(), tokens)
        flat, sizes = _flat(found["logits"])
        values[at[inside], first : first + int(sizes[0])] = flat.reshape(len(sizes), -1)[inside]
        first += experts
    return values


def _flat(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Every entry of a column of lists, and the lists' lengths."""
    lists = column.combine_chunks()
    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    return lists.flatten().to_numpy(zero_copy_only=False), np.diff(lists.offsets.to_numpy())


def _at(token: NDArray[np.integer[Any]], tokens: TokenTable) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Place of each number among the tokens, and whether it is one of them."""
    at = np.minimum(np.searchsorted(tokens.token, token), len(tokens) - 1)
    return at, tokens.token[at] == token


def _recorded(
    shards: list[VectorShard], tokens: TokenTable, run: Run, site: Site, *, expert: int | None = None
) -> TokenTable:
    """Those tokens whose vectors were kept."""
    present = np.zeros(len(tokens), bool)
    for shard in shards:
        _, at = _rows(shard, tokens, expert=expert)
        present[at] = True
    if not present.any():
        raise InputError(f"run {run.name!r} kept no vectors at {site} of the tokens asked for")
    return tokens.rows(present)


def _rows(
    shard: VectorShard, tokens: TokenTable, *, expert: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of a shard that belong to the tokens (and to the expert), and the place of each among the tokens."""
    at, inside = _at(np.asarray(shard.token), tokens)
    if expert is not None and shard.expert is not None:
        inside &= np.asarray(shard.expert) == expert
    rows = np.flatnonzero(inside)
    return rows, at[rows]


def _vectors(shard: VectorShard, rows: NDArray[np.int64], head: int | None = None) -> NDArray[np.float32]:
    """Some vectors, flat; of one head alone where it is given."""
    raw = np.asarray(shard.raw[rows])
    return replace(shard, raw=raw if head is None else raw[:, head]).float32().reshape(len(rows), -1)


def _finite(vectors: NDArray[np.float32], site: Site) -> NDArray[np.float32]:
    if not np.isfinite(vectors).all():
        raise InputError(
            f"some vectors recorded at {site} hold NaN or infinities",
            fix="record the run again in another dtype (float32)",
        )
    return vectors
