"""`fastres.load`: a trained network as a function of images, from a run's checkpoint alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastres.build import EVALUATION_BATCH, empty_net, place
from fastres.config import RunConfig
from fastres.data.imageset import IMAGE_SIZE, Float32Array
from fastres.data.resident import evaluation_batches
from fastres.errors import InputError
from fastres.evaluate import check_scale, for_one_pass, read_checkpoint
from fastres.evaluator import evaluating
from fastres.files import given_path
from fastres.models.imagenet import Network
from fastres.runtime import Runtime, autocast, prepare, usual_torch


@dataclass(frozen=True)
class Predictor:
    """A trained network; call it with images.

    Attributes:
        net: In evaluation mode until you change that, on its device. It takes float images `(batch, 3, 32, 32)`:
            (pixels - mean) / 64.
        mean: float32 `(32, 32, 3)`, 0 to 255: the mean of the training images.
        class_names: Of the logits.
        config: The run's.
        step: Of training.
        runtime: Device and precision.
    """

    net: Network = field(repr=False)
    mean: Float32Array = field(repr=False)
    class_names: tuple[str, ...]
    config: RunConfig
    step: int
    runtime: Runtime

    @usual_torch()
    @torch.no_grad()
    def __call__(self, images: Any) -> Float32Array:
        """The logits, float32 `(num, classes)`. In evaluation mode, whatever mode `net` is in, which stays.

        Args:
            images: uint8 `(num, 32, 32, 3)`, RGB, as in `ImageSet`; or one, `(32, 32, 3)`. An array, a tensor, a PIL
                image, or a list of any of these.

        Raises:
            InputError: Images of another type or shape.
        """
        wanted = f"give uint8 (num, {IMAGE_SIZE}, {IMAGE_SIZE}, 3), 0 to 255, colours last"
        try:
            images = np.asarray(images)
        except (ValueError, TypeError) as error:
            raise InputError(f"images are no array ({error}); {wanted}") from error
        images = images[None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise InputError(f"images are {images.dtype} {images.shape}; {wanted}")
        device, dtype = self.runtime.device, self.runtime.dtype
        batches = evaluation_batches(
            images,
            np.zeros(len(images), np.uint8),
            self.mean,
            batch_size=EVALUATION_BATCH,
            device=device,
            dtype=dtype,
            channels_last=self.config.execution.channels_last,
        )
        with evaluating(self.net), autocast(device, dtype):
            logits = [self.net(batch).float().cpu().numpy() for batch, _ in batches]
        return np.concatenate(logits) if logits else np.zeros((0, len(self.class_names)), np.float32)


@usual_torch()
def load(
    run: str | Path,
    *,
    device: str | torch.device = "auto",
    precision: str | None = None,
    say: Callable[[str], None] = print,
) -> Predictor:
    """The network that a run trained, as far as it got. No data set is needed.

    On a GPU it sets torch's current device, TF32 and cuDNN's search, as training does.

    Args:
        run: A run folder, whose newest whole checkpoint is taken, or a checkpoint file.
        device: "auto", "cpu", "cuda", "cuda:0".
        precision: "auto", "fp32", "tf32", "bf16", "fp16"; default: the run's.
        say: Takes one-line notices: a damaged checkpoint was passed over.

    Raises:
        InputError: There is no such run, it has no checkpoint yet, or no such precision or GPU index.
        MachineError: No GPU where one was asked for.
    """
    path = given_path("run", run)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a run folder")
    saved = read_checkpoint(path, say)
    if saved is None:
        raise InputError(f"{path} is no checkpoint of fastres; `fastres eval` reads other projects' weights")
    check_scale(saved, path)
    config = RunConfig.from_dict(saved.meta["config"])
    asked = {"device": str(device), "threads": torch.get_num_threads()}
    asked |= {"precision": precision} if precision is not None else {}
    execution = RunConfig.from_dict({"execution": for_one_pass(config.to_dict(), asked)["execution"]}).execution
    runtime, names = prepare(execution), tuple(saved.meta["data"]["class_names"])
    net = empty_net(config.model, num_classes=len(names))
    net.load_state_dict(saved.weights)
    mean = saved.tensors["data/mean"].numpy()
    return Predictor(place(net, execution, runtime).eval(), mean, names, config, saved.meta["step"], runtime)
