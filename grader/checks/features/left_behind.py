"""What a subject leaves in the modules of a model besides tensors and modes: hooks, other layers, attributes."""

from torch import nn

Attributes = dict[tuple[str, str], dict[str, int]]


def attributes(model: nn.Module) -> Attributes:
    """The attributes of every module, and how much is in those that hold something: a hook is in one of them."""
    return {
        (name, type(module).__name__): {
            key: len(value) if isinstance(value, dict | list | set) else 0 for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


def what_is_new(before: Attributes, after: Attributes) -> str:
    """In a word or two, the worst of it."""
    if before.keys() != after.keys():
        return "another layer"
    if any(after[name].get(key) != size for name, sizes in before.items() for key, size in sizes.items()):
        return "a hook"
    return "nothing" if before == after else "another attribute"
