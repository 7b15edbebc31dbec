"""A study's YAML file: its runs, and the questions that they answer.

```yaml
name: claims                                 # the runs are checkpoints/claims/...
title: What the paper claims
run: pretrain model=tiny data=scenes         # the command of every run
options: {data.steps: 2400}                  # of every run
seeds: 5                                     # 0 to 4, or a list
arms:
  contrast: {label: contrast alone, options: {model.task.weight_itm: 0}}
  all: {label: all four losses}
first:                                       # made once for each seed; the other runs start from its last weights
  label: masked words alone
  options: {data.steps: 600, model.task.weight_itc: 0, model.task.weight_itm: 0, model.task.weight_mim: 0}
grid:                                        # which arms on what
- {arms: [contrast, all]}
- {arms: [contrast, all], fraction: 0.25}    # of the training images
- {arms: [contrast], flops_of: all}          # as many steps as cost the operations of `all`
metrics:
  R@1: {mean: [retrieval/tr_r1, retrieval/ir_r1]}
  words: {mean: [mlm/nats_no_image], minus: [mlm/nats]}
questions:
- claim: All four losses beat contrast alone.
  better: all
  than: [contrast, contrast@flops-of-all]
  metric: R@1
```

A `cell` is an arm on a part of the data with a number of steps: `all`, `all@0.25`, `contrast@flops-of-all`. It is run
once per seed.
"""

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from maskvlm.config.given_options import fill_environment, read_config_file
from maskvlm.config.plain_schema import AnyOf, Entries, Flag, Listed, OneOf, Real, Record, Text, Tree, Whole, maybe
from maskvlm.config.safe_yaml import cut, read_yaml
from maskvlm.utils.errors import ExitCode, UserError

COMMANDS = ("pretrain", "finetune")
"""Commands that a run of a study may use."""
NOT_IN_FILES = ("allow-import", "debug", "folder", "run", "print_config")
"""Options that only the person who starts a study may give."""
STOPS_EARLY = ("trainer.max_time", "trainer.fast_dev_run", "trainer.limit_train_batches", "trainer.overfit_batches")
"""Options that end a run before its last step."""
KEY = r"[A-Za-z_]\w*(\.\w+)*\+?"
"""Pattern of an option in a file: a dotted key, optionally with the + that appends to a list."""
NAME = Text(60, r"[a-z0-9]+([._+-][a-z0-9]+)*")
CELL = Text(200, r"[a-z0-9._+-]+(@[a-z0-9._+-]+)*")
SENTENCE = Text(500)
SEEDS = AnyOf((Whole(1, 1000), Listed(Whole(0, 2**32 - 1), 1000, 1)))
OPTIONS = maybe(Entries(Tree()))
PART = Tree(lines=True)
"""A part that is read with a schema of its own."""
METRIC_NAMES = Listed(Text(100), 20, 1)
SCHEMA = Record(
    {
        "name": NAME, "run": Text(1000), "arms": Entries(maybe(PART)), "metrics": Entries(PART),
        "questions": Listed(PART, 200, 0),
    },
    {
        "title": SENTENCE, "about": Text(5000, lines=True), "options": OPTIONS, "seeds": SEEDS,
        "grid": Listed(PART, 200, 1), "columns": Listed(SENTENCE, 50), "first": PART,
    },
    ExitCode.USAGE,
)  # fmt: skip
ARM = Record({}, {"label": SENTENCE, "options": OPTIONS, "run": Text(1000)}, ExitCode.USAGE)
FIRST_RUN = Record({"label": SENTENCE, "options": Entries(Tree())}, {}, ExitCode.USAGE)
BLOCK = Record(
    {"arms": Listed(NAME, 200, 1)},
    {"fraction": Real(0, 1), "flops_of": NAME, "options": OPTIONS, "seeds": SEEDS},
    ExitCode.USAGE,
)
GAUSSIAN = "gaussian nats"
METRIC = Record(
    {"mean": METRIC_NAMES},
    {
        "minus": METRIC_NAMES,
        "otherwise": METRIC_NAMES,
        "lower": Flag(),
        "unit": Text(40),
        "as": OneOf(("difference", GAUSSIAN)),
    },
    ExitCode.USAGE,
)
SIDE = AnyOf((CELL, Listed(CELL, 20, 1)))
QUESTION = Record(
    {"claim": SENTENCE, "better": CELL, "than": SIDE, "metric": SENTENCE},
    {"source": SENTENCE, "by": Real(), "more_than": Tree()},
    ExitCode.USAGE,
)
PAIR = Record({"better": CELL, "than": CELL}, {}, ExitCode.USAGE)
TODO = "See docs/studies.md"
FIRST = "first"
"""Name of the cell that all others start from."""


@dataclass(frozen=True)
class Metric:
    """A metric of a study: the mean of some of a run's metrics, minus the mean of others.

    Attributes:
        mean, minus: keys of metrics.json.
        otherwise: keys used in place of `mean` for a run that does not measure it, e.g. contrastive retrieval for a run
            without re-ranking.
        unit: such as "points" or "nats".
        lower: whether lower is better.
        gaussian: `mean` and `minus` are squared errors. The value is by how many nats `mean` predicts a number better
            than `minus`, if errors are Gaussian with known variances: half the logarithm of minus / mean.
    """

    name: str
    mean: tuple[str, ...]
    minus: tuple[str, ...] = ()
    otherwise: tuple[str, ...] = ()
    unit: str = "points"
    lower: bool = False
    gaussian: bool = False

    def of(self, metrics: Mapping[str, float]) -> float:
        """The value of the metric; NaN if the run does not measure it, for example because it lacks the head."""
        mean = self.mean if all(metrics.get(key) is not None for key in self.mean) else self.otherwise
        if not mean or any(metrics.get(key) is None for key in (*mean, *self.minus)):
            return float("nan")
        value = sum(metrics[key] for key in mean) / len(mean)
        other = sum(metrics[key] for key in self.minus) / len(self.minus) if self.minus else 0.0
        if not self.gaussian:
            return value - other
        return 0.5 * math.log(other / value) if value > 0 and other > 0 else float("nan")


@dataclass(frozen=True)
class Cell:
    """What differs between runs, apart from the seed.

    Attributes:
        arm: name of its arm. fraction: fraction of the training images.
        flops_of: the arm whose operations it may spend; "" if the options set the number of steps.
        options: key -> value, from the study, the block and the arm; later ones win.
        seeds: seeds of its runs.
        run: words of the runs' command. written: the same as in the file, before environment variables are filled in:
            another folder on another machine does not make another run.
    """

    arm: str
    fraction: float
    flops_of: str
    options: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]
    run: tuple[str, ...]
    written: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the cell: `all`, `all@0.25`, `contrast@flops-of-all`."""
        part = f"@{self.fraction}" if self.fraction < 1 else ""
        return f"{self.arm}{part}{f'@flops-of-{self.flops_of}' if self.flops_of else ''}"


class Comparison(NamedTuple):
    """Two cells, paired by seed; the claim is that `better` is better."""

    better: str
    than: str


@dataclass(frozen=True)
class Claim:
    """A claim, and the comparisons that decide it.

    Attributes:
        comparisons: all of them must hold.
        more_than: the lead in each comparison must exceed the lead in this one; None: it must exceed `by`.
        by: the minimum difference, in the metric's unit.
        source: where the claim is made.
    """

    claim: str
    comparisons: tuple[Comparison, ...]
    metric: Metric
    more_than: Comparison | None = None
    by: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class Study:
    """A whole study.

    Attributes:
        run: the command of every run, except for arms with their own, before environment variables are filled in; for
            display.
        arms: name -> description, for display.
        columns: names of the metrics that the table shows.
        first: run once per seed before all others, which start from its last weights; None: they start as their command
            says.
        first_options: its options, before environment variables are filled in; for display.
    """

    name: str
    title: str
    about: str
    run: str
    arms: Mapping[str, str]
    cells: tuple[Cell, ...]
    metrics: Mapping[str, Metric]
    columns: tuple[str, ...]
    questions: tuple[Claim, ...]
    first: Cell | None = None
    first_options: tuple[tuple[str, str], ...] = ()

    def cell(self, name: str) -> Cell:
        """The cell with this name. Raises KeyError."""
        return {cell.name: cell for cell in self.cells}[name]

    def label(self, cell: Cell) -> str:
        """Description of a cell, for display."""
        words = [self.arms[cell.arm]]
        words += [f"{100 * cell.fraction:g} % of the images"] if cell.fraction < 1 else []
        words += [f"with the operations of {self.arms[cell.flops_of]}"] if cell.flops_of else []
        return ", ".join(words)


def read_study(file: str, where: str | None = None) -> Study:
    """Read and check a study's file.

    Args:
        where: the machine, overriding where= in the file.

    Raises:
        UserError: it does not exist, or the schema does not allow it; names the key.
    """
    # The checks of configuration files: a small regular file, UTF-8, YAML without tags.
    if read_config_file(file) is None:
        raise UserError(file, "is empty", TODO)
    written = read_yaml(Path(file).read_text("utf-8-sig"), file)
    content = SCHEMA.read(_filled(written, file), file, TODO)
    arms = {name: ARM.read(each or {}, f"{file}: arms.{name}", TODO) for name, each in _mapping(content, "arms", file)}
    for name in arms:
        if not NAME.fits(name):
            raise UserError(f"{file}: arms", f"{name!r} is not a valid folder name", "Use a-z, 0-9 and - . _ +")
    metrics = {
        name: _metric(name, METRIC.read(each, f"{file}: metrics.{name}", TODO))
        for name, each in _mapping(content, "metrics", file)
    }
    runs = {name: _words(arm.get("run", content["run"]), f"{file}: run", where) for name, arm in arms.items()}
    cells = tuple(_cells(content, arms, runs, file))
    as_written = {
        name: _words((written["arms"][name] or {}).get("run", written["run"]), f"{file}: run", where) for name in arms
    }
    cells = tuple(replace(cell, written=as_written[cell.arm]) for cell in cells)
    first, first_options = _first(content, cells, file, where), dict[str, Any]()
    if first is not None:
        first_options = (written.get("options") or {}) | (written["first"].get("options") or {})
        first = replace(first, written=_words(written["run"], f"{file}: run", where))
    questions = tuple(
        _question(each, cells, metrics, f"{file}: question {number}")
        for number, each in enumerate(content["questions"], 1)
    )
    columns = tuple(content.get("columns") or metrics)
    labels = {name: arm.get("label", name) for name, arm in arms.items()}
    labels |= {FIRST: content["first"]["label"]} if first else {}
    for name in columns:
        _known(name, metrics, f"{file}: columns")
    return Study(
        content["name"], content.get("title", content["name"]), content.get("about", ""),
        written["run"], labels, cells, metrics, columns, questions, first,
        tuple((key, as_text(value)) for key, value in first_options.items()),
    )  # fmt: skip


def _filled(value: Any, file: str, path: tuple[str, ...] = ()) -> Any:
    """`value` with environment variables filled in, in commands and options only. Anything else may appear on the page.

    Raises:
        UserError: a variable elsewhere (77), or as `fill_environment`.
    """
    # Below an arm's name, or the number of a block of the grid.
    inner = path[2:] if path[:1] in (("arms",), ("grid",)) else path[1:] if path[:1] == ("first",) else path
    if inner == ("run",) and isinstance(value, str):
        return _filled_command(value, file)
    if inner == ("options",):
        return fill_environment(value, file)
    if isinstance(value, dict):
        return {key: _filled(part, file, (*path, str(key))) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, file, (*path, "")) for part in value]
    if isinstance(value, str) and "${" in value:
        where = ".".join(name for name in path if name)
        what = f"{cut(value)} would appear on the page"
        raise UserError(f"{file}: {cut(where)}", what, "Use the environment only in run and options", ExitCode.REFUSED)
    return value


def _filled_command(run: str, file: str) -> str:
    """A command with variables filled in word by word: a folder's name may have spaces, or an apostrophe."""
    if "${" not in run:
        return run
    try:
        words = shlex.split(run)
    except ValueError:
        return run  # `_words` reports it
    return shlex.join(fill_environment(word, file) for word in words)


def _words(run: str, where: str, machine: str | None) -> tuple[str, ...]:
    """The command of a run, split as in the shell; `machine` overrides its where=."""
    try:
        words = tuple(shlex.split(run))
    except ValueError as error:
        raise UserError(where, f"{error}", "Close the quotation") from None
    if not words or words[0] not in COMMANDS:
        raise UserError(where, f"does not begin with a command of a study ({', '.join(COMMANDS)})", "Begin it with one")
    for word in words:
        key = word.partition("=")[0].lstrip("-")
        if key in NOT_IN_FILES:
            raise _not_for_files(where, word)
        _check_whole(key, where)
    if machine is None:
        return words
    # Words come before options.
    return (words[0], f"where={machine}", *(word for word in words[1:] if not word.startswith("where=")))


def _check_whole(key: str, where: str) -> None:
    """Raises UserError for an option that ends a run before its last step."""
    if key in STOPS_EARLY:
        what = "cannot limit a run of a study: a run that it stops is unfinished, and is resumed every time"
        raise UserError(where, f"{key} {what}", "Give data.steps, or flops_of")


def _not_for_files(where: str, option: str) -> UserError:
    return UserError(where, f"{option} is not allowed in a study's file", "Give it to `maskvlm study`, or leave it out")


def _mapping(content: Mapping[str, Any], key: str, file: str) -> list[tuple[str, Any]]:
    if not isinstance(content[key], dict) or not content[key]:
        raise UserError(f"{file}: {key}", "expected names with values", TODO)
    return list(content[key].items())


def _metric(name: str, content: Mapping[str, Any]) -> Metric:
    gaussian = content.get("as") == GAUSSIAN
    if gaussian and "minus" not in content:
        raise UserError(f"metric {name}", f"as: {GAUSSIAN} compares two errors", "Give minus, the larger one")
    unit, lower = content.get("unit", "points"), content.get("lower", False)
    minus, otherwise = (tuple(content.get(key, ())) for key in ("minus", "otherwise"))
    return Metric(name, tuple(content["mean"]), minus, otherwise, unit, lower, gaussian)


def _first(content: Mapping[str, Any], cells: tuple[Cell, ...], file: str, machine: str | None) -> Cell | None:
    """The run that the others start from, made once for each of their seeds."""
    if "first" not in content:
        return None
    where = f"{file}: first"
    read = FIRST_RUN.read(content["first"], where, TODO)
    words = _words(content["run"], f"{file}: run", machine)
    for cell in cells:
        if cell.arm == FIRST:
            raise UserError(where, "another arm has this name", "Give the arm another name")
        if any(word.startswith("from=") for word in cell.run):
            raise UserError(where, f"{cell.name} has a from= of its own", "Leave out one of the two")
        if cell.run[0] == words[0] == "pretrain" and _model(cell.run) != _model(words):
            what = f"{cell.name} has {_model(cell.run)}, but the run that it starts from {_model(words)}"
            raise UserError(where, what, "Give both the same model")
    options = (content.get("options") or {}) | read["options"]
    _check_keys(options, where)
    seeds = dict.fromkeys(seed for cell in cells for seed in cell.seeds)
    return Cell(FIRST, 1.0, "", tuple((key, as_text(value)) for key, value in options.items()), tuple(seeds), words)


def _model(words: tuple[str, ...]) -> str:
    return next((word for word in words if word.startswith("model=")), "model=tiny")


def _check_keys(options: Mapping[str, Any], where: str) -> None:
    """Raises UserError for an option that a file may not set."""
    for key in options:
        _check_whole(key, where)
        if key in NOT_IN_FILES or not re.fullmatch(KEY, key):
            raise _not_for_files(where, key)


def _cells(
    content: Mapping[str, Any], arms: Mapping[str, Any], runs: Mapping[str, tuple[str, ...]], file: str
) -> Iterator[Cell]:
    """Cells of all blocks of `grid`; without a grid, every arm once."""
    cells: dict[str, Cell] = {}
    for number, each in enumerate(content.get("grid", [{"arms": list(arms)}]), 1):
        where = f"{file}: grid {number}"
        block = BLOCK.read(each, where, TODO)
        for arm in (*block["arms"], *([block["flops_of"]] if "flops_of" in block else [])):
            _known(arm, arms, where)
        if block.get("fraction") == 0:
            raise UserError(where, "a fraction of 0 leaves no training images", "Give a fraction above 0")
        if "flops_of" in block and any(runs[arm][0] != "pretrain" for arm in (*block["arms"], block["flops_of"])):
            raise UserError(where, "flops_of counts the operations of pretrain only", "Give data.steps")
        for arm in block["arms"]:
            options = (content.get("options") or {}) | (block.get("options") or {}) | (arms[arm].get("options") or {})
            _check_keys(options, f"{where}: {arm}")
            cell = Cell(
                arm, float(block.get("fraction", 1.0)), block.get("flops_of", ""),
                tuple((key, as_text(value)) for key, value in options.items()),
                _seeds(block.get("seeds", content.get("seeds", 1))), runs[arm],
            )  # fmt: skip
            if cell.name in cells:
                raise UserError(where, f"{cell.name} appears twice", "Keep one of them")
            cells[cell.name] = cell
            yield cell


def _seeds(content: int | list[int]) -> tuple[int, ...]:
    return tuple(range(content)) if isinstance(content, int) else tuple(dict.fromkeys(content))


def as_text(value: Any) -> str:
    """An option's value in the form that the command line takes."""
    return value if isinstance(value, str) else json.dumps(value)


def _question(content: Any, cells: tuple[Cell, ...], metrics: Mapping[str, Metric], where: str) -> Claim:
    read = QUESTION.read(content, where, TODO)
    names = {cell.name: cell for cell in cells}
    than = [read["than"]] if isinstance(read["than"], str) else read["than"]
    more = PAIR.read(read["more_than"], f"{where}: more_than", TODO) if "more_than" in read else None
    for name in (read["better"], *than, *(more.values() if more else ())):
        _known(name, names, where)
    _known(read["metric"], metrics, where)
    if read["better"] in than:
        raise UserError(where, f"{read['better']} is compared with itself", "Name another cell")
    others = [*than, *(more.values() if more else ())]
    for name in others:
        if not set(names[read["better"]].seeds) & set(names[name].seeds):
            what = f"{read['better']} and {name} have no seed in common"
            raise UserError(where, what, "Give them the same seeds: differences are paired by seed")
    return Claim(
        read["claim"], tuple(Comparison(read["better"], name) for name in than), metrics[read["metric"]],
        Comparison(**more) if more else None, float(read.get("by", 0.0)), read.get("source", ""),
    )  # fmt: skip


def _known(name: str, names: Mapping[str, Any], where: str) -> None:
    if name not in names:
        raise UserError(where, f"there is no {name}", f"Available: {', '.join(names)}")
