"""A small Hub on the loopback address: what huggingface_hub's client asks for to create, fill and read a repository.

Regular files lie in commits, large ones behind a redirect to another host name, as on the real Hub. Faults can be asked for.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit


class Repo:
    """A repository: its commits, oldest first, each a name and all its files."""

    def __init__(self, private: bool = False) -> None:
        self.private, self.gated = private, False
        self.commits: list[tuple[str, dict[str, bytes]]] = []

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit on top of the last."""
        content = {**(self.commits[-1][1] if self.commits else {}), **files}
        name = hashlib.sha1(repr((len(self.commits), sorted(content.items()))).encode()).hexdigest()
        self.commits.append((name, content))
        return name

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Find a commit by its name, or the last one as main."""
        if revision == "main" and self.commits:
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub:
    """The server; a context manager. ``cut`` names files to end half-way, ``errors`` counts down requests answered by 503.

    A client sets both by ``GET /test/<name of a .safetensors to cut>/<errors>``.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut: set[str] = set()
        self.errors = 0
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.http.shutdown()
        self.http.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes | dict[str, Any] = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        extra = {"X_Error_Code": code} if code else {}
        self.reply(status, {"error": message}, X_Error_Message=message, **extra)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/test/(\w*)/(\d+)", path):  # a client asks for faults
            self.hub.cut, self.hub.errors = {match[1] + ".safetensors"} - {".safetensors"}, int(match[2])
            return self.reply(200)
        if self.hub.errors and "/resolve/" in path:
            self.hub.errors -= 1
            return self.refuse(503, "", "Service Unavailable")
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            return self.send_object(match[1])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.send_file(*match.groups())
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repo = self.hub.repos.get(match[1])
            if repo is None:
                return self.refuse(401, "RepoNotFound", "Invalid username or password.")
            name, files = repo.files(match[2] or "main") or ("", {})
            siblings = [{"rfilename": file} for file in files]
            return self.reply(200, {"id": match[1], "sha": name, "private": repo.private, "siblings": siblings, "tags": []})
        return self.refuse(404, "", f"no such page: {path}")

    def send_file(self, repo_id: str, revision: str, name: str) -> None:
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return self.refuse(401, "RepoNotFound", "Invalid username or password.")
        if repo.gated:
            return self.refuse(403, "GatedRepo", f"Access to model {repo_id} is restricted.")
        found = repo.files(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = found
        if name not in files:
            return self.refuse(404, "EntryNotFound", f"{name} does not exist")
        data = files[name]
        if not name.endswith(".safetensors"):
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.reply(200, data, X_Repo_Commit=commit, ETag=etag)
        digest = hashlib.sha256(data).hexdigest()
        self.hub.objects[digest] = data
        if name in self.hub.cut:
            self.hub.cut.add(digest)
        return self.reply(
            302,
            X_Repo_Commit=commit,
            X_Linked_ETag=f'"{digest}"',
            X_Linked_Size=str(len(data)),
            Location=f"http://localhost:{self.hub.port}/lfs/{digest}",
        )

    def send_object(self, digest: str) -> None:
        data = self.hub.objects[digest]
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if digest in self.hub.cut:  # as much as was promised is never sent
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        extra = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.reply(206 if start else 200, data[start:], ETag=f'"{digest}"', **extra)

    def do_PUT(self) -> None:
        data = self.body()
        self.hub.objects[hashlib.sha256(data).hexdigest()] = data
        self.reply(200)

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.hub.requests.append(f"POST {path}")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self.reply(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self.commit(match[1], body)
        return self.refuse(404, "", f"no such page: {path}")

    def create(self, request: dict[str, Any]) -> None:
        name = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            return self.reply(409, {**url, "error": "You already created this model repo"})
        private = bool(request.get("private")) or request.get("visibility") == "private"
        self.hub.repos[name] = Repo(private)
        self.hub.repos[name].commit({})
        return self.reply(200, url)

    def commit(self, repo: str, body: bytes) -> None:
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        name = self.hub.repos[repo].commit(files)
        url = f"{self.hub.endpoint}/{repo}/commit/{name}"
        self.reply(200, {"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""})
