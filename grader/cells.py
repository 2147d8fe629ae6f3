"""Whether a check would judge an old definition, because the last run of the cell that defines it failed.

IPython keeps what a cell defined before. After a syntax error in the cell, the check below it would say "passed" of code
that is on the page no more.
"""

import re
from typing import Any

_DEFINES = re.compile(r"^(?:async +def|def|class) +(\w+)|^(\w+) *=[^=]", re.MULTILINE)

_before: dict[str, Any] = {}  # what the cell that is running defines -> what had that name before it
_failed: dict[str, tuple[Any, str]] = {}  # name -> the definition that stayed, and what stopped the cell


def watch(shell: Any) -> None:
    """Notice failed runs of cells in an IPython shell from now on."""

    def before(info):
        _before.clear()
        names = {name for pair in _DEFINES.findall(info.raw_cell or "") for name in pair if name}
        _before.update({name: shell.user_ns[name] for name in names if name in shell.user_ns})

    def after(result):
        error = result.error_before_exec or result.error_in_exec
        for name, thing in _before.items():
            if error is not None and shell.user_ns.get(name) is thing:
                _failed[name] = thing, f"{type(error).__name__}: {error}"
            else:
                _failed.pop(name, None)
        _before.clear()

    shell.events.register("pre_run_cell", before)
    shell.events.register("post_run_cell", after)


def why_old(name: str, thing: Any) -> str | None:
    """What stopped the last run of the cell that defines a name, if `thing` is what stayed under that name."""
    old, error = _failed.get(name, (None, None))
    return error if old is thing else None
