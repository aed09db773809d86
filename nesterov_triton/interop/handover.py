"""The methods that are left to torchdiffeq: multi-step ones, and scipy's."""

from __future__ import annotations

from typing import Any

from nesterov_triton.interop.options import check_options


def by_torchdiffeq(func: Any, y0: Any, t: Any, *, method: str, options: Any, **keywords: Any) -> Any:
    """`torchdiffeq.odeint`, with its options checked.

    Raises:
        ImportError: torchdiffeq is not installed.
        ValueError, TypeError: an option that the method does not know.
    """
    check_options(method, options)
    return _torchdiffeq(method).odeint(func, y0, t, method=method, options=options, **keywords)


def adjoint_by_torchdiffeq(
    func: Any, y0: Any, t: Any, *, method: str, options: Any, adjoint_method: Any, adjoint_options: Any, **keywords: Any
) -> Any:
    """`torchdiffeq.odeint_adjoint`; see `by_torchdiffeq`."""
    check_options(method, options)
    if adjoint_options is not None:
        check_options(adjoint_method or method, adjoint_options, "adjoint_")
    return _torchdiffeq(method).odeint_adjoint(
        func, y0, t, method=method, options=options, adjoint_method=adjoint_method, adjoint_options=adjoint_options,
        **keywords,
    )  # fmt: skip


def _torchdiffeq(method: str) -> Any:
    try:
        import torchdiffeq
    except ImportError:
        raise ImportError(
            f"method {method!r} is torchdiffeq's own, which is not installed: pip install torchdiffeq, or use one of "
            "this package's methods"
        ) from None
    return torchdiffeq
