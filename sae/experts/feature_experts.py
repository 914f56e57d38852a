"""`feature_experts`: which experts write a latent, which experts' routers it moves, on a run's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moescope.core.errors import InputError
from moescope.probes.claim import claimed
from moescope.probes.live_model import LiveModel
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.data.run_batches import Documents
from moescope.sae.data.trained_with import TrainedWith
from moescope.sae.experts.agreement import agreement_rows
from moescope.sae.experts.gate_rows import gate_pairs, gate_rows
from moescope.sae.experts.pair_rows import Rows, Setting
from moescope.sae.experts.passes import Walk, group_sums, whole_sums
from moescope.sae.experts.run_text import run_text
from moescope.sae.experts.subject import routers_around, subject_of
from moescope.sae.experts.writer_rows import writer_pairs, writer_rows
from moescope.store.run import Run
from moescope.store.sae_rows import write_rows
from moescope.store.store import Store

METRICS = (
    "writes", "writes_chosen", "writes_share", "writes_excess", "writes_excess_p", "writes_encoder",
    "gates_weights", "gates_logit", "gates_logit_p", "gates_lift",
)  # fmt: skip
AGREEMENT = ("gates_spearman", "gates_pearson")
_GROUPS, _SAMPLE = 400, 512


@dataclass(frozen=True)
class FeatureExperts:
    """What was measured and stored.

    Attributes:
        sae_id, run_id: of what, on what.
        writers, gates: (layer, block) of the routers whose experts write, and of those that the latents reach.
        features: latents that were active often enough.
        tokens, documents: behind the numbers.
        rows: rows of `feature_experts`.
        notes: what was left out, and why.
    """

    sae_id: str
    run_id: str
    writers: tuple[tuple[int, str], ...]
    gates: tuple[tuple[int, str], ...]
    features: int
    tokens: int
    documents: int
    rows: int
    notes: tuple[str, ...]


def feature_experts(
    autoencoder: Autoencoder,
    model: LiveModel,
    run: Run,
    store: Store,
    *,
    layers: Sequence[int] | None = None,
    documents: Documents = "held_out",
    tokens: int | None = None,
    features: Sequence[int] | None = None,
    top: int = 3,
    strongest: int = 40,
    encoder: bool = False,
    least_active: int = 20,
    skip_first: int | None = None,
    draws: int = 500,
    others: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> FeatureExperts:
    """Measure which experts write the latents of an autoencoder, and which experts' routers the latents move.

    Two passes of the model over the run's own text. The first sums over all tokens, for every latent and expert; the second
    sums by document, for the pairs that are kept: each latent's `top` experts, each expert's 20 latents, and every expert of
    the `strongest` latents. Rows of `feature_experts`, n the active tokens:

    `writes`: mean over tokens on which the latent is active of the expert's contribution along the unit decoder row, its routing
        weight and everything between its output and the stream included, 0 where it was not chosen; over all experts, shared
        ones (expert −1, −2, …) and biases, they sum to what the block writes. `writes_chosen`: the same over the active tokens that chose
        the expert. `writes_share`: of what the block writes there, where that is over 0. `writes_excess`: `writes` less the
        same mean over tokens on which the latent is inactive: an expert that writes this direction always has none.
        `writes_encoder`: along the unit encoder column.
    `gates_weights`: from weights alone: how much a unit of activation adds to the expert's router logit by the direct path
        (router row · decoder row, the norm's gain folded in, at its mean scale on these tokens), less the mean over experts.
        `gates_logit`: mean of the expert's logit (less the token's mean over experts) on active tokens less that on inactive
        ones. `gates_lift`: P(chosen | active) ÷ P(chosen).

    Null of `writes` and `writes_excess`: the same tokens and expert along the decoder rows of the `others` latents of nearest
    frequency; of the gates: the same expert with those latents. `null_value` is the mean size over them (for the lift the
    mean), and `…_p` the share at least as large, the latent's own counted. How far `gates_weights` tell `gates_logit` over all
    pairs goes to `sae_measures`, beside latents permuted.

    Args:
        autoencoder: of the stream, of a block's input or output, or of experts' outputs.
        model: the model it belongs to.
        run: whose sequences are run again.
        store: open for writing.
        layers: layers of routers to look at; None for the nearest whose experts write there, and every router behind.
        documents: `held_out`: without those the autoencoder was trained on, where it was trained on this run.
        tokens: about how many, of documents drawn at random; None for all.
        features: latents; None for all.
        top, strongest: which pairs are kept.
        encoder: measure `writes_encoder` too.
        least_active: latents active on fewer tokens, or in a single document, are left out.
        skip_first: leave out so many first tokens of each sequence, where massive activations stand; None for as many as
            training left out.
        draws: bootstrap resamples of documents.
        others: latents of the null.
        batch_size: sequences a forward pass.
        seed: of the resampling.
        progress: show how far it is, on stderr.

    Raises:
        InputError: a dense model, an autoencoder that is not of the stream, latents or layers that are not there, no latent that is
            active often enough, or a block whose output is not told apart.

    Example:
        >>> import moescope as ms
        >>> from moescope.sae.loading import load_autoencoder
        >>> def joined(store: ms.Store) -> FeatureExperts:
        ...     return feature_experts(load_autoencoder(store, "mine"), ms.load("demo"), store.run("base"), store)
    """
    if min(top, strongest, least_active, draws, others, batch_size) < 1:
        raise InputError("top, strongest, least_active, draws, others and batch_size are 1 or more")
    if store.read_only:
        raise InputError(f"{store.path} is open for reading only", fix="open it with Store(path)")
    subject = subject_of(autoencoder, model, features)
    writers, gates = routers_around(subject, model, layers)
    text = run_text(run, autoencoder, documents=documents, tokens=tokens)
    begin = TrainedWith.of(autoencoder.row).skip_first if skip_first is None else skip_first
    directions = {"writes": subject.directions}
    if encoder and subject.encoder is not None:
        directions["writes_encoder"] = subject.encoder / subject.encoder.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    with claimed(model.module, "latents × experts"):
        walk = Walk(model, subject, text, writers, gates, begin, batch_size, progress)
        sums = whole_sums(walk, directions)
        alive = np.flatnonzero((sums.active >= least_active) & (sums.documents >= 2) & (sums.active < sums.rows))
        if not len(alive):
            raise InputError(
                f"no latent of {autoencoder.name!r} is active on {least_active} tokens of two documents",
                found=f"{sums.rows:,} tokens of {text.n_documents:,} documents",
                fix="take more text, or ask for fewer active tokens (least_active)",
            )
        writer_kept = {at: writer_pairs(sums, at, alive, top, strongest) for at in writers}
        gate_kept = {at: gate_pairs(sums, at, alive, top, strongest) for at in gates}
        sample = np.random.default_rng(seed).permutation(alive)[:_SAMPLE]
        kept = max((len(p.feature) for p in (*writer_kept.values(), *gate_kept.values())), default=1)
        groups = int(max(20, min(_GROUPS, 2e7 // max(kept, 1))))
        by_group = group_sums(walk, directions, writer_kept, gate_kept, np.sort(sample), most_groups=groups)
    setting = Setting(subject, sums, by_group, alive, others, draws, seed, autoencoder.sae_id, run.run_id)
    rows = Rows()
    for at in writers:
        writer_rows(rows, setting, at, walk.parts[at].n_choices)
    notes = [note for at in gates if (note := gate_rows(rows, setting, at))]
    measures = [row for at in gates for row in agreement_rows(setting, at, np.sort(sample))]
    table = rows.table(setting)
    same = {"sae_id": autoencoder.sae_id, "run_id": run.run_id}
    write_rows(
        store,
        {"feature_experts": table, "sae_measures": measures},
        over=[
            *(("feature_experts", {**same, "metric": metric}) for metric in METRICS),
            *(("sae_measures", {**same, "metric": metric}) for metric in AGREEMENT),
        ],
    )
    if text.n_documents > groups:
        notes.append(f"The {text.n_documents:,} documents are resampled in {groups} groups.")
    if text.held_out:
        notes.append("Documents that the autoencoder was trained on are left out.")
    return FeatureExperts(
        autoencoder.sae_id,
        run.run_id,
        tuple(writers),
        tuple(gates),
        len(alive),
        sums.rows,
        text.n_documents,
        table.num_rows,
        tuple(notes),
    )
