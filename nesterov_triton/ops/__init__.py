"""The solver's elementwise arithmetic, one idea a folder, each with its torch reference.

Every function takes tensors and returns tensors and knows nothing of loops or of autograd strategy. With `out` the
result is written there and nothing is allocated; without, the same operations in the same order run out of place and
are differentiable, so that both ways give the same bits.
"""
