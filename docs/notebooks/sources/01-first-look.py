"""Source of 01-first-look.ipynb: `python docs/notebooks/execute.py` makes the notebook of it."""
# ruff: noqa: B018  the last line of a cell is what it shows

# %% [markdown]
# # A first look
#
# A mixture-of-experts model sends each token to a few of many experts. Which experts, and by what? Here a small model runs over
# text of ten kinds, everything it decides is kept, and the first answer that comes to mind ("experts are specialists of topics")
# is held against a simpler one.
#
# Everything happens offline, on the bundled model of 6.7 million parameters, and is written to a temporary folder. The model is
# far too small to be useful; it is there to be looked into.

# %%
import math
import tempfile
from pathlib import Path

import moescope as ms

folder = Path(tempfile.mkdtemp())
model = ms.load("demo")
model.anatomy

# %% [markdown]
# The anatomy is found by looking at the model, not by reading its name. Remember two numbers of the table: how many experts a
# layer has (E), and how many of them each token takes (k). A router that did not care would give each expert k/E of the tokens.
#
# ## Record
#
# **Question:** what did the model do with each token of the corpus? The corpus has ten labels, one a kind of text; every
# passage was held out when the model was trained.

# %%
store = ms.Store(folder / "runs.duckdb")
run = ms.record(model, "demo", store, name="base")
run

# %% [markdown]
# Before any number is believed: is all of it there? Every place in the model that should have been seen has a row in the ledger,
# events expected beside events found in the store. One missing event would make the run `incomplete`, and every figure would
# say so.

# %%
ledger = run.coverage.df()
ledger.groupby("status")[["expected", "recorded"]].sum()

# %% [markdown]
# **How to read it:** one status, `complete`, and two equal sums. Only then does it make sense to go on.
#
# ## One sentence, token by token
#
# Records are tables, and every question about them is SQL (in `run.sql`, `$run` stands for the run's id).
# Here are the first tokens of one French passage, with the two experts
# that each took in the last layer and how decided its router was (the margin: how far ahead the last chosen expert was of the
# first one not chosen, in logits).

# %%
tokens = run.sql("""
    SELECT t.position, t.token_id, r.experts, r.weights, r.margin
    FROM tokens t JOIN routing r USING (run_id, token) JOIN sequences s USING (run_id, sequence_id)
    WHERE t.run_id = $run AND r.layer = 5 AND t.position < 12
        AND s.sequence_id = (SELECT min(sequence_id) FROM sequences WHERE run_id = $run AND label = 'french')
    ORDER BY t.position
""").df()
tokens.insert(1, "text", [model.tokenizer.decode([i]) for i in tokens.pop("token_id")])
tokens.round(2)

# %% [markdown]
# Look for pieces that come twice and keep, or do not keep, their experts; for neighbours that share one; and for margins so small
# that a little noise would have sent the token elsewhere. One sentence can suggest either answer. This notebook and the
# next put numbers to it.
#
# ## Does it predict anything?
#
# **Question:** how well does the model predict each kind of text? In nats a token (NLL, lower is better). A model that
# knew nothing would need ln(vocabulary) nats. A sterner comparison: one that knew only how often each token occurs *in this very
# corpus* needs the entropy of those counts. **What would refute that it learned more:** an NLL near that second
# number; its routing would then be a study of noise.

# %%
ms.analyze(run, "nll").figure()

# %%
counts = run.sql("SELECT count(*) AS n FROM tokens WHERE run_id = $run AND position > 0 GROUP BY token_id").df().n
share = counts / counts.sum()
unigram = float(-(share * share.map(math.log)).sum())
baselines = {
    "the model": ms.analyze(run, "nll").df().query("label == 'all'").value.item(),
    "token counts of this corpus": unigram,
    "nothing known": math.log(model.tokenizer.vocab_size),
}
{name: round(nats, 2) for name, nats in baselines.items()}

# %% [markdown]
# **How to read it:** the model is well below both; it has learned something beyond how common words are. Labels differ, and
# their intervals (95 %, over documents, because tokens of one document are not independent) tell which differences to
# trust: bars whose intervals overlap much should not be ranked.
#
# ## Do experts prefer kinds of text?
#
# **Question:** does an expert take a larger share of one label's tokens than of all tokens? **Null:** labels dealt out anew
# over whole documents, 200 times. Shuffling tokens instead would make nearly everything "significant", because neighbours agree.
# With hundreds of expert–label pairs some look special by luck: `q` is the p-value after false-discovery control.
# **What would refute specialization:** shares within the range of the shuffles, and few or no pairs with q < 0.05.

# %%
special = ms.analyze(run, "specialization")
special.df().head(8).round(3)

# %% [markdown]
# The column `null` is the share that shuffled labels give, `lift` how many times its overall share the expert takes. The whole
# picture, layer by layer:

# %%
special.figure()

# %% [markdown]
# **How to read it:** some experts take several times their share of one language. It is tempting to call them "the German
# expert" or "the Bible expert". But languages differ in their *words*, and a router that looked at nothing but the token would
# show the same map. So ask which piece of knowledge tells more about the choice.
#
# ## Topic or token?
#
# **Question:** how many bits does each thing known of a token tell about the expert it goes to? **Null:** the same after
# shuffling, which is not 0: thousands of token ids fit noise well, so only the distance of a bar from its null counts.
# **What would refute "experts follow topics":** that the label tells much less than the token id does.

# %%
information = ms.analyze(run, "routing_information")
table = information.df()
table["over shuffled"] = table.value - table.null
table.groupby("given")[["value", "null", "over shuffled"]].mean().sort_values("over shuffled", ascending=False).round(3)

# %% [markdown]
# (Means over layers, in bits.) Layer by layer, since layers need not agree:

# %%
information.figure()

# %% [markdown]
# **How to read it:** the token id tells several times more than the label, most clearly so in the first layer, where context has
# had little chance to enter. Position tells next to nothing. So most of what a map of specialists shows *may* be words. That is not
# the end of the matter: label and token overlap, and this table does not say what the label tells once the token is known. The
# third notebook asks exactly that of one expert, and finds a case in which the token is not the answer.
#
# ## What next
#
# - `special.save("specialization.html")` writes an answer with figure, table, definition and query; `special.sql` shows the query.
# - `ms.analyses()` lists every question that can be asked of this run.
# - The same in one command: `moescope profile demo --store runs.duckdb --report report.html`.
# - [Consistency and caches](02-consistency-and-caches.ipynb): neighbours that share experts, and what that is worth.
# - [Who is this expert?](03-who-is-this-expert.ipynb): from "goes together with German" to "is needed for German".
