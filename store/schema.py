"""The tables of a store, as data: the file is made from these, and so is the documentation.

Long because it is one list: every table with its columns, in the order of the file.
"""

from __future__ import annotations

from dataclasses import dataclass

from moescope.store.sql_text import literal

SCHEMA_VERSION = 4


@dataclass(frozen=True)
class Column:
    """One column: name, DuckDB type and what it means, with its unit."""

    name: str
    type: str
    comment: str


@dataclass(frozen=True)
class Table:
    """One table: name, what one row is, and its columns."""

    name: str
    comment: str
    columns: tuple[Column, ...]
    constraint: str = ""

    def ddl(self) -> list[str]:
        """Statements that create the table and its comments."""
        columns = ", ".join(f'"{c.name}" {c.type}' for c in self.columns)
        constraint = f", {self.constraint}" if self.constraint else ""
        create = f'CREATE TABLE "{self.name}" ({columns}{constraint})'
        comments = [f'COMMENT ON TABLE "{self.name}" IS {literal(self.comment)}']
        comments += [f'COMMENT ON COLUMN "{self.name}"."{c.name}" IS {literal(c.comment)}' for c in self.columns]
        return [create, *comments]


_RUN = Column("run_id", "UUID", "the run this row belongs to")
_TOKEN = Column("token", "BIGINT", "run-wide row number of the unmasked token, 0-based, by sequence")
_LAYER = Column("layer", "USMALLINT", "0-based index of the transformer block")
_BLOCK = Column("block", "VARCHAR", "sublayer holding the router: mlp, attn, mlp.1, …")
_SEQUENCE = Column("sequence_id", "BIGINT", "0-based number of the sequence, in corpus order after splitting")
_EXPERT = Column("expert", "INTEGER", "expert id; null experts follow the routed ones; shared experts are −1, −2, …")
_BATCH = Column("batch", "INTEGER", "0-based number of the batch in the plan")
_VALUE = Column("value", "DOUBLE", "the value")
_METRIC = Column("metric", "VARCHAR", "what was measured")
_HEAD = Column("head", "INTEGER", "query head")
_CONDITION = Column("condition", "VARCHAR", "under which it was measured; base for the run as it was recorded")
_ATTENTION = Column("block", "VARCHAR", "the attention it is a head of: attn, attn.1, …")
_KIND = Column("kind", "VARCHAR", "target or control")
_SAE = Column("sae_id", "UUID", "the sparse autoencoder")
_SEEN = Column("run_id", "UUID", "the run whose tokens it was measured on")
_LATENT = Column("feature", "INTEGER", "0-based number of the latent")
_LOW = Column("ci_low", "DOUBLE", "lower bound, null where documents are too few for one")
_HIGH = Column("ci_high", "DOUBLE", "upper bound")
_UNIT = Column("unit", "VARCHAR", "unit of the value")
_NULL = Column("null_value", "DOUBLE", "the same under the null or control that `null_kind` names")
_NULL_KIND = Column("null_kind", "VARCHAR", "what that null or control is")
_LOAD = (
    Column("label", "VARCHAR", "label of the document, null where it has none"),
    Column("phase", "VARCHAR", "prefill or decode"),
    _EXPERT,
    Column("tokens", "BIGINT", "tokens that chose the expert"),
    Column("weight_sum", "DOUBLE", "sum of the weights given to the expert"),
)

TABLES: tuple[Table, ...] = (
    Table(
        "store_info",
        "facts about the file itself",
        (
            Column(
                "key",
                "VARCHAR",
                "application, schema_version, created_by, created_at, upgraded_by, upgraded_at or views",
            ),
            Column("value", "VARCHAR", "its value"),
        ),
    ),
    Table(
        "runs",
        "one row a run: a pass of a corpus through a model",
        (
            Column("run_id", "UUID", "identity of the run"),
            Column("name", "VARCHAR", "the user's name for it, unique in the file"),
            Column("model", "VARCHAR", "what was loaded: Hub id, path, or class name of a module"),
            Column("revision", "VARCHAR", "commit of the weights; for local files a digest of their contents"),
            Column("architecture", "VARCHAR", "class name of the model"),
            Column("intervention", "JSON", "the edits in force, null for none"),
            Column("settings", "JSON", "probes, batch size, lengths, dtype, device and kernels of the run"),
            Column("versions", "JSON", "versions of moescope, torch, transformers, duckdb and Python"),
            Column("seed", "BIGINT", "seed of everything random in the run"),
            Column("corpus_fingerprint", "VARCHAR", "SHA-256 over the texts and labels, in order"),
            Column("status", "VARCHAR", "running, complete, incomplete or failed"),
            Column("started_at", "TIMESTAMP", "when recording began, UTC"),
            Column("finished_at", "TIMESTAMP", "when it ended, UTC; null while running"),
            Column("summary", "JSON", "counts and timings of the run: tokens, seconds, splits, skipped lines, notes"),
            Column("anatomy", "JSON", "what the model is made of: width, vocabulary, parameters"),
        ),
        "PRIMARY KEY (run_id), UNIQUE (name)",
    ),
    Table(
        "layers",
        "one row a layer and sublayer of a run's model",
        (
            _RUN,
            _LAYER,
            _BLOCK,
            Column("stack", "VARCHAR", "decoder, or encoder in encoder-decoder models"),
            Column("kind", "VARCHAR", "moe, dense, attention or ssm"),
            Column("n_experts", "INTEGER", "routed experts, null where the sublayer has none"),
            Column("top_k", "INTEGER", "experts chosen for each token"),
            Column("n_shared", "INTEGER", "shared experts, which see every token"),
            Column("n_null", "INTEGER", "null (zero-computation) experts"),
            Column("d_expert", "INTEGER", "neurons of one expert, or of the dense MLP"),
            Column("routing_rule", "JSON", "rule from logits to decision with the agreement found on the first batch"),
        ),
    ),
    Table(
        "sequences",
        "one row a sequence: a document, or a part of one that was longer than the context",
        (
            _RUN,
            _SEQUENCE,
            Column("document_id", "BIGINT", "0-based number of the document in the corpus"),
            Column("part", "INTEGER", "0-based number of this part of the document"),
            Column("label", "VARCHAR", "label of the document, null where it has none"),
            Column("source", "VARCHAR", "where the document comes from"),
            Column("text", "VARCHAR", "the text of the part"),
            Column("n_tokens", "INTEGER", "unmasked tokens of the text, special ones included; generated ones not"),
            Column("content_hash", "VARCHAR", "SHA-256 over the token ids"),
            Column("metadata", "JSON", "every other field of the document"),
        ),
    ),
    Table(
        "tokens",
        "one row an unmasked token",
        (
            _RUN,
            _TOKEN,
            _SEQUENCE,
            Column("position", "INTEGER", "0-based place in the sequence"),
            Column("token_id", "INTEGER", "id in the tokenizer's vocabulary"),
            Column("phase", "VARCHAR", "prefill or decode"),
            Column("nll", "FLOAT", "−ln p(this token | those before it), nats; null at the first token of a sequence"),
            Column("predicted_id", "INTEGER", "the most likely next token after this one"),
            Column("is_special", "BOOLEAN", "whether the tokenizer calls the token special"),
            Column("class", "VARCHAR", "special, space, punctuation, digit, word, fragment or mixed"),
        ),
    ),
    Table(
        "vocabulary",
        "one row a token id seen in a run, also as a prediction",
        (
            _RUN,
            Column("token_id", "INTEGER", "id in the tokenizer's vocabulary"),
            Column("bytes", "BLOB", "the bytes it stands for; a character may be spread over several tokens"),
            Column("text", "VARCHAR", "the bytes as text, with U+FFFD where they are part of a character"),
        ),
    ),
    Table(
        "routing",
        "one row a token and router: the decision the experts were given",
        (
            _RUN,
            _TOKEN,
            _LAYER,
            _BLOCK,
            Column("experts", "USMALLINT[]", "chosen experts by weight, descending, ties by lower id"),
            Column("weights", "FLOAT[]", "weights given to the experts, scaling included, in the order of experts"),
            Column(
                "margin",
                "FLOAT",
                "k-th minus (k+1)-th score where the router takes its top-k; null where the rule is not verified",
            ),
            Column(
                "entropy", "FLOAT", "entropy of the router's distribution over all experts, nats; null without logits"
            ),
        ),
    ),
    Table(
        "router_logits",
        "one row a token and router",
        (
            _RUN,
            _TOKEN,
            _LAYER,
            _BLOCK,
            Column("logits", "FLOAT[]", "router scores before softmax, sigmoid or bias, by expert id"),
        ),
    ),
    Table(
        "expert_outputs",
        "one row a token and router: how large each chosen expert's output was",
        (
            _RUN,
            _TOKEN,
            _LAYER,
            _BLOCK,
            Column(
                "norms", "FLOAT[]", "L2 norm of each slot's output before its weight, in the order of routing.experts"
            ),
        ),
    ),
    Table(
        "experts",
        "one row an expert: reductions over every token routed to it",
        (
            _RUN,
            _LAYER,
            _BLOCK,
            _EXPERT,
            Column("tokens", "BIGINT", "tokens that chose the expert"),
            Column("weight_sum", "DOUBLE", "sum of the weights given to it"),
            Column(
                "output_norm_mean",
                "DOUBLE",
                "mean L2 norm of its output before the weight, null where it was never chosen",
            ),
            Column("weighted_norm_sum", "DOUBLE", "sum of weight × L2 norm of its output"),
            Column("max_abs_out", "FLOAT", "largest |output| over its tokens and channels"),
            Column("max_abs_channel", "INTEGER", "channel of that maximum"),
            Column("max_abs_token", "BIGINT", "token of that maximum"),
            Column(
                "active_share",
                "DOUBLE",
                "share of |neuron| over a threshold (0 unless the probe was given one), over its tokens and neurons; "
                "null where neurons cannot be read",
            ),
            Column("zero_share", "DOUBLE", "share of neurons exactly zero; null where neurons cannot be read"),
        ),
    ),
    Table("loads", "one row an expert, label and phase; the one source of load", (_RUN, _LAYER, _BLOCK, *_LOAD)),
    Table(
        "residual",
        "one row a token and layer: the residual stream at the block's output",
        (
            _RUN,
            _TOKEN,
            _LAYER,
            Column("norm", "FLOAT", "L2 norm"),
            Column("top_values", "FLOAT[3]", "the three largest values by magnitude, signed"),
            Column("top_channels", "USMALLINT[3]", "their channels"),
        ),
    ),
    Table(
        "residual_sequences",
        "one row a sequence and layer",
        (
            _RUN,
            _SEQUENCE,
            _LAYER,
            Column("median_abs", "FLOAT", "lower median of |x| over all its tokens and channels at the block's output"),
        ),
    ),
    Table(
        "massive_activations",
        "one row a massive activation at a block's output",
        (
            _RUN,
            _LAYER,
            _TOKEN,
            Column("channel", "INTEGER", "channel of the residual stream"),
            _VALUE,
            Column("ratio", "DOUBLE", "|value| over the median |x| of the layer"),
        ),
    ),
    Table(
        "super_experts",
        "one row an expert that a rule calls super expert",
        (
            _RUN,
            Column("rule", "VARCHAR", "name of the rule"),
            _LAYER,
            _BLOCK,
            _EXPERT,
            _VALUE,
            Column("threshold", "DOUBLE", "what the value had to exceed"),
        ),
    ),
    Table(
        "heads",
        "one row a head, metric and condition",
        (
            _RUN,
            _LAYER,
            _HEAD,
            _METRIC,
            _CONDITION,
            _VALUE,
            Column("n", "BIGINT", "observations behind the value"),
            _ATTENTION,
        ),
    ),
    Table(
        "head_sequences",
        "one row a sequence, attention, metric and condition, all heads of it; heads is made from it",
        (
            _RUN,
            _SEQUENCE,
            _LAYER,
            _ATTENTION,
            _METRIC,
            _CONDITION,
            Column("sums", "FLOAT[]", "sum over the observations, by query head; value = sum ÷ n"),
            Column("n", "BIGINT", "observations (queries) behind each sum"),
        ),
    ),
    Table(
        "activations",
        "one row a shard of recorded vectors, kept beside the file",
        (
            _RUN,
            Column("site", "VARCHAR", "where the vectors were read"),
            Column("path", "VARCHAR", "the shard, a safetensors file, relative to the store's folder"),
            Column("rows", "BIGINT", "vectors in it"),
            Column("width", "INTEGER", "components of a vector, all heads together"),
            Column("dtype", "VARCHAR", "their type: float32, bfloat16, float16 or float64"),
            Column("checksum", "VARCHAR", "SHA-256 of the shard"),
            Column("shard", "INTEGER", "0-based number of the shard among those of the site"),
            Column("tokens", "BIGINT", "sampled tokens that its vectors belong to"),
        ),
    ),
    Table(
        "coverage",
        "one row a site: events expected beside events recorded",
        (
            _RUN,
            Column("site", "VARCHAR", "the site, or the table where it is not one site's"),
            Column("expected", "BIGINT", "events the batches must give"),
            Column("recorded", "BIGINT", "events found in the store"),
            Column("status", "VARCHAR", "complete, short, excess, invalid or absent"),
            Column("detail", "VARCHAR", "what it means and what to do"),
        ),
    ),
    Table(
        "effects",
        "one row an effect: what an intervention, or its control, does to a metric",
        (
            Column("effect_id", "UUID", "identity of the effect"),
            Column("sweep_id", "UUID", "the sweep it is part of"),
            Column("base_run_id", "UUID", "the run without the intervention"),
            Column("run_id", "UUID", "the run with it, null unless kept"),
            Column("intervention", "JSON", "the edits"),
            _KIND,
            Column("draw", "INTEGER", "number of the control draw"),
            Column("group_kind", "VARCHAR", "what the tokens are grouped by"),
            Column("group_value", "VARCHAR", "the group"),
            _METRIC,
            _VALUE,
            Column("ci_low", "DOUBLE", "lower bound"),
            Column("ci_high", "DOUBLE", "upper bound"),
            Column("n", "BIGINT", "tokens"),
            Column("unit", "VARCHAR", "unit of the value"),
        ),
    ),
    Table(
        "effect_sequences",
        "one row an effect and sequence, for resampling documents",
        (
            Column("effect_id", "UUID", "the effect"),
            _KIND,
            Column("draw", "INTEGER", "number of the control draw"),
            _SEQUENCE,
            _METRIC,
            Column("sum", "DOUBLE", "sum over its tokens"),
            Column("n", "BIGINT", "tokens"),
        ),
    ),
    Table(
        "saes",
        "one row a sparse autoencoder; its weights lie beside the file in the format of SAELens",
        (
            Column("sae_id", "UUID", "identity of the autoencoder"),
            Column("name", "VARCHAR", "the user's name for it"),
            Column("site", "VARCHAR", "where the vectors it encodes are read"),
            Column("target_site", "VARCHAR", "what it predicts, null where that is its input: transcoders differ"),
            Column("expert", "INTEGER", "the one expert whose vectors it was trained on; null for all"),
            Column("architecture", "VARCHAR", "name of the saved form: topk, jumprelu, standard, gated, transcoder, …"),
            Column("trained_as", "VARCHAR", "name of the form it was trained in: batchtopk is saved as jumprelu, …"),
            Column("d_in", "INTEGER", "components of a vector"),
            Column("d_sae", "INTEGER", "latents"),
            Column("path", "VARCHAR", "folder of its weights, relative to the store's folder"),
            Column("checksum", "VARCHAR", "SHA-256 of the file of weights"),
            Column("model", "VARCHAR", "the model it belongs to"),
            Column("anatomy_digest", "VARCHAR", "digest of that model's anatomy; null where it is not known"),
            Column("trained_on", "UUID", "the run whose vectors it was trained on; null for a published one"),
            Column("corpus_fingerprint", "VARCHAR", "of that run's corpus"),
            Column("vectors", "BIGINT", "vectors that training took, repeats included"),
            Column("settings", "JSON", "of training: sparsity, rate, batch, seed, share held out, …"),
            Column(
                "summary", "JSON", "how training ended: losses, L0, dead latents, explained variance, seconds, status"
            ),
            Column("source", "JSON", "release and id of a published one, or the folder it was read from"),
            Column("versions", "JSON", "of the libraries"),
            Column("created_at", "TIMESTAMP", "UTC"),
        ),
    ),
    Table(
        "sae_measures",
        "one row a measure of an autoencoder, or of a control beside it",
        (
            _SAE,
            _SEEN,
            _METRIC,
            Column("condition", "VARCHAR", "sae, or the control: pca, random_decoder, shuffled, zero, mean, base, …"),
            Column("group_kind", "VARCHAR", "what the tokens or latents are grouped by; all for none"),
            Column("group_value", "VARCHAR", "the group"),
            _VALUE,
            _LOW,
            _HIGH,
            Column("n", "BIGINT", "tokens (or latents) behind it"),
            _UNIT,
        ),
    ),
    Table(
        "features",
        "one row a latent: where it fires and what it writes to the logits",
        (
            _SAE,
            _SEEN,
            _LATENT,
            Column("active", "BIGINT", "tokens on which it is over 0"),
            Column("tokens", "BIGINT", "tokens that were encoded"),
            Column("documents", "BIGINT", "documents in which it is active"),
            Column("mean", "DOUBLE", "mean activation where it is active"),
            Column("maximum", "DOUBLE", "largest activation"),
            Column("edges", "FLOAT[]", "edges of the histogram of activations over 0"),
            Column("counts", "UBIGINT[]", "tokens in each of its bins"),
            Column("decoder_norm", "DOUBLE", "L2 norm of its decoder row"),
            Column(
                "raised_ids",
                "INTEGER[]",
                "token ids whose logits its decoder row raises most; null away from the stream",
            ),
            Column("raised", "FLOAT[]", "by how much for each unit of activation, in logits"),
            Column("lowered_ids", "INTEGER[]", "token ids whose logits it lowers most"),
            Column("lowered", "FLOAT[]", "by how much, in logits"),
        ),
    ),
    Table(
        "feature_contexts",
        "one row an example of a latent: a window of text with its activation on every token",
        (
            _SAE,
            _SEEN,
            _LATENT,
            Column(
                "stratum",
                "INTEGER",
                "0 for the largest activations; 1, 2, … for quantiles of activation from the top down",
            ),
            Column("rank", "INTEGER", "0-based place in the stratum, one a document"),
            _SEQUENCE,
            Column("position", "INTEGER", "of the token of largest activation, in the sequence"),
            _VALUE,
            Column("first_position", "INTEGER", "position of the window's first token"),
            Column("activations", "FLOAT[]", "on every token of the window"),
        ),
    ),
    Table(
        "feature_labels",
        "one row a latent and label of documents",
        (
            _SAE,
            _SEEN,
            _LATENT,
            Column("label", "VARCHAR", "label of the documents"),
            Column("active", "BIGINT", "tokens of that label on which it is active"),
            Column("tokens", "BIGINT", "tokens of that label"),
            Column("lift", "DOUBLE", "P(active | label) ÷ P(active)"),
            _LOW,
            _HIGH,
            Column("p", "DOUBLE", "of the null that documents carry their labels at random"),
            Column("q", "DOUBLE", "false-discovery rate at which it would be called (Benjamini and Hochberg)"),
        ),
    ),
    Table(
        "feature_links",
        "one row a pair of latents, of one autoencoder or two",
        (
            _SAE,
            _SEEN,
            Column("kind", "VARCHAR", "cosine, coactivation, family, association, absorption, split, …"),
            _LATENT,
            Column("other_sae_id", "UUID", "autoencoder of the other one"),
            Column("other_feature", "INTEGER", "the other one"),
            _VALUE,
            _LOW,
            _HIGH,
            _NULL,
            _NULL_KIND,
            Column("n", "BIGINT", "tokens behind it"),
        ),
    ),
    Table(
        "feature_experts",
        "one row a latent and expert: how much the expert writes it, or it gates the expert",
        (
            _SAE,
            _SEEN,
            _LATENT,
            _LAYER,
            _BLOCK,
            _EXPERT,
            _METRIC,
            _VALUE,
            _LOW,
            _HIGH,
            _NULL,
            _NULL_KIND,
            Column("n", "BIGINT", "tokens behind it"),
            _UNIT,
        ),
    ),
    Table(
        "sparse_probes",
        "one row a number of a sparse probe: a classifier of a concept from a few units",
        (
            Column("probe_id", "UUID", "identity of the probe"),
            _SEEN,
            Column("sae_id", "UUID", "autoencoder whose latents it reads; null for other units"),
            Column("unit_kind", "VARCHAR", "neuron, latent, expert or router_logit"),
            Column("site", "VARCHAR", "where the units are read"),
            Column(
                "concept", "VARCHAR", "what it tells apart from the rest, a label of the corpus or a class of token"
            ),
            Column("ranking", "VARCHAR", "how units were ranked"),
            Column("k", "INTEGER", "units it may use; 0 for all of them"),
            Column("units", "INTEGER[]", "which"),
            Column("coefficients", "FLOAT[]", "weight of each, for standardised units"),
            _METRIC,
            _VALUE,
            _LOW,
            _HIGH,
            _NULL,
            _NULL_KIND,
            Column("n", "BIGINT", "tokens (or documents) of the test part"),
        ),
    ),
    Table(
        "descriptions",
        "one row a description in words of a latent, expert, neuron or head",
        (
            Column("description_id", "UUID", "identity of the description"),
            _SEEN,
            Column("sae_id", "UUID", "autoencoder of the latent; null for other units"),
            Column("unit_kind", "VARCHAR", "latent, expert, neuron or head"),
            Column("layer", "USMALLINT", "of the unit"),
            Column("block", "VARCHAR", "sublayer of the unit"),
            Column("unit", "INTEGER", "number of the latent, expert, neuron or head"),
            Column("text", "VARCHAR", "the description"),
            Column("describer", "VARCHAR", "who or what wrote it"),
            Column("prompt", "VARCHAR", "what it was given"),
            Column("created_at", "TIMESTAMP", "UTC"),
        ),
    ),
    Table(
        "description_scores",
        "one row a score of a description",
        (
            Column("description_id", "UUID", "the description"),
            _METRIC,
            _VALUE,
            _LOW,
            _HIGH,
            _NULL,
            _NULL_KIND,
            Column("n", "BIGINT", "examples behind it"),
            Column("scorer", "VARCHAR", "who or what judged"),
        ),
    ),
    Table(
        "mlp_students",
        "one row a student that imitates an MLP",
        (
            _RUN,
            _LAYER,
            _BLOCK,
            Column("student", "VARCHAR", "moe, dense, linear or mean"),
            Column(
                "inputs", "VARCHAR", "real; gaussian, of the same mean and covariance; gaussian − real for differences"
            ),
            Column("experts", "INTEGER", "single-neuron experts it chooses from; null where it has none"),
            Column("active", "INTEGER", "neurons active on a token"),
            Column("share", "DOUBLE", "active parameters ÷ those of the MLP"),
            Column("router_rank", "INTEGER", "rank of its router, null for full"),
            _METRIC,
            _VALUE,
            _LOW,
            _HIGH,
            Column("n", "BIGINT", "vectors of the test part"),
            Column("settings", "JSON", "of its training"),
        ),
    ),
    Table(
        "batches",
        "one row a committed batch of the plan",
        (
            _RUN,
            _BATCH,
            Column("first_sequence", "BIGINT", "its first sequence"),
            Column("sequences", "INTEGER", "how many it has"),
            Column("tokens", "BIGINT", "unmasked tokens"),
        ),
    ),
    Table(
        "load_partials",
        "loads of one batch, so that shards merge to the same sums",
        (_RUN, _BATCH, _LAYER, _BLOCK, *_LOAD),
    ),
    Table(
        "expert_partials",
        "reductions of one batch, so that shards merge to the same sums",
        (
            _RUN,
            _BATCH,
            _LAYER,
            _BLOCK,
            _EXPERT,
            Column("tokens", "BIGINT", "tokens that chose the expert"),
            Column("weight_sum", "DOUBLE", "sum of weights"),
            Column("norm_sum", "DOUBLE", "sum of L2 norms of its output"),
            Column("weighted_norm_sum", "DOUBLE", "sum of weight × L2 norm"),
            Column("max_abs_out", "FLOAT", "largest |output|"),
            Column("max_abs_channel", "INTEGER", "its channel"),
            Column("max_abs_token", "BIGINT", "its token"),
            Column("neurons", "BIGINT", "values of its neurons seen, 0 where neurons cannot be read"),
            Column("active", "BIGINT", "of these, how many over the threshold"),
            Column("zeros", "BIGINT", "of these, how many exactly zero"),
        ),
    ),
)

TABLE_BY_NAME = {table.name: table for table in TABLES}
