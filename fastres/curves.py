"""The training and test error curves of one run, as PNG and SVG."""

from pathlib import Path
from typing import Any

from fastres.checkpoint import disk_error


def draw_curves(records: list[dict[str, Any]], title: str, folder: Path) -> list[Path]:
    """Draw error over steps from metrics records: training error thin, test error bold, as in the paper's Figure 6.

    Training error is the running error over the augmented stream. Returns the files `curves.png` and `curves.svg`.

    Raises:
        MachineError: The files cannot be written.
    """
    from matplotlib import rc_context  # half a second; only at the end of a run
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for kind, label, width in (("train", "training error (augmented, running)", 1.0), ("test", "test error", 2.2)):
        points = [(r["step"], 100 * r["error"]) for r in records if r.get("kind") == kind]
        if points:
            steps, errors = zip(*points, strict=True)
            axes.plot(
                steps,
                errors,
                linewidth=width,
                label=label,
                color="C0",
                marker="o" if len(points) < 12 else None,
                markersize=3,
            )
    for record in records:
        if record.get("kind") == "warmup_end":
            axes.axvline(record["step"], color="0.6", linewidth=0.8, linestyle=":", label="warm-up ends")
    axes.set(xlabel="steps", ylabel="error (%)", title=title, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.25)
    if records:
        axes.legend(frameon=False)
    paths = [folder / "curves.png", folder / "curves.svg"]
    for path in paths:
        try:
            # Equal runs, equal files: no date, and ids that do not come from chance.
            with rc_context({"svg.hashsalt": "fastres"}):
                figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise disk_error(error, folder, 0) from error
    return paths
