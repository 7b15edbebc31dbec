"""Rows 24, 25, 28, 34, 38, 42, 43, 64, D2 and D15: what no other file of tests holds. Real files, all of them tiny."""

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from guards import Build
from PIL import Image
from torch import nn
from transformers import BertConfig

from maskvlm.checkpoint.io import load, save
from maskvlm.cli.lightning import LightningCommand, Parsed, run_command
from maskvlm.data.batch import InputSpec
from maskvlm.data.example_sets import CollateExamples, EvalExamples
from maskvlm.data.module import PairData
from maskvlm.data.prepare.rows import screened
from maskvlm.data.raw import BadRow, RawRow, open_raw
from maskvlm.data.streaming.remote import read_shards
from maskvlm.data.text import Captioner, tokenizer_from_json, tokenizer_hash, train_tokenizer
from maskvlm.data.transforms import eval_transform
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.model.encoders import TextEncoder
from maskvlm.objectives.answers import ScoredExamples
from maskvlm.training.checkpoint_io import SafeCheckpointIO
from maskvlm.utils.errors import ExitCode, UserError
from tasks.entailment.scenes import SceneHypotheses
from tasks.vqa.data import VqaV2

OLD = Path(__file__).resolve().parents[1] / "fixtures" / "89274c0"


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.guard("maskvlm.model.encoders:tokenizer_hash", gives="'the same'")
def test_a_run_does_not_go_on_with_another_tokenizer_of_the_same_size(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 24. Two words have changed places: every tensor fits, and every caption would mean something else."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "run", "run")
    content = load("run/last.ckpt")
    record = json.loads(content["tokenizer"])
    words = record["tokenizer"]["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    other = json.dumps(record)
    ours, theirs = (tokenizer_from_json(text) for text in (content["tokenizer"], other))
    assert len(ours) == len(theirs)
    save(content | {"tokenizer": other}, "run/last.ckpt")
    with pytest.raises(UserError) as caught:
        run_command(LightningCommand, ["fit", "-c", "run/config-fit.yaml", "--run", "run"])
    size = f"({len(ours)} entries)"
    assert caught.value.what == (
        f"tokenizer {tokenizer_hash(theirs)} {size} differs from the model's, {tokenizer_hash(ours)} {size}"
    )
    assert caught.value.code == ExitCode.BAD_DATA


@pytest.mark.guard("maskvlm.training.checkpoint_io:check_version")
@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("9.9.9", "its state was written by Lightning 9.9.9, this is "),
        ("not a version", "does not give a version of Lightning ('not a version')"),
        (None, "does not give a version of Lightning ('')"),
    ],
)
def test_the_state_of_a_later_lightning_is_refused(
    build: Build, tmp_path: Path, version: str | None, message: str
) -> None:
    """Row 25. Its weights are taken all the same: they do not depend on Lightning."""
    content = load(OLD / "run" / "last.ckpt")
    content.pop("pytorch-lightning_version")
    path = tmp_path / "x.ckpt"
    save(content | ({} if version is None else {"pytorch-lightning_version": version}), path)
    with pytest.raises(UserError) as caught:
        SafeCheckpointIO().load_checkpoint(path)
    assert message in caught.value.what
    assert "--from this checkpoint" in caught.value.todo
    assert caught.value.code == ExitCode.BAD_DATA
    assert load(path)["global_step"] == 3


def test_an_exported_program_is_no_checkpoint(tmp_path: Path) -> None:
    """Row 28. `torch.export.load` unpickles with everything allowed; nothing here calls it."""
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    for name in ("x.pt2", "x.ckpt"):
        torch.export.save(program, tmp_path / name)
        for read in (load, PretrainedMaskVLM.from_pretrained):
            with pytest.raises(UserError) as caught:
                read(tmp_path / name)
            assert caught.value.code in (ExitCode.BAD_DATA, ExitCode.REFUSED)
            assert "\n" not in str(caught.value)


class Mark:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_refused_weights_come_without_advice_to_load_them_all_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """D15. torch's own text names the switch that would run the file."""
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertConfig(vocab_size=60, **settings).save_pretrained(tmp_path)
    train_tokenizer(["a red dog"], 60).save_pretrained(tmp_path)
    torch.save({"weight": torch.zeros(2), "hook": Mark(tmp_path / "mark")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        TextEncoder(str(tmp_path), 12).load_pretrained()
    assert caught.value.code == ExitCode.REFUSED
    assert "mkdir" in caught.value.what
    output = "".join([str(caught.value), *capfd.readouterr(), caplog.text])
    assert not any(word in output for word in ("weights_only", "add_safe_globals", "Traceback"))
    assert not (tmp_path / "mark").exists()


# ---------------------------------------------------------------------- data


@pytest.mark.guard("maskvlm.utils.errors:Absent.check")
def test_all_that_is_missing_is_told_at_once(build: Build, tmp_path: Path) -> None:
    """Row 34: of both splits, questions and annotations alike, in one line."""
    spec = InputSpec(24, (0.5,) * 3, (0.5,) * 3, 30, 200)
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text('{"annotations": []}')
    source = VqaV2(str(tmp_path), train=["mscoco_train2014", "mscoco_more2014"], val="mscoco_val2014")
    data = PairData(source, spec, steps=1)
    with pytest.raises(UserError) as caught:
        data.setup("fit")
    message = str(caught.value)
    parts = ("mscoco_train2014", "mscoco_more2014")
    absent = [*(f"v2_OpenEnded_{part}_questions.json" for part in (*parts, "mscoco_val2014"))]
    absent += [f"v2_{part}_annotations.json" for part in parts]
    assert all(message.count(name) == 1 for name in absent)
    assert "v2_mscoco_val2014_annotations.json" not in message
    assert "\n" not in message
    assert caught.value.code == ExitCode.MISSING_INPUT


def toy_image(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), colour).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_a_pickle_in_a_shard_is_passed_over(tmp_path: Path) -> None:
    """Row 42. Prepared and streamed; the sample that it lies in is used without it."""
    evil, folder = pickle.dumps(Mark(tmp_path / "mark")), tmp_path / "raw"
    folder.mkdir()
    endings = ("pyd", "pkl", "pickle", "pth", "pt", "npy")
    shard(
        folder / "0.tar",
        *((f"0.{ending}", evil) for ending in endings),
        ("0.png", toy_image()),
        ("0.txt", b"a red square"),
        ("1.png", evil),
        ("1.txt", b"a pickle by another name"),
        ("2.txt", b"no image"),
        ("2.pyd", evil),
    )
    rows = [*open_raw("webdataset", str(folder)).rows()]
    kinds = [row.reason if isinstance(row, BadRow) else row.captions for row in rows]
    assert kinds == [("a red square",), ("a pickle by another name",), "no image"]  # opened later, as an image
    streamed = [*read_shards([str(folder / "0.tar")], "toy")]
    assert [row["problem"] and row["problem"][0] for row in streamed] == [None, None, "no image"]
    assert not (tmp_path / "mark").exists()


def test_members_of_a_sample_come_in_any_order_and_parts_alone_are_told(tmp_path: Path) -> None:
    """Row 43: each with its key, also where another shard has the same one."""
    shard(tmp_path / "0.tar", ("0.txt", b"words first"), ("0.png", toy_image()), ("1.png", toy_image()))
    shard(tmp_path / "1.tar", ("0.txt", b"no image"), ("1.txt", b"another one"), ("1.png", toy_image("blue")))
    rows = [*open_raw("webdataset", str(tmp_path)).rows()]
    outcomes = [(row.origin, row.reason if isinstance(row, BadRow) else row.captions[0]) for row in rows]
    assert outcomes == [
        ("0.tar!0.png", "words first"),
        ("0.tar!1.png", "no caption"),
        ("1.tar!0.txt", "no image"),
        ("1.tar!1.png", "another one"),
    ]
    ids = [row.image_id for row in rows if isinstance(row, RawRow)]
    assert len({*ids}) == 2


@pytest.mark.guard("maskvlm.data.prepare.rows:stable_id", gives="__import__('uuid').uuid4().int")
def test_an_id_in_two_shards_is_counted_and_named(build: Build, tmp_path: Path) -> None:
    """Row 38. The same photo by its address: the second one is a bad row, which names id and place."""
    facts = json.dumps({"url": "https://farm1.staticflickr.com/2/77_a.jpg", "key": "0"}).encode()
    for number in (0, 1):
        shard(tmp_path / f"{number}.tar", ("0.png", toy_image()), ("0.txt", b"a square"), ("0.json", facts))
    rows = [*screened(open_raw("webdataset", str(tmp_path)).rows())]
    assert [type(row) for row in rows] == [RawRow, BadRow]
    assert isinstance(rows[1], BadRow)
    assert rows[1].reason == "duplicate image id"
    assert "flickr 77" in rows[1].message
    assert rows[1].origin == "1.tar!0.png"


# ---------------------------------------------------------------------- evaluation


def test_what_an_evaluation_keeps_of_an_example_holds_no_image() -> None:
    """Row 64: a few hundred bytes an example, whatever the size of its images."""
    source = SceneHypotheses(train=4, val=12, test=4, size=160)
    split = source.split("val")
    captioner = Captioner(train_tokenizer([split[index]["text"] for index in range(12)], 200), 30)
    spec = InputSpec(24, (0.5,) * 3, (0.5,) * 3, 30, 200, captioner.tokenizer)
    data, collate, scored_examples = (
        EvalExamples(split, eval_transform(spec)),
        CollateExamples(captioner, source),
        ScoredExamples(),
    )
    for first in range(0, 12, 4):
        batch = collate([data[index] for index in range(first, first + 4)])
        scored_examples.add(batch, ["neutral"] * 4, [0.0] * 4)
    assert len(pickle.dumps(split[0])) > 10_000
    assert len(scored_examples.own) == 12
    assert len(pickle.dumps(scored_examples.own)) < 12 * 1000


# ---------------------------------------------------------------------- what a checkpoint may set


@pytest.mark.guard("maskvlm.config.plain_schema:Record.read", gives="args[1]")
@pytest.mark.parametrize("key", ["strategy", "profiler", "seed_everything"])
def test_of_a_checkpoint_no_setting_of_the_trainer_is_taken(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """D2. As in the attacks on commit 89274c0: a strategy that runs a command, a profiler that writes elsewhere."""
    monkeypatch.chdir(OLD.parents[2])
    hook = {"class_path": "torch.utils.collect_env.run", "init_args": {"command": f"touch {tmp_path / 'mark'}"}}
    strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"ddp_comm_hook": hook}}
    profiler = {"class_path": "SimpleProfiler", "init_args": {"dirpath": str(tmp_path / "elsewhere")}}
    values = {"strategy": strategy, "profiler": profiler, "seed_everything": 77}
    more = {key: values[key]} if key == "seed_everything" else {"trainer": {key: values[key]}}
    content = load(OLD / "run" / "last.ckpt")
    save(content | {"model": yaml.safe_dump(yaml.safe_load(content["model"]) | more)}, tmp_path / "x.ckpt")
    files = ("conf/base.yaml", "conf/finetune.yaml", "tasks/nlvr/conf.yaml", "conf/where/cpu.yaml")
    words = ["fit", "--from", str(tmp_path / "x.ckpt"), *(word for file in files for word in ("-c", file))]
    with pytest.raises(UserError, match=rf"the key '{next(iter(more))}' is not known here") as caught:
        run_command(Parsed, words)
    assert caught.value.code == ExitCode.REFUSED
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "elsewhere").exists()
