"""`Steering`: an intervention that steers, with where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moescope.core.intervention import Intervention
from moescope.core.notebook_html import box, facts
from moescope.core.sites import Site


@dataclass(frozen=True)
class Steering:
    """What steers a model: edits as plain data, and how they were found.

    Attributes:
        intervention: to be used as any other: `model.edited`, `ms.effect`, `moescope.sae.steering.dose.dose_response`.
        provenance: method, texts or records behind it, norms and scores, as plain data.
    """

    intervention: Intervention
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        found = {key: value for key, value in self.provenance.items() if not isinstance(value, (list, tuple, dict))}
        return box(self.intervention._repr_html_(), facts(found))

    def save(self, path: str | Path) -> None:
        """Write the intervention as JSON, which `Intervention.load` reads back."""
        self.intervention.save(path)


def in_block(site: Site) -> str:
    """A site's name inside its block, as edits spell it.

    Example:
        >>> in_block(Site.parse("blocks.3.attn.hook_q"))
        'attn.hook_q'
    """
    return f"{site.block}.{site.tensor}" if site.block else site.tensor
