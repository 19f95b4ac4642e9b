"""shadow.py: bf16 copies of the weights change nothing that is computed, saved or named."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import fastres
from fastres import checkpoint
from fastres.errors import Interrupted
from fastres.optim import make_sgd, momentum_buffers
from fastres.runtime import Runtime
from fastres.step import Replica, TrainStep
from tests.runs import assert_same_run, tiny
from tests.test_loop import interrupt_at
from tests.test_step import CPU, Noise, compiles, make_net, one_thread  # noqa: F401 (a fixture for the whole file)

STEPS = 50
Scope = Literal["none", "blocks", "whole"]


def make(
    *,
    shadows: bool,
    decay_on: Literal["all", "weights"] = "all",
    lr_in_velocity: bool = False,
    momentum: float = 0.9,
    scope: Scope = "none",
    channels_last: bool = True,
) -> Replica:
    net = make_net()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    # The unfused SGD: the fused one rounds the last few numbers of each tensor in another way, at places that depend
    # on where a tensor ends.
    optimizer = make_sgd(
        net,
        lr=0.1,
        momentum=momentum,
        weight_decay=1e-2,
        weight_decay_on=decay_on,
        lr_in_velocity=lr_in_velocity,
        fused=False,
    )
    runtime = Runtime(CPU, "bf16", scope, shadow_weights=shadows)
    replica = Replica(net, optimizer, Noise(torch.bfloat16), runtime, num_steps=STEPS)
    replica.set_lrs(lambda step: 0.1 / (step + 1))
    return replica


def everything(replica: Replica) -> dict[str, Tensor]:
    velocities = {f"v/{name}": v for name, v in momentum_buffers(replica.net, replica.optimizer).items()}
    return {**replica.net.state_dict(), **velocities, "losses": replica.losses, "errors": replica.errors}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"decay_on": "weights"},
        {"channels_last": False},
        {"decay_on": "weights", "channels_last": False},
        {"lr_in_velocity": True},
        {"momentum": 0.0},
    ],
    ids=str,
)
def test_bit_equal_to_autocast_over_50_steps(how: dict[str, Any]) -> None:
    ours, theirs = make(shadows=True, **how), make(shadows=False, **how)
    for replica in (ours, theirs):
        step = TrainStep([replica])
        for k in range(STEPS):
            step(k)
    expected = everything(theirs)
    for name, value in everything(ours).items():
        assert torch.equal(value, expected[name]), name
        assert value.stride() == expected[name].stride(), name


def test_the_graph_has_no_casts_of_weights() -> None:
    replica = make(shadows=True)
    assert replica._sgd is not None
    seen: list[torch.dtype] = []
    convolution = torch.nn.functional.conv2d

    def noted(images: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        seen.append(weight.dtype)
        return convolution(images, weight, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.conv2d", noted)
        replica.forward(*replica.loader.load(replica.counter))
    assert seen == [torch.bfloat16] * 7
    masters = dict(replica.net.named_parameters())
    for name, leaf in replica._sgd.leaves.items():
        assert torch.equal(leaf, masters[name].bfloat16())
        assert leaf.stride() == masters[name].stride()
    assert all(p.dtype == torch.float32 for p in masters.values())


@compiles
def test_the_compiled_update_is_the_plain_one() -> None:
    """In one step, within the roundings of fused multiply-adds."""
    plain, compiled = make(shadows=True), make(shadows=True)
    assert compiled._sgd is not None
    from fastres import shadow

    compiled._sgd._update = torch.compile(shadow._update, fullgraph=True, dynamic=False)
    for replica in (plain, compiled):
        TrainStep([replica])(0)
    for (name, a), b in zip(everything(plain).items(), everything(compiled).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=name)


@compiles
@pytest.mark.parametrize("scope", ["whole", "blocks"])
def test_compiled_networks_take_the_shadows(scope: Scope) -> None:
    """One step's loss; a trajectory in bf16 says nothing."""
    compiled, eager = make(shadows=True, scope=scope), make(shadows=True)
    for replica in (compiled, eager):
        TrainStep([replica])(0)
    assert float(compiled.losses[0]) == pytest.approx(float(eager.losses[0]), rel=2e-3)
    assert compiled._sgd is not None
    moved = [bool((leaf != start).any()) for leaf, start in _beside_start(compiled)]
    assert all(moved)


def _beside_start(replica: Replica) -> list[tuple[Tensor, Tensor]]:
    fresh = make(shadows=True)
    assert replica._sgd is not None
    assert fresh._sgd is not None
    return list(zip(replica._sgd.leaves.values(), fresh._sgd.leaves.values(), strict=True))


def test_loaded_weights_reach_the_shadows() -> None:
    replica, other = make(shadows=True), make_net(seed=5)
    with torch.no_grad():
        for ours, theirs in zip(replica.net.state_dict().values(), other.state_dict().values(), strict=True):
            ours.copy_(theirs)
    replica.seek(7)
    assert int(replica.counter) == 7
    assert replica._sgd is not None
    for name, leaf in replica._sgd.leaves.items():
        assert torch.equal(leaf, other.get_parameter(name).bfloat16())


def test_warm_up_leaves_no_trace_in_the_shadows() -> None:
    replica = make(shadows=True)
    before = [tensor.clone() for tensor in replica.state()]
    step = TrainStep([replica])
    step.warm_up(None)
    assert all(torch.equal(a, b) for a, b in zip(before, replica.state(), strict=True))
    assert replica._sgd is not None
    assert any(tensor is replica._sgd.shadows for tensor in replica.state())


def test_runs_resume_and_are_saved_as_without_them(tmp_path: Path) -> None:
    how = {"precision": "bf16", "shadow_weights": True}
    for name in ("whole", "cut"):
        config = tiny(tmp_path / name, execution=how)
        if name == "whole":
            fastres.train(config)
            continue
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, 5)
            with pytest.raises(Interrupted):
                fastres.train(config)
        fastres.train(config, resume=Path(config.output.out or ""))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    plain = tiny(tmp_path / "plain", execution={"precision": "bf16"})
    fastres.train(plain)
    ours, theirs = (checkpoint.load(tmp_path / name / checkpoint.NEWEST) for name in ("whole", "plain"))
    assert {n: (t.shape, t.dtype) for n, t in ours.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.tensors.items()
    }


def test_only_in_bf16() -> None:
    from fastres.config import Execution
    from fastres.errors import InputError
    from fastres.runtime import prepare

    with pytest.raises(InputError, match="the precision here is fp32; use --precision bf16"):
        prepare(Execution(device="cpu", precision="fp32", shadow_weights=True))
    assert prepare(Execution(device="cpu", precision="bf16")).shadow_weights is False
    assert prepare(Execution(device="cpu", precision="bf16", shadow_weights=True)).shadow_weights is True
