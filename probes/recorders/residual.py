"""Probe `residual`: size, largest channels and massive activations of the residual stream at every block's output."""

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
from moescope.probes.probe import HostBatch, Probe, ProbeContext, Tensors
from moescope.probes.recorders.massive_activations import CHANNELS, SiteValues, longer_lists, massive_rows
from moescope.probes.selection import largest_and_median
from moescope.store.coverage import Expectation
from moescope.store.writer import BatchRecords

_TOKENS = "SELECT count(*) FROM residual WHERE run_id = $run AND layer = $layer"
_SEQUENCES = "SELECT count(*) FROM residual_sequences WHERE run_id = $run AND layer = $layer"


@probe(name="residual", tables=("residual", "residual_sequences", "massive_activations"), default=True)
class ResidualProbe(Probe):
    """L2 norm, the three largest channels of every token, and the median |x| of every sequence, at each layer.

    Every activation that is massive by the rule of `moescope.probes.recorders.massive_activations` becomes a row of its own.
    The median is that of the sequence's prefill, for tokens generated after it too. Where more are massive than what is kept
    of a batch can tell, the ledger says so and the run is incomplete.
    """

    def __init__(self, context: ProbeContext) -> None:
        super().__init__(context)
        # Number of the batch whose steps are being turned into rows, and the medians of its prefill.
        self._medians: tuple[int, dict[Site, NDArray[np.float32]]] = (-1, {})

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """Every block's output, where that is one vector a token."""
        return [] if anatomy.no_stream else [Site(layer, "", RESID_POST) for layer in range(anatomy.n_layers)]

    @classmethod
    def no_use(cls, anatomy: Anatomy) -> str | None:
        """Where the blocks hand on more than one vector a token."""
        return anatomy.no_stream

    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Reduce [row, position, d_model] to seven numbers a token, one a row, and longer lists for a few tokens."""
        stream, mask = tensors["resid"].detach(), tensors["mask"]
        channels, medians = largest_and_median(stream, mask, 3)
        values = stream.gather(-1, channels)
        positions, list_channels, list_values = longer_lists(stream, values, mask, medians)
        return {
            "norm": torch.linalg.vector_norm(stream, dim=-1, dtype=torch.float32).flatten(),
            "channels": channels.to(torch.int32).flatten(0, 1),
            "values": values.float().flatten(0, 1),
            "median": medians,
            "list_positions": positions,
            "list_channels": list_channels,
            "list_values": list_values,
        }

    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """Rows of `residual`, `residual_sequences` and `massive_activations`, all layers at once."""
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
        if host.phase == "prefill":
            self._medians = host.batch.number, {site: host.kept[site]["median"] for site in sites}
        self._add_massive(sites, host, records)
        if host.phase != "prefill":
            return  # the median is of the whole text, which the prefill has seen
        records.tables["residual_sequences"] = pa.table(
            {
                "sequence_id": np.tile(sequences, len(sites)),
                "layer": np.repeat(layers, len(sequences)),
                "median_abs": stacked("median", np.arange(len(sequences))),
            }
        )

    def _add_massive(self, sites: list[Site], host: HostBatch, records: BatchRecords) -> None:
        batch, medians = self._medians
        found = []
        for site in sites:
            if batch != host.batch.number or site not in medians:
                continue  # its prefill was not seen, which the ledger shows
            kept = host.kept[site]
            at_site = SiteValues(
                site.layer,
                kept["values"].take(host.real, axis=0),
                kept["channels"].take(host.real, axis=0),
                medians[site].astype(np.float64)[host.row],
                kept["list_positions"],
                kept["list_channels"],
                kept["list_values"],
            )
            rows, missing = massive_rows(at_site, host.real, host.token, host.mask.shape[1])
            found += [] if rows is None else [rows]
            if missing:
                self.context.report(
                    site,
                    f"{missing} tokens of a batch may have more massive activations than the record holds: up to three a token, "
                    f"and up to {CHANNELS} for a few tokens of each sequence",
                )
        if found:
            records.tables["massive_activations"] = pa.concat_tables(found)

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
