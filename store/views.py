"""The views of a store, as data: shapes that people ask for again and again, with a comment on each column.

A view is a stored query: it takes no room, every DuckDB client sees it, and it works in a store opened for reading only.
None sorts, and a condition on `run_id`, `layer` or `token` reaches the table below, so that only those rows are read.
"""

from __future__ import annotations

from dataclasses import dataclass

from moescope.store.schema import Column
from moescope.store.sql_text import literal

_RUN = Column("run_id", "UUID", "the run this row belongs to")
_TOKEN = Column("token", "BIGINT", "run-wide row number of the unmasked token, 0-based")
_LAYER = Column("layer", "USMALLINT", "0-based index of the transformer block")
_BLOCK = Column("block", "VARCHAR", "sublayer holding the router: mlp, attn, mlp.1, …")
_EXPERT = Column("expert", "INTEGER", "expert id; null experts follow the routed ones")
_LABEL = Column("label", "VARCHAR", "label of the document, null where it has none")
_SLOT = Column("slot", "INTEGER", "0-based place in the decision: slot 0 has the largest weight")
_WEIGHT = Column("weight", "FLOAT", "weight given to the expert, scaling included; null where it was not recorded")
_LOAD = (
    Column("tokens", "BIGINT", "tokens that chose the expert"),
    Column("weight_sum", "DOUBLE", "sum of the weights given to it"),
)
_FAIR = Column("fair_share", "DOUBLE", "1 ÷ experts: its share if all were chosen equally often")


@dataclass(frozen=True)
class View:
    """One view: name, what one row is, its columns, and the query it stands for."""

    name: str
    comment: str
    columns: tuple[Column, ...]
    query: str

    def ddl(self) -> list[str]:
        """Statements that create the view and its comments."""
        comments = [f'COMMENT ON VIEW "{self.name}" IS {literal(self.comment)}']
        comments += [f'COMMENT ON COLUMN "{self.name}"."{c.name}" IS {literal(c.comment)}' for c in self.columns]
        return [f'CREATE VIEW "{self.name}" AS {self.query}', *comments]


VIEWS: tuple[View, ...] = (
    View(
        "decisions",
        "one row a decision: a token's slot at a router, the expert in it and its weight",
        (_RUN, _TOKEN, _LAYER, _BLOCK, _SLOT, _EXPERT, _WEIGHT),
        """
        SELECT run_id, token, layer, block, slot::INTEGER - 1 AS slot, expert::INTEGER AS expert, weight
        FROM (
            SELECT
                run_id, token, layer, block,
                generate_subscripts(experts, 1) AS slot,
                unnest(experts) AS expert,
                unnest(weights) AS weight
            FROM routing
        )
        """,
    ),
    View(
        "decision_outputs",
        "one row a decision whose expert's output was measured (probe expert_outputs)",
        (
            *(_RUN, _TOKEN, _LAYER, _BLOCK, _SLOT, _EXPERT, _WEIGHT),
            Column("norm", "FLOAT", "L2 norm of the expert's output before its weight"),
        ),
        """
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
        )
        """,
    ),
    View(
        "router_scores",
        "one row a token, router and expert: the router's score, chosen or not (probe router_logits)",
        (_RUN, _TOKEN, _LAYER, _BLOCK, _EXPERT, Column("logit", "FLOAT", "score before softmax, sigmoid or bias")),
        """
        SELECT run_id, token, layer, block, expert::INTEGER - 1 AS expert, logit
        FROM (
            SELECT
                run_id, token, layer, block,
                generate_subscripts(logits, 1) AS expert,
                unnest(logits) AS logit
            FROM router_logits
        )
        """,
    ),
    View(
        "token_text",
        "one row an unmasked token: its text, where it stands, and what the model predicted after it",
        (
            *(_RUN, _TOKEN),
            Column("sequence_id", "BIGINT", "0-based number of the sequence"),
            Column("document_id", "BIGINT", "0-based number of the document in the corpus"),
            _LABEL,
            Column("position", "INTEGER", "0-based place in the sequence"),
            Column("phase", "VARCHAR", "prefill or decode"),
            Column("token_id", "INTEGER", "id in the tokenizer's vocabulary"),
            Column(
                "text", "VARCHAR", "its piece of text, with U+FFFD where it is part of a character; null without one"
            ),
            Column("nll", "FLOAT", "−ln p(this token | those before it), nats; null at the first token of a sequence"),
            Column("predicted_text", "VARCHAR", "text of the most likely next token after this one"),
            Column("is_special", "BOOLEAN", "whether the tokenizer calls the token special"),
            Column("class", "VARCHAR", "special, space, punctuation, digit, word, fragment or mixed"),
        ),
        """
        SELECT
            t.run_id, t.token, t.sequence_id, s.document_id, s.label, t.position, t.phase, t.token_id,
            v.text, t.nll, p.text AS predicted_text, t.is_special, t.class
        FROM tokens t
        LEFT JOIN sequences s ON s.run_id = t.run_id AND s.sequence_id = t.sequence_id
        LEFT JOIN vocabulary v ON v.run_id = t.run_id AND v.token_id = t.token_id
        LEFT JOIN vocabulary p ON p.run_id = t.run_id AND p.token_id = t.predicted_id
        """,
    ),
    View(
        "expert_load",
        "one row a router's expert: how much of the router's work it takes, over all labels and phases",
        (
            *(_RUN, _LAYER, _BLOCK, _EXPERT, *_LOAD),
            Column("share", "DOUBLE", "share of the router's decisions that name it; null where there are none"),
            _FAIR,
            Column("relative_load", "DOUBLE", "share ÷ fair share: 1 is fair, 0 is an expert that is never chosen"),
        ),
        """
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
        WINDOW router AS (PARTITION BY run_id, layer, block)
        """,
    ),
    View(
        "expert_load_by_label",
        "one row a router's expert and label: how much of the label's decisions at the router it takes",
        (
            *(_RUN, _LAYER, _BLOCK, _LABEL, _EXPERT, *_LOAD),
            Column("share", "DOUBLE", "share of the label's decisions at this router that name the expert"),
            Column("overall_share", "DOUBLE", "its share of the decisions of all labels"),
            Column(
                "lift",
                "DOUBLE",
                "share ÷ overall share: over 1 where the expert prefers the label; a null level "
                "comes from the analysis `specialization`",
            ),
        ),
        """
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
        )
        """,
    ),
    View(
        "labels",
        "one row a run and label: how much of the corpus carries it",
        (
            *(_RUN, _LABEL),
            Column("documents", "BIGINT", "documents with the label"),
            Column("sequences", "BIGINT", "sequences they were split into"),
            Column("tokens", "BIGINT", "unmasked tokens of their texts, generated ones not"),
        ),
        """
        SELECT
            run_id, label,
            count(DISTINCT document_id) AS documents,
            count(*) AS sequences,
            sum(n_tokens)::BIGINT AS tokens
        FROM sequences
        GROUP BY run_id, label
        """,
    ),
    View(
        "run_overview",
        "one row a run, with the counts and timings of its summary as columns",
        (
            Column("run_id", "UUID", "identity of the run"),
            Column("name", "VARCHAR", "the user's name for it"),
            Column("status", "VARCHAR", "running, complete, incomplete or failed"),
            Column("model", "VARCHAR", "what was loaded"),
            Column("architecture", "VARCHAR", "class name of the model"),
            Column("tokens", "BIGINT", "unmasked tokens, generated ones included"),
            Column("generated_tokens", "BIGINT", "tokens that the model generated"),
            Column("sequences", "BIGINT", "sequences"),
            Column("documents", "BIGINT", "documents of the corpus"),
            Column("seconds", "DOUBLE", "how long recording took, by a clock that does not jump"),
            Column("tokens_per_second", "DOUBLE", "tokens ÷ seconds"),
            Column("stopped", "VARCHAR", "why it stopped early, null where it did not"),
            Column("started_at", "TIMESTAMP", "when recording began, UTC"),
            Column("finished_at", "TIMESTAMP", "when it ended, UTC; before started_at where the clock was set back"),
        ),
        """
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
        FROM runs
        """,
    ),
    View(
        "gaps",
        "one row a site that is not fully recorded; none where every run is whole",
        (
            _RUN,
            Column("name", "VARCHAR", "the run's name"),
            Column("site", "VARCHAR", "the site, or the table where it is not one site's"),
            Column("missing", "BIGINT", "events expected and not recorded; negative where there are too many"),
            Column("status", "VARCHAR", "short, excess, invalid or absent"),
            Column("detail", "VARCHAR", "what it means and what to do"),
        ),
        """
        SELECT c.run_id, r.name, c.site, c.expected - c.recorded AS missing, c.status, c.detail
        FROM coverage c
        JOIN runs r ON r.run_id = c.run_id
        WHERE c.status <> 'complete'
        """,
    ),
    View(
        "vector_sites",
        "one row a site at which a run kept vectors",
        (
            _RUN,
            Column("site", "VARCHAR", "where the vectors were read"),
            Column("shards", "BIGINT", "files they lie in"),
            Column("rows", "BIGINT", "vectors"),
            Column("width", "INTEGER", "components of a vector, all heads together"),
            Column("dtype", "VARCHAR", "their type"),
            Column("tokens", "BIGINT", "sampled tokens that they belong to"),
        ),
        """
        SELECT
            run_id, site,
            count(*) AS shards,
            sum("rows")::BIGINT AS "rows",
            max(width) AS width,
            any_value(dtype) AS dtype,
            sum(tokens)::BIGINT AS tokens
        FROM activations
        GROUP BY run_id, site
        """,
    ),
)
