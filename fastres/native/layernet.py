"""A CIFAR network in training on a GPU by the kernels of `native/cuda`: a launch a layer each way.

`fusednet.py` has two. At batch 128 the maps of a layer are a few megabytes: a launch and another pass over them cost as
much as the convolution itself.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastres.models.cifar import CifarNet, logits_of
from fastres.native.fusednet import Layer, check_images, layers_of, new_maps, sum_table
from fastres.native.gpu_layers import LANES, MAX_CLASSES, MAX_LAYERS, SUM_THREADS, Kind, compile_for, launch

SHARED = 147_456  # bytes that a program shares, the most that one kernel takes; an A100 has them
MAX_SHARES = 64  # of a layer's gradient of weights
IMAGE_US, BYTES_A_US = 1.2, 3e6  # estimates for an H200, not measured: an image in `weight_grads`, and its memory


def programs_for(batch_size: int, processors: int) -> int:
    """Programs (thread blocks) with the same number of images each, planned as one a multiprocessor at once."""
    choices = [n for n in range(1, min(batch_size, 2 * processors) + 1) if batch_size % n == 0]
    return min(choices, key=lambda n: (-(-n // processors) * (batch_size // n), n))


def splits_evenly(batch_size: int, processors: int) -> bool:
    """Whether a batch can be shared out without leaving most of a GPU idle."""
    programs = programs_for(batch_size, processors)
    return -(-programs // processors) * (batch_size // programs) <= 2 * -(-batch_size // processors)


def shares_for(num_layers: int, size: int, batch_size: int, processors: int) -> int:
    """In how many shares to make the gradients of some layers' weights, `size` each: the quickest by an estimate."""

    def microseconds(shares: int) -> float:
        waves, images = -(-num_layers * shares // processors), -(-batch_size // shares)
        return waves * (images + 1) * IMAGE_US + num_layers * shares * size * 8 / BYTES_A_US

    return min(range(1, min(batch_size, MAX_SHARES) + 1), key=microseconds)


def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; where there is none, an H200's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def kind_of(layer: Layer) -> Kind:
    """For which the kernels are compiled."""
    return Kind(
        layer.side, layer.stride, 16 if layer.is_stem else layer.in_channels, layer.out_channels, int(layer.is_stem)
    )


class _Pass:
    """The launches of a pass forwards.

    Attributes:
        maps: By layer, its convolution's result. In evaluation only of the last ones, as `outs`.
        outs: By layer, what came of it.
        kept: By layer, what is kept of its norm.
    """

    def __init__(self, layers: list[Layer], images: Tensor, programs: int, *, training: bool) -> None:
        self.maps: dict[int, Tensor] = {}
        self.outs: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}
        self._layers, self._programs, self._training = layers, programs, training
        self._images = len(images) // programs
        self._shares: dict[int, Tensor] = {}  # of the statistics of a layer's maps
        for k, layer in enumerate(layers):
            maps, shares = (
                new_maps(images, layer.out_channels, layer.side),
                _floats(images, programs, 2, layer.out_channels),
            )
            given, numbers = self._norm(k - 1) if k else self._no_norm(images)
            launch("forward_layer", kind_of(layer), programs, *given, layer.weight, maps, shares, *numbers)
            self.maps[k], self._shares[k] = maps, shares
            if not training:  # the next norm may add what came of the layer before the last
                self.maps.pop(k - 1, None)
                self.outs.pop(k - 3, None)

    def end(self) -> Tensor:
        """What came of the last layer, in evaluation."""
        last = len(self._layers) - 1
        (maps, _, add, *weights, out, _), (_, _, images, channels, pad, eps, _) = self._norm(last)
        given = maps, add, *weights, out, images, channels, pad, eps
        launch("norm_forward", kind_of(self._layers[last]), self._programs, *given)
        return self.outs[last]

    def judge(self, fc: nn.Linear, labels: Tensor, pooled: Tensor, grad_logits: Tensor) -> tuple[Tensor, ...]:
        """From the last convolution on, and back to it: losses, wrong answers, what `LayerNet.backward` begins with.

        Args:
            fc: The last layer.
            labels: int64 `(batch,)`.
            pooled, grad_logits: float32 `(batch, channels)` and `(batch, classes)`: become the means of the last maps,
                and the gradients of the logits.
        """
        last, batch_size = len(self._layers) - 1, len(labels)
        (*given, out, kept), numbers = self._norm(last)
        shares = _floats(out, self._programs, 2, self._layers[last].out_channels)
        losses, wrong = _floats(out, batch_size), labels.new_empty(batch_size, dtype=torch.int32)
        launch(
            "head", kind_of(self._layers[last]), self._programs, *given, kept, fc.weight, fc.bias, labels,
            out, shares, pooled, grad_logits, losses, wrong, *numbers, fc.out_features,
        )  # fmt: skip
        return losses, wrong, out, shares

    def _no_norm(self, images: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return (images, *(None,) * 8), (0, 0, self._images, 0, 0, 0.0, 0.0)

    def _norm(self, k: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What kernels take of a layer's norm: addresses, and numbers."""
        layer, maps = self._layers[k], self.maps[k]
        add = self.outs[layer.shortcut_from] if layer.shortcut_from >= 0 else None
        out, kept, norm = torch.empty_like(maps), _floats(maps, 4, layer.out_channels), layer.norm
        self.outs[k], self.kept[k] = out, kept
        given = (maps, self._shares[k], add, norm.weight, norm.bias, norm.running_mean, norm.running_var, out, kept)
        shares, channels = self._programs if self._training else 0, 0 if add is None else add.shape[1]
        return given, (
            shares, layer.pixels // self._programs, self._images, channels, layer.pad, norm.eps, norm.momentum,
        )  # fmt: skip


class LayerNet:
    """Training passes of a network on batches of one size.

    Args:
        net: On a GPU, one of the paper's; its running statistics move.
        weights: bfloat16, of the convolutions, by parameter name, channels last; read in each pass.
        batch_size: Images.

    Raises:
        ValueError: More classes than the kernels take.

    Attributes:
        weight_grads: float32: of all convolutions, one after the other, as they lie in memory.
        other_grads: float32: of scale and shift of all norms, then of weight and bias of the last layer.
    """

    def __init__(self, net: nn.Module, weights: Mapping[str, Tensor], batch_size: int) -> None:
        assert isinstance(net, CifarNet)
        self.fc, device = net.fc, net.fc.weight.device
        if self.fc.out_features > MAX_CLASSES:
            raise ValueError(f"{self.fc.out_features} classes; these kernels take {MAX_CLASSES} at most")
        processors = processors_of(device)
        self.batch_size, self._programs = batch_size, programs_for(batch_size, processors)
        self.layers = layers_of(net, weights, batch_size)
        sizes = [layer.weight.numel() for layer in self.layers]
        self.weight_grads = torch.zeros(sum(sizes), device=device)
        norms = [layer.out_channels for layer in self.layers for _ in range(2)]
        others = [*norms, self.fc.weight.numel() + self.fc.bias.numel()]
        self.other_grads = torch.zeros(sum(others), device=device)
        self._other_grads: Sequence[Tensor] = torch.split(self.other_grads, others)
        self._pooled = torch.zeros(batch_size, self.fc.in_features, device=device)
        self._grad_logits = torch.zeros(batch_size, self.fc.out_features, device=device)
        kinds = defaultdict(list)
        for k, layer in enumerate(self.layers):
            kinds[kind_of(layer)].append(k)
        compile_for(kinds, device)
        # Layers whose weights' gradients are made by one launch, by the first, whose maps' gradient comes last.
        self._groups = {
            some[at]: some[at : at + MAX_LAYERS] for some in kinds.values() for at in range(0, len(some), MAX_LAYERS)
        }
        self._num_shares = [0] * len(sizes)
        for group in self._groups.values():
            shares = shares_for(len(group), sizes[group[0]], batch_size, processors)
            for k in group:
                self._num_shares[k] = shares
        counts, table = sum_table(sizes, self._num_shares, SUM_THREADS)
        self._weight_shares: Sequence[Tensor] = torch.split(torch.zeros(sum(counts), device=device), counts)
        self._table = table.to(device)
        self._images: Tensor | None = None
        self._pass: _Pass | None = None
        self._ends: tuple[Tensor, Tensor] | None = None  # the last layer's gradient, and its norm's shares

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each image, float32 `(batch,)`, and whether its answer is wrong, int32 `(batch,)`.

        Args:
            images: bfloat16 `(batch, 3, 32, 32)`, channels last.
            labels: int64 `(batch,)`.

        Raises:
            ValueError: Images of another number, shape, dtype, layout or device.
        """
        check_images(images, self.layers[0].weight, self.batch_size)
        self._images, self._pass = images, _Pass(self.layers, images, self._programs, training=True)
        losses, wrong, grad, shares = self._pass.judge(self.fc, labels, self._pooled, self._grad_logits)
        self._ends = grad, shares
        return losses, wrong

    @property
    def grads(self) -> tuple[Tensor, Tensor]:
        """`weight_grads` and `other_grads`."""
        return self.weight_grads, self.other_grads

    @torch.no_grad()
    def backward(self, loss: Tensor) -> None:  # noqa: ARG002 (the kernels have its gradient)
        """Fill `weight_grads` and `other_grads`, by the mean of what `forward` gave, which must be the last call."""
        assert self._pass is not None
        assert self._ends is not None
        maps, outs, kept = self._pass.maps, self._pass.outs, self._pass.kept
        programs, images, last = self._programs, self.batch_size // self._programs, len(self.layers) - 1
        grad, shares = self._ends
        grads = {last: grad}  # of layers' results, zero where their ReLU was
        grad_maps = {}  # of their convolutions' results
        norm_grads = self._other_grads  # scale, shift
        for k in range(last, -1, -1):
            layer, kind, grad_maps[k] = self.layers[k], kind_of(self.layers[k]), torch.empty_like(maps[k])
            given = (grads[k], maps[k], kept[k], shares, norm_grads[2 * k + 1], norm_grads[2 * k], grad_maps[k])
            if k == 0:
                launch("norm_backward", kind, programs, *given, programs, layer.pixels, images)
            else:
                below, end = self.layers[k - 1], layer.shortcut_to
                grads[k - 1], shares = torch.empty_like(outs[k - 1]), _floats(grad, programs, 2, below.out_channels)
                launch(
                    "backward_layer", kind, programs, *given,
                    layer.weight, maps[k - 1], kept[k - 1], outs[k - 1] if below.shortcut_from >= 0 else None,
                    grads[end] if end >= 0 else None, grads[k - 1], shares,
                    programs, layer.pixels, images, self.layers[end].pad if end >= 0 else 0,
                )  # fmt: skip
            if group := self._groups.get(k):
                sources = [outs.pop(j - 1) if j else self._images for j in group]
                tensors = [grad_maps.pop(j) for j in group], sources, [self._weight_shares[j] for j in group]
                launch("weight_grads", kind, (self._num_shares[k], len(group)), tensors, self.batch_size)
            del maps[k]  # memory that the layers below can use
            grads.pop(k + 1, None)
        first, *_ = self._weight_shares
        launch("sum_weight_shares", kind_of(self.layers[0]), len(self._table), first, self._table, self.weight_grads)
        results, classes = self._other_grads[-1], self.fc.out_features
        programs = -(-len(results) // LANES)
        launch(
            "head_grads", kind_of(self.layers[-1]), programs,
            self._pooled, self._grad_logits, results, self.batch_size, classes,
        )  # fmt: skip
        self._images = self._pass = self._ends = None


class LayerInference:
    """A network in evaluation mode by the same kernels.

    Args:
        net: One of the paper's (`fusednet.is_paper_net`); weights and running statistics are read in each call.
    """

    def __init__(self, net: nn.Module) -> None:
        assert isinstance(net, CifarNet)
        self.net = net
        self._masters = {name: p for name, p in net.named_parameters() if p.ndim == 4}
        self._weights = {name: p.detach().bfloat16() for name, p in self._masters.items()}
        self._layers: dict[int, list[Layer]] = {}  # by the number of images

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images `(batch, 3, 32, 32)`, bfloat16 and channels last -> float32 logits `(batch, classes)`."""
        check_images(images, self._weights["conv1.weight"])
        torch._foreach_copy_(list(self._weights.values()), list(self._masters.values()))
        if len(images) not in self._layers:
            self._layers[len(images)] = layers_of(self.net, self._weights, len(images))
            compile_for({kind_of(layer) for layer in self._layers[len(images)]}, images.device)
        # No shares are summed, so there may be as many as fit at once: two a multiprocessor at 32 and 64 channels.
        programs = programs_for(len(images), 2 * processors_of(images.device))
        passed = _Pass(self._layers[len(images)], images, programs, training=False)
        return logits_of(passed.end(), self.net.fc)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
