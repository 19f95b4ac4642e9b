"""The one definition of a pixel that the network sees; every loader executes it.

    inside ? (float32(u8[source]) - mean[source]) * SCALE : 0        cast once to the training precision

The paper's order (section 4.2): the per-pixel mean is subtracted, then zeros are padded; so what lies outside the image
is zero in the network's units, not black.
"""

import numpy as np

from fastres.data.imageset import Bytes, Float32Array

# A power of two, so the product is exact, and about one over the standard deviation of CIFAR-10's pixels (63 of 255).
# The first layer is followed by batch norm, so the constant reaches what is learned only through BN's eps.
SCALE = 2.0**-6


def pixels(images: Bytes, mean: Float32Array) -> Float32Array:
    """uint8 images `(num, 32, 32, 3)` and the float32 mean image `(32, 32, 3)`, both 0 to 255, as float32 pixels."""
    values: Float32Array = np.subtract(images, mean, dtype=np.float32)
    values *= np.float32(SCALE)
    return values
