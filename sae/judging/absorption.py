"""Absorption and splitting of a concept that tokens themselves spell out: their first letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.sae.autoencoder import Autoencoder
from moescope.sae.judging.controls import in_parts
from moescope.sae.judging.logistic import f1_score, fit_logistic
from moescope.sae.judging.probing import Code, columns_of, most_correlated
from moescope.sae.judging.rows import ByDocument, Floats, MeasureRow, ratios

LEAST_FITTED, LEAST_JUDGED = 50, 20  # tokens of a letter
KNOWN = 0.7  # F1 of the dense probe: a letter under it is not written along one direction
GAIN = 0.03  # of F1, for a latent to count as one that the concept is split over
MOST = 10
ALIGNED, SHARE = 0.1, 0.4
_POOL = 32
_DECAY = 1e-3
_MOST_ROWS = 10_000


@dataclass(frozen=True)
class Letter:
    """A first letter that vectors tell.

    Attributes:
        letter: a to z.
        direction: unit vector along which a logistic probe on whole vectors reads it.
        said: [row] judged tokens with the letter that the probe finds.
        fitted, judged: [row] tokens with the letter.
    """

    letter: str
    direction: Float[torch.Tensor, " component"]
    said: NDArray[np.bool_]
    fitted: NDArray[np.bool_]
    judged: NDArray[np.bool_]


def absorption_rows(
    autoencoder: Autoencoder,
    codes: Mapping[str, Code],
    fitted: Float[torch.Tensor, "row component"],
    judged: Float[torch.Tensor, "row component"],
    letters: tuple[NDArray[np.object_], NDArray[np.object_]],
    by_document: ByDocument,
    *,
    seed: int,
) -> list[MeasureRow]:
    """How often a letter's own latents are silent where another latent carries it, and over how many latents it is split.

    After Chanin et al. 2024 (arXiv 2409.14507), on first letters of tokens. A letter counts where a logistic probe on whole
    vectors, fitted on the other documents, reaches an F1 of 0.7. Its own latents are found one after the other: that which
    correlates most with what the probe on those so far leaves unexplained, as long as it raises F1 on the judged documents by
    0.03. `splitting` is how many there are beyond the first. A token with the letter, found by the probe, counts as absorbed
    where none of them fires and the latent that adds most along the probe's direction has a cosine of 0.1 or more with it and
    adds 0.4 or more of what all active latents add. Where the paper ablates latents and looks at the answer of a spelling
    prompt, this looks at what they add along the probe, so that it needs no prompt; and where the paper holds out words, this
    holds out documents, so that a vector which names its token tells its letter. `shuffled` gives latents each other's
    decoder rows.

    Args:
        autoencoder: what is judged.
        codes: `sae`, and `pca` for the same count over principal components.
        fitted, judged: vectors.
        letters: first letter of each one's token, None for none.
        by_document: of the judged ones.
        seed: of the shuffling.

    Returns:
        Nothing where no letter counts.
    """
    known = known_letters(fitted, judged, *letters)
    if not known:
        return []
    rows: list[MeasureRow] = []
    own: list[NDArray[np.int64]] = []
    for name, code in codes.items():
        split = own_units(code, autoencoder.d_sae, fitted, judged, known)
        own = split if name == "sae" else own
        rows += _splitting(name, [len(units) - 1 for units in split], known)
    shuffle = torch.randperm(autoencoder.d_sae, generator=torch.Generator().manual_seed(seed))
    for condition, order in (("sae", None), ("shuffled", shuffle)):
        decoder = autoencoder.decoder.float().cpu()
        decoder = decoder if order is None else decoder[order]
        silent, absorbed = carried_elsewhere(autoencoder, decoder, judged, known, own)
        rows += _absorbed(condition, absorbed, "absorption", known, by_document)
        if order is None:
            rows += _absorbed(condition, silent, "own_latents_silent", known, by_document)
    return rows


def known_letters(
    fitted: Float[torch.Tensor, "row component"],
    judged: Float[torch.Tensor, "row component"],
    fitted_letters: NDArray[np.object_],
    judged_letters: NDArray[np.object_],
) -> list[Letter]:
    """Letters that are frequent enough and that a logistic probe on whole vectors tells."""
    often = [
        letter
        for letter in sorted({str(found) for found in fitted_letters if found is not None})
        if (fitted_letters == letter).sum() >= LEAST_FITTED and (judged_letters == letter).sum() >= LEAST_JUDGED
    ]
    if not often:
        return []
    step = max(1, len(fitted) // _MOST_ROWS)
    answers = np.stack([fitted_letters == letter for letter in often], 1)
    weights, bias = _dense_probes(fitted[::step].double(), torch.from_numpy(answers[::step]).double())
    found = []
    for number, letter in enumerate(often):
        yes = judged_letters == letter
        guessed = ((judged.double() @ weights[:, number] + bias[number]) > 0).numpy()
        if f1_score(guessed, yes) >= KNOWN:
            direction = (weights[:, number] / weights[:, number].norm()).float()
            found.append(Letter(letter, direction, guessed & yes, fitted_letters == letter, yes))
    return found


def own_units(
    code: Code,
    width: int,
    fitted: Float[torch.Tensor, "row component"],
    judged: Float[torch.Tensor, "row component"],
    known: Sequence[Letter],
) -> list[NDArray[np.int64]]:
    """The units that each letter is split over, in the order in which they are found; at least one."""
    pools = most_correlated(code, width, fitted, np.stack([letter.fitted for letter in known], 1), _POOL)
    wanted = np.unique(pools)
    before, now = (columns_of(code, width, x, wanted) for x in (fitted, judged))
    found = []
    for letter, pool in zip(known, pools, strict=True):
        at = np.searchsorted(wanted, pool)
        found.append(pool[_one_after_another(before[:, at], now[:, at], letter)])
    return found


def _one_after_another(before: Floats, now: Floats, letter: Letter) -> list[int]:
    """Columns that tell a letter, each chosen for what those before leave unexplained, as long as F1 rises by the gain."""
    standard = (before - before.mean(0)) / np.maximum(before.std(0), 1e-9)
    chosen: list[int] = []
    best, residual = -1.0, letter.fitted - letter.fitted.mean()
    while len(chosen) < min(MOST, before.shape[1]):
        gain = np.abs(standard.T @ residual)
        gain[chosen] = -1.0
        tried = [*chosen, int(gain.argmax())]
        probe = fit_logistic(before[:, tried], letter.fitted)
        f1 = f1_score(probe.scores(now[:, tried]) > 0, letter.judged)
        if chosen and f1 - best < GAIN:
            break
        chosen, best = tried, f1
        residual = letter.fitted - np.exp(-np.logaddexp(0.0, -probe.scores(before[:, tried])))
    return chosen


def carried_elsewhere(
    autoencoder: Autoencoder,
    decoder: Float[torch.Tensor, "latent component"],
    judged: Float[torch.Tensor, "row component"],
    known: Sequence[Letter],
    own: Sequence[NDArray[np.int64]],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[row, letter] Where the letter's own latents are silent though the probe finds it; and where another carries it."""
    directions = torch.stack([letter.direction for letter in known], 1)
    along = decoder @ directions
    cosine = along / decoder.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    silent, carried = [], []
    for part in in_parts(judged, autoencoder.d_sae):
        acts = autoencoder.encode(part.to(autoencoder.device)).cpu()
        whole = acts @ along
        for number, units in enumerate(own):
            added = acts * along[:, number]
            most, which = added.max(-1)
            silent.append((acts[:, torch.from_numpy(units)] <= 0).all(-1))
            carried.append((cosine[which, number] >= ALIGNED) & (most >= SHARE * whole[:, number]) & (most > 0))
    shape = -1, len(known)
    parts = len(silent) // len(known)
    stacked = [
        torch.cat([torch.stack(flags[p * len(known) : (p + 1) * len(known)], 1) for p in range(parts)]).reshape(shape)
        for flags in (silent, carried)
    ]
    said = np.stack([letter.said for letter in known], 1)
    quiet = stacked[0].numpy() & said
    return quiet, quiet & stacked[1].numpy()


def _dense_probes(
    x: Float[torch.Tensor, "row component"], yes: Float[torch.Tensor, "row letter"]
) -> tuple[Float[torch.Tensor, "component letter"], Float[torch.Tensor, " letter"]]:
    """Logistic probes on whole vectors, with a ridge of 1e-3 on standardised components; in the vectors' own units."""
    centre, scale = x.mean(0), x.std(0).clamp(min=1e-9)
    standard = (x - centre) / scale
    weights = torch.zeros(x.shape[1], yes.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.logit(yes.mean(0)).requires_grad_()
    fitting = torch.optim.LBFGS([weights, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        fitting.zero_grad()
        scores = standard @ weights + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, yes, reduction="none").mean(0).sum()
        loss = loss + _DECAY * weights.square().sum() / 2
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        fitting.step(closure)  # type: ignore[no-untyped-call]  # torch has no types there
    own = weights.detach() / scale[:, None]
    return own, bias.detach() - centre @ own


def _splitting(condition: str, extra: Sequence[int], known: Sequence[Letter]) -> list[MeasureRow]:
    rows = [MeasureRow("splitting", condition, float(np.mean(extra)), len(known), "latents")]
    for count, letter in zip(extra, known, strict=True):
        n = int(letter.judged.sum())
        rows.append(
            MeasureRow("splitting", condition, count, n, "latents", group_kind="letter", group_value=letter.letter)
        )
    return rows


def _absorbed(
    condition: str, flags: NDArray[np.bool_], metric: str, known: Sequence[Letter], by_document: ByDocument
) -> list[MeasureRow]:
    said = np.stack([letter.said for letter in known], 1)
    above: Floats = by_document.sums(flags.astype(float))
    below: Floats = by_document.sums(said.astype(float))
    ((value, low, high),) = ratios(above.sum(1, keepdims=True), below.sum(1, keepdims=True), seed=by_document.seed)
    rows = [MeasureRow(metric, condition, value, int(said.sum()), "share of tokens", low, high)]
    each = ratios(above, below, seed=by_document.seed)
    for found, letter in zip(each, known, strict=True):
        n = int(letter.said.sum())
        rows.append(MeasureRow(metric, condition, found[0], n, "share of tokens", *found[1:], "letter", letter.letter))
    return rows
