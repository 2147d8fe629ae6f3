"""A list that modules remember their calls in, also where a subject works on a copy of the module."""

import weakref

_LISTS: dict[int, "SharedList"] = weakref.WeakValueDictionary()


class SharedList(list):
    """A list that every copy of its owner shares, deep or pickled."""

    def __init__(self) -> None:
        super().__init__()
        _LISTS[id(self)] = self

    def __reduce__(self):
        return _list_with, (id(self),)


def _list_with(number: int) -> SharedList:
    return _LISTS[number]
