"""See, and change, what happens inside mixture-of-experts language models while they run.

Names resolve when first used, so that `import moescope` loads neither torch nor transformers nor dash.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moescope.core.versions import VERSION

if TYPE_CHECKING:
    from moescope import edits, sae
    from moescope.analysis_api import analyses, analyze
    from moescope.contrast_api import contrast
    from moescope.core.errors import IncompleteError, InputError, MoescopeError, RunError, StoreError
    from moescope.core.intervention import Intervention
    from moescope.core.result import Result
    from moescope.effect_api import effect
    from moescope.phenomena_api import phenomena
    from moescope.probes.anatomy import Anatomy
    from moescope.probes.corpus import Corpus
    from moescope.probes.custom_layers import register_moe
    from moescope.probes.live_model import LiveModel
    from moescope.probes.loading import load
    from moescope.probes.planning import plan
    from moescope.probes.record import record
    from moescope.report.write import write_report
    from moescope.store.run import Run
    from moescope.store.store import Store
    from moescope.sweep_api import sweep

__version__ = VERSION

_HOME = {
    "Anatomy": "moescope.probes.anatomy",
    "Corpus": "moescope.probes.corpus",
    "IncompleteError": "moescope.core.errors",
    "InputError": "moescope.core.errors",
    "Intervention": "moescope.core.intervention",
    "LiveModel": "moescope.probes.live_model",
    "MoescopeError": "moescope.core.errors",
    "Result": "moescope.core.result",
    "Run": "moescope.store.run",
    "RunError": "moescope.core.errors",
    "Store": "moescope.store.store",
    "StoreError": "moescope.core.errors",
    "analyses": "moescope.analysis_api",
    "analyze": "moescope.analysis_api",
    "contrast": "moescope.contrast_api",
    "effect": "moescope.effect_api",
    "load": "moescope.probes.loading",
    "phenomena": "moescope.phenomena_api",
    "plan": "moescope.probes.planning",
    "record": "moescope.probes.record",
    "register_moe": "moescope.probes.custom_layers",
    "sweep": "moescope.sweep_api",
    "write_report": "moescope.report.write",
}

__all__ = [
    "Anatomy",
    "Corpus",
    "IncompleteError",
    "InputError",
    "Intervention",
    "LiveModel",
    "MoescopeError",
    "Result",
    "Run",
    "RunError",
    "Store",
    "StoreError",
    "analyses",
    "analyze",
    "contrast",
    "edits",
    "effect",
    "load",
    "phenomena",
    "plan",
    "record",
    "register_moe",
    "sae",
    "sweep",
    "write_report",
]


if not TYPE_CHECKING:  # a type checker reads the imports above, so that it knows a name that is not there

    def __getattr__(name: str) -> Any:
        if name in ("edits", "sae"):
            return importlib.import_module(f"moescope.{name}")
        if name not in _HOME:
            raise AttributeError(f"module 'moescope' has no attribute {name!r}; it has {', '.join(__all__)}")
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
