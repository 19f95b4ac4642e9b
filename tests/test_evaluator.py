"""evaluator.py: what is answered is counted, with running statistics, and nothing is changed."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from fastres.evaluator import Evaluation, Evaluator
from fastres.models.cifar import CifarNet, init_he_


class Fixed(nn.Module):
    """Answers with its input's first ten numbers; complains in training mode."""

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return images.flatten(1)[:, :10]


def batches_of(answers: list[int], labels: list[int], size: int) -> list[tuple[Tensor, Tensor]]:
    images = torch.zeros(len(answers), 3, 32, 32)
    images.view(len(answers), -1)[torch.arange(len(answers)), torch.tensor(answers)] = 1
    target = torch.tensor(labels)
    return [(images[k : k + size], target[k : k + size]) for k in range(0, len(answers), size)]


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_evaluation_counts_what_was_answered(size: int) -> None:
    answers, labels = [0, 1, 2, 2, 9, 9, 3], [0, 1, 2, 3, 9, 0, 3]
    net = Fixed()
    evaluator = Evaluator(net, batches_of(answers, labels, size), num_classes=10, dtype=torch.float32)
    evaluator()
    result = evaluator()  # a second time: nothing is left over from the first
    assert net.training
    assert result.num_images == 7
    assert result.error == pytest.approx(2 / 7)
    assert result.confusion[3][2] == 1
    assert result.confusion[0][9] == 1
    assert result.class_errors[:4] == [0.5, 0.0, 0.0, 0.5]
    assert result.class_errors[5] is None
    exp = torch.tensor(1.0).exp()
    right, wrong = (-torch.log(v / (exp + 9)) for v in (exp, torch.tensor(1.0)))
    assert result.loss == pytest.approx(float(5 * right + 2 * wrong) / 7, rel=1e-6)


@pytest.fixture
def net() -> CifarNet:
    made = CifarNet(8)
    init_he_(made, mode="fan_in", generator=torch.Generator().manual_seed(0))
    return made


def noise(num: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, 3, 32, 32, generator=generator), torch.randint(10, (num,), generator=generator)


def test_running_statistics_are_used_and_left_alone(net: CifarNet) -> None:
    images, labels = noise()
    before = {k: t.clone() for k, t in net.state_dict().items()}
    together = Evaluator(net, [(images, labels)], num_classes=10, dtype=torch.float32)()
    singly = [(images[k : k + 1], labels[k : k + 1]) for k in range(len(images))]
    one_by_one = Evaluator(net, singly, num_classes=10, dtype=torch.float32)()
    assert together.confusion == one_by_one.confusion
    assert together.loss == pytest.approx(one_by_one.loss, rel=1e-5)
    assert all(torch.equal(before[k], t) for k, t in net.state_dict().items())
    assert net.training


def test_each_part_is_in_the_mode_it_was_in(net: CifarNet) -> None:
    for training in (True, False):
        net.train(training)
        net.layer1.train(not training)  # as one freezes a part
        Evaluator(net, [noise()], num_classes=10, dtype=torch.float32)()
        assert (net.training, net.layer1.training, net.layer2.training) == (training, not training, training)


def test_a_captured_evaluation_sees_the_weights_of_each_call(net: CifarNet) -> None:
    captures: list[object] = []

    class StandIn:
        def __init__(self, branches: Sequence[Callable[[], None]], static: Sequence[Tensor]) -> None:
            captures.append(static)
            self.branches = branches
            for branch in branches:
                branch()

        def replay(self) -> None:
            assert not net.training
            self.branches[0]()

        def check(self) -> None: ...

    plain = Evaluator(net, [noise()], num_classes=10, dtype=torch.float32)
    captured = Evaluator(net, [noise()], num_classes=10, dtype=torch.float32, capture=StandIn)
    captured.warm_up()
    assert len(captures) == 1
    assert net.training
    for _ in range(2):
        assert captured() == plain()
        with torch.no_grad():
            net.fc.bias.add_(torch.arange(10))
    assert captured() == plain()
    assert len(captures) == 1
    assert net.training


def test_compiled_networks_are_run_eagerly(net: CifarNet) -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        calls.append(1)
        return graph

    net.compile(backend=backend)
    Evaluator(net, [noise()], num_classes=10, dtype=torch.float32)()
    assert not calls


def test_nothing_to_evaluate_is_refused(net: CifarNet) -> None:
    with pytest.raises(ValueError, match="no batches"):
        Evaluator(net, [], num_classes=10, dtype=torch.float32)
    assert Evaluation(0.0, [[1, 0], [0, 1]]).error == 0
