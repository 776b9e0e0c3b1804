"""A file behind a URL, read in order; what fails and may pass is tried again from the byte that was reached."""

import http.client
import io
import logging
import re
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from .sampling import DataError

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds between two attempts that bring nothing, a minute in all; then the file counts as lost."""
TIMEOUT = 60.0
"""Seconds in which a server must send something."""
_PASSING = (408, 425, 429)
"""Answers of a server that may be others a moment later, besides those from 500 on."""
_BUFFER = 2**18
_logger = logging.getLogger(__name__)


def open_url(url: str, start: int = 0) -> BinaryIO:
    """Open a file behind `http://`, `https://` or `file://` from a byte on.

    Raises:
        DataError: No such file on this machine; a server's answer raises it when bytes are read.
    """
    if not url.startswith("file:"):
        return io.BufferedReader(_RemoteFile(url, start), _BUFFER)
    try:
        file = Path(unquote(urlsplit(url).path)).open("rb")  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise DataError(f"{shown(url)} cannot be read: {error.strerror}") from error
    file.seek(start)
    return file


def shown(url: str) -> str:
    """Return a URL for messages, without what may be secret in it: a signature behind `?`, a user before `@`."""
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0])


class _RemoteFile(io.RawIOBase):
    """The bytes of a URL from `start` on, over as many connections as it takes."""

    def __init__(self, url: str, start: int) -> None:
        self._url, self._at = url, start
        self._size: int | None = None  # of the whole file, once a server has told it
        self._response: Any = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._hang_up()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Read what has come, at least a byte but for the end of the file.

        Raises:
            DataError: Nothing came in all attempts, or the server refuses.
        """
        for pause in (*PAUSES, None):
            try:
                content = self._read(len(buffer))
                buffer[: len(content)] = content
                self._at += len(content)
                return len(content)
            except (OSError, http.client.HTTPException) as error:
                self._hang_up()
                reason, may_pass = _read_error(error)
            if pause is None or not may_pass:
                tries = f", tried {len(PAUSES) + 1} times in {sum(PAUSES):g} s" if may_pass else ""
                raise DataError(f"{shown(self._url)} cannot be read from byte {self._at} on: {reason}{tries}")
            _logger.warning("%s: %s; trying again in %g s", shown(self._url), reason, pause)
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _read(self, count: int) -> bytes:
        if self._at == self._size:
            return b""
        if self._response is None:
            self._response = self._connect()
        content: bytes = self._response.read1(count)
        if not content and self._size is not None and self._at < self._size:
            raise ConnectionError(f"the connection was cut after {self._at} of {self._size} bytes")
        return content

    def _connect(self) -> Any:
        ranged = {"Range": f"bytes={self._at}-"} if self._at else {}
        request = urllib.request.Request(self._url, headers={"User-Agent": "mvmae", **ranged})  # noqa: S310 (http alone)
        response = urllib.request.urlopen(request, timeout=TIMEOUT)  # noqa: S310
        whole, total = response.status != 206, response.headers.get("Content-Length")
        if not whole:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(total) if total and total.isdigit() else None
        if self._size is not None and size != self._size:
            response.close()
            raise DataError(f"{shown(self._url)} has changed while it was read: {self._size} bytes, then {size}")
        self._size = size
        left = self._at if whole else 0  # a server without ranges begins at the first byte
        while left and (passed := response.read1(min(left, _BUFFER))):
            left -= len(passed)
        if left:
            response.close()
            raise ConnectionError(f"the connection was cut after {self._at - left} bytes, of which {self._at} were read before")
        return response

    def _hang_up(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _read_error(error: OSError | http.client.HTTPException) -> tuple[str, bool]:
    """Return the reason of a failure in words, and whether it may pass."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # an answer, with a connection of its own
        return f"the server answers {error.code} {error.reason}", error.code >= 500 or error.code in _PASSING
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    text = "no answer in time" if isinstance(cause, TimeoutError) else str(cause) or type(cause).__name__
    return " ".join(text.split()), not isinstance(cause, ssl.SSLCertVerificationError | str)
