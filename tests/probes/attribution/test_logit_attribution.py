"""Logits taken apart: the identity, and every part against sums written out on plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.edit_kinds.experts import Ablate
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.attribution.logit_attribution import logit_attribution
from moescope.probes.edits.session import edited
from moescope.probes.families.tiny import build_tiny

IDENTITY = 1e-4  # largest error of the sum, in float32


def some_ids(n: int = 11) -> list[int]:
    found: list[int] = torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(1)).tolist()
    return found


def plain_logits(module: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return found


def check_identity(frame: Any, logits: torch.Tensor, limit: float = IDENTITY) -> None:
    """Parts sum to the model's logit, and `residual` is what is missing."""
    groups = list(frame.groupby(["position", "target_id"]))
    assert groups
    for (position, target), rows in groups:
        wanted = float(logits[position, target])
        assert rows.logit.iloc[0] == pytest.approx(wanted, abs=1e-6)
        assert abs(rows.value.sum() - wanted) < limit
        assert rows.value.sum() + rows.residual.iloc[0] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("heads", [False, True])
def test_parts_sum_to_the_logits_of_the_demo_model(demo_model: Any, heads: bool) -> None:
    ids = demo_model.tokenizer("The cat sat on the mat, and the dog looked at it.")["input_ids"]
    result = logit_attribution(demo_model, ids, targets="next", positions="all", heads=heads)
    frame = result.df()
    check_identity(frame, plain_logits(demo_model.module, ids))
    assert result.n == len(ids) - 1
    assert set(frame.component) == {"embedding", "expert", "head" if heads else "attn"}
    assert len(frame[frame.component == "expert"]) == (len(ids) - 1) * 6 * 2  # layers, slots


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe", "qwen2_moe", "llama", "gpt2"])
def test_parts_sum_to_the_logits(tiny_model: Callable[..., Any], family: str, heads: bool) -> None:
    module, ids = tiny_model(family), some_ids()
    frame = logit_attribution(ms.load(module), ids, targets=[5, 90], positions="all", heads=heads).df()
    check_identity(frame, plain_logits(module, ids))


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
@torch.no_grad()
def test_parts_equal_sums_written_out(
    tiny_model: Callable[..., Any], plain_passes: Any, family: str, experts: str
) -> None:
    module, ids, target = tiny_model(family, experts=experts), some_ids(), 17
    frame = logit_attribution(ms.load(module), ids, targets=[target], positions="all").df()
    if family == "deepseek_v3":  # its first block has no experts, and the others shared ones
        moe_layers, passes = (1, 2), plain_passes_of_experts(module, ids)
    else:
        moe_layers, passes = (0, 1), plain_passes(module, [ids])[0].experts
    stream = module.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    for position in range(len(ids)):
        last = last_stream(module, ids)[position]
        norm = module.model.norm
        reads = (
            module.lm_head.weight[target].detach()
            * norm.weight.detach()
            / (last.square().mean() + norm.variance_epsilon).sqrt()
        )
        rows = frame[frame.position == position]
        found = rows[rows.component == "embedding"].value.item()
        assert found == pytest.approx(float(reads @ stream[0][0, position]), abs=1e-4)
        for layer in moe_layers:
            hidden, chosen, weights, _ = (t[position] for t in passes[layer])
            for expert, weight in zip(chosen.tolist(), weights.tolist(), strict=True):
                out = plain_expert(module.model.layers[layer].mlp.experts, expert, hidden)
                here = rows[(rows.component == "expert") & (rows.layer == layer) & (rows.expert == expert)]
                assert here.value.item() == pytest.approx(weight * float(reads @ out), abs=1e-4)
            if family == "deepseek_v3":
                shared = float(reads @ module.model.layers[layer].mlp.shared_experts(hidden))
                here = rows[(rows.component == "shared") & (rows.layer == layer)]
                assert here.value.item() == pytest.approx(shared, abs=1e-4)


def plain_expert(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    gate, up = (experts.gate_up_proj[expert] @ hidden).chunk(2)
    found: torch.Tensor = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
    return found


def plain_passes_of_experts(module: Any, ids: list[int]) -> dict[int, tuple[torch.Tensor, ...]]:
    seen: dict[int, tuple[torch.Tensor, ...]] = {}
    handles = [
        module.model.layers[n].mlp.experts.register_forward_pre_hook(
            lambda _m, given, n=n: seen.__setitem__(n, tuple(t.clone() for t in (*given, given[0])))
        )
        for n in (1, 2)
    ]
    plain_logits(module, ids)
    for handle in handles:
        handle.remove()
    return seen


def last_stream(module: Any, ids: list[int]) -> torch.Tensor:
    """What the last block hands on."""
    seen: list[torch.Tensor] = []
    handle = module.model.layers[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    plain_logits(module, ids)
    handle.remove()
    return seen[0][0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3"])
def test_heads_make_up_attention_and_equal_their_columns(tiny_model: Callable[..., Any], family: str) -> None:
    module, ids = tiny_model(family), some_ids()
    live = ms.load(module)
    whole = logit_attribution(live, ids, positions="all").df()
    parts = logit_attribution(live, ids, positions="all", heads=True).df()
    assert set(parts["head"].dropna()) == {0, 1, 2, 3}
    for (position, layer), rows in whole[whole.component == "attn"].groupby(["position", "layer"]):
        here = parts[
            (parts.position == position) & (parts.layer == layer) & parts.component.isin(["head", "attn bias"])
        ]
        assert here.value.sum() == pytest.approx(rows.value.sum(), abs=1e-5)
    assert bool(parts.component.isin(["attn bias"]).any()) is (family == "gpt2")


def test_a_planted_expert_is_found_with_its_weight(tiny_model: Callable[..., Any]) -> None:
    """One expert writes 50 times a token's unembedding row; nothing else in the last block writes."""
    module, ids, target = tiny_model("mixtral"), some_ids(), 33
    last = module.model.layers[-1]
    with torch.no_grad():
        last.self_attn.o_proj.weight.zero_()
        last.mlp.experts.down_proj.zero_()
        row = module.lm_head.weight[target]
        last.mlp.experts.down_proj[2] = 50 * torch.outer(row, torch.ones(24))
    frame = logit_attribution(ms.load(module), ids, targets=[target], positions="all").df()
    here = frame[(frame.component == "expert") & (frame.layer == 1)]
    assert here[here.expert == 2].value.abs().min() > 0
    assert (here[here.expert != 2].value == 0).all()
    assert (frame[(frame.component == "attn") & (frame.layer == 1)].value == 0).all()


def test_null_is_the_mean_over_the_vocabulary(tiny_model: Callable[..., Any]) -> None:
    live, ids = ms.load(tiny_model("qwen3_moe")), some_ids()
    frame = logit_attribution(live, ids, targets=range(97), positions=[4, -1]).df()
    assert set(frame.position) == {4, 10}
    keys = ["position", "component", "layer", "expert"]
    for _, rows in frame.groupby(keys, dropna=False):
        assert rows.value.mean() == pytest.approx(rows.null.iloc[0], abs=1e-9)


def test_versus_is_the_difference_of_two_logits(tiny_model: Callable[..., Any]) -> None:
    live, ids = ms.load(tiny_model("gpt2")), some_ids()
    each = logit_attribution(live, ids, targets=[4, 9]).df()
    lead = logit_attribution(live, ids, targets=[4], versus=9).df()
    keys = ["component", "layer", "block"]
    first, second = (each[each.target_id == t].set_index(keys).value for t in (4, 9))
    assert (first - second).reindex(lead.set_index(keys).index).to_numpy() == pytest.approx(lead.value.to_numpy())
    assert (lead.null == 0).all()
    last = plain_logits(live.module, ids)[-1]
    assert lead.logit[0] == pytest.approx(float(last[4] - last[9]))


def small(family: str, **settings: Any) -> Any:
    import transformers

    common = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    config = transformers.AutoConfig.for_model(family, **common, **settings)
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return module


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.3, "embedding_multiplier": 2.0}),
        ("cohere", {"logit_scale": 0.25}),  # a layer norm, and attention beside the MLP
        ("phi", {}),  # biases everywhere, also in the unembedding
        ("gemma3_text", {}),  # norms after attention and MLP, gains 1 + weight
        ("stablelm", {}),
    ],
)
def test_factors_biases_and_norms_behind_sublayers(family: str, settings: dict[str, Any], heads: bool) -> None:
    module, ids = small(family, **settings), some_ids()
    frame = logit_attribution(ms.load(module), ids, targets=[7, 8], positions="all", heads=heads).df()
    check_identity(frame, plain_logits(module, ids))
    if heads:
        assert frame["head"].notna().any()
    if family == "phi":
        assert {"final norm bias", "unembedding bias"} <= set(frame.component)


def test_a_soft_cap_is_said_and_the_logits_before_it_are_taken_apart() -> None:
    module, ids = small("gemma2", final_logit_softcapping=5.0), some_ids()
    result = logit_attribution(ms.load(module), ids, targets=[7, 8], positions="all")
    capped = plain_logits(module, ids)
    before = 5.0 * torch.atanh(capped.double() / 5.0)
    check_rows = result.df().groupby(["position", "target_id"])
    for (position, target), rows in check_rows:
        assert rows.value.sum() == pytest.approx(float(before[position, target]), abs=1e-3)
    assert any("soft cap" in note for note in result.notes)


@pytest.mark.parametrize(
    "family", ["flex_olmo", "granitemoeshared", "gpt_oss", "nemotron_h", "longcat_flash", "cohere2_moe", "phimoe"]
)
def test_families_with_norms_factors_latent_widths_and_null_experts(family: str) -> None:
    module, ids = build_tiny(family), some_ids()
    frame = logit_attribution(ms.load(module), ids, positions="all", heads=True).df()
    check_identity(frame, plain_logits(module, ids))
    assert (frame.component == "expert").any()


@pytest.mark.parametrize("family", ["llama4_text", "axk1", "jetmoe"])
def test_where_experts_cannot_be_told_apart_it_says_so_and_sums_all_the_same(family: str) -> None:
    module, ids = build_tiny(family), some_ids()
    result = logit_attribution(ms.load(module), ids, positions="all")
    check_identity(result.df(), plain_logits(module, ids))
    assert not (result.df().component == "expert").any()
    assert any("not told apart" in note for note in result.notes)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("zaya", "something else with the residual stream"),
        ("gemma4_text", "something else with the residual stream"),
        ("deepseek_v4", "several residual streams"),
        ("switch_transformers", "encoder-decoder"),
    ],
)
def test_models_whose_logits_are_no_sum_of_parts_are_refused(family: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        logit_attribution(ms.load(build_tiny(family)), some_ids())


def test_bfloat16_reports_what_rounding_leaves(tiny_model: Callable[..., Any]) -> None:
    module, ids = tiny_model("qwen3_moe", dtype="bfloat16"), some_ids()
    frame = logit_attribution(ms.load(module), ids, positions="all").df()
    rounding = frame.residual.abs().max()
    assert 1e-4 < rounding < 0.05 * frame.logit.abs().max()
    check_identity(frame, plain_logits(module, ids), limit=rounding + 1e-9)


def test_an_ablated_expert_adds_nothing(tiny_model: Callable[..., Any]) -> None:
    live, ids = ms.load(tiny_model("mixtral")), some_ids()
    with edited(live, Intervention([Ablate(layer=1, experts=[0, 2])])):
        frame = logit_attribution(live, ids, targets=[5], positions="all").df()
        with torch.no_grad():
            logits = live.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    check_identity(frame, logits)
    here = frame[(frame.component == "expert") & (frame.layer == 1)]
    gone = here.expert.isin([0, 2])
    assert gone.any()
    assert (here[gone].value == 0).all()
    assert (here[~gone].value != 0).all()


def test_it_can_be_drawn_saved_and_read(demo_model: Any, tmp_path: Any) -> None:
    result = logit_attribution(demo_model, "The cat sat on the", positions=[-1], heads=True)
    figure = result.figure()
    bars = [x for trace in figure.data if trace.type == "bar" for x in trace.x]
    largest = result.df().value.abs().max()
    assert max(map(abs, bars)) == pytest.approx(largest)
    assert result.save(tmp_path / "logit.html").stat().st_size > 1000
    assert "not what causes it" in result.notes[0]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"positions": [11]}, "no such position"),
        ({"positions": []}, "no such position"),
        ({"positions": "first"}, "positions cannot be"),
        ({"targets": "best"}, "targets cannot be"),
        ({"targets": [97]}, "no such token"),
        ({"targets": []}, "no such token"),
        ({"versus": -1}, "no such token"),
    ],
)
def test_what_is_not_there_is_refused(tiny_model: Callable[..., Any], options: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        logit_attribution(ms.load(tiny_model("llama")), some_ids(), **options)


@pytest.mark.parametrize(
    ("text", "problem"),
    [([], "no text"), ([97], "no text"), ([3] * 65, "longer than"), ("words", "no tokenizer")],
)
def test_what_is_no_text_is_refused(tiny_model: Callable[..., Any], text: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        logit_attribution(ms.load(tiny_model("llama")), text)


def test_the_next_token_needs_two(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="no position"):
        logit_attribution(ms.load(tiny_model("llama")), [5], targets="next")


@pytest.mark.slow
def test_parts_sum_to_the_logits_of_smollm2(smollm2: Any) -> None:
    ids = smollm2.tokenizer("The capital of France is")["input_ids"]
    result = logit_attribution(smollm2, ids, heads=True)
    check_identity(result.df(), plain_logits(smollm2.module, ids))
    assert result.df().target[0].strip() == "Paris"
