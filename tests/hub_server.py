"""A Hugging Face Hub on the loopback: repositories in memory, one user with one token, and failures on demand.

Models and data sets share their names. It takes files in the commit itself, or, where `large` is set, weights as the
Hub's storage of large files (git LFS) does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]
TOKEN = "hf_ThisTokenMustNeverBeSeen"
"""Of the user, where a test does not choose another; what is said or written must not hold it."""
MISSING = (404, "RepoNotFound", "Repository not found")


def environment(server: Hub, folder: Path) -> dict[str, str]:
    """What makes another process take a server for the Hub."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }


@dataclass
class Repository:
    """The commits of every branch, newest last: address and files."""

    private: bool = False
    gated: str | bool = False
    branches: dict[str, list[tuple[str, Files]]] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        commits = self.branches.setdefault(branch, [])
        text = repr([branch, len(commits), sorted((name, git_oid(data)) for name, data in files.items())])
        commits.append((hashlib.sha1(text.encode()).hexdigest(), files))
        return commits[-1][0]

    def find(self, revision: str) -> tuple[str, Files] | None:
        """The newest commit of a branch, or a commit by its address."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c[0] == revision), None)


@dataclass
class Failure:
    """What goes wrong at addresses that hold `part`: a status with an error code, or with status 0 a dropped line.

    The line drops in the middle of what the client sends. `after`: how many requests go well before.
    """

    part: str
    status: int
    code: str = ""
    says: str = "Internal error"
    times: float = float("inf")
    delay: float = 0
    after: int = 0


def git_oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def directory(path: str) -> dict[str, str]:
    """How the tree tells a folder."""
    return {"type": "directory", "path": path, "oid": git_oid(b"")}


class Hub(ThreadingHTTPServer):
    """Use it as a context: it serves from its own thread until the end.

    Args:
        token: what the user `me` must send to write, or to see what is private.
        role: of the token: `write` or `read`.

    Attributes:
        requests: methods and addresses of all requests.
        sent: bytes that were sent to GET and POST, by the path of the address.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, token: str = "hf_sesame", role: str = "write") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token, self.role = token, role
        self.orgs = {"team": "write", "readers": "read"}
        self.large = False
        self.objects: Files = {}
        self.repos: dict[str, Repository] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.sent: Counter[str] = Counter()
        self.stopping = threading.Event()

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()

    def add(self, repo: str, files: Files | None = None, **settings: Any) -> Repository:
        """A repository that is there already."""
        made = self.repos[repo] = Repository(**settings)
        made.commit("main", {".gitattributes": b"", **(files or {})})
        return made

    def fail(self, part: str, status: int, **more: Any) -> None:
        """Let requests whose method and address hold `part` fail; see `Failure`."""
        self.failures.append(Failure(part, status, **more))

    def failure(self, request: str) -> Failure | None:
        """The failure due now."""
        for failure in self.failures:
            if failure.part in request and failure.times > 0:
                failure.after -= 1
                if failure.after < 0:
                    failure.times -= 1
                    return failure
        return None

    def fetched(self) -> dict[str, int]:
        """The files that were asked for, whole or in part, with the bytes that were sent of each."""
        found = {unquote(path.partition("/resolve/")[2]): size for path, size in self.sent.items()}
        return {path.partition("/")[2]: size for path, size in found.items() if path}

    def files(self, repo: str, branch: str = "main") -> Files:
        """What a loader finds."""
        found = self.repos[repo].find(branch)
        assert found
        return found[1]


class Refused(Exception):
    """An answer with a status of 400 or more: status, error code, message."""


class Handler(BaseHTTPRequestHandler):
    """Answers with JSON, but `resolve` with the bytes of a file."""

    server: Hub

    def handle_any(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        request = f"{self.command} {self.path}"
        self.server.requests.append(request)
        failure = self.server.failure(request)
        if failure and not failure.status:
            self.server.stopping.wait(failure.delay)
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(size)
        if failure:
            self.server.stopping.wait(failure.delay)
            self.refuse(failure.status, failure.code, failure.says)
            return
        try:
            self.route(urlsplit(self.path).path, body)
        except Refused as refusal:
            self.refuse(*refusal.args)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def route(self, path: str, body: bytes) -> None:
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                answer(self, *map(unquote, match.groups("")), *([body] if method in ("POST", "PUT") else []))
                return
        raise Refused(404, "", f"no route for {self.command} {path}")

    # What is asked for

    def whoami(self) -> None:
        self.need_token()
        orgs = [{"name": name, "roleInOrg": role} for name, role in self.server.orgs.items()]
        access = {"displayName": "test", "role": self.server.role}
        self.say({"type": "user", "name": "me", "orgs": orgs, "auth": {"accessToken": access}})

    def auth_check(self, repo: str) -> None:
        self.repository(repo)
        self.need_token()
        self.need_rights(repo)
        self.say({})

    def create(self, body: bytes) -> None:
        self.need_token()
        wanted = json.loads(body)
        repo = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        self.need_rights(repo)
        if repo in self.server.repos:
            self.refuse(409, "", "You already created this model repo", url=f"{self.server.url}/{repo}")
            return
        self.server.add(repo, private=wanted.get("visibility") == "private")
        self.say({"url": f"{self.server.url}/{repo}"})

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        if not re.match(r"---\n.*?\n---\n", content, re.DOTALL):
            raise Refused(400, "", "no metadata")
        self.say({"errors": [], "warnings": []})

    def branch(self, repo: str, branch: str, _: bytes) -> None:
        self.need_rights(repo)
        found = self.repository(repo)
        if branch in found.branches:
            raise Refused(409, "", "Reference already exists")
        found.branches[branch] = list(found.branches["main"])
        self.say({})

    def preupload(self, repo: str, revision: str, body: bytes) -> None:
        self.need_rights(repo)
        there = self.commit_at(repo, revision)[1]
        paths = [file["path"] for file in json.loads(body)["files"]]
        oids = {path: git_oid(there[path]) for path in paths if path in there}
        modes = {path: "lfs" if self.is_large(path) else "regular" for path in paths}
        files = [{"path": p, "uploadMode": modes[p], "shouldIgnore": False, "oid": oids.get(p)} for p in paths]
        self.say({"files": files})

    def batch(self, repo: str, body: bytes) -> None:
        """Where large files go; those that are there already need not be sent."""
        self.need_rights(repo)
        objects = json.loads(body)["objects"]
        for one in objects:
            if one["oid"] not in self.server.objects:
                actions = {name: f"{self.server.url}/storage/{name}/{one['oid']}" for name in ("upload", "verify")}
                one["actions"] = {name: {"href": address} for name, address in actions.items()}
        self.say({"transfer": "basic", "objects": objects})

    def store(self, oid: str, body: bytes) -> None:
        """The address is the permission, as with the Hub's storage."""
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "", "another hash")
        self.server.objects[oid] = body
        self.say({})

    def verify(self, oid: str, body: bytes) -> None:
        self.need_token()
        if json.loads(body)["size"] != len(self.server.objects[oid]):
            raise Refused(400, "", "another size")
        self.say({})

    def commit(self, repo: str, revision: str, body: bytes) -> None:
        self.need_rights(repo)
        files = dict(self.commit_at(repo, revision)[1])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.server.objects[line["value"]["oid"]]
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        oid = self.repository(repo).commit(revision, files)
        self.say({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid})

    def info(self, repo: str, revision: str) -> None:
        sha, files = self.commit_at(repo, revision or "main")
        sized = parse_qs(urlsplit(self.path).query).get("blobs") == ["true"]
        siblings = [{"rfilename": name} | ({"size": len(files[name])} if sized else {}) for name in sorted(files)]
        found = self.server.repos[repo]
        self.say({"id": repo, "sha": sha, "private": found.private, "gated": found.gated, "siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        """The files and folders in a folder, at all depths if `recursive`."""
        inside = f"{folder}/" if folder else ""
        files = {name: data for name, data in self.commit_at(repo, revision)[1].items() if name.startswith(inside)}
        if folder and not files:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        parents = {str(parent) for name in files for parent in PurePosixPath(name).parents}
        folders = [name for name in parents if name != "." and name.startswith(inside)]
        found = [self.entry(name, data) for name, data in sorted(files.items())] + list(map(directory, sorted(folders)))
        deep = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
        self.say([one for one in found if deep or "/" not in one["path"].removeprefix(inside)])

    def paths_info(self, repo: str, revision: str, body: bytes) -> None:
        files = self.commit_at(repo, revision)[1]
        paths = json.loads(body)["paths"]
        folders = {path for path in paths if any(name.startswith(f"{path}/") for name in files)}
        found = [self.entry(path, files[path]) for path in paths if path in files]
        self.say(found + list(map(directory, sorted(folders))))

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
        if self.is_large(name):
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return found

    def is_large(self, name: str) -> bool:
        return self.server.large and name.endswith(".safetensors")

    def resolve(self, repo: str, revision: str, path: str) -> None:
        sha, files = self.commit_at(repo, revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        data = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git_oid(data)}"', "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            self.reply(206, data[start : end + 1], headers)
            return
        self.reply(200, data, headers)

    # What they need

    def need_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            raise Refused(401, "", "Invalid credentials in Authorization header")

    def need_rights(self, repo: str) -> None:
        self.need_token()
        owner = repo.partition("/")[0]
        if self.server.role != "write" or (owner != "me" and self.server.orgs.get(owner) != "write"):
            raise Refused(403, "", "you have no right to write here")

    def repository(self, repo: str) -> Repository:
        found = self.server.repos.get(repo)
        if found is None:
            raise Refused(*MISSING)
        if found.private:
            try:
                self.need_token()
            except Refused:
                raise Refused(*MISSING) from None
        return found

    def commit_at(self, repo: str, revision: str) -> tuple[str, Files]:
        found = self.repository(repo).find(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # How it is said

    def say(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, says: str, **more: str) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": says}
        if code:
            headers["X-Error-Code"] = code
        body = {"error": says, "errors": [{"message": says}], **more}
        self.reply(status, json.dumps(body).encode(), headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.server.sent[urlsplit(self.path).path] += len(body)
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Tests read what clients say, not what the server does."""


NAME = r"([\w.-]+/[\w.-]+)"
KIND = "/api/(?:models|datasets)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("GET", f"/api/models/{NAME}/auth-check(?:/write)?", Handler.auth_check),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/storage/upload/(.+)", Handler.store),
    ("POST", "/storage/verify/(.+)", Handler.verify),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("GET", f"{KIND}/{NAME}(?:/revision/(.+))?", Handler.info),
    ("GET", f"{KIND}/{NAME}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("POST", f"{KIND}/{NAME}/paths-info/(.+)", Handler.paths_info),
    ("GET HEAD", f"/(?:datasets/)?{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
