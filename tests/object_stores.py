"""Servers on this machine that speak the protocols of S3 and Google Cloud Storage."""

import contextlib
import http.server
import json
import logging
import re
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping

import pytest


@contextlib.contextmanager
def s3() -> Iterator[str]:
    """moto's S3 in memory; yields the URL of an empty bucket."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        request = urllib.request.Request(f"{endpoint}/bucket", method="PUT")
        urllib.request.urlopen(request).close()
        try:
            yield "s3://bucket"
        finally:
            server.stop()


class _Gcs(http.server.BaseHTTPRequestHandler):
    """What TensorStore uses of Cloud Storage's JSON API, as its reference describes it.

    The emulators on PyPI give no generation with an object's content, so nothing that is read
    can be written conditionally with them.
    """

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    objects: dict[str, tuple[int, bytes]]  # name -> generation, content
    guard: threading.Lock

    def do_GET(self) -> None:
        name, query = self._asked()
        if name is None:
            return self._list(query)
        generation, content = self.objects.get(name, (0, b""))
        if not generation:
            return self._answer(404)
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self._answer(412)
        if query.get("alt") != "media":
            return self._answer(200, self._resource(name))
        headers = {"x-goog-generation": str(generation)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._answer(200, content, headers)
        first, last = wanted.groups()
        start = int(first) if first else len(content) - int(last)
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            return self._answer(416)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._answer(206, content[start:stop], headers)

    def do_POST(self) -> None:
        _, query = self._asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        with self.guard:
            generation, _ = self.objects.get(query["name"], (0, b""))
            if query.get("ifGenerationMatch", str(generation)) != str(generation):
                return self._answer(412)
            self.objects[query["name"]] = (time.time_ns(), content)
        return self._answer(200, self._resource(query["name"]))

    def do_DELETE(self) -> None:
        name, query = self._asked()
        with self.guard:
            generation, _ = self.objects.get(name or "", (0, b""))
            if query.get("ifGenerationMatch", str(generation)) != str(generation):
                return self._answer(412)
            found = self.objects.pop(name or "", None)
        return self._answer(204 if found else 404)

    def _asked(self) -> tuple[str | None, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        name = url.path.partition("/b/bucket/o")[2].removeprefix("/")
        return urllib.parse.unquote(name) or None, dict(urllib.parse.parse_qsl(url.query))

    def _list(self, query: dict[str, str]) -> None:
        start = query.get("pageToken") or query.get("startOffset", "")
        stop = query.get("endOffset", chr(0x10FFFF))
        names = sorted(name for name in self.objects if start <= name < stop)
        page: dict[str, object] = {"items": [{"name": name, "size": "1"} for name in names[:3]]}
        if names[3:]:  # small pages, so that there are several
            page["nextPageToken"] = names[3]
        self._answer(200, json.dumps(page).encode())

    def _resource(self, name: str) -> bytes:
        generation, content = self.objects[name]
        when = "2025-01-01T00:00:00Z"
        facts = {"name": name, "generation": str(generation), "size": str(len(content))}
        return json.dumps(facts | {"timeCreated": when, "updated": when}).encode()

    def _answer(
        self, status: int, content: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def gcs() -> Iterator[str]:
    """A server in memory; yields the URL of an empty bucket."""
    handler = type("Handler", (_Gcs,), {"objects": {}, "guard": threading.Lock()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        try:
            yield "gs://bucket"
        finally:
            server.shutdown()
            server.server_close()
