"""What `nesterov_triton.solve` and the layers call while torch.compile traces them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.variables.base import VariableTracker
from torch._functorch import config as _functorch_config
from torch.func import functional_call

from nesterov_triton import gates, gradients
from nesterov_triton.compiled.gradients import Adjoint, Counts, Discrete, Setting, forward
from nesterov_triton.compiled.loop import Plan
from nesterov_triton.compiled.reversible import Reversible
from nesterov_triton.compiled.step import stages_back
from nesterov_triton.compiled.system import TENSOR, Bound, put
from nesterov_triton.gradients import leaves
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.status import Stats
from nesterov_triton.stepping.controllers import PI, Integral
from nesterov_triton.stepping.loop import LoopOptions
from nesterov_triton.systems import Momentum, Rule, System


@dataclass(frozen=True)
class CompiledSolution:
    """As `Solution`, with tensors where Python cannot know while it is traced.

    Attributes:
        t: the requested times, [n] float64.
        ys: the states at those times, [n, *shape], or a pair of such.
        final: the state at the last time.
        stats: counts, 0-d tensors.
        status: 0-d int64: 0, or the number of a failure (`ops.control`); the states are NaN then.
    """

    t: Tensor
    ys: Any
    final: Any
    stats: Stats
    status: Tensor


def run(
    system: System,
    state: Tensor | tuple[Tensor, Tensor],
    times: Tensor,
    settings: Any,
    params: Sequence[Tensor] = (),
    traced: bool = False,
    args: tuple[Any, ...] = (),
) -> CompiledSolution:
    """`nesterov_triton.solve.run` for a tracer: no check that needs values, and failures as NaN and a status.

    Args:
        traced: whether the settings were made under the tracer, and exist nowhere else.

    Raises:
        RuntimeError: what only the eager solver does is asked for.
    """
    rows = list(state) if isinstance(state, tuple | list) else [state]
    h = rows[0]
    if params:
        raise RuntimeError(
            "solve(..., params=) cannot be traced by torch.compile: make them parameters of the field, an nn.Module"
        )
    times = times.to(h.device).clone()
    field = system.field
    own = dict(field.named_parameters()) if isinstance(field, nn.Module) else {}
    trained = {name: p for name, p in own.items() if p.requires_grad}
    scalars = {name: value.to(h.device, torch.float64) for name, value in system.scalars().items()}
    given = tuple(a for a in args if isinstance(a, Tensor))
    if any(not a.is_floating_point() for a in given):
        raise RuntimeError("args that are tensors must be floating-point ones under torch.compile")
    tensors = [*scalars.values(), *trained.values(), *given]
    kind = h.device.type
    autocast = (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
    gradient, controller = settings.gradient, settings.options.controller
    if type(controller) not in (Integral, PI):
        raise RuntimeError(
            f"controller {type(controller).__name__} may have a rule of its own, which torch.compile cannot trace: "
            "take 'integral' or 'pi', or leave the layer outside of the compiled region (torch.compiler.disable)"
        )
    rtol, atol, options = (settings.rtol, settings.atol, settings.options) if traced else _settings(settings)
    plan = Plan(settings.tableau, rtol, atol, options)
    bound = Bound(system, *_rule(system), tuple(scalars), tuple(trained), autocast, _constants(args))
    setting = Setting(bound, plan, _backward_plan(plan, gradient), len(rows), times.requires_grad)
    if exporting():  # for inference: what keeps states for a backward pass cannot be stored
        rows, tensors, times = [x.detach() for x in rows], [x.detach() for x in tensors], times.detach()
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (*rows, times, *tensors))
    if wanted and isinstance(field, nn.Module):
        _refuse_attributes(field)
    strategy = type(gradient)
    momentum, named = isinstance(system, Momentum), isinstance(field, nn.Module)
    try_field(
        id(system) if momentum else 0,
        id(field) if named else field,
        h,
        autocast is None,
        torch.is_grad_enabled(),
        _constants(args),
        *given,
    )
    if torch.is_grad_enabled():
        without_donation()
    # The solver's own arithmetic keeps the state's dtype.
    with nullcontext() if autocast is None else torch.autocast(kind, enabled=False):
        if not wanted:
            done, counts = forward(setting, times, rows, tensors, keep=False)
            found = [*done.rows, *done.outputs, *counts]
        elif strategy is gradients.Discrete:
            found = list(Discrete.apply(setting, times, *rows, *tensors))  # type: ignore[no-untyped-call]
        elif strategy is gradients.Adjoint:
            found = list(Adjoint.apply(setting, times, *rows, *tensors))  # type: ignore[no-untyped-call]
        elif strategy is gradients.Reversible:
            found = list(Reversible.apply(setting, *numbers(gradient), times, *rows, *tensors))  # type: ignore[no-untyped-call]
        else:
            raise RuntimeError(
                f"gradient={gradient!r} cannot be traced by torch.compile: take 'discrete', 'adjoint' or 'reversible', "
                "or leave the layer outside of the compiled region (torch.compiler.disable)"
            )
    return _solution(setting, times, rows, found, strategy)


def _refuse_attributes(field: nn.Module) -> None:
    """Raise where a module holds a tensor that needs a gradient and is no parameter, such as a context set just before:
    a loop would give it none. Traced, so that it sees what has been set in the compiled function."""
    for module, names in zip(field.modules(), _attributes(id(field)), strict=False):
        for name in names:
            value = getattr(module, name)
            if isinstance(value, Tensor) and value.requires_grad:
                raise RuntimeError(
                    f"{type(module).__name__}.{name} needs a gradient and is no parameter of the field: it would get "
                    "none under torch.compile; leave the layer outside of the compiled region "
                    "(torch.compiler.disable), with gradient='backprop'"
                )


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _attributes(field: int) -> tuple[tuple[str, ...], ...]:
    """Of each of a module's modules the names of what is a tensor, or may become one, beside parameters and buffers."""

    def loose(module: nn.Module) -> tuple[str, ...]:
        if module._forward_pre_hooks:  # which may make such a tensor anew in every call, as weight_norm does
            return ()
        return tuple(name for name, x in vars(module).items() if x is None or isinstance(x, Tensor))

    found = _known_by(field)
    return tuple(map(loose, found.modules())) if isinstance(found, nn.Module) else ()


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def without_donation() -> bool:
    """From here on no backward graph overwrites tensors that were saved for it. Runs in Python, while tracing.

    Inductor before pytorch#193960 takes the numbers of those that a graph may overwrite for numbers of a loop's inputs,
    too: a loop in a backward pass then overwrites what is still in use, and gradients are silently wrong. There is no
    switch for one graph alone; for others this one costs memory, at most one tensor for each that could be used again.
    """
    _functorch_config.donated_buffer = False
    return True


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def try_field(
    system: int, field: Any, h: Tensor, exact: bool, grads: bool, constants: tuple[Any, ...], *given: Tensor
) -> bool:
    """Raise where the field does not fit the state, or uses tensors that need gradients and would silently get none.

    A tracer does not tell, and sizes that it compares become constants of the trace: this runs in Python, once for each
    trace, and evaluates the field once on zeros.

    Args:
        system: the identity of a momentum system; 0 for one of first order.
        field: a module's identity, or a function.
        h: a state.
        exact: whether the field must return the state's dtype.
        grads: whether there will be gradients.
        constants, given: its args, see `Bound`.

    Raises:
        ValueError: naming the shapes and dtypes that do not agree.
        RuntimeError: naming the shapes of the tensors that would get no gradient, or the buffers that the field
            changes; or system and field are made under the tracer.
    """
    momentum: Momentum | None = _known_by(system) if system else None
    field = _known_by(field) if isinstance(field, int) else field
    if isinstance(momentum, VariableTracker) or isinstance(field, VariableTracker):
        raise RuntimeError(
            "a system or field made inside of the compiled function cannot be traced by torch.compile: make it outside"
        )
    sees_momentum = momentum is not None and momentum.sees_momentum
    # torch.export records a change of the mode, even to the same.
    with torch.enable_grad() if grads else nullcontext(), torch._C.DisableTorchFunctionSubclass():
        features = [torch.zeros_like(h).requires_grad_(grads) for _ in range(1 + sees_momentum)]
        t = torch.ones((), dtype=h.dtype, device=h.device)
        tensors = [torch.zeros_like(a).requires_grad_(grads) for a in given]
        args = put(constants, tensors)
        if isinstance(field, nn.Module):
            # Buffers as copies: a trial must not count in anybody's running mean.
            copies = {name: b.clone() for name, b in field.named_buffers()}
            before = {name: b._version for name, b in copies.items()}
            u = functional_call(field, copies, (t, *features, *args))
            changed = [name for name, b in copies.items() if b._version != before[name]]
            if changed:
                raise RuntimeError(
                    f"the field changes its buffers ({', '.join(changed)}), which a loop under torch.compile cannot: "
                    "put it into eval(), or leave the layer outside of the compiled region (torch.compiler.disable)"
                )
            seen = [*features, *field.parameters(), *tensors]
        else:
            u, seen = field(t, *features, *args), [*features, *tensors]
        if u.shape != h.shape or (u.dtype != h.dtype and exact):
            raise ValueError(
                f"field returned shape {tuple(u.shape)} {u.dtype} for h of shape {tuple(h.shape)} {h.dtype}; "
                "return h's shape and dtype"
            )
        if grads:
            leaves.refuse_unseen(u, seen)
            if momentum is not None:
                leaves.check_gates(momentum, h.dtype, h.device)
    return True


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def exporting() -> bool:
    """`torch.compiler.is_exporting()`, which before 2.13 is always true for a tracer."""
    return torch.compiler.is_exporting()


def _known_by(identity: int) -> Any:
    """The object of this identity, which the traced code holds. torch before 2.13 hands on no objects but by name; to
    take an identity is to guard it."""
    return ctypes.cast(identity, ctypes.py_object).value


def _numbers_of(owner: Any) -> tuple[float | int | None, ...]:
    """All numbers that a solve reads of settings or of a system, or of a gradient strategy, in one order."""
    if isinstance(owner, Momentum):
        bounds = (getattr(gate, "bound", None) for gate in (owner.gate_x, owner.gate_f))
        return (owner.sign, owner.damping_factor, owner.fixed_damping, owner.fixed_xi, *bounds)
    if isinstance(owner, gradients.Adjoint):
        return (owner.rtol, owner.atol)
    if isinstance(owner, gradients.Reversible):
        return (owner.every, owner.bound)
    o = owner.options
    c = o.controller
    tolerances = (None if isinstance(x, Tensor) else x for x in (owner.rtol, owner.atol))
    shape = (c.alpha, c.beta) if isinstance(c, PI) else (None, None)
    return (*tolerances, o.step_size, o.first_step, o.max_steps, c.safety, c.min_factor, c.max_factor, *shape)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _as_constants(owner: int) -> tuple[float | int | None, ...] | None:
    """None for what is made while it is traced, whose identity is that of the tracer's stand-in: before torch 2.13 an
    object of that class without attributes."""
    found = _known_by(owner)
    return None if isinstance(found, VariableTracker) or not vars(found) else _numbers_of(found)


def numbers(owner: Any) -> list[Any]:
    """These numbers as constants of the trace, with a guard on each: with `dynamic=True` a tracer takes numbers for
    inputs, and a loop takes none."""
    constants = _as_constants(id(owner))
    if constants is None:
        return list(_numbers_of(owner))
    if isinstance(owner, Momentum):
        id(owner.gate_x), id(owner.gate_f)  # to look at an identity is to guard it
    for number, constant in zip(_numbers_of(owner), constants, strict=True):
        if constant is not None and number != constant:  # to compare is to guard
            raise AssertionError(f"{number} is not {constant}")
    return list(constants)


def _settings(settings: Any) -> tuple[Any, Any, LoopOptions]:
    """rtol, atol and the loop's options."""
    rtol, atol, step_size, first_step, max_steps, *factors, alpha, beta = numbers(settings)
    pi = isinstance(settings.options.controller, PI)
    controller: Integral = PI(*factors, alpha, beta) if pi else Integral(*factors)  # type: ignore[call-arg]
    tolerances = (given if own is None else own for given, own in ((settings.rtol, rtol), (settings.atol, atol)))
    return *tolerances, LoopOptions(controller, step_size, first_step, max_steps)


def _rule(system: System) -> tuple[Rule | None, tuple[float, float]]:
    """A momentum system's rule, and γ and ξ where they are fixed."""
    if not isinstance(system, Momentum):
        return None, (0.0, 0.0)
    sign, factor, damping, xi, bound_x, bound_f = numbers(system)
    rule = system.rule
    gate_x, gate_f = _gate(rule.gate_x, bound_x), _gate(rule.gate_f, bound_f)
    return rule._replace(sign=sign, factor=factor, gate_x=gate_x, gate_f=gate_f), (damping, xi)


def _constants(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(TENSOR if isinstance(a, Tensor) else a for a in args)


def _gate(gate: gates.Gate, bound: float) -> gates.Gate:
    return type(gate)(bound) if type(gate) in (gates.Softclip, gates.Hardtanh) else gate  # type: ignore[call-arg]


def _backward_plan(plan: Plan, gradient: Any) -> Plan:
    """Of the adjoint's backward solve."""
    if type(gradient) is not gradients.Adjoint:
        return plan
    for name in ("method", "quadratures_in_norm", "options", "measure"):
        if getattr(gradient, name) not in (None, False):
            raise RuntimeError(f"Adjoint({name}=) cannot be traced by torch.compile")
    own = numbers(gradient)
    rtol, atol = plan.rtol if own[0] is None else own[0], plan.atol if own[1] is None else own[1]
    options = plan.options
    if isinstance(plan.tableau, Nystrom) and options.step_size is not None and own != [None, None]:
        if None in own:
            raise RuntimeError(f"Adjoint method {plan.tableau.name!r} is to be adaptive: give it rtol and atol")
        options = replace(options, step_size=None)
    return Plan(plan.tableau, rtol, atol, options)


def _solution(
    setting: Setting, times: Tensor, rows: Sequence[Tensor], found: Sequence[Tensor], strategy: type
) -> CompiledSolution:
    n, many = setting.rows, len(times) > 2
    ends, inside = found[:n], found[n : 2 * n] if many else []
    counts = Counts(*found[n * (1 + many) : n * (1 + many) + 4])
    reached = counts.status == 0

    def checked(x: Tensor) -> Tensor:
        return torch.where(reached, x, torch.full_like(x, torch.nan))

    final = [checked(x) for x in ends]
    middle = [checked(x) for x in inside] if many else [row.new_zeros((0, *row.shape)) for row in rows]
    ys = [torch.cat((a.unsqueeze(0), b, c.unsqueeze(0))) for a, b, c in zip(rows, middle, final, strict=True)]
    tableau = setting.plan.tableau
    back: Any = 0
    if strategy in (gradients.Discrete, gradients.Reversible):
        # The first force of all is pulled back by itself where steps are taken back.
        extra = 1 if strategy is gradients.Reversible else 0
        back = (counts.accepted * stages_back(tableau, many) + extra).detach()
    stats = Stats(
        nfe_forward=counts.evaluations.detach(),  # type: ignore[arg-type]
        nfe_backward=back,
        accepted=counts.accepted.detach(),  # type: ignore[arg-type]
        rejected=counts.rejected.detach(),  # type: ignore[arg-type]
        method=tableau.name,
        path="compiled",
        path_backward="compiled",
        loop="compiled",
        loop_backward="compiled",
    )
    one = n == 1
    return CompiledSolution(
        times.detach(), ys[0] if one else tuple(ys), final[0] if one else tuple(final), stats, counts.status.detach()
    )
