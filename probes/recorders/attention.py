"""Probe `attention`: statistics of every head's attention, by sequence, reduced while the pattern passes in slices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.probe import probe
from moescope.core.sites import PATTERN, Site
from moescope.probes.anatomy import Anatomy
from moescope.probes.arrow_rows import constant
from moescope.probes.attention_classes import key_codes
from moescope.probes.attention_reduced import attention_places
from moescope.probes.attention_slices import PatternSlices
from moescope.probes.attention_statistics import METRICS, SINK_METRIC, reduce_pattern
from moescope.probes.batches import Batch, Side
from moescope.probes.pieces import Pieces
from moescope.probes.probe import HostBatch, Probe, ProbeContext, Tensors
from moescope.store.coverage import Expectation
from moescope.store.writer import BatchRecords

CONDITION = "base"
_QUERIES = """
SELECT sum(n)
FROM head_sequences
WHERE run_id = $run AND layer = $layer AND block = $block AND metric = 'entropy' AND condition = 'base'
"""


@probe(name="attention", tables=("head_sequences", "heads"))
class AttentionProbe(Probe):
    """Where each head's attention goes: sinks, classes of keys, entropy, distance (`moescope.probes.attention_statistics`).

    The queries of the texts count; those of generated tokens, which see the same keys and few others, do not. Layers
    without attention weights are left out, with the reason in the run's summary (`attention_left_out`). Families whose
    modules compute attention by themselves hand over their whole pattern: there memory grows with the square of the length,
    as it does in the model.
    """

    def __init__(self, context: ProbeContext) -> None:
        super().__init__(context)
        self._pieces = Pieces(context.tokenizer)
        self._prefill, self._padded = True, True
        self._codes: torch.Tensor | None = None
        self._generated = 0
        sites, left_out = attention_places(context.anatomy)
        self._sites = sites
        self._left_out = {str(as_pattern(site)): reason for site, reason in left_out.items()}

    @classmethod
    def no_use(cls, anatomy: Anatomy) -> str | None:
        """Where no layer has attention weights."""
        sites, left_out = attention_places(anatomy)
        return None if sites else "; ".join(dict.fromkeys(left_out.values())) or "the model has no attention"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The pattern of every attention, in slices."""
        return attention_places(anatomy)[0]

    def enter(self, batch: Batch, *, step: int, side: Side) -> None:
        """Look up what the tokens of a batch are."""
        self._prefill = step == 0
        if self._prefill:
            ids, mask = batch.padded(0, side=side)
            self._padded = not bool(mask.all())
            self._codes = torch.from_numpy(key_codes(self._pieces, ids))

    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Sums over queries for every row, metric and head."""
        slices, mask = cast("PatternSlices", tensors["slices"]), tensors["mask"]
        if slices.refused is not None:
            self._refuse(site, slices.refused)
            return {}
        if not self._prefill or mask.shape[1] != slices.queries:
            return {}
        codes = self._codes
        fits = codes is not None and codes.shape == mask.shape  # a pass tried before the run is of other tokens
        on_device = codes.to(slices.device) if codes is not None and fits else None
        sums = reduce_pattern(slices, mask, on_device, padded=self._padded or not fits)
        return {"sums": sums.sums, "n": sums.n.to(torch.int32)}

    def _refuse(self, site: Site, reason: str) -> None:
        self._left_out[str(as_pattern(site))] = reason
        self._sites = [other for other in self._sites if other != site]
        if not self._sites:
            raise InputError(
                "no layer of this model shows its attention pattern",
                found="; ".join(dict.fromkeys(self._left_out.values())),
                fix="leave the probe attention out",
            )

    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """Rows of `head_sequences`: one a sequence, layer and metric."""
        if host.phase != "prefill":
            self._generated += len(host.real)
            return
        tables = []
        for site in self._sites:
            if kept := host.kept.get(site):  # the ledger finds a gap
                if not np.isfinite(kept["sums"]).all():
                    self.context.report(as_pattern(site), "some attention weights are NaN or infinite")
                tables.append(_rows(site, kept["sums"], kept["n"], host))
        if tables:
            records.tables["head_sequences"] = pa.concat_tables(tables).unify_dictionaries()

    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """A query a token of the texts, at every attention."""
        queries = tokens - self._generated
        return [
            Expectation(
                str(as_pattern(site)),
                queries,
                _QUERIES,
                site.layer,
                site.block,
                self.context.problems.get(str(as_pattern(site))) or self.context.problems.get(str(site)),
            )
            for site in self._sites
        ]

    def state(self) -> dict[str, Any]:
        """Generated tokens, whose queries do not count."""
        return {"generated": self._generated}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self._generated += int(state.get("generated", 0))

    def summary(self) -> dict[str, Any]:
        """Layers that are left out, and why."""
        return {"attention_left_out": self._left_out} if self._left_out else {}


def as_pattern(site: Site) -> Site:
    """The site of the pattern itself, by which a site of its slices is told to people."""
    return Site(site.layer, site.block, PATTERN)


def _rows(site: Site, sums: NDArray[np.float32], n: NDArray[np.int32], host: HostBatch) -> pa.Table:
    """Rows of one attention from its sums [row, metric, head]."""
    rows, metrics, heads = sums.shape
    names = (*METRICS, SINK_METRIC)[:metrics]
    sequences = np.array([s.sequence_id for s in host.batch.sequences], np.int64)
    offsets = pa.array(np.arange(0, sums.size + 1, heads, dtype=np.int32))
    return pa.table(
        {
            "sequence_id": np.repeat(sequences, metrics),
            "layer": pa.array(np.full(rows * metrics, site.layer, np.uint16)),
            "block": constant(site.block, rows * metrics),
            "metric": _dictionary(names, rows),
            "condition": constant(CONDITION, rows * metrics),
            "sums": pa.ListArray.from_arrays(offsets, pa.array(sums.ravel(), pa.float32())),
            "n": pa.array(n.ravel().astype(np.int64)),
        }
    )


def _dictionary(names: Iterable[str], times: int) -> pa.Array:
    listed = list(names)
    indices = np.tile(np.arange(len(listed), dtype=np.int8), times)
    return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(listed))
