"""What a run was made with, to be kept beside its numbers."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import nesterov_triton


def machine(device: str, processes: int) -> dict[str, str | int]:
    """Processor, versions and the source's commit, as far as they can be known."""
    found: dict[str, str | int] = {
        "processor": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nesterov_triton": nesterov_triton.__version__,
        "commit": _commit(),
    }
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = "none"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or 1} cores"


def _commit() -> str:
    """Of the repository that holds the package, with a + where files differ; unknown outside of one."""
    folder = Path(nesterov_triton.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", "--error-unmatch", "__init__.py"):  # installed, inside some other repository
            return "unknown"
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
