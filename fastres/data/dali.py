"""The same batches as resident.py's, by NVIDIA DALI. The only file that imports nvidia.dali.

DALI does the pixel work and draws nothing: the epoch plan says which image, crop and flip. A pipeline run costs tens of
microseconds and about one more for each sample, so many steps' batches are one run, and all of them one DALI sample: a
sequence of frames, rearranged out of the data set (itself one sequence, handed over once without a copy) and then
shifted and mirrored by an affine map a frame, zeros outside.
"""

import contextlib
import importlib
import importlib.util
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.dlpack
from torch import Tensor

from fastres.data.deviceplan import DevicePlan, decode_index, look_up
from fastres.data.imageset import IMAGE_SIZE, Float32Array, ImageSet
from fastres.data.pixels import pixels
from fastres.data.plan import PAD, EpochPlan, Samples
from fastres.data.resident import ONE_KERNEL
from fastres.errors import MachineError, says_out_of_memory

RUNS_AHEAD = 2  # runs that are asked for before the first of them is taken
RING_RUNS = 4  # in the ring: in use, next, being copied, and the one before, not all of whose steps may be launched
FRAMES_PER_RUN = 4_096  # 50 MB in fp32; large enough that a run's fixed cost does not show
MOST_FRAMES = 65_535  # a run: on a GPU each is a block of DALI's warp along z, of which CUDA has no more

START = "DALI does not start"


def dali_available() -> bool:
    """Whether DALI is installed; does not import it (0.4 s)."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the nvidia namespace
        return False


def check_starts(device: torch.device) -> None:
    """Raise MachineError where DALI is installed and does not make a batch: some errors come with the first kernel."""
    black, label = np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), np.zeros(1, np.uint8)
    images = ImageSet(black, label, black, label, ("black",), "black", "", official=False, source="built in")
    loader = DaliLoader(
        images,
        EpochPlan(0, 1),
        mean=images.mean_image(),
        batch_size=1,
        device=device,
        dtype=torch.float32,
        num_threads=1,
        steps_per_run=1,
    )
    with contextlib.closing(loader):
        loader.prepare(0)


class DaliLoader:
    """Training batches by a DALI pipeline on the CPU or a GPU that works ahead of the training.

    Args:
        images: Its training images are used.
        plan: Order, crops and flips.
        others: Plans of runs that train beside this one; one pipeline makes the batches of all, see `seats`.
        mean: float32 `(32, 32, 3)`, 0 to 255, of the training images.
        batch_size: Images a step.
        device, dtype: Of the batches. DALI works in fp32; the cast is made once, when a batch is taken.
        channels_last: Memory format of the batches; False makes another copy.
        num_threads: DALI's CPU threads.
        ahead: Steps that may be prepared before the first of them is launched: those of a graph.
        steps_per_run: Steps in one pipeline run; default: about 4,096 images, of all plans. At least `ahead`, or the
            ring would be filled anew before it is read.
        compiled: Compile what a step takes from the ring; else each operation is a kernel.

    Raises:
        MachineError: DALI is not installed, does not start, or would need more frames a run than it takes.
    """

    name, prefetched = "dali", 0

    def __init__(
        self,
        images: ImageSet,
        plan: EpochPlan,
        *,
        others: Sequence[EpochPlan] = (),
        mean: Float32Array,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool = True,
        num_threads: int = 2,
        ahead: int = 1,
        steps_per_run: int | None = None,
        compiled: bool = False,
    ) -> None:
        if not dali_available():
            raise MachineError(
                "the DALI loader needs NVIDIA DALI, which is not installed (it exists for Linux): "
                "pip install nvidia-dali-cuda120, or use --loader resident"
            )
        self.plans, self.batch_size, self.channels_last = (plan, *others), batch_size, channels_last
        self.period = self.steps_per_run = max(ahead, steps_per_run or FRAMES_PER_RUN // (batch_size * len(self.plans)))
        frames = self.steps_per_run * batch_size * len(self.plans)
        if device.type == "cuda" and frames > MOST_FRAMES:
            raise MachineError(
                f"the DALI loader makes at most {MOST_FRAMES:,} images at once, and these need {frames:,} "
                f"(--graph-steps {self.steps_per_run}, {len(self.plans)} of {batch_size:,}); use --loader resident"
            )
        self._labels = torch.from_numpy(images.train_labels.astype(np.int64)).to(device)
        self._codes = [DevicePlan(each, batch_size, device) for each in self.plans]
        shape = (RING_RUNS * self.steps_per_run, len(self.plans), batch_size, IMAGE_SIZE, IMAGE_SIZE, 3)
        self._ring = torch.zeros(shape, dtype=dtype, device=device)
        self._rings = [self._ring[:, place] for place in range(len(self.plans))]
        self._from_ring: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = _from_ring
        if compiled:
            self._from_ring = torch.compile(_from_ring, fullgraph=True, dynamic=False, options=ONE_KERNEL)
        # On which the ring is filled, beside the training.
        self._side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._filled: dict[int, torch.cuda.Event | None] = {}  # runs in the ring, and when their copy is done
        self._data = torch.from_numpy(pixels(images.train_images, mean)).to(device)[None]  # DALI reads it in place
        with _explained(START):  # half installed, or not for this driver
            self._pipeline: Any = _pipeline(device, num_threads)
            self._feed("data", self._data)
        self._asked: list[int] = []  # runs that DALI has the input of, oldest first
        self._under_way = 0  # of them: that it was told to make
        self._started, self._whole = False, True  # whether DALI was told to make all that it was fed
        # DALI's buffers, oldest first, each with when its copy is done: let go, DALI writes the next run into one, and
        # knows nothing of our stream.
        self._held: deque[tuple[torch.cuda.Event | None, Tensor]] = deque()
        self._run = -1  # the run that is being used

    def prepare(self, step: int) -> None:
        """Where 0-based step `step` begins a run of DALI: copy it and the next two into the ring, and ask for more.

        Waits for no device; for DALI's host threads only where they are slower than the training. Any step may be asked
        for; steps in order are what is quick. Up to a run's steps may be prepared before the first is launched.
        """
        for codes in self._codes:
            codes.prepare(step)
        run = step // self.steps_per_run
        if run == self._run:
            return
        if not self._whole:
            raise RuntimeError("DALI holds what it was fed before a signal came; make another loader")
        if run not in self._filled:  # the first, or a jump
            self._filled.clear()
        self._run = run
        # By now every step of the runs before the last one is launched, so this event covers all that read their slots.
        used = torch.cuda.current_stream().record_event() if self._side else None
        for wanted in (run, run + 1, run + 2):
            if wanted not in self._filled:
                self._fill(wanted, used)
        for old in [old for old in self._filled if old < run]:
            del self._filled[old]
        if (ready := self._filled[run]) is not None:
            torch.cuda.current_stream().wait_event(ready)

    def load(self, counter: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of the step that `counter` says: images `(batch, 3, 32, 32)`, labels int64 `(batch,)`."""
        return self.load_of(0, counter)

    def load_of(self, place: int, counter: Tensor) -> tuple[Tensor, Tensor]:
        """`load` for the plan at `place` among all plans."""
        batch, labels = self._from_ring(self._rings[place], self._codes[place].codes, self._labels, counter)
        return (batch if self.channels_last else batch.contiguous()), labels

    def seats(self) -> list["Seat"]:
        """A loader for each plan, all fed by this one's pipeline."""
        return [Seat(self, place) for place in range(len(self.plans))]

    def close(self) -> None:
        """Stop DALI's threads and let go of the data."""
        if self._side:
            self._side.synchronize()  # the last copies read DALI's buffers
        self._held.clear()
        try:
            with contextlib.suppress(MachineError):  # discard what it was at
                self._drain()
        finally:
            self._pipeline = None

    def _fill(self, run: int, used: torch.cuda.Event | None) -> None:
        """Copy a run into its place in the ring, cast to the training precision, behind `used`."""
        if self._asked and self._asked[0] != run:  # a jump: discard what was asked for
            self._drain()
        self._whole = False
        while len(self._asked) < RUNS_AHEAD:
            self._ask(self._asked[-1] + 1 if self._asked else run)
        self._whole = True
        place = run % RING_RUNS * self.steps_per_run
        slots = self._ring[place : place + self.steps_per_run]
        with torch.cuda.stream(self._side):  # does nothing where there is none
            if self._side and used:
                self._side.wait_event(used)
            while self._held and ((copied := self._held[0][0]) is None or copied.query()):  # type: ignore[no-untyped-call]
                self._held.popleft()
            frames = self._take()
            slots.copy_(frames.view(slots.shape), non_blocking=True)
            self._filled[run] = copied = self._side.record_event() if self._side else None
            self._held.append((copied, frames))

    def _drain(self) -> None:
        while self._under_way:
            self._take()

    def _ask(self, run: int) -> None:
        """Have the pipeline make a run, behind those it is at."""
        samples = self._samples(run)
        with _explained(f"DALI failed at its run {run}"):
            self._feed("order", torch.from_numpy(samples.index)[None])
            self._feed("matrices", torch.from_numpy(_matrices(samples))[None])
            self._asked.append(run)
            if self._started:
                self._pipeline.schedule_run()
                self._under_way += 1
            elif len(self._asked) == RUNS_AHEAD:  # DALI's first call starts as many runs as its queue is deep
                self._pipeline.schedule_run()
                self._started, self._under_way = True, RUNS_AHEAD

    def _samples(self, run: int) -> Samples:
        """What a run is made of, in the order [step, plan, image]."""
        count = self.steps_per_run * self.batch_size
        parts = [plan.at(run * count, count) for plan in self.plans]
        if len(parts) == 1:
            return parts[0]
        return Samples(*(self._in_turns([getattr(part, field.name) for part in parts]) for field in fields(Samples)))

    def _in_turns(self, columns: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return np.stack([column.reshape(self.steps_per_run, -1) for column in columns], axis=1).reshape(-1)

    def _take(self) -> Tensor:
        """The frames float32 `(steps_per_run * plans * batch, 32, 32, 3)` of the oldest run under way."""
        run, under_way = self._asked.pop(0), self._under_way
        self._under_way = 0  # a pipeline that has failed gives nothing more
        with _explained(f"DALI failed at its run {run}"):
            (frames,) = self._pipeline.outputs(cuda_stream=self._side and self._side.cuda_stream)
        self._under_way = under_way - 1
        # By the array interface, not by DLPack: DALI gives such a buffer back by a thread that waits for the whole
        # device. Nothing but the stream above says when it is filled: it must be the one that copies it.
        if self._side:
            return torch.as_tensor(frames[0], device=self._data.device)
        tensor: Tensor = torch.utils.dlpack.from_dlpack(frames[0])
        return tensor

    def _feed(self, name: str, tensor: Tensor) -> None:
        tensors: Any = importlib.import_module("nvidia.dali.tensors")
        layout = "FHWC" if name == "data" else None
        if tensor.is_cuda:
            wrapped = tensors.TensorListGPU(tensor.__dlpack__(), layout=layout)
        else:
            wrapped = tensors.TensorListCPU(tensor.numpy(), layout=layout)
        self._pipeline.feed_input(name, wrapped)


def _from_ring(ring: Tensor, codes: Tensor, labels: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    """A plan's batch `(batch, 3, 32, 32)` of the step that `counter` says, and its labels int64 `(batch,)`."""
    batch = ring.index_select(0, counter % len(ring))[0].permute(0, 3, 1, 2)
    return batch, labels.index_select(0, decode_index(look_up(codes, counter)))


class Seat:
    """The batches of one of the plans of a `DaliLoader`."""

    name, prefetched = DaliLoader.name, DaliLoader.prefetched

    def __init__(self, loader: DaliLoader, place: int) -> None:
        self._loader, self._place, self.period = loader, place, loader.period

    def prepare(self, step: int) -> None:
        """Have the step's batches of all plans ready; the second seat to ask finds them there."""
        self._loader.prepare(step)

    def load(self, counter: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of the step that `counter` says: images `(batch, 3, 32, 32)`, labels int64 `(batch,)`."""
        return self._loader.load_of(self._place, counter)

    def close(self) -> None:
        """Stop DALI's threads, for all seats; once is enough."""
        self._loader.close()


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn DALI's errors into MachineError: `what` and why. One for lack of memory is `guards`' to explain.

    DALI names the operator, prints where the pipeline made it, and says why after "encountered:".
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        if says_out_of_memory(error):
            raise
        said = str(error).rpartition("encountered:")[2].splitlines()
        first = next((line for line in said if line.strip()), "no reason given")
        raise MachineError(f"{what}: {first.strip().rstrip(':')}; --loader resident does without") from error


def _pipeline(device: torch.device, num_threads: int) -> Any:
    """The one pipeline definition, CPU and GPU."""
    dali: Any = importlib.import_module("nvidia.dali")  # its type information lacks most of what is used here
    fn, types = dali.fn, dali.types
    gpu = device.type == "cuda"
    pipeline = dali.Pipeline(
        batch_size=1,
        num_threads=num_threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=RUNS_AHEAD,
        exec_dynamic=True,
    )
    with pipeline:
        data = fn.external_source(
            name="data",
            device="gpu" if gpu else "cpu",
            no_copy=True,
            repeat_last=True,
            layout="FHWC",
            dtype=types.FLOAT,
        )
        order = fn.external_source(name="order", dtype=types.INT32, ndim=1)
        matrices = fn.external_source(name="matrices", dtype=types.FLOAT, ndim=3)
        frames = fn.sequence_rearrange(data, new_order=order)
        batch = fn.warp_affine(
            frames,
            matrix=fn.per_frame(matrices),
            size=(IMAGE_SIZE, IMAGE_SIZE),
            interp_type=types.INTERP_NN,
            fill_value=0,
            inverse_map=True,
        )
        pipeline.set_outputs(batch)
    pipeline.build()
    return pipeline


def _matrices(samples: Samples) -> Float32Array:
    """Affine maps `(num, 2, 3)` from a pixel of the batch to one of the image; both count from the pixels' corners."""
    matrices = np.zeros((len(samples), 2, 3), np.float32)
    matrices[:, 0, 0] = np.where(samples.flip, -1, 1)
    matrices[:, 0, 2] = samples.dx - PAD + np.where(samples.flip, IMAGE_SIZE, 0)
    matrices[:, 1, 1] = 1
    matrices[:, 1, 2] = samples.dy - PAD
    return matrices
