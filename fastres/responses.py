"""How strongly each layer of a network responds (paper, section 4.2, "Analysis of Layer Responses", and Figure 7)."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import InputError
from fastres.evaluate import Trained, bar, tested_images
from fastres.evaluator import evaluating
from fastres.models.imagenet import Network
from fastres.runtime import autocast, eager


@dataclass(frozen=True)
class Response:
    """A 3x3 layer, and the standard deviation of its output after BN and before ReLU or addition."""

    name: str  # of the convolution: layer1.0.conv2
    std: float  # over all images, channels and positions


@torch.no_grad()
def layer_responses(net: Network, batches: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Response]:
    """The responses of all 3x3 layers (6n+1 of a CIFAR network), in order, the first convolution included.

    One pass in evaluation mode; no activation is kept. Moments are taken in float64 and joined over the batches, so the
    result does not depend on their size beyond rounding. Mode, hooks and weights of `net` are afterwards as before.

    Args:
        net: On its device.
        batches: Images `(batch, 3, 32, 32)` on that device, and labels, which are not looked at.
        dtype: Precision of the activations, as in training; fp32 measures the network rather than its rounding.

    Raises:
        ValueError: There are no batches.
        InputError: A layer's output is NaN or Inf.
    """
    layers = _batch_norms(net)
    moments = [_Moments() for _ in layers]
    with evaluating(net), _watched(list(layers.values()), moments), eager():
        for images, _ in batches:
            with autocast(images.device, dtype):
                net(images)
    if moments[0].count == 0:
        raise ValueError("no batches to measure the responses on")
    stds = torch.stack([m.squares / m.count for m in moments]).sqrt().tolist()  # host sync: the one read
    for name, std in zip(layers, stds, strict=True):
        if not math.isfinite(std):
            raise InputError(f"the network answers with NaN or Inf: the output of {name} has no standard deviation")
    return [Response(name, std) for name, std in zip(layers, stds, strict=True)]


def _batch_norms(net: Network) -> dict[str, nn.Module]:
    """The batch norm behind every 3x3 convolution, by the convolution's name; what projects is 1x1."""
    convs = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
    return {name: net.get_submodule(name.replace("conv", "bn")) for name in convs}


@contextmanager
def _watched(layers: Sequence[nn.Module], moments: Sequence["_Moments"]) -> Iterator[None]:
    """Feed each layer's outputs to its moments, at once: ReLU and addition work in place on them."""
    handles = [
        layer.register_forward_hook(lambda _, __, output, m=m: m.add(output))
        for layer, m in zip(layers, moments, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Moments:
    """Mean and sum of squared deviations of a stream of values, on their device, in float64.

    Batches are joined by the formula of Chan, Golub and LeVeque (1983, https://doi.org/10.1080/00031305.1983.10483115):
    sums of plain squares would lose the spread of values far from zero.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        variance, mean = torch.var_mean(values.double(), correction=0)
        count = self.count + values.numel()
        share = values.numel() / count  # of the new values
        shift = mean - self.mean
        self.squares = self.squares + variance * values.numel() + shift**2 * (self.count * share)
        self.mean = self.mean + shift * share
        self.count = count


def to_dict(target: str, trained: Trained, responses: Sequence[Response]) -> dict[str, Any]:
    """JSON-ready: what was measured on what, and of each layer index (from 1), name and std."""
    images = trained.images
    return {
        "target": target,
        "model": trained.name,
        "step": trained.step,
        "precision": trained.runtime.precision,
        "responses": [{"index": i, "layer": r.name, "std": r.std} for i, r in enumerate(responses, 1)],
        "num_images": len(images.test_images),
        "data": images.test_facts(),
    }


def table(trained: Trained, responses: Sequence[Response]) -> str:
    """For people: a layer a line, with a bar as long as its response is strong."""
    width = max(len(response.name) for response in responses)
    largest = max(response.std for response in responses) or 1.0
    lines = [
        f"{trained.at_step}: std of each 3x3 layer's output after BN, before ReLU or addition",
        tested_images(trained.images),
    ]
    for i, r in enumerate(responses, 1):
        lines.append(f"{i:>4}  {r.name:<{width}}  {r.std:7.4f}  {bar(r.std / largest)}".rstrip())
    return "\n".join(lines)
