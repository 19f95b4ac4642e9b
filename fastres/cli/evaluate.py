"""`fastres eval`: the test error of a run or of a weights file."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastres.cli.flags import given, parse_channels


def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="A run folder, or a weights file.")],
    arch: Annotated[
        str | None, typer.Option(help="resnet or plain, for a weights file that does not say (they look alike).")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="cifar10 or synthetic; default: what the run was trained on.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where CIFAR-10 is (or in FASTRES_DATA).")] = None,
    data_url: Annotated[list[str] | None, typer.Option(help="A mirror of cifar-10-binary.tar.gz; repeatable.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Per-channel mean 0-1 that other weights were trained with: 0.485,0.456,0.406.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Per-channel standard deviation, likewise.")] = None,
    test_set: Annotated[
        bool, typer.Option("--test-set", help="Of a run with --val-split: the test images, not the validation images.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16, fp16; default: the run's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, the rest on stderr.")] = False,
) -> None:
    """Test error and loss, in all and by class."""
    from fastres.console import Console
    from fastres.evaluate import evaluate_target, report

    execution = given(
        device=device,
        precision=precision,
        data_dir=None if data_dir is None else str(data_dir),
        data_urls=data_url,
    )
    outcome = evaluate_target(
        target,
        execution,
        arch=arch,
        dataset=dataset,
        mean=None if mean is None else parse_channels("--mean", mean),
        std=None if std is None else parse_channels("--std", std),
        test_set=test_set,
        say=Console("lines", stderr=True).say,
    )
    print(json.dumps(outcome.to_dict()) if as_json else report(outcome))
