"""The documentation: generated pages are current, links lead somewhere, and the text keeps to its limits."""

import re
from pathlib import Path

import pytest

from experiments.docs import cli_page, pages

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORDS, LINES, SENTENCE = 1100, 150, 30


def prose(text: str) -> str:
    """A page without code, tables, comments and the targets of links."""
    text = re.sub(r"```.*?```", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("|")]
    text = re.sub(r"\]\([^)]*\)", "]", "\n".join(lines))
    return re.sub(r"`[^`]*`", "code", text)


def sentences(text: str) -> list[str]:
    """The sentences of a page; list items and headings are sentences of their own."""
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-#]|\d+\.) )", prose(text))
    return [part for block in blocks for part in re.split(r"(?<=[.!?:;])\s+", " ".join(block.split())) if part]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in pages()])
def test_generated_pages_are_current(path):
    assert path.read_text(encoding="utf-8") == pages()[path], "run python -m experiments.docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_front_page_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES and len(text.split()) <= WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_in_plain_words(page):
    text = page.read_text(encoding="utf-8")
    long = [sentence for sentence in sentences(text) if len(sentence.split()) > SENTENCE]
    assert not long
    bare = re.findall(r"(?<![\w.)\]])\.\d+\b", prose(text) + "\n".join(re.findall(r"^\|.*", text, re.MULTILINE)))
    assert not bare, "a number without its leading zero"
    assert not re.search(r"pip install [\"']?speedrl(?!\[[a-z,]+\] @)", text), "that name is another project's"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_commands_exist(page):
    sections = dict(re.findall(r"^## speedrl (\w+)\n(.*?)(?=^## |\Z)", cli_page(), re.DOTALL | re.MULTILINE))
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        for command, rest in re.findall(r"(?:\.venv/bin/|-m |^)speedrl (\w+)([^#&]*)", line):
            for option in re.findall(r"--[a-z0-9-]+", rest):
                assert re.search(rf"{option}(?![\w-])", sections[command]), f"speedrl {command} has no {option}"


def test_the_python_example_of_the_front_page_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_model" in block)
    names: dict = {}
    exec(code, names)
    names["loss"].backward()
    assert names["loss"].isfinite()
