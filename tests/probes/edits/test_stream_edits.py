"""Edits of the stream against the same changes made by hand on plain transformers models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moescope as ms
from moescope.core.edit_kinds.stream import Add, Clamp, MaskHead, ProjectOut, SetChannel, Skip
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.sites import Site
from moescope.probes.edits.now import Now
from moescope.probes.edits.session import edited
from moescope.probes.edits.step import Place, step_for
from moescope.probes.edits.steps.add import AddStep
from moescope.probes.edits.steps.mask_head import MaskHeadStep
from moescope.probes.edits.steps.skip import SkipStep
from moescope.probes.families.tiny import build_tiny
from moescope.probes.taps import tapped

SITES = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
FAMILIES = ("llama", "gpt2", "qwen3_moe", "mixtral", "deepseek_v3")
WIDTH = 32


@pytest.fixture(params=FAMILIES)
def live(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> ms.LiveModel:
    return ms.load(tiny_model(request.param))


@pytest.fixture
def llama(tiny_model: Callable[..., Any]) -> ms.LiveModel:
    return ms.load(tiny_model("llama"))


def vector(seed: int = 0, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def some_ids(rows: int = 2, positions: int = 7, seed: int = 5) -> torch.Tensor:
    return torch.randint(1, 97, (rows, positions), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(live: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    found: torch.Tensor = live.module(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found


@contextmanager
def by_hand(module: Any, change: Callable[[torch.Tensor], torch.Tensor], *, before: bool = False) -> Iterator[None]:
    """Change what a module gives, or its first argument, by a method laid over its own `forward`."""
    plain = module.forward

    def forward(*args: Any, **named: Any) -> Any:
        if before:
            return plain(change(args[0]), *args[1:], **named)
        out = plain(*args, **named)
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def parts_of(live: Any, layer: int) -> dict[str, tuple[Any, bool]]:
    """Site → the module whose output (or input) is the stream there, written out by family."""
    if hasattr(live.module, "transformer"):  # GPT-2
        block = live.module.transformer.h[layer]
        attention = block.attn
    else:
        block = live.module.model.layers[layer]
        attention = block.self_attn
    return {
        "hook_resid_pre": (block, True),
        "hook_resid_post": (block, False),
        "hook_attn_out": (attention, False),
        "hook_mlp_out": (block.mlp, False),
    }


def at_site(live: Any, site: Site, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with tapped(live.module, live.anatomy, [site], lambda _, t: seen.append(next(iter(t.values())).clone())):
        logits(live, ids)
    return seen[0]


@pytest.mark.parametrize("site", SITES)
def test_add_equals_adding_by_hand(live: Any, site: str) -> None:
    ids, v = some_ids(), vector()
    module, before = parts_of(live, 1)[site]
    with by_hand(module, lambda x: x + v, before=before):
        wanted = logits(live, ids)
    with edited(live, Intervention([Add(layer=1, site=site, vector=v)])):  # type: ignore[arg-type]  # one of the four
        found = logits(live, ids)
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, logits(live, ids), atol=1e-3)


def test_project_out_and_clamp_equal_the_formulas(live: Any) -> None:
    ids, v = some_ids(), vector(1)
    unit = v / v.norm()
    block, _ = parts_of(live, 0)["hook_resid_post"]

    def without(x: torch.Tensor) -> torch.Tensor:
        return x - (x @ unit)[..., None] * unit

    def held(x: torch.Tensor) -> torch.Tensor:
        c = x @ unit
        return x + (c.clamp(-0.1, 0.2) - c)[..., None] * unit

    for edit, change in (
        (ProjectOut(layer=0, vector=v), without),
        (Clamp(layer=0, vector=v, low=-0.1, high=0.2), held),
    ):
        with by_hand(block, change):
            wanted = logits(live, ids)
        with edited(live, Intervention([edit])):
            found = logits(live, ids)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def test_project_out_leaves_nothing_along_the_vector_and_all_else(live: Any) -> None:
    ids, v, site = some_ids(), vector(2), Site(0, "", "hook_resid_post")
    before = at_site(live, site, ids)
    with edited(live, Intervention([ProjectOut(layer=0, vector=v)])):
        after = at_site(live, site, ids)
    assert (after @ (v / v.norm())).abs().max() < 1e-5
    across = torch.linalg.qr(torch.stack([v, *(vector(n) for n in range(3, 6))]).T)[0][:, 1:]
    torch.testing.assert_close(after @ across, before @ across, atol=1e-5, rtol=1e-5)


def test_clamp_within_bounds_keeps_every_bit(live: Any) -> None:
    ids = some_ids()
    with edited(live, Intervention([Clamp(layer=0, vector=vector(), low=-1e6, high=1e6)])):
        found = logits(live, ids)
    assert torch.equal(found, logits(live, ids))


@pytest.mark.parametrize("site", SITES)
def test_set_channel_sets_those_and_no_others(live: Any, site: str) -> None:
    ids, place = some_ids(), Site(1, "", site)
    before = at_site(live, place, ids)
    edit = SetChannel(layer=1, site=site, channels=(3, 30), values=(7.0, -2.0))  # type: ignore[arg-type]  # one of the four
    with edited(live, Intervention([edit])):
        after = at_site(live, place, ids)
    assert torch.equal(after[..., [3, 30]], torch.tensor([7.0, -2.0]).expand(2, 7, 2))
    others = [c for c in range(WIDTH) if c not in (3, 30)]
    assert torch.equal(after[..., others], before[..., others])


def test_set_channel_above_a_bound_leaves_smaller_values(llama: Any) -> None:
    ids, site = some_ids(), Site(0, "", "hook_resid_post")
    before = at_site(llama, site, ids)
    bound = float(before[..., 4].abs().median())
    with edited(llama, Intervention([SetChannel(layer=0, channels=4, above=bound)])):
        after = at_site(llama, site, ids)
    over = before[..., 4].abs() > bound
    assert 0 < int(over.sum()) < over.numel()
    assert torch.equal(after[..., 4], before[..., 4].masked_fill(over, 0.0))


@pytest.mark.parametrize("taps_first", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3"])
def test_neurons_of_a_dense_mlp_are_channels_too(tiny_model: Callable[..., Any], family: str, taps_first: bool) -> None:
    live, ids, place = ms.load(tiny_model(family)), some_ids(), Site(0, "mlp", "hook_post")
    end = live.module.transformer.h[0].mlp.c_proj if family == "gpt2" else live.module.model.layers[0].mlp.down_proj
    before = at_site(live, place, ids)
    with torch.no_grad():
        kept = end.weight.clone()
        (end.weight if family == "gpt2" else end.weight.T)[[4, 40]] = 0
        wanted = logits(live, ids)
        end.weight.copy_(kept)
    seen: list[torch.Tensor] = []
    contexts = [
        lambda: tapped(live.module, live.anatomy, [place], lambda _, t: seen.append(t["post"].clone())),
        lambda: edited(live, Intervention([SetChannel(layer=0, site="mlp.hook_post", channels=(4, 40))])),
    ]
    first, second = contexts if taps_first else contexts[::-1]
    with first(), second():
        found = logits(live, ids)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    before[..., [4, 40]] = 0
    assert torch.equal(seen[0], before)
    with edited(live, Intervention([Add(layer=0, site="mlp.hook_post", vector=vector(width=before.shape[-1]))])):
        torch.testing.assert_close(
            at_site(live, place, ids)[..., 5], seen[0][..., 5] + vector(width=before.shape[-1])[5]
        )


def test_neurons_of_experts_are_no_such_channels(tiny_model: Callable[..., Any]) -> None:
    live = ms.load(tiny_model("mixtral"))
    with (
        pytest.raises(InputError, match="no dense MLP"),
        edited(live, Intervention([SetChannel(layer=0, site="mlp.hook_post", channels=1)])),
    ):
        pass


def test_skip_equals_a_model_without_the_part(live: Any) -> None:
    ids = some_ids()
    parts = parts_of(live, 1)
    for part, site in (("attn", "hook_attn_out"), ("mlp", "hook_mlp_out")):
        with by_hand(parts[site][0], torch.zeros_like):
            wanted = logits(live, ids)
        with edited(live, Intervention([Skip(layer=1, part=part)])):  # type: ignore[arg-type]  # one of the two
            assert torch.equal(logits(live, ids), wanted)


def test_skip_of_a_block_equals_a_model_built_without_it(tiny_model: Callable[..., Any]) -> None:
    live, ids = ms.load(tiny_model("llama", num_hidden_layers=3)), some_ids()
    with edited(live, Intervention([Skip(layer=1, part="block")])):
        found = logits(live, ids)
    del live.module.model.layers[1]
    assert torch.equal(found, live.module(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_strength_goes_from_the_model_to_the_edit(llama: Any, strength: float) -> None:
    ids, site, v = some_ids(), Site(0, "", "hook_resid_post"), vector()
    before = at_site(llama, site, ids)
    aims = {
        Add(layer=0, vector=v, strength=strength): before + v,
        SetChannel(layer=0, channels=2, values=(5.0,), strength=strength): torch.cat(
            [before[..., :2], torch.full((2, 7, 1), 5.0), before[..., 3:]], -1
        ),
        Skip(layer=0, part="block", strength=strength): at_site(llama, Site(0, "", "hook_resid_pre"), ids),
    }
    for edit, aim in aims.items():
        with edited(llama, Intervention([edit])):
            after = at_site(llama, site, ids)
        torch.testing.assert_close(after, before + strength * (aim - before), atol=1e-5, rtol=1e-5)
        if strength == 0:
            assert torch.equal(after, before)


def test_untouched_tokens_and_rows_keep_every_bit_in_bfloat16(tiny_model: Callable[..., Any]) -> None:
    live, ids, site = ms.load(tiny_model("llama", dtype="bfloat16")), some_ids(3), Site(1, "", "hook_resid_post")
    before = at_site(live, site, ids)
    v = vector()
    edits = [
        Add(layer=1, vector=v, positions="2:4"),
        ProjectOut(layer=1, vector=v, positions="2:4"),
        Clamp(layer=1, vector=v, low=0.0, high=0.0, positions="2:4"),
        SetChannel(layer=1, channels=1, values=(3.0,), positions="2:4"),
        Skip(layer=1, part="block", positions="2:4"),
    ]
    for edit in edits:
        with edited(live, [Intervention(), Intervention([edit])]) as session:
            session.assign([0, 1, 0])
            after = at_site(live, site, ids)
        untouched = torch.ones(3, 7, dtype=torch.bool)
        untouched[1, 2:4] = False
        assert torch.equal(after[untouched], before[untouched]), edit
        assert not torch.equal(after[~untouched], before[~untouched]), edit


def test_interventions_in_one_batch_equal_the_same_alone(live: Any) -> None:
    v = vector()
    several = [
        Intervention([Add(layer=0, vector=v), SetChannel(layer=1, channels=(1, 2), site="hook_mlp_out")]),
        Intervention(),
        Intervention([Add(layer=0, vector=-v, strength=0.5, positions="0:1")]),
        Intervention([Skip(layer=1, part="attn")]),
        Intervention([SetChannel(layer=1, channels=(5, 6), values=(1.0, 2.0), site="hook_mlp_out")]),
    ]
    row = some_ids(1)
    with edited(live, several) as session:
        session.assign(range(5))
        together = logits(live, row.expand(5, -1))
    for number, alone in enumerate(several):
        with edited(live, alone):
            torch.testing.assert_close(together[number], logits(live, row)[0], atol=1e-5, rtol=1e-5)


def test_edits_act_in_the_order_given(llama: Any) -> None:
    ids, site, v = some_ids(), Site(0, "", "hook_resid_post"), vector()
    set_first = [SetChannel(layer=0, channels=0, values=(9.0,)), Add(layer=0, vector=v)]
    with edited(llama, Intervention(set_first)):
        assert torch.allclose(at_site(llama, site, ids)[..., 0], 9 + v[0])
    with edited(llama, Intervention(set_first[::-1])):
        assert torch.equal(at_site(llama, site, ids)[..., 0], torch.full((2, 7), 9.0))


@pytest.mark.parametrize("taps_first", [True, False])
@pytest.mark.parametrize("site", SITES)
def test_taps_see_the_edited_stream_in_either_order(live: Any, site: str, taps_first: bool) -> None:
    ids, v, place = some_ids(), vector(), Site(1, "", site)
    wanted = at_site(live, place, ids) + v
    seen: list[torch.Tensor] = []
    tap = lambda: tapped(live.module, live.anatomy, [place], lambda _, t: seen.append(next(iter(t.values()))))  # noqa: E731  entered in two orders
    edit = lambda: edited(live, Intervention([Add(layer=1, site=site, vector=v)]))  # type: ignore[arg-type]  # noqa: E731  entered in two orders
    first, second = (tap, edit) if taps_first else (edit, tap)
    with first(), second():
        logits(live, ids)
    assert torch.equal(seen[0], wanted)


@pytest.mark.parametrize(
    "family", ["gemma4_text", "flex_olmo", "granitemoe", "granitemoeshared", "zaya", "beam", "longcat_flash"]
)
@pytest.mark.parametrize("site", ["hook_attn_out", "hook_mlp_out"])
def test_what_is_added_is_changed_behind_its_norm_and_factor(family: str, site: str) -> None:
    """These families norm what a sublayer gives, multiply it, or sum it from several modules before they add it."""
    live, ids, place = ms.load(build_tiny(family)), some_ids(), Site(1, "", site)
    v = vector()
    plain = at_site(live, place, ids)
    post = at_site(live, Site(1, "", "hook_resid_post"), ids)
    for taps_first in (True, False):
        seen: list[torch.Tensor] = []
        tap = lambda: tapped(live.module, live.anatomy, [place], lambda _, t: seen.append(next(iter(t.values()))))  # noqa: B023, E731  used at once
        edit = lambda: edited(live, Intervention([Add(layer=1, site=site, vector=v)]))  # type: ignore[arg-type]  # noqa: E731  one of the four
        first, second = (tap, edit) if taps_first else (edit, tap)
        with first(), second():
            logits(live, ids)
        torch.testing.assert_close(seen[0], plain + v, atol=1e-5, rtol=1e-5)
    with edited(live, Intervention([Skip(layer=1, part="attn" if "attn" in site else "mlp")])):
        assert at_site(live, place, ids).abs().max() < 1e-6
        assert not torch.allclose(at_site(live, Site(1, "", "hook_resid_post"), ids), post, atol=1e-3)


def test_positions_hold_with_padding_at_the_left(llama: Any) -> None:
    rows, site = [some_ids(1, n)[0] for n in (4, 7)], Site(0, "", "hook_resid_post")
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, -len(row) :], mask[number, -len(row) :] = row, 1
    seen: list[torch.Tensor] = []
    with (
        edited(llama, Intervention([SetChannel(layer=0, channels=0, values=(50.0,), positions="0:1")])),
        tapped(llama.module, llama.anatomy, [site], lambda _, t: seen.append(t["resid"])),
    ):
        logits(llama, ids, mask)
    hit = seen[0][..., 0] == 50
    assert hit.nonzero().tolist() == [[0, 3], [1, 0]]


def test_generation_with_a_cache_equals_whole_passes(live: Any) -> None:
    prompt = some_ids(2, 5)
    cut = Intervention([Add(layer=0, vector=2 * vector()), Skip(layer=1, part="mlp", positions="generated")])
    with edited(live, cut), torch.no_grad():
        made = live.module.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids = prompt
    for _ in range(4):  # the same without a cache: what was generated is known by its place
        written_out = Intervention([Add(layer=0, vector=2 * vector()), Skip(layer=1, part="mlp", positions="5:")])
        with edited(live, written_out):
            ids = torch.cat([ids, logits(live, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


def hooks_of(module: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in module.modules())


def test_nothing_remains_after_an_exception(live: Any) -> None:
    ids = some_ids()
    before, hooks = logits(live, ids), hooks_of(live.module)
    cut = Intervention([Add(layer=None, vector=vector()), Skip(layer=1, part="mlp"), SetChannel(layer=0, channels=0)])

    def fails() -> None:
        with edited(live, cut):
            assert not torch.equal(logits(live, ids), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert hooks_of(live.module) == hooks
    assert torch.equal(logits(live, ids), before)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Add(layer=0, vector=(1.0,) * 5), "5 numbers, the stream 32"),
        (lambda: Add(layer=9, vector=(1.0,) * WIDTH), "no layer 9"),
        (lambda: ProjectOut(layer=0, vector=(0.0,) * WIDTH), "no direction"),
        (lambda: ProjectOut(layer=0, vector=(1.0,) * WIDTH, strength=2), "between 0 and 1"),
        (lambda: Clamp(layer=0, vector=(1.0,) * WIDTH), "bound"),
        (lambda: Clamp(layer=0, vector=(1.0,) * WIDTH, low=2, high=1), "bound"),
        (lambda: SetChannel(layer=0, channels=WIDTH), "no channel 32"),
        (lambda: SetChannel(layer=0, site="mlp.hook_post", channels=48), "no channel 48"),
        (lambda: SetChannel(layer=0, channels=()), "channel"),
        (lambda: SetChannel(layer=0, channels=(1, 2), values=(1.0,)), "2 channels"),
        (lambda: Skip(layer=0, part="mlp", strength=-1), "between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(llama: Any, make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason), edited(llama, Intervention([make()])):
        pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: Add(layer=0, vector=(float("nan"),) * WIDTH),
        lambda: Add(layer=0, vector=(1.0,) * WIDTH, strength=float("inf")),
        lambda: SetChannel(layer=0, channels=0, values=(float("inf"),)),
        lambda: Skip(layer=0, part="norm"),  # type: ignore[arg-type]  # no part
        lambda: Add(layer=0, site="hook_z", vector=(1.0,) * WIDTH),  # type: ignore[arg-type]  # no stream
    ],
)
def test_what_no_model_could_take_is_no_edit(make: Callable[[], Any]) -> None:
    with pytest.raises(InputError):
        make()


def test_a_fault_names_the_layer_and_the_reason(llama: Any) -> None:
    with (
        pytest.raises(InputError, match=r"layer 1 .* no channel 32"),
        edited(llama, Intervention([SetChannel(layer=1, channels=WIDTH)])),
    ):
        pass


def test_several_streams_are_refused() -> None:
    live = ms.load(build_tiny("deepseek_v4"))
    found = AddStep.why_not(Add(layer=0, vector=(1.0,) * WIDTH), Place(live.module, live.anatomy, 0))
    assert found is not None
    assert "several residual streams" in found


def test_a_mixer_without_an_mlp_is_refused() -> None:
    live = ms.load(build_tiny("nemotron_h"))
    layer = next(n for n in range(3) if not any(s.layer == n and s.block == "mlp" for s in live.anatomy.sublayers))
    place = Place(live.module, live.anatomy, layer)
    assert "no MLP" in str(SkipStep.why_not(Skip(layer=layer, part="mlp"), place))


@pytest.mark.parametrize(
    "edit",
    [
        Add(layer=1, vector=(1.0,) * WIDTH, positions="1:3"),
        ProjectOut(layer=1, vector=(1.0,) * WIDTH),
        Clamp(layer=1, vector=(1.0,) * WIDTH, low=0.0, positions="token:5"),
        SetChannel(layer=1, channels=(1, 2), values=(1.0, 2.0), above=0.5),
        Skip(layer=1, part="mlp", strength=0.5, positions="generated"),
        MaskHead(layer=1, heads=(0, 2), how="zero"),
        MaskHead(layer=1, heads=(0, 2), how="uniform"),
    ],
)
def test_no_step_reads_back_to_the_host(llama: Any, edit: Any) -> None:
    """Fake tensors have no values: a step that asked for one would fail."""
    s = next(s for s in llama.anatomy.sublayers if (s.layer, s.block) == (1, "attn"))
    kind = step_for(edit)
    with FakeTensorMode():
        step: Any = kind([None, edit], Place(llama.module, llama.anatomy, 1, s if kind is MaskHeadStep else None))
        ids = torch.zeros(2, 7, dtype=torch.long)
        now = Now(ids, ids == 0, ids, False, torch.zeros(2, dtype=torch.long))
        if kind is MaskHeadStep:
            assert step.outputs(step.queries(torch.zeros(2, 4, 7, 8), now).transpose(1, 2), now).shape == (2, 7, 4, 8)
        else:
            assert step.change(torch.zeros(2, 7, WIDTH, dtype=torch.bfloat16), now).dtype == torch.bfloat16
        step.update([edit, None])


def test_an_update_writes_into_the_tables_there_are(llama: Any) -> None:
    place = Place(llama.module, llama.anatomy, 1)
    step = AddStep([Add(layer=1, vector=(1.0,) * WIDTH), None], place)
    tables = [step.table.data_ptr(), step.amounts.strength.data_ptr(), step.amounts.place.data_ptr()]  # type: ignore[union-attr]  # made
    step.update([None, Add(layer=1, vector=(2.0,) * WIDTH, strength=0.5, positions="2:")])
    assert tables == [step.table.data_ptr(), step.amounts.strength.data_ptr(), step.amounts.place.data_ptr()]  # type: ignore[union-attr]  # made
    assert step.table[:, 0].tolist() == [0.0, 2.0]
