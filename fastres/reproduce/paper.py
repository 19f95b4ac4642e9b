"""What the paper says of its CIFAR-10 networks, as far as it is compared with (He et al., CVPR 2016, section 4.2)."""

from dataclasses import dataclass, fields

from fastres.config import RunConfig, make_config


@dataclass(frozen=True)
class Published:
    """Table 6's row of a network."""

    error: float  # test error, a fraction
    best: float | None = None  # of five runs, where `error` is their mean
    std: float | None = None  # of five runs


# By architecture and depth. Of the plain nets the paper prints no numbers: Figure 6 has their curves.
TABLE_6: dict[tuple[str, int], Published] = {
    ("resnet", 20): Published(0.0875),
    ("resnet", 32): Published(0.0751),
    ("resnet", 44): Published(0.0717),
    ("resnet", 56): Published(0.0697),
    ("resnet", 110): Published(0.0661, best=0.0643, std=0.0016),
    ("resnet", 1202): Published(0.0793),
}

# How far a mean may lie from the printed number and still agree with it. The paper's own five runs of ResNet-110 have a
# standard deviation of 0.16 points; the other rows are one run each, so of both sides together about 0.2.
TOLERANCE = 0.002

# What Table 6 needs, best evidence for the time first: networks, and how many seeds of each.
STAGES: tuple[tuple[str, int, int | None], ...] = (
    ("resnet", 20, None),
    ("resnet", 110, 1),
    ("plain", 20, 1),
    ("plain", 56, 1),
    ("resnet", 56, None),
    ("resnet", 110, None),
    ("plain", 32, 1),
    ("plain", 44, 1),
    ("resnet", 32, None),
    ("resnet", 44, None),
)  # None: as many as were asked for
FIGURE_7 = (("plain", 20), ("plain", 56), ("resnet", 20), ("resnet", 56), ("resnet", 110))


def departures(config: RunConfig) -> list[str]:
    """In what a run is not as the paper has it, as "steps 64,000 -> 3,910"; where it is silent any choice will do."""
    model, recipe = config.model, config.recipe
    paper = make_config("paper", model={"arch": model.arch, "depth": model.depth}).recipe
    unused = set()
    if recipe.schedule != "step":
        unused |= {"milestones", "lr_decay"}
    if "none" in (recipe.warmup, paper.warmup):
        unused |= {"warmup_steps", "warmup_lr"}
    if recipe.warmup == "ramp":
        unused |= {"warmup_lr"}
    names = [f.name for f in fields(recipe) if f.name not in unused]
    pairs = {name: (getattr(paper, name), getattr(recipe, name)) for name in names}
    if model.arch == "resnet":
        pairs["shortcut"] = ("A", model.shortcut)
    return [f"{name} {_written(was)} -> {_written(now)}" for name, (was, now) in pairs.items() if was != now]


def _written(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
