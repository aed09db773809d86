"""The layers: thin modules around a system and `solve`.

Every layer takes features h, [batch, ...], to h(T), by solving its system from t[0] to t[-1]. See `Layer` for what they
share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, Unpack, overload

import torch
from torch import Tensor, nn

from nesterov_triton import gates, systems
from nesterov_triton._fields import check_instance
from nesterov_triton._names import unknown
from nesterov_triton._numbers import is_integer
from nesterov_triton.solve import Options, Settings, Solution, State, Times, check_tensor, check_times, run, solve
from nesterov_triton.status import Stats
from nesterov_triton.systems import Field, Form, Momentum, System, Xi

TIMES = (1.0, 2.0)
OPTIONS = frozenset(Options.__annotations__)


class LayerOptions(Options, total=False):
    """The keyword arguments of every layer; see `Layer`."""

    t: Times


class MomentumOptions(LayerOptions, total=False):
    """The keyword arguments of every layer around a momentum system; see `MomentumLayer`."""

    initial_velocity: nn.Module | None


class Layer(nn.Module):
    """What all layers share. The options are those of `nesterov_triton.solve`, with its defaults.

    Args:
        system: the right-hand side.
        t: two or more strictly monotone times, either direction; an `nn.Parameter` or tensor that requires gradients is
            differentiated.
        method: adaptive dopri5, tsit5, bosh3, adaptive_heun, fehlberg2, dopri8, prince_dormand8; fixed-step euler,
            midpoint, heun2, heun3, rk4, rk4_38; for momentum systems nystrom4, nystrom6, strang, blanes_moan4, or
            "auto": see `nesterov_triton.solve`.
        rtol, atol: tolerances of an adaptive method, numbers or tensors that broadcast with h.
        gradient: "discrete" (exact gradient of the steps taken), "adjoint" (the adjoint equation, memory independent of
            the number of steps), "reversible" (exact too, the steps taken back), "backprop" (plain autograd, for
            derivatives of any order), or an object.
        controller: "integral", "pi", or an object; None for the method's own.
        step_size: the step of a fixed-step method, or of one for momentum systems.
        first_step: the first step of an adaptive method; chosen by itself without.
        max_steps: attempted steps allowed.
        loop: "auto", "eager" or "graph": see `nesterov_triton.solve`.

    Attributes:
        stats: counts of the last call (`Stats`).

    The solver's options are read from `options` and replaced by `configure`; the system's (gate, xi, form, field) are
    attributes of `system`.

    Raises:
        ValueError, TypeError: bad options here, bad input in the call; the message names the argument and the fix.
        SolveError: in the call, where the last time is not reached.
    """

    def __init__(self, system: System, *, t: Times = TIMES, **options: Unpack[Options]) -> None:
        super().__init__()
        self.system = system
        self._check_names(options)
        self.settings = Settings.make(**options).of(system)
        checked = check_times(system, t)
        if checked.requires_grad and not isinstance(t, Tensor):
            raise ValueError("t must be one tensor where it needs gradients, or no optimizer would see it in the layer")
        # Other times are kept as numbers: a buffer would follow .half() and lose them.
        learned = checked.requires_grad or isinstance(t, nn.Parameter)
        self.t: Times = t if learned else tuple(checked.tolist())
        self.stats = Stats()

    @property
    def field(self) -> Field:
        """The user's network."""
        return self.system.field

    @property
    def options(self) -> Mapping[str, Any]:
        """The solver's options as they are, all of those that `configure` takes; to be read only."""
        return MappingProxyType(self.settings.given())

    def configure(self, **options: Unpack[Options]) -> Self:
        """Replace some of the solver's options, as for an evaluation by another method or tolerance; the others stay.

        Returns:
            The layer itself.

        Raises:
            ValueError, TypeError: as where a layer is made; its options are then as before.
        """
        self._check_names(options)
        before: dict[str, Any] = {**self.settings.given()}
        try:
            self.settings = Settings.make(**{**before, **options}).of(self.system)
        except ValueError as error:
            for name in ("step_size", "first_step"):
                if before[name] is not None and name not in options and name in str(error):
                    kept = f"the layer keeps {name} = {before[name]}; to drop it pass {name}=None"
                    raise ValueError(f"{error} ({kept})") from None
            raise
        return self

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks of a module first."""
        raise RuntimeError(
            f"{type(self).__name__} cannot be scripted by torch.jit.script, which knows no loop like a solver's: use "
            "torch.export, or torch.compile"
        )

    def _check_names(self, options: Mapping[str, object]) -> None:
        for name in options:
            if name not in OPTIONS:
                choices = _option_names(type(self))
                raise TypeError(unknown(f"option of {type(self).__name__}", name, choices, _owners(name)))

    def __setattr__(self, name: str, value: Any) -> None:
        # Where they would be written, nothing reads them.
        if name in OPTIONS:
            raise AttributeError(f"{name} is an option of the solver: set it with layer.configure({name}=...)")
        if name == "options":
            raise AttributeError("options are to be read; set them with layer.configure(...)")
        if name == "field":
            raise AttributeError("field is the system's: set layer.system.field, or make another layer")
        if name in ("gate", "xi", "form") and type(self).__module__ == __name__:  # another's may be its own
            raise AttributeError(f"{name} is the system's, chosen when the layer is made: make another layer")
        super().__setattr__(name, value)

    def _times(self, t: Times | None) -> Tensor:
        return check_times(self.system, self.t if t is None else t)

    def _run(self, state: State, h: Tensor, times: Tensor, args: Sequence[Any]) -> Solution:
        if torch.compiler.is_compiling():
            from nesterov_triton.compiled.solve import exporting  # takes in all of torch's compiler

            solution = run(self.system, state, h, times, self.settings, args=args)
            if not exporting():  # an exported program has no layer to tell
                self.stats = solution.stats
            return solution
        self.stats = Stats()  # of this call, also where it fails
        return run(self.system, state, h, times, self.settings, stats=self.stats, args=args)

    def extra_repr(self) -> str:
        """Method, tolerances or step, and gradient; of all else what differs from the default."""
        given = self.options
        adaptive = self.settings.tableau.adaptive and given["step_size"] is None
        shown: dict[str, Any] = {"method": given["method"]}
        for name in ("rtol", "atol") if adaptive else ():
            value = given[name]
            shown[name] = f"tensor{list(value.shape)}" if isinstance(value, Tensor) and value.ndim else float(value)
        gradient = given["gradient"]
        shown["gradient"] = gradient if isinstance(gradient, str) else repr(gradient)
        defaults: dict[str, Any] = {**Settings.make().given()}
        for name in ("controller", "step_size", "first_step", "max_steps", "loop"):
            if given[name] != defaults[name]:
                shown[name] = given[name]
        if isinstance(self.t, Tensor):
            shown["t"] = "learned" if self.t.requires_grad else f"[{len(self.t)} times]"
        elif self.t != TIMES:
            shown["t"] = self.t if len(self.t) < 5 else f"{self.t[0]}...{self.t[-1]} ({len(self.t)} times)"
        return ", ".join(f"{name}={value}" for name, value in {**self._of_the_model(), **shown}.items())

    def _of_the_model(self) -> dict[str, Any]:
        """What of the layer's own arguments differs from the default, to be shown."""
        return {}


def _option_names(layer: type[Layer]) -> dict[str, None]:
    """The keyword arguments of a layer, its own and those that it passes on."""
    own = (name for base in layer.__mro__ if issubclass(base, Layer) for name in signature(base.__init__).parameters)
    return dict.fromkeys(
        [*(n for n in own if n not in ("self", "field", "system", "options")), *Options.__annotations__]
    )


def _owners(name: str) -> list[str]:
    """What takes a keyword argument of this name, of all that the package has."""
    from nesterov_triton import interop  # the front door is above the layers

    if name in signature(MomentumLayer.forward).parameters:
        return ["the call of a momentum layer"]
    layers = (ANODE, SONODE, HBNODE, GHBNODE, NesterovNODE, GNesterovNODE)
    found = [layer.__name__ for layer in layers if name in _option_names(layer)]
    if len(found) > 3:
        return ["momentum layers"]
    functions = (solve, interop.odeint, interop.odeint_adjoint)
    return found or [f.__name__ for f in functions if name in signature(f).parameters]


class NODE(Layer):
    """Neural ODE (Chen et al. 2018): h' = f(t, h).

    Args:
        field: f(t, h), a module or function; t is a 0-d tensor, the result has h's shape and dtype.
        options: see `Layer`.
    """

    def __init__(self, field: Field, **options: Unpack[LayerOptions]) -> None:
        super().__init__(systems.FirstOrder(field), **options)

    def forward(self, h: Tensor, t: Times | None = None, *, args: Sequence[Any] = ()) -> Tensor:
        """h(T), shape of `h`; with more than two times all of them, [len(t), *h.shape].

        Args:
            h: features at t[0], [batch, ...], floating point.
            t: times for this call instead of the layer's own.
            args: what the field is called with beside t and h, f(t, h, *args), such as a context; the tensors among
                them are differentiated.
        """
        check_tensor("h", h, self.system)
        solution = self._run(h, h, self._times(t), args)
        out = solution.final if len(solution.t) == 2 else solution.ys
        assert isinstance(out, Tensor)
        return out

    if TYPE_CHECKING:  # nn.Module's own takes and gives anything
        __call__ = forward


class ANODE(NODE):
    """Augmented neural ODE (Dupont et al. 2019): h' = f(t, h) on features padded with zeros.

    Args:
        field: f(t, h) on the padded features.
        augment: how many zero channels to add, at least 1.
        dim: the dimension they are added to; 1 is the features of [batch, features] and the channels of an image.
        options: see `Layer`.

    Raises:
        ValueError: augment < 1.
    """

    def __init__(self, field: Field, augment: int, *, dim: int = 1, **options: Unpack[LayerOptions]) -> None:
        if not is_integer(augment) or augment < 1:
            raise ValueError(f"augment must be an integer of at least 1, got {augment!r}; for none use NODE")
        if not is_integer(dim):
            raise TypeError(f"dim must be the number of a dimension, got {dim!r}")
        super().__init__(field, **options)
        self.augment, self.dim = int(augment), int(dim)

    def forward(self, h: Tensor, t: Times | None = None, *, args: Sequence[Any] = ()) -> Tensor:
        """All of h(T): shape of `h` with `augment` more channels; see `NODE.forward`."""
        check_tensor("h", h, self.system)
        if not -h.ndim <= self.dim < h.ndim:
            raise ValueError(f"h of shape {tuple(h.shape)} has no dimension {self.dim} to augment; add it or pass dim=")
        padding = list(h.shape)
        padding[self.dim] = self.augment
        return super().forward(torch.cat((h, h.new_zeros(padding)), dim=self.dim), t, args=args)

    def _of_the_model(self) -> dict[str, Any]:
        return {"augment": self.augment} | ({} if self.dim == 1 else {"dim": self.dim})


class MomentumLayer(Layer):
    """A layer around a momentum system.

    Args:
        system: the momentum system.
        initial_velocity: a module h(t0) -> velocity of h's shape, or None for zeros. It is m(t0), except in the exact
            form, where it is h'(t0) (with a gate on the momentum: what h'(t0) would be without it).
        options: see `Layer`.
    """

    system: Momentum

    def __init__(
        self, system: Momentum, *, initial_velocity: nn.Module | None = None, **options: Unpack[LayerOptions]
    ) -> None:
        super().__init__(system, **options)
        check_instance("initial_velocity", initial_velocity)
        if initial_velocity is not None and not callable(initial_velocity):
            raise TypeError(f"initial_velocity must be a module h -> velocity, got {type(initial_velocity).__name__}")
        self.initial_velocity = initial_velocity

    @overload
    def forward(
        self, h: Tensor, t: Times | None = None, *, return_velocity: Literal[False] = False, args: Sequence[Any] = ()
    ) -> Tensor: ...
    @overload
    def forward(
        self, h: Tensor, t: Times | None = None, *, return_velocity: Literal[True], args: Sequence[Any] = ()
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, h: Tensor, t: Times | None = None, *, return_velocity: bool, args: Sequence[Any] = ()
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def forward(
        self, h: Tensor, t: Times | None = None, *, return_velocity: bool = False, args: Sequence[Any] = ()
    ) -> Tensor | tuple[Tensor, Tensor]:
        """h(T), shape of `h`; with more than two times all of them, [len(t), *h.shape].

        Args:
            h: features at t[0], [batch, ...], floating point.
            t: times for this call instead of the layer's own.
            return_velocity: return (h, h') instead, both of that shape.
            args: as for `NODE.forward`.
        """
        check_tensor("h", h, self.system)
        times = self._times(t)
        velocity = None
        if self.initial_velocity is not None:
            velocity = self.initial_velocity(h)
            if isinstance(velocity, Tensor) and torch.is_autocast_enabled(h.device.type):
                velocity = velocity.to(h.dtype)  # autocast's is narrower
            if not isinstance(velocity, Tensor) or velocity.shape != h.shape or velocity.dtype != h.dtype:
                tensor = isinstance(velocity, Tensor)
                got = f"{tuple(velocity.shape)} {velocity.dtype}" if tensor else type(velocity).__name__
                raise ValueError(
                    f"initial_velocity returned {got} for h of {tuple(h.shape)} {h.dtype}; return h's shape and dtype"
                )
        solution = self._run(self.system.initial_state(h, velocity, times[0]), h, times, args)
        two = len(solution.t) == 2
        x, m = solution.final if two else solution.ys
        at = times[-1] if two else times
        features = self.system.features(at, x)
        return (features, self.system.velocity(at, x, m)) if return_velocity else features

    if TYPE_CHECKING:
        __call__ = forward

    def _of_the_model(self) -> dict[str, Any]:
        system = self.system
        shown: dict[str, Any] = {}
        if system.gate_x != gates.get("softclip") and isinstance(self, GHBNODE | GNesterovNODE):
            shown["gate"] = system.gate_x
        if system.raw_xi is None and isinstance(self, GHBNODE | GNesterovNODE):
            shown["xi"] = system.fixed_xi
        if system.exact:
            shown["form"] = "exact"
        return shown


class SONODE(MomentumLayer):
    """Second-order neural ODE (Norcliffe et al. 2020): h'' = f(t, h, h').

    Args:
        field: f(t, h, m) with m = h'; the result has h's shape and dtype.
        options: see `MomentumLayer` and `Layer`.
    """

    def __init__(self, field: Field, **options: Unpack[MomentumOptions]) -> None:
        super().__init__(systems.second_order(field), **options)


class HBNODE(MomentumLayer):
    """Heavy-ball neural ODE (Xia et al. 2021): h' = m, m' = -γ m + f(t, h), γ learnable in (0, 1).

    Args:
        field: f(t, h).
        options: see `MomentumLayer` and `Layer`.
    """

    def __init__(self, field: Field, **options: Unpack[MomentumOptions]) -> None:
        super().__init__(systems.heavy_ball(field), **options)


class GHBNODE(MomentumLayer):
    """Generalised heavy-ball neural ODE (Xia et al. 2021): h' = σ(m), m' = -γ m + f(t, h) - ξ h.

    Args:
        field: f(t, h).
        gate: σ: a name, a gate, or an elementwise callable.
        xi: ξ, a number ≥ 0 or "learnable".
        options: see `MomentumLayer` and `Layer`.
    """

    def __init__(
        self, field: Field, gate: gates.GateLike = "softclip", xi: Xi = "learnable", **options: Unpack[MomentumOptions]
    ) -> None:
        super().__init__(systems.generalised_heavy_ball(field, gate, xi), **options)


class NesterovNODE(MomentumLayer):
    """Nesterov neural ODE (Nguyen et al. 2022): h = k(t) x, x' = m, m' = -m - f(t, h), for t > 0.

    Args:
        field: f(t, h).
        form: "absorbed", the paper's, where the network stands for all that the damping leaves; or "exact", where it
            stands for -F alone and the layer solves h'' + (3/t) h' = -f(t, h).
        damping_factor: r ≥ 0 for damping r/t in place of 3/t: k(t) = t^(-r/2) e^(t/2).
        options: see `MomentumLayer` and `Layer`.
    """

    def __init__(
        self, field: Field, *, form: Form = "absorbed", damping_factor: float = 3.0, **options: Unpack[MomentumOptions]
    ) -> None:
        super().__init__(systems.nesterov(field, form, damping_factor), **options)


class GNesterovNODE(MomentumLayer):
    """Generalised Nesterov neural ODE (Nguyen et al. 2022): h = σ(k(t)) x, x' = σ(m), m' = -m - σ(f(t, h)) - ξ h, for t
    > 0.

    Args:
        field: f(t, h).
        gate: σ: a name, a gate, or an elementwise callable.
        xi: ξ, a number ≥ 0 or "learnable".
        form, damping_factor: as in `NesterovNODE`.
        options: see `MomentumLayer` and `Layer`.
    """

    def __init__(
        self,
        field: Field,
        gate: gates.GateLike = "softclip",
        xi: Xi = "learnable",
        *,
        form: Form = "absorbed",
        damping_factor: float = 3.0,
        **options: Unpack[MomentumOptions],
    ) -> None:
        super().__init__(systems.gnesterov(field, gate, xi, form, damping_factor), **options)


__all__: Sequence[str] = ["ANODE", "GHBNODE", "HBNODE", "NODE", "SONODE", "GNesterovNODE", "NesterovNODE"]
