"""The HTTP interface of the Hugging Face hub on loopback: repositories of models and data sets in memory.

with HubServer() as hub, hub.client(monkeypatch, tmp_path):
    hub.add("models", "owner/name", {"config.json": b"{}"})
    hub.faults += [("POST .*/commit/", LATE)]
    ... the real huggingface_hub client ...
    assert hub.head("owner/name").files == ...
"""

import base64
import hashlib
import itertools
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants

DROP, LATE = "<drop>", "<late>"
"""A connection that is closed before the request has an effect, and one that is closed after it."""
ACCOUNTS = {
    "hf_writes": {"name": "owner", "orgs": [{"name": "group"}], "auth": {"accessToken": {"role": "write"}}},
    "hf_reads": {"name": "owner", "orgs": [], "auth": {"accessToken": {"role": "read"}}},
    "hf_narrow": {"name": "owner", "orgs": [], "auth": {"accessToken": {"role": "fineGrained"}}},
}
"""What the hub says of each token. The narrow one may only read, which only a refusal tells."""
REFUSAL = {
    401: (401, "", "Invalid credentials in Authorization header"),
    403: (403, "", "you have no write access"),
    "repository": (404, "RepoNotFound", "Repository not found"),
    "revision": (404, "RevisionNotFound", "Invalid rev id"),
    "file": (404, "EntryNotFound", "Entry not found"),
}


@dataclass
class Commit:
    """A commit: its id, message and files."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """The commits of a repository, the newest last, and which of its files are stored by LFS."""

    private: bool = True
    commits: list[Commit] = field(default_factory=list)
    large: set[str] = field(default_factory=set)


class Refused(Exception):
    """A request that gets an error: status, error code, message."""


class HubServer(ThreadingHTTPServer):
    """The server, as a context.

    Attributes:
        repositories: by (models or datasets, owner/name).
        stored: uploaded large files by SHA-256.
        faults: (regular expression of "METHOD path", DROP, LATE or an HTTP status); the first that fits a request is
            taken, and removed.
        requests: "METHOD path" of every request.
        refusals: models that nobody may read, each with HTTP status and error code.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        self.repositories, self.stored, self.faults, self.requests, self.refusals = {}, {}, [], [], {}
        self.numbers = itertools.count(1)
        self.guard = threading.RLock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self):
        """What HF_ENDPOINT names."""
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        """Say nothing: clients that give up are part of the plan."""

    @contextmanager
    def client(self, monkeypatch, home, token=None):
        """Let the libraries of this process take the server for the hub, as HF_ENDPOINT, HF_HOME, HF_TOKEN and
        HF_HUB_DISABLE_XET would before they are imported. Undone with what the test itself patches, last first."""
        from csc_train import hub_access

        monkeypatch.setattr(constants, "ENDPOINT", self.address)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"{self.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
        hub_access._hub_answers.cache_clear()
        yield self
        hub_access._hub_answers.cache_clear()

    def add(self, kind, name, files, message="first", private=True):
        """Commit files, over those of the last commit; None removes one. Returns the commit's id."""
        repository = self.repositories.setdefault((kind, name), Repository(private))
        before = repository.commits[-1].files if repository.commits else {}
        after = {path: content for path, content in {**before, **files}.items() if content is not None}
        oid = hashlib.sha1(b"%d" % next(self.numbers)).hexdigest()
        repository.commits.append(Commit(oid, message, after))
        return oid

    def head(self, name, kind="models"):
        """The newest commit of a repository."""
        return self.repositories[kind, name].commits[-1]


def git_hash(content):
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers a request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_any(self):
        """Read the request, and answer it or fail as planned."""
        hub, request = self.server, f"{self.command} {self.path}"
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self.read_chunks()
        with hub.guard:
            hub.requests.append(request)
            fault = next((each for each in hub.faults if re.match(each[0], request)), (None, None))
            if fault[0]:
                hub.faults.remove(fault)
            try:
                if fault[1] == DROP:
                    raise ConnectionError
                if isinstance(fault[1], int):
                    raise Refused(fault[1], "", "planned")
                answer = self.answer(body)
                if fault[1] == LATE:
                    raise ConnectionError
            except Refused as refused:
                status, code, message = refused.args
                headers = {"X-Error-Code": code, "X-Error-Message": message}
                return self.send(status, json.dumps({"error": message}).encode(), headers)
            except ConnectionError:
                self.close_connection = True
                return None
        return self.send(*answer) if isinstance(answer, tuple) else self.send(200, json.dumps(answer).encode())

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_chunks(self):
        """The body of a request without a length."""
        whole = b""
        while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
            whole += self.rfile.read(size)
            self.rfile.readline()
        return whole

    def send(self, status, content, headers=()):
        """Send an answer."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def account(self, writes=False):
        """Whose token it is."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in ACCOUNTS:
            raise Refused(*REFUSAL[401])
        if writes and token != "hf_writes":
            raise Refused(*REFUSAL[403 if token else 401])
        return ACCOUNTS.get(token)

    def repository(self, kind, name, revision="main"):
        """A repository, and the commit that a revision names."""
        for model, (status, code) in self.server.refusals.items():
            if model == name:
                raise Refused(status, code, "")
        found = self.server.repositories.get((kind, name))
        if found is None or (found.private and not self.account()):
            raise Refused(*REFUSAL["repository"])
        if revision == "main" and not found.commits:
            return found, Commit("", "", {})
        for commit in found.commits[::-1]:
            if revision in ("main", commit.oid, commit.message):
                return found, commit
        raise Refused(*REFUSAL["revision"])

    def answer(self, body):
        """What a request gets: (status, content, headers), or an object."""
        url = urlsplit(self.path)
        path = unquote(url.path)
        if path == "/api/whoami-v2":
            if (account := self.account()) is None:
                raise Refused(*REFUSAL[401])
            return account
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            self.account(writes=True)
            return {"objects": [self.place(each) for each in json.loads(body)["objects"]]}
        if found := re.fullmatch(r"/stored/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != found[1]:
                raise Refused(400, "", "another file")
            self.server.stored[found[1]] = body
            return {}
        if found := re.fullmatch(
            r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(revision|tree|preupload|commit)/([^/]+)(?:/(.*))?)?", path
        ):
            kind, name, action, revision, rest = found.groups()
            if action in ("preupload", "commit"):
                self.account(writes=True)
                repository, commit = self.repository(kind, name, revision)
                return getattr(self, action)(kind, name, repository, commit, body)
            repository, commit = self.repository(kind, name, revision or "main")
            if action == "tree":
                return self.tree(
                    repository, commit, rest or "", "true" in str(parse_qs(url.query).get("recursive")).lower()
                )
            files = [{"rfilename": file} for file in commit.files]
            return {"id": name, "sha": commit.oid or None, "private": repository.private, "siblings": files}
        if found := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.*)", path):
            _, commit = self.repository("datasets" if found[1] else "models", found[2], found[3])
            if found[4] not in commit.files:
                raise Refused(*REFUSAL["file"])
            return self.resolve(commit, commit.files[found[4]])
        raise Refused(404, "", "no such page")

    def resolve(self, commit, content):
        """A file, or the part of it that is asked for."""
        facts = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": commit.oid,
            "Accept-Ranges": "bytes",
        }
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            facts["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return 206, content[start : end + 1], facts
        return 200, content, facts

    def tree(self, repository, commit, folder, recursive):
        """The files of a commit under a folder."""
        rows, inside = [], f"{folder}/" if folder else ""
        for path, content in commit.files.items():
            if not path.startswith(inside):
                continue
            if not recursive and "/" in path.removeprefix(inside):
                row = {
                    "type": "directory",
                    "path": inside + path.removeprefix(inside).split("/")[0],
                    "oid": "0",
                    "size": 0,
                }
                rows += [] if row in rows else [row]
                continue
            row = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if path in repository.large:
                row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            rows.append(row)
        return rows

    def create(self, asked):
        """Create a repository with a first commit, as the hub does."""
        account = self.account(writes=True)
        name = f"{asked.get('organization') or account['name']}/{asked['name']}"
        answer = {"url": f"{self.server.address}/{name}", "name": name}
        if ("models", name) in self.server.repositories:
            return 409, json.dumps(answer | {"error": "You already created this model repo"}).encode()
        self.server.add(
            "models",
            name,
            {".gitattributes": b"*.safetensors lfs\n"},
            "initial commit",
            asked["visibility"] == "private",
        )
        return answer

    def place(self, asked):
        """Where a large file is to be put; no place if it is stored already."""
        found = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] in self.server.stored:
            return found
        href = f"{self.server.address}/stored/{asked['oid']}?X-Signature=hf_signed"
        return found | {"actions": {"upload": {"href": href}}}

    def preupload(self, kind, name, repository, commit, body):
        """How each file is to be uploaded, and which the repository has."""
        answer = []
        for path in (each["path"] for each in json.loads(body)["files"]):
            large, held = path.endswith(".safetensors"), commit.files.get(path)
            oid = None if held is None else hashlib.sha256(held).hexdigest() if large else git_hash(held)
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "shouldIgnore": False, "uploadMode": mode, "oid": oid})
        return {"files": answer}

    def commit(self, kind, name, repository, commit, body):
        """Commit files that are in the body or stored; refused on another parent than the newest."""
        header, *entries = [(row["key"], row["value"]) for row in map(json.loads, body.splitlines())]
        if header[1].get("parentCommit", commit.oid) != commit.oid:
            raise Refused(412, "", "A commit has happened since")
        files = {}
        for key, value in entries:
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.stored:
                    raise Refused(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.stored[value["oid"]]
                repository.large.add(value["path"])
            else:
                files[value["path"]] = None
        oid = self.server.add(kind, name, files, header[1]["summary"])
        return {"commitUrl": f"{self.server.address}/{name}/commit/{oid}", "commitOid": oid, "success": True}

    def log_message(self, *_):
        """Silent."""
