"""The experiments' data files: found in a folder, or fetched to it, and checked."""

import os
from pathlib import Path


def data_folder(given: Path | None) -> Path:
    """The folder given, or that of NESTEROV_TRITON_DATA, or a cache of the user's."""
    named = os.environ.get("NESTEROV_TRITON_DATA")
    if given is not None or named:
        return given or Path(str(named))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nesterov-triton"
