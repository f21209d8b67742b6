"""A server on this machine that answers as the Hugging Face hub does: repositories, commits, files.

`python hub_server.py FOLDER` prints its address. It knows one user, whose token is `hf_right`. It
keeps each repository as a folder; the name of a commit is a hash of what the files hold."""
import base64
import hashlib
import json
import re
import sys
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import yaml

ROOT = Path(sys.argv[1]) if __name__ == "__main__" else Path(tempfile.gettempdir())
TOKEN = "hf_right"


def commit_of(folder: Path) -> str:
    "Forty digits that change with the content of a repository."
    parts = [path.name.encode() + path.read_bytes() for path in files_of(folder)]
    return hashlib.sha1(b"".join(parts)).hexdigest()


def files_of(folder: Path) -> list[Path]: return sorted(p for p in folder.rglob("*") if p.is_file())


def wrong_in(card: str) -> list[dict[str, str]]:
    "What the hub would refuse of the metadata of a card."
    data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
    found = []
    base = data.get("base_model")
    if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base): found.append("base_model")
    relation = data.get("base_model_relation", "finetune")
    if relation not in ("adapter", "merge", "quantized", "finetune"): found.append("relation")
    if not all(isinstance(tag, str) for tag in data.get("tags", [])): found.append("tags")
    return [{"message": f"wrong: {name}"} for name in found]


class Hub(BaseHTTPRequestHandler):
    "The few requests that huggingface_hub makes for a push and for a pull."
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def answer(self, status: int, content=b"", **headers):
        if not isinstance(content, bytes): content = json.dumps(content).encode()
        self.send_response(status)
        plain = {"Content-Length": str(len(content)), "Content-Type": "application/json"}
        for name, value in (plain | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(content)

    def refuse(self, status: int, code: str):
        self.answer(status, {"error": code}, X_Error_Code=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self):
        path = unquote(urlparse(self.path).path)
        body = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized")
        if path == "/api/validate-yaml":
            wrong = wrong_in(json.loads(body)["content"])
            return self.answer(200, {"errors": wrong, "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            there = (ROOT / name).exists()
            (ROOT / name).mkdir(parents=True, exist_ok=True)
            told = {"url": f"{self.address}/{name}", "name": name}
            return self.answer(409 if there else 200, told)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            asked = json.loads(body)["files"]
            return self.answer(200, {"files": [{"path": file["path"], "uploadMode": "regular",
                                                "shouldIgnore": False} for file in asked]})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] != "file": continue
                file = ROOT / match[1] / entry["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(entry["value"]["content"]))
            oid = commit_of(ROOT / match[1])
            return self.answer(200, {"commitUrl": f"{self.address}/{match[1]}/commit/{oid}",
                                     "commitOid": oid, "success": True})
        self.refuse(404, "RepoNotFound")

    @property
    def address(self) -> str: return f"http://127.0.0.1:{self.server.server_port}"

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+|/tree/\w+(/.*)?)?", path)
        name = match[1] if match else "/".join(path.split("/")[1:3])
        folder = ROOT / name
        if not folder.is_dir(): return self.refuse(401, "RepoNotFound")
        oid = commit_of(folder)
        if match is None:
            _, revision, *rest = path.removeprefix(f"/{name}/").split("/")
            file = folder.joinpath(*rest)
            if not file.is_file(): return self.refuse(404, "EntryNotFound")
            content = file.read_bytes()
            return self.answer(200, content, X_Repo_Commit=oid,
                               ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        names = [str(path.relative_to(folder)) for path in files_of(folder)]
        if "/tree/" in path:
            return self.answer(200, [
                {"type": "file", "path": name, "size": (folder / name).stat().st_size,
                 "oid": hashlib.sha1((folder / name).read_bytes()).hexdigest()} for name in names])
        told = {"id": name, "modelId": name, "sha": oid, "private": False, "tags": [], "likes": 0}
        self.answer(200, told | {"downloads": 0, "siblings": [{"rfilename": n} for n in names]})

    do_HEAD = do_GET


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
