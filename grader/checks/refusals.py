"""How solutions refuse a model, a name or a file."""

from collections.abc import Callable

from grader.experiment import WrongReturn
from grader.fake_gpu import Refused


def raised(attempt: Callable[[], object], kind: type[Exception] = Exception) -> tuple[str, str]:
    """What `attempt` raises: the name of its class, or "ValueError" for all that are derived from it, and its message.

    Args:
        attempt: a call without arguments.
        kind: of the errors that are results. Others pass, as do a stub's, a fake GPU's and that of a wrong return.

    Returns:
        "nothing" and an empty message if nothing is raised.
    """
    try:
        attempt()
    except (NotImplementedError, WrongReturn, Refused):
        raise
    except kind as error:
        return "ValueError" if isinstance(error, ValueError) else type(error).__name__, str(error)
    return "nothing", ""
