"""Layers inside torch.compile on one CPU thread: `python -m benchmarks.compiled`.

The system, the contenders' turns and the ratios are those of `benchmarks.cpu`. Compiled are the layer, whole, and the
field alone: what its evaluations would take if the rest cost nothing. Beside them, where they are installed, diffrax
and jax (jit, Dopri5, its default adjoint) on the same system. Every answer and gradient is first held against a tight
float64 solution. Seconds of compilation are wall time, with an empty cache.

Prints a Markdown table and writes `compiled.json` into this machine's folder of `benchmarks/results`.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.cpu import WRONG, layer
from benchmarks.problems import BOUND, SYSTEM, T0, T1, TOLERANCE, XI, Problem, TorchdiffeqSystem, relative_error
from benchmarks.report import Line, installed, run


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def diffrax_solves(problem: Problem) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    """(features at the end, attempted steps), and the same with gradients, by diffrax; None where it is missing."""
    try:
        import diffrax
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    h0, cotangent, *weights = (
        jnp.asarray(x.detach().numpy()) for x in (problem.h0, problem.cotangent, *problem.field.parameters())
    )

    def softclip(x: Any) -> Any:
        return BOUND * jnp.tanh(x / BOUND)

    def kappa(t: Any) -> Any:
        return softclip(t**-1.5 * jnp.exp(t / 2))

    def rhs(t: Any, state: Any, weights: Any) -> Any:
        (x, m), (a, b, c, d) = state, weights
        h = kappa(t) * x
        return softclip(m), -m - softclip(jnp.tanh(h @ a.T + b) @ c.T + d) - XI * h

    def solve(h0: Any, weights: Any) -> Any:
        controller = diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(rhs), diffrax.Dopri5(), T0, T1, None, (h0 / kappa(T0), jnp.zeros_like(h0)), weights,
            stepsize_controller=controller, saveat=diffrax.SaveAt(t1=True),
        )  # fmt: skip
        return kappa(T1) * solution.ys[0][0], solution.stats["num_steps"]

    def loss(h0: Any, weights: Any) -> Any:
        h1, steps = solve(h0, weights)
        return (h1 * cotangent).sum(), (h1, steps)

    forward, train = jax.jit(solve), jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    wait: Any = jax.block_until_ready
    return lambda: wait(forward(h0, weights)), lambda: wait(train(h0, weights))


def check_diffrax(solves: tuple[Callable[[], Any], Callable[[], Any]], truth: Any) -> dict[str, float]:
    """Errors of what diffrax gives.

    Raises:
        RuntimeError: it is wrong.
    """
    forward, train = solves
    (_, (h1, steps)), (of_h0, of_weights) = train()

    def error(value: Any, exact: Tensor) -> float:
        return relative_error(torch.tensor(value.tolist()), exact)

    errors = [error(forward()[0], truth[0]), error(h1, truth[0])]
    gradients = [error(g, exact) for g, exact in zip((of_h0, *of_weights), truth[1], strict=True)]
    if not max(*errors, *gradients) < WRONG:
        raise RuntimeError(f"diffrax: wrong answer, errors {errors}, of the gradients {gradients}")
    return {"error": max(errors), "gradient_error": max(gradients), "attempted": int(steps)}


def measure(rounds: int) -> tuple[list[Line], dict[str, Any]]:
    """The lines of the table, and the numbers behind them."""
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": cache}):
        return _measure(rounds)


def _measure(rounds: int) -> tuple[list[Line], dict[str, Any]]:
    problem = Problem.draw()
    h0, t = problem.h0, torch.tensor(T0)
    truth = problem.truth()
    eager = {gradient: layer(problem, gradient) for gradient in ("discrete", "adjoint")}
    compiled = {gradient: torch.compile(one, fullgraph=True) for gradient, one in eager.items()}
    # Not Inductor's default: tanh by exp, three times as fast, to an absolute error of 1e-7.
    options: dict[str, Any] = {"cpp.use_decompose_tanh": True}
    fast_tanh = torch.compile(layer(problem, "discrete"), fullgraph=True, options=options)
    field = torch.compile(problem.field, fullgraph=True)
    peer = TorchdiffeqSystem(problem.field)
    tolerances: dict[str, Any] = {"rtol": TOLERANCE, "atol": TOLERANCE}

    def forward(solve: Callable[[Tensor], object]) -> Callable[[], object]:
        return torch.no_grad()(lambda: solve(h0))

    def train(solve: Callable[..., Tensor], **options: Any) -> Callable[[], object]:
        return lambda: problem.gradients(solve(h0, **options))

    compilation = {"forward": seconds(forward(compiled["discrete"]))}
    torch._dynamo.reset()
    compilation["forward again"] = seconds(forward(compiled["discrete"]))

    def errors_of(name: str, h1: Tensor, found: Sequence[Tensor]) -> dict[str, float]:
        errors = relative_error(h1, truth[0]), max(map(relative_error, found, truth[1]))
        if not max(errors) < WRONG:
            raise RuntimeError(f"{name}: wrong answer, error {errors[0]:.1e}, of the gradients {errors[1]:.1e}")
        return {"error": errors[0], "gradient_error": errors[1]}

    answers = {}
    for gradient, one in compiled.items():
        start = time.perf_counter()
        h1 = one(h0)
        found = problem.gradients(h1)
        compilation[gradient] = time.perf_counter() - start
        torch._dynamo.reset()
        compilation[f"{gradient} again"] = seconds(train(one))
        errors = errors_of(gradient, h1, found)
        stats = eager[gradient].stats
        eager[gradient](h0)
        steps = int(stats.accepted), int(stats.rejected)
        if steps != (eager[gradient].stats.accepted, eager[gradient].stats.rejected):
            raise RuntimeError(f"{gradient}: {steps} steps compiled, others eager: {eager[gradient].stats}")
        answers[gradient] = errors | {"accepted": steps[0], "rejected": steps[1]}
        nfe = int(stats.nfe_forward)
    h1 = fast_tanh(h0)  # last: it would fill the cache for those whose compilation is timed
    answers["tanh by exp"] = errors_of("tanh by exp", h1, problem.gradients(h1))
    back = 6 * int(answers["discrete"]["accepted"])

    def field_calls() -> None:
        for _ in range(nfe):
            field(t, h0)

    def field_gradients() -> None:
        with torch.no_grad():
            field_calls()
        for _ in range(back):
            h = h0.detach().requires_grad_()
            torch.autograd.grad(field(t, h), [h, *problem.field.parameters()], problem.cotangent)

    rival = diffrax_solves(problem)
    others = {}
    if rival is not None:
        others = dict(zip(("forward, diffrax", "train, diffrax"), rival, strict=True))
        answers["diffrax"] = check_diffrax(rival, truth)
    times = timing.interleave(
        others
        | {
            "forward, field": torch.no_grad()(field_calls),
            "forward, compiled": forward(compiled["discrete"]),
            "forward, compiled, tanh by exp": forward(fast_tanh),
            "forward, eager": forward(eager["discrete"]),
            "forward, odeint": forward(lambda h: peer.solve(h, **tolerances)),
            "train, field": field_gradients,
            "train, compiled": train(compiled["discrete"]),
            "train, compiled, tanh by exp": train(fast_tanh),
            "train, compiled adjoint": train(compiled["adjoint"]),
            "train, eager": train(eager["discrete"]),
            "train, odeint": train(peer.solve, **tolerances),
            "train, odeint_adjoint": train(peer.solve, adjoint=True, **tolerances),
        },
        rounds,
    )

    ratio = partial(timing.ratio, times)
    lines = [
        Line(
            "compiled, forward / calls of the compiled field", ratio("forward, compiled", "forward, field"), ("<=", 1.5)
        ),
        Line(
            "compiled, forward and backward / the compiled field's calls and backward passes",
            ratio("train, compiled", "train, field"),
            ("<=", 1.5),
        ),
        Line("eager / compiled, forward", ratio("forward, eager", "forward, compiled")),
        Line("eager / compiled, forward and backward", ratio("train, eager", "train, compiled")),
        Line("torchdiffeq `odeint` / compiled, forward", ratio("forward, odeint", "forward, compiled")),
        Line(
            "torchdiffeq `odeint_adjoint` / compiled, forward and backward",
            ratio("train, odeint_adjoint", "train, compiled"),
        ),
        Line("torchdiffeq `odeint` / compiled, forward and backward", ratio("train, odeint", "train, compiled")),
        Line(
            "torchdiffeq `odeint_adjoint` / compiled adjoint", ratio("train, odeint_adjoint", "train, compiled adjoint")
        ),
        Line("seconds of compilation, forward alone", compilation["forward"]),
        Line("forward and backward, discrete", compilation["discrete"]),
        Line("forward and backward, adjoint", compilation["adjoint"]),
        Line("the same from torch's cache on disk, forward alone", compilation["forward again"]),
        Line("forward and backward, discrete", compilation["discrete again"]),
        Line("forward and backward, adjoint", compilation["adjoint again"]),
    ]
    if others:
        for what in ("forward", "train"):
            said = "forward" if what == "forward" else "forward and backward"
            value = ratio(f"{what}, diffrax", f"{what}, compiled")
            note = f"{answers['diffrax']['attempted']:g} attempted steps"
            lines.append(Line(f"diffrax / compiled, {said}", value, (">=", 1.0), note))
        for what in ("forward", "train"):
            said = "forward" if what == "forward" else "forward and backward"
            value = ratio(f"{what}, diffrax", f"{what}, compiled, tanh by exp")
            lines.append(Line(f"diffrax / compiled with `cpp.use_decompose_tanh`, {said}", value))
    milliseconds = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    return lines, {"answers": answers, "nfe": nfe, "cpu_milliseconds": milliseconds}


if __name__ == "__main__":
    packages = ("torch", "torchdiffeq", "nesterov-triton", *installed("diffrax", "jax"))
    run("compiled", __doc__.partition("\n")[0], SYSTEM, measure, *packages)
