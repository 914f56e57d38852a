"""Source of 02-consistency-and-caches.ipynb: `python docs/notebooks/execute.py` makes the notebook of it."""
# ruff: noqa: B018  the last line of a cell is what it shows

# %% [markdown]
# # Routing consistency and expert caches
#
# A model whose experts do not fit into fast memory keeps some of them there and fetches others. That pays only if neighbouring
# tokens want the same experts. Do they; why; and what is it worth? The measures come from
# [arXiv 2505.16056](https://arxiv.org/abs/2505.16056).
#
# The plan: check the instrument on routing whose answer is known, measure the model, take the consistency apart with three
# shuffles, then replay caches and place experts on devices.

# %%
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

import moescope as ms

folder = Path(tempfile.mkdtemp())
model = ms.load("demo")
store = ms.Store(folder / "runs.duckdb")
run = ms.record(model, "demo", store, name="base", probes=("tokens", "routing"))
run

# %% [markdown]
# ## Is the instrument right?
#
# **Question:** what does the measure say of routing whose answer we know? Two made-up traces of the same shape (16 experts, 2 a
# token): in one, every token draws its experts at random; in the other, each document uses the same two experts
# throughout. The measure, *segment routing best performance* (SRP), asks how well one fixed set of experts serves a window
# of 16 tokens: F1, from 0 to 1. **If it is right,** the first trace must score what chance gives, the second 1.

# %%
random = np.random.default_rng(0)
experts, k, length, documents = 16, 2, 128, 100
drawn = [random.permuted(np.arange(experts))[:k].tolist() for _ in range(documents * length)]
fixed = [random.permuted(np.arange(experts))[:k].tolist() for _ in range(documents)]


def trace(chosen: list[list[int]]) -> pd.DataFrame:
    """A routing trace of one layer, as another program would write it."""
    sequence, position = np.divmod(np.arange(len(chosen)), length)
    return pd.DataFrame({"sequence_id": sequence, "position": position, "layer": 0, "experts": chosen})


store.import_trace(trace(drawn), name="random", n_experts=experts)
store.import_trace(trace([pair for pair in fixed for _ in range(length)]), name="fixed", n_experts=experts)


def srp(name: str) -> pd.Series:
    """SRP of a run, with what chance gives."""
    row = ms.analyze(store.run(name), "local_consistency", segment=16).df().query("metric == 'SRP'")
    return row[["value", "ci_low", "ci_high", "null"]].squeeze()


pd.DataFrame({name: srp(name) for name in ("random", "base", "fixed")}).T.round(3)

# %% [markdown]
# **How to read it:** `random` meets its null (a closed form), `fixed` is at 1: the instrument can say both. The model (`base`)
# lies between, much nearer to chance than to one set a document, and above chance by far more than its interval is wide.
#
# ## Where does the consistency come from?
#
# **Question:** is it that *neighbours* agree, or only that tokens of the same document, or of the same kind of text, like the
# same experts? Three shuffles take away one thing after another: order within a document; documents within a label; labels too.
# **What would refute "neighbours agree":** an excess over the shuffle within sequences whose interval reaches 0.

# %%
consistency = ms.analyze(run, "local_consistency", segment=16)
rows = consistency.df().set_index("metric")
rungs = rows.loc["SRP", ["null", "null_shuffled", "null_shuffled_in_label", "null_shuffled_in_sequence", "value"]]
rungs.index = ["chance", "all tokens shuffled", "shuffled within labels", "shuffled within documents", "as it ran"]
pd.DataFrame({"SRP": rungs, "gained": rungs.diff()}).astype(float).round(3)

# %%
rows[rows.index.str.startswith("excess")][["value", "ci_low", "ci_high"]].round(3)

# %% [markdown]
# **How to read it:** each rung adds one kind of sameness. The largest step here is the label's (tokens of one kind of text share
# experts), then comes the order of tokens, then the document. Had only chance and the final value been compared, as is often
# done, all of it would have been called "local". Imbalance alone (the step from chance to all tokens shuffled) hardly matters:
# this model was trained to balance its load.
#
# And by window length? A window of one token can always be served; long windows must serve many tastes at once.

# %%
ms.analyze(run, "window_usage").figure()

# %% [markdown]
# **How to read it:** the share of a layer's experts that a window of w tokens touches, beside chance. The gap between the curves is
# what a cache can live on. It closes on the right: over a few hundred tokens, nearly every expert is wanted once.
#
# ## What is it worth to a cache?
#
# **Question:** a cache holds C of the 16 experts of each layer; what share of the choices does it serve? Policies are replayed on
# the recorded choices: LRU and others that know the past, and Belady, which knows the future and so bounds them all. **Null:** the
# same replay after tokens are shuffled, which keeps the load and removes the order. **What would refute a gain from
# consistency:** LRU at its null.

# %%
caches = ms.analyze(run, "expert_cache")
hits = caches.df().query("metric == 'hit rate' and size in (2, 4, 8)")
hits = hits.groupby(["policy", "size"])[["value", "null"]].mean().unstack("size")
hits.round(3)

# %%
caches.figure()

# %% [markdown]
# **How to read it:** a cache of 4 serves far more than the quarter of choices that 4 of 16 experts would by chance, but it is
# still wrong about half of the time. Hold LRU against LFU: one bets on what was just used, the other on what was used most.
# Where LFU does no worse, tastes that last through a document count for more than the last few tokens do. The distance from
# LRU to Belady is what a better *policy* could gain at most with the same memory; the distance from Belady to 1 no policy can
# close. Sizes below 2k (shaded) cannot be built: so small a cache gives up experts within one token. These are counts of hits,
# not of seconds: what a miss costs depends on the machine.
#
# ## And to several devices?
#
# **Question:** if the experts of each layer lie on 4 devices, which should lie together? Placing by affinity puts experts of
# consecutive layers that follow each other on one device, so that fewer tokens cross over; placing apart what is loaded together
# evens the load. Both are fitted on half of the documents and judged on the other half. **Null:** 20 placements at random.
# **What would refute a gain:** values on the held-out half within `null_low` and `null_high`.

# %%
placement = ms.analyze(run, "placement")
summary = placement.df().query("layer.isna() and expert.isna()").dropna(axis=1, how="all")
summary.round(3)

# %%
placement.figure()

# %% [markdown]
# **How to read it:** hold each placement against the random ones, and against "contiguous", which is what one gets without
# thinking. One aim is paid with the other: look at both columns before choosing. The gain on held-out documents is of the same
# mixture of texts; on other traffic it may be less. The two documents' halves share labels: a test on a label that was not
# used for fitting would be sterner.
#
# ## What next
#
# - `ms.analyze(run, "local_consistency", pool="label")`: which kinds of text are routed most consistently?
# - `ms.analyze(run, "expert_prefetch")`: what a predictor of the next experts adds, and how much more is moved for it.
# - Your own model's routing, from any program: `store.import_trace("trace.parquet", name="mine", n_experts=64)`.
# - [Who is this expert?](03-who-is-this-expert.ipynb)
