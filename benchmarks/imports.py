"""Importing a module of `helpers`, beside importing just what it names of other packages; each time in a new interpreter."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

from benchmarks.timing import Comparison

ROOT = Path(__file__).parents[1]
TIMED = "import time; started = time.perf_counter(); exec({!r}); print(time.perf_counter() - started)"


def modules() -> list[str]:
    """What can be imported of `helpers` by itself: its modules, its packages, and each of the recordings."""
    paths = [path.parent for path in (ROOT / "helpers").glob("*/__init__.py")]
    paths += [path for place in (".", "recordings") for path in (ROOT / "helpers" / place).glob("*.py")]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    return sorted(name for name in names if not name.endswith("__init__"))


def required(module: str) -> list[str]:
    """The import statements of other packages that importing `module` cannot do without, as they stand in the source.

    Those at module level, its own and those of the modules of `helpers` that it imports there.
    """
    statements, visited, queue = [], set(), ["helpers", module]
    while queue:
        name = queue.pop(0)
        if name in visited:
            continue
        visited.add(name)
        queue.append(name.rpartition(".")[0] or "helpers")  # importing a module imports its package first
        for node in ast.parse(_file(name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "helpers":
                queue += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names if node.module == "helpers")]
            elif isinstance(node, ast.Import) and any(alias.name.startswith("helpers") for alias in node.names):
                queue += [alias.name for alias in node.names]
            elif isinstance(node, ast.Import | ast.ImportFrom) and ast.unparse(node) not in statements:
                statements.append(ast.unparse(node))
    return statements


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _seconds(statements: str) -> float:
    """How long a new interpreter takes for `statements`, its own start not counted."""
    done = subprocess.run(
        [sys.executable, "-c", TIMED.format(statements)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@cache
def _warm() -> None:
    """Everything once, so that the first comparison does not read from disk what the others find in memory."""
    _seconds("; ".join(f"import {module}" for module in modules()))


def _build(module: str):
    def build():
        _warm()
        theirs = "\n".join(required(module))
        return lambda: _seconds(f"import {module}"), lambda: _seconds(theirs)

    return build


def _target(module: str) -> float | None:
    """None if other packages are of the standard library alone: most of those are there before anything is imported."""
    packages = {statement.split()[1].partition(".")[0] for statement in required(module)}
    return None if packages <= sys.stdlib_module_names else 1.1


def _rounds(module: str) -> int:
    """Importing torch takes seconds and varies little; without it a turn is short, and its ratio needs more of them."""
    return 3 if any("torch" in statement for statement in required(module)) else 15


COMPARISONS = [
    Comparison(
        f"import {module}", f"`{module}`", "its imports of other packages", _build(module), _rounds(module), _target(module)
    )
    for module in modules()
]
