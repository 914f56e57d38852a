"""Probe `router_logits`: what every router gave each token, before softmax, sigmoid or bias."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from moescope.core.probe import probe
from moescope.core.sites import ROUTER_LOGITS, Site
from moescope.probes.anatomy import Anatomy
from moescope.probes.arrow_rows import constant, lists
from moescope.probes.probe import HostBatch, Probe, Tensors, expectations_at, no_routers
from moescope.store.coverage import Expectation
from moescope.store.writer import BatchRecords

_ROWS = "SELECT count(logits) FROM router_logits WHERE run_id = $run AND layer = $layer AND block = $block"


@probe(name="router_logits", tables=("router_logits",))
class RouterLogitsProbe(Probe):
    """Router scores of every token over all experts, by expert id, as float32."""

    @classmethod
    def no_use(cls, anatomy: Anatomy) -> str | None:
        """Where there is no such thing to record."""
        return no_routers(anatomy)

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """Every router that gives its logits."""
        return [Site(s.layer, s.block, ROUTER_LOGITS) for s in anatomy.moe if s.has_logits]

    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Copy them: a model may write over its own tensors before these reach the host."""
        logits = tensors["logits"].detach()
        return {"logits": logits.reshape(-1, logits.shape[-1]).to(torch.float32, copy=True)}

    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """Rows of `router_logits`."""
        tables = []
        for site in self.sites(self.context.anatomy):
            if not (kept := host.kept.get(site)):
                continue  # the ledger finds the gap
            logits = kept["logits"].take(host.real, axis=0)
            if np.isnan(logits).any():
                self.context.report(site, "some router logits are NaN")
            columns = {
                "token": host.token,
                "layer": pa.array(np.full(len(logits), site.layer, np.uint16)),
                "block": constant(site.block, len(logits)),
                "logits": lists(logits, pa.float32()),
            }
            tables.append(pa.table(columns))
        if tables:
            records.tables["router_logits"] = pa.concat_tables(tables).unify_dictionaries()

    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """A row a token at every router that gives its logits."""
        routers = [s for s in self.context.anatomy.moe if s.has_logits]
        return expectations_at(self, routers, ROUTER_LOGITS, lambda _: tokens, _ROWS)
