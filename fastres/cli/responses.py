"""`fastres responses`: how strongly each layer of a network responds."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastres.cli.flags import given, parse_channels
from fastres.files import check_figure


def responses(
    target: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="A run folder, or a weights file.")],
    out: Annotated[Path | None, typer.Option(help="Draw them too, into this file: .png or .svg.")] = None,
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp16, auto; of the activations.")] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, the rest on stderr.")] = False,
) -> None:
    """Standard deviation of each 3x3 layer's output, after BN and before ReLU or addition (the paper's Figure 7)."""
    if out is not None:
        check_figure(out)
    from fastres.console import Console
    from fastres.evaluate import load_trained
    from fastres.reproduce import fig7
    from fastres.responses import layer_responses, table, to_dict

    say = Console("lines", stderr=True).say
    execution = given(
        device=device,
        precision=precision,
        data_dir=None if data_dir is None else str(data_dir),
        data_urls=data_url,
    )
    trained = load_trained(
        target,
        execution,
        arch=arch,
        dataset=dataset,
        mean=None if mean is None else parse_channels("--mean", mean),
        std=None if std is None else parse_channels("--std", std),
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
