"""The hub that refuses, is silent, hangs up or is not there: errors of one line, in bounded time."""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_hub
import pytest
from command_line import run
from fake_hub import REVISION, response, serve

from effformer.checkpoints import download, download_errors, hub

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
pytestmark = pytest.mark.usefixtures("no_gpu", "new_session")
Answer = Callable[[socket.socket, bytes], object]

FOUND = response("200 OK", f"X-Repo-Commit: {REVISION}", 'ETag: "etag"', body=b"x" * 1000)
WEIGHTS = "model.safetensors"


@pytest.fixture
def new_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, token or endpoint of this machine, and no connection or failure of an earlier test."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_ETAG_TIMEOUT",
                 "HF_HUB_DOWNLOAD_TIMEOUT"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "_failed", {})
    huggingface_hub.close_session()


def say(content: bytes) -> Answer:
    return lambda connection, request: connection.sendall(content)


def to_get(answer: Answer) -> Answer:
    """The file is there, and `answer` is given to those that want its content."""

    def both(connection: socket.socket, request: bytes) -> None:
        if request.startswith(b"HEAD"):
            connection.sendall(FOUND[: FOUND.index(b"\r\n\r\n") + 4])
        else:
            answer(connection, request)

    return both


def silent(connection: socket.socket, request: bytes) -> None:
    time.sleep(5)


def slow(connection: socket.socket, request: bytes) -> None:
    """A byte comes before each timeout of the HTTP library."""
    for byte in b"HTTP/1.1 200 OK\r\nX-Letters: " + b"a" * 50:
        connection.sendall(bytes([byte]))
        time.sleep(0.1)


def failure(tmp_path: Path, endpoint: str, **keywords: Any) -> str:
    with pytest.raises(hub.HubError) as caught:
        hub.locate("someone/network", endpoint=endpoint, cache_dir=tmp_path, **keywords)
    assert isinstance(caught.value, ConnectionError)
    message = str(caught.value)
    assert message.startswith(f"someone/network: {WEIGHTS} cannot be had from ")
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    ("answer", "cause", "remedy"),
    [
        (lambda connection, request: None, "it hangs up", "check HF_ENDPOINT, the proxy and the firewall"),
        (say(b"\0\xff\r\n\r\n"), "its answer is damaged", "HF_ENDPOINT"),
        (say(response("302 Found", "Location: /again")), "it redirects in a circle", "HF_ENDPOINT"),
        (say(response("200 OK", body=b"<html>")), "an answer came, but not from a hub", "HF_ENDPOINT"),
        (say(response("401 Unauthorized")), "answers 401 Unauthorized", "hf auth login"),
        (say(response("403 Forbidden")), "answers 403 Forbidden", "hf auth login"),
        (
            say(response("403 Forbidden", "X-Error-Code: GatedRepo", "X-Error-Message: ask for access")),
            "answers 403 Forbidden (ask for access)",
            "gated",
        ),
        (say(response("404 Not Found")), "answers 404 Not Found", "check its name and revision"),
        (say(response("404 Not Found", "X-Error-Code: RepoNotFound")), "answers 404 Not Found", "check its name"),
        (say(response("407 Proxy Authentication Required")), "the proxy answers 407", "HTTPS_PROXY=http://USER:PASSWORD"),
        (say(response("429 Too Many Requests", "Retry-After: 300")), "answers 429 Too Many Requests", "wait some minutes"),
        (say(response("500 Oops", body=b"[1]")), "answers 500 Internal Server Error", "try again later"),
        (say(response("503 Busy", "Retry-After: 300")), "answers 503 Service Unavailable", "try again later"),
        (to_get(lambda connection, request: None), "it hangs up", "HF_ENDPOINT"),
        (to_get(say(response("502 Bad"))), "answers 502 Bad Gateway", "try again later"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, answer: Answer, cause: str, remedy: str) -> None:
    start = time.monotonic()
    with serve(answer) as endpoint:
        message = failure(tmp_path, endpoint)
    assert cause in message
    assert remedy in message
    assert time.monotonic() - start < 4  # the hub library waits for 300 seconds, or tries again for 24


@pytest.mark.parametrize("answer", [silent, slow, to_get(silent), to_get(slow)])
def test_silence_is_bounded_and_costs_its_time_once(
    tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "WAIT", 1.2)
    with serve(answer) as endpoint:
        start = time.monotonic()
        assert "no answer within 1.2 s" in failure(tmp_path, endpoint)
        assert 1 < time.monotonic() - start < 3
        start = time.monotonic()
        assert "HF_HUB_ETAG_TIMEOUT=60 waits" in failure(tmp_path, endpoint)
        assert time.monotonic() - start < 0.5
    monkeypatch.setattr(download, "_failed", {})
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "2")
    with serve(answer) as endpoint:
        assert "no answer within 2 s" in failure(tmp_path, endpoint)


def test_names_and_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(say(FOUND)) as endpoint:
        assert "TLS fails" in (message := failure(tmp_path, endpoint.replace("http", "https")))
        assert "SSL_CERT_FILE" in message
    assert "no connection to 127.0.0.1 (" in failure(tmp_path, endpoint)
    elsewhere = f"Location: {endpoint.replace('127.0.0.1', '127.0.0.2')}/a"
    with serve(say(response("302 Found", elsewhere, f"X-Repo-Commit: {REVISION}", 'ETag: "etag"'))) as redirecting:
        assert "no connection to 127.0.0.2 (" in failure(tmp_path, redirecting)
    for url in ("huggingface.co", "ftp://huggingface.co", "http://a..b", "http://x y", "https://", "http://h:port"):
        with pytest.raises(
            hub.HubError, match=r"^someone/network: endpoint is not a URL \(.*\): set it to https://HOST$"
        ):
            hub.locate("someone/network", endpoint=url, cache_dir=tmp_path)

    def unknown(*arguments: object, **keywords: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "the name of the server (no.such.host), or the proxy's, is not found" in failure(
        tmp_path, "https://no.such.host"
    )
    monkeypatch.setenv("HF_ENDPOINT", "http://[bad")  # huggingface_hub could not be imported
    with pytest.raises(hub.HubError, match="HF_ENDPOINT is not a URL"):
        hub.locate("someone/network")


def test_proxies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(say(response("407 Proxy Authentication Required"))) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        message = failure(tmp_path, "https://hub.example")
    assert "the proxy answers 407 Proxy Authentication Required: give user and password" in message
    huggingface_hub.close_session()
    monkeypatch.setenv("HTTPS_PROXY", "gopher://user:secret@proxy:1")
    assert "secret" not in (message := failure(tmp_path, "https://hub.example"))
    assert "the proxy is not a URL" in message
    huggingface_hub.close_session()
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setitem(sys.modules, "socks", None)
    message = failure(tmp_path, "https://hub.example")
    assert re.search("ALL_PROXY names a SOCKS proxy.*: pip install (socksio|pysocks), or unset ALL_PROXY$", message)
    assert (
        download_errors.line_of("\n GET http://user:secret@proxy:1/x failed.\nmore")
        == "GET http://***@proxy:1/x failed"
    )


@pytest.mark.parametrize("token", [None, "hf_\0secret"])
def test_tokens_that_cannot_be_sent(tmp_path: Path, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_\xe9t\xe9")
    with serve(say(FOUND)) as endpoint:
        message = failure(tmp_path, endpoint, token=token)
    assert "HF_TOKEN, or another header, " in message
    assert "set HF_TOKEN as " in message
    assert "secret" not in message


@pytest.mark.parametrize("variable", ["HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"])
@pytest.mark.parametrize("value", ["2.5", "abc", "", "0", "-1"])
def test_timeouts_that_the_hub_library_cannot_read(
    tmp_path: Path, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(hub.HubError, match=f"{variable}: got '{value}', allowed is a whole number of seconds"):
        hub.locate("someone/network", cache_dir=tmp_path)


def test_a_slow_refusal_of_one_file_is_not_that_of_another(tmp_path: Path) -> None:
    repository = fake_hub.repository({"pytorch_model.bin": b"weights"})

    def slow_to_answer(connection: socket.socket, request: bytes) -> None:
        time.sleep(1.2 if WEIGHTS.encode() in request else 0)
        repository(connection, request)

    with serve(slow_to_answer) as endpoint:
        assert hub.locate("someone/network", endpoint=endpoint, cache_dir=tmp_path).name == "pytorch_model.bin"
        assert hub.locate("someone/other", endpoint=endpoint, cache_dir=tmp_path).name == "pytorch_model.bin"


def stalling(after: int) -> Answer:
    """The first byte comes, as the probe wants it; the download gets the beginning of the content and then silence."""

    def answer(connection: socket.socket, request: bytes) -> None:
        if b"bytes=0-0" in request:
            connection.sendall(FOUND)
            return
        connection.sendall(FOUND[: FOUND.index(b"\r\n\r\n") + 4 + after] if after else b"")
        time.sleep(8)

    return to_get(answer)


@pytest.mark.parametrize("after", [0, 500])
def test_a_download_that_stands_still_is_given_up(tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAIT", 1.2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    with serve(stalling(after)) as endpoint:
        start = time.monotonic()
        assert "no data for 1.2 s: check HF_ENDPOINT" in (message := failure(tmp_path, endpoint))
        assert message.endswith("HF_HUB_DOWNLOAD_TIMEOUT=60 waits for 60 s")
        assert time.monotonic() - start < 3.5
        time.sleep(2)
    assert not list(tmp_path.rglob("*.incomplete"))  # the thread ended with the library's own timeout


def test_a_slow_download_that_goes_on_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAIT", 1.0)
    content = bytes(8 * download._CHUNK)
    found = response("200 OK", f"X-Repo-Commit: {REVISION}", 'ETag: "etag"', body=content)

    def drip(connection: socket.socket, request: bytes) -> None:
        end = found.index(b"\r\n\r\n") + 4
        connection.sendall(found[:end])
        for place in range(0, len(content) if request.startswith(b"GET") else 0, download._CHUNK):
            connection.sendall(content[place : place + download._CHUNK])
            time.sleep(0.4)

    with serve(drip) as endpoint:
        start = time.monotonic()
        assert hub.locate("someone/network", endpoint=endpoint, cache_dir=tmp_path).read_bytes() == content
        assert time.monotonic() - start > 2


def test_files_of_xet_come_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_wanted(*arguments: object, **keywords: object) -> None:
        raise AssertionError("xet")

    monkeypatch.setattr("huggingface_hub.file_download.xet_get", not_wanted)
    pytest.importorskip("hf_xet")
    before = constants.HF_HUB_DISABLE_XET, constants.DOWNLOAD_CHUNK_SIZE

    def answer(connection: socket.socket, request: bytes) -> None:
        link = f'Link: <{endpoint}/token>; rel="xet-auth"'
        headers = (f"X-Repo-Commit: {REVISION}", 'ETag: "etag"', f"X-Xet-Hash: {'a' * 64}", link)
        found = response("200 OK", *headers, body=b"weights")
        connection.sendall(found[: found.index(b"\r\n\r\n") + 4] if request.startswith(b"HEAD") else found)

    with serve(answer) as endpoint:
        assert hub.locate("someone/network", endpoint=endpoint, cache_dir=tmp_path).read_bytes() == b"weights"
    assert before == (constants.HF_HUB_DISABLE_XET, constants.DOWNLOAD_CHUNK_SIZE)


def test_wrong_calls_are_not_the_hubs_fault(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="colour"):
        hub.locate("someone/network", colour="red")
    with pytest.raises(ValueError, match="Repo id|repo_id"):
        hub.locate("someone/net--work")
    assert "local_files_only" in failure(tmp_path, "http://127.0.0.1:9", local_files_only=True)


def test_a_download_comes_from_the_cache_afterwards(tmp_path: Path) -> None:
    requests = []
    answer = fake_hub.repository({"pytorch_model.bin": b"weights", "config.json": b"\xef\xbb\xbf{}"})

    def counted(connection: socket.socket, request: bytes) -> None:
        requests.append(request[:4])
        answer(connection, request)

    def locate() -> Path:
        return hub.locate("someone/network", endpoint=endpoint, cache_dir=tmp_path)

    with serve(counted) as endpoint:
        assert locate().read_bytes() == b"weights"
        assert hub.read_config("someone/network", endpoint=endpoint, cache_dir=tmp_path) == {}
        requests.clear()
        locate()
        assert requests == [b"HEAD", b"HEAD"]  # model.safetensors is not there, pytorch_model.bin has not changed
    assert locate().read_bytes() == b"weights"


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Let `pretrained` ask another server, and use another cache."""

    def use(endpoint: str, cache: Path) -> None:
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(cache),
        }.items():
            monkeypatch.setattr(constants, name, value)

    return use


def test_a_cached_checkpoint_loads_although_the_hub_is_silent(
    tmp_path: Path, published: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effformer.commands.common import load_network

    monkeypatch.setattr(download, "WAIT_IF_CACHED", 1.0)
    fake_hub.write(tmp_path)
    connections = []

    def watched(connection: socket.socket, request: bytes) -> None:
        connections.append(request)
        silent(connection, request)

    with serve(watched) as endpoint:
        published(endpoint, tmp_path)
        assert load_network(None, "auto", "eager")[3] == hub.PRETRAINED["efficientformer_l1"]
    assert len(connections) == 1  # of four files


def test_run_goes_on_without_lines_of_the_hub_library(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, photo: Path, published: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content of the weights breaks off, and the library tries five times more."""
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    requests = []

    def half(connection: socket.socket, request: bytes) -> None:
        requests.append(request)
        connection.sendall(FOUND[:-900])

    with serve(to_get(half)) as endpoint:
        published(endpoint, tmp_path)
        status, out, err = run(capfd, "run", photo, "--size", "32")
    assert (status, err) == (0, "")
    assert len(requests) == 1 + 6
    assert "no trained weights: timm/efficientformer_l1.snap_dist_in1k: model.safetensors cannot be had" in out
    assert "weights: random (seed 0)" in out
