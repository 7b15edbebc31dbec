"""What a checkpoint or a folder of the hub's format says is data: each guard, with it and without it."""

import base64
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import model_mutators
import numpy
import pytest
import torch
import yaml
from guards import Build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModel, AutoProcessor

from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.hf_folder import write_sums
from maskvlm.checkpoint.pickles import check_pickle
from maskvlm.checkpoint.tokenizer_files import read_tokenizer
from maskvlm.checkpoint.warm_start import read_content
from maskvlm.checkpoint.weights import read_state
from maskvlm.inference.hf_config import MaskVLMProcessor
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.model.encoders import ImageEncoder, TextEncoder
from maskvlm.training.checkpoint_io import SafeCheckpointIO
from maskvlm.training.resume_check import check_optimizer
from maskvlm.utils.errors import ExitCode, UserError

ROOT = Path(__file__).resolve().parents[2]
OLD = ROOT / "tests" / "fixtures" / "89274c0"


def content() -> dict[str, Any]:
    good_content: dict[str, Any] = torch.load(OLD / "run" / "last.ckpt", weights_only=True)
    return good_content


def refused(source: Path, *codes: ExitCode, **settings: Any) -> str:
    """It is one line with one of these codes; the line."""
    with pytest.raises(UserError) as caught:
        PretrainedMaskVLM.from_pretrained(source, **settings)
    assert caught.value.code in codes, caught.value
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_recipe(path: Path, change: Callable[[dict[str, Any]], Any], key: str = "model") -> Path:
    """A checkpoint whose recipe is changed."""
    held = content()
    recipe = yaml.safe_load(held[key])
    change(recipe["model"]["backbone"]["init_args"] if key == "model" else recipe)
    torch.save(held | {key: yaml.safe_dump(recipe)}, path)
    return path


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD / "hub", tmp_path / "hub"))


# ---------------------------------------------------------------------- the recipe


@pytest.mark.guard("maskvlm.config.plain_schema:Record.read", gives="args[1]")
@pytest.mark.parametrize("value", [
    {"class_path": "torch.utils.collect_env.run", "init_args": {"command": "touch x"}}, ["os.system"], "x", 10**12, -1,
])  # fmt: skip
def test_a_setting_is_a_plain_value_in_its_range(build: Build, tmp_path: Path, value: Any) -> None:
    path = with_recipe(tmp_path / "x.ckpt", lambda args: args.update(cross_layers=value))
    assert "cross_layers: expected a whole number from 1 to" in refused(path, ExitCode.REFUSED)


@pytest.mark.guard("maskvlm.config.plain_schema:Record.read", gives="args[1]")
@pytest.mark.parametrize(
    "key", ["checkpoint_path", "pretrained_cfg", "pretrained", "cache_dir", "act_layer", "img_size"]
)
def test_a_setting_that_is_not_of_the_shape_is_not_known(build: Build, tmp_path: Path, key: str) -> None:
    path = with_recipe(tmp_path / "x.ckpt", lambda args: args["image"]["init_args"]["config"].update({key: None}))
    assert f"the key '{key}' is not known here" in refused(path, ExitCode.REFUSED)
    with pytest.raises(UserError, match="is not known here"):  # nor may a training set what could not be loaded again
        ImageEncoder("vit_tiny_patch16_224", 64, random_init=True, config={key: None})


@pytest.mark.guard("maskvlm.config.plain_schema:Record.read", gives="args[1]")
@pytest.mark.parametrize(("part", "key"), [("image", "weights"), ("text", "tokenizer")])
def test_a_file_is_not_named(build: Build, tmp_path: Path, part: str, key: str) -> None:
    path = with_recipe(tmp_path / "x.ckpt", lambda args: args[part]["init_args"].update({key: "/etc/passwd"}))
    assert f"{key}: expected nothing, found '/etc/passwd'" in refused(path, ExitCode.REFUSED)


@pytest.mark.guard(
    "maskvlm.inference.rebuild:class_of",
    gives="getattr(__import__(args[0].rpartition('.')[0]), args[0].rpartition('.')[2])",
)
def test_a_task_of_a_package_that_nobody_allowed_is_not_imported(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_of_this_test.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Task: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil_of_this_test", raising=False)
    path = with_recipe(tmp_path / "x.ckpt", lambda recipe: recipe.update(class_path="evil_of_this_test.Task"), "task")
    assert "--allow-import evil_of_this_test" in refused(path, ExitCode.REFUSED)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "name",
    [
        "maskvlm.utils.launch.requeue",
        "maskvlm.objectives.pretraining.PretrainingMetrics",
        "tasks.vqa.score.main",
        "os.system",
    ],
)
def test_what_is_no_task_is_refused(tmp_path: Path, name: str) -> None:
    refused(with_recipe(tmp_path / "x.ckpt", lambda recipe: recipe.update(class_path=name), "task"), ExitCode.REFUSED)


PARTS_OF_STRANGERS = [
    {"class_path": "evil_of_this_test.Task"},
    {"class_path": "os.system", "init_args": {"command": "touch marker"}},
    {"class_path": "maskvlm.objectives.pretraining_losses.PretrainingLoss"},  # abstract
    {"class_path": "maskvlm.objectives.masking.RandomBlocks"},  # another kind of part than `losses` takes
    {"class_path": "maskvlm.objectives.pretraining_losses.WordsPresent", "init_args": {"weight": "__import__('os')"}},
    {"class_path": "maskvlm.objectives.pretraining_losses.WordsPresent", "more": 1},
    "maskvlm.objectives.pretraining_losses.WordsPresent",
    7,
]


@pytest.mark.parametrize("part", PARTS_OF_STRANGERS, ids=str)
def test_a_part_of_a_task_that_nobody_allowed_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Any
) -> None:
    (tmp_path / "evil_of_this_test.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Task: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "evil_of_this_test", raising=False)
    for where in ({"losses": [part]}, {"losses": part}, {"image_masking": part}, {"text_masking": part}):
        if part == PARTS_OF_STRANGERS[3] and "image_masking" in where:
            continue
        change = where.items()
        path = with_recipe(
            tmp_path / "x.ckpt", lambda recipe, change=change: recipe["init_args"].update(change), "task"
        )
        refused(path, ExitCode.REFUSED, ExitCode.BAD_DATA)
        assert not (tmp_path / "marker").exists()


PLUG = """
from torch import nn
from maskvlm.objectives.pretraining import MaskedPretraining

class Endless(MaskedPretraining):
    def build(self, backbone):
        super().build(backbone)
        self.more = nn.ModuleList(nn.Linear(1, 1) for _ in range(self.masked_pixels.layers * 4000))
"""


def test_a_task_of_an_allowed_package_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_of_this_test.py").write_text(
        "from maskvlm.objectives.pretraining import MaskedPretraining as Mine\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = with_recipe(tmp_path / "x.ckpt", lambda recipe: recipe.update(class_path="acme_of_this_test.Mine"), "task")
    PretrainedMaskVLM.from_pretrained(path, allow_import=["acme_of_this_test"])
    PretrainedMaskVLM.from_pretrained(path, allow_import="acme_of_this_test")
    refused(path, ExitCode.REFUSED)
    refused(path, ExitCode.REFUSED, allow_import=None)


# ---------------------------------------------------------------------- sizes


@pytest.mark.guard("maskvlm.inference.rebuild:at_most", gives="__import__('contextlib').nullcontext()")
def test_no_more_modules_are_laid_out_than_there_are_tensors(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plug_of_this_test.py").write_text(PLUG)
    monkeypatch.syspath_prepend(tmp_path)
    path = with_recipe(
        tmp_path / "x.ckpt", lambda recipe: recipe.update(class_path="plug_of_this_test.Endless"), "task"
    )
    message = refused(path, ExitCode.REFUSED, allow_import=["plug_of_this_test"])
    assert "asks for a model of more than its" in message


@pytest.fixture
def largest() -> Iterator[Callable[[], int]]:
    """Numbers of the largest parameter that got memory."""
    maximum = [0]

    def note(module: Any, name: str, value: Any) -> None:
        if value is not None and value.device.type != "meta":
            maximum[0] = max(maximum[0], value.numel())

    handle = register_module_parameter_registration_hook(note)
    yield lambda: maximum[0]
    handle.remove()


@pytest.mark.guard("maskvlm.inference.rebuild:check_model_size")
def test_what_does_not_fit_the_tensors_gets_no_memory(build: Build, tmp_path: Path, largest: Callable[[], int]) -> None:
    def change(args: dict[str, Any]) -> None:
        args["text"]["init_args"]["config"] |= {"hidden_size": 1024, "intermediate_size": 1024}
        args["image"]["init_args"]["config"]["embed_dim"] = 1024

    assert "does not fit MaskVLM" in refused(with_recipe(tmp_path / "x.ckpt", change), ExitCode.BAD_DATA)
    assert largest() < 1024**2


# ---------------------------------------------------------------------- the content


def doubled(times: int) -> list[Any]:
    tree: list[Any] = [0]
    for _ in range(times):
        tree = [tree, tree]
    return tree


def looped() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.guard("maskvlm.checkpoint.content:check_parts")
@pytest.mark.parametrize("make", [
    lambda: doubled(60), looped, lambda: torch.zeros(1).expand(10**12),
], ids=["doubled", "looped", "expanded"])  # fmt: skip
def test_the_content_is_bounded_and_plain(build: Build, tmp_path: Path, make: Callable[[], Any]) -> None:
    torch.save(content() | {"callbacks": {"x": make()}}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", ExitCode.BAD_DATA, ExitCode.REFUSED)


@pytest.mark.guard("maskvlm.checkpoint.content:check_content", gives="args[0]")
@pytest.mark.parametrize("change", [
    {"labels": torch.zeros(3, dtype=torch.long)}, {"labels": ["a", 5]}, {"lineage": 5}, {"lineage": [{"task": "x"}]},
    {"schema": "x"}, {"schema": 99}, {"global_step": "many"}, {"model": 7}, {"tokenizer": ["x"]}, {"state_dict": 5},
    {"state_dict": {"x": torch.zeros(2, dtype=torch.complex64)}}, {"state_dict": {5: torch.zeros(1)}},
], ids=lambda change: next(iter(change)))  # fmt: skip
def test_each_part_of_the_content_has_its_kind(build: Build, tmp_path: Path, change: dict[str, Any]) -> None:
    torch.save(content() | change, tmp_path / "x.ckpt")
    key = next(iter(change))
    message = refused(tmp_path / "x.ckpt", ExitCode.BAD_DATA)
    assert f"x.ckpt: {key}" in message or "was written in format 99, this version reads up to" in message


@pytest.mark.guard("maskvlm.checkpoint.integrity:_check_archive")
def test_members_that_overlap_are_refused_before_they_are_read(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save(content(), path)
    with zipfile.ZipFile(path) as archive:
        big = max(archive.infolist(), key=lambda info: info.file_size)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(500):
            twin = zipfile.ZipInfo(f"{big.filename}{number}")
            twin.header_offset, twin.CRC = big.header_offset, big.CRC
            twin.file_size = twin.compress_size = big.file_size
            archive.filelist.append(twin)
        archive._didModify = True  # type: ignore[attr-defined]
    assert "overlap" in refused(path, ExitCode.BAD_DATA)


@pytest.mark.guard(
    "maskvlm.training.checkpoint_io:SafeCheckpointIO.remove_checkpoint", gives="__import__('os').remove(args[1])"
)
def test_a_state_cannot_have_files_of_others_deleted(build: Build, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("precious.ckpt", "run/notes.txt"):
        (tmp_path / name).write_text("x")
    io_plugin = SafeCheckpointIO()
    for name in ("run/../precious.ckpt", "run/notes.txt"):
        io_plugin.remove_checkpoint(f"{tmp_path}/{name}")
    assert (tmp_path / "precious.ckpt").exists()
    assert (tmp_path / "run" / "notes.txt").exists()


# ---------------------------------------------------------------------- resuming


def without(held: dict[str, Any], *keys: str) -> None:
    for key in keys[:-1]:
        held = held[key]
    del held[keys[-1]]


@pytest.mark.guard("maskvlm.training.resume_check:check_resumable")
@pytest.mark.parametrize("change", [
    lambda held: without(held, "loops"), lambda held: without(held, "PairData"),
    lambda held: without(held, "PairData", "batches"), lambda held: held.update(optimizer_states=[]),
    lambda held: held["lr_schedulers"][0].update(last_epoch="x"),
    lambda held: held["loops"]["fit_loop"].update({"epoch_progress": 5}), lambda held: held.update(callbacks=[]),
], ids=["loops", "data", "batches", "optimiser", "schedule", "progress", "callbacks"])  # fmt: skip
def test_a_run_goes_on_from_a_whole_state_alone(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], Any]
) -> None:
    from maskvlm.cli.lightning import LightningCommand, run_command

    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "run", "run")
    held = content()
    change(held)
    torch.save(held, "run/last.ckpt")
    Path("run/last.ckpt.sha256").unlink()
    with pytest.raises(UserError) as caught:
        run_command(LightningCommand, ["fit", "-c", "run/config-fit.yaml", "--run", "run"])
    assert caught.value.code == ExitCode.BAD_DATA


@pytest.mark.parametrize("value", [torch.zeros(7), 5, torch.zeros(3, 3)], ids=["length", "number", "matrix"])
def test_an_optimisers_state_has_the_shapes_of_its_weights(value: Any) -> None:
    """Without this the fused optimiser reads and writes beyond them."""
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    state = optimizer.state_dict()
    check_optimizer([state], torch.optim.AdamW([weight]), "x.ckpt")
    state["state"][0]["exp_avg"] = value
    with pytest.raises(UserError, match=r"state\[0\].exp_avg expected a tensor \[4, 4\]"):
        check_optimizer([state], torch.optim.AdamW([weight]), "x.ckpt")


@pytest.mark.parametrize("value", ["x", 0.9, [0.9, 0.999], (0.9,), (0.9, "x"), ()])
def test_an_optimisers_settings_are_of_the_form_that_the_run_has(value: Any) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4, 4))])
    state = optimizer.state_dict()
    state["param_groups"][0]["betas"] = (0.8, 0)  # other numbers of the same form
    check_optimizer([state], optimizer, "x.ckpt")
    state["param_groups"][0]["betas"] = value
    with pytest.raises(
        UserError, match=r"groups\[0\]\.betas.*: holds no state that a run can resume from \(expected a "
    ):
        check_optimizer([state], optimizer, "x.ckpt")


# ---------------------------------------------------------------------- folders


@pytest.mark.guard("maskvlm.checkpoint.hf_folder:check_sums")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json"])
def test_every_file_that_is_read_has_its_sum(build: Build, hub: Path, name: str) -> None:
    write_sums(hub)
    PretrainedMaskVLM.from_pretrained(hub)
    good = (hub / name).read_bytes()
    changed = good.replace(b'"num_attention_heads": 2', b'"num_attention_heads": 4').replace(b'"red"', b'"rad"')
    if changed == good:
        changed = good[:-9] + bytes([good[-9] ^ 1]) + good[-8:] if name.endswith("safetensors") else good + b"\n"
    (hub / name).write_bytes(changed)
    assert f"{name}: damaged or changed" in refused(hub, ExitCode.BAD_DATA)


def test_files_for_people_may_be_gone_or_changed(hub: Path) -> None:
    write_sums(hub)
    (hub / "README.md").write_text("mine")
    for name in ("lineage.safetensors", "processor_config.json"):
        (hub / name).unlink()
    PretrainedMaskVLM.from_pretrained(hub)
    (hub / "tokenizer.json").unlink()
    refused(hub, ExitCode.MISSING_INPUT)


@pytest.mark.guard("maskvlm.utils.whole_files:check_inside")
@pytest.mark.parametrize("name", ["config.json", "special_tokens_map.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_not_followed(build: Build, hub: Path, tmp_path: Path, name: str) -> None:
    (hub / "checksums.json").unlink()
    (tmp_path / name).write_bytes((hub / name).read_bytes() if (hub / name).exists() else b"{}")
    (hub / name).unlink(missing_ok=True)
    (hub / name).symlink_to(tmp_path / name)
    assert "leads out of its folder" in refused(hub, ExitCode.REFUSED)


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in (OLD / "hub").iterdir():
        shutil.copy(file, blobs / f"{file.name}.blob")
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}.blob")
    PretrainedMaskVLM.from_pretrained(snapshot)


@pytest.mark.parametrize("edits", [
    {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"},
    {"tokenizer_class": "MBartTokenizer", "chat_template": "{{ 1 / 0 }}"},
    {"mask_token": 5, "pad_token": {"content": ["x"]}, "extra_special_tokens": {"a": 1}},
])  # fmt: skip
def test_of_a_tokenizers_settings_texts_alone_are_read(hub: Path, edits: dict[str, Any]) -> None:
    (hub / "checksums.json").unlink()
    file = hub / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edits))
    assert read_content(hub)["tokenizer"] == content()["tokenizer"]
    assert AutoProcessor.from_pretrained(hub).tokenizer.mask_token == "[MASK]"


@pytest.mark.guard("maskvlm.model.hf_text:check_tokenizer")
def test_a_tokenizer_gives_no_token_that_the_model_lacks(build: Build, hub: Path) -> None:
    (hub / "checksums.json").unlink()
    tokenizer = json.loads((hub / "tokenizer.json").read_text())
    assert tokenizer["post_processor"]["type"] == "BertProcessing"
    tokenizer["post_processor"]["cls"][1] = 99_999
    (hub / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "it gives token 99999" in refused(hub, ExitCode.BAD_DATA)


@pytest.mark.parametrize("edits", [
    {"image_mean": [10**400] * 3}, {"image_std": [0, 0, 0]}, {"size": {"height": 4096, "width": 1}}, {"size": 5},
], ids=["long", "zero", "uneven", "kind"])  # fmt: skip
def test_a_processor_is_read_as_data(hub: Path, edits: dict[str, Any]) -> None:
    (hub / "checksums.json").unlink()
    file = hub / "processor_config.json"
    images = json.loads(file.read_text())["image_processor"]
    file.write_text(json.dumps({"image_processor": images | edits, "processor_class": "MaskVLMProcessor"}))
    with pytest.raises(UserError) as caught:
        MaskVLMProcessor.from_pretrained(hub)
    assert caught.value.code == ExitCode.BAD_DATA


def test_a_type_that_fetches_code_is_refused(tmp_path: Path) -> None:
    path = with_recipe(tmp_path / "x.ckpt", lambda args: args["text"]["init_args"].update(name="yoso"))
    assert "expected a type of text encoder" in refused(path, ExitCode.REFUSED)


def test_auto_classes_refuse_what_from_pretrained_refuses(hub: Path) -> None:
    (hub / "checksums.json").unlink()
    config = json.loads((hub / "config.json").read_text())
    config["backbone"]["init_args"]["image"]["init_args"]["config"]["pretrained_cfg"] = {"file": "/etc/passwd"}
    (hub / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="pretrained_cfg"):
        AutoModel.from_pretrained(hub)


def charsmap(longest: int) -> str:
    """A `precompiled_charsmap` without a rule, which could put a text of this length in the place of a character."""
    return base64.b64encode(struct.pack("<I", 4) + bytes(4) + b"a\0" + longest * b"b" + b"\0").decode()


def inserting(times: int) -> dict[str, Any]:
    rule = {"type": "Replace", "pattern": {"Regex": "(?=.)"}, "content": "y"}
    return {"normalizer": {"type": "Sequence", "normalizers": [rule] * times}}


def doubling(times: int) -> dict[str, Any]:
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"normalizer": {"type": "Sequence", "normalizers": [rule] * times}}


@pytest.mark.parametrize("change", [
    doubling(30), {"normalizer": {"type": "Prepend", "prepend": "a" * 10_000}},
    {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "no", "type_id": 0}}],
                        "pair": [], "special_tokens": {}}},
    inserting(9), {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(300)}},
], ids=["doubling", "prepend", "panic", "inserting", "precompiled"])  # fmt: skip
def test_the_rules_of_a_tokenizer_are_bounded(hub: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    (hub / "checksums.json").unlink()
    tokenizer = json.loads((hub / "tokenizer.json").read_text())
    (hub / "tokenizer.json").write_text(json.dumps(tokenizer | change))
    refused(hub, ExitCode.BAD_DATA)
    stored = json.loads(content()["tokenizer"])
    torch.save(content() | {"tokenizer": json.dumps(stored | {"tokenizer": tokenizer | change})}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", ExitCode.BAD_DATA)


def test_padding_and_cutting_of_a_tokenizer_are_not_read(hub: Path) -> None:
    (hub / "checksums.json").unlink()
    tokenizer = json.loads((hub / "tokenizer.json").read_text())
    tokenizer["padding"] = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                       "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip
    (hub / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert read_content(hub)["tokenizer"] == content()["tokenizer"]


def test_a_role_that_is_none_is_refused(tmp_path: Path) -> None:
    stored = json.loads(content()["tokenizer"])
    stored["special"]["tokenizer_object"] = "[MASK]"
    torch.save(content() | {"tokenizer": json.dumps(stored)}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", ExitCode.BAD_DATA)


def nested(times: int) -> Any:
    key: Any = (0,)
    for _ in range(times):
        key = (key, key)
    return {key: 1}


@pytest.mark.guard("maskvlm.checkpoint.integrity:check_pickle")
@pytest.mark.parametrize(
    "value",
    [nested(8), bytearray(9), torch.empty(9, device="meta"), torch.zeros(3).to_sparse()],
    ids=["key", "bytearray", "meta", "sparse"],
)
def test_a_pickle_that_asks_for_much_is_not_unpickled(build: Build, tmp_path: Path, value: Any) -> None:
    torch.save(content() | {"callbacks": {}, "x": [value]}, tmp_path / "x.ckpt")
    message = refused(tmp_path / "x.ckpt", ExitCode.REFUSED)
    assert "nested more than" in message or "which no checkpoint needs" in message


def pickled(value: bytes) -> bytes:
    """A checkpoint's pickle whose state is one value."""
    return b"\x80\x02}(X\x0a\x00\x00\x00state_dict}X\x01\x00\x00\x00x" + value + b"su."


NUMBER = b"J\x00\x2e\xb9\x05"  # 96 million
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0atQ"
WIDE = (
    b"ctorch._utils\n_rebuild_tensor_v2\n("
    + STORAGE
    + b"K\x00"
    + NUMBER
    + b"\x85K\x00\x85\x89ccollections\nOrderedDict\n)RtR"
)
BOMBS = {
    "called by another": b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nbytearray\ncbuiltins\nbytearray\n"
    + NUMBER
    + b"\x85}tR",
    "copied": b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n("
    + WIDE
    + b"ctorch\nfloat64\nX\x03\x00\x00\x00cpu\x89tR",
    "doubled": 20 * b"c_codecs\nencode\n"
    + b"X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R"
    + 19 * b"X\x03\x00\x00\x00hex\x86R",
}


@pytest.mark.parametrize("kind", sorted(BOMBS))
def test_no_call_that_grows_is_made(tmp_path: Path, kind: str) -> None:
    torch.save({"state_dict": {"a": torch.zeros(10)}}, tmp_path / "good.ckpt")
    with zipfile.ZipFile(tmp_path / "good.ckpt") as good, zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        for info in good.infolist():
            content = pickled(BOMBS[kind]) if info.filename.endswith("data.pkl") else good.read(info)
            archive.writestr(info.filename, content)
    assert "which no checkpoint needs" in refused(tmp_path / "x.ckpt", ExitCode.REFUSED)


def test_bytes_sets_and_sizes_of_a_checkpoint_are_made(tmp_path: Path) -> None:
    value = {"b": b"\x00\xff", "s": {1, 2}, "z": torch.Size([2]), "d": torch.device("cpu"), "t": torch.float16}
    value["p"] = torch.nn.Parameter(torch.ones(2))
    torch.save(value, tmp_path / "x.pth")
    check_pickle(tmp_path / "x.pth")


def test_tensors_of_a_state_do_not_share_one_storage(tmp_path: Path) -> None:
    """A model of gigabytes would come of a file of megabytes."""
    held = content()
    largest = max(value.numel() for value in held["state_dict"].values())
    shared = torch.zeros(largest)
    state = {name: shared[: value.numel()].view(value.shape) for name, value in held["state_dict"].items()}
    torch.save(held | {"state_dict": state}, tmp_path / "x.ckpt")
    assert "tensors of" in refused(tmp_path / "x.ckpt", ExitCode.REFUSED)


def test_attributes_of_a_container_are_not_taken(tmp_path: Path) -> None:
    from collections import OrderedDict

    odd = OrderedDict(content()["state_dict"])
    odd.values = 5  # type: ignore[assignment, method-assign]
    torch.save(content() | {"state_dict": odd}, tmp_path / "x.ckpt")
    assert "attributes of its own" in refused(tmp_path / "x.ckpt", ExitCode.REFUSED)


def test_sums_in_a_pipe_keep_nobody_waiting(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "x.ckpt")
    os.mkfifo(tmp_path / "x.ckpt.sha256")
    PretrainedMaskVLM.from_pretrained(tmp_path / "x.ckpt")


def test_a_fine_tuned_retrieval_takes_the_width_of_its_contrast_from_the_checkpoint(tmp_path: Path) -> None:
    """`contrast_dim` is left out of its settings: 8 here, 256 without a checkpoint."""
    held = content()
    named = ("projection.", "matching.")
    state = {n: v for n, v in held["state_dict"].items() if not n.startswith("task.") or n[5:].startswith(named)}
    task_spec = {"class_path": "tasks.retrieval.task.Retrieval", "init_args": {}}
    torch.save(held | {"state_dict": state, "task": yaml.safe_dump(task_spec)}, tmp_path / "x.ckpt")
    model = PretrainedMaskVLM.from_pretrained(tmp_path / "x.ckpt")
    assert model.task.projection.image.out_features == 8
    model.save_pretrained(tmp_path / "hub")
    PretrainedMaskVLM.from_pretrained(tmp_path / "hub")


# ---------------------------------------------------------------------- encoders of strangers


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    folder = tmp_path / "encoder"
    BertModel(BertConfig(vocab_size=256, **shape)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(OLD / "hub" / name, folder)
    return folder


def spoilt(encoder: Path, **edits: Any) -> Path:
    file = encoder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edits))
    return encoder


def test_an_encoder_of_a_stranger_brings_numbers_alone(encoder: Path) -> None:
    spoilt(
        encoder,
        quantization_config={"quant_method": "gptq"},
        auto_map={"AutoModel": "evil.M"},
        attn_implementation="x/y",
    )
    text_encoder = TextEncoder(str(encoder), 12)
    assert {origin.how for origin in text_encoder.load_pretrained().tensors.values()} == {"loaded"}
    assert not hasattr(text_encoder.config, "quantization_config")
    assert text_encoder.config._attn_implementation == "sdpa"


@pytest.mark.guard("maskvlm.checkpoint.text_files:check_memory")
def test_an_encoder_is_not_larger_than_its_weights(build: Build, encoder: Path, largest: Callable[[], int]) -> None:
    spoilt(encoder, hidden_size=2048, intermediate_size=2048)
    with pytest.raises(UserError, match="its configuration asks for") as caught:
        TextEncoder(str(encoder), 12)
    assert caught.value.code == ExitCode.REFUSED
    assert largest() < 2048**2


@pytest.mark.guard("maskvlm.utils.whole_files:check_inside")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_link_out_of_an_encoders_folder_is_not_followed(
    build: Build, encoder: Path, tmp_path: Path, name: str
) -> None:
    shutil.move(encoder / name, tmp_path / name)
    (encoder / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match="leads out of its folder") as caught:
        TextEncoder(str(encoder), 12).load_pretrained()
    assert caught.value.code == ExitCode.REFUSED


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "evil.pkl"])
def test_an_index_of_weights_names_files_beside_it(encoder: Path, name: str) -> None:
    (encoder / "model.safetensors").unlink()
    (encoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match="which is not a weights file beside it") as caught:
        TextEncoder(str(encoder), 12).load_pretrained()
    assert caught.value.code == ExitCode.REFUSED


def test_a_word_list_is_read_as_transformers_reads_it(encoder: Path, shared_data: Path) -> None:
    from transformers import RobertaTokenizerFast

    folder = shared_data / "roberta_vocab"
    ours, theirs = read_tokenizer(folder), RobertaTokenizerFast.from_pretrained(folder)
    assert ours is not None
    for text in ("A man rides a horse.", "it's here, 2 dogs!", "  two  spaces", "Ünïcödé 🐕"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_berts_word_list_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "run", ".", "caf", "##e"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    ours, theirs = read_tokenizer(tmp_path), BertTokenizerFast(str(tmp_path / "vocab.txt"))
    assert ours is not None
    for text in ("A dog runs.", "café [MASK] dogs", "zebra"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = read_tokenizer(tmp_path)
    assert cased is not None
    assert cased("A")["input_ids"] == [2, 1, 3]


@pytest.mark.guard("maskvlm.checkpoint.integrity:refused_imports", gives="str(args[0])")
@pytest.mark.parametrize("value", [numpy.float64(3), Path("x")], ids=["number", "path"])
def test_nobody_is_told_how_to_load_what_could_run_code(build: Build, tmp_path: Path, value: Any) -> None:
    torch.save({"x": torch.zeros(1), "y": value}, tmp_path / "x.pth")
    for read in (read_state, checkpoint.load):
        with pytest.raises(UserError) as caught:
            read(tmp_path / "x.pth")
        assert caught.value.code == ExitCode.REFUSED
        assert not any(word in str(caught.value) for word in ("weights_only", "trust the source of", "safe_globals"))


# ---------------------------------------------------------------------- random edits


def answers_or_one_line(source: Path) -> None:
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            PretrainedMaskVLM.from_pretrained(source)
            refusal = None
        except UserError as error:
            refusal = error
    assert refusal is None or "\n" not in str(refusal)
    assert refusal is None or refusal.code in (ExitCode.BAD_DATA, ExitCode.REFUSED, ExitCode.MISSING_INPUT)
    assert time.monotonic() - began < 10


MANY = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@MANY
@given(seed=st.integers(0, 2**32))
def test_any_checkpoint_is_a_model_or_one_line(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("edited")
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model_mutators.checkpoint(content(), rng, str(folder / "marker")), buffer)
    data = buffer.getvalue()
    (folder / "x.ckpt").write_bytes(model_mutators.raw(data, rng) if rng.random() < 0.2 else data)
    answers_or_one_line(folder / "x.ckpt")
    assert not (folder / "marker").exists()


@MANY
@given(seed=st.integers(0, 2**32))
def test_any_folder_is_a_model_or_one_line(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("edited")
    model_mutators.folder(OLD / "hub", folder / "hub", random.Random(seed), str(folder / "marker"))
    answers_or_one_line(folder / "hub")
    assert not (folder / "marker").exists()


# ---------------------------------------------------------------------- the corpus


@pytest.mark.slow
def test_no_attack_gets_through(tmp_path: Path) -> None:
    """Each by one way in. Against commit 89274c0 a third of them get through (`--tree`)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "tests/security/run_attacks.py"),
        "--ways",
        "1",
        "--json",
        str(tmp_path / "x"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert len({each["attack"] for each in json.loads((tmp_path / "x").read_text())}) >= 60
