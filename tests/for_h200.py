# mypy: ignore-errors
"""Compiles the GPU's kernels for an H200, without one, and prints what each launch needs. A process of its own."""

import json
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from fastres.models.cifar import CifarNet
from fastres.native import fusednet

LIMITS = {"max_shared_mem": 232_448, "multiprocessor_count": 132}  # bytes; of one


def main() -> None:
    """A list of what was launched: kernel, and bytes of shared memory."""
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_device_interface=lambda: torch.cuda,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_current_stream=lambda *_: 0,
        is_active=lambda: True,
        utils=SimpleNamespace(get_device_properties=lambda _: LIMITS),
    )
    triton.runtime.driver.set_active(driver)
    launched = []

    run = triton.runtime.JITFunction.run

    def compile_only(kernel, *args, **how):
        compiled = run(kernel, *args, **how | {"warmup": True})
        launched.append({"kernel": kernel.fn.__name__, "shared": compiled.metadata.shared})

    triton.runtime.JITFunction.run = compile_only
    for depth, batch_size in ((20, 128), (8, 100)):
        net = CifarNet(depth).to(memory_format=torch.channels_last)
        weights = {name: p.detach().bfloat16() for name, p in net.named_parameters() if p.ndim == 4}
        fused = fusednet.FusedNet(net, weights, batch_size)
        images = torch.zeros(batch_size, 3, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        fused.backward_from(torch.zeros_like(fused.maps_of(images)))
        fusednet.Inference(net)(images)
    print(json.dumps(launched))


if __name__ == "__main__":
    main()
