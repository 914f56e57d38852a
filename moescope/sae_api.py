"""`moescope.sae`, the measuring part: each function measures, stores, and answers with a `Result`.

What is measured lies in `moescope.sae`, what is asked of the records in the analyses; here the two are put together, as
`moescope.effect` does it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.effect_api import with_autoencoders, with_notes
from moescope.sae.circuits import circuit
from moescope.sae.concepts import describe as describing
from moescope.sae.concepts import sparse_probes as probing
from moescope.sae.experts import ablate_writers as writers
from moescope.sae.experts import compare_neurons as beside
from moescope.sae.experts import feature_experts as joining
from moescope.sae.experts import sparsity
from moescope.sae.judging import judge as judging
from moescope.sae.reading import read as reading
from moescope.sae.steering import dose
from moescope.sae.students import study as studying

if TYPE_CHECKING:
    from moescope.core.intervention import Intervention
    from moescope.probes.live_model import LiveModel
    from moescope.store.run import Run
    from moescope.store.store import Store

P = ParamSpec("P")
O = TypeVar("O")  # noqa: E741  the outcome
Given = Mapping[str, Any]

_RETURNS = re.compile(r"\n *Returns:\n.*?(?=\n *(?:Raises|Example|Source)s?:|\Z)", re.DOTALL)
_EXAMPLE = re.compile(r"\n *Examples?:\n.*?(?=\n *(?:Raises|Source)s?:|\Z)", re.DOTALL)


def _answering(
    analysis: str, asked: Callable[[O, Given], tuple[Run, Mapping[str, Any]]], measure: Callable[P, O]
) -> Callable[P, Result]:
    """A function that measures as `measure` does, and answers with the analysis of that name.

    Args:
        analysis: which.
        asked: from what was measured and the arguments, the run that the numbers belong to and the analysis' parameters.
        measure: measures and stores; its arguments, and what it says of them, stay as they are.
    """
    signature = inspect.signature(measure)

    @functools.wraps(measure)
    def answer(*args: P.args, **named: P.kwargs) -> Result:
        outcome = measure(*args, **named)
        run, parameters = asked(outcome, signature.bind(*args, **named).arguments)
        result = analyze(run, analysis, allow_incomplete=True, **parameters)
        notes = [note for note in getattr(outcome, "notes", ()) if note not in result.notes]
        return with_notes(result, notes) if notes else result

    told = _EXAMPLE.sub("", _RETURNS.sub("", inspect.getdoc(measure) or ""))
    answer.__doc__ = f"{told.rstrip()}\n\nReturns:\n    The answer of the analysis `{analysis}`, with its figure.\n"
    answer.__annotations__ = {**measure.__annotations__, "return": "Result"}
    answer.__signature__ = signature.replace(return_annotation="Result")  # type: ignore[attr-defined]  # what `help` shows
    return answer


def _given_run(outcome: Any, given: Given) -> tuple[Run, dict[str, Any]]:
    """The run and the autoencoder that were given."""
    del outcome
    return given["run"], {"sae": given["autoencoder"].name}


def _stored(run: Run | None) -> Run:
    if run is None:
        raise InputError("an answer comes from a store", found="none", fix="pass the store that the circuit is kept in")
    return run


judge = _answering("sae_quality", lambda found, _: (found.run, {"sae": found.sae_id}), judging.judge)
read = _answering("features", _given_run, reading.read_features)
associate = _answering("feature_association", _given_run, reading.associate_features)
feature_experts = _answering("expert_features", _given_run, joining.feature_experts)
ablate_writers = _answering("feature_writers", _given_run, writers.ablate_writers)
compare_neurons = _answering("neurons_against_sae", _given_run, beside.compare_neurons)
expert_sparsity = _answering("expert_sparsity_routing", lambda _, given: (given["run"], {}), sparsity.expert_sparsity)
sparse_probes = _answering("sparse_probes", lambda _, given: (given["run"], {}), probing.sparse_probes)
describe = _answering("descriptions", lambda _, given: (given["run"], {}), describing.describe)
mlp_students = _answering(
    "mlp_students", lambda found, _: (found.run, {"layer": found.layer, "block": found.block}), studying.mlp_students
)
head_circuit = _answering(
    "head_circuit", lambda found, _: (_stored(found.run), {"task": found.task}), circuit.head_circuit
)


@functools.wraps(dose.dose_response)
def _dose(model: LiveModel, intervention: Intervention, corpus: Any, store: Store, **asked: Any) -> dose.Dose:
    """Measured with the autoencoders that the edits name, from the store where they are not given."""
    sources = with_autoencoders(model, store, [intervention], asked.pop("sources", None))
    return dose.dose_response(model, intervention, corpus, store, sources=sources, **asked)


dose_response = _answering("steering_dose", lambda found, _: (found.base, {"sweep": found.sweep_id}), _dose)
