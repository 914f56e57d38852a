"""Formulas of the documentation as MathML, which browsers draw by themselves: no script, no font, no network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError

# Spellings that the converter of docutils does not know, beside those it does.
_SPELLINGS = {r"\dots": r"\ldots", r"\lvert": "|", r"\rvert": "|", r"\tfrac": r"\frac", r"\dfrac": r"\frac"}


def as_mathml(formula: str, *, block: bool) -> str:
    r"""A formula of LaTeX as MathML.

    Raises:
        ExtensionError: something in it cannot be told in MathML.

    Example:
        >>> as_mathml(r"x^2", block=False).replace("\n", "").replace(" ", "")
        '<mathxmlns="http://www.w3.org/1998/Math/MathML"><msup><mi>x</mi><mn>2</mn></msup></math>'
    """
    known = formula
    for spelling, other in _SPELLINGS.items():
        known = known.replace(spelling, other)
    try:
        return str(tex2mathml(known, as_block=block))
    except MathError as error:
        raise ExtensionError(f"the formula {formula!r} cannot be shown: {error}") from error


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(as_mathml(node.astext(), block=False))
    raise nodes.SkipNode


def _displayed(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math-block">{as_mathml(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    """Make it the renderer of formulas; Sphinx calls this."""
    app.add_html_math_renderer("mathml", (_inline, None), (_displayed, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
