import errno
import inspect
import io
import json
import os
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich import console

import raysubset
from raysubset import comparison
from raysubset.cli import call, run_job
from raysubset.cli.flags import COMMANDS
from raysubset.cli.live import shown
from raysubset.cli.screen import print_sections
from raysubset.config import Config, MinimizeConfig, field_docs, flatten
from raysubset.events import Event, Note, OnEvent
from raysubset.pipeline.run_report import RunReport
from raysubset.report import Command, Section, sections
from raysubset.run_directory import REPORT_PATH, Lease, RunDirectory
from tests.flags import parse_config
from tests.test_report import a_record

# isort: split
import ray


def exit_of(arguments: str | list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int | str | None, str, str]:
    """Exit code, stdout and stderr of `raysubset …`."""
    try:
        code = call(arguments.split() if isinstance(arguments, str) else arguments)
    except SystemExit as exit:
        code = exit.code
    said = capsys.readouterr()
    return code, said.out, said.err


# Flags


def test_flags_set_single_fields():
    flags = (
        "--seed 3 --data.name mnist --subsets.num 4 --subsets.size 5000 --model.width 32 --minimize.learning-rate 0.3"
    )
    expected = {"seed": 3, "data.name": "mnist", "subsets.num": 4, "subsets.size": 5000, "model.width": 32}
    assert parse_config(flags.split()) == Config().with_overrides(expected | {"minimize.learning_rate": 0.3})


def test_flags_may_be_set_back_to_none_and_false():
    default = Config().with_overrides({"subsets.num": 4, "minimize.compile": True})
    assert parse_config(["--subsets.num", "None", "--minimize.no-compile"], default=default) == Config()


@pytest.mark.parametrize("wrapped", [False, True])
def test_config_file_gives_defaults_that_flags_override(tmp_path: Path, wrapped: bool):
    tree = {"seed": 7, "subsets": {"num": 3}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"format": 1, "config": tree} if wrapped else tree))
    config = parse_config(["--config", str(path), "--seed", "8"])
    assert config == Config().with_overrides({"seed": 8, "subsets.num": 3})


def test_config_of_a_run_can_be_passed_back_in(tmp_path: Path):
    config = Config(storage_path=str(tmp_path)).with_overrides({"rounds.num": 2, "task.label_smoothing": 0.1})
    run = RunDirectory(str(tmp_path), "a-run")
    run.open(config.to_dict(), {})
    assert parse_config(["--config", f"{tmp_path}/a-run/config.json"]) == config


@pytest.mark.parametrize(
    ("tree", "flags"),
    [
        ({"model": {"name": "os:execv"}}, ["--model.name", "cnn"]),
        ({"data": {"name": "os:abort"}}, ["--data.name=digits"]),
        ({"subsets": {"scheme": "function", "function": "os:abort"}}, ["--subsets.function", "own:cut"]),
        ({"aggregation": {"method": "os:abort"}}, ["--aggregation.method", "fisher"]),
    ],
)
def test_a_function_that_a_file_names_is_called_only_where_the_user_says_so(
    tmp_path: Path, tree: dict[str, Any], flags: list[str]
):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"format": 1, "config": tree}))
    with pytest.raises(ValueError, match=r"os:.* would be imported from .* and called.* add --trust-code"):
        parse_config(["--config", str(path)])
    assert "os:" in str(parse_config(["--config", str(path), "--trust-code"]).to_dict())
    assert "os:" not in str(parse_config(["--config", str(path), *flags]).to_dict())


def test_a_jobs_own_default_is_kept_where_a_partial_file_says_nothing(tmp_path: Path):
    path = tmp_path / "part.json"
    path.write_text(json.dumps({"subsets": {"num": 3}}))
    default = Config().with_overrides({"subsets.size": 100, "seed": 5})
    assert parse_config(["--config", str(path)], default=default) == default.with_overrides({"subsets.num": 3})


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("rn", "there is no command rn; did you mean run?"),
        ("--seed 3", "there is no command --seed"),
        ("run --subsets.nmu 3", "there is no flag --subsets.nmu; did you mean --subsets.num?"),
        ("run --xyz 3", "there is no flag --xyz; see raysubset run --help"),
        ("run --subsets.nmu=3", "there is no flag --subsets.nmu; did you mean --subsets.num?"),
        ("run --fesh", "did you mean --fresh?"),
        ("run digits", "unexpected argument 'digits'"),
        ("run --subsets.num 0", "raysubset: subsets.num = 0 must be at least 1"),
        ("run --subsets.num many", "--subsets.num: give a whole number, not 'many'; see raysubset run --help"),
        ("run --seed 1.5", "--seed: give a whole number, not '1.5'"),
        ("run --fine-tuning.num-workers two", "--fine-tuning.num-workers: give a whole number or auto, not 'two'"),
        ("run --minimize.momentum much", "--minimize.momentum: give a number, not 'much'"),
        ("run --minimize.learning-rate fast", "--minimize.learning-rate: give a number, not 'fast'"),
        ("sweep --sizes 80 large", "--sizes: give a whole number, not 'large'"),
        ("export", "the following arguments are required: DIRECTORY; see raysubset export --help"),
        (
            "run --minimize.optimizer sdg",
            "minimize.optimizer = 'sdg' is not one of sgd, adam, ",
        ),
        ("run --minimize.learning-rate", "--minimize.learning-rate: expected one argument; see raysubset run --help"),
        ("run --minimize.epochs 0", "minimize.epochs = 0.0 must be positive"),
        ("run --subsets.start independent", "set trunk.epochs to 0"),
        ("run --name a/b", "must be a plain folder name"),
        ("run --config", "--config: expected one argument"),
        ("run --config /none.json", "--config /none.json: No such file or directory"),
        ("report", "report needs a directory"),
        ("report /none", "/none is no run directory: nothing is there"),
        ("report /proc", "it has no config.json; give the path of one, as listed by raysubset ls /proc"),
        ("run --data.name digts", "did you mean digits?"),
        ("run --storage-path /proc/none", "cannot write to /proc/none"),
        ("compare --seeds 0", "--seeds: 0 cannot tell a difference from noise"),
        ("compare --num-workers 0", "--num-workers 0: arm I needs at least one"),
        ("run --data.image-size 10000000", "this machine has too little memory for that"),
        ("compare --method conventional", "a comparison has arms of both methods: leave out --method conventional"),
        ("compare --budgets nan", "--budgets = nan must be a number"),
        ("compare --budgets inf", "--budgets = inf must be a number and finite"),
        ("compare --learning-rates nan", "--learning-rates = nan must be positive"),
        ("compare --learning-rates 0", "--learning-rates = 0.0 must be positive"),
        ("compare --minimize.optimizer gauss_newton --learning-rates 3", "gauss_newton takes that share"),
        ("compare --batch-sizes 0", "--batch-sizes = 0 must be at least 1"),
        ("compare --margin nan", "--margin = nan must be in [0, 1)"),
        ("compare --margin=-1", "--margin = -1.0 must be in [0, 1)"),
        ("compare --seeds 100000000000", "--seeds = 100000000000 must be in [0, 1000]"),
        ("sweep --sizes 80 --seeds 0", "--seeds = 0 must be in [1, 1000]"),
        ("sweep --sizes 10000000", "subsets.size = 10000000 exceeds the training set's 1294 examples"),
        ("sweep --sizes 0", "subsets.size = 0 must be at least 1"),
        ("run --storage-path foo://x", "storage_path of foo:// cannot be opened"),
        ("advise --against /none", "/none is no run directory"),
        ("doctor --model.wdth 3", "did you mean --model.width?"),
        ("run --lr 1", "did you mean --minimize.learning-rate or"),
        ("run --epochs=1", "did you mean --minimize.epochs or --fine-tuning.epochs or --trunk.epochs?"),
        ("run --data x", "did you mean --data.name?"),
        ("run --model x", "did you mean --model.name?"),
        ("run --workers 2", "did you mean --fine-tuning.num-workers or --trunk.num-workers or"),
        ("run --gpus 1", "did you mean --actors.num-gpus?"),
        ("run --output x", "did you mean --storage-path?"),
        ("run --quick", "--quick is a flag of compare, not of raysubset run"),
        (
            "report x --seed 3",
            "--seed is a flag of run and compare and sweep and advise and find-rate and doctor and",
        ),
        ("run --resume", "the same command under the same --name resumes"),
        ("run --data.streamed yes", "unexpected argument 'yes' after --data.streamed"),
        ("run --data.streamed=yes", "--data.streamed: ignored explicit argument 'yes'"),
        ("report a --format pdf", "--format: invalid choice: 'pdf' (choose from 'text', 'json', 'html')"),
        ("config --to a.json", "--to a.json: the file is YAML: give it a name that ends in .yaml"),
    ],
)
@pytest.mark.usefixtures("no_node_ahead")
def test_a_mistake_is_one_line_and_exit_code_2(arguments: str, told: str, capsys: pytest.CaptureFixture[str]):
    code, out, err = exit_of(arguments, capsys)
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]  # notes on the data may come before
    assert line.startswith("raysubset: ")
    assert told in line
    assert "Traceback" not in err


def test_long_messages_are_not_cut(capsys: pytest.CaptureFixture[str]):
    name = "x" * 300 + "/y"
    assert name in exit_of(["run", "--name", name], capsys)[2].replace(" ", "")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is no JSON"),
        ('{"seeed": 1}', "did you mean seed?"),
        ("[]", "should hold settings by their names, not []"),
        ('{"seed": "x"}', "should be int"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path: Path, text: str, told: str, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "bad.json"
    path.write_text(text)
    code, _, err = exit_of(["run", "--config", str(path)], capsys)
    assert code == 2
    assert str(path) in err
    assert told in err
    assert len(err.splitlines()) == 1


def test_a_jobs_mistake_is_exit_code_2(capsys: pytest.CaptureFixture[str]):
    assert run_job(["--seeed", "3"], default=Config()) == 2
    assert "did you mean --seed?" in capsys.readouterr().err


@pytest.mark.usefixtures("no_node_ahead")
def test_what_compare_is_given_reaches_it_be_it_nought(monkeypatch: pytest.MonkeyPatch):
    given, signature = {}, inspect.signature(comparison.compare)

    def compare(config: Config, **options: Any) -> None:
        given.update(options)
        raise ValueError("enough")

    monkeypatch.setattr("raysubset.comparison.compare", compare)
    assert call(["compare", "--margin", "0", "--arms", "B", "G"]) == 2
    assert (given["margin"], given["arms"]) == (0.0, ("B", "G"))
    assert "budgets" not in given
    bound = signature.bind(Config(), **given)
    bound.apply_defaults()
    assert bound.arguments["seeds"] == 5


# User functions

USERS_CODE = """
import sys
def exits(*given): sys.exit(0)
def raises(*given):
    def inner(): raise KeyError("of the user")
    inner()
"""
PLACES = {
    "model.name": ["--model.name"],
    "data.name": ["--data.name"],
    "subsets.function": ["--subsets.scheme", "function", "--subsets.function"],
}


WAITS = re.compile(r" (raysubset \S+ starts: |reading |planning)")  # lines that say what goes on


@pytest.fixture
def users_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with modules of the user's, under names that no other test has imported."""
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.startswith("users_")]:
        del sys.modules[name]


@pytest.mark.usefixtures("no_node_ahead")
@pytest.mark.parametrize("field", PLACES)
@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("exits", "ended the process (sys.exit(0)): put what a script does, such as parsing flags, under `if __name__"),
        ("raises", "raised KeyError: 'of the user'; see users_{field}.py, line 5, in inner"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "compare", "sweep --sizes 40"])
def test_what_a_users_function_does_beside_returning_is_a_line(
    field: str, function: str, told: str, verb: str, users_code: Path, capsys: pytest.CaptureFixture[str]
):
    module = f"users_{field.partition('.')[0]}"
    (users_code / f"{module}.py").write_text(USERS_CODE)
    sys.modules.pop(module, None)
    arguments = [*verb.split(), "--storage-path", str(users_code / "runs"), *PLACES[field], f"{module}:{function}"]
    code, out, err = exit_of(arguments, capsys)
    *notes, line = [line for line in err.splitlines() if not WAITS.search(line)]
    assert (code, out) == (2, "")
    assert all(f"{module} is " in note for note in notes), err
    assert f"raysubset: {field} = '{module}:{function}' {told.format(field=field.partition('.')[0])}" in line
    assert not (users_code / "runs").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import sys\nsys.exit(0)\n", 'such as parsing flags, under `if __name__ == "__main__":`'),
        ("def net(:\n", "raised SyntaxError"),
        ("from raysubset import Config, run\ndef net(*g): ...\nrun(Config())\n", "calls run() when it is imported"),
        ("from raysubset import Config, compare\ncompare(Config())\n", "calls compare() when it is imported"),
    ],
)
def test_what_a_users_module_does_when_it_is_imported_is_a_line(
    text: str, told: str, users_code: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
):
    if "run(" in text or "compare(" in text or "def net" in text:  # for the others a node is started ahead, and ends
        request.getfixturevalue("no_node_ahead")
    (users_code / "ends.py").write_text(text)
    sys.modules.pop("ends", None)
    code, out, err = exit_of(["run", "--model.name", "ends:net", "--storage-path", str(users_code / "runs")], capsys)
    lines = [line for line in err.splitlines() if not WAITS.search(line)]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert "ends" in err
    assert told in err


# Help


def test_help_has_two_levels_in_the_configs_own_words(capsys: pytest.CaptureFixture[str]):
    code, out, _ = exit_of("run --help", capsys)
    assert not code
    assert len(out.splitlines()) < 50
    assert "--help-all" in out
    for told in ("--minimize.learning-rate", "--config FILE", "--fresh", "Examples per subset"):
        assert told in out
    code, out, _ = exit_of("run --help-all", capsys)
    assert not code
    words = " ".join(out.split())
    assert "Examples per subset. Q = size · outputs / parameters should exceed 1." in words
    assert all(key.rpartition(".")[2].replace("_", "-") in words for key in flatten(Config().to_dict()))
    assert "130 stopped by Ctrl-C" in words
    assert "Least rise of training accuracy from window to window that keeps the weights training. In [0, 1)." in words


@pytest.mark.parametrize("width", ["80", "40"])
def test_help_fits_the_terminal(width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", width)
    for arguments in ("--help", "run --help", "report --help"):
        lines = exit_of(arguments, capsys)[1].splitlines()
        assert max(map(len, lines)) <= int(width), arguments


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]):
    assert exit_of("--version", capsys) == (0, f"raysubset {raysubset.__version__}\n", "")


def test_a_file_that_config_writes_gives_the_settings_it_was_written_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = str(tmp_path / "mine.yaml")
    flags = ["--data.name", "mnist", "--minimize.learning-rate", "1e-05", "--minimize.compile", "--subsets.num", "3"]
    assert exit_of(["config", *flags, "--to", path], capsys) == (0, "", "")
    text = Path(path).read_text()
    assert parse_config(["--config", path]) == parse_config(flags)
    assert re.findall(r"^[a-z].*", text, re.MULTILINE) == [
        'data.name: "mnist"',
        "subsets.num: 3",
        "minimize.learning_rate: 1e-05",
        "minimize.compile: true",
    ]
    Path(path).write_text(re.sub(r"^#(?=[a-z_.]+: )", "", text, flags=re.MULTILINE))  # every setting, as its default
    assert parse_config(["--config", path]) == parse_config(flags)
    assert "exists already" in exit_of(["config", "--to", path], capsys)[2]
    code, _, told = exit_of(["config", "--to", str(tmp_path / "none" / "mine.yaml")], capsys)
    assert (code, f"there is no folder {tmp_path}/none" in told) == (2, True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\nseed: 2\n", "seed is given twice"),
        ("subsets: {num: 3}\nsubsets.num: 4\n", "subsets.num is given twice"),
        ("subsets: 3\nsubsets.num: 4\n", "subsets is a group of settings: give single ones, such as subsets.num"),
        ("a: [", "is no YAML"),
        ("a: &a\n  b: *a\n", "recursion"),
        ("subsets.nmu: 4", "did you mean subsets.num?"),
        ("minimize:\n  learning_rate: fast", "learning_rate = 'fast' should be float"),
    ],
)
def test_what_is_wrong_with_a_yaml_file_is_told(tmp_path: Path, text: str, told: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml") as refused:
        parse_config(["--config", str(path)])
    assert told in str(refused.value)


def test_yaml_says_what_people_mean(tmp_path: Path):
    path = tmp_path / "mine.yml"
    anchored = "trunk: &full\n  epochs: 2\n  learning_rate: 0.05\nfine_tuning:\n  <<: *full\n  epochs: 3\n"
    path.write_text(f"# comments\nname: None\nminimize:\n  learning_rate: 1e-3\nsubsets.num: 3\n{anchored}")
    overrides = {"minimize.learning_rate": 0.001, "subsets.num": 3, "trunk.epochs": 2, "trunk.learning_rate": 0.05}
    overrides |= {"fine_tuning.epochs": 3, "fine_tuning.learning_rate": 0.05}
    assert parse_config(["--config", str(path)]) == Config().with_overrides(overrides)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("raysubset re", ["report"]),
        ("raysubset run --minimize.opt", ["--minimize.optimizer"]),
        ("raysubset run --method ", ["subset_pretraining", "conventional"]),
        ("raysubset report --format j", ["json"]),
        ("raysubset report /tm", []),  # a path: the shell's own
    ],
)
def test_a_shell_completes_commands_flags_and_words(
    line: str, told: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COMP_LINE", line)
    assert exit_of(["--complete", "raysubset", "", ""], capsys)[1].split() == told


def test_bash_takes_the_line_that_the_manual_gives():
    text = Path(__file__).parents[1].joinpath("raysubset/README.md").read_text()
    (line,) = re.findall(r"^complete .*", text, re.MULTILINE)
    done = subprocess.run(["bash", "-c", f"{line}; complete -p raysubset"], capture_output=True, text=True, check=True)
    assert "raysubset --complete" in done.stdout


def test_help_of_a_configs_class_has_its_fields_documentation():
    text = pydoc.render_doc(MinimizeConfig, renderer=pydoc.plaintext)  # pyright: ignore[reportAttributeAccessIssue]
    assert "learning_rate: float | None = None" in text
    assert "for a curve; the cost is counted. By default never" in field_docs(MinimizeConfig)["validate_every"]
    assert field_docs(MinimizeConfig)["validate_every"].endswith("after each epoch anyway. At least 1.")
    assert field_docs(MinimizeConfig)["learning_rate"] in text
    assert all(field_docs(type(room)).values() for room in vars(Config()).values() if is_dataclass(room))


def test_overview_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    for arguments in ([], ["--help"]):
        code, out, _ = exit_of(arguments, capsys)
        assert not code
        assert all(verb in out for verb in (*COMMANDS, "Exit codes"))


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["run", "--help"], ["run", "--subsets.nmu", "3"], ["rn"], ["sweep"]),
        *(["run", "--data.name", "digts"], ["compare", "--data.name", "/none.csv"]),
    ],
    ids=" ".join,
)
def test_help_and_mistakes_wait_neither_for_torch_nor_for_ray(arguments: list[str]):
    program = (
        "import sys\nfrom raysubset.cli import call\n"
        f"try: call({arguments})\nexcept SystemExit: pass\n"
        "print('imported:', sorted({'torch', 'ray', 'pyarrow', 'numpy', 'yaml'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "imported: []"


@pytest.mark.usefixtures("no_node_ahead")
def test_a_second_driver_of_the_same_name_is_refused_before_ray_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with Lease(RunDirectory(str(tmp_path), "run")):
        code, out, err = exit_of(["run", "--storage-path", str(tmp_path), "--name", "run"], capsys)
    assert (code, out) == (2, "")
    assert f"is being written by process {os.getpid()}" in err
    assert not ray.is_initialized()


# Report


@pytest.fixture
def finished(tmp_path: Path) -> str:
    run = RunDirectory(str(tmp_path), "a-run")
    run.write_json(REPORT_PATH, a_record(uri=run.uri))
    return run.uri


def test_report_is_printed_again(finished: str, capsys: pytest.CaptureFixture[str]):
    code, out, err = exit_of(["report", finished], capsys)
    assert (code, err) == (0, "")
    for told in (
        "Test accuracy 90.00% ± 3.00",
        "fine_tuning",
        "What this tells",
        "raysubset run --method conventional",
    ):
        assert told in out
    assert "\x1b" not in out  # no colours where nobody looks


@pytest.mark.parametrize("kind", [OSError, RuntimeError])  # the driver's own, and what it tells of an actor's
@pytest.mark.parametrize(
    ("number", "way_out"), [(errno.ENOSPC, "make room there"), (errno.EROFS, "make it writable and repeat this")]
)
def test_storage_that_takes_no_more_is_told_with_the_way_out(
    number: int,
    way_out: str,
    kind: type[Exception],
    finished: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def refuse(self: RunDirectory, path: str, data: bytes) -> None:
        full = OSError(number, os.strerror(number), path)
        raise full if kind is OSError else kind(f"subset 0 was lost 4 times in a row, last: OSError: {full}")

    monkeypatch.setattr(RunDirectory, "write_bytes", refuse)
    code, _, err = exit_of(["report", finished, "--format", "html"], capsys)
    assert (code, err.count("\n")) == (1, 1)
    assert f"{os.strerror(number)}: 'progress.csv'; {way_out}" in err


def test_a_report_shows_itself_in_a_line_in_a_notebook_and_as_the_command_does(
    finished: str, capsys: pytest.CaptureFixture[str]
):
    report = RunReport.from_dict(a_record(uri=finished))
    assert repr(report) == f"<RunReport a-run: test accuracy 90.00% for {report.passes:.2f} passes, " + (
        f"{report.critical_path_passes:.2f} on the critical path; {finished}>"
    )
    report.show()
    shown = capsys.readouterr().out
    assert call(["report", finished]) == 0
    assert capsys.readouterr().out == shown
    html = report._repr_html_()
    assert html.startswith("<pre")
    assert "90.00%" in html
    assert "\x1b" not in html


def test_a_notebook_shows_a_report_as_one_output(
    finished: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    outputs: list[str] = []
    notebook = SimpleNamespace(display=outputs.append, HTML=str)
    monkeypatch.setattr(console, "_is_jupyter", lambda: True)
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    report = RunReport.from_dict(a_record(uri=finished))
    report.show()
    assert outputs == [report._repr_html_()]
    assert capsys.readouterr().out == ""


def test_a_verb_shows_what_happens_unless_it_is_given_a_listener(capsys: pytest.CaptureFixture[str]):
    heard: list[Event] = []

    def verb(config: Config, *, on_event: OnEvent | None = None) -> str:
        """Does it."""
        for tell in (on_event,) if on_event else ():
            tell(Note("it is done"))
        return "report"

    assert shown(verb)(Config()) == "report"
    assert "it is done" in capsys.readouterr().err
    assert shown(verb)(Config(), on_event=heard.append) == "report"
    assert shown(verb)(Config(), on_event=None) == "report"
    assert (heard, capsys.readouterr().err) == ([Note("it is done")], "")


def test_dir_has_the_interface_and_waits_for_no_torch():
    program = "import raysubset, sys; print(dir(raysubset), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert all(repr(name) in done.stdout for name in raysubset.__all__)
    assert done.stdout.endswith(" False\n")
    assert raysubset.run.__module__.startswith("raysubset.pipeline")


def test_report_as_json_is_the_file(finished: str, capsys: pytest.CaptureFixture[str]):
    code, out, _ = exit_of(["report", finished, "--format", "json"], capsys)
    assert code == 0
    written = json.loads(Path(finished, REPORT_PATH).read_text())
    assert json.loads(out) == {key: value for key, value in written.items() if key != "digest"}  # the file's own


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_narrow_terminal_cuts_no_number_and_breaks_no_command(monkeypatch: pytest.MonkeyPatch):
    record = a_record()
    parts = sections(record)
    whole = {len(part.rows[0]) for part in parts if part.columns}
    assert max(whole) == 10  # the table of the stages is wider than the terminal
    drawn = Terminal()
    monkeypatch.setattr(sys, "stdout", drawn)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    print_sections(parts)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", drawn.getvalue()).splitlines()
    commands = [f"  {line}" for part in parts for line in part.lines if isinstance(line, Command)]
    assert commands
    assert set(commands) <= set(lines)
    assert all(len(line) <= 80 for line in lines if line not in commands)
    words = set(" ".join(lines).split())
    for part in parts:
        for number in part.numeric:
            assert all(row[number] in words for row in part.rows if row[number] and " " not in row[number])


AWKWARD = Section("[b]t[/b]", ("", "lr[high]", ":100:"), (("a\nb", "\x1b[31m", "cafe\u0301"),), ("  run 'lr[a]' :x:",))


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]):
    print_sections([AWKWARD])
    out = capsys.readouterr().out
    for told in ("[b]t[/b]", "lr[high]", ":100:", "a\\nb", "\\x1b[31m", "cafe\u0301", "  run 'lr[a]' :x:\n"):
        assert told in out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_lacks_is_written_otherwise(encoding: str, finished: str, monkeypatch: pytest.MonkeyPatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding))
    assert call(["report", finished]) == 0
    assert call(["run", "--help-all"]) == 0
    sys.stdout.flush()
    out = sys.stdout.buffer.getvalue().decode(encoding)  # pyright: ignore[reportAttributeAccessIssue]
    assert f"90.00% {'±' if encoding != 'ascii' else chr(92) + 'xb1'} 3.00" in out


def test_a_terminal_that_says_it_has_no_columns_has_some(monkeypatch: pytest.MonkeyPatch):
    drawn = io.StringIO()
    drawn.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", drawn)
    monkeypatch.setenv("COLUMNS", "0")
    print_sections([AWKWARD])
    assert "lr[high]" in drawn.getvalue()


def test_output_cut_off_by_its_reader_is_no_crash(finished: str):
    command = f"{sys.executable} -m raysubset report {finished} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
