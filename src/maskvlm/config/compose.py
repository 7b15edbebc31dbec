"""Turns the words of a command, `model=base data=coco run=first`, into a stack of YAML files and options.

Later files override earlier ones, and the options after the words override all files:

    base < model/MODEL < pretrain | finetune < pretrain-MODEL | recipe/RECIPE < data/DATA | tasks/TASK/DATA
         < where/WHERE < continue < continue-MODEL < options

`continue` and `continue-MODEL` are only for pre-training from a checkpoint. With a checkpoint there is no model/MODEL;
in fine-tuning with from=random it comes before base.

Nothing here imports torch: a wrong word is rejected before seconds of imports.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from maskvlm.config.bundled_models import default_model
from maskvlm.config.given_options import nearest
from maskvlm.utils.errors import ExitCode, UserError

PACKAGED = "_home"
"""Folder of the installed package with the conf/ and tasks/ that a clone has at its top level."""
IMAGE_WEIGHTS, TOKENIZERS = (".safetensors", ".bin", ".pth"), ("tokenizer.json", "vocab.txt", "vocab.json")
SPLITS = ("val", "test")
TABLES = {"csv": (".csv", ".tsv", ".tab"), "jsonl": (".jsonl", ".ndjson", ".json")}
"""File extensions of users' own tables, by kind."""
RUN_NAME = "MASKVLM_RUN_NAME"
"""Environment variable that tells the processes started by a run the name of its folder."""


def own_home() -> Path:
    """The project's own folder with conf/ and tasks/: the clone that contains this package, or the package."""
    package = Path(__file__).resolve().parents[1]
    # src/maskvlm -> the clone; a wheel has its own copy of conf/ and tasks/
    return package.parents[1] if _has_both(package.parents[1]) else package / PACKAGED


def home() -> Path:
    """The folder whose conf/ and tasks/ a training or data command uses: the working directory, or `own_home`."""
    # both `base.yaml` and tasks/: a folder that only happens to have a conf/ does not count
    return Path() if _has_both(Path()) else own_home()


def _has_both(folder: Path) -> bool:
    return (folder / "conf" / "base.yaml").is_file() and (folder / "tasks").is_dir()


def find_tasks(here: bool = False) -> None:
    """Let `import tasks` find this project's plug-ins, in this process only.

    Args:
        here: prefer those of the working directory. Leave it False when using someone else's model or file: the folder
            it came in may be untrusted too, and its code would run.
    """
    folder = str((home() if here else own_home()).resolve())
    if folder not in sys.path:
        # first: an installed package named `tasks` must not win
        sys.path.insert(0, folder)


def find_packages(names: Iterable[str]) -> None:
    """Append the working directory to Python's path if it holds a package that the command itself names.

    Args:
        names: names of packages, modules or classes.
    """
    here = Path.cwd()
    roots = {name.partition(".")[0] for name in names} - {""}
    named = any((here / root).is_dir() or (here / f"{root}.py").is_file() for root in roots)
    if named and not {"", str(here)} & {*sys.path}:
        # last: a file in the working directory must not shadow an installed package
        sys.path.append(str(here))


class CommandWords(NamedTuple):
    """The words of a command before its options, and the options.

    Attributes:
        places: words without a name, such as a task.
        values: values by name.
        options: everything from the first word that begins with a dash, except `--from X` and `--from=X`, which are
            stored as `from=X`.
    """

    places: list[str]
    values: dict[str, str]
    options: list[str]

    def get(self, name: str, default: str = "") -> str:
        """The value of a word; `default` if it is not given."""
        return self.values.get(name, default)


def read_words(command: str, arguments: Sequence[str], names: Sequence[str], places: int = 0) -> CommandWords:
    """Parse a command's words.

    Args:
        names: names that the command knows.
        places: maximum number of words without a name.

    Raises:
        UserError: a name is unknown or given twice, or there are too many words without a name (2).
    """
    # words end where the options begin
    first = next((at for at, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    before, options = list(arguments[:first]), list(arguments[first:])
    # `--from X` and `--from=X` mean the stack of `from=X`, which has no model/ file
    if "from" in names:
        before += [f"from={word.removeprefix('--from=')}" for word in options if word.startswith("--from=")]
        options = [word for word in options if not word.startswith("--from=")]
        if "--from" in options[:-1]:  # as the last word it has no value
            at = options.index("--from")
            before.append(f"from={options[at + 1]}")
            del options[at : at + 2]
    words = CommandWords([], {}, options)
    for word in before:
        name, equals, value = word.partition("=")
        if not equals and len(words.places) < places:
            words.places.append(word)
        elif not equals or name not in names:
            # of `make finetune TASK=vqa` and `make data SET=coco`
            if equals and value and places and name.lower() in ("task", "set"):
                what = f"{name}= is a variable of make; a command's first word goes without a name"
                raise UserError(f"{command}: {word}", what, f"Write maskvlm {command} {value}")
            known = " ".join(f"{each}=" for each in names)
            raise UserError(f"{command}: {word}", "no such word", f"Available: {known}; options begin with --")
        elif name in words.values:
            raise UserError(f"{command}: {word}", f"{name} is given twice", "Keep one of them")
        else:
            words.values[name] = value
    return words


# ---------------------------------------------------------------------- names of files


def choices(kind: str) -> list[str]:
    """Names of the YAML files in conf/KIND."""
    return sorted(path.stem for path in (home() / "conf" / kind).glob("*.yaml"))


def chosen(kind: str, value: str) -> Path:
    """The file in conf/KIND with this name. Raises UserError, which lists the available names."""
    if value not in choices(kind):
        raise UserError(f"{kind}={value}", f"no such {kind}", f"Available: {', '.join(choices(kind))}")
    return home() / "conf" / kind / f"{value}.yaml"


def data_root() -> Path:
    """The folder of prepared sets: the environment variable DATA_ROOT, which the YAML files use too."""
    return Path(os.environ.get("DATA_ROOT") or "data")


def prepared() -> list[str]:
    """Names of the prepared sets in `data_root`."""
    return sorted(path.parent.name for path in data_root().glob("*/manifest.json"))


def tasks() -> list[str]:
    """Names of the tasks in `home`."""
    return sorted(path.parent.name for path in (home() / "tasks").glob("*/task.py"))


def files(paths: Sequence[Path]) -> list[str]:
    """The paths as `-c` options."""
    return [word for path in paths for word in ("-c", str(path))]


def there(*names: str) -> list[Path]:
    """The given files in conf/, as far as they exist."""
    return [path for name in names if (path := home() / "conf" / f"{name}.yaml").is_file()]


# ---------------------------------------------------------------------- stacks


def data_files(name: str) -> tuple[list[Path], list[str]]:
    """Files and options of a data set: one in conf/data, or a prepared one, which needs no file of its own."""
    if name in choices("data"):
        return [chosen("data", name)], []
    if name and name in prepared():
        return [chosen("data", "prepared")], ["--data.source.root", str(data_root() / name)]
    raise no_data(name)


def no_data(name: str) -> UserError:
    """The error for a `data=NAME` that cannot be trained on, with what to do about it."""
    where, folder = f"data={name}", data_root() / name
    # only a plain name; os.path accepts any text
    if name and "/" not in name and os.path.isdir(folder / ".making"):
        return UserError(where, "is not finished", "Run the same `maskvlm data` again: it resumes where it stopped")
    if name and "/" not in name and os.path.isfile(folder / "first-look.png"):
        what = f"was only previewed ({folder / 'first-look.png'})"
        return UserError(where, what, "Prepare it: the same `maskvlm data` without --look")
    kind = next((kind for kind, ends in TABLES.items() if name.lower().endswith(ends)), None)
    own = ", ".join(prepared()) or "none"
    todo = f"Available: {', '.join(choices('data'))}; prepared in {data_root()}: {own}"
    if kind:
        return UserError(where, "no such data set", f"Prepare it first: maskvlm data {kind} raw={name} name=NAME")
    near = nearest(name, [*choices("data"), *prepared()], 0.6)
    return UserError(where, "no such data set" + (f" (did you mean {near}?)" if near else ""), todo)


def encoder_options(folder: str) -> list[str]:
    """Options for both encoders in a folder, which has a subfolder for each, the text encoder's with a tokenizer."""
    if not folder:
        return []
    inside = sorted(path for path in Path(folder).glob("*") if path.is_dir())
    text = next((path for path in inside if any((path / name).is_file() for name in TOKENIZERS)), None)
    image = [file for path in inside if path != text for file in sorted(path.iterdir()) if file.suffix in IMAGE_WEIGHTS]
    if text is None or not image:
        what = f"has no folder of image weights (*{', *'.join(IMAGE_WEIGHTS)}) beside one of a text encoder"
        todo = "Name a folder that holds both; the text encoder's has its tokenizer"
        raise UserError(f"encoders={folder}", what, todo, ExitCode.MISSING_INPUT)
    return ["--model.backbone.image.weights", str(image[0]), "--model.backbone.text.name", str(text)]


def refuse_encoders(words: CommandWords) -> None:
    """Raises UserError if `encoders=` is given, which would change nothing: the encoders are those of `from=`."""
    if words.get("encoders"):
        what = "has no effect: the encoders are those of the checkpoint that the run starts from"
        if words.get("from") == "random":
            what = "has no effect: from=random is the model with random weights"
        raise UserError(f"encoders={words.get('encoders')}", what, "Leave it out")


def pretraining(words: CommandWords) -> list[str]:
    """The stack of pre-training. From a checkpoint, the model is the checkpoint's and `model` selects the recipe."""
    model = words.get("model", "tiny")
    data, options = data_files(words.get("data", "scenes"))
    where = chosen("where", words.get("where", "auto"))
    architecture, start = chosen("model", model), words.get("from")
    # A model need not have its own recipe, and another recipe can be named instead.
    named = words.values.get("recipe")
    recipe = there("pretrain") + ([chosen("recipe", named)] if named is not None else there(f"pretrain-{model}"))
    if start:
        refuse_encoders(words)
        # Without model/MODEL: the architecture is the checkpoint's.
        return ["--from", start, *files([*there("base"), *recipe, *data, where]), *continued(words), *options]
    stack = files([*there("base"), architecture, *recipe, *data, where])
    return [*stack, *options, *encoder_options(words.get("encoders"))]


def continued(words: CommandWords) -> list[str]:
    """Additional files for pre-training from a checkpoint; they override `where`."""
    return files(there("continue", f"continue-{words.get('model', 'tiny')}"))


def downstream(task: str, words: CommandWords) -> list[str]:
    """The stack of a task, from a checkpoint; `from=random` is the control, the model with random weights."""
    folder = task_folder(task)
    data, start = words.get("data", "scenes"), words.get("from")
    if not sets_of(task):
        what = f"the task {task} has no data sets: there is no YAML file"
        raise UserError(folder, what, "Write one, such as tasks/vqa/daquar.yaml", ExitCode.MISSING_INPUT)
    chosen_set, options = task_data(task, data)
    file = folder / ("conf.yaml" if chosen_set == "scenes" else f"{chosen_set}.yaml")
    refuse_encoders(words)
    first = ["--from", start]
    if start == "random":
        # without a checkpoint, a file must define the model
        first = ["--model.random_init", "true", *files([chosen("model", words.get("model", "tiny"))])]
    stack = files([*there("base", "finetune"), file, chosen("where", words.get("where", "auto"))])
    # a user who types a package's task trusts the package
    return [*first, *stack, *options, *(["--allow-import", task.partition(".")[0]] if "." in task else [])]


def task_data(task: str, name: str) -> tuple[str, list[str]]:
    """Which data set of a task `name` is, and options: a set that the task has a file for, or, for a task that takes
    any images with captions (it has `prepared.yaml`), a prepared one. Raises UserError if it is neither."""
    known = sets_of(task)
    if name in known:
        return name, []
    own = prepared() if "prepared" in known else []
    if name in own:
        return "prepared", ["--data.source.root", str(data_root() / name)]
    near = nearest(name, [*known, *own], 0.6)
    what = f"no such data set of {task}" + (f" (did you mean {near}?)" if near else "")
    todo = f"Available: {', '.join(known)}" + (f"; prepared in {data_root()}: {', '.join(own)}" if own else "")
    if name in prepared():
        what = f"is a prepared set, but not one of {task}"
    raise UserError(f"data={name}", what, todo)


def sets_of(task: str) -> list[str]:
    """Names of the data sets for which a task has a file. Raises like `task_folder`."""
    # conf.yaml is the task on the built-in scenes; every other file is a data set
    return sorted("scenes" if path.stem == "conf" else path.stem for path in task_folder(task).glob("*.yaml"))


def with_model(words: CommandWords, purpose: str) -> CommandWords:
    """The words, with the bundled model as from= if they name no checkpoint; `purpose` as in `default_model`."""
    return words if words.get("from") else words._replace(values=words.values | {"from": default_model(purpose)})


def task_folder(task: str) -> Path:
    """Folder of a task's YAML files: tasks/TASK, or an installed package (`acme.ocr`), of which only the parent
    packages are imported.

    Raises:
        UserError: there is no such task.
    """
    # one of this project's tasks: its files are found without importing anything
    if task in tasks():
        return home() / "tasks" / task
    if "." in task:
        find_packages([task])
        try:
            # finds the file without running it
            spec = importlib.util.find_spec(task)
        except (ImportError, ValueError):
            spec = None
        # a namespace package has no file
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent
    known = ", ".join(tasks()) or "none yet"
    todo = f"Available: {known}, and package.task of a package that is installed or in this folder (with __init__.py)"
    near = nearest(task, tasks(), 0.6)
    what = "no such task" + (f" (did you mean {near}?)" if near else "")
    raise UserError(f"task {task}", what, todo, ExitCode.MISSING_INPUT if "." in task else ExitCode.USAGE)


# ---------------------------------------------------------------------- runs


def run_options(words: CommandWords, kind: str) -> list[str]:
    """The run's folder under checkpoints/: named by run=, or after the command, its data and the time."""
    name = words.values.get("run")
    # names only, also of `--run=x`
    options = {word.partition("=")[0] for word in words.options}
    if name is not None and options & {"--run", "--folder"}:
        raise UserError(f"run={name}", "the folder is also given as an option", "Keep one of them")
    # torchrun's processes do not share an environment that one of them could set
    if name is None and "TORCHELASTIC_RUN_ID" in os.environ:
        what = "torchrun starts several processes, which need one folder"
        raise UserError("run=", what, "Name it: run=first; it is made under checkpoints/")
    if name is None:
        # processes started by this one inherit it, so that all write to one folder
        when = moment_of_evaluation() if kind.startswith("evaluate-") else moment()
        name = os.environ.setdefault(RUN_NAME, f"{kind}-{when}")
    # the name must be a single folder below checkpoints/
    elif not name or name in (".", "..") or "/" in name or len(name.split()) != 1:
        todo = "Give one word such as run=first; it is made under checkpoints/"
        raise UserError(f"run={name}", "is not a valid folder name", todo)
    return ["--folder", str(Path("checkpoints") / name)]


def same_command(folder: Path) -> str:
    """How to resume the run in this folder: a name generated from the time has to be given explicitly."""
    name = folder.name
    return f"the same command with run={name}" if os.environ.get(RUN_NAME) == name else "the same command"


def moment() -> str:
    """A timestamp shared by all processes of a job; under SLURM the job id, as clock times would differ."""
    # SLURM starts each process separately, so none inherits what another one sets
    return os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S")


def moment_of_evaluation() -> str:
    """Like `moment`, for commands that resume nothing: several evaluations in one job each get their own folder."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_NTASKS", "1") == "1":
        return time.strftime("%Y%m%d-%H%M%S")
    return "-".join(filter(None, (job, os.environ.get("SLURM_STEP_ID"))))


TRAINING = ("model", "data", "where", "run", "from", "encoders")
"""Names of the words that pre-training and fine-tuning share."""
PRETRAINING = ("model", "recipe", *TRAINING[1:])
Composed = list[str]
"""A command with its files and options."""


def pretrain_command(words: CommandWords) -> Composed:
    """`pretrain model=compact data=flickr8k --model.lr 1e-3`."""
    recipe = words.get("recipe")
    kind = f"pretrain-{words.get('data', 'scenes')}-{words.get('model', 'tiny')}{f'-{recipe}' if recipe else ''}"
    return ["fit", *run_options(words, kind), *pretraining(words), *words.options]


def finetune_command(words: CommandWords) -> Composed:
    """`finetune vqa data=daquar from=checkpoints/first/best.ckpt`."""
    if not words.places:
        raise UserError("finetune", "no task was given", f"Give one of {', '.join(tasks())}, such as finetune vqa")
    task, words = words.places[0], with_model(words, "fine-tuned")
    run = run_options(words, f"finetune-{task}{data_of(task, words)}")
    return ["fit", *run, *downstream(task, words), *words.options]


def evaluate_command(words: CommandWords) -> Composed:
    """`evaluate vqa from=... split=test`; without a task, the evaluation of pre-training."""
    task = "".join(words.places)
    # Lightning's names of the two
    command = {"val": "validate", "test": "test"}[split(words)]
    if not task and words.get("from") == "random":
        raise UserError("from=random", "has no training to evaluate", "Name a checkpoint, or also name a task")
    words = with_model(words, "evaluated")
    run = run_options(words, f"evaluate-{task or 'pretraining'}{data_of(task, words)}")
    # Losses, masking and fine-tuning settings are the checkpoint's own: with others it would be evaluated on something
    # it never learned.
    start = words.get("from")
    stack = downstream(task, words) if task else pretraining(words)
    own = [] if start == "random" else ["--settings_from" if task else "--task_from", start]
    # after the files, which may validate on a part of the split; before the options, which override it
    return [command, *run, *stack, *own, "--trainer.limit_val_batches", "1.0", *words.options]


def data_of(task: str, words: CommandWords) -> str:
    """The data's part of a run's folder name. A package's task has its own data, whose name is not typed."""
    data = words.get("data", "" if "." in task else "scenes")
    return f"-{data}" if data else ""


def config_command(words: CommandWords) -> Composed:
    """`config [TASK] ...`: the composed configuration of `pretrain` or `finetune`."""
    return [*pretrain_or_finetune(words), "--print_config"]


def submit_command(words: CommandWords) -> Composed:
    """`submit [TASK] ... where=slurm4x8`: the SLURM batch script for `pretrain` or `finetune`."""
    # without "fit"
    return ["submit", *pretrain_or_finetune(words)[1:]]


def pretrain_or_finetune(words: CommandWords) -> Composed:
    """Compose `finetune` if a task is given, else `pretrain`."""
    if words.places == ["pretrain"]:
        raise UserError("pretrain", "is not a task", "Leave the word out: without a task, pre-training is meant")
    recipe = words.values.get("recipe")
    if words.places and recipe is not None:
        raise UserError(f"recipe={recipe}", "applies to pre-training only; a task has its own", "Leave it out")
    return finetune_command(words) if words.places else pretrain_command(words)


def preview_command(words: CommandWords) -> Composed:
    """`preview data=coco`: a contact sheet."""
    out = f"checkpoints/preview-{words.get('data', 'scenes')}.png"
    return ["preview", "--out", out, *pretraining(words), *words.options]


def bench_command(words: CommandWords) -> Composed:
    """`bench model=base where=gpu1`."""
    return ["bench", *pretraining(words), *words.options]


def doctor_command(words: CommandWords) -> Composed:
    """`doctor model=base data=coco where=gpu8`: the words of `pretrain`."""
    # Without a name the only folder to check is checkpoints/.
    run = run_options(words, "doctor") if "run" in words.values else []
    return ["doctor", *run, *pretraining(words), *words.options]


def index_command(words: CommandWords) -> Composed:
    """`index data=coco from=checkpoints/first/best.ckpt`: a search index of the images of a split."""
    words = with_model(words, "used")
    if any(option.partition("=")[0] == "--split" for option in words.options):
        # The folder is named after the split: a later option would write one split under the name of another.
        raise UserError("index: --split", "is given without dashes", "Write split=train, val, test or all")
    part, data = split(words, ("train", *SPLITS, "all")), words.get("data", "scenes")
    out = f"checkpoints/index-{data}-{part}"
    return ["index", "--from", words.get("from"), "--split", part, "--out", out, *data_alone(words), *words.options]


def embed_command(words: CommandWords) -> Composed:
    """`embed data=coco from=checkpoints/first/best.ckpt split=train`: the vectors of a split."""
    words = with_model(words, "used")
    part, data = split(words, ("train", *SPLITS, "all")), words.get("data", "scenes")
    option_names = {option.partition("=")[0] for option in words.options}
    if "--split" in option_names:
        raise UserError("embed: --split", "is given without dashes", "Write split=train, val, test or all")
    out = [] if "--out" in option_names else ["--out", f"checkpoints/vectors-{data}-{part}"]
    return ["embed", "--from", words.get("from"), "--split", part, *out, *data_alone(words), *words.options]


def publish_command(words: CommandWords) -> Composed:
    """`publish from=checkpoints/first/best.ckpt to=owner/name`."""
    named = [word for name in ("from", "to") if name in words.values for word in (f"--{name}", words.get(name))]
    return ["publish", *named, *words.options]


def data_alone(words: CommandWords) -> list[str]:
    """The stack of pre-training for a command that only uses its data; the checkpoint is an option of that command."""
    return pretraining(words._replace(values={name: each for name, each in words.values.items() if name != "from"}))


def data_command(words: CommandWords) -> Composed:
    """`data flickr8k raw=/where/it/was/downloaded name=mine`."""
    # the second place may be named: raw=
    places = [*words.places, *([words.values["raw"]] if "raw" in words.values else [])]
    if len(places) != 2:
        # a folder here may have the name of a set
        if (
            words.places
            and len(places) == 1
            and (os.path.isfile(places[0]) or ("/" in places[0] and os.path.isdir(places[0])))
        ):
            end = Path(places[0]).suffix.lower()
            table = next((kind for kind, ends in TABLES.items() if end in ends), "SET")
            kind = "folder" if Path(places[0]).is_dir() else table
            raise UserError(
                "data", f"{places[0]} is a path, not a set's name", f"maskvlm data {kind} raw={places[0]} name=NAME"
            )
        if words.places and len(places) == 1:
            place = f"FILE.{places[0]}" if places[0] in TABLES else "FOLDER"
            raise UserError("data", "raw= is missing", f"maskvlm data {places[0]} raw={place}")
        what = "no set was given" if not words.places else f"{len(places) - 1} folders or files were given"
        todo = "Give a set (`maskvlm data --help` lists them) and its path as distributed: data flickr8k raw=FOLDER"
        raise UserError("data", what, todo)
    name = set_name(words, places[0].rpartition(".")[2].lower())  # a third-party reader is named by its class
    out = [] if "--out" in words.options else ["--out", str(data_root() / name)]
    return ["data", *places, *out, *words.options]


def data_check_command(words: CommandWords) -> Composed:
    """`data-check flickr8k`: a set in DATA_ROOT by name, or a folder."""
    # at most one place
    named = words.get("name") or "".join(words.places)
    if not named:
        own = ", ".join(prepared()) or "none"
        raise UserError("data-check", "no set was given", f"Give one of those prepared in {data_root()} ({own})")
    folder = Path(named) if "/" in named else data_root() / set_name(words, named)
    return ["data-check", str(folder), *words.options]


def set_name(words: CommandWords, otherwise: str) -> str:
    """The name of a prepared set: one word, which is a folder in DATA_ROOT."""
    name = words.get("name", otherwise)
    if not name or "/" in name or name in (".", "..") or len(name.split()) != 1:
        own = ", ".join(prepared()) or "none"
        todo = f"Give one word; the set is a folder of that name in DATA_ROOT (prepared in {data_root()}: {own})"
        raise UserError(f"name={name}", "is not a valid name for a set", todo)
    return name


def split(words: CommandWords, among: Sequence[str] = SPLITS) -> str:
    """The split that a command evaluates or indexes."""
    part = words.get("split", "val")
    if part not in among:
        raise UserError(f"split={part}", "no such split", f"Available: {', '.join(among)}")
    return part
