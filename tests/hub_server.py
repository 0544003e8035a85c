"""A local Hub server: the part of the HTTP API that the unmodified huggingface_hub client uses to push and load.

    python tests/hub_server.py FOLDER

prints its URL. Repositories and uploads are stored in FOLDER and survive a kill. Each request is logged as a line
`METHOD PATH` in FOLDER/requests.log before the response. FOLDER/faults.json is a list of faults, read at each request:
a request whose line starts with `match` fails with `status` and `message`, is delayed by `wait` seconds, or, if `stall`
is true, is read by half and never answered.

TOKENS lists the valid tokens and their permissions. There is one branch, main. Files of LFS_SUFFIXES and files above
10 MB are uploaded as LFS objects, and downloaded from another origin than the API.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {  # token: user, role, namespaces of the user
    "hf_write": ("tester", "write", ("tester", "org")),
    "hf_read": ("tester", "read", ("tester", "org")),
    "hf_stranger": ("stranger", "write", ("stranger",)),
}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".npz", ".parquet", ".png")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

KIND = r"(?P<kind>models|datasets|spaces)"
ID = r"(?P<id>[^/]+/[^/]+)"
GIT = r"/((?P<kind>datasets|spaces)/)?" + ID
ROUTES = {
    "GET /api/whoami-v2": "whoami",
    "GET /api/agent-harnesses": "nothing",
    "POST /api/validate-yaml": "validate_yaml",
    "POST /api/repos/create": "create",
    "DELETE /api/repos/delete": "delete",
    f"GET /api/{KIND}": "list_repos",
    f"GET /api/{KIND}/{ID}(/revision/(?P<rev>[^/]+))?": "info",
    f"PUT /api/{KIND}/{ID}/settings": "settings",
    f"GET /api/{KIND}/{ID}/tree/(?P<rev>[^/]+)(/(?P<path>.+))?": "tree",
    f"POST /api/{KIND}/{ID}/paths-info/(?P<rev>[^/]+)": "paths_info",
    f"POST /api/{KIND}/{ID}/preupload/(?P<rev>[^/]+)": "preupload",
    f"POST /api/{KIND}/{ID}/commit/(?P<rev>[^/]+)": "commit",
    f"POST /api/{KIND}/{ID}/variables": "set_variable",
    f"POST {GIT}.git/info/lfs/objects/batch": "lfs_batch",
    "PUT /lfs/(?P<oid>[0-9a-f]{64})": "lfs_put",
    "POST /lfs/(?P<oid>[0-9a-f]{64})/verify": "lfs_verify",
    "GET /cdn/(?P<oid>[0-9a-f]{64})": "cdn",
    f"GET {GIT}/resolve/(?P<rev>[^/]+)/(?P<path>.+)": "resolve",
}


class Refused(Exception):
    """A request with an error response."""

    def __init__(self, status, message, code=None, **headers):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, **headers}
        if code is not None:
            self.headers["X-Error-Code"] = code


class Store:
    """Storage of the server: repositories as JSON, contents as files named by their hash."""

    def __init__(self, folder):
        self.folder, self.lock = folder, threading.RLock()
        for name in ("blobs", "lfs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.file = folder / "repos.json"
        self.repos = json.loads(self.file.read_text()) if self.file.exists() else {}

    def save(self):
        with self.lock:
            self.write(self.file, json.dumps(self.repos, indent=1).encode())

    def write(self, path, content):
        partial = path.with_name(f".{path.name}.{threading.get_ident()}")
        partial.write_bytes(content)
        partial.replace(path)

    def blob(self, content):
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.write(self.folder / "blobs" / oid, content)
        return {"oid": oid, "size": len(content), "lfs": None}

    def pointer(self, sha256):
        size = (self.folder / "lfs" / sha256).stat().st_size
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return self.blob(text.encode()) | {"size": size, "lfs": {"oid": sha256, "size": size, "pointerSize": len(text)}}

    def content(self, file):
        parts = ("lfs", file["lfs"]["oid"]) if file["lfs"] else ("blobs", file["oid"])
        return self.folder.joinpath(*parts).read_bytes()

    def add_commit(self, repo, title, files):
        before = repo["commits"][-1]["oid"] if repo["commits"] else ""
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        oid = hashlib.sha1(json.dumps([before, title, date, files]).encode()).hexdigest()
        repo["commits"].append({"oid": oid, "title": title, "date": date, "files": files})
        self.save()
        return oid


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # saves 40 ms per request

    def log_message(self, *words):
        """Disable the log of the base class."""

    def do_GET(self):
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        line = f"{'GET' if self.command == 'HEAD' else self.command} {unquote(url.path)}"
        with self.store.lock, open(self.store.folder / "requests.log", "a") as log:
            log.write(f"{self.command} {unquote(url.path)}\n")
        try:
            self.body = self.read_body(self.fault(line))
            for route, name in ROUTES.items():
                match = re.fullmatch(route, line)
                if match:
                    getattr(self, name)(**{k: v for k, v in match.groupdict().items() if v is not None})
                    return
            raise Refused(404, f"no such route: {line}")
        except Refused as error:
            self.answer(json.dumps({"error": str(error)}).encode(), status=error.status, **error.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def fault(self, line):
        """Apply faults.json to a request; return whether to stall."""
        file = self.store.folder / "faults.json"
        for fault in json.loads(file.read_text()) if file.exists() else []:
            if line.startswith(fault["match"]):
                time.sleep(fault.get("wait", 0))
                if "status" in fault:
                    self.read_body()
                    raise Refused(fault["status"], fault.get("message", "a fault"))
                return fault.get("stall", False)
        return False

    def read_body(self, stall=False):
        length = int(self.headers.get("Content-Length", 0))
        if stall:
            self.rfile.read(length // 2)
            threading.Event().wait()
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content=b"", status=200, **headers):
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, content, status=200):
        self.answer(json.dumps(content).encode(), status)

    def url(self, path, host="127.0.0.1"):
        return f"http://{host}:{self.server.server_port}{path}"

    def who(self):
        """Return user, role and namespaces of the token; without a token, None, None and no namespaces."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token, (None, None, ()))

    def repo(self, kind, id, write=False):
        """Return a repository if the token may read it, or write to it if `write`."""
        user, role, namespaces = self.who()
        repo = self.store.repos.get(f"{kind}/{id}")
        is_mine = id.split("/")[0] in namespaces
        if repo is None or (repo["private"] and not is_mine):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not user:
            raise Refused(401, "Invalid username or password.")
        if write and not (is_mine and role == "write"):
            raise Refused(403, "Authorization error.")
        return repo

    def revision(self, repo, rev):
        for commit in reversed(repo["commits"]):
            if rev == "main" or commit["oid"] == rev:
                return commit
        raise Refused(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    # Users, cards

    def nothing(self):
        self.json({})

    def whoami(self):
        user, role, namespaces = self.who()
        if user is None:
            raise Refused(401, "Invalid user token.")
        orgs = [{"name": name, "type": "org"} for name in namespaces if name != user]
        self.json({"type": "user", "name": user, "orgs": orgs, "auth": {"accessToken": {"role": role}}})

    def validate_yaml(self):
        try:
            front_matter(json.loads(self.body)["content"])
        except (yaml.YAMLError, ValueError) as error:
            return self.json({"errors": [{"message": " ".join(str(error).split())}], "warnings": []}, 400)
        self.json({"errors": [], "warnings": []})

    # Repositories

    def named(self):
        """Return kind and id of the repository named in the body, and the body."""
        body = json.loads(self.body)
        user, role, namespaces = self.who()
        namespace = body.get("organization") or user
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if role != "write" or namespace not in namespaces:
            raise Refused(403, f'You don\'t have the rights to do this under the namespace "{namespace}"')
        return f"{body.get('type') or 'model'}s", f"{namespace}/{body['name']}", body

    def create(self):
        kind, id, body = self.named()
        url = self.url(f"/{id}" if kind == "models" else f"/{kind}/{id}")
        with self.store.lock:
            if f"{kind}/{id}" in self.store.repos:
                return self.json({"error": "You already created this repo", "url": url}, 409)
            variables = {entry["key"]: entry["value"] for entry in body.get("variables", [])}
            repo = {"private": is_private(body), "sdk": body.get("sdk"), "variables": variables, "commits": []}
            self.store.repos[f"{kind}/{id}"] = repo
            self.store.add_commit(repo, "initial commit", {".gitattributes": self.store.blob(GITATTRIBUTES)})
        self.json({"url": url, "name": id})

    def delete(self):
        kind, id, _ = self.named()
        self.repo(kind, id, write=True)
        del self.store.repos[f"{kind}/{id}"]
        self.store.save()
        self.json({})

    def settings(self, kind, id):
        repo, body = self.repo(kind, id, write=True), json.loads(self.body)
        repo["private"] = is_private(body, repo["private"])
        self.store.save()
        self.json({"private": repo["private"]})

    def set_variable(self, kind, id):
        repo, body = self.repo(kind, id, write=True), json.loads(self.body)
        repo["variables"][body["key"]] = body["value"]
        self.store.save()
        self.json({key: {"key": key, "value": value} for key, value in repo["variables"].items()})

    def list_repos(self, kind):
        _, _, namespaces = self.who()
        visible = []
        for name, repo in self.store.repos.items():
            its_kind, author, _ = name.split("/")
            if its_kind == kind and self.query.get("author") in (None, author):
                if not repo["private"] or author in namespaces:
                    visible.append(self.described(name.removeprefix(f"{kind}/"), repo, repo["commits"][-1]))
        self.json(visible)

    def info(self, kind, id, rev="main"):
        repo = self.repo(kind, id)
        self.json(self.described(id, repo, self.revision(repo, rev)))

    def described(self, id, repo, commit):
        siblings = [{"rfilename": path} for path in sorted(commit["files"])]
        for sibling in siblings if "blobs" in self.query else []:
            file = commit["files"][sibling["rfilename"]]
            lfs = file["lfs"] and {**file["lfs"], "sha256": file["lfs"]["oid"]}
            sibling |= {"size": file["size"], "blobId": file["oid"], "lfs": lfs}
        card = commit["files"].get("README.md")
        data = front_matter(self.store.content(card).decode()) if card else {}
        return {
            "_id": hashlib.md5(id.encode()).hexdigest()[:24], "id": id, "modelId": id, "author": id.split("/")[0],
            "sha": commit["oid"], "lastModified": commit["date"], "private": repo["private"], "gated": False,
            "disabled": False, "tags": data.get("tags", []), "cardData": data, "siblings": siblings,
            "downloads": 0, "likes": 0, **({"sdk": repo["sdk"]} if repo["sdk"] else {}),
        }  # fmt: skip

    # Files

    def tree(self, kind, id, rev, path=""):
        files = self.revision(self.repo(kind, id), rev)["files"]
        prefix = f"{path}/" if path else ""
        inside = [name for name in sorted(files) if name.startswith(prefix)]
        if not inside:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        folders = {name[:end] for name in inside for end in (i for i, c in enumerate(name) if c == "/")}
        folders = {name for name in folders if name.startswith(prefix)}
        entries = [entry(name, files[name]) for name in inside]
        entries += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        if self.query.get("recursive", "false").lower() != "true":
            entries = [item for item in entries if "/" not in item["path"].removeprefix(prefix)]
        self.json(entries)

    def paths_info(self, kind, id, rev):
        files = self.revision(self.repo(kind, id), rev)["files"]
        is_form = self.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
        paths = parse_qs(self.body.decode())["paths"] if is_form else json.loads(self.body)["paths"]
        self.json([entry(path, files[path]) for path in paths if path in files])

    def preupload(self, kind, id, rev):
        files = self.revision(self.repo(kind, id, write=True), rev)["files"]
        answers = []
        for file in json.loads(self.body)["files"]:
            path, existing = file["path"], files.get(file["path"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or file["size"] > 10_000_000 else "regular"
            oid = existing and (existing["lfs"] or existing)["oid"]
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": answers})

    def lfs_batch(self, id, kind="models"):
        self.repo(kind, id, write=True)
        objects = []
        for requested in json.loads(self.body)["objects"]:
            oid = requested["oid"]
            if not (self.store.folder / "lfs" / oid).exists():
                actions = {"upload": self.url(f"/lfs/{oid}"), "verify": self.url(f"/lfs/{oid}/verify")}
                requested = requested | {"actions": {name: {"href": href} for name, href in actions.items()}}
            objects.append(requested)
        self.json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content does not match its hash")
        self.store.write(self.store.folder / "lfs" / oid, self.body)
        self.answer()

    def lfs_verify(self, oid):
        file = self.store.folder / "lfs" / oid
        if not file.exists() or file.stat().st_size != json.loads(self.body)["size"]:
            raise Refused(404, "no such object")
        self.json({})

    def commit(self, kind, id, rev):
        repo = self.repo(kind, id, write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        with self.store.lock:
            before = self.revision(repo, rev)
            if header["value"].get("parentCommit", before["oid"]) != before["oid"]:
                raise Refused(412, "A commit has happened since.")
            files = dict(before["files"])
            for operation in operations:
                self.apply(operation["key"], operation["value"], files)
            oid = self.store.add_commit(repo, header["value"]["summary"], files)
        self.json({"success": True, "commitOid": oid, "commitUrl": self.url(f"/{id}/commit/{oid}")})

    def apply(self, key, value, files):
        path = value["path"]
        if key == "file":
            files[path] = self.store.blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not (self.store.folder / "lfs" / value["oid"]).exists():
                raise Refused(422, f"the object of {path} was never uploaded")
            files[path] = self.store.pointer(value["oid"])
        else:
            deleted = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
            if not deleted:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in deleted:
                del files[name]

    def resolve(self, id, rev, path, kind="models"):
        commit = self.revision(self.repo(kind, id), rev)
        file = commit["files"].get(path)
        headers = {"X-Repo-Commit": commit["oid"]}
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **headers)
        if file["lfs"]:
            headers |= {"X-Linked-Etag": f'"{file["lfs"]["oid"]}"', "X-Linked-Size": str(file["size"])}
            location = self.url(f"/cdn/{file['lfs']['oid']}", "localhost")
            return self.answer(status=302, Location=location, **headers)
        self.send_content(self.store.content(file), ETag=f'"{file["oid"]}"', **headers)

    def cdn(self, oid):
        if "Authorization" in self.headers:
            raise Refused(400, "the token was sent to another origin")
        self.send_content((self.store.folder / "lfs" / oid).read_bytes(), ETag=f'"{oid}"')

    def send_content(self, content, **headers):
        headers |= {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return self.answer(content, **headers)
        first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.answer(content[first : last + 1], 206, **headers)


def is_private(body, otherwise=False):
    return body["visibility"] == "private" if "visibility" in body else body.get("private", otherwise)


def entry(path, file):
    return {"type": "file", "path": path, **{key: value for key, value in file.items() if value is not None}}


def front_matter(text):
    match = re.match(r"---\n(.*?)\n---(\n|$)", text, flags=re.DOTALL)
    data = yaml.safe_load(match[1]) if match else {}
    if not isinstance(data, dict):
        raise ValueError("the metadata is not a mapping")
    return data


if __name__ == "__main__":
    Handler.store = Store(Path(sys.argv[1]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
