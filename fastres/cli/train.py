"""`fastres train`: flags to a config, and one call."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastres.cli.flags import (
    based_on_preset,
    given,
    in_steps,
    parse_milestones,
    parse_model,
    parse_seeds,
    read_toml,
    refuse_both,
)
from fastres.clock import Clocks
from fastres.config import RunConfig, check_sense, with_dependent_defaults
from fastres.configtree import merge
from fastres.errors import InputError

MODEL, RECIPE, DATA, EXECUTION, OUTPUT = "Model", "Recipe", "Data", "How it runs", "What is kept and shown"


def train(
    depth: Annotated[
        int | None,
        typer.Option(
            help="Layers, 6n+2: 20 (default), 32, 44, 56, 110, 1202; imagenet: 18 to 152.", rich_help_panel=MODEL
        ),
    ] = None,
    arch: Annotated[str | None, typer.Option(help="resnet, plain or imagenet.", rich_help_panel=MODEL)] = None,
    model: Annotated[
        str | None,
        typer.Option(help="--arch and --depth in one: ResNet20, PlainNet56, ImageNetResNet18.", rich_help_panel=MODEL),
    ] = None,
    shortcut: Annotated[
        str | None, typer.Option(help="A: identity, zero-padded (the paper's); B: projection.", rich_help_panel=MODEL)
    ] = None,
    pad: Annotated[
        str | None,
        typer.Option(help="Option A's zero channels: both (half before, half after) or after.", rich_help_panel=MODEL),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="He initialisation by fan_in (default) or fan_out.", rich_help_panel=MODEL)
    ] = None,
    norm_batch: Annotated[
        int | None,
        typer.Option(help="Images per BN statistic: 64 as on two GPUs; 0: the batch.", rich_help_panel=MODEL),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="paper: 64k steps (default); fast: ten epochs; smoke: built-in data, a minute on two cores.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps (default 64,000).", rich_help_panel=RECIPE)] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Their number in passes over the data.", rich_help_panel=RECIPE)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per step (default 128).", rich_help_panel=RECIPE)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate (default 0.1).", rich_help_panel=RECIPE)] = None,
    schedule: Annotated[str | None, typer.Option(help="step or linear.", rich_help_panel=RECIPE)] = None,
    milestones: Annotated[
        str | None, typer.Option(help="Steps at which lr falls: 32000,48000.", rich_help_panel=RECIPE)
    ] = None,
    warmup: Annotated[
        str | None,
        typer.Option(
            help="none; constant: lr 0.01 for --warmup-steps; error: until training error < 80 %; ramp.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Length of the warm-up (default 400).", rich_help_panel=RECIPE)
    ] = None,
    warmup_epochs: Annotated[float | None, typer.Option(help="Its length in epochs.", rich_help_panel=RECIPE)] = None,
    momentum: Annotated[float | None, typer.Option(help="Of SGD (default 0.9).", rich_help_panel=RECIPE)] = None,
    lr_in_velocity: Annotated[
        bool | None,
        typer.Option(
            "--lr-in-velocity/--no-lr-in-velocity",
            help="lr inside the velocity, as in Caffe; not PyTorch's way.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default 1e-4.", rich_help_panel=RECIPE)] = None,
    weight_decay_on: Annotated[
        str | None,
        typer.Option(help="all parameters (default), or weights: not of BN, not biases.", rich_help_panel=RECIPE),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of initial weights, order, crops and flips (default 0).", rich_help_panel=RECIPE)
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Several runs: 5 (seeds 0 to 4), 2-4, 1,3; on a GPU side by side.", rich_help_panel=RECIPE),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="cifar10, or synthetic (built in).", rich_help_panel=DATA)] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where CIFAR-10 is (or in FASTRES_DATA).", rich_help_panel=DATA)
    ] = None,
    data_url: Annotated[
        list[str] | None, typer.Option(help="A mirror of cifar-10-binary.tar.gz; repeatable.", rich_help_panel=DATA)
    ] = None,
    val_split: Annotated[
        bool | None,
        typer.Option("--val-split/--no-val-split", help="Train on 45k, test on the other 5k.", rich_help_panel=DATA),
    ] = None,
    augment: Annotated[
        bool | None, typer.Option("--augment/--no-augment", help="Random crop and flip.", rich_help_panel=DATA)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:0.", rich_help_panel=EXECUTION)] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, fp32, tf32, bf16 or fp16.", rich_help_panel=EXECUTION)
    ] = None,
    amp: Annotated[
        bool | None, typer.Option("--amp", help="Short for --precision auto.", rich_help_panel=EXECUTION)
    ] = None,
    no_amp: Annotated[
        bool | None, typer.Option("--no-amp", help="Short for --precision fp32.", rich_help_panel=EXECUTION)
    ] = None,
    loader: Annotated[str | None, typer.Option(help="auto, resident or dali.", rich_help_panel=EXECUTION)] = None,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile (default: on a GPU).", rich_help_panel=EXECUTION),
    ] = None,
    compile_scope: Annotated[
        str | None,
        typer.Option(
            help="whole network (fewest kernels), blocks (quickest start) or auto.", rich_help_panel=EXECUTION
        ),
    ] = None,
    compile_mode: Annotated[
        str | None,
        typer.Option(
            help="default, plain (Inductor's own), or max-autotune (kernels chosen by timing).",
            rich_help_panel=EXECUTION,
        ),
    ] = None,
    cuda_graph: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graph/--no-cuda-graph",
            help="A step as one captured graph (default: on a GPU).",
            rich_help_panel=EXECUTION,
        ),
    ] = None,
    graph_steps: Annotated[
        int | None, typer.Option(help="Steps per graph (default 1).", rich_help_panel=EXECUTION)
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic/--no-deterministic",
            help="The same bits each time on a GPU too.",
            rich_help_panel=EXECUTION,
        ),
    ] = None,
    shadow_weights: Annotated[
        bool | None,
        typer.Option(
            "--shadow-weights/--no-shadow-weights",
            help="bf16 copies of the weights, kept by the update (default: bf16 on a GPU).",
            rich_help_panel=EXECUTION,
        ),
    ] = None,
    native: Annotated[
        bool | None,
        typer.Option(
            "--native/--no-native",
            help="fastres' own kernels (default: bf16 on a GPU; a CPU with g++ to build them).",
            rich_help_panel=EXECUTION,
        ),
    ] = None,
    layer_kernels: Annotated[
        bool | None,
        typer.Option(
            "--layer-kernels/--no-layer-kernels",
            help="On a GPU, CUDA C++ kernels with one launch per layer instead of Triton (off; not measured).",
            rich_help_panel=EXECUTION,
        ),
    ] = None,
    channels_last: Annotated[
        bool | None,
        typer.Option(
            "--channels-last/--no-channels-last", help="Memory format (default: on).", rich_help_panel=EXECUTION
        ),
    ] = None,
    side_by_side: Annotated[
        int | None,
        typer.Option(help="Of --seeds, how many at once; 0: up to 8 on a GPU, 1 on a CPU.", rich_help_panel=EXECUTION),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; 0: one per core.", rich_help_panel=EXECUTION)
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(help="A TOML file as --dry-run prints it; flags win over it.", rich_help_panel=OUTPUT),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder (default: a new one in runs/).", rich_help_panel=OUTPUT)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Move a run that is in --out aside.", rich_help_panel=OUTPUT)
    ] = False,
    resume: Annotated[Path | None, typer.Option(help="Resume this run folder.", rich_help_panel=OUTPUT)] = None,
    log_every: Annotated[
        int | None, typer.Option(help="Steps between log records (100).", rich_help_panel=OUTPUT)
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between tests (2,000).", rich_help_panel=OUTPUT)] = None,
    clean_train_error: Annotated[
        bool | None,
        typer.Option(
            "--clean-train-error/--no-clean-train-error",
            help="Also test on the training images, without augmentation.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    checkpoint_every: Annotated[
        str | None, typer.Option(help="Steps (500) or minutes (10min, the default).", rich_help_panel=OUTPUT)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.", rich_help_panel=OUTPUT)] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Result as one JSON object on stdout, the rest on stderr.", rich_help_panel=OUTPUT),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config as TOML and stop.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Train a network. Without options: the paper's ResNet-20 on CIFAR-10, 64k steps."""
    refuse_both("--model", model, "--depth", depth)
    refuse_both("--model", model, "--arch", arch)
    refuse_both("--steps", steps, "--epochs", epochs)
    refuse_both("--warmup-steps", warmup_steps, "--warmup-epochs", warmup_epochs)
    refuse_both("--amp", amp, "--no-amp", no_amp)
    refuse_both("--amp" if amp else "--no-amp", amp or no_amp, "--precision", precision)
    refuse_both("--seed", seed, "--seeds", seeds)
    refuse_both("--seeds", seeds, "--overwrite", overwrite or None)
    if side_by_side is not None and side_by_side < 0:
        raise InputError(f"--side-by-side is {side_by_side}; 0 chooses, else how many")
    refuse_both("--resume", resume, "--out", out)
    refuse_both("--resume", resume, "--overwrite", overwrite or None)
    refuse_both("--resume", resume, "--preset", preset)
    refuse_both("--resume", resume, "--config", config or None)
    if config and len(config) > 1:
        raise InputError(f"--config is given {len(config)} times; give one file")
    if warmup == "none":
        refuse_both("--warmup none", True, "--warmup-steps", warmup_steps)
        refuse_both("--warmup none", True, "--warmup-epochs", warmup_epochs)
    if model is not None:
        arch, depth = parse_model(model)
    elif arch is not None and arch[-1:].isdigit():
        raise InputError(f"--arch is {arch!r}; a network with its depth is a --model: ResNet20, ImageNetResNet50")
    flags = given(
        model=given(arch=arch, depth=depth, shortcut=shortcut, pad=pad, init=init, norm_batch=norm_batch),
        data=given(dataset=dataset, val_split=val_split, augment=augment),
        recipe=given(
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            schedule=schedule,
            milestones=None if milestones is None else parse_milestones(milestones),
            warmup=warmup,
            warmup_steps=warmup_steps,
            momentum=momentum,
            lr_in_velocity=lr_in_velocity,
            weight_decay=weight_decay,
            weight_decay_on=weight_decay_on,
        ),
        seed=seed,
        execution=given(
            device=device,
            precision="auto" if amp else "fp32" if no_amp else precision,
            loader=loader,
            compile=compile_,
            compile_scope=compile_scope,
            compile_mode=compile_mode,
            cuda_graph=cuda_graph,
            graph_steps=graph_steps,
            deterministic=deterministic,
            shadow_weights=shadow_weights,
            native=native,
            layer_kernels=layer_kernels,
            channels_last=channels_last,
            threads=threads,
            data_dir=data_dir and data_dir.absolute(),
            data_urls=data_url,
        ),
        output=given(
            out=out,
            log_every=log_every,
            eval_every=eval_every,
            clean_train_error=clean_train_error,
            checkpoint_every=checkpoint_every,
        ),
    )
    base = _resumed(resume) if resume is not None else based_on_preset(read_toml(config[0]) if config else {}, preset)
    tree = merge(base, in_steps(flags, base, epochs, warmup_epochs))
    resolved = RunConfig.from_dict(tree if resume is not None else with_dependent_defaults(tree))
    if resume is None:
        check_sense(resolved)
    if resolved.recipe.schedule == "linear" and milestones is not None:
        raise InputError("--milestones does nothing with a linear schedule; add --schedule step")
    if resolved.recipe.warmup == "error" and (warmup_steps or warmup_epochs) is not None:
        raise InputError("--warmup error ends by the training error, not after a number of steps; leave that out")
    if data_dir is not None and resolved.data.dataset == "synthetic":
        raise InputError("--data-dir does nothing with built-in data; add --dataset cifar10, or leave it out")
    if side_by_side is not None and seeds is None and resume is None:
        raise InputError("--side-by-side does nothing without --seeds; leave it out")
    if dry_run:
        print(resolved.to_toml(), end="")
        return
    clocks = Clocks()
    with clocks("import"):
        from fastres import loop, sweep
        from fastres.console import Console
    console = Console("quiet" if quiet else "auto", stderr=as_json)
    if seeds is not None or (resume is not None and sweep.is_sweep(resume)):
        outcomes = sweep.train_seeds(
            resolved,
            parse_seeds(seeds) if seeds is not None else (),
            resume=resume,
            side_by_side=side_by_side or 0,
            console=console,
            clocks=clocks,
        )
        if as_json:
            print(json.dumps([sweep.as_json(outcome) for outcome in outcomes]))
        sweep.raise_if_all_diverged(outcomes)
        return
    result = loop.train(resolved, resume=resume, overwrite=overwrite, console=console, clocks=clocks)
    if as_json:
        print(json.dumps(result.to_dict()))


def _resumed(path: Path) -> dict[str, Any]:
    """The config of a run or a sweep that is to go on."""
    from fastres import sweep
    from fastres.rundir import RunDir, found_again

    if sweep.is_sweep(path):
        return found_again(sweep.read_sweep(path)["config"])
    return found_again(RunDir.open(path).config().to_dict())
