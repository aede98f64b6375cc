"""Every configuration file in the repository: complete, buildable, and aimed at figures of the paper."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from offload_sparse.cli.main import main
from offload_sparse.config import parse as arguments
from offload_sparse.config.run import RunConfig
from offload_sparse.policy.config import ALPHA
from offload_sparse.run import trainer
from offload_sparse.run.plan import dry_run
from offload_sparse.run.plan.dry_run import Structure
from offload_sparse.workloads.data import source
from offload_sparse.workloads.data.loader import DeclaredData

StructureOf = Callable[[RunConfig, DeclaredData], Structure]

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
EXPERIMENTS = sorted((CONFIGS / "zhou2021").glob("*.yaml"))

# Tables 2, 3 and 4 of Zhou et al. 2021, and the searched VGG-19 of section 5.5:
# accuracy, parameters and FLOPs in %, train-cost saving.
ROWS = {
    "table2_vgg16_cifar10": (92.5, 4.4, 8.7, 8.69),
    "table2_resnet20_cifar10": (90.93, 35.1, 36.1, 2.09),
    "table2_wrn28_10_cifar10": (95.6, 8.4, 7.9, 9.39),
    "table3_resnet50_imagenet_rho0.68": (76.0, 48.2, 46.8, 1.60),
    "table3_resnet50_imagenet_rho0.50": (73.5, 27.0, 24.7, 3.02),
    "table3_resnet50_imagenet_rho0.32": (69.3, 10.8, 10.1, 7.36),
    "table4_vgg19_cifar10_rho0.53": (93.46, 23.71, 28.57, 2.64),
    "table4_vgg19_cifar10_rho0.44": (93.11, 12.75, 19.33, 3.89),
    "table4_vgg19_cifar10_rho0.32": (92.23, 6.69, 10.27, 7.30),
    "table4_vgg19_cifar10_rho0.22": (90.82, 3.06, 4.94, 15.28),
    "table4_vgg19_cifar10_rho0.13": (87.97, 0.80, 1.70, 44.68),
    "figure3_vgg19_cifar10_dynamics": (92.73, 16.68, 14.28, 5.28),
}
GOALS = ("accuracy", "params", "flops", "train_cost_saving")


@cache
def load(path: Path) -> RunConfig:
    return arguments.parse(["--config", str(path)])


@pytest.fixture(scope="module")
def structure_of() -> StructureOf:
    """Discovery takes seconds, and the files of a sweep share a network."""
    found: dict[tuple[str, str, str], Structure] = {}
    original = dry_run.structure_of

    def shared(config: RunConfig, data: DeclaredData) -> Structure:
        name = (config.model.name, config.model.residual, f"{data} {config.model.arguments}")
        if name not in found:
            found[name] = original(config, data)
        return found[name]

    return shared


LONG = ("decoder_7b_file", "mlp_10b_file")  # whose layers are those of small networks, many times


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in LONG else ()) for path in FILES],
    ids=lambda path: path.stem,
)
def test_every_file_passes_a_dry_run_without_data_or_traces(
    path: Path,
    structure_of: StructureOf,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a dry run reads no data")

    monkeypatch.setattr(dry_run, "structure_of", structure_of)
    monkeypatch.setattr(source, "load_splits", refuse)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", str(path), "--dry_run"]) == 0
    assert load(path).model.name in capsys.readouterr().out.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_names_its_figure_and_its_own_folder(path: Path) -> None:
    config = load(path)
    number = path.stem[len("figure")] if path.stem.startswith("figure") else path.stem[len("table")]
    kind = "Figure" if path.stem.startswith("figure") else "Table"
    assert config.paper["source"].startswith(f"Zhou et al. 2021, {kind}")
    assert number in config.paper["source"]
    assert config.run_dir == Path("runs") / path.stem


def test_the_experiments_are_those_of_the_paper() -> None:
    covered = {(load(path).model.name, load(path).data.name) for path in EXPERIMENTS}
    own, cifar10, cifar100, imagenet = (
        "offload_sparse/",
        "uoft-cs/cifar10",
        "uoft-cs/cifar100",
        "ILSVRC/imagenet-1k",
    )
    assert covered == {
        (f"{own}vgg16_cifar", cifar10),
        (f"{own}resnet20_cifar", cifar10),
        (f"{own}wrn28_10_cifar", cifar10),
        (f"{own}vgg19_cifar", cifar10),
        (f"{own}vgg19_cifar", cifar100),
        (f"{own}resnet32_wide_cifar", cifar10),
        (f"{own}resnet32_wide_cifar", cifar100),
        ("torchvision/resnet50", imagenet),
        ("timm/mobilenetv1_100", imagenet),
    }


@pytest.mark.parametrize("name", ROWS)
def test_the_figures_are_those_of_the_papers_tables(name: str) -> None:
    paper = load(CONFIGS / "zhou2021" / f"{name}.yaml").paper
    assert tuple(paper[goal] for goal in GOALS) == ROWS[name]


@pytest.mark.parametrize("name", ROWS)
def test_rho_is_the_square_root_of_the_rows_flops(name: str) -> None:
    config = load(CONFIGS / "zhou2021" / f"{name}.yaml")
    assert config.policy.rho == pytest.approx((config.paper["flops"] / 100) ** 0.5, abs=0.006)


@pytest.mark.parametrize("name", sorted({path.stem for path in EXPERIMENTS} - set(ROWS)))
def test_points_without_numbers_in_the_text_claim_none(name: str) -> None:
    paper = load(CONFIGS / "zhou2021" / f"{name}.yaml").paper
    stated = {"train_cost_saving": 58.8} if name == "figure2_resnet32_cifar100_rho0.125" else {}
    assert {goal: paper[goal] for goal in GOALS if goal in paper} == stated


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_settings_are_those_of_appendix_b(path: Path) -> None:
    config = load(path)
    optim, policy = config.optim, config.policy
    given = (
        config.data.batch_size,
        optim.name,
        optim.lr,
        optim.momentum,
        optim.warmup_epochs,
        optim.label_smoothing,
    )
    imagenet = "imagenet" in path.stem
    assert given == ((256, "sgd", 0.256, 0.875, 3, 0.1) if imagenet else (256, "sgd", 0.1, 0.9, 0, 0))
    assert (policy.optimizer, policy.lr, ALPHA) == ("adam", 12e-3, 0.5)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_default_search_can_be_put_behind_a_file_of_the_paper(path: Path) -> None:
    config = arguments.parse(["--config", str(path), "--config", str(CONFIGS / "default_search.yaml")])
    given = load(path)
    default = arguments.parse(["--policy.rho", str(given.policy.rho)])
    assert default.policy.search == "probe"
    assert (config.policy, config.round) == (default.policy, default.round)
    assert config.optim == given.optim


@pytest.mark.parametrize("method", ["sparse_offload", "static", "quickstart", "default_search", "none"])
def test_train_says_that_the_paper_s_search_measured_below_static(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stops(_: object) -> None:
        raise ValueError("far enough")

    monkeypatch.setattr(trainer, "train", stops)
    given = ["--config", str(CONFIGS / "zhou2021" / "table2_vgg16_cifar10.yaml")]
    if method == "quickstart":
        given = ["--config", str(CONFIGS / "quickstart.yaml")]
    elif method == "default_search":
        given += ["--config", str(CONFIGS / "default_search.yaml")]
    elif method == "none":
        given += ["--policy.search", "none"]
    else:
        given += ["--method", method]
    assert main(["train", *given, "--run_dir", str(tmp_path / "run")]) == 2
    assert ("76.3 against 84.2" in capsys.readouterr().err) == (method == "sparse_offload")


# --- Pote et al. 2023 --------------------------------------------------------------------------------

DFBST = sorted((CONFIGS / "dfbst").glob("*.yaml"))

# Network, batch, learning rate, epochs, milestones, alpha, beta, accuracy (tables 1 to 4, section 4.4).
SECTIONS = {
    "lenet_300_100_mnist": ("lenet_300_100", 64, 0.01, 20, [], 5e-4, 0.01, 98.06),
    "lenet5_caffe_mnist": ("lenet5_caffe", 64, 0.01, 20, [], 5e-4, 0.01, 99.06),
    "vgg16_cifar10": ("vgg16_dst_cifar", 64, 0.1, 160, [80, 120], 5e-6, 0.1, 93.75),
    "resnet18_cifar100": ("resnet18_cifar", 64, 0.1, 100, [80], 5e-6, 0.01, 63.66),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_the_settings_of_dfbst_are_those_of_section_4(name: str) -> None:
    config = load(CONFIGS / "dfbst" / f"{name}.yaml")
    optim, options = config.optim, config.dfbst
    settings = (config.data.batch_size, optim.lr, config.train.epochs, optim.milestones)
    found = (*settings, config.dst.alpha, options.beta, config.paper["accuracy"])
    assert (config.model.name.removeprefix("offload_sparse/"), *found) == SECTIONS[name]
    assert (config.method, optim.name, optim.momentum) == ("dfbst", "sgd", 0.9)


def test_the_ablations_change_one_factor_and_keep_the_other() -> None:
    figures = [load(path) for path in DFBST if path.stem.startswith("figure")]
    four = [(c.dst.alpha, c.dfbst.beta) for c in figures if "Figure 4" in c.paper["source"]]
    five = [(c.dst.alpha, c.dfbst.beta) for c in figures if "Figure 5" in c.paper["source"]]
    assert len({alpha for alpha, _ in four}) == len(four) == 4
    assert {beta for _, beta in four} == {0.01}
    assert len({beta for _, beta in five}) == len(five) == 4
    assert {alpha for alpha, _ in five} == {5e-6}


@pytest.mark.parametrize("path", DFBST, ids=lambda path: path.stem)
def test_every_run_of_dfbst_has_a_folder_of_its_own(path: Path) -> None:
    assert load(path).run_dir == Path("runs") / f"dfbst_{path.stem}"
