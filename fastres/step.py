"""One training step of one or several replicas: load, forward, backward, update, log; all of it on the device.

`train` and the benchmarks run the same `TrainStep`. The step counter, the learning rates and the logs are device
tensors, and the step begins with `loader.load(counter)`, so a step asks nothing of the host: on a GPU it is captured
once as a CUDA graph and replayed.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastres import optim
from fastres.config import MAX_GRAPH_STEPS
from fastres.cudagraph import WARM_UP_CALLS, Capture, Replay
from fastres.models.cifar import loss_and_errors, predict_maps
from fastres.native.fusednet import FusedNet
from fastres.native.layernet import LayerNet
from fastres.runtime import Runtime, allow_recompilations, autocast
from fastres.shadow import ShadowedSgd

Options = dict[str, bool | str | int | Callable[..., object]]  # of torch.compile
SPARE = WARM_UP_CALLS * MAX_GRAPH_STEPS  # places behind the last step in tables and logs, for the steps of a warm-up


class Loader(Protocol):
    """What yields batches: the loaders of `fastres.data`.

    Attributes:
        name: As in the config.
        prefetched: Batches that its worker processes make ready while nobody takes any.
        period: Steps after which its work repeats itself: batches that are made together.
    """

    name: str
    prefetched: int
    period: int

    def prepare(self, step: int) -> None:
        """Host's work before 0-based step `step` is launched: enqueues what it needs, waits for nothing."""

    def load(self, counter: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of the step that `counter` says, an int64 `(1,)` on the device; called inside the captured graph.

        Images `(batch, 3, 32, 32)` in the training precision, labels int64 `(batch,)`.
        """

    def close(self) -> None:
        """Release threads and buffers."""


@dataclass(frozen=True)
class Window:
    """What steps `start + 1` to `start + len(losses)` gave, on the host."""

    start: int  # steps done before it
    losses: list[float]  # mean cross-entropy of each step's batch
    errors: list[int]  # wrong answers in each step's batch


class OwnPasses(Protocol):
    """A network's training passes by kernels of fastres' own: `FusedNet` and `LayerNet`."""

    @property
    def grads(self) -> tuple[Tensor, Tensor]:
        """Flat float32 gradients: of the convolutions' weights, and of the leading (or all) other parameters.

        Those of the rest are in their `.grad`.
        """

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `Replica.forward`."""

    def backward(self, loss: Tensor) -> None:
        """Fill `grads`; `loss` is what `forward` gave, which must be the last call."""


class Replica:
    """One network in training: weights, optimizer, samples, counter and log, all its own.

    Args:
        net: On its device; gives logits `(batch, classes)`.
        optimizer: Of its parameters, from `optim.make_sgd`.
        loader: Of its samples.
        runtime: Device, precision, whether to compile.
        num_steps: Steps of the whole run.

    Attributes:
        counter: int64 `(1,)` on the device: the 0-based step that comes next.
        lrs: float32 `(num_steps + SPARE,)`, the learning rate of each step.
        lr_ratios: float32 `(num_steps + SPARE,)`, the rate before over the rate of each step; read where the optimizer
            has the rate in the velocity.
        losses: float32 `(num_steps + SPARE,)`, the mean cross-entropy of each step's batch.
        errors: int32 `(num_steps + SPARE,)`, wrong answers in each step's batch.
    """

    def __init__(
        self, net: nn.Module, optimizer: torch.optim.SGD, loader: Loader, runtime: Runtime, *, num_steps: int
    ) -> None:
        self.net, self.optimizer, self.loader = net, optimizer, loader
        self.device, self.dtype, self.num_steps = runtime.device, runtime.dtype, num_steps
        self.counter = torch.zeros(1, dtype=torch.int64, device=self.device)
        size = num_steps + SPARE
        self.lrs = torch.zeros(size, dtype=torch.float32, device=self.device)
        self.lr_ratios = torch.ones(size, dtype=torch.float32, device=self.device)
        self.losses = torch.zeros(size, dtype=torch.float32, device=self.device)
        self.errors = torch.zeros(size, dtype=torch.int32, device=self.device)
        # fp16's range needs its gradients scaled; the scale is part of the state, and stays on the device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self._sgd: ShadowedSgd | None = None
        if runtime.shadow_weights:
            self._sgd = ShadowedSgd(net, optimizer, compiled=runtime.compile_scope != "none")
        self._velocities: list[Tensor] = []  # velocities that have the learning rate inside
        if optimizer.param_groups[0]["lr_in_velocity"]:
            self._velocities = list(optim.momentum_buffers(net, optimizer).values())
        self._predict, self._record, head = _predict, _record, predict_maps
        options = compile_options(self.device, runtime.compile_mode)
        if runtime.compile_scope != "none":
            allow_recompilations()
            if self.device.type == "cuda":  # a few launches instead of a dozen
                self._record = torch.compile(_record, fullgraph=True, dynamic=False)
                head = torch.compile(head, fullgraph=True, dynamic=False, options=options)
        self._make_passes: Callable[[nn.Module, Mapping[str, Tensor], int], OwnPasses] | None = None
        self._passes: OwnPasses | None = None  # made for the first batch, whose size they are for
        if runtime.native and self.device.type == "cuda":
            self._make_passes = LayerNet if runtime.layer_kernels else functools.partial(FusedNet, predict=head)
        elif runtime.compile_scope == "blocks":
            compile_blocks(net, options)
        elif runtime.compile_scope == "whole":
            self._predict = torch.compile(_predict, fullgraph=True, dynamic=False, options=options)

    def set_lrs(self, lr_at: Callable[[int], float], start: int = 0) -> None:
        """Fill the tables of learning rates from 0-based step `start` on; takes part from the next step launched."""
        values = torch.tensor([lr_at(step) for step in range(start, self.num_steps)], dtype=torch.float32)
        self.lrs[start : self.num_steps] = values.to(self.device)
        self.lr_ratios[: self.num_steps] = optim.lr_ratios(self.lrs[: self.num_steps])

    def step(self) -> None:
        """Take the step that the counter says. Nothing is read back from the device."""
        images, labels = self.loader.load(self.counter)
        loss, errors = self.forward(images, labels)
        self.backward(loss)
        self.update()
        self.log(loss, errors)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy, fp32 (fp64 for an fp64 network), and wrong answers, int32: their mean and sum, both `()`.

        With the layer kernels both are per image, `(batch,)`; `log` takes either.
        """
        if self._make_passes and not self._passes:
            assert self._sgd
            self._passes = self._make_passes(self.net, self._sgd.leaves, len(images))
        if self._passes:
            return self._passes.forward(images, labels)
        return self._predict(self.net, self._sgd.leaves if self._sgd else {}, images, labels, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Gradients into `.grad`, which the last update left empty, or to where `update` finds them."""
        if self._passes:
            self._passes.backward(loss)
        else:
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """SGD on the fp32 weights, with the learning rate that stands at the counter."""
        if self._velocities:
            optim.scale_velocities(self._velocities, self.lr_ratios.index_select(0, self.counter))
        if self._sgd:
            self._sgd.step(self.lrs, self.counter, self._passes.grads if self._passes else None)
            return
        optim.set_lr(self.optimizer, self.lrs.index_select(0, self.counter))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def log(self, loss: Tensor, errors: Tensor) -> None:
        """Write loss and errors into their places, and count the step."""
        self._record(self.counter, loss.detach(), errors, self.losses, self.errors)

    def window(self, start: int, stop: int) -> Window:
        """The log of 0-based steps `start` to `stop - 1`. Waits for the device; for log steps only."""
        return Window(start, self.losses[start:stop].tolist(), self.errors[start:stop].tolist())

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes, the scaler's apart."""
        momentum = optim.momentum_buffers(self.net, self.optimizer)
        logs = (self.counter, self.losses, self.errors)
        shadows = [self._sgd.shadows] if self._sgd else []
        return [
            *self.net.state_dict().values(),
            *momentum.values(),
            self.optimizer.param_groups[0]["lr"],
            *logs,
            *shadows,
        ]

    def seek(self, step: int) -> None:
        """Have the counter stand at 0-based step `step`, and take over weights that were loaded from elsewhere."""
        self.counter.fill_(step)
        if self._sgd:
            self._sgd.refresh()


class TrainStep:
    """The steps of one or several replicas, which have nothing in common.

    Args:
        replicas: Usually one. Several are parallel branches of one graph.

    Attributes:
        graphs: What was captured, by its number of steps; empty where steps are launched kernel by kernel.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = tuple(replicas)
        self.graphs: dict[int, Replay] = {}

    def __call__(self, step: int, stop: int | None = None) -> int:
        """Launch 0-based step `step`, which the counters must stand at; nothing is waited for.

        Args:
            step: The step to launch.
            stop: Several steps may be launched in one go, but none from here on; default: `step + 1`.

        Returns:
            The number of steps launched.
        """
        room = 1 if stop is None else stop - step
        count = max((n for n in self.graphs if n <= room), default=1)
        for ahead in range(count):  # step by step: loaders of several replicas may share a pipeline, which goes one way
            for replica in self.replicas:
                replica.loader.prepare(step + ahead)
        if count in self.graphs:
            self.graphs[count].replay()
        else:
            for replica in self.replicas:
                replica.step()
        return count

    def seek(self, step: int) -> None:
        """Have the counters stand at 0-based step `step`."""
        for replica in self.replicas:
            replica.seek(step)

    def warm_up(self, capture: Capture | None = None, *, graph_steps: int = 1) -> None:
        """Compile and capture, before any clock runs, and leave no trace: weights, momentum, BN and logs are put back.

        Args:
            capture: `cudagraph.CapturedGraph`; None captures nothing and only takes a step, which compiles.
            graph_steps: Capture a second graph of so many steps, where above 1.
        """
        state = [tensor for replica in self.replicas for tensor in replica.state()]
        before = [tensor.clone() for tensor in state]
        scalers = [replica.scaler.state_dict() for replica in self.replicas]
        for replica in self.replicas:
            replica.loader.prepare(0)
        if capture is None:
            for replica in self.replicas:
                replica.step()
        else:
            for count in sorted({1, graph_steps}):
                self.seek(0)
                branches = [functools.partial(_steps, replica, count) for replica in self.replicas]
                self.graphs[count] = capture(branches, state)
        with torch.no_grad():
            for now, was in zip(state, before, strict=True):
                now.copy_(was)
        for replica, scaler in zip(self.replicas, scalers, strict=True):
            replica.scaler.load_state_dict(scaler)

    def check(self) -> None:
        """Raise RuntimeError where a tensor that a graph uses has moved."""
        for graph in self.graphs.values():
            graph.check()


def _steps(replica: Replica, count: int) -> None:
    for _ in range(count):
        replica.step()


def compile_blocks(net: nn.Module, options: Options | None) -> None:
    """Compile each residual block in place, so that saved names stay clean.

    Equal blocks share their code: five distinct blocks are compiled whatever the depth, so ResNet-110 starts as
    quickly as ResNet-20. (`dynamic=False`: there is one batch shape in a run.)
    """
    for stage in (child for name, child in net.named_children() if name.startswith("layer")):
        for block in stage.children():
            block.compile(fullgraph=True, dynamic=False, options=options)


def compile_options(device: torch.device, mode: str) -> Options | None:
    """Inductor's options for the network, by `Execution.compile_mode`; it makes no graphs: ours is around it."""
    options: Options = {}
    if mode != "plain" and device.type == "cuda":
        options["combo_kernels"] = True
    if mode == "max-autotune":  # what torch's mode of this name sets
        options |= {"max_autotune": True, "coordinate_descent_tuning": True}
    return options or None


# Plain functions, so that equal networks share one compilation.


def _predict(
    net: nn.Module, weights: dict[str, Tensor], images: Tensor, labels: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`weights` stand in for the network's own of the same names."""
    with autocast(images.device, dtype):
        logits = functional_call(net, weights, (images,)) if weights else net(images)
    return loss_and_errors(logits, labels)


def _record(counter: Tensor, loss: Tensor, wrong: Tensor, losses: Tensor, errors: Tensor) -> None:
    """Write what a step gave, of the batch or of each image, into its place in the logs, and count the step."""
    losses.index_copy_(0, counter, loss.to(losses.dtype).mean().view(1))
    errors.index_copy_(0, counter, wrong.sum(dtype=errors.dtype).view(1))
    counter.add_(1)
