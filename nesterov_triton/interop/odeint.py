"""`odeint` and `odeint_adjoint`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from nesterov_triton.gradients import GradientLike
from nesterov_triton.interop import options as opt
from nesterov_triton.interop.call import Backward, Call
from nesterov_triton.interop.handover import adjoint_by_torchdiffeq, by_torchdiffeq
from nesterov_triton.interop.names import name_of, untraced
from nesterov_triton.interop.rows import check_rows, solve_rows
from nesterov_triton.interop.states import Function
from nesterov_triton.interop.until import solve_until
from nesterov_triton.systems import System


@untraced
def odeint(
    func: Function | System,
    y0: Tensor | tuple[Tensor, ...],
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    args: Sequence[Any] = (),
    gradient: GradientLike | None = None,
    return_stats: bool = False,
    per_sample: bool = False,
) -> Any:
    """Solve dy/dt = func(t, y), y(t[0]) = y0, as `torchdiffeq.odeint` does.

    Args:
        func: f(t, y) or f(t, y, \\*args): t is a 0-d tensor of y's real dtype, the result has y's form, shapes and
            device. Or a momentum system of `nesterov_triton.systems`, for a y0 of (x, m).
        y0: the state at t[0]: a tensor of any shape, real or complex, or a tuple of such.
        t: [n], increasing or decreasing; it may require gradients. With `event_fn` two times, of which the second one
            only says which way.
        rtol, atol: relative and absolute tolerance of an adaptive method: numbers, tensors that broadcast with y0, or
            for a tuple one of either for each of its tensors.
        method: dopri5 (the default), dopri8, tsit5, bosh3, fehlberg2, adaptive_heun, with adaptive steps; euler,
            midpoint, heun2, heun3, rk4, with fixed ones. Names mean what they mean in torchdiffeq: rk4 is the 3/8 rule
            (`solve`'s rk4_38), dopri8 is Prince and Dormand's pair (`solve`'s prince_dormand8). explicit_adams,
            implicit_adams, fixed_adams and scipy_solver are handed to torchdiffeq.
        options: adaptive methods: first_step, min_step, max_step, safety, ifactor, dfactor, max_num_steps, step_t,
            jump_t, norm, dtype (times are float64 whatever it says). Fixed steps: step_size or grid_constructor, interp
            ("linear" or "cubic"), perturb, max_num_steps; without the first two there is one step to each time in t.
        event_fn: event_fn(t, y) -> tensor. The solve ends where one of its elements changes its sign.
        args: what func is called with beside t and y. Tensors among them are differentiated.
        gradient: "discrete", "adjoint", "backprop", or an object from `nesterov_triton.gradients`. Without it the exact
            gradient of the steps taken: of fixed ones by "backprop"; of adaptive ones by "discrete", or by "backprop"
            where func uses tensors that need gradients and are not its parameters.
        return_stats: return the counts (`Stats`) too, last.
        per_sample: adaptive steps for each row of y0, [batch, ...], by itself: a row takes the same steps, and has the
            same answer up to func's own rounding, whatever the other rows are. func is then given the rows' times, of
            shape [batch, 1, ...], which broadcasts with y; the tensors of a tuple have the same number of dimensions.
            max_num_steps counts each row's steps, the stats sum them. Gradients come from "discrete" or "backprop".

    Returns:
        The states at all times in the form of y0, each with a first axis of n; with `event_fn` (event time, states at
        t[0] and at the event).

    Raises:
        ValueError, TypeError: bad input, before any work; the message names the argument and the fix.
        SolveError: the last time was not reached.
    """
    name = opt.check_method(method)
    if name in opt.HANDED_OVER:
        _only_native(name, args=args, gradient=gradient, return_stats=return_stats, per_sample=per_sample)
        return by_torchdiffeq(func, y0, t, rtol=rtol, atol=atol, method=name, options=options, event_fn=event_fn)
    call = Call(func, y0, t, rtol, atol, name, options, args)
    if per_sample:
        return _rows(call, gradient, event_fn, return_stats)
    return _solve(call, gradient, None, event_fn, return_stats)


@untraced
def odeint_adjoint(
    func: Function | System,
    y0: Tensor | tuple[Tensor, ...],
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
    args: Sequence[Any] = (),
    gradient: GradientLike | None = None,
    return_stats: bool = False,
    per_sample: bool = False,
) -> Any:
    """`odeint` with the gradient from the adjoint equation, as `torchdiffeq.odeint_adjoint` does.

    Args:
        func, y0, t, rtol, atol, method, options, event_fn, args, return_stats: see `odeint`. func is a module, or
            `adjoint_params` says what it uses.
        adjoint_rtol, adjoint_atol: tolerances of the backward solve; the forward ones without.
        adjoint_method: its method; the forward one without.
        adjoint_options: its options; the forward ones but for the norm without. Its "norm" is a function of the tuple
            (t, y, cotangent of y, of each parameter), or "seminorm", which leaves out the parameters; without it the
            largest of all their norms counts.
        adjoint_params: the tensors that gradients are wanted of beside y0, t and args; func's parameters without.
        gradient: "adjoint" if None; "discrete" for the exact gradient of the steps taken, by the same call.
        per_sample: see `odeint`; with gradient="discrete" or "backprop".

    Raises:
        ValueError, TypeError: bad input, before any work; the message names the argument and the fix.
        SolveError: the last time was not reached, in the call or in the backward pass.
        RuntimeError: in the backward pass, where func uses tensors that need gradients and would get none.
    """
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError(
            f"adjoint_params is missing: func {name_of(func)} is no nn.Module that could be asked for its parameters; "
            "name the tensors it uses, or pass adjoint_params=() if there are none"
        )
    name, back = opt.check_method(method), opt.check_method(adjoint_method or method, "adjoint_")
    if name in opt.HANDED_OVER or back in opt.HANDED_OVER:
        theirs = name if name in opt.HANDED_OVER else back
        _only_native(theirs, args=args, gradient=gradient, return_stats=return_stats, per_sample=per_sample)
        return adjoint_by_torchdiffeq(
            func, y0, t, rtol=rtol, atol=atol, method=name, options=options, event_fn=event_fn,
            adjoint_rtol=adjoint_rtol, adjoint_atol=adjoint_atol, adjoint_method=adjoint_method,
            adjoint_options=adjoint_options, adjoint_params=adjoint_params,
        )  # fmt: skip
    params = _checked_params(adjoint_params)
    call = Call(func, y0, t, rtol, atol, name, options, args, params)
    if per_sample:
        return _rows(call, "adjoint" if gradient is None else gradient, event_fn, return_stats)
    backward = Backward(adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options)
    return _solve(call, "adjoint" if gradient is None else gradient, backward, event_fn, return_stats)


def _solve(
    call: Call,
    gradient: GradientLike | None,
    backward: Backward | None,
    event_fn: Callable[..., Tensor] | None,
    return_stats: bool,
) -> Any:
    if event_fn is not None and gradient is None:
        call.look()
    strategy = call.gradient(gradient, backward)
    if event_fn is None:
        found: tuple[Any, ...] = (call.result(call.solve(strategy)),)
    else:
        time, states = solve_until(call, event_fn, strategy)
        found = (time, call.result(states))
    if return_stats:
        return (*found, call.stats)
    return found[0] if len(found) == 1 else found


def _rows(call: Call, gradient: GradientLike | None, event_fn: Callable[..., Tensor] | None, return_stats: bool) -> Any:
    if event_fn is not None:
        raise ValueError("event_fn does not go with per_sample=True; drop one of them")
    check_rows(call, gradient)
    solution = call.result(solve_rows(call, gradient))
    return (solution, call.stats) if return_stats else solution


def _checked_params(params: Sequence[Tensor] | None) -> tuple[Tensor, ...] | None:
    if params is None:
        return None
    if isinstance(cast(object, params), Tensor):
        raise TypeError("adjoint_params must be a sequence of tensors, got one tensor; pass adjoint_params=(tensor,)")
    found = tuple(params)
    for i, p in enumerate(found):
        if not isinstance(p, Tensor):
            raise TypeError(f"adjoint_params must hold tensors, adjoint_params[{i}] is {type(p).__name__}")
    return found


def _only_native(method: str, **given: Any) -> None:
    for name, value in given.items():
        if value:
            raise ValueError(f"{name} is for this package's own methods, and {method!r} is torchdiffeq's; drop {name}")
