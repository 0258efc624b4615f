"""A hub of our own on this machine: as much of its protocol as downloads need, and its ways of saying no."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECONDS_OF_SLOWNESS = 0.5
"""Per download."""
TOKEN = "hf_valid"


@dataclass
class Hub:
    """`someone/tiny` and `/clear` hold the files of `folder`; other names get other answers, see `Handler`."""

    folder: Path
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path, in order."""
    port: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    """Set when it closes: nobody is answered who still waits."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def files(self) -> dict[str, Path]:
        files = (file for file in sorted(self.folder.rglob("*")) if file.is_file())
        return {file.relative_to(self.folder).as_posix(): file for file in files}


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """someone/tiny, /gated (a licence), /hidden (401), /missing (404), /huge (no disk holds it), /silent, /broken (503),
    /other (no pipeline), /slow."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        repository = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        if not repository.startswith("someone/"):  # what the library asks once a day on its own account
            return self.refuse(404, "", "Not found")
        self.hub.requests.append((self.command, path))
        name = repository.removeprefix("someone/")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif name == "silent":
            self.hub.over.wait()
        elif name == "broken":
            self.refuse(503, "", "down")
        elif name == "hidden":
            self.refuse(401, "RepoNotFound", "Repository not found")
        elif name not in ("tiny", "gated", "huge", "other", "slow", "clear"):
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif path.startswith("/api/models/"):
            self.tell(path.removeprefix(f"/api/models/{repository}").strip("/").split("/"), name)
        elif name == "gated" and token != TOKEN:
            self.refuse(401, "GatedRepo", "Access to this model is restricted")
        else:
            self.give(path.split("/resolve/", 1)[1], name)

    def tell(self, words: list[str], name: str) -> None:
        """What a repository is, or which files there are."""
        revision = words[1] if words[0] else "main"
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = {} if name == "other" else self.hub.files()
        sizes = {path: file.stat().st_size for path, file in files.items()}
        if words[0] == "tree":
            return self.send([{"type": "file", "path": p, "size": sizes[p], "oid": oid(files[p])} for p in files])
        siblings = [{"rfilename": path, "size": sizes[path], "blobId": oid(files[path])} for path in files]
        gated = "manual" if name == "gated" else False
        return self.send({"id": f"someone/{name}", "sha": COMMIT, "gated": gated, "siblings": siblings})

    def give(self, rest: str, name: str) -> None:
        revision, file = rest.split("/", 1)
        found = self.hub.files().get(file)
        if found is None or revision not in ("main", COMMIT):
            self.refuse(404, "EntryNotFound", "Entry not found")
        else:
            size = {"X-Linked-Size": str(10**17)} if name == "huge" else {}
            self.reply(200, found.read_bytes(), ETag=f'"{oid(found)}"', **size)

    def send(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, message: str) -> None:
        given = {"X-Error-Code": code} if code else {}
        self.reply(status, b"", **given, **{"X-Error-Message": message})

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            half = len(body) // 2
            self.wfile.write(body[:half])
            time.sleep(SECONDS_OF_SLOWNESS if "/slow/resolve/" in self.path else 0)
            self.wfile.write(body[half:])


def oid(file: Path) -> str:
    return hashlib.sha1(str(file).encode()).hexdigest()
