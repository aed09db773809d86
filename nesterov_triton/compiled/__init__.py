"""Solves inside torch.compile: the loop as an operation of the graph, with nothing of Python left in it.

The eager solver decides in Python, step by step, so a tracer cannot follow it. Here the same arithmetic is written for
the tracer: one attempted step is the body of a `while_loop`, scalars of control are tensors, accept or reject a
`where`. Gradients do not come from differentiating the loop (torch drops them, silently, for what needs none at the
start): each strategy is an autograd.Function with a loop of its own in its backward pass.

| module | holds |
|---|---|
| `system` | the right-hand side as a function of tensors alone |
| `step` | one step: stages, end, error, dense output |
| `loop` | the loop over attempted steps |
| `gradients` | discrete and adjoint |
| `reversible` | the gradient that takes a splitting's steps back, by loops in loops |
| `solve` | what `nesterov_triton.solve` and the layers call under a tracer |
"""
