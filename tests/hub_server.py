"""A loopback server that speaks the Hub's protocol, as far as huggingface_hub 2.4 uses it without Xet.

Create, validate-yaml, info, tree, preupload, LFS batch and PUT, NDJSON commit, resolve, tags; and every fault that a
client may meet, switched on for requests that match a text such as ``"POST /api/models/me/x/commit"``. It listens on
127.0.0.1 on a port of its own and stops with its ``with`` block.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".model")
LFS_BYTES = 5_000_000


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A repo: its commits (path to bytes), its branches and tags, oldest commit first."""

    name: str
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return self.refs["main"]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes], message: str = "by hand", ref: str = "main") -> str:
        oid = hashlib.sha1(f"{self.name} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.messages.append(message)
        self.refs[ref] = oid
        return oid


@dataclass
class Fault:
    """What happens to requests whose ``METHOD path`` contains ``match``, for the next ``times`` of them (-1: all)."""

    match: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    times: int = -1
    cut: bool = False
    done: bool = False  # what was asked for is done all the same; only its answer is this one
    half: bool = False  # the answer breaks in its middle
    delay: float = 0.0
    call: Callable[[], None] | None = None


class HubServer:
    """The state of the server, and what a test may ask of it."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.corrupt: set[str] = set()
        self.trace: list[tuple[str, str, int]] = []
        self.slept: list[float] = []  # what the client would have waited, see connect()
        self.url = ""
        self.stop = threading.Event()

    def repo(self, name: str, files: dict[str, bytes] | None = None, *, private: bool = False) -> Repo:
        """Make a repo as the Hub does: with a first commit that holds ``.gitattributes``."""
        made = self.repos[name] = Repo(name, private)
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}, "initial commit")
        return made

    def fail(self, match: str, status: int = 0, **options: Any) -> Fault:
        fault = Fault(match, status, **options)
        self.faults.append(fault)
        return fault

    def heal(self) -> None:
        self.faults.clear()
        self.corrupt.clear()

    def requests(self, match: str) -> list[str]:
        """The requests so far whose ``METHOD path`` contains a text."""
        return [f"{method} {path}" for method, path, _ in self.trace if match in f"{method} {path}"]


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_BYTES


class _Cut(Exception):
    """The connection shall break now."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits for a delayed acknowledgement
    wbufsize = -1
    hub: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815

    def _serve(self) -> None:
        address = urlsplit(self.path)
        self.route, self.query = address.path, parse_qs(address.query)
        self.answered = 0
        line = f"{self.command} {self.route}"
        try:
            fault = self.fault = self._fault(line)
            if fault and fault.cut and not fault.done:
                self.rfile.read(min(64, int(self.headers.get("Content-Length") or 0)))
                raise _Cut
            self.body = self._read_body()
            if fault and fault.status and not fault.done:
                self._json(fault.body if fault.body is not None else {"error": "a fault"}, fault.status, fault.headers)
            else:
                self._route()
        except _Cut:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if self.route != "/api/agent-harnesses":  # which huggingface_hub asks for once in a process, whatever it does
            self.hub.trace.append((self.command, self.route, self.answered))

    def _fault(self, line: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.match in line and fault.times != 0:
                fault.times -= 1
                if fault.delay:
                    self.hub.stop.wait(fault.delay)
                if fault.call:
                    fault.call()
                return fault
        return None

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # -- answers ----------------------------------------------------------------------------------------------------

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        if self.fault and self.fault.done:
            if self.fault.cut:
                raise _Cut
            status, data, headers = self.fault.status, b"{}", {"Content-Type": "application/json"}
        self.answered = status
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.fault and self.fault.half:
            self.wfile.write(data[: len(data) // 2])
            raise _Cut
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._json({"error": message}, status, headers if code else {})

    # -- routes -----------------------------------------------------------------------------------------------------

    def _route(self) -> None:
        path = self.route
        if path == "/api/repos/create":
            return self._create()
        if path == "/api/validate-yaml":
            content = json.loads(self.body)["content"]
            wrong = not content.startswith("---\n")
            return self._json(
                {"errors": [{"message": "no metadata"}] if wrong else [], "warnings": []}, 400 if wrong else 200
            )
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            return self._put_lfs(match[1])
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self._with_repo(match[1], self._lfs_batch, write=True)
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self._with_repo(match[1], lambda repo: self._resolve(repo, match[2], unquote(match[3])))
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/refs", path):
            return self._with_repo(match[1], self._refs)
        if match := re.fullmatch(
            r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree|preupload|commit|tag)/([^/]+))?", path
        ):
            action, revision = match[2] or "revision", unquote(match[3] or "main")
            return self._with_repo(
                match[1], lambda repo: getattr(self, f"_{action}")(repo, revision), write=self.command == "POST"
            )
        return self._error(404, "", "no such route")

    def _with_repo(self, name: str, action: Callable[[Repo], None], *, write: bool = False) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token != self.hub.token:
            return self._error(401, "", "Invalid credentials in Authorization header")
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not token):
            return self._error(404 if token else 401, "RepoNotFound", "Repository not found")
        if write and not token:
            return self._error(401, "", "Authentication required")
        return action(repo)

    def _commit_of(self, repo: Repo, revision: str) -> str | None:
        return repo.refs.get(revision) or (revision if revision in repo.commits else None)

    def _create(self) -> None:
        asked = json.loads(self.body)
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._error(401, "", "Invalid credentials in Authorization header")
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repo(name, private=asked.get("visibility") == "private")
        return self._json({"url": f"{self.hub.url}/{name}"})

    def _revision(self, repo: Repo, revision: str) -> None:
        commit = self._commit_of(repo, revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": path} for path in sorted(repo.commits[commit])]
        return self._json(
            {
                "id": repo.name,
                "modelId": repo.name,
                "sha": commit,
                "private": repo.private,
                "tags": [],
                "siblings": siblings,
            }
        )

    def _refs(self, repo: Repo) -> None:
        refs = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in repo.refs.items()
            if not name.startswith("refs/")
        ]
        return self._json({"branches": refs, "tags": [], "converts": []})

    def _tree(self, repo: Repo, revision: str) -> None:
        commit = self._commit_of(repo, revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        rows: list[dict[str, Any]] = []
        for path, data in sorted(repo.commits[commit].items()):
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            if is_lfs(path, len(data)):
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{_sha256(data)}\nsize {len(data)}\n"
                row["oid"] = git_oid(pointer.encode())
                row["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": len(pointer)}
            rows.append(row)
        folders = {str(path).rpartition("/")[0] for path in repo.commits[commit] if "/" in path}
        rows += [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in sorted(folders)]
        return self._json(rows)

    def _preupload(self, repo: Repo, revision: str) -> None:
        commit = self._commit_of(repo, revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        answer = []
        for file in json.loads(self.body)["files"]:
            large = is_lfs(file["path"], file["size"])
            standing = repo.commits[commit].get(file["path"])
            oid = None if standing is None else _sha256(standing) if large else git_oid(standing)
            mode = "lfs" if large else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._json({"files": answer})

    def _lfs_batch(self, repo: Repo) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            row: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                row["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(row)
        return self._json({"transfer": "basic", "objects": objects})

    def _put_lfs(self, oid: str) -> None:
        if _sha256(self.body) != oid:
            return self._error(422, "", "wrong bytes")
        self.hub.lfs[oid] = self.body
        return self._send(200, b"", {})

    def _commit(self, repo: Repo, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        start = self._commit_of(repo, revision)
        pull_request = "create_pr" in self.query
        if start is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if header.get("parentCommit") not in (None, start) and not pull_request:
            return self._error(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[start])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return self._error(400, "", f"LFS object {value['oid']} is missing")
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        oid = repo.commit(files, header["summary"], f"refs/pr/{number}" if pull_request else revision)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo.name}/commit/{oid}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo.name}/discussions/{number}"
        return self._json(answer)

    def _tag(self, repo: Repo, revision: str) -> None:
        name, commit = json.loads(self.body)["tag"], self._commit_of(repo, revision)
        if name in repo.refs:
            return self._error(409, "", "Tag reference exists already")
        assert commit is not None
        repo.refs[name] = commit
        return self._json({})

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        commit = self._commit_of(repo, unquote(revision))
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        data = repo.commits[commit].get(path)
        if data is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        etag = _sha256(data) if is_lfs(path, len(data)) else git_oid(data)
        headers = {
            "ETag": f'"{etag}"',
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(data)),
            "X-Linked-Etag": f'"{etag}"',
        }
        if path in self.hub.corrupt:
            data = bytes(byte ^ 1 for byte in data[:1]) + data[1:]
        if begin := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            headers["Content-Range"] = f"bytes {begin[1]}-{len(data) - 1}/{len(data)}"
            return self._send(206, data[int(begin[1]) :], headers)
        return self._send(200, data, headers)


def ended_at(request: int, number: signal.Signals, *, answered: bool) -> Callable[[Path], None]:
    """What makes a process send itself a signal before a request, counted from one, or once that is answered; its
    temporary folder is then the folder that it is called with."""

    def prepare(folder: Path) -> None:
        import httpx2

        tempfile.tempdir = str(folder)
        send, requests = httpx2.Client.send, itertools.count(1)

        def counted(self: Any, *args: Any, **options: Any) -> Any:
            is_the_one = next(requests) == request
            if is_the_one and not answered:
                os.kill(os.getpid(), number)
            answer = send(self, *args, **options)
            if is_the_one and answered:
                os.kill(os.getpid(), number)
            return answer

        httpx2.Client.send = counted  # type: ignore[method-assign]

    return prepare


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def running_hub(token: str = "hf_LoopbackTokenThatNobodyMaySee") -> Iterator[HubServer]:
    """A server that runs for as long as the block."""
    hub = HubServer(token)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stop.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


_tls = functools.cache(ssl.create_default_context)


def connect(server: HubServer, home: Path, patch: Any) -> None:
    """Point the huggingface_hub of this process at the server, with a cache and a token of its own.

    Its constants are made from the environment when it is imported, which may have happened long ago.
    """
    from huggingface_hub import close_session, constants
    from huggingface_hub.utils import _http

    close_session()
    patch.setenv("HF_TOKEN", server.token)
    patch.setattr(constants, "ENDPOINT", server.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(_http, "time", SimpleNamespace(sleep=server.slept.append))
    patch.setattr(ssl, "create_default_context", _tls)  # each client reads all certificates, and speaks plain HTTP
