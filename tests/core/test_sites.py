"""Sites: every name reads back as the place it was made from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.core.errors import InputError
from moescope.core.sites import Site

# Section 5 of the design: every site with its block and tensor.
TABLE = {
    "blocks.3.hook_resid_pre": ("", "hook_resid_pre"),
    "blocks.3.hook_resid_post": ("", "hook_resid_post"),
    "blocks.3.hook_attn_out": ("", "hook_attn_out"),
    "blocks.3.hook_mlp_out": ("", "hook_mlp_out"),
    "blocks.3.mlp.hook_router_logits": ("mlp", "hook_router_logits"),
    "blocks.3.mlp.hook_expert_indices": ("mlp", "hook_expert_indices"),
    "blocks.3.mlp.hook_expert_weights": ("mlp", "hook_expert_weights"),
    "blocks.3.mlp.experts.hook_out": ("mlp", "experts.hook_out"),
    "blocks.3.mlp.experts.hook_post": ("mlp", "experts.hook_post"),
    "blocks.3.mlp.shared_expert.hook_out": ("mlp", "shared_expert.hook_out"),
    "blocks.3.mlp.hook_post": ("mlp", "hook_post"),
    "blocks.3.attn.hook_pattern": ("attn", "hook_pattern"),
    "blocks.3.attn.hook_z": ("attn", "hook_z"),
    "blocks.3.mlp.1.hook_router_logits": ("mlp.1", "hook_router_logits"),
    "blocks.3.attn.1.hook_q": ("attn.1", "hook_q"),
    "blocks.3.attn.hook_router_logits": ("attn", "hook_router_logits"),
}


@pytest.mark.parametrize("name", TABLE)
def test_site_of_the_design_is_read_and_written_alike(name: str) -> None:
    block, tensor = TABLE[name]
    assert Site.parse(name) == Site(3, block, tensor)
    assert str(Site(3, block, tensor)) == name


@given(
    layer=st.integers(0, 999),
    block=st.sampled_from(["", "mlp", "attn", "mlp.1", "attn.12"]),
    tensor=st.sampled_from(sorted({tensor for _, tensor in TABLE.values()})),
)
def test_any_site_reads_back_as_itself(layer: int, block: str, tensor: str) -> None:
    site = Site(layer, block, tensor)
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    "text",
    ["", "blocks", "blocks.", "blocks.x.hook_resid_post", "blocks.-1.hook_z", "blocks.3", "blocks.3.", "model.layers.3.mlp",
     "blocks.3.hook resid", "xblocks.3.hook_z", "blocks.3.hook_z\n", "blocks.3.hook_z;drop"],
)  # fmt: skip
def test_text_that_is_no_site_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=r"is not a site.*blocks\.3\.mlp\.hook_router_logits"):
        Site.parse(text)


def test_sites_sort_by_layer_as_a_number() -> None:
    assert sorted([Site(10, "", "a"), Site(9, "mlp", "a"), Site(9, "", "b")])[-1].layer == 10
