"""Counts the kernels of one training step on an H200, without a GPU: Inductor lowers the step for it, nothing is run.

    scripts/count-kernels --depth 20,110

At batch 128 a step of these networks is bound by how many kernels it launches, so the count is what is guarded
(tests/test_kernels.py). Counted are Inductor's kernels, as its generated code launches them, and one for each call that
it leaves to a library: a convolution's forward, and the gradients of its input and its weight (one for the first layer,
whose input needs none); what cuDNN adds to split a reduction is not known without a GPU. Parts that are not compiled
count one kernel an operation.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("nodriver.c")
MULTIPROCESSORS = 132
LIBRARY_CALL = re.compile(r"(?:extern_kernels\.(\w+)|torch\.ops\.aten\.(\w+)\.\w+)\(")
KERNEL_LAUNCH = re.compile(r"^\s+(?:triton_\w+)\.run\(", re.MULTILINE)


@dataclass(frozen=True)
class Count:
    """Launches of one lowered function."""

    triton: int
    library: dict[str, int]  # launches by the library's function

    @property
    def launches(self) -> int:
        """In all."""
        return self.triton + sum(self.library.values())


def count_code(code: str) -> Count:
    """The launches in a wrapper that Inductor generated."""
    body = code[code.index("def call(") :]
    library = dict(collections.Counter(one or other for one, other in LIBRARY_CALL.findall(body)))
    if "convolution_backward" in library:
        library["convolution_backward"] *= 2  # of the input and of the weight; `whole_step` knows the first layer
    return Count(len(KERNEL_LAUNCH.findall(body)), library)


def main() -> None:
    """Count, in a process of its own that believes in a GPU."""
    parser = argparse.ArgumentParser(description="Kernels of a training step on an H200, counted without one")
    parser.add_argument("--depth", default="20,110")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--scope", choices=["whole", "blocks"], default="whole", help="what is compiled at once")
    parser.add_argument("--no-shadows", action="store_true", help="cast the weights in every step instead")
    parser.add_argument("--layer-kernels", action="store_true", help="of our own those with a launch a layer")
    parser.add_argument("--no-native", action="store_true", help="cuDNN's and Inductor's kernels instead of our own")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.layer_kernels and args.no_native:
        parser.error("--layer-kernels are of our own kernels, which --no-native leaves out")
    if args.inside:
        from benchmarks.lowering import whole_step

        for depth in args.depth.split(","):
            how = {"shadows": not args.no_shadows, "native": not args.no_native, "layer_kernels": args.layer_kernels}
            print(json.dumps(whole_step(int(depth), args.batch_size, args.scope, **how)))
        return
    for line in run_inside([arg for arg in sys.argv[1:] if arg != "--json"]):
        print(json.dumps(line) if args.json else _in_words(line))


def run_inside(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The counts, from a process whose CUDA libraries are `nodriver.c`'s.

    Raises:
        SystemExit: There is no C compiler, or the lowering fails (what it printed is in the message).
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        compiled = subprocess.run(
            ["gcc", "-shared", "-fPIC", "-w", "-o", library, SOURCE], capture_output=True, text=True
        )
        if compiled.returncode != 0:
            raise SystemExit(f"count-kernels: gcc cannot build {SOURCE.name}: {compiled.stderr}")
        environment = {**os.environ, "LD_LIBRARY_PATH": folder, "LD_PRELOAD": str(library)}
        environment |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "CUDA_VISIBLE_DEVICES": "0"}
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernels", "--inside", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"count-kernels: {done.stderr[-3000:]}")
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _in_words(count: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {number}" for name, number in count["parts"].items())
    return f"ResNet-{count['depth']}: {count['launches']} launches a step ({parts})"


if __name__ == "__main__":
    main()
