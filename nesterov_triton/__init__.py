"""Momentum neural ODEs in PyTorch: layers, systems, solver.

    import nesterov_triton as nt
    layer = nt.GNesterovNODE(field)      # field(t, h): your network
    h = layer(h0)                        # h(T), differentiable
    layer.stats                          # what it took

`solve` does the same for a system, or for any f(t, y), without a layer. `odeint`, `odeint_adjoint`, `odeint_event` and
`odeint_dense` do what torchdiffeq's functions of these names do.
"""

from nesterov_triton import gates, gradients, kernels, methods, systems, tableaus
from nesterov_triton._names import public
from nesterov_triton.interop import odeint, odeint_adjoint, odeint_dense, odeint_event
from nesterov_triton.nn import ANODE, GHBNODE, HBNODE, NODE, SONODE, GNesterovNODE, NesterovNODE
from nesterov_triton.solve import Solution, solve
from nesterov_triton.status import SolveError, Stats, Status
from nesterov_triton.stepping import controllers

__version__ = "0.1.0"

__all__ = [
    "ANODE",
    "GHBNODE",
    "HBNODE",
    "NODE",
    "SONODE",
    "GNesterovNODE",
    "NesterovNODE",
    "Solution",
    "SolveError",
    "Stats",
    "Status",
    "controllers",
    "gates",
    "gradients",
    "kernels",
    "methods",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "solve",
    "systems",
    "tableaus",
]


def __dir__() -> list[str]:
    return public(globals())
