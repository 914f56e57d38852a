-- The schema of version 2, frozen: before statistics of attention were kept by sequence. Never change it.

CREATE TABLE "store_info" (
    "key" VARCHAR,
    "value" VARCHAR
);
COMMENT ON TABLE "store_info" IS 'facts about the file itself';
COMMENT ON COLUMN "store_info"."key" IS 'application, schema_version, created_by, created_at, upgraded_by, upgraded_at or views';
COMMENT ON COLUMN "store_info"."value" IS 'its value';

CREATE TABLE "runs" (
    "run_id" UUID,
    "name" VARCHAR,
    "model" VARCHAR,
    "revision" VARCHAR,
    "architecture" VARCHAR,
    "intervention" JSON,
    "settings" JSON,
    "versions" JSON,
    "seed" BIGINT,
    "corpus_fingerprint" VARCHAR,
    "status" VARCHAR,
    "started_at" TIMESTAMP,
    "finished_at" TIMESTAMP,
    "summary" JSON,
    "anatomy" JSON,
    PRIMARY KEY (run_id), UNIQUE (name)
);
COMMENT ON TABLE "runs" IS 'one row a run: a pass of a corpus through a model';
COMMENT ON COLUMN "runs"."run_id" IS 'identity of the run';
COMMENT ON COLUMN "runs"."name" IS 'the user''s name for it, unique in the file';
COMMENT ON COLUMN "runs"."model" IS 'what was loaded: Hub id, path, or class name of a module';
COMMENT ON COLUMN "runs"."revision" IS 'commit of the weights; for local files a digest of their contents';
COMMENT ON COLUMN "runs"."architecture" IS 'class name of the model';
COMMENT ON COLUMN "runs"."intervention" IS 'the edits in force, null for none';
COMMENT ON COLUMN "runs"."settings" IS 'probes, batch size, lengths, dtype, device and kernels of the run';
COMMENT ON COLUMN "runs"."versions" IS 'versions of moescope, torch, transformers, duckdb and Python';
COMMENT ON COLUMN "runs"."seed" IS 'seed of everything random in the run';
COMMENT ON COLUMN "runs"."corpus_fingerprint" IS 'SHA-256 over the texts and labels, in order';
COMMENT ON COLUMN "runs"."status" IS 'running, complete, incomplete or failed';
COMMENT ON COLUMN "runs"."started_at" IS 'when recording began, UTC';
COMMENT ON COLUMN "runs"."finished_at" IS 'when it ended, UTC; null while running';
COMMENT ON COLUMN "runs"."summary" IS 'counts and timings of the run: tokens, seconds, splits, skipped lines, notes';
COMMENT ON COLUMN "runs"."anatomy" IS 'what the model is made of: width, vocabulary, parameters';

CREATE TABLE "layers" (
    "run_id" UUID,
    "layer" USMALLINT,
    "block" VARCHAR,
    "stack" VARCHAR,
    "kind" VARCHAR,
    "n_experts" INTEGER,
    "top_k" INTEGER,
    "n_shared" INTEGER,
    "n_null" INTEGER,
    "d_expert" INTEGER,
    "routing_rule" JSON
);
COMMENT ON TABLE "layers" IS 'one row a layer and sublayer of a run''s model';
COMMENT ON COLUMN "layers"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "layers"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "layers"."block" IS 'sublayer holding the router: mlp, attn, mlp.1, …';
COMMENT ON COLUMN "layers"."stack" IS 'decoder, or encoder in encoder-decoder models';
COMMENT ON COLUMN "layers"."kind" IS 'moe, dense, attention or ssm';
COMMENT ON COLUMN "layers"."n_experts" IS 'routed experts, null where the sublayer has none';
COMMENT ON COLUMN "layers"."top_k" IS 'experts chosen for each token';
COMMENT ON COLUMN "layers"."n_shared" IS 'shared experts, which see every token';
COMMENT ON COLUMN "layers"."n_null" IS 'null (zero-computation) experts';
COMMENT ON COLUMN "layers"."d_expert" IS 'neurons of one expert, or of the dense MLP';
COMMENT ON COLUMN "layers"."routing_rule" IS 'rule from logits to decision with the agreement found on the first batch';

CREATE TABLE "sequences" (
    "run_id" UUID,
    "sequence_id" BIGINT,
    "document_id" BIGINT,
    "part" INTEGER,
    "label" VARCHAR,
    "source" VARCHAR,
    "text" VARCHAR,
    "n_tokens" INTEGER,
    "content_hash" VARCHAR,
    "metadata" JSON
);
COMMENT ON TABLE "sequences" IS 'one row a sequence: a document, or a part of one that was longer than the context';
COMMENT ON COLUMN "sequences"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "sequences"."sequence_id" IS '0-based number of the sequence, in corpus order after splitting';
COMMENT ON COLUMN "sequences"."document_id" IS '0-based number of the document in the corpus';
COMMENT ON COLUMN "sequences"."part" IS '0-based number of this part of the document';
COMMENT ON COLUMN "sequences"."label" IS 'label of the document, null where it has none';
COMMENT ON COLUMN "sequences"."source" IS 'where the document comes from';
COMMENT ON COLUMN "sequences"."text" IS 'the text of the part';
COMMENT ON COLUMN "sequences"."n_tokens" IS 'unmasked tokens of the text, special ones included; generated ones not';
COMMENT ON COLUMN "sequences"."content_hash" IS 'SHA-256 over the token ids';
COMMENT ON COLUMN "sequences"."metadata" IS 'every other field of the document';

CREATE TABLE "tokens" (
    "run_id" UUID,
    "token" BIGINT,
    "sequence_id" BIGINT,
    "position" INTEGER,
    "token_id" INTEGER,
    "phase" VARCHAR,
    "nll" FLOAT,
    "predicted_id" INTEGER,
    "is_special" BOOLEAN,
    "class" VARCHAR
);
COMMENT ON TABLE "tokens" IS 'one row an unmasked token';
COMMENT ON COLUMN "tokens"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "tokens"."token" IS 'run-wide row number of the unmasked token, 0-based, by sequence';
COMMENT ON COLUMN "tokens"."sequence_id" IS '0-based number of the sequence, in corpus order after splitting';
COMMENT ON COLUMN "tokens"."position" IS '0-based place in the sequence';
COMMENT ON COLUMN "tokens"."token_id" IS 'id in the tokenizer''s vocabulary';
COMMENT ON COLUMN "tokens"."phase" IS 'prefill or decode';
COMMENT ON COLUMN "tokens"."nll" IS '−ln p(this token | those before it), nats; null at the first token of a sequence';
COMMENT ON COLUMN "tokens"."predicted_id" IS 'the most likely next token after this one';
COMMENT ON COLUMN "tokens"."is_special" IS 'whether the tokenizer calls the token special';
COMMENT ON COLUMN "tokens"."class" IS 'special, space, punctuation, digit, word, fragment or mixed';

CREATE TABLE "vocabulary" (
    "run_id" UUID,
    "token_id" INTEGER,
    "bytes" BLOB,
    "text" VARCHAR
);
COMMENT ON TABLE "vocabulary" IS 'one row a token id seen in a run, also as a prediction';
COMMENT ON COLUMN "vocabulary"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "vocabulary"."token_id" IS 'id in the tokenizer''s vocabulary';
COMMENT ON COLUMN "vocabulary"."bytes" IS 'the bytes it stands for; a character may be spread over several tokens';
COMMENT ON COLUMN "vocabulary"."text" IS 'the bytes as text, with U+FFFD where they are part of a character';

CREATE TABLE "routing" (
    "run_id" UUID,
    "token" BIGINT,
    "layer" USMALLINT,
    "block" VARCHAR,
    "experts" USMALLINT[],
    "weights" FLOAT[],
    "margin" FLOAT,
    "entropy" FLOAT
);
COMMENT ON TABLE "routing" IS 'one row a token and router: the decision the experts were given';
COMMENT ON COLUMN "routing"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "routing"."token" IS 'run-wide row number of the unmasked token, 0-based, by sequence';
COMMENT ON COLUMN "routing"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "routing"."block" IS 'sublayer holding the router: mlp, attn, mlp.1, …';
COMMENT ON COLUMN "routing"."experts" IS 'chosen experts by weight, descending, ties by lower id';
COMMENT ON COLUMN "routing"."weights" IS 'weights given to the experts, scaling included, in the order of experts';
COMMENT ON COLUMN "routing"."margin" IS 'k-th minus (k+1)-th score where the router takes its top-k; null where the rule is not verified';
COMMENT ON COLUMN "routing"."entropy" IS 'entropy of the router''s distribution over all experts, nats; null without logits';

CREATE TABLE "router_logits" (
    "run_id" UUID,
    "token" BIGINT,
    "layer" USMALLINT,
    "block" VARCHAR,
    "logits" FLOAT[]
);
COMMENT ON TABLE "router_logits" IS 'one row a token and router';
COMMENT ON COLUMN "router_logits"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "router_logits"."token" IS 'run-wide row number of the unmasked token, 0-based, by sequence';
COMMENT ON COLUMN "router_logits"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "router_logits"."block" IS 'sublayer holding the router: mlp, attn, mlp.1, …';
COMMENT ON COLUMN "router_logits"."logits" IS 'router scores before softmax, sigmoid or bias, by expert id';

CREATE TABLE "expert_outputs" (
    "run_id" UUID,
    "token" BIGINT,
    "layer" USMALLINT,
    "block" VARCHAR,
    "norms" FLOAT[]
);
COMMENT ON TABLE "expert_outputs" IS 'one row a token and router: how large each chosen expert''s output was';
COMMENT ON COLUMN "expert_outputs"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "expert_outputs"."token" IS 'run-wide row number of the unmasked token, 0-based, by sequence';
COMMENT ON COLUMN "expert_outputs"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "expert_outputs"."block" IS 'sublayer holding the router: mlp, attn, mlp.1, …';
COMMENT ON COLUMN "expert_outputs"."norms" IS 'L2 norm of each slot''s output before its weight, in the order of routing.experts';

CREATE TABLE "experts" (
    "run_id" UUID,
    "layer" USMALLINT,
    "block" VARCHAR,
    "expert" INTEGER,
    "tokens" BIGINT,
    "weight_sum" DOUBLE,
    "output_norm_mean" DOUBLE,
    "weighted_norm_sum" DOUBLE,
    "max_abs_out" FLOAT,
    "max_abs_channel" INTEGER,
    "max_abs_token" BIGINT,
    "active_share" DOUBLE,
    "zero_share" DOUBLE
);
COMMENT ON TABLE "experts" IS 'one row an expert: reductions over every token routed to it';
COMMENT ON COLUMN "experts"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "experts"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "experts"."block" IS 'sublayer holding the router: mlp, attn, mlp.1, …';
COMMENT ON COLUMN "experts"."expert" IS 'expert id; null experts follow the routed ones; shared experts are −1, −2, …';
COMMENT ON COLUMN "experts"."tokens" IS 'tokens that chose the expert';
COMMENT ON COLUMN "experts"."weight_sum" IS 'sum of the weights given to it';
COMMENT ON COLUMN "experts"."output_norm_mean" IS 'mean L2 norm of its output before the weight, null where it was never chosen';
COMMENT ON COLUMN "experts"."weighted_norm_sum" IS 'sum of weight × L2 norm of its output';
COMMENT ON COLUMN "experts"."max_abs_out" IS 'largest |output| over its tokens and channels';
COMMENT ON COLUMN "experts"."max_abs_channel" IS 'channel of that maximum';
COMMENT ON COLUMN "experts"."max_abs_token" IS 'token of that maximum';
COMMENT ON COLUMN "experts"."active_share" IS 'share of |neuron| over a threshold (0 unless the probe was given one), over its tokens and neurons; null where neurons cannot be read';
COMMENT ON COLUMN "experts"."zero_share" IS 'share of neurons exactly zero; null where neurons cannot be read';

CREATE TABLE "loads" (
    "run_id" UUID,
    "layer" USMALLINT,
    "block" VARCHAR,
    "label" VARCHAR,
    "phase" VARCHAR,
    "expert" INTEGER,
    "tokens" BIGINT,
    "weight_sum" DOUBLE
);
COMMENT ON TABLE "loads" IS 'one row an expert, label and phase; the one source of load';
COMMENT ON COLUMN "loads"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "loads"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "loads"."block" IS 'sublayer holding the router: mlp, attn, mlp.1, …';
COMMENT ON COLUMN "loads"."label" IS 'label of the document, null where it has none';
COMMENT ON COLUMN "loads"."phase" IS 'prefill or decode';
COMMENT ON COLUMN "loads"."expert" IS 'expert id; null experts follow the routed ones; shared experts are −1, −2, …';
COMMENT ON COLUMN "loads"."tokens" IS 'tokens that chose the expert';
COMMENT ON COLUMN "loads"."weight_sum" IS 'sum of the weights given to the expert';

CREATE TABLE "residual" (
    "run_id" UUID,
    "token" BIGINT,
    "layer" USMALLINT,
    "norm" FLOAT,
    "top_values" FLOAT[3],
    "top_channels" USMALLINT[3]
);
COMMENT ON TABLE "residual" IS 'one row a token and layer: the residual stream at the block''s output';
COMMENT ON COLUMN "residual"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "residual"."token" IS 'run-wide row number of the unmasked token, 0-based, by sequence';
COMMENT ON COLUMN "residual"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "residual"."norm" IS 'L2 norm';
COMMENT ON COLUMN "residual"."top_values" IS 'the three largest values by magnitude, signed';
COMMENT ON COLUMN "residual"."top_channels" IS 'their channels';

CREATE TABLE "residual_sequences" (
    "run_id" UUID,
    "sequence_id" BIGINT,
    "layer" USMALLINT,
    "median_abs" FLOAT
);
COMMENT ON TABLE "residual_sequences" IS 'one row a sequence and layer';
COMMENT ON COLUMN "residual_sequences"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "residual_sequences"."sequence_id" IS '0-based number of the sequence, in corpus order after splitting';
COMMENT ON COLUMN "residual_sequences"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "residual_sequences"."median_abs" IS 'lower median of |x| over all its tokens and channels at the block''s output';

CREATE TABLE "massive_activations" (
    "run_id" UUID,
    "layer" USMALLINT,
    "token" BIGINT,
    "channel" INTEGER,
    "value" DOUBLE,
    "ratio" DOUBLE
);
COMMENT ON TABLE "massive_activations" IS 'one row a massive activation at a block''s output';
COMMENT ON COLUMN "massive_activations"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "massive_activations"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "massive_activations"."token" IS 'run-wide row number of the unmasked token, 0-based, by sequence';
COMMENT ON COLUMN "massive_activations"."channel" IS 'channel of the residual stream';
COMMENT ON COLUMN "massive_activations"."value" IS 'the value';
COMMENT ON COLUMN "massive_activations"."ratio" IS '|value| over the median |x| of the layer';

CREATE TABLE "super_experts" (
    "run_id" UUID,
    "rule" VARCHAR,
    "layer" USMALLINT,
    "block" VARCHAR,
    "expert" INTEGER,
    "value" DOUBLE,
    "threshold" DOUBLE
);
COMMENT ON TABLE "super_experts" IS 'one row an expert that a rule calls super expert';
COMMENT ON COLUMN "super_experts"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "super_experts"."rule" IS 'name of the rule';
COMMENT ON COLUMN "super_experts"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "super_experts"."block" IS 'sublayer holding the router: mlp, attn, mlp.1, …';
COMMENT ON COLUMN "super_experts"."expert" IS 'expert id; null experts follow the routed ones; shared experts are −1, −2, …';
COMMENT ON COLUMN "super_experts"."value" IS 'the value';
COMMENT ON COLUMN "super_experts"."threshold" IS 'what the value had to exceed';

CREATE TABLE "heads" (
    "run_id" UUID,
    "layer" USMALLINT,
    "head" INTEGER,
    "metric" VARCHAR,
    "condition" VARCHAR,
    "value" DOUBLE,
    "n" BIGINT
);
COMMENT ON TABLE "heads" IS 'one row a head, metric and condition';
COMMENT ON COLUMN "heads"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "heads"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "heads"."head" IS 'query head';
COMMENT ON COLUMN "heads"."metric" IS 'what was measured';
COMMENT ON COLUMN "heads"."condition" IS 'under which it was measured';
COMMENT ON COLUMN "heads"."value" IS 'the value';
COMMENT ON COLUMN "heads"."n" IS 'observations behind the value';

CREATE TABLE "activations" (
    "run_id" UUID,
    "site" VARCHAR,
    "path" VARCHAR,
    "rows" BIGINT,
    "width" INTEGER,
    "dtype" VARCHAR,
    "checksum" VARCHAR,
    "shard" INTEGER,
    "tokens" BIGINT
);
COMMENT ON TABLE "activations" IS 'one row a shard of recorded vectors, kept beside the file';
COMMENT ON COLUMN "activations"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "activations"."site" IS 'where the vectors were read';
COMMENT ON COLUMN "activations"."path" IS 'the shard, a safetensors file, relative to the store''s folder';
COMMENT ON COLUMN "activations"."rows" IS 'vectors in it';
COMMENT ON COLUMN "activations"."width" IS 'components of a vector, all heads together';
COMMENT ON COLUMN "activations"."dtype" IS 'their type: float32, bfloat16, float16 or float64';
COMMENT ON COLUMN "activations"."checksum" IS 'SHA-256 of the shard';
COMMENT ON COLUMN "activations"."shard" IS '0-based number of the shard among those of the site';
COMMENT ON COLUMN "activations"."tokens" IS 'sampled tokens that its vectors belong to';

CREATE TABLE "coverage" (
    "run_id" UUID,
    "site" VARCHAR,
    "expected" BIGINT,
    "recorded" BIGINT,
    "status" VARCHAR,
    "detail" VARCHAR
);
COMMENT ON TABLE "coverage" IS 'one row a site: events expected beside events recorded';
COMMENT ON COLUMN "coverage"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "coverage"."site" IS 'the site, or the table where it is not one site''s';
COMMENT ON COLUMN "coverage"."expected" IS 'events the batches must give';
COMMENT ON COLUMN "coverage"."recorded" IS 'events found in the store';
COMMENT ON COLUMN "coverage"."status" IS 'complete, short, excess, invalid or absent';
COMMENT ON COLUMN "coverage"."detail" IS 'what it means and what to do';

CREATE TABLE "effects" (
    "effect_id" UUID,
    "sweep_id" UUID,
    "base_run_id" UUID,
    "run_id" UUID,
    "intervention" JSON,
    "kind" VARCHAR,
    "draw" INTEGER,
    "group_kind" VARCHAR,
    "group_value" VARCHAR,
    "metric" VARCHAR,
    "value" DOUBLE,
    "ci_low" DOUBLE,
    "ci_high" DOUBLE,
    "n" BIGINT,
    "unit" VARCHAR
);
COMMENT ON TABLE "effects" IS 'one row an effect: what an intervention, or its control, does to a metric';
COMMENT ON COLUMN "effects"."effect_id" IS 'identity of the effect';
COMMENT ON COLUMN "effects"."sweep_id" IS 'the sweep it is part of';
COMMENT ON COLUMN "effects"."base_run_id" IS 'the run without the intervention';
COMMENT ON COLUMN "effects"."run_id" IS 'the run with it, null unless kept';
COMMENT ON COLUMN "effects"."intervention" IS 'the edits';
COMMENT ON COLUMN "effects"."kind" IS 'target or control';
COMMENT ON COLUMN "effects"."draw" IS 'number of the control draw';
COMMENT ON COLUMN "effects"."group_kind" IS 'what the tokens are grouped by';
COMMENT ON COLUMN "effects"."group_value" IS 'the group';
COMMENT ON COLUMN "effects"."metric" IS 'what was measured';
COMMENT ON COLUMN "effects"."value" IS 'the value';
COMMENT ON COLUMN "effects"."ci_low" IS 'lower bound';
COMMENT ON COLUMN "effects"."ci_high" IS 'upper bound';
COMMENT ON COLUMN "effects"."n" IS 'tokens';
COMMENT ON COLUMN "effects"."unit" IS 'unit of the value';

CREATE TABLE "effect_sequences" (
    "effect_id" UUID,
    "kind" VARCHAR,
    "draw" INTEGER,
    "sequence_id" BIGINT,
    "metric" VARCHAR,
    "sum" DOUBLE,
    "n" BIGINT
);
COMMENT ON TABLE "effect_sequences" IS 'one row an effect and sequence, for resampling documents';
COMMENT ON COLUMN "effect_sequences"."effect_id" IS 'the effect';
COMMENT ON COLUMN "effect_sequences"."kind" IS 'target or control';
COMMENT ON COLUMN "effect_sequences"."draw" IS 'number of the control draw';
COMMENT ON COLUMN "effect_sequences"."sequence_id" IS '0-based number of the sequence, in corpus order after splitting';
COMMENT ON COLUMN "effect_sequences"."metric" IS 'what was measured';
COMMENT ON COLUMN "effect_sequences"."sum" IS 'sum over its tokens';
COMMENT ON COLUMN "effect_sequences"."n" IS 'tokens';

CREATE TABLE "batches" (
    "run_id" UUID,
    "batch" INTEGER,
    "first_sequence" BIGINT,
    "sequences" INTEGER,
    "tokens" BIGINT
);
COMMENT ON TABLE "batches" IS 'one row a committed batch of the plan';
COMMENT ON COLUMN "batches"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "batches"."batch" IS '0-based number of the batch in the plan';
COMMENT ON COLUMN "batches"."first_sequence" IS 'its first sequence';
COMMENT ON COLUMN "batches"."sequences" IS 'how many it has';
COMMENT ON COLUMN "batches"."tokens" IS 'unmasked tokens';

CREATE TABLE "load_partials" (
    "run_id" UUID,
    "batch" INTEGER,
    "layer" USMALLINT,
    "block" VARCHAR,
    "label" VARCHAR,
    "phase" VARCHAR,
    "expert" INTEGER,
    "tokens" BIGINT,
    "weight_sum" DOUBLE
);
COMMENT ON TABLE "load_partials" IS 'loads of one batch, so that shards merge to the same sums';
COMMENT ON COLUMN "load_partials"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "load_partials"."batch" IS '0-based number of the batch in the plan';
COMMENT ON COLUMN "load_partials"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "load_partials"."block" IS 'sublayer holding the router: mlp, attn, mlp.1, …';
COMMENT ON COLUMN "load_partials"."label" IS 'label of the document, null where it has none';
COMMENT ON COLUMN "load_partials"."phase" IS 'prefill or decode';
COMMENT ON COLUMN "load_partials"."expert" IS 'expert id; null experts follow the routed ones; shared experts are −1, −2, …';
COMMENT ON COLUMN "load_partials"."tokens" IS 'tokens that chose the expert';
COMMENT ON COLUMN "load_partials"."weight_sum" IS 'sum of the weights given to the expert';

CREATE TABLE "expert_partials" (
    "run_id" UUID,
    "batch" INTEGER,
    "layer" USMALLINT,
    "block" VARCHAR,
    "expert" INTEGER,
    "tokens" BIGINT,
    "weight_sum" DOUBLE,
    "norm_sum" DOUBLE,
    "weighted_norm_sum" DOUBLE,
    "max_abs_out" FLOAT,
    "max_abs_channel" INTEGER,
    "max_abs_token" BIGINT,
    "neurons" BIGINT,
    "active" BIGINT,
    "zeros" BIGINT
);
COMMENT ON TABLE "expert_partials" IS 'reductions of one batch, so that shards merge to the same sums';
COMMENT ON COLUMN "expert_partials"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "expert_partials"."batch" IS '0-based number of the batch in the plan';
COMMENT ON COLUMN "expert_partials"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "expert_partials"."block" IS 'sublayer holding the router: mlp, attn, mlp.1, …';
COMMENT ON COLUMN "expert_partials"."expert" IS 'expert id; null experts follow the routed ones; shared experts are −1, −2, …';
COMMENT ON COLUMN "expert_partials"."tokens" IS 'tokens that chose the expert';
COMMENT ON COLUMN "expert_partials"."weight_sum" IS 'sum of weights';
COMMENT ON COLUMN "expert_partials"."norm_sum" IS 'sum of L2 norms of its output';
COMMENT ON COLUMN "expert_partials"."weighted_norm_sum" IS 'sum of weight × L2 norm';
COMMENT ON COLUMN "expert_partials"."max_abs_out" IS 'largest |output|';
COMMENT ON COLUMN "expert_partials"."max_abs_channel" IS 'its channel';
COMMENT ON COLUMN "expert_partials"."max_abs_token" IS 'its token';
COMMENT ON COLUMN "expert_partials"."neurons" IS 'values of its neurons seen, 0 where neurons cannot be read';
COMMENT ON COLUMN "expert_partials"."active" IS 'of these, how many over the threshold';
COMMENT ON COLUMN "expert_partials"."zeros" IS 'of these, how many exactly zero';

CREATE VIEW "decisions" AS 
        SELECT run_id, token, layer, block, slot::INTEGER - 1 AS slot, expert::INTEGER AS expert, weight
        FROM (
            SELECT
                run_id, token, layer, block,
                generate_subscripts(experts, 1) AS slot,
                unnest(experts) AS expert,
                unnest(weights) AS weight
            FROM routing
        );
COMMENT ON VIEW "decisions" IS 'one row a decision: a token''s slot at a router, the expert in it and its weight';
COMMENT ON COLUMN "decisions"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "decisions"."token" IS 'run-wide row number of the unmasked token, 0-based';
COMMENT ON COLUMN "decisions"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "decisions"."block" IS 'sublayer holding the router: mlp, attn, mlp.1, …';
COMMENT ON COLUMN "decisions"."slot" IS '0-based place in the decision: slot 0 has the largest weight';
COMMENT ON COLUMN "decisions"."expert" IS 'expert id; null experts follow the routed ones';
COMMENT ON COLUMN "decisions"."weight" IS 'weight given to the expert, scaling included; null where it was not recorded';

CREATE VIEW "decision_outputs" AS 
        SELECT run_id, token, layer, block, slot::INTEGER - 1 AS slot, expert::INTEGER AS expert, weight, norm
        FROM (
            SELECT
                run_id, token, layer, block,
                generate_subscripts(r.experts, 1) AS slot,
                unnest(r.experts) AS expert,
                unnest(r.weights) AS weight,
                unnest(o.norms) AS norm
            FROM routing r
            JOIN expert_outputs o USING (run_id, token, layer, block)
        );
COMMENT ON VIEW "decision_outputs" IS 'one row a decision whose expert''s output was measured (probe expert_outputs)';
COMMENT ON COLUMN "decision_outputs"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "decision_outputs"."token" IS 'run-wide row number of the unmasked token, 0-based';
COMMENT ON COLUMN "decision_outputs"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "decision_outputs"."block" IS 'sublayer holding the router: mlp, attn, mlp.1, …';
COMMENT ON COLUMN "decision_outputs"."slot" IS '0-based place in the decision: slot 0 has the largest weight';
COMMENT ON COLUMN "decision_outputs"."expert" IS 'expert id; null experts follow the routed ones';
COMMENT ON COLUMN "decision_outputs"."weight" IS 'weight given to the expert, scaling included; null where it was not recorded';
COMMENT ON COLUMN "decision_outputs"."norm" IS 'L2 norm of the expert''s output before its weight';

CREATE VIEW "router_scores" AS 
        SELECT run_id, token, layer, block, expert::INTEGER - 1 AS expert, logit
        FROM (
            SELECT
                run_id, token, layer, block,
                generate_subscripts(logits, 1) AS expert,
                unnest(logits) AS logit
            FROM router_logits
        );
COMMENT ON VIEW "router_scores" IS 'one row a token, router and expert: the router''s score, chosen or not (probe router_logits)';
COMMENT ON COLUMN "router_scores"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "router_scores"."token" IS 'run-wide row number of the unmasked token, 0-based';
COMMENT ON COLUMN "router_scores"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "router_scores"."block" IS 'sublayer holding the router: mlp, attn, mlp.1, …';
COMMENT ON COLUMN "router_scores"."expert" IS 'expert id; null experts follow the routed ones';
COMMENT ON COLUMN "router_scores"."logit" IS 'score before softmax, sigmoid or bias';

CREATE VIEW "token_text" AS 
        SELECT
            t.run_id, t.token, t.sequence_id, s.document_id, s.label, t.position, t.phase, t.token_id,
            v.text, t.nll, p.text AS predicted_text, t.is_special, t.class
        FROM tokens t
        LEFT JOIN sequences s ON s.run_id = t.run_id AND s.sequence_id = t.sequence_id
        LEFT JOIN vocabulary v ON v.run_id = t.run_id AND v.token_id = t.token_id
        LEFT JOIN vocabulary p ON p.run_id = t.run_id AND p.token_id = t.predicted_id;
COMMENT ON VIEW "token_text" IS 'one row an unmasked token: its text, where it stands, and what the model predicted after it';
COMMENT ON COLUMN "token_text"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "token_text"."token" IS 'run-wide row number of the unmasked token, 0-based';
COMMENT ON COLUMN "token_text"."sequence_id" IS '0-based number of the sequence';
COMMENT ON COLUMN "token_text"."document_id" IS '0-based number of the document in the corpus';
COMMENT ON COLUMN "token_text"."label" IS 'label of the document, null where it has none';
COMMENT ON COLUMN "token_text"."position" IS '0-based place in the sequence';
COMMENT ON COLUMN "token_text"."phase" IS 'prefill or decode';
COMMENT ON COLUMN "token_text"."token_id" IS 'id in the tokenizer''s vocabulary';
COMMENT ON COLUMN "token_text"."text" IS 'its piece of text, with U+FFFD where it is part of a character; null without one';
COMMENT ON COLUMN "token_text"."nll" IS '−ln p(this token | those before it), nats; null at the first token of a sequence';
COMMENT ON COLUMN "token_text"."predicted_text" IS 'text of the most likely next token after this one';
COMMENT ON COLUMN "token_text"."is_special" IS 'whether the tokenizer calls the token special';
COMMENT ON COLUMN "token_text"."class" IS 'special, space, punctuation, digit, word, fragment or mixed';

CREATE VIEW "expert_load" AS 
        SELECT
            *,
            tokens / nullif(sum(tokens) OVER router, 0) AS share,
            1 / count(*) OVER router AS fair_share,
            tokens * count(*) OVER router / nullif(sum(tokens) OVER router, 0) AS relative_load
        FROM (
            SELECT run_id, layer, block, expert, sum(tokens)::BIGINT AS tokens, sum(weight_sum) AS weight_sum
            FROM loads
            WHERE expert >= 0
            GROUP BY run_id, layer, block, expert
        )
        WINDOW router AS (PARTITION BY run_id, layer, block);
COMMENT ON VIEW "expert_load" IS 'one row a router''s expert: how much of the router''s work it takes, over all labels and phases';
COMMENT ON COLUMN "expert_load"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "expert_load"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "expert_load"."block" IS 'sublayer holding the router: mlp, attn, mlp.1, …';
COMMENT ON COLUMN "expert_load"."expert" IS 'expert id; null experts follow the routed ones';
COMMENT ON COLUMN "expert_load"."tokens" IS 'tokens that chose the expert';
COMMENT ON COLUMN "expert_load"."weight_sum" IS 'sum of the weights given to it';
COMMENT ON COLUMN "expert_load"."share" IS 'share of the router''s decisions that name it; null where there are none';
COMMENT ON COLUMN "expert_load"."fair_share" IS '1 ÷ experts: its share if all were chosen equally often';
COMMENT ON COLUMN "expert_load"."relative_load" IS 'share ÷ fair share: 1 is fair, 0 is an expert that is never chosen';

CREATE VIEW "expert_load_by_label" AS 
        SELECT *, share / nullif(overall_share, 0) AS lift
        FROM (
            SELECT
                *,
                tokens / nullif(sum(tokens) OVER (PARTITION BY run_id, layer, block, label), 0) AS share,
                sum(tokens) OVER (PARTITION BY run_id, layer, block, expert)
                    / nullif(sum(tokens) OVER (PARTITION BY run_id, layer, block), 0) AS overall_share
            FROM (
                SELECT
                    run_id, layer, block, label, expert,
                    sum(tokens)::BIGINT AS tokens,
                    sum(weight_sum) AS weight_sum
                FROM loads
                WHERE expert >= 0
                GROUP BY run_id, layer, block, label, expert
            )
        );
COMMENT ON VIEW "expert_load_by_label" IS 'one row a router''s expert and label: how much of the label''s decisions at the router it takes';
COMMENT ON COLUMN "expert_load_by_label"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "expert_load_by_label"."layer" IS '0-based index of the transformer block';
COMMENT ON COLUMN "expert_load_by_label"."block" IS 'sublayer holding the router: mlp, attn, mlp.1, …';
COMMENT ON COLUMN "expert_load_by_label"."label" IS 'label of the document, null where it has none';
COMMENT ON COLUMN "expert_load_by_label"."expert" IS 'expert id; null experts follow the routed ones';
COMMENT ON COLUMN "expert_load_by_label"."tokens" IS 'tokens that chose the expert';
COMMENT ON COLUMN "expert_load_by_label"."weight_sum" IS 'sum of the weights given to it';
COMMENT ON COLUMN "expert_load_by_label"."share" IS 'share of the label''s decisions at this router that name the expert';
COMMENT ON COLUMN "expert_load_by_label"."overall_share" IS 'its share of the decisions of all labels';
COMMENT ON COLUMN "expert_load_by_label"."lift" IS 'share ÷ overall share: over 1 where the expert prefers the label; a null level comes from the analysis `specialization`';

CREATE VIEW "labels" AS 
        SELECT
            run_id, label,
            count(DISTINCT document_id) AS documents,
            count(*) AS sequences,
            sum(n_tokens)::BIGINT AS tokens
        FROM sequences
        GROUP BY run_id, label;
COMMENT ON VIEW "labels" IS 'one row a run and label: how much of the corpus carries it';
COMMENT ON COLUMN "labels"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "labels"."label" IS 'label of the document, null where it has none';
COMMENT ON COLUMN "labels"."documents" IS 'documents with the label';
COMMENT ON COLUMN "labels"."sequences" IS 'sequences they were split into';
COMMENT ON COLUMN "labels"."tokens" IS 'unmasked tokens of their texts, generated ones not';

CREATE VIEW "run_overview" AS 
        SELECT
            run_id, name, status, model, architecture,
            (summary ->> 'tokens')::BIGINT AS tokens,
            (summary ->> 'generated_tokens')::BIGINT AS generated_tokens,
            (summary ->> 'sequences')::BIGINT AS sequences,
            (summary ->> 'documents')::BIGINT AS documents,
            (summary ->> 'seconds')::DOUBLE AS seconds,
            (summary ->> 'tokens_per_second')::DOUBLE AS tokens_per_second,
            summary ->> 'stopped' AS stopped,
            started_at, finished_at
        FROM runs;
COMMENT ON VIEW "run_overview" IS 'one row a run, with the counts and timings of its summary as columns';
COMMENT ON COLUMN "run_overview"."run_id" IS 'identity of the run';
COMMENT ON COLUMN "run_overview"."name" IS 'the user''s name for it';
COMMENT ON COLUMN "run_overview"."status" IS 'running, complete, incomplete or failed';
COMMENT ON COLUMN "run_overview"."model" IS 'what was loaded';
COMMENT ON COLUMN "run_overview"."architecture" IS 'class name of the model';
COMMENT ON COLUMN "run_overview"."tokens" IS 'unmasked tokens, generated ones included';
COMMENT ON COLUMN "run_overview"."generated_tokens" IS 'tokens that the model generated';
COMMENT ON COLUMN "run_overview"."sequences" IS 'sequences';
COMMENT ON COLUMN "run_overview"."documents" IS 'documents of the corpus';
COMMENT ON COLUMN "run_overview"."seconds" IS 'how long recording took, by a clock that does not jump';
COMMENT ON COLUMN "run_overview"."tokens_per_second" IS 'tokens ÷ seconds';
COMMENT ON COLUMN "run_overview"."stopped" IS 'why it stopped early, null where it did not';
COMMENT ON COLUMN "run_overview"."started_at" IS 'when recording began, UTC';
COMMENT ON COLUMN "run_overview"."finished_at" IS 'when it ended, UTC; before started_at where the clock was set back';

CREATE VIEW "gaps" AS 
        SELECT c.run_id, r.name, c.site, c.expected - c.recorded AS missing, c.status, c.detail
        FROM coverage c
        JOIN runs r ON r.run_id = c.run_id
        WHERE c.status <> 'complete';
COMMENT ON VIEW "gaps" IS 'one row a site that is not fully recorded; none where every run is whole';
COMMENT ON COLUMN "gaps"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "gaps"."name" IS 'the run''s name';
COMMENT ON COLUMN "gaps"."site" IS 'the site, or the table where it is not one site''s';
COMMENT ON COLUMN "gaps"."missing" IS 'events expected and not recorded; negative where there are too many';
COMMENT ON COLUMN "gaps"."status" IS 'short, excess, invalid or absent';
COMMENT ON COLUMN "gaps"."detail" IS 'what it means and what to do';

CREATE VIEW "vector_sites" AS 
        SELECT
            run_id, site,
            count(*) AS shards,
            sum("rows")::BIGINT AS "rows",
            max(width) AS width,
            any_value(dtype) AS dtype,
            sum(tokens)::BIGINT AS tokens
        FROM activations
        GROUP BY run_id, site;
COMMENT ON VIEW "vector_sites" IS 'one row a site at which a run kept vectors';
COMMENT ON COLUMN "vector_sites"."run_id" IS 'the run this row belongs to';
COMMENT ON COLUMN "vector_sites"."site" IS 'where the vectors were read';
COMMENT ON COLUMN "vector_sites"."shards" IS 'files they lie in';
COMMENT ON COLUMN "vector_sites"."rows" IS 'vectors';
COMMENT ON COLUMN "vector_sites"."width" IS 'components of a vector, all heads together';
COMMENT ON COLUMN "vector_sites"."dtype" IS 'their type';
COMMENT ON COLUMN "vector_sites"."tokens" IS 'sampled tokens that they belong to';

INSERT INTO store_info VALUES ('application', 'moescope'), ('schema_version', '2'),
    ('created_by', 'moescope 0.1.0'), ('created_at', '2026-11-22T09:00:00+00:00'), ('views', 'decisions,decision_outputs,router_scores,token_text,expert_load,expert_load_by_label,labels,run_overview,gaps,vector_sites');
