"""Build a bare Hugging Face encoder, and check and fit its tokenizer and positions.

`text_files.py` reads its files.
"""

from typing import Any, NoReturn

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedTokenizerFast

from maskvlm.checkpoint.integrity import first_line
from maskvlm.checkpoint.text_files import WHERE, is_folder, is_type, read_text_tokenizer
from maskvlm.utils.errors import ExitCode, UserError


def build_text_encoder(config: PreTrainedConfig, checkpointing: bool = False) -> Any:
    """The bare encoder with random weights, without a pooling layer; uses SDPA attention if supported."""
    config.use_cache = False  # for decoders; warns with checkpointing
    try:
        model = AutoModel.from_config(config)
    except Exception as error:  # contradictory settings: each model raises its own error
        raise UserError(f"{WHERE}.config", first_line(error), "Fix the settings") from error
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # unused, and DDP would wait for its gradients
    if checkpointing:  # renamed in transformers 5.24; the old name warns
        name = "activation_checkpointing_enable"
        enable = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if config.model_type not in IGNORE_PADDING:
        _try(model)
    return model


def _try(model: Any) -> None:
    """Raise UserError for a model that cannot encode text alone: some need more inputs, such as boxes, or the layer
    after the encoder that is left out here. Checked now rather than in the first step."""
    device = next(model.parameters()).device
    # A model without memory, for comparison with a checkpoint, whose model was checked when it was trained.
    if device.type == "meta":
        return
    token_BT = torch.zeros(1, 3, dtype=torch.long, device=device)
    try:
        # Dropout draws random numbers here, which must not affect later draws.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(input_ids=token_BT, attention_mask=torch.ones_like(token_BT)).last_hidden_state.shape  # noqa: B018
    except Exception as error:  # each model raises its own error
        what = f"{model.config.model_type} cannot encode text alone ({first_line(error)})"
        raise UserError(f"{WHERE}.name", what, "Choose another encoder, such as bert or roberta") from error


# Tests check that these give the same features with a finished mask as with a padding mask.
FINISHED_MASK = frozenset({"bert", "roberta", "xlm-roberta", "distilbert", "electra"})
# A test checks that their features do not depend on padding; those of ConvBERT and others do, with any mask.
IGNORE_PADDING = FINISHED_MASK | {"mpnet", "roformer"}


def takes_finished_mask(model: Any) -> bool:
    """Whether the model takes a finished mask [B, 1, T, T], True where a position may attend. Given a padding mask,
    transformers checks whether there is any padding, so the host waits for the GPU in every step."""
    config = model.config
    return config.model_type in FINISHED_MASK and config._attn_implementation == "sdpa"


def random_tokenizer(name: str, other: str | None) -> PreTrainedTokenizerFast | None:
    """Tokenizer for random weights: the one named, or the folder's own; None if one is to be trained."""
    if other is None:
        return None if is_type(name) or not is_folder(name) else read_text_tokenizer(name)
    tokenizer = read_text_tokenizer(other, "Name a folder, or leave it out: one is trained on the captions")
    return tokenizer if tokenizer is not None else _no_tokenizer(other)


def _no_tokenizer(name: str) -> NoReturn:
    todo = f"Name one ({WHERE}.tokenizer FOLDER)"
    raise UserError(name, "holds no tokenizer", todo, ExitCode.MISSING_INPUT)


def pretrained_tokenizer(name: str, other: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer that belongs to pretrained weights.

    Args:
        name: name of the model.
        other: location of the tokenizer, if it is not next to the weights.

    Raises:
        UserError: there is none, or the weights were trained with another one.
    """
    # With `other`, the model's own tokenizer is only compared: read from a folder, never fetched from the hub.
    own = read_text_tokenizer(name) if other is None or is_folder(name) else None
    tokenizer = own if other is None else read_text_tokenizer(other)
    if tokenizer is None:
        _no_tokenizer(other or name)
    if own is not None and own.get_vocab() != tokenizer.get_vocab():
        what = f"the weights in {name} were trained with another vocabulary ({len(own)} entries)"
        todo = "Leave it out: the model has its own"
        raise UserError(f"{WHERE}.tokenizer", what, todo, ExitCode.BAD_DATA)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig) -> None:
    """Raise UserError unless the model has a row for every entry, the tokenizer has a mask token, and both agree on the
    padding token."""
    if len(tokenizer) > config.vocab_size:
        what = f"{len(tokenizer)} entries, but the model has rows for {config.vocab_size}"
        raise UserError("tokenizer", what, f"Set {WHERE}.vocab_size, or use the model's own tokenizer")
    highest = max((*tokenizer.get_vocab().values(), *tokenizer.backend_tokenizer.encode("a").ids), default=0)
    if highest >= config.vocab_size:  # ids with gaps, or start and end tokens outside the vocabulary
        what = f"it gives token {highest}, but the model has rows for {config.vocab_size}"
        raise UserError("tokenizer", what, "Use the model's own tokenizer", ExitCode.BAD_DATA)
    if tokenizer.mask_token_id is None:
        raise UserError("tokenizer", "it has no mask token", "Use one of a masked language model")
    # RoBERTa numbers positions by non-padding tokens, and no model trains the row of the padding token.
    if tokenizer.pad_token_id != config.pad_token_id:
        what = f"its padding is token {tokenizer.pad_token_id}, the model's is {config.pad_token_id}"
        raise UserError("tokenizer", what, f"Use the model's own, or set {WHERE}.config.pad_token_id")


def fit_config(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    text_length: int,
    settings: dict[str, Any],
    keep_positions: bool,
) -> None:
    """Fit the config of random weights to the tokenizer, or to the one to be trained (its padding is token 0).

    Values in `settings` are kept. A bare model type gets as many positions as text_length needs; RoBERTa's start after
    the padding token's id.
    """
    pad = settings.get("pad_token_id", 0 if tokenizer is None else tokenizer.pad_token_id)
    wanted = {"pad_token_id": pad}
    if tokenizer is not None:
        wanted["vocab_size"] = len(tokenizer)
    if not keep_positions:
        # MPNet's positions start after 1 at the earliest.
        first = max(pad, 1) if config.model_type == "mpnet" else pad
        wanted["max_position_embeddings"] = text_length + first + 1
    for key, value in wanted.items():
        if key not in settings and hasattr(config, key):
            setattr(config, key, value)


def check_positions(model: Any, text_length: int) -> None:
    """Raise UserError if the model has position embeddings for fewer than text_length tokens."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if table is None:
        return
    # RoBERTa's positions start after the padding id.
    first = 0 if table.padding_idx is None else table.padding_idx + 1
    most = len(table.weight) - first
    if text_length > most:
        what = f"{text_length} tokens, but the model has {most} positions"
        raise UserError(f"{WHERE}.text_length", what, f"Set it to {most} or less")
