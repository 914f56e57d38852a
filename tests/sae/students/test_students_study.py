"""Students of an MLP: closed forms, planted teachers, Gaussian inputs, and what is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import moescope as ms
from moescope.core.errors import InputError, RunError
from moescope.core.sites import Site
from moescope.sae.students.fitting import Parts, fit, linear_map, mean_output, spread_of
from moescope.sae.students.gaussian import gaussian_like, moments
from moescope.sae.students.measures import Units, agreement
from moescope.sae.students.networks import DenseStudent, ExpertStudent, dense_neurons
from moescope.sae.students.student_rows import BETWEEN
from moescope.sae.students.study import mlp_students
from moescope.sae.students.teacher import Teacher
from moescope.store.sae_rows import write_rows
from moescope.store.store import Store


def _fvu(errors: np.ndarray[Any, Any], parts: Parts) -> float:
    return float(errors.mean(0).sum() / spread_of(parts).sum())


def _three(x: torch.Tensor, y: torch.Tensor) -> Parts:
    n = len(x)
    a, b = int(0.7 * n), int(0.8 * n)
    return Parts.of((x[:a], y[:a]), (x[a:b], y[a:b]), (x[b:], y[b:]))


def test_gaussian_inputs_have_the_moments_of_the_real_ones() -> None:
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=random)
    real = torch.rand(4000, 6, generator=random).pow(3) @ mix + torch.arange(6.0)
    mean, covariance = moments(real)
    drawn = gaussian_like(mean, covariance, 400_000, seed=1).numpy().astype(np.float64)
    scale = np.sqrt(np.diag(np.cov(real.numpy().T)))
    assert np.abs(drawn.mean(0) - real.numpy().mean(0)).max() < 1e-2 * scale.max()
    difference = np.cov(drawn.T) - np.cov(real.numpy().astype(np.float64).T)
    assert np.abs(difference / np.outer(scale, scale)).max() < 1e-2
    third = ((drawn - drawn.mean(0)) ** 3).mean(0) / scale**3
    assert np.abs(third).max() < 0.03, "no skew is left"
    assert np.abs(((real.numpy() - real.numpy().mean(0)) ** 3).mean(0) / scale**3).max() > 0.3


def test_singular_covariance_stays_in_its_subspace() -> None:
    x = torch.outer(torch.randn(200, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 2.0, -1.0]))
    drawn = gaussian_like(*moments(x), 500)
    assert torch.linalg.matrix_rank(drawn, rtol=1e-4) == 1 or torch.linalg.svdvals(drawn)[1] < 1e-3


def test_linear_teacher_is_learnt_without_rest_and_the_mean_explains_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 8, generator=random)
    y = x @ torch.randn(8, 5, generator=random) + 3
    parts = _three(x, y)
    assert _fvu(linear_map(parts).errors, parts) < 1e-10
    test, train = y[800:].double(), y[:700].double()
    spread = (test - test.mean(0)).square().sum()
    expected = 1 + len(test) * (train.mean(0) - test.mean(0)).square().sum() / spread
    assert _fvu(mean_output(parts).errors, parts) == pytest.approx(float(expected), rel=1e-5)


def test_linear_map_is_least_squares_of_numpy() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(600, 4)).astype(np.float32), random.normal(size=(600, 3)).astype(np.float32)
    y += np.sin(3 * x[:, :3])
    parts = _three(torch.from_numpy(x), torch.from_numpy(y))
    found = linear_map(parts)
    if found.settings["ridge"] == 0:
        design = np.c_[x, np.ones(len(x))].astype(np.float64)
        weights = np.linalg.lstsq(design[:420], y[:420].astype(np.float64), rcond=None)[0]
        rest = ((design[480:] @ weights - y[480:]) ** 2).sum()
        assert _fvu(found.errors, parts) == pytest.approx(rest / ((y[480:] - y[480:].mean(0)) ** 2).sum(), rel=1e-4)
    else:
        pytest.fail("noise of this size needs no ridge")


def planted_mixture(count: int = 6000, experts: int = 32, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher that is a mixture of single-neuron experts, one for each cluster of inputs."""
    random = torch.Generator().manual_seed(3)
    centres = F.normalize(torch.randn(experts, width, generator=random), dim=1) * 6
    which = torch.randint(experts, (count,), generator=random)
    x = centres[which] + 0.6 * torch.randn(count, width, generator=random)
    w, v = torch.randn(experts, width, generator=random), torch.randn(experts, width, generator=random)
    chosen = (x @ F.normalize(centres, dim=1).T).argmax(1)
    return x, F.relu((x * w[chosen]).sum(1) + 2)[:, None] * v[chosen]


def test_student_mixture_finds_the_planted_mixture_where_an_equal_dense_student_cannot() -> None:
    parts = _three(*planted_mixture())

    def mixture(seed: int, x: torch.Tensor) -> ExpertStudent:
        return ExpertStudent(24, 24, 2, experts=64, examples=x, activation="relu", seed=seed)

    def dense(seed: int, x: torch.Tensor) -> DenseStudent:
        return DenseStudent(24, 24, 2, activation="relu", seed=seed)

    options: dict[str, Any] = {"steps": 500, "batch": 192, "seeds": (0,)}
    ours = _fvu(fit(mixture, parts, rates=(1e-2,), **options).errors, parts)
    theirs = _fvu(fit(dense, parts, rates=(3e-2,), **options).errors, parts)
    # Outputs of two neurons lie in a plane: no dense student leaves less than what the best plane does.
    y = parts.test[1].double()
    variances = torch.linalg.svdvals(y - y.mean(0)).square()
    bound = float(1 - variances[:2].sum() / variances.sum())
    assert ours < 0.1 < 0.4 < bound <= theirs


def test_mixture_is_its_formula_written_as_loops() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, generator=random)
    for rank in (None, 2):
        student = ExpertStudent(6, 4, 5, experts=7, router_rank=rank, seed=1)
        with torch.no_grad():
            for p in student.parameters():
                p.copy_(torch.randn(p.shape, generator=random))
            out = student(x)
            for row in range(5):
                given = x[row] if student.key is None else student.key @ x[row]
                logits = [float(student.router[e] @ given) for e in range(7)]
                best = sorted(range(7), key=lambda e: -logits[e])[:3]
                total = sum(np.exp(logits[e]) for e in best)
                y = student.shared.c.clone()
                for n in range(2):
                    y += F.gelu(student.shared.w[n] @ x[row] + student.shared.b[n]) * student.shared.v[n]
                for e in best:
                    y += np.exp(logits[e]) / total * F.gelu(student.w[e] @ x[row] + student.b[e]) * student.v[e]
                assert torch.allclose(out[row], y, atol=1e-5)


def test_active_parameters_are_those_that_work_on_a_token() -> None:
    dense = DenseStudent(6, 4, 3)
    assert dense.active_parameters == 3 * (6 + 1 + 4) + 4
    full = ExpertStudent(6, 4, 5, experts=7)
    assert full.active_parameters == 5 * (6 + 1 + 4) + 4 + 7 * 6
    low = ExpertStudent(6, 4, 5, experts=7, router_rank=2)
    assert low.active_parameters == 5 * (6 + 1 + 4) + 4 + 2 * 6 + 2 * 7
    assert DenseStudent(6, 4, dense_neurons(full.active_parameters, 6, 4)).active_parameters == pytest.approx(
        full.active_parameters, abs=6
    )


def test_fvu_and_its_interval_are_those_of_documents_drawn_one_by_one() -> None:
    random = np.random.default_rng(0)
    unit = random.integers(0, 6, 40)
    spread, errors = random.random(40) + 0.5, random.random((1, 40))
    units = Units.of(unit, spread, draws=50, seed=0)
    found = units.fvu(errors)
    assert found.value == pytest.approx(errors.sum() / spread.sum())
    for draw, weights in zip(found.draws, units.weights, strict=True):
        above = below = 0.0
        for document, times in enumerate(weights):
            for i in np.flatnonzero(unit == document):
                above += times * errors[0, i]
                below += times * spread[i]
        assert draw == pytest.approx(above / below)
    assert Units.of(np.zeros(3, int), np.ones(3), draws=5, seed=0).fvu(np.ones((1, 3))).interval == (None, None)


def test_agreement_is_its_formula_counted_token_by_token() -> None:
    random = np.random.default_rng(0)
    a = random.integers(0, 5, 300)
    b = np.where(random.random(300) < 0.6, a, random.integers(0, 5, 300))

    def brute(tokens: list[tuple[int, int]]) -> float:
        n = len(tokens)
        one, two, both = Counter(x for x, _ in tokens), Counter(y for _, y in tokens), Counter(tokens)
        shared = sum(c / n * math.log(c * n / (one[x] * two[y])) for (x, y), c in both.items())
        entropies = [-sum(c / n * math.log(c / n) for c in counts.values()) for counts in (one, two)]
        return 2 * shared / sum(entropies)

    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    assert agreement(a, b) == pytest.approx(brute(pairs))
    weights = random.integers(0, 3, 300)
    repeated = [pair for pair, times in zip(pairs, weights, strict=True) for _ in range(times)]
    assert agreement(a, b, weights.astype(float)) == pytest.approx(brute(repeated))
    assert agreement(np.zeros(4, int), np.zeros(4, int)) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_pairs_are_what_the_module_was_seen_to_take_and_give(
    family: str, tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    module = tiny_model(family)
    sequences = token_ids([17, 20, 31, 24, 9])
    run = record_ids(module, sequences, probes=("tokens",))
    live = ms.load(module)
    teacher = Teacher(live, 1)
    site = Site(1, "", "hook_resid_post")
    pairs = teacher.pairs(run, vectors=1000, skip=3, also=site, progress=False)
    mlp = (module.model.layers if family != "gpt2" else module.transformer.h)[1].mlp
    given: list[torch.Tensor] = []
    mlp.register_forward_pre_hook(lambda _m, inputs: given.append(inputs[0]))
    expected = {}
    for document, ids in enumerate(sequences):
        with torch.no_grad():
            module(input_ids=torch.tensor([ids]))
            out = mlp(given[-1])
        out = out[0] if isinstance(out, tuple) else out
        expected[document] = given[-1][0, 3:], out[0, 3:]
    for document, (x, y) in expected.items():
        ours = pairs.at(pairs.document == document)
        assert torch.allclose(ours.x, x, atol=1e-4)
        assert torch.allclose(ours.y, y, atol=1e-3)
    assert pairs.other is not None
    assert pairs.other.shape == pairs.x.shape
    assert torch.allclose(teacher(pairs.x), pairs.y, atol=1e-3)


def test_active_parameters_of_a_mixture_are_its_router_and_chosen_experts(tiny_model: Callable[..., Any]) -> None:
    module = tiny_model("qwen3_moe")
    assert Teacher(ms.load(module), 0).parameters == 8 * 32 + 2 * 3 * 16 * 32
    assert Teacher(ms.load(tiny_model("llama")), 0).parameters == 3 * 48 * 32


@pytest.fixture
def tiny_run(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any]
) -> tuple[Any, Any]:
    module = tiny_model("llama")
    return ms.load(module), record_ids(module, token_ids([40] * 14), probes=("tokens",))


def test_study_stores_every_student_and_replaces_what_was_there(tiny_run: tuple[Any, Any], store: Store) -> None:
    live, run = tiny_run
    options: dict[str, Any] = {
        "layer": 1, "active": (4,), "experts": 16, "router_rank": 2, "steps": 30, "batch": 64, "lrs": (1e-2,), "progress": False,
    }  # fmt: skip
    first = mlp_students(live, run, store, **options)
    again = mlp_students(live, run, store, **options)
    assert first == again, "the same seed gives the same numbers"
    rows = store.sql("SELECT * FROM mlp_students").df()
    assert len(rows) == len(again.rows)
    fvu = rows[rows["metric"] == "fvu"]
    assert set(fvu["inputs"]) == {"real", "gaussian", BETWEEN}
    real = fvu[fvu["inputs"] == "real"]
    assert (real["ci_low"] <= real["value"]).all()
    assert (real["value"] <= real["ci_high"]).all()
    mixtures = rows[(rows["student"] == "moe") & (rows["inputs"] == "real")]
    one = mixtures[mixtures["router_rank"].isna()].set_index("metric")["value"]
    dense = real[(real["student"] == "dense") & (real["active"] == 4)]["value"].item()
    assert one["gain"] == pytest.approx(dense - one["fvu"])
    settings = json.loads(real["settings"].iloc[0])
    assert settings["rate"] == 1e-2
    assert settings["teacher_parameters"] == 3 * 48 * 32
    both = {
        inputs: part.set_index(["student", "active", "router_rank"])["value"] for inputs, part in fvu.groupby("inputs")
    }
    assert np.allclose(both[BETWEEN], both["gaussian"] - both["real"])


def test_agreement_with_an_autoencoder_beats_shuffled_latents_where_it_sorts_as_the_router(
    tiny_run: tuple[Any, Any], store: Store
) -> None:
    live, run = tiny_run

    class Sorter:
        """A latent for each direction of a few random ones: not the router's, but of the same vectors."""

        site, name, device = Site(1, "", "hook_resid_post"), "sorter", torch.device("cpu")

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :6] - x.mean(0)[:6]

    found = mlp_students(
        live, run, store, layer=1, students=("moe",), active=(4,), experts=8, inputs=("real",), steps=5, batch=32, lrs=(1e-3,),
        sae=Sorter(), progress=False,  # type: ignore[arg-type]  # duck-typed
    ).df()  # fmt: skip
    values = found.set_index("metric")["value"]
    assert 0 <= values["nmi_shuffled"] < values["nmi"] <= 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"layer": 9}, "no MLP"),
        ({"block": "attn"}, "no MLP"),
        ({"students": ("sparse",)}, "students cannot be 'sparse'"),
        ({"inputs": ()}, "inputs cannot be none"),
        ({"active": (1,)}, "do not go together"),
        ({"active": (64,), "experts": 8}, "do not go together"),
        ({"lrs": (0.0,)}, "lrs"),
        ({"steps": 0}, "steps cannot be 0"),
        ({"vectors": 3}, "vectors cannot be 3"),
        ({"activation": "tanh"}, "activation"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    options: dict[str, Any], problem: str, tiny_run: tuple[Any, Any], store: Store
) -> None:
    live, run = tiny_run
    with pytest.raises(InputError, match=problem):
        mlp_students(live, run, store, **{"layer": 1, "progress": False, **options})
    assert not store.sql("SELECT * FROM mlp_students").df().size


def test_too_few_documents_and_runs_without_tokens_are_refused(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any], store: Store
) -> None:
    module = tiny_model("llama")
    few = record_ids(module, token_ids([60, 60, 60]), name="few", probes=("tokens",))
    with pytest.raises(InputError, match="too few documents"):
        mlp_students(ms.load(module), few, store, layer=0, progress=False)
    bare = store.begin_run(name="bare")
    with pytest.raises(InputError, match="no tokens"):
        mlp_students(ms.load(module), bare, store, layer=0, progress=False)


def test_loss_that_explodes_is_told_and_nothing_is_stored(
    tiny_run: tuple[Any, Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, run = tiny_run
    plain = DenseStudent.forward
    monkeypatch.setattr(DenseStudent, "forward", lambda self, x: plain(self, x) * float("nan"))
    with pytest.raises(RunError, match="not finite"):
        mlp_students(live, run, store, layer=1, students=("dense", "mean"), active=(4,), steps=3, progress=False)
    assert not store.sql("SELECT * FROM mlp_students").df().size
    write_rows(store, {})


def test_weights_of_the_model_are_not_touched(tiny_run: tuple[Any, Any], store: Store) -> None:
    live, run = tiny_run
    before = {name: p.clone() for name, p in live.module.named_parameters()}
    mlp_students(live, run, store, layer=1, students=("dense",), active=(4,), steps=3, progress=False)
    assert all(torch.equal(before[name], p) for name, p in live.module.named_parameters())
    assert not live.module.model.layers[1].mlp._forward_hooks
