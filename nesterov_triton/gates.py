"""Gates: the elementwise nonlinearities σ of the momentum family, each with its derivative.

A gate maps a tensor of any shape to one of the same shape. `pullback` multiplies a cotangent by σ'(x); it is given
y = σ(x) too, because for every gate here σ' is cheaper from the value than from the argument.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from nesterov_triton import transforms
from nesterov_triton._fields import check_instance
from nesterov_triton._names import lookup, public
from nesterov_triton._numbers import is_number, plain
from nesterov_triton.ops.rows import Row


class Gate:
    """An elementwise function with its derivative.

    Attributes:
        bound: the supremum of \\|σ\\| (infinity for the identity and for callables, whose bound is not known).
        from_value: whether `pullback` needs y = σ(x) alone, and `x` may be anything.
    """

    bound: float = math.inf
    from_value: bool = True

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """σ(x), shape of `x`; written into `out` if given (then it is not differentiable)."""
        raise NotImplementedError

    def number(self, x: float) -> float:
        """σ of a plain number."""
        return float(self(torch.tensor(x, dtype=torch.float64, device="cpu")))

    def both(self, a: Tensor, b: Tensor, out: Row) -> None:
        """σ(a) and σ(b) into the two parts of `out`."""
        self(a, out=out.parts[0])
        self(b, out=out.parts[1])

    def pullback(self, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """σ'(x) ⊙ grad, given y = σ(x); all of one shape. May return `grad` itself."""
        raise NotImplementedError

    def both_pullback(self, grad: Row, y: Row) -> Sequence[Tensor]:
        """The two parts of σ' ⊙ grad, given the values y of a gate that is known by them; y may be overwritten."""
        return self.pullback(grad.flat, grad.flat, y.flat).view(2, -1).unbind(0)


def _check_bound(gate: Softclip | Hardtanh) -> None:
    bound: object = gate.bound
    if not is_number(bound):
        learned = "; a gate has no parameters, so that it would not be learned: pass a number"
        raise TypeError(
            f"gate bound must be a positive finite number, got {type(bound).__name__}"
            f"{learned if isinstance(bound, Tensor) else ''}"
        )
    if not (math.isfinite(bound) and bound > 0):
        raise ValueError(f"gate bound must be a positive finite number, got {bound}")
    if plain(bound) is not bound:
        object.__setattr__(gate, "bound", plain(bound))


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # or later solves could not save it for their backward passes
def constant(value: float, dtype: torch.dtype) -> Tensor:
    """A 0-d CPU tensor, which torch takes as a scalar on any device: a Python number costs a tensor and a cast each
    time, 1.5 of the 4 µs that a product of 16,384 elements takes."""
    return transforms.plain(torch.tensor(value, dtype=dtype, device="cpu"))


@dataclass(frozen=True)
class Identity(Gate):
    """σ(x) = x."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return x if out is None else out.copy_(x)

    def number(self, x: float) -> float:
        return x

    def pullback(self, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return grad


@dataclass(frozen=True)
class Softclip(Gate):
    """σ(x) = c tanh(x / c): the identity near 0, bounded by c, smooth everywhere. The default gate.

    A kink costs a high-order adaptive method dearly: GNesterovNODE on the paper's point clouds (`nesterov-triton
    compare point-cloud --gradient adjoint`: dopri5, tolerance 1e-7, seed 0) took, in epoch 100 of 100, 800 forward and
    1348 backward evaluations a batch with hardtanh(±5) and 244 and 264 with softclip(5), at a training loss of 0.021
    and 0.024.

    Raises:
        ValueError: `bound` is not a positive finite number.
    """

    bound: float = 5.0

    def __post_init__(self) -> None:
        _check_bound(self)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        c = self.bound
        compiling = torch.compiler.is_compiling()  # then what is best in memory is for the compiler to say
        if x.dtype in (torch.float16, torch.bfloat16):
            if compiling:
                return c * torch.tanh(x * (1 / c))
            y = torch.mul(x, 1 / c, out=out)
            return torch.mul(torch.tanh(y, out=out), c, out=out)
        # tanh(v) = 2 sigmoid(2 v) - 1: torch's vectorised sigmoid takes 0.5 ns an element on one CPU core, expm1 1.3,
        # tanh 2.7, more than the rest of a stage together. The price is accuracy near 0, where the error is absolute:
        # 6e-8 c in float32, below any tolerance that makes sense there. Inductor's tanh takes 1.5 ns, its sigmoid 0.4.
        if compiling:
            return torch.sigmoid(x * (2 / c)) * (2 * c) - c
        y = torch.mul(x, constant(2 / c, x.dtype), out=out)
        y = torch.sigmoid(y, out=out)
        return torch.add(constant(-c, x.dtype), y, alpha=2 * c, out=out)

    def number(self, x: float) -> float:
        return self.bound * math.tanh(x / self.bound)

    def both(self, a: Tensor, b: Tensor, out: Row) -> None:
        if a.dtype in (torch.float16, torch.bfloat16):
            return super().both(a, b, out)
        c, y = self.bound, out.flat
        for x, part in zip((a, b), out.parts, strict=True):
            torch.mul(x, constant(2 / c, x.dtype), out=part)
        torch.sigmoid(y, out=y)
        torch.add(constant(-c, a.dtype), y, alpha=2 * c, out=y)

    def pullback(self, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
        # σ' = 1 - (y / c)²
        return torch.addcmul(grad, torch.mul(grad, y), y, value=-1 / self.bound**2)

    def both_pullback(self, grad: Row, y: Row) -> Sequence[Tensor]:
        square = torch.mul(y.flat, y.flat, out=y.flat)
        torch.addcmul(grad.flat, grad.flat, square, value=-1 / self.bound**2, out=y.flat)
        return y.parts


@dataclass(frozen=True)
class Tanh(Softclip):
    """σ(x) = tanh(x), bounded by 1."""

    bound: float = 1.0

    def __post_init__(self) -> None:
        if self.bound != 1.0:
            raise ValueError(f"gate bound: tanh is bounded by 1, got {self.bound}; use Softclip({self.bound})")


@dataclass(frozen=True)
class Hardtanh(Gate):
    """σ(x) = min(max(x, -c), c): the published experiments' gate, with c = 5. See `Softclip` for what its kinks cost.

    Raises:
        ValueError: `bound` is not a positive finite number.
    """

    bound: float = 5.0

    def __post_init__(self) -> None:
        _check_bound(self)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        c = self.bound
        if out is None:  # differs from clamp in its derivative at the kinks: 0, as in `pullback`
            return torch.nn.functional.hardtanh(x, -c, c)
        return torch.clamp(x, -c, c, out=out)

    def pullback(self, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.mul(grad, torch.lt(y.abs(), self.bound))


@dataclass(frozen=True)
class Elementwise(Gate):
    """Any elementwise callable as a gate; its derivative comes from autograd.

    Args:
        function: maps a tensor to one of the same shape and dtype, each element on its own.
    """

    function: Callable[[Tensor], Tensor]
    from_value = False

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        compiling = torch.compiler.is_compiling()
        version = None if compiling or x.is_inference() else x._version
        y = self.function(x) if compiling else self._called(x)
        if version is not None and x._version != version:
            raise ValueError(f"gate must not change its argument: {self.function!r} works in place; pass inplace=False")
        if y.shape != x.shape or y.dtype != x.dtype:
            raise ValueError(
                f"gate must be elementwise: {self.function!r} turned {tuple(x.shape)} {x.dtype} into "
                f"{tuple(y.shape)} {y.dtype}; return a tensor of the argument's shape and dtype"
            )
        return y if out is None else out.copy_(y)

    def _called(self, x: Tensor) -> Tensor:
        try:
            return self.function(x)
        except RuntimeError as error:
            own = [*self.function.parameters()] if isinstance(self.function, torch.nn.Module) else []
            if all(p.dtype == x.dtype and p.device == x.device for p in own):
                raise
            raise RuntimeError(
                f"the gate uses {len(own)} tensor(s) of its own, {own[0].dtype} on {own[0].device}, and is applied to "
                f"{x.dtype} on {x.device} (times are float64 on the CPU): a callable gate has no parameters. Put what "
                "is learned into the field"
            ) from error

    def pullback(self, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
        # Where no tensor may be marked as a leaf, or, in inference mode, no mark means anything.
        if torch.compiler.is_compiling() or transforms.active() or torch.is_inference_mode_enabled():
            return cast(Tensor, torch.func.vjp(self.function, x)[1](grad)[0])
        # Of times the result is differentiated once more, where a layer returns the velocity.
        again = torch.is_grad_enabled() and (x.requires_grad or grad.requires_grad)
        with torch.enable_grad():
            leaf = x if again and x.requires_grad else x.detach().requires_grad_()
            value = self.function(leaf)
        if not value.requires_grad:  # a constant function
            return torch.zeros_like(grad)
        return torch.autograd.grad(value, leaf, grad, create_graph=again)[0]


GateName: TypeAlias = Literal["identity", "tanh", "hardtanh", "softclip"]
GateLike: TypeAlias = GateName | Gate | Callable[[Tensor], Tensor]

GATES: dict[str, Gate] = {"identity": Identity(), "tanh": Tanh(), "hardtanh": Hardtanh(), "softclip": Softclip()}


def get(gate: GateLike | str) -> Gate:
    """The gate of that name, the gate itself, or an elementwise callable wrapped as one.

    Raises:
        ValueError: unknown name (the message gives the nearest valid one).
        TypeError: neither a name, nor a gate, nor callable.
    """
    if isinstance(gate, Gate):
        return gate
    if isinstance(gate, str):
        return lookup("gate", gate, GATES)
    check_instance("gate", gate)
    if callable(gate):
        return Elementwise(gate)
    raise TypeError(f"gate must be a name, a gate object or an elementwise callable, got {type(gate).__name__}")


# By exact type: a subclass may compute something else.
_FORMS: dict[type[Gate], str] = {
    Identity: "identity",
    Softclip: "softclip",
    Tanh: "softclip",
    Hardtanh: "hardtanh",
}


def kernel_form(gate: Gate) -> tuple[str, float] | None:
    """The name in `gates_triton.FORMS` and the bound of a gate that has a Triton form; None for all others, which
    then take the torch path."""
    name = _FORMS.get(type(gate))
    return None if name is None else (name, gate.bound)


@functools.lru_cache(maxsize=256)
def of_form(name: str, bound: float) -> Gate:
    """The gate whose `kernel_form` this is (softclip with bound 1 for tanh, which is the same function)."""
    if name == "identity":
        return Identity()
    return lookup("gate form", name, {"softclip": Softclip, "hardtanh": Hardtanh})(bound)


__all__ = ["GATES", "Elementwise", "Gate", "GateLike", "GateName", "Hardtanh", "Identity", "Softclip", "Tanh", "get"]


def __dir__() -> list[str]:
    return public(globals())
