"""From a config to the things it names: data, network, optimizer, loaders, tests. Used by train, eval and bench."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastres import config as cfg
from fastres.config import RunConfig
from fastres.cudagraph import CapturedGraph
from fastres.data.imageset import Float32Array, ImageSet
from fastres.errors import InputError, MachineError
from fastres.evaluator import Evaluator
from fastres.models.cifar import CifarNet, init_he_
from fastres.models.imagenet import ImageNetNet, Network
from fastres.models.norm import BatchNorm
from fastres.native.fusednet import Inference
from fastres.native.layernet import LayerInference
from fastres.optim import make_sgd
from fastres.runtime import Runtime
from fastres.step import Loader

EVALUATION_BATCH = 1_000  # images; fits any machine that trains


def load_images(
    data: cfg.Data,
    execution: cfg.Execution,
    *,
    train: bool = True,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """The data set that a config names, split as it says.

    Args:
        data, execution: Which set, and where it may be found.
        train: False where the test images are enough; CIFAR-10's training batches need not be there then.
        say: Takes one-line notices.
        progress: Takes bytes done and bytes in all, of a download.

    Raises:
        InputError: The data at `data_dir` is not CIFAR-10.
        MachineError: No data and no network.
    """
    if data.dataset == "synthetic":
        from fastres.data import synthetic

        return _made_by(synthetic.make_synthetic)
    from fastres.data.cifar import load_cifar10

    folder = Path(execution.data_dir) if execution.data_dir else None
    train = train or data.val_split  # whose validation images are training images
    images = load_cifar10(folder, train=train, urls=execution.data_urls, progress=progress, say=say)
    return images.validation_split(cfg.NUM_VALIDATION) if data.val_split else images


@functools.lru_cache(maxsize=1)
def _made_by(make: Callable[[], ImageSet]) -> ImageSet:
    """The built-in data set, once a process: it takes two seconds, and many runs may follow each other."""
    return make()


def build_net(config: RunConfig, runtime: Runtime, *, num_classes: int) -> Network:
    """The network on its device with initial weights, which depend on the seed alone, not on the device."""
    net = empty_net(config.model, num_classes=num_classes)
    init_he_(net, mode=config.model.init, generator=torch.Generator().manual_seed(config.seed))
    return place(net, config.execution, runtime)


def empty_net(model: cfg.Model, *, num_classes: int) -> Network:
    """The network that a config names, on the CPU, weights not yet set."""
    options: dict[str, Any] = {
        "shortcut": model.shortcut,
        "pad": model.pad,
        "num_classes": num_classes,
        "norm_batch": model.norm_batch,
        "bn_eps": model.bn_eps,
        "bn_momentum": model.bn_momentum,
    }
    with torch.random.fork_rng(devices=[]):  # torch's layers draw weights that are thrown away
        if model.arch == "imagenet":
            return ImageNetNet(model.depth, **options)
        return CifarNet(model.depth, residual=model.arch == "resnet", **options)


def place(net: Network, execution: cfg.Execution, runtime: Runtime) -> Network:
    """Move a network to its device, its 4-d weights to channels-last where the config says so; in place."""
    for module in net.modules():
        if isinstance(module, BatchNorm):
            module.native = runtime.native and runtime.device.type == "cpu"
    layout = torch.channels_last if execution.channels_last else torch.preserve_format
    return net.to(runtime.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def build_optimizer(net: Network, recipe: cfg.Recipe) -> torch.optim.SGD:
    """SGD as the recipe has it."""
    return make_sgd(
        net,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        weight_decay_on=recipe.weight_decay_on,
        lr_in_velocity=recipe.lr_in_velocity,
        fused=True,
    )


def loader_kind(execution: cfg.Execution, runtime: Runtime) -> str:
    """Which loader it will be: what "auto" means here."""
    from fastres.data.dali import dali_available

    if execution.loader != "auto":
        return execution.loader
    return "dali" if runtime.device.type == "cuda" and dali_available() else "resident"


def check_loader(config: RunConfig) -> None:
    """Raise InputError for a loader that does not augment as the plan says."""
    if config.execution.loader == "torchvision":
        raise InputError(
            "--loader torchvision uses its own random crops and flips, so the same config would give other results; it "
            "is there for `fastres bench`. Use --loader resident or dali"
        )


def build_loaders(
    configs: Sequence[RunConfig],
    images: ImageSet,
    mean: Float32Array,
    runtime: Runtime,
    say: Callable[[str], None] | None = None,
) -> list[Loader]:
    """The loaders of runs that differ in their seed alone. They share the images, and DALI makes their batches in one.

    Args:
        configs: Of the runs.
        images, mean, runtime: Of all of them.
        say: Told where a DALI that nobody asked for does not start, and the resident loader takes its place; None:
            that is an error too.

    Raises:
        MachineError: DALI was asked for by name and is not there or does not start.
    """
    from fastres.data.dali import DaliLoader
    from fastres.data.plan import EpochPlan
    from fastres.data.resident import ResidentLoader
    from fastres.data.table import TableLoader

    config, execution = configs[0], configs[0].execution
    first, *others = [EpochPlan(c.seed, len(images.train_images), augment=c.data.augment) for c in configs]
    options: dict[str, Any] = {
        "mean": mean,
        "batch_size": config.recipe.batch_size,
        "device": runtime.device,
        "dtype": runtime.dtype,
        "channels_last": execution.channels_last,
    }
    kind, may_fall_back = loader_kind(execution, runtime), execution.loader != "dali" and say is not None
    if kind == "dali":
        try:
            dali = DaliLoader(
                images,
                first,
                others=others,
                num_threads=runtime.threads,
                ahead=execution.graph_steps,
                compiled=runtime.compile_scope != "none" and runtime.device.type == "cuda",
                **options,
            )
            try:
                if may_fall_back:
                    dali.prepare(0)  # some errors come with the first kernel
            except BaseException:
                dali.close()
                raise
            return [*dali.seats()]
        except MachineError as error:
            if not (say and may_fall_back):
                raise
            say(f"taking the resident loader: {error}")
    if kind == "torchvision":
        from fastres.data.torchvision import TorchvisionLoader

        return [TorchvisionLoader(images, plan, **options) for plan in (first, *others)]
    if runtime.device.type == "cpu":
        table = TableLoader(images, first, **options)
        return [table, *map(table.sharing, others)]
    resident = ResidentLoader(images, first, compiled=runtime.compile_scope != "none", **options)
    return [resident, *map(resident.sharing, others)]


def build_evaluators(
    nets: Sequence[nn.Module],
    config: RunConfig,
    images: ImageSet,
    mean: Float32Array,
    runtime: Runtime,
    *,
    train: bool = False,
) -> list[Evaluator]:
    """What tests networks on the test images (under `val_split` the validation images): the plain single view.

    The images are on the device once, for all of them. `train`: the plain training images instead.
    """
    from fastres.data.resident import evaluation_batches

    batches = list(
        evaluation_batches(
            images.train_images if train else images.test_images,
            images.train_labels if train else images.test_labels,
            mean,
            batch_size=EVALUATION_BATCH,
            device=runtime.device,
            dtype=runtime.dtype,
            channels_last=config.execution.channels_last,
        )
    )
    capture = CapturedGraph if runtime.cuda_graph else None
    how: dict[str, Any] = {"num_classes": len(images.class_names), "dtype": runtime.dtype, "capture": capture}
    return [Evaluator(net, batches, forward=inference_of(net, runtime), **how) for net in nets]


def inference_of(net: nn.Module, runtime: Runtime) -> Inference | LayerInference | None:
    """The network in evaluation mode by fastres' own GPU kernels; None: by torch's."""
    if not runtime.native or runtime.device.type != "cuda":
        return None
    return LayerInference(net) if runtime.layer_kernels else Inference(net)
