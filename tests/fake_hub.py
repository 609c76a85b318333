"""The Hugging Face hub in this process: the part of its HTTP interface that making, filling and reading a repository
of models asks for."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_this_test"
COMMIT = "c0ffee" * 6 + "c0ff"


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # else every answer waits 40 ms
    files: dict[str, dict[str, bytes]]  # of each repository
    blobs: dict[str, bytes]  # by sha256

    def log_message(self, *_):
        pass

    def answer(self, status: int, content=None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def refused(self) -> bool:
        """Whether who asks may not write; then that is the answer."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        self.answer(401, {"error": "Invalid username or password."})
        return True

    def do_POST(self):
        body, path = self.rfile.read(int(self.headers["Content-Length"])), urlsplit(self.path).path
        if self.refused():
            return
        here = f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            known = repo in self.files
            self.files.setdefault(repo, {})
            self.answer(409 if known else 200, {"url": f"{here}/{repo}", "error": "You already created this repo"})
        elif path == "/api/validate-yaml":  # of a model card
            front = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            self.answer(200, {"errors": [] if isinstance(front, dict) else [{"message": "no mapping"}], "warnings": []})
        elif found := re.fullmatch("/api/models/(.*)/preupload/main", path):
            mode = lambda name: "lfs" if name.endswith(".safetensors") else "regular"
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer(
                200, {"files": [{"path": name, "uploadMode": mode(name), "shouldIgnore": False} for name in names]}
            )
        elif path.endswith("/info/lfs/objects/batch"):
            of = lambda o: {"actions": {"upload": {"href": f"{here}/blob/{o['oid']}"}}}
            self.answer(200, {"transfer": "basic", "objects": [o | of(o) for o in json.loads(body)["objects"]]})
        elif found := re.fullmatch("/api/models/(.*)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[found[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[found[1]][value["path"]] = self.blobs[value["oid"]]
            commit = {"commitUrl": f"{here}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT}
            self.answer(200, commit)
        else:
            self.answer(404, {"error": path})

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.blobs[_hash(body)] = body
        self.answer(200, b"")

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch("/api/models/([^/]*/[^/]*)(/revision/.*)?", path):
            if found[1] not in self.files:
                self.answer(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
                return
            names = [{"rfilename": name} for name in sorted(self.files[found[1]])]
            self.answer(200, {"id": found[1], "modelId": found[1], "sha": COMMIT, "siblings": names, "private": False})
        elif (found := re.fullmatch("/api/models/([^/]*/[^/]*)/tree/.*", path)) and found[1] in self.files:
            of = lambda name, content: {"type": "file", "path": name, "size": len(content), "oid": _hash(content)}
            self.answer(200, [of(*file) for file in sorted(self.files[found[1]].items())])
        elif (found := re.fullmatch("/([^/]*/[^/]*)/resolve/[^/]*/(.*)", path)) and found[2] in self.files.get(
            found[1], {}
        ):
            content = self.files[found[1]][found[2]]
            self.answer(
                200, content, **{"ETag": f'"{_hash(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            )
        else:
            self.answer(404, {"error": path}, **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """The address of an empty hub, and its repositories' files."""
    files: dict[str, dict[str, bytes]] = {}
    handler = type("Handler", (Hub,), {"files": files, "blobs": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", files
    finally:
        server.shutdown()
        server.server_close()
