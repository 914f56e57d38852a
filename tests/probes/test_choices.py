"""What a recording is asked for: read in any spelling, checked before anything runs, kept in the run's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import moescope as ms
from moescope.probes.choices import longest

LENGTHS = (7, 3, 12)


@pytest.fixture
def recorded(tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]) -> Any:
    return lambda **options: record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS), **options)


def test_sites_bring_the_probe_of_vectors_and_one_site_in_two_spellings_is_one(recorded: Any) -> None:
    run = recorded(sites=["model.layers.1.mlp.gate", "blocks.1.mlp.hook_router_logits", "resid_post0"], generate=2)
    assert run.status == "complete"
    settings = run.info["settings"]
    assert settings["sites"] == ["blocks.1.mlp.hook_router_logits", "blocks.0.hook_resid_post"]
    assert settings["sample"] == 1.0
    assert "activations" in settings["probes"]
    rows = dict(run.store.fetch("SELECT site, sum(rows)::INTEGER FROM activations GROUP BY site"))
    assert rows == dict.fromkeys(settings["sites"], sum(LENGTHS) + 2 * len(LENGTHS))


def test_a_sample_takes_its_share_and_another_seed_takes_others(recorded: Any) -> None:
    counts = [
        recorded(sites=["resid_post0"], sample=0.5, seed=seed, name=f"{seed}").store.fetch(
            "SELECT sum(rows) FROM activations WHERE run_id = (SELECT run_id FROM runs WHERE name = ?)", [str(seed)]
        )[0][0]
        for seed in range(4)
    ]
    assert all(0 < count < sum(LENGTHS) for count in counts)


@pytest.mark.parametrize("sample", [0, -0.1, 1.01, float("nan")])
def test_a_sample_is_a_share(sample: float, recorded: Any, store: Any) -> None:
    with pytest.raises(ms.InputError, match="share of the tokens"):
        recorded(sites=["resid_post0"], sample=sample)
    assert store.runs() == []


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("blocks.0.hook_resid_pst", "resid_post"),
        ("blocks.7.hook_resid_post", "layers 0 to 1"),
        ("nonsense", "is not a site"),
    ],
)
def test_a_site_that_the_model_does_not_have_is_refused_with_what_it_has(
    site: str, words: str, recorded: Any, store: Any
) -> None:
    with pytest.raises(ms.InputError, match=words):
        recorded(sites=[site])
    assert store.runs() == []


def test_vectors_without_a_site_are_refused(recorded: Any, store: Any) -> None:
    with pytest.raises(ms.InputError, match="none was named"):
        recorded(probes=("activations",))
    assert store.runs() == []


def test_prompts_are_cut_to_what_the_answer_leaves(tiny_model: Callable[..., Any]) -> None:
    model = ms.load(tiny_model("llama"))  # a context of 64
    assert [longest(model, n, 0) for n in (10, 64, 512)] == [10, 64, 64]
    assert [longest(model, n, 30) for n in (10, 64, 512)] == [10, 34, 34]
    with pytest.raises(ms.InputError, match="at most 62 tokens"):
        longest(model, 10, 63)
