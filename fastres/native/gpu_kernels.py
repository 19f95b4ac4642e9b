# ruff: noqa: N803
# mypy: ignore-errors
# Triton's own Python: constants in capitals, no types.
"""Triton kernels for training on a GPU: 3x3 convolutions with padding 1, and batch norm with what follows it.

Maps are channels last, so a map is a matrix `(pixels, channels)`; weights lie as [out][row][column][in]. A convolution
goes from a source of K channels to a target of N. A program takes `TILES` tiles of `BLOCK` pixels. Sums over pixels are
made in two steps: each program leaves its share, `(programs, 2, channels)` in float32, and each program of the next
kernel adds up all shares by itself, in one order: quicker than a kernel between the two, and the same bits every time.
"""

import triton
import triton.language as tl


@triton.jit
def pixels_of(tile, BLOCK: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The pixels of a tile: index in the batch, column, row, image."""
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    return pixel, pixel % WIDTH, pixel // WIDTH % HEIGHT, pixel // (WIDTH * HEIGHT)


@triton.jit
def leave(shares, first, second, N: tl.constexpr):
    """Store this program's share of two sums for each of N channels; `shares` is where it begins."""
    n = tl.arange(0, N)
    tl.store(shares + n, first)
    tl.store(shares + N + n, second)


@triton.jit
def convolved(
    source, weight, column, row, image,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The convolution at BLOCK pixels, or the gradient of its input (`TRANSPOSED`), (BLOCK, N).

    `HEIGHT` and `WIDTH` are those of the source's maps.
    """
    k, n = tl.arange(0, K), tl.arange(0, N)
    acc = tl.zeros([BLOCK, N], tl.float32)
    for tap in tl.range(9, num_stages=STAGES):
        if TRANSPOSED:
            r, c = row + 1 - tap // 3, column + 1 - tap % 3
            inside = (r >= 0) & (c >= 0) & (r % STRIDE == 0) & (c % STRIDE == 0)
            r, c = r // STRIDE, c // STRIDE
            at_weight = k[:, None] * (9 * N) + tap * N + n[None, :]
        else:
            r, c = row * STRIDE + tap // 3 - 1, column * STRIDE + tap % 3 - 1
            inside = (r >= 0) & (c >= 0)
            at_weight = n[None, :] * (9 * K) + tap * K + k[:, None]
        inside = inside & (r < HEIGHT) & (c < WIDTH)
        at = ((image * HEIGHT + r) * WIDTH + c) * K
        taken = tl.load(source + at[:, None] + k[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(taken, tl.load(weight + at_weight), acc)
    return acc


@triton.jit
def windows(source, column, row, image, k, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr):
    """What whole 3x3 windows see, zeros outside and after 9 K: (BLOCK, len(k))."""
    r = row[:, None] + (k // (3 * K))[None, :] - 1
    c = column[:, None] + (k // K % 3)[None, :] - 1
    inside = (r >= 0) & (r < HEIGHT) & (c >= 0) & (c < WIDTH) & (k < 9 * K)[None, :]
    at = ((image[:, None] * HEIGHT + r) * WIDTH + c) * K + (k % K)[None, :]
    return tl.load(source + at, mask=inside, other=0.0)


@triton.jit
def forward_at(
    source, weight, column, row, image,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A convolution at some pixels of the target's HEIGHT x WIDTH; one product where 9 K channels are at most 32."""
    if 9 * K <= 32:
        k, n = tl.arange(0, 32), tl.arange(0, N)
        w = tl.load(weight + n[None, :] * (9 * K) + k[:, None], mask=(k < 9 * K)[:, None], other=0.0)
        acc = tl.dot(windows(source, column, row, image, k, HEIGHT, WIDTH, K), w)
    else:
        acc = convolved(
            source, weight, column, row, image, HEIGHT * STRIDE, WIDTH * STRIDE, K, N, STRIDE, False, BLOCK, STAGES
        )
    return acc


@triton.jit
def conv3x3(
    source, weight, target, shares,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A convolution; shares of the mean of what is stored and of the sum of squared differences from the share's mean.

    `HEIGHT` and `WIDTH` are those of the target's maps.
    """
    program = tl.program_id(0)
    n = tl.arange(0, N)
    mean = tl.zeros([N], tl.float32)
    squares = tl.zeros([N], tl.float32)
    for tile in range(TILES):
        pixel, column, row, image = pixels_of(program * TILES + tile, BLOCK, HEIGHT, WIDTH)
        acc = forward_at(source, weight, column, row, image, HEIGHT, WIDTH, K, N, STRIDE, BLOCK, STAGES)
        stored = acc.to(target.dtype.element_ty)
        tl.store(target + pixel[:, None] * N + n[None, :], stored)
        stored = stored.to(tl.float32)
        new = tl.sum(stored, 0) / BLOCK
        off = stored - new[None, :]
        delta = new - mean  # the tiles so far and this one together: Chan, Golub and LeVeque 1979
        mean += delta / (tile + 1)
        squares += tl.sum(off * off, 0) + delta * delta * (BLOCK * tile / (tile + 1))
    leave(shares + program * 2 * N, mean, squares, N)


@triton.jit
def shortcut(
    maps, pixel, column, row, image, n,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """What is added at some pixels of maps of N channels: `maps`, or every second pixel and row of CHANNELS of them."""
    if CHANNELS == N:
        added = tl.load(maps + pixel[:, None] * N + n[None, :])
    else:
        at = ((image * HEIGHT * 2 + row * 2) * WIDTH * 2 + column * 2) * CHANNELS
        there = ((n >= PAD) & (n < PAD + CHANNELS))[None, :] & (pixel >= 0)[:, None]
        added = tl.load(maps + at[:, None] + (n - PAD)[None, :], mask=there, other=0.0)
    return added.to(tl.float32)


@triton.jit
def shortcut_grad(
    grad, out, pixel, column, row, image, k,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """The gradient of K channels of what went into a shortcut, `grad` being that of `out`, which has CHANNELS."""
    if CHANNELS == K:
        at = pixel[:, None] * K + k[None, :]
        there = (pixel >= 0)[:, None] & (k >= 0)[None, :]
    else:
        at = ((image * HEIGHT + row) // 2 * (WIDTH // 2) + column // 2)[:, None] * CHANNELS + (k + PAD)[None, :]
        there = ((row % 2 == 0) & (column % 2 == 0))[:, None] & (k >= 0)[None, :]
    positive = tl.load(out + at, mask=there, other=0.0).to(tl.float32) > 0
    return tl.where(positive, tl.load(grad + at, mask=there, other=0.0).to(tl.float32), 0.0)


@triton.jit
def weight_share(
    grad, source, shares, program, tap_row,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program's share of the gradient of one row of a convolution's weights.

    SPAN: 0: three products, K terms each; else one, the least power of 2 that is no less than 3 K, which is quicker
    where K is small.
    """
    n = tl.arange(0, N)
    at_share = shares + program * (9 * K * N) + n[None, :] * (9 * K) + tap_row * (3 * K)
    if SPAN:
        k = tl.arange(0, SPAN)
        acc = tl.zeros([SPAN, N], tl.float32)
        for tile in tl.range(TILES, num_stages=STAGES):
            pixel, column, row, image = pixels_of(program * TILES + tile, BLOCK, HEIGHT, WIDTH)
            r, c = row * STRIDE + tap_row - 1, column[:, None] * STRIDE - 1 + (k // K)[None, :]
            inside = ((r >= 0) & (r < HEIGHT * STRIDE))[:, None] & (c >= 0) & (c < WIDTH * STRIDE)
            at = ((image * HEIGHT * STRIDE + r) * WIDTH * STRIDE + column * STRIDE - 1) * K
            inside = inside & (k < 3 * K)[None, :]
            taken = tl.load(source + at[:, None] + k[None, :], mask=inside, other=0.0)
            acc = tl.dot(tl.trans(taken), tl.load(grad + pixel[:, None] * N + n[None, :]), acc)
        tl.store(at_share + k[:, None], acc, mask=(k < 3 * K)[:, None])
    else:
        k = tl.arange(0, K)
        left = tl.zeros([K, N], tl.float32)
        middle = tl.zeros([K, N], tl.float32)
        right = tl.zeros([K, N], tl.float32)
        for tile in tl.range(TILES, num_stages=STAGES):
            pixel, column, row, image = pixels_of(program * TILES + tile, BLOCK, HEIGHT, WIDTH)
            r, c = row * STRIDE + tap_row - 1, column * STRIDE
            inside = (r >= 0) & (r < HEIGHT * STRIDE)
            at = ((image * HEIGHT * STRIDE + r) * WIDTH * STRIDE + c) * K
            at = source + at[:, None] + k[None, :]
            own = tl.load(grad + pixel[:, None] * N + n[None, :])
            taken = tl.load(at - K, mask=(inside & (c >= 1))[:, None], other=0.0)
            left = tl.dot(tl.trans(taken), own, left)
            taken = tl.load(at, mask=inside[:, None], other=0.0)
            middle = tl.dot(tl.trans(taken), own, middle)
            taken = tl.load(at + K, mask=(inside & (c + 1 < WIDTH * STRIDE))[:, None], other=0.0)
            right = tl.dot(tl.trans(taken), own, right)
        tl.store(at_share + k[:, None], left)
        tl.store(at_share + K + k[:, None], middle)
        tl.store(at_share + 2 * K + k[:, None], right)


@triton.jit
def conv3x3_grads(
    grad, source, weight, grad_source, weight_shares, below, kept, norm_shares, over_grad, over_out,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr,
    OVER: tl.constexpr, PAD: tl.constexpr, PROGRAMS: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
    OWN_BLOCK: tl.constexpr, OWN_TILES: tl.constexpr, OWN_STAGES: tl.constexpr,
):  # fmt: skip
    """All that a convolution has to say backwards: the first 3 PROGRAMS for its weights, the others for its source.

    The source is what the layer below gave: ReLU(norm(below) + ...), with `kept` of its norm.

    Args:
        grad: Of the target, HEIGHT x WIDTH.
        grad_source: Becomes the source's gradient.
        weight_shares: Become shares of the weights' gradient, `(PROGRAMS, [weights])`.
        norm_shares: Become shares of the gradients of shift and scale of the norm below, in this order.
        over_grad, over_out: Gradient and value of what a shortcut went to that began at the source, OVER channels of
            them; OVER = 0: none did.
        OWN_...: Of the programs for the source.
    """
    program = tl.program_id(0)
    if program < 3 * PROGRAMS:
        weight_share(
            grad, source, weight_shares, program // 3, program % 3, HEIGHT, WIDTH, K, N, STRIDE, SPAN, BLOCK, TILES,
            STAGES,
        )  # fmt: skip
    else:
        program -= 3 * PROGRAMS
        k = tl.arange(0, K)
        mean, rstd = tl.load(kept + k)[None, :], tl.load(kept + K + k)[None, :]
        sums = tl.zeros([OWN_BLOCK, K], tl.float32)
        products = tl.zeros([OWN_BLOCK, K], tl.float32)
        for tile in range(OWN_TILES):
            pixel, column, row, image = pixels_of(
                program * OWN_TILES + tile, OWN_BLOCK, HEIGHT * STRIDE, WIDTH * STRIDE
            )
            acc = convolved(grad, weight, column, row, image, HEIGHT, WIDTH, N, K, STRIDE, True, OWN_BLOCK, OWN_STAGES)
            if OVER:
                acc += shortcut_grad(
                    over_grad, over_out, pixel, column, row, image, k, HEIGHT * STRIDE, WIDTH * STRIDE, K, OVER, PAD
                )
            at = pixel[:, None] * K + k[None, :]
            stored = acc.to(grad_source.dtype.element_ty)
            tl.store(grad_source + at, stored)
            positive = tl.load(source + at).to(tl.float32) > 0
            own = tl.where(positive, stored.to(tl.float32), 0.0)
            sums += own
            products += own * ((tl.load(below + at).to(tl.float32) - mean) * rstd)
        leave(norm_shares + program * 2 * K, tl.sum(sums, 0), tl.sum(products, 0), K)


@triton.jit
def first_weight_grad(
    grad, source, shares,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Shares of the gradient of the weights of a convolution of stride 1, where 9 K channels are at most 32."""
    program = tl.program_id(0)
    k, n = tl.arange(0, 32), tl.arange(0, N)
    acc = tl.zeros([32, N], tl.float32)
    for tile in tl.range(TILES, num_stages=STAGES):
        pixel, column, row, image = pixels_of(program * TILES + tile, BLOCK, HEIGHT, WIDTH)
        taken = windows(source, column, row, image, k, HEIGHT, WIDTH, K)
        acc = tl.dot(tl.trans(taken), tl.load(grad + pixel[:, None] * N + n[None, :]), acc)
    at = program * (9 * K * N) + n[None, :] * (9 * K) + k[:, None]
    tl.store(shares + at, acc, mask=(k < 9 * K)[:, None])


@triton.jit
def add_up(shares, result, table, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum shares of many layers. A program's row of the table: place of its first share, shares, their size, results.

    A program makes BLOCK results in a row, those that lie within its layer.
    """
    table += tl.program_id(0) * 5
    start, num_shares, size, first, place = (
        tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3), tl.load(table + 4),
    )  # fmt: skip
    at = first + tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    share = 0
    while share < num_shares:  # no range: Triton 3.6's interpreter cannot take a number that was loaded
        rows = share + tl.arange(0, ROWS)
        there = (rows < num_shares)[:, None] & (at < size)[None, :]
        acc += tl.load(shares + start + rows[:, None] * size + at[None, :], mask=there, other=0.0)
        share += ROWS
    tl.store(result + place + at, tl.sum(acc, 0), mask=at < size)
