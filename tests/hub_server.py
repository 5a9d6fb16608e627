"""A server that speaks as much of the hub's language as downloads and uploads need."""

import base64
import http.server
import json
import os
import threading
from pathlib import Path
from urllib.parse import unquote

REVISION = "0123456789abcdef0123456789abcdef01234567"


def serve(root: Path) -> str:
    """Serves the repositories root/OWNER/NAME from a thread; returns the server's address."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            match self.parts():
                case ["api", "models", owner, name, *rest] if (root / owner / name).is_dir():
                    folder = root / owner / name
                    files = sorted(f for f in folder.rglob("*") if f.is_file())
                    names = [f.relative_to(folder).as_posix() for f in files]
                    if rest[:1] == ["tree"]:
                        self.answer(
                            [
                                {"type": "file", "path": n, "oid": n, "size": f.stat().st_size}
                                for n, f in zip(names, files, strict=True)
                            ]
                        )
                    else:
                        siblings = [{"rfilename": n} for n in names]
                        repository = f"{owner}/{name}"
                        self.answer({"id": repository, "sha": REVISION, "siblings": siblings})
                case [owner, name, "resolve", _, *path] if (root / owner / name).is_dir():
                    self.answer(root.joinpath(owner, name, *path).read_bytes())
                case _:
                    self.refuse("RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != "Bearer hf_secret":
                return self.refuse("unauthorized", 401)
            match self.parts():
                case ["api", "repos", "create"]:
                    wanted = json.loads(body)
                    name = f"{wanted['organization']}/{wanted['name']}"
                    (root / name).mkdir(parents=True, exist_ok=True)
                    (root / name / ".private").write_text(json.dumps(wanted))
                    self.answer({"url": f"{address}/{name}", "id": name})
                case ["api", "validate-yaml"]:
                    self.answer({"errors": [], "warnings": []})
                case ["api", "models", _, _, "preupload", _]:
                    files = [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["size"] > 20_000 else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                    self.answer({"files": files})
                case [_, _, "info", "lfs", "objects", "batch"]:
                    objects = [
                        {**file, "actions": {"upload": {"href": f"{address}/lfs/{file['oid']}"}}}
                        for file in json.loads(body)["objects"]
                    ]
                    self.answer({"transfer": "basic", "objects": objects})
                case ["api", "models", owner, name, "commit", _]:
                    for line in map(json.loads, body.splitlines()):
                        value = line["value"]
                        if line["key"] == "file":
                            content = base64.b64decode(value["content"])
                        elif line["key"] == "lfsFile":
                            content = large[value["oid"]]
                        else:
                            continue
                        path = root / owner / name / value["path"]
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(content)
                    commit = f"{address}/{owner}/{name}/commit/{REVISION}"
                    self.answer({"commitOid": REVISION, "commitUrl": commit})
                case _:
                    self.refuse("unknown request")

        def do_PUT(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            large[self.parts()[1]] = content
            self.answer({})

        def parts(self) -> list[str]:
            path = unquote(self.path.split("?")[0]).strip("/")
            return path.replace(".git/", "/").split("/")

        def answer(self, content) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            kind = "octet-stream" if isinstance(content, bytes) else "json"
            self.send_response(200)
            self.send_header("Content-Type", f"application/{kind}")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{hash(body)}"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, reason: str, status: int = 404) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", reason)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    large: dict[str, bytes] = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Read when huggingface_hub is imported.
    os.environ.update(HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
    return address
