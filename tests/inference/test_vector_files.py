"""Vectors of a data set: the model's own, whole files, the same whoever makes them and however often he is stopped."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from toy_examples import bare_backbone, data_for, fit, matters
from toys import PATCH, SIZE, WIDTH

from maskvlm.cli.embed import device_of_process, main, process_of
from maskvlm.data.batch import Row
from maskvlm.data.scenes.source import Scenes
from maskvlm.inference import vector_files
from maskvlm.inference.pretrained import PretrainedMaskVLM, UnknownWords
from maskvlm.inference.vector_files import embed, identity
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.training.lit import LitModel
from maskvlm.utils.errors import ExitCode, UserError

VIT = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": 1, "num_heads": 2}
BERT = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 2 * WIDTH}
IMAGE = {"name": "vit_tiny_patch16_224", "image_size": SIZE, "config": VIT}
TEXT = {"name": "bert", "text_length": 24, "vocab_size": 150, "config": BERT}
CROSS = {"cross_layers": 2, "cross_heads": 2}
TASK = {"mask_block": 16, "decoder_layers": 1, "contrast_dim": 8, "rerank_k": 3}


def toy_checkpoint(path: Path) -> Path:
    """A checkpoint of pre-training, of weights that all matter; it says which model it is."""
    backbone, task = bare_backbone(), MaskedPretraining(**TASK)  # type: ignore[arg-type]
    model = LitModel(backbone, task)
    encoders = {
        name: {"class_path": f"maskvlm.model.encoders.{name.title()}Encoder", "init_args": args}
        for name, args in (("image", IMAGE), ("text", TEXT))
    }
    whole = {"class_path": "maskvlm.model.maskvlm.MaskVLM", "init_args": encoders | CROSS}
    model.model_yaml = yaml.safe_dump({"model": {"random_init": True, "backbone": whole}})
    model.task_yaml = yaml.safe_dump(
        {"class_path": "maskvlm.objectives.pretraining.MaskedPretraining", "init_args": TASK}
    )
    trainer = fit(model, data_for(backbone, Scenes(train=24, val=6, test=5, size=SIZE)), path)
    matters(backbone, task)
    trainer.save_checkpoint(path)
    return path


class Photos:
    """Files of noise, two captions each; `stop` is a row at which somebody pulls the plug."""

    skipped: dict[str, list[str]] = {}

    def __init__(self, folder: Path, count: int = 10) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.count, self.fingerprint = folder, count, "photos"
        self.stop, self.read = -1, list[int]()
        rng = np.random.default_rng(0)
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(self.path(index))

    def path(self, index: int) -> Path:
        return self.folder / f"{index}.png"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Row:
        self.read.append(index)
        if index == self.stop:
            raise KeyboardInterrupt
        captions = [f"a red square {index}", f"circle number {index}"]
        return Row(image=str(self.path(index)), captions=captions, image_id=f"id {index}", origin=f"photos {index}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.ckpt")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PretrainedMaskVLM:
    pretrained = PretrainedMaskVLM.from_pretrained(checkpoint)
    pretrained.batch_size = 3
    return pretrained


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    return Photos(tmp_path / "photos")


def start(model: PretrainedMaskVLM, photos: Any, folder: Path, process: tuple[int, int] = (0, 1), **more: Any) -> str:
    return embed(model, photos, folder, {"checkpoint": "c", "split": "val", **more}, shard=4, process=process)


def content(folder: Path) -> dict[str, bytes]:
    """Every file by its name, temporary ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rows_of(folder: Path, kind: str = "pictures") -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob(f"{kind}-*.parquet"))])


def vector_of(table: pa.Table) -> torch.Tensor:
    return torch.tensor(table["vector"].to_pylist())


# ---------------------------------------------------------------------- what is written


def test_the_files_hold_the_models_own_vectors(model: PretrainedMaskVLM, photos: Photos, tmp_path: Path) -> None:
    folder = tmp_path / "vectors"
    assert start(model, photos, folder) == f"{folder}: 3 of 3 shards, 10 images in all"
    shards = [f"{kind}-0000{part}-of-00003.parquet" for kind in ("captions", "pictures") for part in range(3)]
    assert sorted(content(folder)) == [*shards, "vectors.json"]
    table = rows_of(folder)
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 8)
    assert table["row"].to_pylist() == list(range(10))
    assert table["id"].to_pylist() == [f"id {n}" for n in range(10)]
    assert table["path"].to_pylist() == [str(photos.path(n)) for n in range(10)]
    assert table["captions"].to_pylist()[3] == ["a red square 3", "circle number 3"]
    assert torch.allclose(vector_of(table), model.encode_image([photos.path(n) for n in range(10)]), atol=1e-6)
    texts = rows_of(folder, "captions")
    assert texts["row"].to_pylist() == [n // 2 for n in range(20)]
    assert texts["caption"].to_pylist()[7] == "circle number 3"
    assert torch.allclose(vector_of(texts), model.encode_text(texts["caption"].to_pylist()), atol=1e-6)
    facts = json.loads((folder / "vectors.json").read_text())
    assert facts["weights"] == identity(model)
    assert {name: facts[name] for name in ("data", "split", "pictures", "width", "shards")} == {
        "data": "photos", "split": "val", "pictures": 10, "width": 8, "shards": 3,
    }  # fmt: skip


def test_the_same_model_in_another_container_is_the_same(model: PretrainedMaskVLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "hub")
    copy = PretrainedMaskVLM.from_pretrained(tmp_path / "hub")
    assert identity(copy) == identity(model)
    with torch.no_grad():
        copy.task.projection.image.weight[0, 0] += 1e-3
    assert identity(copy) != identity(model)


# ---------------------------------------------------------------------- stopped, shared, started again


def test_a_killed_one_goes_on_to_the_same_files(model: PretrainedMaskVLM, photos: Photos, tmp_path: Path) -> None:
    start(model, photos, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    photos.stop = 6
    with pytest.raises(KeyboardInterrupt):
        start(model, photos, tmp_path / "killed")
    partial = content(tmp_path / "killed")
    assert set(partial) == {f"{kind}-00000-of-00003.parquet" for kind in ("captions", "pictures")} | {"vectors.json"}
    photos.stop, photos.read = -1, []
    start(model, photos, tmp_path / "killed")
    assert photos.read == [4, 5, 6, 7, 8, 9]  # what is there is not made again
    assert content(tmp_path / "killed") == whole
    photos.read = []
    start(model, photos, tmp_path / "killed")
    assert photos.read == []


def test_a_kill_while_a_file_is_written_leaves_none_of_its_name(
    model: PretrainedMaskVLM, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(model, photos, tmp_path / "whole")
    plain = vector_files.pq.write_table

    def half(table: pa.Table, file: Any, **more: Any) -> None:
        plain(table, file, **more)
        if "row" in table.column_names and table["row"][0].as_py() == 4 and "path" in table.column_names:
            os.truncate(file, 100)
            raise KeyboardInterrupt

    monkeypatch.setattr(vector_files.pq, "write_table", half)
    with pytest.raises(KeyboardInterrupt):
        start(model, photos, tmp_path / "killed")
    assert "pictures-00001-of-00003.parquet" not in content(tmp_path / "killed")
    monkeypatch.setattr(vector_files.pq, "write_table", plain)
    start(model, photos, tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_two_processes_make_what_one_makes(model: PretrainedMaskVLM, photos: Photos, tmp_path: Path) -> None:
    photos.path(9).write_bytes(b"nothing")
    start(model, photos, tmp_path / "one")
    report = start(model, photos, tmp_path / "two", (0, 2))
    assert "2 of 3 shards" in report
    assert "the rest belong to other processes" in report
    assert photos.read[10:] == [0, 1, 2, 3, 8, 9]
    assert "3 of 3 shards" in start(model, photos, tmp_path / "two", (1, 2))
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_processes_are_those_of_torchrun_or_slurm() -> None:
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}
    assert process_of({"RANK": "1", "WORLD_SIZE": "2", **slurm}) == (1, 2)
    assert process_of(slurm) == (3, 4)


def test_where_chooses_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [device_of_process(name, 1) for name in ("auto", "cpu", "gpu")] == ["cpu", "cpu", "cuda"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [device_of_process(name, 3) for name in ("auto", "cpu", "gpu")] == ["cuda:1", "cpu", "cuda:1"]
    assert process_of({"SLURM_NTASKS": "4"}) == (0, 1)  # a shell that waits for srun


def test_other_things_are_refused(model: PretrainedMaskVLM, photos: Photos, tmp_path: Path) -> None:
    start(model, photos, tmp_path / "v")
    there = content(tmp_path / "v")

    def refused(*, shard: int = 4, captions: bool = True, split: str = "val") -> str:
        with pytest.raises(UserError) as caught:
            embed(model, photos, tmp_path / "v", {"split": split}, shard, captions)
        assert caught.value.code == ExitCode.CANNOT_CREATE
        assert content(tmp_path / "v") == there
        return caught.value.what

    assert refused(split="test") == "holds vectors of another split (split val, not test)"
    assert refused(shard=5) == "holds vectors of shards of another size (shard 4, not 5)"
    assert "or without captions" in refused(captions=False)
    photos.fingerprint = "others"
    assert refused() == "holds vectors of other data (data photos, not others)"
    photos.fingerprint = "photos"
    with torch.no_grad():
        model.task.projection.text.weight[0, 0] += 1e-3
        message = refused()
        model.task.projection.text.weight[0, 0] -= 1e-3
    assert message.startswith("holds vectors of another checkpoint (weights ")


# ---------------------------------------------------------------------- images that cannot be read


def test_a_broken_image_is_left_out_counted_and_listed(
    model: PretrainedMaskVLM, photos: Photos, tmp_path: Path
) -> None:
    folder = tmp_path / "vectors"
    whole = photos.path(2).read_bytes()
    photos.path(2).write_bytes(whole[: len(whole) // 2])
    for index in (4, 5, 6, 7):  # a whole shard
        photos.path(index).unlink()
    photos.skipped = {"no caption": ["photos 99"]}
    report = start(model, photos, folder)
    assert "left out or repaired (truncated: 1, missing: 4, no caption: 1): listed in" in report
    assert rows_of(folder)["row"].to_pylist() == [0, 1, 3, 8, 9]
    assert vector_of(rows_of(folder)).shape == (5, 8)
    assert torch.allclose(vector_of(rows_of(folder))[2], model.encode_image(photos.path(3)), atol=1e-6)
    listed = json.loads((folder / "bad_samples.json").read_text())
    assert listed["problems"] == {"truncated": 1, "missing": 4}
    assert listed["left_out"] == {"no caption": ["photos 99"]}
    assert listed["examples"]["truncated"][0].startswith("photos 2: bad image, truncated")
    assert [line.split(":")[0] for line in listed["examples"]["missing"]] == [f"photos {n}" for n in (4, 5, 6, 7)]
    (folder / "bad_samples.json").unlink()
    assert start(model, photos, folder) == report  # all is done, and still it is said
    assert json.loads((folder / "bad_samples.json").read_text()) == listed


# ---------------------------------------------------------------------- the command


def test_the_command_embeds_what_the_files_configure(
    checkpoint: Path, root: Path, tmp_path: Path, stack: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(root)
    out = tmp_path / "vectors"
    words = ["--from", str(checkpoint), "--out", str(out), "--device", "cpu", "--no-captions", "--shard", "4"]
    data = [*stack(WHERE="cpu"), "--data.source.val", "6"]
    assert main([*words, *data], []) == 0
    facts = json.loads((out / "vectors.json").read_text())
    assert facts["data"] == Scenes(val=6, short=5).split("val").fingerprint
    assert facts["source"]["class_path"] == "maskvlm.data.scenes.source.Scenes"
    assert facts["source"]["init_args"]["val"] == 6
    assert sorted(content(out)) == [*(f"pictures-0000{n}-of-00002.parquet" for n in range(2)), "vectors.json"]
    table = rows_of(out)
    assert table["path"].to_pylist() == [None] * 6
    assert table["origin"].to_pylist()[5] == "scenes (seed 0) val image 5"
    monkeypatch.setattr(PretrainedMaskVLM, "unknown_words", lambda self, texts: ["giraffe"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownWords)  # a line, not Python's warning
        with_captions = [word for word in words if word != "--no-captions"]
        assert main([*with_captions, *data, "--out", str(tmp_path / "more")], []) == 0
    assert "warning: words that the model's tokenizer does not know: giraffe; " in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--data.source.vall: unknown key \(did you mean data.source.val\?\)"):
        main([*words, *data, "--data.source.vall", "3"], [])
    files = ("conf/base.yaml", "conf/model/tiny.yaml", "conf/finetune.yaml", "tasks/nlvr/conf.yaml")
    with pytest.raises(UserError, match="has no captions of images"):
        main([*words, *(word for file in files for word in ("-c", file))], [])


def test_parts_and_streams_of_the_training_images(
    checkpoint: Path, root: Path, tmp_path: Path, stack: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Rows are those of the whole split, by which images are found again; a stream has none."""
    monkeypatch.chdir(root)
    out = tmp_path / "vectors"
    words = ["--from", str(checkpoint), "--out", str(out), "--device", "cpu", "--no-captions", "--split", "train"]
    assert main([*words, *stack(WHERE="cpu"), "--data.source.train", "6", "--data.fraction", "0.5"], []) == 0
    assert "embedding all images of split=train;" in capsys.readouterr().err
    assert rows_of(out)["row"].to_pylist() == [*range(6)]
    (tmp_path / "shard.tar").touch()
    source = {"class_path": "maskvlm.data.streaming.source.Stream"}
    source |= {"init_args": {"root": str(tmp_path / "shard.tar"), "evaluate": str(tmp_path)}}  # type: ignore[dict-item]
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"source": source}}}))
    files = ("conf/base.yaml", "conf/model/tiny.yaml", "conf/pretrain.yaml", str(tmp_path / "stream.yaml"))
    with pytest.raises(UserError, match="--split: train is streamed"):
        main([*words, *(word for file in files for word in ("-c", file))], [])
