"""How solutions of this topic refuse a model, a name or a file."""

from collections.abc import Callable

from grader.experiment import WrongReturn


def raised(attempt: Callable[[], object]) -> tuple[str, str]:
    """The kind of the error that `attempt` raises, and its message; a ValueError of any class counts as one.

    Returns:
        "nothing" and an empty message if it raises nothing. What a stub raises, and a wrong return, pass.
    """
    try:
        attempt()
    except (NotImplementedError, WrongReturn):
        raise
    except Exception as error:
        return "ValueError" if isinstance(error, ValueError) else type(error).__name__, str(error)
    return "nothing", ""
