"""Files that are either whole or not there."""

import json
import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a temporary file beside `path`, then renames it: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON, atomically."""
    write_atomically(path, lambda partial: partial.write_text(json.dumps(value, indent=1) + "\n"))


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty. ValueError where there are none or the file is no text."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a text file with one prompt a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file; give one prompt a line in UTF-8") from None
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path}: no prompts in it; give one prompt a line")
    return lines
