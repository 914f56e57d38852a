"""What each tab of the routing page asks, of which analyses, and which of their parameters it lets one change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moescope.dashboard.panel import Click

Kind = Literal["choice", "whole", "decimal", "layer"]


@dataclass(frozen=True)
class Control:
    """One parameter of the address, with a field to change it.

    Attributes:
        name: in the address.
        label: over the field.
        kind: a choice of words, a number, or a layer of the run.
        options: value → word, of a choice; the first is the default.
        default: what holds where the address does not say; empty for the analysis's own choice.
        hint: what an empty field means.
        least: smallest number.
    """

    name: str
    label: str
    kind: Kind
    options: Mapping[str, str] = field(default_factory=dict)
    default: str | int | float = ""
    hint: str = ""
    least: float = 1

    @property
    def start(self) -> str | int | float:
        """The default in the form in which the field holds it."""
        return next(iter(self.options)) if self.options and self.default == "" else self.default


@dataclass(frozen=True)
class Shown:
    """One panel: an analysis, the controls it follows, and what a click on its figure selects.

    Attributes:
        analysis: its name.
        controls: names of the tab's controls that it reads, as parameters of the analysis of the same name.
        given: parameters that stay.
        click: as a panel takes it.
        height: of its place while it is computed.
        seconds: what it takes for 25 million choices on two processor cores.
        simulator: the slider with value cards that goes with it.
    """

    analysis: str
    controls: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    click: Click | None = None
    height: int = 400
    seconds: float = 1.0
    simulator: str | None = None


@dataclass(frozen=True)
class Tab:
    """One tab.

    Attributes:
        name: in the address.
        title: on the tab.
        question: what it answers and which null it uses, in a sentence or two.
        controls: fields above its panels.
        panels: in order.
        needs: a table without which the tab is not shown.
    """

    name: str
    title: str
    question: str
    controls: tuple[Control, ...]
    panels: tuple[Shown, ...]
    needs: str | None = None


def _choice(parameter: str, title: str, /, **options: str) -> Control:
    """A choice of words; two underscores stand for a blank or a hyphen of the value."""
    return Control(
        parameter, title, "choice", options={value.replace("__", " "): word for value, word in options.items()}
    )


_LAYER = Control("layer", "Layer", "layer", hint="strongest")
_BY_ALL = _choice("by", "By", layer="layer", label="label", position="position", phase="phase", **{"class": "class"})
_BY_SOME = _choice("by", "By", layer="layer", label="label", model="whole model")
_PAIRS = _choice("pairs", "Pairs", first="first choices", all="all choices", same_rank="same rank")
_SOURCES = {name: name for name in ("all", "label", "token id", "id before it", "position", "class")}
_FIRST = {"slot": "first choices", "token": "early tokens", "weight": "largest weights"}
_PREDICTORS = {"token": "token id", "previous_layer": "layer before", "popularity": "popularity"}
_BATCH = Control("batch", "Tokens a batch", "whole", default=512)

TABS: tuple[Tab, ...] = (
    Tab(
        "balance",
        "Balance",
        "Is the work shared evenly among experts? The null is a router without preference: as many experts a token, every "
        "set alike, simulated for as many tokens.",
        (_BY_ALL, Control("batch", "Tokens a batch", "whole", default=4096)),
        (
            Shown("balance", ("by", "batch"), height=520),
            Shown("load", click="expert", height=480),
            Shown("balance_losses", ("by",), seconds=5),
        ),
    ),
    Tab(
        "consistency",
        "Consistency",
        "Do neighbouring tokens use the same experts? Against chance in closed form (every set of k experts alike) and "
        "against the same decisions with their tokens shuffled, which keeps the load and removes the order.",
        (
            Control("segment", "Tokens a window", "whole", default=16),
            _choice("pool", "Pool", model="whole model", layer="layer", expert="expert", label="label"),
            _BY_SOME,
            Control("lag", "Tokens back", "whole", default=1),
        ),
        (
            Shown("local_consistency", ("segment", "pool"), seconds=2.2, click="expert"),
            Shown("repetition", ("by", "lag"), seconds=1.1),
            Shown("residency", ("by",), seconds=2.5),
            Shown("window_usage", ("by",), seconds=2.8),
        ),
    ),
    Tab(
        "specialization",
        "Specialization",
        "Do experts prefer certain texts or tokens? The null shuffles labels over documents, or token ids over tokens; what "
        "stands out is corrected for the number of experts tried.",
        (
            _LAYER,
            _choice("ids", "Token ids", all="all kinds", input="of the token", predicted="predicted", next="next"),
        ),
        (
            Shown("label_divergence", seconds=0.8, click="expert"),
            Shown("label_distance", ("layer",)),
            Shown("class_specialization", click="expert", height=480),
            Shown("position_specialization", click="expert", height=480),
            Shown("vocabulary_specialization", ("ids",), seconds=3.3, click="expert"),
        ),
    ),
    Tab(
        "coactivation",
        "Co-activation",
        "Which experts of a layer are chosen for the same token? The null is what the experts' loads alone give when k "
        "different ones are drawn; communities are judged against the same weights on random pairs.",
        (
            _LAYER,
            _choice("pairs", "Pairs", all="all choices", adjacent="adjacent ranks"),
            Control("top", "Partners a token", "whole", hint="all"),
        ),
        (
            Shown("coactivation", ("layer", "pairs", "top"), height=560, click="expert"),
            Shown("expert_communities", ("layer",), seconds=1.3, click="expert"),
        ),
    ),
    Tab(
        "paths",
        "Paths",
        "Which ways do tokens take through the layers, by their first choices? The null is independent layers of the same "
        "loads, p(i) p(j), or each router's decisions shuffled over tokens.",
        (
            Control("first_layer", "From layer", "layer", default="", hint="first"),
            Control("layers", "Layers shown", "choice", options={str(n): str(n) for n in (4, 2, 3, 5, 6)}),
            Control("experts", "Experts a layer", "choice", options={str(n): str(n) for n in (6, 4, 8, 12)}),
            Control("length", "Routers a path", "whole", default=3),
            _PAIRS,
        ),
        (
            Shown("path_map", ("first_layer", "layers", "experts"), height=560),
            Shown("paths", ("length",), seconds=0.9),
            Shown("affinity", ("pairs",)),
            Shown("combinations"),
        ),
    ),
    Tab(
        "predictability",
        "Predictability",
        "How much of a decision can be told in advance? Tables are filled on half of the documents and tried on the other; "
        "the null is popularity, the most frequent experts of the first half.",
        (
            Control("size", "Experts named", "whole", hint="k"),
            _choice("choice", "Predict", set="all choices", first="the first choice"),
            Control("ahead", "Layers ahead", "whole", default=1, least=0),
        ),
        (
            Shown("predictability", ("size", "choice"), seconds=3.4),
            Shown("context_independence", seconds=2.5),
            Shown("gate_ahead", ("ahead", "size")),
        ),
    ),
    Tab(
        "certainty",
        "Certainty",
        "How decided is each router, and what does its choice say about the token? Entropy is compared with its maximum, "
        "ln E; information with what labels, ids or positions shuffled over documents or tokens give.",
        (
            _BY_ALL,
            Control("given", "Information from", "choice", options=_SOURCES),
        ),
        (
            Shown("router_entropy"),
            Shown("router_uncertainty", ("by",), seconds=1.3),
            Shown("router_margin", ("by",)),
            Shown("routing_information", ("given",), seconds=2.8),
            Shown("router_information", seconds=5),
        ),
    ),
    Tab(
        "cache",
        "Cache",
        "What would a cache of experts serve, and what must still be moved to the device? Against routing at random "
        "(C ÷ experts), the same tokens shuffled, and Belady, which knows the future and is the best there can be.",
        (
            _choice(
                "policy", "Policy", lru="LRU", lfu="LFU", fifo="FIFO", lifo="LIFO", look_ahead="look-ahead", belady="Belady"
            ),
            Control("batch", "Tokens a step", "choice", options={str(n): str(n) for n in (1, 2, 4, 8, 16, 32, 64)}),
            Control("horizon", "Look-ahead, tokens", "choice", options={str(n): str(n) for n in (16, 1, 4, 64, 256)}),
            Control("expert_bytes", "Bytes an expert", "whole", hint="from the run"),
            Control("predictor", "Prefetch by", "choice", options=_PREDICTORS),
            Control("width", "Experts prefetched", "whole", hint="k"),
            Control("budget", "Budget of all layers", "whole", hint="3k a layer"),
        ),
        (
            Shown("expert_cache", ("batch", "horizon"), seconds=10, height=440, simulator="cache"),
            Shown("expert_prefetch", ("width",), seconds=3.6, height=420, simulator="prefetch"),
            Shown("cache_budget", ("budget",), height=380),
        ),
    ),
    Tab(
        "capacity",
        "Capacity",
        "How many decisions would be dropped if every expert took a limited number of a batch's tokens? The null is a "
        "balanced router, whose batches are uneven by chance alone.",
        (
            Control("batch", "Tokens a batch", "whole", hint="a sequence"),
            Control("priority", "Who comes first", "choice", options=_FIRST),
            Control("minimum", "Least capacity", "whole", default=4, least=0),
            _choice("reroute", "Dropped ones go", false="nowhere", true="to the next choice (slower)"),
        ),
        (
            Shown("capacity", ("batch", "priority", "minimum", "reroute"), seconds=2.4, height=440, simulator="capacity"),
        ),
    ),
    Tab(
        "placement",
        "Placement",
        "Which device should hold which expert, and how long does the busiest keep the others waiting? Placements and copies "
        "are found on half of the documents and judged on the other, against placement or copies at random.",
        (
            _BATCH,
            _choice("pairs", "Crossings of", first="first choices", all="all choices"),
            _choice(
                "algorithm", "Algorithm", contiguous="in order of ids", load="equal loads",
                **{"anti-correlation": "apart what is loaded together", "affinity": "together what follows"},
            ),
        ),
        (
            Shown("placement", ("batch", "pairs"), height=420, simulator="placement"),
            Shown("replication", ("batch", "devices"), height=400, simulator="replication"),
            Shown("stragglers", ("batch", "devices"), height=440),
        ),
    ),
    Tab(
        "routers",
        "Other routers",
        "Which experts would another rule have chosen from the same logits, at the same number of experts a token? Agreement "
        "is compared with what two choices at random share.",
        (
            _choice(
                "rule", "Rule", top_p="top-p", ratio="ratio", gap="gap", null="null experts", expert_choice="expert choice",
                balanced="balanced", grouped="grouped", hash="hash",
            ),
            _BY_ALL,
            Control("window", "Tokens a window", "whole", default=1024),
        ),
        (
            Shown("counterfactual_rules", ("window",), seconds=20),
            Shown("counterfactual_routing", ("rule", "by", "window"), seconds=8),
        ),
        needs="router_logits",
    ),
)  # fmt: skip
