"""Lists of prompts: text files, JSONL, and the sets that the field reports on, by name."""

import codecs
import csv
import json
import os
import re
import urllib.request
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from speedrl.system.files import write_atomically
from speedrl.system.hub import hub_file

STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPSv2's benchmark, arXiv 2306.09341
GENEVAL = "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/generation_prompts.txt"
INSTEAD = "give a file with one prompt a line"


class Lines(Sequence):
    """The prompts of a text file or of JSONL, read where they are wanted: of a million, memory holds 8 bytes each.

    A byte order mark and empty lines are left out, and control characters are spaces. ValueError for a file without
    prompts, or with a line that is not UTF-8 or has no prompt.
    """

    def __init__(self, path: Path):
        self.path, self.starts = path, array("Q")
        self.file = path.open("rb")  # stays open: a file of that name that comes later is another
        start = 0
        for raw in self.file:
            if self.prompt(raw, len(self.starts) + 1):
                self.starts.append(start)
            start += len(raw)
        if not self.starts:
            raise ValueError(f"{path}: no prompts in it; give one prompt a line")

    def prompt(self, raw: bytes, number: int) -> str:
        """The prompt of a line, "" for an empty one."""
        try:
            line = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: not a text file; give one prompt a line in UTF-8") from None
        if line and self.path.suffix in (".jsonl", ".ndjson"):
            line = field(line, number, self.path)
        return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", line).strip()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        self.file.seek(self.starts[index])
        return self.prompt(self.file.readline(), int(index) + 1)


def open_prompts(source: str | Path) -> Sequence[str]:
    """As `read_prompts`, but a file's lines stay in the file."""
    path = Path(source)
    if not path.exists() and str(source) in SETS:
        return SETS[str(source)]()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {INSTEAD}, or one of {', '.join(SETS)}")
    return Lines(path)


def read_prompts(source: str | Path) -> list[str]:
    """The prompts of a text file, one a line; of a JSONL file, the field "prompt" of each line; or of a named set.

    Names: hpsv2 (all four styles), hpsv2-anime, hpsv2-concept-art, hpsv2-paintings, hpsv2-photo, partiprompts,
    geneval. They are fetched on first use and cached. FileNotFoundError where there is no such file or set or it
    cannot be fetched, ValueError for a file without prompts; each in one line.
    """
    return list(open_prompts(source))


def field(line: str, number: int, path: Path) -> str:
    """The prompt of one line of JSONL."""
    try:
        prompt = json.loads(line)["prompt"].strip()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
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
