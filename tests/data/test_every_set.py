"""Every named set in its own layout: raw files -> `data` -> two steps of training with the configuration that
`make pretrain DATA=...` and `make finetune TASK=... DATA=...` compose. Fails where a reader, the prepared form, a YAML
file or a task's reader of prepared images does not fit the others. And the broken sets of `bad_raw.py`, prepared."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_raw import KINDS, make_bad_raw
from karpathy_rows import image
from toy_raw import encoded, photo

from maskvlm.cli.commands import COMMANDS
from maskvlm.cli.main import main
from maskvlm.data.prepared.manifest import read_manifest
from maskvlm.data.prepared.source import Prepared

ROOT = Path(__file__).resolve().parents[2]
TRAIN, VAL = 12, 6
THINGS, PLACES = ("red dog", "dark car", "old cat"), ("snow", "park", "sea", "street", "field", "house")
TEXTS = [f"a {thing} in the {place}" for thing in THINGS for place in PLACES]


def put(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(photo(number)))


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def parts() -> list[str]:
    return ["train"] * TRAIN + ["val"] * VAL


# ------------------------------------------------------------------ raw sets


def karpathy(raw: Path, name: str) -> None:
    numbers = range(1, 1 + TRAIN + VAL)
    names = [f"{1000 + n}.jpg" if name != "coco" else f"val2014/COCO_val2014_{n:012d}.jpg" for n in numbers]
    put(raw / "images" if name != "coco" else raw, names)
    images = [
        image(names[n - 1].rpartition("/")[2], parts()[n - 1], TEXTS[n - 1], TEXTS[-n], imgid=n, **more(name, n))
        for n in numbers
    ]
    write(raw / f"dataset_{name}.json", {"images": images, "dataset": name})


def more(name: str, number: int) -> dict[str, Any]:
    return {"filepath": "val2014", "cocoid": number} if name == "coco" else {}


def genome(raw: Path) -> None:
    put(raw / "VG_100K", [f"{n}.jpg" for n in range(TRAIN)])
    regions = [{"id": n, "regions": [{"phrase": TEXTS[n]}, {"phrase": TEXTS[n + 1]}]} for n in range(TRAIN)]
    write(raw / "region_descriptions.json", regions)
    write(raw / "image_data.json", [{"image_id": n, "coco_id": None} for n in range(TRAIN)])


def address(n: int) -> str:
    return f"http://example.org/{n}.jpg"


def sbu(raw: Path) -> None:
    put(raw / "images", [f"{n}.jpg" for n in range(TRAIN)])
    records = {"image_urls": [address(n) for n in range(TRAIN)], "captions": TEXTS[:TRAIN]}
    write(raw / "sbu-captions-all.json", {**records, "user_ids": [0] * TRAIN})


def conceptual(raw: Path, name: str) -> None:
    """CC3M has a validation list, CC12M has the address first."""
    put(raw / "images", [f"{n}.jpg" for n in range(TRAIN)])
    pairs = [(TEXTS[n], address(n)) if name == "cc3m" else (address(n), TEXTS[n]) for n in range(TRAIN)]
    file = "Train_GCC-training.tsv" if name == "cc3m" else "cc12m.tsv"
    write(raw / file, "".join("\t".join(pair) + "\n" for pair in pairs))


def webdataset(raw: Path) -> None:
    """As img2dataset writes it."""
    raw.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(raw / f"{shard:05d}.tar", "w") as archive:
            for n in range(shard * 9, shard * 9 + 9):
                key, record = f"{shard:05d}{n:04d}", {"caption": TEXTS[n], "url": address(n), "status": "success"}
                files = {"jpg": encoded(photo(n)), "txt": TEXTS[n].encode()}
                files["json"] = json.dumps({**record, "key": key}).encode()
                for kind, content in files.items():
                    info = tarfile.TarInfo(f"{key}.{kind}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        write(raw / f"{shard:05d}_stats.json", {"count": 10, "successes": 9, "failed_to_download": 1})


def table(raw: Path, kind: str) -> Path:
    put(raw, [f"{n}.jpg" for n in range(TRAIN + VAL)])
    rows = [{"image": f"{n}.jpg", "caption": TEXTS[n], "split": split} for n, split in enumerate(parts())]
    if kind == "jsonl":
        write(raw / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return raw / "pairs.jsonl"
    with (raw / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return raw / "pairs.csv"


def folder(raw: Path) -> None:
    put(raw, [f"{n}.jpg" for n in range(TRAIN)])
    for n in range(TRAIN):
        write(raw / f"{n}.txt", TEXTS[n])


def hub(raw: Path) -> None:
    import datasets

    rows = [{"image": {"bytes": encoded(photo(n)), "path": None}, "caption": TEXTS[n]} for n in range(TRAIN)]
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows, features)).save_to_disk(raw)


def make_raw(name: str, raw: Path) -> Path:
    """A small set in its own layout; returns what RAW names."""
    if name in ("csv", "jsonl"):
        return table(raw, name)
    if name in ("coco", "flickr30k", "flickr8k"):
        karpathy(raw, name)
    elif name in ("cc3m", "cc12m"):
        conceptual(raw, name)
    else:
        {"vg": genome, "sbu": sbu, "webdataset": webdataset, "folder": folder, "hf": hub}[name](raw)
    return raw


# ------------------------------------------------------------------ prepared, and trained on


@pytest.fixture
def at_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of prepared sets."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "sets"))
    return tmp_path / "sets"


def composed(*words: str) -> list[str]:
    """The command that these words stand for."""
    return COMMANDS[words[0]].full(words[1:])


SHORT = ["--data.steps=2", "--data.epochs=null", "--data.batch_size=4", "--trainer.limit_val_batches=0"]
NAMED = ("coco", "flickr30k", "flickr8k", "vg", "sbu", "cc3m", "cc12m")
OWN = ("webdataset", "csv", "jsonl", "folder", "hf")


@pytest.mark.parametrize("name", [*NAMED, *OWN])
def test_raw_prepared_trained(name: str, tmp_path: Path, at_the_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, as_name = make_raw(name, tmp_path / "raw"), name if name in NAMED else "mine"
    assert main(["data", name, str(raw), "--out", str(at_the_root / as_name), "--workers", "1", "--side", "48"]) == 0
    manifest = read_manifest(at_the_root / as_name)
    counts = {split: facts["pictures"] for split, facts in manifest["splits"].items()}
    halves = name in ("coco", "flickr30k", "flickr8k", "csv", "jsonl")
    assert counts == ({"train": TRAIN, "val": VAL} if halves else {"train": 18 if name == "webdataset" else TRAIN})
    assert manifest["left_out"] == {}
    capsys.readouterr()
    run = tmp_path / "run"
    arguments = composed("pretrain", f"data={as_name}", "where=cpu")
    arguments[arguments.index("--folder") + 1] = str(run)
    assert main([*arguments, *SHORT]) == 0, capsys.readouterr().err
    facts = json.loads((run / "versions.json").read_text())
    assert facts["finished"]["step"] == 2
    assert facts["data"]["train"]["sha"] == Prepared(str(at_the_root / as_name), 1000).split("train").fingerprint


# ------------------------------------------------------------------ sets of the tasks, from true files


def part_of_vqa(shared: Path, raw: Path) -> None:
    """Some of DAQUAR's questions under the names of VQA v2."""
    for split, year in (("train", "train2014"), ("val", "val2014")):
        questions = json.loads((shared / f"v2_OpenEnded_daquar_{split}_questions.json").read_text())
        answers = json.loads((shared / f"v2_daquar_{split}_annotations.json").read_text())
        questions["questions"], answers["annotations"] = questions["questions"][:20], answers["annotations"][:20]
        for number in {row["image_id"] for row in questions["questions"]}:
            source = shared / "images" / f"COCO_daquar_{number:012d}.jpg"
            (raw / year).mkdir(parents=True, exist_ok=True)
            (raw / year / f"COCO_{year}_{number:012d}.jpg").write_bytes(source.read_bytes())
        write(raw / f"v2_OpenEnded_mscoco_{year}_questions.json", questions)
        write(raw / f"v2_mscoco_{year}_annotations.json", answers)


def part_of_nlvr(shared: Path, raw: Path) -> None:
    for split in ("train", "dev"):
        lines = (shared / f"{split}.json").read_text().splitlines(keepends=True)[:20]
        write(raw / f"{split}.json", "".join(lines))
        for line in lines:
            name = json.loads(line)["identifier"].rsplit("-", 1)[0]
            for file in (shared / "images").glob(f"{name}-img?.png"):
                (raw / "images").mkdir(parents=True, exist_ok=True)
                (raw / "images" / file.name).write_bytes(file.read_bytes())


def part_of_snli(shared: Path, raw: Path) -> None:
    for split in ("train", "dev"):
        lines = (shared / f"snli_ve_{split}.jsonl").read_text().splitlines(keepends=True)[:20]
        write(raw / f"snli_ve_{split}.jsonl", "".join(lines))
        for name in {f"{json.loads(line)['Flickr30K_ID']}.jpg" for line in lines}:
            (raw / "images").mkdir(parents=True, exist_ok=True)
            (raw / "images" / name).write_bytes((shared / "images" / name).read_bytes())


PARTS: dict[str, tuple[str, str, Callable[[Path, Path], None]]] = {
    "vqav2": ("vqa", "daquar_vqa", part_of_vqa),
    "nlvr2": ("nlvr", "nlvr_pairs", part_of_nlvr),
    "snli_ve": ("entailment", "snli_ve", part_of_snli),
}


@pytest.mark.parametrize("name", PARTS)
def test_sets_of_tasks(name: str, tmp_path: Path, at_the_root: Path, shared_data: Path) -> None:
    task, place, make = PARTS[name]
    make(shared_data / place, tmp_path / "raw")
    assert main(["data", name, str(tmp_path / "raw"), "--out", str(at_the_root / name), "--workers", "1"]) == 0
    arguments = composed("finetune", task, f"data={name}", "from=random", "where=cpu")
    arguments[arguments.index("--folder") + 1] = str(tmp_path / "run")
    small = ["--model.backbone.image.image_size=48", *["--data.source.min_count=1"] * (task == "vqa")]
    assert main([*arguments, *small, *SHORT, "--data.eval_batch_size=4", "--trainer.limit_val_batches=1.0"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics[f"{task}/examples"] == 20


@pytest.mark.parametrize(("task", "metric"), [("retrieval", "tr_r1"), ("captioning", "cider")])
def test_a_set_of_your_own_is_fine_tuned_on_by_its_name(
    task: str, metric: str, tmp_path: Path, at_the_root: Path
) -> None:
    raw = str(make_raw("csv", tmp_path / "raw"))
    assert main(["data", "csv", raw, "--out", str(at_the_root / "mine"), "--workers", "1", "--side", "48"]) == 0
    arguments = composed("finetune", task, "data=mine", "from=random", "where=cpu")
    arguments[arguments.index("--folder") + 1] = str(tmp_path / "run")
    small = ["--model.backbone.image.image_size=48", "--data.eval_batch_size=4", "--trainer.limit_val_batches=1.0"]
    assert main([*arguments, *SHORT, *small]) == 0
    assert f"{task}/{metric}" in json.loads((tmp_path / "run" / "metrics.json").read_text())
    facts = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert facts["data"]["train"]["sha"] == Prepared(str(at_the_root / "mine"), 1000).split("train").fingerprint


# ------------------------------------------------------------------ broken sets


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_broken_rows_are_left_out(kind: str, tmp_path: Path, at_the_root: Path) -> None:
    """A fifth of the rows is broken in over twenty ways: each is counted under its reason, the rest is whole and
    trains. Fails where one check of `RowMaker.take` or of a reader is taken away."""
    expected = make_bad_raw(tmp_path / "raw", kind)
    name = "webdataset" if kind == "tars" else kind
    assert main(["data", name, str(tmp_path / "raw"), "--out", str(at_the_root / "bad"), "--workers", "2"]) == 0
    lines = [json.loads(line) for line in (at_the_root / "bad" / "skipped.jsonl").read_text().splitlines()]
    problems: dict[str, list[str]] = {}
    for line in lines:
        problems.setdefault(line["reason"], []).append(line["origin"])
    wanted: dict[str, list[str]] = {}
    for reasons in (expected.bad, expected.mended):
        for reason, origins in reasons.items():
            wanted.setdefault(reason, []).extend(origins)
    assert {reason: sorted(origins) for reason, origins in problems.items()} == {
        reason: sorted(origins) for reason, origins in wanted.items()
    }
    pairs = Prepared(str(at_the_root / "bad")).split("train")
    captions = {tuple(pairs.captions(index)) for index in range(len(pairs))}
    assert len(pairs) == len(expected.good)
    assert any("\U0001f415" in text or ord(max(text)) > 0x1F000 for texts in captions for text in texts)
    arguments = composed("pretrain", "data=bad", "where=cpu")
    arguments[arguments.index("--folder") + 1] = str(tmp_path / "run")
    assert main([*arguments, *SHORT]) == 0
