"""Source of 03-who-is-this-expert.ipynb: `python docs/notebooks/execute.py` makes the notebook of it."""
# ruff: noqa: B018  the last line of a cell is what it shows

# %% [markdown]
# # Who is this expert?
#
# One expert takes most tokens of one language. Is it "the expert of that language"? Three claims hide in that name: it goes
# together with the language; it follows the language and not merely its words; the model needs it for the language, and for
# nothing else. Each has its own test and its own control, and each could fail.
#
# So that the expert is not chosen and tested on the same text, documents are parted: half of each label to choose with,
# some of the others to test on.

# %%
import tempfile
from collections import defaultdict
from pathlib import Path

import plotly.graph_objects as go

import moescope as ms

folder = Path(tempfile.mkdtemp())
model = ms.load("demo")
store = ms.Store(folder / "runs.duckdb")

by_label = defaultdict(list)
for document in ms.Corpus.load("demo"):
    by_label[document.label].append({"text": document.text, "label": document.label})
choosing = [text for texts in by_label.values() for text in texts[:12]]
testing = [text for texts in by_label.values() for text in texts[12:18]]

explored = ms.record(model, choosing, store, name="choosing")
tested = ms.record(model, testing, store, name="testing")
len(choosing), len(testing)

# %% [markdown]
# ## 1. Does it go together with the language?
#
# **Question:** which expert stands out most for any label? **Null:** labels shuffled over documents. **What would refute it:** a
# share within what the shuffles give (q over 0.05).

# %%
special = ms.analyze(explored, "specialization").df()
first = special.iloc[0]
layer, expert, label = int(first.layer), int(first.expert), str(first.label)
special.head(5).round(3)

# %%
again = ms.analyze(tested, "specialization").df()
again.query("layer == @layer and expert == @expert and label == @label").round(3)

# %% [markdown]
# **How to read it:** the second table is the same pair on documents that did not choose it. The strongest of hundreds of pairs is
# partly the strongest by luck, so a somewhat smaller value would be no surprise; a share near its null would end the story here.
#
# ## 2. Language or words?
#
# The first notebook showed that token ids tell much of the routing. **Question:** does the expert take a token *because of the
# token*, or because of the text it stands in? **Control:** compare the same token id inside and outside the language, using only
# ids that occur often in both, such as commas, digits and pieces of words. **What would refute "it follows the language":** equal
# shares in both columns.

# %%
same_ids = """
    WITH seen AS (
        SELECT t.token_id, s.label = $label AS inside, list_contains(r.experts, $expert) AS taken
        FROM routing r JOIN tokens t USING (run_id, token) JOIN sequences s USING (run_id, sequence_id)
        WHERE t.run_id = $run AND r.layer = $layer AND t.position > 0
    )
    SELECT token_id, count(*) FILTER (inside) AS n_inside, count(*) FILTER (NOT inside) AS n_outside,
        avg(taken::INT) FILTER (inside) AS share_inside, avg(taken::INT) FILTER (NOT inside) AS share_outside
    FROM seen
    GROUP BY token_id
    HAVING n_inside >= 10 AND n_outside >= 10
    ORDER BY n_inside DESC
"""
both = explored.sql(same_ids, {"layer": layer, "expert": expert, "label": label}).df()
both.insert(1, "token", [repr(model.tokenizer.decode([i])) for i in both.token_id])
both.head(12).round(3)

# %%
figure = go.Figure(
    go.Scatter(
        x=both.share_outside,
        y=both.share_inside,
        mode="markers",
        marker={"size": 8, "color": "#0072B2", "opacity": 0.6},
    )
)
figure.add_shape(type="line", x0=0, y0=0, x1=1, y1=1, line={"dash": "dot", "color": "#868e96"})
figure.update_layout(
    template="plotly_white",
    width=560,
    height=480,
    title=f"L{layer}·E{expert}: the same tokens, inside and outside {label}",
)
figure.update_xaxes(title=f"share taken outside {label}", range=[-0.03, 1.03])
figure.update_yaxes(title=f"share taken inside {label}", range=[-0.03, 1.03])
figure

# %% [markdown]
# **How to read it:** each point is one token id; on the dotted line, text would make no difference. Nearly all points lie far above
# it, many at the left edge: commas and digits go to this expert in one language and almost never elsewhere. So for *this* expert
# words alone do not explain it; by this layer, the model carries the language in its context. Note the exceptions near the
# lower left, if you see any: tokens such as an underscore keep their own expert in any language. They are the reason to
# look at tokens and not only at means.
#
# ## 3. What does it write?
#
# **Question:** when it is chosen, does it push towards the token that comes next? `logit_attribution` takes one logit apart, exactly,
# into what each part added. Each part's `null` is what it adds to *every* token alike, which changes no probability.

# %%
passage = testing[[text["label"] for text in testing].index(label)]["text"][:220]
parts = model.logit_attribution(passage)
table = parts.df()
table["over all tokens"] = table.value - table.null
largest = table.sort_values("over all tokens", ascending=False).head(6)
largest[["component", "layer", "expert", "value", "null"]].round(2)

# %% [markdown]
# **How to read it:** the largest parts of one logit after one passage: an anecdote, to be looked at and not to be counted. It tells
# where the sum comes from. It does not tell what would happen without a part, since everything behind it would change too.
#
# ## 4. Is it needed, and for what?
#
# **Question:** take the expert out (its slots give nothing) and measure how much worse the next token is predicted, in nats, on the
# test documents. **Controls:** three other experts of the same layer with the nearest load, each taken out alone: taking out
# *any* expert hurts. **What would refute "needed for the language":** an effect inside the controls' range there; **what would refute
# "for nothing else":** an effect beyond the controls on other labels.

# %%
cut = ms.Intervention([ms.edits.Ablate(layer=layer, experts=[expert])], name=f"without L{layer}E{expert}")
effect = ms.effect(model, testing, cut, store, base="testing", controls=3)
effect.df().query("metric == 'delta_nll'")[["kind", "value", "ci_low", "ci_high", "null"]].round(4)

# %%
groups = ms.analyze(tested, "effect_groups")
columns = ["label", "value", "ci_low", "ci_high", "null", "control_low", "control_high"]
of_labels = groups.df().query("group_kind == 'label' and metric == 'delta_nll'")
of_labels[columns].sort_values("value", ascending=False).round(4)

# %% [markdown]
# **How to read it:** over all text the effect is small, and its interval wide (the difference to the controls may well reach 0): one
# label in ten carries it, so documents disagree. By label it separates: the language that the expert was chosen for stands far
# beyond its controls, and on all others the effect is near 0. A large `control_high` elsewhere is no fault: controls are experts
# too, and one of them may be needed there, as this one is here. With three controls the least rank p is 1/4, so the argument
# rests on the intervals and on the size beside the controls, not on a p-value; more controls (`controls=19`) would allow one.
#
# And the size in proportion: the model still predicts the language without its expert, worse but far from helplessly. "Takes
# most tokens of" and "is indispensable for" are two statements. Others can stand in, and ablation of one says nothing of pairs.

# %%
groups.figure()

# %% [markdown]
# ## What next
#
# - `ms.effect(..., decompose=True)` parts the effect into what the expert wrote and what later routers did about its absence.
# - `ms.sweep(model, testing, store, base="testing", layers=[4])` takes out every expert of a layer in turn: is the top one unusual?
# - `ms.edits.Ablate(..., how="route_around")` lets the router take its next choice instead: is it the expert or the slot?
# - [Features and steering](05-features-and-steering.ipynb) looks inside what this layer writes.
