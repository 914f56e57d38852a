"""What can be recorded of each family: found by building it tiny and recording it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moescope.core.errors import MoescopeError
from moescope.probes.anatomy import Sublayer
from moescope.probes.corpus import Corpus
from moescope.probes.families.tiny import ENCODER_DECODER_TYPES, build_tiny, moe_model_types
from moescope.probes.live_model import LiveModel
from moescope.probes.record import record
from moescope.store.run import Run
from moescope.store.store import Store

_READ = {
    "experts": "what the experts are given",
    "skipping": "what the experts are given",
    "one_hot": "what the experts are given",
    "mask_as_ids": "what the experts are given",
    "shares_of_two": "the router's output",
    "dense_scores": "the router's output",
    "sorted_slots": "the router's output",
    "product_keys": "the ids looked up",
    "registered": "your own function",
}
_TEXTS = ((40, 25, 60), 3)


@dataclass(frozen=True)
class Support:
    """One model type, recorded in tiny form.

    Attributes:
        model_type: its name in transformers.
        recorded: `complete`, or what went wrong.
        routers: routers found, over how many layers with routers, for instance `2 in 2 layers`.
        decision: where the decision is read.
        rule: the routing rule, where one reproduces the decisions; otherwise how far the best one goes.
        inside: `outputs and neurons`, `outputs`, or why the inside of the experts cannot be read.
        note: what a reader of the records must know.
    """

    model_type: str
    recorded: str
    routers: str
    decision: str
    rule: str
    inside: str
    note: str


COLUMNS = ("model type", "recorded", "routers", "decision read from", "routing rule", "inside the experts", "note")


def supported_types() -> tuple[str, ...]:
    """Model types that are looked at: every causal language model with experts, and the encoder-decoder ones."""
    return (*moe_model_types(), *ENCODER_DECODER_TYPES)


def support_table(types: Iterable[str] | None = None, *, each: Callable[[str], None] = lambda _: None) -> list[Support]:
    """Build each type tiny, record it, and say what was found.

    Args:
        types: model types; None for all.
        each: called with a type before it is looked at.

    Example:
        >>> support_table(["olmoe"])[0].rule
        'top-k of softmax, weights softmax'
    """
    found = []
    for name in types or supported_types():
        each(name)
        found.append(support_of(name))
    return found


def support_of(model_type: str) -> Support:
    """What can be recorded of one model type; raises `InputError` for an unknown one."""
    model = LiveModel(build_tiny(model_type), None, name=model_type)
    routers = model.anatomy.moe
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "family.duckdb") as store:
        try:
            run = record(model, _corpus(), store, name=model_type, progress=False)
            recorded, rules = _status(run), _rules(run)
        except MoescopeError as error:
            recorded, rules = str(error), "—"
    return Support(
        model_type,
        recorded,
        f"{len(routers)} in {len({s.layer for s in routers})} of {model.anatomy.n_layers} layers",
        "; ".join(dict.fromkeys(_READ[s.reader] for s in routers)),
        rules,
        "; ".join(dict.fromkeys(_inside(s) for s in routers)),
        "; ".join(dict.fromkeys([*(s.note for s in routers if s.note), *_stream(model)])),
    )


def _corpus() -> Corpus:
    lengths, seed = _TEXTS
    random = torch.Generator().manual_seed(seed)
    return Corpus.from_token_ids([torch.randint(3, 97, (n,), generator=random).tolist() for n in lengths])


def _status(run: Run) -> str:
    bad = [row for row in run.coverage.table.to_pylist() if row["status"] != "complete"]
    return "complete" if run.complete else "; ".join(f"{row['site']}: {row['detail']}" for row in bad[:2])


def _rules(run: Run) -> str:
    query = """
        SELECT routing_rule->>'text', (routing_rule->>'verified')::BOOLEAN, (routing_rule->>'choice_verified')::BOOLEAN
        FROM layers
        WHERE run_id = $run AND kind = 'moe'
        ORDER BY layer, block
    """
    texts = []
    for text, verified, choice in run.store.fetch(query, {"run": run.run_id}):
        if text is None:
            texts.append("no logits to hold a rule against")
        else:
            texts.append(
                text if verified else f"{text.split(', weights')[0]}, weights by no known rule" if choice else "none"
            )
    return "; ".join(dict.fromkeys(texts))


def _stream(model: LiveModel) -> list[str]:
    reason = model.anatomy.no_stream
    return [f"no residual stream to record: {reason}"] if reason else []


def _inside(s: Sublayer) -> str:
    if s.unreachable is not None:
        return f"no: {s.unreachable}"
    return "outputs and neurons" if s.neurons else "outputs"


def as_markdown(found: Iterable[Support]) -> str:
    """The table as it stands in the documentation."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_cells(s) for s in found)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _cells(s: Support) -> tuple[str, ...]:
    plain: dict[str, Any] = vars(s)
    return tuple(str(value).replace("|", "\\|") or "—" for value in plain.values())
