"""An object store on this machine, as far as fsspec asks of one over HTTP."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar


class Store(SimpleHTTPRequestHandler):
    """A folder, as object stores give it out: HEAD with a size, and ranges of bytes. `cut`: bytes of a file that come
    before the connection ends."""

    cut: int | None = None
    asked: list[tuple[str, str | None]]

    def do_GET(self):
        self.asked.append((self.path, self.headers.get("Range")))
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        body, span = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        part = body if span is None else body[int(span[1]) : int(span[2] or len(body) - 1) + 1]
        self.send_response(200 if span is None else 206)
        if span is not None:
            self.send_header("Content-Range", f"bytes {span[1]}-{int(span[1]) + len(part) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part if self.cut is None or path.suffix != ".bin" else part[: self.cut])

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def object_store(folder: Path) -> Iterator[tuple[str, type[Store]]]:
    """(URL, handler) of what lies in the folder."""

    class Own(Store):
        asked: ClassVar = []

        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", Own
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
