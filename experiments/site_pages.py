"""What the site has beside docs/, a hook of mkdocs: README.md as its first page, and the files that pages link to."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
CARD = "speedrl/models/embedded"
PLACES = {"README.md": "index.md", "NOTICE": "NOTICE.txt", "CITATION.cff": "CITATION.cff.txt",
          **{f"{CARD}/{name}": f"{CARD}/{name}" for name in ("README.md", "curves.png", "sheet.png")}}


def on_files(files: Any, *, config: Any) -> None:
    """Adds the files of PLACES to the site."""
    for source, place in PLACES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Leads links to where the site has their files."""
    if page.file.src_uri == "index.md":
        markdown = markdown.replace("](docs/", "](")
        return re.sub(r"\]\(([^):#]+)\)", lambda link: f"]({PLACES.get(link[1], link[1])})", markdown)
    return re.sub(r"\]\(\.\./([^)#]+)\)", lambda link: f"]({PLACES.get(link[1], link[1])})", markdown)
