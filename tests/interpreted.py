"""The GPU's kernels by Triton's interpreter, on the CPU: prints how far they are from float64. A process of its own:

Triton looks at TRITON_INTERPRET when it is imported. In float32, for it multiplies bfloat16 wrongly.
"""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastres.models.cifar import CifarNet, init_he_
from fastres.native import fusednet
from fastres.native.fusednet import FusedNet, Inference, Launches

CASES: dict[str, tuple[int, int, dict[str, Any]]] = {  # depth, images, and what else
    "ResNet": (8, 2, {}),
    "two blocks a stage": (14, 1, {"pad": "after"}),
    "PlainNet": (8, 3, {"residual": False}),
}


def far(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of what is exact."""
    return float((found.double() - exact).norm() / exact.norm())


def network(depth: int, how: dict[str, Any]) -> CifarNet:
    """With scales and shifts that are not all alike."""
    net: CifarNet = CifarNet(depth, **how).to(memory_format=torch.channels_last)
    init_he_(net, mode="fan_in", generator=torch.Generator().manual_seed(0))
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=chance))
    return net


def compared(depth: int, how: dict[str, Any], images: Tensor, grad: Tensor) -> Iterator[tuple[str, float]]:
    """How far maps, gradients and running statistics of one step are from float64."""
    net, exact = network(depth, how), network(depth, how).double()
    maps = exact.layer3(exact.layer2(exact.layer1(torch.relu(exact.bn1(exact.conv1(images.double()))))))
    maps.backward(grad.double())
    convs = {name: parameter for name, parameter in net.named_parameters() if parameter.ndim == 4}
    fused = FusedNet(net, {name: parameter.detach() for name, parameter in convs.items()}, len(images))
    yield "maps", far(fused.maps_of(images), maps.detach())
    fused.backward_from(grad)
    exact_grads = {name: parameter.grad for name, parameter in exact.named_parameters() if parameter.grad is not None}
    sizes = [parameter.numel() for parameter in convs.values()]
    for name, found in zip(convs, fused.weight_grads.split(sizes), strict=True):
        yield name, far(found, exact_grads[name].permute(0, 2, 3, 1).flatten())
    norms = [name for name in exact_grads if name not in convs]
    for name, found in zip(norms, fused.norm_grads.split([len(exact_grads[name]) for name in norms]), strict=True):
        yield name, far(found, exact_grads[name])
    for (name, found), wanted in zip(net.named_buffers(), exact.buffers(), strict=True):
        yield name, far(found, wanted)
    inference = Inference(net)
    inference._weights = {name: weight.float() for name, weight in inference._weights.items()}
    with torch.no_grad():
        yield "logits in evaluation mode", far(inference(images), exact.eval()(images.double()))


def lost() -> Iterator[str]:
    """Where a weight that is not finite leaves a result finite."""
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    images = images.contiguous(memory_format=torch.channels_last)
    for name in ("conv1.weight", "layer2.0.conv1.weight", "layer3.0.bn2.bias"):
        for value in (float("nan"), float("inf")):
            net = network(8, {})
            with torch.no_grad():
                weight = dict(net.named_parameters())[name]
                weight[(0,) * weight.ndim] = value
            weights = {name: parameter.detach() for name, parameter in net.named_parameters() if parameter.ndim == 4}
            inference = Inference(net)
            inference._weights = {name: weight.float() for name, weight in inference._weights.items()}
            for what, result in (
                ("training", FusedNet(net, weights, 1).maps_of(images)),
                ("logits", inference(images)),
            ):
                if result.isfinite().all():
                    yield f"{what}, {name}: {value}"


def main() -> None:
    """One JSON object: distances by case and what was compared, and what did not show."""
    results = {}
    usual = fusednet.LAUNCHES
    few = {width: Launches(*(how._replace(programs=3) for how in each)) for width, each in usual.items()}
    for label, (depth, batch_size, how) in CASES.items():
        fusednet.LAUNCHES = few if label == "PlainNet" else usual  # several tiles a program
        chance = torch.Generator().manual_seed(2)
        shapes = (batch_size, 3, 32, 32), (batch_size, 64, 8, 8)
        images, grad = (torch.randn(shape, generator=chance) for shape in shapes)
        images, grad = (x.contiguous(memory_format=torch.channels_last) for x in (images, grad))
        results[label] = dict(compared(depth, how, images, grad))
    print(json.dumps({"far": results, "lost": list(lost())}))


if __name__ == "__main__":
    main()
