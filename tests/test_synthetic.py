"""The built-in data set: the same bytes everywhere, and out of reach of a linear classifier.

That ResNet-20 passes 90 % on it is what the smoke preset is for, and tested where that is run.
"""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import config
from fastres.data import synthetic
from fastres.data.imageset import ImageSet
from fastres.data.synthetic import make_synthetic


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return make_synthetic()


def test_form(images: ImageSet) -> None:
    for pixels, labels, num in (
        (images.train_images, images.train_labels, 10_000),
        (images.test_images, images.test_labels, 2_000),
    ):
        assert pixels.shape == (num, 32, 32, 3)
        assert labels.shape == (num,)
        assert pixels.dtype == np.uint8
        assert labels.dtype == np.uint8
        assert np.bincount(labels).tolist() == [num // 10] * 10
    assert len(set(images.class_names)) == 10
    assert config.NUM_TRAIN["synthetic"] == len(images.train_images)


def test_the_bytes_are_pinned(images: ImageSet) -> None:
    """Another numpy or machine that gave other bytes would make results incomparable without a word."""
    content = (images.train_labels, images.train_images, images.test_labels, images.test_images)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in content)).hexdigest()
    assert images.digest == f"sha256:{digest}" == synthetic.DIGEST
    assert images.official


def test_seeds_and_sizes(images: ImageSet) -> None:
    """A smaller set is the beginning of a larger one, also across the chunks that it is made in."""
    small = make_synthetic(0, 523, 31)
    assert np.array_equal(small.train_images, images.train_images[:523])
    assert np.array_equal(small.test_images, images.test_images[:31])
    assert not small.official
    other = make_synthetic(1, 523, 31)
    assert not np.array_equal(other.train_images, small.train_images)
    assert other.digest != small.digest


def test_no_image_twice_nor_in_both_parts(images: ImageSet) -> None:
    both = np.concatenate([images.train_images, images.test_images])
    assert len({image.tobytes() for image in both}) == len(both)


def standardised(features: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Training and test features, less the training mean, in units of the training deviation."""
    mean, deviation = features[0].mean(dim=0), features[0].std(dim=0) + 1e-3
    return (features[0] - mean) / deviation, (features[1] - mean) / deviation


def regress(train: Tensor, labels: Tensor, l2: float) -> Tensor:
    """Multinomial logistic regression by L-BFGS: weights `(features + 1, 10)`, the last row the intercept."""
    ones = torch.ones(len(train), 1)
    inputs = torch.cat([train, ones], dim=1)
    weights = torch.zeros(inputs.shape[1], 10, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=30, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weights, labels) + l2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def linear_accuracy(images: ImageSet, train: np.ndarray, test: np.ndarray, penalties: tuple[float, ...]) -> float:
    """The test accuracy, the best over `penalties`: chosen on the test set, in the classifier's favour."""
    inputs = standardised((torch.from_numpy(train).float().flatten(1), torch.from_numpy(test).float().flatten(1)))
    labels, truth = (torch.from_numpy(a).long() for a in (images.train_labels, images.test_labels))
    accuracies = []
    for l2 in penalties:
        weights = regress(inputs[0], labels, l2)
        answers = (inputs[1] @ weights[:-1] + weights[-1]).argmax(dim=1)
        accuracies.append((answers == truth).float().mean().item())
    return max(accuracies)


def test_no_linear_classifier_on_pixels_passes_half(images: ImageSet) -> None:
    accuracy = linear_accuracy(images, images.train_images, images.test_images, (1e-2, 1e-1))
    assert accuracy < 0.5  # 14 % when this was written, chance is 10 %


def test_the_linear_classifier_is_a_good_one(images: ImageSet) -> None:
    """Where there is something linear to find, among all the rest, it finds it: a faint tint of a place by class."""

    def tinted(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
        hinted = pixels.astype(np.float32)
        for k in range(10):
            hinted[labels == k, 3 * k : 3 * k + 3, :, :] += 20
        return hinted

    train = tinted(images.train_images, images.train_labels)
    test = tinted(images.test_images, images.test_labels)
    assert linear_accuracy(images, train, test, (1e-2,)) > 0.9


def test_colours_alone_say_little(images: ImageSet) -> None:
    """Logistic regression on each channel's histogram, 16 bins."""

    def histograms(pixels: np.ndarray) -> np.ndarray:
        bins = pixels.reshape(len(pixels), -1, 3) // 16
        return np.concatenate([(bins == k).mean(axis=1) for k in range(16)], axis=1)

    accuracy = linear_accuracy(images, histograms(images.train_images), histograms(images.test_images), (1e-3, 1e-2))
    assert accuracy < 0.3  # 12 % when this was written
