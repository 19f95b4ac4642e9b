"""build.py: what is chosen on a GPU, on a device that holds no data."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastres import build
from fastres.build import build_evaluators, build_loaders, empty_net, inference_of, loader_kind
from fastres.config import RunConfig, make_config
from fastres.cudagraph import CapturedGraph
from fastres.data.imageset import ImageSet
from fastres.data.resident import ResidentLoader, _batch
from fastres.data.synthetic import make_synthetic
from fastres.native.fusednet import Inference
from fastres.native.layernet import LayerInference
from fastres.runtime import Runtime

META = Runtime(torch.device("meta"), "bf16", threads=1)  # not the CPU, as a GPU is
CUDA = replace(META, device=torch.device("cuda", 0), native=True)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return make_synthetic(num_train=20, num_test=1_100)


def configs(*seeds: int, **execution: Any) -> list[RunConfig]:
    return [make_config(seed=seed, recipe={"batch_size": 4}, execution=execution) for seed in seeds]


def test_seeds_share_the_resident_images_and_have_their_own_plans(images: ImageSet) -> None:
    how = {"loader": "resident", "channels_last": False}
    loaders = build_loaders(configs(5, 3, 4, **how), images, images.mean_image(), META)
    assert all(isinstance(loader, ResidentLoader) for loader in loaders)
    made: list[Any] = loaders
    assert [loader.window.plan.seed for loader in made] == [5, 3, 4]
    assert {loader.window.batch_size for loader in made} == {4}
    assert len({id(loader.window.codes) for loader in made}) == 3
    assert len({id(loader._pixels) for loader in made}) == 1
    assert {(loader.dtype, loader.channels_last) for loader in made} == {(torch.bfloat16, False)}


@pytest.mark.parametrize("scope", ["none", "blocks", "whole"])
def test_the_resident_loader_is_compiled_where_the_network_is(images: ImageSet, scope: Any) -> None:
    runtime = replace(META, compile_scope=scope)
    (loader,) = build_loaders(configs(0, loader="resident"), images, images.mean_image(), runtime)
    assert isinstance(loader, ResidentLoader)
    assert (loader._batch is _batch) == (scope == "none")


@pytest.mark.parametrize("there", [True, False])
def test_the_loader_that_auto_means(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr("fastres.data.dali.dali_available", lambda: there)
    (auto,), (resident,), (dali,) = configs(0), configs(0, loader="resident"), configs(0, loader="dali")
    on_cpu = replace(META, device=torch.device("cpu"))
    assert loader_kind(auto.execution, CUDA) == ("dali" if there else "resident")
    assert loader_kind(auto.execution, on_cpu) == "resident"
    assert [loader_kind(c.execution, r) for c in (resident, dali) for r in (CUDA, on_cpu)] == ["resident"] * 2 + [
        "dali"
    ] * 2


def test_which_kernels_test_a_network() -> None:
    net = empty_net(make_config(model={"depth": 8}).model, num_classes=10)
    assert type(inference_of(net, CUDA)) is Inference
    assert type(inference_of(net, replace(CUDA, layer_kernels=True))) is LayerInference
    assert inference_of(net, replace(CUDA, native=False)) is None
    assert inference_of(net, replace(CUDA, device=torch.device("cpu"))) is None


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_evaluations_share_their_images_and_are_captured_as_steps_are(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch, graph: bool, train: bool
) -> None:
    made: list[torch.nn.Module] = []
    forwards: list[Any] = ["first", "second"]

    def of(net: torch.nn.Module, _: Runtime) -> object:
        made.append(net)
        return forwards[len(made) - 1]

    monkeypatch.setattr(build, "inference_of", of)
    (config,) = configs(0)
    nets = [empty_net(config.model, num_classes=10) for _ in range(2)]
    runtime = replace(META, cuda_graph=graph)
    evaluators = build_evaluators(nets, config, images, images.mean_image(), runtime, train=train)
    assert [e.net for e in evaluators] == nets == made
    assert [e._forward for e in evaluators] == forwards
    assert {e._capture for e in evaluators} == {CapturedGraph if graph else None}
    assert evaluators[0]._batches[0][0] is evaluators[1]._batches[0][0]
    assert [len(labels) for _, labels in evaluators[0]._batches] == ([20] if train else [1_000, 100])
    assert {(i.dtype, i.device.type) for i, _ in evaluators[0]._batches} == {(torch.bfloat16, "meta")}
