"""A local server that speaks as much of the Hub's protocol as pushing to and loading from a model repository needs.

Files travel inside the commit ("regular" uploads), so that no large-file storage is needed. Whatever is asked beyond
this is answered with 404 and kept in `unknown_requests`, which a test should find empty.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


USER = "me"


@dataclass
class Repository:
    """Commits, oldest first: what each was called and the whole content after it."""

    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)  # (sha, message, files)

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits.append((sha, message, files))
        return sha

    def at(self, revision: str | None):
        """The commit of a revision, `(sha, message, files)`, or `None`."""
        if revision in (None, "main"):
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class LocalHub(ThreadingHTTPServer):
    """`with LocalHub() as hub:` serves at `hub.url`; `hub.files("me/x")` is what a repository holds now."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.unknown_requests: list[str] = []

    def __enter__(self):
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self._thread.join()
        self.server_close()

    def files(self, name: str) -> dict[str, bytes]:
        return self.repositories[name].commits[-1][2]

    def messages(self, name: str) -> list[str]:
        return [message for _, message, _ in self.repositories[name].commits]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Quiet."""

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, content, headers=()):
        headers = dict(headers)
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _missing(self, code: str, headers=()):
        self._answer(404, {"error": code}, {"X-Error-Code": code, **dict(headers)})

    def _handle(self):
        path, body = unquote(urlsplit(self.path).path), self._read_body()
        for pattern, method in (
            (r"/api/whoami-v2", self._whoami),
            (r"/api/validate-yaml", self._validate_yaml),
            (r"/api/repos/create", self._create),
            (r"/api/models/([^/]+/[^/]+)/preupload/.+", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/.+", self._commit),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", self._tree),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ):
            if match := re.fullmatch(pattern, path):
                return method(body, *match.groups())
        self.server.unknown_requests.append(f"{self.command} {self.path}")
        return self._missing("NotFound")

    do_GET = do_HEAD = do_POST = _handle

    def _whoami(self, body):
        self._answer(200, {"type": "user", "name": USER, "orgs": []})

    def _validate_yaml(self, body):
        self._answer(200, {"errors": [], "warnings": []})

    def _create(self, body):
        request = json.loads(body)
        name = f"{request.get('organization') or USER}/{request['name']}"
        answer = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.repositories:
            return self._answer(409, {"error": "You already created this repo", **answer})
        self.server.repositories[name] = Repository()
        self.server.repositories[name].commit("initial commit", {".gitattributes": b""})
        return self._answer(200, answer)

    def _preupload(self, body, name):
        modes = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": modes})

    def _commit(self, body, name):
        repository = self.server.repositories[name]
        files, message = dict(self.server.files(name)), ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "deletedFile":
                files.pop(value["path"])
            else:
                return self._answer(400, {"error": f"a commit with {key} is not spoken here"})
        sha = repository.commit(message, files)
        url = f"{self.server.url}/{name}/commit/{sha}"
        return self._answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _find(self, name, revision):
        """The commit asked for, or `None` after the answer that it is missing."""
        repository = self.server.repositories.get(name)
        commit = repository and repository.at(revision)
        if commit is None:
            self._missing("RevisionNotFound" if repository else "RepoNotFound")
        return commit

    def _tree(self, body, name, revision, folder):
        if commit := self._find(name, revision):
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in commit[2].items()
                if path.startswith(f"{folder}/" if folder else "")
            ]
            self._answer(200, entries)

    def _info(self, body, name, revision):
        if commit := self._find(name, revision):
            info = {"_id": "1", "id": name, "modelId": name, "sha": commit[0], "private": False, "tags": []}
            self._answer(200, {**info, "siblings": [{"rfilename": path} for path in commit[2]]})

    def _resolve(self, body, name, revision, path):
        if not (commit := self._find(name, revision)):
            return None
        headers = {"X-Repo-Commit": commit[0]}
        if path not in commit[2]:
            return self._missing("EntryNotFound", headers)
        content = commit[2][path]
        headers |= {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if match := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._answer(206, content[first : last + 1], headers)
        return self._answer(200, content, headers)
