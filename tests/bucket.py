"""A bucket of Google Cloud Storage on this machine, for tests; it holds its objects in memory.

It knows what of the JSON API gcsfs, orbax and TensorStore use:
https://cloud.google.com/storage/docs/json_api/v1
"""

import base64
import hashlib
import json
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Bucket:
    """A server that holds the bucket `name`; use it as a context.

    Attributes:
      objects: {name of an object: (its generation, its bytes)}.
      fails: (method, path) → the status that a request is answered with for a failure, or 0.
      asked: (method, path, status) of all requests.
    """

    def __init__(self, name: str = "bucket"):
        """Listens on a free port of the loopback interface."""
        self.name, self.lock = name, threading.RLock()
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.fails: Callable[[str, str], int] = lambda method, path: 0
        self.asked: list[tuple[str, str, int]] = []
        self._generation = 0
        self._uploads: dict[str, tuple[str, bytearray]] = {}
        handler = type("Handler", (_Handler,), {"bucket": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "Bucket":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: pathlib.Path) -> dict[str, str]:
        """What makes a process take this for Google's, without credentials.

        Args:
          home: a folder for the client's settings.
        """
        settings = home / "fsspec"
        settings.mkdir(parents=True, exist_ok=True)
        (settings / "conf.json").write_text(json.dumps({"gcs": {"token": "anon"}}))
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "FSSPEC_CONFIG_DIR": str(settings),
            "GCE_METADATA_ROOT": "127.0.0.1:9",  # nobody there: no credentials
            # Without it a kind of bucket that TensorStore knows not is asked for, by gRPC.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def put(self, name: str, content: bytes) -> dict:
        """Makes or replaces an object; returns its metadata."""
        with self.lock:
            self._generation += 1
            self.objects[name] = self._generation, bytes(content)
            return self.about(name)

    def about(self, name: str) -> dict:
        """The metadata of an object."""
        generation, content = self.objects[name]
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        return {
            "kind": "storage#object",
            "bucket": self.name,
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "md5Hash": digest,
            "updated": "2020-01-01T00:00:00.000Z",
            "timeCreated": "2020-01-01T00:00:00.000Z",
        }

    def list(self, query: Mapping[str, str]) -> dict:
        """The objects that a query asks for, folded at its delimiter."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names, prefixes = [], set()
        for name in sorted(self.objects):
            rest = name.removeprefix(prefix)
            within = query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff")
            if not name.startswith(prefix) or not within:
                continue
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                names.append(name)
        return {"items": [self.about(name) for name in names], "prefixes": sorted(prefixes)}


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_) -> None:
        """Clients that end leave their connections; what is wrong here a test sees as no answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *_) -> None:
        """Tests read `Bucket.asked`."""

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self._chunks() if "chunked" in str(self.headers.get("Transfer-Encoding")) else b""
        body = body or self.rfile.read(length)
        status = self.bucket.fails(self.command, self.path)
        if not status:
            with self.bucket.lock:
                status, headers, content = self._reply(body)
        else:
            headers, content = {}, b'{"error": {"message": "told to fail"}}'
        self.bucket.asked.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _reply(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        path, _, text = self.path.partition("?")
        query = dict(urllib.parse.parse_qsl(text))
        if path.startswith("/batch/"):
            return self._batch(body)
        match = re.match(r"/(?:(upload|download)/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?$", path)
        if match is None or match[2] != self.bucket.name:
            return 404, {}, b'{"error": {"message": "The specified bucket does not exist."}}'
        if match[1] == "upload":
            return self._upload(query, body)
        if not path.partition("/b/")[2].partition("/")[2]:
            return self._json({"kind": "storage#bucket", "name": self.bucket.name})
        if not match[3]:
            return self._json(self.bucket.list(query))
        name, _, verb = match[3].partition("/")
        return self._object(urllib.parse.unquote(name), verb, query)

    @staticmethod
    def _json(value: dict) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    def _object(self, name: str, verb: str, query: dict) -> tuple[int, dict[str, str], bytes]:
        if name not in self.bucket.objects:
            return 404, {}, b'{"error": {"message": "No such object"}}'
        if self.command == "DELETE":
            del self.bucket.objects[name]
            return 204, {}, b""
        generation, content = self.bucket.objects[name]
        if verb:
            to = urllib.parse.unquote(verb.rpartition("/o/")[2])
            made = self.bucket.put(to, content)
            if verb.startswith("moveTo/"):
                del self.bucket.objects[name]
                return self._json(made)
            return self._json({"done": True, "resource": made, "kind": "storage#rewriteResponse"})
        if query.get("alt") != "media":
            return self._json(self.bucket.about(name))
        headers = {"x-goog-generation": str(generation), "ETag": str(generation)}
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, headers, content
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            return 416, {"Content-Range": f"bytes */{len(content)}"}, b""
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, headers, content[first : last + 1]

    def _upload(self, query: dict, body: bytes) -> tuple[int, dict[str, str], bytes]:
        kind, uploads = query.get("uploadType"), self.bucket._uploads
        if "upload_id" in query:
            name, held = uploads[query["upload_id"]]
            held += body
            if not self.headers["Content-Range"].endswith(f"/{len(held)}"):
                return 308, {"Range": f"bytes=0-{len(held) - 1}"}, b""
            return self._json(self.bucket.put(name, held))
        if kind == "resumable":
            identity = str(len(uploads))
            uploads[identity] = query["name"], bytearray()
            place = f"{self.bucket.url}{self.path}&upload_id={identity}"
            return 200, {"Location": place}, b""
        if kind == "multipart":
            mark = (
                b"--" + self.headers["Content-Type"].rpartition("boundary=")[2].strip('"').encode()
            )
            about, content = body.split(mark)[1:3]
            name = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
            content = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
            content = content.removesuffix(b"\n").removesuffix(b"\r")
            return self._json(self.bucket.put(name, content))
        held = self.bucket.objects.get(query["name"], (0, b""))[0]
        if int(query.get("ifGenerationMatch", held)) != held:
            return 412, {}, b""
        return self._json(self.bucket.put(query["name"], body))

    def _batch(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Objects deleted together."""
        answer = b""
        for path in re.findall(rb"DELETE /storage/v1/b/[^/]+/o/(\S+) HTTP", body):
            name = urllib.parse.unquote(path.decode().partition("?")[0])
            found = self.bucket.objects.pop(name, None)
            answer += b"--batch\r\n\r\nHTTP/1.1 %d x\r\n\r\n" % (204 if found else 404)
        return 200, {"Content-Type": "multipart/mixed; boundary=batch"}, answer + b"--batch--"
