"""A training loop of one's own: any module, any data, any number of processes; saved and resumed.

    accelerate launch launch/own_loop.py --save runs/own_loop.pt --until 25                  (stops early)
    accelerate launch launch/own_loop.py --resume runs/own_loop.pt --export runs/own_network (to the end)

Two processes on a CPU: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2
launch/own_loop.py. Whoever calls ``session.state_dict()`` or ``session.finalize()`` does so on every rank.
"""

from __future__ import annotations

import argparse
import hashlib
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from offload_sparse import Forward, Setup, SparseOffload


class Waves(nn.Module):
    """Tells three frequencies apart. Its first layer is frozen, as that of a pretrained network may be."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 24, 5, padding=2)
        self.mix = nn.Conv1d(24, 32, 3, padding=1)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 3)
        self.stem.requires_grad_(False)

    def forward(self, signals: Tensor) -> Tensor:
        hidden = F.relu(self.stem(signals))
        return self.head(F.relu(self.norm(self.mix(hidden))).mean(dim=2))


def batch_of(step: int, rank: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """This rank's part of the batch of a step: sines in noise, float64[size, 2, 32], and their frequency."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    labels = torch.randint(3, (size,), generator=generator)
    time = torch.linspace(0, 6.28, 32, dtype=torch.float64)
    waves = torch.sin(time * (1 + 3 * labels.view(-1, 1, 1)))
    return waves + 0.3 * torch.randn(size, 2, 32, generator=generator, dtype=torch.float64), labels


def digest(state: dict[str, dict[str, Tensor]]) -> str:
    """Of all weights and optimizer slots, bit for bit."""
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state["rows"].items()):
        if not name.startswith("buffers/"):  # statistics differ between ranks while a round is open
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--until", type=int, help="stop after so many steps")
    parser.add_argument("--save", help="write the state there at the end")
    parser.add_argument("--resume", help="go on from a state")
    parser.add_argument("--export", help="folder of the final network")
    arguments = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    session = SparseOffload(
        lambda: Waves().double(),
        batch_of(0, 0)[0],
        partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.05),
        rho=0.5,
        total_steps=arguments.steps,
        groups=lambda name: {"lr": 2e-3} if name.startswith("head") else None,
        forward=Forward(accelerator.autocast),
        setup=Setup(dtype=torch.float64),
        device=accelerator.device,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(session.optimizer, arguments.steps)
    if arguments.resume:
        saved = torch.load(arguments.resume, weights_only=True)
        session.load_state_dict(saved["session"])
        schedule.load_state_dict(saved["schedule"])
        accelerator.print("resumed", session.steps_done, digest(saved["session"]))
    for step in range(session.steps_done, arguments.until or arguments.steps):
        x, y = (part.to(accelerator.device) for part in batch_of(step, accelerator.process_index))
        loss = session.step(lambda network: F.cross_entropy(network(x), y))  # noqa: B023 - read now
        schedule.step()
        accelerator.print(f"step {step + 1} loss {float(loss):.4f}")
    state = session.state_dict()
    accelerator.print("state", session.steps_done, digest(state) if accelerator.is_main_process else "")
    if arguments.save and accelerator.is_main_process:
        Path(arguments.save).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"session": state, "schedule": schedule.state_dict()}, arguments.save)
    if not arguments.until:
        network = session.finalize()
        if accelerator.is_main_process and arguments.export:
            network.save(arguments.export)
    accelerator.end_training()


if __name__ == "__main__":
    main()
