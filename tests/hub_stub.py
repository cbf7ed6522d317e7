"""A small Hub on the loopback address: as much of its HTTP interface as pushing and pulling use."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories by name: a list of commits, each a dictionary of files."""

    def __init__(self):
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.url = ""

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Add files to a repository; returns the revision."""
        commits = self.repositories.setdefault(name, [])
        commits.append({**(commits[-1] if commits else {}), **files})
        return revision(len(commits) - 1)

    def files(self, name: str, wanted: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """(revision, its files); None if there is no such repository or revision."""
        commits = self.repositories.get(name)
        if commits is None:
            return None
        known = {revision(i): files for i, files in enumerate(commits)}
        at = revision(len(commits) - 1) if wanted == "main" else wanted
        if not commits:
            return at, {}
        return (at, known[at]) if at in known else None


def revision(number: int) -> str:
    return hashlib.sha1(str(number).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def _answer(self, content=b"", status=200, **headers) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def _path(self) -> list[str]:
        self.hub.requests.append(f"{self.command} {self.path}")
        self.hub.tokens.add(self.headers.get("Authorization"))
        return unquote(urlsplit(self.path).path).strip("/").split("/")

    def do_GET(self):
        match self._path():
            case ["api", "models", owner, name, *rest]:
                wanted = rest[1] if rest[:1] == ["revision"] else "main"
                self._send_info(f"{owner}/{name}", wanted)
            case [owner, name, "resolve", wanted, *file]:
                self._send_file(f"{owner}/{name}", wanted, "/".join(file))
            case _:
                self._answer({}, 404)

    do_HEAD = do_GET

    def _send_info(self, name: str, wanted: str) -> None:
        found = self.hub.files(name, wanted)
        if name not in self.hub.repositories:
            self._missing("RepoNotFound")
        elif found is None:
            self._missing("RevisionNotFound")
        else:
            sha, files = found
            siblings = [{"rfilename": file} for file in files]
            self._answer({"id": name, "modelId": name, "sha": sha, "siblings": siblings})

    def _send_file(self, name: str, wanted: str, file: str) -> None:
        found = self.hub.files(name, wanted)
        if found is None or file not in found[1]:
            self._missing("EntryNotFound")
            return
        data = found[1][file]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self._answer(data, ETag=etag, X_Repo_Commit=found[0], Accept_Ranges="bytes")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        match self._path():
            case ["api", "repos", "create"]:
                wanted = json.loads(body)
                name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
                self.hub.repositories.setdefault(name, [])
                self._answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
            case ["api", "validate-yaml"]:
                self._answer({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "preupload", _]:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self._answer({"files": files})
            case ["api", "models", owner, name, "commit", _]:
                lines = [json.loads(line) for line in body.splitlines()]
                files = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines if line["key"] == "file"
                }  # fmt: skip
                sha = self.hub.commit(f"{owner}/{name}", files)
                url = f"{self.hub.url}/{owner}/{name}/commit/{sha}"
                self._answer(
                    {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}
                )
            case _:
                self._answer({}, 404)


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A Hub that answers as long as the context lasts."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub, "timeout": 20})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join(10)
