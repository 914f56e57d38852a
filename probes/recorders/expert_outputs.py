"""Probe `expert_outputs`: how large each chosen expert's output was, for every token."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from moescope.core.probe import probe
from moescope.core.sites import EXPERT_OUT, Site
from moescope.probes.anatomy import Anatomy
from moescope.probes.arrow_rows import constant, lists, slot_order
from moescope.probes.probe import HostBatch, Probe, Tensors, expectations_at, no_inside
from moescope.probes.recorders.experts import computed_slots, experts_site
from moescope.probes.slot_reductions import slot_norms
from moescope.store.coverage import Expectation
from moescope.store.writer import BatchRecords

_NORMS = "SELECT sum(len(norms)) FROM expert_outputs WHERE run_id = $run AND layer = $layer AND block = $block"


@probe(name="expert_outputs", tables=("expert_outputs",))
class ExpertOutputsProbe(Probe):
    """L2 norm of every slot's output before its weight, in the order in which `routing` stores the slots."""

    @classmethod
    def no_use(cls, anatomy: Anatomy) -> str | None:
        """Where there is no such thing to record."""
        return no_inside(anatomy)

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """Where `experts` reads them."""
        return [experts_site(s) for s in anatomy.moe if s.unreachable is None]

    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Reduce every slot's output to its norm; ids and weights give the order."""
        ids = tensors["indices"]
        return {
            "ids": ids.to(torch.int32, copy=True),
            "weights": tensors["weights"].detach().to(torch.float32, copy=True),
            "norms": slot_norms(*computed_slots(tensors)).reshape(ids.shape),
        }

    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """Rows of `expert_outputs`."""
        tables = []
        for s in self.context.anatomy.moe:
            if not (kept := host.kept.get(experts_site(s))):
                continue  # the ledger finds the gap
            ids, weights, norms = (kept[name].take(host.real, axis=0) for name in ("ids", "weights", "norms"))
            if not np.isfinite(norms).all():
                self.context.report(Site(s.layer, s.block, EXPERT_OUT), "some expert outputs are NaN or infinite")
            order = slot_order(weights, ids)
            if order is not None:
                norms = np.take_along_axis(norms, order, 1)
            columns = {
                "token": host.token,
                "layer": pa.array(np.full(len(norms), s.layer, np.uint16)),
                "block": constant(s.block, len(norms)),
                "norms": lists(norms, pa.float32()),
            }
            tables.append(pa.table(columns))
        if tables:
            records.tables["expert_outputs"] = pa.concat_tables(tables).unify_dictionaries()

    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """k norms a token at every router whose experts can be read."""
        reached = [s for s in self.context.anatomy.moe if s.unreachable is None]
        return expectations_at(self, reached, EXPERT_OUT, lambda s: tokens * (s.top_k or 0), _NORMS)
