"""Downloading one file: with a progress bar, going on where a connection broke, kept only once it is checked."""

import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

ATTEMPTS = 5
PATIENCE = 30.0  # seconds without a byte
CHUNK = 1 << 18


class DownloadError(Exception):
    """The file could not be had; the message says why."""


def download(
    url: str, path: Path, check: Callable[[Path], None], size: int | None = None, *, pause: float = 1.0
) -> None:
    """Put what is at ``url`` to ``path``, once ``check`` lets it pass.

    What has come of it is kept beside as ``.part``, and the next attempt, or the next call, asks for the rest.

    Args:
        check: raises ValueError for a file that is not what it must be.
        size: in bytes, where it is known beforehand.
        pause: seconds before a second attempt, doubled before each further one.

    Raises:
        DownloadError: no connection, or a wrong file; a file that failed the check is not kept.
        OSError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        before = part.stat().st_size if part.exists() else 0
        try:
            stated = _rest(url, part, size)
        except HTTPError as error:
            if error.code != 416:  # of what is there beyond the file's end: start again
                raise DownloadError(f"HTTP {error.code} {error.reason}") from error
            part.unlink()
            problem = "the part that was there is no part of it"
            continue
        except (URLError, OSError, EOFError) as error:
            if isinstance(error, OSError) and not isinstance(error, URLError | ConnectionError | TimeoutError):
                raise
            problem = str(getattr(error, "reason", error))
            continue
        try:
            if stated is not None:
                _check_sum(part, stated)
            check(part)
        except ValueError as error:
            part.unlink()
            problem = f"what came is not the file: {error}"
            if before:  # put together of two files, perhaps
                continue
            break
        os.replace(part, path)
        return
    raise DownloadError(problem)


class _Redirects(HTTPRedirectHandler):
    """Follows redirections, and keeps the sum that the Hugging Face Hub states in its own."""

    def __init__(self) -> None:
        self.sha256: str | None = None

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.note(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def note(self, headers: Any) -> None:
        found = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-ETag") or "")
        if found:
            self.sha256 = found[1]


def _rest(url: str, part: Path, size: int | None) -> str | None:
    """Bring ``part`` to its end; gives the SHA-256 that the host states, if it does.

    Raises:
        HTTPError, URLError, OSError, EOFError: the connection; what has come is in ``part``.
    """
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    done = part.stat().st_size if part.exists() else 0
    if size is not None and done > size:
        part.unlink()
        done = 0
    elif done and done == size:
        return None
    redirects = _Redirects()
    request = Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with build_opener(redirects).open(request, timeout=PATIENCE) as answer:
        redirects.note(answer.headers)
        if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            done = 0  # the whole file comes
        length = answer.headers.get("Content-Length")
        total = None if length is None else done + int(length)
        if size is not None and total is not None and total != size:
            part.unlink(missing_ok=True)
            raise DownloadError(f"what it holds has {total:,} bytes")
        columns = (TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        part.parent.mkdir(parents=True, exist_ok=True)  # not where nothing comes
        with (
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
            open(part, "ab" if done else "wb") as file,
        ):
            task = progress.add_task(part.name.removesuffix(".part"), total=total, completed=done)
            while chunk := cast(bytes, answer.read(CHUNK)):
                file.write(chunk)
                progress.update(task, advance=len(chunk))
                done += len(chunk)
    if total is not None and done < total:
        raise EOFError(f"the connection broke after {done:,} of {total:,} bytes")
    return redirects.sha256


def _check_sum(path: Path, stated: str) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != stated:
        raise ValueError(f"its SHA-256 is {found}, and its host states {stated}")
