"""The options of benches: mistakes are one line, before anything is trained or measured."""

from __future__ import annotations

import pytest

from offload_sparse.bench import cells, peers, pretrained
from offload_sparse.bench.options import BenchConfig, PretrainedConfig, options_of
from offload_sparse.cli import main as cli


@pytest.mark.parametrize(
    ("bench", "option", "value", "complaint"),
    [
        ("study", "methods", "prob", "methods gives 'prob'; give some of even, none, probe"),
        ("study", "methods", "[even, taper]", "methods gives 'taper'"),  # which is for VGG-19
        ("study", "methods", "family", "methods gives 'family'"),  # of several shares
        ("study", "flops", "[0.1, 2]", "flops is 2.0; give a ratio in (0, 1)"),
        ("study", "flops", "[]", "flops is empty"),
        ("pretrained", "arms", "norm_scal", "arms gives 'norm_scal'; give some of scratch, random"),
        ("pretrained", "epochs", "[1, 0]", "epochs is 0; give 1 or more"),
        ("pretrained", "epochs", "[]", "epochs is empty"),
        ("pretrained", "rho", "[0]", "rho is 0.0; give a ratio in (0, 1)"),
        ("sync", "modes", "steps", "modes gives 'steps'; give some of step, round10"),
        ("dfbst", "jobs", "0", "jobs is 0; give 1 or more"),
        ("peers", "k", "3", "k is 3; give 4 or more"),
        ("peers", "model", "torchvision/alexnet", "takes no width; give --width 1"),
        ("variance", "pairs", "2", "pairs is 2; give 4 or more"),  # a variance needs two of each half
        *((bench, "set", "resnet20", "--set resnet20 needs images") for bench in ("study", "pretrained")),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(
    bench: str,
    option: str,
    value: str,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module, name in ((cells.subprocess, "Popen"), (peers, "measure"), (pretrained, "loading")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("something starts"))
    assert cli.main(["bench", bench, f"--{option}", value]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("memory --json study", BenchConfig),
        ("--cache study pretrained", PretrainedConfig),
        ("--quick pretrained", PretrainedConfig),
        ("--name pretrained", PretrainedConfig),
        ("pretrained -h", PretrainedConfig),
        ("pretrained --help", PretrainedConfig),
    ],
)
def test_the_value_of_an_option_names_no_bench(command: str, options: type[BenchConfig]) -> None:
    assert options_of(command.split()) is options
