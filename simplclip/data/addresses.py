"""Tars that are not local files: http(s) URLs, and the output of a command (pipe:COMMAND)."""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import subprocess
import urllib.request
from collections.abc import Iterator
from typing import Protocol
from urllib.parse import urlsplit

TIMEOUT = 60.0  # seconds without a byte, after which a server or a command counts as hanging


class StreamError(OSError):
    """A stream failed for a reason other than its contents; another try may go further."""


class Stream(Protocol):
    def read(self, size: int) -> bytes: ...


class Address(str):
    """An http(s) URL, which is fetched, or pipe:COMMAND, which is run. The path of a file or folder stays a plain str.

    Only `data.parts_of` makes addresses: from texts that its caller gave, and, if they are URLs, from lines of list files.
    """


def names_address(text: str) -> bool:
    """Whether a text that a user typed is the address of a stream."""
    return text.startswith(("pipe:", "http://", "https://"))


def is_address(url: str) -> bool:
    return isinstance(url, Address)


def name_of(url: str) -> str:
    """Returns the file name of a path or URL, without the query of the URL, which may be a signature that changes."""
    return os.path.basename(urlsplit(url).path if is_address(url) and url.startswith("http") else url)


@contextlib.contextmanager
def opened(url: str) -> Iterator[Stream]:
    """Context with a reader of a stream. Raises StreamError if bytes end too early, or none come for TIMEOUT seconds."""
    with (_command if url.startswith("pipe:") else _response)(url) as stream:
        yield stream


_web = urllib.request.OpenerDirector()  # without the schemes that a server could redirect to, such as ftp:
for _handler in (
    urllib.request.ProxyHandler,
    urllib.request.UnknownHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPErrorProcessor,
):
    _web.add_handler(_handler())


@contextlib.contextmanager
def _response(url: str) -> Iterator[Stream]:
    # Not webdataset's gopen: its curl has no time limit for a server that hangs, and its retries start the stream again.
    request = urllib.request.Request(url, headers={"User-Agent": "simplclip"})
    try:
        response = _web.open(request, timeout=TIMEOUT)
    except (OSError, http.client.HTTPException) as error:
        raise StreamError(_reason(error)) from error
    with response:
        yield _Response(response)


class _Response:
    def __init__(self, response: http.client.HTTPResponse):
        self.response = response

    def read(self, size: int) -> bytes:
        try:
            data = self.response.read(size)
        except (OSError, http.client.HTTPException) as error:
            raise StreamError(_reason(error)) from error
        if not data and self.response.length:
            raise StreamError(f"the connection was closed {self.response.length:,} bytes before the end")
        return data


@contextlib.contextmanager
def _command(url: str) -> Iterator[Stream]:
    process = subprocess.Popen(url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE)
    try:
        yield _Command(process)
    finally:
        process.kill()  # it may write on, or wait for something, after the end of the tar
        process.wait()
        process.stdout.close()


class _Command:
    def __init__(self, process: subprocess.Popen[bytes]):
        self.process, self.file = process, process.stdout.fileno()

    def read(self, size: int) -> bytes:
        if os.name != "nt" and not select.select([self.file], [], [], TIMEOUT)[0]:
            raise StreamError(f"the command wrote nothing for {TIMEOUT:g} seconds")
        data = os.read(self.file, size)
        if not data:
            try:
                status = self.process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                raise StreamError(f"the command did not end in {TIMEOUT:g} seconds after its output") from None
            if status:
                raise StreamError(f"the command ended with exit code {status}")
        return data


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return f"the server sent nothing for {TIMEOUT:g} seconds"
    return str(error) or repr(error)
