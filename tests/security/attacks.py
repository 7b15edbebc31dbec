"""Attacks by somebody who hands out a model, a folder, a configuration, an index or a data set: what each tries to do.

An attack writes its files and says which commands open them. Three things tell that it got through: a file in `mark`, a
connection to `port`, a file of `secret` that was opened. The corpus is written without knowledge of what the program
checks; it also runs against other versions of the program, so it uses nothing of it but its file formats.
"""

import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
OLD = ROOT / "tests" / "fixtures" / "89274c0"


@dataclass
class Place:
    """Where an attack works. here: its files. mark: what its code would write into. secret: what it would read."""

    here: Path
    mark: Path
    secret: Path
    port: int
    name: str = ""

    @property
    def marker(self) -> str:
        return str(self.mark / self.name)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/{self.name}"


@dataclass
class Attack:
    """What it is called, how it writes its files, and the commands that open them."""

    name: str
    make: Callable[[Place], list[list[str]]]
    kind: str = field(default="model")


ATTACKS: list[Attack] = []


def attack(kind: str, **settings: Any) -> Callable[[Callable[..., list[list[str]]]], Callable[..., list[list[str]]]]:
    """Add a function to the corpus; with settings once for each of their values."""

    def add(make: Callable[..., list[list[str]]]) -> Callable[..., list[list[str]]]:
        if not settings:
            ATTACKS.append(Attack(make.__name__, make, kind))
        for key, values in settings.items():
            for label, value in values.items():
                name = f"{make.__name__}-{label}"
                ATTACKS.append(Attack(name, lambda place, value=value, key=key: make(place, **{key: value}), kind))
        return make

    return add


# ---------------------------------------------------------------------- code that would run


def runs(place: Place) -> dict[str, Any]:
    """Values that make a careless reader of configurations run `touch marker`."""
    touch = ["touch", place.marker]
    handler = "torch.distributed.elastic.multiprocessing.subprocess_handler"
    entry = {
        "entrypoint": "touch",
        "args": [place.marker],
        "env": {},
        "stdout": None,
        "stderr": None,
        "local_rank_id": 0,
    }
    return {
        "subprocess": {"class_path": f"{handler}.SubprocessHandler", "init_args": entry},
        "collect": {"class_path": "torch.utils.collect_env.run", "init_args": {"command": " ".join(touch)}},
        "popen": {"class_path": "subprocess.Popen", "init_args": {"args": touch}},
        "hydra": {"_target_": "os.system", "command": " ".join(touch)},
        "listed": [{"class_path": f"{handler}.SubprocessHandler", "init_args": entry}],
        "deep": {"a": {"b": [{"class_path": f"{handler}.SubprocessHandler", "init_args": entry}]}},
    }


class Reduced:
    """Pickles to a call of `os.system`."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (self.command,)


# ---------------------------------------------------------------------- models


def content() -> dict[str, Any]:
    """What a good checkpoint holds."""
    good_content: dict[str, Any] = torch.load(OLD / "run" / "last.ckpt", weights_only=True)
    return good_content


WAYS = ("api", "fit", "fill", "convert", "export", "resume")


def opened(place: Place, source: Path, ways: tuple[str, ...] = WAYS) -> list[list[str]]:
    """Commands that open a model."""
    image = place.here / "image.png"
    if not image.exists():
        from PIL import Image

        Image.new("RGB", (48, 48), "red").save(image)
    task = ["-c", str(ROOT / "conf/base.yaml"), "-c", str(ROOT / "conf/finetune.yaml")]
    task += ["-c", str(ROOT / "tasks/entailment/conf.yaml"), "-c", str(ROOT / "conf/where/cpu.yaml")]
    task += ["--trainer.fast_dev_run", "1", "--data.batch_size", "4", "--data.eval_batch_size", "4"]
    config = source.parent / "config-fit.yaml"
    every = {
        "api": ["API", str(source)],
        "auto": ["AUTO", str(source)],
        "processor": ["PROCESSOR", str(source)],
        "fit": ["fit", "--run", str(place.here / "run"), "--from", str(source), *task],
        "fill": ["fill", "--from", str(source), str(image), "a [MASK] circle"],
        "convert": ["convert", str(source), str(place.here / "converted")],
        "export": ["export", "--from", str(source), str(place.here / "exported"), "--format", "torch"],
        "resume": ["fit", "-c", str(config), "--run", str(source.parent), "--ckpt_path", str(source)],
    }
    return [every[way] for way in ways]


def checkpoint(place: Place, change: Callable[[dict[str, Any]], Any], ways: tuple[str, ...] = WAYS) -> list[list[str]]:
    """A run's folder with a changed checkpoint, and no sum beside it."""
    folder = place.here / "stranger"
    shutil.copytree(OLD / "run", folder)
    (folder / "last.ckpt.sha256").unlink()
    held = content()
    changed = change(held)
    torch.save(held if changed is None else changed, folder / "last.ckpt")
    return opened(place, folder / "last.ckpt", ways)


def model_of(held: dict[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = yaml.safe_load(held["model"])
    return model


def into_model(place: Place, change: Callable[[dict[str, Any]], Any]) -> list[list[str]]:
    """A checkpoint whose recipe of the backbone is changed, and the same as a folder of the hub's format."""

    def spoil(held: dict[str, Any]) -> None:
        recipe = model_of(held)
        change(recipe["model"])
        held["model"] = yaml.safe_dump(recipe)

    def spoil_folder(config: dict[str, Any]) -> None:
        recipe = {"random_init": True, "backbone": config["backbone"]}
        change(recipe)
        config["backbone"] = recipe["backbone"]

    return checkpoint(place, spoil, WAYS[:5]) + folder(place, spoil_folder)


def into_task(place: Place, change: Callable[[dict[str, Any]], Any]) -> list[list[str]]:
    """The same of the recipe of the task."""

    def spoil(held: dict[str, Any]) -> None:
        recipe = yaml.safe_load(held["task"])
        change(recipe)
        held["task"] = yaml.safe_dump(recipe)

    return checkpoint(place, spoil, ("api", "fill", "convert", "export")) + folder(
        place, lambda config: change(config["task"])
    )


HUB = ("api", "auto", "fill", "fit")


def folder(
    place: Place,
    change: Callable[[dict[str, Any]], Any],
    more: Callable[[Path], Any] = lambda folder: None,
    ways: tuple[str, ...] = HUB,
) -> list[list[str]]:
    """A folder of the hub's format with a changed config.json, and no sums."""
    hub = place.here / "hub"
    shutil.copytree(OLD / "hub", hub)
    (hub / "checksums.json").unlink()
    config = json.loads((hub / "config.json").read_text())
    change(config)
    (hub / "config.json").write_text(json.dumps(config))
    more(hub)
    return opened(place, hub, ways)


def args_of(model: dict[str, Any], part: str) -> dict[str, Any]:
    args: dict[str, Any] = model["backbone"]["init_args"][part]["init_args"]
    return args


HOW = {name: name for name in ("subprocess", "collect", "popen", "hydra", "listed", "deep")}


@attack("model", how=HOW)
def code_in_the_image_encoders_config(place: Place, how: str) -> list[list[str]]:
    return into_model(place, lambda model: args_of(model, "image")["config"].update(x=runs(place)[how]))


@attack("model", how=HOW)
def code_in_the_text_encoders_config(place: Place, how: str) -> list[list[str]]:
    return into_model(place, lambda model: args_of(model, "text")["config"].update(hidden_act=runs(place)[how]))


@attack("model", how={"subprocess": "subprocess", "collect": "collect"})
def code_in_the_place_of_a_number(place: Place, how: str) -> list[list[str]]:
    return into_model(place, lambda model: model["backbone"]["init_args"].update(dropout=runs(place)[how]))


@attack("model", part={"backbone": "backbone", "image": "image", "text": "text"})
def another_class(place: Place, part: str) -> list[list[str]]:
    def change(model: dict[str, Any]) -> None:
        spec = model["backbone"] if part == "backbone" else model["backbone"]["init_args"][part]
        spec.clear()
        spec.update(runs(place)["subprocess"])

    return into_model(place, change)


@attack("model", path={
    "builtin": "builtins.exec", "os": "os.system", "hub": "torch.hub.load", "load": "torch.load",
    "module": "torch.nn.Linear", "lightning": "lightning.pytorch.callbacks.LambdaCallback",
    "function": "maskvlm.utils.launch.requeue", "folder": "tasks.vqa.score.main", "package": "evil.Task",
})  # fmt: skip
def another_task(place: Place, path: str) -> list[list[str]]:
    (place.here / "evil.py").write_text(f"open({place.marker!r}, 'w')\n")  # on the path, as the command runs here
    return into_task(place, lambda task: task.update(class_path=path))


@attack("model", how={"subprocess": "subprocess", "hydra": "hydra"})
def code_in_a_setting_of_the_task(place: Place, how: str) -> list[list[str]]:
    return into_task(place, lambda task: task["init_args"].update(temperature=runs(place)[how]))


@attack("model", how={"subprocess": "subprocess", "collect": "collect"})
def a_trainer_beside_the_model(place: Place, how: str) -> list[list[str]]:
    """`fit --from` took the whole text for a configuration file."""
    hook = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"ddp_comm_hook": runs(place)[how]}}

    def spoil(held: dict[str, Any]) -> None:
        held["model"] = yaml.safe_dump(model_of(held) | {"trainer": {"strategy": hook, "devices": 1}})

    return checkpoint(place, spoil, WAYS[:5])


@attack("model")
def a_profiler_that_writes_elsewhere(place: Place) -> list[list[str]]:
    profiler = {"class_path": "lightning.pytorch.profilers.SimpleProfiler"}
    profiler |= {"init_args": {"dirpath": str(place.mark), "filename": place.name}}  # type: ignore[dict-item]

    def spoil(held: dict[str, Any]) -> None:
        held["model"] = yaml.safe_dump(model_of(held) | {"trainer": {"profiler": profiler}})

    return checkpoint(place, spoil, ("fit",))


@attack("model")
def settings_of_the_model_that_are_not_its_shape(place: Place) -> list[list[str]]:
    def spoil(held: dict[str, Any]) -> None:
        recipe = model_of(held)
        recipe["model"]["task"] = runs(place)["subprocess"]
        held["model"] = yaml.safe_dump(recipe)

    return checkpoint(place, spoil, ("api", "fit"))


@attack("model", key={
    "checkpoint_path": "path", "pretrained_cfg": "cfg", "overlay": "overlay", "cache_dir": "cache", "url": "url",
})  # fmt: skip
def files_and_addresses_through_timm(place: Place, key: str) -> list[list[str]]:
    secret = str(place.secret / "secret.safetensors")
    values: dict[str, dict[str, Any]] = {
        "path": {"checkpoint_path": secret},
        "cfg": {"pretrained": True, "pretrained_cfg": {"file": secret}},
        "overlay": {"pretrained": True, "pretrained_cfg_overlay": {"url": f"{place.address}.pth"}},
        "cache": {"pretrained": True, "cache_dir": place.marker},
        "url": {"pretrained": True, "pretrained_cfg": {"url": f"{place.address}.pth", "num_classes": 0}},
    }
    return into_model(place, lambda model: args_of(model, "image")["config"].update(values[key]))


@attack("model", key={"weights": "weights", "tokenizer": "tokenizer", "name": "name", "start": "start"})
def files_through_our_own_settings(place: Place, key: str) -> list[list[str]]:
    def change(model: dict[str, Any]) -> None:
        if key == "start":
            model["backbone"]["init_args"]["start"] = str(place.secret / "secret.ckpt")
        elif key == "weights":
            args_of(model, "image").update(weights=str(place.secret / "secret.safetensors"), random_init=False)
        else:
            args_of(model, "text")[key] = str(place.secret)

    return into_model(place, change)


@attack("model", name={"hub": "hf-hub:stranger/model", "local": "local-dir:", "path": "../secret"})
def a_timm_model_of_another_place(place: Place, name: str) -> list[list[str]]:
    named = name + str(place.secret) if name.endswith(":") else name
    return into_model(place, lambda model: args_of(model, "image").update(name=named))


@attack("model", key={
    "attention": {"attn_implementation": "stranger/kernel"}, "private": {"_attn_implementation": "stranger/kernel"},
    "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "auto": {"auto_map": {"AutoModel": "evil.X"}}, "path": {"name_or_path": "/etc"},
})  # fmt: skip
def settings_of_transformers_that_fetch(place: Place, key: dict[str, Any]) -> list[list[str]]:
    return into_model(place, lambda model: args_of(model, "text")["config"].update(key))


@attack("bomb", size={"layers": 10**12, "negative": -1, "wide": 2**40, "float": 1e300, "text": "9" * 5000})
def sizes_without_end(place: Place, size: Any) -> list[list[str]]:
    def change(model: dict[str, Any]) -> None:
        model["backbone"]["init_args"]["cross_layers"] = size
        args_of(model, "image")["config"]["depth"] = size
        args_of(model, "text")["config"]["num_hidden_layers"] = size

    return into_model(place, change)


@attack("bomb")
def a_decoder_without_end(place: Place) -> list[list[str]]:
    return into_task(place, lambda task: task["init_args"].update(decoder_layers=10**12))


@attack("bomb")
def aliases_that_multiply(place: Place) -> list[list[str]]:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9))

    def spoil(held: dict[str, Any]) -> None:
        held["model"] = bomb

    return checkpoint(place, spoil, ("api", "fit"))


@attack("model", key={"object": "!!python/object/apply:os.system ['touch {}']", "name": "!!python/name:os.system"})
def yaml_that_asks_for_objects(place: Place, key: str) -> list[list[str]]:
    def spoil(held: dict[str, Any]) -> None:
        held["model"] = "model: " + key.format(place.marker)

    return checkpoint(place, spoil, ("api", "fit"))


@attack("pickle", where={"content": "content", "callbacks": "callbacks", "state": "state", "lineage": "lineage"})
def a_pickle_that_runs(place: Place, where: str) -> list[list[str]]:
    evil = Reduced(f"touch {place.marker}")

    def spoil(held: dict[str, Any]) -> None:
        if where == "content":
            held["evil"] = evil
        elif where == "state":
            held["state_dict"]["evil"] = evil
        else:
            held[where] = [evil]

    return checkpoint(place, spoil)


@attack("pickle", how={"bare": "bare", "legacy": "legacy", "tar": "tar", "inner": "inner"})
def a_pickle_in_the_place_of_the_file(place: Place, how: str) -> list[list[str]]:
    evil = Reduced(f"touch {place.marker}")
    commands = checkpoint(place, lambda held: None)
    path = place.here / "stranger" / "last.ckpt"
    if how == "bare":
        path.write_bytes(pickle.dumps(evil))
    elif how == "legacy":
        torch.save({"state_dict": {}, "x": evil}, path, _use_new_zipfile_serialization=False)
    elif how == "tar":
        with tarfile.open(path, "w") as tar:
            data = pickle.dumps(evil)
            entry = tarfile.TarInfo("pickle")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(evil, protocol=2))
            archive.writestr("archive/version", "3")
    return commands


@attack("model", key={
    "instantiator": {"hyper_parameters": {"_instantiator": "os.system"}},
    "class": {"hyper_parameters": {"_class_path": "evil.Model"}, "hparams_name": "kwargs"},
    "data": {"datamodule_hyper_parameters": {"_instantiator": "evil.make"}},
})  # fmt: skip
def hyper_parameters_that_import(place: Place, key: dict[str, Any]) -> list[list[str]]:
    (place.here / "evil.py").write_text(f"open({place.marker!r}, 'w')\n")
    return checkpoint(place, lambda held: held.update(key))


@attack("model")
def a_callback_state_that_deletes(place: Place) -> list[list[str]]:
    """Lightning deletes what the best checkpoint was, by the name that the state gives."""
    victim = place.here / "precious.ckpt"
    victim.write_bytes(b"precious")

    def spoil(held: dict[str, Any]) -> None:
        for key, state in held["callbacks"].items():
            if key.startswith("ModelCheckpoint"):
                away = f"{place.here}/stranger/../precious.ckpt"
                best = torch.tensor(-1e9)
                state |= {"dirpath": f"{place.here}/stranger", "best_model_path": away, "kth_best_model_path": away}
                state |= {"best_k_models": {away: best}, "best_model_score": best, "kth_value": best}

    return checkpoint(place, spoil, ("resume",))


@attack(
    "bomb", form={"meta": "meta", "sparse": "sparse", "wide": "wide", "long": "long", "self": "self", "deep": "deep"}
)
def tensors_and_lists_that_are_none(place: Place, form: str) -> list[list[str]]:
    def spoil(held: dict[str, Any]) -> None:
        name = "backbone.image.mask_token"
        if form == "meta":
            held["state_dict"][name] = torch.empty(10**9, 10**3, device="meta")
        elif form == "sparse":
            held["state_dict"][name] = torch.sparse_coo_tensor([[0]], [1.0], (2**40,))
        elif form == "wide":
            held["state_dict"][name] = torch.zeros(1).expand(10**12)
        elif form == "long":
            held["labels"] = torch.zeros(1, dtype=torch.long).expand(10**10)
        elif form == "self":
            loop: list[Any] = []
            loop.append(loop)
            held["callbacks"] = loop
        else:
            doubled: list[Any] = [0]
            for _ in range(60):
                doubled = [doubled, doubled]
            held["evaluation"] = doubled

    return checkpoint(place, spoil, ("api", "fit", "convert"))


@attack("bomb")
def members_that_overlap(place: Place) -> list[list[str]]:
    """Many entries of the archive that are the same bytes: a small file of a large content."""
    commands = checkpoint(place, lambda held: held.update(x=torch.zeros(2**20)), ("api",))
    path = place.here / "stranger" / "last.ckpt"
    with zipfile.ZipFile(path) as archive:
        big = max(archive.infolist(), key=lambda info: info.file_size)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(3000):
            twin = zipfile.ZipInfo(f"{big.filename}{number}")
            twin.header_offset, twin.file_size, twin.compress_size, twin.CRC = (
                big.header_offset,
                big.file_size,
                big.file_size,
                big.CRC,
            )
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True  # type: ignore[attr-defined]
    return commands


# ---------------------------------------------------------------------- folders of the hub's format


@attack("folder", key={
    "auto_map": {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoProcessor": "evil.P"}},
    "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "attention": {"_attn_implementation": "stranger/kernel", "attn_implementation": "stranger/kernel"},
    "architectures": {"architectures": ["evil.M"], "custom_pipelines": {"x": {"impl": "evil.P"}}},
})  # fmt: skip
def config_json_that_names_code(place: Place, key: dict[str, Any]) -> list[list[str]]:
    def more(hub: Path) -> None:
        (hub / "evil.py").write_text(f"open({place.marker!r}, 'w')\n")

    return folder(place, lambda config: config.update(key), more)


@attack("folder", key={
    "auto_map": {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"},
    "class": {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"},
    "template": {"chat_template": "{{ cycler.__init__.__globals__.os.system('touch x') }}"},
})  # fmt: skip
def tokenizer_config_that_names_code(place: Place, key: dict[str, Any]) -> list[list[str]]:
    def more(hub: Path) -> None:
        (hub / "evil.py").write_text(f"open({place.marker!r}, 'w')\n")
        file = hub / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | key))

    return folder(place, lambda config: None, more, (*HUB, "processor"))


@attack("folder")
def processor_config_that_names_code(place: Place) -> list[list[str]]:
    def more(hub: Path) -> None:
        (hub / "evil.py").write_text(f"open({place.marker!r}, 'w')\n")
        settings = {"processor_class": "P", "auto_map": {"AutoProcessor": "evil.P", "AutoImageProcessor": "evil.I"}}
        (hub / "processor_config.json").write_text(json.dumps(settings))

    return folder(place, lambda config: None, more, (*HUB, "processor"))


@attack("folder", name={name: name for name in ("config.json", "tokenizer.json", "model.safetensors")})
def a_link_out_of_the_folder(place: Place, name: str) -> list[list[str]]:
    def more(hub: Path) -> None:
        (hub / name).unlink()
        (hub / name).symlink_to(place.secret / ("secret" + Path(name).suffix))

    # Not by AutoModel: transformers reads config.json itself, before it knows whose it is.
    return folder(place, lambda config: None, more, ("api", "fill", "fit"))


@attack("folder")
def an_adapter_of_another_model(place: Place) -> list[list[str]]:
    def more(hub: Path) -> None:
        (hub / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(place.secret)}))

    return folder(place, lambda config: None, more)


@attack("folder")
def a_pickle_beside_the_weights(place: Place) -> list[list[str]]:
    def more(hub: Path) -> None:
        (hub / "model.safetensors").unlink()
        (hub / "pytorch_model.bin").write_bytes(pickle.dumps(Reduced(f"touch {place.marker}")))

    return folder(place, lambda config: None, more)


@attack("folder", names={"up": "../../secret/secret.safetensors", "absolute": "SECRET/secret.safetensors"})
def an_encoders_index_that_leads_out(place: Place, names: str) -> list[list[str]]:
    encoder_folder = encoder(place)
    (encoder_folder / "model.safetensors").unlink()
    named = names.replace("SECRET", str(place.secret))
    (encoder_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": named}}))
    return using(place, encoder_folder)


@attack("folder", key={
    "auto_map": {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}},
    "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "attention": {"_attn_implementation": "stranger/kernel", "attn_implementation": "stranger/kernel"},
    "wide": {"hidden_size": 2**20, "num_attention_heads": 1, "intermediate_size": 2**20},
    "layers": {"num_hidden_layers": 10**12},
})  # fmt: skip
def an_encoder_that_names_code(place: Place, key: dict[str, Any]) -> list[list[str]]:
    encoder_folder = encoder(place)
    (encoder_folder / "evil.py").write_text(f"open({place.marker!r}, 'w')\n")
    config = json.loads((encoder_folder / "config.json").read_text())
    (encoder_folder / "config.json").write_text(json.dumps(config | key))
    return using(place, encoder_folder)


@attack("folder")
def an_encoders_tokenizer_that_names_code(place: Place) -> list[list[str]]:
    encoder_folder = encoder(place)
    (encoder_folder / "evil.py").write_text(f"open({place.marker!r}, 'w')\n")
    tokenizer_config = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    (encoder_folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return using(place, encoder_folder)


def encoder(place: Place) -> Path:
    """A small text encoder as save_pretrained writes it."""
    from transformers import BertConfig, BertModel

    encoder_folder = place.here / "encoder"
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=256, **shape)).save_pretrained(encoder_folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(OLD / "hub" / name, encoder_folder)
    return encoder_folder


def using(place: Place, encoder_folder: Path) -> list[list[str]]:
    """A model that starts from it."""
    return [["ENCODER", str(encoder_folder)]]


# ---------------------------------------------------------------------- configurations


def configured(place: Place, text: str, *more: str) -> list[list[str]]:
    """A `-c` file over the built-in world's."""
    file = place.here / "stranger.yaml"
    file.write_text(text)
    stack = ["base", "model/tiny", "pretrain", "pretrain-tiny", "data/scenes", "where/cpu"]
    words = [word for name in stack for word in ("-c", str(ROOT / "conf" / f"{name}.yaml"))]
    run = ["--run", str(place.here / "run"), "--trainer.fast_dev_run", "1", "--data.batch_size", "4"]
    return [["fit", *words, "-c", str(file), *run, *more], ["bench", *words, "-c", str(file), *more]]


def callback(path: str, **args: Any) -> str:
    return yaml.safe_dump({"trainer": {"callbacks+": [{"class_path": path, "init_args": args}]}})


@attack("config", key={
    "lambda": "lightning.pytorch.callbacks.LambdaCallback", "stranger": "evil.Callback",
    "popen": "subprocess.Popen", "torch": "torch.utils.collect_env.run", "requeue": "maskvlm.utils.launch.requeue",
})  # fmt: skip
def a_callback_that_is_none(place: Place, key: str) -> list[list[str]]:
    (place.here / "evil.py").write_text(f"open({place.marker!r}, 'w')\n")
    touch = runs(place)["collect"]
    args = {"lambda": {"setup": touch}, "torch": {"command": f"touch {place.marker}"}}
    chosen = args.get("lambda" if "Lambda" in key else "torch" if "collect" in key else "", {})
    return configured(place, callback(key, **chosen))


@attack("config", how=HOW)
def code_in_a_strategy(place: Place, how: str) -> list[list[str]]:
    strategy = {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "init_args": {"ddp_comm_hook": runs(place)[how]},
    }
    return configured(place, yaml.safe_dump({"trainer": {"strategy": strategy, "devices": 1}}))


@attack("config", how={"subprocess": "subprocess", "collect": "collect"})
def code_where_anything_may_stand(place: Place, how: str) -> list[list[str]]:
    config = {"model": {"backbone": {"init_args": {"image": {"init_args": {"config": {"x": runs(place)[how]}}}}}}}
    return configured(place, yaml.safe_dump(config))


@attack("config", text={
    "object": "run: !!python/object/apply:os.system ['touch MARK']\n", "name": "run: !!python/name:os.system\n",
    "bomb": "a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n",
    "resolver": "run: ${oc.create:${oc.decode:'[1, 2]'}}\n",
    "env": "run: ${oc.env:PATH,${oc.env:HOME}}${oc.decode:x}\n",
})  # fmt: skip
def yaml_of_a_stranger(place: Place, text: str) -> list[list[str]]:
    return configured(place, text.replace("MARK", place.marker))


@attack("config")
def a_task_of_a_stranger(place: Place) -> list[list[str]]:
    (place.here / "evil.py").write_text(f"open({place.marker!r}, 'w')\nclass Task: ...\n")
    return configured(place, yaml.safe_dump({"model": {"task": {"class_path": "evil.Task"}}}))


# ---------------------------------------------------------------------- an index


@attack("index", key={"source": "source", "root": "root", "path": "path"})
def an_index_that_names_things(place: Place, key: str) -> list[list[str]]:
    """Its images are read for re-ranking."""
    import pyarrow.parquet as pq

    index_folder = place.here / "index"
    shutil.copytree(place.here.parent / "index", index_folder)
    about = json.loads((index_folder / "index.json").read_text())
    if key == "source":
        about["source"] = runs(place)["subprocess"]
    elif key == "root":
        about["source"] = {
            "class_path": "maskvlm.data.prepared.source.Prepared",
            "init_args": {"root": str(place.secret)},
        }
    else:
        import hashlib

        table = pq.read_table(index_folder / "ids.parquet").to_pylist()
        schema = pq.read_schema(index_folder / "ids.parquet")
        import pyarrow as pa

        rows = [row | {"path": str(place.secret / "secret.png")} for row in table]
        pq.write_table(pa.Table.from_pylist(rows, schema), index_folder / "ids.parquet")
        about["sha256"]["ids.parquet"] = hashlib.sha256((index_folder / "ids.parquet").read_bytes()).hexdigest()
    (index_folder / "index.json").write_text(json.dumps(about))
    command = ["search", "--index", str(index_folder), "--from", str(OLD / "run" / "last.ckpt")]
    return [[*command, "a red circle", "--rerank"]]


def corpus() -> Iterator[Attack]:
    """All of them."""
    yield from ATTACKS
