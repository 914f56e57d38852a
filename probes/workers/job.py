"""What goes between the program that asked for a run and its workers: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moescope.core import errors
from moescope.core.errors import MoescopeError, RunError
from moescope.probes.corpus import Corpus


@dataclass(frozen=True)
class Job:
    """What every worker is told.

    Attributes:
        model: name or path, which the worker loads by itself.
        load_options: for `load`: device, dtype, revision, trust_remote_code, device_map.
        corpus: the whole one; the worker reads it for itself.
        fingerprint: of the corpus, as the program that asked found it.
        name: of the run.
        options: for `Recording`: probes, sites, batch_size, ….
        folder: where shards go, the same folder for all.
        marker: name of a file there, by which a worker knows that it is the same.
        cwd: folder that relative paths of the corpus start from.
        threads: of torch, in each worker.
    """

    model: str
    load_options: Mapping[str, Any]
    corpus: Corpus
    fingerprint: str
    name: str
    options: Mapping[str, Any]
    folder: str
    marker: str
    cwd: str
    threads: int


@dataclass(frozen=True)
class Task:
    """Batches to record: from `first` up to, but without, `end`; `attempt` counts from 0."""

    first: int
    end: int
    attempt: int = 0

    @property
    def file(self) -> str:
        """Name of its shard. A second attempt has another: the first one's file may lie there half written."""
        return f"batches-{self.first:07}-{self.end:07}.{self.attempt}.duckdb"


@dataclass(frozen=True)
class Refusal:
    """An error as data: exceptions with fields of their own do not travel well between processes."""

    kind: str
    fields: Mapping[str, str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """Any error; one that moescope did not raise on purpose becomes a `RunError`."""
        if not isinstance(error, MoescopeError):
            error = RunError("a worker failed", found=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        told = {name: getattr(error, name) for name in ("problem", "expected", "found", "fix")}
        return cls(type(error).__name__, told)

    def error(self) -> MoescopeError:
        """The error again, to be raised."""
        kind = getattr(errors, self.kind, RunError)
        fields = dict(self.fields)
        made: MoescopeError = kind(fields.pop("problem") or "a worker failed", **fields)
        return made


@dataclass(frozen=True)
class Outcome:
    """What a worker says when it is done with something.

    Attributes:
        refusal: why it could not be done; None where it could.
        shard: path of the shard; None where the plan ends before the task, or nothing was to be recorded.
        batches, tokens, characters: recorded.
        plan_batches: how many batches the plan has, where the worker has come to its end.
    """

    refusal: Refusal | None = None
    shard: str | None = None
    batches: int = 0
    tokens: int = 0
    characters: int = 0
    plan_batches: int | None = None
