"""Probe `residual`: size and largest channels of the residual stream at every block's output."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from moescope.core.probe import probe
from moescope.core.sites import RESID_POST, Site
from moescope.probes.anatomy import Anatomy
from moescope.probes.arrow_rows import triples
from moescope.probes.probe import HostBatch, Probe, Tensors
from moescope.probes.selection import largest_channels, median_abs
from moescope.store.coverage import Expectation
from moescope.store.writer import BatchRecords

_TOKENS = "SELECT count(*) FROM residual WHERE run_id = $run AND layer = $layer"
_SEQUENCES = "SELECT count(*) FROM residual_sequences WHERE run_id = $run AND layer = $layer"


@probe(name="residual", tables=("residual", "residual_sequences"), default=True)
class ResidualProbe(Probe):
    """L2 norm, the three largest channels of every token, and the median |x| of every sequence, at each layer."""

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """Every block's output."""
        return [Site(layer, "", RESID_POST) for layer in range(anatomy.n_layers)]

    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Reduce [row, position, d_model] to five numbers a token and one a row."""
        stream, mask = tensors["resid"].detach(), tensors["mask"]
        channels = largest_channels(stream, 3)
        return {
            "norm": torch.linalg.vector_norm(stream, dim=-1, dtype=torch.float32).flatten(),
            "channels": channels.to(torch.int32).flatten(0, 1),
            "values": stream.gather(-1, channels).float().flatten(0, 1),
            "median": median_abs(stream, mask),
        }

    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """Rows of `residual` and `residual_sequences`."""
        tokens, sequences = [], []
        ids = [s.sequence_id for s in host.batch.sequences]
        for site in self.sites(self.context.anatomy):
            kept = host.kept.get(site)
            if kept is None:
                continue  # the ledger finds the gap
            norm = kept["norm"].take(host.real)
            if not np.isfinite(norm).all():
                self.context.report(site, "some activations are NaN or infinite")
            tokens.append(
                pa.table(
                    {
                        "token": host.token,
                        "layer": pa.array(np.full(len(norm), site.layer, np.uint16)),
                        "norm": pa.array(norm, pa.float32()),
                        "top_values": triples(kept["values"].take(host.real, axis=0), pa.float32()),
                        "top_channels": triples(
                            kept["channels"].take(host.real, axis=0).astype(np.uint16), pa.uint16()
                        ),
                    }
                )
            )
            sequences.append(
                pa.table(
                    {
                        "sequence_id": pa.array(ids, pa.int64()),
                        "layer": pa.array(np.full(len(ids), site.layer, np.uint16)),
                        "median_abs": pa.array(kept["median"], pa.float32()),
                    }
                )
            )
        if tokens:
            records.tables["residual"] = pa.concat_tables(tokens)
            records.tables["residual_sequences"] = pa.concat_tables(sequences)

    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """A row a token, and a median a sequence, at every layer."""
        found = []
        for site in self.sites(self.context.anatomy):
            problem = self.context.problems.get(str(site))
            found.append(Expectation(str(site), tokens, _TOKENS, site.layer, "", problem))
            found.append(Expectation(f"{site} median", sequences, _SEQUENCES, site.layer, ""))
        return found
