"""A Hub on this machine: the few routes of it that `huggingface_hub` needs to download and to upload."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_of-the-tests"


@dataclass
class Repository:
    """What is in it, at one commit."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False

    @property
    def commit(self) -> str:
        content = repr(sorted(self.files.items())).encode()
        return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@dataclass
class Hub:
    """The server, and its repositories by id."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    """Revision -> id of the repository that has it, beside `main` and the commit."""
    requests: list[str] = field(default_factory=list)
    refuses_uploads: bool = False

    def add(self, repo: str, directory: Path, *, private: bool = False) -> Repository:
        files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        self.repositories[repo] = Repository(files, private)
        return self.repositories[repo]

    def environment(self, cache: Path, *, token: str | None = None) -> dict[str, str]:
        """For a process that is to use this Hub."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0].strip("/")
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo, rest = "/".join(parts[:2]), parts[2:]
        repository = self._repository(repo)
        if repository is None:
            return
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", repository.commit) and self.hub.tags.get(revision) != repo:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif rest[:1] == ["resolve"]:
            self._file(repository, "/".join(rest[2:]))
        elif rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
                for name, content in sorted(repository.files.items())
            ]
            self._json(entries)
        else:
            siblings = [{"rfilename": name} for name in sorted(repository.files)]
            info = {"id": repo, "sha": repository.commit, "private": repository.private}
            self._json(info | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0].strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, None, "Invalid username or password.")
        elif path == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.hub.repositories:
                known = {"error": "You already created it", "url": f"{self.hub.url}/{repo}"}
                self._send(409, json.dumps(known).encode(), {})
                return
            self.hub.repositories[repo] = Repository(private=asked.get("visibility") == "private")
            self._json({"url": f"{self.hub.url}/{repo}"})
        elif path[-2] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif path[-2] == "commit" and not self.hub.refuses_uploads:
            self._commit("/".join(path[2:4]), body)
        elif path[-2] == "commit":
            self._refuse(503, None, "The Hub is being repaired.")
        else:
            self._json({})

    def _commit(self, repo: str, body: bytes) -> None:
        repository = self.hub.repositories[repo]
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                value = line["value"]
                repository.files[value["path"]] = base64.b64decode(value["content"])
        url = f"{self.hub.url}/{repo}/commit/{repository.commit}"
        self._json({"commitUrl": url, "commitOid": repository.commit})

    def _repository(self, repo: str) -> Repository | None:
        repository = self.hub.repositories.get(repo)
        if repository is not None and (
            not repository.private or self.headers.get("Authorization") == f"Bearer {TOKEN}"
        ):
            return repository
        self._refuse(401, "RepoNotFound", "Repository not found")
        return None

    def _file(self, repository: Repository, name: str) -> None:
        content = repository.files.get(name)
        if content is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": repository.commit}
        self._send(200, content, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def _oid(content: bytes) -> str:
    """As git names a blob."""
    blob = b"blob %d\0" % len(content) + content
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that answers on a free port of this machine until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {}))
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
