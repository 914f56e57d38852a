"""Heads taken out, against projections zeroed by hand and patterns written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import moescope as ms
from moescope.core.edit_kinds.stream import MaskHead
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.sites import Site
from moescope.probes.edits.session import edited
from moescope.probes.edits.step import Place
from moescope.probes.edits.steps.mask_head import MaskHeadStep
from moescope.probes.families.tiny import build_tiny
from moescope.probes.taps import tapped

FAMILIES = ("llama", "gpt2", "qwen3_moe", "mixtral", "deepseek_v3")
HEADS, D_HEAD = 4, 8


@pytest.fixture(params=FAMILIES)
def live(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> ms.LiveModel:
    return ms.load(tiny_model(request.param))


def some_ids(rows: int = 2, positions: int = 7) -> torch.Tensor:
    return torch.randint(1, 97, (rows, positions), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(live: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = live.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return found


def projection(live: Any, layer: int) -> Any:
    """The output projection, written out by family."""
    if hasattr(live.module, "transformer"):
        return live.module.transformer.h[layer].attn.c_proj
    return live.module.model.layers[layer].self_attn.o_proj


def attention_place(live: Any, layer: int) -> Place:
    s = next(s for s in live.anatomy.sublayers if (s.layer, s.block) == (layer, "attn"))
    return Place(live.module, live.anatomy, layer, s)


def pattern(
    live: Any, ids: torch.Tensor, layer: int, edit: MaskHead | None, *, taps_first: bool = False
) -> torch.Tensor:
    site = Site(layer, "attn", "hook_pattern")
    seen: list[torch.Tensor] = []
    contexts = [
        lambda: tapped(live.module, live.anatomy, [site], lambda _, t: seen.append(t["pattern"])),
        lambda: edited(live, Intervention([edit] if edit else [])),
    ]
    first, second = contexts if taps_first else contexts[::-1]
    with first(), second():
        logits(live, ids)
    return seen[0]


def test_zero_equals_zeroed_columns_of_the_output_projection(live: Any) -> None:
    ids, end = some_ids(), projection(live, 1)
    with edited(live, Intervention([MaskHead(layer=1, heads=(0, 2))])):
        found = logits(live, ids)
    with torch.no_grad():
        kept = end.weight.clone()
        for head in (0, 2):
            lines = slice(head * D_HEAD, (head + 1) * D_HEAD)
            if type(end).__name__ == "Conv1D":
                end.weight[lines] = 0
            else:
                end.weight[:, lines] = 0
        wanted = logits(live, ids)
        end.weight.copy_(kept)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(found, logits(live, ids), atol=1e-3)


@pytest.mark.parametrize("taps_first", [True, False])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_uniform_gives_every_visible_key_the_same_weight(live: Any, kernel: str, taps_first: bool) -> None:
    live.module.set_attn_implementation(kernel)
    ids = some_ids()
    plain = pattern(live, ids, 1, None)
    found = pattern(live, ids, 1, MaskHead(layer=1, heads=3, how="uniform"), taps_first=taps_first)
    even = torch.ones(7, 7).tril() / torch.arange(1, 8)[:, None]
    torch.testing.assert_close(found[:, 3], even.expand(2, 7, 7), atol=1e-6, rtol=1e-6)
    assert torch.equal(found[:, :3], plain[:, :3])
    assert not torch.allclose(plain[:, 3], found[:, 3], atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_uniform_puts_out_the_mean_of_the_visible_values(tiny_model: Callable[..., Any], family: str) -> None:
    live, ids = ms.load(tiny_model(family)), some_ids()
    z, v = Site(1, "attn", "hook_z"), Site(1, "attn", "hook_v")
    seen: dict[Site, torch.Tensor] = {}
    with (
        edited(live, Intervention([MaskHead(layer=1, heads=2, how="uniform")])),
        tapped(live.module, live.anatomy, [z, v], lambda s, t: seen.__setitem__(s, t[s.tensor[-1]])),
    ):
        logits(live, ids)
    head = 2 if seen[v].shape[2] == HEADS else 1  # of two key heads, the second serves heads 2 and 3
    mean = seen[v][:, :, head].cumsum(1) / torch.arange(1, 8)[:, None]
    torch.testing.assert_close(seen[z][:, :, 2], mean, atol=1e-5, rtol=1e-5)


def test_a_sink_keeps_its_own_logit() -> None:
    live, ids = ms.load(build_tiny("gpt_oss")), some_ids()
    found = pattern(live, ids, 0, MaskHead(layer=0, heads=1, how="uniform"))[:, 1]
    sink = live.module.model.layers[0].self_attn.sinks[1].exp()
    visible = torch.arange(1, 8)[:, None].clamp(max=live.module.config.sliding_window)
    last = found[0, -1]
    assert float(last.sum()) < 1
    torch.testing.assert_close(
        found.sum(-1), (visible[:, 0] / (visible[:, 0] + sink)).expand(2, 7), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", ["bloom", "gptj", "gpt_neo"])
def test_attention_of_its_own_takes_zero_and_refuses_uniform(family: str) -> None:
    live = own_attention(family)
    place = attention_place(live, 0)
    assert MaskHeadStep.why_not(MaskHead(layer=0, heads=1), place) is None
    reason = MaskHeadStep.why_not(MaskHead(layer=0, heads=1, how="uniform"), place)
    assert reason is not None
    assert "`zero` works" in reason
    ids = some_ids()
    with edited(live, Intervention([MaskHead(layer=0, heads=1)])):
        assert not torch.allclose(logits(live, ids), plain_logits(live, ids), atol=1e-4)


def plain_logits(live: Any, ids: torch.Tensor) -> torch.Tensor:
    plain = own_attention(live.module.config.model_type)
    plain.module.load_state_dict(live.module.state_dict())
    return logits(plain, ids)


def own_attention(family: str) -> Any:
    import transformers

    settings: dict[str, dict[str, Any]] = {
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    }
    config = transformers.AutoConfig.for_model(
        family, vocab_size=97, bos_token_id=1, eos_token_id=2, **settings[family]
    )
    torch.manual_seed(0)
    return ms.load(transformers.AutoModelForCausalLM.from_config(config).eval())


def test_strength_and_positions(live: Any) -> None:
    ids, site = some_ids(), Site(1, "attn", "hook_z")

    def heads(edit: MaskHead | None) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        with (
            edited(live, Intervention([edit] if edit else [])),
            tapped(live.module, live.anatomy, [site], lambda _, t: seen.append(t["z"])),
        ):
            logits(live, ids)
        return seen[0]

    plain = heads(None)
    assert torch.equal(heads(MaskHead(layer=1, heads=1, strength=0)), plain)
    half = heads(MaskHead(layer=1, heads=1, strength=0.5, positions="2:4"))
    torch.testing.assert_close(half[:, 2:4, 1], plain[:, 2:4, 1] / 2)
    half[:, 2:4, 1] = plain[:, 2:4, 1]
    assert torch.equal(half, plain)
    with edited(live, Intervention([MaskHead(layer=1, heads=1, how="uniform", strength=0)])):
        found = logits(live, ids)
    assert torch.equal(found, logits(live, ids))


def test_rows_of_a_batch_equal_the_same_alone(live: Any) -> None:
    several = [
        Intervention([MaskHead(layer=0, heads=0)]),
        Intervention([MaskHead(layer=0, heads=(1, 3), how="uniform"), MaskHead(layer=1, heads=2)]),
        Intervention(),
        Intervention([MaskHead(layer=0, heads=1, how="uniform", positions="3:")]),
    ]
    row = some_ids(1)
    with edited(live, several) as session:
        session.assign([0, 1, 2, 3])
        together = logits(live, row.expand(4, -1))
        session.assign([3, 3, 0, 2])
        again = logits(live, row.expand(4, -1))
    for number, alone in enumerate(several):
        with edited(live, alone):
            wanted = logits(live, row)[0]
        torch.testing.assert_close(together[number], wanted, atol=1e-5, rtol=1e-5)
        for place in [i for i, n in enumerate([3, 3, 0, 2]) if n == number]:
            torch.testing.assert_close(again[place], wanted, atol=1e-5, rtol=1e-5)


def test_update_changes_heads_without_new_hooks(live: Any) -> None:
    ids = some_ids()
    with edited(live, Intervention([MaskHead(layer=1, heads=0)])) as session:
        first = logits(live, ids)
        session.update(Intervention([MaskHead(layer=1, heads=(1, 2))]))
        second = logits(live, ids)
    with edited(live, Intervention([MaskHead(layer=1, heads=(1, 2))])):
        assert torch.equal(second, logits(live, ids))
    assert not torch.equal(first, second)


def test_generation_masks_generated_tokens_alone(live: Any) -> None:
    prompt = some_ids(2, 5)
    cut = [MaskHead(layer=n, heads=range(HEADS), how="uniform", positions="generated") for n in (0, 1)]
    with edited(live, Intervention(cut)), torch.no_grad():
        made = live.module.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids = prompt
    written_out = [MaskHead(layer=n, heads=range(HEADS), how="uniform", positions="5:") for n in (0, 1)]
    for _ in range(4):
        with edited(live, Intervention(written_out)):
            ids = torch.cat([ids, logits(live, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


def test_attention_functions_are_as_before_after_an_exception(live: Any) -> None:
    ids, method = some_ids(), AttentionInterface.get_interface
    before = logits(live, ids)

    def fails() -> None:
        with edited(live, Intervention([MaskHead(heads=1, how="uniform")])):
            assert "get_interface" in vars(ALL_ATTENTION_FUNCTIONS)
            logits(live, ids)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
    assert AttentionInterface.get_interface is method
    assert not any(name.startswith("_moescope") for m in live.module.modules() for name in vars(m))
    assert torch.equal(logits(live, ids), before)


@pytest.mark.parametrize(
    ("family", "make", "reason"),
    [
        ("mixtral", lambda: MaskHead(layer=0, heads=4), "heads 0 to 3"),
        ("mixtral", lambda: MaskHead(layer=0), "head"),
        ("mixtral", lambda: MaskHead(layer=0, heads=0, strength=1.5), "between 0 and 1"),
        ("jetmoe", lambda: MaskHead(layer=0, heads=0), "cannot be told apart"),
        ("doge", lambda: MaskHead(layer=0, heads=0, how="uniform"), "uneven"),
        ("inkling_text", lambda: MaskHead(layer=0, heads=0, how="uniform"), "uneven"),
        ("minimax", lambda: MaskHead(layer=1, heads=0, how="uniform"), "by itself"),
    ],
)
def test_what_cannot_be_is_refused(family: str, make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason), edited(ms.load(build_tiny(family)), Intervention([make()])):
        pass
