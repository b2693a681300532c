"""A server on this machine that speaks as much of the Hugging Face Hub as pushing and loading need; stdlib only.

    with FakeHub({"hf_abc": Account("me")}) as hub:  # who each token is of
        hub.repositories["me/codec"].files(), hub.requests

Processes are pointed at it by `hub.environment(...)`, this one by `hub.use(monkeypatch, ...)`. Large files go by LFS,
the Xet protocol being switched off. Of a real Hub it lacks quotas, gates, pull requests, tags and moved names.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit


LARGE = re.compile(r".*\.(safetensors|bin|parquet|arrow|png|wav|flac)")
REPOSITORY = r"(?P<kind>datasets/|)(?P<name>[\w.-]+/[\w.-]+?)"
API = r"/api/" + REPOSITORY.replace("datasets/|", "models/|datasets/")


@dataclass(frozen=True)
class Account:
    """Who a token is of, and whether it may write: to repositories of this name, never to others."""

    name: str
    may_write: bool = True


@dataclass
class Commit:
    """All files by path, and the paths that the commit named."""

    oid: str
    message: str
    files: dict[str, bytes]
    changed: list[str]


@dataclass
class Repository:
    """Branches by name: their commits, oldest first. Made with one commit, as on the Hub."""

    name: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def __post_init__(self):
        self.branches["main"] = []
        self.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, message: str, added: dict[str, bytes], deleted: tuple[str, ...] = ()) -> Commit:
        commits = self.branches[branch]
        before = commits[-1] if commits else Commit(self.name, "", {}, [])
        gone = [path for path in before.files for name in deleted if f"{path}/".startswith(f"{name.rstrip('/')}/")]
        files = {path: data for path, data in before.files.items() if path not in gone} | added
        parts = [before.oid, message, *(path + blob_id(data) for path, data in files.items())]
        oid = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        commits.append(Commit(oid, message, files, [*added, *gone]))
        return commits[-1]

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch's name or a hash stands for."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((one for commits in self.branches.values() for one in commits if one.oid == revision), None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.at(revision).files


class Refused(Exception):
    """An answer that is an error, with the Hub's code for it and what else is in the body."""

    def __init__(self, status: int, message: str, code: str = "", **body):
        self.status, self.headers = status, {"X-Error-Message": message, "X-Error-Code": code}
        self.body = body | {"error": message}


class FakeHub:
    """The server, running while the block lasts.

    `repositories` are by name, those of data sets by `datasets/` and name. `requests` are (method, path, token or
    None). `failures` maps (method, pattern of paths) to a status, to "cut" for a connection that breaks before
    anything is done, or to "lost" for one that breaks when all is done. `bad_cards` is a pattern of cards to refuse.
    """

    injected = "injected failure"  # the message of failures

    def __init__(self, accounts: dict[str, Account]):
        self.accounts, self.repositories, self.blobs = accounts, {}, {}
        self.requests, self.failures, self.bad_cards = [], {}, None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """For a process: this hub, a home without caches and logins, a token or none."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        new = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return kept | new | ({"HF_TOKEN": token} if token else {})

    def use(self, monkeypatch, home: Path, token: str | None = None) -> None:
        """The same for this process, where huggingface_hub has read its environment already."""
        from huggingface_hub import constants

        monkeypatch.delenv("HF_TOKEN", raising=False)
        for name, value in self.environment(home, token).items():
            monkeypatch.setenv(name, value)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        here = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": True}
        paths = {"HF_HUB_CACHE": "hub", "HF_TOKEN_PATH": "token", "HF_STORED_TOKENS_PATH": "stored_tokens"}
        for name, value in (here | {name: str(home / path) for name, path in paths.items()}).items():
            monkeypatch.setattr(constants, name, value)
        # Transformers asks by one object for all, which keeps the address that it was made with.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)


ROUTES = []


def route(methods: str, pattern: str):
    """A method of Handler that answers these requests, with the pattern's groups; the first that fits does."""

    def register(function):
        ROUTES.append((methods.split(), re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """One connection. A route returns what is sent, as a tuple: JSON or bytes, and headers if there are any."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self):
        url = urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.query = parse_qs(url.query)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.account = self.hub.accounts.get(token)
        self.hub.requests.append((self.command, url.path, token))
        failures = self.hub.failures.items()
        due = [how for (method, path), how in failures if method == self.command and re.search(path, url.path)]
        failure = due[0] if due else ""
        try:
            if isinstance(failure, int):
                raise Refused(failure, self.hub.injected)
            if token and not self.account:
                raise Refused(401, "Invalid credentials in Authorization header")
            answer = (200, *self.find(url.path)) if failure != "cut" else None
        except Refused as error:
            answer = error.status, error.body, error.headers
        if failure in ("cut", "lost"):
            self.close_connection = True
        else:
            self.send(*answer)

    def find(self, path):
        for methods, pattern, function in ROUTES:
            if self.command in methods and (found := pattern.fullmatch(path)):
                return function(self, **{name: unquote(text) for name, text in found.groupdict("").items()})
        raise Refused(404, f"no such route: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status, content, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | dict(headers)).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def repository(self, kind, name, *, write=False) -> Repository:
        """By the rights of whoever asks: what is private is not there for others."""
        found = self.hub.repositories.get(kind.removeprefix("models/") + name)
        owner = self.account and self.account.name == name.split("/")[0]
        if not found or (found.private and not owner):
            raise Refused(404 if self.account else 401, "Repository not found", "RepoNotFound")
        if write and not (owner and self.account.may_write):
            raise Refused(403 if self.account else 401, "Forbidden: write access required")
        return found

    def commit_at(self, kind, name, revision) -> Commit:
        commit = self.repository(kind, name).at(revision or "main")
        if not commit:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ---- repositories and branches

    @route("POST", "/api/repos/create")
    def create(self):
        asked = json.loads(self.body)
        owner = asked.get("organization") or (self.account and self.account.name)
        if not self.account or not self.account.may_write or owner != self.account.name:
            raise Refused(403 if self.account else 401, f"no right to create a repository of {owner}")
        key = ("datasets/" if asked.get("type") == "dataset" else "") + f"{owner}/{asked['name']}"
        if key in self.hub.repositories:
            raise Refused(409, "You already created this repository", url=f"{self.hub.url}/{key}")
        self.hub.repositories[key] = Repository(key, asked.get("visibility") == "private")
        return ({"url": f"{self.hub.url}/{key}"},)

    @route("POST", API + "/branch/(?P<branch>[^/]+)")
    def make_branch(self, kind, name, branch):
        repository = self.repository(kind, name, write=True)
        if branch in repository.branches:
            raise Refused(409, "Reference already exists")
        start = self.commit_at(kind, name, json.loads(self.body or b"{}").get("startingPoint"))
        repository.branches[branch] = [start]
        return ({},)

    @route("GET", API + "/refs")
    def references(self, kind, name):
        branches = self.repository(kind, name).branches.items()
        heads = [
            {"name": one, "ref": f"refs/heads/{one}", "targetCommit": commits[-1].oid} for one, commits in branches
        ]
        return ({"branches": heads, "converts": [], "tags": []},)

    @route("GET", API + "(/revision/(?P<revision>[^/]+))?")
    def about(self, kind, name, revision):
        commit = self.commit_at(kind, name, revision)
        files = [{"rfilename": path} for path in commit.files]
        private = self.repository(kind, name).private
        return ({"id": name, "modelId": name, "sha": commit.oid, "private": private, "tags": [], "siblings": files},)

    # ---- reading

    @route("GET", API + "/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
    def tree(self, kind, name, revision, folder):
        commit = self.commit_at(kind, name, revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        start = f"{folder}/" if folder else ""
        below = [path for path in commit.files if path.startswith(start)]
        if folder and not below:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        folders = {start + part for path in below for part in _parents(path.removeprefix(start))}
        entries = [
            *(directory(path) for path in sorted(folders)),
            *(entry(path, commit.files[path]) for path in below),
        ]
        return ([one for one in entries if recursive or "/" not in one["path"].removeprefix(start)],)

    @route("GET HEAD", f"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def download(self, kind, name, revision, path):
        commit = self.commit_at(kind, name, revision)
        if path not in commit.files:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        data = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{object_id(path, data)}"', "Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), int(found[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        return data, headers

    # ---- writing

    @route("POST", "/api/validate-yaml")
    def validate_card(self):
        if self.hub.bad_cards and re.search(self.hub.bad_cards, json.loads(self.body)["content"]):
            raise Refused(400, "Invalid metadata", errors=[{"message": f"not allowed: {self.hub.bad_cards}"}])
        return ({"errors": [], "warnings": []},)

    @route("POST", API + "/preupload/(?P<revision>[^/]+)")
    def upload_modes(self, kind, name, revision):
        self.repository(kind, name, write=True)
        here = self.commit_at(kind, name, revision).files
        modes = [
            {
                "path": path,
                "uploadMode": "lfs" if is_large(path) else "regular",
                "shouldIgnore": False,
                "oid": object_id(path, here[path]) if path in here else None,
            }
            for path in (file["path"] for file in json.loads(self.body)["files"])
        ]
        return ({"files": modes},)

    @route("POST", f"/{REPOSITORY}.git/info/lfs/objects/batch")
    def announce_objects(self, kind, name):
        self.repository(kind, name, write=True)
        objects = [{"oid": one["oid"], "size": one["size"]} for one in json.loads(self.body)["objects"]]
        for one in objects:
            if one["oid"] not in self.hub.blobs:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}}
        return ({"transfer": "basic", "objects": objects},)

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def store_object(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(422, "content does not match its hash")
        self.hub.blobs[oid] = self.body
        return ({},)

    @route("POST", API + "/commit/(?P<revision>[^/]+)")
    def make_commit(self, kind, name, revision):
        repository = self.repository(kind, name, write=True)
        if revision not in repository.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines()]
        values = {
            kind: [line["value"] for line in lines if line["key"] == kind] for kind in {one["key"] for one in lines}
        }
        added = {one["path"]: base64.b64decode(one["content"]) for one in values.get("file", [])}
        for one in values.get("lfsFile", []):
            if one["oid"] not in self.hub.blobs:
                raise Refused(400, f"{one['path']} was not uploaded")
            added[one["path"]] = self.hub.blobs[one["oid"]]
        deleted = [one["path"] for key in ("deletedFile", "deletedFolder") for one in values.get(key, [])]
        made = repository.commit(revision, values["header"][0]["summary"], added, deleted)
        url = f"{self.hub.url}/{repository.name}/commit/{made.oid}"
        return ({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""},)


def is_large(path: str) -> bool:
    """Whether a file of this name goes by LFS."""
    return bool(LARGE.fullmatch(path))


def object_id(path: str, data: bytes) -> str:
    """By which the client sees that it need not send a file again: SHA-256 of what goes by LFS, or git's."""
    return hashlib.sha256(data).hexdigest() if is_large(path) else blob_id(data)


def blob_id(data: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes) -> dict:
    """A file in a listing."""
    lfs = {"lfs": {"oid": object_id(path, data), "size": len(data), "pointerSize": 134}} if is_large(path) else {}
    return {"type": "file", "path": path, "oid": blob_id(data), "size": len(data)} | lfs


def directory(path: str) -> dict:
    """A folder in a listing."""
    return {"type": "directory", "path": path, "oid": blob_id(path.encode()), "size": 0}


def _parents(path: str) -> list[str]:
    return [str(folder) for folder in PurePosixPath(path).parents][:-1]
