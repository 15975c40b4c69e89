"""Models of the hub: what its own library says to a hub that refuses, breaks off or is not there, and what users read.

A small server on this machine speaks as much of the hub's protocol as a download needs.
"""

import contextlib
import http.server
import json
import socket
import threading

import pytest

from tests.tiny import build
from wpjax.checkpoints.checkpoint import fingerprint, load_checkpoint, local_path
from wpjax.errors import CheckpointError

COMMIT = "c" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the files of its server as org/open. `breaks` readings of the weights break off; or all are refused."""

    protocol_version = "HTTP/1.1"

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        files, path = self.server.files, self.path.partition("?")[0]
        if "org/gated" in path:
            self.answer(403 if self.headers["authorization"] else 401, X_Error_Code="GatedRepo")
        elif "org/none" in path:
            self.answer(401, X_Error_Code="RepoNotFound")
        elif "org/busy" in path:
            self.answer(403, b"no", X_Error_Message="Too busy for you")
        elif path.startswith("/api/models/org/open/revision/"):
            if not path.endswith(("/main", COMMIT)):
                self.answer(404, X_Error_Code="RevisionNotFound")
                return
            self.answer(200, json.dumps({"id": "org/open", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith("/api/models/org/open/tree/"):
            tree = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in files.items()]
            self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        elif path.startswith("/org/open/resolve/"):
            self.file(files, path.rsplit("/", 1)[1])
        else:  # what the library tells of itself
            self.answer(404)

    def file(self, files, name):
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        body = files[name][start:]
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(files[name]) - 1}/{len(files[name])}"
        if self.command == "GET":
            self.server.read.append((name, start))
            if name.endswith(".safetensors") and self.server.refuses:
                self.answer(403, X_Error_Message="Try tomorrow")
                return
            if name.endswith(".safetensors") and self.server.breaks:
                self.server.breaks -= 1
                headers["Content-Length"] = str(len(body))
                body = body[: len(body) // 2]
                self.close_connection = True
        self.answer(206 if start else 200, body, **headers)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build("llama-gqa3", tmp_path_factory.mktemp("model") / "llama").folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "cache"


def point_to(port, monkeypatch):
    """What HF_ENDPOINT does, which the library reads once, when it is imported."""
    hub = f"http://127.0.0.1:{port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub + "/{repo_id}/resolve/{revision}/{filename}"
    )


@contextlib.contextmanager
def serving(folder, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.read, server.breaks, server.refuses = [], 0, False
    point_to(server.server_port, monkeypatch)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def said(hub_id):
    with pytest.raises(CheckpointError) as error:
        local_path(hub_id)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_hub_that_refuses_says_why(folder, cache, monkeypatch):
    with serving(folder, monkeypatch) as server:
        hub = f"http://127.0.0.1:{server.server_port}"
        assert "knows no such model; check the name; if it is private or gated, log in with `hf" in said("org/none")
        assert f"gated: accept its terms at {hub}/org/gated, then log in with `hf auth login`" in said("org/gated")
        assert f"no revision 'v9' of it; {hub}/org/open/refs" in said("org/open@v9")
        assert "did not give it (Got: HfHubHTTPError: 403 Forbidden: Too busy for you" in said("org/busy")
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        assert f"to the owner of this token, as it is gated: ask for access at {hub}/org/gated" in said("org/gated")
        assert "knows no such model; check the name; if it is private, ask for access" in said("org/none")


def test_a_download_goes_on(folder, cache, monkeypatch):
    """Within a file when the connection breaks, and with the files that are left when the command is run again."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    with serving(folder, monkeypatch) as server:
        server.refuses = True
        assert "org/open: no such folder here, and the hub did not give it" in said("org/open")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert f"only a part of it in the cache ({cache}), and HF_HUB_OFFLINE is set; unset it" in said("org/open")
        assert f"it is not in the cache ({cache}), and HF_HUB_OFFLINE is set; unset it, or" in said("org/other")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert ("config.json", 0) in server.read
        server.read.clear()
        server.refuses, server.breaks = False, 1
        model, there = load_checkpoint("org/open"), load_checkpoint(folder)
        # Small files that the refused run did not come to, as its threads were cut off, are read now, too.
        first, second = (start for name, start in server.read if name == "model.safetensors")
        assert first < second
    assert fingerprint(model.cfg, model.params) == fingerprint(there.cfg, there.params)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert local_path("org/open").is_relative_to(cache)


def test_a_hub_that_is_not_there(folder, cache, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_to(port := free.getsockname()[1], monkeypatch)
        assert f"the hub at http://127.0.0.1:{port} cannot be reached ([Errno" in said("org/open")
        snapshot = cache / "models--org--open" / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (cache / "models--org--open" / "refs").mkdir()
        (cache / "models--org--open" / "refs" / "main").write_text(COMMIT)
        (snapshot / "config.json").write_text((folder / "config.json").read_text())
        assert "model.safetensors is not among its files in the cache" in said("org/open")
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
        (snapshot / "model-00001-of-00002.safetensors").write_bytes(b"")
        assert "model-00002-of-00002.safetensors is not among its files in the cache" in said("org/open")
