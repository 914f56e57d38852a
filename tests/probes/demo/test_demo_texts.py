"""The sample of the demo text: even over domains, and even in any first part of the file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from moescope.core.errors import InputError
from moescope.probes.demo.texts import LONGEST, main, sample


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Forty documents of one domain, ten of another, one too long of a third."""
    lengths = {"many": [100] * 40, "few": [100] * 10, "long": [LONGEST + 5000]}
    with (tmp_path / "train.jsonl").open("w") as file:
        for domain, sizes in lengths.items():
            for number, size in enumerate(sizes):
                text = f"{domain} {number} ".ljust(size, "x")
                file.write(json.dumps({"domain": domain, "text": text, "source": f"{domain}/{number}"}) + "\n")
    return tmp_path


def test_domains_share_the_characters_and_take_turns(cache: Path) -> None:
    found = list(sample(cache, ["many", "few"], 1200))
    assert Counter(d["label"] for d in found) == {"many": 6, "few": 6}
    assert [d["label"] for d in found[:4]] == ["many", "few", "many", "few"]
    assert len({d["source"] for d in found}) == 12


def test_a_domain_that_runs_out_gives_all_it_has(cache: Path) -> None:
    assert Counter(d["label"] for d in sample(cache, ["many", "few"], 6000)) == {"many": 30, "few": 10}


def test_long_documents_are_cut(cache: Path) -> None:
    assert [len(d["text"]) for d in sample(cache, ["long"], 10**6)] == [LONGEST]


def test_same_text_gives_the_same_file(cache: Path) -> None:
    for name in ("a", "b"):
        main(["--cache", str(cache), "--out", str(cache / f"{name}.jsonl"), "--characters", "2000"])
    assert (cache / "a.jsonl").read_bytes() == (cache / "b.jsonl").read_bytes() != b""


def test_unknown_domain_is_told(cache: Path) -> None:
    with pytest.raises(InputError, match="no domain 'poems'"):
        list(sample(cache, ["poems"], 100))
