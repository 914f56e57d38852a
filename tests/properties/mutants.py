"""Changes of a module's code, one place at a time: what a test that means something notices."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.MatMult: ast.Mult,
}  # fmt: skip
_COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_CALLS = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "all": "any", "any": "all", "argmin": "argmax",
          "argmax": "argmin", "sum": "mean", "mean": "sum", "cumsum": "cumprod", "std": "var", "zeros": "ones", "ones": "zeros",
          "log": "log1p", "log2": "log", "exp": "expm1", "floor": "ceil", "ceil": "floor", "sqrt": "abs", "comb": "perm"}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One changed module.

    Attributes:
        line: of the change.
        change: what was done, in words.
        code: the whole module, changed.
    """

    line: int
    change: str
    code: str


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of a module; docstrings, annotations, messages of errors and decorators stay as they are."""
    tree = ast.parse(source)
    spared = _spared(tree)
    places = [node for node in ast.walk(tree) if id(node) not in spared]
    order = {id(node): number for number, node in enumerate(ast.walk(tree))}
    for node in places:
        for change, apply in _changes(node):
            changed = copy.deepcopy(tree)
            twin = next(found for number, found in enumerate(ast.walk(changed)) if number == order[id(node)])
            apply(twin)
            code = ast.unparse(ast.fix_missing_locations(changed))
            if code != ast.unparse(tree):
                yield Mutant(getattr(node, "lineno", 0), change, code)


def _spared(tree: ast.Module) -> set[int]:
    """Nodes that no test of behaviour can see."""
    found: set[int] = set()
    for node in ast.walk(tree):
        out: list[ast.AST | None] = []
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            out.append(node.body[0])
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]
            out += [*node.decorator_list, node.returns, *(a.annotation for a in arguments)]
        if isinstance(node, ast.ClassDef):
            out += node.decorator_list
        if isinstance(node, ast.AnnAssign):
            out.append(node.annotation)
        if isinstance(node, ast.Raise):
            out.append(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            out.append(node)
        found |= {id(inner) for root in out if root is not None for inner in ast.walk(root)}
    return found


Change = tuple[str, Callable[..., None]]


def _changes(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in _ARITHMETIC:
        other = _ARITHMETIC[type(node.op)]
        yield f"{type(node.op).__name__} → {other.__name__}", lambda twin: setattr(twin, "op", other())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        turned = _COMPARISONS[type(node.ops[0])]
        yield f"{type(node.ops[0]).__name__} → {turned.__name__}", lambda twin: twin.ops.__setitem__(0, turned())
    if isinstance(node, ast.BoolOp):
        joined = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield f"{type(node.op).__name__} → {joined.__name__}", lambda twin: setattr(twin, "op", joined())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        yield f"{type(node.op).__name__} left out", _without_sign
    if isinstance(node, ast.Constant):
        yield from _of_constant(node.value)
    if isinstance(node, ast.Attribute) and node.attr in _CALLS:
        yield f".{node.attr} → .{_CALLS[node.attr]}", lambda twin: setattr(twin, "attr", _CALLS[node.attr])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        yield f"{node.func.id} → {_CALLS[node.func.id]}", lambda twin: setattr(twin.func, "id", _CALLS[node.func.id])
    if isinstance(node, ast.IfExp):
        yield "the branches of an if exchanged", _exchanged


def _of_constant(value: object) -> Iterator[Change]:
    if isinstance(value, bool):
        yield f"{value} → {not value}", lambda twin: setattr(twin, "value", not value)
    elif isinstance(value, (int, float)):
        yield f"{value} → {value + 1}", lambda twin: setattr(twin, "value", value + 1)


def _without_sign(twin: ast.UnaryOp) -> None:
    """Put a plus, or nothing, in the place of the sign."""
    if isinstance(twin.op, ast.USub):
        twin.op = ast.UAdd()
    else:  # twice is not at all
        twin.operand = ast.UnaryOp(type(twin.op)(), twin.operand)


def _exchanged(twin: ast.IfExp) -> None:
    twin.body, twin.orelse = twin.orelse, twin.body
