"""Interventions as data: they come back from JSON as they went, and what is none is refused with the field named."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moescope.edits as e
from moescope.core.edit import edits
from moescope.core.edit_text import read_edit
from moescope.core.errors import InputError
from moescope.core.positions import read_positions

DRAW = random.Random(0)
VECTOR = [DRAW.gauss(0, 1) for _ in range(70)] + [1e-308, 5e-324, -0.0, 1 / 3]

ONE_OF_EACH = [
    e.Ablate(layer=3, experts=[5, 9], how="route_around", positions="generated", strength=1),
    e.Ablate(layer=1, experts=2, how="mean", means=[VECTOR]),
    e.Force(experts=4, weight=0.25),
    e.Bias(layer=(0, 2), experts=[1], value=-1e-3, strength=0.1),
    e.Scale(experts=np.array([1, 2]), factor=np.float32(0.1)),
    e.Keep(experts=range(4), positions="3:"),
    e.SetRouting(run="base", weights="own"),
    e.MixRouting(reference=[0.25] * 4, share=0.3),
    e.TopK(k=3),
    e.RankRouting(ranks=[2, 3]),
    e.TopP(p=0.4, renormalise=False),
    e.RandomRouting(seed=7),
    e.SwapExperts(first=2, second=0, block="mlp.1"),
    e.FakeQuant(experts=[0], bits=3),
    e.Add(vector=VECTOR, layer=2, strength=-2.5),
    e.ProjectOut(vector=VECTOR[:5], site="hook_mlp_out"),
    e.Clamp(vector=VECTOR[:5], low=-1.0),
    e.SetChannel(channels=[3, 1], values=[0.5, -0.5], above=100.0),
    e.MaskHead(heads=[0, 3], how="uniform", layer=1),
    e.Skip(part="attn", layer=0),
    e.Patch(run="other", site="hook_resid_pre", positions="token:13"),
    e.Splice(layer=2, site="mlp.experts.hook_out", sae="one", strength=0.5),
    e.Latents(
        layer=2, site="attn.hook_q", sae="one", latents=np.array([4, 1]), how="set", values=[3, 0.1], forced=True
    ),
    e.Descend(layer=2, sae="one", target=[abs(x) for x in VECTOR], steps=3, rate=0.25, keep=5),
]


def test_every_kind_is_tried_here() -> None:
    assert {edit.kind for edit in ONE_OF_EACH} == set(edits.names())


@pytest.mark.parametrize("edit", ONE_OF_EACH, ids=lambda edit: edit.kind)
def test_an_edit_comes_back_exactly(edit: e.Edit) -> None:
    back = e.Intervention.from_json(e.Intervention([edit], name="x").to_json())
    assert back.edits == (edit,)
    assert type(back.edits[0]) is type(edit)
    for name, value in vars(edit).items():
        assert type(getattr(back.edits[0], name)) is type(value), name


def test_the_bits_of_long_vectors_come_back() -> None:
    written = e.Intervention([e.Add(vector=VECTOR)]).to_json()
    (back,) = e.Intervention.from_json(written).edits
    assert isinstance(back, e.Add)
    assert [x.hex() for x in back.vector] == [float(x).hex() for x in VECTOR]
    assert "0.333" not in written  # packed


def test_whole_interventions_keep_order_name_and_model(tmp_path: Path) -> None:
    all_of_them = e.Intervention(ONE_OF_EACH, name="all — Ω", anatomy="0123456789abcdef")
    all_of_them.save(tmp_path / "all.json")
    assert e.Intervention.load(tmp_path / "all.json") == all_of_them
    assert list(tmp_path.iterdir()) == [tmp_path / "all.json"]  # nothing half-written beside it
    assert json.loads((tmp_path / "all.json").read_text())["format"] == 1


def test_the_empty_intervention_is_one_too() -> None:
    empty = e.Intervention()
    assert e.Intervention.from_json(empty.to_json()) == empty
    assert len(empty) == 0
    assert empty


def test_strengths_are_multiplied_and_interventions_added() -> None:
    one = e.Intervention([e.Add(vector=[1.0], strength=2.0)], name="a")
    other = e.Intervention([e.Scale(experts=0)], name="b", anatomy="0" * 16)
    assert [edit.strength for edit in (one + other).with_strength(0.5)] == [1.0, 0.5]
    assert (one + other).name == "a + b"
    assert (one + other).anatomy == "0" * 16
    assert one.with_strength(1) == one
    with pytest.raises(InputError, match="two models"):
        other + e.Intervention(anatomy="1" * 16)


def test_equal_interventions_are_equal_keys() -> None:
    make = lambda: e.Intervention([e.Ablate(experts=[1, 2], layer=[0, 1])])  # noqa: E731 — twice the same
    assert {make(): 1}[make()] == 1


def test_an_intervention_for_a_model_carries_its_digest() -> None:
    class Anatomy:
        digest = "feedfeedfeedfeed"

    assert e.Intervention().for_model(Anatomy()).anatomy == Anatomy.digest


def test_what_is_shown_is_short_and_escaped() -> None:
    long = e.Intervention([e.Add(vector=[0.5] * 4096)], name="<script>")
    assert len(repr(long)) < 200
    assert "<script>" not in long._repr_html_()
    assert "&lt;script&gt;" in long._repr_html_()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "JSON"),
        ("[]", "no intervention"),
        ('{"edit": []}', "no intervention"),
        ('{"edits": [{"layer": 1}]}', "kind"),
        ('{"edits": [{"kind": "abalte"}]}', "ablate"),
        ('{"edits": [{"kind": "ablate", "experts": [1], "expert": 2}]}', "no field 'expert'"),
        ('{"edits": [{"kind": "ablate", "experts": ["a"]}]}', "experts cannot be"),
        ('{"edits": [{"kind": "ablate", "experts": [1], "how": "zeroo"}]}', "zero"),
        ('{"edits": [{"kind": "add", "vector": {"float64": "!!", "shape": [1]}}]}', "vector cannot be read"),
        ('{"edits": [{"kind": "add", "vector": [NaN]}]}', "finite"),
        ('{"format": 99, "edits": []}', "newer moescope"),
        ('{"edits": [], "extra": 1}', "extra"),
        ('{"edits": [], "name": 3}', "name"),
    ],
)
def test_what_is_no_intervention_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        e.Intervention.from_json(text)
    (tmp_path / "it.json").write_text(text)
    with pytest.raises(InputError, match=r"it\.json"):
        e.Intervention.load(tmp_path / "it.json")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json"):
        e.Intervention.load(tmp_path / "none.json")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="bytes"):
        e.Intervention.load(tmp_path / "bytes")


@pytest.mark.parametrize(
    "make",
    [
        lambda: e.Ablate(experts=[]),
        lambda: e.Ablate(experts=[-1]),
        lambda: e.Ablate(experts=[1.5]),
        lambda: e.Ablate(experts=True),
        lambda: e.Ablate(experts=[1], how="gone"),  # type: ignore[arg-type]  # the point
        lambda: e.Ablate(experts=[1], layer=-1),
        lambda: e.Ablate(experts=[1], layer=[]),
        lambda: e.Ablate(experts=[1], strength=math.nan),
        lambda: e.Ablate(experts=[1], strength="1"),  # type: ignore[arg-type]  # the point
        lambda: e.Ablate(experts=[1], positions="3:3"),
        lambda: e.Ablate(experts=[1], positions="last"),
        lambda: e.Ablate(experts=[1, 2], how="mean", means=[[1.0]]),
        lambda: e.Add(vector=[math.inf]),
        lambda: e.TopK(k=0),
        lambda: e.TopP(p=0.0),
        lambda: e.TopP(p=1.5),
        lambda: e.RankRouting(ranks=[0]),
        lambda: e.MixRouting(reference=[0.5, 0.4]),
        lambda: e.MixRouting(reference=[1.5, -0.5]),
        lambda: e.MixRouting(reference=[1.0], share=2.0),
        lambda: e.FakeQuant(experts=[1], bits=1),
        e.SetRouting,
        lambda: e.SwapExperts(first=-1),
        lambda: e.Intervention([3]),  # type: ignore[list-item]  # the point
        lambda: e.Intervention("ablate"),  # type: ignore[arg-type]  # the point
    ],
)
def test_edits_that_mean_nothing_are_refused_when_made(make: Any) -> None:
    with pytest.raises(InputError):
        make()


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        (
            "ablate layer=3 experts=5,9 how=route_around positions=generated",
            e.Ablate(layer=3, experts=[5, 9], how="route_around", positions="generated"),
        ),
        ("keep experts=0-3,7 layer=0-1", e.Keep(experts=[0, 1, 2, 3, 7], layer=[0, 1])),
        ("top_p p=0.5 renormalise=false", e.TopP(p=0.5, renormalise=False)),
        ("force experts=1 weight=none", e.Force(experts=1)),
        ("add vector=1,-2.5 strength=1e-1", e.Add(vector=[1.0, -2.5], strength=0.1)),
        ("set_routing run='my run' weights=own", e.SetRouting(run="my run", weights="own")),
        ("set_routing run=7", e.SetRouting(run="7")),
        ("skip", e.Skip()),
    ],
)
def test_edits_are_read_from_one_line(text: str, edit: e.Edit) -> None:
    assert read_edit(text) == edit


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "missing"),
        ("abalte experts=1", "ablate"),
        ("ablate expert=1", "did you mean experts"),
        ("ablate experts=1 experts=2", "twice"),
        ("ablate experts=x", "experts"),
        ("ablate 3", "no field"),
        ("top_k k=2,3", "k cannot be"),
        ("ablate 'experts=1", "no edit"),
    ],
)
def test_lines_that_are_no_edit_are_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_edit(text)


@pytest.mark.parametrize("one", ["all", "prompt", "generated", "0:4", "2:6", "4:", "token:7", "token:8"])
@pytest.mark.parametrize("other", ["all", "prompt", "generated", "0:4", "2:6", "4:", "token:7", "token:8"])
def test_positions_overlap_where_some_token_is_at_both(one: str, other: str) -> None:
    def holds(text: str, place: int, token: int, generated: bool) -> bool:
        if text in ("all", "prompt", "generated"):
            return text == "all" or generated == (text == "generated")
        if text.startswith("token:"):
            return token == int(text[6:])
        start, stop = text.split(":")
        return int(start) <= place < (int(stop) if stop else 99)

    tokens = [(place, token, generated) for place in range(9) for token in (7, 8) for generated in (False, True)]
    expected = any(holds(one, *token) and holds(other, *token) for token in tokens)
    assert read_positions(one).overlaps(read_positions(other)) == expected
