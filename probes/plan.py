"""`Plan`: what a recording will cost, for a reader, a notebook or a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moescope.core.result import Result
from moescope.core.tabular import Tabular
from moescope.probes.plan_budget import written_bytes

if TYPE_CHECKING:
    import pyarrow as pa

_DEFINITION = (
    "Bytes on disk from formulas of tokens, layers, routers and widths, with floats compressed as records of a few batches of "
    "this model compress; seconds from running those batches under all probes, extrapolated by their padded size; each "
    "probe's part from running one batch with it and without it; memory from the largest batch and the records that wait "
    "to be written."
)


@dataclass(frozen=True)
class Cost:
    """What one probe, the model itself, or the file costs.

    Attributes:
        part: name of a probe, `forward pass`, or `the file itself`.
        rows: rows in its tables, and vectors.
        bytes: on disk.
        seconds: of the recording.
        memory_bytes: held while it runs: records until they are written; for the forward pass the largest batch.
    """

    part: str
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0
    memory_bytes: int = 0


@dataclass(frozen=True, repr=False)
class Plan(Tabular):
    """What a recording will cost; made by `moescope.plan`.

    Attributes:
        model, corpus: names.
        probes, sites, sample: what it records; where a budget was given, what fits it.
        tokens, sequences, batches, documents: of the corpus, generated tokens (`generated`, at most) among the tokens.
        tokens_error: relative standard error of the tokens; 0 where all texts were counted.
        bytes: on disk, vectors included.
        seconds: from the first batch to the settled ledger.
        memory_bytes, device_bytes: peak of this process, and of the CUDA devices (0 without).
        costs: of each part.
        budget: bytes; None where none was given.
        lost: what the budget leaves out, in words.
        left_out: default probes that the model has no use for, with the reason.
    """

    model: str
    corpus: str
    probes: tuple[str, ...]
    sites: tuple[str, ...]
    sample: float
    tokens: int
    generated: int
    sequences: int
    batches: int
    documents: int
    tokens_error: float
    bytes: int
    seconds: float
    memory_bytes: int
    device_bytes: int
    costs: tuple[Cost, ...] = field(repr=False)
    budget: int | None = None
    lost: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def result(self) -> Result:
        """The plan as a `Result`: table, definition and units, to be saved like any other."""
        import pyarrow as pa

        seconds = sum(cost.seconds for cost in self.costs) or 1.0
        rows = [{**vars(cost), "share_of_time": cost.seconds / seconds} for cost in self.costs]
        return Result(
            title=self.title,
            table=pa.Table.from_pylist(rows),
            definition=_DEFINITION,
            units={"bytes": "bytes on disk", "seconds": "s", "memory_bytes": "bytes", "share_of_time": "share"},
            n=self.tokens,
            n_unit="tokens" if self.tokens_error == 0 else f"tokens, ± {self.tokens_error:.1%}",
            name="plan",
            source="size formulas and a measured pass",
            notes=self.notes,
            provenance={"model": self.model, "corpus": self.corpus},
        )

    @property
    def title(self) -> str:
        """The totals in one sentence."""
        device = f" and {written_bytes(self.device_bytes)} on the device" if self.device_bytes else ""
        return (
            f"{self.tokens:,} tokens in {self.batches:,} batches will take {written_bytes(self.bytes)} on disk, "
            f"about {_duration(self.seconds)}, and {written_bytes(self.memory_bytes)} of memory{device}"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know besides."""
        found = [f"To stay within {written_bytes(self.budget)}: {loss}." for loss in self.lost] if self.budget else []
        if self.tokens_error:
            found.append(
                f"Tokens are estimated from a sample of the texts: ± {2 * self.tokens_error:.1%} (two errors)."
            )
        if self.generated:
            found.append(f"At most {self.generated:,} of the tokens are generated: answers may end earlier.")
        return (*found, *(f"Without {name}: {reason}." for name, reason in self.left_out.items()))

    def arrow(self) -> pa.Table:
        """The costs, a row each part, as a PyArrow table."""
        return self.result.table

    def as_json(self) -> dict[str, Any]:
        """All of it as plain JSON data."""
        plain = {name: value for name, value in vars(self).items() if name not in ("costs", "result")}
        return {**plain, "left_out": dict(self.left_out), "notes": self.notes, "costs": self.result.table.to_pylist()}

    def planned(self) -> dict[str, float]:
        """What a run keeps of it, to be held against what it took."""
        return {"bytes": self.bytes, "seconds": round(self.seconds, 3), "memory_bytes": self.memory_bytes}

    _repr_pretty_ = Tabular._repr_pretty_  # IPython looks for it beside `__repr__`

    def __repr__(self) -> str:
        return f"Plan({self.model} on {self.corpus}: {self.title})"

    def __str__(self) -> str:
        return str(self.result)

    def _repr_html_(self) -> str:
        return self.result._repr_html_()


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
