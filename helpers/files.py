"""Files written atomically: a reader sees the old file or the new one, never half of either."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 into `path`, making its folder; an interruption leaves the old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8", newline="\n")
    draft.replace(path)
