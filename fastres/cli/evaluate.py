"""`fastres eval`: the test error of a run or of a weights file."""

import json
from typing import Annotated

import typer

from fastres.cli import flags
from fastres.cli.flags import given, parse_channels


def evaluate(
    target: flags.Target,
    arch: flags.Arch = None,
    dataset: flags.Dataset = None,
    data_dir: flags.DataDir = None,
    data_url: flags.DataUrls = None,
    mean: flags.ChannelMean = None,
    std: flags.ChannelStd = None,
    test_set: Annotated[
        bool, typer.Option("--test-set", help="Of a run with --val-split: the test images, not the validation images.")
    ] = False,
    device: flags.Device = "auto",
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16, fp16; default: the run's.")] = None,
    as_json: flags.Json = False,
) -> None:
    """Test error and loss, in all and by class."""
    from fastres.console import Console
    from fastres.evaluate import evaluate_target, report

    outcome = evaluate_target(
        target,
        given(device=device, precision=precision, data_dir=data_dir, data_urls=data_url),
        arch=arch,
        dataset=dataset,
        mean=parse_channels("--mean", mean),
        std=parse_channels("--std", std),
        test_set=test_set,
        say=Console("lines", stderr=True).say,
    )
    print(json.dumps(outcome.to_dict()) if as_json else report(outcome))
