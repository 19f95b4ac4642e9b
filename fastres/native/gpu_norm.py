# ruff: noqa: N803
# mypy: ignore-errors
# Triton's own Python: constants in capitals, no types.
"""Triton kernels for training on a GPU: batch norm, what is added, and ReLU. Words as in `gpu_kernels.py`.

ReLU lets NaN through, as torch's does and `tl.maximum` does not: else a run that diverges would not be seen to.
"""

import triton
import triton.language as tl

from fastres.native.gpu_kernels import forward_at, leave, pixels_of, shortcut


@triton.jit
def norm_forward(
    maps, shares, add, scale, shift, running_mean, running_var, out, kept, eps, momentum,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, ADD: tl.constexpr, PAD: tl.constexpr,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """ReLU(norm(maps) + shortcut); the running statistics move.

    Args:
        shares: `conv3x3`'s, of PROGRAMS programs that had COUNT pixels each. ROWS: a power of 2 that is no less.
        add: What the shortcut begins with, of ADD channels, which are less than N where the map shrinks; 0: none.
        kept: Becomes mean, one over the standard deviation, and that times scale.
    """
    program = tl.program_id(0)
    n = tl.arange(0, N)
    there = (tl.arange(0, ROWS) < PROGRAMS)[:, None]
    shares += tl.arange(0, ROWS)[:, None] * (2 * N) + n[None, :]
    means = tl.load(shares, mask=there, other=0.0)
    squares = tl.sum(tl.load(shares + N, mask=there, other=0.0), 0)
    mean = tl.sum(means, 0) / PROGRAMS
    off = tl.where(there, means - mean[None, :], 0.0)
    total: tl.constexpr = PROGRAMS * COUNT
    var = (squares + COUNT * tl.sum(off * off, 0)) / total
    rstd = 1 / tl.sqrt_rn(var + eps)
    factor = rstd * tl.load(scale + n)
    offset = tl.load(shift + n)
    if program == 0:
        tl.store(kept + n, mean)
        tl.store(kept + N + n, rstd)
        tl.store(kept + 2 * N + n, factor)
        was = tl.load(running_mean + n)
        tl.store(running_mean + n, was + momentum * (mean - was))
        was = tl.load(running_var + n)
        tl.store(running_var + n, was + momentum * (var * (total / (total - 1)) - was))
    for tile in range(TILES):
        pixel, column, row, image = pixels_of(program * TILES + tile, BLOCK, HEIGHT, WIDTH)
        at = pixel[:, None] * N + n[None, :]
        value = (tl.load(maps + at).to(tl.float32) - mean[None, :]) * factor[None, :] + offset[None, :]
        if ADD:
            value += shortcut(add, pixel, column, row, image, n, HEIGHT, WIDTH, N, ADD, PAD)
        tl.store(out + at, tl.where(value < 0, 0.0, value).to(out.dtype.element_ty))


@triton.jit
def norm_sums(
    grad, maps, out, kept, shares,
    N: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Shares of the gradients of shift and scale, in this order; `grad` is that of `out`."""
    program = tl.program_id(0)
    n = tl.arange(0, N)
    mean, rstd = tl.load(kept + n)[None, :], tl.load(kept + N + n)[None, :]
    sums = tl.zeros([BLOCK, N], tl.float32)
    products = tl.zeros([BLOCK, N], tl.float32)
    for tile in range(TILES):
        at = ((program * TILES + tile) * BLOCK + tl.arange(0, BLOCK))[:, None] * N + n[None, :]
        positive = tl.load(out + at).to(tl.float32) > 0
        own = tl.where(positive, tl.load(grad + at).to(tl.float32), 0.0)
        sums += own
        products += own * ((tl.load(maps + at).to(tl.float32) - mean) * rstd)
    leave(shares + program * 2 * N, tl.sum(sums, 0), tl.sum(products, 0), N)


@triton.jit
def norm_backward(
    grad, maps, out, kept, shares, grad_maps, grad_scale, grad_shift,
    N: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradients of maps, scale and shift, by shares of PROGRAMS programs. COUNT: pixels in all."""
    program = tl.program_id(0)
    n = tl.arange(0, N)
    there = (tl.arange(0, ROWS) < PROGRAMS)[:, None]
    shares += tl.arange(0, ROWS)[:, None] * (2 * N) + n[None, :]
    sums = tl.sum(tl.load(shares, mask=there, other=0.0), 0)
    products = tl.sum(tl.load(shares + N, mask=there, other=0.0), 0)
    if program == 0:
        tl.store(grad_shift + n, sums)
        tl.store(grad_scale + n, products)
    sums, products = (sums / COUNT)[None, :], (products / COUNT)[None, :]
    mean, rstd = tl.load(kept + n)[None, :], tl.load(kept + N + n)[None, :]
    factor = tl.load(kept + 2 * N + n)[None, :]
    for tile in range(TILES):
        at = ((program * TILES + tile) * BLOCK + tl.arange(0, BLOCK))[:, None] * N + n[None, :]
        positive = tl.load(out + at).to(tl.float32) > 0
        own = tl.where(positive, tl.load(grad + at).to(tl.float32), 0.0)
        value = factor * (own - sums - (tl.load(maps + at).to(tl.float32) - mean) * rstd * products)
        tl.store(grad_maps + at, value.to(grad_maps.dtype.element_ty))


@triton.jit
def inference(
    source, weight, add, scale, shift, running_mean, running_var, out, eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr,
    ADD: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ReLU(norm(conv(source)) + shortcut) with the running statistics; `add` and `ADD` as in `norm_forward`."""
    n = tl.arange(0, N)
    factor = tl.load(scale + n) / tl.sqrt_rn(tl.load(running_var + n) + eps)
    offset = tl.load(shift + n) - tl.load(running_mean + n) * factor
    for tile in range(TILES):
        pixel, column, row, image = pixels_of(tl.program_id(0) * TILES + tile, BLOCK, HEIGHT, WIDTH)
        value = forward_at(source, weight, column, row, image, HEIGHT, WIDTH, K, N, STRIDE, BLOCK, STAGES)
        value = value * factor[None, :] + offset[None, :]
        if ADD:
            value += shortcut(add, pixel, column, row, image, n, HEIGHT, WIDTH, N, ADD, PAD)
        tl.store(out + pixel[:, None] * N + n[None, :], tl.where(value < 0, 0.0, value).to(out.dtype.element_ty))
