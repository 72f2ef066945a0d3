"""A Hugging Face cache with random weights in place of the published ones, and servers that answer in the hub's place."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import safetensors.torch

from effformer import create_model
from effformer.checkpoints.hub import PRETRAINED
from effformer.testing import randomise

REVISION = "0" * 40


def write(cache: Path, names: Iterable[str] = ("efficientformer_l1",)) -> None:
    """Put randomised weights of `names` where `pretrained=True` looks for them, with HF_HUB_CACHE set to `cache`."""
    for name in names:
        repository = cache / f"models--{PRETRAINED[name].replace('/', '--')}"
        snapshot = repository / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)
        network = randomise(create_model(name))
        safetensors.torch.save_file(network.state_dict(), snapshot / "model.safetensors")
        (snapshot / "config.json").write_text(
            json.dumps({
                "architecture": name,
                "num_classes": 1000,
                "num_features": network.config.widths[-1],
                "pretrained_cfg": {
                    "tag": "snap_dist_in1k",
                    "input_size": [3, 224, 224],
                    "crop_pct": 0.95,
                    "interpolation": "bicubic",
                    "mean": [0.485, 0.456, 0.406],
                    "std": [0.229, 0.224, 0.225],
                },
            })
        )  # fmt: skip


def use(cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub read files from `cache` only."""
    constants = pytest.importorskip("huggingface_hub.constants")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


@contextlib.contextmanager
def serve(answer: Callable[[socket.socket, bytes], object]) -> Iterator[str]:
    """A server's URL. `answer` gets the connection and the request of each; the server then hangs up."""

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            answer(connection, connection.recv(65536))

    def work() -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                threading.Thread(target=talk, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=work, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def response(status: str, *headers: str, body: bytes = b"") -> bytes:
    """An answer, as `response("404 Not Found")`."""
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + body


def repository(files: dict[str, bytes]) -> Callable[[socket.socket, bytes], object]:
    """Answers as the hub would for a repository that holds these files."""

    def answer(connection: socket.socket, request: bytes) -> None:
        method, path, _ = request.decode().split(" ", 2)
        name = path.rpartition("/")[2]
        commit = f"X-Repo-Commit: {REVISION}"
        if name not in files:
            connection.sendall(response("404 Not Found", "X-Error-Code: EntryNotFound", commit))
            return
        said = response("200 OK", commit, f'ETag: "{name}"', body=files[name])
        connection.sendall(said[: said.index(b"\r\n\r\n") + 4] if method == "HEAD" else said)

    return answer
