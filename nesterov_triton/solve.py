"""`solve`: a system, a state and times in; a `Solution` out. Everything is checked here, before any work."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypedDict, cast, get_args

import torch
from torch import Tensor, nn

from nesterov_triton import gradients, methods, transforms
from nesterov_triton._fields import check_materialised
from nesterov_triton._names import lookup
from nesterov_triton._numbers import is_number, is_whole, plain
from nesterov_triton.gradients.forward import forward
from nesterov_triton.gradients.leaves import check_transforms, refuse_gradients
from nesterov_triton.gradients.problem import Problem, parameters, trainable
from nesterov_triton.gradients.reversible import check as check_reversible
from nesterov_triton.methods import Method
from nesterov_triton.nystrom import Nystrom, check
from nesterov_triton.status import SolveError, Stats, Status
from nesterov_triton.stepping import controllers
from nesterov_triton.stepping.loop import LoopOptions
from nesterov_triton.stepping.stepper import Measure, Tolerance
from nesterov_triton.systems import System, as_system

State: TypeAlias = Tensor | tuple[Tensor, Tensor]
Times: TypeAlias = Sequence[float] | Tensor
Loop: TypeAlias = Literal["auto", "eager", "graph"]
LOOPS = get_args(Loop)


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solve gave.

    Attributes:
        t: the requested times, [n] float64 on the CPU.
        states: the states at those times, flat: [D] each, the rows (y, or x and m) one after the other.
        shape: of h.
        rows: 1, or 2 for a momentum system.
        stats: counts; nfe_backward is filled in when the backward pass runs.
        status: how the solve ended. Anything but SUCCESS only with throw=False: then unreached states are NaN, and
            nothing has a gradient.
        message: in words, with t, dt and the number of steps where the solve failed.
    """

    t: Tensor
    states: tuple[Tensor, ...]
    shape: torch.Size
    rows: int
    stats: Stats
    status: Status
    message: str

    @property
    def ys(self) -> State:
        """The states stacked over the times: [n, *shape], or a pair of such, (xs, ms), for a momentum system."""
        stacked = torch.stack(self.states).view(len(self.states), self.rows, *self.shape)
        return stacked[:, 0] if self.rows == 1 else (stacked[:, 0], stacked[:, 1])

    @property
    def final(self) -> State:
        """The state at the last time: a tensor of h's shape, or a pair (x, m) of such."""
        # Indexed, not unbound: autograd lets nobody change one of several views of unbind in place.
        last = self.states[-1].view(self.rows, *self.shape)
        return last[0] if self.rows == 1 else (last[0], last[1])


class Options(TypedDict, total=False):
    """The keyword arguments that `solve` and the layers share; see `solve` for their meaning."""

    method: methods.MethodName
    rtol: Tensor | float
    atol: Tensor | float
    gradient: gradients.GradientLike
    controller: controllers.ControllerLike | None
    step_size: float | None
    first_step: float | None
    max_steps: int
    loop: Loop


@dataclass(frozen=True)
class Settings:
    """A checked choice of method and options; what `solve` makes of its keyword arguments.

    Raises (from `make`):
        ValueError, TypeError: naming the argument and the fix.
    """

    tableau: Method
    rtol: Tensor | float
    atol: Tensor | float
    gradient: gradients.Gradient
    options: LoopOptions
    loop: Loop = "auto"
    measure: Measure | None = None  # as in `Tolerance`
    inside: bool = False  # as in `Problem`
    auto: bool = False  # the method is chosen when the system is known; until then it is the general one
    controller: controllers.ControllerLike | None = None  # as given

    @classmethod
    def make(
        cls,
        *,
        method: methods.MethodName = "dopri5",
        rtol: Tensor | float = 1e-5,
        atol: Tensor | float = 1e-5,
        gradient: gradients.GradientLike = "discrete",
        controller: controllers.ControllerLike | None = None,
        step_size: float | None = None,
        first_step: float | None = None,
        max_steps: int = 10_000,
        loop: Loop = "auto",
    ) -> Settings:
        """Check the options; see `solve` for their meaning."""
        tableau = methods.get(method)
        auto = method == "auto"
        either = isinstance(tableau, Nystrom)
        if tableau.adaptive:
            if step_size is not None and first_step is not None and either:
                raise ValueError("step_size and first_step exclude each other: fixed steps, or adaptive ones")
            if step_size is not None and auto:
                raise ValueError("method='auto' chooses an adaptive method; with step_size name one, such as 'rk4'")
            if step_size is not None and not either:
                raise ValueError(f"step_size belongs to fixed-step methods and {method!r} is adaptive; use first_step")
        elif step_size is None:
            raise ValueError(f"step_size is missing: {method!r} takes fixed steps; pass for example step_size=0.1")
        elif first_step is not None:
            raise ValueError(f"first_step belongs to adaptive methods and {method!r} takes fixed steps; use step_size")
        for name, value in (("step_size", step_size), ("first_step", first_step)):
            if value is not None and not (is_number(value) and 0 < value < math.inf):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if not is_whole(max_steps) or max_steps < 1:
            raise ValueError(f"max_steps must be an integer of at least 1, got {max_steps!r}; for no limit say 2**31")
        step_size = None if step_size is None else plain(step_size)
        first_step = None if first_step is None else plain(first_step)
        max_steps = max_steps if type(max_steps) is int else int(max_steps)
        rtol, atol = _tolerance("rtol", rtol), _tolerance("atol", atol)
        if not isinstance(rtol, Tensor) and not isinstance(atol, Tensor) and rtol == atol == 0:
            raise ValueError("rtol and atol are both 0; give at least one of them a positive value")
        lookup("loop", loop, dict.fromkeys(LOOPS))
        strategy = gradients.get(gradient)
        if isinstance(strategy, gradients.Reversible) and not auto:
            check_reversible(tableau)
        if loop == "graph" and isinstance(strategy, gradients.Backprop):
            raise ValueError("loop='graph' and gradient='backprop' exclude each other: leave one of them out")
        options = LoopOptions(_controller(controller, tableau), step_size, first_step, max_steps)
        return cls(tableau, rtol, atol, strategy, options, loop, auto=auto, controller=controller)

    def given(self) -> Options:
        """The options that these settings were made of, gradients by name where they have one."""
        o = self.options
        named = (cast(gradients.GradientName, n) for n, g in gradients.GRADIENTS.items() if g == self.gradient)
        return {
            "method": "auto" if self.auto else cast(methods.MethodName, self.tableau.name),
            "rtol": self.rtol,
            "atol": self.atol,
            "gradient": next(named, self.gradient),
            "controller": self.controller,
            "step_size": o.step_size,
            "first_step": o.first_step,
            "max_steps": o.max_steps,
            "loop": self.loop,
        }

    def of(self, system: System) -> Settings:
        """These settings with the choice of a method made for the system, where it is to be.

        Raises:
            ValueError: the method is not for this system.
        """
        reversible = isinstance(self.gradient, gradients.Reversible)
        tableau = methods.choose(system, self.rtol, self.atol, reversible) if self.auto else self.tableau
        if isinstance(tableau, Nystrom):
            check(tableau, system)
        if not self.auto:
            return self
        options = replace(self.options, controller=_controller(self.controller, tableau))
        return replace(self, tableau=tableau, options=options)


def solve(
    system: System | Callable[[Tensor, Tensor], Tensor],
    state: State,
    t: Times,
    *,
    method: methods.MethodName = "dopri5",
    rtol: Tensor | float = 1e-5,
    atol: Tensor | float = 1e-5,
    gradient: gradients.GradientLike = "discrete",
    controller: controllers.ControllerLike | None = None,
    step_size: float | None = None,
    first_step: float | None = None,
    max_steps: int = 10_000,
    loop: Loop = "auto",
    params: Sequence[Tensor] = (),
    args: Sequence[Any] = (),
    throw: bool = True,
) -> Solution:
    """Solve an initial value problem, differentiably.

    Args:
        system: a system, or any callable f(t, y) that returns dy/dt: t is a 0-d tensor of y's dtype, y and the result
            have one shape, dtype and device. It is never called outside [t[0], t[-1]].
        state: the state at t[0]: a floating-point tensor y of any shape, or a pair (x, m) of one shape for a momentum
            system.
        t: two or more strictly increasing or decreasing times; a tensor may require gradients.
        method: adaptive dopri5, tsit5, bosh3, adaptive_heun, fehlberg2, dopri8, prince_dormand8; fixed-step euler,
            midpoint, heun2, heun3, rk4, rk4_38. For momentum systems whose field sees the position alone, adaptive or
            with a step_size: nystrom4, nystrom6 (without gate_x), and strang, blanes_moan4, whose steps can be taken
            back. "auto" chooses (`nesterov_triton.methods.choose`), and says in `Stats.method` which.
        rtol, atol: relative and absolute tolerance of an adaptive method, numbers or tensors that broadcast with h. A
            step is accepted when the root mean square of err / (atol + rtol max(\\|z_n\\|, \\|z_n+1\\|)) is at most 1.
        gradient: "discrete", "adjoint", "reversible", "backprop", or an object from `nesterov_triton.gradients`.
        controller: "integral", "pi", or an object from `nesterov_triton.controllers`; None for the method's own, which
            is "pi" for those of momentum systems and "integral" for the others.
        step_size: the step of a fixed-step method, or of one for momentum systems that is to take fixed steps; the last
            one is shortened to end at t[-1].
        first_step: the first step of an adaptive method; chosen by itself without.
        max_steps: attempted steps allowed.
        loop: "eager" decides about every step in Python, which takes one look at the device a step. "graph" decides on
            the device: one attempted step, the field included, is captured once as a CUDA graph and replayed, and the
            host waits for none of them. What prevents that is in `Stats.loop`, and warned of once. On a CPU "graph"
            takes the same decisions the same way, without a graph. "auto" is "eager" until graphs have been run on a
            GPU.
        params: tensors that f uses and that need gradients, beyond the parameters of an `nn.Module`.
        args: what f is called with beside t and y, f(t, y, *args), such as a context; the tensors among them are
            differentiated.
        throw: raise on failure; otherwise the solution says so in its status.

    Returns:
        A `Solution`; requested times between steps come from the method's interpolant and never change the steps.

    Raises:
        ValueError, TypeError: bad input, before any work; the message names the argument and the fix.
        SolveError: the last time was not reached (with `throw`).
    """
    settings = Settings.make(
        method=method,
        rtol=rtol,
        atol=atol,
        gradient=gradient,
        controller=controller,
        step_size=step_size,
        first_step=first_step,
        max_steps=max_steps,
        loop=loop,
    )
    refuse_layer("system", system)
    bound = as_system(system)
    h = check_state(bound, state)
    times = check_times(bound, t)
    return run(bound, state, h, times, settings.of(bound), params, throw, traced=True, args=args)


def run(
    system: System,
    state: State,
    h: Tensor,
    times: Tensor,
    settings: Settings,
    params: Sequence[Tensor] = (),
    throw: bool = True,
    stats: Stats | None = None,
    traced: bool = False,
    stand_ins: Mapping[int, Tensor] | None = None,
    args: Sequence[Any] = (),
) -> Solution:
    """`solve` on checked input: `h` is any tensor with the state's shape, dtype and device, `times` from
    `check_times`; `traced` where a tracer sees the settings being made."""
    if torch.compiler.is_compiling():
        from nesterov_triton.compiled import solve as compiled  # takes in all of torch's compiler

        return compiled.run(system, state, times, settings, params, traced, _checked_args(args))  # type: ignore[return-value]
    stats = Stats() if stats is None else stats
    stats.method = settings.tableau.name
    args = _checked_args(args)
    if args:
        needed = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        params = (*params, *needed)
        if torch.is_grad_enabled() and not isinstance(settings.gradient, gradients.Backprop):
            # Leaves, so that what leads to them stays out of the field's own graphs.
            stand_ins = {id(a): a.detach().requires_grad_() for a in needed}
            args = tuple(stand_ins.get(id(a), a) for a in args)
    problem = bind(system, state, h, times, settings, params, stats, stand_ins, args)
    try:
        with problem.without_autocast():
            backprop = isinstance(settings.gradient, gradients.Backprop)
            if not backprop:
                check_transforms(problem, (*problem.params, *problem.frozen, *params))
            # Only autograd itself knows what a closure needs gradients of.
            plain = backprop and (torch.is_grad_enabled() or transforms.active())
            if plain or problem.differentiable():
                later = settings.gradient.solve(problem)
            else:
                later = _solve_without_gradient(problem)
        z = problem.z
        return Solution(times.detach(), (z, *later), h.shape, system.rows, stats, Status.SUCCESS, Status.SUCCESS.value)
    except SolveError as e:
        e.stats = stats
        if throw:
            raise
        reached = [s.detach() for s in (problem.z, *e.reached)]
        missing = torch.full_like(reached[0], math.nan)
        states = (*reached, *(missing for _ in range(len(times) - len(reached))))
        return Solution(times.detach(), states, h.shape, system.rows, stats, e.status, str(e))


def bind(
    system: System,
    state: State,
    h: Tensor,
    times: Tensor,
    settings: Settings,
    params: Sequence[Tensor],
    stats: Stats,
    stand_ins: Mapping[int, Tensor] | None = None,
    args: tuple[Any, ...] = (),
) -> Problem:
    """What every gradient strategy is handed; arguments as for `run`.

    Raises:
        TypeError, ValueError: `params` is no sequence of tensors, a tolerance does not fit the state, or a time its
            dtype.
    """
    if isinstance(cast(object, params), Tensor):
        raise TypeError("params must be a sequence of tensors, got one tensor; pass params=[tensor]")
    params = tuple(params)  # an iterator, as of Module.parameters(), can be read once only
    for i, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise TypeError(f"params must hold tensors, params[{i}] is {type(p).__name__}")
    z = torch.cat([s.reshape(-1) for s in state]) if isinstance(state, tuple | list) else state.reshape(-1).contiguous()
    system.check_range(times.tolist(), h.dtype)
    own = parameters(system.field)
    if torch.is_grad_enabled():  # without, this may be the dry run that makes them
        check_materialised(system.field, own)
    kind = h.device.type
    return Problem(
        system=system,
        shape=h.shape,
        z=z,
        times=times,
        scalars={name: value.to("cpu", torch.float64) for name, value in system.scalars().items()},
        params=trainable((*own, *params)),
        frozen=tuple(p for p in own if not p.requires_grad),
        method=settings.tableau,
        tolerance=_for_state(settings, system.rows, h) if _controlled(settings) else None,
        options=settings.options,
        stats=stats,
        autocast=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        loop=settings.loop,
        inside=settings.inside,
        stand_ins=stand_ins or {},
        args=args,
    )


def _checked_args(args: Sequence[Any]) -> tuple[Any, ...]:
    if not isinstance(args, tuple | list):
        raise TypeError(
            f"args must be a tuple of what the field is called with beside t and h, got {type(args).__name__}"
        )
    return tuple(args)


def _solve_without_gradient(problem: Problem) -> list[Tensor]:
    """The states, where nothing known needs a gradient. If the field does all the same, a backward pass will raise."""
    graphs: list[Tensor] = []
    flow = problem.flow(watch=True, on_output=graphs.append) if torch.is_grad_enabled() else problem.flow()
    with torch.no_grad():
        states = forward(problem, flow)
    return refuse_gradients(states, graphs[0]) if graphs else states


def refuse_layer(name: str, system: object) -> None:
    """Raise for a layer, which takes (h, t) where a field takes (t, h)."""
    if isinstance(system, nn.Module) and isinstance(system._modules.get("system"), System):
        from nesterov_triton.nn import Layer  # above this module

        if isinstance(system, Layer):
            kind = type(system).__name__
            raise TypeError(f"{name} must be a system or f(t, y), got the layer {kind}; pass layer.system")


def check_state(system: System, state: object) -> Tensor:
    """The state's first tensor, once the state is found fit for the system.

    Raises:
        ValueError, TypeError: naming the argument and the fix.
    """
    if system.rows == 1:
        check_tensor("state", state, system)
        assert isinstance(state, Tensor)
        return state
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"state of a momentum system must be a pair (x, m) of tensors, got {type(state).__name__}")
    x, m = state
    check_tensor("state x", x, system)
    check_tensor("state m", m, system)
    if (x.shape, x.dtype, x.device) != (m.shape, m.dtype, m.device):
        raise ValueError(
            f"state x and m must agree in shape, dtype and device, got {tuple(x.shape)} {x.dtype} {x.device} and "
            f"{tuple(m.shape)} {m.dtype} {m.device}"
        )
    assert isinstance(x, Tensor)
    return x


# How many steps there are depends on values, of which these tracers see one example.
_UNTRACED = "its steps depend on values; use torch.export, or torch.compile"


def check_tensor(name: str, value: object, system: System) -> None:
    """Raise unless `value` is a finite floating-point tensor on the field's device."""
    if not isinstance(value, Tensor):
        if isinstance(value, torch.fx.Proxy):
            raise TypeError(f"{name} must be a tensor, got a Proxy of torch.fx: {_UNTRACED}")
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; convert it with torch.as_tensor")
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        raise RuntimeError(f"torch.jit.trace, and torch.onnx.export by it, cannot record a solve: {_UNTRACED}")
    if value.is_complex():
        raise TypeError(
            f"{name} must be a floating-point tensor, got {value.dtype}; convert it with torch.view_as_real, which "
            "keeps both parts, or take nt.odeint, which solves complex states"
        )
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}; convert it, say with .float()")
    if isinstance(system.field, nn.Module):
        p = _first_parameter(system.field)
        if p is not None and p.device != value.device:
            raise ValueError(f"{name} is on {value.device} and the field's parameters on {p.device}; move one of them")
    # A tracer knows no values, and vmap hides them; a compiled solve that meets NaN ends with a status.
    if torch.compiler.is_compiling() or not transforms.readable(value):
        return
    # A finite sum has finite terms; one reduction is a fifth of the cost of isfinite.
    total = value.detach().sum(dtype=torch.float32 if value.element_size() < 4 else None)
    if not math.isfinite(total) and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds NaN or infinite values; clean the input")


def _first_parameter(module: nn.Module) -> Tensor | None:
    """`next(module.parameters(), None)`, which takes as long as a small layer."""
    for p in module._parameters.values():
        if p is not None:
            return p
    found = (_first_parameter(child) for child in module._modules.values() if child is not None)
    return next((p for p in found if p is not None), None)


def check_times(system: System, t: object) -> Tensor:
    """The times as float64 on the CPU, [n], with their graph.

    Raises:
        ValueError, TypeError: naming the argument and the fix.
    """
    if torch.compiler.is_compiling():
        return t.to(torch.float64) if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    if isinstance(t, Tensor):
        if t.ndim != 1:
            raise ValueError(f"t must be one-dimensional, got a tensor of shape {tuple(t.shape)}")
        if t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"t must hold real numbers, got {t.dtype}")
        times = t.to("cpu", torch.float64, copy=True)  # the backward pass reads them again
    else:
        if isinstance(t, str | bytes):
            raise TypeError(f"t must be a sequence or tensor of times, got the string {t!r}")
        try:
            each = list(t)  # type: ignore[call-overload]
            if any(isinstance(x, Tensor) for x in each):  # float() would lose their gradients
                times = torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu").view(()) for x in each])
            else:
                times = torch.tensor([float(x) for x in each], dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"t must be a sequence or tensor of times, got {t!r}") from None
    if not transforms.readable(times):
        raise ValueError("t is batched by torch.func.vmap; all samples must have the same times: give t in_dims=None")
    values = times.tolist()
    if len(values) < 2:
        raise ValueError(f"t must hold at least two times, the first and the last, got {len(values)}")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"t holds NaN or infinite times: {values}")
    steps = [b - a for a, b in itertools.pairwise(values)]
    if not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
        if len(values) == 2:
            raise ValueError(
                f"t must be strictly increasing or decreasing, got {values}: between equal times there is nothing to "
                "solve; take the state as it is there, without a call, as for observations at the same time"
            )
        raise ValueError(f"t must be strictly increasing or decreasing, got {values}; sort it and drop repetitions")
    system.check_times(values)
    return times


def _for_state(settings: Settings, rows: int, h: Tensor) -> Tolerance:
    """Tolerances that broadcast with the flat state, [rows · N]."""

    def flat(name: str, value: Tensor | float) -> Tensor | float:
        if not isinstance(value, Tensor):
            return value
        try:
            # A tolerance for a half-precision state may be below what that can hold; the norms are taken in float32.
            half = h.dtype in (torch.float16, torch.bfloat16)
            full = value.to(h.device, torch.float32 if half else h.dtype).expand(h.shape)
        except RuntimeError:
            raise ValueError(
                f"{name} of shape {tuple(value.shape)} does not broadcast with h of shape {tuple(h.shape)}"
            ) from None
        return full.reshape(-1).repeat(rows) if value.ndim else full.new_tensor(float(value))

    return Tolerance(flat("rtol", settings.rtol), flat("atol", settings.atol), settings.measure)


def _controlled(settings: Settings) -> bool:
    """Whether the error decides about steps."""
    options = settings.options
    return settings.tableau.adaptive and options.grid is None and options.step_size is None


def _controller(given: controllers.ControllerLike | None, method: Method) -> controllers.Integral:
    return controllers.get(methods.controller_of(method) if given is None else given)


def _tolerance(name: str, value: object) -> Tensor | float:
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.requires_grad:
            raise ValueError(f"{name} must be a floating-point tensor that needs no gradient")
        if not bool((torch.isfinite(value) & (value > 0)).all()):
            raise ValueError(f"{name} must be positive and finite everywhere")
        return value
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number ≥ 0 or a tensor of numbers > 0, got {value!r}")
    return float(value)
