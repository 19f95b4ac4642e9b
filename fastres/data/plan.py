"""Which image, crop and flip stand at every position of the endless stream of samples: a function of the seed alone.

Numbers come from numpy's Philox bit generator, whose raw words are a fixed function of key and counter (numpy promises
never to change them; it does not promise that of `Generator`'s methods, which are therefore not used). The key is
(seed, purpose), the counter starts at (epoch), so any epoch is reached at once, whatever came before it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PAD = 4  # pixels of zeros on each side, from which a 32x32 crop is taken (section 4.2)
NUM_OFFSETS = 2 * PAD + 1

ORDER, CROP = 0, 1  # purposes: second half of the key

Ints = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Samples:
    """A stretch of the stream; arrays of one length. The 32x32 crop is taken first, then mirrored."""

    index: Ints  # of the image, 0 to num_images - 1
    dy: Ints  # 0 to 8: first row of the crop in the padded 40x40 image; 4 is centred
    dx: Ints  # 0 to 8: its first column
    flip: npt.NDArray[np.bool_]  # whether the crop is mirrored left to right

    def __len__(self) -> int:
        return len(self.index)


class EpochPlan:
    """The stream of samples of one seed: every image once an epoch, in a new order, crop and flip each time.

    Args:
        seed: 0 to 2**63 - 1.
        num_images: In an epoch.
        augment: False gives the centred crop without a flip; the order stays random.
    """

    def __init__(self, seed: int, num_images: int, *, augment: bool = True) -> None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; it must be between 0 and 2**63 - 1")
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; it must be at least 1")
        self.seed, self.num_images, self.augment = seed, num_images, augment
        self._epochs: dict[int, Samples] = {}  # the two last used: batches straddle an epoch's edge, DALI works ahead

    def at(self, start: int, count: int) -> Samples:
        """The samples at positions `start` to `start + count - 1` of the stream, counted from 0."""
        if start < 0 or count < 0:
            raise ValueError(f"positions {start} to {start + count} are not in the stream, which starts at 0")
        pieces = []
        while True:
            epoch, offset = divmod(start, self.num_images)
            taken = min(count, self.num_images - offset)
            whole, part = self.epoch(epoch), slice(offset, offset + taken)
            pieces.append(Samples(whole.index[part], whole.dy[part], whole.dx[part], whole.flip[part]))
            start, count = start + taken, count - taken
            if count == 0:
                break
        if len(pieces) == 1:
            return pieces[0]
        return Samples(
            *(np.concatenate([getattr(p, field) for p in pieces]) for field in ("index", "dy", "dx", "flip"))
        )

    def epoch(self, epoch: int) -> Samples:
        """All samples of a 0-based epoch, in order."""
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._make(epoch)
        return self._epochs[epoch]

    def _make(self, epoch: int) -> Samples:
        # Sorting random keys is a uniform permutation; ties (1 in 10**10 epochs of 50k) are broken by index.
        index = np.argsort(self._words(ORDER, epoch), kind="stable").astype(np.int32)
        if not self.augment:
            centred = np.full(self.num_images, PAD, np.int32)
            return Samples(index, centred, centred, np.zeros(self.num_images, np.bool_))
        words = self._words(CROP, epoch)
        return Samples(
            index, _offset(words >> np.uint64(40)), _offset(words >> np.uint64(16)), (words & np.uint64(1)) == 1
        )

    def _words(self, purpose: int, epoch: int) -> Words:
        """One random 64-bit word for each position of an epoch."""
        # numpy takes key and counter as arrays of 64-bit words, lowest first; the counter's low words count the draws.
        key, counter = np.array([self.seed, purpose], np.uint64), np.array([0, 0, epoch, 0], np.uint64)
        words: Words = np.random.Philox(key=key, counter=counter).random_raw(self.num_images)
        return words


def _offset(words: Words) -> Ints:
    """The low 24 bits of each word as a crop offset, 0 to 8; no offset is likelier than another by over 1 in 10**6."""
    low = words & np.uint64(0xFFFFFF)
    return ((low * np.uint64(NUM_OFFSETS)) >> np.uint64(24)).astype(np.int32)
