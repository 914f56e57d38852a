"""What the command palette finds: pages and analyses, the same for every store, and what the shown run has."""

from __future__ import annotations

from typing import Any

from moescope.core.analysis import SECTION_TITLES, analyses
from moescope.dashboard.navigation import ordered_pages, page_keys
from moescope.dashboard.records import layer_of, model_layers, routers
from moescope.store.run import Run
from moescope.store.store import Store


def fixed_entries() -> dict[str, Any]:
    """Pages with their keys, and every analysis of one run or of two with the question it answers."""
    keys = page_keys()
    return {
        "pages": [
            {"name": page.name, "path": page.path, "words": page.subtitle, "key": keys[page.path]}
            for page in ordered_pages()
        ],
        "analyses": [
            {
                "name": analysis.name,
                "words": analysis.summary,
                "section": SECTION_TITLES[analysis.section] if analysis.section else "",
            }
            for analysis in analyses
        ],
    }


def run_entries(store: Store, run: Run | None) -> dict[str, Any]:
    """Runs, and the routers, layers and number of tokens of the one that is shown."""
    names = [other.name for other in store.runs()]
    if run is None:
        return {"runs": names, "routers": [], "layers": 0, "tokens": 0}
    known = routers(run)
    return {
        "runs": names,
        "routers": [
            {
                "layer": r.layer,
                "address": str(layer_of(r, known)),
                "name": r.name,
                "experts": r.experts,
                "shared": r.shared,
            }
            for r in known
        ],
        "layers": 1 + max(model_layers(run), default=-1),
        "tokens": run.rows("tokens"),
    }
