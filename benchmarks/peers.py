"""Other people's trainers, run unmodified and timed, with fastres before and after on the same machine.

    python -m benchmarks.peers path/to/pytorch_resnet_cifar10 --data-dir path/to/cifar-10-batches-bin --depth 20

For a clone of https://github.com/akamaster/pytorch_resnet_cifar10 or of
https://github.com/flukeskywalker/highway-resnet-comparison. Both call `.cuda()`, so this needs a GPU. Their code runs
as it is, in a scratch folder that holds CIFAR-10 where torchvision looks for it; torchvision's check of the MD5 is off,
since the data that fastres was pointed to need not be the official files. What they print is read for two things: how
fast they are, and that their loss falls, so that the work is the same.
"""

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

NUM_TRAIN, BATCH_SIZE = 50_000, 128
LAUNCHER = """
import runpy, sys
import torchvision.datasets.cifar as cifar
cifar.CIFAR10._check_integrity = lambda self: True
cifar.check_integrity = lambda *_: True
sys.path.insert(0, sys.argv[1])
script = sys.argv[1] + "/trainer.py"
sys.argv = [script, *sys.argv[2:]]
runpy.run_path(script, run_name="__main__")
"""


@dataclass(frozen=True)
class Peer:
    """A trainer that is known: how it is called, and what its lines mean."""

    name: str
    mark: str  # stands in its trainer.py, and in no other's
    arguments: tuple[str, ...]
    line: re.Pattern[str]  # groups: step or epoch, loss, and seconds where it says them


PEERS = (
    Peer(
        "akamaster/pytorch_resnet_cifar10",
        "Propert ResNets for CIFAR10 in pytorch",
        ("--arch=resnet{depth}", "--epochs=1", "--print-freq=20"),
        re.compile(r"Epoch: \[0\]\[(?P<count>\d+)/\d+\].*Loss (?P<loss>[\d.]+|nan) "),
    ),
    Peer(
        "flukeskywalker/highway-resnet-comparison",
        "ResNet/Highway110 for CIFAR10 in pytorch",
        ("--arch=resnet{depth}", "--amp", "--epochs=4"),
        re.compile(r"epoch +(?P<count>\d+) \| train loss: (?P<loss>[\d.]+|nan) .*train time: (?P<seconds>[\d.]+)"),
    ),
)


@dataclass(frozen=True)
class Seen:
    """What a peer said of itself."""

    rates: list[float]  # images a second
    losses: list[float]


def peer_at(checkout: Path) -> Peer:
    """Which trainer a folder holds. Ends the program where it is none that is known."""
    script = checkout / "trainer.py"
    text = script.read_text(encoding="utf-8", errors="replace") if script.is_file() else ""
    for peer in PEERS:
        if peer.mark in text:
            return peer
    raise SystemExit(f"peers: {checkout} is no clone of {' or '.join(p.name for p in PEERS)}")


def run_peer(peer: Peer, checkout: Path, scratch: Path, depth: int) -> Seen:
    """Run it to its own end, and read its lines as they come."""
    arguments = [argument.format(depth=depth) for argument in peer.arguments]
    command = [sys.executable, "-u", "-c", LAUNCHER, str(checkout.resolve()), *arguments]
    process = subprocess.Popen(command, cwd=scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    with process.stdout:
        seen = read_lines(peer, process.stdout)
    if process.wait() != 0 or not seen.rates:
        raise SystemExit(f"peers: {peer.name} ended with {process.returncode} and {len(seen.rates)} timed lines")
    return seen


def read_lines(peer: Peer, lines: Iterator[str]) -> Seen:
    """Rates from the peer's own seconds where it prints them, else from when its lines arrive; not the first one."""
    rates, losses = list[float](), list[float]()
    before: tuple[int, float] | None = None
    for text in lines:
        now = perf_counter()
        match = peer.line.search(text)
        if not match:
            print(text, end="", file=sys.stderr)
            continue
        count = int(match["count"])
        losses.append(float(match["loss"]))
        if before is not None and "seconds" in match.groupdict():
            rates.append(NUM_TRAIN / float(match["seconds"]))
        elif before is not None and before[0] > 0:  # not from its first line, before which cuDNN makes its choices
            rates.append((count - before[0]) * BATCH_SIZE / (now - before[1]))
        before = (count, now)
    return Seen(rates, losses)


def write_python_layout(images: Any, folder: Path) -> None:
    """CIFAR-10 as torchvision reads it: five training batches, a test batch and the names."""
    target = folder / "data" / "cifar-10-batches-py"
    target.mkdir(parents=True)
    pixels = images.train_images.transpose(0, 3, 1, 2).reshape(5, -1, 3072)
    labels = images.train_labels.reshape(5, -1)
    batches = {f"data_batch_{k + 1}": (pixels[k], labels[k]) for k in range(5)}
    batches["test_batch"] = (images.test_images.transpose(0, 3, 1, 2).reshape(-1, 3072), images.test_labels)
    for name, (data, which) in batches.items():
        content = {"data": np.ascontiguousarray(data), "labels": which.tolist()}
        (target / name).write_bytes(pickle.dumps(content))
    (target / "batches.meta").write_bytes(pickle.dumps({"label_names": list(images.class_names)}))


def fastres_rate(depth: int, seconds: float) -> dict[str, Any]:
    """One cell of `fastres bench`: the training step with its loader."""
    command = [sys.executable, "-m", "fastres", "bench", "--depth", str(depth), "--device", "cuda"]
    command += ["--loader", "dali,resident", "--seconds", str(seconds), "--json", "-"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ))
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def main() -> None:
    """fastres, the peer, fastres; one JSON object."""
    parser = argparse.ArgumentParser(description="Time another trainer, unmodified, with fastres before and after")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10.0, help="of fastres, each time")
    args = parser.parse_args()
    peer = peer_at(args.checkout)

    import torch

    if not torch.cuda.is_available():
        print("peers: these trainers call .cuda(), and torch finds no GPU", file=sys.stderr)
        raise SystemExit(3)
    from fastres.data.cifar import load_cifar10

    with tempfile.TemporaryDirectory() as scratch:
        write_python_layout(load_cifar10(args.data_dir, say=lambda _: None), Path(scratch))
        before = fastres_rate(args.depth, args.seconds)
        seen = run_peer(peer, args.checkout, Path(scratch), args.depth)
        after = fastres_rate(args.depth, args.seconds)
    ours = [max(cell["images_per_second"] for cell in report["cells"]) for report in (before, after)]
    theirs = median(seen.rates)
    print(
        json.dumps(
            {
                "peer": peer.name,
                "depth": args.depth,
                "peer_images_per_second": theirs,
                "peer_rates": seen.rates,
                "peer_losses": seen.losses,
                "loss_falls": seen.losses[-1] < seen.losses[0],
                "fastres_images_per_second": ours,
                "ratio": min(ours) / theirs,
                "environment": before["environment"],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
