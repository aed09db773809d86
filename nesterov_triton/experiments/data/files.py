"""Data files: where each one has its public home, what it must be, and how it is found, fetched and checked."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nesterov_triton.experiments.data.download import DownloadError, download
from nesterov_triton.experiments.experiment import CommandError


@dataclass(frozen=True)
class DataFile:
    """A file of a data set.

    Attributes:
        name: its path inside the data folder.
        url: its public home.
        contents: what it must be, in words.
        size, sha256: in bytes and hexadecimal, where every good copy has the same ones.
        look: raises ValueError where the file's structure is not right; for files with good copies of several sums.
    """

    name: str
    url: str
    contents: str
    size: int | None = None
    sha256: str | None = None
    look: Callable[[Path], None] | None = None

    def expected(self) -> str:
        size = "" if self.size is None else f" of {self.size:,} bytes"
        return f"{self.contents}{size}" + (f", SHA-256 {self.sha256}" if self.sha256 else "")

    def check(self, path: Path) -> None:
        """Raise ValueError where the file at ``path`` is not this one."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            raise ValueError(f"it has {size:,} bytes")
        if self.sha256 is not None:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.sha256:
                raise ValueError(f"its SHA-256 is {found}")
        if self.look is not None:
            self.look(path)


def find(file: DataFile, folder: Path) -> Path:
    """The file in ``folder``, downloaded to it where it is missing; checked.

    Raises:
        CommandError: it is damaged, or missing and could not be downloaded; with what to do.
    """
    path = folder / file.name
    if not path.exists():
        try:
            download(file.url, path, file.check, file.size)
        except (DownloadError, OSError, ValueError) as error:
            raise CommandError(
                f"{path} is missing and could not be downloaded from {file.url} ({error}); get it where there is "
                f"internet, {file.expected()}, put it there, or name the folder that holds {file.name} with --data or "
                "NESTEROV_TRITON_DATA"
            ) from error
        return path
    try:
        file.check(path)
    except (ValueError, OSError) as error:
        raise CommandError(damaged(path, file, error)) from error
    return path


def damaged(path: Path, file: DataFile, error: Exception) -> str:
    return f"{path} is truncated or corrupt: {error}; expected {file.expected()}. Delete it to have it downloaded again"
