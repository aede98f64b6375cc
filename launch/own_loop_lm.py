"""A character model in a loop of one's own: train, validate, save and resume, sample text.

    python launch/own_loop_lm.py                                 ours: rho of the heads and hidden channels
    python launch/own_loop_lm.py --method dense --train_flops F  all of the network, for as many FLOPs
    python launch/own_loop_lm.py --method even --train_flops F   rho of every width, from the start
    torchrun --nproc_per_node 2 launch/own_loop_lm.py

F is the ``train_flops`` that the first command prints at its end, 2.098e12 with these defaults. The text is
that of Python's own standard library, so nothing is downloaded. Interrupted, the same command resumes from
``--out``; other settings need another one. The controls start anew. The model is written in the style of
nanoGPT; the package knows nothing of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offload_sparse import SparseOffload
from offload_sparse.channels.accounting import count_flops, count_parameters
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.subnet import narrow_module

CONTEXT, CHARACTERS = 64, 128
LEARNING_RATE, EVERY = 2e-3, 250


class Attention(nn.Module):
    """Causal attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n_head, self.n_embd = heads, width

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (
            t.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2) for t in (q, k, v)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CharacterModel(nn.Module):
    """int64[N, L] with L <= CONTEXT to logits float[N, L, CHARACTERS]; the head is the embedding."""

    def __init__(self, width: int = 128, heads: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(CHARACTERS, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.ln_f(self.blocks(x)))


def standard_library() -> tuple[Tensor, Tensor]:
    """uint8[characters] for training, and of other modules for validation: every tenth, by name."""
    folder = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(sorted(folder.glob("*.py"))):
        parts[number % 10 == 0].append(path.read_bytes().translate(None, bytes(range(CHARACTERS, 256))))
    train, validation = (torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8) for p in parts)
    return train, validation


def batch_of(text: Tensor, size: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets int64[size, CONTEXT], the same for a step whoever asks."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - CONTEXT - 1, (size,), generator=generator)
    rows = text[starts[:, None] + torch.arange(CONTEXT + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def loss_of(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits: Tensor = network(batch[0])
    return functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


@torch.no_grad()
def validation_loss(network: nn.Module, text: Tensor, device: torch.device) -> float:
    batches = (batch_of(text, 64, -1 - i) for i in range(8))
    losses = [float(loss_of(network, (x.to(device), y.to(device)))) for x, y in batches]
    return sum(losses) / len(losses)


@torch.no_grad()
def sample(network: nn.Module, start: str, length: int, device: torch.device) -> str:
    """``start`` and ``length`` more characters, drawn at temperature 0.8."""
    tokens = torch.tensor([list(start.encode("ascii"))], device=device)
    for _ in range(length):
        odds = (network(tokens[:, -CONTEXT:])[0, -1] / 0.8).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(odds, 1)[None]], 1)
    return bytes(tokens[0].tolist()).decode("ascii")


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """A short warm-up, then half a cosine; from the step alone, so that nothing of it needs saving."""
    rate = LEARNING_RATE * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_of(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99))


@dataclass
class Result:
    """What is compared: nats per character on modules that were not trained on, and what they cost."""

    method: str
    steps: int
    validation_loss: float
    parameters: int
    train_flops: float


def train_ours(settings: argparse.Namespace) -> Result:
    """The loop: a session in the place of model and optimizer."""
    checkpoint, flops = settings.out / "session.pt", 0.0
    given = {name: value for name, value in vars(settings).items() if name != "out"}
    saved = saved_state(checkpoint, given)
    text, held_out = standard_library()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    session = SparseOffload(
        CharacterModel,
        batch_of(text, settings.batch_size, 0)[0],
        optimizer_of,
        rho=settings.rho,
        total_steps=settings.steps,
        no_decay=True,
        seed=settings.seed,
    )
    if saved:
        session.load_state_dict(saved["session"])
        flops = saved["flops"]
        show(f"resumed at step {session.steps_done}")
    for step in range(session.steps_done, settings.steps):
        set_rate(session.optimizer, step, settings.steps)
        x, y = (t.to(session.device) for t in batch_of(text, settings.batch_size, step * world + rank))
        loss = session.step(partial(loss_of, batch=(x, y)))
        if (step + 1) % EVERY == 0 or step + 1 == settings.steps:
            forward = session.expected_cost()[1] * session.cost.dense_flops * world
            flops += sum(forward * (4 if r.compared else 3) for r in session.records())
            with session.evaluation() as network:
                found = validation_loss(network, held_out, session.device)
            show(f"step {step + 1:5d}  loss {float(loss):.3f}  validation {found:.3f}")
            state = {"session": session.state_dict(), "flops": flops, "settings": given}
            if rank == 0:
                save(state, checkpoint)
    final = session.finalize()
    if rank == 0:
        final.save(settings.out / "model")
    show(sample(final.module, "def ", 300, session.device))
    found = validation_loss(final.module, held_out, session.device)
    return Result("sparse_offload", settings.steps, found, count_parameters(final.module), flops)


def show(text: str) -> None:
    """Print it, once for all ranks."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def saved_state(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What a run of the same settings has left, if anything. Other settings end the program in one line."""
    if not path.exists():
        return {}
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    began: dict[str, Any] = saved.get("settings", {})
    if others := [f"--{name} {value}" for name, value in began.items() if value != given.get(name)]:
        raise SystemExit(f"{path} is of a run with {' '.join(others)}; give the same, or another --out")
    return saved


def save(state: object, path: Path) -> None:
    """Write the whole file beside the old one first, so that one of both is always there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train_plain(settings: argparse.Namespace) -> Result:
    """The controls: an ordinary network of full or even width, for ``train_flops`` or ``steps``."""
    text, held_out = standard_library()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    network: nn.Module = CharacterModel()
    example = (batch_of(text, settings.batch_size, 0)[0],)
    if settings.method == "even":
        channel_map = discover(network, example, "internal")
        network = narrow_module(network, channel_map, channel_map.uniform_mask(settings.rho))
    network = network.to(device)
    per_step = 3 * count_flops(network, example)
    steps = int(settings.train_flops / per_step) if settings.train_flops else settings.steps
    optimizer = optimizer_of(
        [
            {"params": [p for p in network.parameters() if p.dim() > 1]},
            {"params": [p for p in network.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
    )
    for step in range(steps):
        set_rate(optimizer, step, steps)
        x, y = (t.to(device) for t in batch_of(text, settings.batch_size, step))
        loss = loss_of(network, (x, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            show(f"step {step + 1:5d}  loss {loss.item():.3f}")
    found = validation_loss(network.eval(), held_out, device)
    show(sample(network, "def ", 300, device))
    return Result(settings.method, steps, found, count_parameters(network), float(per_step * steps))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=("sparse_offload", "dense", "even"), default="sparse_offload")
    parser.add_argument("--rho", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--train_flops", type=float, default=0.0, help="of a control, in the place of its steps"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/own_loop_lm"))
    settings = parser.parse_args()
    if "RANK" in os.environ:
        torch.distributed.init_process_group()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(settings.seed)
    result = train_ours(settings) if settings.method == "sparse_offload" else train_plain(settings)
    show(json.dumps(vars(result)))


if __name__ == "__main__":
    main()
