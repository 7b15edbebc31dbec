"""Every set that `make data` reads, three images each, in its own layout."""

import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TEXTS = ("a red dog in the snow", 'two cats, "asleep"', "ein Fuß im Gras")
Files = dict[str, bytes]


def toy_image(number: int) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((16, 16)).save(data, "JPEG")
    return data.getvalue()


IMAGES = [toy_image(number) for number in range(3)]


def named(*names: str) -> Files:
    return dict(zip(names, IMAGES, strict=True))


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def lines(*values: Any) -> bytes:
    return b"".join(dump(value) + b"\n" for value in values)


def archive(*files: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def karpathy(name: str, *names: str) -> Files:
    images = [
        {"filename": each.rpartition("/")[2], "split": split, "sentences": [{"raw": text}], "imgid": n, "cocoid": n}
        | ({"filepath": each.rpartition("/")[0]} if "/" in each else {})
        for n, (each, split, text) in enumerate(zip(names, ("train", "val", "test"), TEXTS, strict=True), 1)
    ]
    places = [each if "/" in each else f"images/{each}" for each in names]
    return {f"dataset_{name}.json": dump({"dataset": name, "images": images}), **named(*places)}


def links(file: str, order: Callable[[str, str], tuple[str, str]]) -> Files:
    rows = ("\t".join(order(text, f"http://example.org/{n}.jpg")) for n, text in enumerate(TEXTS))
    return {file: "\n".join(rows).encode() + b"\n", **named(*(f"images/{n}.jpg" for n in range(3)))}


def vqa(part: str) -> Files:
    questions = [{"question_id": n, "image_id": n, "question": "what is it"} for n in (1, 2, 3)]
    annotations = [{"question_id": n, "image_id": n, "answers": [{"answer": "dog"}]} for n in (1, 2, 3)]
    return {
        f"v2_OpenEnded_{part}_questions.json": dump({"questions": questions}),
        f"v2_{part}_annotations.json": dump({"annotations": annotations}),
        **named(*(f"images/COCO_{n:012d}.jpg" for n in (1, 2, 3))),
    }


def nlvr() -> Files:
    rows = [{"identifier": f"dev-{n}-0-1", "sentence": "two dogs", "label": "True"} for n in (1, 2)]
    return {"dev.json": lines(*rows), **named("dev-1-0-img0.png", "dev-1-0-img1.png", "dev-2-0-img0.png")}


def snli() -> Files:
    row = {"gold_label": "neutral", "sentence2": "a dog"}
    rows = [{**row, "Flickr30K_ID": f"{n}", "pairID": f"{n}.jpg#0r1n"} for n in (11, 12, 13)]
    return {"snli_ve_dev.jsonl": lines(*rows), **named(*(f"images/{n}.jpg" for n in (11, 12, 13)))}


def table(suffix: str) -> Files:
    rows = [{"image": f"{n}.jpg", "caption": text, "split": "train"} for n, text in enumerate(TEXTS)]
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    comma = "image,caption,split\n" + "".join(f"{n}.jpg,{text},train\n" for n, text in enumerate(quoted))
    return {f"pairs.{suffix}": comma.encode() if suffix == "csv" else lines(*rows), **named("0.jpg", "1.jpg", "2.jpg")}


def web() -> Files:
    members = [
        (f"{n}.{kind}", content)
        for n, text in enumerate(TEXTS)
        for kind, content in (("jpg", IMAGES[n]), ("txt", text.encode()), ("json", dump({"key": str(n), "url": "x"})))
    ]
    return {"00000.tar": archive(*members), "00000_stats.json": dump({"count": 4, "successes": 3})}


def parquet() -> Files:
    rows = [{"jpg": IMAGES[n], "txt": text, "key": str(n), "url": "x"} for n, text in enumerate(TEXTS)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return {"00000.parquet": buffer.getvalue()}


def hub() -> Files:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    rows = [{"image": {"bytes": IMAGES[n], "path": None}, "caption": text} for n, text in enumerate(TEXTS)]
    with tempfile.TemporaryDirectory() as folder:
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows, features)).save_to_disk(folder)
        return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def files(*texts: str) -> Files:
    return {**named("0.jpg", "1.jpg", "2.jpg"), **{f"{n}.txt": text.encode() for n, text in enumerate(texts)}}


def web_files() -> Files:
    return {**files(*TEXTS), **{f"{n}.json": dump({"key": f"{n}"}) for n in (0, 1)}}


def genome() -> Files:
    regions = [{"id": n, "regions": [{"phrase": text}]} for n, text in enumerate(TEXTS)]
    known = [{"image_id": n, "coco_id": None} for n in range(3)]
    images = named(*(f"VG_100K/{n}.jpg" for n in range(3)))
    return {"region_descriptions.json": dump(regions), "image_data.json": dump(known), **images}


def token() -> Files:
    rows = "".join(f"{n}_a.jpg#0\t{text}\n" for n, text in enumerate(TEXTS))
    lists = {"Flickr_8k.devImages.txt": b"1_a.jpg\n"}
    return {"Flickr8k.token.txt": rows.encode(), **lists, **named("0_a.jpg", "1_a.jpg", "2_a.jpg")}


TOYS: dict[str, tuple[str, Callable[[], Files]]] = {
    "coco": ("coco", lambda: karpathy("coco", *(f"val2014/COCO_val2014_{n:012d}.jpg" for n in (1, 2, 3)))),
    "flickr30k": ("flickr30k", lambda: karpathy("flickr30k", "11.jpg", "12.jpg", "13.jpg")),
    "flickr8k": ("flickr8k", lambda: karpathy("flickr8k", "11.jpg", "12.jpg", "13.jpg")),
    "flickr8k token": ("flickr8k", token),
    "vg": ("vg", genome),
    "sbu": ("sbu", lambda: {**links("x", lambda *_: ("", "")), **sbu()}),
    "cc3m": ("cc3m", lambda: links("Train_GCC-training.tsv", lambda text, url: (text, url))),
    "cc12m": ("cc12m", lambda: links("cc12m.tsv", lambda text, url: (url, text))),
    "vqav2": ("vqav2", lambda: vqa("mscoco_val2014")),
    "daquar": ("daquar", lambda: vqa("daquar_val")),
    "nlvr2": ("nlvr2", nlvr),
    "nlvr_pairs": ("nlvr_pairs", nlvr),
    "snli_ve": ("snli_ve", snli),
    "webdataset": ("webdataset", web),
    "webdataset parquet": ("webdataset", parquet),
    "webdataset files": ("webdataset", web_files),
    "csv": ("csv", lambda: table("csv")),
    "jsonl": ("jsonl", lambda: table("jsonl")),
    "folder": ("folder", lambda: files(*TEXTS)),
    "hf": ("hf", hub),
}
"""Name of the toy -> name of the set, and its files by their names."""


def sbu() -> Files:
    urls = [f"http://example.org/{n}.jpg" for n in range(3)]
    return {"sbu-captions-all.json": dump({"image_urls": urls, "captions": [*TEXTS]})}


def write(folder: Path, content: Files) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder
