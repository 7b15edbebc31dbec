"""Configuration, tokenizer and weights of a Hugging Face encoder: from a folder, the cache or the hub."""

import difflib
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from maskvlm.errors import ExitCode, UserError
from maskvlm.hub import Unreachable, from_cache_or_hub
from maskvlm.verify import first_line
from maskvlm.weights import State, check_file, find_weights

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
"""Shapes of well-known models, so that a random start, and the error that names weights, need no hub."""
SAFE: dict[str, Any] = {"trust_remote_code": False}
"""Without it the library asks on the terminal whether to run code that comes with a model."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def read_config(name: str, random_init: bool, settings: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a folder, a well-known or hub model, or with random_init of a model type.

    Raises:
        UserError: no such model, a setting it does not have, no masked language model.
    """

    def fetch(local: bool) -> PreTrainedConfig:
        return AutoConfig.from_pretrained(name, local_files_only=local, **SAFE, **settings)

    if random_init and is_type(name):
        config = _guard(WHERE, "configuration", lambda: AutoConfig.for_model(name, **settings))
    elif is_folder(name):
        config = _guard(name, "configuration", lambda: fetch(True))
    elif name.rpartition("/")[2] in KNOWN:
        kind, known = KNOWN[name.rpartition("/")[2]]
        config = _guard(WHERE, "configuration", lambda: AutoConfig.for_model(kind, **(known | settings)))
    else:
        todo = "Name a folder, or a model type such as bert with its settings in config"
        config = _from_hub(name, "configuration", fetch, f"{WHERE}.name", todo if random_init else None)
    _check_config(name, config, settings)
    return config


def is_type(name: str) -> bool:
    """Whether a name is that of a model type (`bert`), which stands for no weights."""
    return name in CONFIG_MAPPING


def is_folder(name: str) -> bool:
    """Whether a name is a folder; a path that leads nowhere is a UserError, not a name to ask the hub for."""
    if Path(name).is_dir():
        return True
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        what = "is a file" if Path(name).exists() else "no such folder"
        todo = "Name a folder with config.json, weights and tokenizer, as save_pretrained writes it"
        raise UserError(name, what, todo, ExitCode.MISSING_INPUT)
    return False


def _check_config(name: str, config: PreTrainedConfig, settings: dict[str, Any]) -> None:
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or config.is_encoder_decoder:
        what = f"{name} (type {config.model_type}) is no encoder trained by masking words"
        raise UserError(f"{WHERE}.name", what, "Choose one such as roberta-base")
    fresh = type(config)()
    for key in settings:
        if not hasattr(fresh, key):
            near = difflib.get_close_matches(key, fresh.to_dict(), 1)
            todo = f"Did you mean {near[0]}?" if near else f"Use those of {type(config).__name__}"
            what = f"{config.model_type} has no such setting"
            raise UserError(f"{WHERE}.config.{key}", what, todo.rstrip("."))


def build(config: PreTrainedConfig, checkpointing: bool = False) -> Any:
    """The bare encoder with random weights, without a pooling layer; attention by SDPA where it can."""
    config.use_cache = False  # for decoders; with checkpointing it warns
    try:
        model = AutoModel.from_config(config)
    except Exception as error:  # settings that contradict each other: each model has its own error
        raise UserError(f"{WHERE}.config", first_line(error), "Mend the settings") from error
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # nothing reads it, and DDP would wait for its gradients
    if checkpointing:  # renamed in transformers 5.24; the old name warns
        name = "activation_checkpointing_enable"
        enable = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def read_tokenizer(name: str, config: PreTrainedConfig, todo: str | None = None) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a folder (None where it has none) or of a hub model; `todo` as in `_from_hub`."""

    def fetch(local: bool) -> Any:
        # A bare pair of vocab.json and merges.txt does not say which kind of tokenizer it is.
        kind = {"config": config} if Path(name).is_dir() else {}
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local, **kind, **SAFE)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # made up where files are missing
            raise FileNotFoundError(f"{name} holds no vocabulary")
        return tokenizer

    if is_folder(name):
        if not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
            return None
        return _guard(name, "tokenizer", lambda: fetch(True))
    return _from_hub(name, "tokenizer", fetch, f"{WHERE}.tokenizer", todo)


def random_tokenizer(name: str, other: str | None, config: PreTrainedConfig) -> PreTrainedTokenizerFast | None:
    """For random weights: the one asked for, or a folder's own; None where one is to be trained."""
    if other is None:
        return None if is_type(name) or not is_folder(name) else read_tokenizer(name, config)
    tokenizer = read_tokenizer(other, config, "Name a folder, or leave it out: one is trained on the captions")
    return tokenizer if tokenizer is not None else _no_tokenizer(other)


def _no_tokenizer(name: str) -> NoReturn:
    todo = f"Name one ({WHERE}.tokenizer FOLDER)"
    raise UserError(name, "holds no tokenizer", todo, ExitCode.MISSING_INPUT)


def pretrained_tokenizer(name: str, other: str | None, config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """The tokenizer that belongs to pretrained weights.

    Args:
        name: of the model.
        other: where the tokenizer is, if not beside the weights.
        config: of the model.

    Raises:
        UserError: there is none, or the weights were trained with another one.
    """
    own = read_tokenizer(name, config) if other is None or is_folder(name) else None
    tokenizer = own if other is None else read_tokenizer(other, config)
    if tokenizer is None:
        _no_tokenizer(other or name)
    if own is not None and own.get_vocab() != tokenizer.get_vocab():
        what = f"the weights in {name} were trained with another vocabulary ({len(own)} entries)"
        todo = "Leave it out: the model brings its own"
        raise UserError(f"{WHERE}.tokenizer", what, todo, ExitCode.BAD_DATA)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig) -> None:
    """Raise UserError unless the model has a row for every entry, and both agree on what padding is."""
    if len(tokenizer) > config.vocab_size:
        what = f"{len(tokenizer)} entries, but the model has rows for {config.vocab_size}"
        raise UserError("tokenizer", what, f"Set {WHERE}.vocab_size, or take the model's own tokenizer")
    if tokenizer.mask_token_id is None:
        raise UserError("tokenizer", "it has no mask token", "Take one of a model trained by masking words")
    # RoBERTa counts positions over what is not padding, and no model learns the row of the padding token.
    if tokenizer.pad_token_id != config.pad_token_id:
        what = f"its padding is token {tokenizer.pad_token_id}, the model's is {config.pad_token_id}"
        raise UserError("tokenizer", what, f"Take the model's own, or set {WHERE}.config.pad_token_id")


def fit_config(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    text_length: int,
    settings: dict[str, Any],
    keep_positions: bool,
) -> None:
    """For random weights: agree with the tokenizer, or with the one to be trained (its padding is token 0).

    What `settings` gives stays. A mere model type gets as many positions as text_length needs; RoBERTa's
    begin after the padding token's id.
    """
    pad = settings.get("pad_token_id", 0 if tokenizer is None else tokenizer.pad_token_id)
    wanted = {"pad_token_id": pad}
    if tokenizer is not None:
        wanted["vocab_size"] = len(tokenizer)
    if not keep_positions:
        wanted["max_position_embeddings"] = text_length + pad + 1
    for key, value in wanted.items():
        if key not in settings and hasattr(config, key):
            setattr(config, key, value)


def check_positions(model: Any, text_length: int) -> None:
    """Raise UserError where the model has position embeddings for fewer than text_length tokens."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if table is None:
        return
    first = 0 if table.padding_idx is None else table.padding_idx + 1
    if text_length > table.num_embeddings - first:
        what = f"{text_length} tokens, but the model has {table.num_embeddings - first} positions"
        raise UserError(f"{WHERE}.text_length", what, f"Set it to {table.num_embeddings - first} or less")


def read_text_state(name: str, config: PreTrainedConfig) -> State:
    """The weights of a folder or hub model under the names they have in `build(config)`.

    Heads and pooling layers are left out. Tensors that the model lacks, or that have another shape there,
    come as empty ones, so that whoever loads the state sees that they do not fit.
    """
    if is_folder(name):
        if not any(Path(name).glob("*.index.json")):  # in several files
            check_file(find_weights(Path(name)))
        model, info = _guard(name, "weights", lambda: _pretrained(name, config, True))
    else:
        model, info = _from_hub(name, "weights", lambda local: _pretrained(name, config, local))
    state = dict(model.state_dict())
    for key in info["missing_keys"]:
        state.pop(key, None)
    parts = {key.partition(".")[0] for key in state}
    for key in info["unexpected_keys"]:
        key = key.removeprefix(f"{model.base_model_prefix}.")
        if key.partition(".")[0] in parts:
            state[key] = torch.empty(0, device="meta")
    for key, theirs, _ in info["mismatched_keys"]:
        state[key] = torch.empty(theirs, device="meta")
    return State({key: value for key, value in state.items() if not key.startswith("pooler.")}, name)


def _pretrained(name: str, config: PreTrainedConfig, local: bool) -> tuple[Any, dict[str, Any]]:
    with quiet():
        model, info = AutoModel.from_pretrained(
            name,
            config=config,
            local_files_only=local,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            **SAFE,
        )
    return model, info


def _from_hub(name: str, kind: str, fetch: Callable[[bool], Any], where: str = WHERE, todo: str | None = None) -> Any:
    """`todo`: what to do where the hub cannot be reached, if it is not about weights."""
    try:
        return _guard(name, kind, lambda: from_cache_or_hub(f"{name} (Hugging Face)", fetch))
    except Unreachable as error:
        if todo is None:
            raise
        what = f"the {kind} of {name} is not on this machine, and the hub cannot be reached"
        raise UserError(where, what, todo, ExitCode.MISSING_INPUT) from error


def _guard(where: str, kind: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        what = f"its {kind} could run code ({first_line(error)})"
        raise UserError(where, what, "Store them with safetensors", ExitCode.REFUSED) from error
    except Exception as error:  # each of the three libraries underneath has its own
        if "trust_remote_code" in str(error):
            what = f"its {kind} comes with program code of its own"
            raise UserError(where, what, "Choose a model that needs none", ExitCode.REFUSED) from error
        what = f"its {kind} cannot be read ({first_line(error)})"
        raise UserError(where, what, "Mend it, or name another one", ExitCode.BAD_DATA) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no report of the library's: ours are stricter, and these files are small."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
