# mypy: ignore-errors
# It puts other things into places that torch keeps to itself.
"""Lowers the parts of a training step for an H200 with fake tensors. Only inside `kernels.py`'s process.

Importing this module makes torch believe in a GPU for good.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels import MULTIPROCESSORS, count_code

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=MULTIPROCESSORS, total_memory=141 << 30, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65_536,
    shared_memory_per_block=49_152, shared_memory_per_block_optin=232_448, shared_memory_per_multiprocessor=233_472,
    L2_cache_size=60 << 20, clock_rate=1_980_000, memory_clock_rate=3_201_000, memory_bus_width=6144, uuid="none",
    gcnArchName="", is_integrated=False, is_multi_gpu_board=False,
)  # fmt: skip


def fake_gpu() -> None:
    """Answer every question that torch, Inductor and Triton ask of a GPU as an H200 would."""
    cuda = torch.cuda
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda._lazy_init = lambda: None
    cuda.get_device_properties = lambda *_: H200
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_name = lambda *_: H200.name
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.synchronize = lambda *_: None
    cuda.memory_allocated = lambda *_: 0
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda *_: None

    # Only now: some of these modules keep what they find in torch.cuda.
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.config as inductor
    import torch._subclasses.fake_tensor as fake_tensor
    import triton
    from torch._inductor import async_compile
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from triton.backends.compiler import GPUTarget

    limits = {"max_shared_mem": 232_448, "multiprocessor_count": MULTIPROCESSORS}
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_device_interface=lambda: torch.cuda,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        is_active=lambda: True,
        utils=SimpleNamespace(get_device_properties=lambda _: limits),
    )
    triton.runtime.driver.set_active(driver)

    interface = interfaces.CudaInterface
    interface.is_available = staticmethod(lambda: True)
    interface.get_compute_capability = staticmethod(lambda *_: 90)
    interface.current_device = interface.Worker.current_device = staticmethod(lambda: 0)
    interface.Worker.get_device_properties = staticmethod(lambda *_: H200)
    interface.get_raw_stream = staticmethod(lambda _: 0)
    interface.is_triton_capable = staticmethod(lambda *_: True)
    interface.raise_if_triton_unavailable = staticmethod(lambda *_: None)

    # Patterns that are matched with tensors made on the GPU; none of them occurs in these networks.
    fuse_attention._sfdp_init = misc_patterns._misc_patterns_init = pad_mm._pad_mm_init = lambda *_, **__: None

    async_compile.AsyncCompile.triton = lambda *_, **__: None  # the code is wanted, not the binary
    if hasattr(fake_tensor, "init_gpu_context"):
        fake_tensor.init_gpu_context = lambda *_: None
    inductor.compile_threads = 1
    inductor.joint_graph_constant_folding = False  # it would compute on the GPU

    # Without a driver ATen does not find cuDNN. What it says where it does: NHWC if either operand is.
    def memory_format(images: Tensor, weight: Tensor, _backend: object) -> torch.memory_format:
        last = torch.channels_last
        nhwc = any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (images, weight))
        return last if nhwc else torch.contiguous_format

    torch._C._select_conv_backend = lambda *_, **__: torch._C._ConvBackend.Cudnn
    torch._C._conv_determine_backend_memory_format = memory_format


def whole_step(
    depth: int, batch_size: int, scope: str, *, shadows: bool, native: bool, layer_kernels: bool
) -> dict[str, Any]:
    """The launches of one step of `step.Replica` in bf16, fed by the resident loader, by part.

    Args:
        depth: Of the ResNet.
        batch_size: Images.
        scope: "whole" or "blocks": what is compiled at once.
        shadows: bf16 copies of the convolutions' weights, or casts in every step.
        native: fastres' own kernels, or cuDNN and Inductor.
        layer_kernels: Of those the ones with a launch a layer.
    """
    fake_gpu()
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fastres import shadow, step
    from fastres.data import resident
    from fastres.models.cifar import CifarNet

    cuda, bf16, int64 = torch.device("cuda"), torch.bfloat16, torch.int64
    with torch.device("meta"):
        net = CifarNet(depth)
    with FakeTensorMode() as mode:
        _materialise(net, shadows=shadows)
        counter = torch.zeros(1, dtype=int64, device=cuda)
        images = torch.zeros(batch_size, 3, 32, 32, dtype=bf16, device=cuda).to(memory_format=torch.channels_last)
        labels = torch.zeros(batch_size, dtype=int64, device=cuda)
        plan = torch.zeros(768, batch_size, dtype=torch.int32, device=cuda)
        pixels = torch.zeros(50_000 * 1024, 3, dtype=torch.uint8, device=cuda)
        data = (pixels, torch.zeros(1024, 3, device=cuda), torch.zeros(50_000, dtype=int64, device=cuda))
        of = (batch_size,) if layer_kernels else ()
        log = (torch.zeros(of, device=cuda), torch.zeros(of, dtype=torch.int32, device=cuda))
        tables = (torch.zeros(64_000, device=cuda), torch.zeros(64_000, dtype=torch.int32, device=cuda))
        parts = {
            "load": lower(mode, resident._batch, counter, plan, *data, bf16, options=resident.ONE_KERNEL)["forward"],
            "log": lower(mode, step._record, counter, *log, *tables)["forward"],
        }
        options = step.compile_options(cuda, "default") or {}
        if native:
            parts |= _fused(mode, net, images, labels, options, layer_kernels=layer_kernels)
        elif scope == "whole":

            def predict(*batch: Tensor) -> Any:
                return step._predict(net, {}, *batch, bf16)

            parts |= lower(mode, predict, images, labels, net=net, options=options)
        else:
            parts |= _blocks(mode, net, batch_size, options)
        parts["backward"] -= 0 if native else 1  # the images need no gradient
        parameters = list(net.parameters())
        if shadows or native:
            convs = sum(p.numel() for p in parameters if p.ndim == 4)
            sizes = (convs, sum(p.numel() for p in parameters) - convs)
            head = [p.numel() for name, p in net.named_parameters() if name.startswith("fc.")]
            late = head if native and not layer_kernels else []  # autograd's, beside those that are in one piece
            masters, others = ([torch.zeros(n, device=cuda) for _ in range(3)] for n in sizes)
            grads = [torch.zeros(n, device=cuda) for n in (sizes[1] - sum(late), *late)]

            def update(*tensors: Tensor) -> None:
                (w, v, d, grad), (shadows, lrs, counter) = tensors[:4], tensors[7:10]
                weights, velocities, decay = tensors[4:7]
                pieces = (w, v, (grad,), d), (weights, velocities, tensors[10:], decay)
                shadow._update(*pieces, shadows, lrs, counter, 0.9)

            grad, bf16s = (torch.zeros(convs, dtype=bf16, device=cuda) for _ in range(2))
            flat = (*masters, grad, *others, bf16s, tables[0], counter, *grads)
            parts["update"] = lower(mode, update, *flat, options={"combo_kernels": True})["forward"]
            if not native:
                parts["update"] += sum(-(-count // 128) for count in _kinds(parameters))  # torch.cat: 128 a launch
        else:
            parts["update"] = 2 + -(-len(parameters) // 48)  # the rate, looked up and stored; the fused SGD's pieces
    how = {"depth": depth, "scope": scope, "shadows": shadows, "native": native, "layer_kernels": layer_kernels}
    return {**how, "launches": sum(parts.values()), "parts": parts}


def _kinds(parameters: list[nn.Parameter]) -> tuple[int, int]:
    convs = sum(p.ndim == 4 for p in parameters)
    return convs, len(parameters) - convs


def _materialise(net: nn.Module, *, shadows: bool) -> None:
    """Fake tensors on the GPU in the place of a meta network's."""
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = torch.zeros(parameter.shape, device="cuda")
                if value.ndim == 4:
                    value = value.to(memory_format=torch.channels_last)
                    value = value.to(torch.bfloat16) if shadows else value
                module._parameters[name] = nn.Parameter(value)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, device="cuda")


def _fused(mode: Any, net: Any, images: Tensor, labels: Tensor, options: Any, *, layer_kernels: bool) -> dict[str, int]:
    """fastres' own kernels, and what is compiled behind them where that is not theirs too."""
    from fastres.models.cifar import predict_maps
    from fastres.native import fusednet, layernet

    count = [0]

    def launch(*_: Any) -> None:
        count[0] += 1

    fusednet._launch = layernet.launch = launch
    layernet.compile_for = lambda *_: None  # NVRTC asks the driver for more than the double of it knows
    weights = {name: parameter.detach() for name, parameter in net.named_parameters() if parameter.ndim == 4}
    if layer_kernels:
        layers = layernet.LayerNet(net, weights, len(images))
        losses, _ = layers.forward(images, labels)
        forward, count[0] = count[0], 0
        layers.backward(losses)
        return {"forward": forward, "backward": count[0]}
    fused = fusednet.FusedNet(net, weights, len(images))
    maps = fused.maps_of(images)
    forward, count[0] = count[0], 0
    fused.backward_from(torch.zeros_like(maps))
    head = lower(
        mode,
        predict_maps,
        maps.permute(0, 2, 3, 1).requires_grad_(),
        net.fc.weight,
        net.fc.bias,
        labels,
        options=options,
    )
    return {"forward": forward + head["forward"], "backward": count[0] + head["backward"]}


def _blocks(mode: Any, net: Any, batch_size: int, options: Any) -> dict[str, int]:
    """Each residual block compiled alone; the first layer, the head and the loss launched operation by operation."""
    # conv, bn, relu; cast, mean, addmm, log_softmax, nll_loss, argmax, ne, sum, and the two casts of the first layer
    forward = 13
    # nll_loss, log_softmax, mm twice, sum, mean, cast; relu, bn, conv's two, and a cast
    backward = 12
    known: dict[Any, dict[str, int]] = {}
    side = 32
    for stage in (net.layer1, net.layer2, net.layer3):
        for block in stage:
            shape = (batch_size, block.conv1.in_channels, side, side)
            side //= block.stride
            kind = (shape, block.stride)
            if kind not in known:
                inputs = torch.zeros(shape, dtype=torch.bfloat16, device="cuda").to(memory_format=torch.channels_last)

                def run(x: Tensor, block: nn.Module = block) -> Tensor:
                    with torch.autocast("cuda", torch.bfloat16):
                        return block(x)

                known[kind] = lower(mode, run, inputs.requires_grad_(), net=block, options=options)
            forward += known[kind]["forward"]
            backward += known[kind]["backward"]
    return {"forward": forward, "backward": backward}


def lower(
    mode: Any, function: Callable[..., Any], *inputs: Any, net: nn.Module | None = None, options: Any = None
) -> dict[str, int]:
    """Lower a function as `torch.compile` would; the launches of "forward" and, for a network, of "backward".

    Args:
        mode: Of the fake tensors.
        function: Of tensors; what else it takes comes last.
        inputs: What it takes.
        net: The network that it runs: its parameters need gradients.
        options: Inductor's.
    """
    import torch._inductor.config as inductor
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.compile_fx import joint_graph_passes
    from torch._inductor.decomposition import select_decomp_table

    tensors = [value for value in inputs if isinstance(value, Tensor)]
    others = inputs[len(tensors) :]
    launches: dict[str, int] = {}
    backwards: list[Any] = []

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, *tensors: Tensor) -> Any:
            result = function(*tensors, *others)
            return result if isinstance(result, tuple) else () if result is None else (result,)

    def compiler(which: str) -> Callable[..., Any]:
        def compile_(graph: Any, examples: Any) -> Any:
            launches[which] = count_code(_code(mode, graph, examples, backward=which == "backward")).launches
            return lambda *_: None

        return compile_

    def partition(graph: Any, joint_inputs: Any, **how: Any) -> Any:
        joint_graph_passes(graph)
        forward, backward = min_cut_rematerialization_partition(graph, joint_inputs, compiler="inductor", **how)
        backwards.append(backward)
        return forward, backward

    with inductor.patch(options or {}):
        aot_module_simplified(
            Module(),
            tensors,
            fw_compiler=compiler("forward"),
            bw_compiler=compiler("backward"),
            partition_fn=partition,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )
        if backwards and "backward" not in launches:  # it would be compiled at the first backward
            placeholders = [node.meta["val"] for node in backwards[0].graph.nodes if node.op == "placeholder"]
            compiler("backward")(backwards[0], placeholders)
    return launches


def _code(mode: Any, graph: Any, examples: Any, *, backward: bool) -> str:
    """Inductor's code for a graph."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        view_to_reshape(graph)
        post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(
            graph, example_inputs=examples, is_inference=False, is_backward=backward, shape_env=None
        )
        with V.set_graph_handler(lowering):
            lowering.run(*examples)
            code = lowering.codegen()[0]
    return code if isinstance(code, str) else code.value
