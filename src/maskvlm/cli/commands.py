"""The registry of commands, used by dispatch, `maskvlm --help`, `maskvlm COMMAND --help`, docs/commands.md and shell
completion. Nothing here imports torch."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from maskvlm.config import compose
from maskvlm.config.bundled_models import DEFAULT
from maskvlm.config.compose import (
    PRETRAINING,
    SPLITS,
    TRAINING,
    CommandWords,
    Composed,
    choices,
    prepared,
    read_words,
    tasks,
)
from maskvlm.config.given_options import config_files

LEARN, DATA, ASK, SEARCH, KEEP = "Train and evaluate", "Data", "Use a model", "Search images", "Checkpoints"
LIGHTNING, SHELL = "Lightning's own commands, with -c FILE.yaml", "Shell"


class Command(NamedTuple):
    """One command.

    Attributes:
        name, group, description: as `maskvlm --help` shows them.
        target: `module:function`, which takes the arguments and the packages that class paths may come from, and
            returns the exit status or a line that says what was done. "": `compose` names another command.
        words: names of its `name=value` words.
        places: its positional words.
        compose: turns these words into files and options.
        named: whether the target is passed the command's name, too.
    """

    name: str
    group: str
    description: str
    target: str = ""
    words: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    compose: Callable[[CommandWords], Composed] | None = None
    named: bool = False

    @property
    def usage(self) -> str:
        """Usage line: `maskvlm evaluate [TASK] [model=..] ...`."""
        words = " ".join([*self.places, *(f"[{name}=..]" for name in self.words)])
        return f"maskvlm {self.name} {words}".rstrip()

    def full(self, arguments: Sequence[str]) -> list[str]:
        """The command with its words expanded to files and options. With a whole stack of files nothing is expanded."""
        if self.compose is None or (self.target and self._is_whole(arguments)):
            return [self.name, *arguments]
        return self.compose(read_words(self.name, arguments, self.words, len(self.places)))

    def _is_whole(self, arguments: Sequence[str]) -> bool:
        """Whether the arguments hold a whole stack, which begins with conf/base.yaml. Other files come on top of the
        stack that the words stand for."""
        options = {word.partition("=")[0] for word in arguments}
        stack = any(Path(file).name == "base.yaml" for file in config_files(list(arguments)))
        # `--vectors` needs no data, and so no stack.
        return stack or bool(options & {"-h", "--help", "--vectors"})

    @property
    def has_own_options(self) -> bool:
        """Whether its target has its own help; the others take the keys of `fit`."""
        return bool(self.target) and self.name not in ("submit", "preview", "bench")

    def run(self, arguments: list[str], allowed: list[str]) -> int | str:
        """Import the target and call it."""
        # Imported here so that help and mistakes do not import torch.
        module, _, function = self.target.partition(":")
        target: Callable[[list[str], list[str]], int | str] = getattr(importlib.import_module(module), function)
        return target([self.name, *arguments] if self.named else arguments, allowed)


def _method(name: str, description: str) -> Command:
    return Command(name, ASK, description, "maskvlm.cli.ask:main", named=True)


def _lightning(name: str, description: str) -> Command:
    return Command(name, LIGHTNING, description, "maskvlm.cli.lightning:main", named=True)


LOOK = ("model", "data", "where")
REGISTRY = (
    Command("pretrain", LEARN, "pre-train on image-text pairs", words=PRETRAINING, compose=compose.pretrain_command),
    Command(
        "finetune", LEARN, "fine-tune on a downstream task",
        words=TRAINING, places=("TASK",), compose=compose.finetune_command,
    ),
    Command(
        "evaluate", LEARN, "evaluate a checkpoint on a task, or by pre-training's own metrics",
        words=(*TRAINING, "split"), places=("[TASK]",), compose=compose.evaluate_command,
    ),
    Command(
        "config", LEARN, "print the composed configuration of pretrain or finetune",
        words=PRETRAINING, places=("[TASK]",), compose=compose.config_command,
    ),
    Command(
        "submit", LEARN, "run pretrain or finetune as a SLURM job: write the script and submit it",
        "maskvlm.cli.slurm:submit", PRETRAINING, ("[TASK]",), compose.submit_command,
    ),
    Command(
        "bench", LEARN, "time a few training steps", "maskvlm.cli.bench:bench",
        ("model", "recipe", "data", "where", "from", "encoders"), compose=compose.bench_command,
    ),
    Command(
        "doctor", LEARN, "check machine, weights and data before a run; predict memory, speed and hours",
        "maskvlm.cli.doctor:main", PRETRAINING, compose=compose.doctor_command,
    ),
    Command(
        "study", LEARN, "make the runs of a study and compare them: means, intervals, verdicts",
        "maskvlm.cli.study:main",
    ),
    Command(
        "data", DATA, "prepare a data set from its original files, once", "maskvlm.data.prepare.command:main",
        ("raw", "name"), ("SET", "[RAW]"), compose.data_command,
    ),
    Command(
        "data-check", DATA, "verify a prepared data set", "maskvlm.data.prepare.command:verify_set",
        ("name",), ("SET",), compose.data_check_command,
    ),
    Command(
        "preview", DATA, "write a contact sheet of a data set", "maskvlm.cli.preview:preview", LOOK,
        compose=compose.preview_command,
    ),
    Command("scene", DATA, "write a drawn scene to try a model on, and print its captions", "maskvlm.cli.scene:scene"),
    _method("fill", "fill in masked words from the image"),
    _method("match", "probability that image and text match"),
    _method("rank", "order texts for an image, or images for a text"),
    _method("caption", "write a caption for an image"),
    _method("score", "pseudo-log-likelihood of texts given an image"),
    _method("explain", "show where the model looks for a word"),
    _method("reconstruct", "paint masked patches from the text"),
    _method("inpaint", "paint masked patches in rounds, the most certain first"),
    Command("suite", ASK, "evaluate a model on a published suite", "maskvlm.cli.suite:main"),
    Command("demo", ASK, "serve a web page to try models in, on this machine only", "maskvlm.demo.serve:main"),
    Command(
        "embed", SEARCH, "write the embeddings of a data set as Parquet", "maskvlm.cli.embed:main",
        (*LOOK, "from", "split"), compose=compose.embed_command,
    ),
    Command(
        "index", SEARCH, "build a search index of a data set's images", "maskvlm.cli.search:make",
        (*LOOK, "from", "split"), compose=compose.index_command,
    ),
    Command("search", SEARCH, "find images by a text or an image", "maskvlm.cli.search:main"),
    Command("convert", KEEP, "convert a checkpoint to a Hugging Face folder, or back", "maskvlm.cli.convert:convert"),
    Command(
        "publish", KEEP, "upload a model and its card to the hub, in half precision",
        "maskvlm.cli.publish:main", ("from", "to"), compose=compose.publish_command,
    ),
    Command(
        "export", KEEP, "export as ONNX or torch.export files, checked against torch",
        "maskvlm.inference.onnx_export:main",
    ),
    _lightning("fit", "train"),
    _lightning("validate", "evaluate --ckpt_path on the validation split"),
    _lightning("test", "evaluate --ckpt_path on the test split"),
    Command("completion", SHELL, "print a completion script for bash or zsh", "maskvlm.cli.completion:main"),
)  # fmt: skip
COMMANDS = {command.name: command for command in REGISTRY}

ELSEWHERE = {
    "predict": "`evaluate` keeps every prediction of a split (predictions.jsonl), `embed` all vectors; methods such as "
    "`caption` answer for images that you name",
}
"""Commands of a plain LightningCLI that are missing here, and what replaces them."""

USAGE = """maskvlm COMMAND [word=value ...] [--key value ...]
{commands}
TASK.TOOL and methods of tasks
  vqa.score, vqa.vocabulary ...  a task's own tool, with its own options
  answer, compare, entail        ask a fine-tuned model: METHOD --from CHECKPOINT IMAGE "TEXT"

Options of every command
  --allow-import NAME   allow config files to name classes of this package (also MASKVLM_ALLOW_IMPORT=a,b)
  --debug               show tracebacks
Options of commands that train or evaluate
  --folder FOLDER       folder of the run: everything is written here (also --run, but not under torchrun)
  --print_config        print the composed configuration and stop

`maskvlm COMMAND --help` shows what a command takes; `maskvlm config` prints every key with its value;
`maskvlm fit --help`, `fit --data.help` and `fit --model.task.help MaskedPretraining` explain them."""


def overview() -> str:
    """The overview of `maskvlm --help`: all commands by group."""
    lines = []
    for group in dict.fromkeys(command.group for command in REGISTRY):
        lines += ["", group]
        lines += [f"  {command.name:<12} {command.description}" for command in REGISTRY if command.group == group]
    return USAGE.format(commands="\n".join(lines))


WORDS: dict[str, tuple[str, Callable[[], Sequence[str]], str]] = {
    "model": (
        "size, encoders and recipe; with from= only the recipe, as the model is the checkpoint's",
        lambda: choices("model"),
        "tiny",
    ),
    "recipe": ("another training recipe", lambda: choices("recipe"), "the model's own"),
    "data": ("the data set", lambda: [*choices("data"), *prepared()], "scenes"),
    "where": ("the machine", lambda: choices("where"), "auto"),
    "run": ("folder of the run under checkpoints/", list, "named after the command and the time"),
    "from": ("checkpoint file, Hugging Face folder or hub name to start from", list, ""),
    "to": ("name on the hub: owner/name", list, ""),
    "encoders": ("folder of pretrained encoders, to work without a connection; not with from=", list, ""),
    "split": ("split to evaluate", lambda: SPLITS, "val"),
    "raw": ("folder or file of the set as distributed; for hf: name on the hub", list, ""),
    "name": ("name of the prepared set", list, "as the set"),
}
"""Word -> its description, its possible values (empty: any), and its default."""


def word_help(command: Command, name: str) -> tuple[str, Sequence[str], str]:
    """Description, possible values and default of a word, as this command takes it."""
    description, among, default = WORDS[name]
    values: Sequence[str] = among()
    if command.places == ("TASK",):
        description = {
            "model": "with from=random: the model that gets random weights",
            "from": f"{description}; random: random weights, as a control",
        }.get(name, description)
        default = DEFAULT if name == "from" else default
        # The data sets of pre-training do not fit a task.
        values = () if name == "data" else values
    elif "[TASK]" in command.places:
        description += {
            "model": "; with a task only for from=random",
            "from": "; with a task also random",
            "encoders": " or a task",
        }.get(name, "")
    elif command.name in ("embed", "index"):
        description = {"model": "whose recipe sets up the data", "split": "split to read"}.get(name, description)
        description = description.removesuffix(" to start from")
        values = ("train", *SPLITS, "all") if name == "split" else values
    if name == "encoders" and command.name in ("finetune", "evaluate"):
        description = "has no effect here and is rejected: the encoders are the checkpoint's"
    if name == "from" and command.name in ("evaluate", "embed", "index"):
        default = DEFAULT
    if name == "data" and values:
        description += ", also one that `maskvlm data` has prepared"
    return description, values, default


KEYS = (
    "`maskvlm config` prints every key with its value; `maskvlm fit --help`, `fit --data.help` and\n"
    "`fit --model.task.help MaskedPretraining` explain them. Keys override files, -c FILE.yaml the composed ones."
)


def help_of(command: Command, places: Sequence[str] = ()) -> str:
    """Help of a command, with the available choices.

    Args:
        places: positional words given along with --help: a task has its own data sets.
    """
    lines = [f"{command.usage} [--key value ...]", f"  {command.description}", ""]
    if any("TASK" in place for place in command.places):
        lines.append(f"  TASK      {' '.join(tasks())}, or package.task of an installed package")
    own_sets = [task for task in tasks() if any("TASK" in place for place in command.places)]
    for name in command.words:
        description, values, otherwise = word_help(command, name)
        can_be = f": {' '.join(values)}" if values else ""
        lines.append(f"  {name + '=':<9} {description}{can_be}{f' (default: {otherwise})' if otherwise else ''}")
        if name == "data":
            named_tasks = [task for task in own_sets if task in places] or own_sets
            lines += [f"            of {task}: {' '.join(compose.sets_of(task))}" for task in named_tasks]
    keys = [] if command.has_own_options and command.name != "index" else ["", KEYS]
    return "\n".join([*lines, *keys])
