"""Run the commands and return their exit codes.

torch and Ray are not imported before the flags are parsed, so --help and mistakes are answered at once.
"""

import dataclasses
import errno
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.text import Text

from raysubset import VERBS, __version__
from raysubset.cli import flags
from raysubset.cli.live import telling
from raysubset.cli.parsing import HELP, overview, parse, parse_command
from raysubset.cli.screen import console_of, open_screen, print_sections, sections_of, visible
from raysubset.config import Config, field_type, parse_value, refuse_missing_data
from raysubset.errors import CorruptFile, first_line, is_of_full_card, one_line
from raysubset.events import OnEvent, Waiting
from raysubset.uris import without_secrets

QUICK: dict[str, Any] = {  # the options of `compare --quick`
    "seeds": 2,
    "budgets": (1.0, 2.0, 4.0),
    "arms": ("B", "D", "G", "H"),
}

_WAYS_OUT = dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM), "; make it writable and repeat this, or choose another place"
)
_WAYS_OUT |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; make room there: the same command then resumes")

STARTING = f"raysubset {__version__} starts: torch and Ray are loaded"

DONE, FAILED, MISTAKE, STOPPED = 0, 1, 2, 130  # the last is the shells' code for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `raysubset` command and end the process with its exit code."""
    sys.exit(call(sys.argv[1:] if arguments is None else list(arguments)))


def call(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    again = shlex.join(["raysubset", *(without_secrets(a) for a in arguments if a != "--fresh")])
    return _guarded(lambda: _answer(arguments), again=f"to resume: {again}")


def _answer(arguments: Sequence[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb == "--complete":  # bash passes the line in its environment
        from raysubset.cli.help import completions

        line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "100000"))]
        print("\n".join(completions([*line.split(), *([""] if line.endswith(" ") else [])])))
    elif verb == "--version":
        print(f"raysubset {__version__}")
    elif verb in HELP:
        print(overview(), end="")
    else:
        return _do(parse_command(arguments))
    return DONE


def run_job(arguments: Sequence[str], *, default: Config, description: str | None = None) -> int:
    """Do a job file's work: parse the flags of `raysubset run`, which change single fields of the job's default config,
    run, and print the report. Return the exit code. `description` is the first lines of the job's --help.
    """
    return _job(flags.Run, arguments, default, description)


def run_sweep_job(
    arguments: Sequence[str], *, default: Config, sizes: Sequence[int], seeds: int, description: str | None = None
) -> int:
    """Do the work of a sweep's job file, as run_job() does that of a run.

    Args:
        arguments: the flags of `raysubset sweep`, which change single fields of the default, the sizes and the seeds.
        sizes: examples per subset.
        seeds: runs of each size.
    """
    return _job(flags.Sweep, arguments, default, description, sizes=tuple(sizes), seeds=seeds)


def run_comparison_job(
    arguments: Sequence[str], *, default: Config, description: str | None = None, **options: Any
) -> int:
    """Do the work of a comparison's job file, as run_job() does that of a run.

    Args:
        arguments: the flags of `raysubset compare`.
        options: defaults for compare(): seeds, budgets, arms, learning_rates, batch_sizes, margin, num_workers,
            bandwidth.
    """
    return _job(flags.Compare, arguments, default, description, **options)


def _job(
    kind: type[flags.Command], arguments: Sequence[str], default: Config, description: str | None, **options: Any
) -> int:
    prog = Path(sys.argv[0]).name
    command = partial(parse, kind, arguments, default, prog=prog, description=description, **options)
    return _guarded(lambda: _do(command()), again="the same command resumes")


def _guarded(work: Callable[[], int], *, again: str) -> int:
    """Do the work; turn mistakes, failures and Ctrl-C into a line and an exit code."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    open_screen()
    previous = signal.signal(signal.SIGTERM, _interrupt)  # `ray job stop` leaves three seconds: stop as Ctrl-C does
    try:
        return work()
    except SystemExit as end:  # argparse has printed the help
        return DONE if not end.code else FAILED
    except ValueError as error:
        is_damage = isinstance(error, CorruptFile) and "--fresh" not in str(error)
        _error(f"{error}{'; give the command that wrote it again' if is_damage else ''}")
        return MISTAKE
    except KeyboardInterrupt:
        _error(f"stopped; finished work is kept, {again}")
        return STOPPED
    except BrokenPipeError:  # the reader of our output has closed it, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # numpy's, and torch's RuntimeError
            smaller = "choose a smaller --data.image-size, --model.width, --model.depth or --minimize.batch-size"
            _error(f"this machine has too little memory for that ({first_line(error)}): {smaller}")
            return MISTAKE
        logging.getLogger(__name__).debug("failed", exc_info=True)
        way_out = next((text for number, text in _WAYS_OUT.items() if f"[Errno {number}]" in str(error)), "")
        _error(one_line(error) if is_of_full_card(error) else f"{type(error).__name__}: {error}{way_out}")
        return FAILED
    except Exception as error:
        if not type(error).__module__.startswith("ray."):
            raise
        logging.getLogger(__name__).debug("failed", exc_info=True)
        _error(f"the cluster failed: {one_line(error)}; finished work is kept, {again}")
        return FAILED
    finally:
        signal.signal(signal.SIGTERM, previous)


def _reported(command: flags.Resumed, verb: str, *arguments: Any, is_finished: bool = False, **options: Any) -> Any:
    """Call run(), sweep() or compare(), write the report's page, print where it is and the report, and return it.

    Ray's processes start while torch is imported with the room of the verb, unless the work is finished.
    """
    with telling(STARTING) as tell, ExitStack() as stack:
        if not is_finished:
            from raysubset.cluster import started_ahead

            stack.enter_context(started_ahead(command.config.cluster))
        options |= {"on_event": tell, "fresh": command.fresh, "accept_changed_code": command.accept_changed_code}
        room = import_module(f"raysubset.{VERBS[verb]}")
        report = getattr(room, verb)(command.config, *arguments, **options)
        page = _write_page(report.uri, tell)
    print(page)
    report.show()
    return report


def _run(command: flags.Run) -> None:
    report_path = Path(command.config.storage_path).expanduser() / command.config.run_name() / "report.json"
    _reported(command, "run", is_finished=report_path.exists() and not command.fresh)


def _sweep(command: flags.Sweep) -> int:
    space, scheduler = _space(command.sizes, command.space), "asha" if command.prune else None
    options = {"seeds": command.seeds, "scheduler": scheduler, "baseline": command.baseline}
    report = _reported(command, "sweep", space, **options)
    return FAILED if any(trial["state"] == "failed" for trial in report.trials) else DONE


def _compare(command: flags.Compare) -> int:
    options = dict(QUICK) if command.quick else {}
    for name in ("seeds", "budgets", "arms", "learning_rates", "batch_sizes", "margin", "num_workers", "bandwidth"):
        if (value := getattr(command, name)) not in (None, ()):
            options[name] = value
    report = _reported(command, "compare", **options)
    return FAILED if report.has_failed else DONE


def _space(sizes: Sequence[int], fields: Sequence[str]) -> dict[str, list[Any]]:
    """Return lists of values by dotted name, from --sizes 100 200 and --space minimize.learning_rate=0.05,0.1.

    Raises:
        ValueError: for a field given twice or without values, or if there is none.
    """
    space: dict[str, list[Any]] = {"subsets.size": list(sizes)} if sizes else {}
    for text in fields:
        key, mark, values = text.partition("=")
        key = key.replace("-", "_")
        if not (key and mark and values):
            raise ValueError(f"--space {text}: write field=value,value")
        if key in space:
            raise ValueError(f"--space {text}: {key} is given twice")
        space[key] = [parse_value(word, field_type(Config, key)) for word in values.split(",")]
    if not space:
        raise ValueError("there is nothing to sweep: give --sizes or --space field=value,value")
    return space


def _report(command: flags.Report) -> None:
    if not command.directories:
        raise ValueError("report needs a directory: that of a run, a sweep or a comparison, or those of several runs")
    if command.to and (command.format != "html" or len(command.directories) == 1):
        raise ValueError(
            f"--to {command.to} is for --format html of several runs; the page of one is in its directory: leave it out"
        )
    _refuse_no_folder(command.to)
    from raysubset import report

    if len(command.directories) == 1:
        (directory,) = command.directories
        record: Any = report.read_report(directory)
        read, write = sections_of, partial(report.write_files, directory)
    else:
        record, read = report.read_several(command.directories), report.several_sections
        write = partial(report.write_several, record, command.to or "report.html")
    with _damaged(", ".join(command.directories)):
        match command.format:
            case "html":
                print(write())
            case "json":
                print(json.dumps(record, indent=1))
            case "text":
                print_sections(read(record))


def _refuse_no_folder(path: str | None) -> None:
    if path and not (folder := Path(path).expanduser().parent).is_dir():
        raise ValueError(f"--to {path}: there is no folder {folder}: choose another")


def _ls(command: flags.Ls) -> int:
    from raysubset.report import list_runs, listing_section

    entries, num_others = list_runs(command.storage)
    if command.format == "json":
        print(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=1))
    else:
        print_sections([listing_section(command.storage, entries, num_others)])
    return MISTAKE if any(entry.state == "damaged" for entry in entries) else DONE


@contextmanager
def _damaged(directory: str) -> Iterator[None]:
    """Report records and tables as damaged whose values have the right types but do not belong together."""
    try:
        yield
    except CorruptFile:
        raise
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        text = f"{directory} is damaged ({one_line(error)}): give its command again, with --fresh"
        raise ValueError(text) from error


def _write_page(uri: str, tell: OnEvent) -> str:
    """Write a finished directory's page; say where it is, or why there is none: the result does not need it."""
    tell(Waiting("drawing the page and its plots"))
    from raysubset.report import write_files

    try:
        with _damaged(uri):
            return f"Page: {write_files(uri)}"
    except OSError as error:
        return f"No page, as it cannot be written: {first_line(error)}"


def _doctor(command: flags.Doctor) -> int:
    from raysubset.doctor import examine

    console = console_of(sys.stdout, soft_wrap=True)
    is_healthy = True
    for check in examine(command.config):
        mark = {True: ("ok  ", "green"), False: ("FAIL", "red"), None: ("note", "yellow")}[check.ok]
        console.print(Text.assemble(mark, f" {check.name}: {visible(check.text)}"))
        is_healthy = is_healthy and check.ok is not False
    return DONE if is_healthy else FAILED


def _num_gpus_here(config: Config) -> float:
    """Return the GPUs that this process uses in place of an actor: 1 if there is one, unless actors.num_gpus is 0.

    Raises:
        ValueError: if actors.num_gpus requests a GPU and there is none.
    """
    import torch

    num_gpus = config.actors.num_gpus
    if num_gpus and not torch.cuda.is_available():
        text = f"actors.num_gpus = {num_gpus:g}, but torch sees no GPU on this machine, where the command measures"
        raise ValueError(f"{text}: give the command on a node that has one, or leave it out")
    return float(torch.cuda.is_available() and num_gpus != 0)


def _advise(command: flags.Advise) -> None:
    from raysubset.comparison import advise, measured_lines, sizes_of
    from raysubset.data import load_full_set
    from raysubset.pipeline.node_speeds import measure_speed
    from raysubset.planning import make_plan
    from raysubset.report import Section, advice_sections, read_report

    config = command.config
    if config.method != "subset_pretraining":
        raise ValueError("advise is for subset pretraining: leave out --method conventional")
    if command.num_workers < 2:
        raise ValueError(f"--num-workers {command.num_workers}: on one device there is nothing to choose")
    comparison = command.against and read_report(command.against)
    if comparison and comparison.get("kind") != "comparison":
        raise ValueError(f"--against {command.against}: that is no comparison: give the directory of one")
    num_gpus, full_set = _num_gpus_here(config), load_full_set(*config.learned)
    plan, num_train = make_plan(config, full_set), len(full_set.train)
    per_s = measure_speed(full_set, config, plan.subsets[0].indices, num_gpus).examples_per_s
    speed = {"s_per_pass": num_train / per_s, "num_workers": command.num_workers}
    advice = advise(config, plan, sizes_of(config, full_set, plan), num_train=num_train, **speed)
    sections = advice_sections(advice.to_dict())
    if comparison:
        with _damaged(str(command.against)):
            sections.append(Section("What the comparison measured", lines=tuple(measured_lines(comparison, advice))))
    print_sections(sections)


def _find_rate(command: flags.FindRate) -> None:
    _refuse_no_folder(command.to)
    from raysubset.data import load_full_set
    from raysubset.planning import make_plan
    from raysubset.report import rate_sections, write_rates
    from raysubset.training import place, rate_range, use_device
    from raysubset.work import seeded_model

    config = command.config
    recipe = config.stage("subsets", epochs=1.0)
    recipe.peak_learning_rate()
    if recipe.whole_loop:
        raise ValueError(f"{recipe.whole_loop} takes no steps of batches at a rate: use sgd, adam, adamw or muon")
    device = use_device(num_gpus=_num_gpus_here(config), num_threads=config.actors.num_cpus)
    full_set = load_full_set(*config.learned)
    plan = make_plan(config, full_set)
    indices = None if config.method == "conventional" else plan.subsets[0].indices
    examples = full_set.training_batches(indices, device=device, augment=True)
    model = place(seeded_model(config, full_set), device, channels_last=recipe.channels_last)
    rates = rate_range(model, examples, recipe, seed=config.seed)
    passes = rates.cost.passes(len(full_set.train), plan.forward_share)
    about = {"passes": passes, "num_examples": len(examples), "loss": full_set.task.loss_name}
    about["quality"] = full_set.quality
    sections = rate_sections(rates, config.to_dict(), **about)
    if command.to:
        print(f"Page: {write_rates(sections, command.to, config.to_dict())}")
    print_sections(sections)


def _export(command: flags.Export) -> None:
    from raysubset.trained_model.exporting import export_model

    print(export_model(command.directory, command.to, format=command.format, trust_code=command.trust_code))


def _predict(command: flags.Predict) -> int:
    from raysubset.trained_model.exporting import predict_files

    code = DONE
    for prediction in predict_files(command.directory, command.files, trust_code=command.trust_code):
        if prediction.error:
            code = MISTAKE
            _error(prediction.error)
        if command.format == "json":
            tree = dataclasses.asdict(prediction)
            print(json.dumps({key: value for key, value in tree.items() if value or (key == "row" and value == 0)}))
        elif not prediction.error:
            print(prediction)
    return code


def _settings(command: flags.Settings) -> None:
    from raysubset.cli.help import settings_text

    text = settings_text(command.config)
    if command.to is None:
        print(text, end="")
        return
    path = Path(command.to).expanduser()
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(f"--to {command.to}: the file is YAML: give it a name that ends in .yaml")
    if path.exists():
        raise ValueError(f"--to {command.to} exists already: choose another name")
    _refuse_no_folder(command.to)
    path.write_text(text, encoding="utf-8")


_WORK: Mapping[type[flags.Command], Callable[[Any], int | None]] = {
    flags.Run: _run,
    flags.Sweep: _sweep,
    flags.Compare: _compare,
    flags.Report: _report,
    flags.Ls: _ls,
    flags.Doctor: _doctor,
    flags.Advise: _advise,
    flags.FindRate: _find_rate,
    flags.Export: _export,
    flags.Predict: _predict,
    flags.Settings: _settings,
}


def _do(command: flags.Command) -> int:
    if isinstance(command, flags.OfConfig) and not isinstance(command, flags.Doctor | flags.Settings):
        refuse_missing_data(command.config.data.name)  # at once: to import torch and Ray takes seconds
    return _WORK[type(command)](command) or DONE


def _error(text: str) -> None:
    line = " ".join(part for part in map(str.strip, text.splitlines()) if part)
    print(f"raysubset: {visible(without_secrets(line))}", file=sys.stderr, flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
