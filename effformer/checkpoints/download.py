"""Download a file from the Hugging Face hub: bounded waiting, and errors of one line (extra `hub`)."""

from __future__ import annotations

import inspect
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from ..extras import install

T = TypeVar("T")

# Seconds to wait for the hub's answer and for a file's first byte, over all addresses, redirects and look-ups of names.
# HF_HUB_ETAG_TIMEOUT overrides them.
WAIT, WAIT_IF_CACHED = 6.0, 3.0
_REMEMBERED = 10.0  # seconds: loading a checkpoint asks several times, and a silent hub should cost its time once

_LOG_IN = "check its name; log in (`hf auth login`, or HF_TOKEN) if it is private or gated"
_ROUTE = "check HF_ENDPOINT, the proxy and the firewall"
_CERTIFICATES = "set SSL_CERT_FILE to a file with the certificates of the proxy or mirror"
_REMEDIES = {
    401: _LOG_IN,
    403: f"{_LOG_IN}; a proxy or firewall may also refuse",
    404: f"check its name and revision, and {_ROUTE.removeprefix('check ')}",
    407: "give user and password: HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT",
    408: "try again later",
    429: "wait some minutes, or log in (`hf auth login`)",
}


class HubError(ConnectionError):
    """The Hugging Face hub gives no file, and the cache has none. The message names the cause and the way out."""


class _Cause(NamedTuple):
    cause: str
    remedy: str


def download(repository: str, name: str, **keywords: Any) -> Path | None:
    """A file of a hub repository, from the cache if the hub does not answer; None if the repository lacks it.

    The hub is asked once, without repetition. Only a download that has begun is repeated.

    Args:
        repository: "owner/name".
        name: of the file.
        **keywords: of `huggingface_hub.hf_hub_download`.

    Raises:
        HubError: where neither the hub nor the cache gives the file.
        ImportError: without huggingface_hub.
        TypeError: for a keyword that `hf_hub_download` does not know.
        ValueError: for a name that the hub would not allow.
    """
    try:
        urlsplit(os.environ.get("HF_ENDPOINT", "")).port  # noqa: B018  # the import below looks at it
    except ValueError as error:
        raise HubError(f"{repository}: HF_ENDPOINT is no URL ({_line(error)}): set it to https://HOST") from error
    try:
        import huggingface_hub
        from huggingface_hub import constants
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(f"checkpoint: {repository} is a hub id, to download it: {install('hub')}") from error
    inspect.signature(huggingface_hub.hf_hub_download).bind(repository, name, **keywords)
    place = {key: value for key, value in keywords.items() if key in ("cache_dir", "repo_type", "revision")}
    file = "/".join(filter(None, (keywords.get("subfolder"), name)))
    cached = huggingface_hub.try_to_load_from_cache(repository, file, **place)
    if keywords.get("force_download"):
        cached = None
    endpoint = keywords.get("endpoint") or constants.ENDPOINT
    wait = _seconds("HF_HUB_ETAG_TIMEOUT", WAIT if cached is None else WAIT_IF_CACHED)

    def ask() -> str | None:
        """Ask for the file and for its first byte. Returns its path if the cache has this version of it."""
        commit = _commit(repository, file, endpoint, wait, keywords)
        found = huggingface_hub.try_to_load_from_cache(repository, file, **place | {"revision": commit})
        if isinstance(found, str) and not keywords.get("force_download"):
            return found
        _read_first_byte(repository, file, endpoint, wait, keywords)
        return None

    try:
        if not keywords.get("local_files_only"):
            if (found := _remembering(endpoint, lambda: _within(wait, ask))) is not None:
                return Path(found)
            with _quiet():
                return Path(huggingface_hub.hf_hub_download(repository, name, **keywords))
        failure: Exception = FileNotFoundError("local_files_only is set")
    except HFValidationError:
        raise
    except Exception as error:  # of a server and of three HTTP libraries: any type
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        failure = error
    if cached is not None:
        return Path(cached) if isinstance(cached, str) else None  # else a mark: the repository lacks the file
    cause, remedy = _explained(failure, wait)
    host = urlsplit(endpoint).hostname or "the hub"
    raise HubError(
        f"{repository}: {file} cannot be had from {host}, and is not in the cache: {cause}: {remedy}"
    ) from failure


def _commit(repository: str, file: str, endpoint: str, wait: float, keywords: dict[str, Any]) -> str:
    """The commit that a revision stands for. Raises what the hub library raises, but asks once."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import FileMetadataError

    url = _url(repository, file, endpoint, keywords)
    metadata = get_hf_file_metadata(url, token=keywords.get("token"), timeout=wait, headers=keywords.get("headers"))
    if metadata.commit_hash is None or metadata.etag is None:
        raise FileMetadataError("no commit and no ETag in the answer")
    return str(metadata.commit_hash)


def _read_first_byte(repository: str, file: str, endpoint: str, wait: float, keywords: dict[str, Any]) -> None:
    """Begin to download, since the content comes from other hosts than the answer: a firewall may stop these."""
    from huggingface_hub import utils

    library: Any = utils  # its names differ between versions
    url, session = _url(repository, file, endpoint, keywords), library.get_session()
    headers = library.build_hf_headers(token=keywords.get("token"), headers=keywords.get("headers"))
    headers["Range"] = "bytes=0-0"
    if hasattr(session, "stream"):  # httpx: huggingface_hub from 1.0 on
        with session.stream("GET", url, headers=headers, timeout=wait, follow_redirects=True) as response:
            library.hf_raise_for_status(response)
            next(response.iter_raw(), None)
    else:
        with session.get(url, headers=headers, timeout=wait, stream=True) as response:
            library.hf_raise_for_status(response)
            next(response.iter_content(1), None)


def _url(repository: str, file: str, endpoint: str, keywords: dict[str, Any]) -> str:
    from huggingface_hub import hf_hub_url

    named = {key: keywords[key] for key in ("repo_type", "revision") if key in keywords}
    return str(hf_hub_url(repository, file, endpoint=endpoint, **named))


# --- time -------------------------------------------------------------------------------------------------------------


def _seconds(variable: str, default: float) -> float:
    """The seconds that an environment variable says, as the hub library reads it."""
    said = os.environ.get(variable, "")
    return float(said) if said.isascii() and said.isdigit() and int(said) else default


def _within(seconds: float, function: Callable[[], T]) -> T:
    """The result of `function`, which is left to itself after `seconds`.

    Timeouts of an HTTP library do not bound the whole: each address, redirect and packet begins anew, and the look-up
    of a name has none.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="effformer-hub", daemon=True).start()
    return future.result(seconds)


_failed: dict[tuple[Any, ...], tuple[float, Exception]] = {}


def _remembering(endpoint: str, function: Callable[[], T]) -> T:
    """The result of `function`. If it was slow to fail a moment ago, it fails at once."""
    key, start = (endpoint, *sorted(getproxies().items())), time.monotonic()
    until, failure = _failed.get(key, (start, None))
    if failure is not None and start < until:
        raise failure
    try:
        return function()
    except Exception as error:
        if time.monotonic() - start > 1:
            _failed[key] = time.monotonic() + _REMEMBERED, error
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hub library's lines about repeated requests off the terminal."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    if level == logging.WARNING:  # its default; another one is the user's choice
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


# --- errors -----------------------------------------------------------------------------------------------------------


def _explained(error: BaseException, wait: float) -> _Cause:
    """The cause of a failed request and its remedy, from the error and those that it came from.

    Types are known by name: huggingface_hub used requests, then httpx, then httpx2.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    text = next((line for link in chain if (line := _line(link))), type(error).__name__)
    status = next((code for link in chain if (code := _status(link))), None)
    if "OfflineModeIsEnabled" in names:
        return _Cause("HF_HUB_OFFLINE is set", "unset it, or download the file before")
    if status is not None or "ProxyError" in names:
        who = "the proxy" if "ProxyError" in names or status == 407 else "the server"
        if status is None:
            return _Cause(f"{who} refuses ({text})", _ROUTE)
        phrase = next((known.phrase for known in HTTPStatus if known == status), "")
        said = next((said for link in chain if (said := getattr(link, "server_message", None))), None)
        answer = " ".join(filter(None, (f"{status} {phrase}".strip(), said and f"({_line(said)})")))
        remedy = "try again later" if status >= 500 else _REMEDIES.get(status, _ROUTE)
        return _Cause(f"{who} answers {answer}", remedy)
    if "TooManyRedirects" in names:
        return _Cause("it redirects in a circle", _ROUTE)
    if "SSLError" in names or any(isinstance(link, ssl.SSLError) for link in chain):
        return _Cause(f"TLS fails ({text})", f"{_CERTIFICATES}, or {_ROUTE}")
    if names & {"UnsupportedProtocol", "InvalidURL", "MissingSchema", "InvalidSchema"} or type(error) is ValueError:
        return _Cause(f"HF_ENDPOINT or the proxy is no URL ({text})", "set it to https://HOST")
    if any(isinstance(link, socket.gaierror) for link in chain) or "NameResolutionError" in names:
        return _Cause("its name, or the proxy's, is not found", "check the network, HF_ENDPOINT and the proxy")
    if names & {"TimeoutError", "TimeoutException", "Timeout"}:
        return _Cause(f"no answer within {wait:g} s", f"{_ROUTE}; HF_HUB_ETAG_TIMEOUT=60 waits for 60 s")
    if "FileMetadataError" in names:
        return _Cause("an answer came, but not from a hub", _ROUTE)
    if names & {"RemoteProtocolError", "ReadError", "WriteError", "ChunkedEncodingError", "ConnectionResetError"}:
        return _Cause(f"it hangs up, or its answer is damaged ({text})", f"{_ROUTE}, or try again")
    if names & {"ConnectError", "ConnectionError"}:
        return _Cause(f"no connection ({text})", _ROUTE)
    if isinstance(error, FileNotFoundError) and error.errno is not None and error.filename is None:
        return _Cause("SSL_CERT_FILE or SSL_CERT_DIR names no file", _CERTIFICATES)
    if isinstance(error, OSError) and error.errno is not None:
        return _Cause(
            f"a file fails ({text})", "check the space and the rights in the cache; HF_HOME names another one"
        )
    if "local_files_only" in text:
        return _Cause(text, "leave it out, or download the file before")
    return _Cause(f"{type(error).__name__} ({text})", _ROUTE)


def _status(error: BaseException) -> int | None:
    """The status that a server or a proxy answered with."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    if code is None and type(error).__name__ == "ProxyError" and (match := re.match(r"(\d{3})\b", str(error))):
        code = int(match[1])
    return code


def _line(error: BaseException | str) -> str:
    """The first line of a message, short, without the password of a proxy."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"//[^/\s@]*@", "//***@", lines[0])[:150].rstrip(".") if lines else ""
