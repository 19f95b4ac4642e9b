"""Which depths exist. No torch here, so that `config.py` can ask."""

import numbers

from fastres.errors import InputError

# Of the ImageNet networks: residual blocks at each of the four map sizes (He et al., CVPR 2016, Table 1)
IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def num_blocks(depth: int) -> int:
    """The n of a 6n+2-layer network: pairs of 3x3 layers at each of its three map sizes (section 4.2)."""
    check_depth(depth)
    return (depth - 2) // 6


def check_depth(depth: int, *, imagenet: bool = False) -> None:
    """Raise InputError, with the nearest valid depths, where a network has no such depth.

    Args:
        depth: Layers with weights: 6n+2 for some n of at least 1.
        imagenet: Of the ImageNet networks instead: one of Table 1's five.
    """
    if imagenet:
        if depth not in IMAGENET_BLOCKS:
            known = ", ".join(map(str, IMAGENET_BLOCKS))
            raise InputError(f"depth {depth} is none of the ImageNet networks'; they have {known} layers")
        return
    if not isinstance(depth, numbers.Integral):
        raise InputError(f"depth is {depth!r}; it must be an integer, 6n+2")
    if depth >= 8 and (depth - 2) % 6 == 0:
        return
    below = (depth - 2) // 6 * 6 + 2
    nearest = "nearest: 8" if depth < 8 else f"nearest: {below} and {below + 6}"
    other = f"; of the ImageNet networks: ImageNetResNet{depth}" if depth in IMAGENET_BLOCKS else ""
    raise InputError(f"depth {depth} is not 6n+2; {nearest}{other}")
