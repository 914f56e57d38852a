"""Measures of an autoencoder against closed forms, planted answers and plain loops; no model takes part."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.sae.judging.ablation import sparsity_of
from moescope.sae.judging.absorption import absorption_rows
from moescope.sae.judging.controls import Own, Pca, PcaTopK, RandomDecoder, Shuffled, Zero, controls_for
from moescope.sae.judging.latents import decoder_rows, firing, latent_rows, nearest_cosines
from moescope.sae.judging.logistic import fit_logistic, log_losses
from moescope.sae.judging.probing import Question, auc_draws, most_correlated, probe_rows, with_bounds
from moescope.sae.judging.reconstruction import reconstruction_rows
from moescope.sae.judging.rows import ByDocument, MeasureRow
from moescope.sae.judging.run_tokens import RunTokens, some_sequences, split
from moescope.sae.judging.vectors import Vectors


@dataclass
class Planted:
    """An autoencoder written out: relu(x · encoderᵀ + bias), times decoder."""

    encoder: torch.Tensor
    decoder: torch.Tensor
    bias: float = 0.0
    site: Site = field(default_factory=lambda: Site(0, "", "hook_resid_post"))
    target_site: Site | None = None
    expert: int | None = None
    head: int | None = None
    row: dict[str, Any] = field(default_factory=dict)
    name: str = "planted"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_sae(self) -> int:
        return len(self.encoder)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.encoder.T + self.bias).relu()

    def decode(self, activations: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        return activations @ self.decoder


def both_signs(width: int) -> Planted:
    """Writes every vector again without error: a latent for each component and sign."""
    rows = torch.cat([torch.eye(width), -torch.eye(width)])
    return Planted(rows, rows)


def drawn(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def value(rows: list[MeasureRow], metric: str, condition: str = "sae", group: str | None = None) -> float:
    (found,) = [r for r in rows if (r.metric, r.condition, r.group_value) == (metric, condition, group)]
    return found.value


def judged(ways: list[Any], x: torch.Tensor, mean: torch.Tensor, groups: Any = ()) -> list[MeasureRow]:
    vectors = Vectors(x, x, np.arange(len(x)))
    return reconstruction_rows(ways, vectors, mean, ByDocument(np.arange(len(x)) % 4), groups, width=7)


def test_autoencoder_without_error_explains_everything() -> None:
    x = drawn(40, 6) + 2
    rows = judged([Own(both_signs(6))], x, x.mean(0))
    assert value(rows, "fvu") == pytest.approx(0, abs=1e-12)
    assert value(rows, "cosine") == pytest.approx(1, abs=1e-6)
    assert value(rows, "norm_ratio") == pytest.approx(1, abs=1e-6)
    assert value(rows, "explained_variance") == pytest.approx(1, abs=1e-12)


def test_reconstruction_measures_are_those_of_plain_loops() -> None:
    x, mean = drawn(30, 5), drawn(1, 5, seed=1)[0]
    own = Planted(drawn(9, 5, seed=2), 0.3 * drawn(9, 5, seed=3), bias=-0.2)
    half = np.arange(30) % 2 == 0
    rows = judged([Own(own), Zero(5)], x, mean, [("label", "even", half)])
    squared, about, relative, cosines, ratios = [], [], [], [], []
    for vector in x.double():
        again = sum(
            max(float(e.double() @ vector) - 0.2, 0) * d.double() for e, d in zip(own.encoder, own.decoder, strict=True)
        )
        squared.append(float(((vector - again) ** 2).sum()))
        about.append(float(((vector - mean.double()) ** 2).sum()))
        relative.append(squared[-1] / about[-1])
        cosines.append(float(vector @ again / (vector.norm() * again.norm())) if again.norm() else 0.0)
        ratios.append(float(again.norm() / vector.norm()))
    assert value(rows, "fvu") == pytest.approx(sum(squared) / sum(about), rel=1e-5)
    assert value(rows, "normalised_mse") == pytest.approx(np.mean(relative), rel=1e-5)
    assert value(rows, "cosine") == pytest.approx(np.mean(cosines), rel=1e-5)
    assert value(rows, "norm_ratio") == pytest.approx(np.mean(ratios), rel=1e-5)
    of_even = 1 - sum(squared[::2]) / sum(about[::2])
    assert value(rows, "explained_variance", group="even") == pytest.approx(of_even, rel=1e-5)
    assert value(rows, "fvu", "zero") == pytest.approx(float((x.double() ** 2).sum()) / sum(about), rel=1e-6)


def test_interval_resamples_documents_and_holds_the_value() -> None:
    x = drawn(400, 5)
    own = Planted(drawn(9, 5, seed=2), 0.3 * drawn(9, 5, seed=3))
    (fvu,) = [r for r in judged([Own(own)], x, x.mean(0)) if r.metric == "fvu"]
    assert fvu.ci_low is not None
    assert fvu.ci_high is not None
    assert fvu.ci_low < fvu.value < fvu.ci_high
    alone = reconstruction_rows(
        [Own(own)], Vectors(x, x, np.arange(400)), x.mean(0), ByDocument(np.zeros(400, int)), (), width=7
    )
    assert all(row.ci_low is None for row in alone)


def test_pca_leaves_the_variance_of_the_other_components() -> None:
    x = drawn(500, 6) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1]) + 1
    controls = controls_for(both_signs(6), x, k=2, draws=1, seed=0)  # type: ignore[arg-type]  # duck-typed
    rows = judged(controls, x, x.mean(0))
    eigen = np.linalg.eigvalsh(np.cov(x.double().numpy().T))[::-1]
    assert value(rows, "fvu", "pca") == pytest.approx(eigen[2:].sum() / eigen.sum(), rel=1e-4)
    assert value(rows, "fvu", "mean") == pytest.approx(1, abs=1e-9)
    assert value(rows, "fvu", "pca_topk") < value(rows, "fvu", "pca")


def test_pca_by_vector_keeps_the_largest_coefficients() -> None:
    way = PcaTopK(torch.zeros(3), torch.eye(3), 1)
    assert way.reconstruct(torch.tensor([[1.0, -4.0, 2.0]])).tolist() == [[0.0, -4.0, 0.0]]
    assert Pca(torch.zeros(3), torch.eye(3)[:1]).reconstruct(torch.tensor([[1.0, -4.0, 2.0]])).tolist() == [[1, 0, 0]]


def test_random_decoder_has_the_scale_of_least_squares() -> None:
    x, mean = drawn(200, 8), torch.zeros(8)
    rows = torch.nn.functional.normalize(drawn(20, 8, seed=5), dim=-1)
    way = RandomDecoder(mean, rows, 3).fit(x)
    errors = []
    for factor in (0.95, 1.0, 1.05):
        other = RandomDecoder(mean, rows, 3)
        other.scale = way.scale * factor
        errors.append(float((x - other.reconstruct(x)).square().sum()))
    assert errors[1] < min(errors[0], errors[2])
    one = RandomDecoder(torch.zeros(2), torch.eye(2), 1).fit(torch.tensor([[3.0, 1.0]]))
    assert one.reconstruct(torch.tensor([[3.0, 1.0]])).tolist() == [[3.0, 0.0]]


def test_shuffled_writes_other_latents_rows() -> None:
    own = Planted(drawn(9, 5, seed=2), drawn(9, 5, seed=3))
    way = Shuffled(own, torch.Generator().manual_seed(1))  # type: ignore[arg-type]  # duck-typed
    x = drawn(4, 5)
    acts = own.encode(x)
    dealt = torch.zeros_like(own.decoder)
    for latent, other in enumerate(way.order.tolist()):
        dealt[other] = own.decoder[latent]  # latent `latent` is as active as `other`
    assert torch.allclose(way.reconstruct(x), acts @ dealt, atol=1e-6)
    assert sorted(way.order.tolist()) == list(range(9))


def test_controls_of_a_transcoder_do_not_see_what_it_predicts() -> None:
    own = Planted(drawn(9, 5), drawn(9, 3), target_site=Site(0, "", "hook_mlp_out"))
    names = {way.name for way in controls_for(own, drawn(50, 3), k=2, draws=1, seed=0)}  # type: ignore[arg-type]  # duck-typed
    assert names == {"zero", "mean", "shuffled"}


def test_latents_are_counted_where_they_fire() -> None:
    own = Planted(torch.eye(4), torch.eye(4))
    x = torch.zeros(40, 4)
    x[:, 0] = 1  # always
    x[:4, 1] = 1  # on a tenth of the vectors, which is not over a tenth
    x[:5, 2] = 1  # on more
    found = firing(own, x)  # type: ignore[arg-type]  # duck-typed
    assert found.active.tolist() == [40, 4, 5, 0]
    rows = latent_rows(found, ByDocument(np.arange(40)), {"dead_share": 0.125})
    assert value(rows, "l0") == pytest.approx(49 / 40)
    assert value(rows, "l0_p95") == 3
    assert value(rows, "dead_share") == 0.25
    assert value(rows, "dense_share") == 0.5
    assert value(rows, "dead_share_training") == 0.125


def test_nearest_cosines_are_those_of_every_pair() -> None:
    rows = drawn(30, 4)
    expected = [
        max(float(torch.cosine_similarity(a, b, dim=0)) for b in torch.cat([rows[:i], rows[i + 1 :]]))
        for i, a in enumerate(rows)
    ]
    assert nearest_cosines(rows) == pytest.approx(np.array(expected), abs=1e-5)


def test_decoder_with_twins_stands_out_from_random_rows() -> None:
    rows = drawn(64, 32)
    measured = decoder_rows(Planted(rows, torch.cat([rows[:32], rows[:32] * 2])), seed=0)  # type: ignore[arg-type]  # duck-typed
    assert value(measured, "twin_share") == 1
    assert value(measured, "twin_share", "random_decoder") == 0
    assert value(measured, "max_cosine") == pytest.approx(1, abs=1e-5)
    own = decoder_rows(Planted(rows, rows), seed=0)  # type: ignore[arg-type]  # duck-typed
    assert value(own, "max_cosine") == pytest.approx(value(own, "max_cosine", "random_decoder"), abs=0.05)


def test_sparsity_of_one_changed_logit_and_of_noise() -> None:
    one = torch.zeros(4, 25)
    one[2, 7] = -3
    assert sparsity_of(one) == pytest.approx(1 / 100)
    assert sparsity_of(torch.full((4, 25), 2.0)) is None  # a shift of all logits changes no prediction
    assert sparsity_of(drawn(40, 1000)) == pytest.approx(2 / math.pi, abs=0.01)


def test_auc_counts_pairs() -> None:
    random = np.random.default_rng(0)
    score, answer = random.integers(0, 5, 60).astype(float), random.random(60) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in score[answer] for b in score[~answer]]
    found, low, high = with_bounds(auc_draws(score, answer, ByDocument(np.arange(60) % 12), seed=0))
    assert found == pytest.approx(np.mean(pairs))
    assert low is not None
    assert high is not None
    assert low < found < high


def test_logistic_probe_is_the_one_of_least_loss() -> None:
    from scipy.optimize import minimize

    random = np.random.default_rng(0)
    x = random.normal(size=(300, 3)) * [1.0, 10.0, 0.1] + 5
    yes = random.random(300) < 1 / (1 + np.exp(-(x[:, 0] - 5) - 0.2 * (x[:, 1] - 5)))
    probe = fit_logistic(x, yes)

    def loss(weights: Any) -> float:
        return float(log_losses((x - probe.centre) / probe.scale @ weights[:3] + weights[3], yes).mean())

    best = minimize(loss, np.zeros(4)).fun
    assert float(log_losses(probe.scores(x), yes).mean()) == pytest.approx(best, abs=1e-5)


def test_separable_answers_give_a_finite_probe() -> None:
    x = np.array([[0.0], [0.0], [1.0], [1.0]])
    probe = fit_logistic(x, np.array([False, False, True, True]))
    assert np.isfinite(probe.weights).all()
    assert (probe.scores(x) > 0).tolist() == [False, False, True, True]


def test_most_correlated_units_are_those_of_numpy() -> None:
    x, answers = drawn(100, 12), np.stack([np.arange(100) % 3 == 0, np.arange(100) % 7 == 0], 1)
    found = most_correlated(lambda part: part, 12, x, answers, 4)
    for number in range(2):
        each = [abs(np.corrcoef(x[:, unit].numpy(), answers[:, number])[0, 1]) for unit in range(12)]
        assert set(found[number].tolist()) == set(np.argsort(each)[-4:].tolist())


def labelled(rows: int, seed: int) -> tuple[torch.Tensor, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Vectors of 20 documents, half of which have a label that component 3 tells, noisily."""
    random = np.random.default_rng(seed)
    document = np.arange(rows) % 20
    yes = document % 2 == 0
    x = random.normal(size=(rows, 8))
    x[:, 3] += 3.0 * yes
    return torch.from_numpy(x).float(), yes, document


def test_best_latent_tells_a_planted_label_and_controls_do_not() -> None:
    fitted, yes_fitted, document = labelled(800, 0)
    now, yes_now, document_now = labelled(600, 1)
    spread = torch.nn.functional.normalize(drawn(8, 8, seed=4), dim=-1)
    own = both_signs(8)
    codes = {"sae": own.encode, "random_direction": lambda x: x @ spread.T}
    question = Question("label", "a", yes_fitted, yes_now)
    rows = probe_rows(codes, 16, fitted, now, [question], document, ByDocument(document_now), seed=0)
    assert value(rows, "probe_auc", group="a") > 0.95
    (mean,) = [r for r in rows if (r.metric, r.condition, r.group_value) == ("probe_auc", "sae", None)]
    assert mean.ci_low is not None
    assert mean.ci_high is not None
    assert mean.ci_low <= mean.value == value(rows, "probe_auc", group="a") <= mean.ci_high
    assert value(rows, "probe_loss", group="a") < value(rows, "probe_loss", "random_direction", "a")
    assert value(rows, "probe_loss", "prior", "a") == pytest.approx(math.log(2), abs=1e-6)
    assert abs(value(rows, "probe_auc", "shuffled", "a") - 0.5) < 0.35
    assert value(rows, "probe_loss", "shuffled", "a") > 2 * value(rows, "probe_loss", group="a")
    rare = Question("label", "b", np.arange(800) < 5, yes_now)
    assert probe_rows(codes, 16, fitted, now, [rare], document, ByDocument(document_now), seed=0) == []


def spelled(rows: int, absorbed: float, seed: int) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """Vectors that spell a first letter along component 0; a share of its tokens are of a word of their own, component 1."""
    random = np.random.default_rng(seed)
    letter = np.array([None] * rows, dtype=object)
    letter[: rows // 3] = "a"
    letter[rows // 3 : 2 * rows // 3] = "b"
    x = np.abs(random.normal(0, 0.01, (rows, 6)))
    x[letter == "a", 0] += 2
    own_word = (letter == "a") & (np.arange(rows) < absorbed * rows / 3)
    x[own_word, 1] += 3
    x[letter == "b", 2] += 2
    return torch.from_numpy(x).float(), letter


def speller(absorbs: bool, split_over: int = 1) -> Planted:
    """Latents for `a`, for a word that begins with it and for `b`; where it absorbs, the word's row writes the letter too."""
    encoder = torch.zeros(4, 6)
    encoder[0, 0], encoder[1, 1], encoder[2, 2], encoder[3, 3] = 1, 1, 1, 1
    decoder = torch.eye(4, 6)
    if absorbs:
        encoder[0, 1] = -2.0  # silent on the word
        decoder[1, 0] = 2 / 3
    return Planted(encoder, decoder, bias=-0.5)


def test_latent_that_raises_f1_is_the_letters_own_and_absorbs_nothing() -> None:
    (fitted, before), (now, letters) = spelled(900, 0.3, 0), spelled(600, 0.3, 1)
    own, documents = speller(absorbs=True), ByDocument(np.arange(600) % 10)
    rows = absorption_rows(own, {"sae": own.encode}, fitted, now, (before, letters), documents, seed=0)  # type: ignore[arg-type]  # duck-typed
    assert value(rows, "splitting", group="a") == 1
    assert value(rows, "splitting", group="b") == 0
    assert value(rows, "absorption") == value(rows, "own_latents_silent") == 0


def test_latent_that_takes_a_letter_over_is_found() -> None:
    """The word is too rare to raise F1, so that its latent is none of the letter's own: every one of its tokens is absorbed."""
    (fitted, before), (now, letters) = spelled(900, 0.04, 0), spelled(900, 0.04, 1)
    own = speller(absorbs=True)
    given = {"sae": own.encode}
    documents = ByDocument(np.arange(900) % 10)
    rows = absorption_rows(own, given, fitted, now, (before, letters), documents, seed=3)  # type: ignore[arg-type]  # duck-typed
    assert value(rows, "own_latents_silent", group="a") == pytest.approx(0.04)
    assert value(rows, "absorption", group="a") == pytest.approx(0.04)
    plain = speller(absorbs=False)
    rows = absorption_rows(
        plain,
        {"sae": plain.encode},
        fitted,
        now,
        (before, letters),
        documents,
        seed=3,  # type: ignore[arg-type]  # duck-typed
    )
    assert value(rows, "absorption", group="a") == 0


def test_letter_written_by_two_latents_is_split() -> None:
    random = np.random.default_rng(0)
    letter = np.array(["a" if i % 2 else None for i in range(600)], dtype=object)
    x = np.abs(random.normal(0, 0.01, (600, 4)))
    x[np.arange(600) % 4 == 1, 0] += 2
    x[np.arange(600) % 4 == 3, 1] += 2
    own = Planted(torch.eye(4), torch.eye(4), bias=-0.5)
    vectors = torch.from_numpy(x).float()
    rows = absorption_rows(
        own,  # type: ignore[arg-type]  # duck-typed
        {"sae": own.encode},
        vectors,
        vectors,
        (letter, letter),
        ByDocument(np.arange(600) % 10),
        seed=0,
    )
    assert value(rows, "splitting", group="a") == 1
    assert value(rows, "absorption", group="a") == 0


def test_letters_that_vectors_do_not_tell_are_left_out() -> None:
    letter = np.array(["a" if i % 2 else None for i in range(600)], dtype=object)
    own = both_signs(4)
    x = drawn(600, 4)
    documents = ByDocument(np.arange(600) % 10)
    assert absorption_rows(own, {"sae": own.encode}, x, x, (letter, letter), documents, seed=0) == []  # type: ignore[arg-type]  # duck-typed


def a_run(documents: int, length: int = 5) -> RunTokens:
    n = documents * length
    sequence = np.repeat(np.arange(documents), length)
    nothing = np.array([None] * n, dtype=object)
    return RunTokens(
        np.arange(n), sequence, np.tile(np.arange(length), documents), np.arange(n), sequence, nothing, nothing
    )


def test_split_keeps_documents_apart_and_leaves_first_tokens_out() -> None:
    tokens = a_run(200)
    parts = split(tokens, apart=True, first=1, share=0.2)
    judged, fitted = (set(tokens.document[side].tolist()) for side in (parts.judged, parts.fitted))
    assert not judged & fitted
    assert judged | fitted == set(range(200))
    assert 20 <= len(judged) <= 60
    assert tokens.position[parts.judged].min() == 1
    same = split(tokens, apart=False, first=0, share=0.2)
    assert same.judged.all()
    assert same.fitted.all()


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(InputError, match="too few documents"):
        split(a_run(3), apart=True, first=0, share=0.1)


def test_some_sequences_stop_at_the_limit() -> None:
    tokens = a_run(50)
    eligible = tokens.position >= 1
    assert len(some_sequences(tokens, eligible, limit=40, seed=0)) == 10
    assert len(some_sequences(tokens, eligible, limit=10_000, seed=0)) == 50
    other = some_sequences(tokens, eligible, limit=40, seed=1).tolist()
    assert other != some_sequences(tokens, eligible, limit=40, seed=0).tolist()
    assert other == sorted(other)
