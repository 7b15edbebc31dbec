"""What a checkpoint or a folder of the hub's format says is data: nothing of it is built, run, opened or fetched."""

import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attacks
import model_mutators
import numpy
import pytest
import torch
from attacks import EVIL, KINDS, OLD, ROOT, Place, content, good, with_recipe, write
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModel, AutoProcessor
from watching import limited, watched

from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.content import check_parts, problem_of
from maskvlm.checkpoint.hf_folder import write_sums
from maskvlm.checkpoint.pickles import check_pickle
from maskvlm.checkpoint.tokenizer_files import read_tokenizer
from maskvlm.checkpoint.warm_start import read_content
from maskvlm.checkpoint.weights import read_state
from maskvlm.cli.lightning import LightningCommand, run_command
from maskvlm.inference.hf_config import MaskVLMProcessor
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.model.encoders import TextEncoder
from maskvlm.training import lit
from maskvlm.training.checkpoint_io import SafeCheckpointIO
from maskvlm.training.resume_check import check_optimizer
from maskvlm.utils.errors import ExitCode, UserError

CODES = (ExitCode.BAD_DATA, ExitCode.REFUSED, ExitCode.MISSING_INPUT)
load = PretrainedMaskVLM.from_pretrained


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    here = Place(tmp_path / "place")
    here.here.mkdir()
    monkeypatch.syspath_prepend(here.prepare())
    return here


@pytest.fixture
def hub(place: Place) -> Path:
    return good(place, "folder")


def harmless(place: Place, read: Callable[[], Any]) -> UserError | None:
    """What it is refused with, if it is, checked: one line, soon, and nothing ran, was fetched or read elsewhere."""
    refusal = None
    with watched() as deeds, limited(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except UserError as error:
            refusal = error
    assert not place.mark.exists()
    assert EVIL not in sys.modules
    wrong = ("connect", f"read {place.secret}")
    assert [deed for deed in deeds if deed.startswith(wrong) or (deed.startswith("run") and "touch" in deed)] == []
    assert refusal is None or (refusal.code in CODES and "\n" not in str(refusal)), refusal
    return refusal


CASES = [(kind, name) for kind, table in KINDS.items() for name in table]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_no_attack_gets_through(place: Place, kind: str, name: str) -> None:
    """Refused in one line; or what is not read changes nothing."""
    source, loaded = write(kind, name, place), list[Any]()

    def read() -> None:
        loaded.append(TextEncoder(str(source), 12) if kind == "encoder" else load(source))
        if kind == "encoder":
            assert {origin.how for origin in loaded[0].load_pretrained().tensors.values()} == {"loaded"}
        elif kind == "folder":
            loaded.append(AutoProcessor.from_pretrained(source))

    assert bool(harmless(place, read)) is not name.startswith("unread")
    if kind == "encoder" and name.startswith("unread"):
        assert not hasattr(loaded[0].config, "quantization_config")
        assert loaded[0].config._attn_implementation == "sdpa"
    elif kind == "folder" and name.startswith("unread"):
        assert read_content(source)["tokenizer"] == content()["tokenizer"]
        assert loaded[1].tokenizer.mask_token == "[MASK]"


@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if case[0] in ("backbone", "task")][::2])
def test_nor_does_a_recipe_in_a_folder(place: Place, kind: str, name: str) -> None:
    source = write(kind, name, place, as_folder=True)
    assert harmless(place, lambda: load(source))
    assert harmless(place, lambda: AutoModel.from_pretrained(source))


def test_a_tensor_is_plain_numbers_in_memory_of_its_own() -> None:
    """Also where the pickle did not tell."""
    zeros = torch.zeros(3, 3)
    assert problem_of(zeros) is problem_of(torch.nn.Parameter(zeros)) is problem_of(zeros.t()) is None
    odd = (zeros.to_sparse(), zeros.to("meta"), zeros[:1, :1].expand(99, 99), torch.nn.Buffer(zeros).as_subclass(Odd))
    assert all(problem_of(each) for each in odd)
    for value in (2**64, Path("x"), {Path("x"): 1}, frozenset([Path("x")])):
        with pytest.raises(UserError):
            check_parts({"x": [value]}, "x.ckpt")


class Odd(torch.Tensor):
    """A tensor of another type."""


# ---------------------------------------------------------------------- tasks of allowed packages, and sizes

PLUG = """
from torch import nn
from maskvlm.objectives.pretraining import MaskedPretraining

class Mine(MaskedPretraining): ...

class Endless(MaskedPretraining):
    def build(self, backbone):
        super().build(backbone)
        self.more = nn.ModuleList(nn.Linear(1, 1) for _ in range(self.masked_pixels.layers * 4000))
"""


def test_a_task_of_an_allowed_package_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more modules are laid out than there are tensors."""
    (tmp_path / "plug_of_this_test.py").write_text(PLUG)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "x.ckpt"
    with_recipe(path, "task", lambda recipe: recipe.update(class_path="plug_of_this_test.Mine"))
    for allowed in ((), None, ["plug_of"]):
        with pytest.raises(UserError, match="--allow-import plug_of_this_test"):
            load(path, allow_import=allowed)
        assert "plug_of_this_test" not in sys.modules
    load(path, allow_import="plug_of_this_test")
    with_recipe(path, "task", lambda recipe: recipe.update(class_path="plug_of_this_test.Endless"))
    with pytest.raises(UserError, match="asks for a model of more than its"):
        load(path, allow_import=["plug_of_this_test"])


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


def test_what_does_not_fit_the_tensors_gets_no_memory(place: Place, largest: Callable[[], int]) -> None:
    def change(recipe: dict[str, Any]) -> None:
        attacks.text(recipe)["config"] |= {"hidden_size": 1024, "intermediate_size": 1024}
        attacks.image(recipe)["config"]["embed_dim"] = 1024

    path, encoder = good(place, "checkpoint"), good(place, "encoder")
    with_recipe(path, "model", change)
    with pytest.raises(UserError, match="does not fit MaskVLM"):
        load(path)
    attacks.edit(encoder / "config.json", lambda config: config.update(hidden_size=2048, intermediate_size=2048))
    with pytest.raises(UserError, match="its configuration asks for"):
        TextEncoder(str(encoder), 12)
    assert largest() < 1024**2


# ---------------------------------------------------------------------- pickles


def test_bytes_sets_and_sizes_of_a_checkpoint_are_made(tmp_path: Path) -> None:
    value = {"b": b"\x00\xff", "s": {1, 2}, "z": torch.Size([2]), "d": torch.device("cpu"), "t": torch.float16}
    value["p"] = torch.nn.Parameter(torch.ones(2))
    torch.save(value, tmp_path / "x.pth")
    check_pickle(tmp_path / "x.pth")


@pytest.mark.parametrize("value", [numpy.float64(3), Path("x")], ids=["number", "path"])
def test_nobody_is_told_how_to_load_what_could_run_code(tmp_path: Path, value: Any) -> None:
    torch.save({"x": torch.zeros(1), "y": value}, tmp_path / "x.pth")
    for read in (read_state, checkpoint.load):
        with pytest.raises(UserError) as caught:
            read(tmp_path / "x.pth")
        assert caught.value.code == ExitCode.REFUSED
        assert not any(word in str(caught.value) for word in ("weights_only", "trust the source of", "safe_globals"))


def test_sums_in_a_pipe_keep_nobody_waiting(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "x.ckpt")
    os.mkfifo(tmp_path / "x.ckpt.sha256")
    with limited():
        load(tmp_path / "x.ckpt")


# ---------------------------------------------------------------------- resuming


def test_a_state_cannot_have_files_of_others_deleted(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("precious.ckpt", "run/notes.txt"):
        (tmp_path / name).write_text("x")
    for name in ("run/../precious.ckpt", "run/notes.txt"):
        SafeCheckpointIO().remove_checkpoint(f"{tmp_path}/{name}")
    assert (tmp_path / "precious.ckpt").exists()
    assert (tmp_path / "run" / "notes.txt").exists()


RESUMED: list[Callable[[dict[str, Any]], Any]] = [
    lambda held: held.pop("loops"),
    lambda held: held.pop("PairData"),
    lambda held: held["PairData"].pop("batches"),
    lambda held: held.update(optimizer_states=[]),
    lambda held: held["lr_schedulers"][0].update(last_epoch="x"),
    lambda held: held["loops"]["fit_loop"].update({"epoch_progress": 5}),
    lambda held: held.update(callbacks=[]),
]


def test_a_run_goes_on_from_a_whole_state_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):
        pass

    def stop(*arguments: Any) -> None:
        check(*arguments)
        for change in RESUMED:
            held = content()
            change(held)
            with pytest.raises(UserError) as caught:
                check(held, *arguments[1:])
            assert caught.value.code == ExitCode.BAD_DATA
        raise Reached

    check = lit.check_resumable
    monkeypatch.setattr(lit, "check_resumable", stop)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "run", "run")
    with pytest.raises(Reached):
        run_command(LightningCommand, ["fit", "-c", "run/config-fit.yaml", "--run", "run"])


def test_an_optimisers_state_has_the_shapes_and_the_form_of_its_own() -> None:
    """Without this the fused optimiser reads and writes beyond its weights."""
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0]["betas"] = (0.8, 0)  # other numbers of the same form
    check_optimizer([state], optimizer, "x.ckpt")
    for value in (torch.zeros(7), 5, torch.zeros(3, 3)):
        moments = state["state"][0] | {"exp_avg": value}
        with pytest.raises(UserError, match=r"exp_avg expected a tensor \[4, 4\]"):
            check_optimizer([state | {"state": {0: moments}}], optimizer, "x.ckpt")
    for betas in ("x", 0.9, [0.9, 0.999], (0.9,), (0.9, "x")):
        groups = [state["param_groups"][0] | {"betas": betas}]
        with pytest.raises(UserError, match="betas"):
            check_optimizer([state | {"param_groups": groups}], optimizer, "x.ckpt")


# ---------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_every_file_that_is_read_has_its_sum(hub: Path, name: str) -> None:
    write_sums(hub)
    (hub / "README.md").write_text("mine")  # a file for people
    (hub / "processor_config.json").unlink()
    load(hub)
    good = (hub / name).read_bytes()
    (hub / name).write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:] if name.endswith("s") else good + b"\n")
    with pytest.raises(UserError, match=f"{name}: damaged or changed"):
        load(hub)
    (hub / name).unlink()
    with pytest.raises(UserError) as caught:
        load(hub)
    assert caught.value.code == ExitCode.MISSING_INPUT


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in (OLD / "hub").iterdir():
        shutil.copy(file, blobs / f"{file.name}.blob")
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}.blob")
    load(snapshot)


@pytest.mark.parametrize("edits", [
    {"image_mean": [10**400] * 3}, {"image_std": [0, 0, 0]}, {"size": {"height": 4096, "width": 1}}, {"size": 5},
], ids=str)  # fmt: skip
def test_a_processor_is_read_as_data(hub: Path, edits: dict[str, Any]) -> None:
    attacks.edit(hub / "processor_config.json", lambda settings: settings["image_processor"].update(edits))
    with pytest.raises(UserError) as caught:
        MaskVLMProcessor.from_pretrained(hub)
    assert caught.value.code == ExitCode.BAD_DATA


def test_word_lists_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
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


# ---------------------------------------------------------------------- random edits, and all ways in


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 60), marks=pytest.mark.slow)])
def test_any_checkpoint_or_folder_is_a_model_or_one_line(place: Place, seeds: range) -> None:
    good, path, hub = (OLD / "run" / "last.ckpt").read_bytes(), place.here / "x.ckpt", place.here / "hub"
    for seed in seeds:
        rng = random.Random(seed)
        torch.save(model_mutators.checkpoint(content(), rng, str(place.mark)), path)
        harmless(place, lambda: load(path))
        path.write_bytes(model_mutators.raw(good, rng))
        harmless(place, lambda: load(path))
        model_mutators.folder(OLD / "hub", hub, rng, str(place.mark))
        harmless(place, lambda: load(hub))
        shutil.rmtree(hub)


@pytest.mark.slow
def test_nor_through_a_command(tmp_path: Path) -> None:
    """Each command in a process of its own, on some of the attacks."""
    command = [sys.executable, str(ROOT / "tests/security/run_attacks.py"), "--every", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
