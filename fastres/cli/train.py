"""`fastres train`: flags to a config, and one call."""

import json
from pathlib import Path
from typing import Annotated

from typer import Option

from fastres.cli import flags
from fastres.cli.flags import (
    based_on_preset,
    check_idle,
    given,
    in_steps,
    parse_milestones,
    parse_model,
    parse_seeds,
    read_file,
    refuse_both,
    refuse_data_flags,
)
from fastres.cli.help import panel
from fastres.clock import Clocks
from fastres.config import RunConfig, check_sense, with_dependent_defaults
from fastres.configtree import merge
from fastres.errors import InputError
from fastres.files import given_path

Model = panel("Model")
Recipe = panel("Recipe")
Data = panel("Data")
Execution = panel("How it runs")
Output = panel("Logs, tests, checkpoints")
Tuning = panel("For performance work")


def train(
    preset: Annotated[
        str | None,
        Option(
            help="paper: the paper's recipe, 64,000 steps; fast: ten epochs; smoke: built-in data, a minute on two "
            "cores. [default: paper]"
        ),
    ] = None,
    config: Annotated[
        list[Path] | None,
        Option(metavar="FILE", help="TOML file as --dry-run prints it, or a run's folder; flags win over it."),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the resolved config as TOML and stop.")] = False,
    seed: Annotated[
        int | None, Option(help="Seed of the initial weights, order, crops and flips. [default: 0]")
    ] = None,
    seeds: Annotated[
        str | None, Option(help="Train several seeds, on a GPU side by side: 5 (seeds 0 to 4), 2-4, or 1,3.")
    ] = None,
    out: Annotated[Path | None, Option(help="Run folder. [default: a new one in runs/]")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Move a run that is already in --out aside.")] = False,
    go_on: Annotated[
        bool, Option("--continue", help="Go on with the run that is in --out, or begin it: for jobs that are requeued.")
    ] = False,
    resume: Annotated[Path | None, Option(help="Run folder, or folder of --seeds, to go on with.")] = None,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON on stdout, all else on stderr.")] = False,
    depth: Annotated[
        int | None,
        Model(help="Layers: 6n+2, as 20, 32, 44, 56, 110, 1202; imagenet: 18 to 152. [default: 20; imagenet: 18]"),
    ] = None,
    arch: Annotated[
        str | None,
        Model(help="resnet; plain: no shortcuts; imagenet: the paper's Table 1, for 32x32 images. [default: resnet]"),
    ] = None,
    model: Annotated[
        str | None, Model(help="--arch and --depth in one word: ResNet20, PlainNet56, ImageNetResNet18.")
    ] = None,
    shortcut: Annotated[
        str | None,
        Model(help="Where shapes change, A: zero-padded identity; B: 1x1 projection. [default: A; imagenet: B]"),
    ] = None,
    pad: Annotated[
        str | None,
        Model(help="Where option A puts its zero channels: both (half before, half after) or after. [default: both]"),
    ] = None,
    init: Annotated[str | None, Model(help="He initialisation by fan_in or fan_out. [default: fan_in]")] = None,
    norm_batch: Annotated[
        int | None,
        Model(help="Images per batch-norm statistic, such as 64 as on two GPUs; 0: the whole batch. [default: 0]"),
    ] = None,
    steps: Annotated[
        int | None, Recipe(help="Training length in steps. [paper: 64,000; fast: 3,910; smoke: 250]")
    ] = None,
    epochs: Annotated[float | None, Recipe(help="Training length in epochs, instead of --steps.")] = None,
    batch_size: Annotated[int | None, Recipe(help="Images per step. [default: 128]")] = None,
    lr: Annotated[float | None, Recipe(help="Learning rate (lr), before any decay. [default: 0.1]")] = None,
    schedule: Annotated[
        str | None,
        Recipe(
            help="step: lr falls to a tenth at each milestone; linear: it falls to zero over the run. "
            "[paper: step; fast, smoke: linear]"
        ),
    ] = None,
    milestones: Annotated[
        str | None, Recipe(help="Steps at which lr falls under --schedule step, or none. [default: 32000,48000]")
    ] = None,
    warmup: Annotated[
        str | None,
        Recipe(
            help="none; constant: lr 0.01 for --warmup-steps; error: lr 0.01 until the training error is below 80 %; "
            "ramp: lr rises over --warmup-steps. [paper: none, constant for ResNets of 110 layers and deeper; fast, "
            "smoke: ramp]"
        ),
    ] = None,
    warmup_steps: Annotated[
        int | None,
        Recipe(
            help="Length of the warm-up in steps. [default: 400; ramp: a tenth of all steps, as where 400 are too many]"
        ),
    ] = None,
    warmup_epochs: Annotated[
        float | None, Recipe(help="Length of the warm-up in epochs, instead of --warmup-steps.")
    ] = None,
    momentum: Annotated[float | None, Recipe(help="SGD momentum. [default: 0.9]")] = None,
    lr_in_velocity: Annotated[
        bool | None,
        Recipe(
            "--lr-in-velocity/--no-lr-in-velocity",
            help="Multiply by lr inside the velocity, as Caffe does and PyTorch does not. [default: off]",
        ),
    ] = None,
    weight_decay: Annotated[float | None, Recipe(help="SGD weight decay. [default: 1e-4]")] = None,
    weight_decay_on: Annotated[
        str | None,
        Recipe(help="What decays: all parameters, or weights (no biases, nothing of batch norm). [default: all]"),
    ] = None,
    dataset: Annotated[
        str | None, Data(help="cifar10, or synthetic (built in). [paper, fast: cifar10; smoke: synthetic]")
    ] = None,
    data_dir: Annotated[Path | None, Data(help=flags.DATA_DIR)] = None,
    data_url: Annotated[list[str] | None, Data(metavar="URL", help=flags.MIRROR)] = None,
    val_split: Annotated[
        bool | None,
        Data(
            "--val-split/--no-val-split",
            help="Train on 45,000 of the training images, test on the other 5,000. [default: off]",
        ),
    ] = None,
    augment: Annotated[
        bool | None, Data("--augment/--no-augment", help="Crop and flip images at random. [default: on]")
    ] = None,
    device: Annotated[str | None, Execution(help=f"{flags.DEVICES} [default: auto]")] = None,
    precision: Annotated[str | None, Execution(help=f"{flags.PRECISIONS} [default: auto]")] = None,
    amp: Annotated[bool | None, Execution("--amp", help="Short for --precision auto.")] = None,
    no_amp: Annotated[bool | None, Execution("--no-amp", help="Short for --precision fp32.")] = None,
    loader: Annotated[
        str | None,
        Execution(help="resident, dali, or auto: dali on a GPU where it is installed, else resident. [default: auto]"),
    ] = None,
    compile_: Annotated[
        bool | None, Execution("--compile/--no-compile", help="Use torch.compile. [default: on a GPU]")
    ] = None,
    deterministic: Annotated[
        bool | None,
        Execution(
            "--deterministic/--no-deterministic",
            help="The same bits each time on a GPU too; a CPU gives them anyway. [default: off]",
        ),
    ] = None,
    side_by_side: Annotated[
        int | None,
        Execution(help="How many of --seeds to train at once; 0: up to 8 on a GPU, 1 on a CPU. [default: 0]"),
    ] = None,
    threads: Annotated[int | None, Execution(help=f"{flags.THREADS} [default: 0]")] = None,
    log_every: Annotated[
        int | None, Output(help="Steps between log records. [paper: 100; fast: 50; smoke: 10]")
    ] = None,
    eval_every: Annotated[int | None, Output(help="Steps between tests. [paper: 2,000; fast: 391; smoke: 79]")] = None,
    clean_train_error: Annotated[
        bool | None,
        Output(
            "--clean-train-error/--no-clean-train-error",
            help="Test on the training images, too, without augmentation. [default: off]",
        ),
    ] = None,
    checkpoint_every: Annotated[
        str | None, Output(help="Steps (500) or minutes (10min) between checkpoints. [default: 10min]")
    ] = None,
    compile_scope: Annotated[
        str | None,
        Tuning(
            help="What is compiled at once: whole, the network (fewest kernels); blocks (quickest start); or auto: "
            "blocks on a GPU from 110 layers on, else whole. [default: auto]"
        ),
    ] = None,
    compile_mode: Annotated[
        str | None,
        Tuning(
            help="default: on a GPU with independent kernels joined; plain: Inductor's own; max-autotune: kernels "
            "chosen by timing, which takes minutes. [default: default]"
        ),
    ] = None,
    cuda_graph: Annotated[
        bool | None,
        Tuning("--cuda-graph/--no-cuda-graph", help="Run a step as one captured CUDA graph. [default: on a GPU]"),
    ] = None,
    graph_steps: Annotated[int | None, Tuning(help="Steps per CUDA graph, at most 64. [default: 1]")] = None,
    shadow_weights: Annotated[
        bool | None,
        Tuning(
            "--shadow-weights/--no-shadow-weights",
            help="Have the update keep bf16 copies of the weights. [default: in bf16 on a GPU]",
        ),
    ] = None,
    native: Annotated[
        bool | None,
        Tuning(
            "--native/--no-native",
            help="Use fastres' own kernels. [default: in bf16 on a GPU; on a CPU with g++ to build them]",
        ),
    ] = None,
    layer_kernels: Annotated[
        bool | None,
        Tuning(
            "--layer-kernels/--no-layer-kernels",
            help="On a GPU, take CUDA C++ kernels with one launch per layer instead of Triton's; not measured. "
            "[default: off]",
        ),
    ] = None,
    channels_last: Annotated[
        bool | None,
        Tuning("--channels-last/--no-channels-last", help="Keep tensors in channels-last order. [default: on]"),
    ] = None,
) -> None:
    """Train a network. Without options: the paper's ResNet-20 on CIFAR-10, 64k steps."""
    refuse_both("--model", model, "--depth", depth)
    refuse_both("--model", model, "--arch", arch)
    refuse_both("--steps", steps, "--epochs", epochs)
    refuse_both("--warmup-steps", warmup_steps, "--warmup-epochs", warmup_epochs)
    refuse_both("--amp", amp, "--no-amp", no_amp)
    refuse_both("--amp" if amp else "--no-amp", amp or no_amp, "--precision", precision)
    refuse_both("--seed", seed, "--seeds", seeds)
    refuse_both("--seeds", seeds, "--overwrite", overwrite)
    if side_by_side is not None and side_by_side < 0:
        raise InputError(f"--side-by-side is {side_by_side}; 0 chooses, else how many")
    refuse_both("--resume", resume, "--out", out)
    refuse_both("--continue", go_on, "--overwrite", overwrite)
    refuse_both("--continue", go_on, "--resume", resume)
    refuse_both("--resume", resume, "--overwrite", overwrite)
    refuse_both("--resume", resume, "--preset", preset)
    refuse_both("--resume", resume, "--config", config)
    if config and len(config) > 1:
        raise InputError(f"--config is given {len(config)} times; give one file")
    if warmup == "none":
        refuse_both("--warmup none", True, "--warmup-steps", warmup_steps)
        refuse_both("--warmup none", True, "--warmup-epochs", warmup_epochs)
    if model is not None:
        arch, depth = parse_model(model)
    elif arch is not None and arch[-1:].isdigit():
        raise InputError(f"--arch is {arch!r}; a network with its depth is a --model: ResNet20, ImageNetResNet50")
    chosen = given(
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
    if resume is not None:
        from fastres.sweepdir import is_sweep, stored_config

        if seed is not None and is_sweep(resume):
            raise InputError(f"--seed {seed}: a sweep has several; --seeds {seed}-{seed} trains that one too")
        base = stored_config(resume)
    else:
        base = based_on_preset(read_file(config[0]) if config else {}, preset)
    tree = merge(base, in_steps(chosen, base, epochs, warmup_epochs))
    resolved = RunConfig.from_dict(tree if resume is not None else with_dependent_defaults(tree))
    if resume is None:
        check_sense(resolved)
    if resolved.recipe.schedule == "linear" and milestones is not None:
        raise InputError("--milestones does nothing with a linear schedule; add --schedule step")
    if resolved.recipe.warmup == "error" and (warmup_steps or warmup_epochs) is not None:
        raise InputError("--warmup error ends by the training error, not after a number of steps; leave that out")
    refuse_data_flags(resolved.data.dataset, data_dir, data_url)
    check_idle(chosen, resolved)
    if go_on and not resolved.output.out:
        raise InputError("--continue goes on with what is in --out; add --out RUN")
    if side_by_side is not None and seeds is None and resume is None:
        raise InputError("--side-by-side does nothing without --seeds; leave it out")
    chosen_seeds = parse_seeds(seeds) if seeds is not None else ()
    if dry_run:
        print(resolved.to_toml(), end="")
        return
    clocks = Clocks()
    with clocks("import"):
        from fastres import loop, sweep
        from fastres.console import Console
        from fastres.sweepdir import is_sweep, to_go_on_with
    console = Console("quiet" if quiet else "auto", stderr=as_json)
    if seeds is not None or (resume is not None and is_sweep(resume)):
        outcomes = sweep.train_seeds(
            resolved,
            chosen_seeds,
            resume=resume,
            side_by_side=side_by_side or 0,
            console=console,
            clocks=clocks,
        )
        if as_json:
            print(json.dumps([sweep.as_json(outcome) for outcome in outcomes]))
        sweep.raise_if_all_diverged(outcomes)
        return
    if go_on:
        resume = to_go_on_with(given_path("--out", resolved.output.out), resolved)
    result = loop.train(resolved, resume=resume, overwrite=overwrite, console=console, clocks=clocks)
    if as_json:
        print(json.dumps(result.to_dict()))
