"""Attacks by somebody who hands out a checkpoint, a folder, an encoder or a configuration: one of each kind.

Each table has names and changes of a good file; `write` makes the files of one. Three things tell that an attack got
through: the file `mark` exists, an address was connected to, a file of `secret` was read. The tables use nothing of the
program but its file formats, so they also run against other versions of it (`run_attacks.py`).
"""

import base64
import io
import json
import os
import pickle
import shutil
import struct
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
OLD = ROOT / "tests" / "fixtures" / "89274c0"
EVIL = "evil_of_a_stranger"  # a module that writes the mark when it is imported


class Place(NamedTuple):
    """Where an attack works: a new folder."""

    here: Path

    @property
    def mark(self) -> Path:
        """What its code writes."""
        return self.here / "mark"

    @property
    def secret(self) -> Path:
        """A folder that it would read."""
        return self.here / "secret"

    def prepare(self) -> Path:
        """Make the secret, and a folder of packages, which is returned, with one that writes the mark."""
        shutil.copytree(OLD / "hub", self.secret)
        shutil.copy(OLD / "run" / "last.ckpt", self.secret / "secret.ckpt")
        packages = self.here / "packages"
        packages.mkdir()
        (packages / f"{EVIL}.py").write_text(f"open({str(self.mark)!r}, 'w')\nclass Task: ...\n")
        return packages

    @property
    def code(self) -> dict[str, Any]:
        """What makes a careless reader of settings run `touch MARK`."""
        return {"class_path": "torch.utils.collect_env.run", "init_args": {"command": f"touch {self.mark}"}}


Change = Callable[[Any, Place], Any]


class Reduced:
    """Pickles to a call of `os.system`."""

    def __init__(self, place: Place) -> None:
        self.command = f"touch {place.mark}"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def content() -> dict[str, Any]:
    """What a good checkpoint holds."""
    held: dict[str, Any] = torch.load(OLD / "run" / "last.ckpt", weights_only=True)
    return held


# ---------------------------------------------------------------------- the recipes of a model and of its task


def image(recipe: dict[str, Any]) -> dict[str, Any]:
    args: dict[str, Any] = recipe["init_args"]["image"]["init_args"]
    return args


def text(recipe: dict[str, Any]) -> dict[str, Any]:
    args: dict[str, Any] = recipe["init_args"]["text"]["init_args"]
    return args


def other(spec: dict[str, Any], new: dict[str, Any]) -> None:
    spec.clear()
    spec.update(new)


BACKBONES: dict[str, Change] = {
    "code in a timm setting": lambda r, p: image(r)["config"].update(x=p.code),
    "code as an activation": lambda r, p: text(r)["config"].update(hidden_act=p.code),
    "code as a number": lambda r, p: r["init_args"].update(cross_layers=p.code),
    "another backbone": lambda r, p: other(r, p.code),
    "a file through timm": lambda r, p: image(r)["config"].update(checkpoint_path=f"{p.secret}/model.safetensors"),
    "an address through timm": lambda r, p: image(r)["config"].update(pretrained_cfg={"url": "http://127.0.0.1:9/x"}),
    "a hub through timm": lambda r, p: image(r).update(name="hf-hub:stranger/model"),
    "a file as weights": lambda r, p: image(r).update(weights=f"{p.secret}/model.safetensors"),
    "a folder as a tokenizer": lambda r, p: text(r).update(tokenizer=str(p.secret)),
    "a type that fetches code": lambda r, p: text(r).update(name="yoso"),
    "an auto_map": lambda r, p: text(r)["config"].update(auto_map={"AutoModel": f"{EVIL}.X"}),
    "layers without end": lambda r, p: r["init_args"].update(cross_layers=10**12),
    "width without end": lambda r, p: text(r)["config"].update(hidden_size=2**40, intermediate_size=2**40),
}  # fmt: skip


def part(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"maskvlm.objectives.{name}", "init_args": settings}


WORDS = "pretraining_losses.WordsPresent"
TASKS: dict[str, Change] = {
    "a class of ours that is no task": lambda t, p: t.update(part("pretraining.PretrainingMetrics")),
    "a script of a task": lambda t, p: t.update(class_path="tasks.vqa.score.main"),
    "a package of a stranger": lambda t, p: t.update(class_path=f"{EVIL}.Task"),
    "code in a setting": lambda t, p: t["init_args"].update(temperature=p.code),
    "a loss of a stranger": lambda t, p: t["init_args"].update(losses=[{"class_path": f"{EVIL}.Task"}]),
    "a loss with code": lambda t, p: t["init_args"].update(losses=[part(WORDS, weight="exit()")]),
    "a masking that is a number": lambda t, p: t["init_args"].update(text_masking=7),
    "a masking that is code": lambda t, p: t["init_args"].update(image_masking=p.code),
    "a decoder without end": lambda t, p: t["init_args"].update(decoder_layers=10**12),
}  # fmt: skip

# ---------------------------------------------------------------------- what a checkpoint holds beside them


def settings_of(held: dict[str, Any], **more: Any) -> None:
    held["model"] = yaml.safe_dump(yaml.safe_load(held["model"]) | more)


def doubled(times: int, kind: Any) -> Any:
    tree = kind([0])
    for _ in range(times):
        tree = kind([tree, tree])
    return tree


def looped() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def stored_tokenizer(held: dict[str, Any], key: str, **more: Any) -> None:
    document = json.loads(held["tokenizer"])
    document[key].update(more)
    held["tokenizer"] = json.dumps(document)


def shared(held: dict[str, Any], _: Place) -> None:
    """A model of gigabytes would come of a file of megabytes."""
    largest = torch.zeros(max(value.numel() for value in held["state_dict"].values()))
    state = {name: largest[: value.numel()].view(value.shape) for name, value in held["state_dict"].items()}
    held["state_dict"] = state


def with_attributes(held: dict[str, Any], _: Place) -> None:
    state = OrderedDict(held["state_dict"])
    state.values = 5  # type: ignore[assignment, method-assign]
    held["state_dict"] = state


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
RULE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
DOUBLING = {"type": "Sequence", "normalizers": [RULE] * 30}
INSERTING = {"type": "Sequence", "normalizers": [RULE | {"pattern": {"Regex": "(?=.)"}, "content": "y"}] * 9}
OBJECT = "model: !!python/object/apply:os.system ['touch MARK']"
CONTENTS: dict[str, Change] = {
    "a trainer beside the model": lambda h, p: settings_of(h, **hook(p.code)),
    "YAML that makes objects": lambda h, p: h.update(model=OBJECT.replace("MARK", str(p.mark))),
    "YAML that multiplies": lambda h, p: h.update(model=ALIASES),
    "a pickle that runs": lambda h, p: h.update(x=Reduced(p)),
    "a list that doubles": lambda h, p: h.update(callbacks={"x": doubled(60, list)}),
    "a list that holds itself": lambda h, p: h.update(callbacks=looped()),
    "a key of many tuples": lambda h, p: h.update(x={doubled(8, tuple): 1}),
    "a bytearray": lambda h, p: h.update(x=bytearray(9)),
    "a tensor without memory": lambda h, p: h.update(x=torch.empty(10**9, 10**3, device="meta")),
    "a sparse tensor": lambda h, p: h["state_dict"].update(x=torch.sparse_coo_tensor([[0]], [1.0], (2**40,))),
    "a terabyte over four bytes": lambda h, p: h.update(callbacks={"x": torch.zeros(1).expand(10**12)}),
    "tensors over one memory": shared,
    "a container with attributes": with_attributes,
    "complex numbers": lambda h, p: h["state_dict"].update(x=torch.zeros(2, dtype=torch.complex64)),
    "a state that is none": lambda h, p: h.update(state_dict=5),
    "a name that is none": lambda h, p: h["state_dict"].update({5: torch.zeros(1)}),
    "a history that is a number": lambda h, p: h.update(lineage=5),
    "a tokenizer that is a list": lambda h, p: h.update(tokenizer=["x"]),
    "labels that are a tensor": lambda h, p: h.update(labels=torch.zeros(3, dtype=torch.long)),
    "a history without its keys": lambda h, p: h.update(lineage=[{"task": "x"}]),
    "a later format": lambda h, p: h.update(schema=99),
    "a tokenizer whose rules double": lambda h, p: stored_tokenizer(h, "tokenizer", normalizer=DOUBLING),
    "a role of a tokenizer that is none": lambda h, p: stored_tokenizer(h, "special", tokenizer_object="[MASK]"),
    "unread: hyper-parameters that import": lambda h, p: h.update(hyper_parameters={"_instantiator": f"{EVIL}.make"}),
}

# ---------------------------------------------------------------------- the bytes of a checkpoint

NUMBER = b"J\x00\x2e\xb9\x05"  # 96 million
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0atQ"
WIDE = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00" + NUMBER
WIDE += b"\x85K\x00\x85\x89ccollections\nOrderedDict\n)RtR"
CALLED = b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nbytearray\ncbuiltins\nbytearray\n" + NUMBER + b"\x85}tR"
COPIED = b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n(" + WIDE
COPIED += b"ctorch\nfloat64\nX\x03\x00\x00\x00cpu\x89tR"
ENCODED = 20 * b"c_codecs\nencode\n" + b"X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R"
ENCODED += 19 * b"X\x03\x00\x00\x00hex\x86R"


def replaced_pickle(path: Path, value: bytes) -> None:
    """A state of one value, which a pickle's instructions make."""
    good = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(path, "w") as archive:
        for info in source.infolist():
            made = b"\x80\x02}(X\x0a\x00\x00\x00state_dict}X\x01\x00\x00\x00x" + value + b"su."
            archive.writestr(info.filename, made if info.filename.endswith("data.pkl") else source.read(info))


def overlapping(path: Path) -> None:
    """Many entries of the archive that are the same bytes: a small file of a large content."""
    with zipfile.ZipFile(path) as archive:
        big = max(archive.infolist(), key=lambda info: info.file_size)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(500):
            twin = zipfile.ZipInfo(f"{big.filename}{number}")
            twin.header_offset, twin.CRC = big.header_offset, big.CRC
            twin.file_size = twin.compress_size = big.file_size
            archive.filelist.append(twin)
        archive._didModify = True  # type: ignore[attr-defined]


def in_zip(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3")


FILES: dict[str, Callable[[Path, Place], Any]] = {
    "a bare pickle": lambda f, p: f.write_bytes(pickle.dumps(Reduced(p))),
    "a zip": lambda f, p: in_zip(f, pickle.dumps(Reduced(p), protocol=2)),
    "members that overlap": lambda f, p: overlapping(f),
    "a call by another": lambda f, p: replaced_pickle(f, CALLED),
    "a copy that grows": lambda f, p: replaced_pickle(f, COPIED),
    "codecs that double": lambda f, p: replaced_pickle(f, ENCODED),
}

# ---------------------------------------------------------------------- folders of the hub's format, and encoders


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(file.read_text()) if file.exists() else {}
    change(document)
    file.write_text(json.dumps(document))


def merge(file: Path, **more: Any) -> None:
    edit(file, lambda document: document.update(more))


def linked(folder: Path, name: str, place: Place) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(place.secret / name)


def tokenizer(folder: Path, **rules: Any) -> None:
    merge(folder / "tokenizer.json", **rules)


def charsmap(longest: int) -> dict[str, str]:
    """A normaliser without a rule, which could put a text of this length in the place of a character."""
    content = struct.pack("<I", 4) + bytes(4) + b"a\0" + longest * b"b" + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


CLASSES = {"AutoConfig": f"{EVIL}.C", "AutoModel": f"{EVIL}.M", "AutoProcessor": f"{EVIL}.P"}
TOKENIZERS = {"AutoTokenizer": [f"{EVIL}.T", f"{EVIL}.T"]}
JINJA = "{{ cycler.__init__.__globals__.os.system('touch mark') }}"
QUANTISED = {"quantization_config": {"quant_method": "gptq", "bits": 4}, "attn_implementation": "stranger/kernel"}
PADDING = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
PADDING |= {"pad_type_id": 0, "pad_token": "[PAD]"}
BERT = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 99_999]}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "no", "type_id": 0}}], "pair": []}
UNREAD: dict[str, Callable[[Path, Place], Any]] = {
    "unread: classes in config.json": lambda f, p: merge(f / "config.json", auto_map=CLASSES, **QUANTISED),
    "unread: classes of a tokenizer": lambda f, p: merge(f / "tokenizer_config.json", auto_map=TOKENIZERS),
}
FOLDERS: dict[str, Callable[[Path, Place], Any]] = {
    "a link as config.json": lambda f, p: linked(f, "config.json", p),
    "a link as tokenizer.json": lambda f, p: linked(f, "tokenizer.json", p),
    "a link as weights": lambda f, p: linked(f, "model.safetensors", p),
    "a pickle for weights": lambda f, p: (
        (f / "model.safetensors").rename(f / "x") and (f / "pytorch_model.bin").write_bytes(pickle.dumps(Reduced(p)))
    ),
    "a header without end": lambda f, p: (f / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}"),
    "a file for timm": lambda f, p: edit(
        f / "config.json", lambda c: image(c["backbone"])["config"].update(pretrained_cfg={"file": str(p.secret)})
    ),
    "a token that the model lacks": lambda f, p: tokenizer(f, post_processor=BERT),
    "rules that double": lambda f, p: tokenizer(f, normalizer=DOUBLING),
    "rules that put in": lambda f, p: tokenizer(f, normalizer=INSERTING),
    "a table of long texts": lambda f, p: tokenizer(f, normalizer=charsmap(300)),
    "rules that stop the process": lambda f, p: tokenizer(f, post_processor=TEMPLATE | {"special_tokens": {}}),
    **UNREAD,
    "unread: settings that are no texts": lambda f, p: merge(f / "tokenizer_config.json", mask_token=5, pad_token={}),
    "unread: a template": lambda f, p: merge(f / "tokenizer_config.json", chat_template=JINJA),
    "unread: padding without end": lambda f, p: tokenizer(f, padding=PADDING),
}


def indexed(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    merge(folder / "model.safetensors.index.json", weight_map={"x": name})


ENCODERS: dict[str, Callable[[Path, Place], Any]] = {
    "a link as config.json": lambda f, p: linked(f, "config.json", p),
    "a link as tokenizer.json": lambda f, p: linked(f, "tokenizer.json", p),
    "a link as weights": lambda f, p: linked(f, "model.safetensors", p),
    "an index that leads up": lambda f, p: indexed(f, "../secret/model.safetensors"),
    "an index of a pickle": lambda f, p: indexed(f, "evil.pkl"),
    "width without end": lambda f, p: merge(f / "config.json", hidden_size=2048, intermediate_size=2048),
    "layers without end": lambda f, p: merge(f / "config.json", num_hidden_layers=10**12),
    **UNREAD,
}

# ---------------------------------------------------------------------- the files of one

KINDS: dict[str, dict[str, Callable[[Any, Place], Any]]] = {
    "backbone": BACKBONES, "task": TASKS, "content": CONTENTS, "file": FILES, "folder": FOLDERS, "encoder": ENCODERS,
}  # fmt: skip


@cache
def encoder_files() -> dict[str, bytes]:
    """A small text encoder as save_pretrained writes it."""
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with tempfile.TemporaryDirectory() as folder:
        BertModel(BertConfig(vocab_size=256, **shape)).save_pretrained(folder)
        written = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return written | {name: (OLD / "hub" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}


def good(place: Place, kind: str) -> Path:
    """A checkpoint, a folder of the hub's format without its sums, or an encoder, none of them changed."""
    path = place.here / (kind if kind in ("folder", "encoder") else "x.ckpt")
    if kind == "encoder":
        path.mkdir()
        for name, data in encoder_files().items():
            (path / name).write_bytes(data)
    elif kind == "folder":
        shutil.copytree(OLD / "hub", path)
        (path / "checksums.json").unlink()
    else:
        shutil.copy(OLD / "run" / "last.ckpt", path)
    return path


def with_recipe(path: Path, key: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the recipe of the backbone (`model`) or of the task of a checkpoint, or of a folder."""
    if path.is_dir():
        edit(path / "config.json", lambda config: change(config["backbone" if key == "model" else key]))
        return
    held = content()
    recipe = yaml.safe_load(held[key])
    change(recipe["model"]["backbone"] if key == "model" else recipe)
    torch.save(held | {key: yaml.safe_dump(recipe)}, path)


def write(kind: str, name: str, place: Place, as_folder: bool = False) -> Path:
    """Write the files of an attack; returns what is to be opened. as_folder: put a recipe into a folder."""
    change, path = KINDS[kind][name], good(place, "folder" if as_folder else kind)
    if kind in ("backbone", "task"):
        with_recipe(path, "model" if kind == "backbone" else kind, lambda recipe: change(recipe, place))
    elif kind == "content":
        held = content()
        change(held, place)
        torch.save(held, path)
    else:
        change(path, place)
    return path


# ---------------------------------------------------------------------- configurations


def callback(path: str, **args: Any) -> dict[str, Any]:
    return {"trainer": {"callbacks+": [{"class_path": path, "init_args": args}]}}


def hook(spec: Any) -> dict[str, Any]:
    args = {"ddp_comm_hook": spec}
    return {"trainer": {"strategy": {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": args}}}


def task(spec: Any) -> dict[str, Any]:
    return {"model": {"task": spec}}


PARSER = "jsonargparse.set_parsing_settings"
CONFIGS: dict[str, Callable[[Place], Any]] = {
    "a callback of callables": lambda p: callback("lightning.pytorch.callbacks.LambdaCallback", setup=p.code),
    "it by its bare name": lambda p: {"trainer": {"callbacks": "LambdaCallback"}},
    "a callback that loads": lambda p: callback("StochasticWeightAveraging", swa_lrs=0.1, avg_fn="torch.hub.load"),
    "a callback of a stranger": lambda p: callback(f"{EVIL}.Callback"),
    "a logger that sends": lambda p: {"trainer": {"logger": "WandbLogger"}},
    "a reader of checkpoints": lambda p: {"trainer": {"plugins": ["lightning.pytorch.plugins.TorchCheckpointIO"]}},
    "code in a strategy": lambda p: hook(p.code),
    "a function in a strategy": lambda p: hook("maskvlm.utils.whole_files.write_text"),
    "a task of a stranger": lambda p: task({"class_path": f"{EVIL}.Task"}),
    "a task that is a method": lambda p: task("maskvlm.objectives.pretraining.MaskedPretraining.forward"),
    "a task through our imports": lambda p: task({"class_path": "maskvlm.config.given_options.os.system"}),
    "a task in a text": lambda p: task("{class_path: os.system}"),
    "a source that opens the parser": lambda p: {"data": {"init_args": {"source": {"class_path": PARSER}}}},
    "YAML that makes objects": lambda p: OBJECT.replace("MARK", str(p.mark)),
    "YAML that multiplies": lambda p: ALIASES,
}
