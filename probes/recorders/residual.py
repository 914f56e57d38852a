"""Probe `residual`: size and largest channels of the residual stream at every block's output."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from moescope.probes.anatomy import Anatomy
from moescope.probes.arrow_rows import triples
from moescope.probes.probe import HostBatch, Probe, Tensors
from moescope.store.coverage import Expectation
from moescope.store.writer import BatchRecords

from moescope.core.probe import probe
from moescope.core.sites import RESID_POST, Site

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
        channels = stream.abs().topk(min(3, stream.shape[-1]), dim=-1).indices
        return {
            "norm": torch.linalg.vector_norm(stream, dim=-1, dtype=torch.float32),
            "channels": channels.to(torch.int32),
            "values": stream.gather(-1, channels).float(),
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
            norm = kept["norm"][host.mask]
            if not np.isfinite(norm).all():
                self.context.report(site, "some activations are NaN or infinite")
            tokens.append(
                pa.table(
                    {
                        "token": host.token,
                        "layer": pa.array(np.full(len(norm), site.layer, np.uint16)),
                        "norm": pa.array(norm, pa.float32()),
                        "top_values": triples(kept["values"][host.mask], pa.float32()),
                        "top_channels": triples(kept["channels"][host.mask].astype(np.uint16), pa.uint16()),
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


@torch.library.custom_op("moescope::median_abs", mutates_args=())
def median_abs(stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Lower median of |x| over the real tokens and all channels of each row.

    Takes [row, position, d_model] and the mask [row, position]; gives [row] in float32.
    """
    magnitudes = stream.abs().float().masked_fill(~mask.unsqueeze(-1), torch.nan)
    return magnitudes.flatten(1).nanmedian(dim=1).values


@median_abs.register_kernel("cpu")
def _median_abs_cpu(stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """NumPy's selection is some fifteen times faster than torch's on a CPU, where reading on the host costs nothing."""
    magnitudes = stream.abs().float().numpy()
    medians = torch.empty(len(stream), dtype=torch.float32)
    for row, length in enumerate(mask.sum(1).tolist()):
        values = magnitudes[row][mask[row].numpy()].ravel() if length < mask.shape[1] else magnitudes[row].ravel()
        middle = (len(values) - 1) // 2
        medians[row] = float(np.partition(values, middle)[middle]) if len(values) else torch.nan
    return medians


@median_abs.register_fake
def _median_abs_fake(stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return stream.new_empty(stream.shape[0], dtype=torch.float32)
