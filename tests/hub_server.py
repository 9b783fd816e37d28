"""A model hub on 127.0.0.1 for tests: the part of the Hub's API that huggingface_hub uses, backed by a folder.

    with HubServer(folder) as hub:
        subprocess.run(..., env={**os.environ, **hub.environment(cache)})

It serves repositories with commits, branches and pull requests, LFS uploads, and downloads with ranges and ETags, and
fails when asked to: see [`HubServer.fail`]. The client reads its environment at import, so run it in a process of its
own. Without Xet (`HF_HUB_DISABLE_XET`), which this does not speak.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


WRITER, READER = "hf_test_token_that_may_write", "hf_test_token_that_may_only_read"
LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 gpl gpl-2.0 gpl-3.0 agpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql unlicense zlib unknown other""".split()
LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".pt", ".pth")


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method whose path matches; see [`HubServer.fail`]."""

    method: str
    path: str
    kind: str | int
    times: int
    at: int


class Refusal(Exception):
    """An answer with an error status, and what the client reads from its headers."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        self.status, self.body = status, {"error": message}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


def metadata_errors(card: str) -> list[str]:
    """What the Hub refuses in a model card's metadata, as far as it says so.

    Licences are those that its refusal of another lists (huggingface_hub issue 4218), the rest is what its
    specification calls required (hub-docs, modelcard.md) and what `license: other` takes (repositories-licenses.md).
    """
    block = re.match(r"\s*---\r?\n([\S\s]*?)\r?\n---[ \t]*(\r?\n|$)", card)
    if not block:
        return ["no metadata"]
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    errors, licence = [], metadata.get("license")
    if licence is not None and licence not in LICENSES:
        errors.append(f'"license" must be one of {LICENSES}')
    if licence == "other":
        if not re.fullmatch(r"[a-z0-9-.]+", str(metadata.get("license_name"))):
            errors.append('"license_name" must be an id like my-license-1.0')
        if not re.fullmatch(r"LICENSE(\.md)?|https?://\S+", str(metadata.get("license_link"))):
            errors.append('"license_link" must be LICENSE, LICENSE.md or a URL')
    for dataset in metadata.get("datasets") or []:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset):
            errors.append(f'"datasets" must be names of the Hub, got {dataset!r}')
    for model in metadata.get("model-index") or []:
        errors += [f'"model-index" lacks {name}' for name in ("name", "results") if name not in model]
        for result in model.get("results") or []:
            for part, names in {"task": ["type"], "dataset": ["type", "name"]}.items():
                missing = [name for name in names if not result.get(part, {}).get(name)]
                errors += [f'"model-index" lacks {part}.{name}' for name in missing]
            for metric in result.get("metrics") or [{}]:
                errors += [f'"model-index" lacks metrics.{name}' for name in ("type", "value") if name not in metric]
    return errors


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Commits as `{"id", "message", "parent", "files": {path: {"oid", "size", "lfs"}}}`, and refs that point there."""

    private: bool = False
    commits: dict[str, dict] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, dict], message: str, parent: str | None) -> str:
        content = json.dumps([parent, files, message, time.time_ns()], sort_keys=True).encode()
        commit = hashlib.sha1(content).hexdigest()
        self.commits[commit] = {"id": commit, "message": message, "parent": parent, "files": files}
        self.refs[ref] = commit
        return commit

    def find(self, revision: str) -> dict:
        revision = revision.removeprefix("refs/heads/")
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit]

    def history(self, revision: str = "main") -> list[str]:
        """Messages of the commits, the newest first."""
        messages, commit = [], self.find(revision)
        while True:
            messages.append(commit["message"])
            if commit["parent"] is None:
                return messages
            commit = self.commits[commit["parent"]]


class HubServer(ThreadingHTTPServer):
    """The hub. `log` has every request as (method, path, range header or None, status or what failed)."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.lock = Path(folder), threading.RLock()
        self.faults: list[Fault] = []
        self.log: list[tuple] = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # clients may leave in the middle of an answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """Variables for a client that keeps its cache in `home`."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return {**variables, "HF_HUB_DISABLE_TELEMETRY": "1", **({"HF_TOKEN": token} if token else {})}

    def fail(self, method: str, path: str, kind: str | int, times: int = 1, at: int = 0) -> None:
        """Let the next `times` requests of this method, whose path matches the regular expression, go wrong.

        Args:
            kind: a status; `"drop"`: the connection closes without an answer; `"cut"`: it closes after `at` bytes of
                the body; `"flip"`: the bit at byte `at` of the body is wrong; `"lost"`: all is done, but the
                connection closes instead of an answer; `"race"`: somebody else commits just before.
        """
        self.faults.append(Fault(method, path, kind, times, at))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    if fault.times == 0:
                        self.faults.remove(fault)
                    return fault
        return None

    def blob(self, repo_id: str, oid: str) -> Path:
        return self.folder / f"{repo_id}.blobs" / oid

    def repository(self, repo_id: str) -> Repository:
        path = self.folder / f"{repo_id}.json"
        if not path.exists():
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return Repository(**json.loads(path.read_text()))

    def save(self, repo_id: str, repository: Repository) -> None:
        path = self.folder / f"{repo_id}.json"
        path.write_text(json.dumps(vars(repository)))

    def create(self, repo_id: str, private: bool = False) -> Repository:
        """A new repository with one commit, which holds `.gitattributes`, as the Hub makes it."""
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
        repository = Repository(private)
        self.blob(repo_id, "").mkdir(parents=True)
        repository.commit("main", {".gitattributes": self.add_blob(repo_id, attributes)}, "initial commit", None)
        self.save(repo_id, repository)
        return repository

    def add_blob(self, repo_id: str, content: bytes) -> dict:
        oid = git_oid(content)
        self.blob(repo_id, oid).write_bytes(content)
        return {"oid": oid, "size": len(content), "lfs": None}

    def commit_from_elsewhere(self, repo_id: str, path: str = "NEWS.md", content: bytes = b"by others\n") -> None:
        """Somebody else's commit, which adds a file to `main`."""
        repository = self.repository(repo_id)
        head = repository.find("main")
        files = {**head["files"], path: self.add_blob(repo_id, content)}
        repository.commit("main", files, "from elsewhere", head["id"])
        self.save(repo_id, repository)

    def content(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """A file of a repository, from the disk."""
        return self.blob(repo_id, self.repository(repo_id).find(revision)["files"][path]["oid"]).read_bytes()


class Handler(BaseHTTPRequestHandler):
    """One request: authorise, look for a fault, find the route, answer in JSON or with a file."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/preupload/(?P<revision>.+)", "preupload"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/commit/(?P<revision>.+)", "commit"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/branch/(?P<branch>.+)", "create_branch"),
        (
            "GET",
            r"/api/(?:models/)?(?P<repo_id>(?:datasets/)?[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?",
            "tree",
        ),
        ("GET", r"/api/(?:models/)?(?P<repo_id>(?:datasets/)?[^/]+/[^/]+)/revision/(?P<revision>.+)", "model_info"),
        ("GET", r"/api/(?:models/)?(?P<repo_id>(?:datasets/)?[^/]+/[^/]+)", "model_info"),
        ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("POST", r"/lfs/(?P<repo_id>[^/]+/[^/]+)/verify", "lfs_verify"),
        ("GET", r"/(?P<repo_id>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def do_GET(self):
        self.fault = self.server.take_fault(self.command, self.path)
        try:
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Transfer-Encoding") == "chunked":
                self.body = self.read_chunks()
            self.handle_request()
        except Refusal as refusal:
            self.answer(refusal.body, refusal.status, refusal.headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def read_chunks(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def handle_request(self):
        self.query = parse_qs(urlsplit(self.path).query)
        kind = self.fault and self.fault.kind
        if isinstance(kind, int):
            raise Refusal(kind, "this hub fails as asked")
        if kind == "drop":
            return self.hang_up("dropped")
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, name in self.ROUTES:
            if route_method == method and (match := re.fullmatch(pattern, urlsplit(self.path).path)):
                values = {key: value and unquote(value) for key, value in match.groupdict().items()}
                with self.server.lock:
                    self.authorise(is_write=method != "GET" and name not in ("validate_yaml", "lfs_verify", "lfs_put"))
                    if kind == "race":
                        self.server.commit_from_elsewhere(values["repo_id"])
                    answer = getattr(self, name)(**values)
                return self.hang_up("answer lost") if kind == "lost" else answer()
        raise Refusal(404, f"this hub has no {self.command} {self.path}")

    def authorise(self, is_write: bool):
        header = self.headers.get("Authorization")
        self.token = header and header.removeprefix("Bearer ")
        if self.token is not None and self.token not in (WRITER, READER):
            raise Refusal(401, "Invalid credentials in Authorization header")
        if is_write and self.token is None:
            raise Refusal(401, "Invalid username or password.")
        if is_write and self.token == READER:
            raise Refusal(403, "This token may only read: it lacks the write role")

    def repository(self, repo_id: str) -> Repository:
        repository = self.server.repository(repo_id)
        if repository.private and self.token is None:
            raise Refusal(401, "Repository not found", "RepoNotFound")
        return repository

    # Answers

    def hang_up(self, what: str):
        self.server.log.append((self.command, self.path, self.headers.get("Range"), what))
        self.close_connection = True

    def json(self, value, status: int = 200):
        return lambda: self.answer(value, status)

    def answer(self, value, status: int = 200, headers: dict | None = None):
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, body: bytes, status: int, headers: dict):
        self.server.log.append((self.command, self.path, self.headers.get("Range"), status))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.kind == "flip":
            at = self.fault.at % len(body)
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        if self.fault and self.fault.kind == "cut":
            body, self.close_connection = body[: self.fault.at], True
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass

    # Accounts and repositories

    def whoami(self):
        if self.token is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if self.token == WRITER else "read"
        user = {"type": "user", "name": "tester", "fullname": "Tester", "orgs": [{"type": "org", "name": "org"}]}
        return self.json({**user, "auth": {"type": "access_token", "accessToken": {"role": role}}})

    def create_repo(self):
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or 'tester'}/{request['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id}
        if (self.server.folder / f"{repo_id}.json").exists():
            return self.json({**answer, "error": "You already created this model repo"}, 409)
        self.server.create(repo_id, private=request.get("visibility") == "private" or request.get("private") is True)
        return self.json(answer)

    def validate_yaml(self):
        errors = metadata_errors(json.loads(self.body)["content"])
        return self.json({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

    def create_branch(self, repo_id: str, branch: str):
        repository = self.repository(repo_id)
        if branch in repository.refs:
            raise Refusal(409, f"Reference already exists: {branch}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.refs[branch] = repository.find(start)["id"]
        self.server.save(repo_id, repository)
        return self.json({})

    # Uploads

    def preupload(self, repo_id: str, revision: str):
        present = self.repository(repo_id).find(revision)["files"]
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            oid = present.get(file["path"], {}).get("oid")
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.json({"files": files, "commitOid": ""})

    def lfs_batch(self, repo_id: str):
        self.repository(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            if not self.server.blob(repo_id, wanted["oid"]).exists():
                base = f"{self.server.url}/lfs/{repo_id}"
                actions = {"upload": {"href": f"{base}/{wanted['oid']}"}, "verify": {"href": f"{base}/verify"}}
                wanted = {**wanted, "actions": actions}
            objects.append(wanted)
        return self.json({"transfer": "basic", "objects": objects})

    def lfs_put(self, repo_id: str, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have the SHA-256 that was announced")
        self.server.blob(repo_id, oid).write_bytes(self.body)
        return self.json({})

    def lfs_verify(self, repo_id: str):
        request = json.loads(self.body)
        blob = self.server.blob(repo_id, request["oid"])
        if not blob.exists() or blob.stat().st_size != request["size"]:
            raise Refusal(404, "the object did not arrive")
        return self.json({})

    def commit(self, repo_id: str, revision: str):
        repository = self.repository(repo_id)
        head = repository.find(revision)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit") not in (None, head["id"]):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head["files"])
        for operation in operations:
            self.apply(repo_id, operation["key"], operation["value"], files)
        answer = {"success": True}
        if "create_pr" in self.query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.server.url}/{repo_id}/discussions/{number}"
        commit = repository.commit(revision, files, header["value"]["summary"], head["id"])
        self.server.save(repo_id, repository)
        return self.json({**answer, "commitUrl": f"{self.server.url}/{repo_id}/commit/{commit}", "commitOid": commit})

    def apply(self, repo_id: str, kind: str, value: dict, files: dict):
        if kind == "file":
            files[value["path"]] = self.server.add_blob(repo_id, base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            blob = self.server.blob(repo_id, value["oid"])
            if not blob.exists():
                raise Refusal(400, f"LFS object {value['oid']} was not uploaded")
            lfs = {"oid": value["oid"], "size": blob.stat().st_size, "pointerSize": 134}
            files[value["path"]] = {"oid": value["oid"], "size": lfs["size"], "lfs": lfs}
        elif kind == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise Refusal(400, f"this hub knows no operation {kind!r}")

    # Reading

    def model_info(self, repo_id: str, revision: str = "main"):
        repository = self.repository(repo_id)
        commit = repository.find(revision)
        siblings = [{"rfilename": path} for path in commit["files"]]
        info = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit["id"], "siblings": siblings}
        if "README.md" in commit["files"]:
            card = self.server.blob(repo_id, commit["files"]["README.md"]["oid"]).read_text()
            if tag := re.search(r"^pipeline_tag: (.+)$", card, flags=re.MULTILINE):
                info |= {"pipeline_tag": tag[1], "library_name": "transformers"}
        return self.json({**info, "private": repository.private, "gated": False, "disabled": False, "tags": []})

    def tree(self, repo_id: str, revision: str, path: str | None = None):
        files = self.repository(repo_id).find(revision)["files"]
        prefix, is_recursive = f"{path}/" if path else "", self.query.get("recursive") == ["true"]
        entries = {}
        for name, file in files.items():
            if name.startswith(prefix):
                inner = name.removeprefix(prefix)
                if "/" in inner and not is_recursive:
                    folder = prefix + inner.split("/")[0]
                    entries[folder] = {"type": "directory", "path": folder, "oid": git_oid(folder.encode()), "size": 0}
                else:
                    lfs = {"lfs": file["lfs"]} if file["lfs"] else {}
                    entries[name] = {"type": "file", "path": name, "oid": file["oid"], "size": file["size"], **lfs}
        if path and not entries:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        return self.json(list(entries.values()))

    def resolve(self, repo_id: str, revision: str, path: str):
        commit = self.repository(repo_id).find(revision)
        headers = {"X-Repo-Commit": commit["id"], "Accept-Ranges": "bytes"}
        if path not in commit["files"]:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        file = commit["files"][path]
        headers |= {"ETag": f'"{file["oid"]}"', "Content-Type": "application/octet-stream"}
        if file["lfs"]:
            headers |= {"X-Linked-ETag": f'"{file["oid"]}"', "X-Linked-Size": str(file["size"])}
        body, status = self.server.blob(repo_id, file["oid"]).read_bytes(), 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(body) - 1), len(body) - 1)
            if first >= len(body):
                raise Refusal(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{len(body)}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            body, status = body[first : last + 1], 206
        return lambda: self.send(body, status, headers)


if __name__ == "__main__":
    import sys

    with HubServer(Path(sys.argv[1])) as hub:
        print(" ".join(f"{name}={value}" for name, value in hub.environment(Path(sys.argv[1]) / "home").items()))
        while True:
            time.sleep(60)
