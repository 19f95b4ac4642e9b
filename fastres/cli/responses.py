"""`fastres responses`: how strongly each layer of a network responds."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastres.cli import flags
from fastres.cli.flags import given, parse_channels
from fastres.files import check_figure


def responses(
    target: flags.Target,
    out: Annotated[Path | None, typer.Option(help="Draw a chart, too: .png or .svg.")] = None,
    arch: flags.Arch = None,
    dataset: flags.Dataset = None,
    data_dir: flags.DataDir = None,
    data_url: flags.DataUrls = None,
    mean: flags.ChannelMean = None,
    std: flags.ChannelStd = None,
    device: flags.Device = "auto",
    precision: Annotated[str, typer.Option(help=flags.PRECISIONS)] = "fp32",
    threads: Annotated[int | None, typer.Option(help=f"{flags.THREADS} [default: 0]")] = None,
    as_json: flags.Json = False,
) -> None:
    """Measure how strongly each layer responds (the paper's Figure 7).

    That is the standard deviation of each 3x3 layer's output, after batch norm and before ReLU or addition.
    """
    if out is not None:
        check_figure(out)
    from fastres.console import Console
    from fastres.evaluate import load_trained
    from fastres.reproduce import fig7
    from fastres.responses import layer_responses, table, to_dict

    say = Console("lines", stderr=True).say
    trained = load_trained(
        target,
        given(device=device, precision=precision, threads=threads, data_dir=data_dir, data_urls=data_url),
        arch=arch,
        dataset=dataset,
        mean=parse_channels("--mean", mean),
        std=parse_channels("--std", std),
        say=say,
    )
    measured = layer_responses(trained.net, trained.batches(), trained.runtime.dtype)
    if out is not None:
        fig7.draw_one(trained, measured, out)
        say(f"drawn: {out}")
    if as_json:
        print(json.dumps(to_dict(str(target), trained, measured)))
    else:
        print(table(trained, measured))
