"""The causes of failed requests to the Hugging Face hub, and their remedies, each in one line."""

from __future__ import annotations

import os
import re
import socket
import ssl
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import urlsplit

_LOG_IN = "check its name; log in (`hf auth login`, or HF_TOKEN) if it is private or gated"
_ROUTE = "check HF_ENDPOINT, the proxy and the firewall"
_TOKEN = "set HF_TOKEN as https://huggingface.co/settings/tokens shows it, or unset it"
_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
_CERTIFICATES = "set SSL_CERT_FILE to a file with the certificates of the proxy or mirror"
_REMEDIES = {
    401: _LOG_IN,
    403: f"{_LOG_IN}; a proxy or firewall may also refuse",
    404: f"check its name and revision, and {_ROUTE.removeprefix('check ')}",
    407: "give user and password: HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT",
    408: "try again later",
    429: "wait some minutes, or log in (`hf auth login`)",
}


class Cause(NamedTuple):
    """The cause of a failed request, and its remedy."""

    cause: str
    remedy: str


class NoDataError(TimeoutError):
    """A download that began and then stood still."""


_TIMEOUTS = {"TimeoutError", "TimeoutException", "Timeout"}


def is_silence(error: BaseException) -> bool:
    """Whether a request failed without an answer: other files of the same server would wait as long."""
    chain = _chain(error)
    return bool(_names(chain) & (_TIMEOUTS | {"ConnectError", "ConnectionError"})) and not any(map(_status, chain))


def explained(error: BaseException, wait: float) -> Cause:
    """The cause of a failed request and its remedy, from the error and those that it came from.

    Types are known by name: huggingface_hub used requests, then httpx, then httpx2.
    """
    chain = _chain(error)
    names = _names(chain)
    text = next((line for link in chain if (line := line_of(link))), type(error).__name__)
    status = next((code for link in chain if (code := _status(link))), None)
    if "OfflineModeIsEnabled" in names:
        return Cause("HF_HUB_OFFLINE is set", "unset it, or download the file before")
    if status is not None or "ProxyError" in names:
        answering = "the proxy" if "ProxyError" in names or status == 407 else "the server"
        if status is None:
            return Cause(f"{answering} refuses ({text})", _ROUTE)
        phrase = next((known.phrase for known in HTTPStatus if known == status), "")
        said = next((said for link in chain if (said := getattr(link, "server_message", None))), None)
        answer = " ".join(filter(None, (f"{status} {phrase}".strip(), said and f"({line_of(said)})")))
        remedy = "try again later" if status >= 500 else _REMEDIES.get(status, _ROUTE)
        return Cause(f"{answering} answers {answer}", remedy)
    if "TooManyRedirects" in names:
        return Cause("it redirects in a circle", _ROUTE)
    if "SSLError" in names or any(isinstance(link, ssl.SSLError) for link in chain):
        return Cause(f"TLS fails ({text})", f"{_CERTIFICATES}, or {_ROUTE}")
    if "SOCKS" in text:
        package = "socksio" if "ImportError" in names else "pysocks"  # of httpx, of requests
        proxies = (variable for variable in os.environ if variable.upper() in _PROXIES)
        variables = ", ".join(name for name in proxies if os.environ[name].startswith("socks")) or "the proxy"
        return Cause(f"{variables} names a SOCKS proxy, which needs the package {package}",
                     f"pip install {package}, or unset {variables}")  # fmt: skip
    if "UnicodeEncodeError" in names:
        return Cause(f"HF_TOKEN, or another header, is not ASCII ({text})", _TOKEN)
    if names & {"LocalProtocolError", "InvalidHeader"}:  # its text shows the token
        return Cause("HF_TOKEN, or another header, holds characters that HTTP does not allow", _TOKEN)
    unknown = {"UnsupportedProtocol", "InvalidURL", "MissingSchema", "InvalidSchema"}
    if names & unknown or type(error) in (ValueError, UnicodeError):
        return Cause(f"HF_ENDPOINT or the proxy is not a URL ({text})", "set it to https://HOST")
    host = next((f" ({name})" for link in chain if (name := _host(link))), "")
    if any(isinstance(link, socket.gaierror) for link in chain) or "NameResolutionError" in names:
        cause = f"the name of the server{host}, or the proxy's, is not found"
        return Cause(cause, "check the network, HF_ENDPOINT and the proxy")
    if "NoDataError" in names:
        return Cause(f"no data for {text} s", f"{_ROUTE}; HF_HUB_DOWNLOAD_TIMEOUT=60 waits for 60 s")
    if names & _TIMEOUTS:
        return Cause(f"no answer within {wait:g} s", f"{_ROUTE}; HF_HUB_ETAG_TIMEOUT=60 waits for 60 s")
    if "FileMetadataError" in names:
        return Cause("an answer came, but not from a hub", _ROUTE)
    if names & {"RemoteProtocolError", "ReadError", "WriteError", "ChunkedEncodingError", "ConnectionResetError"}:
        return Cause(f"it hangs up, or its answer is damaged ({text})", f"{_ROUTE}, or try again")
    if names & {"ConnectError", "ConnectionError"}:
        return Cause(f"no connection to {host[2:-1] or 'it'} ({text})", _ROUTE)
    if isinstance(error, FileNotFoundError) and error.errno is not None and error.filename is None:
        return Cause("SSL_CERT_FILE or SSL_CERT_DIR names no file", _CERTIFICATES)
    if isinstance(error, OSError) and error.errno is not None:
        return Cause(f"a file fails ({text})", "check the space and the rights in the cache; HF_HOME names another one")
    if "local_files_only" in text:
        return Cause(text, "leave it out, or download the file before")
    return Cause(f"{type(error).__name__} ({text})", _ROUTE)


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those that it came from."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _names(chain: list[BaseException]) -> set[str]:
    """The names of the types of errors, and of those that they derive from."""
    return {kind.__name__ for link in chain for kind in type(link).__mro__}


def _host(error: BaseException) -> str | None:
    """The host that a request went to, which a redirect may have named."""
    try:
        return urlsplit(str(getattr(error, "request").url)).hostname  # noqa: B009  # libraries differ
    except (AttributeError, RuntimeError, ValueError):  # without a request, or without a URL
        return None


def _status(error: BaseException) -> int | None:
    """The status that a server or a proxy answered with."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    if code is None and type(error).__name__ == "ProxyError" and (match := re.match(r"(\d{3})\b", str(error))):
        code = int(match[1])
    return code


def line_of(error: BaseException | str) -> str:
    """The first line of a message, short, without the password of a proxy."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"//[^/\s@]*@", "//***@", lines[0])[:150].rstrip(".") if lines else ""
