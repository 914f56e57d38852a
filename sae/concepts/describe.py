"""Descriptions of units in words, as stored rows with scores: written and judged by any text-completion function."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.core.errors import InputError
from moescope.sae.concepts.activity import Described, read_activity
from moescope.sae.concepts.asking import Asker
from moescope.sae.concepts.counting import counted
from moescope.sae.concepts.description_job import SCORES, Job, Scored
from moescope.sae.concepts.description_scoring import score_all
from moescope.sae.concepts.prompts import describe_prompt, read_description
from moescope.sae.concepts.windows import Window, Words, active_windows, stored_windows
from moescope.store.sae_rows import write_rows

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel
    from moescope.sae.autoencoder import Autoencoder
    from moescope.store.run import Run
    from moescope.store.store import Store

_BEFORE_SQL = """
    SELECT unit, description_id::VARCHAR, text, prompt
    FROM descriptions
    WHERE run_id = $run AND unit_kind = $kind AND describer = $describer
        AND sae_id IS NOT DISTINCT FROM $sae::UUID
        AND layer IS NOT DISTINCT FROM $layer AND block IS NOT DISTINCT FROM $block
    ORDER BY created_at
"""
_CONTEXTS_SQL = """
    SELECT stratum, rank, sequence_id, value, first_position, activations
    FROM feature_contexts
    WHERE run_id = $run AND sae_id = $sae::UUID AND feature = $unit
    ORDER BY stratum, rank
"""


@dataclass(frozen=True)
class Descriptions:
    """What was described and scored.

    Attributes:
        run: name of the run.
        unit_kind: what was described.
        texts: unit → description, those found in the store too.
        described, kept: units described now, and those that had a description of this describer before.
        skipped: unit → why it has none.
        rows: scores written now, as they lie in `description_scores`, with `unit`.
        calls, retries, unread: of the completion function: calls, questions asked again, answers never understood.
        errors: the last things it raised.
    """

    run: str
    unit_kind: Described
    texts: dict[int, str]
    described: tuple[int, ...]
    kept: tuple[int, ...]
    skipped: dict[int, str]
    rows: tuple[dict[str, Any], ...]
    calls: int
    retries: int
    unread: int
    errors: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know besides: units without a description, and answers that were none."""
        left = [f"{self.unit_kind} {unit} has no description: {why}." for unit, why in self.skipped.items()]
        unread = [f"{self.unread:,} questions were never answered to the point."] if self.unread else []
        failed = [f"The completion function failed at times; last: {self.errors[-1]}"] if self.errors else []
        return (*left, *unread, *failed)


def describe(
    store: Store,
    run: Run,
    *,
    complete: Callable[[str], str],
    units: Sequence[int],
    unit_kind: Described = "latent",
    sae: Autoencoder | None = None,
    layer: int | None = None,
    block: str = "mlp",
    describer: str = "unnamed",
    scores: Sequence[Scored] = ("detection", "fuzzing"),
    model: LiveModel | None = None,
    examples: int = 20,
    judged: int = 20,
    width: int = 32,
    tokens: int = 200_000,
    draws: int = 1000,
    again: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Descriptions:
    """Have units described in words from texts on which they are active, and score each description; all of it is stored.

    The describer sees windows of text with the active tokens marked: for latents those of `feature_contexts` where there
    are any, else half of the largest activity and half drawn at random. What is judged are other documents. Detection: does
    this passage make it active, asked of as many passages with activity as without (balanced accuracy). Fuzzing: are the
    marked tokens those on which it is active, half of the passages having as many silent tokens marked instead (Paulo et al.
    2024, arXiv 2410.13928). Both stand beside chance, ½, and beside the same questions asked with another unit's
    description, which tells a description that is good from one that fits anything. Causal, nats: the describer names words
    that the unit makes more likely, and the score is how much log p of these as the next token is lost when the unit is
    taken out (latents, experts, heads), over the tokens on which it is active; beside it the words named for another unit.

    Args:
        store: where rows go; each description as soon as it is there.
        run: whose texts are shown.
        complete: prompt → text; any function. What it raises is counted and told.
        units: numbers of the latents, experts, neurons (expert · d_expert + i inside experts) or heads.
        unit_kind: what they are.
        sae: of the latents; where it was trained on this run, only documents held out are shown and judged.
        layer, block: of experts, neurons and heads.
        describer: the name that is stored. Units that this describer has described are left as they are, and scored where
            scores are missing.
        scores: which.
        model: for the causal score, and for latents where the run kept no vectors.
        examples: windows shown.
        judged: windows a score asks about.
        width: tokens of a window.
        tokens: of the run to look at, at most, in whole documents.
        draws: bootstrap resamples of documents.
        again: describe anew, in place of what this describer wrote before.
        seed: of everything random.
        progress: draw a bar on stderr.

    Raises:
        InputError: nothing was recorded there, or a value makes no sense.
        RunError: the completion function failed several times in a row; what was done is stored.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["one two three", "four five six"] * 8, store, name="first", progress=False)
        ...     found = describe(store, run, complete=lambda prompt: "DESCRIPTION: numbers in words", units=[15],
        ...                      unit_kind="expert", layer=1, scores=(), progress=False)
        ...     found.texts
        {15: 'numbers in words'}
    """
    wanted = _checked(units, scores, model, unit_kind, describer, examples=examples, judged=judged, width=width)
    activity = read_activity(
        run, unit_kind, wanted, sae=sae, layer=layer, block=block, model=model, most=tokens, seed=seed
    )
    of_latents = sae if unit_kind == "latent" else None
    at_layer = layer if of_latents is None else of_latents.site.layer
    at_block = ("attn" if unit_kind == "head" else block) if of_latents is None else of_latents.site.block or None
    job = Job(
        store, run, unit_kind, of_latents, at_layer, at_block, describer, activity, Words(run), Asker(complete),
        examples, judged, width, draws, seed, model,
    )  # fmt: skip
    before = _before(job)
    kept = [unit for unit in wanted if unit in before and not again]
    ids, texts = {u: before[u][0] for u in kept}, {u: before[u][1] for u in kept}
    job.shown = {u: before[u][2] for u in kept}
    skipped: dict[int, str] = {}
    rows: list[dict[str, Any]] = []
    todo = [unit for unit in wanted if unit not in texts]
    with counted("descriptions", len(todo) + len(wanted) * bool(scores), shown=progress) as count:
        for unit in todo:
            _describe_one(job, unit, before.get(unit), ids, texts, skipped)
            count()
        rows = score_all(job, ids, texts, list(scores), count)
    asker = job.asker
    return Descriptions(
        run.name, unit_kind, texts, tuple(unit for unit in todo if unit in texts), tuple(kept), skipped, tuple(rows),
        asker.calls, asker.retries, asker.unread, tuple(asker.errors),
    )  # fmt: skip


def _checked(
    units: Sequence[int],
    scores: Sequence[str],
    model: LiveModel | None,
    kind: str,
    describer: str,
    **counts: int,
) -> list[int]:
    if not len(units):
        raise InputError("no units are given", fix="name some: units=[0, 1, 2]")
    if not describer.strip():
        raise InputError("a describer needs a name", fix="pass describer=…")
    if kind not in ("latent", "expert", "neuron", "head"):
        raise InputError(f"there are no units of kind {kind!r}", expected="latent, expert, neuron or head")
    if unknown := [one for one in scores if one not in SCORES]:
        raise InputError(f"there is no score {unknown[0]!r}", expected=", ".join(SCORES))
    if "causal" in scores and kind == "neuron":
        raise InputError("neurons have no causal score", fix="leave causal out of scores")
    if "causal" in scores and (model is None or model.tokenizer is None):
        raise InputError(
            "the causal score runs the model", fix="pass model=… with its tokenizer, or leave causal out of scores"
        )
    for name, value in counts.items():
        if value < (least := 4 if name != "examples" else 1):
            raise InputError(f"{name} cannot be {value}", expected=f"{least} or more")
    return list(dict.fromkeys(int(unit) for unit in units))


def _before(job: Job) -> dict[int, tuple[str, str, frozenset[int]]]:
    """Unit → id and text of what this describer wrote, and the documents it was shown."""
    known = {
        "kind": job.kind, "describer": job.describer, "sae": job.sae.sae_id if job.sae else None, "layer": job.layer,
        "block": job.block,
    }  # fmt: skip
    found = job.run.sql(_BEFORE_SQL, known).fetchall()
    return {int(unit): (str(of), text, _documents_shown(prompt)) for unit, of, text, prompt in found}


def _documents_shown(prompt: str | None) -> frozenset[int]:
    """The documents named in a stored prompt's first line."""
    head = (prompt or "").split("\n", 1)[0]
    return frozenset(json.loads(head.removeprefix("documents: "))) if head.startswith("documents: [") else frozenset()


def _describe_one(
    job: Job,
    unit: int,
    before: tuple[str, str, frozenset[int]] | None,
    ids: dict[int, str],
    texts: dict[int, str],
    skipped: dict[int, str],
) -> None:
    """Ask for one description and store it, over the one that was there."""
    windows = _examples(job, unit)
    if not windows:
        skipped[unit] = "active on too few documents"
        return
    prompt = describe_prompt([job.words.text(one, marks=True) for one in windows], _WHAT[job.kind])
    text = job.asker.ask(prompt, read_description, lambda found: found is not None)
    if text is None:
        skipped[unit] = "no description could be read in the answers" + (
            f" ({job.asker.errors[-1]})" if job.asker.errors else ""
        )
        return
    job.shown[unit] = frozenset(one.document for one in windows)
    ids[unit], texts[unit] = str(uuid.uuid4()), text
    row = {
        "description_id": ids[unit], "run_id": job.run.run_id, "sae_id": job.sae.sae_id if job.sae else None,
        "unit_kind": job.kind, "layer": job.layer, "block": job.block, "unit": unit, "text": text,
        "describer": job.describer, "prompt": f"documents: {json.dumps(sorted(job.shown[unit]))}\n{prompt}",
        "created_at": datetime.now(UTC).replace(tzinfo=None),
    }  # fmt: skip
    over = [(name, {"description_id": before[0]}) for name in ("description_scores", "descriptions")] if before else []
    write_rows(job.store, {"descriptions": [row]}, over=over)


_WHAT = {
    "latent": "feature",
    "expert": "expert (a part that only some tokens pass through)",
    "neuron": "neuron",
    "head": "attention head",
}


def _examples(job: Job, unit: int) -> list[Window]:
    """Windows for the describer, of at most half of the documents on which the unit is active."""
    active = len(np.unique(job.activity.tokens.document[job.activity.places[unit]]))
    most = min(job.examples, active // 2)
    if most < 1:
        return []
    if job.sae is not None:
        rows = job.run.sql(_CONTEXTS_SQL, {"sae": job.sae.sae_id, "unit": unit}).to_arrow_table().to_pylist()
        stored = stored_windows(rows, job.activity)
        first: dict[int, Window] = {}
        for window in stored:
            first.setdefault(window.document, window)
        if first:
            return list(first.values())[:most]
    return active_windows(
        job.activity, unit, count=most, width=job.width, top=(most + 1) // 2, random=job.random(unit, 0)
    )
