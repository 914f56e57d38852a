"""`docs/probes.md`: every probe with its tables, its sites and what it costs, from the registry and the bundled model."""

from __future__ import annotations

import inspect
import re

from docstrings import as_markdown

import moescope as ms
from moescope.core.probe import ProbeEntry, probes
from moescope.core.sites import Site
from moescope.probes.probe import Probe, ProbeContext

HEAD = """# Probes

A probe records one kind of thing during a forward pass, as rows of its tables. `--probe routing,experts`, or
`probes=("routing", "experts")` in Python, chooses; `tokens` is always recorded. How to write one is told in
[a probe of your own](how-to/probe.md), what each table holds in [the store](store.md).

| probe | tables | recorded by default | MB | bytes a token |
|---|---|---|---|---|
{rows}

The last two columns are what `moescope plan` says for the bundled model (6 layers, 6 routers, 16 experts, top-2) and its corpus of
{tokens:,} tokens, vectors at one site for all tokens; the file itself takes 2.4 MB more. What a probe costs in time depends on
the model: `moescope plan MODEL --data FILE --probe …` measures it on yours.

`python docs/generate/pages.py probes` writes this page anew.
"""
TOKENS = 66_246
# `moescope plan demo --probe … --site blocks.3.hook_resid_post --json`: bytes a probe adds to the file.
BYTES = {
    "tokens": 1_310_720,
    "routing": 7_864_320,
    "experts": 524_288,
    "residual": 7_340_032,
    "router_logits": 23_330_816,
    "expert_outputs": 3_670_016,
    "attention": 1_310_720,
    "activations": 51_407_596,
}
VECTORS_AT = "blocks.3.hook_resid_post"


def probes_page() -> str:
    """The page as Markdown."""
    entries = sorted(probes, key=lambda entry: (entry.name != "tokens", not entry.default, entry.name))
    rows = "\n".join(_row(entry) for entry in entries)
    anatomy = ms.load("demo").anatomy
    return HEAD.format(rows=rows, tokens=TOKENS) + "".join(_entry(entry, anatomy) for entry in entries)


def _row(entry: ProbeEntry) -> str:
    tables = ", ".join(f"[`{table}`](store.md#{table})" for table in entry.tables)
    default = "always" if entry.name == "tokens" else "yes" if entry.default else "no"
    size = BYTES[entry.name]
    return f"| [`{entry.name}`](#{entry.name}) | {tables} | {default} | {size / 1e6:.1f} | {size / TOKENS:.0f} |"


def _entry(entry: ProbeEntry, anatomy: ms.Anatomy) -> str:
    told = as_markdown(inspect.getdoc(entry.function) or "").replace("\n\n**Arguments**", "\n\n**Settings**")
    sites = (
        ", ".join(f"`{site}`" for site in sites_of(entry, anatomy))
        or "none: it reads what the model is given and gives"
    )
    return f"\n## `{entry.name}`\n\n{told}\n\n**Sites** of the bundled model: {sites}.\n"


def sites_of(entry: ProbeEntry, anatomy: ms.Anatomy) -> list[str]:
    """Where the probe is called in a model of this anatomy, `{L}` standing for the layer."""
    context = ProbeContext(anatomy, sites=(Site.parse(VECTORS_AT),))
    probe: Probe = entry.function(context)
    return list(dict.fromkeys(re.sub(r"blocks\.\d+", "blocks.{L}", str(site)) for site in probe.sites(anatomy)))
