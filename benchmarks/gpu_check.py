"""Proves and measures the whole GPU path, in pieces that fit into ten minutes, on a machine that forgets.

    scripts/gpu-check --list
    scripts/gpu-check --minutes 9 --out runs/gpu-check --data-dir path/to/cifar-10-batches-bin
    scripts/gpu-check parity bench/resnet20 --minutes 9
    scripts/gpu-check --list parity | awk '{print $2}' | xargs -P 12 -I TASK scripts/gpu-check TASK --minutes 6

The last line has twelve checks share a folder and the GPU, which is for what proves, not for what times.

Sections are lists of tasks (`gpu_tasks.py`; those that time are in `gpu_timing.py`). Each task runs in a process of its
own, so that what one of them breaks, the next one finds whole. A task that is done leaves OUT/<section>/<task>.json and
is not repeated (to repeat it, remove the file); one that failed leaves <task>.failed.json, and comes again after all
others. No task is begun for which no time is left; one that trains gets what is left, saves, and goes on the next time.
In the end everything but large checkpoints is in OUT/gpu-check.tar.gz; unpacked into an empty OUT, it lets another
machine go on.

    scripts/gpu-check peers --peer path/to/pytorch_resnet_cifar10 --data-dir path/to/cifar-10-batches-bin

times other people's trainers too, unmodified, whose clones lie on this machine (`peers.py` names those it knows).
"""

import argparse
import contextlib
import faulthandler
import math
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, strftime
from typing import Literal

from benchmarks.gpu_files import ROOT, Files, Setting, Task, TaskFailed
from benchmarks.gpu_tasks import all_tasks, machine

NO_GPU, CUT = 3, 75  # exit codes: of the whole; of a task's process that saved before its end
RESERVE_SECONDS = 10.0  # at the end, for the tar
GRACE_SECONDS = 25.0  # from SIGTERM to SIGKILL: to finish a step and save
PATIENCE = 2.0  # times what is allowed for a task; then it hangs. A call's first task has as much time

Ending = Literal["done", "failed", "cut"]
Attempt = Callable[[Task, float], Ending]


@dataclass
class Tally:
    """What became of the tasks, by name."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # cut, or not begun


class Stopped(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt no Exception, so that nothing takes it for a task's failure."""


def go_through(
    tasks: Sequence[Task],
    files: Files,
    attempt: Attempt,
    *,
    seconds: float,
    clock: Callable[[], float] = monotonic,
    say: Callable[[str], None] = print,
) -> Tally:
    """Try every task that is not done yet, as long as there is time.

    Args:
        tasks: In the order of the work; those that failed before come last.
        files: Says which are done.
        attempt: Runs a task within so many seconds.
        seconds: From now on, for all.
        clock: In seconds.
        say: Takes lines.
    """
    end, tally = clock() + seconds - RESERVE_SECONDS, Tally()
    todo = [task for task in tasks if files.state(task) != "done"]
    for task in sorted(todo, key=lambda task: files.state(task) == "failed"):
        left = end - clock()
        if left < task.seconds:
            tally.left.append(task.name)
            continue
        say(f"{task.name} ({_minutes(left)} left)")
        began, ending = clock(), attempt(task, left)
        getattr(tally, "left" if ending == "cut" else ending).append(task.name)
        why = f": {files.why(task)}" if ending == "failed" else ""
        say(f"  {ending} after {_minutes(clock() - began)}{why}")
    return tally


def in_its_own_process(task: Task, seconds: float, *, setting: Setting, files: Files) -> Ending:
    """Run a task in a process of its own; whatever it does, this returns in time."""
    limit = seconds - GRACE_SECONDS if task.goes_on else min(seconds, PATIENCE * task.seconds)
    code, late = _run(_command(task.name, setting, limit), files.log(task), limit)
    if code == 0 and files.state(task) == "done":
        return "done"
    stopped = late and (code != -signal.SIGKILL if task.goes_on else limit == seconds)
    if code == CUT or stopped:
        return "cut"
    if files.state(task) != "failed" or late:
        how = f"took longer than {limit:.0f} s and was stopped" if late else f"ended with exit code {code}"
        files.failed(task, {"error": f"{how}; its last words are in {files.log(task)}"})
    return "failed"


def _command(name: str, setting: Setting, seconds: float) -> list[str]:
    given = ["--data-dir", str(setting.data_dir)] if setting.data_dir else []
    given += [f"--peer={checkout}" for checkout in setting.peers]
    inside = ["--inside", name, "--seconds", str(seconds), "--out", str(setting.out), "--device", setting.device]
    return [sys.executable, "-u", "-m", "benchmarks.gpu_check", *inside, *given]


def _run(command: list[str], log: Path, seconds: float) -> tuple[int, bool]:
    """The exit code of a command whose words go into `log`, and whether its time ran out before it ended."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as words:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=words, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            return process.wait(seconds), False
        except subprocess.TimeoutExpired:
            return _stop(process), True
        except BaseException:  # Ctrl-C or SIGTERM: what trains shall save
            _stop(process)
            raise
        finally:
            _signal_all(process, signal.SIGKILL)  # what it may have left behind


def _stop(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM, and SIGKILL where that does not help."""
    _signal_all(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(GRACE_SECONDS)
    _signal_all(process, signal.SIGKILL)
    return process.wait()


def _signal_all(process: subprocess.Popen[bytes], signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signum)


def inside(name: str, setting: Setting, files: Files) -> int:
    """A task's own process: run it, keep what it returns or why it failed. Its exit code."""
    import torch

    from fastres.errors import Interrupted, OutOfTime

    if name == "machine":
        if setting.device == "cuda" and not torch.cuda.is_available():
            print("torch finds no GPU here; fastres doctor says what is missing")
            return NO_GPU
        files.environment(machine(setting))
        return 0
    task = next(task for task in all_tasks(setting) if task.name == name)
    if not task.goes_on and math.isfinite(setting.seconds):
        faulthandler.dump_traceback_later(max(1.0, setting.seconds - 2))  # where it hangs, if it does
    began, start = strftime("%Y-%m-%d %H:%M:%S"), monotonic()
    try:
        result = task.run(setting)
    except (Interrupted, OutOfTime) as cut:
        print(cut)
        return CUT
    except Exception as error:  # noqa: BLE001 (a task may fail in any way; the others go on)
        traceback.print_exc()
        seen = error.result if isinstance(error, TaskFailed) else {}
        files.failed(task, {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc(), **seen})
        return 1
    if "environment" not in result:
        result = {"environment": machine(setting), **result}
    files.done(task, result, {"began": began, "seconds": monotonic() - start})
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Go through the tasks, and pack what they left. The exit code: 0, 1 where one failed, 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="gpu-check", description="Prove and measure the GPU path, piece by piece")
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help="or SECTION/TASK; default: all, as --list has it"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="stop by then (default 9)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu-check"), help="what is kept (default runs/gpu-check)"
    )
    parser.add_argument("--data-dir", type=Path, help="where CIFAR-10 lies; without it FASTRES_DATA or the cache")
    parser.add_argument(
        "--peer", type=Path, action="append", default=[], metavar="CHECKOUT", help="a trainer for `peers`; repeatable"
    )
    parser.add_argument("--list", action="store_true", help="the tasks and what became of them; runs nothing")
    parser.add_argument(
        "--weights", type=float, default=10.0, metavar="MB", help="of checkpoints in the tar (default 10)"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help=argparse.SUPPRESS)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=math.inf, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    data_dir = args.data_dir or (Path(os.environ["FASTRES_DATA"]) if os.environ.get("FASTRES_DATA") else None)
    clones = tuple(checkout.resolve() for checkout in args.peer)
    setting = Setting(args.out.resolve(), data_dir and data_dir.resolve(), args.device, args.seconds, clones)
    files = Files(setting.out)
    if args.inside:
        return inside(args.inside, setting, files)
    tasks = all_tasks(setting)
    chosen = [task for task in tasks if not args.sections or {task.section, task.name} & set(args.sections)]
    known = {task.section for task in tasks} | {task.name for task in tasks}
    if unknown := [name for name in args.sections if name not in known]:
        sections = ", ".join(dict.fromkeys(task.section for task in tasks))
        peers = "; for peers give --peer CHECKOUT" if unknown[0].startswith("peers") else ""
        parser.error(f"there is no {unknown[0]!r}; sections are {sections}, and --list has the tasks{peers}")
    if args.list:
        for task in chosen:
            print(files.line(task))
        return 0
    return _go(chosen, setting, files, 60 * args.minutes, args.weights)


def _go(tasks: Sequence[Task], setting: Setting, files: Files, seconds: float, weights_mb: float) -> int:
    signal.signal(signal.SIGTERM, _raise_stopped)
    start, ended = monotonic(), 0
    code, _ = _run(_command("machine", setting, 120), files.out / "machine.log", 120)
    if code != 0:
        print(f"gpu-check: {(files.out / 'machine.log').read_text().strip()}", file=sys.stderr)
        return NO_GPU if code == NO_GPU else 1
    tally = Tally()
    try:
        tally = go_through(
            tasks,
            files,
            lambda task, left: in_its_own_process(task, left, setting=setting, files=files),
            seconds=seconds - (monotonic() - start),
            say=lambda line: print(line, flush=True),
        )
    except (KeyboardInterrupt, Stopped) as signalled:
        ended = 130 if isinstance(signalled, KeyboardInterrupt) else 143
    packed = files.pack(weights_mb)
    for line in summary(tasks, files, tally, packed, stopped=bool(ended)):
        print(line)
    return ended or (1 if any(files.state(task) == "failed" for task in tasks) else 0)


def _raise_stopped(*_: object) -> None:
    raise Stopped


def summary(tasks: Sequence[Task], files: Files, tally: Tally, packed: Path, *, stopped: bool) -> list[str]:
    """What a person wants to know in the end."""
    states = [files.state(task) for task in tasks]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "failed", "open") if state in states)
    lines = [f"{len(tasks)} tasks: {counts}; {packed} has it all"]
    lines += [f"  {files.line(task)}" for task in tasks if files.state(task) == "failed"]
    if stopped:
        lines.append("stopped; run the same command again to resume")
    elif tally.left:
        shortest = min(task.seconds for task in tasks if task.name in tally.left)
        tried = tally.done or tally.failed
        enough = "" if tried else f" (none fitted; the next needs --minutes {math.ceil((shortest + 45) / 60)} or more)"
        lines.append(f"the time is used up, {len(tally.left)} tasks are left: go on with the same line{enough}")
    return lines


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main())
