"""Files written atomically: a reader sees the old file or the new one, never half of either."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 into `path`, making its folder; an interruption leaves the old file as it was."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` into `path`, making its folder; an interruption leaves the old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(content)
    draft.replace(path)
