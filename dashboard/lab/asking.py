"""What the page asks of the model, answered as data for the browser; every refusal is part of the answer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from moescope.core.errors import InputError, MoescopeError
from moescope.core.intervention import Intervention
from moescope.dashboard.lab.bench import Bench, RefusedEditError
from moescope.dashboard.lab.lines import read_all, told
from moescope.dashboard.model_host import ModelHost
from moescope.dashboard.model_requests import Replaced, Stopped

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel
    from moescope.store.run import Run

MAX_PROMPT = 20_000
_LARGEST = 2**63
_COLDEST = 0.01  # below, logits divided by it are no numbers any more
_SAMPLE = ("bible", "python")
_SAMPLE_LENGTH = 220

_BEFORE = """
    SELECT v.text, t.is_special
    FROM tokens t
    LEFT JOIN vocabulary v
        ON v.run_id = t.run_id
        AND v.token_id = t.token_id
    WHERE t.run_id = $run
      AND t.sequence_id = (SELECT sequence_id FROM tokens WHERE run_id = $run AND token = $token)
      AND t.token <= $token
    ORDER BY t.token DESC
    LIMIT 128
"""


def prompts_of(text: str) -> list[str]:
    r"""The prompts of the box: one a line, `\n` in a line for a line break, `\\` for a backslash.

    Example:
        >>> prompts_of("one\n\ndef f(x):\\n    return x")
        ['one', 'def f(x):\n    return x']
    """
    if len(text) > MAX_PROMPT:
        raise InputError(
            "the prompts are too long", expected=f"at most {MAX_PROMPT:,} characters", found=f"{len(text):,}"
        )
    breaks = (line.replace("\\\\", "\0").replace("\\n", "\n").replace("\0", "\\") for line in text.splitlines())
    return [prompt for prompt in breaks if prompt.strip()]


def in_box(prompts: list[str]) -> str:
    r"""The reverse of `prompts_of`.

    Example:
        >>> in_box(["a\nb", "c"])
        'a\\nb\nc'
    """
    return "\n".join("\\n".join(p.replace("\\", "\\\\").splitlines()) for p in prompts)


@cache
def sample_prompts() -> str:
    """The beginnings of two texts of the demo corpus, as the box holds them."""
    texts = dict(reversed(_demo_corpus()))
    return in_box([texts[label][:_SAMPLE_LENGTH].rsplit(" ", 1)[0] for label in _SAMPLE])


def demo_texts() -> list[str]:
    """The texts of the demo corpus, in an order in which its labels take turns."""
    by_label: dict[str, list[str]] = {}
    for label, text in _demo_corpus():
        by_label.setdefault(label, []).append(text)
    return [text for turn in zip(*by_label.values(), strict=False) for text in turn]


@cache
def _demo_corpus() -> tuple[tuple[str, str], ...]:
    """Label and text of every document."""
    from moescope.probes.demo import CORPUS_PATH

    with CORPUS_PATH.open(encoding="utf-8") as lines:
        documents = [json.loads(line) for line in lines]
    return tuple((str(document["label"]), str(document["text"])) for document in documents)


def text_before(run: Run, token: int) -> str | None:
    """The text of a sequence up to and with a token, as the box holds it; None where the run has no pieces."""
    rows = run.store.fetch(_BEFORE, {"run": run.run_id, "token": token})
    text = "".join(str(piece) for piece, special in reversed(rows) if piece is not None and not special)
    return in_box([text]) if text.strip() else None


class Asking:
    """The page's requests.

    Args:
        host: the model's host.
        bench: what is kept between requests.
    """

    def __init__(self, host: ModelHost, bench: Bench) -> None:
        self._host, self._bench = host, bench

    def answer(self, ask: Mapping[str, Any]) -> dict[str, Any]:
        """The prompts unedited and edited.

        Raises:
            Replaced: a newer request took its place.
        """

        def request(model: LiveModel, prompts: list[str], intervention: Intervention | None) -> dict[str, Any]:
            from moescope.dashboard.lab.comparison import shown

            begun = time.perf_counter()
            base, edited, refused = self._bench.base(model, prompts), None, None
            if intervention is not None:
                try:
                    edited = self._bench.edited(model, base, intervention)
                except Stopped:
                    raise
                except MoescopeError as problem:
                    refused = problem
            row, at = _whole(ask, "row"), None if ask.get("at") is None else _whole(ask, "at")
            found = shown(model, base, edited, row=row, at=at)
            found["refused"] = None if refused is None else _refused(refused)
            return {**found, "model": model.name, "ms": 1000 * (time.perf_counter() - begun)}

        return self._asked(ask, "lab", "the lab's prompts", request)

    def writes(self, ask: Mapping[str, Any]) -> dict[str, Any]:
        """What the model writes after the prompt that is looked at, unedited and edited."""

        def request(model: LiveModel, prompts: list[str], intervention: Intervention | None) -> dict[str, Any]:
            from moescope.dashboard.lab.writing import MAX_WRITTEN, written

            begun = time.perf_counter()
            found = written(
                self._bench,
                model,
                self._bench.base(model, prompts),
                intervention,
                row=_whole(ask, "row"),
                tokens=max(1, min(_whole(ask, "tokens"), MAX_WRITTEN)),
                temperature=_temperature(ask),
                seed=_whole(ask, "seed"),
            )
            return {**found, "ms": 1000 * (time.perf_counter() - begun)}

        return self._asked(ask, "lab writes", "writing in the lab", request)

    def _asked(
        self,
        ask: Mapping[str, Any],
        who: str,
        words: str,
        request: Callable[[LiveModel, list[str], Intervention | None], dict[str, Any]],
    ) -> dict[str, Any]:
        """An answer with the prompts and edits read, or the refusal of what cannot be read or run."""
        tab, stamp = str(ask.get("tab", "")), ask.get("stamp")
        if self._host.source is None:
            return {"state": "no model", "stamp": stamp}
        rows: list[dict[str, str] | None] = []
        try:
            prompts = prompts_of(str(ask.get("prompt") or ""))
            edits, rows = read_all(list(ask.get("edits") or ()), ask.get("kept"))
            sound = [edit for edit in edits if edit is not None]
            intervention = Intervention(sound) if edits and len(sound) == len(edits) else None
            found = self._host.ask(
                lambda model: request(model, prompts, intervention),
                who=f"{who} {tab}",
                words=words,
                keeps=True,
                before=(f"lab writes {tab}",) if who == "lab" else (),
            )
        except MoescopeError as refused:
            if isinstance(refused, Replaced):
                raise
            problem = told(refused)
            return {"state": "refused", "problem": problem, "rows": rows, "stamp": stamp}
        return {"state": "answered", **found, "rows": rows, "stamp": stamp}


def _whole(ask: Mapping[str, Any], name: str) -> int:
    """A number of the request; 0 where it is left out."""
    given = ask.get(name) or 0
    try:
        if abs(found := int(given)) < _LARGEST:
            return found
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{name} is no whole number of 64 bits", found=str(given)[:40])


def _temperature(ask: Mapping[str, Any]) -> float:
    given = ask.get("temperature") or 0
    try:
        found = float(given)
        if found == 0 or _COLDEST <= found < math.inf:
            return found
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError("that is no temperature", expected=f"0, or {_COLDEST} and above", found=str(given)[:40])


def suggested(run: Run | None) -> str:
    """The model to offer where none is chosen: the run's own, where it is on this disk or its name says where it is."""
    return run.model if run is not None and run.model else "demo"


def _refused(problem: MoescopeError) -> dict[str, Any]:
    return {**told(problem), "place": problem.place if isinstance(problem, RefusedEditError) else None}
