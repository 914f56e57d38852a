"""What experts can be compared by: the one list of measures, each with its unit, its definition and where it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moescope.core.errors import InputError
from moescope.routing.experts import feature_readings, readings
from moescope.routing.experts.readings import Read, of_analysis, reductions, rule, strongest
from moescope.routing.specialization.label_divergence import EXPERT, VARIATION
from moescope.routing.specialization.vocabulary import ANY
from moescope.store.run import Run


@dataclass(frozen=True)
class Measure:
    """One number an expert.

    Attributes:
        name: in an address and as a parameter.
        title: in words.
        group: what kind of question it answers.
        unit: of the value.
        definition: what is computed.
        needs: the tables it is read from.
        read: reads it.
        centred: 0 stands for nothing, and both directions count.
        ratio: the value is log2 of a ratio, which is what words name.
    """

    name: str
    title: str
    group: str
    unit: str
    definition: str
    needs: tuple[str, ...]
    read: Read
    centred: bool = False
    ratio: bool = False

    def missing(self, run: Run) -> list[str]:
        """Tables it needs that hold nothing of a run."""
        return [table for table in self.needs if run.rows(table) == 0]

    def said(self, value: float, *, difference: bool = False) -> str:
        """A value in a sentence."""
        if self.ratio and not difference:
            return f"{2**value:.2f}×"
        return f"{value:+.3g}".replace("-", "−") if self.centred or difference else f"{value:.3g}".replace("-", "−")


_IMPORTANCE = {
    "frequency": ("frequency", "tokens", "c, the tokens routed to the expert"),
    "weighted_frequency": ("weighted frequency", "sum of weights", "Σg over the expert's tokens, g its weight"),
    "esft_token": ("ESFT token score", "share of decisions", "c ÷ (tokens × k)"),
    "esft_gate": ("ESFT gate score", "mean weight over all tokens", "Σg ÷ tokens"),
    "ean_sum": ("EAN sum", "sum of L2 norms", "Σ‖f‖, f the output before the weight"),
    "weighted_ean_sum": ("weighted EAN sum", "sum of weight × L2 norm", "Σ g‖f‖"),
    "reap": ("REAP", "mean weight × L2 norm", "Σ g‖f‖ ÷ c"),
}
_EFFECTS = {
    "ablation": ("ΔNLL", "nats", "mean NLL with the expert taken out alone, less the mean NLL with all experts"),
    "ablation_over_others": (
        "ΔNLL over the others", "nats", "ΔNLL of the expert less the mean ΔNLL of the other experts of its layer",
    ),
    "ablation_estimate": ("ΔNLL estimate", "nats", "first-order estimate of ΔNLL, −gradient · contribution"),
    "ablation_kl": ("KL", "nats", "KL(unedited ‖ expert taken out), mean over tokens"),
    "ablation_flips": ("flips", "share of tokens", "share of tokens whose most likely prediction changes without it"),
}  # fmt: skip
_RULES = {"super_paper": "paper", "super_released": "released", "super_reap": "REAP"}


def _listed() -> tuple[Measure, ...]:
    return (
        Measure(
            "load", "Load", "Routing", "log2 (load ÷ fair share)",
            "Share of a layer's decisions (token × slot) that name the expert, against the fair share 1 ÷ experts; 1 is twice "
            "and −1 half of fair.",
            ("loads",), of_analysis("load", amount="tokens"), ratio=True,
        ),
        Measure(
            "weight", "Mean weight", "Routing", "weight", "Mean weight given to the expert over the tokens that chose it.",
            ("loads",), reductions("weight"),
        ),
        Measure(
            "consistency", "Local consistency", "Routing", "SRP, 16 tokens",
            "Segment routing best performance of the expert in windows of 16 tokens (analysis local_consistency, pool=expert).",
            ("routing",), of_analysis("local_consistency", "SRP", pool="expert", shuffles=0, draws=200),
        ),
        Measure(
            "consistency_excess", "Local consistency over chance", "Routing", "(SRP − chance) ÷ (1 − chance)",
            "SRP in windows of 16 tokens over what load alone gives (analysis local_consistency, pool=expert).",
            ("routing",), of_analysis("local_consistency", "excess over binomial", pool="expert", shuffles=0, draws=200),
            centred=True,
        ),
        Measure(
            "output_norm", "Output norm", "Output", "L2 norm",
            "Mean L2 norm of the expert's output, before its weight, over its tokens.",
            ("experts",), reductions("output_norm"),
        ),
        Measure(
            "weighted_norm", "Weighted output norm", "Output", "weight × L2 norm",
            "Mean of weight × L2 norm of the expert's output over its tokens.",
            ("experts",), reductions("weighted_norm"),
        ),
        Measure(
            "max_out", "Largest |output|", "Output", "activation",
            "Largest |output| of the expert over its tokens and channels, before its weight.",
            ("experts",), of_analysis("expert_maxima", contexts=0),
        ),
        Measure(
            "active", "Active neurons", "Output", "share of neurons",
            "Share of the expert's neurons whose |activation| is over the threshold of the recording, over its tokens.",
            ("experts",), of_analysis("expert_neurons", "active"),
        ),
        Measure(
            "zeros", "Neurons exactly 0", "Output", "share of neurons",
            "Share of the expert's neurons whose activation is exactly 0, over its tokens.",
            ("experts",), of_analysis("expert_neurons", "exact zeros"),
        ),
        *(
            Measure(
                name, metric[:1].upper() + metric[1:], "Importance", unit, f"{words} (analysis importance).", ("routing",),
                of_analysis("importance", metric),
            )
            for name, (metric, unit, words) in _IMPORTANCE.items()
        ),
        Measure(
            "label_lift", "Preferred label", "Specialization", "log2 lift",
            "log2 of the share of a label's tokens that choose the expert over its share of all labelled tokens (pointwise mutual "
            "information): of the label it prefers most, or of the one asked for.",
            ("routing", "sequences"), strongest("specialization", "label", "lift"), ratio=True,
        ),
        Measure(
            "label_divergence", "Divergence over labels", "Specialization", "bits",
            "Jensen–Shannon divergence of the expert's distribution over labels from the even one (analysis label_divergence).",
            ("routing", "sequences"), of_analysis("label_divergence", EXPERT, absent="chosen too rarely"),
        ),
        Measure(
            "label_variation", "Variation over labels", "Specialization", "ratio",
            "Coefficient of variation of the expert's share over labels (analysis label_divergence).",
            ("routing", "sequences"), of_analysis("label_divergence", VARIATION, absent="chosen too rarely"),
        ),
        Measure(
            "class_lift", "Preferred class of token", "Specialization", "log2 ratio",
            "log2 of the share of a class of tokens (word, digit, …) that choose the expert over what their documents give, for the "
            "class it prefers most (analysis class_specialization).",
            ("routing", "tokens"), strongest("class_specialization", "class", "over_null"), ratio=True,
        ),
        Measure(
            "position_lift", "Preferred position", "Specialization", "log2 ratio",
            "log2 of the share of positions' tokens that choose the expert over what their documents give, for the positions it "
            "prefers most (analysis position_specialization).",
            ("routing", "tokens"), strongest("position_specialization", "position", "over_null"), ratio=True,
        ),
        Measure(
            "vocabulary", "Vocabulary specialization", "Specialization", "share of occurrences",
            "Over the ids that the expert takes most of, the mean share of their occurrences that go to it; ids with 20 occurrences "
            "or more (analysis vocabulary_specialization, form=lrc).",
            ("routing", "tokens"),
            of_analysis(
                "vocabulary_specialization", f"{ANY}, ids of this expert", absent="takes most of no common id", form="lrc", ids="input",
            ),
        ),
        Measure(
            "partner", "Closest partner", "Neighbours", "log2 (observed ÷ chance)",
            "log2 of how often the expert is chosen together with its closest partner, over k different experts drawn by load alone.",
            ("routing",), readings.partner, ratio=True,
        ),
        Measure(
            "cluster", "Silhouette of its cluster", "Neighbours", "−1 to 1",
            "How much nearer an expert is to its own cluster than to the next, by which documents use it (analysis expert_clusters).",
            ("routing",), of_analysis("expert_clusters", "silhouette", absent="its use does not vary", shuffles=1), centred=True,
        ),
        *(
            Measure(
                name, f"Taken out: {metric}", "Effects", unit, f"{words[:1].upper()}{words[1:]} (analysis expert_effects).", ("effects",),
                of_analysis("expert_effects", metric, absent="not measured"), centred=unit == "nats" and metric != "KL",
            )
            for name, (metric, unit, words) in _EFFECTS.items()
        ),
        *(
            Measure(
                name, f"Super-expert rule: {words}", "Super experts", "largest |output| ÷ threshold",
                f"Largest |output| over the threshold of the rule {words!r}; over 1 the expert is a super expert. Only in the layers "
                "the rule looks at (analysis super_experts).",
                ("experts",), rule(words),
            )
            for name, words in _RULES.items()
        ),
        Measure(
            "features_written", "Latents written most", "Features", "latents",
            "For how many latents of the autoencoder the expert writes most of all experts of its layer, in excess of the tokens on "
            "which the latent is inactive (table feature_experts).",
            ("feature_experts",), feature_readings.features_written,
        ),
        Measure(
            "feature_writing", "Strongest latent it writes", "Features", "activation along the decoder row",
            "The largest excess that the expert writes along the decoder row of any latent (table feature_experts).",
            ("feature_experts",), feature_readings.strongest_latent("writes"),
        ),
        Measure(
            "feature_gating", "Strongest latent that gates it", "Features", "logit",
            "The largest change of the expert's router logit where a latent is active (table feature_experts).",
            ("feature_experts",), feature_readings.strongest_latent("gates"), centred=True,
        ),
    )  # fmt: skip


MEASURES: Mapping[str, Measure] = {measure.name: measure for measure in _listed()}


def measure_named(name: str) -> Measure:
    """The measure of that name; raises `InputError` with all names for another.

    Example:
        >>> measure_named("reap").unit
        'mean weight × L2 norm'
    """
    if name not in MEASURES:
        raise InputError(f"there is no measure {name!r} of experts", expected="one of " + ", ".join(MEASURES))
    return MEASURES[name]
