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
        bool,
        typer.Option(
            "--test-set", help="Test a run with --val-split on the test images, not on its validation images."
        ),
    ] = False,
    device: flags.Device = "auto",
    precision: Annotated[str | None, typer.Option(help=f"{flags.PRECISIONS} [default: the run's setting]")] = None,
    threads: Annotated[int | None, typer.Option(help=f"{flags.THREADS} [default: 0]")] = None,
    as_json: flags.Json = False,
) -> None:
    """Test error and loss, overall and per class."""
    from fastres.console import Console
    from fastres.evaluate import load_trained, report, score

    trained = load_trained(
        target,
        given(device=device, precision=precision, threads=threads, data_dir=data_dir, data_urls=data_url),
        arch=arch,
        dataset=dataset,
        mean=parse_channels("--mean", mean),
        std=parse_channels("--std", std),
        test_set=test_set,
        say=Console("lines", stderr=True).say,
    )
    outcome = score(trained, target)
    print(json.dumps(outcome.to_dict()) if as_json else report(outcome))
