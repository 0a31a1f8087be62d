"""A hub on this machine: what huggingface_hub asks of a server to fetch a repository, from folders."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from speedrl.system.files import checksum

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def loopback_hub(repositories: dict[str, Path], asked: list[str]) -> Iterator[str]:
    """The address of a hub with these repositories by owner/name, each of one commit; `asked` gets every path."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self, body: bool = True):
            asked.append(self.path)
            path = self.path.partition("?")[0].removeprefix("/").removeprefix("api/models/")
            name = "/".join(path.split("/")[:2])
            folder, rest = repositories.get(name), path.removeprefix(name).strip("/").split("/")
            if folder is None:
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
            if rest[0] in ("", "revision"):
                files = [{"rfilename": str(f.relative_to(folder))} for f in sorted(folder.rglob("*")) if f.is_file()]
                about = {"id": name, "sha": COMMIT, "siblings": files, "private": False, "tags": [], "downloads": 0}
                return self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"}, body)
            if rest[0] == "tree":
                files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
                tree = [{"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size,
                         "oid": checksum(f)[:40]} for f in files]
                return self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
            file = folder.joinpath(*rest[2:])
            if not file.is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{checksum(file)}"'}
            return self.answer(200, file.read_bytes(), headers, body)

        def do_HEAD(self):
            self.do_GET(body=False)

        def answer(self, status: int, content: bytes, headers: dict[str, str], body: bool):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
