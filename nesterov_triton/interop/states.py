"""States as torchdiffeq takes them, tensors or tuples of tensors, real or complex, and the flat real one that is
solved for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nesterov_triton.interop.names import name_of

State: TypeAlias = Tensor | tuple[Tensor, ...]
Function: TypeAlias = Callable[..., Any]


class Layout:
    """How a state is laid out: the shapes of its tensors, one after the other in one flat real tensor, [D].

    Tensors of different dtypes are promoted to one. A complex number takes two elements.

    Attributes:
        shapes: of the tensors.
        single: whether the state is a tensor, not a tuple.
        dtype: of the tensors, which the function is given too.
        real: the dtype of D and of the time.
        simple: whether the state is one real tensor, which is solved for as it is.
    """

    def __init__(self, y0: object) -> None:
        single = isinstance(y0, Tensor)
        parts: tuple[Any, ...] = (y0,) if single else tuple(y0) if isinstance(y0, tuple | list) else ()
        if not parts:
            raise TypeError(f"y0 must be a tensor or a tuple of tensors, got {type(y0).__name__}")
        for i, part in enumerate(parts):
            name = "y0" if single else f"y0[{i}]"
            if not isinstance(part, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(part).__name__}; convert it with torch.as_tensor")
            if not part.is_floating_point() and not part.is_complex():
                raise TypeError(f"{name} must be floating point or complex, got {part.dtype}; convert it with .float()")
            if part.device != parts[0].device:
                raise ValueError(f"{name} is on {part.device} and y0[0] on {parts[0].device}; move one of them")
        self.single = single
        self.shapes = tuple(part.shape for part in parts)
        self.sizes = [part.numel() for part in parts]
        dtype = parts[0].dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        self.dtype, self.complex, self.device = dtype, dtype.is_complex, parts[0].device
        self.real = dtype.to_real() if dtype.is_complex else dtype
        self.simple = single and not self.complex

    def flat(self, y: Any) -> Tensor:
        """The flat real tensor, [D], of a state; with its graph."""
        whole = y.reshape(-1) if self.single else torch.cat([part.to(self.dtype).reshape(-1) for part in y])
        return torch.view_as_real(whole.resolve_conj()).reshape(-1) if self.complex else whole

    def elements(self, z: Tensor) -> Tensor:
        """Flat elements, [..., N], complex ones of a complex state, of [..., D]."""
        if self.complex and z.numel() == 0:  # whose storage may begin at an odd element
            return z.new_empty((*z.shape[:-1], 0), dtype=self.dtype)
        return torch.view_as_complex(z.view(*z.shape[:-1], -1, 2)) if self.complex else z

    def parts(self, z: Tensor) -> list[Tensor]:
        """The tensors of the state(s) [..., D], in their shapes behind the leading ones."""
        whole = self.elements(z)
        if len(self.sizes) == 1:
            return [whole.reshape((*z.shape[:-1], *self.shapes[0]))]
        pieces = torch.split(whole, self.sizes, dim=-1)
        return [p.reshape((*z.shape[:-1], *shape)) for p, shape in zip(pieces, self.shapes, strict=True)]

    def state(self, z: Tensor) -> State:
        """The state(s) of [..., D], as the function takes them."""
        parts = self.parts(z)
        return parts[0] if self.single else tuple(parts)

    def slope(self, u: Any, function: Function) -> Tensor:
        """What the function returned, flat, [D], in the state's dtype.

        Raises:
            TypeError, ValueError: it is no state of this layout; the message says what to return.
        """
        parts = (u,) if self.single else u
        if not isinstance(parts, tuple | list) or len(parts) != len(self.shapes):
            got = f"{len(parts)} values" if isinstance(parts, tuple | list) else type(parts).__name__
            raise TypeError(f"func {name_of(function)} returned {got}; return a tuple of {len(self.shapes)} tensors")
        flat = []
        for i, (part, shape) in enumerate(zip(parts, self.shapes, strict=True)):
            name = "" if self.single else f" [{i}]"
            if not isinstance(part, Tensor):
                raise TypeError(f"func {name_of(function)} returned{name} {type(part).__name__}; return tensors")
            if part.shape != shape:
                raise ValueError(
                    f"func {name_of(function)} returned{name} shape {tuple(part.shape)} for a state of {tuple(shape)}; "
                    "return the state's shape"
                )
            if part.device != self.device:
                raise ValueError(f"func {name_of(function)} returned{name} a tensor on {part.device}; y0 is elsewhere")
            if part.is_complex() and not self.complex:
                raise ValueError(
                    f"func {name_of(function)} returned{name} {part.dtype} for a real state; make y0 complex"
                )
            flat.append((part if part.dtype == self.dtype else part.to(self.dtype)).reshape(-1))
        whole = flat[0] if len(flat) == 1 else torch.cat(flat)
        return torch.view_as_real(whole.resolve_conj()).reshape(-1) if self.complex else whole


class Adapted:
    """A function f(t, y, *args) as the field of a flat state, or of the tensor itself where the layout is simple.

    Attributes:
        known: its value at the first state, if it has been computed already: what the first call returns.
    """

    def __init__(self, function: Function, layout: Layout, args: Sequence[Any] = ()) -> None:
        self.function, self.layout, self.args = function, layout, tuple(args)
        self.known: Tensor | None = None

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        if self.known is not None:
            known, self.known = self.known, None
            return known if torch.is_grad_enabled() else known.detach()
        layout = self.layout
        if not layout.simple:
            return layout.slope(self.function(t, layout.state(z), *self.args), self.function)
        u = self.function(t, z, *self.args)
        if type(u) is Tensor and u.dtype == z.dtype and u.shape == z.shape:
            return u
        return layout.slope(u, self.function).view(z.shape)


class AdaptedModule(nn.Module):
    """The same around a module, so that its parameters are found, and their change between the passes."""

    def __init__(self, adapted: Adapted) -> None:
        super().__init__()
        self.function = adapted.function
        self._adapted = adapted

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self._adapted(t, z)

    __call__ = forward  # nobody hooks this module
