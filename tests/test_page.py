"""The report's page: it parses, needs no network, and its script sorts and enlarges."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from speedrl.evaluation.pages import SCRIPT, Section, page, write_page

VOID = {"meta", "img", "link", "br"}
PARTS = [
    Section(
        title="a <b> & c",
        words=['it says "less" <than>'],
        images=[("figure one.png", "a figure")],
        tables=[(["name", "R@1"], [["x", "0.5 ±0.1"], ["y", "–"], ["z", "0.25"]])],
        commands=["speedrl train --out 'a b'"],
        files=["a.json"],
    ),
    Section(title="empty"),
]


class Reader(HTMLParser):
    """Checks that tags close in order; keeps tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_parses_and_says_what_it_was_given():
    found = Reader(page("title", PARTS))
    assert not found.open
    assert 'it says "less" <than>' in found.text and "a <b> & c" in found.text and "--out 'a b'" in found.text
    names = [tag for tag, _ in found.tags]
    assert names.count("th") == 2 == names.count("button") and names.count("td") == 6 and names.count("dialog") == 1
    assert ("img", {"src": "figure one.png", "alt": "a figure"}) in found.tags


def test_the_page_needs_no_network_and_no_file_but_those_beside_it(tmp_path):
    write_page(tmp_path / "index.html", "title", PARTS)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    sources = [value for _, found in Reader(text).tags for key, value in found.items() if key in ("src", "href")]
    assert set(sources) == {"figure one.png", "a.json", "data:,"}
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


# as much of a browser's document as the script touches
DOCUMENT = """
class Node {
  constructor(text) { this.textContent = text; this.listeners = {}; this.attributes = {}; }
  addEventListener(name, f) { this.listeners[name] = f; }
  getAttribute(name) { return this.attributes[name] ?? null; }
  setAttribute(name, value) { this.attributes[name] = value; }
  removeAttribute(name) { delete this.attributes[name]; }
}
const cells = JSON.parse(process.argv[1]);
const rows = cells.map(texts => ({cells: texts.map(text => new Node(text))}));
const body = {rows, appendChild(row) { rows.splice(rows.indexOf(row), 1); rows.push(row); }};
const heads = cells[0].map(() => { const h = new Node(""), b = new Node(""); h.querySelector = () => b; return h; });
const table = {querySelectorAll: () => heads, querySelector: () => body};
const box = new Node(""), large = new Node(""), picture = new Node("");
picture.src = "a.png"; picture.alt = "words";
box.querySelector = () => large; box.showModal = () => { box.open = true; }; box.close = () => { box.open = false; };
globalThis.document = {
  querySelectorAll: name => name === "table" ? [table] : [picture], querySelector: () => box,
};
"""
TRY = """
const shown = () => rows.map(row => row.cells[0].textContent).join("");
const click = column => heads[column].querySelector().listeners.click();
const seen = [shown()];
for (const column of [1, 1, 2, 1]) { click(column); seen.push(shown()); }
seen.push(heads.map(h => h.getAttribute("aria-sort")));
picture.listeners.click({preventDefault() {}});
seen.push([box.open, large.src, large.alt]);
box.listeners.click();
seen.push(box.open);
console.log(JSON.stringify(seen));
"""


def test_a_click_on_a_heading_sorts_and_one_on_an_image_enlarges(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    cells = [["a", "0.5 ±0.1", "kl"], ["b", "–", "all"], ["c", "12", "None"], ["d", "-3e-5", "Lr"]]
    script = DOCUMENT + "(function () {" + SCRIPT + "})();" + TRY
    done = subprocess.run([node, "-e", script, json.dumps(cells)], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    start, up, down, words, again, marks, enlarged, closed = json.loads(done.stdout)
    assert (start, up, down) == ("abcd", "dacb", "cadb"), "by value, and what is missing last"
    assert words == "badc" and again == "dacb", "all, kl, Lr, None"
    assert marks == [None, "ascending", None]
    assert enlarged == [True, "a.png", "words"] and closed is False
