"""The one form in which every data set reaches the trainer: arrays in host memory. No torch, no I/O."""

import functools
import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

IMAGE_SIZE = 32  # pixels, height and width

Bytes = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]


def caveat(dataset: str, official: object) -> str:
    """The caveat on a data set, printed beside every result on it.

    Args:
        dataset: "cifar10" or "synthetic".
        official: `ImageSet.official`, as recorded with the result; anything but a bool is no record.

    Returns:
        Words for the face of a table or figure; "" for the official CIFAR-10 files.
    """
    if dataset == "synthetic":
        return "synthetic data: not a result of the paper"
    if not isinstance(official, bool):
        return "which images were used was not recorded"
    return "" if official else "the data set is not the official CIFAR-10 files"


def short_digest(digest: str) -> str:
    """A digest for a person to compare: "sha256:" and sixteen digits."""
    return f"{digest[:23]}..."


@dataclass(frozen=True)
class ImageSet:
    """A labelled train/test pair of 32x32 RGB images.

    Images are uint8 `(num_images, 32, 32, 3)` (NHWC, RGB), labels uint8 `(num_images,)` in `0..len(class_names) - 1`.
    """

    train_images: Bytes
    train_labels: Bytes
    test_images: Bytes
    test_labels: Bytes
    class_names: tuple[str, ...]
    name: str  # "cifar10" or "synthetic"
    digest: str  # "sha256:<hex>" over all labels and pixels; equal digests mean equal data
    official: bool  # the digest is that of the published data set (synthetic: of its own definition)
    source: str  # where it was found, for people: a path, a URL, or "built in"

    @property
    def caveat(self) -> str:
        """The caveat printed beside results on these images; "" for the official CIFAR-10 files."""
        return caveat(self.name, self.official)

    def facts(self) -> dict[str, Any]:
        """Which images these are, JSON-ready: `name`, `digest`, `official`."""
        return {"name": self.name, "digest": self.digest, "official": self.official}

    def test_facts(self) -> dict[str, Any]:
        """The same of the test images alone: `name`, `test_digest`, `official`."""
        return {"name": self.name, "test_digest": self.test_digest, "official": self.official}

    @functools.cached_property
    def test_digest(self) -> str:
        """ "sha256:<hex>" over the test labels and pixels alone, wherever they came from."""
        digest = hashlib.sha256(np.ascontiguousarray(self.test_labels).data)
        digest.update(np.ascontiguousarray(self.test_images).data)
        return f"sha256:{digest.hexdigest()}"

    def validation_split(self, num: int) -> "ImageSet":
        """Evaluate on the last `num` training images, train on those before."""
        cut = len(self.train_images) - num
        return replace(
            self,
            train_images=self.train_images[:cut],
            train_labels=self.train_labels[:cut],
            test_images=self.train_images[cut:],
            test_labels=self.train_labels[cut:],
        )

    def mean_image(self) -> Float32Array:
        """The per-pixel mean over the training images (section 3.4), float32 `(32, 32, 3)`, in units of 0 to 255.

        Summed in integers, so it does not depend on the order of summation.
        """
        total = self.train_images.sum(axis=0, dtype=np.int64)
        mean: Float32Array = (total / len(self.train_images)).astype(np.float32)
        return mean
