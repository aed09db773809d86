"""The solver's elementwise arithmetic, one idea a folder, each with its torch reference.

`momentum` and `runge_kutta` are what a step on a CPU is made of. The four `*_stage` and `*_finish` are whole gaps
between two evaluations of the field, each an operator with a Triton kernel for CUDA devices; `reference.py` is what it
computes, `kernel.py` the kernel, `__init__.py` the public function and its registration.

Every function takes tensors and returns tensors and knows nothing of loops or of autograd strategy. With `out` the
result is written there and nothing is allocated; without, the same operations in the same order run out of place and
are differentiable, so that both ways give the same bits.
"""
