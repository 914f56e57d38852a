"""Dose-response on a model whose logits are known: no norm at its end, a planted decoder row, and what it must move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
import moescope.edits as e
from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.probes.edits.session import edited
from moescope.sae.steering.dose import dose_response
from moescope.sae.steering.targets import LatentTarget, ProbeTarget, TokenTarget

WIDTH, TOKEN = 32, 41
SITE = Site(1, "", "hook_resid_post")


class Planted:
    """ReLU latents; latent 3's decoder row is the unembedding row of a token, all others are random, of other lengths."""

    def __init__(self, unembedding: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        self.site, self.target_site, self.expert, self.name, self.sae_id = SITE, None, None, "planted", None
        self.decoder = torch.randn(20, WIDTH, generator=generator) * torch.linspace(0.5, 3, 20)[:, None]
        self.decoder[3] = unembedding[TOKEN]
        self.encoder = torch.randn(WIDTH, 20, generator=generator)
        self.d_in, self.d_sae, self.device = WIDTH, 20, torch.device("cpu")

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ self.encoder).relu()

    def decode(self, activations: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        return activations @ self.decoder


@pytest.fixture
def planted(tiny_model: Callable[..., Any], tmp_path: Path) -> Any:
    module = tiny_model("llama")
    module.model.norm = torch.nn.Identity()
    model = ms.load(module)
    sae = Planted(module.lm_head.weight.detach())
    ids = torch.randint(1, 97, (6, 9), generator=torch.Generator().manual_seed(4))
    corpus = ms.Corpus.from_token_ids(ids.tolist())
    edit = e.Intervention(e.Latents(layer=1, sae="planted", latents=[3], values=[2.0]), name="planted")
    with ms.Store(tmp_path / "runs.duckdb") as store:
        yield SimpleNamespace(model=model, module=module, sae=sae, ids=ids, corpus=corpus, edit=edit, store=store)


def stored(planted: Any, sweep: str, metric: str, kind: str = "target") -> dict[float, list[float]]:
    """Strength → values."""
    query = """
        SELECT intervention ->> '$.name', value
        FROM effects
        WHERE sweep_id = ? AND metric = ? AND kind = ?
        ORDER BY effect_id, draw
    """
    found: dict[float, list[float]] = {}
    for name, value in planted.store.fetch(query, [sweep, metric, kind]):
        found.setdefault(float(name.rpartition(" × ")[2].split()[0]), []).append(value)
    return found


def test_a_planted_direction_moves_its_logit_by_the_computed_amount(planted: Any) -> None:
    row = planted.sae.decoder[3]
    with torch.no_grad():
        plain = planted.module(input_ids=planted.ids).logits
        for strength in (-1.0, 0.5, 3.0):
            cut = planted.edit.with_strength(strength)
            with edited(planted.model, cut, sources={"planted": planted.sae}):
                found = planted.module(input_ids=planted.ids).logits
            wanted = plain + strength * 2.0 * (planted.module.lm_head.weight @ row)
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
        with edited(planted.model, planted.edit.with_strength(0), sources={"planted": planted.sae}):
            assert torch.equal(planted.module(input_ids=planted.ids).logits, plain)


def test_the_norm_at_a_model_s_end_is_all_that_stands_between(tiny_model: Callable[..., Any]) -> None:
    module = tiny_model("llama")
    model, sae = ms.load(module), Planted(module.lm_head.weight.detach())
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(4))
    cut = e.Intervention(e.Latents(layer=1, sae="planted", latents=[3], how="set", values=[5.0]))
    last: list[torch.Tensor] = []
    handle = module.model.norm.register_forward_pre_hook(lambda _, given: last.append(given[0].clone()))
    with torch.no_grad():
        module(input_ids=ids)
        handle.remove()
        moved = last[0] + (5.0 - sae.encode(last[0])[..., 3:4]) * sae.decoder[3]
        wanted = module.lm_head(module.model.norm(moved))
        with edited(model, cut, sources={"planted": sae}):
            found = module(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_stored_dose_response_holds_the_computed_amounts(planted: Any) -> None:
    target = TokenTarget(planted.model, TOKEN, measure="logit")
    found = dose_response(
        planted.model, planted.edit, planted.corpus, planted.store, target=target, strengths=[0, 1, 2], controls=3,
        sources={"planted": planted.sae}, progress=False,
    )  # fmt: skip
    per_unit = 2.0 * float(planted.sae.decoder[3] @ planted.sae.decoder[3])
    values = stored(planted, found.sweep_id, "delta_target_logit")
    assert {s: v[0] for s, v in values.items()} == pytest.approx({0: 0.0, 1: per_unit, 2: 2 * per_unit}, rel=1e-4)
    assert stored(planted, found.sweep_id, "kl")[0.0] == [0.0]
    # A control writes a vector of the same length in another latent's direction.
    controls = stored(planted, found.sweep_id, "delta_target_logit", "control")
    assert len(controls[1.0]) == found.controls == 3
    rows = planted.sae.decoder
    length = 2.0 * float(rows[3].norm())
    possible = [length * float(rows[i] @ rows[3] / rows[i].norm()) for i in range(20) if i != 3]
    for value in controls[1.0]:
        assert min(abs(value - one) for one in possible) < 1e-3
        assert abs(value) < 0.9 * per_unit
    again = dose_response(
        planted.model, planted.edit, planted.corpus, planted.store, target=target, strengths=[2, 1, 0], controls=3,
        sources={"planted": planted.sae}, progress=False,
    )  # fmt: skip
    assert again.sweep_id == found.sweep_id
    assert planted.store.fetch("SELECT count(DISTINCT effect_id) FROM effects") == [(3,)]


def test_log_probabilities_kl_and_nll_are_those_of_plain_passes(planted: Any) -> None:
    target = TokenTarget(planted.model, [TOKEN, 7])
    found = dose_response(
        planted.model, planted.edit, planted.corpus, planted.store, target=target, strengths=[1.5], controls=0,
        sources={"planted": planted.sae}, progress=False,
    )  # fmt: skip
    with torch.no_grad():
        plain = planted.module(input_ids=planted.ids).logits
        cut = planted.edit.with_strength(1.5)
        with edited(planted.model, cut, sources={"planted": planted.sae}):
            moved = planted.module(input_ids=planted.ids).logits
    p, q = (x[:, :-1].double().log_softmax(-1) for x in (plain, moved))
    following = planted.ids[:, 1:, None]
    wanted = {
        "delta_target_logprob": (q[..., [TOKEN, 7]].logsumexp(-1) - p[..., [TOKEN, 7]].logsumexp(-1)).mean(),
        "delta_nll": (p.gather(-1, following) - q.gather(-1, following)).mean(),
        "kl": (p.exp() * (p - q)).sum(-1).mean(),
        "base_target_logprob": p[..., [TOKEN, 7]].logsumexp(-1).mean(),
    }
    for metric, value in wanted.items():
        assert stored(planted, found.sweep_id, metric)[1.5][0] == pytest.approx(float(value), rel=1e-4, abs=1e-6), (
            metric
        )


def test_latents_and_probes_are_targets_where_they_read(planted: Any) -> None:
    probe = ProbeTarget(SITE, planted.sae.decoder[3], bias=-0.5, name="planted")
    with torch.no_grad():
        seen: list[torch.Tensor] = []
        handle = planted.module.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
        planted.module(input_ids=planted.ids)
        handle.remove()
    after = seen[0] + 2.0 * planted.sae.decoder[3]
    codes = [planted.sae.encode(x)[:, 1:, 3].mean() for x in (seen[0], after)]
    answers = [torch.sigmoid(x @ planted.sae.decoder[3] - 0.5)[:, 1:].mean() for x in (seen[0], after)]
    for target, metric, (low, high) in (
        (LatentTarget(planted.sae, 3), "delta_target_activation", codes),
        (probe, "delta_target_probability", answers),
    ):
        found = dose_response(
            planted.model, planted.edit, planted.corpus, planted.store, target=target, strengths=[1], controls=0,
            sources={"planted": planted.sae}, progress=False,
        )  # fmt: skip
        assert stored(planted, found.sweep_id, metric)[1.0][0] == pytest.approx(float(high - low), rel=1e-4)


def test_random_directions_stand_beside_a_vector(planted: Any) -> None:
    vector = 1.5 * planted.sae.decoder[3]
    edit = e.Intervention(e.Add(layer=1, vector=vector.tolist()), name="vector")
    found = dose_response(
        planted.model, edit, planted.corpus, planted.store, target=TokenTarget(planted.model, TOKEN), strengths=[1],
        controls=2, progress=False,
    )  # fmt: skip
    query = "SELECT intervention::VARCHAR FROM effects WHERE sweep_id = ? AND metric = 'kl' AND kind = 'control'"
    controls = [e.Intervention.from_json(text) for (text,) in planted.store.fetch(query, [found.sweep_id])]
    norms = [np.linalg.norm(control.edits[0].vector) for control in controls]  # type: ignore[attr-defined]  # vectors
    assert norms == pytest.approx([float(vector.norm())] * 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"strengths": []}, "strengths"),
        ({"controls": -1}, "counts"),
        ({"intervention": e.Intervention()}, "0 edits"),
        ({"sources": {}}, "not among the given ones"),
        ({"base": "nobody"}, "nobody"),
        ({"strengths": [1.5], "intervention": e.Intervention(e.Splice(layer=1, sae="planted"))}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_nothing_stored(planted: Any, change: dict[str, Any], said: str) -> None:
    asked = {"intervention": planted.edit, "sources": {"planted": planted.sae}, "progress": False, **change}
    with pytest.raises(InputError, match=said):
        dose_response(
            planted.model, asked.pop("intervention"), planted.corpus, planted.store,
            target=TokenTarget(planted.model, TOKEN), **asked,
        )  # fmt: skip
    assert planted.store.fetch("SELECT count(*) FROM effects") == [(0,)]


def test_targets_that_are_none_are_refused(planted: Any) -> None:
    with pytest.raises(InputError, match="no token 97"):
        TokenTarget(planted.model, 97)
    with pytest.raises(InputError, match="no tokenizer"):
        TokenTarget(planted.model, " Python")
    with pytest.raises(InputError, match="no latent 20"):
        LatentTarget(planted.sae, 20)
    with pytest.raises(InputError, match="tokens"):
        TokenTarget(ms.load("demo"), "a sentence of several tokens")
