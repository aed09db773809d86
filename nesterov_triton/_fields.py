"""What a field must be: looked at when it is given, and where its first evaluation fails; with the fix in words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def check_field(field: object, arguments: str = "t, h") -> None:
    """Raise unless `field` can be called as f(`arguments`), maybe with more behind them, as far as can be told.

    Raises:
        TypeError: not callable, a class, or of another signature.
    """
    check_instance("field", field)
    if not callable(field):
        raise TypeError(f"field must be a module or function ({arguments}) -> dh, got {type(field).__name__}")
    if torch.compiler.is_compiling():  # a tracer has no signatures
        return
    given = arguments.split(", ")
    if _takes(getattr(field, "forward", field), len(given)):
        return
    signature = _signature(field)
    if signature is not None and not _binds(signature, given, partly=True):
        raise TypeError(_other_arguments(field, arguments, signature))


def check_instance(name: str, value: object) -> None:
    """Raise for a class: calling it would make an object, not call one."""
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be a module, object or function, got the class {value.__name__}; pass an instance, "
            f"say {value.__name__}(...)"
        )


def check_materialised(field: object, parameters: Iterable[Tensor]) -> None:
    """Raise where parameters do not exist yet, for the solve would look for their gradients in vain.

    Raises:
        ValueError: naming one of them.
    """
    if any(map(is_lazy, parameters)):
        assert isinstance(field, nn.Module)
        name = next(name for name, p in field.named_parameters() if is_lazy(p))
        raise ValueError(
            f"the field's parameters are lazy and do not exist yet ({name}): call the layer, or the field, once "
            "before, under torch.no_grad()"
        )


def explained(
    field: Callable[..., Tensor], features: Sequence[Tensor], args: int, error: Exception, cast: bool
) -> Exception:
    """What to raise where the first call of a field fails; the error itself where no more is known of it.

    Args:
        features: what the field was called with beside the time.
        args: how much it was given behind them.
        cast: whether it ran under autocast.
    """
    if isinstance(error, TypeError) and _of_the_call(error):
        called = [*("t", "h", "m")[: 1 + len(features)], *(f"args[{i}]" for i in range(args))]
        return TypeError(_other_arguments(field, ", ".join(called), _signature(field)))
    # A field may have weights of another dtype on purpose, and cast what it gets: a mistake is only what fails.
    if isinstance(error, RuntimeError) and not cast and "type" in str(error) and isinstance(field, nn.Module):
        dtype, own = features[0].dtype, {p.dtype for p in field.parameters() if p.is_floating_point()}
        if len(own) == 1 and dtype not in own:
            (other,) = own
            return ValueError(
                f"h, the state, is {dtype} and all parameters of the field are {other}; convert one of them, "
                f"with h.to({other}) or field.to({dtype})"
            )
    return error


def name_of(field: Any) -> str:
    """A field's name: a module's class, a function's own."""
    kind = type(field).__name__
    return kind if isinstance(field, nn.Module) else getattr(field, "__name__", kind)


def _takes(function: Any, count: int) -> bool:
    """Whether a plain Python function takes so many arguments; false where only its signature, whose making takes 20 µs
    of each `solve`, could tell."""
    bare = getattr(function, "__func__", function)
    if type(bare) is not FunctionType or bare.__code__.co_kwonlyargcount:
        return False
    most = bare.__code__.co_argcount - (bare is not function)
    return most - len(bare.__defaults__ or ()) <= count <= most


def _inner(field: Any) -> Any:
    """What torch's own wrappers hand all their arguments to."""
    if isinstance(field, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return _inner(field.module)
    if isinstance(field, nn.Module):
        inner = getattr(field, "_orig_mod", None)  # of torch.compile
        return field if inner is None else _inner(inner)
    return getattr(field, "_torchdynamo_orig_callable", field)


def _signature(field: Any) -> inspect.Signature | None:
    """What a call must look like; None where that cannot be told."""
    field = _inner(field)
    if isinstance(field, nn.Module):
        if field._forward_pre_hooks:  # which may change the arguments
            return None
        field = field.forward if type(field).__call__ is nn.Module.__call__ else field.__call__
    try:
        # A decorator made by functools.wraps shows another function's signature than its own.
        return inspect.signature(field, follow_wrapped=False)
    except (ValueError, TypeError):
        return None


def _binds(signature: inspect.Signature, given: Sequence[object], partly: bool = False) -> bool:
    try:
        (signature.bind_partial if partly else signature.bind)(*given)
    except TypeError:
        return False
    return True


def _other_arguments(field: Any, arguments: str, signature: inspect.Signature | None) -> str:
    inner = _inner(field)
    name = name_of(inner)
    said = f"field {name} is called as f({arguments})"
    if signature is None:
        return f"{said} and takes other arguments; wrap it: lambda {arguments}: ..., or in a module with that forward"
    said = f"{said} and takes ({', '.join(signature.parameters)})"
    if arguments == "t, h" and _binds(signature, "thm"):
        return f"{said}; pass what it takes behind t and h as args=(...); if that is the velocity, it is SONODE's field"
    fewer = next((given for given in ("t, h", "h") if _binds(signature, given.split(", "))), None)
    if fewer is None or fewer == arguments:
        return f"{said}; wrap it in a function or module f({arguments}), say with functools.partial for the others"
    if isinstance(inner, nn.Module):
        forward = f"forward = lambda self, {arguments}: self[0]({fewer})"
        return f"{said}; wrap it: class Field(nn.Sequential): {forward}; then pass Field(net)"
    called = name if name.isidentifier() and getattr(inner, "__name__", None) == name else "f"
    return f"{said}; wrap it: lambda {arguments}: {called}({fewer})"


_CALLS = inspect.getfile(nn.Module)  # a module's __call__, with its hooks


def _of_the_call(error: Exception) -> bool:
    """Whether the error arose where the field was called, not inside of it."""
    trace = error.__traceback__
    if trace is None:
        return False
    last = trace
    while last.tb_next is not None:
        last = last.tb_next
    return last is trace or last.tb_frame.f_code.co_filename == _CALLS
