"""The same batch at every step."""

from torch import Tensor


class FrozenLoader:
    """A loader without work: what a step costs without one, and what a network makes of one batch.

    Args:
        images, labels: As `step.Loader.load` gives them.
    """

    name, prefetched, period = "none", 0, 1

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._batch = images, labels

    def prepare(self, step: int) -> None:
        """Nothing to do ahead."""

    def load(self, counter: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """The batch, whatever `counter` says."""
        return self._batch

    def close(self) -> None:
        """Nothing to release."""
