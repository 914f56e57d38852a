"""Which experts write a latent and which it gates: planted, by hand, and against plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.sae.data.split import held_out as split
from moescope.sae.experts.feature_experts import feature_experts

LENGTHS = [20, 14, 17, 9, 16, 12, 18, 11]


def rows_of(store: Any, metric: str, **where: Any) -> pd.DataFrame:
    frame = store.sql("SELECT * FROM feature_experts").df()
    frame = frame[frame["metric"] == metric]
    for name, value in where.items():
        frame = frame[frame[name] == value]
    return frame


def planted_directions(latents: int, width: int) -> torch.Tensor:
    drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(3))
    return torch.linalg.qr(drawn).Q[:latents].contiguous()


@pytest.fixture
def planted_writer(tiny_model: Callable[..., Any]) -> tuple[Any, torch.Tensor]:
    """A Qwen3-MoE whose expert 2 of layer 0 alone writes along the first direction, and writes nothing else."""
    module = tiny_model("qwen3_moe")
    directions = planted_directions(12, 32)
    d = directions[0]
    with torch.no_grad():
        down = module.model.layers[0].mlp.experts.down_proj  # [expert, d_model, d_expert]
        down -= torch.einsum("d,em->edm", d, torch.einsum("d,edm->em", d, down))  # nobody writes along d …
        neuron = torch.zeros(32, 16)
        neuron[:, 5] = 3.0 * d  # … but neuron 5 of expert 2
        down[2] = neuron
        # and the router of layer 1 sends what lies along d to expert 6
        router = module.model.layers[1].mlp.gate.weight
        router -= torch.outer(router @ d, d)
        router[6] += 4.0 * d
        module.model.layers[1].post_attention_layernorm.weight.fill_(1.0)
    return module, directions


def test_the_expert_that_writes_a_direction_is_found_with_its_amount(
    planted_writer: tuple[Any, torch.Tensor], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Any, plain_passes: Callable[..., Any],
) -> None:  # fmt: skip
    module, directions = planted_writer
    sequences = token_ids(LENGTHS)
    run = record_ids(module, sequences)
    autoencoder = planted_autoencoder("blocks.0.hook_mlp_out", directions, threshold=0.02)
    found = feature_experts(
        autoencoder, ms.load(module), run, store, least_active=3, draws=50, others=8, progress=False
    )
    assert found.writers == ((0, "mlp"),)
    assert found.gates == ((1, "mlp"),)
    # What expert 2 gave, from the neuron alone.
    amounts, actives = [], 0
    for batch in plain_passes(module, sequences):
        hidden, ids, weights, _ = batch.experts[0]
        experts = module.model.layers[0].mlp.experts
        width = batch.ids.shape[1]
        for row in range(len(batch.ids)):
            for position in range(1, int(batch.mask[row].sum())):
                token = row * width + position
                amount = 0.0
                for slot in range(2):
                    if int(ids[token, slot]) == 2:
                        gate, up = (experts.gate_up_proj[2] @ hidden[token]).chunk(2)
                        neuron = torch.nn.functional.silu(gate[5]) * up[5]
                        amount = float((weights[token, slot] * 3.0 * neuron).detach())
                if amount > 0.02:
                    amounts.append(amount)
                    actives += 1
    mine = rows_of(store, "writes", feature=0)
    by_expert = mine.set_index("expert")["value"]
    assert by_expert[2] == pytest.approx(np.mean(amounts), rel=1e-4)
    assert by_expert.drop(2).abs().max() < 1e-5
    assert set(mine["n"]) == {actives}
    share = rows_of(store, "writes_share", feature=0, expert=2).iloc[0]
    assert share["value"] == pytest.approx(1.0, abs=1e-4)
    excess = rows_of(store, "writes_excess", feature=0).set_index("expert")
    assert excess["value"].idxmax() == 2
    assert excess.loc[2, "ci_low"] > 0
    # Other latents' rows get next to nothing of an expert that writes along this one alone.
    assert excess.loc[2, "null_value"] < 1e-4
    gates = rows_of(store, "gates_weights", feature=0, layer=1).set_index("expert")["value"]
    assert gates.idxmax() == 6
    assert gates[6] > 5 * gates.drop(6).abs().max()
    others = gates.drop(6)
    assert others.max() - others.min() < 1e-5


def brute_force(module: Any, sequences: list[list[int]], directions: torch.Tensor, threshold: float) -> dict[str, Any]:
    """Sums over tokens, with plain hooks and plain loops, of a Qwen2-MoE's layer 0 and the router of layer 1."""
    first, second = module.model.layers[0], module.model.layers[1]
    kept: dict[str, Any] = {}
    hooks = [
        first.mlp.register_forward_hook(lambda _m, _i, out: kept.update(out=out)),
        first.mlp.experts.register_forward_pre_hook(lambda _m, given: kept.update(given=given)),
        first.mlp.shared_expert.register_forward_hook(lambda _m, _i, out: kept.update(shared=out)),
        first.mlp.shared_expert_gate.register_forward_hook(lambda _m, _i, out: kept.update(gate=out)),
        second.mlp.gate.register_forward_hook(lambda _m, given, out: kept.update(logits=out[0], router_in=given[0])),
        second.mlp.experts.register_forward_pre_hook(lambda _m, given: kept.update(second=given)),
        second.post_attention_layernorm.register_forward_hook(lambda _m, given, _o: kept.update(before=given[0])),
    ]
    tokens: list[dict[str, Any]] = []
    try:
        for ids in sequences:
            with torch.no_grad():
                module(torch.tensor([ids]))
            hidden, chosen, weights = kept["given"]
            for t in range(1, len(ids)):
                out = kept["out"].reshape(-1, 32)[t]
                token: dict[str, Any] = {"on": (directions @ out > threshold).numpy(), "writes": {}, "block": out}
                for expert, weight in zip(chosen[t].tolist(), weights[t], strict=True):
                    gate, up = (first.mlp.experts.gate_up_proj[expert] @ hidden[t]).chunk(2)
                    given = first.mlp.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                    token["writes"][expert] = (directions @ (weight * given)).detach().numpy()
                shared = torch.sigmoid(kept["gate"].reshape(-1)[t]) * kept["shared"].reshape(-1, 32)[t]
                token["writes"][-1] = (directions @ shared).detach().numpy()
                logits = kept["logits"][t]
                token["logits"] = (logits - logits.mean()).detach().numpy()
                token["second"] = set(kept["second"][1][t].tolist())
                token["scale"] = float(1 / (kept["before"].reshape(-1, 32)[t].square().mean() + 1e-6).sqrt())
                tokens.append(token)
    finally:
        for hook in hooks:
            hook.remove()
    return {"tokens": tokens}


def test_numbers_are_those_of_plain_loops(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module = tiny_model("qwen2_moe", seed=1)
    directions = planted_directions(6, 32)
    sequences = token_ids(LENGTHS)
    run = record_ids(module, sequences)
    autoencoder = planted_autoencoder("blocks.0.hook_mlp_out", 2.0 * directions, encoder=directions.T, threshold=0.1)
    feature_experts(
        autoencoder, ms.load(module), run, store, least_active=2, draws=20, encoder=True, batch_size=3, progress=False
    )
    tokens = brute_force(module, sequences, directions, 0.1)["tokens"]
    second = module.model.layers[1]
    router, norm = second.mlp.gate.weight.detach(), second.post_attention_layernorm.weight.detach()
    scale = np.mean([token["scale"] for token in tokens])
    compared = 0
    for f in range(6):
        on = [token for token in tokens if token["on"][f]]
        off = [token for token in tokens if not token["on"][f]]
        if len(on) < 2 or not off:
            continue
        block = sum(float(directions[f] @ token["block"]) for token in on)
        for expert in [*range(6), -1]:

            def written(part: list[dict[str, Any]], expert: int = expert, f: int = f) -> float:
                return sum(float(t["writes"][expert][f]) for t in part if expert in t["writes"])

            expected = {
                "writes": written(on) / len(on),
                "writes_encoder": written(on) / len(on),
                "writes_excess": written(on) / len(on) - written(off) / len(off),
            }
            if chose := sum(expert in t["writes"] for t in on):
                expected["writes_chosen"] = written(on) / chose
            if block > 0:
                expected["writes_share"] = written(on) / block
            for metric, value in expected.items():
                row = rows_of(store, metric, feature=f, expert=expert)
                assert len(row) == 1
                assert row.iloc[0]["value"] == pytest.approx(value, rel=1e-3, abs=1e-5), (metric, f, expert)
                compared += 1
        for expert in range(6):
            moved = np.mean([t["logits"][expert] for t in on]) - np.mean([t["logits"][expert] for t in off])
            both = np.mean([expert in t["second"] for t in on])
            ever = np.mean([expert in t["second"] for t in tokens])
            by_weight = float((router[expert] - router.mean(0)) * norm @ (2.0 * directions[f])) * scale
            checks = {"gates_logit": moved, "gates_weights": by_weight} | ({"gates_lift": both / ever} if ever else {})
            for metric, value in checks.items():
                row = rows_of(store, metric, feature=f, expert=expert, layer=1)
                assert row.iloc[0]["value"] == pytest.approx(value, rel=1e-3, abs=1e-5), (metric, f, expert)
    assert compared > 60


def test_contributions_of_all_experts_sum_to_what_the_block_writes(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module = tiny_model("deepseek_v3")
    run = record_ids(module, token_ids(LENGTHS))
    autoencoder = planted_autoencoder("blocks.1.hook_mlp_out", planted_directions(8, 32), threshold=0.1)
    feature_experts(autoencoder, ms.load(module), run, store, least_active=2, draws=20, progress=False)
    shares = rows_of(store, "writes_share", layer=1).groupby("feature")["value"].sum()
    assert len(shares) >= 4
    assert np.allclose(shares, 1.0, atol=1e-4)
    assert -1 in set(rows_of(store, "writes_share")["expert"])


def test_latents_of_a_blocks_input_reach_its_router_without_a_norm_between(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module = tiny_model("mixtral")
    run = record_ids(module, token_ids(LENGTHS))
    directions = planted_directions(6, 32)
    autoencoder = planted_autoencoder("blocks.1.mlp.hook_in", 3.0 * directions, encoder=directions.T, threshold=0.3)
    found = feature_experts(autoencoder, ms.load(module), run, store, least_active=2, draws=20, progress=False)
    assert (found.writers, found.gates) == ((), ((1, "mlp"),))
    router = module.model.layers[1].mlp.gate.weight.detach()
    expected = (router - router.mean(0)) @ (3.0 * directions).T
    rows = rows_of(store, "gates_weights")
    assert len(rows) >= 4 * 4
    for row in rows.itertuples():
        assert row.value == pytest.approx(float(expected[row.expert, row.feature]), rel=1e-4, abs=1e-5)


def test_null_of_latents_that_no_expert_favours_is_as_large_as_what_they_get(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module = tiny_model("mixtral")
    run = record_ids(module, token_ids([24] * 10))
    # Activity that has nothing to do with what is written: latents of the stream before, decoded along other directions.
    decoder = planted_directions(30, 32)
    encoder = torch.randn(32, 30, generator=torch.Generator().manual_seed(11))
    autoencoder = planted_autoencoder(
        "blocks.0.hook_resid_pre", decoder, encoder=encoder, threshold=1.0, target="blocks.0.hook_mlp_out"
    )
    feature_experts(autoencoder, ms.load(module), run, store, least_active=5, draws=20, others=20, progress=False)
    p = rows_of(store, "writes_excess_p")["value"]
    assert len(p) > 60
    assert 0.3 < p.mean() < 0.7
    assert (p < 0.1).mean() < 0.25


def test_slots_of_experts_are_followed_one_by_one(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Any, plain_passes: Callable[..., Any],
) -> None:  # fmt: skip
    module = tiny_model("mixtral")
    sequences = token_ids(LENGTHS)
    run = record_ids(module, sequences)
    directions = planted_directions(4, 32)
    autoencoder = planted_autoencoder("blocks.1.mlp.experts.hook_out", directions, threshold=0.05)
    feature_experts(autoencoder, ms.load(module), run, store, least_active=2, draws=20, skip_first=0, progress=False)
    experts = module.model.layers[1].mlp.experts
    values: dict[int, list[float]] = {}
    for batch in plain_passes(module, sequences):
        hidden, ids, _, _ = batch.experts[1]
        for token in np.flatnonzero(batch.mask.reshape(-1).numpy()):
            for expert in ids[token].tolist():
                gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                out = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                if (amount := float((directions[0] @ out).detach())) > 0.05:
                    values.setdefault(expert, []).append(amount)
    found = rows_of(store, "writes_chosen", feature=0).set_index("expert")
    for expert, given in values.items():
        assert found.loc[expert, "value"] == pytest.approx(np.mean(given), rel=1e-4)
        assert found.loc[expert, "n"] == len(given)


def test_measuring_again_takes_the_place_of_what_was_there(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module = tiny_model("mixtral")
    run = record_ids(module, token_ids(LENGTHS))
    autoencoder = planted_autoencoder("blocks.0.hook_resid_post", planted_directions(8, 32), threshold=0.1)
    for _ in range(2):
        found = feature_experts(
            autoencoder, ms.load(module), run, store, least_active=2, draws=20, seed=4, progress=False
        )
        stored = store.fetch("SELECT count(*) FROM feature_experts")[0][0]
        assert stored == found.rows > 0


def test_documents_it_was_trained_on_are_left_out(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module = tiny_model("mixtral")
    run = record_ids(module, token_ids([12] * 40))
    directions = planted_directions(8, 32)
    told = {"held_out_share": 0.4}
    autoencoder = planted_autoencoder(
        "blocks.0.hook_resid_post", directions, threshold=0.1, trained_on=run.run_id, settings=told
    )
    options = {"least_active": 2, "draws": 20, "progress": False}
    held_out = feature_experts(autoencoder, ms.load(module), run, store, **options)
    everything = feature_experts(autoencoder, ms.load(module), run, store, documents="all", **options)
    assert held_out.documents == int(split(list(range(40)), share=0.4).sum()) < everything.documents == 40
    assert any("left out" in note for note in held_out.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": [99]}, "no such latents"),
        ({"layers": [9]}, "layer 9 has no router"),
        ({"least_active": 100_000}, "no latent of"),
        ({"top": 0}, "are 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    change: dict[str, Any], message: str, tiny_model: Callable[..., Any], record_ids: Callable[..., Any],
    token_ids: Callable[..., Any], planted_autoencoder: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module = tiny_model("mixtral")
    run = record_ids(module, token_ids([9, 9]))
    autoencoder = planted_autoencoder("blocks.0.hook_resid_post", planted_directions(8, 32))
    with pytest.raises(InputError, match=message):
        feature_experts(autoencoder, ms.load(module), run, store, progress=False, **change)


@pytest.mark.parametrize(
    ("site", "expert", "width", "message"),
    [
        ("blocks.0.hook_resid_post", 3, 32, "of expert 3 alone"),
        ("blocks.0.hook_resid_post", None, 16, "does not write into the stream"),
        ("blocks.0.attn.hook_q", None, 32, "no expert writes into"),
    ],
)
def test_autoencoder_that_experts_do_not_write_is_refused(
    site: str, expert: int | None, width: int, message: str, tiny_model: Callable[..., Any],
    record_ids: Callable[..., Any], token_ids: Callable[..., Any], planted_autoencoder: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module = tiny_model("mixtral")
    run = record_ids(module, token_ids([9, 9]))
    autoencoder = planted_autoencoder(site, planted_directions(4, width), expert=expert)
    with pytest.raises(InputError, match=message):
        feature_experts(autoencoder, ms.load(module), run, store, progress=False)


def test_dense_model_is_refused(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module = tiny_model("llama")
    run = record_ids(module, token_ids([9, 9]))
    autoencoder = planted_autoencoder("blocks.0.hook_resid_post", planted_directions(4, 32))
    with pytest.raises(InputError, match="has no experts"):
        feature_experts(autoencoder, ms.load(module), run, store, progress=False)
