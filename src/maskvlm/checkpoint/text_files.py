"""The files of a Hugging Face encoder, in a folder, the cache or on the hub: configuration, weights, tokenizer.

They are untrusted. Only the shape is read from the configuration, and nothing that could name code, a file or a model.
The weights are read by `weights.py`, the tokenizer by `tokenizers`; transformers gets tensors and a clean
configuration.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from maskvlm.checkpoint import tokenizer_files
from maskvlm.checkpoint.hub_client import Unreachable, from_cache_or_hub
from maskvlm.checkpoint.integrity import first_line
from maskvlm.checkpoint.model_spec import NOT_READ, Bounds, check_text_config
from maskvlm.checkpoint.weights import State, read_state, weight_bytes
from maskvlm.config.plain_schema import Tree, describe_value
from maskvlm.data.files import load_json
from maskvlm.utils.errors import ExitCode, UserError

WHERE = "model.backbone.text"
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta-base": ("roberta", _ROBERTA),
    "roberta-large": ("roberta", _ROBERTA | _LARGE),
    "distilroberta-base": ("roberta", _ROBERTA | {"num_hidden_layers": 6}),
    "bert-base-uncased": ("bert", {}),
    "bert-large-uncased": ("bert", _LARGE),
}
"""Shapes of well-known models, so that random initialisation, and the error for missing weights, need no hub."""
PUBLISHERS = ("", "FacebookAI", "google-bert", "distilbert")
"""Their owners on the hub: another owner's model of the same name may have another shape."""
ANY_SIZE = Bounds(2**24, 4096)
CONFIG = "config.json"
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
PICKLED = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
"""Name patterns of pickled weights; SAFETENSORS are preferred."""


# ---------------------------------------------------------------------- configuration


def read_text_config(name: str, random_init: bool, settings: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a folder, a well-known or hub model or, with random_init, a model type.

    Raises:
        UserError: no such model (66); its configuration is damaged or has no known type (65), cannot be read (74),
            needs program code of its own, is a link out of its folder or asks for more than its weights hold (77); it
            is not a masked language model, a setting is unknown, or settings contradict each other (2); a setting has
            a value that a checkpoint could not hold (77).
    """
    # From local to remote: a type, a folder, a well-known shape, the hub.
    if random_init and is_type(name):
        config = for_type(name, settings, WHERE)
    elif is_folder(name):
        config = config_of(Path(name), name, settings)
        if not random_init:
            check_memory(config, Path(name))
    elif (parts := name.rpartition("/"))[0] in PUBLISHERS and parts[2] in KNOWN:
        kind, known = KNOWN[parts[2]]
        config = for_type(kind, known | settings, WHERE)
    else:
        todo = "Name a folder, or a model type such as bert with its settings in config"
        folder = _fetched(name, [(CONFIG,)], "configuration", f"{WHERE}.name", todo if random_init else None)
        config = config_of(folder, name, settings)
    _check_config(name, config, settings)
    return config


def config_of(folder: Path, name: str, settings: dict[str, Any]) -> PreTrainedConfig:
    """The configuration in a folder's `config.json`, with `settings` overriding its own.

    Numbers of settings that this version does not know are kept, since they may determine the shape in a configuration
    of another version; strings and mappings are not.

    Raises:
        UserError: there is no such file, or no shape can be read from it (65); it cannot be read (74); the model needs
            program code of its own, or the file is a link out of its folder (77).
    """
    file = folder / CONFIG
    if not file.is_file():
        todo = "Name a folder with config.json, weights and tokenizer, as save_pretrained writes it"
        raise UserError(name, f"its configuration cannot be read (there is no {CONFIG})", todo, ExitCode.BAD_DATA)
    # Read as plain data: nothing that it names is looked up.
    content = load_json(tokenizer_files.file_text(file).encode(), file)
    kind = content.get("model_type") if isinstance(content, dict) and Tree().fits(content) else None
    if not isinstance(kind, str) or not is_type(kind):
        if isinstance(content, dict) and "auto_map" in content:
            what = "its configuration comes with program code of its own"
            raise UserError(name, what, "Choose a model that needs none", ExitCode.REFUSED)
        what = f"its configuration cannot be read ({describe_value(kind)} is not a known model type)"
        raise UserError(name, what, "Fix it, or name another one", ExitCode.BAD_DATA)
    # The type's own settings are checked in full; only numbers are taken from all others.
    known = CONFIG_MAPPING[kind]().to_dict().keys() - NOT_READ
    known_settings = {key: content[key] for key in content.keys() & known}
    # Other kinds of models are rejected by `_check_config`, which names them.
    if kind_is_read(kind):
        try:
            check_text_config(kind, known_settings, str(file), ANY_SIZE)
        except UserError as error:
            raise UserError(error.where, error.what, "Fix it, or name another one", ExitCode.BAD_DATA) from error
    others = {
        k: v for k, v in content.items() if type(v) in (bool, int, float) and k not in known and k not in NOT_READ
    }
    # Settings become keyword arguments of the library's class.
    plain = {key: value for key, value in others.items() if key.isidentifier() and not key.startswith("_")}
    plain.pop("trust_remote_code", None)
    return for_type(kind, plain | known_settings | settings, name)


def for_type(kind: str, settings: dict[str, Any], where: str) -> PreTrainedConfig:
    """The configuration of a model type. Raises UserError for settings that the library rejects (65)."""
    try:
        return AutoConfig.for_model(kind, **settings)
    except Exception as error:  # each model raises its own type
        what = f"its configuration cannot be read ({first_line(error)})"
        raise UserError(where, what, "Fix it, or name another one", ExitCode.BAD_DATA) from error


def check_memory(config: PreTrainedConfig, folder: Path) -> None:
    """Check that a folder's model has at most 10 million parameters more than its weight files have bytes. A folder
    without weight files passes.

    Raises:
        UserError: it has more (77): it would not fit its weights, and might not fit in memory; its settings contradict
            each other (2).
    """
    there = weight_bytes(folder)
    try:
        # Shapes only, without memory.
        with torch.device("meta"):
            numbers = sum(value.numel() for value in AutoModel.from_config(config).parameters())
    except Exception as error:  # contradictory settings: each model raises its own type
        raise UserError(f"{WHERE}.config", first_line(error), "Fix the settings") from error
    # A parameter takes at least one byte.
    if there and numbers > there + 10_000_000:
        what = f"its configuration asks for {numbers:,} numbers, its weights are {there:,} bytes"
        raise UserError(folder / CONFIG, what, "Get the folder again", ExitCode.REFUSED)


def is_type(name: str) -> bool:
    """Whether a name is a model type (`bert`), which has no weights of its own."""
    return name in CONFIG_MAPPING


def kind_is_read(kind: str) -> bool:
    """Whether a model type has a masked language model."""
    return CONFIG_MAPPING[kind] in MODEL_FOR_MASKED_LM_MAPPING


def is_folder(name: str) -> bool:
    """Whether a name is a folder. Raises UserError (66) for a path that does not exist or is a file: the hub is not
    asked for it."""
    if Path(name).is_dir():
        return True
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        what = "is a file" if Path(name).exists() else "no such folder"
        todo = "Name a folder with config.json, weights and tokenizer, as save_pretrained writes it"
        raise UserError(name, what, todo, ExitCode.MISSING_INPUT)
    return False


def _check_config(name: str, config: PreTrainedConfig, settings: dict[str, Any]) -> None:
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or config.is_encoder_decoder:
        what = f"{name} (type {config.model_type}) is not an encoder trained as a masked language model"
        raise UserError(f"{WHERE}.name", what, "Choose one such as roberta-base")
    fresh = type(config)()
    for key in settings:
        if not hasattr(fresh, key):
            near = difflib.get_close_matches(key, fresh.to_dict(), 1)
            todo = f"Did you mean {near[0]}?" if near else f"Use those of {type(config).__name__}"
            what = f"{config.model_type} has no such setting"
            raise UserError(f"{WHERE}.config.{key}", what, todo.rstrip("."))
    check_text_config(config.model_type, settings, WHERE, ANY_SIZE, "Set its shape: a checkpoint holds nothing else")


# ---------------------------------------------------------------------- tokenizer and weights


def read_text_tokenizer(name: str, todo: str | None = None) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a folder (None if it has none) or of a hub model; `todo` as in `_fetched`.

    Raises:
        UserError: no such folder or model (66); no vocabulary, or a file is damaged (65), cannot be read (74) or is a
            link out of its folder (77).
    """
    if is_folder(name):
        return tokenizer_files.read_tokenizer(Path(name))
    folder = _fetched(name, [tokenizer_files.FILES], "tokenizer", f"{WHERE}.tokenizer", todo)
    tokenizer = tokenizer_files.read_tokenizer(folder)
    if tokenizer is None:
        what = f"{name} holds no vocabulary"
        raise UserError(f"{WHERE}.tokenizer", what, "Choose another one", ExitCode.BAD_DATA)
    return tokenizer


def read_text_state(name: str, config: PreTrainedConfig) -> State:
    """The weights of a folder or hub model, under their names in `hf_text.build_text_encoder(config)`.

    Heads and pooling layers are left out. Tensors that the model lacks, or that have another shape there, are returned
    without values, so that loading the state shows that they do not fit.

    Raises:
        Unreachable: they are not on this machine, and the hub cannot be reached (66).
        UserError: as `read_state`, or the library cannot use them (65).
    """
    folder = Path(name) if is_folder(name) else _fetched(name, [SAFETENSORS, PICKLED], "weights")
    stored = read_state(folder)
    try:
        with quiet():
            # The library renames keys of its earlier versions. It gets tensors but no path: nothing is downloaded.
            kind: Any = MODEL_MAPPING[type(config)]
            model, info = kind.from_pretrained(
                None, config=config, state_dict=dict(stored.tensors), output_loading_info=True,
                ignore_mismatched_sizes=True, dtype=torch.float32,
            )  # fmt: skip
    except Exception as error:  # each model of the library raises its own type
        what = f"its weights cannot be read ({first_line(error)})"
        raise UserError(name, what, "Fix it, or name another one", ExitCode.BAD_DATA) from error
    # The model's own initial values must not be taken for the file's.
    state = dict(model.state_dict())
    for key in info["missing_keys"]:
        state.pop(key, None)
    parts = {key.partition(".")[0] for key in state}
    for key in info["unexpected_keys"]:
        key = key.removeprefix(f"{model.base_model_prefix}.")
        # Keep keys of a part that the model has; heads, which it lacks as a whole, are left out.
        if key.partition(".")[0] in parts:
            # On the meta device a tensor has a shape but no memory, which is enough for `check_fit`.
            state[key] = torch.empty(0, device="meta")
    for key, theirs, _ in info["mismatched_keys"]:
        state[key] = torch.empty(theirs, device="meta")
    return State({key: value for key, value in state.items() if not key.startswith("pooler.")}, name)


def _fetched(name: str, choices: list[tuple[str, ...]], kind: str, where: str = WHERE, todo: str | None = None) -> Path:
    """The folder of a hub model with the files of one kind, downloaded if necessary.

    Args:
        choices: patterns of their names in order of preference; later ones are for a model without the earlier ones.
        todo: advice for when the hub cannot be reached, if the files are not weights.
    """

    def fetch(local: bool) -> Path:
        for files in choices:
            folder = Path(snapshot_download(name, allow_patterns=list(files), local_files_only=local))
            # The client returns a folder even if no file in it matches. An index without its weights does not count.
            if any(not file.name.endswith(".index.json") for pattern in files for file in folder.glob(pattern)):
                return folder
        raise FileNotFoundError(f"{name} holds none of {', '.join(each for files in choices for each in files)}")

    try:
        return from_cache_or_hub(f"{name} (Hugging Face)", fetch)
    except Unreachable as error:
        if todo is None:
            raise
        what = f"the {kind} of {name} is not on this machine, and the hub cannot be reached"
        raise UserError(where, what, todo, ExitCode.MISSING_INPUT) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Context without the library's progress bar and reports: ours are stricter, and these files are small."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
