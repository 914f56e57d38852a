"""A corpus in a notebook: its first documents, and its counts where somebody has counted already."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from moescope.core.errors import MoescopeError
from moescope.core.notebook_html import box, grid, heading

if TYPE_CHECKING:
    from moescope.probes.corpus import Corpus, CorpusFacts, Document

_FIRST = 3
_BEGINNING = 100


def corpus_html(corpus: Corpus, counted: CorpusFacts | None) -> str:
    """Name, counts and first documents; the rest of the corpus is not read for it."""
    told = _counts(counted) if counted else "not counted yet: .facts() walks it once"
    try:
        first = list(islice(corpus, _FIRST))
    except MoescopeError as broken:
        return box(heading(f"Corpus {corpus.name}", told, str(broken)))
    rows = [(document.label, _beginning(document), document.source) for document in first]
    table = grid(rows, ("label", "text", "from")) if rows else ""
    return box(
        heading(f"Corpus {corpus.name}", told), table, f"<p>The first {len(first)} documents.</p>" if first else ""
    )


def _counts(facts: CorpusFacts) -> str:
    labels = ", ".join(f"{label} ({n:,})" for label, n in list(facts.labels.items())[:8])
    more = f", … {len(facts.labels) - 8} more" if len(facts.labels) > 8 else ""
    skipped = f", {facts.skipped:,} records skipped" if facts.skipped else ""
    counts = f"{facts.documents:,} documents, {facts.characters:,} characters{skipped}"
    return f"{counts}; labels: {labels}{more}" if labels else f"{counts}; no labels"


def _beginning(document: Document) -> str:
    if document.token_ids is not None:
        ids = " ".join(map(str, document.token_ids[:12]))
        return f"{len(document.token_ids):,} token ids: {ids}{' …' if len(document.token_ids) > 12 else ''}"
    text = " ".join(document.text[: 2 * _BEGINNING].split())
    return text if len(text) <= _BEGINNING else text[: _BEGINNING - 1] + "…"
