"""Every solver that is compared, behind one shape: `Contender`. A package that is not installed says so.

Peers get the right-hand side as their users write it, and the way that costs them least: torchdiffeq one stacked
tensor (its tuples are flattened and copied at every evaluation), torchode and torchdyn [batch, features] with x and m
side by side, diffrax a pair. All get the same field and weights, dopri5, rtol = atol, float32 and one thread.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Before jax is imported: one thread for it, too.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import torch
import torchdiffeq
from torch import Tensor, nn

import nesterov_triton as nt
from benchmarks.cases import HIDDEN_CHANNELS, Case, RightHandSide
from benchmarks.problems import BOUND, XI


class Absent(Exception):
    """A contender that cannot run here, and why."""


@dataclass(frozen=True, eq=False)
class Contender:
    """One solver on one case.

    Attributes:
        forward: solves, for timing.
        train: solves and differentiates, for timing.
        features: h1.
        gradients: of the checked samples' loss, by `Case.inputs`.
    """

    forward: Callable[[], object]
    train: Callable[[], object]
    features: Callable[[], Tensor]
    gradients: Callable[[], list[Tensor]]


def _torch(case: Case, solve: Callable[[Tensor, float, float], Tensor]) -> Contender:
    def wait() -> None:
        if case.h0.is_cuda:
            torch.cuda.synchronize()

    def forward() -> None:
        with torch.no_grad():
            case.run(solve)
        wait()

    def train() -> None:
        case.gradients(case.run(solve))
        wait()

    def features() -> Tensor:
        with torch.no_grad():
            return case.run(solve)

    return Contender(forward, train, features, lambda: case.gradients(case.run(solve), case.checked_cotangent))


# --- this package


def layer(case: Case, **options: Any) -> nt.nn.Layer:
    """The package's layer for a case, on the case's own parameters."""
    options = {"rtol": case.tolerance, "atol": case.tolerance, "t": (case.t0, case.t1), **options}
    if case.model == "GNesterovNODE":
        return nt.GNesterovNODE(case.field, gate=nt.gates.Softclip(BOUND), xi=XI, **options)
    if case.model == "HBNODE":
        heavy_ball = nt.HBNODE(case.field, **options)
        heavy_ball.system.raw_damping = case.raw_damping
        return heavy_ball
    return nt.NODE(case.field, **options)


def ours(
    case: Case, gradient: nt.gradients.GradientLike = "discrete", loop: str = "auto", compiled: bool = False
) -> Contender:
    if loop == "graph" and not case.h0.is_cuda:
        raise Absent("graphs need a CUDA device")
    if compiled and case.recurrence is not None:
        raise Absent("every interval would be compiled by itself")
    module: Any = layer(case, gradient=gradient, **({} if loop == "auto" else {"loop": loop}))
    if compiled:
        # Several layers of one class are compiled in one process; none may count as another's recompilation.
        torch._dynamo.reset()
        module = torch.compile(module, fullgraph=True)
    if case.recurrence is None:
        return _torch(case, lambda h, t0, t1: module(h))
    return _torch(case, lambda h, t0, t1: module(h, t=(t0, t1)))


# --- torchdiffeq


def torchdiffeq_(case: Case, adjoint: bool = False, seminorm: bool = False) -> Contender:
    system = case.right_hand_side()
    odeint = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    options: dict[str, Any] = {"rtol": case.tolerance, "atol": case.tolerance, "method": "dopri5"}
    if adjoint:
        options["adjoint_params"] = tuple(case.field.parameters()) + (
            () if case.raw_damping is None else (case.raw_damping,)
        )
    if seminorm:
        options["adjoint_options"] = {"norm": "seminorm"}

    def solve(h: Tensor, t0: float, t1: float) -> Tensor:
        t = torch.tensor([t0, t1], device=h.device)
        return system.features(odeint(system, system.start(h, t[0]), t, **options)[-1], t[1])

    return _torch(case, solve)


# --- torchode and torchdyn


class Flat(nn.Module):
    """The right-hand side on [batch, features], x and m side by side; the time is 0-d or [batch]."""

    def __init__(self, system: RightHandSide, case: Case) -> None:
        super().__init__()
        self.system = system
        self.shape = case.h0.shape[1:]
        if case.raw_damping is not None:
            self.raw_damping = case.raw_damping  # registered here: their adjoints look for parameters in the module

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        system, scalar = self.system, t if t.ndim == 0 else t[0]
        parts = [part.reshape(-1, *self.shape) for part in z.chunk(system.rows, dim=1)]
        if system.rows == 1:
            slope: Tensor = system.field(scalar, parts[0])
            return slope.flatten(1)
        # torchode has a time for every sample; a field that looks at the time gets the first one's, see `torchode_`.
        scale = system.scale(t) if t.ndim == 0 else system.scale(t).reshape(-1, *[1] * len(self.shape))
        return torch.cat([rate.flatten(1) for rate in system.rates(scalar, scale, *parts)], dim=1)

    def start(self, h: Tensor, t: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in self.system.start(h, t)], dim=1)

    def features(self, z: Tensor, t: Tensor) -> Tensor:
        h = z.chunk(self.system.rows, dim=1)[0].reshape(-1, *self.shape)
        return self.system.scale(t) * h


def torchode_(case: Case, adjoint: bool = False) -> Contender:
    torchode = load("torchode")
    if case.size == "convolutional":
        raise Absent("torchode gives every sample a time of its own, and this field takes one for all")
    flat = Flat(case.right_hand_side(), case)
    term = torchode.ODETerm(flat, with_stats=False)
    controller = torchode.IntegralController(atol=case.tolerance, rtol=case.tolerance, term=term)
    method = torchode.Dopri5(term=term)
    solver = (
        torchode.JointBacksolveAdjoint(term, method, controller)
        if adjoint
        else torchode.AutoDiffAdjoint(method, controller, backprop_through_step_size_control=False)
    ).to(case.h0.device)

    def solve(h: Tensor, t0: float, t1: float) -> Tensor:
        start, end = (torch.full((len(h),), t, device=h.device) for t in (t0, t1))
        problem = torchode.InitialValueProblem(y0=flat.start(h, start[0]), t_start=start, t_end=end)
        return flat.features(solver.solve(problem).ys[:, -1], end[0])

    return _torch(case, solve)


def torchdyn_(case: Case, adjoint: bool = False) -> Contender:
    numerics, core = load("torchdyn.numerics"), load("torchdyn.core")
    flat = Flat(case.right_hand_side(), case)
    tolerances = {"atol": case.tolerance, "rtol": case.tolerance}
    problem = None
    if adjoint:
        back = {"atol_adjoint": case.tolerance, "rtol_adjoint": case.tolerance}
        problem = core.ODEProblem(flat, "dopri5", sensitivity="adjoint", **tolerances, **back)

    def solve(h: Tensor, t0: float, t1: float) -> Tensor:
        t = torch.tensor([t0, t1], device=h.device)
        z = flat.start(h, t[0])
        _, states = numerics.odeint(flat, z, t, "dopri5", **tolerances) if problem is None else problem(z, t)
        return flat.features(states[-1], t[1])

    return _torch(case, solve)


# --- diffrax


def diffrax_(case: Case, backsolve: bool = False) -> Contender:
    diffrax, jax = load("diffrax"), load("jax")
    jnp = jax.numpy
    if case.h0.device.type != {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend()):
        raise Absent(f"jax runs on {jax.default_backend()} here, the case on {case.h0.device.type}")
    h0, *weights = (jnp.asarray(x.detach().cpu().numpy()) for x in case.inputs)
    cotangent, checked = (jnp.asarray(x.cpu().numpy()) for x in (case.cotangent, case.checked_cotangent))
    count = len(list(case.field.parameters()))

    def softclip(x: Any) -> Any:
        return BOUND * jnp.tanh(x / BOUND)

    def scale(t: Any) -> Any:
        return softclip(t**-1.5 * jnp.exp(t / 2)) if case.model == "GNesterovNODE" else 1.0

    def convolution(x: Any, w: Any, b: Any) -> Any:
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME") + b[:, None, None]

    def network(t: Any, h: Any, w: Any) -> Any:
        if case.size != "convolutional":
            return jnp.tanh(h @ w[0].T + w[1]) @ w[2].T + w[3]
        time = jnp.broadcast_to(jnp.asarray(t, h.dtype), (len(h), 1, *h.shape[2:]))
        assert w[0].shape[0] == HIDDEN_CHANNELS
        out = jax.nn.relu(convolution(jnp.concatenate([h, time], 1), w[0], w[1]))
        out = jax.nn.relu(convolution(jnp.concatenate([out, time], 1), w[2], w[3]))
        return convolution(jnp.concatenate([out, time], 1), w[4], w[5])

    def rates(t: Any, z: Any, w: Any) -> Any:
        if case.model == "NODE":
            return network(t, z, w)
        x, m = z
        if case.model == "HBNODE":
            return m, network(t, x, w) - jax.nn.sigmoid(w[count]) * m
        h = scale(t) * x
        return softclip(m), -m - softclip(network(t, h, w)) - XI * h

    controller = diffrax.PIDController(rtol=case.tolerance, atol=case.tolerance)
    adjoint = {"adjoint": diffrax.BacksolveAdjoint()} if backsolve else {}

    def solve_once(h: Any, t0: Any, t1: Any, w: Any) -> Any:
        z0 = h if case.model == "NODE" else (h / scale(t0), jnp.zeros_like(h))
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(rates), diffrax.Dopri5(), t0, t1, None, z0, w,
            stepsize_controller=controller, saveat=diffrax.SaveAt(t1=True), **adjoint,
        )  # fmt: skip
        return solution.ys[0] if case.model == "NODE" else scale(t1) * solution.ys[0][0]

    def solve(h: Any, w: Any) -> Any:
        if case.recurrence is None:
            return solve_once(h, case.t0, case.t1, w)
        seen = jnp.asarray(case.recurrence.observations.cpu().numpy())
        of_input, of_state, b_input, b_state = w[-4:]

        def observe(h: Any, step: Any) -> Any:
            x, end = step
            h = solve_once(h, case.t0, end, w)
            return jnp.tanh(x @ of_input.T + b_input + h @ of_state.T + b_state), None

        return jax.lax.scan(observe, h, (seen, jnp.asarray(case.recurrence.ends)))[0]

    def loss(h: Any, w: Any, cotangent: Any) -> Any:
        return (solve(h, w) * cotangent).sum()

    forward, train = jax.jit(solve), jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    wait: Any = jax.block_until_ready

    def tensor(x: Any) -> Tensor:
        return torch.tensor(x.__array__().copy(), device=case.h0.device)

    def gradients() -> list[Tensor]:
        _, (of_h0, of_weights) = train(h0, weights, checked)
        return [tensor(g) for g in (of_h0, *of_weights)]

    return Contender(
        lambda: wait(forward(h0, weights)),
        lambda: wait(train(h0, weights, cotangent)),
        lambda: tensor(forward(h0, weights)),
        gradients,
    )


def load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name.partition('.')[0]} is not installed here ({error}); see the extra `peers`") from None
    except (OSError, RuntimeError) as error:  # as of a torchvision made for another build of torch, under torchdyn
        raise Absent(f"{name.partition('.')[0]} cannot be imported here ({error})") from None


# --- the entries of every table; the first word is the package

OURS = "nesterov_triton"
FORWARD: dict[str, Callable[[Case], Contender]] = {
    f"{OURS} eager": ours,
    f"{OURS} compiled": lambda case: ours(case, compiled=True),
    f"{OURS} graph": lambda case: ours(case, loop="graph"),
    "torchdiffeq odeint": torchdiffeq_,
    "torchode": torchode_,
    "torchdyn": torchdyn_,
    "diffrax": diffrax_,
}
TRAIN: dict[str, Callable[[Case], Contender]] = {
    f"{OURS} eager, discrete": ours,
    f"{OURS} eager, kept": lambda case: ours(case, nt.gradients.Discrete(recompute=False)),
    f"{OURS} eager, adjoint": lambda case: ours(case, "adjoint"),
    f"{OURS} eager, backprop": lambda case: ours(case, "backprop"),
    f"{OURS} compiled, discrete": lambda case: ours(case, compiled=True),
    f"{OURS} graph, discrete": lambda case: ours(case, loop="graph"),
    f"{OURS} graph, adjoint": lambda case: ours(case, "adjoint", loop="graph"),
    "torchdiffeq odeint": torchdiffeq_,
    "torchdiffeq odeint_adjoint": lambda case: torchdiffeq_(case, adjoint=True),
    "torchdiffeq odeint_adjoint, seminorm": lambda case: torchdiffeq_(case, adjoint=True, seminorm=True),
    "torchode autodiff": torchode_,
    "torchode joint backsolve": lambda case: torchode_(case, adjoint=True),
    "torchdyn autograd": torchdyn_,
    "torchdyn adjoint": lambda case: torchdyn_(case, adjoint=True),
    "diffrax default": diffrax_,
    "diffrax backsolve": lambda case: diffrax_(case, backsolve=True),
}
