"""The solver's elementwise arithmetic, one idea a folder, each with its torch reference.

`momentum` and `runge_kutta` are what a step in plain torch is made of, and hold the arithmetic on blocks that kernels
share. Every other folder is one operator: a whole gap between two evaluations of the field, with a Triton kernel for
CUDA devices. `reference.py` is what it computes, `kernel.py` the kernel, `__init__.py` the public function and its
registration; `dispatch` chooses.

| operators | what they lead to |
|---|---|
| `*_stage`, `*_finish` | the field's next arguments; the step's end, its error and its norm |
| `*_dense_output` | the states at requested times inside the step |
| `*_adjoint_*`, `first_order_*` with `through` | the same for state and adjoint, and the field's cotangents |
| `*_reverse_stage`, `*_reverse_finish` | the field's cotangents in a transposed step; the cotangent of its start |
| `control` (several functions) | the decisions of a loop on the device, in memory that stays where it is |

Every function but those of `control` takes tensors and returns tensors and knows nothing of loops or of autograd
strategy. With `out` the result is written there and nothing is allocated; without, the same operations in the same
order run out of place and are differentiable, so that both ways give the same bits.
"""
