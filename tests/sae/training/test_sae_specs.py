"""What to train, as plain data and as text."""

from __future__ import annotations

import json

import pytest

from moescope.core.errors import InputError
from moescope.sae.training.specs import ARCHITECTURES, SaeSpec


@pytest.mark.parametrize("form", ARCHITECTURES)
def test_every_form_goes_through_text_and_json(form: str) -> None:
    spec = SaeSpec.parse(f"{form}:d=64,lr=0.003,seed=4,centre=mean")
    assert (spec.architecture, spec.d_sae, spec.lr, spec.seed, spec.centre) == (form, 64, 0.003, 4, "mean")
    assert SaeSpec.parse(str(spec)) == spec
    assert SaeSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


def test_text_says_only_what_was_asked() -> None:
    assert str(SaeSpec.parse("matryoshka:x=4,k=8.5,widths=16+32")) == "matryoshka:x=4,k=8.5,widths=16+32"
    assert str(SaeSpec()) == "topk"


def test_latents_come_from_the_width() -> None:
    assert SaeSpec(expansion=2.5).latents(40) == 100
    assert SaeSpec().latents(40) == 320
    assert SaeSpec(d_sae=77).latents(40) == 77


def test_rate_falls_as_the_root_of_the_width() -> None:
    assert SaeSpec().rate(2**14) == pytest.approx(2e-4)
    assert SaeSpec().rate(2**16) == pytest.approx(1e-4)
    assert SaeSpec().rate(8) == 1e-3
    assert SaeSpec(lr=0.5).rate(8) == 0.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sparse:d=4", "no architecture 'sparse'"),
        ("topk:d=64,k=0", "k is a number over 0"),
        ("topk:k=nan", "k is a number"),
        ("topk:k=2.5", "whole number"),
        ("topk:l1=3", "topk has no l1"),
        ("standard:k=3", "standard has no k"),
        ("jumprelu:l0=1,target_l0=4", "two ways"),
        ("topk:d=64,x=2", "how many latents"),
        ("topk:width=3", "no setting 'width'"),
        ("topk:d", "is no setting"),
        ("topk:d=4,d=5", "twice"),
        ("topk:d=many", "no number"),
        ("topk:warm_up=0.8,decay=0.5", "shares of the steps"),
        ("topk:normalise=layer_norm", "one by one"),
        ("transcoder:normalise=whiten", "normalise=none or scale"),
        ("matryoshka:d=64,widths=32+16", "grow"),
        ("topk:widths=8", "no nested widths"),
        ("topk:centre=middle", "no centre"),
    ],
)
def test_what_cannot_be_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        SaeSpec.parse(text)


def test_more_active_latents_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match="of which 32 are to be active"):
        SaeSpec(d_sae=16).latents(8)
    with pytest.raises(InputError, match="nested width of 512"):
        SaeSpec.parse("matryoshka:d=64,k=4,widths=32+512").latents(8)
