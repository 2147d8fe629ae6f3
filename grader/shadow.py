"""Notice files beside a notebook that hide the packages it means to import."""

from pathlib import Path

PACKAGES = ("torch", "torchvision", "numpy", "helpers", "grader", "sklearn", "matplotlib", "safetensors", "random")


def refuse(folder: Path, home: Path) -> None:
    """Raise if `folder`, where imports look first, hides a package.

    Args:
        folder: the notebook's.
        home: where the real `helpers` and `grader` are.

    Raises:
        ImportError: names the file to rename.
    """
    for name in PACKAGES:
        for path in (folder / f"{name}.py", folder / name / "__init__.py"):
            if path.is_file() and not path.resolve().is_relative_to((home / name).resolve()):
                hidden = path if path.name != "__init__.py" else path.parent
                raise ImportError(f"{hidden.name} in this folder hides the real {name}. Rename it and restart the kernel.")
