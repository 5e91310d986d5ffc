"""As much of wandb's server as a run needs to begin, to go on and to be told numbers: on this machine, over HTTP."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "p", "name": "megabus", "entity": {"id": "e", "name": "me"}}


class Server(ThreadingHTTPServer):
    """rows: of each run by its id, as they came; begun: the ids in the order in which runs were begun or resumed."""

    def __init__(self, key: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.key, self.rows, self.begun = key, dict[str, list[dict[str, Any]]](), list[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            for line in json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
                self.rows[path.split("/")[-2]].append(json.loads(line))
        if path != "/graphql":
            return {}
        asked = json.loads(body)
        values = asked.get("variables", {})
        name = values.get("name")
        if asked["operationName"] == "RunResumeStatus":
            self.begun.append(name)
            return {"model": PROJECT | {"bucket": self._bucket(name) if name in self.rows else None}}
        if asked["operationName"] == "UpsertBucket":
            new = name not in self.rows
            self.rows.setdefault(name, [])
            return {"upsertBucket": {"bucket": self._bucket(name) | {"project": PROJECT}, "inserted": new}}
        if asked["operationName"] == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/file"} for file in values["files"]]
            return {"createRunFiles": {"runID": values["run"], "uploadHeaders": [], "files": files}}
        return {"viewer": {"id": "u", "username": "me", "entity": "me"}}

    def _bucket(self, name: str) -> dict[str, Any]:
        tail = json.dumps([json.dumps(row) for row in self.rows[name][-1:]])
        counts = {f"{kind}LineCount": 0 for kind in ("log", "events")} | {"historyLineCount": len(self.rows[name])}
        texts = {"summaryMetrics": "{}", "config": "{}", "wandbConfig": '{"t": 1}', "eventsTail": "[]"}
        return {"id": name, "name": name, "displayName": name, "historyTail": tail, "tags": []} | counts | texts


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        known = self.headers.get("Authorization") is None or self.headers["Authorization"] == f"Basic {self.server.key}"
        text = json.dumps({"data": self.server.answer(self.path, body)} if known else {"errors": [{"message": "no"}]})
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_PUT = do_POST  # noqa: N815  as http.server calls them

    def log_message(self, *args: object) -> None:
        """Nothing is said."""


@contextmanager
def wandb_server(key: str) -> Iterator[Server]:
    """key: what clients must show, as in HTTP's basic authentication."""
    with Server(key) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
