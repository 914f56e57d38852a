"""Source of 05-features-and-steering.ipynb: `python docs/notebooks/execute.py` makes the notebook of it."""
# ruff: noqa: B018  the last line of a cell is what it shows

# %% [markdown]
# # Features and steering
#
# What do the experts of one layer write? A sparse autoencoder splits each written vector into a few of many learned directions
# (latents). Here a small one is trained, judged beside simple baselines, read, joined to the experts, and then used to push the
# model, because a feature that only *goes together* with German is one thing, and a direction that *makes* the model write
# German another.
#
# This needs the extra `sae` (`pip install "moescope[sae]"`). The site is the MoE output of layer 4 of the bundled model, the layer
# in which [the third notebook](03-who-is-this-expert.ipynb) found an expert that takes most German tokens.

# %%
import tempfile
from pathlib import Path

import moescope as ms

folder = Path(tempfile.mkdtemp())
model = ms.load("demo")
store = ms.Store(folder / "sae.duckdb")
site = "blocks.4.hook_mlp_out"
run = ms.sae.record(model, "demo", store, sites=[site], name="vectors")
(sae,) = ms.sae.train(run, store, "topk:d=256,k=8", site=site)
sae.name

# %% [markdown]
# 256 latents, of which 8 may be active at a token. A tenth of the documents was kept out of training; what follows is measured on
# those wherever it says held out.
#
# ## Is it any good?
#
# **Question:** how much of the vectors' variance is left unexplained (FVU), and how much worse does the model predict with the
# reconstruction in the vectors' place? **Baselines of the same size:** the 8 first principal components; the 8 largest of
# all principal components of each vector; a random decoder; zero. **What would refute its use:** a baseline that does as well.

# %%
quality = ms.sae.judge(sae, model, store, tokens=6000, live_tokens=2048, ablations=0, controls=2)
judged = quality.df().query("metric in ('fvu', 'delta_ce')")
judged.pivot_table(index="condition", columns="metric", values="value").sort_values("fvu").round(3)

# %% [markdown]
# **How to read it:** the row `sae` should be the best of its column. The fair rival is `pca_topk`, which also chooses 8 directions
# for each vector; `pca` has to use the same 8 for all. The distance to 0 is what the latents do not say: results about latents are
# results about the explained part.
#
# ## What do the latents fire on?
#
# **Question:** which latents have a meaning that can be checked? For each, the best simple rule (the token, the token before, the
# label) is learned on one half of the documents and tested on the other. **Null:** the same with activations moved along the
# corpus.

# %%
ms.sae.read(sae, run, store, model=model, documents="all")
best = ms.analyze(run, "top_features", sae=sae.name)
best.df().query("example == 1")[["feature", "metric", "value", "null", "label", "lift", "text"]].head(8).round(2)

# %% [markdown]
# **How to read it:** `value` is the correlation on unseen documents, `null` what luck gives; the token between ⟦ and ⟧ is where
# the latent fires most. The ranking favours detectors of single tokens, by its definition. A latent further down is not
# meaningless; no simple rule found it.
#
# ## A latent of German
#
# Choose by a rule fixed beforehand: among latents active on at least 1 % of the tokens, the one with the highest lift
# for German. Lift is P(active | German) ÷ P(active); 1 means no preference, and q is held to a false-discovery rate over
# all latents and labels.

# %%
features = ms.analyze(run, "features", sae=sae.name).df()
german = features.query("label == 'german' and value >= 0.01 and q < 0.05").sort_values("lift", ascending=False)
latent = int(german.feature.iloc[0])
german.head(5)[["feature", "value", "active", "documents", "lift", "lift_low", "lift_high", "q"]].round(4)

# %%
ms.analyze(run, "feature", sae=sae.name, feature=latent).figure()

# %% [markdown]
# **How to read it:** before any number, read the column at 0, down the page, then the rows of lower quantiles: the largest examples
# alone make every latent look cleaner than it is. All of it may be German, and the latent still be about something narrower, such as
# how certain words end. A label is the coarsest name that fits.
#
# ## Which expert writes it?
#
# **Question:** on tokens where the latent is active, whose output lies along its decoder row? Contributions add up to what the
# block writes. **Null:** what the same expert writes on the same tokens along latents of about the same frequency. **What would
# refute a writer:** a contribution no larger than its null.

# %%
ids = [int(i) for i in german.feature.head(4)]
writing = ms.sae.feature_experts(sae, model, run, store, features=ids, documents="all", draws=200)
written = writing.df().query("metric == 'writes'").sort_values("value", ascending=False)
written.groupby("feature").head(2).sort_values(["feature", "value"], ascending=[True, False]).round(2)

# %% [markdown]
# **How to read it:** for each latent the two experts that write it most. Where the first stands far before the second, and over its
# null beyond its interval, the latent is that expert's writing. The null is not small: what an expert puts out on such tokens lies
# partly along other latents too. If the expert is number 14, this is the one that the third notebook arrived at by
# routing alone: two ways that need not have met. (It is not proof of two independent facts: an autoencoder of this layer can
# only find what its experts write.)
#
# ## Does it steer?
#
# **Question:** if the latent is added everywhere, does the model lean towards German? The target is fixed without looking at the
# latent: the 20 tokens most concentrated in German documents. It is measured on texts that are *not* German. **Controls:** other
# latents, active about as often, added at the same strength: any push changes something. **What would refute it:** a target
# effect inside the controls' range at every strength, or one that comes only when the rest of the predictions is broken (KL, ΔNLL).

# %%
concentrated = store.sql("""
    SELECT token_id, count(*) FILTER (label = 'german') AS german, count(*) AS everywhere
    FROM tokens JOIN sequences USING (run_id, sequence_id)
    WHERE position > 0
    GROUP BY token_id
    HAVING german >= 20
    ORDER BY german / everywhere DESC, german DESC, token_id
    LIMIT 20
""").df()
" ".join(repr(model.tokenizer.decode([i])) for i in concentrated.token_id)

# %%
target = ms.sae.TokenTarget(model, [int(i) for i in concentrated.token_id])
plain = [d for d in ms.Corpus.load("demo") if d.label in ("bible", "dictionary", "kernel", "french")][::8]
texts = [{"text": d.text, "label": d.label} for d in plain]
steer = ms.sae.latent_edit(sae, latent, how="add", value="max", store=store)
dose = ms.sae.dose_response(
    model, steer.intervention, texts, store, target=target, strengths=(0.25, 0.5, 1, 2), controls=4, max_length=256
)
answer = dose.df()
answer.query("metric == 'target effect'")[
    ["strength", "value", "ci_low", "ci_high", "null", "control_low", "control_high"]
].round(3)

# %% [markdown]
# Strength 1 adds the largest activation that the latent reaches anywhere in the corpus. `value` is by how many nats the
# log-probability of the German tokens rises; `control_low` and `control_high` are the least and the most among the controls.
# And the price, at the same strengths:

# %%
price = answer.query("metric in ('KL', 'ΔNLL')")
price.pivot_table(index="strength", columns="metric", values=["value", "null"]).round(3)

# %% [markdown]
# **How to read it:** read the two tables row by row. A useful strength is one at which the target is beyond *all* controls while KL and
# ΔNLL are still moderate; at large strengths everything moves, and controls move too. With four controls the least rank p is
# 1/5, so the range says more than a p-value could. Controls are drawn from all other latents: some of them may be German too, which
# makes the test sterner.

# %%
dose.figure()

# %% [markdown]
# Whatever the curve shows, it is about probabilities of 20 tokens in this small model. A direction that raises German words has not
# been shown to carry "German" as such: other tests would be German *grammar*, or text written under the push.
#
# ## What next
#
# - `ms.sae.ablate_writers(sae, model, store, run=run, features=[...])`: is the latent still active without its writer?
# - `ms.sae.contrastive_labels`: a direction from labels alone, without an autoencoder. Does the latent beat it?
# - `moescope sae study demo --site blocks.4.hook_mlp_out --spec topk:d=1024,k=16 --store sae.duckdb` does all of this at length.
# - [Sparse autoencoders](../sae.md) has every form, measure and edit.
