"""Which runs are of one network, and the caveats that a table or figure of them prints."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from fastres.config import RunConfig
from fastres.data.imageset import caveat, short_digest
from fastres.errors import InputError
from fastres.plots.runs import once_each
from fastres.reproduce import paper
from fastres.rundir import RunDir

NAMES = {"resnet": "ResNet", "plain": "plain", "imagenet": "ImageNet-style ResNet"}


@dataclass(frozen=True)
class Network:
    """The runs of one network: one config, several seeds, the same images."""

    name: str  # as in the paper: plain-20, ResNet-110
    config: RunConfig  # of the first run
    runs: tuple[tuple[int, RunDir], ...]  # (seed, run), by seed
    digest: str | None  # of the images; None where no run recorded it
    caveat: str  # on the images; "" for the official CIFAR-10 files

    @property
    def images(self) -> str:
        """One word on its images for a table's column: official, synthetic, or other."""
        return "official" if not self.caveat else "synthetic" if self.config.data.dataset == "synthetic" else "other"

    def label(self, reached: int, num_drawn: int) -> str:
        """Its name in a legend: how many seeds, and what became of those without a result.

        Args:
            reached: The last step that is drawn.
            num_drawn: Runs of it that are in the curve.
        """
        found = [run.status for _, run in self.runs]
        lost, cut = found.count("diverged"), found.count("cut")
        if len(self.runs) == 1:
            notes = [f"diverged after {reached:,}"] * lost + [f"unfinished, at {reached:,}"] * cut
        else:
            some = ((lost, "diverged"), (cut, "unfinished"))
            of = f" of {len(self.runs)}" if num_drawn < len(self.runs) else ""
            notes = [f"n = {num_drawn}{of}", *(f"{count} {what}" for count, what in some if count)]
        return f"{self.name} ({', '.join(notes)})" if notes else self.name


def paper_name(arch: str, depth: int) -> str:
    """ "plain-20", "ResNet-110", "ImageNet-style ResNet-18"."""
    return f"{NAMES[arch]}-{depth}"


def by_network(runs: Iterable[RunDir]) -> list[Network]:
    """The runs of each network, plain nets first, by depth.

    Raises:
        InputError: Runs of one network differ in more than the seed, have other images, or two have the same seed.
    """
    read = [(run.config(), run) for run in runs]
    read.sort(key=lambda pair: (pair[0].model.arch, pair[0].model.depth, pair[0].seed, str(pair[1].path)))
    return [
        _network(name, list(members))
        for name, members in groupby(read, key=lambda pair: paper_name(pair[0].model.arch, pair[0].model.depth))
    ]


def _network(name: str, members: Sequence[tuple[RunConfig, RunDir]]) -> Network:
    (first, first_run), *others = members
    for (before, before_run), (config, run) in zip(members, others, strict=False):
        if changed := first.differs_from(config, but_seed=True):
            raise InputError(
                f"the runs of {name} are not of one config: {first_run.path} and {run.path} differ in "
                f"{'; '.join(changed)}. Give runs that differ in the seed alone"
            )
        if before.seed == config.seed:
            raise InputError(
                f"{before_run.path} and {run.path} are both {name} with seed {config.seed}; give one of them"
            )
    digests: dict[str, RunDir] = {}
    caveats: dict[str, None] = {}
    for _, run in members:
        data = run.data()
        caveats[caveat(first.data.dataset, data.get("official"))] = None
        if isinstance(digest := data.get("digest"), str):
            digests.setdefault(digest, run)
    if len(digests) > 1:
        (one, one_run), (other, other_run), *_ = digests.items()
        raise InputError(
            f"the runs of {name} did not have the same images: {one_run.path} had {short_digest(one)}, "
            f"{other_run.path} {short_digest(other)}; give runs of the same data"
        )
    words = "; ".join(filter(None, caveats))
    return Network(name, first, tuple((config.seed, run) for config, run in members), next(iter(digests), None), words)


def note_of(runs: Iterable[RunDir]) -> str:
    """The caveats on runs, to be printed on the table or figure made of them; "" where there is nothing.

    Data that is not the official CIFAR-10 files, precisions where a network has several, every difference from the
    paper's recipe, and every choice that is not our default where the paper leaves it open. What is not so of all
    networks names those of which it is.
    """
    read = [(run.config(), run) for run in runs]
    named = [(paper_name(config.model.arch, config.model.depth), config, run) for config, run in read]
    notes = once_each((name, on_images(config, run)) for name, config, run in named)
    precisions: dict[str, set[str]] = {}
    for name, _, run in named:
        precisions.setdefault(name, set()).update(str(e["precision"]) for e in run.environments() if "precision" in e)
    notes += [f"{name} in {' and '.join(sorted(some))}" for name, some in precisions.items() if len(some) > 1]
    return "; ".join([*notes, *recipe_notes((name, config) for name, config, _ in named)])


def recipe_notes(named: Iterable[tuple[str, RunConfig]]) -> list[str]:
    """In what networks were not trained as the paper has it, then what else was chosen where it leaves a choice."""
    named, notes = list(named), []
    for heading, is_open in (("not the paper's recipe", False), ("where the paper leaves it open", True)):
        changed = once_each((name, _changed(config, is_open)) for name, config in named)
        notes += [f"{heading}: {', '.join(changed)}"] if changed else []
    return notes


def sentence(words: str) -> str:
    """A caveat that stands alone: with a capital letter and a full stop."""
    return f"{words[0].upper()}{words[1:]}."


def on_images(config: RunConfig, run: RunDir) -> list[str]:
    """The caveats on a run's images: which they were, and what a validation split makes of them."""
    split = "trained on 45k images, tested on the other 5k, not on the test set" if config.data.val_split else ""
    return list(filter(None, [caveat(config.data.dataset, run.data().get("official")), split]))


def _changed(config: RunConfig, is_open: bool) -> list[str]:
    said = ("data.dataset", "data.val_split")  # in `on_images`
    return [str(one) for one in paper.differences(config) if one.is_open is is_open and one.path not in said]
