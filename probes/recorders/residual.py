"""Probe `residual`: size and largest channels of the residual stream at every block's output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from moescope.core.probe import probe
from moescope.core.sites import RESID_POST, Site
from moescope.probes.anatomy import Anatomy
from moescope.probes.arrow_rows import triples
from moescope.probes.probe import HostBatch, Probe, Tensors
from moescope.probes.selection import largest_and_median
from moescope.store.coverage import Expectation
from moescope.store.writer import BatchRecords

_TOKENS = "SELECT count(*) FROM residual WHERE run_id = $run AND layer = $layer"
_SEQUENCES = "SELECT count(*) FROM residual_sequences WHERE run_id = $run AND layer = $layer"


@probe(name="residual", tables=("residual", "residual_sequences"), default=True)
class ResidualProbe(Probe):
    """L2 norm, the three largest channels of every token, and the median |x| of every sequence, at each layer."""

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """Every block's output, where that is one vector a token."""
        return [] if anatomy.no_stream else [Site(layer, "", RESID_POST) for layer in range(anatomy.n_layers)]

    @classmethod
    def no_use(cls, anatomy: Anatomy) -> str | None:
        """Where the blocks hand on more than one vector a token."""
        return anatomy.no_stream

    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Reduce [row, position, d_model] to five numbers a token and one a row."""
        stream, mask = tensors["resid"].detach(), tensors["mask"]
        channels, medians = largest_and_median(stream, mask, 3)
        return {
            "norm": torch.linalg.vector_norm(stream, dim=-1, dtype=torch.float32).flatten(),
            "channels": channels.to(torch.int32).flatten(0, 1),
            "values": stream.gather(-1, channels).float().flatten(0, 1),
            "median": medians,
        }

    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """Rows of `residual` and `residual_sequences`, all layers at once."""
        sites = [site for site in self.sites(self.context.anatomy) if site in host.kept]  # the ledger finds a gap
        if not sites:
            return

        def stacked(name: str, places: NDArray[np.int64]) -> NDArray[Any]:
            return np.concatenate([host.kept[site][name].take(places, axis=0) for site in sites])

        norm = stacked("norm", host.real)
        self._check(sites, norm.reshape(len(sites), -1))
        layers = np.array([site.layer for site in sites], np.uint16)
        sequences = np.array([s.sequence_id for s in host.batch.sequences])
        records.tables["residual"] = pa.table(
            {
                "token": np.tile(host.token, len(sites)),
                "layer": np.repeat(layers, len(host.real)),
                "norm": norm,
                "top_values": triples(stacked("values", host.real), pa.float32()),
                "top_channels": triples(stacked("channels", host.real).astype(np.uint16), pa.uint16()),
            }
        )
        if host.phase != "prefill":
            return  # the median is of the whole text, which the prefill has seen
        records.tables["residual_sequences"] = pa.table(
            {
                "sequence_id": np.tile(sequences, len(sites)),
                "layer": np.repeat(layers, len(sequences)),
                "median_abs": stacked("median", np.arange(len(sequences))),
            }
        )

    def _check(self, sites: list[Site], norms: NDArray[np.float32]) -> None:
        for site, norm in zip(sites, norms, strict=True):
            if not np.isfinite(norm).all():
                self.context.report(site, "some activations are NaN or infinite")

    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """A row a token, and a median a sequence, at every layer."""
        found = []
        for site in self.sites(self.context.anatomy):
            problem = self.context.problems.get(str(site))
            found.append(Expectation(str(site), tokens, _TOKENS, site.layer, "", problem))
            found.append(Expectation(f"{site} median", sequences, _SEQUENCES, site.layer, ""))
        return found
