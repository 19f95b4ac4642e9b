"""Which depths exist. No torch here, so that `config.py` can ask."""

from fastres.errors import InputError


def num_blocks(depth: int) -> int:
    """The n of a 6n+2-layer network: pairs of 3x3 layers at each of its three map sizes (section 4.2)."""
    check_depth(depth)
    return (depth - 2) // 6


def check_depth(depth: int) -> None:
    """Raise InputError, with the nearest valid depths, unless `depth` is 6n+2 for some n of at least 1."""
    if depth >= 8 and (depth - 2) % 6 == 0:
        return
    below = (depth - 2) // 6 * 6 + 2
    nearest = "nearest: 8" if depth < 8 else f"nearest: {below} and {below + 6}"
    raise InputError(f"depth {depth} is not 6n+2; {nearest}")
