"""What a run's network answers on the test images: errors by class, most confident mistakes, layer responses."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastres.data.imageset import Bytes
from fastres.evaluate import Trained, load_trained
from fastres.evaluator import Evaluation
from fastres.responses import layer_responses
from fastres.runtime import autocast

NUM_MISTAKES = 25  # a sheet of five by five


@dataclass(frozen=True)
class Mistake:
    """A test image that got the wrong answer."""

    index: int  # in the test set
    image: str  # PNG as a data URI
    true: str
    answer: str
    probability: float  # of the answer, 0 to 1


@dataclass(frozen=True)
class Answers:
    """A network tested again, from its newest checkpoint."""

    step: int | None
    evaluation: Evaluation
    class_names: tuple[str, ...]
    mistakes: list[Mistake]  # the most confident, most confident first
    responses: list[float]  # std of each 3x3 layer's output after BN, in layer order
    caveats: tuple[str, ...]  # what there is to say of the images, as `evaluate.Trained` has it


def answers_of(run: Path, execution: dict[str, Any], say: Callable[[str], None]) -> Answers:
    """Test a run's newest checkpoint on the images that its config names.

    Args:
        run: The run folder.
        execution: Changes to `fastres.config.Execution`: device, where the data is.
        say: Takes one-line notices.

    Raises:
        InputError: No checkpoint, or a damaged one.
        MachineError: No data, no such device.
    """
    trained = load_trained(run, execution, say=say)
    labels, logits = _logits(trained)
    loss = float(F.cross_entropy(logits.double(), labels))
    answers = logits.argmax(dim=1)
    num_classes = len(trained.images.class_names)
    counts = torch.bincount(labels * num_classes + answers, minlength=num_classes**2)
    confusion: list[list[int]] = counts.view(num_classes, num_classes).tolist()
    responses = layer_responses(trained.net, trained.batches(), trained.runtime.dtype)
    return Answers(
        trained.step,
        Evaluation(loss, confusion),
        trained.images.class_names,
        _mistakes(trained, labels, answers, logits.softmax(dim=1).amax(dim=1)),
        [response.std for response in responses],
        trained.caveats,
    )


@torch.no_grad()
def _logits(trained: Trained) -> tuple[Tensor, Tensor]:
    """Labels int64 `(num_images,)` and fp32 logits `(num_images, num_classes)`, on the CPU, in the order of the set."""
    trained.net.eval()
    labels, logits = list[Tensor](), list[Tensor]()
    for images, truth in trained.batches():
        with autocast(images.device, trained.runtime.dtype):
            logits.append(trained.net(images).float().cpu())
        labels.append(truth.cpu())
    return torch.cat(labels), torch.cat(logits)


def _mistakes(trained: Trained, labels: Tensor, answers: Tensor, probabilities: Tensor) -> list[Mistake]:
    """Equal probabilities (1 in fp32) keep the order of the set."""
    wrong = (answers != labels).nonzero().flatten()
    order = wrong[probabilities[wrong].argsort(descending=True, stable=True)][:NUM_MISTAKES].tolist()
    names, images = trained.images.class_names, trained.images.test_images
    return [
        Mistake(i, data_uri(images[i]), names[int(labels[i])], names[int(answers[i])], float(probabilities[i]))
        for i in order
    ]


def data_uri(image: Bytes) -> str:
    """A uint8 image `(height, width, 3)` as a PNG in a data URI."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def png(image: Bytes) -> bytes:
    """A uint8 image `(height, width, 3)` as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return file.getvalue()
