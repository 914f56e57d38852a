"""What can be started from the Work page: for each kind its fields, and how it is done."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moescope.core.errors import InputError
from moescope.dashboard.url_state import ViewState, link
from moescope.store.store import Store

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Field:
    """One thing to fill in.

    Attributes:
        name: also the flag of the command line, without its dashes.
        label: what it is called on the page.
        default: what it begins with.
        form: how it is filled in.
        note: one line below it.
        options: of a choice.
        least: the smallest number it takes.
        always: whether the command line has no default for it.
    """

    name: str
    label: str
    default: Any = None
    form: Literal["text", "number", "switch", "several"] = "text"
    note: str = ""
    options: tuple[str, ...] = ()
    least: int = 0
    always: bool = False


@dataclass(frozen=True)
class Kind:
    """One kind of long work.

    Attributes:
        name: in the address.
        title: on its button.
        about: what it does, and what it leaves in the store.
        command: the same on the command line, before the model.
        fields: what to fill in, besides model, texts and name.
        do: does it on a live model, and gives the link to its result.
        named: whether the run it makes can be given a name.
    """

    name: str
    title: str
    about: str
    command: str
    fields: tuple[Field, ...]
    do: Callable[[LiveModel, Store, Values], str]
    named: bool = True


def command_line(kind: Kind, store: Store, values: Values) -> str:
    """The command that does the same without the dashboard."""
    words = ["moescope", *kind.command.split(), str(values.get("model") or "demo"), "--store", str(store.path)]
    defaults = {field.name: None if field.always else field.default for field in kind.fields}
    for name in ("data", *(["name"] if kind.named else []), *defaults):
        value = values.get(name)
        if value in (None, "", [], False) or value == defaults.get(name):
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif name in _SEVERAL:
            words += [word for part in _parts(value, _SEVERAL[name]) for word in (flag, part)]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(words)


# Flags that are given once for each of their parts, and what divides these on the page.
_SEVERAL = {"edit": ";", "spec": " "}


def _parts(text: str | None, by: str) -> list[str]:
    return [part.strip() for part in (text or "").split(by) if part.strip()]


def checked(kind: Kind, values: Values, store: Store) -> dict[str, Any]:
    """What was filled in, with numbers as numbers.

    Raises:
        InputError: a field that is empty and must not be, a number that is none, a name that is taken.
    """
    given = dict(values)
    for field in kind.fields:
        value = given.get(field.name)
        if field.form == "number" and value not in (None, ""):
            given[field.name] = _number(field, value)
        elif value in ("", []):
            given[field.name] = None
    if not str(given.get("model") or "").strip():
        raise InputError("no model is named", fix='"demo", a Hub id, a folder, or a .gguf file')
    name = str(given.get("name") or "").strip() or None
    taken = {run.name: run for run in store.runs()}
    if (
        kind.named
        and name in taken
        and kind.name != "study"
        and not (given.get("resume") and not taken[str(name)].complete)
    ):
        raise InputError(f"there already is a run called {name!r}", fix="choose another name")
    return given | {"name": name, "data": (given.get("data") or "").strip() or None}


def _number(field: Field, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise InputError(f"{field.label} cannot be {value!r}", expected="a whole number") from None
    if number < field.least:
        raise InputError(f"{field.label} cannot be {number}", expected=f"{field.least} or more")
    return number


def _free(store: Store, wish: str) -> str:
    taken = {run.name for run in store.runs()}
    return wish if wish not in taken else next(n for i in range(2, 10**6) if (n := f"{wish} {i}") not in taken)


def _corpus(values: Values) -> Any:
    from moescope.probes.corpus import Corpus

    return Corpus.load(values["data"] or "demo")


def _profile(model: LiveModel, store: Store, values: Values) -> str:
    from moescope.probes.record import record

    run = record(
        model, _corpus(values), store, name=values["name"] or _free(store, str(values["model"]).rsplit("/", 1)[-1]),
        probes=values["probe"], batch_size=values["batch_size"] or 8, max_length=values["max_length"] or 512,
        resume=bool(values["resume"]), progress=False,
    )  # fmt: skip
    return link("/", ViewState(run=run.name))


def _phenomena(model: LiveModel, store: Store, values: Values) -> str:
    from moescope.phenomena_api import phenomena

    found = phenomena(
        model, values["data"], store, name=values["name"], texts=values["texts"] or 16,
        controls=values["controls"] or 5, progress=False,
    )  # fmt: skip
    return link("/phenomena", ViewState(run=str(found.provenance.get("run", "")) or None))


def _sweep(model: LiveModel, store: Store, values: Values) -> str:
    from moescope.sweep_api import sweep

    found = sweep(model, _corpus(values), store, kind="experts", screen=values["screen"], progress=False)
    base = str(found.provenance.get("run", "")) or None
    return link("/experts", ViewState(run=base))


def _effect(model: LiveModel, store: Store, values: Values) -> str:
    from moescope.core.edit_text import read_edit
    from moescope.core.intervention import Intervention
    from moescope.effect_api import effect

    lines = _parts(values["edit"], ";")
    if not lines:
        raise InputError("no edit is given", fix="for instance: ablate layer=3 experts=5")
    found = effect(
        model, _corpus(values), Intervention([read_edit(line) for line in lines]), store,
        controls=values["controls"] or 0, keep_run=values["keep_run"], progress=False,
    )  # fmt: skip
    return link("/", ViewState(run=str(found.provenance.get("run", "")) or None))


def _study(model: LiveModel, store: Store, values: Values) -> str:
    from moescope.sae_study import study

    if not values["site"]:
        raise InputError("no site is named", fix="for instance blocks.3.hook_mlp_out")
    done = study(
        model, _corpus(values), store, site=values["site"], specs=_parts(values["spec"], " ") or ["topk"],
        name=values["name"] or "study", tokens=values["tokens"], progress=False,
    )  # fmt: skip
    return link("/features", ViewState(run=done.run.name, sae=done.autoencoders[0].name))


_CONTROLS = Field("controls", "Random controls", 5, "number", "matched random edits measured beside it")

KINDS = (
    Kind(
        "profile", "Record a run", "Runs texts through a model and keeps what every router and expert did.", "profile",
        (
            Field(
                "probe", "Probes", ["tokens", "routing", "experts", "residual"], "several",
                options=("tokens", "routing", "experts", "residual", "router_logits", "expert_outputs", "attention"),
            ),
            Field("batch_size", "Sequences a pass", 8, "number", least=1),
            Field("max_length", "Longest sequence", 512, "number", "tokens; longer texts are split", least=2),
            Field("resume", "Go on with a stopped run of this name", False, "switch"),
        ),
        _profile,
    ),
    Kind(
        "phenomena", "Look for phenomena",
        "Massive activations, attention sinks, super experts, retrieval heads; each link cut beside random cuts.",
        "phenomena", (Field("texts", "Texts", 16, "number", least=1), _CONTROLS), _phenomena,
    ),
    Kind(
        "sweep", "Ablate every expert", "Takes out every expert alone and measures what the predictions lose.",
        "intervene sweep --kind experts",
        (
            Field(
                "screen", "Run only so many exactly", None, "number",
                "the rest is estimated with one backward pass; empty runs all", least=1,
            ),
        ),
        _sweep,
        named=False,
    ),
    Kind(
        "effect", "Measure an intervention", "The change of NLL, KL and flips against matched random controls.",
        "intervene effect",
        (
            Field("edit", "Edits", None, "text", "one line each, separated by semicolons"), _CONTROLS,
            Field("keep_run", "Also record it as a run called", None, "text"),
        ),
        _effect,
        named=False,
    ),
    Kind(
        "study", "Train an autoencoder",
        "Records vectors at a site, trains sparse autoencoders on them, judges and reads them, joins them to experts.",
        "sae study",
        (
            Field("site", "Site", "blocks.3.hook_mlp_out", "text", "where the vectors are read", always=True),
            Field("spec", "Form", "topk:d=1024,k=16", "text", "several, separated by spaces", always=True),
            Field("tokens", "Tokens", None, "number", "empty for all of the corpus", least=1),
        ),
        _study,
    ),
)  # fmt: skip
