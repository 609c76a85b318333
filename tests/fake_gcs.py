"""A bucket of Google Cloud Storage in this process: the part of its JSON interface over HTTP that gcsfs, tensorstore
and google-cloud-storage ask for. Like the real one it knows whole objects only: no folders, no appending, no
renaming."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Store:
    """The objects of one bucket by name, with their generations; `puts` lists the name of every object written, in
    order."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.puts: list[str] = []
        self.uploads: dict[str, tuple[str, bytes]] = {}  # resumable ones under way: name and what has come
        self.lock = threading.RLock()

    def put(self, name: str, data: bytes) -> None:
        with self.lock:
            self.puts.append(name)
            self.objects[name] = data, len(self.puts)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # else every answer waits 40 ms
    store: Store

    def log_message(self, *_):
        pass

    def answer(self, status: int, content=None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        if "Content_Type" not in headers:
            headers["Content_Type"] = "application/json; charset=UTF-8"
        for name, value in (headers | {"Content_Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def resource(self, name: str) -> dict:
        data, generation = self.store.objects[name]
        return {
            "kind": "storage#object",
            "bucket": "bucket",
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        body = self.body()
        with self.store.lock:
            path = re.sub("^/(upload/|download/)?storage/v1/", "", url.path)
            if not re.match("b/bucket(/|$)", path):
                return self.answer(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
            if path == "b/bucket":
                return self.answer(200, {"kind": "storage#bucket", "name": "bucket", "id": "bucket"})
            path = path.removeprefix("b/bucket/o").removeprefix("/")
            if self.command in ("POST", "PUT") and "uploadType" in query:
                return self.upload(query, body)
            if not path:
                return self.listing(query)
            if move := re.fullmatch("(.*)/(?:rewriteTo/b/bucket|moveTo)/o/(.*)", path):
                source, target = map(unquote, move.groups())
                if source not in self.store.objects:
                    return self.absent()
                self.store.put(target, self.store.objects[source][0])
                if "/moveTo/" in path:
                    del self.store.objects[source]
                    return self.answer(200, self.resource(target))
                return self.answer(200, {"done": True, "resource": self.resource(target)})
            return self.object(unquote(path), query)

    do_GET = do_POST = do_PUT = do_DELETE = handle_request

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def absent(self) -> None:
        self.answer(404, {"error": {"code": 404, "message": "No such object"}})

    def refused(self, name: str, query: dict) -> bool:
        """Whether the request asked for another generation than there is (0: none)."""
        current = self.store.objects[name][1] if name in self.store.objects else 0
        return "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != current

    def object(self, name: str, query: dict) -> None:
        if name not in self.store.objects:
            return self.absent()
        data, generation = self.store.objects[name]
        if self.command == "DELETE":
            if self.refused(name, query):
                return self.answer(412)
            del self.store.objects[name]
            return self.answer(204)
        if query.get("alt") != "media":
            return self.answer(200, self.resource(name))
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304)
        facts = {
            "Content_Type": "application/octet-stream",
            "x_goog_generation": str(generation),
            "ETag": str(generation),
        }
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            if first > last:
                return self.answer(416, **facts)
            return self.answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **facts)
        self.answer(200, data, **facts)

    def listing(self, query: dict) -> None:
        prefix, delimiter, items, prefixes = query.get("prefix", ""), query.get("delimiter"), [], set()
        for name in sorted(self.store.objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            head, separator, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if separator:
                prefixes.add(prefix + head + separator)
            else:
                items.append(self.resource(name))
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def upload(self, query: dict, body: bytes) -> None:
        if "upload_id" in query:  # a further part of a resumable one
            name, before = self.store.uploads[query["upload_id"]]
            self.store.uploads[query["upload_id"]] = name, before + body
            whole = self.headers["Content-Range"].rpartition("/")[2]
            if whole == "*" or int(whole) > len(before + body):
                return self.answer(308, Range=f"bytes=0-{len(before + body) - 1}")
            body = before + body
        elif query["uploadType"] == "multipart":
            boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            about, data = re.split(rb"\r?\n--" + re.escape(boundary), b"\n" + body)[1:3]
            head = lambda part: re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1]
            name, body = json.loads(head(about))["name"], head(data)
        else:
            name = query["name"]
            if query["uploadType"] == "resumable":
                id = str(len(self.store.uploads))
                self.store.uploads[id] = name, b""
                place = (
                    f"http://{self.headers['Host']}/upload/storage/v1/b/bucket/o?uploadType=resumable&upload_id={id}"
                )
                return self.answer(200, Location=place)
        if self.refused(name, query):
            return self.answer(412)
        self.store.put(name, body)
        self.answer(200, self.resource(name))


@contextlib.contextmanager
def serving(store: Store) -> Iterator[str]:
    """Yields the address at which the bucket `bucket` answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"store": store}))
    server.handle_error = lambda *_: None  # clients drop requests whose answer they no longer need
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
