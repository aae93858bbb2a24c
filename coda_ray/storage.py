"""Addresses to file systems: one way to read and write, whether a folder, an S3 server or the public gallery.

Writes appear whole or not at all. Permission and network errors are retried with back-off and then raised; a file that is
not there is told at once. Keys come from the environment, as every AWS tool reads them.
"""

import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

import fsspec
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from fsspec.implementations.local import LocalFileSystem

from coda_ray.config import Place

log = logging.getLogger(__name__)
T = TypeVar("T")
ATTEMPTS = 5
FIRST_WAIT_S = 0.5
# What a second try cannot mend.
FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)
# A file that `_beside` is writing, or that a process left there when it died.
_PART = re.compile(r"\.[0-9a-f]{32}\.part$")


@dataclass(frozen=True)
class StoredFile:
    """One file of a folder.

    Parameters
    ----------
    path
        Relative to the folder that was asked.
    size
        Bytes.
    modified
        When it was last written, by the clock of the storage (unix s).
    tag
        Differs between versions of the file: the ETag, or the time of change in ns.
    """

    path: str
    size: int
    modified: float
    tag: str


@dataclass(frozen=True)
class Folder:
    """A place that was opened: paths below are relative to it, with forward slashes.

    Parameters
    ----------
    fs
        The fsspec file system.
    root
        Path of the folder inside that file system, without a trailing slash.
    """

    fs: Any
    root: str

    def __post_init__(self) -> None:
        """Leave the retries to `retrying`: s3fs alone would try a broken connection 25 times before that."""
        if not self.is_local:
            self.fs.retries = 1

    def __reduce__(self) -> tuple[type["Folder"], tuple[Any, str]]:
        """Pickle as a call, so that the above holds in every process."""
        return Folder, (self.fs, self.root)

    @property
    def is_local(self) -> bool:
        """Whether this is a folder of this machine's file system."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, relative: str = "") -> str:
        """Path inside the file system."""
        return f"{self.root}/{relative}" if relative else self.root

    def address(self, relative: str = "") -> str:
        """Full address, as a person would write it."""
        return self.path(relative) if self.is_local else f"s3://{self.path(relative)}"

    def child(self, relative: str) -> "Folder":
        """Open a folder inside this one."""
        return Folder(self.fs, self.path(relative))

    def exists(self, relative: str) -> bool:
        """Whether a file or folder is there."""
        return retrying(lambda: bool(self.fs.exists(self.path(relative))), self.address(relative))

    def names(self, relative: str = "") -> list[str]:
        """Sorted names directly inside a folder; empty where there is none."""
        try:
            found = retrying(lambda: self.fs.ls(self.path(relative), detail=False, refresh=True), self.address(relative))
        except (FileNotFoundError, NotADirectoryError):
            return []
        entries = {str(name).rstrip("/").rsplit("/", 1)[-1] for name in found if str(name).rstrip("/") != self.path(relative)}
        return sorted(entries)

    def files(self, relative: str = "") -> list[StoredFile]:
        """List every file below a folder, however deep, as it is now.

        Parameters
        ----------
        relative
            The folder; by default this one.

        Returns
        -------
        list of StoredFile
            Sorted by path, which is relative to this folder; empty where there is none.

        Raises
        ------
        OSError
            When permission or network errors outlast the retries.
        """
        find = self._local_files if self.is_local else self._remote_files
        try:
            return sorted(retrying(lambda: list(find(relative)), self.address(relative)), key=lambda file: file.path)
        except FileNotFoundError:
            return []

    def _local_files(self, relative: str) -> Iterator[StoredFile]:
        """Files of a folder of this machine; one that goes away meanwhile is passed over."""
        for folder, _, names in os.walk(self.path(relative), onerror=_raise_unless_gone):
            for name in names:
                path = f"{folder}/{name}"
                try:
                    found = os.stat(path)
                except FileNotFoundError:
                    continue
                if not _PART.search(name):
                    yield StoredFile(path.removeprefix(f"{self.root}/"), found.st_size, found.st_mtime, str(found.st_mtime_ns))

    def _remote_files(self, relative: str) -> Iterator[StoredFile]:
        """Files below a prefix of a bucket, without the empty objects that some tools write for folders."""
        for path, found in self.fs.find(self.path(relative), detail=True).items():
            if found["type"] == "file" and path != self.path(relative) and not path.endswith("/"):
                modified, tag = found["LastModified"].timestamp(), str(found["ETag"]).strip('"')
                yield StoredFile(path.removeprefix(f"{self.root}/"), found["size"], modified, tag)

    def read(self, relative: str) -> bytes:
        """Read a whole file.

        Raises
        ------
        FileNotFoundError
            When it is not there.
        OSError
            When permission or network errors outlast the retries.
        """
        return retrying(lambda: self._cat_file(self.path(relative)), self.address(relative))

    def read_json(self, relative: str) -> dict[str, Any] | None:
        """Read a JSON object; None where there is no such file.

        Raises
        ------
        ValueError
            When the file holds anything else.
        OSError
            As `read` does.
        """
        try:
            found = json.loads(self.read(relative))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(
                f"{self.address(relative)}: not JSON ({error}); delete it, and run the same command again"
            ) from error
        if not isinstance(found, dict):
            raise ValueError(f"{self.address(relative)}: not a JSON object; delete it, and run the same command again")
        return found

    def read_address(self, address: str) -> bytes:
        """Read a file by its full address, which may lie outside this folder (a local path, or another bucket here)."""
        there = self.at(address)
        return retrying(lambda: there._cat_file(there.root), address)

    def _cat_file(self, path: str) -> bytes:
        """One attempt at a whole file, in one request: s3fs asks for the size first where it may read in parts."""
        options = {} if self.is_local else {"max_concurrency": 1}
        return cast(bytes, self.fs.cat_file(path, **options))

    def at(self, address: str) -> "Folder":
        """Open a full address, which may lie outside this folder (a local path, or another bucket here)."""
        if self.is_local or not address.startswith("s3://"):
            return Folder(LocalFileSystem(), address.removeprefix("file://"))
        return Folder(self.fs, address.removeprefix("s3://"))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes | Exception]:
        """Read byte ranges `(relative path, start, end)` concurrently.

        Returns
        -------
        list
            The bytes of each range, fewer where the file ends before it; or the error of one whose file is not there.

        Raises
        ------
        OSError
            When permission or network errors outlast the retries.
        """
        results = self._cat_ranges(ranges)
        for attempt in count(1):
            failed = [i for i, result in enumerate(results) if isinstance(result, Exception) and not isinstance(result, FINAL)]
            if not failed:
                break
            first = failed[0]
            _wait_or_raise(cast(Exception, results[first]), attempt, self.address(ranges[first][0]))
            for i, again in zip(failed, self._cat_ranges([ranges[i] for i in failed]), strict=True):
                results[i] = again
        return results

    def _cat_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes | Exception]:
        """One concurrent attempt at every range."""
        paths, starts, ends = (list(column) for column in zip(*ranges, strict=True)) if ranges else ([], [], [])
        found = self.fs.cat_ranges([self.path(path) for path in paths], starts, ends, on_error="return")
        return [b"" if _is_past_the_end(result) else result for result in found]

    def write(self, relative: str, data: bytes) -> None:
        """Write a whole file, so that a reader sees the old one, the new one, and nothing between."""
        path = self.path(relative)
        if not self.is_local:
            retrying(lambda: self.fs.pipe_file(path, data), self.address(relative))
            return
        with _beside(path, data) as part:
            os.replace(part, path)

    def create(self, relative: str, data: bytes) -> bool:
        """Write a whole file where none is; of several who do so at once, one succeeds.

        Parameters
        ----------
        relative
            The file.
        data
            Its content, which must differ from what anybody else writes there, as by a random number: after an answer that
            was lost, the content alone tells whose file it is.

        Returns
        -------
        bool
            Whether this call wrote it; False where a file is there already, which stays as it is.

        Raises
        ------
        OSError
            When permission or network errors outlast the retries. The file may be there, or not.
        """
        try:
            retrying(lambda: self._create(self.path(relative), data), self.address(relative))
        except FileExistsError:
            return self.read(relative) == data
        return True

    def _create(self, path: str, data: bytes) -> None:
        """One attempt at an exclusive write; FileExistsError where there is a file."""
        if self.is_local:
            with _beside(path, data) as part:
                os.link(part, path)
            return
        try:
            self.fs.pipe_file(path, data, mode="create")
        except OSError as error:
            # The name of the condition, by which s3fs knows this refusal, is missing from the answers of some servers.
            if _code(error) in ("PreconditionFailed", "412"):
                raise FileExistsError(path) from error
            raise

    def refuses_overwrites(self, relative: str) -> None:
        """Make sure that `create` is exclusive here, by creating one file twice.

        Parameters
        ----------
        relative
            Beginning of the name of that file, which is deleted afterwards.

        Raises
        ------
        OSError
            When the second write was not refused.
        """
        probe = f"{relative}.{uuid4().hex}"
        try:
            refused = self.create(probe, b"first") and not self.create(probe, b"second")
        finally:
            self.delete(probe)
        if not refused:
            raise OSError(
                f"{self.address(relative)}: this S3 server ignores conditional writes (If-None-Match), without which two writers "
                "overwrite each other; give an address on AWS or another server that knows them, or a shared folder"
            )

    def delete(self, relative: str) -> None:
        """Delete a file or a folder with all that is in it; nothing happens where there is none."""
        try:
            retrying(lambda: self.fs.rm(self.path(relative), recursive=True), self.address(relative))
        except FileNotFoundError:
            return


def open_place(place: Place) -> Folder:
    """Open a place of the configuration.

    Parameters
    ----------
    place
        `s3://bucket/prefix` (public, private or S3-compatible) or a folder.

    Returns
    -------
    Folder
        Picklable; opening makes no request.

    Raises
    ------
    ValueError
        When the address has another scheme.
    """
    scheme, separator, rest = place.address.partition("://")
    if not separator or scheme == "file":
        return Folder(LocalFileSystem(), str(Path(rest if separator else place.address).expanduser().resolve()))
    if scheme != "s3":
        raise ValueError(f"address = {place.address!r}: only s3://bucket/prefix and folders are known; correct the scheme")
    options: dict[str, Any] = {}
    if place.endpoint_url:
        options["endpoint_url"] = place.endpoint_url
    if place.region:
        options["client_kwargs"] = {"region_name": place.region}
    fs = fsspec.filesystem(
        "s3",
        anon=place.anonymous,
        use_listings_cache=False,
        config_kwargs={
            # Other S3 servers answer errors to, or store, the checksum trailers that AWS alone understands.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            # Each of our attempts is up to four requests with up to 7 s between them, so that a server that goes on answering
            # errors is given up within a minute (5 x 7 s, and 15 s of ours); one that never answers, within a quarter of an hour.
            "connect_timeout": 20,
            "read_timeout": 30,
            "retries": {"max_attempts": 3, "mode": "standard"},
        },
        **options,
    )
    return Folder(fs, rest.strip("/"))


def retrying(call: Callable[[], T], what: str) -> T:
    """Call, and call again with exponential back-off after a permission or network error.

    Parameters
    ----------
    call
        The request.
    what
        Address, for the messages.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError
        At once.
    PermissionError
        At once, where there are no keys.
    OSError
        After the last attempt. Both name the address.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return call()
        except FINAL:
            raise
        except Exception as error:
            _wait_or_raise(error, attempt, what)


def _wait_or_raise(error: Exception, attempt: int, what: str) -> None:
    """Wait before the next attempt; raise an error that another attempt cannot mend, or when there was the last one."""
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        raise PermissionError(
            f"{what}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or, for a public bucket, bucket.anonymous=true"
        ) from error
    if not isinstance(error, _storage_errors()):
        raise error
    if attempt == ATTEMPTS:
        raise OSError(f"{what}: gave up after {ATTEMPTS} attempts: {type(error).__name__}: {error}") from error
    wait = FIRST_WAIT_S * 2 ** (attempt - 1) * (1 + random.random())  # noqa: S311 (jitter, not a secret)
    log.warning("%s: %s: %s; attempt %d of %d in %.1f s", what, type(error).__name__, error, attempt + 1, ATTEMPTS, wait)
    time.sleep(wait)


@contextmanager
def _beside(path: str, data: bytes) -> Iterator[str]:
    """Write a temporary file into the folder of another one, which is made where it is not there; delete it afterwards."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    part = f"{path}.{uuid4().hex}.part"
    try:
        Path(part).write_bytes(data)
        yield part
    finally:
        Path(part).unlink(missing_ok=True)


def _raise_unless_gone(error: OSError) -> None:
    """Raise an error of `os.walk`, which would pass over folders that it may not read."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@cache
def _storage_errors() -> tuple[type[Exception], ...]:
    """Errors of permission and network; some are looked up here, because their libraries take long to import."""
    from aiohttp import ClientError as ConnectionBrokenError
    from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

    return OSError, BotoCoreError, ConnectionBrokenError, ResponseParserError


def _is_past_the_end(result: bytes | Exception) -> bool:
    """Whether an S3 server refused a range because the file ends before it; a folder gives no bytes."""
    return isinstance(result, OSError) and _code(result) in ("InvalidRange", "416")


def _code(error: OSError) -> str | None:
    """Code of the S3 answer behind an error."""
    cause = error.__cause__
    return cause.response["Error"].get("Code") if isinstance(cause, ClientError) else None
