"""A hub on loopback: the routes of the real one that taking and pushing files goes through."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"


class Hub(ThreadingHTTPServer):
    """Repos of any type in memory. `repos[id]` holds revisions, each a dict of files by name.

    `asked` are the requests, as `METHOD path`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.repos.setdefault(repo, {})[revision] = files


class Result(NamedTuple):
    """What a command line came to."""

    code: int
    stdout: str
    stderr: str


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


_SCRIPT = """
import json, os, sys
from typer.testing import CliRunner
from alvts_cli.cli import app

for line in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = line["token"]
    done = CliRunner().invoke(app, line["args"])
    print(json.dumps([done.exit_code, done.stdout, done.stderr]), flush=True)
"""


def at_hub(hub: Hub | None, home: Path, *commands: Sequence[object]) -> list[Result]:
    """Run command lines one after the other in one process, with the hub behind `HF_ENDPOINT`.

    Args:
        hub: None for an address where nobody answers.
        home: `HF_HOME`.
        commands: each of alvts; one that begins with `token=...` logs in with that.
    """
    address = "http://127.0.0.1:9" if hub is None else hub.address
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    lines = []
    for command in commands:
        args = [str(arg) for arg in command]
        named = args[0].startswith("token=")
        token = args.pop(0).removeprefix("token=") if named else TOKEN
        lines.append({"token": token, "args": args})
    words = [sys.executable, "-c", _SCRIPT, json.dumps(lines)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [Result(*json.loads(line)) for line in done.stdout.splitlines()]


def _sha(revision: str, files: dict[str, bytes]) -> str:
    text = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in files.items()})
    return hashlib.sha1(f"{revision}{text}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self._path()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "RepoNotFound")
        if path == "/api/repos/create":
            told = json.loads(data)
            repo = "/".join(filter(None, (told.get("organization"), told["name"])))
            if repo in self.server.repos:
                return self._json({"url": f"{self.server.address}/{repo}"}, 409)
            self.server.add(repo, {})
            return self._json({"url": f"{self.server.address}/{repo}"})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.address}/lfs/{one['oid']}"}}}
                for one in json.loads(data)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(data)["files"]
            ]
            return self._json({"files": files})
        if "/commit/" in path:
            there = dict(self.server.repos[repo]["main"])
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    there[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    there[value["path"]] = self.server.blobs[value["oid"]]
            self.server.add(repo, there)
            sha = _sha("main", there)
            url = f"{self.server.address}/{repo}/commit/{sha}"
            return self._json({"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})
        return self._refuse(404, "EntryNotFound")

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self._path().rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.blobs[oid] = data
        self._send(200, b"")

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        return path

    def _get(self) -> None:
        path = self._path()
        parts = path.strip("/").split("/")
        parts = parts[{"api": 2, "datasets": 1}.get(parts[0], 0) :]
        repo, rest = "/".join(parts[:2]), parts[2:]
        revisions = self.server.repos.get(repo)
        if revisions is None:
            return self._refuse(401, "RepoNotFound")
        action, revision, name = (*rest[:2], "/".join(rest[2:])) if rest else ("", "main", "")
        by_sha = {_sha(r, files): r for r, files in revisions.items()}
        revision = by_sha.get(revision, revision)
        if revision not in revisions:
            return self._refuse(404, "RevisionNotFound")
        files = revisions[revision]
        sha = _sha(revision, files)
        if path.startswith("/api/"):
            if action == "tree":
                return self._json([_entry(n, d) for n, d in files.items() if n.startswith(name)])
            named = [{"rfilename": one} for one in files]
            return self._json({"id": repo, "sha": sha, "siblings": named, "tags": []})
        if name not in files:
            return self._refuse(404, "EntryNotFound", sha)
        data = files[name]
        tag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": sha}
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        self._send(206 if start else 200, data[start:], tag)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, sha: str = "") -> None:
        self._send(
            status, b"", {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": sha}
        )

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
