"""Every kernel compiled for GPUs that need not be there: no spills, shared memory that fits, tensor cores in use."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton
from kernels.offline import SHARED_LIMIT, compiled

from lmc_fast.kernels import dual_gemm, head_maps, interpolate_weight, runtime, softmax_loss

OLD_COMPILER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
pytestmark = [
    pytest.mark.skipif(runtime.INTERPRETED, reason="the interpreter has no compiler"),
    pytest.mark.skipif(OLD_COMPILER, reason="triton before 3.7 spills 8 bytes of some kernels"),
]
ARCHITECTURES = [80, 90]
SMALLER = 128 * 128  # m n of the largest tile where the epilogue needs registers


def types(pointers: str, dtype: str, whole: str = "", plain: str = "", floats: str = "") -> dict[str, str]:
    """Triton types of arguments by name; `whole` are integers that 16 divides, as sizes of models are."""
    return (
        dict.fromkeys(pointers.split(), f"*{dtype}")
        | dict.fromkeys(whole.split(), "i32:16")
        | dict.fromkeys(plain.split(), "i32")
        | dict.fromkeys(floats.split(), "fp32")
    )


def dual(dtype: str) -> dict[str, str]:
    sizes = "N K K2 x_row a_row z_row b_row rows_like"
    return types("x a z b", dtype, sizes, "T", "alpha_a alpha_b") | {"lam": "*fp32"}


def dual_forward(dtype: str) -> dict[str, str]:
    return dual(dtype) | types("y", dtype, "y_row")


def dual_gradient(dtype: str) -> dict[str, str]:
    return dual(dtype) | types("dx dz grad", dtype, "dx_row dz_row grad_row") | {"partial": "*fp32"}


EXTRAS = {"perm": "*i64", "scale": "*fp32"}
BIAS = {"bias": "*bf16"}


def report(kernel, capability, arguments, tile, **meta):
    return compiled(kernel, capability, arguments, tile.blocks() | meta, tile.warps, tile.stages)


def check_product(r, capability: int, half: bool = True) -> None:
    assert r.stack == 0, r[:3]
    assert r.shared <= SHARED_LIMIT[capability], r[:3]
    assert "cp.async" in r.ptx
    if half:
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync.aligned.m16n8k16") in r.ptx


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_dual_product(capability):
    for tile in runtime.tiles(capability // 10):
        arguments = dual_forward("bf16") | EXTRAS | BIAS
        plain = {"ACTIVATION": "none", "PRECISION": "tf32"}
        check_product(report(dual_gemm.forward_kernel, capability, arguments, tile, **plain), capability)
        if tile.m * tile.n == SMALLER:
            arguments |= {"pre": "*bf16", "pre_row": "i32:16"}
            r = report(dual_gemm.forward_kernel, capability, arguments, tile, **plain | {"ACTIVATION": "gelu"})
            check_product(r, capability)


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_dual_gradient(capability):
    for tile in runtime.tiles(capability // 10):
        arguments = dual_gradient("bf16") | EXTRAS
        check_product(report(dual_gemm.gradient_kernel, capability, arguments, tile, PRECISION="tf32"), capability)


@pytest.mark.parametrize("capability, precision", [(80, "ieee"), (90, "tf32")])
def test_float32(capability, precision):
    (tile,) = runtime.tiles(capability // 10, itemsize=4)
    there, back = dual_forward("fp32") | EXTRAS, dual_gradient("fp32") | EXTRAS
    r = report(dual_gemm.forward_kernel, capability, there, tile, ACTIVATION="gelu", PRECISION=precision)
    check_product(r, capability, half=False)
    r = report(dual_gemm.gradient_kernel, capability, back, tile, PRECISION=precision)
    check_product(r, capability, half=False)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_transient(capability, transposed):
    """Strides of 1 are constants, as the just-in-time compiler makes them."""
    near, far = ("n", "k") if transposed else ("k", "n")
    ones = {f"{m}_{near}": 1 for m in "ab"}
    arguments = types("a b rotation", "bf16", f"N K D a_{far} b_{far} r_row rows_like", "", "alpha_a alpha_b") | EXTRAS
    forward = arguments | types("out", "bf16", f"out_{far}") | {"lam": "*fp32"}
    small = {k: v for k, v in arguments.items() if not k.startswith(("a", "r"))} | {"rows_like": "i32:16"}
    reduction = small | types("grad", "bf16", f"g_{far} out_row") | {"out": "*fp32"}
    scale = small | types("grad rotation", "bf16", f"g_{far} r_row") | {"partial": "*fp32"}
    del scale["scale"]
    for tile in runtime.tiles(capability // 10, largest=SMALLER)[:1]:
        meta = {"PRECISION": "tf32"}
        r = report(interpolate_weight.forward_kernel, capability, forward, tile, **meta, **ones, **{f"out_{near}": 1})
        check_product(r, capability)
        ones_of_gradient = {f"b_{near}": 1, f"g_{near}": 1} | meta
        for kernel, given in (
            (interpolate_weight.rotation_kernel, reduction),
            (interpolate_weight.scale_kernel, scale),
        ):
            check_product(report(kernel, capability, given, tile, **ones_of_gradient), capability)


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("width, half", [(64, 8), (128, 64), (256, 128), (96, 0)])
def test_head_maps(width, half, capability):
    size = head_maps.blocks(width, True)
    warps, stages = size.pop("num_warps"), size.pop("num_stages")
    rope = {"cos": "*fp32", "sin": "*fp32"} if half else {}
    arguments = types("ya yb maps", "bf16", "heads_per_map ya_row yb_row", "T length", "alpha_a alpha_b") | rope
    arguments |= {"lam": "*fp32"}
    meta = {"WIDTH": width, "HALF": half, "PRECISION": "tf32"} | size
    backward = types("dya dyb grad", "bf16", "dya_row dyb_row grad_row", "heads tiles_each")
    backward |= dict.fromkeys(("dmaps", "dbias", "slopes"), "*fp32")
    back = compiled(head_maps.gradient_kernel, capability, arguments | backward, meta, warps, stages)
    del meta["BLOCK_J"]
    there = compiled(
        head_maps.forward_kernel, capability, arguments | types("out bias", "bf16", "out_row"), meta, warps, stages
    )
    for r in (there, back):
        assert r.stack == 0 and r.shared <= SHARED_LIMIT[capability], r[:3]


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("capped", [False, True])
def test_softmax_loss(capped, capability):
    size = softmax_loss.block_of(50304)
    warps = size.pop("num_warps")
    common = types("logits", "bf16", "V row_stride", "", "scale cap") | {"losses": "*fp32", "log_sums": "*fp32"}
    entropy = common | {"target": "*i64", "first": "i32"}
    kl = common | types("one two", "bf16", "one_row two_row", "rows", "share_one share_two")
    meta = {"GIVEN": False, "CAPPED": capped} | size
    no_target = {name: kind for name, kind in entropy.items() if name != "target"}
    for kernel, arguments, more in (
        (softmax_loss.cross_entropy_kernel, entropy, {"WRITE": True}),
        (softmax_loss.cross_entropy_kernel, no_target, {"WRITE": False}),
        (softmax_loss.divergence_kernel, kl, {}),
    ):
        r = compiled(kernel, capability, arguments, meta | more, warps)
        assert r.stack == 0 and r.registers <= 128, r[:3]
        assert ".v4" in r.ptx
