"""Writes the demo model's card: a fixed text with every number filled in from measured evidence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moescope.probes.demo.sources import HELDOUT_SHARE
from moescope.probes.demo.specialization import CONTROL_DRAWS

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, interpretability, demo]
language: [en, de, fr, es, ja, zh]
---

# moescope demo model

A mixture-of-experts language model of {parameters_m:.1f} million parameters, trained from scratch on two CPU
cores, and small enough to ship inside a Python package. It is there to be looked into: its routing can be
recorded, drawn and edited in seconds, on any machine and offline. **It is not useful as a language model.**
It has seen {tokens_m:.1f} million tokens; it knows the look of ten kinds of text and little else, and nothing
it writes should be believed.

## Architecture

`Qwen3MoeForCausalLM`: {n_layers} layers, every one with {n_experts} experts of width {d_expert}, of which
each token takes {top_k} (softmax over all experts, top {top_k}, weights renormalised to sum to 1). Residual
width {d_model}; {n_heads} attention heads of {d_head} with {n_kv_heads} key-value heads; tied embeddings;
context {context} tokens. {parameters:,} parameters, of which {active:,} take part in one token's forward
pass. `model.safetensors` holds the trained float32 weights rounded once to bfloat16 ({weight_bytes:,} bytes);
`config.json` names float32, so the default load computes in float32 with the rounded values. **Every number
below was measured that way.**

The tokenizer is a byte-level BPE of {vocabulary:,} tokens trained on the same text (digits one by one,
`<bos>` prepended by itself). It gives any text back exactly, except that the strings `<bos>`, `<eos>` and
`<pad>` in a text are read as the special tokens they name.

## Text

Ten domains out of Debian packages and the Python standard library, cleaned of markup, and, where it was easy,
of licence heads, mail addresses and the sections that name authors.

| domain | what | package and version | licence of the source |
|---|---|---|---|
{source_rows}

Copyright stays with the authors of these texts; the package's copyright file and the file itself say who they
are and rule over this table. Of the many licences inside `linux-doc` and `perl-doc` the column names the main
ones. Manual pages in translation stand under the licence of the translation project where its package names
one; Japanese pages keep that of the original page, and those whose licence could not be read off the page
were used for training but not for the shipped corpus. WordNet 3.0 is copyright 2006 by Princeton University,
all rights reserved, and is distributed under the WordNet 3.0 licence, without warranty.

Whole documents (a manual page, file, chapter, or dozen of dictionary entries) were held out by a seeded hash
of their names, {heldout_pct:.0f} % of them. After that, training paragraphs sharing a longer line or sentence
with a held-out document (after levelling case, digits and punctuation) were dropped. Paraphrases are not
caught by this, and the domains are narrow: manual pages resemble each other, so held-out text is new but not
far from the training text.

Training rows take the ten domains in equal shares, which means more passes over the small ones:

| domain | documents used | tokens in them | passes |
|---|---|---|---|
{text_rows}

### The shipped corpus

`corpus.jsonl`, beside this folder, holds {corpus_passages} held-out passages of whole paragraphs,
{corpus_tokens:,} tokens without `<bos>`, none longer than the context window. Labels are domains. Each
passage names its source and its licence:

| domain | passages by licence |
|---|---|
{license_rows}

Passages from the same long document do occur, mostly in `perl`, whose held-out side has few files. A label is
that of the source: a translated manual page holds untranslated names, code, and at times sentences. The
figures of this card and the held-out points of the training curve are on this corpus. The number of steps was
fixed before the run and the last step is what ships: no checkpoint was picked by them.

## Training

| | |
|---|---|
| tokens seen | {tokens_seen:,} ({steps:,} steps of {rows} rows of {row_length}) |
| optimizer | AdamW, betas {betas}, weight decay {weight_decay} (norms: 0) |
| gradients | clipped to norm {clip_norm} |
| learning rate | {warmup} steps of warm-up to {peak_lr}, cosine to {final_lr:.2g} |
| load balancing | Switch loss for each layer by itself, averaged over layers, coefficient {aux_coef} |
| precision, seed | float32, seed {seed} |
| wall time | {wall_minutes:.0f} minutes on two CPU cores that other work shared at times |

Rows are filled end to end with documents of one domain, each beginning with `<bos>` and ending with `<eos>`;
a document that follows another in a row sees it. Predicting `<bos>` is not trained. Learning rate, initial
scales and balance coefficient were set by hand after three runs of at most 120 steps, by training loss, by
loss on part of an earlier cut of the held-out passages, and by unused experts; nothing else was tried. The
run was stopped and resumed on its way.

| step | training NLL | balance loss | learning rate | held-out NLL |
|---|---|---|---|---|
{curve_rows}

NLL in nats per token. The training column is the mean of the curve points since the row before. Balance loss
1 is even load.

## Held-out NLL

Mean over every token after `<bos>`, each passage by itself. Baselines are fitted on the same documents with
the same tokenizer, domains weighted equally, and read the same tokens: **unigram** with add-k; **bigram**
smoothed towards it (p(b|a) = (c(a,b) + κ·p(b)) / (c(a) + κ)); **bigram of the domain**, the same fitted on
the passage's own domain alone, which is told the label where the model is not. k and κ were chosen on a tenth
of the training documents.

| domain | passages | tokens | model, nats | model, bits/byte | unigram | bigram | bigram of the domain |
|---|---|---|---|---|---|---|---|
{nll_rows}

## Experts

Share of all (token, slot) choices in a layer that the least and the most used expert take on the corpus
without `<bos>` (even load: {even_pct:.2f} %), and experts that no token chose. Specialization is the mutual
information between the chosen expert and the domain, in bits (the domain has {label_bits:.2f}). The control
permutes the labels over whole passages, {draws} times.

| layer | least used | most used | unused | information | control mean | control 99th percentile |
|---|---|---|---|---|---|---|
{layer_rows}

{dead_sentence}

Mutual information says that experts and domains go together, not that an expert computes
anything particular to a domain: the domains differ in their tokens, and a router that follows tokens shows
this too.

## Rebuilding

    python -m moescope.probes.demo.sources      # takes the package versions that apt-get offers
    python -m moescope.probes.demo.tokenizer
    python -m moescope.probes.demo.corpus
    python -m moescope.probes.demo.train        # resumes if stopped
    python -m moescope.probes.demo.evaluate     # writes this card

The sources need a Debian system; other package versions give other text. Training is
deterministic for the same text, seed, threads, library versions and processor, and a test holds, on a tiny
model, that a stopped and resumed run ends with the same bits as an unbroken one. Another processor or library
version may round differently, and so end with other weights.
"""

_WHAT = {
    "bible": "King James Version, by chapter",
    "chinese": "manual pages in simplified Chinese",
    "dictionary": "WordNet entries: words, definition, examples",
    "french": "manual pages in French",
    "german": "manual pages in German",
    "japanese": "manual pages in Japanese",
    "kernel": "Linux kernel documentation, reStructuredText",
    "perl": "Perl documentation (pod)",
    "python": "source of the standard library",
    "spanish": "manual pages in Spanish",
}
_SOURCES: dict[str, tuple[tuple[str, ...], str]] = {
    "bible": (("bible-kjv-text",), "public domain"),
    "chinese": (("manpages-zh",), "GFDL-1.2-or-later (a few pages GPL)"),
    "dictionary": (("wordnet-base",), "WordNet 3.0 licence"),
    "french": (("manpages-fr", "manpages-fr-dev"), "GPL-3.0-or-later"),
    "german": (("manpages-de", "manpages-de-dev"), "GPL-3.0-or-later"),
    "japanese": (
        ("manpages-ja", "manpages-ja-dev"),
        "that of each original page: GPL, Linux man-pages, BSD and others",
    ),
    "kernel": (("linux-doc-6.1",), "GPL-2.0-only, some files others"),
    "perl": (("perl-doc",), "GPL-1.0-or-later or Artistic"),
    "python": (("python",), "PSF-2.0"),
    "spanish": (("manpages-es", "manpages-es-dev"), "GPL-3.0-or-later"),
}


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def source_rows(packages: dict[str, str]) -> str:
    """The table of sources with the package versions used."""
    rows = []
    for domain, (names, license_name) in _SOURCES.items():
        versions = ", ".join(f"`{name}` {packages[name]}" for name in names)
        rows.append(_row(domain, _WHAT[domain], versions, license_name))
    return "\n".join(rows)


def curve_rows(curves: list[dict[str, Any]]) -> str:
    """Curve points that have a held-out NLL, with training losses averaged since the one before."""
    rows: list[str] = []
    since: list[dict[str, Any]] = []
    for point in curves:
        since.append(point)
        if "heldout" in point:
            loss, aux = (sum(p[name] for p in since) / len(since) for name in ("loss", "aux_loss"))
            heldout = point["heldout"]["all"]
            rows.append(_row(point["step"], f"{loss:.3f}", f"{aux:.3f}", f"{point['lr']:.2e}", f"{heldout:.3f}"))
            since = []
    return "\n".join(rows)


def nll_rows(table: dict[str, dict[str, Any]]) -> str:
    """The NLL table: domains in alphabetical order, all tokens last."""
    rows = []
    for label in [*sorted(set(table) - {"all"}), "all"]:
        entry = table[label]
        nats = [f"{entry[f'{name}_nats']:.3f}" for name in ("unigram", "bigram", "own_bigram")]
        model = (f"**{entry['nll_nats']:.3f}**", f"{entry['bits_per_byte']:.3f}")
        rows.append(_row(label, entry["passages"], f"{entry['tokens']:,}", *model, *nats))
    return "\n".join(rows)


def layer_rows(layers: list[dict[str, Any]]) -> str:
    """The table of expert load and specialization."""
    return "\n".join(
        _row(
            use["layer"],
            f"{100 * use['min_share']:.2f} %",
            f"{100 * use['max_share']:.2f} %",
            use["n_unused"],
            f"**{use['information_bits']:.3f}**",
            f"{use['control_mean_bits']:.3f}",
            f"{use['control_p99_bits']:.3f}",
        )
        for use in layers
    )


def dead_sentence(layers: list[dict[str, Any]]) -> str:
    """What the count of unused experts comes to, in words."""
    unused = sum(use["n_unused"] for use in layers)
    if unused:
        return f"{unused} experts of all layers together were chosen for no token of the corpus."
    return "Every expert of every layer was chosen for some token of the corpus: none is dead."


def render_card(evidence: dict[str, Any]) -> str:
    """The card's text with every number filled in."""
    architecture, training, nll = evidence["architecture"], evidence["training"], evidence["nll"]
    text, licenses, parameters = evidence["text"], evidence["corpus_licenses"], evidence["parameters"]
    return CARD.format(
        parameters_m=parameters["total"] / 1e6,
        parameters=parameters["total"],
        active=parameters["active"],
        tokens_m=training["tokens_seen"] / 1e6,
        n_layers=architecture["num_hidden_layers"],
        n_experts=architecture["num_local_experts"],
        d_expert=architecture["moe_intermediate_size"],
        top_k=architecture["num_experts_per_tok"],
        d_model=architecture["hidden_size"],
        n_heads=architecture["num_attention_heads"],
        d_head=architecture["head_dim"],
        n_kv_heads=architecture["num_key_value_heads"],
        context=architecture["max_position_embeddings"],
        vocabulary=architecture["vocab_size"],
        weight_bytes=evidence["weight_bytes"],
        source_rows=source_rows(evidence["packages"]),
        heldout_pct=100 * HELDOUT_SHARE,
        text_rows="\n".join(
            _row(domain, f"{use['documents']:,}", f"{use['tokens']:,}", f"{use['epochs']:.2f}")
            for domain, use in text.items()
        ),
        corpus_passages=nll["all"]["passages"],
        corpus_tokens=nll["all"]["tokens"],
        license_rows="\n".join(
            _row(label, "; ".join(f"{name}: {count}" for name, count in counts.items()))
            for label, counts in licenses.items()
        ),
        tokens_seen=training["tokens_seen"],
        steps=training["steps"],
        rows=training["rows_a_step"],
        row_length=training["row_length"],
        betas=", ".join(map(str, training["betas"])),
        weight_decay=training["weight_decay"],
        clip_norm=training["clip_norm"],
        warmup=training["warmup_steps"],
        peak_lr=training["peak_lr"],
        final_lr=training["peak_lr"] * training["final_lr_share"],
        aux_coef=architecture["router_aux_loss_coef"],
        seed=training["seed"],
        wall_minutes=evidence["wall_minutes"],
        curve_rows=curve_rows(evidence["curves"]),
        nll_rows=nll_rows(nll),
        even_pct=100 / architecture["num_local_experts"],
        label_bits=math.log2(len(licenses)),
        draws=CONTROL_DRAWS,
        layer_rows=layer_rows(evidence["layers"]),
        dead_sentence=dead_sentence(evidence["layers"]),
    )


def write_card(evidence: dict[str, Any], path: Path) -> None:
    """Fill the card's text with `evidence` (see `evaluate.gather_evidence`) and write it to `path`."""
    path.write_text(render_card(evidence), encoding="utf-8")
