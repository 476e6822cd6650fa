"""A small Hugging Face Hub on the loopback interface, for the unpatched huggingface_hub client.

It speaks the routes that creating, uploading and downloading a model repository need, checks what a client must do right
(hashes of uploads, parents of commits, metadata of the card, no token to the file store), and can be told to fail: answer
with a status, or cut a connection in mid-transfer. As on the Hub, large files lie on a store of another origin, reached by
redirect, that must never see the user's token.

It stores no Xet files: the client must run with ``HF_HUB_DISABLE_XET=1``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LICENSES = ("apache-2.0", "mit", "llama2", "gemma", "other")
RELATIONS = ("adapter", "merge", "quantized", "finetune")
RESUMABLE = re.compile(r"bytes=(\d+)-(\d*)")


class Refusal(Exception):
    """An HTTP error with the Hub's headers."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose ``METHOD /path`` matches ``pattern``."""

    pattern: str
    times: int = 1
    status: int | None = None  # answer with it, else cut the connection ...
    after: int = 0  # ... after this many bytes of the answer's body, or of the request's
    reset: bool = False  # with a TCP reset instead of an orderly end


@dataclass
class Commit:
    """A state of a repository; large files are held as the sha256 of their content."""

    files: dict[str, bytes | str]
    parent: str | None
    message: str


@dataclass
class Repository:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes | str], message: str) -> str:
        parent = self.refs.get(ref)
        content = repr((sorted(files.items()), parent, message)).encode()
        oid = hashlib.sha1(content).hexdigest()
        self.commits[oid] = Commit(files, parent, message)
        self.refs[ref] = oid
        return oid


class HubServer:
    """The Hub's state and its two servers; use as a context manager.

    Attributes:
        tokens: token -> user; a token whose name starts with ``read`` may not write.
        requests: every request so far, ``"METHOD /path"``, the file store's too.
        multipart_above: larger uploads go in parts of this many bytes.
    """

    def __init__(self, tokens: dict[str, str] | None = None) -> None:
        self.tokens = tokens or {"write-token": "org", "read-token": "reader"}
        self.repositories: dict[str, Repository] = {}
        self.store: dict[str, bytes] = {}  # sha256 -> content
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.multipart_above = 1 << 30
        self.lock = threading.RLock()
        self._servers = [self._serve(HubHandler), self._serve(StoreHandler)]
        ports = [server.server_address[1] for server in self._servers]
        # Another name, not only another port: huggingface_hub 1 tells origins apart by the name alone.
        self.endpoint, self.store_endpoint = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"

    def _serve(self, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": self}))
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(self, pattern: str, **fault: object) -> None:
        self.faults.append(Fault(pattern, **fault))

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def files(self, repo_id: str, ref: str = "main") -> dict[str, bytes]:
        """Every file of a repository, large ones included, without the one that the Hub itself adds."""
        repository = self.repositories[repo_id]
        files = repository.commits[repository.refs.get(ref, ref)].files
        return {p: self.content(f) for p, f in files.items() if p != ".gitattributes"}

    def content(self, stored: bytes | str) -> bytes:
        return stored if isinstance(stored, bytes) else self.store[stored]

    def head(self, repo_id: str, ref: str = "main") -> str:
        return self.repositories[repo_id].refs[ref]


class Handler(BaseHTTPRequestHandler):
    """What both servers share: reading bodies, answering, failing on demand."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    fault: Fault | None = None

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        request = f"{self.command} {unquote(url.path)}"
        self.hub.requests.append(request)
        self.fault = self.hub.fault_for(request)
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault and self.fault.status is None and self.command in ("PUT", "POST"):
            self.rfile.read(min(self.fault.after, length))
            return self.cut()
        self.body = self.rfile.read(length)
        try:
            if self.fault and self.fault.status is not None:
                raise Refusal(self.fault.status, "as the test asked")
            with self.hub.lock:
                self.route(url.path)
        except Refusal as refusal:
            self.answer(refusal.status, {"error": refusal.message}, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def route(self, path: str) -> None:
        for method, pattern, function in self.routes:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return function(self, *map(unquote, match.groups()))
        raise Refusal(404, f"no route {self.command} {path}")

    def json(self) -> dict:
        return json.loads(self.body)

    def answer(self, status: int, content: object = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.status is None:
            self.wfile.write(data[: self.fault.after])
            self.wfile.flush()
            return self.cut()
        self.wfile.write(data)

    def cut(self) -> None:
        self.close_connection = True
        if self.fault and self.fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    def answer_file(self, data: bytes, headers: dict[str, str]) -> None:
        """The whole file, or the part of it that a Range header asks for."""
        asked = RESUMABLE.fullmatch(self.headers.get("Range", ""))
        if asked is None:
            return self.answer(200, data, {"Accept-Ranges": "bytes", **headers})
        start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if start >= len(data):
            raise Refusal(416, "range", **{"Content-Range": f"bytes */{len(data)}"})
        self.answer(206, data[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(data)}", **headers})


class StoreHandler(Handler):
    """The store of large files: presigned addresses, no tokens."""

    def handle_any(self) -> None:
        if "Authorization" in self.headers:
            return self.answer(400, {"error": "the user's token was sent to the file store"})
        super().handle_any()

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def get(self, oid: str) -> None:
        self.answer_file(self.hub.store[oid], {"ETag": f'"{oid}"'})

    def put(self, oid: str) -> None:
        self._keep(oid, self.body)
        self.answer(200)

    def put_part(self, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = self.body
        self.answer(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in self.json()["parts"]]
        self._keep(oid, b"".join(self.hub.parts.pop((oid, number)) for number in numbers))
        self.answer(200, {})

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "the content's sha256 is another one than announced")
        self.hub.store[oid] = data

    routes = (
        (("GET", "HEAD"), r"/get/(\w+)", get),
        (("PUT",), r"/put/(\w+)", put),
        (("PUT",), r"/put/(\w+)/(\d+)", put_part),
        (("POST",), r"/complete/(\w+)", complete),
    )


class HubHandler(Handler):
    """The Hub itself."""

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def user(self) -> str:
        if self.token not in self.hub.tokens:
            raise Refusal(401, "Invalid username or password.")
        return self.hub.tokens[self.token]

    def readable(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository and not repository.private:
            return repository
        # A stranger does not learn whether a private repository exists.
        if self.token not in self.hub.tokens:
            raise Refusal(401, "Repository not found", "RepoNotFound")
        if repository is None or self.hub.tokens[self.token] != repo_id.split("/")[0]:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, repo_id: str) -> Repository:
        repository = self.readable(repo_id)
        self.require_owner(repo_id.split("/")[0])
        return repository

    def require_owner(self, namespace: str) -> None:
        if self.user() != namespace or self.token.startswith("read"):
            raise Refusal(403, f"You don't have the rights to write to the namespace {namespace}")

    def at(self, repo_id: str, revision: str) -> tuple[str, Commit]:
        repository = self.readable(repo_id)
        oid = repository.refs.get(revision, revision)
        if oid not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.commits[oid]

    def whoami(self) -> None:
        self.answer(200, {"type": "user", "name": self.user(), "orgs": []})

    def create_repository(self) -> None:
        asked = self.json()
        namespace = asked.get("organization") or self.user()
        repo_id = f"{namespace}/{asked['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        self.require_owner(namespace)
        if repo_id in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": url, "id": repo_id})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[repo_id] = Repository(private)
        self.hub.repositories[repo_id].commit("main", {".gitattributes": b"*.safetensors lfs\n"}, "initial commit")
        self.answer(200, {"url": url, "id": repo_id})

    def validate_card(self) -> None:
        text = self.json()["content"]
        front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        values = yaml.safe_load(front[1]) if front else {}
        base = values.get("base_model", [])
        errors = [
            f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
            for name in ([base] if isinstance(base, str) else base)
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
        ]
        for key, known in (("license", LICENSES), ("base_model_relation", RELATIONS)):
            if key in values and values[key] not in known:
                errors.append(f'"{key}" must be one of {", ".join(known)}')
        if errors:
            return self.answer(400, {"errors": [{"message": error} for error in errors], "warnings": []})
        warnings = [] if front else [{"message": "empty or missing yaml metadata in repo card"}]
        self.answer(200, {"errors": [], "warnings": warnings})

    def info(self, repo_id: str, revision: str = "main") -> None:
        oid, commit = self.at(repo_id, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        private = self.hub.repositories[repo_id].private
        self.answer(200, {"_id": oid[:24], "id": repo_id, "sha": oid, "private": private, "siblings": siblings})

    def refs(self, repo_id: str) -> None:
        refs = [
            {"name": n, "ref": f"refs/heads/{n}", "targetCommit": o} for n, o in self.readable(repo_id).refs.items()
        ]
        self.answer(200, {"branches": refs, "converts": [], "tags": []})

    def tree(self, repo_id: str, revision: str) -> None:
        files = self.at(repo_id, revision)[1].files
        self.answer(
            200,
            [{"type": "file", "path": p, "size": len(self.hub.content(f)), "oid": etag(f)} for p, f in files.items()],
        )

    def branch(self, repo_id: str, name: str) -> None:
        repository = self.writable(repo_id)
        if name in repository.refs:
            raise Refusal(409, f"Reference already exists: {name}")
        repository.refs[name] = repository.refs["main"]
        self.answer(200, {})

    def preupload(self, repo_id: str, revision: str) -> None:
        self.writable(repo_id)
        oid, commit = self.at(repo_id, revision)
        files = []
        for file in self.json()["files"]:
            binary = b"\0" in base64.b64decode(file["sample"]) or file["path"].endswith(".safetensors")
            entry = {"path": file["path"], "uploadMode": "lfs" if binary else "regular", "shouldIgnore": False}
            stored = commit.files.get(file["path"])
            files.append(entry | ({"oid": etag(stored)} if stored is not None else {}))
        self.answer(200, {"files": files, "commitOid": oid})

    def lfs_batch(self, repo_id: str) -> None:
        self.writable(repo_id)
        asked, store = self.json(), self.hub.store_endpoint
        objects = []
        for entry in asked["objects"]:
            oid, size = entry["oid"], entry["size"]
            answer = {"oid": oid, "size": size, "authenticated": True}
            if oid not in self.hub.store:
                upload: dict = {"href": f"{store}/put/{oid}"}
                if size > self.hub.multipart_above and "multipart" in asked["transfers"]:
                    count = -(-size // self.hub.multipart_above)
                    parts = {str(n): f"{store}/put/{oid}/{n}" for n in range(1, count + 1)}
                    header = {"chunk_size": str(self.hub.multipart_above), **parts}
                    upload = {"href": f"{store}/complete/{oid}", "header": header}
                answer["actions"] = {"upload": upload}
            objects.append(answer)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self.writable(repo_id)
        head, current = self.at(repo_id, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        files, summary = dict(current.files), ""
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                summary = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if len(self.hub.store.get(value["oid"], b"")) != value["size"]:
                    raise Refusal(400, f"the LFS object of {value['path']} was never uploaded")
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"unknown operation {key}")
        answer = {"success": True}
        if self.query.get("create_pr"):
            number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
            repository.refs[revision := f"refs/pr/{number}"] = head
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{number}"
        oid = repository.commit(revision, files, summary)
        self.answer(200, answer | {"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}"})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        oid, commit = self.at(repo_id, revision)
        headers = {"X-Repo-Commit": oid}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        stored = commit.files[path]
        if isinstance(stored, bytes):
            return self.answer_file(stored, {"ETag": f'"{etag(stored)}"', **headers})
        size = str(len(self.hub.store[stored]))
        linked = {"X-Linked-Etag": f'"{stored}"', "X-Linked-Size": size}
        self.answer(302, b"", {"Location": f"{self.hub.store_endpoint}/get/{stored}", **linked, **headers})

    _REPO, _REV = r"([^/]+/[^/]+)", r"([^/]+)"
    routes = (
        (("GET",), r"/api/whoami-v2", whoami),
        (("POST",), r"/api/repos/create", create_repository),
        (("POST",), r"/api/validate-yaml", validate_card),
        (("GET",), rf"/api/models/{_REPO}", info),
        (("GET",), rf"/api/models/{_REPO}/revision/{_REV}", info),
        (("GET",), rf"/api/models/{_REPO}/refs", refs),
        (("GET",), rf"/api/models/{_REPO}/tree/{_REV}", tree),
        (("POST",), rf"/api/models/{_REPO}/branch/{_REV}", branch),
        (("POST",), rf"/api/models/{_REPO}/preupload/{_REV}", preupload),
        (("POST",), rf"/api/models/{_REPO}/commit/{_REV}", commit),
        (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", lfs_batch),
        (("GET", "HEAD"), rf"/{_REPO}/resolve/{_REV}/(.+)", resolve),
    )


def etag(stored: bytes | str) -> str:
    """As git names a file: the sha1 of a small one's blob, the sha256 of a large one's content."""
    if isinstance(stored, str):
        return stored
    return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
