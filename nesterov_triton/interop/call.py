"""One call of the front door, checked and translated: what is solved, by which method, differentiated how."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from nesterov_triton import transforms
from nesterov_triton.gradients import Adjoint, Backprop, Discrete, Gradient, GradientLike
from nesterov_triton.gradients import get as gradient_of
from nesterov_triton.gradients.leaves import unseen_leaves
from nesterov_triton.gradients.problem import parameters, trainable
from nesterov_triton.interop import options as opt
from nesterov_triton.interop.names import name_of
from nesterov_triton.interop.norms import AdjointMeasure, StateMeasure, Tolerances, tolerance
from nesterov_triton.interop.states import Adapted, AdaptedModule, Function, Layout, State
from nesterov_triton.solve import Settings, bind, check_state, check_times, refuse_layer, run
from nesterov_triton.status import SolveError, Stats, Status
from nesterov_triton.stepping.loop import LoopOptions, finite_everywhere, fixed_steps
from nesterov_triton.systems import FirstOrder, Momentum, System


@dataclass(frozen=True)
class Backward:
    """What `odeint_adjoint` is told of the backward solve; None for what the forward one is told."""

    rtol: Any = None
    atol: Any = None
    method: str | None = None
    options: Mapping[str, Any] | None = None


class Call:
    """A checked call.

    Attributes:
        layout, start: of the state, and its flat real form, [D], with its graph.
        times: the requested times, [n] float64 on the CPU, with their graph.
        method: with its options.
        system: what is solved; `state` is what it is started from.
        params: tensors that need gradients, beyond the parameters that the system finds by itself.
        stats: counted on by every solve of this call.
        inert: whether `look` has found that nothing needs a gradient.
    """

    def __init__(
        self,
        func: Function,
        y0: Any,
        t: Any,
        rtol: Any,
        atol: Any,
        method: str,
        options: Any,
        args: Any,
        params: Sequence[Tensor] | None = None,
    ) -> None:
        if not callable(cast(object, func)) and not isinstance(func, System):
            raise TypeError(f"func must be a module or function (t, y) -> dy/dt, got {type(func).__name__}")
        refuse_layer("func", func)
        if not isinstance(args, tuple | list):
            raise TypeError(
                f"args must be a tuple of what func is called with beside t and y, got {type(args).__name__}"
            )
        if isinstance(func, FirstOrder):
            func = func.field
        self.func, self.y0, self.args = func, y0, tuple(args)
        self.layout = layout = Layout(y0)
        self.name = method
        self.options = opt.check_options(method, options)
        watchers = opt.watchers(func, "", layout.state, opt.NATIVE[method])
        self.method = opt.make(method, self.options, watchers)
        self.tolerances = Tolerances.make(rtol, atol, layout)
        given = [a for a in self.args if isinstance(a, Tensor) and a.requires_grad]
        self.adapted: Adapted | None = None
        self.system: System
        self.state: Any
        if isinstance(func, Momentum):
            self._check_momentum(func, params)
            self.system, self.state = func, (y0[0], y0[1])
            self.params: tuple[Tensor, ...] = ()
            self.start = torch.cat([part.reshape(-1) for part in y0])
        else:
            self.adapted = Adapted(func, layout, self.args)
            own = params is None and isinstance(func, nn.Module)
            self.system = FirstOrder(AdaptedModule(self.adapted) if own else self.adapted)
            self.params = (*(() if own else params or ()), *given)
            self.start = layout.flat(y0)
            self.state = y0 if layout.simple else self.start
        self.h = check_state(self.system, self.state)
        self.given_t = t
        one = isinstance(t, Tensor) and t.shape == (1,)
        self.times = t.to("cpu", torch.float64) if one else check_times(self.system, t)
        self.stats = Stats()
        self.inert = False
        self.varies = False  # whether the function is another one at every call
        self._leaves: dict[int, Tensor] | None = None  # in place of the args that need gradients

    def _check_momentum(self, system: Momentum, params: Sequence[Tensor] | None) -> None:
        if self.args:
            raise ValueError(
                "args are for functions here; for a momentum system use nt.solve(system, (x, m), t, args=...)"
            )
        if params is not None:
            raise ValueError("adjoint_params are for functions; a momentum system's parameters are its own")
        if not isinstance(self.y0, tuple | list):
            raise TypeError(f"y0 of a momentum system must be a pair (x, m) of tensors, got {type(self.y0).__name__}")

    # -- gradients -----------------------------------------------------------------------------------------------------

    def gradient(self, choice: GradientLike | None, backward: Backward | None) -> Gradient:
        """The strategy asked for. Without a choice "backprop" for fixed steps, whose graphs torchdiffeq's keep as well;
        for adaptive ones "discrete", or "backprop" where only autograd can see all."""
        if choice == "adjoint" and isinstance(choice, str):
            return self._adjoint(backward or Backward())
        if choice is not None:
            return gradient_of(choice)
        if transforms.active():
            return Backprop()
        if not torch.is_grad_enabled() or self.adapted is None or len(self.times) < 2:
            return Discrete()
        if not self.method.tableau.adaptive:
            return Backprop()
        u = self.look()
        if u is None or not u.requires_grad:
            return Discrete()
        if self.varies:
            return Backprop()
        parts = self.y0 if isinstance(self.y0, tuple | list) else (self.y0,)
        seen = (self.state, *parts, self.times, *parameters(self.system.field), *self.params)
        # What a closure holds is for autograd alone to see.
        return Backprop() if unseen_leaves(u, seen) else Discrete()

    def look(self) -> Tensor | None:
        """The function's first value, where that can have a graph; finds out whether nothing needs a gradient. The
        solve then need not compute it again."""
        adapted, z = self.adapted, self.state
        if adapted is None or transforms.active() or not torch.is_grad_enabled() or len(self.times) < 2:
            return None
        if adapted.known is not None:
            return adapted.known
        version = None if z.is_inference() else z._version
        kept = [(b, b._version) for b in self._buffers()]
        u = adapted(self.times[0].to(z.device, self.layout.real), z)
        if version is not None and version != z._version:
            raise RuntimeError(
                f"func {name_of(self.func)} changes its input in place, and that is y0; use inplace=False, or clone it"
            )
        adapted.known = u
        self.varies = any(b._version != before for b, before in kept) or _draws(self.func)
        known = (u, z, self.times, *parameters(self.system.field), *self.params)
        self.inert = not any(x.requires_grad for x in known)
        return u

    def _buffers(self) -> list[Tensor]:
        """The function's own, of those that keep count of their changes."""
        return [b for b in self.func.buffers() if not b.is_inference()] if isinstance(self.func, nn.Module) else []

    def _adjoint(self, backward: Backward) -> Adjoint:
        method = self.name if backward.method is None else opt.check_method(backward.method, "adjoint_")
        if method != self.name and self.options and backward.options is None:
            raise ValueError(
                "adjoint_options is missing: with another adjoint_method they cannot be taken from options; pass "
                "adjoint_options={} for the defaults"
            )
        if backward.options is None:
            options = {name: value for name, value in self.options.items() if name != "norm"}
        else:
            options = opt.check_options(method, backward.options, "adjoint_")
        layout = self.layout
        own = self.tolerances
        tolerances = Tolerances(
            own.rtol if backward.rtol is None else tolerance("adjoint_rtol", backward.rtol, layout),
            own.atol if backward.atol is None else tolerance("adjoint_atol", backward.atol, layout),
        ).checked("adjoint_")
        watchers = opt.watchers(self.func, "_adjoint", self._joint, opt.NATIVE[method])
        made = opt.make(method, options, watchers, "adjoint_")
        if not made.tableau.adaptive:
            return Adjoint(method=made.tableau.name, options=self._with_grid(made))
        numbers = tolerances.numbers
        alone = isinstance(self.system, Momentum) or (made.norm == "seminorm" and layout.single)
        custom = callable(made.norm) or self.method.norm is not None
        if alone and not custom and not layout.complex and numbers is not None:
            # The root of the mean square of state and cotangent together, which kernels know.
            rtol, atol = (max(x, 1e-300) for x in numbers)
            return Adjoint(rtol, atol, method=made.tableau.name, options=made.loop)
        state = StateMeasure(layout, self.tolerances, self.method.norm if callable(self.method.norm) else None)
        params = trainable((*parameters(self.system.field), *self.params))
        measure = AdjointMeasure(state, tolerances, params, made.norm)
        return Adjoint(
            tolerances.smallest[0],
            tolerances.smallest[1],
            method=made.tableau.name,
            quadratures_in_norm=made.norm != "seminorm",
            options=made.loop,
            measure=measure,
        )

    def _joint(self, z: Tensor) -> tuple[Tensor, ...]:
        """What adjoint callbacks see of the joint state, [2 D]: (0, y, the cotangent of y); tuples stay flat."""
        layout = self.layout
        halves = [layout.elements(x) for x in z.view(2, -1).unbind(0)]
        shape = layout.shapes[0] if layout.single else torch.Size((-1,))
        return (z.new_zeros(()), *(x.reshape(shape) for x in halves))

    # -- solving -------------------------------------------------------------------------------------------------------

    def settings(self, gradient: Gradient, loop: LoopOptions) -> Settings:
        """Of a solve by this call's method."""
        method, numbers, layout = self.method, self.tolerances.numbers, self.layout
        measure = None
        if method.tableau.adaptive and (
            numbers is None or method.norm is not None or layout.complex or not (layout.single or self.adapted is None)
        ):
            measure = StateMeasure(layout, self.tolerances, method.norm if callable(method.norm) else None)
        rtol, atol = numbers or (0.0, 1.0)
        return Settings(method.tableau, rtol, atol, gradient, loop, "auto", measure, method.inside)

    def solve(self, gradient: Gradient) -> list[Tensor]:
        """The states, [D] each, at all requested times, with their graph."""
        if len(self.times) == 1:
            return [self.start]
        if self.method.tableau.adaptive:
            return self.states(self.times, self.settings(gradient, self.method.loop))
        return self._on_a_grid(gradient)

    def states(self, times: Tensor, settings: Settings, state: Any = None) -> list[Tensor]:
        """The states at `times`, from the first state or from another one."""
        state = self.state if state is None else state
        stand_ins = self._hide_graphs(settings.gradient)
        solution = run(self.system, state, self.h, times, settings, self.params, stats=self.stats, stand_ins=stand_ins)
        return list(solution.states)

    def _hide_graphs(self, gradient: Gradient) -> dict[int, Tensor]:
        """Leaves for the args that need gradients, if func is to be called with them; see `Problem.stand_ins`."""
        adapted = self.adapted
        if adapted is None or not torch.is_grad_enabled():
            return {}
        if isinstance(gradient, Backprop):
            adapted.args = self.args
            return {}
        if self._leaves is None:  # once: a call may take several solves, and each one's backward pass meets these
            needed = (a for a in self.args if isinstance(a, Tensor) and a.requires_grad)
            self._leaves = {id(a): a.detach().requires_grad_() for a in needed}
        adapted.args = tuple(self._leaves.get(id(a), a) for a in self.args)
        return self._leaves

    def result(self, states: Sequence[Tensor]) -> State:
        """The states stacked over a new first axis, in the form of y0."""
        return self.layout.state(torch.stack(list(states)))

    def _with_grid(self, method: opt.Method) -> LoopOptions:
        """The loop's options with the user's grid, if there is one."""
        constructor, loop = method.grid_constructor, method.loop
        if constructor is None:
            return loop

        def grid(times: Sequence[float]) -> Sequence[float]:
            made = self._constructed(constructor, torch.tensor(times, dtype=torch.float64))
            return self._checked_grid(made, times).tolist()

        return replace(loop, grid=grid)

    def _constructed(self, constructor: opt.GridConstructor, times: Tensor) -> Tensor:
        """The user's grid for times, [n] float64 on the CPU: float64 on the CPU too, with its graph."""
        like = self.given_t if isinstance(self.given_t, Tensor) else times
        with torch.no_grad() if self.adapted is None else torch.enable_grad():
            grid = constructor(self.func, self.y0, times.to(like))
        if not isinstance(grid, Tensor) or grid.ndim != 1 or not grid.is_floating_point():
            raise TypeError("options['grid_constructor'] must return a 1-D floating-point tensor of times")
        return grid.to("cpu", torch.float64)

    def _checked_grid(self, grid: Tensor, times: Sequence[float]) -> Tensor:
        points = grid.tolist()
        like = self.given_t.dtype if isinstance(self.given_t, Tensor) else torch.float64
        ends = torch.tensor((times[0], times[-1]), dtype=torch.float64).to(like).to(torch.float64).tolist()
        sign = math.copysign(1.0, times[-1] - times[0])
        if len(points) < 2 or [points[0], points[-1]] != ends:
            raise ValueError(f"options['grid_constructor'] must return a grid from t[0] to t[-1], got {points}")
        if any(sign * (b - a) <= 0 for a, b in itertools.pairwise(points)):
            raise ValueError(f"options['grid_constructor'] must return a grid that runs as t does, got {points}")
        return grid

    def _on_a_grid(self, gradient: Gradient) -> list[Tensor]:
        """Fixed steps. A requested time between two of them is interpolated from their ends, as `interp` says."""
        method, times = self.method, self.times
        loop, requested = method.loop, self.times.tolist()
        if method.grid_constructor is not None:
            grid = self._checked_grid(self._constructed(method.grid_constructor, times), requested)
            points = grid.tolist()
            points[0], points[-1] = requested[0], requested[-1]
            loop = replace(loop, grid=lambda _: points)
        elif method.step_size is not None:
            size, count = fixed_steps(requested[0], requested[-1], loop)
            points = [requested[0], *(requested[0] + n * size for n in range(1, count)), requested[-1]]
            grid = times
        else:
            points, grid = requested, times
        if len(points) - 1 > loop.max_steps:
            raise SolveError(Status.MAX_STEPS, requested[0], points[1] - points[0], 0)
        if not grid.requires_grad and set(points).issuperset(requested):
            return self.states(times, self.settings(gradient, loop))
        if method.step_size is not None:
            grid = torch.cat((times[:1] + size * torch.arange(count, dtype=torch.float64), times[-1:]))
        if method.step_size is None and grid.requires_grad and not isinstance(gradient, Adjoint):
            # Every point of the grid moves by itself: one solve for each step.
            states = [self.start]
            settings = self.settings(gradient, replace(loop, grid=None))
            for a in range(len(points) - 1):
                states.append(self.states(grid[a : a + 2], settings, self._state(states[-1]))[-1])
            known = dict(enumerate(states))
        else:
            # Only the ends of the steps that hold a requested time are asked for.
            sign = math.copysign(1.0, requested[-1] - requested[0])
            keys = [sign * p for p in points]
            needed = {0, len(points) - 1}
            for x in requested:
                k = bisect.bisect_left(keys, sign * x)
                needed |= {k} if points[k] == x and not self._slides(k, points) else {k - 1, k}
            order = sorted(needed)
            settings = self.settings(gradient, loop)
            known = dict(zip(order, self.states(grid[order], settings), strict=True))
        return [self._between(known, points, grid, x, times[j]) for j, x in enumerate(requested)]

    def _state(self, z: Tensor) -> Any:
        """A flat state as the system takes it."""
        if isinstance(self.system, Momentum):
            return tuple(self.layout.parts(z))
        return z.view(self.h.shape)

    def _between(
        self, known: Mapping[int, Tensor], points: Sequence[float], grid: Tensor, x: float, time: Tensor
    ) -> Tensor:
        sign = math.copysign(1.0, points[-1] - points[0])
        k = bisect.bisect_left(points, sign * x, key=lambda p: sign * p)
        if points[k] == x and not self._slides(k, points):
            return known[k]
        a, b, width = known[k - 1], known[k], grid[k] - grid[k - 1]
        theta = ((time - grid[k - 1]) / width).to(a.device, a.dtype)
        if points[k] == x:
            return b + (theta - theta.detach()) * (b - a).detach()
        if self.method.interp == "linear":
            return torch.lerp(a, b, theta)
        fa, fb = (self.slope(grid[i], z) for i, z in ((k - 1, a), (k, b)))
        rest, dt = 1 - theta, width.to(a.device, a.dtype)
        # Hermite's cubic: values and slopes at both ends.
        return (
            (1 + 2 * theta) * rest * rest * a
            + theta * theta * (3 - 2 * theta) * b
            + dt * theta * rest * (rest * fa - theta * fb)
        )

    def _slides(self, k: int, points: Sequence[float]) -> bool:
        """Whether a requested time at this point of a grid of equal steps moves by itself, past the grid."""
        return self.method.step_size is not None and self.times.requires_grad and 0 < k < len(points) - 1

    def slope(self, time: Tensor, z: Tensor) -> Tensor:
        """The right-hand side at one more place, [D], with its graph; counted.

        Raises:
            SolveError: it is not finite there.
        """
        found = self._slope(time, z)
        if not finite_everywhere(found):
            raise SolveError(Status.NON_FINITE, float(time.detach()), 0.0, self.stats.accepted)
        return found

    def _slope(self, time: Tensor, z: Tensor) -> Tensor:
        self.stats.nfe_forward += 1
        if self.adapted is not None:
            # Not by the solve's own: that one may have leaves in place of args.
            adapted = Adapted(self.func, self.layout, self.args)
            return adapted(time.to(z.device, self.layout.real), z.view(self.h.shape)).reshape(-1)
        settings = self.settings(Backprop(), self.method.loop)
        flow = bind(self.system, self._state(z), self.h, self.times, settings, self.params, self.stats).flow()
        return torch.cat(tuple(flow.derivative(flow.at(time.reshape(1)), 0, flow.open(z))))


def _draws(func: object) -> bool:
    """Whether a module has dropout at work in it."""
    if not isinstance(func, nn.Module):
        return False
    return any(isinstance(m, _DropoutNd) and m.training and m.p for m in func.modules())
