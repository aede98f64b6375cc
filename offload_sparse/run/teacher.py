"""Distillation from the host: logits of the full network, which no device of the run could hold, for every
training image, computed once on the CPU.

    run_dir/teacher/000000.bin   float16[images, classes] of the first images, written whole or not at all
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from offload_sparse.store.copy.tables import to_device
from offload_sparse.store.files import make_folder, write_file
from offload_sparse.workloads.data.images import ImageSet

TEACHER_FOLDER = "teacher"
TEMPERATURE = 4.0
"""Of both networks' logits (Hinton et al. 2015)."""

BATCH = 128
"""Images that it looks at at a time."""

_IMAGES_PER_FILE = 4096


class Teacher:
    """The logits of a network for the images of a split, each seen as in evaluation.

    Args:
        network: builds it, with its weights, on the CPU; called only where logits are still to be computed.
        normalise: uint8 images to what the network takes.
        folder: where the logits are kept; what an interrupted pass has left there is not computed again."""

    def __init__(
        self,
        network: Callable[[], nn.Module],
        images: ImageSet,
        normalise: Callable[[Tensor], Tensor],
        folder: Path,
        classes: int,
    ) -> None:
        self._network, self._images, self._normalise = network, images, normalise
        self._folder, self._classes = folder, classes
        self._logits: list[Tensor] = []

    def compute(
        self,
        rank: int = 0,
        world_size: int = 1,
        quiet: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Compute what is missing of this rank's share; every rank then waits for the others, and calls
        ``open``. ``stop`` is asked after every batch, as often on every rank; where it says so, the files
        that are whole stay, and the answer is False."""
        make_folder(self._folder)
        parts = list(enumerate(torch.arange(len(self._images)).split(_IMAGES_PER_FILE)))
        batches = self._batches(parts[rank::world_size], quiet or rank > 0)
        for _ in range(-(-len(parts) // world_size) * -(-_IMAGES_PER_FILE // BATCH)):
            next(batches, None)
            if stop():
                return False
        return True

    @torch.no_grad()
    def _batches(self, parts: Sequence[tuple[int, Tensor]], quiet: bool) -> Iterator[None]:
        """Compute and write the files of these images that are missing, one batch at a time."""
        missing = [(number, part) for number, part in parts if not self._is_whole(number, part)]
        if not missing:
            return
        network = self._network().eval()
        total, left = (sum(len(part) for _, part in of) for of in (parts, missing))
        with tqdm(total=total, initial=total - left, desc="teacher", unit="image", disable=quiet) as bar:
            for number, part in missing:
                found = torch.empty(len(part), self._classes, dtype=torch.float16)
                for place in torch.arange(len(part)).split(BATCH):
                    found[place] = network(self._normalise(self._images.decode(part[place]).pixels)).half()
                    bar.update(len(place))
                    if place[-1] + 1 == len(part):
                        write_file(self._file(number), found.numpy().tobytes())
                    yield

    def open(self) -> None:
        """Map the logits of all images into memory."""
        parts = torch.arange(len(self._images)).split(_IMAGES_PER_FILE)
        for number, part in enumerate(parts):
            size = len(part) * self._classes
            values = torch.from_file(str(self._file(number)), False, size, dtype=torch.float16)
            self._logits.append(values.view(len(part), self._classes))

    @torch.autocast("cpu", enabled=False)  # that of the training, whose losses read this
    def __call__(self, indices: Tensor) -> Tensor:
        """float32[b, classes]: the logits of the images at ``indices``, int64[b]. Where no rank has opened
        them, as for a checkpoint that is looked at, this one computes what is missing."""
        if not self._logits:
            self.compute(quiet=True)
            self.open()
        pairs = [divmod(index, _IMAGES_PER_FILE) for index in indices.tolist()]
        return torch.stack([self._logits[file][row] for file, row in pairs]).float()

    def _is_whole(self, number: int, part: Tensor) -> bool:
        path = self._file(number)
        return path.is_file() and path.stat().st_size == 2 * len(part) * self._classes

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:06d}.bin"


def distilled(loss: Tensor, logits: Tensor, teacher: Tensor) -> Tensor:
    """½ loss + ½ T² KL(teacher ‖ network) at temperature T (Hinton et al. 2015): of the loss of the labels, a
    scalar, and the logits of the network and of the full one, float[b, classes] each; in 32 bits at least."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    both = logits.to(exact), to_device(teacher, logits.device).to(exact)
    ours, theirs = ((x / TEMPERATURE).log_softmax(1) for x in both)
    divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return (loss + TEMPERATURE**2 * divergence) / 2
