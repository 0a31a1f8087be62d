"""Lists of prompts: text files, JSONL, and the sets that the field reports on, by name."""

import csv
import json
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path

from speedrl.files import write_atomically
from speedrl.hub import hub_file

STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPSv2's benchmark, arXiv 2306.09341
GENEVAL = "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/generation_prompts.txt"
INSTEAD = "give a file with one prompt a line"


def read_prompts(source: str | Path) -> list[str]:
    """The prompts of a text file, one a line; of a JSONL file, the field "prompt" of each line; or of a named set.

    Names: hpsv2 (all four styles), hpsv2-anime, hpsv2-concept-art, hpsv2-paintings, hpsv2-photo, partiprompts,
    geneval. They are fetched on first use and cached. FileNotFoundError where there is no such file or set or it
    cannot be fetched, ValueError for a file without prompts; each in one line.
    """
    path = Path(source)
    if not path.exists() and str(source) in SETS:
        return SETS[str(source)]()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {INSTEAD}, or one of {', '.join(SETS)}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file; give one prompt a line in UTF-8") from None
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path}: no prompts in it; give one prompt a line")
    if path.suffix in (".jsonl", ".ndjson"):
        return [field(line, number, path) for number, line in enumerate(lines, 1)]
    return lines


def field(line: str, number: int, path: Path) -> str:
    """The prompt of one line of JSONL."""
    try:
        prompt = json.loads(line)["prompt"].strip()
    except (ValueError, TypeError, KeyError, AttributeError):
        prompt = ""
    if not prompt:
        raise ValueError(f'{path}: entry {number} has no prompt; each line must be like {{"prompt": "a red apple"}}')
    return prompt


def hpsv2(*styles: str) -> list[str]:
    files = [hub_file("zhwang/HPDv2", f"benchmark/{s}.json", kind="dataset", instead=INSTEAD) for s in styles]
    return [prompt for file in files for prompt in json.loads(file.read_text(encoding="utf-8"))]


def partiprompts() -> list[str]:
    file = hub_file("nateraw/parti-prompts", "PartiPrompts.tsv", kind="dataset", instead=INSTEAD)
    with file.open(encoding="utf-8", newline="") as lines:
        return [row["Prompt"].strip() for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]


def geneval() -> list[str]:
    """GenEval's prompts (arXiv 2310.11513), which are on no hub: from its repository, into the cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "speedrl/geneval.txt"
    if not cache.exists():
        try:
            with urllib.request.urlopen(GENEVAL, timeout=30) as answer:
                text = answer.read().decode("utf-8")
        except OSError as error:
            raise FileNotFoundError(f"geneval is not cached and {GENEVAL} cannot be reached; {INSTEAD}") from error
        write_atomically(cache, lambda partial: partial.write_text(text, encoding="utf-8"))
    return read_prompts(cache)


SETS: dict[str, Callable[[], list[str]]] = {
    "hpsv2": lambda: hpsv2(*STYLES),
    **{f"hpsv2-{style}": (lambda style=style: hpsv2(style)) for style in STYLES},
    "partiprompts": partiprompts,
    "geneval": geneval,
}
