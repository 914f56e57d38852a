"""Slices of every family's attention put together are its whole pattern, with a mask and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moescope.core.sites import PATTERN, Site
from moescope.probes import attention_slices
from moescope.probes.anatomy import find_anatomy
from moescope.probes.attention_taps import PATTERN_SLICES, reducible_sites, tap_attention
from moescope.probes.families.tiny import build_tiny, moe_model_types

LENGTHS = (24, 15)
# Its own pattern does not show its sinks, which scale what a head puts out.
SCALED = ("granitemoe_swa",)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in moe_model_types() if name not in SCALED])
def test_slices_are_the_pattern(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_slices, "SLICE_BYTES_CPU", 2000)
    model = build_tiny(family)
    anatomy = find_anatomy(model)
    ids = torch.randint(3, 90, (2, LENGTHS[0]), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(ids)
    padded[1, LENGTHS[1] :] = 0
    sites = [site for site in reducible_sites(model, anatomy) if site.tensor in (PATTERN, PATTERN_SLICES)]
    for mask in (padded, None):
        whole: dict[tuple[int, str], Any] = {}
        parts: dict[tuple[int, str], Any] = {}

        def receive(site: Site, tensors: dict[str, Any], whole: Any = whole, parts: Any = parts) -> None:
            place = (site.layer, site.block)
            if site.tensor == PATTERN:
                whole[place] = tensors["pattern"]
                return
            slices = tensors["slices"]
            if slices.refused is None:
                parts[place] = torch.zeros(slices.rows, slices.heads, slices.queries, slices.keys)
                for pattern, first in slices:
                    parts[place][:, :, first : first + pattern.shape[2], : pattern.shape[3]] = pattern

        with torch.no_grad(), tap_attention(model, anatomy, sites, receive):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        assert set(parts) == set(whole) != set()
        for place, expected in whole.items():
            for row, length in enumerate(LENGTHS if mask is not None else (24, 24)):
                real = (row, slice(None), slice(length))
                torch.testing.assert_close(parts[place][real], expected[real].float(), atol=1e-5, rtol=0)
