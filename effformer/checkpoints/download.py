"""Download a file from the Hugging Face hub; every wait for data is bounded, errors have one line (extra `hub`)."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from ..extras import install
from .download_errors import NoDataError, explained, is_silence, line_of

T = TypeVar("T")

# Seconds to wait for the hub's answer and for a file's first byte, over all addresses, redirects and look-ups of names.
# HF_HUB_ETAG_TIMEOUT overrides them. A download that began is given up when no data came for as long, or for
# HF_HUB_DOWNLOAD_TIMEOUT.
WAIT, WAIT_IF_CACHED = 4.0, 3.0
_TIMEOUTS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
_HOST = re.compile(r"\[?[0-9a-f:]+(%\w+)?\]?|[^\s./:@]+(\.[^\s./:@]+)*\.?", re.IGNORECASE)
_CHUNK = 16384  # bytes: the library's 10 MB take longer than the wait on slow lines, and would look like silence
_REMEMBERED = 10.0  # seconds: loading a checkpoint asks several times, and a silent hub should cost its time once


class HubError(ConnectionError):
    """The Hugging Face hub gives no file, and the cache has none. The message names the cause and the way out."""


def download(repository: str, name: str, **keywords: Any) -> Path | None:
    """A file of a hub repository, from the cache if the hub does not answer; None if the repository lacks it.

    The hub is asked once, without repetition. A download that began is repeated where it breaks off, and given up when
    no data came for some seconds. It goes over HTTP and not over xet, whose waiting has no bounds.

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
    _check_environment(repository, keywords.get("endpoint"))  # the import below looks at it
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
    wait = _seconds(_TIMEOUTS[0], WAIT if cached is None else WAIT_IF_CACHED)

    def ask() -> str | None:
        """Ask for the file and for its first byte. Returns its path if the cache has this version of it."""
        commit = _commit(repository, file, endpoint, wait, keywords)
        found = huggingface_hub.try_to_load_from_cache(repository, file, **place | {"revision": commit})
        if isinstance(found, str) and not keywords.get("force_download"):
            return found
        _read_first_byte(repository, file, endpoint, wait, keywords)
        return None

    def fetch() -> str:
        if (found := _within(wait, ask)) is not None:
            return found
        with _quiet(), _bounded_library():
            stalled = _seconds(_TIMEOUTS[1], wait)
            folder = _folder(repository, keywords)
            load = partial(huggingface_hub.hf_hub_download, repository, name, **keywords)
            return str(_while_growing(stalled, folder, load))

    try:
        if not keywords.get("local_files_only"):
            return Path(_remembering(endpoint, fetch))
        failure: Exception = FileNotFoundError("local_files_only is set")
    except HFValidationError:
        raise
    except Exception as error:  # of a server and of three HTTP libraries: any type
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        failure = error
    if cached is not None:
        return Path(cached) if isinstance(cached, str) else None  # else a mark: the repository lacks the file
    cause, remedy = explained(failure, wait)
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


def _check_environment(repository: str, endpoint: str | None) -> None:
    """Raise a HubError for values that the hub library fails at in its own words, some of them at its import."""
    for variable in _TIMEOUTS:
        if (said := os.environ.get(variable)) is not None and not (said.isascii() and said.isdigit() and int(said)):
            raise HubError(f"{repository}: {variable}: got {said!r}, allowed is a whole number of seconds, 1 or more")
    for name, url in (("HF_ENDPOINT", os.environ.get("HF_ENDPOINT")), ("endpoint", endpoint)):
        if not url:
            continue
        try:
            address = urlsplit(url)
            address.port  # noqa: B018  # it raises
            reason = "" if _HOST.fullmatch(address.hostname or "") else f"{line_of(url)} has no valid host"
            reason = reason if address.scheme in ("http", "https") else f"{line_of(url)} lacks https://"
        except ValueError as error:
            reason = line_of(error)
        if reason:
            raise HubError(f"{repository}: {name} is not a URL ({reason}): set it to https://HOST")


# --- time -------------------------------------------------------------------------------------------------------------


def _seconds(variable: str, default: float) -> float:
    """The seconds that an environment variable says."""
    return float(os.environ.get(variable, default))


def _within(seconds: float, function: Callable[[], T]) -> T:
    """The result of `function`, which is left to itself after `seconds`.

    Timeouts of an HTTP library do not bound the whole: each address, redirect and packet begins anew, and the look-up
    of a name has none.
    """
    return _begun(function)[0].result(seconds)


def _while_growing(seconds: float, folder: Path, function: Callable[[], T]) -> T:
    """The result of `function`, which is given up once no incomplete file in `folder` changed for `seconds`.

    Another process may be the one that downloads, while `function` waits for its lock.
    """
    future, thread = _begun(function)
    before, since = _incomplete(folder), time.monotonic()
    try:
        while not wait_for([future], min(0.2, seconds)).done:
            now = _incomplete(folder)
            if now != before:
                before, since = now, time.monotonic()
            elif time.monotonic() - since > seconds:
                raise NoDataError(f"{seconds:g}")
        return future.result()
    finally:
        if not future.done():  # silence, or Ctrl-C: the library removes its incomplete file when this arrives
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(SystemExit))
            wait_for([future], 0.3)


def _incomplete(folder: Path) -> dict[str, int]:
    """The sizes of the files that are being downloaded."""
    sizes = {}
    for path in folder.rglob("*.incomplete"):
        with contextlib.suppress(OSError):  # it is complete now
            sizes[str(path)] = path.stat().st_size
    return sizes


def _folder(repository: str, keywords: dict[str, Any]) -> Path:
    """The folder in which the library keeps files while it downloads them."""
    from huggingface_hub import constants, file_download

    if (place := keywords.get("local_dir")) is not None:
        return Path(place) / ".cache" / "huggingface" / "download"
    cache = Path(keywords.get("cache_dir") or constants.HF_HUB_CACHE)
    kind = keywords.get("repo_type") or "model"
    return cache / file_download.repo_folder_name(repo_id=repository, repo_type=kind) / "blobs"


@contextmanager
def _bounded_library() -> Iterator[None]:
    """Let the hub library download over HTTP, and write what came at once.

    It has no argument for either. Downloads in other threads meanwhile do the same.
    """
    from huggingface_hub import constants

    values = {"HF_HUB_DISABLE_XET": True, "DOWNLOAD_CHUNK_SIZE": _CHUNK}
    before = {name: getattr(constants, name) for name in values if hasattr(constants, name)}
    try:
        for name in before:
            setattr(constants, name, values[name])
        yield
    finally:
        for name, value in before.items():
            setattr(constants, name, value)


def _begun(function: Callable[[], T]) -> tuple[Future[T], int]:
    """The future of `function` in a thread that Python does not wait for at its end, and the thread's number."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=work, name="effformer-hub", daemon=True)
    thread.start()
    return future, thread.ident or 0


_failed: dict[tuple[Any, ...], tuple[float, Exception]] = {}


def _remembering(endpoint: str, function: Callable[[], T]) -> T:
    """The result of `function`. If its server was silent a moment ago, for any file, it fails at once."""
    key, start = (endpoint, *sorted(getproxies().items())), time.monotonic()
    until, failure = _failed.get(key, (start, None))
    if failure is not None and start < until:
        raise failure
    try:
        return function()
    except Exception as error:
        if time.monotonic() - start > 1 and is_silence(error):
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
