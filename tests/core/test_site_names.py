"""Spellings of other libraries: each is read as the one site it means, or refused with what was meant."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.core.errors import InputError
from moescope.core.site_names import read_site, spellings
from moescope.core.sites import Site


@dataclass(frozen=True)
class Part:
    """One sublayer, as the anatomy of a model gives it."""

    layer: int
    block: str
    kind: str
    path: str
    n_shared: int | None = None
    logits_path: str | None = None
    experts_path: str | None = None
    router_logits_index: int = 0


@dataclass(frozen=True)
class Paths:
    block_paths: tuple[str, ...]
    sublayers: tuple[Part, ...] = field(default=())


def _moe(layer: int, path: str, block: str = "mlp", index: int = 0) -> Part:
    return Part(layer, block, "moe", path, 1, f"{path}.gate", f"{path}.experts", index)


MODEL = Paths(
    tuple(f"model.layers.{layer}" for layer in range(4)),
    (
        Part(0, "mlp", "dense", "model.layers.0.mlp"),
        *(Part(layer, "attn", "attention", f"model.layers.{layer}.self_attn") for layer in range(4)),
        *(_moe(layer, f"model.layers.{layer}.mlp") for layer in range(1, 4)),
        _moe(3, "model.layers.3.moe_b", "mlp.1", index=4),
    ),
)
GPT = Paths(("transformer.h.0",), (Part(0, "mlp", "dense", "transformer.h.0.mlp"),))

# Written by hand, library by library, from their own documentation; none is made from the table in the code.
SPELLINGS = {
    # TransformerLens' HookedTransformer, and this package
    "blocks.3.hook_resid_pre": "blocks.3.hook_resid_pre",
    "blocks.3.hook_resid_post": "blocks.3.hook_resid_post",
    "blocks.3.hook_attn_out": "blocks.3.hook_attn_out",
    "blocks.3.hook_mlp_out": "blocks.3.hook_mlp_out",
    "blocks.3.attn.hook_pattern": "blocks.3.attn.hook_pattern",
    "blocks.3.attn.hook_q": "blocks.3.attn.hook_q",
    "blocks.3.attn.hook_k": "blocks.3.attn.hook_k",
    "blocks.3.attn.hook_v": "blocks.3.attn.hook_v",
    "blocks.3.attn.hook_z": "blocks.3.attn.hook_z",
    "blocks.3.mlp.hook_post": "blocks.3.mlp.hook_post",
    "blocks.3.mlp.hook_expert_weights": "blocks.3.mlp.hook_expert_weights",
    "blocks.3.mlp.hook_expert_indices": "blocks.3.mlp.hook_expert_indices",
    "blocks.3.mlp.hook_router_logits": "blocks.3.mlp.hook_router_logits",
    "blocks.3.mlp.experts.hook_out": "blocks.3.mlp.experts.hook_out",
    "blocks.3.mlp.experts.hook_post": "blocks.3.mlp.experts.hook_post",
    "blocks.3.mlp.shared_expert.hook_out": "blocks.3.mlp.shared_expert.hook_out",
    "blocks.3.mlp.1.hook_router_logits": "blocks.3.mlp.1.hook_router_logits",
    "blocks.3.attn.hook_router_logits": "blocks.3.attn.hook_router_logits",
    # its bridge
    "blocks.3.hook_in": "blocks.3.hook_resid_pre",
    "blocks.3.hook_out": "blocks.3.hook_resid_post",
    "blocks.3.attn.hook_out": "blocks.3.hook_attn_out",
    "blocks.3.mlp.hook_out": "blocks.3.hook_mlp_out",
    "blocks.3.mlp.gate.hook_out": "blocks.3.mlp.hook_router_logits",
    "blocks.3.attn.q.hook_out": "blocks.3.attn.hook_q",
    "blocks.3.mlp.hook_in": "blocks.3.mlp.hook_in",
    "blocks.3.mlp.1.hook_in": "blocks.3.mlp.1.hook_in",
    "blocks.3.attn.o.hook_in": "blocks.3.attn.hook_z",
    "blocks.0.mlp.out.hook_in": "blocks.0.mlp.hook_post",
    "blocks.3.mlp.shared_experts.hook_out": "blocks.3.mlp.shared_expert.hook_out",
    "blocks.3.mlp.1.hook_out": "blocks.3.mlp.1.hook_mlp_out",
    # short names
    "resid_post3": "blocks.3.hook_resid_post",
    "resid_pre.3": "blocks.3.hook_resid_pre",
    "k3": "blocks.3.attn.hook_k",
    "k3a": "blocks.3.attn.hook_k",
    "attn3": "blocks.3.attn.hook_pattern",
    "attn_probs.3": "blocks.3.attn.hook_pattern",
    "post3": "blocks.3.mlp.hook_post",
    "router_logits.3": "blocks.3.mlp.hook_router_logits",
    "expert_idx.3": "blocks.3.mlp.hook_expert_indices",
    # transformers
    "model.layers.3": "blocks.3.hook_resid_post",
    "model.layers.3.mlp": "blocks.3.hook_mlp_out",
    "model.layers.3.self_attn": "blocks.3.hook_attn_out",
    "model.layers.3.mlp.gate": "blocks.3.mlp.hook_router_logits",
    "model.layers.3.mlp.experts": "blocks.3.mlp.experts.hook_out",
    "model.layers.3.mlp.shared_experts": "blocks.3.mlp.shared_expert.hook_out",
    "layers.3.mlp": "blocks.3.hook_mlp_out",
    # nnsight
    "model.layers[3].input": "blocks.3.hook_resid_pre",
    "model.layers[3].output": "blocks.3.hook_resid_post",
    "model.layers[3].output[0]": "blocks.3.hook_resid_post",
    "model.model.layers.3.output": "blocks.3.hook_resid_post",
    "model.layers[3].mlp.output": "blocks.3.hook_mlp_out",
    "model.layers[3].mlp.input": "blocks.3.mlp.hook_in",
    "model.layers[3].self_attn.output[0]": "blocks.3.hook_attn_out",
    "model.layers[3].self_attn.o_proj.input": "blocks.3.attn.hook_z",
    "model.layers[3].self_attn.q_proj.output": "blocks.3.attn.hook_q",
    "model.layers[0].mlp.down_proj.input": "blocks.0.mlp.hook_post",
    "model.layers[3].mlp.gate.output[0]": "blocks.3.mlp.hook_router_logits",
    "model.layers[3].mlp.gate.output[1]": "blocks.3.mlp.hook_expert_weights",
    "model.layers[3].mlp.gate.output[2]": "blocks.3.mlp.hook_expert_indices",
    "model.layers[3].mlp.experts.inputs[0][1]": "blocks.3.mlp.hook_expert_indices",
    "model.layers[3].mlp.experts.inputs[0][2]": "blocks.3.mlp.hook_expert_weights",
    "model.layers[3].moe_b.gate.output[4]": "blocks.3.mlp.1.hook_router_logits",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_of_a_library_is_read_as_the_stored_one(name: str) -> None:
    assert str(read_site(name, MODEL)) == SPELLINGS[name]


@pytest.mark.parametrize("name", ["transformer.h.0", "transformer.h[0].output[0]", "transformer.h.0.output"])
def test_a_path_means_what_stands_there_in_this_model(name: str) -> None:
    assert read_site(name, GPT) == Site(0, "", "hook_resid_post")
    with pytest.raises(InputError, match="is not a site"):
        read_site(name, MODEL)


EVERY = [
    *(("", tensor) for tensor in ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out")),
    *(("attn", f"hook_{name}") for name in ("pattern", "q", "k", "v", "z")),
    *((block, f"hook_{name}") for block in ("mlp", "mlp.1", "attn") for name in ("router_logits", "expert_indices")),
    *((block, name) for block in ("mlp", "mlp.1") for name in ("hook_expert_weights", "experts.hook_out")),
    *((block, name) for block in ("mlp", "mlp.2") for name in ("experts.hook_post", "shared_expert.hook_out")),
    ("mlp", "hook_post"),
    ("mlp.1", "hook_mlp_out"),
    ("attn.1", "hook_attn_out"),
]


@given(layer=st.integers(0, 3), place=st.sampled_from(EVERY))
def test_every_spelling_of_a_site_reads_back_as_it(layer: int, place: tuple[str, str]) -> None:
    site = Site(layer, *place)
    found = spellings(site, MODEL)
    assert found[0] == str(site)
    for name in found:
        if "mlp.gate.hook_out" in name and layer == 0:
            continue  # layer 0 is dense: see below
        assert read_site(name, MODEL) == site, name


def test_no_spelling_means_two_sites() -> None:
    found = [name for layer in range(4) for place in EVERY for name in spellings(Site(layer, *place), MODEL)]
    assert len(found) == len(set(found))
    assert len(found) > 300


def test_names_of_get_act_name_are_read_as_it_writes_them() -> None:
    lens = pytest.importorskip("transformer_lens", reason="TransformerLens is not installed")
    for name in ("resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern", "post", "attn", "key",
                 "query", "value", "mlp_post"):  # fmt: skip
        written = lens.utilities.get_act_name(name, 7)
        assert str(read_site((name, 7))) == written
        if "_" not in name:  # it reads digits only behind a plain word
            assert str(read_site(f"{name}7")) == lens.utilities.get_act_name(f"{name}7")


def test_a_tuple_counts_layers_from_the_end_where_the_model_is_known() -> None:
    assert read_site(("resid_post", -1), MODEL) == Site(3, "", "hook_resid_post")
    assert read_site(("k", 2, "a"), MODEL) == Site(2, "attn", "hook_k")
    with pytest.raises(InputError, match="is not a site"):
        read_site(("resid_post", -1))


def test_a_site_is_given_back() -> None:
    assert read_site(Site(1, "mlp", "hook_post")) == Site(1, "mlp", "hook_post")


def test_the_gate_of_a_dense_mlp_is_no_router() -> None:
    with pytest.raises(InputError, match=r"no router: layer 0.*blocks\.0\.mlp\.hook_post"):
        read_site("blocks.0.mlp.gate.hook_out", MODEL)


def test_experts_right_in_the_block_leave_the_block_its_path() -> None:
    model = Paths(("layers.0",), (_moe(0, "layers.0"),))
    assert read_site("layers.0", model) == Site(0, "", "hook_resid_post")
    assert read_site("layers.0.gate", model) == Site(0, "mlp", "hook_router_logits")


def test_paths_are_those_of_the_model_before_a_bridge_wrapped_it() -> None:
    wrapped = "model.layers.0._original_component.mlp._original_component"
    model = Paths(("model.layers.0",), (_moe(0, wrapped),))
    assert read_site("model.layers[0].mlp.gate.output[0]", model) == Site(0, "mlp", "hook_router_logits")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("blocks.2.hook_resid_mid", r"did you mean blocks\.2\.hook_resid_pre\?"),
        ("blocks.2.mlp.hook_router_logit", r"did you mean blocks\.2\.mlp\.hook_router_logits\?"),
        ("resid_pst2", r"did you mean resid_post2\?"),
        ("model.layers.2.mlp.gates", r"did you mean model\.layers\.2\.mlp\.gate\?"),
        ("model.layers[2].self_attn.input", r"input of a module.*blocks\.2\.hook_attn_out"),
        ("blocks.2.mlp.experts.5.hook_out", r"keep the slots of that expert"),
        ("model.layers[2].mlp.experts.output", r"is not a site"),
        ("model.layers[3].moe_b.gate.output[1]", r"is not a site"),
        ("", r"blocks\.3\.mlp\.hook_router_logits"),
        ("blocks.2", r"is not a site"),
        ("blocks.2.mlp.hook_post\nx", r"is not a site"),
    ],
)
def test_what_is_no_site_is_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        read_site(name, MODEL)


def test_a_path_without_a_model_says_that_it_needs_one() -> None:
    with pytest.raises(InputError, match="needs the model's anatomy"):
        read_site("model.layers.3.mlp")
