"""Cards of the placement and replication simulators: how long the busiest device keeps the others waiting, and what travels."""

from __future__ import annotations

from typing import Any

import pandas as pd

from moescope.core.result import Result
from moescope.dashboard import numbers
from moescope.dashboard.records import Router
from moescope.dashboard.routing_page.card_data import Card, Cards, Range, interval, joined, size
from moescope.dashboard.url_state import ViewState
from moescope.store.run import Run

_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
_MEAN, _TAIL = "busiest ÷ mean device", "busiest ÷ mean device, 99th percentile"


def device_span(known: list[Router]) -> Range:
    """Powers of two from 2 up to the experts of the smallest layer, at most 64."""
    most = _most(known)
    return Range(
        1,
        most,
        1,
        4 if most >= 2 else 2,
        tuple((float(power), str(2**power)) for power in range(1, most + 1)),
        power=True,
    )


def given(known: list[Router]) -> dict[str, Any]:
    """All numbers of devices of the slider in one answer."""
    return {"sweep": ",".join(str(2**power) for power in range(1, _most(known) + 1))}


def copy_span(known: list[Router]) -> Range:
    """0, 1, 2, 4, … up to half of the smallest layer's experts."""
    most = min(router.real for router in known) // 2
    steps = steps_of(most)
    return Range(
        0, len(steps) - 1, 1, 0, tuple((float(i), str(copies)) for i, copies in enumerate(steps)), steps=tuple(steps)
    )


def steps_of(most: int) -> list[int]:
    """The numbers of copies that the analysis tries."""
    return sorted({0, *(1 << power for power in range(most.bit_length()) if 1 << power < most), most})


def placement(result: Result, run: Run, state: ViewState, known: list[Router]) -> Cards:
    """Straggling and traffic of each algorithm at every number of devices, beside placement at random."""
    frame = result.df()
    hidden = _hidden_bytes(run)
    at: dict[str, dict[str, list[Card]]] = {}
    for (name, devices), part in frame[frame["metric"] != "device"].groupby(["placement", "devices"], sort=False):
        usual = frame[(frame["placement"] == "contiguous") & (frame["devices"] == devices)]
        at.setdefault(str(name), {})[str(devices)] = _placement_cards(part, usual, hidden, int(devices), known)
    tried = sorted({int(devices) for devices in frame["devices"]})
    return {
        "choice": ("algorithm", "contiguous"),
        "at": at,
        "words": {str(devices): f"{devices} devices" for devices in tried},
        "marks": {str(devices): [("x", float(devices)), ("x2", float(devices))] for devices in tried},
    }


def replication(result: Result, run: Run, state: ViewState, known: list[Router]) -> Cards:
    """What copies of the hottest experts do, beside copies of random ones and none."""
    frame = result.df()
    means, tails = frame[frame["metric"] == _MEAN], frame[frame["metric"] == _TAIL]
    none = float(means[means["copies"] == 0]["value"].iloc[0])
    experts = sum(router.real for router in known)
    at = {}
    for number, row in enumerate(means.to_dict("records")):
        tail = tails[tails["copies"] == row["copies"]].iloc[0].to_dict()
        at[str(number)] = _copy_cards(row, tail, none, experts, len(known))
    return {
        "choice": ("", ""),
        "at": {"": at},
        "words": {str(number): f"{copies} extra copies a layer" for number, copies in enumerate(means["copies"])},
        "marks": {str(number): [("x", str(copies))] for number, copies in enumerate(means["copies"])},
    }


def _placement_cards(
    part: pd.DataFrame, usual: pd.DataFrame, hidden: float | None, devices: int, known: list[Router]
) -> list[Card]:
    rows = {row["metric"]: row for row in part.to_dict("records")}
    before = {row["metric"]: row for row in usual.to_dict("records")}
    cards: list[Card] = []
    for metric, label in ((_MEAN, "Busiest ÷ mean device"), (_TAIL, "Slowest 1 % of batches")):
        row = rows.get(metric)
        if row is None:
            cards.append({"label": label, "value": numbers.MISSING, "detail": "no batch"})
            continue
        cards.append(
            {
                "label": label,
                "value": f"{row['value']:.2f}×",
                "detail": joined(
                    interval(row, lambda v: f"{v:.2f}"),
                    f"at random {row['null']:.2f}×",
                    f"n = {numbers.short_count(row['n'])} batches" if metric == _MEAN else "",
                ),
            }
        )
    mean = rows.get(_MEAN)
    if mean is not None:
        cards.append(
            {
                "label": "Time waited",
                "value": numbers.share(1 - 1 / mean["value"], 1.0),
                "detail": "of all devices' time, the busiest included, if work is all there is",
            }
        )
    crossed = rows.get("crossings a token")
    if crossed is None:
        cards.append({"label": "Crossings a token", "value": numbers.MISSING, "detail": "one router: none to cross"})
        return cards
    steps = len(known) - 1
    cards.append(
        {
            "label": "Crossings a token",
            "value": f"{crossed['value']:.2f}",
            "detail": joined(
                interval(crossed, lambda v: f"{v:.2f}"), f"of {steps} steps", f"at random {crossed['null']:.2f}"
            ),
        }
    )
    usual_crossed = before["crossings a token"]["value"]
    cards.append(
        {
            "label": "Sent across devices",
            "value": size(crossed["value"] * hidden) if hidden else numbers.MISSING,
            "detail": (f"a token, {size(hidden)} a crossing · " if hidden else "width not recorded · ")
            + f"{numbers.ratio(crossed['value'] / usual_crossed if usual_crossed else None)} that in order of ids",
        }
    )
    return cards


def _copy_cards(row: dict[str, Any], tail: dict[str, Any], none: float, experts: int, layers: int) -> list[Card]:
    copies = int(row["copies"])
    return [
        {
            "label": "Busiest ÷ mean device",
            "value": f"{row['value']:.2f}×",
            "detail": joined(interval(row, lambda v: f"{v:.2f}"), f"n = {numbers.short_count(row['n'])} batches"),
        },
        {"label": "Random experts copied", "value": f"{row['null']:.2f}×", "detail": f"no copies: {none:.2f}×"},
        {
            "label": "Slowest 1 % of batches",
            "value": f"{tail['value']:.2f}×",
            "detail": f"random copies: {tail['null']:.2f}×",
        },
        {
            "label": "Memory it takes",
            "value": numbers.share(copies * layers, experts),
            "detail": f"{numbers.count(copies * layers)} copies beside {numbers.count(experts)} experts",
        },
    ]


def _most(known: list[Router]) -> int:
    """The largest power of two of devices."""
    return max(1, min(6, min(router.real for router in known).bit_length() - 1))


def _hidden_bytes(run: Run) -> float | None:
    """Bytes of a token's hidden state, which a crossing sends; None where the run does not say."""
    info = run.info
    width, dtype = info["anatomy"].get("d_model"), info["settings"].get("dtype")
    return float(width * _WIDTHS[dtype]) if width and dtype in _WIDTHS else None
