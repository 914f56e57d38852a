"""What the lab computes: equal to plain passes under `model.edited`; strength 0 exact; what is kept; what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.edit_text import read_edit
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.dashboard.lab.asking import Asking
from moescope.dashboard.lab.bench import Base, Bench, RefusedEditError
from moescope.dashboard.lab.lines import strengths
from moescope.dashboard.lab.measured import _number
from moescope.dashboard.model_host import ModelHost
from moescope.store.store import Store

PROMPTS = ["And God said unto him, Arise, and go up to the mountain.", "def f(x):\n    return x + 1"]
BOX = PROMPTS[0] + "\n" + PROMPTS[1].replace("\n", "\\n")


@pytest.fixture(scope="module")
def host() -> ModelHost:
    return ModelHost("demo")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("lab") / "runs.duckdb") as opened:
        yield opened


@pytest.fixture
def bench(host: ModelHost, store: Store) -> Bench:
    return Bench(host, store)


def made(*lines: str) -> Intervention:
    return Intervention([read_edit(line) for line in lines])


def ask(line: str = "", **more: Any) -> dict[str, Any]:
    plain = {"tab": "t", "prompt": BOX, "edits": [line] if line else [], "kept": None, "row": 0, "at": None}
    return {**plain, "tokens": 8, "temperature": 0, "seed": 0, "stamp": 1, **more}


def on(host: ModelHost, request: Any) -> Any:
    return host.ask(request, who="test", keeps=True)


@pytest.mark.parametrize(
    "lines",
    [
        ("ablate layer=3 experts=0-7",),
        ("ablate layer=3 experts=0-7 how=route_around", "scale layer=1 experts=2 factor=3"),
        ("mask_head layer=2 heads=0,1 strength=0.5",),
        ("fake_quant layer=2 experts=0-15 bits=2",),
    ],
)
def test_an_edited_pass_equals_a_plain_one_under_the_same_edits(
    host: ModelHost, bench: Bench, lines: tuple[str, ...]
) -> None:
    def request(model: Any) -> None:
        base = bench.base(model, PROMPTS)
        first = bench.edited(model, base, made(*lines)).logits
        bench.close()
        with torch.no_grad():
            plain = model.module(input_ids=base.on_device.ids, attention_mask=base.on_device.mask.long()).logits
            assert torch.equal(plain, base.plain.logits)
            with model.edited(made(*lines)):
                truth = model.module(input_ids=base.on_device.ids, attention_mask=base.on_device.mask.long()).logits
        assert torch.equal(first, truth)
        assert not torch.equal(first, plain)

    on(host, request)


def test_strengths_are_changed_in_the_session_that_is_open(host: ModelHost, bench: Bench) -> None:
    def request(model: Any) -> None:
        base = bench.base(model, PROMPTS)
        bench.edited(model, base, made("ablate layer=3 experts=0-7"))
        session = bench._session
        half = bench.edited(model, base, made("ablate layer=3 experts=0-7 strength=0.5")).logits
        assert bench._session is session
        none = bench.edited(model, base, made("ablate layer=3 experts=0-7 strength=0")).logits
        assert bench._session is session
        assert torch.equal(none, base.plain.logits)
        bench.close()
        again = bench.edited(model, base, made("ablate layer=3 experts=0-7 strength=0.5"))
        assert torch.equal(half, again.logits)
        other = bench.edited(model, base, made("skip layer=2 part=mlp")).logits  # another kind: a session of its own
        assert bench._session is not session
        assert not torch.equal(other, half)

    on(host, request)


def test_the_unedited_pass_is_kept_and_never_run_under_edits(host: ModelHost, bench: Bench) -> None:
    def request(model: Any) -> None:
        first = bench.base(model, PROMPTS)
        bench.edited(model, first, made("ablate layer=3 experts=0-7"))
        assert bench.base(model, PROMPTS) is first
        other = bench.base(model, ["Another prompt, run while a session is open."])
        bench.close()
        with torch.no_grad():
            plain = model.module(input_ids=other.on_device.ids).logits
        assert torch.equal(other.plain.logits, plain)

    on(host, request)


def test_nothing_is_left_on_the_model_for_those_who_ask_after(host: ModelHost, bench: Bench) -> None:
    ids = torch.tensor([[5, 6, 7]])
    before = host.ask(lambda m: m.module(input_ids=ids).logits, who="work")
    on(host, lambda m: bench.edited(m, bench.base(m, PROMPTS), made("ablate layer=3 experts=0-14")))
    assert torch.equal(before, host.ask(lambda m: m.module(input_ids=ids).logits, who="work"))
    assert host.ask(lambda m: m.edited(made("skip layer=0")).__enter__() is not None, who="work")


def test_a_refused_edit_is_named_by_its_place(host: ModelHost, store: Store) -> None:
    fresh = ModelHost("demo")
    bench = Bench(fresh, store)

    def request(model: Any) -> None:
        base = bench.base(model, PROMPTS)
        with pytest.raises(RefusedEditError, match="no expert 99") as caught:
            bench.edited(model, base, made("skip layer=2", "ablate layer=3 experts=99"))
        assert caught.value.place == 1
        with pytest.raises(RefusedEditError, match="nowhere") as caught:
            bench.edited(model, base, made("latents layer=2 sae=nowhere latents=1 values=2"))
        assert caught.value.place == 0
        bench.edited(model, base, made("skip layer=2"))  # usable all the same

    on(fresh, request)


def test_switched_decisions_are_those_whose_set_of_experts_differs(store: Store) -> None:
    fresh = ModelHost("demo")
    line = "bias layer=2 experts=4 value=2"
    found = Asking(fresh, Bench(fresh, store)).answer(ask(line))
    sets: list[dict[int, list[frozenset[int]]]] = []

    def brute(model: Any) -> None:
        from moescope.core.sites import EXPERT_INDICES, Site
        from moescope.probes.taps import tapped

        sites = [Site(layer, "mlp", EXPERT_INDICES) for layer in model.anatomy.moe_layers]
        for edits in (None, made(line)):
            chosen: dict[int, list[frozenset[int]]] = {layer: [] for layer in model.anatomy.moe_layers}

            def keep(site: Any, tensors: Any, chosen: Any = chosen) -> None:
                chosen[site.layer] += [frozenset(row) for row in tensors["indices"].tolist()]

            for prompt in PROMPTS:
                ids = model.tokenizer(prompt, return_tensors="pt").input_ids
                with torch.no_grad(), tapped(model.module, model.anatomy, sites, keep):
                    if edits is None:
                        model.module(input_ids=ids)
                    else:
                        with model.edited(edits):
                            model.module(input_ids=ids)
            sets.append(chosen)

    fresh.ask(brute, who="truth")
    truth = {layer: sum(a != b for a, b in zip(sets[0][layer], sets[1][layer], strict=True)) for layer in sets[0]}
    assert {one["layer"]: one["switched"] for one in found["layers"]} == truth
    assert sum(truth.values()) > 0
    assert sum(sum(prompt["switched"]) for prompt in found["prompts"]) == sum(truth.values())


def test_what_is_written_is_what_generate_gives_and_its_alignment_rebuilds_both(store: Store) -> None:
    fresh = ModelHost("demo")
    asking = Asking(fresh, Bench(fresh, store))
    found = asking.writes(ask("ablate layer=3 experts=0-7", tokens=24))
    ids = fresh.ask(lambda m: m.tokenizer(PROMPTS[0], return_tensors="pt").input_ids, who="truth")

    def greedy(model: Any) -> str:
        mask = torch.ones_like(ids)
        out = model.module.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
        return str(model.tokenizer.decode(out[0, ids.shape[1] :]))

    def edited(model: Any) -> str:
        with model.edited(made("ablate layer=3 experts=0-7")):
            return greedy(model)

    assert "".join(found["base"]) == fresh.ask(greedy, who="truth")
    assert "".join(found["edited"]) == fresh.ask(edited, who="truth")
    same = [found["base"][a:b] == found["edited"][c:d] for kind, a, b, c, d in found["parts"] if kind == "equal"]
    assert all(same)
    assert found["parts"][-1][2] == len(found["base"])
    assert found["parts"][-1][4] == len(found["edited"])
    drawn = [asking.writes(ask(tokens=16, temperature=1.5, seed=seed))["base"] for seed in (1, 2)]
    assert drawn[0] != drawn[1]
    none = asking.writes(ask("ablate layer=3 experts=0-7 strength=0", tokens=16, temperature=1.5, seed=1))
    assert none["base"] == none["edited"] == drawn[0]
    assert none["parting"] is None


def test_a_dense_model_answers_without_routing(store: Store) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def load(_source: str) -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        module = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes))
        return ms.load(module, tokenizer=ms.load("demo").tokenizer)

    dense = ModelHost("dense", load=load)
    found = Asking(dense, Bench(dense, store)).answer(ask("skip layer=1 part=attn"))
    assert found["moe"] is False
    assert found["edited"] is True
    assert found["layers"] == []
    assert found["summary"]["kl"] > 0
    refused = Asking(dense, Bench(dense, store)).answer(ask("ablate layer=0 experts=1"))
    assert refused["refused"]["place"] == 0
    assert refused["edited"] is False


def test_bad_prompts_are_told(store: Store, host: ModelHost) -> None:
    asking = Asking(host, Bench(host, store))
    assert asking.answer(ask(prompt=" \n "))["problem"]["problem"] == "there is no prompt"
    assert "16 prompts" in asking.answer(ask(prompt="a\n" * 17))["problem"]["problem"]
    assert "tokens" in asking.answer(ask(prompt="word " * 3900))["problem"]["problem"]
    assert asking.answer(ask("ablate layer=3 experts=x"))["rows"][0]["problem"]
    assert Asking(ModelHost(), Bench(host, store)).answer(ask())["state"] == "no model"


def test_sliders_offer_the_strengths_that_edits_take(host: ModelHost) -> None:
    from moescope.probes.edits.checks import check_edit

    lines = [
        "ablate layer=3 experts=1",
        "ablate layer=3 experts=1 how=route_around",
        "bias layer=3 experts=1 value=1",
        "scale layer=3 experts=1 factor=2",
        "force layer=3 experts=1",
        "keep layer=3 experts=0-7",
        "top_k layer=3 k=1",
        "top_p layer=3 p=0.5",
        "random_routing layer=3",
        "rank_routing layer=3 ranks=2,3",
        "swap_experts layer=3",
        "fake_quant layer=3 experts=1",
        "mask_head layer=3 heads=0",
        "set_channel layer=3 channels=1",
        "skip layer=3",
    ]
    takes = {"whole": {0.0, 1.0}, "part": {0.0, 0.5, 1.0}, "any": {-1.0, 0.0, 0.5, 1.0, 2.0}}

    def request(model: Any) -> None:
        for line in lines:
            offered = takes[strengths(read_edit(line))]
            for strength in (-1.0, 0.0, 0.5, 1.0, 2.0):
                edit = read_edit(f"{line} strength={strength}")
                if strength in offered:
                    check_edit(model, edit)
                else:
                    with pytest.raises(InputError):
                        check_edit(model, edit)

    on(host, request)


def test_a_pass_is_that_of_the_very_prompts_it_was_made_of(host: ModelHost, bench: Bench) -> None:
    def request(model: Any) -> None:
        edits = made("skip layer=2")
        first = bench.base(model, PROMPTS)
        found = bench.edited(model, first, edits)
        assert bench.edited(model, first, edits) is found
        assert bench._last is not None
        assert bench._last[0] is first, "held as long as its pass is: its id cannot become another's"
        twin = Base(first.batch, first.on_device, first.plain)
        assert bench.edited(model, twin, edits) is not found
        bench.close()

    on(host, request)


def test_an_autoencoder_trained_anew_under_its_name_takes_the_place_of_the_old_one(
    store: Store, bench: Bench, host: ModelHost, tmp_path: Path
) -> None:
    from sae_lens import TopKSAE, TopKSAEConfig

    from moescope.sae.loading import from_disk

    edits = made("splice layer=2 sae=again site=hook_resid_post")

    def saved(model: Any, scale: float) -> None:
        width = model.module.config.hidden_size
        module = TopKSAE(TopKSAEConfig(d_in=width, d_sae=2 * width, k=4))
        with torch.no_grad():
            module.W_dec.copy_(scale * torch.cat([torch.eye(width), -torch.eye(width)]))
            module.W_enc.copy_(torch.cat([torch.eye(width), -torch.eye(width)]).T)
        module.save_model(tmp_path / f"{scale}")
        from_disk(tmp_path / f"{scale}", site="blocks.2.hook_resid_post", store=store, name="again", model=model)

    def request(model: Any) -> None:
        base = bench.base(model, PROMPTS)
        bench.close()
        saved(model, 1.0)
        first = bench.edited(model, base, edits)
        old = bench.autoencoders(model, edits)["again"]
        assert bench.autoencoders(model, edits)["again"] is old
        store.connection.execute("DELETE FROM saes WHERE name = 'again'")
        saved(model, 2.0)
        second = bench.edited(model, base, edits)
        assert bench.autoencoders(model, edits)["again"] is not old
        assert not torch.equal(first.logits, second.logits)
        bench.close()

    on(host, request)


@pytest.mark.parametrize(
    ("metric", "value", "told"),
    [
        ("flips", 0.005, "0.5 %"),
        ("flips", -0.004, "−0.4 %"),
        ("flips", 0.0002, "<0.1 %"),
        ("flips", -0.0002, ">−0.1 %"),
        ("flips", 0.0, "0 %"),
        ("kl", 3e-5, "<0.0001"),
        ("delta_nll", -3e-5, ">−0.0001"),
        ("delta_nll", -0.25, "−0.2500"),
        ("kl", 0.0, "0.0000"),
        ("kl", float("nan"), "—"),
    ],
)
def test_a_measured_number_has_one_form_on_either_side_of_0(metric: str, value: float, told: str) -> None:
    assert _number(value, SimpleNamespace(metric=metric)) == told
