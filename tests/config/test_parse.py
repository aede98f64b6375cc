"""From command lines and YAML files to configurations, and back."""

from __future__ import annotations

import dataclasses
import os
import re
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_sparse.cli.main import run_command
from offload_sparse.config import yaml_text
from offload_sparse.config.parse import Options, dump, flat_tree, parse
from offload_sparse.config.run import RunConfig
from offload_sparse.workloads.config import DataConfig

ROOT = Path(__file__).parents[2]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- values ----------------------------------------------------------------------------------------


def test_no_arguments_give_the_defaults() -> None:
    assert parse([]) == RunConfig()


def test_overrides_reach_their_leaves_in_both_spellings() -> None:
    config = parse(["--policy.rho", "1e-1", "--method=static", "--run_dir=runs/x", "--data.mean", "[0.5, 1]"])
    assert config.policy.rho == 0.1
    assert config.method == "static"
    assert config.run_dir == Path("runs/x")
    assert config.data.mean == [0.5, 1.0]
    assert all(isinstance(value, float) for value in config.data.mean)


def test_a_boolean_alone_means_true() -> None:
    config = parse(["--overwrite", "--train.check", "false", "--data.random_flip"])
    assert (config.overwrite, config.train.check, config.data.random_flip) == (True, False, True)


@pytest.mark.parametrize("truth", ["true", "True", "TRUE"])
def test_truth_values_are_written_as_in_a_file(truth: str) -> None:
    """Behind a name and after a sign."""
    config = parse(["--overwrite", truth, f"--quiet={truth}"])
    assert (config.overwrite, config.quiet) == (True, True)


@pytest.mark.parametrize("widths", ["[8, 8, 16]", "8 8 16"])
def test_widths_are_a_list_or_text(widths: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", f"static: {{widths: {widths}}}")
    for config in (parse(["--config", file]), parse(["--static.widths", widths])):
        assert config.static.widths == "8 8 16"


def test_text_stays_text() -> None:
    for text in ("12", "null", "1e-3", "[a", "true", "~"):
        assert parse(["--data.name", text]).data.name == text


def test_the_home_folder_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse(["--config", write(tmp_path / "a.yaml", "run_dir: ~/runs\nstore: {path: ~/store}")])
    assert (config.run_dir, config.store.path) == (tmp_path / "runs", str(tmp_path / "store"))


def test_entries_of_a_mapping_are_set_one_by_one(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", 'model: {arguments: {depth: "2", width: 3}}')
    config = parse(["--config", file, "--model.arguments.width", "4", "--model.arguments.act", "relu"])
    assert config.model.arguments == {"depth": "2", "width": 4, "act": "relu"}
    assert RunConfig().model.arguments == {}


def test_later_files_win_and_overrides_win_over_all_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "policy: {rho: 0.1, lr: 1e-3}\nround: {k: 5}")
    second = write(tmp_path / "b.yaml", "policy.rho: 0.2\nround:\n  k: 6\n")
    config = parse(["--round.k", "7", "--config", first, f"--config={second}"])
    assert (config.policy.rho, config.policy.lr, config.round.k) == (0.2, 1e-3, 7)


def test_a_file_starts_from_its_bases(tmp_path: Path) -> None:
    write(tmp_path / "base" / "root.yaml", "round: {k: 3}\ntrain: {epochs: 2, seed: 9}")
    write(tmp_path / "base" / "model.yaml", "base: root.yaml\ntrain: {epochs: 4}")
    write(tmp_path / "other.yaml", "policy: {rho: 0.5}\nround: {k: 8}")
    file = write(tmp_path / "run.yaml", "base: [base/model.yaml, other.yaml]\npolicy: {rho: 0.75}")
    config = parse(["--config", file])
    assert (config.round.k, config.train.epochs, config.train.seed, config.policy.rho) == (8, 4, 9, 0.75)


def test_two_files_may_share_a_base(tmp_path: Path) -> None:
    write(tmp_path / "root.yaml", "round: {k: 3}")
    for name in ("a", "b"):
        write(tmp_path / f"{name}.yaml", "base: root.yaml")
    assert parse(["--config", write(tmp_path / "c.yaml", "base: [a.yaml, b.yaml]")]).round.k == 3


def test_an_empty_file_or_section_changes_nothing(tmp_path: Path) -> None:
    assert parse(["--config", write(tmp_path / "a.yaml", "# nothing\n")]) == RunConfig()
    assert parse(["--config", write(tmp_path / "b.yaml", "policy:\n")]) == RunConfig()


# --- round trip ------------------------------------------------------------------------------------

_MISLEADING = st.sampled_from(["1", "1e-3", "null", "yes", "~", "[a", "2001-01-01"])
_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8) | _MISLEADING
_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_SCALARS = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | _FLOATS | _TEXT
_KEYS = st.text(string.ascii_lowercase, min_size=1, max_size=4)
_VALUES = _SCALARS | st.lists(_SCALARS, max_size=2) | st.dictionaries(_KEYS, _SCALARS, max_size=2)
_MAPPINGS = st.dictionaries(_KEYS, _VALUES, max_size=3)


def _values_of(hint: Any) -> st.SearchStrategy[Any]:
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is list:
        return st.lists(_values_of(get_args(hint)[0]), max_size=3)
    kinds: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(1, 2**40),
        float: st.floats(0, 0.99),
        str: _TEXT,
        Path: _TEXT.map(Path),
        dict[str, Any]: _MAPPINGS,
        float | Literal["auto"]: st.just("auto") | st.floats(0, 0.99),
        str | int: st.sampled_from(["auto", 8, "<=16"]),
        str | int | float: st.sampled_from(["", "0.25", "5min", "12"]),
    }
    return kinds[hint]


def _hints(tree: type) -> dict[str, Any]:
    hints = get_type_hints(tree)
    return {field.name: hints[field.name] for field in dataclasses.fields(tree)}


def _leaves(tree: type, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, hint in _hints(tree).items():
        if dataclasses.is_dataclass(hint):
            yield from _leaves(cast(type, hint), (*above, name))
        else:
            yield (*above, name), hint


def _replaced(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    new = value if len(path) == 1 else _replaced(getattr(tree, path[0]), path[1:], value)
    return dataclasses.replace(tree, **{path[0]: new})


@st.composite
def _configurations(draw: st.DrawFn) -> RunConfig:
    """The defaults with some leaves replaced; a value that its class refuses leaves the default."""
    config = RunConfig()
    for path, hint in draw(st.lists(st.sampled_from(list(_leaves(RunConfig))), min_size=1, max_size=12)):
        with suppress(ValueError):
            config = _replaced(config, path, draw(_values_of(hint)))
    return config


@settings(max_examples=12, deadline=None)
@given(config=_configurations())
def test_a_dumped_configuration_parses_back_to_itself(
    config: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = write(tmp_path_factory.getbasetemp() / "config.yaml", dump(config))
    assert parse(["--config", file]) == config


@given(value=_MAPPINGS)
def test_yaml_text_gives_back_what_it_was_made_of(value: dict[str, Any]) -> None:
    assert yaml_text.parse(yaml_text.dump(value), "x") == value


def test_a_dump_names_every_leaf() -> None:
    written = yaml_text.parse(dump(RunConfig()), "dump")
    assert set(written) == {field.name for field in dataclasses.fields(RunConfig)}
    assert set(written["data"]) == {field.name for field in dataclasses.fields(DataConfig)}


def test_the_shipped_configurations_parse() -> None:
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        parse(["--config", str(file)])
        assert yaml_text.read_keys(file), file


# --- mistakes --------------------------------------------------------------------------------------


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a command line, which must be the only output and come with exit code 2."""
    assert run_command(lambda: print(parse(argv))) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("offload-sparse: error: ")
    assert output.err.count("\n") == 1
    assert output.err.endswith("\n")
    return output.err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--policy.rhoo", "1"], "unknown option --policy.rhoo; did you mean --policy.rho?"),
        (["--rho", "0.1"], "did you mean --policy.rho?"),
        (["--lr", "0.1"], "did you mean --policy.lr or --optim.lr?"),
        (["--policy", "0.1"], "such as --policy.rho"),
        (["--zzz"], "--help` lists all keys"),
        (["0.1"], "unrecognized arguments: 0.1"),
        (["--policy.rho"], "--policy.rho needs a value; give a number"),
        (["--policy.rho", "--method", "dense"], "--policy.rho needs a value"),
        (["--policy.rho", "x"], "policy.rho is x; give a number"),
        (["--policy.rho", "0"], "give a remaining ratio in (0, 1]"),
        (["--policy.rho", "1.5"], "policy.rho is 1.5; give a remaining ratio in (0, 1]"),
        (["--policy.rho", "-0.1"], "give a remaining ratio in (0, 1]"),
        (["--round.k", "0"], "round.k is 0; give at least 1 step per round"),
        (["--round.k", "1.5"], "round.k is 1.5; give a whole number"),
        (["--method", "magic"], "method is magic; give one of sparse_offload, dense, static"),
        (["--train.check=maybe"], "train.check is maybe; give true or false"),
        (["--trackers", "{a: b}"], "give a list of names such as [train, '2024']"),
        (["--trackers", "[a"], "trackers is [a; give a list"),
        (["--data.mean", "[a]"], "give a list"),
        (["--model.arguments", "3"], "give a mapping"),
        (["--config"], "--config needs a value"),
        (["--config", "no/such.yaml"], "there is no configuration file no/such.yaml"),
        (["--config", "."], ". is no regular file; give a YAML file"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_with_advice(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in error_of(argv, capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("polcy: {rho: 1}", "unknown key polcy"),
        ("policy: {rhoo: 1}", "unknown key policy.rhoo; did you mean policy.rho?"),
        ("policy: 3", "unknown key policy; name a key of this section, such as policy.rho"),
        ("policy: {rho: [1]}", "policy.rho is [1]; give a number"),
        ("policy: {rho: }", "policy.rho is empty; give a number"),
        ("optim: {lr: .nan}", "optim.lr is .nan; give a number"),
        ("optim: {lr: 1e999}", "optim.lr is inf; give a finite number"),
        ("round: {k: true}", "round.k is true; give a whole number"),
        ("data: {name: 3}", "data.name is 3; give text"),
        ("data: {splits: [train, 2024]}", "give a list of names such as [train, '2024']"),
        ("static: {widths: {a: 8}}", "give widths such as [8, 8, 16], or the name of published ones"),
        ("model: {arguments: {1: 2}}", "give a mapping"),
        ("3: 4", "unknown key 3"),
        ("method: dense\nmethod: static", "line 2: not valid YAML, key 'method' appears twice"),
        ("policy: {rho: 1", "not valid YAML"),
        ("- a\n- b", "holds no keys at its top level"),
        ("base: 3", "give a path or a list of paths"),
        ("base: missing.yaml", "there is no configuration file"),
        ("base: a.yaml", "cycle (a.yaml -> a.yaml)"),
        ("policy: !!python/name:os.system {}", "not valid YAML"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_advice(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in error_of(["--config", write(tmp_path / "a.yaml", text)], capsys)


def test_a_longer_cycle_of_bases_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "a")):
        write(tmp_path / f"{name}.yaml", f"base: {base}.yaml")
    line = error_of(["--config", str(tmp_path / "a.yaml")], capsys)
    assert "a.yaml -> b.yaml -> c.yaml -> a.yaml" in line


def test_a_binary_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in error_of(["--config", str(tmp_path / "a.yaml")], capsys)


# --- errors to exit codes --------------------------------------------------------------------------


def failing(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


def test_only_rank_0_prints_but_every_rank_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert run_command(failing(ValueError("two\n  lines"))) == 2
        assert capsys.readouterr().err.count("\n") == lines


def test_a_missing_file_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(FileNotFoundError(2, "No such file or directory", "x.bin"))) == 2
    expected = "offload-sparse: error: x.bin: No such file or directory; check the path\n"
    assert capsys.readouterr().err == expected


def test_an_error_of_a_library_says_how_to_find_its_origin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: int("x")) == 2
    assert "OFFLOAD_SPARSE_TRACEBACK=1" in capsys.readouterr().err
    monkeypatch.setenv("OFFLOAD_SPARSE_TRACEBACK", "1")
    assert run_command(lambda: int("x")) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_command_that_is_interrupted_says_so_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "offload-sparse: interrupted\n"


def test_a_bug_is_not_taken_for_bad_input() -> None:
    with pytest.raises(RuntimeError, match="bug"):
        run_command(failing(RuntimeError("bug")))


def test_a_command_without_a_code_succeeds() -> None:
    assert run_command(lambda: None) == 0


# --- help ------------------------------------------------------------------------------------------


def test_help_shows_every_option_with_its_default_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--help", "all"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section in ("atoms", "data", "policy", "round", "optim", "train", "store", "dfbst"):
        for name in vars(getattr(RunConfig(), section)):
            assert f"--{section}.{name} " in text
    assert "remaining ratio of what `budget` counts" in text
    assert "--policy.rho NUMBER remaining ratio" in text
    assert "(default: 0.25)" in text
    assert "type: " not in text, "which the placeholder says"
    assert "``" not in text
    assert "The method `dst`" in text
    assert "How the weights are trained:" in text
    assert "examples: offload-sparse train --config" in text


def test_every_option_is_documented() -> None:
    parser = Options(RunConfig, "x", ("x",)).parser()
    helps = {action.dest: action.help for action in parser._actions}
    for name in flat_tree(RunConfig()):
        assert len(helps[name] or "") > 10, name


def test_parsing_does_not_import_torch() -> None:
    script = "import sys, offload_sparse.config.parse as a; a.parse([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("text", "leaf", "expected"),
    [
        ("store:\n  pin: off\n", "store.pin", "off"),
        ("store:\n  pin: on\n", "store.pin", "on"),
        ("train:\n  precision: no\n", "train.precision", "no"),
    ],
)
def test_choices_that_yaml_takes_for_truth_values_need_no_quotes(
    tmp_path: Path, text: str, leaf: str, expected: str
) -> None:
    config = parse(["--config", write(tmp_path / "c.yaml", text)])
    section, name = leaf.split(".")
    assert getattr(getattr(config, section), name) == expected


# --- YAML 1.2 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("064", 64), ("08", 8), ("0x10", 16), ("0o17", 15), ("1e-4", 1e-4), ("1.", 1.0)),
        *(("1:04", "1:04"), ("1_000", "1_000"), ("off", "off"), ("no", "no"), ("2001-01-01", "2001-01-01")),
        *(("true", True), ("~", None), (".inf", ".inf"), ("<<: 1", {"<<": 1})),
    ],
)
def test_scalars_are_read_as_yaml_1_2_reads_them(text: str, expected: Any) -> None:
    found = yaml_text.parse(text, "x")
    assert (type(found), found) == (type(expected), expected)


def test_a_number_is_the_same_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    for text, expected in (("064", 64), ("0x10", 16)):
        file = write(tmp_path / "a.yaml", f"data: {{batch_size: {text}}}")
        assert parse(["--config", file]).data.batch_size == expected
        assert parse(["--data.batch_size", text]).data.batch_size == expected


@pytest.mark.parametrize("text", ["1:04", "1_000", "12a"])
def test_text_that_only_yaml_1_1_takes_for_a_number_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.yaml", f"data: {{batch_size: {text}}}")
    assert f"data.batch_size is {text}; give a whole number" in error_of(["--config", file], capsys)


# --- files that attack -------------------------------------------------------------------------------

BOMB = "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*{'a' if n == 0 else f'b{n - 1}'}, *a]\n" for n in range(40))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "aliases (*name) are not read"),
        ("model: {arguments: &a {b: *a}}", "aliases (*name) are not read"),
        ("x" * (yaml_text.LARGEST + 1), "bytes; give a YAML file"),
        ("[" * 3000, "nested too deeply"),
        ("base: /dev/zero", "/dev/zero is no regular file"),
        ("base: [" + "a.yaml, " * 9 + "]", "base is ["),
        ("policy: {rho: !!binary aGk=}", "could not determine a constructor"),
        ("train: {seed: " + "9" * 30 + "}", "a number is too large"),
        ("data: {name: " + "9z" * 6000 + "}", "data.name is 9z"),
        ("data: {mean: [" + "0.5, " * 9000 + "0.5]}", "data.mean is [0.5, 0.5"),
    ],
)
def test_a_file_that_attacks_is_refused_in_a_short_line(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(["--config", write(tmp_path / "a.yaml", text)], capsys)
    assert expected in line
    assert len(line) < 400


def test_a_fifo_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "a.yaml"):
        write(tmp_path / "a.yaml", "base: fifo")
        assert "is no regular file" in error_of(["--config", str(tmp_path / name)], capsys)


# --- options of earlier versions ---------------------------------------------------------------------

OLD = yaml_text.read_keys(ROOT / "offload_sparse" / "config" / "replaced.yaml")


@pytest.mark.parametrize("name", OLD)
def test_an_option_of_an_earlier_version_says_what_replaces_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section, key = name.split(".")
    file = write(tmp_path / "old.yaml", f"{section}: {{{key}: 1}}")
    assert error_of(["--config", file], capsys).endswith(f"unknown key {name}; {OLD[name]}\n")
    for spelling in (name, name.replace("_", "-")):
        assert error_of([f"--{spelling}", "1"], capsys).endswith(f"option --{name}; {OLD[name]}\n")
    assert name not in flat_tree(RunConfig())
    for other in re.findall(r"write ([a-z_.]+)", OLD[name]):
        assert {other, other.rpartition(".")[0]} & flat_tree(RunConfig()).keys(), "what is advised exists"


def test_every_such_option_gets_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "old.yaml", "".join(f"{name}: 1\n" for name in OLD))
    assert run_command(lambda: print(parse(["--config", file, "--train.progress", "false"]))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(OLD) + 1
    assert all(line.startswith("offload-sparse: error: ") for line in lines)


def test_there_are_eighty_options_and_no_more() -> None:
    assert len(flat_tree(RunConfig())) <= 80


# --- spellings ---------------------------------------------------------------------------------------


def test_dashes_and_underscores_are_the_same_everywhere(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "data: {batch-size: 7}\ntrain.log-every: 3\nrun-dir: runs/x")
    more = ["--dry-run", "--policy.hard-cap=2", "--model.arguments.image-size", "8"]
    config = parse(["--config", file, *more])
    assert (config.data.batch_size, config.train.log_every, config.run_dir) == (7, 3, Path("runs/x"))
    assert (config.dry_run, config.policy.hard_cap, config.model.arguments) == (True, 2.0, {"image_size": 8})


def test_help_shows_what_people_use_first_and_all_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for more in ([], ["all"]):
        with pytest.raises(SystemExit):
            parse(["--help", *more])
        shown[bool(more)] = set(re.findall(r"^  --([a-z_.]+)", capsys.readouterr().out, re.MULTILINE))
    assert shown[True] - {"config"} == set(flat_tree(RunConfig()))
    assert len(shown[False] - {"config"}) == 27
    assert {"policy.rho", "method", "run_dir", "train.epochs", "optim.name", "model.weights"} <= shown[False]
