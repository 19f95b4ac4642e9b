"""What a config's execution comes to for its network on this machine: the kernels that suit both, and are right here.

fastres' own GPU kernels were tested on few GPUs, drivers and compilers. So a run begins with one step of a small
network by them, which must be as exact as torch's own.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastres.build import EVALUATION_BATCH, build_net, build_optimizer, inference_of
from fastres.config import Model, RunConfig, make_config
from fastres.data.frozen import FrozenLoader
from fastres.errors import InputError, MachineError, OutOfMemory, first_line, says_out_of_memory
from fastres.native import layernet
from fastres.native.fusednet import is_paper_net, supports
from fastres.optim import momentum_buffers
from fastres.runtime import Runtime, autocast, prepare
from fastres.step import Replica

FOR_WHAT = "for the paper's CIFAR networks, shortcut A, norms over the whole batch, and most batch sizes"
SMALL = 14  # layers: two blocks a stage, so that every kernel of a deeper network is among its own
# How many times as far from fp32 as torch's bf16 a tensor may be, and what is near enough for that. Right kernels are
# at most 1.7 times as far at 16 images and more, 2.7 times at very few, where a single ReLU that rounding turns over
# shows; a tap that one misses makes 9 to 16 times (docs/LOG.md).
FACTOR, NEAR = 4.0, 2**-6


def prepare_for(config: RunConfig, say: Callable[[str], None] | None = None) -> Runtime:
    """Prepare this process for a run: `runtime.prepare` for its network, the kernels checked on this machine.

    Args:
        config: The run's.
        say: Callback for progress lines.

    Raises:
        InputError, MachineError: As of `runtime.prepare`; or kernels that were asked for do not go with the network or
            the batch, do not run on this GPU, or compute something else there.
    """
    runtime, execution, batch_size = prepare_unchecked(config), config.execution, config.recipe.batch_size
    if not runtime.native or runtime.device.type == "cpu":
        return runtime
    bare = replace(runtime, compile_scope="none", compile_mode="default", cuda_graph=False, threads=1, notes=())
    verdict = check_kernels(bare, replace(config.model, depth=SMALL), batch_size, say)
    if not verdict.fault:
        return replace(runtime, notes=(*runtime.notes, *verdict.notes))
    if execution.layer_kernels:
        raise MachineError(f"--layer-kernels {verdict.fault}; use --no-layer-kernels")
    if execution.native:
        raise MachineError(f"--native kernels {verdict.fault}; use --no-native")
    note = f"training without --native kernels, more slowly: they {verdict.fault}"
    return replace(runtime, native=False, notes=(*runtime.notes, note))


def prepare_unchecked(config: RunConfig) -> Runtime:
    """`prepare_for` without the check: with all kernels that network and batch allow, nothing compiled."""
    runtime, batch_size = prepare(config.execution, depth=config.model.depth), config.recipe.batch_size
    if config.execution.layer_kernels:
        _check_layer_kernels(config, runtime)
        return replace(runtime, layer_kernels=True)
    if not runtime.native or runtime.device.type == "cpu" or supports(config.model, batch_size):
        return runtime
    if config.execution.native:
        raise InputError(f"--native kernels on a GPU are {FOR_WHAT}; use --no-native")
    notes = (*runtime.notes, f"training without fastres' own GPU kernels, more slowly: they are {FOR_WHAT}")
    return replace(runtime, native=False, notes=notes)


def _check_layer_kernels(config: RunConfig, runtime: Runtime) -> None:
    """Raise MachineError or InputError if the layer kernels cannot be used."""
    if runtime.device.type != "cuda":
        raise MachineError("--layer-kernels need a GPU; leave it out to train on the CPU")
    if not runtime.native:
        others = {
            "--no-native": config.execution.native is False,
            f"--precision {runtime.precision}": runtime.precision != "bf16",
            "--no-shadow-weights": config.execution.shadow_weights is False,
            "--no-channels-last": not config.execution.channels_last,
            "a torch without Triton": True,
        }
        raise InputError(f"--layer-kernels do not go with {next(flag for flag, given in others.items() if given)}")
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        raise MachineError("--layer-kernels need cuda-bindings, which this torch came without; leave it out")
    gpu, batch_size = torch.cuda.get_device_properties(runtime.device), config.recipe.batch_size
    if (has := gpu.shared_memory_per_block_optin) < layernet.SHARED:
        needed = f"{layernet.SHARED:,} bytes of shared memory a thread block, and this GPU has {has:,}"
        raise MachineError(f"--layer-kernels need {needed}; leave it out")
    if not is_paper_net(config.model, batch_size):
        raise InputError(f"--layer-kernels are {FOR_WHAT}; leave it out")
    if not layernet.splits_evenly(batch_size, gpu.multi_processor_count):
        over = f"{gpu.multi_processor_count} multiprocessors"
        raise InputError(f"--layer-kernels cannot share out --batch-size {batch_size} over {over}; use a multiple of 8")


@dataclass(frozen=True)
class Verdict:
    """On fastres' own kernels."""

    fault: str | None = None  # what they do wrong, to be said of "they"
    notes: tuple[str, ...] = ()


_VERDICTS: dict[tuple[Runtime, Model, int], Verdict] = {}  # of this process: a benchmark asks before each of its turns


def check_kernels(runtime: Runtime, model: Model, batch_size: int, say: Callable[[str], None] | None = None) -> Verdict:
    """Compare a step and a test of a small network by a runtime's own kernels with torch's, in bf16 and in fp32.

    Args:
        runtime: With the kernels to check; compiles nothing else.
        model: Of the network.
        batch_size: Images of the step.
        say: Told before the first time, which compiles the kernels.

    Raises:
        MachineError: The GPU is in a state in which this process can use it no more.
        OutOfMemory: It has no room at all.
    """
    key = runtime, model, batch_size
    if key in _VERDICTS:
        return _VERDICTS[key]
    if say:
        say("checking fastres' own kernels on this GPU")
    try:
        verdict = _compare(*key)
    finally:
        if runtime.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # of a GPU that is lost, which is told by then
                torch.cuda.empty_cache()  # for DALI, which has memory of its own
    if not verdict.notes:  # else memory may have been short for a moment
        _VERDICTS[key] = verdict
    return verdict


def _compare(runtime: Runtime, model: Model, batch_size: int) -> Verdict:
    """`check_kernels` without its cache."""
    torchs = replace(runtime, native=False, layer_kernels=False)
    exact = replace(torchs, precision="fp32", shadow_weights=False)
    try:
        wanted, theirs = (_results(each, model, batch_size) for each in (exact, torchs))
    except Exception as error:  # noqa: BLE001 (whatever it is, it says nothing of the kernels)
        return _unchecked(runtime.device, error)
    try:
        ours = _results(runtime, model, batch_size)
    except Exception as error:  # noqa: BLE001 (a compiler's, a launcher's, a driver's)
        if says_out_of_memory(error):
            return _unchecked(runtime.device, error)
        _check_usable(runtime.device, error)
        return Verdict(f"do not run on this GPU ({first_line(error)})")
    for what, exactly in wanted.items():
        our, their = ((float((found[what] - exactly).norm() / exactly.norm())) for found in (ours, theirs))
        if not our <= FACTOR * max(their, NEAR):  # NaN too
            return Verdict(f"are wrong on this GPU: {what} is {our:.2g} from fp32's, torch's bf16 {their:.2g}")
    return Verdict()


def _unchecked(device: torch.device, error: Exception) -> Verdict:
    """Where there is nothing to compare: the kernels are used."""
    _check_usable(device, error)
    return Verdict(notes=(f"fastres' own GPU kernels could not be checked: {first_line(error)}",))


def _check_usable(device: torch.device, error: Exception) -> None:
    """Raise MachineError after an error that CUDA does not recover from."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as second:
        if says_out_of_memory(second):
            raise OutOfMemory(f"{device} is full: other processes hold its memory (nvidia-smi lists them)") from second
        said = f"{device} failed while fastres' own kernels were checked ({first_line(error)})"
        raise MachineError(f"{said}; try --no-native") from error


def _results(runtime: Runtime, model: Model, batch_size: int) -> dict[str, Tensor]:
    """What one step and one test give, float64, on the CPU. The same weights and images for every runtime."""
    config = make_config("paper", recipe={"batch_size": batch_size, "weight_decay": 0.0})
    config, device, chance = replace(config, model=model), runtime.device, torch.Generator().manual_seed(0)
    net = build_net(config, runtime, num_classes=10)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 1:  # scales and shifts that are not all alike
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=chance).to(device))
                if name.endswith("bias") and "bn" in name:
                    # Far from ReLU's edge: what rounding pushes over it would hide more than a fault does.
                    signs = 2 * (torch.rand(parameter.shape, generator=chance) < 0.75).float() - 1
                    parameter.add_(signs.to(device))
            parameter.copy_(parameter.bfloat16())
    # Coarse patterns, one a class: gradients that agree from image to image leave less to hide a fault in.
    patterns = torch.randn(10, 3, 4, 4, generator=chance).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    labels, test_labels = (torch.arange(num) % 10 for num in (batch_size, EVALUATION_BATCH))
    train_images, test_images = (
        (patterns[some] + 0.3 * torch.randn(len(some), 3, 32, 32, generator=chance))
        .bfloat16()
        .to(device, runtime.dtype, memory_format=torch.channels_last)
        for some in (labels, test_labels)
    )
    loader, optimizer = FrozenLoader(train_images, labels.to(device)), build_optimizer(net, config.recipe)
    # No timed search for cuDNN's kernels, which would take longer than all else here. Deterministic, since torch keeps
    # what was chosen for a shape, and training, which searches, must not find this: the key has that flag alone.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        replica = Replica(net, optimizer, loader, runtime, num_steps=1)
        replica.step()  # its learning rate is 0, so the velocities are the gradients
        net.eval()
        with torch.no_grad(), autocast(device, runtime.dtype):
            inference = inference_of(net, runtime)
            logits = inference(test_images) if inference else net(test_images)
    parts = {f"gradient of {name}": grad for name, grad in momentum_buffers(net, optimizer).items()}
    parts |= {"loss": replica.losses[:1], "logits": logits, **dict(net.named_buffers())}
    return {name: tensor.detach().double().cpu() for name, tensor in parts.items()}
