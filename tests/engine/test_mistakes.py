"""Plain mistakes at the library's edge: each works, or is one clear error that says what to change."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from offload_sparse import FinalNetwork, Forward, Setup, SparseOffload
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.forward import bound, other_device
from offload_sparse.policy.config import PolicyConfig

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
BF16 = partial(Accelerator, cpu=True, mixed_precision="bf16")
X = torch.zeros(2, 12)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 12), torch.randint(0, 4, (8,))


def loss(net: nn.Module) -> Tensor:
    x, y = batch()
    return F.cross_entropy(net(x), y)


def new_session(**more: Any) -> SparseOffload:
    return SparseOffload(network, X, SGD, **({"rho": 0.5, "total_steps": 4, "device": "cpu"} | more))


def trained(closure: Any = loss, **more: Any) -> FinalNetwork:
    session = new_session(**more)
    for _ in range(4):
        session.step(closure)
    return session.finalize()


WORKS: dict[str, Callable[[], Any]] = {
    "device as text": lambda: trained(device="cpu"),
    "bare tensor as example": lambda: SparseOffload(network, X, SGD, rho=0.5),
    "list of examples": lambda: SparseOffload(network, [X], SGD, rho=0.5),
    "float metric": lambda: trained(lambda net: (loss(net), {"accuracy": 0.5})),
    "metric of one entry": lambda: trained(lambda net: (loss(net), {"accuracy": torch.ones(1)})),
    "tensor metric with a graph": lambda: trained(lambda net: (loss(net), {"again": loss(net)})),
    "loss of one entry": lambda: trained(lambda net: loss(net)[None]),
    "optimizer class": lambda: SparseOffload(network, X, torch.optim.Adam, rho=0.5),
    "path as text": lambda: trained().kept_channels(),
}


@pytest.mark.parametrize("what", WORKS)
def test_it_works(what: str) -> None:
    WORKS[what]()


def own_backward(net: nn.Module) -> Tensor:
    first = loss(net) / 2
    first.backward()
    return loss(net) / 2


def with_parameter(value: Tensor) -> nn.Module:
    net = network()
    net.register_parameter("odd", nn.Parameter(value, requires_grad=False))
    return net


def with_tuple() -> nn.Module:
    net = network()
    net.pair = net[0].weight, net[2].weight
    return net


def on_another_device() -> SparseOffload:
    with torch.device("meta"):
        return new_session()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dict loss": (lambda: trained(lambda net: {"loss": loss(net)}), "the closure returns dict"),
    "no loss": (lambda: trained(lambda net: None), "the closure returns NoneType"),
    "number": (lambda: trained(lambda net: float(loss(net))), "the closure returns float"),
    "loss per image": (lambda: trained(lambda net: net(batch()[0])), r"a tensor of shape \[8, 4\]"),
    "detached loss": (lambda: trained(lambda net: loss(net).detach()), "no gradient reaches the network"),
    "constant loss": (lambda: trained(lambda net: torch.ones(())), "no gradient reaches the network"),
    "metrics in a list": (lambda: trained(lambda net: (loss(net), [0.5])), "the metrics are list"),
    "too many metrics": (
        lambda: trained(lambda net: (loss(net), {str(i): 0.0 for i in range(20)})),
        "returns 20 metrics; at most 11",
    ),
    "metric of entries": (
        lambda: trained(lambda net: (loss(net), {"accuracy": torch.ones(3)})),
        r"metric 'accuracy' is of shape \[3\]; return a number",
    ),
    "no metric": (
        lambda: trained(lambda net: (loss(net), {"accuracy": None})),
        "metric 'accuracy' is NoneType; return a number",
    ),
    "metric in words": (lambda: trained(lambda net: (loss(net), {"a": "1"})), "metric 'a' is str"),
    "metrics of some parts": (
        lambda: new_session().step([lambda net: (loss(net), {"a": 1.0, "b": 1.0}), loss]),
        r"parts of a batch have different metrics \(a, b; none\)",
    ),
    "backward in the closure": (lambda: trained(own_backward), "a list of closures for a batch in parts"),
    "backward at rho 1": (lambda: trained(own_backward, rho=1.0), "a list of closures for a batch in parts"),
    "batch and function": (lambda: new_session().step(batch()), "step takes a function of the network"),
    "loss": (lambda: new_session().step(torch.ones(())), "step takes a function of the network"),
    "no closures": (lambda: new_session().step([]), "step takes a function of the network"),
    "rho": (lambda: new_session(rho=1.5), "give a remaining ratio"),
    "ema": (lambda: new_session(ema=1.0), r"ema is 1.0"),
    "ema of few bits": (
        lambda: new_session(ema=0.9, setup=Setup(dtype=torch.bfloat16)),
        "an average in torch.bfloat16 stands still",
    ),
    "budgets": (
        lambda: new_session(policy=PolicyConfig(search="none", budgets=[0.25, 0.5])),
        "leave it empty in a loop",
    ),
    "complex parameter": (
        lambda: SparseOffload(lambda: with_parameter(torch.zeros(3, dtype=torch.complex64)), X, SGD, rho=0.5),
        "parameter 'odd' is complex64.*view_as_real",
    ),
    "integer parameter": (
        lambda: SparseOffload(with_parameter(torch.arange(3)), X, SGD, rho=0.5),
        "parameter 'odd' is int64.*as a buffer",
    ),
    "parameters in a tuple": (
        lambda: SparseOffload(with_tuple, X, SGD, rho=0.5),
        r"keeps a tensor of shape \(16, 12\).*in a list",
    ),
    "context": (lambda: Forward(torch.autocast("cpu", torch.bfloat16)), "autocast is entered in every pass"),
    "prepared model": (
        lambda: SparseOffload(BF16().prepare(network()), X, SGD, rho=0.5),
        r"give the network itself, with Forward\(accelerator.autocast\)",
    ),
    "data-parallel model": (lambda: SparseOffload(nn.DataParallel(network()), X, SGD, rho=0.5), "itself"),
    "compiled model": (lambda: SparseOffload(torch.compile(network()), X, SGD, rho=0.5), "itself"),
    "default device": (on_another_device, r"set_default_device\('meta'\) is no place for a store"),
    "clip_norm": (lambda: new_session(clip_norm=-1.0), r"clip_norm -1.0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_in_one_line(what: str) -> None:
    attempt, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as caught:
        attempt()
    assert "\n" not in str(caught.value)


_SAME = "Expected all tensors to be on the same device, but "
_TYPES = "Input type ({}) and weight type ({}) should be the same"
TORCH_SAYS = {
    _SAME + "found at least two devices, cuda:1 and cpu!": "cpu",
    _SAME + "found at least two devices, cuda:1 and cuda:0!": "cuda:0",
    _SAME + "got mat1 is on cpu, different from other tensors on cuda:1 (in method addmm)": "cpu",
    "indices should be either on cpu or on the same device as the indexed tensor (cpu)": "cpu",
    "FakeTensor Device Propagation for aten.mm.default, found two different devices cuda:1, cpu": "cpu",
    _TYPES.format("torch.FloatTensor", "torch.cuda.FloatTensor"): "cpu",
    _TYPES.format("CPUFloatType", "CUDAFloatType"): "cpu",
    _TYPES.format("torch.cuda.HalfTensor", "torch.cuda.FloatTensor"): None,
    "CUDA out of memory. Tried to allocate 2 MiB. GPU 1 has a total capacity of 80 GiB": None,
    "mat1 and mat2 must have the same dtype, but got Float and Double": None,
}


@pytest.mark.parametrize("message", TORCH_SAYS)
def test_torch_s_words_for_mixed_devices_are_known(message: str) -> None:
    assert other_device(message, torch.device("cuda", 1)) == TORCH_SAYS[message]


MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "convolution": lambda x, own: F.conv2d(x.view(1, 1, 4, 4), own.view(1, 1, 4, 4)),
    "sum": torch.add,
    "product": torch.matmul,
    "labels": lambda x, own: F.cross_entropy(own, x[:, 0].long()),
    "tokens": lambda x, own: F.embedding(x.long(), own),
}


@pytest.mark.parametrize("what", MIXED)
def test_torch_uses_these_words(what: str) -> None:
    """As far as it does without a device: of tensors without values."""
    with FakeTensorMode(), pytest.raises(RuntimeError) as caught:
        MIXED[what](torch.zeros(4, 4), torch.zeros(4, 4, device="cuda:0"))
    assert other_device(str(caught.value), torch.device("cuda", 0)) == "cpu"


def test_a_session_that_has_ended_says_so() -> None:
    session = new_session()
    for _ in range(4):
        session.step(loss)
    session.finalize()
    evaluate = session.evaluation().__enter__
    for ask in (lambda: session.step(loss), session.finalize, session.state_dict, evaluate):
        with pytest.raises(ValueError, match="finalize has ended this session"):
            ask()


def test_an_evaluation_without_any_batch_says_what_it_needs() -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))

    session = SparseOffload(normed, X, SGD, rho=0.5, total_steps=4, device="cpu")
    with pytest.raises(ValueError, match="statistics need at least one batch"), session.evaluation():
        pass
    session.step(loss)
    with session.evaluation() as net:
        assert not net.training


def test_finalize_in_the_middle_of_the_search_warns() -> None:
    session = new_session(total_steps=100, rounds=RoundConfig(k=2, freeze_at=0.5))
    session.step(loss)
    with pytest.warns(UserWarning, match="finalize after 1 steps of the search, which takes 50"):
        session.finalize()
    session = new_session(total_steps=None)
    session.step(loss)
    with pytest.warns(UserWarning, match=r"which total_steps or freeze\(\) would end"):
        session.finalize()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained()


def test_processes_that_do_not_know_of_each_other_are_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="each trains alone; make an Accelerator"):
        new_session()


def test_a_step_that_fails_leaves_the_session_usable() -> None:
    """An error in a closure, in the middle of a round: the next step goes on in that round."""
    session = new_session(total_steps=100, rounds=RoundConfig(k=4, freeze_at=1.0))
    session.step(loss)
    masks = session.masks

    def broken(net: nn.Module) -> Tensor:
        raise KeyError("labels")

    with pytest.raises(KeyError, match="labels"):
        session.step(broken)
    session.step(loss)
    assert session.masks is masks
    assert session.round_step == session.steps_done == 2


def test_a_closure_that_has_failed_does_not_choose_the_final_mask() -> None:
    def broken(net: nn.Module) -> Tensor:
        raise KeyError("labels")

    session = new_session(total_steps=8, rounds=RoundConfig(k=4, freeze_at=0.5))
    for closure in (loss, loss, loss, broken, *[loss] * 5):
        with nullcontext() if closure is loss else pytest.raises(KeyError, match="labels"):
            session.step(closure)
    assert session.steps_done == 8
    assert session.frozen


def test_a_closure_is_replayed_with_the_batch_of_its_step() -> None:
    """A lambda reads the variables of the loop when it is called; the final mask needs those of the step."""
    closures = [bound(lambda scale: scale * x) for x in (1, 2, 3)]  # noqa: B023
    assert [closure(10) for closure in closures] == [10, 20, 30]
    space: dict[str, Any] = {"bound": bound}
    exec("kept = []\nfor x in (1, 2):\n    kept.append(bound(lambda s: [s * x for _ in 'a']))", space)
    assert [closure(10) for closure in space["kept"]] == [[10], [20]]


def test_a_session_changes_nothing_in_its_process() -> None:
    """Neither the environment, nor the garbage collector, nor malloc's options (seen in memory that is
    freed).
    """
    code = (
        "import gc, os, functools, torch\n"
        "from torch import nn\n"
        "from offload_sparse import SparseOffload\n"
        "before = dict(os.environ), gc.get_threshold(), gc.isenabled(), gc.get_freeze_count(), "
        "torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()\n"
        "net = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), "
        "nn.Linear(64, 2))\n"
        "torch.manual_seed(1); state = torch.get_rng_state()\n"
        "SparseOffload(net, torch.zeros(1, 3, 6, 6), torch.optim.SGD, rho=0.5, total_steps=3, device='cpu')\n"
        "assert torch.equal(state, torch.get_rng_state()), 'random state'\n"
        "after = dict(os.environ), gc.get_threshold(), gc.isenabled(), gc.get_freeze_count(), "
        "torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()\n"
        "assert before == after, (before[1:], after[1:], set(after[0].items()) ^ set(before[0].items()))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
