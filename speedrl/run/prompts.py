"""Lists of prompts: text files, JSON, JSONL, tables, Python lists, and the sets that the field reports on, by name."""

import codecs
import csv
import functools
import io
import json
import os
import re
import urllib.request
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from speedrl.system.errors import one_line
from speedrl.system.files import write_atomically
from speedrl.system.hub import hub_file

STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPSv2's benchmark, arXiv 2306.09341
GENEVAL = "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/generation_prompts.txt"
INSTEAD = "give a file with one prompt a line"
COLUMNS = ("prompt", "caption", "text")  # of a table, the first that is there
FORMATS = 'text with one prompt a line, a JSON list, JSONL with "prompt", or CSV/TSV with a column "prompt"'
UNREAD = (".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".yaml", ".yml", ".xml", ".html", ".toml", ".pkl",
          ".npy", ".npz", ".pt", ".safetensors", ".zip", ".gz", ".bz2", ".xz", ".zst", ".tar", ".pdf",
          ".docx")
JSON = re.compile(r'\s*(\{\s*["}]|\[\s*(["{\[\]]|$))')  # begins as no prompt does
MARKUP = re.compile(r"\s*(<\?xml|<!doctype|<html|---\s*$|- *prompt *:|prompts? *:\s*$)", re.IGNORECASE | re.MULTILINE)


class Lines(Sequence):
    """The prompts of a text file or of JSONL, read where they are wanted: of a million, memory holds 8 bytes each.

    A byte order mark and empty lines are left out, and control characters are spaces. ValueError for a file without
    prompts, or with a line that is not UTF-8 or has no prompt.
    """

    def __init__(self, path: Path, file: BinaryIO, *, of_json: bool = False):
        self.path, self.of_json, self.starts = path, of_json, array("Q")
        self.file = file  # stays open: a file of that name that comes later is another
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
        if line and self.of_json:
            try:
                line = prompt_of(json.loads(line), number, self.path)
            except (ValueError, RecursionError):
                raise no_prompt(number, self.path) from None
        return clean(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        self.file.seek(self.starts[index])
        return self.prompt(self.file.readline(), int(index) + 1)


Prompts = str | Path | Iterable[str]  # a file, the name of a set, or texts


def as_list(source: Prompts | None) -> Any:
    """Prompts that can be read again: a list of what is neither a file nor the name of a set, such as a generator."""
    return source if source is None or isinstance(source, str | Path) else list(source)


def open_prompts(source: Prompts) -> Sequence[str]:
    """As `read_prompts`, but the lines of a text or JSONL file stay in the file."""
    if not isinstance(source, str | Path):
        return all_prompts(source, "the list of prompts")
    path = Path(source)
    if not path.exists() and str(source) in SETS:
        return SETS[str(source)]()
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"{path}: no such file; {INSTEAD}, or one of {', '.join(SETS)}")
    if path.suffix.lower() in UNREAD:
        raise ValueError(f"{path}: {path.suffix} files are not read; give {FORMATS}")
    if path.is_file():
        return prompts_in(path, path.open("rb"))
    return prompts_in(path, io.BytesIO(read_once(path)))


@functools.cache
def read_once(path: Path) -> bytes:
    """What comes through a pipe, like /dev/stdin, which gives it but once."""
    return path.read_bytes()


def read_prompts(source: Prompts) -> list[str]:
    """The prompts of a file, of a named set, or of any series of texts.

    A text file has one prompt a line; a JSON file a list of strings or of objects with "prompt"; a JSONL file one of
    these a line; a CSV or TSV file a header with a column prompt, caption or text. What a file is says its suffix, else
    how it begins. Names: hpsv2 (all four styles), hpsv2-anime, hpsv2-concept-art, hpsv2-paintings, hpsv2-photo,
    partiprompts, geneval. They are fetched on first use and cached. FileNotFoundError where there is no such file or
    set or it cannot be fetched, ValueError for a file without prompts or of another format; each in one line.
    """
    return list(open_prompts(source))


def prompts_in(path: Path, file: BinaryIO) -> Sequence[str]:
    """The prompts in an open file, by the suffix of its name and how it begins."""
    suffix = path.suffix.lower()
    head = file.read(2**15).decode("utf-8-sig", "ignore")
    file.seek(0)
    first = next((line for line in head.splitlines() if line.strip()), "")
    if suffix in (".jsonl", ".ndjson"):
        return Lines(path, file, of_json=True)
    if suffix == ".json" or JSON.match(head):
        if first.lstrip().startswith("{") and is_json(first):
            return Lines(path, file, of_json=True)
        return json_list(path, file)
    if suffix in (".csv", ".tsv") or (header(first) and re.fullmatch(r"""["'\w.-]+([,\t;|]["'\w.-]+)+\s*""", first)):
        return in_table(path, file, first)
    if MARKUP.match(head):
        raise ValueError(f"{path}: begins with {first.strip()[:40]!r}, which is no prompt; give {FORMATS}")
    return Lines(path, file)


def json_list(path: Path, file: BinaryIO) -> list[str]:
    """The prompts of a JSON list."""
    try:
        found = json.loads(text_in(path, file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            raise ValueError(f"{path}: cannot be read as JSON ({one_line(error)}); give {FORMATS}") from None
        raise ValueError(f"{path}: cannot be read as JSON; give {FORMATS}") from None
    if not isinstance(found, list):
        raise ValueError(f'{path}: is not a JSON list, like ["a red apple", "an owl"]; give {FORMATS}')
    return all_prompts(found, path)


def header(line: str) -> tuple[int, str] | None:
    """The column of the prompts and the delimiter, where a line is the header of a table with such a column."""
    for delimiter in ",\t;|":
        cells = [cell.strip(" \"'").lower() for cell in line.split(delimiter)]
        if len(cells) > 1 and (known := [name for name in COLUMNS if name in cells]):
            return cells.index(known[0]), delimiter
    return None


def in_table(path: Path, file: BinaryIO, first: str) -> list[str]:
    """The prompts of a table: the column that its header, the line `first`, names."""
    if (found := header(first)) is None:
        if first.strip(" \"'\t").lower() not in COLUMNS:
            wanted = f"the header has no column {', '.join(COLUMNS)}"
            raise ValueError(f"{path}: {wanted}, but is {first.strip()[:80]!r}; name it so, or give {FORMATS}")
        found = (0, "\t" if path.suffix.lower() == ".tsv" else ",")
    column, delimiter = found
    text = io.StringIO(text_in(path, file), newline="")
    try:  # PartiPrompts has quotation marks as they are
        rows = list(csv.reader(text, delimiter=delimiter,
                               quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL))
    except csv.Error as error:
        raise ValueError(f"{path}: cannot be read as a table ({error}); give {FORMATS}") from None
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    return all_prompts([row[column] if len(row) > column else "" for row in rows[1:]], path)


def text_in(path: Path, file: BinaryIO) -> str:
    """The whole of a file, in UTF-8."""
    try:
        return file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file; give one prompt a line in UTF-8") from None


def all_prompts(found: Iterable[Any], where: object) -> list[str]:
    """Strings, or objects with "prompt", as prompts. ValueError for none, and for what is no prompt."""
    prompts = [clean(prompt_of(entry, number, where)) for number, entry in enumerate(found, 1)]
    if not prompts:
        raise ValueError(f"{where}: no prompts in it; give at least one")
    return prompts


def prompt_of(entry: Any, number: int, where: object) -> str:
    """The prompt of a string or of an object of JSON."""
    prompt = entry.get("prompt") if isinstance(entry, dict) else entry
    if not isinstance(prompt, str) or not clean(prompt):
        raise no_prompt(number, where)
    return prompt


def no_prompt(number: int, where: object) -> ValueError:
    return ValueError(f'{where}: entry {number} has no prompt; each must be like {{"prompt": "a red apple"}} or a text')


def clean(prompt: str) -> str:
    """Control characters, and halves of surrogate pairs, which JSON can hold, are spaces."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+", " ", prompt).strip()


def is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def hpsv2(*styles: str) -> list[str]:
    files = [hub_file("zhwang/HPDv2", f"benchmark/{s}.json", kind="dataset", instead=INSTEAD) for s in styles]
    return [prompt for file in files for prompt in read_prompts(file)]


def partiprompts() -> list[str]:
    return read_prompts(hub_file("nateraw/parti-prompts", "PartiPrompts.tsv", kind="dataset", instead=INSTEAD))


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
    "hpsv2": functools.partial(hpsv2, *STYLES),
    **{f"hpsv2-{style}": functools.partial(hpsv2, style) for style in STYLES},
    "partiprompts": partiprompts,
    "geneval": geneval,
}
