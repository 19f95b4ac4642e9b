"""imageset.py: the 45k/5k split, the mean image, the digest of the test images."""

from dataclasses import replace

import numpy as np
import pytest

from fastres.config import NUM_VALIDATION
from fastres.data.imageset import ImageSet


@pytest.fixture
def images() -> ImageSet:
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 256, (60, 32, 32, 3), np.uint8)
    labels = np.arange(60, dtype=np.uint8)
    return ImageSet(pixels[:50], labels[:50], pixels[50:], labels[50:], ("a",), "random", "sha256:0", True, "here")


def test_the_last_training_images_are_held_out(images: ImageSet) -> None:
    assert NUM_VALIDATION == 5_000  # section 4.2
    split = images.validation_split(5)
    assert split.train_labels.tolist() == list(range(45))
    assert split.test_labels.tolist() == list(range(45, 50))
    assert np.array_equal(split.train_images, images.train_images[:45])
    assert np.array_equal(split.test_images, images.train_images[45:])
    assert np.array_equal(split.mean_image(), replace(images, train_images=images.train_images[:45]).mean_image())


def test_the_mean_is_of_each_pixel_over_the_training_images_alone(images: ImageSet) -> None:
    mean = images.mean_image()
    assert mean.shape == (32, 32, 3)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, images.train_images.astype(np.float64).mean(axis=0), rtol=1e-7)
    shuffled = replace(images, train_images=images.train_images[::-1])
    assert np.array_equal(shuffled.mean_image(), mean)


def test_the_test_digest_is_of_test_labels_and_pixels_alone(images: ImageSet) -> None:
    digest = images.test_digest
    assert digest.startswith("sha256:")
    assert replace(images, train_images=images.train_images[:3], digest="sha256:1").test_digest == digest
    assert replace(images, test_labels=images.test_labels[::-1]).test_digest != digest
    assert replace(images, test_images=images.test_images[::-1]).test_digest != digest
