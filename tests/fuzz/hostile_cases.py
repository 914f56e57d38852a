"""The hostile inputs, numbered: case n of a seed is the same on every machine and in every run."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import valid_files as valid
import yaml
from hostile_bytes import broken
from hostile_tables import as_npy, as_npz, as_parquet, hostile_arrays, hostile_csv, hostile_table
from hostile_trees import HOSTILE, as_json, hostile


@dataclass
class Case:
    """One input: the reader it is for, and the text or the path it is given."""

    reader: str
    text: str = ""
    path: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)


def case(number: int, folder: Path, *, seed: int = 0) -> Case:
    """Case `number`; files go into `folder`, which is empty.

    Of each ten: four corpora, three traces, two edits in words, and one file of an intervention, of thresholds or of options.
    """
    dice = random.Random(f"{seed} {number}")
    kind = number % 10
    if kind < 4:
        return Case("corpus", path=_corpus(folder, dice))
    if kind < 7:
        return _trace(folder, dice)
    if kind < 9:
        return Case("edit", text=_words(dice))
    reader = dice.choice(("intervention", "intervention", "thresholds", "config"))
    return Case(reader, path=_intervention(folder, dice) if reader == "intervention" else _yaml(folder, dice, reader))


def _corpus(folder: Path, dice: random.Random) -> Path:
    if dice.random() < 0.06:
        return _place(folder, dice, dice.choice((".jsonl", ".csv", ".parquet", ".txt", "")))
    name, make = dice.choice(_CORPORA)
    raw = make(dice)
    if name.endswith(".txt") or dice.random() < 0.35:
        raw = broken(raw, dice, other=_CORPORA[0][1](dice))
    inside = folder / "inner" if dice.random() < 0.1 else folder
    inside.mkdir(exist_ok=True)
    (inside / name).write_bytes(raw)
    return folder if inside != folder else folder / name


_CORPORA: tuple[tuple[str, Callable[[random.Random], bytes]], ...] = (
    ("a.jsonl", lambda dice: b"\n".join(as_json(hostile(record, dice), dice) for record in valid.records())),
    ("a.csv", lambda dice: hostile_csv(valid.corpus_rows(), dice)),
    ("a.parquet", lambda dice: as_parquet(hostile_table(valid.corpus_table(), dice), dice)),
    ("a.txt", lambda dice: "Ein Text.\nAnd another ligne: été.\n".encode(dice.choice(("utf-8", "utf-16", "latin-1")))),
)


def _trace(folder: Path, dice: random.Random) -> Case:
    if dice.random() < 0.06:
        return Case(
            "trace",
            path=_place(
                folder, dice, dice.choice((".parquet", ".csv", ".npz", ".npy", ".json", ".jsonl", ".pt", ".pkl"))
            ),
        )
    name, make = dice.choice(_TRACES)
    raw = make(dice)
    if name.endswith((".pkl", ".pt")) or dice.random() < 0.35:
        raw = broken(raw, dice, other=valid.pickled(valid.olmoe_values()[0], 2))
    (folder / name).write_bytes(raw)
    options: dict[str, Any] = {"n_experts": valid.E, "top_k": valid.K}
    if dice.random() < 0.3:
        options = dice.choice(
            ({}, {"n_experts": 3}, {"top_k": 1, "layers": [2, 5, 9]}, {"top_k": 2, "probabilities": True})
        )
    if dice.random() < 0.1:
        options["format"] = dice.choice(("neutral", "vllm", "sglang", "llama.cpp", "router_logits", "olmoe"))
    if name.startswith("folder"):
        (folder / "routing").mkdir()
        (folder / name).rename(folder / "routing" / "part.parquet")
        (folder / "moescope.json").write_bytes(as_json(hostile({"run": {"model": "m"}}, dice), dice))
        return Case("trace", path=folder, options=options)
    return Case("trace", path=folder / name, options=options)


def _answers(dice: random.Random) -> bytes:
    answers = hostile(valid.vllm_answers(), dice)
    return as_json(answers, dice)


def _pickle(dice: random.Random) -> bytes:
    return valid.pickled(dice.choice(valid.olmoe_values()), dice.choice((0, 1, 2, 3, 4, 5)))


_TRACES: tuple[tuple[str, Callable[[random.Random], bytes]], ...] = (
    ("a.parquet", lambda dice: as_parquet(hostile_table(valid.trace_table(), dice), dice)),
    ("folder.parquet", lambda dice: as_parquet(hostile_table(valid.trace_table(), dice), dice)),
    ("a.csv", lambda dice: hostile_csv(valid.trace_rows(), dice)),
    ("b.csv", lambda dice: hostile_csv(valid.llama_rows(dice.randrange(4)), dice)),
    ("a.npz", lambda dice: as_npz(hostile_arrays(valid.neutral_arrays(), dice), dice)),
    ("b.npz", lambda dice: as_npz(hostile_arrays(valid.score_arrays(), dice), dice)),
    ("a.npy", lambda dice: as_npy(hostile_arrays({"x": valid.decisions()}, dice).get("x", np.zeros(0)), dice)),
    (
        "b.npy",
        lambda dice: as_npy(
            hostile_arrays({"x": valid.score_arrays()["router_logits"]}, dice).get("x", np.zeros(0)), dice
        ),
    ),
    ("a.json", _answers),
    ("a.jsonl", lambda dice: b"\n".join(as_json(hostile(answer, dice), dice) for answer in valid.vllm_answers())),
    ("b.jsonl", lambda dice: b"\n".join(as_json(hostile(line, dice), dice) for line in valid.olmoe_lines())),
    ("a.pkl", _pickle),
    ("a.pt", lambda dice: valid.sglang_dump(counted=dice.random() < 0.4)),
)


def _place(folder: Path, dice: random.Random, suffix: str) -> Path:
    """A path that is no ordinary file."""
    path = folder / f"a{suffix}"
    kind = dice.randrange(9)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path)
    elif kind == 3:
        path.symlink_to(folder / "nowhere")
    elif kind == 4:
        path.symlink_to("/dev/zero")
    elif kind == 5:
        path.symlink_to("/dev/null")
    elif kind == 6:
        path.mkdir()
        os.mkfifo(path / f"b{suffix}")
        (path / "loop").symlink_to(path)
    elif kind == 7:
        return folder / ("x" * 300 + suffix)
    else:
        path = folder / f"a[0]*?\n\u202e'\"{suffix}"
        path.write_bytes(b"\0" * 100)
    return path


def _words(dice: random.Random) -> str:
    words = dice.choice(valid.EDITS).split()
    for _ in range(dice.choice((1, 1, 2, 3))):
        place = dice.randrange(len(words))
        kind = dice.random()
        name, equals, _ = words[place].partition("=")
        if kind < 0.5 and equals:
            words[place] = f"{name}={dice.choice(_VALUES)}"
        elif kind < 0.65:
            other = dice.choice(valid.EDITS).split()
            words.insert(place, dice.choice(other))
        elif kind < 0.75:
            del words[place]
            words = words or [""]
        else:
            raw = broken(" ".join(words).encode("utf-8", "surrogatepass"), dice)[:20_000]
            return raw.decode("utf-8", dice.choice(("replace", "surrogateescape", "ignore")))
    return " ".join(words)


_VALUES = (
    "", ",", ",,", "1,", "-1", "0-", "9-0", "0-99999999", "5-3", "0-100001", "999999999999", "9" * 5000, "1e999", "nan", "inf",
    "-inf", "1.5", "true", "none", "None,1", "x", "'", '"', "\\", "\x00", "\ud800", "1,1", "0", "2e0", "0x10", "1_0", "٣", "²",
    "1,none", "=", "a=b", "token:", "token:-1", "token:99999999999999999999", ":", "5:3", "0:1:2", "0:", "[1]", "0.5", "1e308",
    "10" * 200, "::", "all,prompt", "hook_resid_post", "nowhere", "token:" + "9" * 5000, "9" * 5000 + ":", "۳:۴",
)  # fmt: skip


def _yaml(folder: Path, dice: random.Random, reader: str) -> Path:
    """Thresholds or options: a tree as YAML, or YAML that is a trap."""
    if dice.random() < 0.05:
        return _place(folder, dice, ".yaml")
    tree = hostile(valid.THRESHOLDS if reader == "thresholds" else valid.OPTIONS, dice)
    if dice.random() < 0.1:
        raw = dice.choice(valid.YAML_TRAPS)
    else:
        raw = as_json(tree, dice)  # JSON is YAML
        if dice.random() < 0.5:
            with contextlib.suppress(
                RecursionError, ValueError
            ):  # what nests too deep, and numbers of thousands of digits
                raw = yaml.dump(tree, allow_unicode=dice.random() < 0.5).encode("utf-8", "surrogatepass")
    path = folder / "a.yaml"
    path.write_bytes(broken(raw, dice) if dice.random() < 0.4 else raw)
    return path


def _intervention(folder: Path, dice: random.Random) -> Path:
    if dice.random() < 0.05:
        return _place(folder, dice, ".json")
    from moescope.core.edit_text import read_edit
    from moescope.core.intervention import Intervention

    picked = [read_edit(words) for words in dice.sample(valid.EDITS, 3)]
    data = hostile(Intervention(picked, name="cut").to_data(), dice)
    if dice.random() < 0.1 and isinstance(data, dict) and isinstance(data.get("edits"), list) and data["edits"]:
        data["edits"][0] = {"kind": "add", "vector": dice.choice(HOSTILE)()}
    raw = as_json(data, dice)
    if dice.random() < 0.3:
        raw = broken(raw, dice)
    path = folder / "a.json"
    path.write_bytes(raw)
    return path
