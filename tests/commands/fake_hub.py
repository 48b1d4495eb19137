"""A Hugging Face hub on the loopback interface, with what an upload needs of it."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_right"


class Hub(ThreadingHTTPServer):
    """A hub that keeps what was committed.

    Attributes:
        repos: name -> branch -> path -> bytes.
        private: names of private repositories.
        messages: of all commits.
        licenses: of models that exist and are not stored.
        read_only: whether the token may not write.
        is_full: whether its store takes no files.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.blobs, self.licenses = {}, {}, {}
        self.private, self.messages = [], []
        self.read_only = self.is_full = False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def is_refused(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
            return True
        if self.server.read_only and self.command == "POST":
            self.answer({"error": "You don't have the rights."}, 403)
            return True
        return False

    def do_GET(self):
        if self.is_refused():
            return
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4])
        if parts[4:5] == ["tree"]:
            branch = self.server.repos[name][parts[5]]
            rows = [
                {"type": "file", "path": path, "oid": "0", "size": len(content)}
                for path, content in branch.items()
            ]
            self.answer(rows)
        elif name in self.server.licenses:
            self.answer({"id": name, "cardData": {"license": self.server.licenses[name]}})
        elif name in self.server.repos:
            files = self.server.repos[name]["main"]
            self.answer({"id": name, "siblings": [{"rfilename": path} for path in files]})
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_PUT(self):  # as of an object store: its addresses need no token
        if self.server.is_full:
            self.body()
            self.answer({"error": "full"}, 507)
            return
        self.server.blobs[self.path.strip("/").split("/")[-1]] = self.body()
        self.answer({})

    def do_POST(self):
        content = self.body()
        if self.is_refused():
            return
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            self.create(json.loads(content))
        elif path == "/api/validate-yaml":
            assert json.loads(content)["repoType"] == "model"
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            rows = [
                {
                    "path": row["path"],
                    "uploadMode": "lfs" if row["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for row in json.loads(content)["files"]
            ]
            self.answer({"files": rows})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **row,
                    "actions": {"upload": {"href": f"{self.server.url}/store/{row['oid']}"}},
                }
                for row in json.loads(content)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/branch/" in path:
            name, branch = path.removeprefix("/api/models/").split("/branch/")
            branches = self.server.repos[name]
            branches.setdefault(branch, dict(branches["main"]))
            self.answer({})
        else:
            self.commit(path, content)

    def create(self, settings):
        name = f"{settings.get('organization') or 'me'}/{settings['name']}"
        if name in self.server.repos:
            self.answer({"error": f"{name} exists", "url": f"{self.server.url}/{name}"}, 409)
            return
        self.server.repos[name] = {"main": {}}
        # the first of version 2 of huggingface_hub, the second of version 1
        if settings.get("visibility") == "private" or settings.get("private"):
            self.server.private.append(name)
        self.answer({"url": f"{self.server.url}/{name}", "name": name})

    def commit(self, path, content):
        name, branch = path.removeprefix("/api/models/").split("/commit/")
        files = self.server.repos[name][branch]
        for line in content.splitlines():
            row = json.loads(line)
            key, value = row["key"], row["value"]
            if key == "header":
                self.server.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                blob = self.server.blobs[value["oid"]]
                assert hashlib.sha256(blob).hexdigest() == value["oid"]
                files[value["path"]] = blob
            else:
                del files[value["path"]]
        commit = f"{self.server.url}/{name}/commit/1"
        self.answer({"commitUrl": commit, "commitOid": "1", "hookOutput": ""})


@contextlib.contextmanager
def running():
    """Yield a hub that serves until the end of the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
