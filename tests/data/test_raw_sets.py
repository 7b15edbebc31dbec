"""The sets known by name, each in the forms in which people have it: true files where there are, small ones else."""

import json
import zlib
from collections import Counter
from hashlib import md5
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_toys import IMAGES

from maskvlm.data.images import safe_open
from maskvlm.data.raw import SETS, BadRow, RawRow, open_raw
from maskvlm.utils.errors import ExitCode, UserError


def rows_of(name: str, raw: Path, **columns: str) -> list[RawRow | BadRow]:
    return [*open_raw(name, str(raw), columns or None).rows()]


def counted(rows: list[RawRow | BadRow]) -> dict[tuple[str, str], int]:
    """(split, reason or "good") -> rows."""
    return Counter((row.split, row.reason if isinstance(row, BadRow) else "good") for row in rows)


def brief(rows: list[RawRow | BadRow], folder: Path) -> list[str]:
    """`path below the folder | id | split | caption | caption` of good rows, `reason @ origin` of bad ones."""
    return [
        f"{row.reason} @ {row.origin}"
        if isinstance(row, BadRow)
        else " | ".join([str(row.image).removeprefix(f"{folder}/"), row.image_id, row.split, *row.captions])
        for row in rows
    ]


# ------------------------------------------------------------------ true files


@pytest.mark.parametrize(
    ("name", "folder", "counts", "files"),
    [
        ("flickr8k", "flickr8k", {("train", "good"): 6000, ("val", "good"): 1000}, 0),
        ("flickr30k", "formats/flickr30k", {("test", "good"): 5}, 0),
        ("cc3m", "formats/cc3m", {("val", "missing image"): 500}, 0),
        ("snli_ve", "snli_ve", {("pictures", "good"): 208}, 2),
        ("snli_ve", "formats/visual_entailment", {("pictures", "good"): 2}, 1),
        ("daquar", "daquar_vqa", {("pictures", "good"): 794}, 4),  # of 795: no question is about image 366
        pytest.param("nlvr_pairs", "nlvr_pairs", {("pictures", "good"): 15_894}, 2, marks=pytest.mark.slow),
        ("nlvr2", "formats/nlvr2", {("pictures", "good"): 8, ("pictures", "missing image"): 334}, 2),
        ("vqav2", "formats/vqav2", {("pictures", "good"): 1}, 2),
    ],
)
def test_true_files(shared_data: Path, name: str, folder: str, counts: dict[tuple[str, str], int], files: int) -> None:
    """Fails where an image is taken twice or lost, or one that no example is about."""
    raw = open_raw(name, str(shared_data / folder))
    rows = [*raw.rows()]
    assert counted(rows) == counts
    assert [file.suffix in (".json", ".jsonl") for file in raw.annotations] == [True] * files
    good = [row for row in rows if isinstance(row, RawRow)]
    assert len({row.image_id for row in good}) == len({row.image for row in good}) == len(good)
    assert all(Path(str(row.image)).is_file() and bool(row.captions) != bool(files) for row in good)
    assert not files or all(str(row.image).endswith(f"/images/{row.name}") for row in good)


def test_rows_of_true_files(shared_data: Path) -> None:
    raw = open_raw("flickr8k", str(shared_data / "flickr8k"))
    rows = [row for row in raw.rows() if isinstance(row, RawRow)]
    assert sum(len(row.captions) for row in rows) == 35_000
    assert (raw.facts.images, raw.facts.captions) == (8000, 40_000)
    assert rows[0].image_id == "flickr 2513260012"
    assert rows[0].captions[0] == "A black dog is running after a white dog in the snow ."
    assert rows[0].origin == "dataset_flickr8k.json image 0 (2513260012_03d33305cf.jpg)"
    assert safe_open(rows[0].image, "x").size == (160, 160)
    entities = {row[2]: row[1] for row in rows_of("flickr30k", shared_data / "formats/flickr30k")}
    captions = entities["flickr 6338542128"]
    assert len(captions) == 5
    assert captions[0].startswith("On a sunny , dry day , wearing full football gear , a Texas A&M football player")
    assert "[" not in "".join(captions)


# ------------------------------------------------------------------ small files in the published layouts


def image(name: str, split: str, *captions: str, **more: Any) -> dict[str, Any]:
    """A row of a json in the Karpathy layout."""
    sentences = [{"raw": text, "tokens": text.split(), "sentid": 0} for text in captions]
    return {"filename": name, "split": split, "sentences": sentences, **more}


def pictures(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, IMAGES[0])


def lay(folder: Path, files: dict[str, Any]) -> Path:
    """Write the files: bytes and texts as they are, anything else as JSON."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


VAL, TRAIN = "COCO_val2014_000000391895.jpg", "COCO_train2014_000000000009.jpg"
KARPATHY = [
    image(VAL, "restval", "a man", "two", filepath="val2014", cocoid=391895, imgid=0),
    image("COCO_train2014_000000000012.jpg", "test", "a dog", filepath="train2014", cocoid=12, imgid=1),
    image("COCO_val2014_000000000013.jpg", "val", "a cat", filepath="val2014", cocoid=13, imgid=2),
    image("../x.jpg", "val", "a cat", cocoid=14),
    image(VAL, "train", filepath="val2014", cocoid=15),
    {"filename": 3, "split": "test"},
]


def coco_captions(name: str, number: int) -> dict[str, Any]:
    captions = [{"image_id": number, "id": n, "caption": f"caption {n}"} for n in (1, 2)]
    return {"images": [{"id": number, "file_name": name}, {"id": 7, "file_name": "no.jpg"}], "annotations": captions}


TOKENS = [f"{n}.jpg#{k}\tcaption {k} of {n}" for n in (11, 22, 33) for k in (0, 1)]
HUB = 'raw,sentids,split,filename,img_id\n"[""one, two"", ""three""]","[1, 2]",test,11.jpg,0\n[1],[],val,12.jpg,1\n'
KAGGLE = "image_name| comment_number| comment\n11.jpg| 0| one\n11.jpg| 1| two\n11.jpg| 2   x\n"
REGIONS = [{"id": n, "regions": [{"region_id": n, "phrase": f"phrase {n}"}] * (n % 4)} for n in (1, 2, 3, 4)]
CC3M = ("Train_GCC-training.tsv", "Validation_GCC-1.1.0-Validation.tsv")
SBU_URLS = ["http://static.flickr.com/2723/4385058960_b0f291553e.jpg", "http://static.flickr.com/1/2_a.jpg"]
SBU_IMAGE, SBU = "images/4385058960_b0f291553e.jpg", "SBU_captioned_photo_dataset"
FORMS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "coco in Karpathy's split": (
        {
            **pictures(f"val2014/{VAL}", "train2017/000000000012.jpg"),
            "karpathy/dataset_coco.json": {"images": KARPATHY, "dataset": "coco"},
        },
        [
            f"val2014/{VAL} | coco 391895 | train | a man | two",
            "train2017/000000000012.jpg | coco 12 | test | a dog",
            "missing image @ dataset_coco.json image 2 (val2014/COCO_val2014_000000000013.jpg)",
            "unsafe name @ dataset_coco.json image 3 (../x.jpg)",
            f"no caption @ dataset_coco.json image 4 (val2014/{VAL})",
            "malformed row @ dataset_coco.json image 5",
        ],
    ),
    "coco as it is distributed": (
        {
            **pictures(f"train2014/{TRAIN}", f"val2014/{VAL}"),
            "annotations/captions_train2014.json": coco_captions(TRAIN, 9),
            "annotations/captions_val2014.json": coco_captions(VAL, 391895),
        },
        [
            f"train2014/{TRAIN} | coco 9 | train | caption 1 | caption 2",
            "missing image @ captions_train2014.json image 1 (no.jpg)",
            f"val2014/{VAL} | coco 391895 | val | caption 1 | caption 2",
            "missing image @ captions_val2014.json image 1 (no.jpg)",
        ],
    ),
    "flickr30k tokens and lists": (
        {
            **pictures(*(f"flickr30k-images/{n}.jpg" for n in (11, 22, 33))),
            "results_20130124.token": "\n".join([*TOKENS, "no tab"]),
            "flickr30k_test.txt": "22.jpg\n",
            "val.txt": "33\n",
        },
        [
            "malformed row @ results_20130124.token:7",
            *(
                f"flickr30k-images/{n}.jpg | flickr {n} | {split} | caption 0 of {n} | caption 1 of {n}"
                for n, split in ((11, "train"), (22, "test"), (33, "val"))
            ),
        ],
    ),
    "flickr30k of the hub": (
        {**pictures("flickr30k-images/11.jpg"), "flickr_annotations_30k.csv": HUB},
        [
            "malformed row @ flickr_annotations_30k.csv:3",
            "flickr30k-images/11.jpg | flickr 11 | test | one, two | three",
        ],
    ),
    "flickr30k of Kaggle": (
        {**pictures("flickr30k-images/11.jpg"), "results.csv": KAGGLE},
        # as in the true file, line 19999
        ["missing column @ results.csv:4", "flickr30k-images/11.jpg | flickr 11 | train | one | two"],
    ),
    # a photo that COCO has too has its id there: else the leak of COCO's test images would not be seen by id
    "vg": (
        {
            **pictures("VG_100K/1.jpg", "images/VG_100K_2/2.jpg", "VG_100K/4.jpg"),
            "region_descriptions.json": [*REGIONS, {"id": "5"}],
            "image_data.json": [{"image_id": n, "coco_id": 9 if n == 2 else None} for n in (1, 2, 3, 4)],
        },
        [
            "VG_100K/1.jpg | vg 1 | train | phrase 1",
            "images/VG_100K_2/2.jpg | coco 9 | train | phrase 2 | phrase 2",
            "missing image @ region_descriptions.json [2] (3.jpg)",
            "no caption @ region_descriptions.json [3] (4.jpg)",
            "malformed row @ region_descriptions.json [4]",
        ],
    ),
    # likewise, as one photo
    "vqav2 of Visual Genome": (
        {
            **pictures("images/COCO_val2014_000000000042.jpg", "images/VG_100K/8.jpg", "images/VG_100K/9.jpg"),
            "v2_OpenEnded_mscoco_val2014_questions.json": {
                "questions": [{"question_id": 1, "image_id": 42, "question": "What?"}]
            },
            "question_answers.json": [{"id": number, "qas": []} for number in (8, 9)],
            "image_data.json": [{"image_id": 8, "coco_id": 42}, {"image_id": 9, "coco_id": None}],
        },
        ["images/COCO_val2014_000000000042.jpg | coco 42 | pictures", "images/VG_100K/9.jpg | vg 9 | pictures"],
    ),
    # row 0 of one list is not given the image of row 0 of the other
    "cc3m with a folder for each list": (
        {
            **pictures("training/0.jpg", "validation/0.jpg"),
            CC3M[0]: "training\thttp://example.org/a\nbroken\n\nx\ty\n",
            CC3M[1]: "validation\thttp://example.org/a\n",
        },
        [
            "training/0.jpg | cc3m 000000000 | train | training",
            f"missing column @ {CC3M[0]}:2",
            f"no address @ {CC3M[0]}:4",
            "validation/0.jpg | cc3m val 000000000 | val | validation",
        ],
    ),
    # no two rows get the one file of a name
    "cc3m of addresses that end alike": (
        {
            **pictures("images/photo.jpg", "images/other.jpg"),
            "cc3m.tsv": "a\thttp://a.org/photo.jpg\nb\thttp://b.org/other.jpg\nc\thttp://c.org/photo.jpg\n",
        },
        [
            "ambiguous name @ cc3m.tsv:1",
            "images/other.jpg | cc3m 000000001 | train | b",
            "ambiguous name @ cc3m.tsv:3",
        ],
    ),
    "sbu json": (
        {**pictures(SBU_IMAGE), "sbu-captions-all.json": {"image_urls": SBU_URLS, "captions": ["one", "two"]}},
        [f"{SBU_IMAGE} | flickr 4385058960 | train | one", "missing image @ sbu-captions-all.json [1]"],
    ),
    "sbu text": (
        {
            **pictures(SBU_IMAGE),
            f"{SBU}_urls.txt": "\n".join([*SBU_URLS, "http://x.org/3.jpg"]),
            f"{SBU}_captions.txt": "one\ntwo\n",
        },
        [
            f"{SBU_IMAGE} | flickr 4385058960 | train | one",
            f"missing image @ {SBU}_urls.txt:2",
            f"missing column @ {SBU}_urls.txt:3",
        ],
    ),
    "folder of texts": (
        {
            **pictures("train/a.jpg", "test/b.jpg", "c.jpg", "d.JPG"),
            **{"train/a.txt": "a dog", "d.TXT": "a fox", "test/b.txt": "a cat"},
        },
        [
            "no caption @ c.jpg",
            "d.JPG | folder d.JPG | train | a fox",
            "test/b.jpg | folder test/b.jpg | test | a cat",
            "train/a.jpg | folder train/a.jpg | train | a dog",
        ],
    ),
    "folder as Hugging Face has it": (
        {
            **pictures("train/a.jpg", "train/b.jpg", "val/c.jpg"),
            "train/metadata.csv": "file_name,text\na.jpg,a dog\nz.jpg,absent\n",
            "val/metadata.jsonl": '{"file_name": "c.jpg", "text": "a cat"}\n',
        },
        [
            "missing image @ train/metadata.csv:3",
            "train/a.jpg | folder train/a.jpg | train | a dog",
            "val/c.jpg | folder val/c.jpg | val | a cat",
            "no caption @ train/b.jpg",
        ],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_published_layout_is_read_row_by_row(tmp_path: Path, form: str) -> None:
    files, expected = FORMS[form]
    assert brief(rows_of(form.split()[0], lay(tmp_path, files)), tmp_path) == expected
    if "image_data.json" in files:  # which ids of Visual Genome are COCO's
        (tmp_path / "image_data.json").unlink()
        with pytest.raises(UserError, match=r"image_data\.json is missing"):
            open_raw(form.split()[0], str(tmp_path))


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


@pytest.mark.parametrize(("name", "naming"), [("cc12m", "rows"), *(("cc3m", naming) for naming in NAMINGS)])
def test_images_of_a_list_by_the_names_of_downloaders(tmp_path: Path, name: str, naming: str) -> None:
    """Fails where a row gets another row's image; row 2 has none."""
    places = [f"images/{NAMINGS[naming](url, row)}" for row, url in enumerate(URLS)]
    pairs = [(f"caption {row}", url) if name == "cc3m" else (url, f"caption {row}") for row, url in enumerate(URLS)]
    lay(tmp_path, {**pictures(*places[:2], places[3]), CC3M[0]: "".join("\t".join(pair) + "\n" for pair in pairs)})
    expected = [f"{places[row]} | {name} {row:09d} | train | caption {row}" for row in range(4)]
    expected[2] = f"missing image @ {CC3M[0]}:3"
    assert brief(rows_of(name, tmp_path), tmp_path) == expected


# ------------------------------------------------------------------ the hub


def picture(end: bytes = b"") -> dict[str, Any]:
    return {"bytes": IMAGES[0] + end, "path": None}


def parquet(file: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), file)


@pytest.mark.parametrize("form", ["parquet", "disk", "imagefolder"])
def test_a_set_of_the_hub(tmp_path: Path, own_cache: None, form: str) -> None:
    import datasets

    rows = [
        {"image": picture(), "caption": ["one", "two"], "image_id": 7},
        {"image": picture(), "caption": ["three"], "image_id": 7},
        {"image": None, "caption": ["four"], "image_id": 8},
        {"image": picture(), "caption": [], "image_id": 9},
        {"image": picture(b"x"), "caption": ["five"], "image_id": 10},
        {"image": {"bytes": None, "path": "http://example.org/a.jpg"}, "caption": ["six"], "image_id": 11},
    ]
    captions, raw = datasets.List(datasets.Value("string")), tmp_path / "raw"
    features = datasets.Features(image=datasets.Image(), caption=captions, image_id=datasets.Value("int64"))
    if form == "parquet":  # as datasets writes it, but that it would itself follow the addresses in it
        parquet(raw / "data" / "validation-00000-of-00001.parquet", rows, features.arrow_schema)
    elif form == "disk":
        datasets.DatasetDict(validation=datasets.Dataset.from_list(rows[:-1], features)).save_to_disk(raw)
    else:
        table = "file_name,caption,image_id\na.jpg,one,7\nb.jpg,five,10\n"
        lay(raw / "validation", {**pictures("a.jpg", "b.jpg"), "metadata.csv": table})
    raw_rows = rows_of("hf", raw)
    assert [row[1:4] for row in raw_rows if isinstance(row, RawRow)] == [
        (("one", "two", "three") if form != "imagefolder" else ("one",), "hf val 7", "val"),
        (("five",), "hf val 10", "val"),
    ]
    assert [safe_open(row.image, "x").size for row in raw_rows if isinstance(row, RawRow)] == [(16, 16)] * 2
    bad = {"parquet": ["no image", "no caption", "address"], "disk": ["no image", "no caption"], "imagefolder": []}
    assert [row.reason for row in raw_rows if isinstance(row, BadRow)] == bad[form]


def test_a_set_of_the_hub_names_no_file_outside(tmp_path: Path, own_cache: None) -> None:
    """Fails where a path in somebody's Parquet is followed to wherever it leads."""
    import datasets

    lay(tmp_path, pictures("private.jpg", "raw/own.jpg"))
    paths = [str(tmp_path / "private.jpg"), str(tmp_path / "raw" / "own.jpg"), "../private.jpg", "own.jpg"]
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    rows = [{"image": {"bytes": None, "path": path}, "text": "a"} for path in paths]
    parquet(tmp_path / "raw" / "train.parquet", rows, features.arrow_schema)
    reasons = [row.reason if isinstance(row, BadRow) else "good" for row in rows_of("hf", tmp_path / "raw")]
    assert sorted(reasons) == ["good", "good", "unsafe name", "unsafe name"]


@pytest.mark.parametrize("role", ["image_id", "caption", "split"])
def test_no_column_of_a_set_is_opened_by_the_library(tmp_path: Path, own_cache: None, role: str) -> None:
    """Fails where `datasets` decodes what a stranger's Parquet calls an image: it opens any path or address."""
    import datasets

    lay(tmp_path, pictures("private.jpg"))
    kinds = {"image": datasets.Image(), "caption": datasets.Value("string"), role: datasets.Image()}
    row = {"image": picture(), "caption": "one", role: {"bytes": None, "path": str(tmp_path / "private.jpg")}}
    facts = {"huggingface": json.dumps({"info": {"features": datasets.Features(kinds).to_dict()}})}
    parquet(tmp_path / "raw" / "train.parquet", [row], datasets.Features(kinds).arrow_schema.with_metadata(facts))
    with patch("PIL.Image.open", side_effect=AssertionError("an image was opened")):
        (only,) = rows_of("hf", tmp_path / "raw")
    reasons = {"caption": "no caption", "split": "unknown split"}
    assert (only.reason if isinstance(only, BadRow) else None) == reasons.get(role)


# ------------------------------------------------------------------ the door


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("flickr30", "."), "Did you mean flickr30k"),
        ((str(Path(__file__).parent), "out"), "Name its kind before it: folder"),
        ((__file__, "out"), "is a file, not a kind of set"),
        (("coco", "nowhere/else"), "no such file or folder"),
        (("csv", ".", {"picture": "x"}), "no role 'picture'"),
        (("coco", ".", {"image": "x"}), "has its own layout"),
        (("folder", ".", None, None, "."), "has its own layout"),
        *(((name, "EMPTY"), r"\.(json|tsv|csv|tar)") for name in sorted({*SETS} - {"hf", "folder"})),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path: Path, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_raw(*(str(tmp_path) if each == "EMPTY" else each for each in arguments))
    assert "\n" not in str(caught.value)
    assert "EMPTY" not in arguments or caught.value.code == ExitCode.MISSING_INPUT
