"""`pytest benchmarks/`: which cases, on which device; by default the three sizes of GNesterovNODE, not compiled."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import MODELS, SIZES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nesterov_triton")
    default = ["small", "medium", "large"]
    group.addoption(
        "--model", nargs="+", choices=MODELS, default=["GNesterovNODE"], help="models (default: %(default)s)"
    )
    group.addoption("--size", nargs="+", choices=SIZES, default=default, help="sizes (default: %(default)s)")
    group.addoption("--compiled", action="store_true", help="compiled layers too, which take half a minute each")
    group.addoption("--device", default="cpu", help="cpu or cuda (default: %(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"model", "size"} <= set(metafunc.fixturenames):
        option = metafunc.config.getoption
        cases = [(model, size) for size in option("--size") for model in option("--model")]
        metafunc.parametrize(("model", "size"), cases, ids=[f"{model}-{size}" for model, size in cases], scope="module")
