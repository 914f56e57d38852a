"""Edits through a sparse autoencoder against the same changes made by hand, one vector at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moescope as ms
import moescope.edits as e
from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.probes.edits.checks import check_intervention
from moescope.probes.edits.now import Now
from moescope.probes.edits.session import edited
from moescope.probes.edits.step import Place, step_for
from moescope.probes.taps import tapped

WIDTH, LATENTS = 32, 24
FAMILIES = ("llama", "gpt2", "qwen3_moe", "mixtral", "deepseek_v3")
SITE = Site(1, "", "hook_resid_post")


@dataclass
class Planted:
    """Eight of so many ReLU latents a vector, with weights of a seed; whatever has these four names is an autoencoder."""

    site: Site = SITE
    width: int = WIDTH
    target_site: Site | None = None
    expert: int | None = None
    k: int = 8
    row: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(11)
        self.decoder = torch.randn(LATENTS, self.width, generator=generator)
        self.encoder = torch.randn(self.width, LATENTS, generator=generator) / self.width**0.5
        self.bias = torch.randn(self.width, generator=generator) * 0.01
        self.d_in = self.width

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        pre = (x.float() - self.bias) @ self.encoder
        largest = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, largest.indices, largest.values.relu())

    def decode(self, activations: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        return activations @ self.decoder + self.bias


def some_ids(rows: int = 2, positions: int = 7, seed: int = 5) -> torch.Tensor:
    return torch.randint(1, 97, (rows, positions), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(live: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = live.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return found


def at_site(live: Any, site: Site, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with tapped(live.module, live.anatomy, [site], lambda _, t: seen.append(next(iter(t.values())).clone())):
        logits(live, ids)
    return seen[0]


@pytest.fixture(params=FAMILIES)
def live(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> ms.LiveModel:
    return ms.load(tiny_model(request.param))


@pytest.fixture
def llama(tiny_model: Callable[..., Any]) -> ms.LiveModel:
    return ms.load(tiny_model("llama"))


def changed_by_hand(x: torch.Tensor, edit: Any, sae: Planted) -> torch.Tensor:
    """One vector, in plain loops."""
    z = sae.encode(x)
    if isinstance(edit, e.Splice):
        return x + edit.strength * (sae.decode(z) - x)
    out = x.clone()
    if isinstance(edit, e.Latents):
        for latent, value in zip(edit.ids, edit.values, strict=True):  # type: ignore[arg-type]  # a tuple once made
            own = float(z[latent])
            aimed = {"add": own + value, "set": value, "scale": own * value}[edit.how]
            if own > 0 or not edit.only_active:
                out = out + edit.strength * (aimed - own) * sae.decoder[latent]
        return out
    code = z.clone().requires_grad_()
    towards = torch.tensor(edit.numbers)
    chosen = list(edit.ids or range(LATENTS))
    for _ in range(edit.steps):
        part = code[chosen]
        if edit.weights is None:
            loss = ((part - towards) ** 2).sum()
        else:
            loss = -torch.nn.functional.logsigmoid((part * towards).sum() + edit.bias)
        (gradient,) = torch.autograd.grad(loss, code)
        code = (code - edit.rate * gradient).detach()
        if edit.weights is not None:
            code = code.clamp(min=0)
        code.requires_grad_()
    final = code.detach()
    if edit.keep is not None:
        kept = sorted(range(LATENTS), key=lambda i: -float(final[i]))[: edit.keep]
        final = torch.tensor([float(final[i]) if i in kept else 0.0 for i in range(LATENTS)])
    if edit.replace:
        return x + edit.strength * (sae.decode(final) - x)
    return x + edit.strength * (sae.decode(final) - sae.decode(z))


def target(seed: int = 3) -> list[float]:
    return torch.rand(LATENTS, generator=torch.Generator().manual_seed(seed)).tolist()


EDITS: list[e.Edit] = [
    e.Splice(layer=1, sae="s"),
    e.Splice(layer=1, sae="s", strength=0.5),
    e.Latents(layer=1, sae="s", latents=[3, 0, 17], values=[2.0, -1.0, 0.5]),
    e.Latents(layer=1, sae="s", latents=range(8), values=1.5, only_active=True, strength=2.0),
    e.Latents(layer=1, sae="s", latents=[5, 6], how="set", values=[4.0, 0.0], strength=0.7),
    e.Latents(layer=1, sae="s", latents=range(LATENTS), how="scale", values=0.0),
    e.Latents(layer=1, sae="s", latents=range(LATENTS), how="scale", values=-1.5),
    e.Descend(layer=1, sae="s", target=target(), steps=4, rate=0.1),
    e.Descend(layer=1, sae="s", target=target(), steps=30, rate=0.3, keep=5, strength=0.5),
    e.Descend(layer=1, sae="s", target=[1.0, 2.0], latents=[9, 2], steps=3, rate=0.2),
    e.Descend(layer=1, sae="s", target=target(), steps=2, rate=0.1, replace=True),
    e.Descend(layer=1, sae="s", weights=[x - 0.4 for x in target()], bias=-1.0, steps=7, rate=2.0),
    e.Descend(layer=1, sae="s", weights=[-3.0, 2.0], latents=[4, 1], steps=5, rate=1.0, keep=7, replace=True),
]


@pytest.mark.parametrize("edit", EDITS, ids=repr)
def test_every_edit_is_its_formula_on_every_token(llama: Any, edit: e.Edit) -> None:
    ids, sae = some_ids(), Planted()
    before = at_site(llama, SITE, ids)
    with edited(llama, e.Intervention(edit), sources={"s": sae}):
        after = at_site(llama, SITE, ids)
    wanted = torch.stack([torch.stack([changed_by_hand(x, edit, sae) for x in row]) for row in before])
    torch.testing.assert_close(after, wanted, atol=2e-5, rtol=2e-5)
    assert (after - before).abs().max() > 1e-3


def test_a_long_descent_arrives_at_its_target(llama: Any) -> None:
    ids, sae = some_ids(), Planted()
    edit = e.Descend(layer=1, sae="s", target=target(), steps=200, rate=0.2, replace=True)
    with edited(llama, e.Intervention(edit), sources={"s": sae}):
        after = at_site(llama, SITE, ids)
    wanted = sae.decode(torch.tensor(target())).expand_as(after)
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_strength_0_and_a_kept_error_change_no_bit(tiny_model: Callable[..., Any], family: str, dtype: str) -> None:
    module = tiny_model(family, dtype=dtype)
    live, ids = ms.load(module), some_ids(3)
    plain = logits(live, ids)
    still = [e.Intervention(edit).with_strength(0) for edit in EDITS]
    still += [
        e.Intervention(e.Splice(layer=1, sae="s", keep_error=True)),
        e.Intervention(e.Latents(layer=1, sae="s", latents=[1, 2], how="scale", values=1.0)),
        e.Intervention(e.Latents(layer=1, sae="s", latents=[1, 2], how="add", values=0.0)),
        e.Intervention(e.Descend(layer=1, sae="s", target=target(), steps=0)),
    ]
    for cut in still:
        with edited(live, cut, sources={"s": Planted()}):
            assert torch.equal(logits(live, ids), plain), cut
    with edited(live, still, sources={"s": Planted()}) as session:
        for start in range(0, len(still), 3):
            session.assign([n % len(still) for n in range(start, start + 3)])
            assert torch.equal(logits(live, ids), plain)
    with edited(live, e.Intervention(EDITS[0]), sources={"s": Planted()}):
        assert not torch.equal(logits(live, ids), plain)


def test_rows_of_a_batch_are_as_each_alone_and_updates_change_tables(llama: Any) -> None:
    cuts = [e.Intervention(), *map(e.Intervention, EDITS)]
    ids = some_ids(len(cuts))
    with edited(llama, cuts, sources={"s": Planted()}) as session:
        session.assign(range(len(cuts)))
        together = logits(llama, ids)
    for number, cut in enumerate(cuts):
        with edited(llama, cut, sources={"s": Planted()}):
            torch.testing.assert_close(together[number, None], logits(llama, ids[number, None]), atol=1e-5, rtol=1e-5)
    first = e.Intervention(e.Latents(layer=1, sae="s", latents=[3, 4], values=[1.0, 2.0]))
    then = e.Intervention(e.Latents(layer=1, sae="s", latents=[9, 2], how="set", values=[5.0, 0.0], positions="2:5"))
    with edited(llama, then, sources={"s": Planted()}):
        wanted = logits(llama, ids)
    with edited(llama, first, sources={"s": Planted()}) as session:
        (step,) = next(iter(session._program.spots.values()))
        tables = [getattr(step.step, name).data_ptr() for name in ("ids", "values", "how", "rows")]
        session.update(then)
        assert torch.equal(logits(llama, ids), wanted)
        assert tables == [getattr(step.step, name).data_ptr() for name in ("ids", "values", "how", "rows")]


def test_positions_and_tokens_without_an_active_latent_keep_every_bit(llama: Any) -> None:
    ids, sae = some_ids(2, 9), Planted()
    before = at_site(llama, SITE, ids)
    share = (sae.encode(before) > 0).float().mean((0, 1))
    latent = int((share - 0.5).abs().argmin())
    edit = e.Latents(layer=1, sae="s", latents=[latent], how="scale", values=3.0, positions="3:6")
    with edited(llama, e.Intervention(edit), sources={"s": sae}):
        after = at_site(llama, SITE, ids)
    active = sae.encode(before)[..., latent] > 0
    active[:, :3], active[:, 6:] = False, False
    assert 0 < active[:, 3:6].sum() < 6
    assert torch.equal((after != before).any(-1), active)


PASSING = {
    "hook_resid_pre": Site(1, "", "hook_resid_pre"),
    "hook_attn_out": Site(1, "", "hook_attn_out"),
    "hook_mlp_out": Site(1, "", "hook_mlp_out"),
    "mlp.hook_in": Site(1, "mlp", "hook_in"),
    "attn.hook_q": Site(1, "attn", "hook_q"),
    "attn.hook_z": Site(1, "attn", "hook_z"),
}


@pytest.mark.parametrize("site", PASSING)
def test_what_taps_see_at_every_site_is_what_was_put_there(live: Any, site: str) -> None:
    ids, place = some_ids(), PASSING[site]
    if site == "attn.hook_q" and live.anatomy.architecture.startswith("Deepseek"):
        with pytest.raises(InputError, match="no attention whose queries"):
            check_intervention(
                live, e.Intervention(e.Splice(layer=1, site=site, sae="s")), sources={"s": Planted(place)}
            )
        return
    before = at_site(live, place, ids)
    flat = before.reshape(*before.shape[:2], -1)
    sae = Planted(place, width=flat.shape[-1])
    plain = logits(live, ids)
    with edited(live, e.Intervention(e.Splice(layer=1, site=site, sae="s")), sources={"s": sae}):  # type: ignore[arg-type]  # a site
        after = at_site(live, place, ids)
        assert not torch.allclose(logits(live, ids), plain, atol=1e-4)
    torch.testing.assert_close(after.reshape(flat.shape), sae.decode(sae.encode(flat)), atol=1e-5, rtol=1e-5)
    with edited(live, e.Intervention(e.Splice(layer=1, site=site, sae="s", strength=0)), sources={"s": sae}):  # type: ignore[arg-type]  # a site
        assert torch.equal(logits(live, ids), plain)


@pytest.mark.parametrize("edit", [EDITS[0], EDITS[3], EDITS[8], EDITS[12]], ids=repr)
def test_no_pass_reads_the_device(llama: Any, edit: e.Edit) -> None:
    """Fake tensors have no values: a step that asked for one would fail."""
    with FakeTensorMode():
        step: Any = step_for(edit)([None, edit], Place(llama.module, llama.anatomy, 1, sources={"s": Planted()}))
        ids = torch.zeros(2, 7, dtype=torch.long)
        now = Now(ids, ids == 0, ids, False, torch.zeros(2, dtype=torch.long))
        assert step.change(torch.zeros(2, 7, WIDTH, dtype=torch.bfloat16), now).dtype == torch.bfloat16
        step.update([edit, None])


def test_a_transcoder_s_prediction_takes_the_place_of_what_it_predicts(llama: Any) -> None:
    ids = some_ids()
    read, predicted = Site(1, "", "hook_resid_pre"), Site(1, "", "hook_mlp_out")
    sae = Planted(read, target_site=predicted)
    seen = at_site(llama, read, ids)
    with edited(llama, e.Intervention(e.Splice(layer=1, site="hook_mlp_out", sae="s")), sources={"s": sae}):
        after = at_site(llama, predicted, ids)
    torch.testing.assert_close(after, sae.decode(sae.encode(seen)), atol=1e-5, rtol=1e-5)
    edit = e.Latents(layer=1, site="hook_mlp_out", sae="s", latents=[1, 2, 3], how="scale", values=0)
    own = at_site(llama, predicted, ids)
    with edited(llama, e.Intervention(edit), sources={"s": sae}):
        after = at_site(llama, predicted, ids)
    torch.testing.assert_close(after, own - sae.encode(seen)[..., 1:4] @ sae.decoder[1:4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("edit", "sources", "said"),
    [
        (EDITS[0], {}, "not among the given ones.*sources="),
        (EDITS[0], {"s": object()}, "no autoencoder"),
        (e.Splice(layer=0, sae="s"), {"s": Planted()}, "layer=1, site='hook_resid_post'"),
        (e.Splice(layer=1, site="hook_resid_pre", sae="s"), {"s": Planted()}, "forced=True"),
        (e.Splice(sae="s"), {"s": Planted()}, "not of blocks.0"),
        (EDITS[0], {"s": Planted(width=31)}, "31 numbers, those at .* 32"),
        (EDITS[0], {"s": Planted(expert=3)}, "outputs of expert 3"),
        (EDITS[0], {"s": Planted(row={"anatomy_digest": "other"})}, "another model"),
        (EDITS[0], {"s": Planted(Site(0, "", "hook_mlp_out"), target_site=SITE)}, "another block"),
        (e.Splice(layer=1, sae="s", strength=1.5), {"s": Planted()}, "between 0 and 1"),
        (e.Latents(layer=1, sae="s", latents=[3, LATENTS], values=1), {"s": Planted()}, f"no latent {LATENTS}"),
        (e.Descend(layer=1, sae="s", target=[1.0] * 5), {"s": Planted()}, "24 latents, and not 5"),
        (e.Descend(layer=1, sae="s", target=[1.0], latents=[99]), {"s": Planted()}, "no latent 99"),
        (e.Descend(layer=1, sae="s", target=[1.0], latents=[1], keep=25), {"s": Planted()}, "25 cannot be kept"),
    ],
)
def test_what_does_not_fit_is_refused(llama: Any, edit: e.Edit, sources: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"(?s){said}"):
        check_intervention(llama, e.Intervention(edit), sources=sources)


def test_forced_goes_elsewhere(llama: Any) -> None:
    ids = some_ids()
    edit = e.Splice(layer=0, site="hook_mlp_out", sae="s", forced=True)
    with edited(llama, e.Intervention(edit), sources={"s": Planted(row={"anatomy_digest": "other"})}):
        assert not torch.equal(logits(llama, ids), logits_plain(llama, ids))


def logits_plain(live: Any, ids: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []
    import threading

    thread = threading.Thread(target=lambda: found.append(logits(live, ids)))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: e.Splice(layer=1),
        lambda: e.Latents(layer=1, sae="s", values=1),
        lambda: e.Latents(layer=1, sae="s", latents=[1, 1], values=[1, 2]),
        lambda: e.Latents(layer=1, sae="s", latents=[-1], values=1),
        lambda: e.Latents(layer=1, sae="s", latents=[1, 2], values=[1.0]),
        lambda: e.Latents(layer=1, sae="s", latents=[1], values=[float("nan")]),
        lambda: e.Latents(layer=1, sae="s", latents=[1], how="clamp", values=1),  # type: ignore[arg-type]  # refused
        lambda: e.Descend(layer=1, sae="s"),
        lambda: e.Descend(layer=1, sae="s", target=[1.0], weights=[1.0]),
        lambda: e.Descend(layer=1, sae="s", target=[-1.0]),
        lambda: e.Descend(layer=1, sae="s", target=[1.0], rate=0.6),
        lambda: e.Descend(layer=1, sae="s", weights=[1.0], rate=0),
        lambda: e.Descend(layer=1, sae="s", target=[1.0], steps=-1),
        lambda: e.Descend(layer=1, sae="s", target=[1.0], keep=0),
        lambda: e.Descend(layer=1, sae="s", target=[1.0, 2.0], latents=[4]),
    ],
)
def test_what_makes_no_sense_cannot_be_made(make: Callable[[], e.Edit]) -> None:
    with pytest.raises(InputError):
        make()


@pytest.mark.parametrize("edit", EDITS, ids=repr)
def test_edits_come_back_from_json(edit: e.Edit) -> None:
    assert e.Intervention.from_json(e.Intervention(edit).to_json()) == e.Intervention(edit)
