"""The sets known by name, each in the forms in which people have it: true files where there are, small ones else."""

import json
import re
import zlib
from collections import Counter
from hashlib import md5
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from karpathy_rows import image
from PIL import Image

from maskvlm.data.files import image_folder, image_names, images_by_number
from maskvlm.data.images import safe_open
from maskvlm.data.raw import SETS, BadRow, RawRow, open_raw
from maskvlm.utils.errors import ExitCode, UserError
from tasks.entailment.data import SnliVe
from tasks.nlvr.data import Nlvr2


def rows_of(name: str, raw: Path, **columns: str) -> list[RawRow | BadRow]:
    return [*open_raw(name, str(raw), columns or None).rows()]


def counted(rows: list[RawRow | BadRow]) -> dict[tuple[str, str], int]:
    """(split, reason or "good") -> rows."""
    return Counter((row.split, row.reason if isinstance(row, BadRow) else "good") for row in rows)


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / name, "JPEG")


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def brief(rows: list[RawRow | BadRow], folder: Path) -> list[Any]:
    """(path below the folder, captions, id, split) of good rows, (reason, origin) of bad ones."""
    return [
        (row.reason, row.origin)
        if isinstance(row, BadRow)
        else (Path(str(row.image)).relative_to(folder).as_posix(), row.captions, row.image_id, row.split)
        for row in rows
    ]


# ------------------------------------------------------------------ true files


def test_flickr8k_is_whole(shared_data: Path) -> None:
    raw = open_raw("flickr8k", str(shared_data / "flickr8k"))
    rows = [*raw.rows()]
    assert counted(rows) == {("train", "good"): 6000, ("val", "good"): 1000}
    assert sum(len(row.captions) for row in rows if isinstance(row, RawRow)) == 35_000
    assert all(row[2].startswith("flickr ") for row in rows)
    assert len({row[2] for row in rows}) == 7000
    assert (raw.facts.images, raw.facts.captions) == (8000, 40_000)
    first = rows[0]
    assert isinstance(first, RawRow)
    assert first.image_id == "flickr 2513260012"
    assert first.captions[0] == "A black dog is running after a white dog in the snow ."
    assert first.origin == "dataset_flickr8k.json image 0 (2513260012_03d33305cf.jpg)"
    assert safe_open(first.image, "x").size == (160, 160)


@pytest.mark.parametrize(
    ("name", "folder", "good", "absent", "files"),
    [
        ("snli_ve", "snli_ve", 208, 0, 2),
        ("snli_ve", "formats/visual_entailment", 2, 0, 1),
        ("daquar", "daquar_vqa", 794, 0, 4),  # of 795 files: no question is about image 366
        ("nlvr_pairs", "nlvr_pairs", 15_894, 0, 2),
        ("nlvr2", "formats/nlvr2", 8, 334, 2),
        ("vqav2", "formats/vqav2", 1, 0, 2),
    ],
)
def test_images_of_annotated_sets(
    shared_data: Path, name: str, folder: str, good: int, absent: int, files: int
) -> None:
    """Fails where an image is taken twice, or one that no example is about."""
    raw = open_raw(name, str(shared_data / folder))
    rows = [*raw.rows()]
    counts = counted(rows)
    assert (counts["pictures", "good"], counts["pictures", "missing image"]) == (good, absent)
    assert sum(counts.values()) == good + absent
    assert len(raw.annotations) == files
    assert all(file.suffix in (".json", ".jsonl") for file in raw.annotations)
    images = shared_data / folder / "images"
    for row in rows:
        if isinstance(row, RawRow):
            assert row.captions == ()
            assert Path(str(row.image)) == images / row.name
            assert Path(str(row.image)).is_file()


def test_the_tasks_find_the_same_images_under_the_same_ids(shared_data: Path) -> None:
    """Fails where a rule for ids here differs from that of the task's reader."""
    folder = shared_data / "daquar_vqa"
    names = image_names(image_folder(None, folder))
    ours = {row.image_id: row.name for row in rows_of("daquar", folder) if isinstance(row, RawRow)}
    theirs = images_by_number(names, "daquar_train")
    assert ours.items() <= theirs.items()
    sets: list[tuple[str, str, Any]] = [("snli_ve", "snli_ve", SnliVe), ("nlvr_pairs", "nlvr_pairs", Nlvr2)]
    for name, place, task in sets:
        images = task(str(shared_data / place))._images()
        rows = [row for row in rows_of(name, shared_data / place) if isinstance(row, RawRow)]
        numbers = images.find(pa.array([row.image_id for row in rows]))
        assert [images.path(number) for number in numbers] == [row.image for row in rows]


def test_flickr30k_entities(shared_data: Path) -> None:
    rows = rows_of("flickr30k", shared_data / "formats/flickr30k")
    assert counted(rows) == {("test", "good"): 5}
    (row,) = [row for row in rows if row[2] == "flickr 6338542128"]
    assert isinstance(row, RawRow)
    assert len(row.captions) == 5
    assert row.captions[0].startswith("On a sunny , dry day , wearing full football gear , a Texas A&M football player")
    assert not any("[" in caption for caption in row.captions)


@pytest.mark.parametrize("folder", ["Sentences", "sentences"])
def test_the_folder_of_sentences_as_the_archive_writes_it(tmp_path: Path, folder: str) -> None:
    put(tmp_path, "images/1000092795.jpg")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "1000092795.txt").write_text(
        "[/EN#1/people Two young guys] look at [/EN#4/bodyparts hands] .\n"
    )
    (row,) = rows_of("flickr30k", tmp_path)
    assert isinstance(row, RawRow)
    assert row.captions == ("Two young guys look at hands .",)


def test_cc3m_without_images_is_all_missing(shared_data: Path) -> None:
    rows = rows_of("cc3m", shared_data / "formats/cc3m")
    assert counted(rows) == {("val", "missing image"): 500}
    assert rows[499].origin == "Validation_GCC-1.1.0-Validation.head500.tsv:500"


# ------------------------------------------------------------------ COCO


def test_coco_in_karpathys_split(tmp_path: Path) -> None:
    put(tmp_path, "val2014/COCO_val2014_000000391895.jpg", "train2017/000000000012.jpg")
    images = [
        image("COCO_val2014_000000391895.jpg", "restval", "a man", "two", filepath="val2014", cocoid=391895, imgid=0),
        image("COCO_train2014_000000000012.jpg", "test", "a dog", filepath="train2014", cocoid=12, imgid=1),
        image("COCO_val2014_000000000013.jpg", "val", "a cat", filepath="val2014", cocoid=13, imgid=2),
        image("../x.jpg", "val", "a cat", cocoid=14),
        image("COCO_val2014_000000391895.jpg", "train", filepath="val2014", cocoid=15),
        {"filename": 3, "split": "test"},
    ]
    write(tmp_path / "karpathy/dataset_coco.json", {"images": images, "dataset": "coco"})
    file = "dataset_coco.json image"
    assert brief(rows_of("coco", tmp_path), tmp_path) == [
        ("val2014/COCO_val2014_000000391895.jpg", ("a man", "two"), "coco 391895", "train"),
        ("train2017/000000000012.jpg", ("a dog",), "coco 12", "test"),
        ("missing image", f"{file} 2 (val2014/COCO_val2014_000000000013.jpg)"),
        ("unsafe name", f"{file} 3 (../x.jpg)"),
        ("no caption", f"{file} 4 (val2014/COCO_val2014_000000391895.jpg)"),
        ("malformed row", f"{file} 5"),
    ]


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_coco_as_it_is_distributed(tmp_path: Path, year: str) -> None:
    for part, number in (("train", 9), ("val", 42)):
        prefix = f"COCO_{part}{year}_" if year == "2014" else ""
        put(tmp_path, f"{part}{year}/{prefix}{number:012d}.jpg")
        images = [{"id": number, "file_name": f"{prefix}{number:012d}.jpg"}, {"id": 7, "file_name": "absent.jpg"}]
        captions = [{"image_id": number, "id": n, "caption": f"{part} {n}"} for n in (1, 2)]
        write(tmp_path / f"annotations/captions_{part}{year}.json", {"images": images, "annotations": captions})
    rows = brief(rows_of("coco", tmp_path), tmp_path)
    assert [row[1:] for row in rows[::2]] == [
        (("train 1", "train 2"), "coco 9", "train"),
        (("val 1", "val 2"), "coco 42", "val"),
    ]
    assert [row[0] for row in rows[1::2]] == ["missing image"] * 2


# ------------------------------------------------------------------ Flickr


def test_flickr_token_file_with_and_without_lists(tmp_path: Path) -> None:
    put(tmp_path, *[f"flickr30k-images/{n}.jpg" for n in (11, 22, 33)])
    lines = [f"{n}.jpg#{k}\tcaption {k} of {n}" for n in (11, 22, 33) for k in (0, 1)]
    write(tmp_path / "results_20130124.token", "\n".join([*lines, "no tab"]))
    rows = rows_of("flickr30k", tmp_path)
    assert counted(rows) == {("train", "good"): 3, ("train", "malformed row"): 1}
    write(tmp_path / "flickr30k_test.txt", "22.jpg\n")
    write(tmp_path / "val.txt", "33\n")
    assert brief(rows_of("flickr30k", tmp_path), tmp_path)[1:] == [
        (f"flickr30k-images/{n}.jpg", (f"caption 0 of {n}", f"caption 1 of {n}"), f"flickr {n}", split)
        for n, split in ((11, "train"), (22, "test"), (33, "val"))
    ]


def test_flickr_csv_of_the_hub_and_of_kaggle(tmp_path: Path) -> None:
    put(tmp_path, "flickr30k-images/11.jpg")
    row = '"[""one, two"", ""three""]","[1, 2]",test,11.jpg,0'
    write(tmp_path / "flickr_annotations_30k.csv", f"raw,sentids,split,filename,img_id\n{row}\n[1],[],val,12.jpg,1\n")
    expected = [("flickr30k-images/11.jpg", ("one, two", "three"), "flickr 11", "test")]
    assert brief(rows_of("flickr30k", tmp_path), tmp_path) == [
        ("malformed row", "flickr_annotations_30k.csv:3"),
        *expected,
    ]
    (tmp_path / "flickr_annotations_30k.csv").unlink()
    write(
        tmp_path / "results.csv", "image_name| comment_number| comment\n11.jpg| 0| one\n11.jpg| 1| two\n11.jpg| 2   x\n"
    )
    assert brief(rows_of("flickr30k", tmp_path), tmp_path) == [
        ("missing column", "results.csv:4"),  # as in the true file, line 19999
        ("flickr30k-images/11.jpg", ("one", "two"), "flickr 11", "train"),
    ]


# ------------------------------------------------------------------ Visual Genome


def test_visual_genome_shares_ids_with_coco(tmp_path: Path) -> None:
    """Fails where coco_id is not asked: the leak of COCO's test images would not be seen by id."""
    put(tmp_path, "VG_100K/1.jpg", "images/VG_100K_2/2.jpg", "VG_100K/4.jpg")
    regions = [{"id": n, "regions": [{"region_id": n, "phrase": f"phrase {n}"}] * (n % 4)} for n in (1, 2, 3, 4)]
    write(tmp_path / "region_descriptions.json", [*regions, {"id": "5"}])
    with pytest.raises(UserError, match=r"image_data\.json is missing"):
        open_raw("vg", str(tmp_path))
    write(tmp_path / "image_data.json", [{"image_id": n, "coco_id": 9 if n == 2 else None} for n in (1, 2, 3, 4)])
    raw = open_raw("vg", str(tmp_path))
    assert brief([*raw.rows()], tmp_path) == [
        ("VG_100K/1.jpg", ("phrase 1",), "vg 1", "train"),
        ("images/VG_100K_2/2.jpg", ("phrase 2",) * 2, "coco 9", "train"),
        ("missing image", "region_descriptions.json [2] (3.jpg)"),
        ("no caption", "region_descriptions.json [3] (4.jpg)"),
        ("malformed row", "region_descriptions.json [4]"),
    ]
    assert raw.notes == ["1 of its images are COCO's, too, and have their ids there"]


def test_vqa_keeps_a_photo_that_visual_genome_has_too_once(tmp_path: Path) -> None:
    """By COCO's id and name; fails where Visual Genome's number is its id."""
    put(tmp_path, "images/COCO_val2014_000000000042.jpg", "images/VG_100K/8.jpg", "images/VG_100K/9.jpg")
    questions = [{"question_id": 1, "image_id": 42, "question": "What?"}]
    write(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(tmp_path / "question_answers.json", [{"id": number, "qas": []} for number in (8, 9)])
    with pytest.raises(UserError, match=r"image_data\.json is missing"):
        open_raw("vqav2", str(tmp_path))
    write(tmp_path / "image_data.json", [{"image_id": 8, "coco_id": 42}, {"image_id": 9, "coco_id": None}])
    raw = open_raw("vqav2", str(tmp_path))
    assert [(row.image_id, row.name) for row in raw.rows() if isinstance(row, RawRow)] == [
        ("coco 42", "COCO_val2014_000000000042.jpg"),
        ("vg 9", "VG_100K/9.jpg"),
    ]
    assert tmp_path / "image_data.json" in raw.annotations


# ------------------------------------------------------------------ lists of addresses

URLS = [f"http://example.org/photos/{name}.jpg?w=1" for name in ("a", "b", "c", "d")]
NAMINGS = {
    "ViLBERT": lambda url, row: f"{zlib.crc32(url.encode())}",
    "LAVIS": lambda url, row: f"{row}_{zlib.crc32(url.encode())}.jpg",
    "MD5": lambda url, row: f"{md5(url.encode()).hexdigest()}.jpg",
    "ViLT": lambda url, row: f"0000/{row:07d}",
    "rows": lambda url, row: f"{row}.jpg",
    "rows from 1": lambda url, row: f"{row + 1}.png",
    "end": lambda url, row: f"{'abcd'[row]}.jpg",
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", ["cc3m", "cc12m"])
def test_images_of_a_list_by_the_names_of_downloaders(tmp_path: Path, name: str, naming: str) -> None:
    """Fails where a row gets another row's image; row 2 has none."""
    for row in (0, 1, 3):
        put(tmp_path, f"images/{NAMINGS[naming](URLS[row], row)}")
    pairs = [(f"caption {row}", url) if name == "cc3m" else (url, f"caption {row}") for row, url in enumerate(URLS)]
    write(tmp_path / "Train_GCC-training.tsv", "".join("\t".join(pair) + "\n" for pair in pairs))
    raw = open_raw(name, str(tmp_path))
    rows = [*raw.rows()]
    assert counted(rows) == {("train", "good"): 3, ("train", "missing image"): 1}
    for row, number in zip((rows[0], rows[1], rows[3]), (0, 1, 3), strict=True):
        assert isinstance(row, RawRow)
        assert row.image == str(tmp_path / "images" / NAMINGS[naming](URLS[number], number))
        assert row[1:4] == ((f"caption {number}",), f"{name} {number:09d}", "train")
    assert rows[2][:2] == ("missing image", "Train_GCC-training.tsv:3")
    assert "images are named by" in raw.notes[0]


def test_rows_count_from_1_where_the_last_number_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the first rows alone decide: both ways of counting find as many images there."""
    monkeypatch.setattr("maskvlm.data.raw.links.PROBE", 2)
    put(tmp_path, "1.jpg", "4.jpg")
    write(tmp_path / "cc3m.tsv", "".join(f"caption {row}\t{url}\n" for row, url in enumerate(URLS)))
    rows = brief(rows_of("cc3m", tmp_path), tmp_path)
    assert [row[:2] for row in (rows[0], rows[3])] == [("1.jpg", ("caption 0",)), ("4.jpg", ("caption 3",))]
    assert [row[0] for row in rows[1:3]] == ["missing image"] * 2


def test_each_list_has_its_own_folder(tmp_path: Path) -> None:
    """Fails where row 0 of one list is given the image of row 0 of the other."""
    for split, file in (("training", "Train_GCC-training.tsv"), ("validation", "Validation_GCC-1.1.0-Validation.tsv")):
        put(tmp_path, f"{split}/0.jpg")
        write(tmp_path / file, f"{split}\t{URLS[0]}\nbroken\n\nx\ty\n")
    assert brief(rows_of("cc3m", tmp_path), tmp_path) == [
        ("training/0.jpg", ("training",), "cc3m 000000000", "train"),
        ("missing column", "Train_GCC-training.tsv:2"),
        ("no address", "Train_GCC-training.tsv:4"),
        ("validation/0.jpg", ("validation",), "cc3m val 000000000", "val"),
        ("missing column", "Validation_GCC-1.1.0-Validation.tsv:2"),
        ("no address", "Validation_GCC-1.1.0-Validation.tsv:4"),
    ]


def test_addresses_that_end_alike_are_ambiguous(tmp_path: Path) -> None:
    """Fails where both rows get the one file of that name."""
    put(tmp_path, "images/photo.jpg", "images/other.jpg")
    urls = ["http://a.org/photo.jpg", "http://b.org/other.jpg", "http://c.org/photo.jpg"]
    write(tmp_path / "cc3m.tsv", "".join(f"caption\t{url}\n" for url in urls))
    assert [row[0] for row in brief(rows_of("cc3m", tmp_path), tmp_path)] == [
        "ambiguous name",
        "images/other.jpg",
        "ambiguous name",
    ]


SBU_URLS = ["http://static.flickr.com/2723/4385058960_b0f291553e.jpg", "http://static.flickr.com/1/2_a.jpg"]


@pytest.mark.parametrize("form", ["json", "list", "text"])
def test_sbu_in_three_forms(tmp_path: Path, form: str) -> None:
    put(tmp_path, "images/4385058960_b0f291553e.jpg")
    if form == "json":
        write(
            tmp_path / "sbu-captions-all.json", {"image_urls": SBU_URLS, "captions": ["one", "two"], "user_ids": [1, 2]}
        )
    elif form == "list":
        records = [
            {"image": url.rpartition("/")[2], "caption": c, "url": url}
            for url, c in zip(SBU_URLS, ("one", "two"), strict=True)
        ]
        write(tmp_path / "sbu.json", records)
    else:
        write(tmp_path / "SBU_captioned_photo_dataset_urls.txt", "\n".join([*SBU_URLS, "http://x.org/3.jpg"]))
        write(tmp_path / "SBU_captioned_photo_dataset_captions.txt", "one\ntwo\n")
    rows = brief(rows_of("sbu", tmp_path), tmp_path)
    assert rows[0] == ("images/4385058960_b0f291553e.jpg", ("one",), "flickr 4385058960", "train")
    assert [row[0] for row in rows[1:]] == ["missing image"] + ["missing column"] * (form == "text")


# ------------------------------------------------------------------ folders and the hub


def test_a_folder_with_texts_beside_the_images(tmp_path: Path) -> None:
    put(tmp_path, "train/a.jpg", "test/b.jpg", "c.jpg", "d.JPG")
    write(tmp_path / "train/a.txt", "a dog\n")
    write(tmp_path / "d.TXT", "a fox")
    write(tmp_path / "test/b.txt", "a cat")
    assert brief(rows_of("folder", tmp_path), tmp_path) == [
        ("no caption", "c.jpg"),
        ("d.JPG", ("a fox",), "folder d.JPG", "train"),
        ("test/b.jpg", ("a cat",), "folder test/b.jpg", "test"),
        ("train/a.jpg", ("a dog\n",), "folder train/a.jpg", "train"),
    ]


def test_a_folder_as_huggingface_has_it(tmp_path: Path) -> None:
    put(tmp_path, "train/a.jpg", "train/b.jpg", "val/c.jpg")
    write(tmp_path / "train/metadata.csv", "file_name,text\na.jpg,a dog\nz.jpg,absent\n")
    write(tmp_path / "val/metadata.jsonl", '{"file_name": "c.jpg", "text": "a cat"}\n')
    assert brief(rows_of("folder", tmp_path), tmp_path) == [
        ("missing image", "train/metadata.csv:3"),
        ("train/a.jpg", ("a dog",), "folder train/a.jpg", "train"),
        ("val/c.jpg", ("a cat",), "folder val/c.jpg", "val"),
        ("no caption", "train/b.jpg"),
    ]


def hub_rows(folder: Path) -> list[dict[str, Any]]:
    put(folder, "a.jpg", "b.jpg")
    first, second = ((folder / name).read_bytes() for name in ("a.jpg", "b.jpg"))
    return [
        {"image": {"bytes": first, "path": "a.jpg"}, "caption": ["one", "two"], "image_id": 7},
        {"image": {"bytes": first, "path": "a.jpg"}, "caption": ["three"], "image_id": 7},
        {"image": None, "caption": ["four"], "image_id": 8},
        {"image": {"bytes": second, "path": None}, "caption": [], "image_id": 9},
        {"image": {"bytes": second, "path": None}, "caption": ["five"], "image_id": 10},
        {"image": {"bytes": None, "path": "http://example.org/a.jpg"}, "caption": ["six"], "image_id": 11},
    ]


@pytest.mark.parametrize("form", ["parquet", "disk", "imagefolder"])
def test_a_set_of_the_hub(tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows, raw = hub_rows(tmp_path / "pictures"), tmp_path / "raw"
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.List(datasets.Value("string")), image_id=datasets.Value("int64")
    )
    if form == "parquet":  # as datasets writes it, but that it would itself follow the addresses in it
        (raw / "data").mkdir(parents=True)
        table = pa.Table.from_pylist(rows, features.arrow_schema)
        pq.write_table(table, raw / "data" / "validation-00000-of-00001.parquet")
    elif form == "disk":
        data = datasets.Dataset.from_list(rows[:-1], features)
        datasets.DatasetDict(validation=data).save_to_disk(raw)
    else:
        put(raw, "validation/a.jpg", "validation/b.jpg")
        write(raw / "validation/metadata.csv", "file_name,caption,image_id\na.jpg,one,7\nb.jpg,five,10\n")
    raw_rows = rows_of("hf", raw)
    assert [row[1:4] for row in raw_rows if isinstance(row, RawRow)] == [
        (("one", "two", "three") if form != "imagefolder" else ("one",), "hf val 7", "val"),
        (("five",), "hf val 10", "val"),
    ]
    assert [safe_open(row.image, "x").size for row in raw_rows if isinstance(row, RawRow)] == [(16, 16)] * 2
    if form != "imagefolder":
        reasons = [row.reason for row in raw_rows if isinstance(row, BadRow)]
        assert reasons == ["no image", "no caption"] + ["address"] * (form == "parquet")


def test_ids_may_count_from_0_in_each_part(tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "pictures", "a.jpg", "b.jpg")
    (tmp_path / "raw").mkdir()
    for part, name in (("train", "a.jpg"), ("test", "b.jpg")):
        image = {"bytes": (tmp_path / "pictures" / name).read_bytes(), "path": None}
        table = pa.Table.from_pylist([{"image": image, "caption": "one", "id": 0}])
        pq.write_table(table, tmp_path / "raw" / f"{part}-00000-of-00001.parquet")
    assert [(row[2], row[3]) for row in rows_of("hf", tmp_path / "raw")] == [("hf 0", "train"), ("hf test 0", "test")]


def test_other_images_of_one_id_are_not_merged(
    tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty id is none."""
    put(tmp_path / "pictures", "a.jpg")
    images = [(tmp_path / "pictures" / "a.jpg").read_bytes() + end for end in (b"", b"x")]
    (tmp_path / "raw").mkdir()
    for own, expected in (("cat", ["hf cat", "hf cat"]), ("", ["hf train 0", "hf train 1"])):
        rows = [{"image": {"bytes": each, "path": None}, "caption": "one", "image_id": own} for each in images]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "raw" / "train-00000-of-00001.parquet")
        raw_rows = rows_of("hf", tmp_path / "raw")
        assert [row[2] for row in raw_rows] == expected
        assert [row[0] for row in raw_rows] == images


def test_a_set_of_the_hub_names_no_file_outside(tmp_path: Path, own_cache: None) -> None:
    """Fails where a path in somebody's Parquet is followed to wherever it leads."""
    import datasets

    put(tmp_path, "private.jpg", "raw/own.jpg")
    paths = [str(tmp_path / "private.jpg"), str(tmp_path / "raw" / "own.jpg"), "../private.jpg", "own.jpg"]
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    rows = [{"image": {"bytes": None, "path": path}, "text": "a"} for path in paths]
    pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), tmp_path / "raw" / "train.parquet")
    raw_rows = rows_of("hf", tmp_path / "raw")
    reasons = [row.reason if isinstance(row, BadRow) else "good" for row in raw_rows]
    assert sorted(reasons) == ["good", "good", "unsafe name", "unsafe name"]


@pytest.mark.parametrize("role", ["image_id", "caption", "split"])
def test_no_column_of_a_set_is_opened_by_the_library(tmp_path: Path, own_cache: None, role: str) -> None:
    """Fails where `datasets` decodes what a stranger's Parquet calls an image: it opens any path or address."""
    import datasets

    put(tmp_path, "private.jpg", "own.jpg")
    (tmp_path / "raw").mkdir()
    kinds = {"image": datasets.Image(), "caption": datasets.Value("string"), role: datasets.Image()}
    row = {"image": {"bytes": (tmp_path / "own.jpg").read_bytes(), "path": None}, "caption": "one"}
    row[role] = {"bytes": None, "path": str(tmp_path / "private.jpg")}
    facts = {"huggingface": json.dumps({"info": {"features": datasets.Features(kinds).to_dict()}})}
    table = pa.Table.from_pylist([row], datasets.Features(kinds).arrow_schema).replace_schema_metadata(facts)
    pq.write_table(table, tmp_path / "raw" / "train.parquet")
    with patch("PIL.Image.open", side_effect=AssertionError("an image was opened")):
        (only,) = rows_of("hf", tmp_path / "raw")
    reasons = {"caption": "no caption", "split": "unknown split"}
    assert (only.reason if isinstance(only, BadRow) else None) == reasons.get(role)


def test_a_set_that_the_hub_does_not_have_is_one_line(tmp_path: Path, own_cache: None) -> None:
    with pytest.raises(UserError, match=r"nobody/nothing: Hugging Face datasets cannot load it") as caught:
        rows_of("hf", Path("nobody/nothing"))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ the door


def test_a_set_that_there_is_not_is_suggested() -> None:
    with pytest.raises(UserError, match=r"there is no set 'flickr30'\. Did you mean flickr30k\? Use one of coco, "):
        open_raw("flickr30", ".")


def test_a_file_in_the_place_of_a_set_is_told_how_to_be_named(tmp_path: Path) -> None:
    (tmp_path / "my.csv").touch()
    (tmp_path / "x.bin").touch()
    for name, what, todo in (
        ("my.csv", "a file", "Name its kind before it: csv"),
        ("x.bin", "a file", "Name its kind before it."),
        (".", "a folder", "Name its kind before it: folder"),
    ):
        with pytest.raises(UserError, match=rf"^SET: .* is {what}, not a kind of set\. {re.escape(todo)}"):
            open_raw(str(tmp_path / name), "out")


@pytest.mark.parametrize("raw", ["", "nowhere", "nowhere/else"])
def test_raw_that_is_not_there_is_named(raw: str) -> None:
    with pytest.raises(UserError, match=r"there is no such file or folder") as caught:
        open_raw("coco", raw)
    assert caught.value.code == ExitCode.MISSING_INPUT


@pytest.mark.parametrize("name", sorted(set(SETS) - {"hf", "folder"}))
def test_an_empty_folder_says_which_files_are_looked_for(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        open_raw(name, str(tmp_path))
    assert caught.value.code == ExitCode.MISSING_INPUT
    assert any(word in str(caught.value) for word in (".json", ".tsv", ".csv", ".tar"))
    assert "\n" not in str(caught.value)


def test_columns_are_for_tables() -> None:
    with pytest.raises(UserError, match="there is no role 'picture'"):
        open_raw("csv", ".", {"picture": "x"})
    with pytest.raises(UserError, match="set 'coco' has its own layout"):
        open_raw("coco", ".", {"image": "x"})


def test_every_set_has_a_licence_line(shared_data: Path, tmp_path: Path) -> None:
    write(tmp_path / "x.csv", "image,caption\n")
    for name, raw in (("csv", tmp_path), ("flickr8k", shared_data / "flickr8k"), ("nlvr2", shared_data / "nlvr_pairs")):
        facts = open_raw(name, str(raw)).facts
        assert facts.licence
        assert "\n" not in facts.licence
