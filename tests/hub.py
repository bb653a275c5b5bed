"""A stand-in for the Hugging Face hub on this machine, and rows in the columns of its data sets."""

import hashlib
import http.server
import json
import os
import re
import shutil
import threading
from pathlib import Path

import pandas as pd

from ept.data.tasks import TASKS

REPOSITORY, REFERENCE = r"(?P<repository>[^/]+/[^/]+)", r"(?P<reference>refs/convert/parquet|[^/]+)"
ABOUT = re.compile(rf"/api/(?:models|datasets)/{REPOSITORY}(?:/(?P<what>revision|tree)/{REFERENCE})?")
FILE = re.compile(rf"/(?:datasets/)?{REPOSITORY}/resolve/{REFERENCE}/(?P<path>.+)")


class Hub:
    """A server that speaks as much of the hub's language as a download needs, while the `with` block lasts."""

    def __init__(self):
        self.files = {}  # (repository, commit, path) -> bytes, or the path of a file
        self.references = {}  # (repository, branch) -> commit
        self.seen = []  # paths that were asked for

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

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": size_of(content), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET" and isinstance(content, bytes):
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
