"""A stand-in for the Hugging Face hub on this machine, which serves and takes files, and rows in the columns of its data sets."""

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import threading
from pathlib import Path

import huggingface_hub
import pandas as pd
import yaml

from ept.data.tasks import TASKS

REPOSITORY, REFERENCE = r"(?P<repository>[^/]+/[^/]+)", r"(?P<reference>refs/convert/parquet|[^/]+)"
ABOUT = re.compile(rf"/api/(?:models|datasets)/{REPOSITORY}(?:/(?P<what>revision|tree)/{REFERENCE})?")
FILE = re.compile(rf"/(?:datasets/)?{REPOSITORY}/resolve/{REFERENCE}/(?P<path>.+)")
WRITE = re.compile(rf"/api/models/{REPOSITORY}/(?P<what>preupload|commit)/{REFERENCE}")
LARGE = re.compile(rf"/{REPOSITORY}\.git/info/lfs/objects/batch")
TOKEN = "hf_standin"  # with which one may write


class Hub:
    """A server that speaks as much of the hub's language as downloads and uploads of models need, while the `with` block lasts."""

    def __init__(self):
        self.files = {}  # (repository, commit, path) -> bytes, or the path of a file
        self.references = {}  # (repository, branch) -> commit
        self.seen = []  # paths that were asked for
        self.made = {}  # repository -> how it was asked for
        self.large = {}  # SHA-256 -> content, of large files that no commit needs to name yet

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Be unreachable from now on."""
        self.server.shutdown()
        self.server.server_close()

    def add(self, repository, commit, folder):
        """All files of a folder become those of a commit."""
        self.files |= {(repository, commit, file.relative_to(folder).as_posix()): file for file in Path(folder).rglob("*") if file.is_file()}

    def commit(self, repository, reference):
        """The commit of a branch, or the commit itself; None where there is neither."""
        found = self.references.get((repository, reference), reference)
        return found if any(key[:2] == (repository, found) for key in self.files) else None

    def environment(self, cache):
        """Environment variables by which a process takes this for the hub, with a cache of its own."""
        kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return kept | own

    def take_over(self, monkeypatch, cache):
        """Let this process take it for the hub, with a cache of its own, for as long as a test lasts."""
        constants = {
            "ENDPOINT": self.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache),
        }
        for name, value in constants.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
        huggingface_hub.close_session()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.hub.seen.append(self.path)
        path = self.path.partition("?")[0].replace("%2F", "/")
        if found := ABOUT.fullmatch(path):
            self.describe(**found.groupdict())
        elif found := FILE.fullmatch(path):
            self.send(**found.groupdict())
        else:
            self.answer(404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def describe(self, repository, what, reference):
        """A commit, or what lies in it."""
        commit = self.hub.commit(repository, reference or "main")
        if commit is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
            return
        listed = {path: content for (name, at, path), content in self.hub.files.items() if (name, at) == (repository, commit)}
        if what == "tree":
            value = [{"type": "file", "path": path, "size": size_of(content), "oid": mark_of(path, content)} for path, content in listed.items()]
        else:
            value = {"id": repository, "sha": commit, "siblings": [{"rfilename": path} for path in listed]}
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json", X_Repo_Commit=commit)

    def send(self, repository, reference, path):
        """A file."""
        commit = self.hub.commit(repository, reference)
        content = self.hub.files.get((repository, commit, path))
        if content is None:
            self.answer(404, X_Error_Code="EntryNotFound" if commit else "RevisionNotFound")
        else:
            self.answer(200, content, ETag=f'"{mark_of(path, content)}"', X_Repo_Commit=commit)

    def do_POST(self):
        self.hub.seen.append(self.path)
        path, body = self.path.partition("?")[0], self.body()
        if path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.say(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif found := WRITE.fullmatch(path):
            {"preupload": self.announce, "commit": self.keep}[found["what"]](found["repository"], found["reference"], body)
        elif found := LARGE.fullmatch(path):
            asked = json.loads(body)["objects"]
            upload = lambda oid: {"upload": {"href": f"{self.hub.address}/large/{oid}"}}
            self.say(200, {"transfer": "basic", "objects": [one if one["oid"] in self.hub.large else one | {"actions": upload(one["oid"])} for one in asked]})
        else:
            self.answer(404)

    def do_PUT(self):
        """A large file."""
        content = self.body()
        right = hashlib.sha256(content).hexdigest() == self.path.removeprefix("/large/")
        if right:
            self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self.answer(200 if right else 400)

    def body(self):
        """What was sent, whole or in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def validate(self, page):
        """The first lines of a card."""
        try:
            good = isinstance(yaml.safe_load(page.split("---")[1]), dict)
        except (IndexError, yaml.YAMLError):
            good = False
        self.say(200 if good else 400, {"warnings": [], "errors": [] if good else [{"message": "the metadata is no mapping"}]})

    def create(self, asked):
        """A repository without files."""
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.hub.made
        self.hub.made.setdefault(name, asked)
        self.say(409 if known else 200, {"url": f"{self.hub.address}/{name}"})

    def announce(self, repository, reference, body):
        """How each file is to be brought."""
        if repository not in self.hub.made:
            self.answer(404, X_Error_Code="RepoNotFound")
            return
        how = lambda path: "lfs" if path.endswith(".safetensors") else "regular"
        self.say(200, {"files": [{"path": file["path"], "uploadMode": how(file["path"]), "shouldIgnore": False} for file in json.loads(body)["files"]]})

    def keep(self, repository, reference, body):
        """A commit: the files of the one before, and those that are new."""
        before = self.hub.commit(repository, reference)
        files = {path: content for (name, at, path), content in self.hub.files.items() if (name, at) == (repository, before)}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.hub.large[line["value"]["oid"]]
        commit = hashlib.sha1(f"{before} {body}".encode()).hexdigest()
        self.hub.files |= {(repository, commit, path): content for path, content in files.items()}
        self.hub.references[repository, reference] = commit
        self.say(200, {"commitUrl": f"{self.hub.address}/{repository}/commit/{commit}", "commitOid": commit})

    def say(self, status, value):
        """A value as JSON."""
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": size_of(content), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD" and isinstance(content, bytes):
            self.wfile.write(content)
        elif self.command == "GET":
            with content.open("rb") as file:
                shutil.copyfileobj(file, self.wfile)

    def log_message(self, *_):
        pass


def size_of(content):
    """Bytes of a file that is served."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def mark_of(path, content):
    """What tells one state of a file from another."""
    return hashlib.sha1(content if isinstance(content, bytes) else f"{path} {size_of(content)} {content.stat().st_mtime_ns}".encode()).hexdigest()


# ---- made-up rows in the hub's columns ----------------------------------------------------------------------------------


def hub_rows(name, n=20, start=0):
    "Rows of a benchmark in the hub's columns; every text is different."
    task, rows = TASKS[name], []
    for i in range(start, start + n):
        row = {field: f"{field} number {i} of these" for field in task.fields}
        row["label"] = float(i % 6) if task.regression else i % len(task.labels)
        row["idx"] = i
        if name == "multirc":
            row["idx"] = {"paragraph": i // 8, "question": i // 4, "answer": i}
        if name == "wsc":
            row.update(span1_text="text", span1_index=0, span2_text="number", span2_index=1)
        rows.append(row)
    return pd.DataFrame(rows)
