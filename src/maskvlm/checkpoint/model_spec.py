"""What a checkpoint says about the model that its tensors belong to: classes and settings of the backbone and the task.

It is untrusted data, so it is read through a closed schema. The backbone and its encoders must be of one given class
each; every setting is a plain value of a given type and range; a size may not exceed what the checkpoint's own tensors
allow. Nothing else is read, nothing is instantiated here, and no name leads to a file or a URL. `rebuild.py` builds the
modules from it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.activations import ACT2FN

from maskvlm.config.plain_schema import (
    NOTHING,
    AnyOf,
    Entries,
    Flag,
    Kind,
    Listed,
    OneOf,
    Real,
    Record,
    Text,
    Tree,
    Whole,
    describe_value,
    maybe,
)
from maskvlm.config.safe_yaml import read_yaml
from maskvlm.data.safe_open import content_of
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import check_inside

BACKBONE, IMAGE, TEXT = (
    "maskvlm.model.maskvlm.MaskVLM",
    "maskvlm.model.encoders.ImageEncoder",
    "maskvlm.model.encoders.TextEncoder",
)
CLASS_PATH = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+"
MOST_SIDE = 4096  # pixels on each side of an image
TODO = "Take a checkpoint from somebody you trust"
SPEC_TODO = (
    "Put that file from its run beside it; if a script built the model, build it there: MaskVLM(..., start=this file)"
)
NOT_READ = frozenset({
    "model_type", "transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype", "id2label",
    "label2id", "problem_type", "output_attentions", "output_hidden_states", "return_dict",
})  # fmt: skip
"""Keys of a Hugging Face configuration that name its origin or a head and do not affect the encoder's shape."""
FETCH_CODE = frozenset({"yoso", "mra"})
"""Model types whose code in transformers downloads compiled code from the hub."""
AS_IS = frozenset({"is_encoder_decoder", "is_decoder", "add_cross_attention", "tie_word_embeddings"})
"""Settings that must have their default in an encoder here."""
WORDS = ("absolute", "full_attention", "sliding_attention", "p2c", "c2p", "default", "mean", "cls", "first", "last")
"""Strings that settings of text encoders may have, besides names of activations."""


class ModelSpec(NamedTuple):
    """class_path and init_args of the backbone and the task; task is None if a checkpoint does not state it."""

    backbone: dict[str, Any]
    task: dict[str, Any] | None


class Bounds(NamedTuple):
    """Bounds on sizes, from a checkpoint's tensors: the longest dimension of one, and how many there are."""

    side: int
    tensors: int


def bounds_of(state: Mapping[str, Tensor]) -> Bounds:
    """The bounds on sizes that a checkpoint's tensors allow. Small sizes are always allowed."""
    longest = max((size for value in state.values() for size in value.shape), default=0)
    return Bounds(max(4096, longest), max(64, len(state)))


# ---------------------------------------------------------------------- reading


def model_spec_of(content: Mapping[str, Any], path: str | Path) -> ModelSpec:
    """The model spec in a checkpoint's content, or in the `config-fit.yaml` beside an older one.

    Raises:
        UserError: neither states the model (66); what states it is damaged (65), cannot be read (74) or is a link out
            of its folder (77); or the schema does not allow it (77).
    """
    bounds = bounds_of(content["state_dict"])
    model, task = content.get("model"), content.get("task")
    beside = Path(path).parent / "config-fit.yaml"
    # Without a task a model spec is incomplete: the file beside the checkpoint has both.
    if model is None or (task is None and beside.is_file()):
        return _beside(beside, path, bounds)
    record = Record({"model": Tree()}, code=ExitCode.REFUSED).read(_yaml(model, path, "model"), f"{path}: model", TODO)
    whole = Record({"backbone": Tree()}, {"random_init": Flag()}, ExitCode.REFUSED)
    backbone = whole.read(record["model"], f"{path}: model", TODO)["backbone"]
    checked_backbone = read_backbone(backbone, f"{path}: model.backbone", bounds)
    return ModelSpec(checked_backbone, None if task is None else read_task(_yaml(task, path, "task"), f"{path}: task"))


def _yaml(text: Any, path: str | Path, key: str) -> Any:
    if not isinstance(text, str):
        raise UserError(f"{path}: {key}", f"expected YAML text, found {describe_value(text)}", TODO, ExitCode.REFUSED)
    return _read_untrusted(text, f"{path}: {key}")


def _read_untrusted(text: str, where: str) -> Any:
    """YAML that comes with a checkpoint. Raises UserError (65; 77 if it is too large)."""
    try:
        return read_yaml(text, where)
    except UserError as error:
        # The reader assumes the user's own YAML, where a mistake is a usage error.
        code = ExitCode.BAD_DATA if error.code == ExitCode.USAGE else error.code
        raise UserError(error.where, error.what, TODO, code) from error


def _beside(file: Path, path: str | Path, bounds: Bounds) -> ModelSpec:
    """The model spec of a checkpoint of the first versions, from a file beside it that is just as untrusted."""
    if not file.is_file():
        what = f"does not say which model it is, and there is no {file.name} beside it"
        raise UserError(path, what, SPEC_TODO, ExitCode.MISSING_INPUT)
    check_inside(file)
    # Only two parts of a whole run's configuration are read.
    config = _read_untrusted(read_small(file), str(file))
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not {"backbone", "task"} <= model.keys():
        raise UserError(
            file, "does not describe a model", f"Put the {file.name} of the checkpoint's run there", ExitCode.BAD_DATA
        )
    backbone = read_backbone(model["backbone"], f"{file}: model.backbone", bounds)
    return ModelSpec(backbone, read_task(model["task"], f"{file}: model.task"))


def read_small(file: Path, most: int = 1_000_000) -> str:
    """The content of a small text file. Raises UserError: it does not exist or is not a file (66), is too large or not
    text (65), or cannot be read (74)."""
    todo = "Get the file again"
    try:
        return content_of(file, most, todo).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(file, f"not UTF-8 text (byte {error.start})", todo, ExitCode.BAD_DATA) from None


def read_backbone(value: Any, where: str, bounds: Bounds) -> dict[str, Any]:
    """The checked class_path and init_args of a backbone. Raises UserError (77)."""
    side, layers = Whole(1, bounds.side), Whole(1, bounds.tensors)
    share = Real(0, 1)
    # First the backbone itself, then the two encoders, then the result is put together.
    args = _class(value, where, BACKBONE)
    # Every option of the classes, with its range; those that name files, or weights to download, must be null.
    also: dict[str, Kind] = {
        "cross_layers": layers,
        "cross_heads": side,
        "dropout": share,
        "checkpointing": Flag(),
        "start": NOTHING,
        "width": maybe(side),
        "query_positions": Flag(),
    }
    part = Tree()
    Record({"image": part, "text": part}, also, ExitCode.REFUSED).read(args, where, TODO)
    image = _class(args["image"], f"{where}.image", IMAGE)
    kinds: dict[str, Kind] = {
        "name": Text(100, r"[A-Za-z0-9_.]+"), "image_size": Whole(1, MOST_SIDE), "weights": NOTHING,
        "random_init": Flag(), "config": maybe(Tree(100)), "drop_path": share, "checkpointing": Flag(),
        "normalisation": OneOf(("model", "clip", "imagenet")),
        "frozen": AnyOf((layers, OneOf((0, "all")))), "feature_cache": NOTHING,
        "masked_patches": OneOf(("token", "left_out")),
    }  # fmt: skip
    Record({}, kinds, ExitCode.REFUSED).read(image, f"{where}.image", TODO)
    check_vit(image.get("config") or {}, f"{where}.image.config", bounds)
    text = _class(args["text"], f"{where}.text", TEXT)
    kinds = {
        "name": Text(100, r"[A-Za-z0-9_.-]+"), "text_length": Whole(3, bounds.side), "random_init": Flag(),
        "config": maybe(Tree(2000)), "tokenizer": NOTHING, "vocab_size": maybe(side), "checkpointing": Flag(),
    }  # fmt: skip
    Record({"name": kinds.pop("name")}, kinds, ExitCode.REFUSED).read(text, f"{where}.text", TODO)
    shape = check_text_config(text["name"], text.get("config") or {}, f"{where}.text", bounds)
    init_args = {name: part for name, part in args.items() if name not in ("image", "text", "start")}
    # Random initialisation, as the checkpoint's tensors follow: nothing is looked up in a file or on the hub.
    init_args["image"] = {"class_path": IMAGE, "init_args": image | {"weights": None, "random_init": True}}
    init_args["text"] = {
        "class_path": TEXT,
        "init_args": text | {"tokenizer": None, "random_init": True, "config": shape},
    }
    return {"class_path": BACKBONE, "init_args": init_args | {"start": None}}


def _class(value: Any, where: str, name: str) -> dict[str, Any]:
    """The init_args of a value whose class must be `name`."""
    kinds = {"class_path": OneOf((name,))}
    read = Record(kinds, {"init_args": maybe(Tree())}, ExitCode.REFUSED).read(value, where, TODO)
    args = read.get("init_args") or {}
    return dict(args) if isinstance(args, dict) else Record(code=ExitCode.REFUSED).read(args, where, TODO)


def vit_kinds(bounds: Bounds) -> dict[str, Kind]:
    """The settings of a timm ViT that a model here may have, all about its shape. Others read or download files."""
    side, share, flag = Whole(1, bounds.side), Real(0, 1), Flag()
    return {
        "patch_size": Whole(1, 256), "embed_dim": side, "depth": Whole(1, bounds.tensors), "num_heads": side,
        "mlp_ratio": Real(0.01, 100), "qkv_bias": flag, "qk_norm": flag, "proj_bias": flag, "init_values": maybe(share),
        "class_token": flag, "reg_tokens": Whole(0, bounds.side), "num_reg_tokens": Whole(0, bounds.side),
        "no_embed_class": flag, "pre_norm": flag,
        "scale_attn_norm": flag, "scale_mlp_norm": flag, "scale_attn_inner": flag,
        "drop_rate": share, "pos_drop_rate": share, "proj_drop_rate": share, "attn_drop_rate": share,
        "dynamic_img_size": flag, "dynamic_img_pad": flag, "use_abs_pos_emb": flag, "use_rel_pos_bias": flag,
        "use_shared_rel_pos_bias": flag, "use_rot_pos_emb": flag, "swiglu_mlp": flag, "scale_mlp": flag,
    }  # fmt: skip


def check_vit(settings: Any, where: str, bounds: Bounds, todo: str = TODO) -> None:
    """Raises UserError (77) for a setting that `vit_kinds` does not allow."""
    Record({}, vit_kinds(bounds), ExitCode.REFUSED).read(settings, where, todo)


def check_text_config(name: str, settings: Any, where: str, bounds: Bounds, todo: str = TODO) -> dict[str, Any]:
    """The settings that determine the shape of a text encoder of this model type.

    Each must have the type of its default, and a size that `bounds` allow; a string must be the name of an activation,
    one of `WORDS`, or the default.

    Raises:
        UserError: no such type, not a setting of this type, or a value that is not allowed (77).
    """
    kind = CONFIG_MAPPING[name] if name in CONFIG_MAPPING else None  # noqa: SIM401 (its `get` loads nothing)
    if kind is None or kind not in MODEL_FOR_MASKED_LM_MAPPING or name in FETCH_CODE:
        what = f"expected a type of text encoder such as bert, found {describe_value(name)}"
        raise UserError(f"{where}.name", what, TODO, ExitCode.REFUSED)
    # The default of each setting is allowed, whatever it is.
    defaults = {key: value for key, value in kind().to_dict().items() if key not in NOT_READ}
    read = (
        {key: value for key, value in settings.items() if key not in NOT_READ} if type(settings) is dict else settings
    )
    kinds: dict[str, Kind] = {
        key: AnyOf((OneOf((default,)), *([] if key in AS_IS else [_like(key, default, bounds)])))
        for key, default in defaults.items()
    }
    return Record({}, kinds, ExitCode.REFUSED).read(read, f"{where}.config", todo)


def _like(key: str, default: Any, bounds: Bounds) -> Kind:
    """The values allowed for a setting with this default."""
    word = OneOf((*WORDS, *ACT2FN.keys()))
    number = AnyOf((Whole(-1, bounds.side), Real(-1e6, 1e6)))
    # Before int, as a bool is an int.
    if isinstance(default, bool):
        return maybe(Flag())
    if isinstance(default, int):
        # A layer has at least one tensor, and a width is a dimension of one.
        return maybe(Whole(0, bounds.tensors) if "layer" in key or "group" in key else Whole(-1000, bounds.side))
    if isinstance(default, float):
        return maybe(Real(-1e6, 1e6))
    if isinstance(default, str):
        return maybe(AnyOf((word, OneOf((default,)))))
    if isinstance(default, list | tuple):
        return maybe(Listed(AnyOf((word, number, Flag())), bounds.tensors))
    if isinstance(default, dict):
        inner = AnyOf((word, number, Flag(), NOTHING))
        return maybe(AnyOf((Entries(inner), Entries(Entries(inner)))))
    return AnyOf((number, word, Flag(), NOTHING, Listed(AnyOf((word, number)), 100)))  # a default of None has no type


def read_task(value: Any, where: str) -> dict[str, Any]:
    """class_path and init_args of a task, checked as far as possible without its class. Raises UserError (77)."""
    kinds = {"class_path": Text(200, CLASS_PATH)}
    read = Record(kinds, {"init_args": maybe(Tree())}, ExitCode.REFUSED).read(value, where, TODO)
    args = read.get("init_args") or {}
    if not isinstance(args, dict):
        Record(code=ExitCode.REFUSED).read(args, where, TODO)
    return {"class_path": read["class_path"], "init_args": {name: args[name] for name in args if name != "labels"}}


# ---------------------------------------------------------------------- writing


def portable(spec: ModelSpec, text_config: Any) -> ModelSpec:
    """The same model spec without names of folders or hub models, but with the shape of the text encoder written out.

    Args:
        text_config: the text encoder's Hugging Face configuration.
    """
    # Shapes replace paths, so that a checkpoint is complete on another machine.
    args = dict(spec.backbone["init_args"])
    image, text = (dict(args[name].get("init_args") or {}) for name in ("image", "text"))
    image |= {"weights": None, "random_init": True, "feature_cache": None}
    own_tokenizer = text.get("tokenizer") is not None
    text |= {"tokenizer": None, "random_init": True}
    # The name of a folder or hub model, which another machine may not have.
    if text.get("name", "") not in CONFIG_MAPPING:
        known = type(text_config)().to_dict().keys() - NOT_READ
        shape = {key: value for key, value in text_config.to_dict().items() if key in known}
        text |= {"name": text_config.model_type, "config": shape, "vocab_size": None}
    elif own_tokenizer:
        # Settings that a plain model type took over from another tokenizer (`hf_text.fit_config`).
        names = [name for name in ("pad_token_id", "max_position_embeddings") if hasattr(text_config, name)]
        taken_over = {name: getattr(text_config, name) for name in names}
        text |= {"vocab_size": text_config.vocab_size, "config": (text.get("config") or {}) | taken_over}
    args["image"] = {"class_path": args["image"]["class_path"], "init_args": image}
    args["text"] = {"class_path": args["text"]["class_path"], "init_args": text}
    return spec._replace(backbone={**spec.backbone, "init_args": {**args, "start": None}})


def spec_of_modules(backbone: Any, task: Any) -> ModelSpec | None:
    """The portable model spec of modules that a script has built, from the arguments that they store.

    Returns:
        the backbone, and the task if its arguments are plain values; None for a backbone that a checkpoint cannot
        describe: it or an encoder is of another class, or has an argument that is not a plain value.
    """
    specs = [_built(part) for part in (backbone, backbone.image, backbone.text)]
    if [None if part is None else part["class_path"] for part in specs] != [BACKBONE, IMAGE, TEXT]:
        return None
    whole, image, text = (part for part in specs if part is not None)
    whole["init_args"] |= {"image": image, "text": text}
    return portable(ModelSpec(whole, _built(task)), backbone.text.config)


def _built(part: Any) -> dict[str, Any] | None:
    """class_path and init_args; None if an argument is an object that cannot be written as text."""
    try:
        # `item` turns NumPy numbers into Python's.
        args = json.loads(json.dumps(part.arguments, allow_nan=False, default=lambda value: value.item()))
    except (AttributeError, TypeError, ValueError):
        return None
    if any(name.startswith("*") for name in args):  # positional arguments have no names
        return None
    return {"class_path": f"{type(part).__module__}.{type(part).__qualname__}", "init_args": args}


def portable_yaml(config: Mapping[str, Any], text_config: Any) -> str:
    """The part of a composed configuration that a model's weights depend on, as stored in a checkpoint."""
    return backbone_yaml(portable(ModelSpec(config["model"]["backbone"], None), text_config))


def backbone_yaml(spec: ModelSpec) -> str:
    """The backbone as YAML, in the form of a `-c` file."""
    return yaml.safe_dump({"model": {"random_init": True, "backbone": spec.backbone}}, sort_keys=False)


def task_yaml(task: Mapping[str, Any]) -> str:
    """A task's class_path and init_args as YAML, which determine the heads; labels are stored elsewhere."""
    args = {name: value for name, value in (task.get("init_args") or {}).items() if name != "labels"}
    return yaml.safe_dump({"class_path": task["class_path"], "init_args": args}, sort_keys=False)
