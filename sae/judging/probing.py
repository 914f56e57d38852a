"""One number as a probe: the latent that tells a label best, beside random directions, principal components and shuffled labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.core.statistics import document_weights
from moescope.sae.judging.controls import in_parts
from moescope.sae.judging.logistic import fit_logistic, log_losses
from moescope.sae.judging.rows import ByDocument, Floats, MeasureRow

CANDIDATES = 16
LEAST = 20  # tokens on each side of a question, fitted on as well as judged
_AUC_DRAWS = 200

Code = Callable[[Float[torch.Tensor, "row component"]], Float[torch.Tensor, "row unit"]]


@dataclass(frozen=True)
class Question:
    """A yes-or-no question about tokens.

    Attributes:
        kind, value: the group asked about: `label` or `class`, and which.
        fitted, judged: [row] answers for the vectors that are fitted on and those that are judged.
    """

    kind: str
    value: str
    fitted: NDArray[np.bool_]
    judged: NDArray[np.bool_]

    @property
    def answerable(self) -> bool:
        """Whether enough tokens are on either side, in both parts."""
        counts = [int(side.sum()) for part in (self.fitted, self.judged) for side in (part, ~part)]
        return min(counts) >= LEAST


@dataclass(frozen=True)
class Answered:
    """How the best single unit answers one question.

    Attributes:
        loss: [row] −ln p(answer) of each judged vector, nats.
        score: [row] log-odds of yes.
    """

    loss: Floats
    score: Floats


def probe_rows(
    codes: Mapping[str, Code],
    width: int,
    fitted: Float[torch.Tensor, "row component"],
    judged: Float[torch.Tensor, "row component"],
    questions: Sequence[Question],
    fitted_document: NDArray[np.int64],
    by_document: ByDocument,
    *,
    seed: int,
) -> list[MeasureRow]:
    """Loss and AUC, on judged vectors, of the best logistic probe on one unit, for each question and code.

    Of every unit of a code, the sixteen whose activation correlates most with the answer are candidates; each gets a logistic
    probe on the fitted vectors, and the one of least loss there is judged. `prior` answers with the share of yes alone.
    `shuffled` does the same with the first code where documents, both those fitted on and those judged, carry each other's
    labels (for token classes: where tokens do).

    Args:
        codes: condition → units of vectors; the first is the autoencoder.
        width: most units of any code, which settles how many rows are done at a time.
        fitted, judged: vectors.
        questions: with answers for both.
        fitted_document: [row] document of each fitted vector.
        by_document: of the judged ones.
        seed: of the shuffling and the resampling.
    """
    asked = [question for question in questions if question.answerable]
    if not asked:
        return []
    answers = np.stack([q.fitted for q in asked], 1)
    generator = np.random.default_rng(seed)
    first = next(iter(codes))
    found = {name: answered(code, width, fitted, judged, answers, asked) for name, code in codes.items()}
    rows: list[MeasureRow] = []
    for name, of_question in found.items():
        rows += _rows(name, of_question, asked, by_document, seed)
    dealt = [_shuffled(q, fitted_document, by_document.place, generator) for q in asked]
    answers = np.stack([q.fitted for q in dealt], 1)
    rows += _rows("shuffled", answered(codes[first], width, fitted, judged, answers, dealt), dealt, by_document, seed)
    prior = [
        Answered(log_losses(np.full(len(judged), _log_odds(q.fitted.mean())), q.judged), np.zeros(0)) for q in asked
    ]
    return rows + _rows("prior", prior, asked, by_document, seed)


def answered(
    code: Code,
    width: int,
    fitted: Float[torch.Tensor, "row component"],
    judged: Float[torch.Tensor, "row component"],
    answers: NDArray[np.bool_],
    asked: Sequence[Question],
) -> list[Answered]:
    """The best unit's answers to each question."""
    candidates = most_correlated(code, width, fitted, answers)
    wanted = np.unique(candidates)
    before, now = (columns_of(code, width, x, wanted) for x in (fitted, judged))
    found = []
    for number, question in enumerate(asked):
        best: tuple[float, Answered] | None = None
        for unit in candidates[number]:
            at = int(np.searchsorted(wanted, unit))
            column = before[:, at : at + 1]
            weights = fit_logistic(column, answers[:, number])
            loss = float(log_losses(weights.scores(column), answers[:, number]).mean())
            if best is None or loss < best[0]:
                score = weights.scores(now[:, at : at + 1])
                best = loss, Answered(log_losses(score, question.judged), score)
        assert best is not None
        found.append(best[1])
    return found


def most_correlated(
    code: Code, width: int, x: Float[torch.Tensor, "row component"], answers: NDArray[np.bool_], count: int = CANDIDATES
) -> NDArray[np.int64]:
    """[question, candidate] The units whose activation correlates most, in magnitude, with each answer."""
    yes = torch.from_numpy(answers).float()
    totals: list[torch.Tensor] = []
    start = 0
    for part in in_parts(x, width):
        units = code(part)
        here = yes[start : start + len(part)]
        start += len(part)
        new = [found.double() for found in (units.sum(0), (units * units).sum(0), here.T @ units)]
        totals = [old + more for old, more in zip(totals, new, strict=True)] if totals else new
    sums, squares, products = totals
    n, share = len(x), yes.double().mean(0)
    covariance = products / n - share[:, None] * (sums / n)
    deviation = (squares / n - (sums / n).square()).clamp(min=0).sqrt()
    correlation = covariance / (deviation * (share * (1 - share)).sqrt()[:, None]).clamp(min=1e-12)
    correlation = torch.where(deviation > 1e-9, correlation.abs(), 0.0)
    found: NDArray[np.int64] = correlation.topk(min(count, correlation.shape[1]), dim=1).indices.numpy()
    return found


def columns_of(
    code: Code, width: int, x: Float[torch.Tensor, "row component"], wanted: NDArray[np.int64]
) -> NDArray[np.float32]:
    """[row, wanted] Activations of some units."""
    at = torch.from_numpy(wanted)
    return torch.cat([code(part)[:, at] for part in in_parts(x, width)]).numpy()


def auc_draws(score: Floats, answer: NDArray[np.bool_], by_document: ByDocument, *, seed: int) -> Floats:
    """The AUC, and after it that of each resample of documents.

    It is the share of (yes, no) pairs in which yes has the higher score, ties half.

    Example:
        >>> documents = ByDocument(np.array([0, 0, 0, 0]))
        >>> auc_draws(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]), documents, seed=0)
        array([0.75])
    """
    order = np.argsort(score, kind="stable")
    first = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])  # where each run of equal scores begins
    yes = answer[order].astype(float)
    count = len(by_document.names)
    draws = document_weights(count, draws=_AUC_DRAWS, seed=seed) if count > 1 else np.zeros((0, count))
    values = []
    for weights in (np.ones(count), *draws):
        of_row = weights[by_document.place[order]]
        positive, negative = (np.add.reduceat(of_row * side, first) for side in (yes, 1 - yes))
        below = np.cumsum(negative) - negative
        pairs = positive.sum() * negative.sum()
        values.append(float((positive * (below + negative / 2)).sum() / pairs) if pairs else np.nan)
    return np.array(values)


def with_bounds(values: Floats) -> tuple[float, float | None, float | None]:
    """The first value, with the bounds of the others; none where there are no others."""
    if len(values) < 2:
        return float(values[0]), None, None
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return float(values[0]), float(low), float(high)


def _rows(
    name: str, of_question: Sequence[Answered], asked: Sequence[Question], by_document: ByDocument, seed: int
) -> list[MeasureRow]:
    losses = np.stack([a.loss for a in of_question], 1)
    n = len(losses)
    each = by_document.means(losses)
    ((mean, low, high),) = by_document.means(losses.mean(1, keepdims=True))
    rows = [MeasureRow("probe_loss", name, mean, n, "nats", low, high)]
    draws = []
    for question, found, answer in zip(asked, each, of_question, strict=True):
        rows.append(MeasureRow("probe_loss", name, found[0], n, "nats", *found[1:], question.kind, question.value))
        if len(answer.score):
            draws.append(auc_draws(answer.score, question.judged, by_document, seed=seed))
            value, low, high = with_bounds(draws[-1])
            rows.append(MeasureRow("probe_auc", name, value, n, "AUC", low, high, question.kind, question.value))
    if draws:  # every question was resampled with the same documents
        value, low, high = with_bounds(np.mean(draws, 0))
        rows.append(MeasureRow("probe_auc", name, value, n, "AUC", low, high))
    return rows


def _shuffled(
    question: Question, fitted: NDArray[np.int64], judged: NDArray[np.int64], generator: np.random.Generator
) -> Question:
    """Answers dealt out anew on either side: among documents where they belong to these, else among tokens."""
    if question.kind != "label":
        sides = [generator.permutation(side) for side in (question.fitted, question.judged)]
    else:
        sides = []
        for answers, document in ((question.fitted, fitted), (question.judged, judged)):
            names, first, place = np.unique(document, return_index=True, return_inverse=True)
            sides.append(answers[first][generator.permutation(len(names))][place])
    return Question(question.kind, question.value, *sides)


def _log_odds(share: float) -> float:
    return float(np.log(share / (1 - share)))
