"""Small mistakes in a solution: its code again with one change, as somebody tired might have written it.

`solution` reads an author's solution from its chapter, `mutants` lists all that one change can make of it. The changes are
those of mutation testing, and a few that are at home here: another `dim`, no `with`, a hook that is only removed on success.
"""

import ast
import copy
import linecache
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jupytext

from grader.authoring import CHECK


def _both_ways(*pairs: tuple[type, type]) -> dict[type, type]:
    return {old: new for pair in pairs for old, new in (pair, pair[::-1])}


OPPOSITE = _both_ways((ast.Lt, ast.GtE), (ast.LtE, ast.Gt), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn))
BOUNDARY = _both_ways((ast.Lt, ast.LtE), (ast.Gt, ast.GtE))
ARITHMETIC = _both_ways((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitOr, ast.BitAnd))
ARITHMETIC |= {ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult}
DIMENSIONS = ("dim", "axis", "dim0", "dim1", "start_dim")
NEXT_LINE = " ⏎ "  # in a change of several lines
SHORT, CONTEXT, LONGEST = 70, 20, 100  # letters: of what is shown whole, around what differs, of a block


@dataclass(frozen=True)
class Solution:
    """An author's solution: the code of the function or class alone, and what its chapter defines above it."""

    name: str
    code: str  # without comments
    above: dict[str, Any]  # imports and earlier solutions

    def define(self, code: str) -> Any:
        """What `code` defines in the solution's place."""
        file = f"<mutant {hash(code)}>"
        linecache.cache[file] = len(code), None, code.splitlines(keepends=True), file  # TorchScript reads the source
        namespace = dict(self.above)
        exec(compile(code, file, "exec"), namespace)
        return namespace[self.name]


@dataclass(frozen=True)
class Mutant:
    """A solution with one change."""

    operator: str  # the kind of change: "compare"
    old: str  # the lines that are changed, without indentation
    new: str  # what stands there now
    code: str

    @property
    def change(self) -> str:
        """By which it is known: "old -> new", another one for each mutant of a solution."""
        return f"{self.old} -> {self.new}".strip()


def solution(script: Path, number: str, name: str) -> Solution:
    """Read the solution of an exercise from its chapter.

    Raises:
        ValueError: nothing above the exercise's check defines `name`.
    """
    statements: list[ast.stmt] = []
    for cell in jupytext.read(script).cells:
        if cell.cell_type != "code" or "demo" in cell.metadata.get("tags", ()):
            continue
        if (called := CHECK.search(cell.source)) and called[1] == number:
            break
        wanted = (ast.Import, ast.ImportFrom)
        if "### BEGIN SOLUTION" in cell.source:
            wanted += (ast.FunctionDef, ast.ClassDef)
        statements += [statement for statement in ast.parse(cell.source).body if isinstance(statement, wanted)]
    definitions = [statement for statement in statements if getattr(statement, "name", None) == name]
    if not definitions:
        raise ValueError(f"{script.name} must define `{name}` above the check of {number}, found no such function or class.")
    statements.remove(definitions[-1])
    above: dict[str, Any] = {"__name__": "learner"}
    exec(compile(ast.Module(statements, []), "<above>", "exec"), above)
    return Solution(name, ast.unparse(definitions[-1]), above)


def mutants(code: str, above: dict[str, Any]) -> list[Mutant]:
    """Everything that one change makes of `code` and that compiles; equal code once.

    Args:
        code: one function or class, as `ast.unparse` writes it.
        above: names that it uses. A function of a module is no method: `torch.exp(x)` does not become `torch`.
    """
    modules = {name for name, value in above.items() if isinstance(value, ModuleType)}
    tree = ast.parse(code)
    made, codes, changes = [], {ast.unparse(tree)}, Counter()
    for parent, field, position, node in list(_places(tree)):
        for operator, replacement in _changes(node, modules):
            if parent is tree and operator == "delete statement":
                continue  # nothing would be left
            mutated = _unparse_with(tree, parent, field, position, replacement)
            if mutated in codes or not _compiles(mutated):
                continue
            codes.add(mutated)
            old, new = _change(code, mutated)
            changes[old, new] += 1
            made.append(
                Mutant(operator, old, new if changes[old, new] == 1 else f"{new} ({changes[old, new]})".strip(), mutated)
            )
    return made


def _places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every node below with its place: the parent, its field, and the position if that is a list."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for position, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                yield node, field, position, child
                yield from _places(child)


def _changes(node: ast.AST, modules: set[str]) -> Iterator[tuple[str, ast.AST | list[ast.stmt]]]:
    """(operator, what is put in the node's place)."""
    match node:
        case ast.Compare(ops=operators):
            for i, operator in enumerate(operators):
                for changed in (BOUNDARY.get(type(operator)), OPPOSITE[type(operator)]):
                    if changed:
                        yield "compare", _copy_with(node, ops=[*operators[:i], changed(), *operators[i + 1 :]])
        case ast.BinOp(left, ast.MatMult(), right):
            yield "swap operands", _copy_with(node, left=right, right=left)
        case ast.BinOp(left, operator, right) if type(operator) in ARITHMETIC:
            yield "arithmetic", _copy_with(node, op=ARITHMETIC[type(operator)]())
            yield "drop operand", left
            if isinstance(operator, ast.Add | ast.Mult | ast.BitAnd | ast.BitOr):
                yield "drop operand", right
        case ast.AugAssign(target, operator, value):
            if type(operator) in ARITHMETIC:
                yield "arithmetic", _copy_with(node, op=ARITHMETIC[type(operator)]())
            yield "+= to =", ast.Assign([target], value, lineno=0)
        case ast.BoolOp(operator, values):
            yield "and/or", _copy_with(node, op=ast.Or() if isinstance(operator, ast.And) else ast.And())
            for i in range(len(values)):
                rest = _without(values, i)
                yield "drop operand", rest[0] if len(rest) == 1 else _copy_with(node, values=rest)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield "drop not/minus", operand
        case ast.Constant(bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(int(value)):
            yield from (("constant", ast.Constant(number)) for number in (value + 1, value - 1))
        case ast.Constant(float(value)):
            yield "constant", ast.Constant(value * 2 if value else 1.0)
        case ast.keyword(name, ast.Constant(int()) | ast.UnaryOp(ast.USub(), ast.Constant(int()))) if name in DIMENSIONS:
            yield from (("dim", _copy_with(node, value=ast.Constant(dim))) for dim in (0, 1, -1))
        case ast.Call(function, values, keywords):
            for i, keyword in enumerate(keywords):
                if keyword.arg:
                    yield "drop keyword", _copy_with(node, keywords=_without(keywords, i))
            for j in range(len(values)):
                for i in range(j):
                    swapped = [*values[:i], values[j], *values[i + 1 : j], values[i], *values[j + 1 :]]
                    yield "swap arguments", _copy_with(node, args=swapped)
            if len(values) == 1 and not keywords and not isinstance(values[0], ast.Starred):
                yield "f(x) to x", values[0]
            if isinstance(function, ast.Attribute) and not _is_module_or_super(function.value, modules):
                yield "obj.m() to obj", function.value
        case ast.Subscript(value, ast.Slice(), ast.Load()):
            yield "drop slice", value
        case ast.If():
            yield "if true", _copy_with(node, test=ast.Constant(True))
            yield "if false", _copy_with(node, test=ast.Constant(False))
        case ast.IfExp(_, body, otherwise):
            yield "if true", body
            yield "if false", otherwise
        case ast.While():
            yield "empty loop", _copy_with(node, test=ast.Constant(False))
        case ast.For(_, _, body):
            yield "empty loop", _copy_with(node, iter=ast.List([], ast.Load()))
            if not any(isinstance(part, ast.Break | ast.Continue) for part in ast.walk(node)):
                yield "loop once", _copy_with(node, body=[*body, ast.Break()])
        case ast.comprehension(_, _, conditions):
            yield from (("drop filter", _copy_with(node, ifs=_without(conditions, i))) for i in range(len(conditions)))
        case ast.With(_, body):
            yield "drop with", body
        case ast.Try(body, handlers, otherwise, final):
            if final:
                yield "no finally", _on_success([_copy_with(node, finalbody=[])] if handlers else body, final)
            if handlers:
                yield "no except", [_copy_with(node, handlers=[], orelse=[])] if final else [*body, *otherwise]
        case ast.ExceptHandler(ast.Name(name)):
            for caught in ("RuntimeError", "ValueError", "BaseException"):
                if caught != name:
                    yield "except other", _copy_with(node, type=ast.Name(caught))
        case ast.Raise(ast.Call(ast.Name() as error, values)):
            yield "raise other", _copy_with(node, exc=ast.Call(ast.Name("RuntimeError"), values, []))
            yield "raise silent", _copy_with(node, exc=ast.Call(error, [], []))
        case ast.FunctionDef(decorator_list=[_, *_]) | ast.ClassDef(decorator_list=[_, *_]):
            yield "drop decorator", _copy_with(node, decorator_list=[])
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if isinstance(node, ast.stmt) and not docstring and not isinstance(node, ast.Pass | ast.Nonlocal | ast.Global):
        yield "delete statement", ast.Pass()


def _on_success(body: list[ast.stmt], final: list[ast.stmt]) -> list[ast.stmt]:
    """`final` after `body` and not in a `finally`; what `body` returns is returned after it."""
    returns = any(isinstance(node, ast.Return) for statement in body for node in ast.walk(statement))
    kept = [_KeepResult().visit(copy.deepcopy(statement)) for statement in body]
    return [*kept, *final, *([ast.Return(ast.Name("result"))] if returns else [])]


class _KeepResult(ast.NodeTransformer):
    """`return x` to `result = x`, but in functions inside."""

    def visit_Return(self, node: ast.Return) -> ast.Assign:
        return ast.Assign([ast.Name("result")], node.value or ast.Constant(None), lineno=0)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return node


def _is_module_or_super(node: ast.expr, modules: set[str]) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    match node:
        case ast.Name(name):
            return name in modules
        case ast.Call(ast.Name("super")):
            return True
    return False


def _copy_with(node: ast.AST, **fields: Any) -> ast.AST:
    changed = copy.copy(node)
    for field, value in fields.items():
        setattr(changed, field, value)
    return changed


def _without(items: list, position: int) -> list:
    return [*items[:position], *items[position + 1 :]]


def _unparse_with(tree: ast.AST, parent: ast.AST, field: str, position: int | None, new: ast.AST | list[ast.stmt]) -> str:
    """The code of `tree` with `new` in one place; the tree stays as it is."""
    old = getattr(parent, field)
    parts = new if isinstance(new, list) else [new]
    setattr(parent, field, new if position is None else [*old[:position], *parts, *old[position + 1 :]])
    try:
        return ast.unparse(tree)
    finally:
        setattr(parent, field, old)


def _compiles(code: str) -> bool:
    try:
        compile(code, "<mutant>", "exec")
    except SyntaxError:
        return False
    return True


def _change(code: str, mutated: str) -> tuple[str, str]:
    before, after = ([line.strip() for line in text.splitlines() if line.strip()] for text in (code, mutated))
    start = _common_length(before, after)
    end = _common_length(before[start:][::-1], after[start:][::-1])
    removed, added = before[start : len(before) - end], after[start : len(after) - end]
    if not removed:  # say after which line
        removed, added = [before[start - 1]], [before[start - 1], *added]
    return _excerpts(NEXT_LINE.join(removed), NEXT_LINE.join(added))


def _excerpts(old: str, new: str) -> tuple[str, str]:
    """Both; if they are long, what differs and the words around it."""
    if max(len(old), len(new)) <= SHORT:
        return old, new
    start = _common_length(old, new)
    end = _common_length(old[start:][::-1], new[start:][::-1])
    first = old.rfind(" ", 0, max(0, start - CONTEXT)) + 1
    block = NEXT_LINE in old + new
    return tuple(_cut(text, first, text.find(" ", len(text) - end + CONTEXT), block) for text in (old, new))


def _cut(text: str, first: int, last: int, block: bool) -> str:
    part = text[first:] if last < 0 else f"{text[first:last]} …"
    if block and len(part) > LONGEST:
        part = f"{part[: LONGEST // 2].rpartition(' ')[0]} … {part[-LONGEST // 2 :].partition(' ')[2]}"
    return f"… {part}" if first else part


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """How many lines, or letters, the two have in common at their beginnings."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(first), len(second)))
