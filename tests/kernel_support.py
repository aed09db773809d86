"""What the kernels' tests share: operators by name, arguments for them, and how equal is equal.

A kernel runs under triton's interpreter on a CPU (conftest.py), and compiled on a CUDA device.
"""

import importlib

import pytest
import torch

from nesterov_triton import gates, tableaus
from nesterov_triton.ops import dispatch

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = (F64, F32, F16, BF16)
SIZES = (1025, 1, 3000, 7, 1024, 517)  # blocks are of 512 or 1024
IDENTITY, TANH = gates.Identity(), gates.Tanh()
SOFTCLIP, HARDTANH, ODD = gates.Softclip(5.0), gates.Hardtanh(1.5), gates.Softclip(3.7)
GATES = ((SOFTCLIP, SOFTCLIP), (IDENTITY, IDENTITY), (TANH, HARDTANH), (HARDTANH, TANH), (ODD, IDENTITY))
DOPRI5, DOPRI8, RK4 = map(tableaus.get, ("dopri5", "dopri8", "rk4"))


class _Implementations:
    """Operators' functions by name: `KERNELS[op]`, `REFERENCES[op]`."""

    def __init__(self, kernel: bool) -> None:
        self.kernel = kernel

    def __getitem__(self, op: str):
        module = importlib.import_module(f"nesterov_triton.ops.{op}.{'kernel' if self.kernel else 'reference'}")
        return module.launch if self.kernel else getattr(module, op)


KERNELS, REFERENCES = _Implementations(True), _Implementations(False)


def normal(*shape, dtype):
    return torch.randn(*shape, dtype=F64).to(DEVICE, dtype)


def scalar(value, dtype=F64):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def momentum_arguments(tableau, outputs, slopes, n, dtype, dt=0.1):
    """outputs, z, slopes, coefficients, dt."""
    u, dm = ([normal(n, dtype=dtype) * size for _ in range(count)] for count, size in ((outputs, 3), (slopes, 1)))
    c = torch.rand(len(tableau.all_a), 4, dtype=F64).to(DEVICE) * 2 - 1
    return u, normal(2 * n, dtype=dtype) * 3, dm, c, scalar(dt)


def all_close(actual, expected):
    """`close`, row by row, for rows and lists of rows in the same places."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        if isinstance(e, list | tuple):
            all_close(a, e)
        else:
            close(a, e)


def close(actual, expected):
    """Equal to a few units in the last place: of what was computed in, then one of what is stored."""
    assert (actual is None) == (expected is None)
    if actual is None:
        return
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    wide = F32 if actual.dtype in (F16, BF16) else actual.dtype
    # Of rows up to 30 in size; a device contracts products and sums, up to thirteen of them.
    atol = (32 if DEVICE == "cpu" else 64) * torch.finfo(wide).eps
    if actual.dtype == BF16 and DEVICE == "cpu":
        # The interpreter truncates to bfloat16 where a device rounds, the slope that goes on into m among others: of a
        # slope of 8 to 16 a unit is 1/16, times dt a_ij, up to 1.2.
        atol = 0.08
    torch.testing.assert_close(actual, expected, rtol=2.01 * torch.finfo(actual.dtype).eps, atol=atol)


def close_norms(actual, expected, dtype):
    assert actual.dtype == F64
    assert actual.shape == ()
    rtol = {F64: 1e-12, F32: 1e-4, F16: 1e-2, BF16: 6e-2}[dtype]  # of cancellation in the error rows
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0.0)


def rows_of(result):
    """The tensors of an operator's result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [row for part in result if part is not None for row in rows_of(part)]


def nodes_of(function, *arguments):
    """The calls in the graph that torch.compile makes of a function, as text, and the results compiled by two backends,
    [2] lists of tensors."""
    nodes = []

    def record(graph, _):
        nodes.extend(node for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = [torch.compile(function, fullgraph=True, backend=backend) for backend in (record, "aot_eager")]
    results = [rows_of(run(*arguments)) for run in compiled]
    return [str(node.target) for node in nodes if "getitem" not in str(node.target)], results


def check_one_node(name, function, x):
    """In a compiled graph the operator of this name is all that the function of x is made of; the same values."""
    with torch.no_grad():
        expected = rows_of(function(x))
        nodes, results = nodes_of(function, x)
    for actual in results:
        assert len(actual) == len(expected)
        assert all(map(torch.equal, actual, expected))
    assert nodes == [f"nesterov_triton.{name}.default"]


def check_no_backward(function, x):
    """An operator has no derivative, and says so."""
    first = rows_of(function(x.requires_grad_()))[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


def check_choice(names):
    """On a CPU the references run, on a CUDA device the kernels."""
    for name in names:
        chosen = dispatch.implementation(name, torch.zeros(1, device=DEVICE))
        assert chosen is (REFERENCES if DEVICE == "cpu" else KERNELS)[name]
