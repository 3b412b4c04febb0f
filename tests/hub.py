"""A stand-in for a hub on loopback: the endpoints of its HTTP API that huggingface_hub calls, with real storage.

Repositories are created, files announced (preupload), large ones sent by the LFS batch protocol with their hashes
checked, and commits made; what was committed can be listed and downloaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"


@dataclass
class Hub:
    """Its state.

    Attributes:
        repos: name -> path -> content.
        refused: a part of a path -> the status that such requests get, and the words.
        asked: every request, METHOD and path.
        writers: names before the slash that the token may write to.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    writers: tuple[str, ...] = ("me",)
    url: str = ""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _respond(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(size)
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append(f"{self.command} {path}")
        for part, (status, words) in self.state.refused.items():
            if part in path:
                self._send(status, {"error": words})
                return
        writes = self.command in ("POST", "PUT", "DELETE") and "/validate-yaml" not in path
        if writes and "/lfs-store/" not in path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
            return
        for method, pattern, answer in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                answer(self, body, **match.groupdict())
                return
        self._send(404, {"error": f"no such endpoint: {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = _respond

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization") or "me"
        name = f"{owner}/{asked['name']}"
        if owner not in self.state.writers:
            self._send(403, {"error": f"You don't have the rights to create a model under the namespace {owner}"})
        elif name in self.state.repos:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.state.url}/{name}"})
        else:
            self.state.repos[name] = {".gitattributes": b"*.safetensors filter=lfs\n"}
            self.state.private[name] = asked.get("private") is True or asked.get("visibility") == "private"
            self.state.commits[name] = [_sha(name.encode())[:40]]
            self._send(200, {"url": f"{self.state.url}/{name}", "name": name})

    def validate(self, body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str) -> None:
        if repo not in self.state.repos:
            self._missing_repo()
            return
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith((".safetensors", ".masks")) else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(body)["files"]
        ]
        self._send(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            one: dict[str, Any] = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.state.objects:
                one["actions"] = {
                    "upload": {"href": f"{self.state.url}/lfs-store/{each['oid']}"},
                    "verify": {"href": f"{self.state.url}/lfs-verify"},
                }
            objects.append(one)
        self._send(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if _sha(body) != oid:
            self._send(400, {"error": "the content does not have that hash"})
            return
        self.state.objects[oid] = body
        self._send(200)

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        there = self.state.objects.get(asked["oid"])
        self._send(200 if there is not None and len(there) == asked["size"] else 404, {})

    def commit(self, body: bytes, repo: str) -> None:
        files = self.state.repos[repo]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commits = self.state.commits[repo]
        commits.append(_sha(commits[-1].encode() + body)[:40])
        url = f"{self.state.url}/{repo}/commit/{commits[-1]}"
        self._send(200, {"success": True, "commitUrl": url, "commitOid": commits[-1]})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if repo not in self.state.repos:
            self._missing_repo()
            return
        siblings = [{"rfilename": name} for name in self.state.repos[repo]]
        values = {"id": repo, "modelId": repo, "sha": self.state.commits[repo][-1], "siblings": siblings}
        self._send(200, {**values, "private": self.state.private[repo], "tags": [], "downloads": 0, "likes": 0})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        if repo not in self.state.repos:
            self._missing_repo()
            return
        files = self.state.repos[repo].items()
        self._send(200, [{"type": "file", "path": n, "size": len(c), "oid": _sha(c)[:40]} for n, c in files])

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        content = self.state.repos.get(repo, {}).get(path)
        commit = self.state.commits.get(repo, [""])[-1]
        if content is None:
            self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        self._send(200, content, X_Repo_Commit=commit, ETag=f'"{_sha(content)[:40]}"')

    def _missing_repo(self) -> None:
        self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_REPO}/preupload/main", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs-store/(?P<oid>[0-9a-f]{64})", _Handler.store),
    ("POST", "/lfs-verify", _Handler.verify),
    ("POST", f"/api/models/{_REPO}/commit/main", _Handler.commit),
    ("GET", f"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("HEAD", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
