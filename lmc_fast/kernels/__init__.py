"""Operations of the interpolated forward pass.

    interp_linear   one layer in any of three ways, in torch operations
    dual_gemm       dual_linear(x, a, z, b, lam, ...)           two products, one accumulator, one launch
    head_maps       head_maps(ya, yb, lam, maps, ...)           mix, map heads, bias, RoPE
    interpolate_weight  interpolate(a, b, rotation, lam, ...)       one matrix α A + β diag(s) (B Rᵀ)[p]
    softmax_loss    cross_entropy_(logits, target, ...), divergence_(logits, teachers, ...)

All but the first are Triton kernels with a `reference` in plain torch, which runs where Triton does not. The engine
uses them on NVIDIA GPUs where LMC_FAST_KERNELS, an environment variable, turns them on, or a measurement (enabled.py).
Importing this package does not import Triton, nor does anything on a CPU; importing an operation's module does, where
Triton is installed. docs/kernels.md counts what each operation moves.
"""
