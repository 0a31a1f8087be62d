"""One page of HTML that needs no network: images that enlarge and tables that sort, all in one file beside them."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from speedrl.system.files import write_atomically

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin: 1rem 0; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
th button { font: inherit; font-weight: bold; color: inherit; background: none; border: 0; padding: 0; }
th button { cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\25b2"; }
th[aria-sort=descending] button::after { content: " \\25bc"; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; max-height: 32rem; background: #fff; cursor: zoom-in; }
figcaption { font-size: .85rem; }
dialog { max-width: 98vw; max-height: 98vh; padding: .5rem; border: 0; overflow: auto; }
dialog img { cursor: zoom-out; background: #fff; }
dialog::backdrop { background: #000b; }
pre { overflow-x: auto; background: #8882; padding: .6rem; font-size: .8rem; }
"""
# numbers by their value, words after them by the alphabet, and what is missing last either way
SCRIPT = """
function key(text) {
  const number = parseFloat(text);
  return text === "" || text === "\\u2013" ? null : Number.isNaN(number) ? text.toLowerCase() : number;
}
function compare(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1;
}
function sorted(rows, column, descending) {
  const keyed = rows.map(row => [key(row.cells[column].textContent.trim()), row]);
  const known = keyed.filter(pair => pair[0] !== null), missing = keyed.filter(pair => pair[0] === null);
  known.sort((a, b) => descending ? compare(b[0], a[0]) : compare(a[0], b[0]));
  return known.concat(missing).map(pair => pair[1]);
}
for (const table of document.querySelectorAll("table")) {
  const heads = Array.from(table.querySelectorAll("th")), body = table.querySelector("tbody");
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    for (const row of sorted(Array.from(body.rows), column, descending)) body.appendChild(row);
  }));
}
const box = document.querySelector("dialog"), large = box.querySelector("img");
for (const image of document.querySelectorAll("figure img")) {
  image.addEventListener("click", event => {
    event.preventDefault();
    large.src = image.src;
    large.alt = image.alt;
    box.showModal();
  });
}
box.addEventListener("click", () => box.close());
"""


class Section(NamedTuple):
    """A part of a page: all optional but the title. Files are named relative to the page."""

    title: str
    words: Sequence[str] = ()  # paragraphs
    images: Sequence[tuple[str, str]] = ()  # file and caption
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]] = ()  # header and lines
    commands: Sequence[str] = ()
    files: Sequence[str] = ()  # to be linked


def page(title: str, sections: Sequence[Section]) -> str:
    """The page as a string of HTML. Everything given is text: nothing in it is taken for HTML."""
    body = "".join(map(section, sections))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n{body}"
        f'<dialog><img src="data:," alt=""></dialog>\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


def section(part: Section) -> str:
    lines = [f"<h2>{html.escape(part.title)}</h2>"]
    lines += [f"<p>{html.escape(words)}</p>" for words in part.words]
    for file, caption in part.images:
        name, caption = html.escape(file), html.escape(caption)
        image = f'<a href="{name}"><img src="{name}" alt="{caption}"></a>'
        lines.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    lines += [table(header, rows) for header, rows in part.tables]
    if part.commands:
        lines.append(f"<pre>{html.escape(chr(10).join(part.commands))}</pre>")
    if part.files:
        links = [f'<a href="{html.escape(file)}">{html.escape(file)}</a>' for file in part.files]
        lines.append(f"<p>{', '.join(links)}</p>")
    return "<section>\n" + "\n".join(lines) + "\n</section>\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose headings sort it."""
    heads = "".join(f'<th scope="col"><button type="button">{html.escape(head)}</button></th>' for head in header)
    lines = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes `page` to a file."""
    text = page(title, sections)
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
