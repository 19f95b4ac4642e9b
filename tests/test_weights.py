"""Weights of other projects in every dress they come in, and files that are no weights at all."""

import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastres.errors import InputError
from fastres.models.cifar import CifarNet
from fastres.weights import read_weights

State = dict[str, Tensor]


def state_of(depth: int = 14, shortcut: Literal["A", "B"] = "A") -> State:
    torch.manual_seed(0)
    return {name: torch.randn_like(t) for name, t in CifarNet(depth, shortcut=shortcut).state_dict().items()}


def renamed(state: State, change: Callable[[str], str]) -> State:
    return {change(name): t for name, t in state.items()}


def assert_equal(got: State, wanted: State) -> None:
    assert set(got) == set(wanted)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


DRESSES: dict[str, Callable[[State], object]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "best_prec1": 91.7, "epoch": 200},
    "model": lambda state: {"model": state, "optimizer": {"param_groups": [{"lr": 0.1}]}},
    "net in state_dict": lambda state: {"state_dict": {"net": state}},
    "DataParallel, linear": lambda state: {
        "state_dict": renamed(state, lambda n: "module." + n.replace("fc.", "linear."))
    },
    "compiled": lambda state: renamed(state, lambda n: "_orig_mod." + n),
    "compiled DataParallel": lambda state: renamed(state, lambda n: "module._orig_mod." + n),
    "counters": lambda state: {**state, "bn1.num_batches_tracked": torch.tensor(7)},
}


@pytest.mark.parametrize("dress", DRESSES)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_weights(dress: str, zipped: bool, tmp_path: Path) -> None:
    state = state_of()
    torch.save(DRESSES[dress](state), tmp_path / "net.th", _use_new_zipfile_serialization=zipped)
    weights = read_weights(tmp_path / "net.th")
    assert (weights.depth, weights.shortcut, weights.arch) == (14, "A", None)
    assert_equal(weights.state, state)
    CifarNet(14).load_state_dict(weights.state, strict=True)


def test_safetensors_and_half_precision(tmp_path: Path) -> None:
    state = {name: t.half() for name, t in state_of(20).items()}
    save_file(state, tmp_path / "net.safetensors")
    weights = read_weights(tmp_path / "net.safetensors")
    assert weights.depth == 20
    assert {t.dtype for t in weights.state.values()} == {torch.float32}
    assert_equal(weights.state, {name: t.float() for name, t in state.items()})


@pytest.mark.parametrize("name", ["downsample", "shortcut"])
def test_projections_mean_option_b(name: str, tmp_path: Path) -> None:
    state = state_of(14, "B")
    torch.save(renamed(state, lambda n: n.replace("downsample", name)), tmp_path / "net.pt")
    weights = read_weights(tmp_path / "net.pt")
    assert (weights.depth, weights.shortcut, weights.arch) == (14, "B", "resnet")
    assert_equal(weights.state, state)


class RunsCode:
    """Its unpickling makes a marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused(zipped: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "net.pth"
    torch.save({"state_dict": state_of(8), "extra": RunsCode(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"refused: to read it would run code \(\w+\.mkdir\)"):
        read_weights(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # and so it would have
    assert marker.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"\(torch\.nn\.modules\.linear\.Linear\)"):
        read_weights(tmp_path / "net.pth")


def test_other_pickles_are_named_for_what_they_are(tmp_path: Path) -> None:
    for protocol in (0, 4):  # of the second torch warns, with a line of its source
        (tmp_path / "net.pth").write_bytes(pickle.dumps({"a": [1, 2]}, protocol=protocol))
        refused = pytest.raises(InputError, match=r"was not written by torch\.save, or is damaged; fastres reads state")
        with (
            warnings.catch_warnings(record=True, action="always") as seen,
            refused,
        ):  # an error would look as the file's
            read_weights(tmp_path / "net.pth")
        assert not seen
    (tmp_path / "net.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"damaged \(it is empty\)"):
        read_weights(tmp_path / "net.pth")


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(200)])
def test_what_is_no_weights_file(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name) as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_a_truncated_or_missing_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match="No such file"):
        read_weights(path)
    if path.suffix == ".pth":
        torch.save(state_of(8), path)
    else:
        save_file(state_of(8), path)
    path.write_bytes(path.read_bytes()[:-1_000])
    with pytest.raises(InputError, match=name):
        read_weights(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "layer2.1.bn2.bias"}, r"layer2\.1\.bn2\.bias is missing$"),
        (lambda s: {**s, "head.weight": torch.zeros(1)}, r"head\.weight is unexpected$"),
        (lambda s: {**s, "fc.weight": torch.zeros(100, 64)}, r"fc\.weight is \(100, 64\), not \(10, 64\)$"),
        (
            lambda s: {k: v for k, v in s.items() if "layer3" not in k},
            r"layer3\.0\.conv1\.weight is missing.* 17 more$",
        ),
        (lambda s: {**s, "layer1.9.conv1.weight": torch.zeros(1)}, "ResNet of 20 layers"),
        (
            lambda _: {"features.0.weight": torch.zeros(1)},
            r"no layer1\.0\.conv1\.weight; its tensors: features\.0\.weight",
        ),
        (lambda s: [s], "holds a list, not a state dict"),
        (
            lambda s: {**s, "fc.bias": s["fc.bias"].to_sparse()},
            r"fc\.bias is torch\.float32 \(sparse_coo\); weights",
        ),
        (lambda s: {**s, "fc.bias": s["fc.bias"].to("meta")}, r"fc\.bias is torch\.float32 \(meta\)"),
        (lambda s: {**s, "fc.bias": s["fc.bias"].to(torch.complex64)}, r"fc\.bias is torch\.complex64"),
        (lambda s: {**s, "fc.bias": s["fc.bias"].to(torch.int8)}, r"fc\.bias is torch\.int8"),
        (lambda _: {}, "its tensors: none"),
    ],
)
def test_other_networks_are_refused_by_name(change: Callable[[State], object], says: str, tmp_path: Path) -> None:
    torch.save(change(state_of()), tmp_path / "net.pt")
    with pytest.raises(InputError, match=says):
        read_weights(tmp_path / "net.pt")


def test_a_pickle_that_holds_itself_ends(tmp_path: Path) -> None:
    content: dict[str, object] = {}
    content["state_dict"] = content
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(InputError, match="its tensors: none"):
        read_weights(tmp_path / "net.pt")
