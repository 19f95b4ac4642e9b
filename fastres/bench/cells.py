"""What a benchmark times: configurations, one by one or all combinations of switches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastres.config import RunConfig


@dataclass(frozen=True)
class Cell:
    """One configuration to be timed.

    Attributes:
        label: Names it in tables.
        config: What `train` would run; its number of steps does not matter.
        frozen: The same batch every step instead of a loader: what is left is the step itself.
        num_replicas: Networks with seeds of their own, side by side in one step.
    """

    label: str
    config: RunConfig
    frozen: bool = False
    num_replicas: int = 1


def matrix(base: RunConfig, switches: dict[str, Sequence[Any]]) -> Iterator[Cell]:
    """All combinations of switches as cells.

    Args:
        base: What all have in common.
        switches: Values by "depth", "batch_size", "loader" ("none": a frozen batch), "precision", "compile", "graph",
            "native", "deterministic". A switch with one value is left out of the labels, but for depth and loader.
    """
    places = {
        "depth": ("model", "depth"),
        "batch_size": ("recipe", "batch_size"),
        "loader": ("execution", "loader"),
        "precision": ("execution", "precision"),
        "compile": ("execution", "compile"),
        "graph": ("execution", "cuda_graph"),
        "native": ("execution", "native"),
        "deterministic": ("execution", "deterministic"),
    }
    combinations: list[dict[str, Any]] = [{}]
    for name, values in switches.items():
        combinations = [{**chosen, name: value} for chosen in combinations for value in values]
    for chosen in combinations:
        tree = base.to_dict()
        words = []
        for name, value in chosen.items():
            section, key = places[name]
            tree[section][key] = "resident" if (name, value) == ("loader", "none") else value
            if name in ("depth", "loader") or len(switches[name]) > 1:
                words.append(_word(name, value))
        config = RunConfig.from_dict(tree)
        label = " ".join([config.name, *(word for word in words if word)])
        yield Cell(label, config, frozen=chosen.get("loader") == "none")


def _word(name: str, value: Any) -> str:
    """A switch's value as a table names it."""
    if name == "depth":
        return ""  # the network's name says it
    if name == "loader":
        return "frozen batch" if value == "none" else str(value)
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"batch {value}" if name == "batch_size" else str(value)
