"""Queries, keys or values of an interpolated pair: α y_a + β (y_b, mapped by head) + bias, then RoPE, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .runtime import INTERPRETED, factors, jit, mix, on, precision, rows_of, stride, tl, triton, usable, vector
from .tiles import factor_pair

Mix = Tensor | tuple[float, float]  # lambda (0-d) for (α, β) = (1 - λ, λ), or (α, β)
Rope = tuple[Tensor, Tensor]  # cos, sin (positions, rotary / 2)

PROGRAMS = 264  # that share the tokens in backward: two for each multiprocessor of an H100


@jit
def _turn(cos, sin, place, t_ok, c, HALF: tl.constexpr):
    """cos and ± sin of RoPE for channels c (1 and 0 behind the rotary ones): y = x cos + partner(x) sin."""
    i = tl.where(c < HALF, c, c - HALF)
    at = place.to(tl.int64)[:, None] * HALF + i[None, :]
    ok = t_ok[:, None] & (c < 2 * HALF)[None, :]
    turn = tl.load(sin + at, mask=ok, other=0.0).to(tl.float32)
    return tl.load(cos + at, mask=ok, other=1.0).to(tl.float32), tl.where((c < HALF)[None, :], -turn, turn)


@jit
def forward_kernel(
    out, ya, yb, maps, bias, cos, sin, lam, alpha_a, alpha_b, T, length, heads_per_map, out_row, ya_row, yb_row,
    WIDTH: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_E)
    t_ok = t < T
    c_ok = c < WIDTH
    ok = t_ok[:, None] & c_ok[None, :]
    t64 = t.to(tl.int64)[:, None]
    first = head * WIDTH
    alpha_a, alpha_b = factor_pair(lam, alpha_a, alpha_b)
    value = alpha_a * tl.load(ya + t64 * ya_row + first + c[None, :], mask=ok, other=0.0).to(tl.float32)
    b_tile = tl.load(yb + t64 * yb_row + first + c[None, :], mask=ok, other=0.0)
    base = (head // heads_per_map).to(tl.int64) * WIDTH * WIDTH
    square = c_ok[:, None] & c_ok[None, :]
    if maps is not None:
        m = tl.load(maps + base + c[:, None] + c[None, :] * WIDTH, mask=square, other=0.0)
        value += alpha_b * tl.dot(b_tile, m, input_precision=PRECISION)
    else:
        value += alpha_b * b_tile.to(tl.float32)
    if bias is not None:
        value += tl.load(bias + first + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    if HALF > 0:
        p = tl.where(c < HALF, c + HALF, tl.where(c < 2 * HALF, c - HALF, c))  # the other channel of the pair
        other = alpha_a * tl.load(ya + t64 * ya_row + first + p[None, :], mask=ok, other=0.0).to(tl.float32)
        if maps is not None:
            m = tl.load(maps + base + c[:, None] + p[None, :] * WIDTH, mask=square, other=0.0)
            other += alpha_b * tl.dot(b_tile, m, input_precision=PRECISION)
        else:
            other += alpha_b * tl.load(yb + t64 * yb_row + first + p[None, :], mask=ok, other=0.0).to(tl.float32)
        if bias is not None:
            other += tl.load(bias + first + p, mask=c_ok, other=0.0).to(tl.float32)[None, :]
        cosine, sine = _turn(cos, sin, t % length, t_ok, c, HALF)
        value = value * cosine + other * sine
    tl.store(out + t64 * out_row + first + c[None, :], value.to(out.dtype.element_ty), mask=ok)


@jit
def gradient_kernel(
    dya, dyb, dmaps, dbias, slopes, grad, ya, yb, maps, cos, sin, lam, alpha_a, alpha_b, T, heads, length,
    heads_per_map, tiles_each, dya_row, dyb_row, grad_row, ya_row, yb_row,
    WIDTH: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """A run of tokens of one head, and BLOCK_J of the map's columns: partial sums for dmaps, dbias and slopes."""
    run, head, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = tl.arange(0, BLOCK_E)
    j = piece * BLOCK_J + tl.arange(0, BLOCK_J)
    c_ok = c < WIDTH
    j_ok = j < WIDTH
    first = head * WIDTH
    alpha_a, alpha_b = factor_pair(lam, alpha_a, alpha_b)
    base = (head // heads_per_map).to(tl.int64) * WIDTH * WIDTH
    map_ok = c_ok[:, None] & j_ok[None, :]
    map_at = c[:, None] * WIDTH + j[None, :]
    of_map = tl.zeros((BLOCK_E, BLOCK_J), dtype=tl.float32)
    of_bias = tl.zeros((BLOCK_E,), dtype=tl.float32)
    slope = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for tile in range(run * tiles_each, (run + 1) * tiles_each):
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        t_ok = t < T
        t64 = t.to(tl.int64)[:, None]
        ok = t_ok[:, None] & c_ok[None, :]
        j_both = t_ok[:, None] & j_ok[None, :]
        g = tl.load(grad + t64 * grad_row + first + c[None, :], mask=ok, other=0.0).to(tl.float32)
        if HALF > 0:
            p = tl.where(c < HALF, c + HALF, tl.where(c < 2 * HALF, c - HALF, c))
            partner = tl.load(grad + t64 * grad_row + first + p[None, :], mask=ok, other=0.0).to(tl.float32)
            cosine, sine = _turn(cos, sin, t % length, t_ok, c, HALF)
            g = g * cosine - partner * sine
        b_tile = tl.load(yb + t64 * yb_row + first + j[None, :], mask=j_both, other=0.0)
        if maps is not None:
            rounded = g.to(yb.dtype.element_ty)
            m = tl.load(maps + base + map_at, mask=map_ok, other=0.0)
            back = tl.dot(rounded, m, input_precision=PRECISION)
            if dmaps is not None:
                of_map = tl.dot(tl.trans(rounded), b_tile, of_map, input_precision=PRECISION)
        else:
            back = g  # then BLOCK_J = BLOCK_E
        tl.store(dyb + t64 * dyb_row + first + j[None, :], (alpha_b * back).to(dyb.dtype.element_ty), mask=j_both)
        if slopes is not None:
            slope += tl.sum(back * b_tile.to(tl.float32), 1)
        if piece == 0:
            tl.store(dya + t64 * dya_row + first + c[None, :], (alpha_a * g).to(dya.dtype.element_ty), mask=ok)
            if slopes is not None:
                a_tile = tl.load(ya + t64 * ya_row + first + c[None, :], mask=ok, other=0.0).to(tl.float32)
                slope -= tl.sum(g * a_tile, 1)
            of_bias += tl.sum(g, 0)
    part = run.to(tl.int64) * heads + head
    if dmaps is not None:
        tl.store(dmaps + part * WIDTH * WIDTH + map_at, alpha_b * of_map, mask=map_ok)
    if slopes is not None:
        tl.store(slopes + part * tl.num_programs(2) + piece, tl.sum(slope))
    if dbias is not None:
        tl.store(dbias + part * WIDTH + c, of_bias, mask=c_ok & (piece == 0))


def blocks(width: int, mapped: bool) -> dict[str, int]:
    """Sizes for heads of `width` channels."""
    block = max(triton.next_power_of_2(width), 16)
    if INTERPRETED:
        return {"BLOCK_T": 16, "BLOCK_E": block, "BLOCK_J": 16 if mapped else block, "num_warps": 4, "num_stages": 1}
    rows, piece, warps = (32, 64, 4) if block <= 64 else (32, 64, 8) if block <= 128 else (16, 32, 8)
    piece = min(piece, block) if mapped else block
    return {"BLOCK_T": rows, "BLOCK_E": block, "BLOCK_J": piece, "num_warps": warps, "num_stages": 2}


def fits(width: int, tensor: Tensor) -> bool:
    """Whether shared memory holds a map: rows of 256 bytes everywhere, of 512 on the data-centre GPUs."""
    row = width * tensor.element_size()
    if row <= 256 or INTERPRETED:
        return True
    return row <= 512 and torch.cuda.get_device_capability(tensor.device) in ((8, 0), (9, 0), (10, 0), (10, 3))


def _sizes(heads: int, width: int, rope: Rope | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """cos, sin, positions and rotary / 2."""
    if rope is None:
        return None, None, 1, 0
    cos, sin = (t.contiguous() for t in rope)
    return cos, sin, *cos.shape


def forward(
    ya: Tensor, yb: Tensor, lam: Mix, maps: Tensor | None, bias: Tensor | None, rope: Rope | None, heads: int
) -> Tensor:
    """Launch; arguments as in `head_maps`."""
    ya, yb = rows_of(ya), rows_of(yb)
    out = torch.empty(ya.shape, dtype=ya.dtype, device=ya.device)
    width = ya.shape[1] // heads
    cos, sin, length, half = _sizes(heads, width, rope)
    share, alpha_a, alpha_b = mix(lam, ya.device)
    size = blocks(width, maps is not None)
    del size["BLOCK_J"]
    if out.numel():
        with on(ya):
            forward_kernel[(triton.cdiv(len(ya), size["BLOCK_T"]), heads)](
                out, ya, yb, None if maps is None else maps.detach().contiguous(), vector(bias), cos, sin, share,
                alpha_a, alpha_b, len(ya), length, 1 if maps is None else heads // len(maps), stride(out), stride(ya),
                stride(yb), width, half, precision(ya.dtype), **size,
            )  # fmt: skip
    return out


def gradients(
    grad: Tensor, ya: Tensor, yb: Tensor, lam: Mix, maps: Tensor | None, rope: Rope | None, heads: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Launch: gradients to ya, yb (T, H e), and in float32, where `wanted`, to the maps, the bias and λ."""
    grad, ya, yb = rows_of(grad), rows_of(ya), rows_of(yb)
    dya, dyb = (torch.empty(ya.shape, dtype=ya.dtype, device=ya.device) for _ in range(2))
    width = ya.shape[1] // heads
    cos, sin, length, half = _sizes(heads, width, rope)
    share, alpha_a, alpha_b = mix(lam, ya.device)
    size = blocks(width, maps is not None)
    pieces, count = triton.cdiv(width, size["BLOCK_J"]), triton.cdiv(len(ya), size["BLOCK_T"])
    tiles_each = triton.cdiv(count, max(1, PROGRAMS // (heads * pieces)))
    runs = triton.cdiv(count, max(tiles_each, 1))

    def parts(want: bool, *shape: int) -> Tensor | None:
        return torch.empty(runs, heads, *shape, dtype=torch.float32, device=ya.device) if want else None

    dmaps, dbias, slopes = parts(wanted[0], width, width), parts(wanted[1], width), parts(wanted[2], pieces)
    if dya.numel():
        with on(ya):
            gradient_kernel[(runs, heads, pieces)](
                dya, dyb, dmaps, dbias, slopes, grad, ya, yb, None if maps is None else maps.detach().contiguous(),
                cos, sin, share, alpha_a, alpha_b, len(ya), heads, length,
                1 if maps is None else heads // len(maps), tiles_each, stride(dya), stride(dyb), stride(grad),
                stride(ya), stride(yb), width, half, precision(ya.dtype), **size,
            )  # fmt: skip
    if dmaps is not None and maps is not None:
        dmaps = dmaps.unflatten(1, (len(maps), -1)).sum((0, 2))
    return dya, dyb, dmaps, None if dbias is None else dbias.sum(0).flatten(), None if slopes is None else slopes.sum()


class _HeadMaps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ya: Tensor, yb: Tensor, lam: Mix, maps: Tensor | None, bias: Tensor | None, cos: Tensor | None,
        sin: Tensor | None, heads: int,
    ) -> Tensor:  # fmt: skip
        rope = None if cos is None or sin is None else (cos, sin)
        rounded = None if maps is None else maps.to(ya.dtype)
        ctx.plain, share = (lam, None) if isinstance(lam, tuple) else (None, lam)
        ctx.heads = heads
        ctx.dtypes = [None if t is None else t.dtype for t in (maps, bias)]
        of_lam, of_maps = ctx.needs_input_grad[2:4]
        kept = ya if of_lam else None, yb if of_lam or of_maps else None  # activations, of the output's size each
        ctx.save_for_backward(*kept, share, rounded, cos, sin)
        return forward(ya, yb, lam, rounded, bias, rope, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ya, yb, share, maps, cos, sin = ctx.saved_tensors
        lam = share if ctx.plain is None else ctx.plain
        of_lam, of_maps, of_bias = ctx.needs_input_grad[2:5]
        rope = None if cos is None else (cos, sin)
        wanted = of_maps, of_bias, of_lam
        grad = rows_of(grads[0])
        ya, yb = (grad if t is None else t for t in (ya, yb))  # then only their shapes and types count
        dya, dyb, dmaps, dbias, dlam = gradients(grad, ya, yb, lam, maps, rope, ctx.heads, wanted)
        dmaps = None if dmaps is None else dmaps.to(ctx.dtypes[0])
        dbias = None if dbias is None else dbias.to(ctx.dtypes[1])
        dlam = None if dlam is None else dlam.to(share.dtype).view_as(share)
        return dya, dyb, dlam, dmaps, dbias, None, None, None


def reference(
    ya: Tensor, yb: Tensor, lam: Mix, maps: Tensor | None = None, bias: Tensor | None = None,
    rope: Rope | None = None, heads: int = 1,
) -> Tensor:  # fmt: skip
    """The same in plain torch operations, differentiable."""
    alpha_a, alpha_b = factors(lam)
    if maps is not None:
        grouped = yb.reshape(len(yb), len(maps), heads // len(maps), maps.shape[1])
        yb = torch.einsum("tghj,gij->tghi", grouped, maps.to(yb.dtype)).reshape(yb.shape)
    y = alpha_a * ya + alpha_b * yb
    y = y if bias is None else y + bias.to(y.dtype)
    if rope is not None:
        cos, sin = (t.to(y.dtype).repeat(len(y) // len(t), 1)[:, None] for t in rope)
        half = cos.shape[-1]
        y = y.unflatten(-1, (heads, y.shape[1] // heads))
        first, second, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
        y = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).flatten(1)
    return y.to(ya.dtype)


def head_maps(
    ya: Tensor,  # (T, H e)
    yb: Tensor,  # (T, H e)
    lam: Mix,
    maps: Tensor | None = None,  # (G, e, e), G divides H
    bias: Tensor | None = None,  # (H e,)
    rope: Rope | None = None,  # cos, sin (positions, rotary / 2)
    heads: int = 1,  # H
) -> Tensor:
    """RoPE(α ya + β (maps[h // (H / G)] @ each head of yb) + bias), (T, H e) in ya's dtype.

    α, β = 1 - λ, λ, or the pair in `lam`. Row t is position t modulo `positions`, which divides T; RoPE turns the pairs
    (i, i + rotary / 2) of each head's first channels. Differentiable in ya, yb, lam, maps and bias, once. ya and yb are
    float16, bfloat16 or float32; the maps may be wider and are rounded once. Where `usable` says no, and for
    maps that do not fit shared memory, `reference` runs. Raises ValueError for shapes.
    """
    if ya.dim() != 2 or ya.shape != yb.shape or ya.shape[1] % heads:
        raise ValueError(f"ya and yb are both (T, {heads} e), not {tuple(ya.shape)} and {tuple(yb.shape)}")
    width = ya.shape[1] // heads
    if maps is not None and (maps.shape[1:] != (width, width) or heads % len(maps)):
        raise ValueError(
            f"maps are (groups, {width}, {width}) with groups a divisor of {heads}, not {tuple(maps.shape)}"
        )
    if bias is not None and bias.shape != ya.shape[1:]:
        raise ValueError(f"the bias has one entry for each of the {ya.shape[1]} channels, not {tuple(bias.shape)}")
    if rope is not None and (len(ya) % len(rope[0]) or 2 * rope[0].shape[1] > width or rope[0].shape != rope[1].shape):
        raise ValueError(f"cos and sin are (a divisor of {len(ya)}, at most {width // 2}) both")
    if not usable(ya, yb, maps, bias) or (maps is not None and not fits(width, ya)):
        return reference(ya, yb, lam, maps, bias, rope, heads)
    return _HeadMaps.apply(ya, yb, lam, maps, bias, *(rope or (None, None)), heads)
