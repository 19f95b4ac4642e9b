"""`fastres bench`: a throughput report, a comparison, a profile, or cost against work."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from fastres.cli import flags
from fastres.cli.flags import given, one_of, parse_list, parse_percent, read_config, refuse_both, refuse_data_flags
from fastres.cli.help import panel
from fastres.config import RunConfig, make_config
from fastres.errors import InputError, MachineError, OutsideTolerance
from fastres.files import check_figure

if TYPE_CHECKING:
    from fastres.bench.cells import Cell
    from fastres.bench.report import Comparison, Report

LOADERS = ("dali", "resident", "torchvision", "none")
SWITCH: dict[str, list[bool | None]] = {"auto": [None], "on": [True], "off": [False], "both": [True, False]}
SECONDS = 60.0  # of measuring, by default
# A comparison has more and shorter chunks in the same time: its median passes over those that something disturbed, and
# what tests/test_bench.py shows of its verdicts holds for so many.
ROUNDS, COMPARED_ROUNDS = 10, 60

What, Others = panel("What is timed"), panel("Instead of a table")

# What has no effect beside another flag, and is refused there: a number that it did not change would mislead.
CELLS = ("depth", "arch", "batch_size", "loader", "precision", "compile_", "graph", "native", "deterministic")
DATA_AND_MACHINE = ("dataset", "data_dir", "device", "threads")
WITHOUT_EFFECT = {
    "compare": (*CELLS, *DATA_AND_MACHINE, "trace"),  # both sides say themselves what they are
    "reports": (*CELLS, *DATA_AND_MACHINE, "trace", "rounds", "seconds"),  # which were measured before
    "profile": ("rounds", "seconds", "json_", "plot", "fail_if_slower"),
    "scaling": ("rounds", "seconds", "trace", "fail_if_slower"),
    "": ("trace",),
}


def bench(
    ctx: typer.Context,
    depth: Annotated[
        str | None,
        What(help="Depths, as 20,56,110. [default: 20,56,110 on a GPU, 20 on a CPU; imagenet: 18]"),
    ] = None,
    arch: Annotated[str, What(help="resnet, plain or imagenet.")] = "resnet",
    batch_size: Annotated[str, What(help="Batch sizes, as 128,512.")] = "128",
    loader: Annotated[
        str | None,
        What(
            help="Loaders: dali, resident, torchvision, none (the same batch every time). "
            "[default: dali where it is installed, resident, none]"
        ),
    ] = None,
    precision: Annotated[str, What(help="Precisions: fp32, tf32, bf16, fp16, or auto, as train takes it.")] = "auto",
    compile_: Annotated[str, What("--compile", help="torch.compile: on, off, both, or auto: on a GPU.")] = "auto",
    graph: Annotated[str, What(help="CUDA graph: on, off, both, or auto: on a GPU.")] = "auto",
    native: Annotated[str, What(help="fastres' own kernels: on, off, both, or auto: where train uses them.")] = "auto",
    deterministic: Annotated[
        str, What(help="The same bits each time: off, on, or both, which says what it costs.")
    ] = "off",
    dataset: Annotated[str, What(help="synthetic (speed does not depend on it) or cifar10.")] = "synthetic",
    data_dir: Annotated[Path | None, What(help="Folder or archive of CIFAR-10; implies --dataset cifar10.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        Others(metavar="A B", help="Compare two configs (.toml), timed in turns, or two reports (.json)."),
    ] = None,
    fail_if_slower: Annotated[
        str | None,
        Others(
            metavar="PERCENT",
            help="With --compare, exit with code 6 where B is slower than A by more than this, as 5%.",
        ),
    ] = None,
    profile: Annotated[
        bool, Others("--profile", help="List the kernels that cost most, and write a Chrome trace.")
    ] = False,
    trace: Annotated[Path, Others(help="File for the trace of --profile.")] = Path("fastres-trace.json"),
    scaling: Annotated[bool, Others("--scaling", help="Time batch sizes 32 to 8192 and depths 8 to 110.")] = False,
    device: flags.Device = "auto",
    threads: Annotated[int, Option(help=flags.THREADS)] = 0,
    rounds: Annotated[
        int | None,
        Option(
            help="Chunks that the measurement of a cell is cut into, in turns with the other cells. "
            f"[default: {ROUNDS}, of comparisons {COMPARED_ROUNDS}]"
        ),
    ] = None,
    seconds: Annotated[float, Option(help="About how long to measure in all, compilation not counted.")] = SECONDS,
    json_: Annotated[
        str | None, Option("--json", metavar="FILE", help="Write the report as JSON; -: as stdout's last line.")
    ] = None,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Draw a chart, .png or .svg.")] = None,
) -> None:
    """Time the step and the loaders that `train` uses. Without options: a useful table in under three minutes."""
    pairs = deterministic == "both"
    rounds = (COMPARED_ROUNDS if compare or pairs else ROUNDS) if rounds is None else rounds
    if not 1 <= rounds <= 100_000:
        raise InputError(f"--rounds is {rounds}; it must be at least 1, and at most 100,000")
    if not 0 < seconds < 1e6:
        raise InputError(f"--seconds is {seconds}; it must be a number above 0")
    if plot is not None:
        check_figure(plot, "--plot")
    if data_dir and not _given(ctx, "dataset"):
        dataset = "cifar10"
    refuse_data_flags(dataset, data_dir)
    refuse_both("--profile", profile, "--scaling", scaling)
    refuse_both("--compare", compare, "--profile" if profile else "--scaling", profile or scaling)
    if fail_if_slower is not None and compare is None:
        raise InputError("--fail-if-slower needs --compare A B")
    limit = None if fail_if_slower is None else parse_percent("--fail-if-slower", fail_if_slower)
    mode = "compare" if compare else "profile" if profile else "scaling" if scaling else ""
    of_reports = compare is not None and all(path.suffix == ".json" for path in compare)
    _refuse_idle(ctx, "reports" if of_reports else mode)
    base = make_config(
        model={"arch": arch},
        data={"dataset": dataset},
        execution=given(
            device=device,
            threads=threads,
            data_dir=data_dir and data_dir.absolute(),
        ),
    )
    switches: dict[str, Any] = {
        "depth": None if depth is None else parse_list("--depth", depth, int),
        "batch_size": parse_list("--batch-size", batch_size, int),
        "precision": parse_list("--precision", precision, str),
        "compile": _switch("--compile", compile_),
        "graph": _switch("--graph", graph),
        "loader": None if loader is None else parse_list("--loader", loader, str),
        "native": _switch("--native", native),
        # The last, and off first: cells without and with it are pairs.
        "deterministic": _switch("--deterministic", deterministic, ("off", "on", "both"))[::-1],
    }
    for name in switches["loader"] or ():
        one_of("--loader", name, LOADERS)
    for path in (json_, plot):
        if path is not None and path != "-":
            from fastres.bench.report import check_place

            check_place(Path(path))
    if compare is not None:
        _compare(compare, limit, rounds, seconds, json_, plot)
    elif profile:
        _profile(_one_cell(base, switches, "--profile"), trace)
    elif scaling:
        depths = switches.pop("depth")
        batch_sizes = switches.pop("batch_size") if _given(ctx, "batch_size") else None
        _scaling(_one_cell(base, switches, "--scaling"), depths, batch_sizes, json_, plot)
    else:
        from fastres.console import Console

        exact = pairs or _given(ctx, "rounds")
        max_seconds = math.inf if exact else 1.5 * seconds
        say = Console("auto", stderr=json_ == "-").say
        _measure(_cells(base, switches, say), rounds, seconds, json_, plot, pairs=pairs, max_seconds=max_seconds)


def _given(ctx: typer.Context, name: str) -> bool:
    """Whether a flag stands on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_idle(ctx: typer.Context, mode: str) -> None:
    """Raise InputError on a flag that would do nothing."""
    names = {param.name: param.opts[0] for param in ctx.command.params}
    if idle := [names[name] for name in WITHOUT_EFFECT[mode] if _given(ctx, name)]:
        instead = {"compare": "the two configs say what is timed", "": "--profile writes a trace"}
        beside = "two reports" if mode == "reports" else f"--{mode}" if mode else "a table"
        raise InputError(f"{idle[0]} does nothing beside {beside}; {instead.get(mode, 'leave it out')}")


def _one_cell(base: RunConfig, switches: dict[str, Any], mode: str) -> "Cell":
    """The cell of a mode that times one; an open loader is `train`'s own choice."""
    from fastres.bench.cells import matrix

    given_switches = {name: values for name, values in switches.items() if values is not None}
    if several := [name for name, values in given_switches.items() if len(values) > 1]:
        raise InputError(f"{mode} times one cell; give one --{several[0].replace('_', '-')}")
    return next(matrix(base, given_switches))


def _cells(base: RunConfig, switches: dict[str, Any], say: Callable[[str], None]) -> "list[Cell]":
    """The matrix, with what was left open filled in for this machine; `say` is told what is not there."""
    from fastres.bench.cells import matrix
    from fastres.data.dali import check_starts, dali_available
    from fastres.machine import gpu

    device, _ = gpu.choose(base.execution.device)
    if device.type == "cpu" and True in switches["deterministic"]:
        say("--deterministic changes nothing on a CPU: what differs is how far equal programs differ here")
    if switches["loader"] is None:
        loaders = ["resident", "none"]
        try:
            if dali_available():
                check_starts(device)
                loaders.insert(0, "dali")
        except MachineError as error:
            say(f"leaving out the dali loader: {error}")
        switches["loader"] = loaders
    if switches["depth"] is None:
        several = device.type == "cuda" and base.model.arch != "imagenet"
        switches["depth"] = [20, 56, 110] if several else [base.model.depth]
    return list(matrix(base, switches))


def _measure(
    cells: "Sequence[Cell]",
    rounds: int,
    seconds: float,
    json_: str | None,
    plot: Path | None,
    *,
    pairs: bool = False,
    max_seconds: float = math.inf,
) -> "dict[str, Comparison]":
    """Time the cells, print the table, write what was asked for; `pairs`: compare every second cell with the first."""
    from fastres.bench.measure import PROFILED, measure
    from fastres.bench.report import check_rounds, compare, draw, footnote, tables
    from fastres.console import Console

    if pairs:
        check_rounds(rounds)
    console = Console("auto", stderr=json_ == "-")
    chunk_seconds = seconds / rounds / len(cells) / (1 + PROFILED)
    report = measure(
        cells,
        rounds=rounds,
        chunk_seconds=chunk_seconds,
        max_seconds=max_seconds,
        say=console.say,
        tick=console.count,
    )
    console.print(tables(report))
    console.say(footnote(report))
    found = {}
    if pairs:
        for first, second in zip(report["cells"][::2], report["cells"][1::2], strict=True):
            found[second["label"]] = compare(first["chunks"], second["chunks"], paired=True)
        report["comparison"] = {label: asdict(comparison) for label, comparison in found.items()}
    for label, comparison in found.items():
        console.say(comparison.line(label))
    if plot is not None:
        draw(report, plot)
    _write(report, json_)
    return found


def _compare(
    paths: tuple[Path, Path], limit: float | None, rounds: int, seconds: float, json_: str | None, plot: Path | None
) -> None:
    """A against B: two reports as they are, or two configs timed in turns."""
    a, b = paths
    if {a.suffix, b.suffix} == {".json"}:
        from fastres.bench.report import compare_reports, read_json, what_differs

        if json_ or plot:
            raise InputError("--json and --plot write what was measured; two reports are only compared")
        reports = read_json(a), read_json(b)
        found, notes = compare_reports(*reports), what_differs(*reports)
        for line in (*(comparison.line(label) for label, comparison in found.items()), *notes):
            print(line)
        ours, theirs = ({cell["label"] for cell in report["cells"]} for report in reports)
        if limit is not None and ours != theirs:
            raise InputError("--fail-if-slower needs the same cells in both reports; measure both with equal flags")
    elif {a.suffix, b.suffix} == {".toml"}:
        configs = [read_config(path, "--compare") for path in paths]
        from fastres.bench.cells import Cell

        names = [path.stem if a.stem != b.stem else str(path) for path in paths]
        if a == b:  # how far equal things differ here
            names[1] += " again"
        cells = [Cell(*pair) for pair in zip(names, configs, strict=True)]
        found = _measure(cells, rounds, seconds, json_, plot, pairs=True)
    else:
        raise InputError(f"--compare {a} {b}: give two configs (.toml) or two reports (.json)")
    if limit is not None:
        _judge(found, limit)


def _judge(found: "dict[str, Comparison]", limit: float) -> None:
    """Raise OutsideTolerance where B is slower than allowed, the interval's lower end taken."""
    slower = {label: c for label, c in found.items() if c.low > 1 + limit / 100}
    if slower:
        words = "; ".join(f"{label} by {100 * (c.low - 1):.1f} % or more" for label, c in slower.items())
        raise OutsideTolerance(f"slower than --fail-if-slower {limit:g}% allows: {words}")


def _profile(cell: "Cell", trace: Path) -> None:
    """The kernels that cost most."""
    from fastres.bench.profiling import profile_cell
    from fastres.console import Console

    console = Console("auto")
    for renderable in profile_cell(cell, trace, say=console.say):
        console.print(renderable)
    console.say(f"trace: {trace} (open it at https://ui.perfetto.dev)")


def _scaling(
    cell: "Cell", depths: Sequence[int] | None, batch_sizes: Sequence[int] | None, json_: str | None, plot: Path | None
) -> None:
    """Cost against work."""
    from fastres.bench.report import tables
    from fastres.bench.scaling import BATCH_SIZES, DEPTHS, MAX_STEP_SECONDS, draw_scaling, measure_scaling
    from fastres.console import Console
    from fastres.models.depth import IMAGENET_BLOCKS

    console = Console("auto", stderr=json_ == "-")
    report = measure_scaling(
        cell.config,
        depths or (tuple(IMAGENET_BLOCKS) if cell.config.model.arch == "imagenet" else DEPTHS),
        batch_sizes or BATCH_SIZES,
        step_seconds=MAX_STEP_SECONDS,
        frozen=cell.frozen,
        say=console.say,
    )
    console.print(tables(report))
    if plot is not None:
        draw_scaling(report, plot)
    _write(report, json_)


def _write(report: "Report", json_: str | None) -> None:
    if json_ == "-":
        print(json.dumps(report))
    elif json_ is not None:
        from fastres.bench.report import write_json

        write_json(report, Path(json_))


def _switch(flag: str, text: str, choices: Sequence[str] = tuple(SWITCH)) -> list[bool | None]:
    return SWITCH[one_of(flag, text, choices)]
