"""The right-hand side as a function of tensors alone: of such a loop's body and a vector-Jacobian product are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nesterov_triton.systems import Rule, System


class Moment(NamedTuple):
    """What a right-hand side needs of one time, 0-d float64 each; None where it needs none."""

    t: Tensor
    scale: Tensor | None  # κ
    drive: Tensor | None  # s
    own: Tensor | None  # the exact form's part of the factor of x


class Bound:
    """A system and what is constant about it in one solve.

    Its tensors are handed in with every call, in one order: those of γ and ξ that are learned, 0-d float64, the field's
    parameters, then the tensors among its args.

    Attributes:
        rule: of a momentum system, with its numbers as constants.
        fixed: γ and ξ where they are not learned.
        scalars: which of "damping" and "xi" are learned.
        names: of the field's parameters.
        args: what the field is called with beside time and features, with `TENSOR` in place of tensors, which are
            handed in last.
        autocast: the device type and dtype of the autocast that the field runs under; None for none.
    """

    def __init__(
        self,
        system: System,
        rule: Rule | None,
        fixed: tuple[float, float],
        scalars: tuple[str, ...],
        names: tuple[str, ...],
        autocast: tuple[str, torch.dtype] | None,
        args: tuple[Any, ...] = (),
    ) -> None:
        self.system, self.rule, self.fixed = system, rule, fixed
        self.scalars, self.names, self.autocast, self.args = scalars, names, autocast, args

    def moments(self, times: Tensor) -> list[Moment]:
        """What the right-hand side needs of the times [s], float64, at each of them."""
        found = (None, None, None) if self.rule is None else self.rule.of_time(times)
        held = [times, *(x for x in found if x is not None)]
        moments = []
        for column in torch.stack(held).unbind(1):
            t, *rest = column.unbind()
            values = iter(rest)
            moments.append(Moment(t, *(None if x is None else next(values) for x in found)))
        return moments

    def slopes(self, at: Moment, rows: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The right-hand side at the moment `at` and the state `rows`, each of h's shape."""
        rule, dtype = self.rule, rows[0].dtype
        if rule is None:
            return (self._field(at.t.to(dtype), rows, tensors),)
        x, m = rows
        h = x if at.scale is None else x * at.scale.to(dtype)
        u = self._field(at.t.to(dtype), (h, m) if self.system.sees_momentum else (h,), tensors)
        slope = self._driven(at, u, x, h, tensors)
        if rule.damped:
            slope = slope - _cast(self.damping(tensors), dtype) * m
        return rule.gate_x(m), slope

    def force(self, at: Moment, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The part of m' that depends on the position, where the field sees that alone; of x's shape."""
        h = x if at.scale is None else x * at.scale.to(x.dtype)
        return self._driven(at, self._field(at.t.to(x.dtype), (h,), tensors), x, h, tensors)

    def damping(self, tensors: Sequence[Tensor]) -> Tensor | float:
        """γ: 0-d float64 where it is learned."""
        return dict(zip(self.scalars, tensors, strict=False)).get("damping", self.fixed[0])

    def _driven(self, at: Moment, u: Tensor, x: Tensor, h: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        rule, dtype = self.rule, x.dtype
        assert rule is not None
        slope = rule.gate_f(u)
        if at.drive is not None:
            slope = slope * at.drive.to(dtype)
        elif rule.sign != 1.0:
            slope = slope * rule.sign
        if at.own is not None:
            slope = slope + at.own.to(dtype) * x
        if rule.residual:
            xi = dict(zip(self.scalars, tensors, strict=False)).get("xi", self.fixed[1])
            slope = slope - _cast(xi, dtype) * h
        return slope

    def _field(self, t: Tensor, features: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        if self.autocast is None:
            return self._call(t, features, tensors)
        kind, dtype = self.autocast
        with torch.autocast(kind, dtype=dtype, cache_enabled=False):
            u = self._call(t, features, tensors)
        return u.to(features[0].dtype)

    def _call(self, t: Tensor, features: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        field: Any = self.system.field
        own, rest = len(self.scalars), len(self.scalars) + len(self.names)
        args = put(self.args, tensors[rest:])
        if not isinstance(field, nn.Module):
            found: Tensor = field(t, *features, *args)
        else:
            params = dict(zip(self.names, tensors[own:rest], strict=True))
            found = functional_call(field, params, (t, *features, *args))
        return found


TENSOR = "a tensor that is handed in"  # no tracer minds a string, and nobody else has this one


def put(args: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """The args with the tensors in their places."""
    each = iter(tensors)
    return [next(each) if isinstance(a, str) and a == TENSOR else a for a in args]


def _cast(x: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    return x.to(dtype) if isinstance(x, Tensor) else x
