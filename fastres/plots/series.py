"""What is drawn of a run: points out of its metrics, smoothed, on the x axis that was asked for; means over runs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastres.configtree import is_number

Float64Array = npt.NDArray[np.float64]
What = Literal["error", "loss", "lr"]
XAxis = Literal["step", "epoch", "time"]

FEW_POINTS = 12  # a line of fewer has a mark at each
PARTS_OF_RUN = 40  # the window of the smoothing, unless told: a run over this


@dataclass(frozen=True)
class Line:
    """One quantity over a run. All arrays are float64 of one length; errors are in per cent."""

    steps: Float64Array
    x: Float64Array
    y: Float64Array  # as logged; of several runs: their mean
    smooth: Float64Array
    low: Float64Array | None = None  # one standard deviation over the runs below `smooth`; None for a single run
    high: Float64Array | None = None  # and above it

    @property
    def smoothed(self) -> bool:
        """Whether the two lines differ, so that both are drawn."""
        return not np.array_equal(self.y, self.smooth)


@dataclass(frozen=True)
class Curve:
    """What is drawn in one colour: a run, or the mean of several."""

    label: str
    train: Line | None
    test: Line | None
    unfinished: bool = False
    warmup_end: float | None = None  # on the x axis
    lr_falls: tuple[float, ...] = ()  # places on the x axis from which on the learning rate is half or less
    held_out: str = "test"  # the images of the second line: "test" or "validation"

    @property
    def lines(self) -> tuple[Line, ...]:
        """Training, then test, as far as there are any."""
        return tuple(line for line in (self.train, self.test) if line is not None)


def curve_of(
    records: Sequence[dict[str, Any]],
    label: str,
    *,
    what: What = "error",
    x: XAxis = "step",
    epochs_per_step: float = 0.0,
    smooth: int | None = None,
    unfinished: bool = False,
    held_out: str = "test",
) -> Curve:
    """One run's curve from its metrics records. Records that lack the quantity, or hold NaN, are left out.

    Args:
        records: As `RunDir.metrics` gives them.
        label: In the legend.
        what: Error in per cent, loss, or learning rate (training only).
        x: Steps, epochs, or seconds of the training clock (tests: the clock as interpolated between log steps).
        epochs_per_step: Needed for "epoch".
        smooth: Logged training points that are averaged, 1 for none; an even number counts as the next odd one. Test
            points are averaged over as many steps. Default: a fortieth of the run. Never across a step at which the
            learning rate doubles or halves: a curve's cliff stays one.
        unfinished: Marks the curve's end.
        held_out: What the images are called that tests are on.
    """
    points = {kind: _points(records, kind, what) for kind in ("train", "test")}
    place = _axis(records, x, epochs_per_step)
    reach, jumps, falls = _reach(points["train"][0], smooth), *_jumps_of_lr(records)

    def line(kind: str) -> Line | None:
        steps, values = points[kind]
        if not len(steps):
            return None
        return Line(steps, place(steps), values, values if what == "lr" else _averaged(steps, values, reach, jumps))

    ends = [record["step"] for record in records if record.get("kind") == "warmup_end"]
    end = float(place(np.array([ends[-1]], np.float64))[0]) if ends else None
    return Curve(label, line("train"), line("test"), unfinished, end, tuple(place(falls).tolist()), held_out)


def mean_curve(curves: Sequence[Curve], label: str) -> Curve:
    """Mean and standard deviation (n - 1) over runs, at the steps that all of them logged."""

    def line(lines: Sequence[Line | None]) -> Line | None:
        there = [one for one in lines if one is not None]
        if len(there) < len(lines):
            return None
        steps = there[0].steps
        for one in there[1:]:
            steps = np.intersect1d(steps, one.steps)
        if not len(steps):
            return None
        rows = [np.searchsorted(one.steps, steps) for one in there]
        x, y, smooth = (
            np.stack([getattr(one, name)[row] for one, row in zip(there, rows, strict=True)])
            for name in ("x", "y", "smooth")
        )
        middle, spread = smooth.mean(axis=0), smooth.std(axis=0, ddof=1)
        return Line(steps, x.mean(axis=0), y.mean(axis=0), middle, middle - spread, middle + spread)

    if len(curves) == 1:
        return curves[0]
    trains, tests = line([c.train for c in curves]), line([c.test for c in curves])
    return Curve(label, trains, tests, any(c.unfinished for c in curves), held_out=curves[0].held_out)


def held_out_names(names: Iterable[str]) -> str:
    """What the tested images of several runs are called: "test", "validation", or both."""
    return " or ".join(sorted(set(names))) or "test"


def _points(records: Iterable[dict[str, Any]], kind: str, what: What) -> tuple[Float64Array, Float64Array]:
    """Steps and values of one kind of record, in rising steps."""
    found = {record["step"]: record.get(what) for record in records if record.get("kind") == kind}
    scale = 100 if what == "error" else 1
    scaled = ((step, scale * float(value)) for step, value in found.items() if is_number(value))
    kept = sorted((step, value) for step, value in scaled if math.isfinite(value))
    return np.array([step for step, _ in kept], np.float64), np.array([value for _, value in kept], np.float64)


def _axis(
    records: Iterable[dict[str, Any]], x: XAxis, epochs_per_step: float
) -> Callable[[Float64Array], Float64Array]:
    """From steps to places on the x axis."""
    if x == "step":
        return lambda steps: steps
    if x == "epoch":
        return lambda steps: steps * epochs_per_step
    known = {0: 0.0}
    for record in records:
        clock = record.get("clock")
        if record.get("kind") == "train" and isinstance(clock, dict) and is_number(clock.get("train")):
            known[record["step"]] = float(clock["train"])
    steps_known, seconds = np.array(sorted(known), np.float64), np.array([known[s] for s in sorted(known)])
    rate = seconds[-1] / max(steps_known[-1], 1)  # for tests after the last log step of an unfinished run
    return lambda steps: np.interp(steps, steps_known, seconds) + rate * np.maximum(steps - steps_known[-1], 0)


def _reach(steps: Float64Array, smooth: int | None) -> float:
    """How many steps to each side are averaged."""
    if len(steps) < 2:
        return 0.0
    points = len(steps) // PARTS_OF_RUN if smooth is None else smooth
    return float(points // 2 * np.median(np.diff(steps)))


def _jumps_of_lr(records: Iterable[dict[str, Any]]) -> tuple[Float64Array, Float64Array]:
    """The last logged steps before a constant learning rate at least doubles or halves, and those where it falls."""
    steps, rates = _points(records, "train", "lr")
    before, after = rates[:-1], rates[1:]
    constant = np.diff(rates, prepend=np.nan)[:-1] == 0  # of the first, nobody knows
    rises, falls = constant & (after >= 2 * before), constant & (after <= before / 2)
    return steps[:-1][rises | falls], steps[:-1][falls]


def _averaged(x: Float64Array, y: Float64Array, reach: float, jumps: Float64Array) -> Float64Array:
    """Means over centred windows.

    Towards the ends of the run, and of a stretch between two jumps, a window shrinks on both sides: the values there
    stay as logged.
    """
    stretch = np.searchsorted(jumps, x)  # a point at the jump is of the stretch before it
    begin, end = x[np.searchsorted(stretch, stretch, "left")], x[np.searchsorted(stretch, stretch, "right") - 1]
    reaches = np.minimum(reach, np.minimum(x - begin, end - x))
    first, last = np.searchsorted(x, x - reaches, "left"), np.searchsorted(x, x + reaches, "right")
    if np.array_equal(last - first, np.ones_like(first)):
        return y
    total = np.concatenate([[0.0], np.cumsum(y)])
    means: Float64Array = (total[last] - total[first]) / (last - first)
    return means
