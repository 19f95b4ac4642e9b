"""`fastres eval`: the test error of a run, of a checkpoint, or of a weights file that another project published."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastres import checkpoint
from fastres.build import EVALUATION_BATCH, empty_net, load_images, place
from fastres.config import Execution, Model, RunConfig
from fastres.console import percent
from fastres.data.imageset import Float32Array, ImageSet, caveat, short_digest
from fastres.data.pixels import SCALE
from fastres.data.resident import evaluation_batches
from fastres.errors import InputError
from fastres.evaluator import Evaluation, Evaluator
from fastres.machine import gpu
from fastres.models.imagenet import Network
from fastres.rundir import RunDir
from fastres.runfolders import found_again
from fastres.runtime import Runtime, prepare
from fastres.weights import ForeignWeights, read_weights

Channels = tuple[float, float, float]


# What a single pass over the test images does not pay for, whatever the run was trained with and on.
ONE_PASS: dict[str, Any] = {
    "device": "auto", "compile": False, "cuda_graph": False, "shadow_weights": False, "native": False,
    "layer_kernels": False, "deterministic": False, "threads": 0,
}  # fmt: skip
BAR = 24  # characters of the longest bar
OTHER_IMAGES = "measured on other images than those of the run"


@dataclass(frozen=True)
class Trained:
    """A trained network, and the test images as it was trained to see them."""

    name: str  # ResNet20
    arch: str  # resnet, plain or imagenet
    step: int | None  # of training; None where the file does not say
    held_out: str  # the images: "test" or "validation"
    net: Network  # on its device
    images: ImageSet
    runtime: Runtime
    caveats: tuple[str, ...]  # on the images it learned from, and on these
    # Each call makes the batches anew: images (batch, 3, 32, 32) and labels int64 (batch,), on the device.
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]

    @property
    def at_step(self) -> str:
        """ "ResNet20 at step 64,000", as far as that is known."""
        return self.name + (f" at step {self.step:,}" if self.step is not None else "")


@dataclass(frozen=True)
class Outcome:
    """A network's test result. Errors are fractions, 0 to 1."""

    target: str
    trained: Trained
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: test_error, test_loss, class_errors by name, confusion, and what was tested on what.

        Of the validation images where `held_out` says so.
        """
        trained, names = self.trained, self.trained.images.class_names
        return {
            "target": self.target,
            "model": trained.name,
            "step": trained.step,
            "held_out": trained.held_out,
            "test_error": self.evaluation.error,
            "test_loss": self.evaluation.loss,
            "class_errors": dict(zip(names, self.evaluation.class_errors, strict=True)),
            "confusion": self.evaluation.confusion,
            "num_images": self.evaluation.num_images,
            "data": trained.images.test_facts(),
        }


def score(trained: Trained, target: Path) -> Outcome:
    """Test a network that came from `target`. Raises InputError where it answers with NaN or Inf."""
    num_classes = len(trained.images.class_names)
    evaluator = Evaluator(trained.net, trained.batches(), num_classes=num_classes, dtype=trained.runtime.dtype)
    found = evaluator()
    if not math.isfinite(found.loss):
        raise InputError(f"{target} answers the test images with NaN or Inf (loss {found.loss}); it has no test error")
    return Outcome(str(target), trained, found)


def load_trained(
    target: Path,
    execution: dict[str, Any],
    *,
    arch: str | None = None,
    dataset: str | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    test_set: bool = False,
    say: Callable[[str], None],
) -> Trained:
    """The network of a run folder, a checkpoint file, or a foreign weights file.

    A checkpoint brings its config and mean image. Foreign weights get the per-pixel mean of the training images, unless
    `mean` and `std` (per channel, of pixels in 0 to 1) say what they were trained with.

    Args:
        target: The folder or file.
        execution: Changes to `fastres.config.Execution`: device, precision, where the data is.
        arch: "resnet", "plain" or "imagenet", for weights that do not say (those of an ImageNet network do).
        dataset: "cifar10" or "synthetic"; default: what the run was trained on.
        mean, std: See above.
        test_set: Of a run under `val_split`: the test images, which it never saw, not the validation images.
        say: Takes one-line notices.

    Raises:
        InputError: `target` is neither, is damaged, or does not fit a CIFAR network.
        MachineError: No data and no network, or no such device.
    """
    if not target.exists():
        raise InputError(f"{target} does not exist; give a run folder or a weights file")
    if arch not in (None, "resnet", "plain", "imagenet"):
        raise InputError(f"--arch is {arch!r}; it must be one of resnet, plain, imagenet")
    saved = read_checkpoint(target, say)  # whatever is wrong with it is said before a download for nothing
    learned = _own(saved, target, arch, mean or std) if saved else _foreign(target, arch, mean, std, say)
    if not checkpoint.all_finite(learned.weights):
        raise InputError(f"{target} holds weights that are NaN or Inf; whatever it answers means nothing")
    stored = saved.meta["config"] if saved else RunConfig().to_dict()
    chosen = _chosen(stored, execution, target, dataset, test_set=test_set)
    runtime = prepare(chosen.execution)
    images = load_images(chosen.data, chosen.execution, train=learned.mean is None, say=say)
    caveats = [images.caveat]
    if saved:
        theirs, ours = saved.meta["data"]["test_digest"], images.test_digest
        if theirs != ours and not test_set:
            say(f"tested on other images ({short_digest(ours)}) than the run was tested on ({short_digest(theirs)})")
        caveats = [_training_caveat(saved), images.caveat, OTHER_IMAGES if theirs != ours else ""]
    mean_image = images.mean_image() if learned.mean is None else learned.mean
    net = empty_net(learned.model, num_classes=len(images.class_names))
    net.load_state_dict(learned.weights)
    return Trained(
        name=RunConfig(model=learned.model).name,
        arch=learned.model.arch,
        step=learned.step,
        held_out=chosen.data.held_out,
        net=place(net, chosen.execution, runtime),
        images=images,
        runtime=runtime,
        caveats=tuple(dict.fromkeys(filter(None, caveats))),
        batches=functools.partial(_batches, images, mean_image, std, runtime, chosen.execution),
    )


@dataclass(frozen=True)
class _Learned:
    """What a file says of a network."""

    model: Model
    weights: dict[str, Tensor]
    step: int | None
    mean: Float32Array | None  # (32, 32, 3), 0 to 255; None: that of the training images


def _own(saved: checkpoint.Checkpoint, target: Path, arch: str | None, pixels: Channels | None) -> _Learned:
    """What a checkpoint says. Raises InputError where it contradicts the command line or this fastres."""
    model = RunConfig.from_dict(saved.meta["config"]).model
    if pixels:
        raise InputError(f"{target} brings its own mean image; leave out --mean and --std")
    if arch is not None and arch != model.arch:
        raise InputError(f"--arch {arch}: {target} says of itself that it is {model.arch}")
    check_scale(saved, target)
    return _Learned(model, saved.weights, saved.meta["step"], saved.tensors["data/mean"].numpy())


def check_scale(saved: checkpoint.Checkpoint, target: Path) -> None:
    """Raise InputError where a checkpoint's network was trained on pixels of another scale than this fastres'."""
    if saved.meta["data"]["scale"] != SCALE:
        raise InputError(f"{target} was trained with pixels scaled by {saved.meta['data']['scale']}, not {SCALE}")


def _foreign(
    target: Path, arch: str | None, mean: Channels | None, std: Channels | None, say: Callable[[str], None]
) -> _Learned:
    """What another project's weights say, and what is assumed of the rest."""
    if std and not mean:
        raise InputError("--std goes with --mean, the other half of what the weights were trained with; add it")
    foreign = read_weights(target)
    model = _model_of(foreign, target, arch)
    say(_assumed(target, model, guessed=arch is None and foreign.arch is None, mean=mean, std=std))
    mean_image: Float32Array | None = None if mean is None else np.full((32, 32, 3), mean, np.float32) * 255
    return _Learned(model, foreign.state, None, mean_image)


def _chosen(
    stored: Mapping[str, Any], execution: dict[str, Any], target: Path, dataset: str | None, *, test_set: bool
) -> RunConfig:
    """How and on what images a network of the config `stored` is tested. Raises InputError."""
    tree = for_one_pass(stored, execution)
    data = dict(tree["data"])
    if dataset and dataset != data["dataset"]:  # which has no validation split of the run's
        if test_set:
            raise InputError(f"--dataset {dataset} has no other test images; leave out --test-set")
        data |= {"dataset": dataset, "val_split": False}
    if test_set and not data["val_split"]:
        raise InputError(f"{target} kept no images for validation: it is tested on the test set; leave out --test-set")
    return RunConfig.from_dict(
        {"execution": tree["execution"], "data": {**data, "val_split": data["val_split"] and not test_set}}
    )


def _model_of(foreign: ForeignWeights, target: Path, arch: str | None) -> Model:
    """The network that another project's weights are of: what their shapes say and, where they do not, `arch`."""
    if foreign.arch not in (None, arch or foreign.arch) or (arch == "imagenet" and foreign.arch is None):
        raise InputError(
            f"--arch {arch}: the tensors of {target} are those of --arch {foreign.arch or 'resnet or plain'}"
        )
    own: Literal["resnet", "plain"] = "plain" if arch == "plain" else "resnet"
    return Model(arch=foreign.arch or own, depth=foreign.depth, shortcut=foreign.shortcut)


def _assumed(target: Path, model: Model, *, guessed: bool, mean: Channels | None, std: Channels | None) -> str:
    """What weights of another project do not say of themselves, in a line."""
    kind = f"{RunConfig(model=model).name}, shortcut {model.shortcut}" + (" (--arch plain if not)" if guessed else "")
    if mean is None:
        pixels = f"pixels less the training images' mean image, times {SCALE:g} (--mean and --std if not)"
    else:
        pixels = f"pixels of 0 to 1 less {mean}" + (
            f", over {std}" if std else f", times {255 * SCALE:g} (--std if not)"
        )
    return f"{target}: taken for {kind}; {pixels}"


def for_one_pass(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config for a single pass on this machine, which may be another one.

    Args:
        tree: The config; what such a pass can do without is left out.
        changes: Laid over its `execution`.
    """
    tree = found_again(tree)
    execution = {**tree["execution"], **ONE_PASS, **changes}
    if execution["precision"] == "tf32" and "precision" not in changes:
        on_gpu = gpu.choose(execution["device"])[0].type == "cuda"
        execution["precision"] = "tf32" if on_gpu else "fp32"
    return {**tree, "execution": execution}


def read_checkpoint(target: Path, say: Callable[[str], None]) -> checkpoint.Checkpoint | None:
    """The checkpoint that `target` holds or is; None for a foreign weights file."""
    if target.is_dir():
        whole, problems = checkpoint.load_all(RunDir.open(target).path, most=1)
        for problem in problems:
            say(f"{problem}; taking the one before")
        if not whole:
            gone = {
                "finished": " any more; its result is in result.json",
                "diverged": ": it diverged before the first (diverged.json says how)",
            }
            raise InputError(f"{target} has no checkpoint{gone.get(RunDir.open(target).status, ' yet')}")
        return whole[0]
    if target.suffix == ".safetensors" and checkpoint.is_checkpoint(target):
        return checkpoint.load(target)
    return None


def _training_caveat(saved: checkpoint.Checkpoint) -> str:
    """What to know of the images that a checkpoint learned from, "" for nothing."""
    data = saved.meta["data"]
    official = data["official"] if "official" in data else RunDir(saved.path.parent).data().get("official")
    return caveat(data["name"], official)


def _batches(
    images: ImageSet, mean: Float32Array, std: Channels | None, runtime: Runtime, execution: Execution
) -> Iterator[tuple[Tensor, Tensor]]:
    """The test images as the network was trained to see them."""
    plain = evaluation_batches(
        images.test_images,
        images.test_labels,
        mean,
        batch_size=EVALUATION_BATCH,
        device=runtime.device,
        dtype=torch.float32 if std else runtime.dtype,
        channels_last=execution.channels_last,
    )
    if std is None:
        yield from plain
        return
    factor = torch.tensor(std, device=runtime.device).mul_(255 * SCALE).reciprocal_().view(1, 3, 1, 1)
    for batch, labels in plain:
        yield (batch * factor).to(runtime.dtype), labels


def report(outcome: Outcome) -> str:
    """The result for people, a class a line."""
    trained, found = outcome.trained, outcome.evaluation
    names = trained.images.class_names
    worst = max(error or 0.0 for error in found.class_errors) or 1.0
    width = max(map(len, names))
    lines = [
        f"{trained.at_step}: {trained.held_out} error {percent(found.error)}, loss {found.loss:.4f}",
        tested_images(trained.images),
    ]
    for name, error in zip(names, found.class_errors, strict=True):
        if error is not None:
            lines.append(f"  {name:<{width}}  {percent(error):>8}  {bar(error / worst)}")
    return "\n".join(lines)


def tested_images(images: ImageSet) -> str:
    """ "10,000 images of cifar10", and what to know of them."""
    note = "" if images.official else f", not the official files (these images: {short_digest(images.test_digest)})"
    return f"{len(images.test_images):,} images of {images.name}{note}"


def bar(share: float) -> str:
    """A bar of a chart in text, as long as its share of the longest."""
    return "#" * round(BAR * share)
