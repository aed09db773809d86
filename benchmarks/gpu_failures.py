"""A plugin for pytest that writes each failure down at once: a run that is cut short tells of none at its end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

FAILURES = "NESTEROV_TRITON_FAILURES"  # the environment's name of the file


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed and FAILURES in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(os.environ[FAILURES]).open("a") as file:
            file.write(f"### {report.nodeid} {report.when}\n{str(report.longrepr)[-2000:]}\n")
