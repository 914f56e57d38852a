"""Every error that the source can raise, read from the source: its words, with … where a name or a number stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from moescope.core import errors

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("moescope", "store", "probes", "routing", "sae", "dashboard")
GAP = "…"
_FIELDS = ("expected", "found", "fix")
_MOST_WORDINGS = 8  # of one call, where parts of it depend on the case

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass(frozen=True, order=True)
class Raised:
    """One error as the source words it.

    Attributes:
        module: where it is raised.
        problem, expected, found, fix: its parts; … stands for what depends on the case, and a part of … alone is left empty.
        kind: name of the public exception that it is.
        about: the first line of what the function around says of itself.
    """

    module: str
    problem: str
    expected: str
    found: str
    fix: str
    kind: str
    about: str = ""


def kinds(folder: Path = ROOT) -> dict[str, type[errors.MoescopeError]]:
    """Exceptions that moescope raises on purpose: name → the public one that it is, or is a case of."""
    public = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.MoescopeError)
    }
    own: dict[str, type[errors.MoescopeError]] = {}
    for path in sources(folder):
        for node in ast.walk(_parsed(path)):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    if isinstance(base, ast.Name) and base.id in public:
                        own[node.name] = public[base.id]
    return public | own


def sources(folder: Path = ROOT) -> Iterator[Path]:
    """Every file of the package but the one that defines the exceptions."""
    for name in FOLDERS:
        yield from (
            p for p in sorted((folder / name).rglob("*.py")) if p.parts[-3:] != ("moescope", "core", "errors.py")
        )


def raised_in(folder: Path = ROOT) -> list[Raised]:
    """All errors of the source, sorted, each wording of a module once."""
    known = kinds(folder)
    return sorted({e for path in sources(folder) for e in _raised_by(path, _module(path.relative_to(folder)), known)})


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts if parts[0] == "moescope" else ("moescope", *parts)).removesuffix(".__init__")


def _raised_by(path: Path, module: str, known: Mapping[str, type[errors.MoescopeError]]) -> Iterator[Raised]:
    def walk(node: ast.AST, around: tuple[Function, ...]) -> Iterator[Raised]:
        if isinstance(node, Function):
            around = (*around, node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            yield from _wordings(node, known[node.func.id].__name__, module, around)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, around)

    yield from walk(_parsed(path), ())


def _wordings(call: ast.Call, kind: str, module: str, around: tuple[Function, ...]) -> Iterator[Raised]:
    given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    if call.args:
        given["problem"] = call.args[0]
    inner = next((f for f in reversed(around) if not isinstance(f, ast.Lambda)), None)
    about = (ast.get_docstring(inner) or "").partition("\n")[0] if inner is not None else ""
    texts = [list(dict.fromkeys(_texts(given.get(name), inner))) for name in ("problem", *_FIELDS)]
    for problem, *others in list(product(*texts))[:_MOST_WORDINGS]:
        expected, found, fix = ("" if text == GAP else text for text in others)
        yield Raised(module, problem, expected, found, fix, kind, about if problem == GAP else "")


def _texts(node: ast.expr | None, inner: ast.AST | None, depth: int = 0) -> list[str]:  # noqa: PLR0911  a kind of expression, a line
    """What an expression of text can say: several where it depends on a condition, … where that is not written there."""
    match node:
        case None | ast.Constant(value=None):
            return [""]
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=values):
            parts = [[v.value] if isinstance(v, ast.Constant) else _inserted(v, inner, depth) for v in values]
            return [_joined("".join(map(str, choice))) for choice in list(product(*parts))[:_MOST_WORDINGS]]
        case ast.IfExp(body=body, orelse=orelse):
            return _texts(body, inner, depth) + _texts(orelse, inner, depth)
        case ast.BoolOp(values=values):
            return [text for value in values for text in _texts(value, inner, depth)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            pairs = product(_texts(left, inner, depth), _texts(right, inner, depth))
            return [_joined(one + two) for one, two in pairs]
        case ast.Name(id=name) if inner is not None and depth == 0:
            return _assigned(name, inner) or [GAP]
    return [GAP]


def _inserted(node: ast.expr, inner: ast.AST | None, depth: int) -> list[str]:
    """What stands in the braces of an f-string: words where they are chosen there, else …."""
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.IfExp):
        texts = _texts(node.value, inner, depth + 1)
        return texts if GAP not in texts else [GAP]
    return [GAP]


def _assigned(name: str, inner: ast.AST) -> list[str]:
    """The texts that a name is given in the function around."""
    values = [
        node.value
        for node in ast.walk(inner)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
    ]
    return [text for value in values for text in _texts(value, None, 1)]


def _joined(text: str) -> str:
    while GAP + GAP in text:
        text = text.replace(GAP + GAP, GAP)
    return text
