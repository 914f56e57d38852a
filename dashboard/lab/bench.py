"""Prompts on the live model, unedited and under edits: the unedited pass is kept, and so is the session of edits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moescope.core.edit import Edit
from moescope.core.errors import InputError, MoescopeError
from moescope.core.intervention import Intervention
from moescope.dashboard.model_host import ModelHost
from moescope.store.store import Store

if TYPE_CHECKING:
    import torch

    from moescope.probes.batches import Batch
    from moescope.probes.forward import DeviceBatch
    from moescope.probes.live_model import LiveModel

MAX_PROMPTS = 16
MAX_LENGTH = 256
MAX_TOKENS = 2048
_KEPT = 4

Router = tuple[int, str]
Sources = tuple[tuple[str, str, str], ...]
"""Kind, name and id of what edits take from the store."""

_IDS = """
    SELECT found.kind, given.name, found.id
    FROM (SELECT unnest($names::VARCHAR[]) AS name) given
    JOIN (
        SELECT 'sae' AS kind, name, sae_id::VARCHAR AS id FROM saes
        UNION ALL
        SELECT 'run', name, run_id::VARCHAR FROM runs
    ) found ON given.name IN (found.name, found.id)
    ORDER BY ALL
"""


class RefusedEditError(InputError):
    """An edit that the model does not take.

    Attributes:
        place: its number in the list; None where several contradict each other.
    """

    def __init__(self, refused: MoescopeError, place: int | None) -> None:
        super().__init__(refused.problem, expected=refused.expected, found=refused.found, fix=refused.fix)
        self.place = place


@dataclass
class Pass:
    """One forward pass over the prompts.

    Attributes:
        logits: of every position.
        decisions: router → ids of the experts each place was given, [row, position, k].
    """

    logits: torch.Tensor
    decisions: dict[Router, torch.Tensor] = field(default_factory=dict)


@dataclass
class Base:
    """Prompts, tokenised and run without edits.

    Attributes:
        batch: the prompts, one row each; a long one in several.
        on_device: the same where the model is.
        plain: the unedited pass.
        written: what the unedited model writes after a prompt, by what was asked.
    """

    batch: Batch
    on_device: DeviceBatch
    plain: Pass
    written: dict[Any, list[int]] = field(default_factory=dict)


class Bench:
    """What the lab keeps between requests. All methods run on the model's own thread, within a request that keeps.

    Args:
        host: the model's host.
        store: where autoencoders and runs that edits name are looked for.
    """

    def __init__(self, host: ModelHost, store: Store) -> None:
        self.host, self._store = host, store
        self._model: LiveModel | None = None
        self._bases: OrderedDict[tuple[str, ...], Base] = OrderedDict()
        self._session: Any = None
        self._context: Any = None
        self._autoencoders: dict[tuple[str, str], Any] = {}
        self._held: Sources = ()
        self._held_on: LiveModel | None = None
        self._last: tuple[Base, Intervention, Sources, Pass] | None = None

    def base(self, model: LiveModel, prompts: Sequence[str]) -> Base:
        """The prompts without edits; run once.

        Raises:
            InputError: no prompts, too many, or a model without a tokenizer.
        """
        self._of(model)
        key = tuple(prompts)
        if key not in self._bases:
            self.host.let_go()  # a plain pass is one without a session
            batch = _batch(model, prompts)
            from moescope.probes.forward import to_device

            on_device = to_device(batch, model)
            self._bases[key] = Base(batch, on_device, _run(model, on_device))
            while len(self._bases) > _KEPT:
                self._bases.popitem(last=False)
        self._bases.move_to_end(key)
        return self._bases[key]

    def edited(self, model: LiveModel, base: Base, intervention: Intervention) -> Pass:
        """The prompts under an intervention; strengths of the session that is open are changed where they lie.

        Raises:
            RefusedEditError: an edit that the model does not take.
            RunError: logits that are no numbers.
        """
        stored = self._stored(intervention)
        last = self._last
        # The very same prompts: an id would be that of others once these are let go.
        if last is not None and last[0] is base and last[1:3] == (intervention, stored):
            return last[3]
        session = self.under(model, intervention, [s.sequence_id for s in base.batch.sequences])
        found = _run(model, base.on_device)
        session.check_finite()
        self._last = (base, intervention, stored, found)
        return found

    def under(self, model: LiveModel, intervention: Intervention, sequences: Sequence[int]) -> Any:
        """Hold the model under an intervention until it is told otherwise; gives the session."""
        session = self._hold(model, intervention)
        session.begin(sequences)
        return session

    def close(self) -> None:
        """Take every edit off the model."""
        context, self._context, self._session = self._context, None, None
        if context is not None:
            context.close()

    def sources(self, model: LiveModel, intervention: Intervention) -> dict[str, Any]:
        """The autoencoders and runs that edits name, from the store."""
        from moescope.probes.effects.sources import sources_of

        return sources_of(intervention, self._store, self.autoencoders(model, intervention))

    def autoencoders(self, model: LiveModel, intervention: Intervention) -> dict[str, Any]:
        """The autoencoders that edits name, loaded once."""
        from moescope.effect_api import with_autoencoders
        from moescope.probes.effects.sources import autoencoder_names

        self._of(model)
        wanted = autoencoder_names([intervention])
        stored = {name: sae_id for kind, name, sae_id in self._stored(intervention) if kind == "sae"}
        gone = [(name, sae_id) for name, sae_id in self._autoencoders if name in wanted and stored.get(name) != sae_id]
        for place in gone:
            del self._autoencoders[place]
        given = {name: module for (name, _), module in self._autoencoders.items() if name in wanted}
        found = with_autoencoders(model, self._store, [intervention], given)
        self._autoencoders.update({(name, stored[name]): found[name] for name in wanted if name in stored})
        return found

    def _stored(self, intervention: Intervention) -> Sources:
        """The autoencoders and runs that edits name, as the store has them now: a name may have been given anew."""
        from moescope.probes.effects.sources import autoencoder_names

        names = {*autoencoder_names([intervention]), *(getattr(edit, "run", None) for edit in intervention.edits)}
        named = sorted(name for name in names if name)
        return tuple(self._store.fetch(_IDS, {"names": named})) if named else ()

    def _of(self, model: LiveModel) -> None:
        """Forget what was kept of another model."""
        if model is not self._model:
            self._bases.clear()
            self._autoencoders.clear()
            self._context = self._session = self._held_on = None  # what is open, the host closes
            self._model, self._last = model, None

    def _hold(self, model: LiveModel, intervention: Intervention) -> Any:
        stored = self._stored(intervention)
        session = self._session if self._held_on is model else None
        if session is not None and self._held == stored and not _of_weights(intervention):
            try:
                session.update(intervention)
            except (
                InputError
            ):  # edits of other kinds or places: a new session, which says so where the model takes them not
                self.host.let_go()
            else:
                return session
        self.host.let_go()
        sources: Mapping[str, Any] = {}
        try:
            sources = self.sources(model, intervention)
            context = ExitStack()
            session = context.enter_context(model.edited(intervention, sources=sources))
        except MoescopeError as refused:
            raise RefusedEditError(refused, _which(model, intervention.edits, self)) from refused
        self._context, self._session, self._held, self._held_on = context, session, stored, model

        def close() -> None:
            # A request that was left behind ends late: only what it opened itself is closed then.
            if self._context is context:
                self.close()
            context.close()

        self.host.keep_open(close)
        return session


def _run(model: LiveModel, on_device: DeviceBatch) -> Pass:
    """A forward pass, with the decisions of every router."""
    import torch

    from moescope.core.sites import EXPERT_INDICES, Site
    from moescope.probes.forward import logits_of
    from moescope.probes.taps import tapped

    decisions: dict[Router, torch.Tensor] = {}

    def receive(site: Site, tensors: dict[str, torch.Tensor]) -> None:
        decisions[site.layer, site.block] = tensors["indices"].detach()

    sites = [Site(s.layer, s.block, EXPERT_INDICES) for s in model.anatomy.moe]
    with torch.no_grad(), tapped(model.module, model.anatomy, sites, receive):
        logits = logits_of(model, on_device)
    rows, width = on_device.ids.shape
    shaped = {place: ids.reshape(rows, width, -1).cpu() for place, ids in sorted(decisions.items())}
    return Pass(logits, shaped)


def _batch(model: LiveModel, prompts: Sequence[str]) -> Batch:
    from moescope.probes.batches import BatchPlan
    from moescope.probes.corpus import Corpus

    if not prompts:
        raise InputError("there is no prompt", fix="write one, a line each")
    if len(prompts) > MAX_PROMPTS:
        raise InputError(f"the lab takes {MAX_PROMPTS} prompts", found=f"{len(prompts)}", fix="leave some out")
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer, and the lab's prompts are texts", fix="choose another model")
    length = min(MAX_LENGTH, model.context or MAX_LENGTH)
    plan = BatchPlan(Corpus.load(list(prompts)), model.tokenizer, MAX_TOKENS, length, model.anatomy.vocabulary)
    batch: Batch = next(iter(plan))
    if batch.tokens > MAX_TOKENS:
        raise InputError(
            f"the prompts have {batch.tokens:,} tokens", expected=f"at most {MAX_TOKENS:,}", fix="shorten them"
        )
    return batch


def _of_weights(intervention: Intervention) -> bool:
    """Whether an edit changes weights: those are put in and taken out, not changed where they lie."""
    from moescope.probes.edits.step import WeightStep, step_for

    return any(issubclass(step_for(edit), WeightStep) for edit in intervention.edits)


def _which(model: LiveModel, edits: Sequence[Edit], bench: Bench) -> int | None:
    """The first edit that is refused by itself."""
    from moescope.probes.edits.checks import check_edit

    for place, edit in enumerate(edits):
        try:
            check_edit(model, edit, bench.sources(model, Intervention([edit])))
        except MoescopeError:
            return place
    return None
