"""Evaluation suites: each reader against its true layout, each figure against a few independent lines or the official
code, and what is wrong with a file told by its place."""

import io
import itertools
import json
import math
import random
import re
import shutil
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from toy_pretrained import saved

from maskvlm.cli.main import main
from maskvlm.data.scenes.source import Scenes
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.suites import aro_order, cxc, eccv_caption, metrics, pointing
from maskvlm.suites.aro import Aro
from maskvlm.suites.aro_order import AroOrder
from maskvlm.suites.cxc import Cxc
from maskvlm.suites.eccv_caption import EccvCaption
from maskvlm.suites.flickr8k_judgements import Flickr8kJudgements
from maskvlm.suites.pointing import Boxed, Pointing
from maskvlm.suites.registry import suite_class, suite_names
from maskvlm.suites.run import SuiteReport, lines_of_suite, run_suite, subset, trained_on, write_result
from maskvlm.suites.scores import WAYS, pair_scores
from maskvlm.suites.sugarcrepe import SugarCrepe
from maskvlm.suites.suite import ItemRows, Suite, SuiteItem, SuiteMetric
from maskvlm.suites.vsr import Vsr
from maskvlm.suites.zeroshot import Zeroshot
from maskvlm.utils.errors import ExitCode, UserError

ROOT = Path(__file__).resolve().parents[2]


def picture(number: int) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((20, 16)).save(data, "PNG")
    return data.getvalue()


def write(root: Path, files: dict[str, Any]) -> Path:
    """Bytes as they are, texts, lists of lines of JSON, and other JSON."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def by_name(suite_metrics: list[SuiteMetric]) -> dict[str, float]:
    return {each.name: each.value for each in suite_metrics}


# ---------------------------------------------------------------------- the true layouts

COCO = ("000000000139.jpg", "000000000285.jpg", "000000000632.jpg")
VAL2014 = tuple(f"COCO_val2014_{name}" for name in COCO)
FLICKR = ("1056338697_4f7d7ce270.jpg", "2549968784_39bfbe44f9.jpg", "1131932671_c8d17751b3.jpg")


def sugarcrepe(root: Path) -> Path:
    def item(name: str, true: str, false: str) -> dict[str, str]:
        return {"filename": name, "caption": true, "negative_caption": false}

    swapped = {"0": item(COCO[0], "a red circle and a blue star", "a blue circle and a red star")}
    swapped["1"] = item(COCO[1], "a green square", "a square that is not green")
    files = {"swap_att.json": swapped, "add_obj.json": {"0": item(COCO[2], "a ring", "a ring and a cross")}}
    return write(root, files | {f"images/{name}": picture(n) for n, name in enumerate(COCO)})


def aro(root: Path) -> Path:
    def item(image: str, box: tuple[float, ...], true: str, false: str, **more: Any) -> dict[str, Any]:
        keys = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
        names = {"image_id": image, "image_path": f"{image}.jpg", "true_caption": true, "false_caption": false}
        return names | dict(zip(keys, box, strict=True)) | more

    above = ("the circle is above the star", "the star is above the circle")
    relations = [
        item("2343", (0, 0, 10, 8), *above, relation_name="above", subject="circle", object="star"),
        item("2343", (10, 8, 10, 8), *above, relation_name="above", subject="circle", object="star"),
    ]
    colours = ("the red ring and the blue square", "the blue ring and the red square")
    attributes = [item("2344", (5.0, 4.6, 99, 99.2), *colours, attributes=["red", "blue"], obj1_name="ring")]
    files = {"visual_genome_relation.json": relations, "visual_genome_attribution.json": attributes}
    files["image_data.json"] = [{"image_id": 2343, "coco_id": 139}, {"image_id": 2344, "coco_id": None}]
    return write(root, files | {f"images/{name}.jpg": picture(n) for n, name in enumerate(("2343", "2344"))})


def vsr_line(image: str, caption: str, label: Any, relation: str = "left of") -> str:
    link = f"http://images.cocodataset.org/train2017/{image}"
    record = {"image": image, "image_link": link, "caption": caption, "label": label, "relation": relation}
    more = {"annotator_id": 2, "vote_true_validator_id": "[18, 2]", "vote_false_validator_id": "[1]"}
    return json.dumps(record | {"subj": "circle", "obj": "star"} | more) + "\n"


def vsr(root: Path) -> Path:
    lines = vsr_line(COCO[0], "The circle is left of the star.", 1) + vsr_line(
        COCO[1], "The star is above.", 0, "above"
    )
    files = {"data/splits/zeroshot/test.jsonl": lines}
    return write(root, files | {f"images/train2017/{name}": picture(n) for n, name in enumerate(COCO)})


def flickr8k(root: Path) -> Path:
    tokens = "".join(
        f"{name}#{n}\ta {word} circle on {n}\n"
        for name, word in zip(FLICKR, ("red", "blue", "green"), strict=True)
        for n in range(2)
    )
    first, second, third = FLICKR
    experts = [(first, f"{second}#1", 1, 1, 2), (third, f"{third}#1", 4, 4, 4), (second, f"{first}#0", 3, 3, 4)]
    crowd = [(first, f"{second}#0", 0.25, 1, 3), (third, f"{third}#1", 1, 3, 0), (second, f"{third}#0", 0, 0, 3)]
    files = {"Flickr8k.token.txt": tokens}
    for name, rows in (("ExpertAnnotations.txt", experts), ("CrowdFlowerAnnotations.txt", crowd)):
        files[name] = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    return write(root, files | {f"images/{name}": picture(n) for n, name in enumerate(FLICKR)})


def coco_captions(per_image: int = 2) -> dict[str, Any]:
    images = [{"id": int(name[:-4]), "file_name": full} for name, full in zip(COCO, VAL2014, strict=True)]
    annotations = [
        {"id": 100 * n + k, "image_id": image["id"], "caption": f"a {('red', 'blue', 'green')[n]} thing {k}"}
        for n, image in enumerate(images)
        for k in range(per_image)
    ]
    return {"images": images, "annotations": annotations}


def crisscrossed(root: Path) -> Path:
    def sent(number: int) -> str:
        return f"COCO_val2014:sentid:{number}"

    sits = [
        (sent(number), VAL2014[n], rated)
        for (number, n), rated in zip(
            itertools.product((0, 1, 100, 201), (0, 1, 2)),
            (4.9, 1.0, 0.2, 4.5, 2.0, 1.1, 0.8, 4.7, 2.2, 0.4, 3.0, 4.1),
            strict=True,
        )
    ]
    sis = [
        (VAL2014[a], VAL2014[b], rated)
        for (a, b), rated in zip(((0, 1), (0, 2), (1, 2), (1, 0)), (2.0, 3.5, 1.0, 0.1), strict=True)
    ]
    sts = [
        (sent(a), sent(b), rated)
        for (a, b), rated in zip(((0, 1), (1, 100), (100, 201), (201, 0)), (5, 2.5, 1, 0), strict=True)
    ]
    files: dict[str, Any] = {"annotations/captions_val2014.json": coco_captions()}
    for kind, rows in (("sits", sits), ("sis", sis), ("sts", sts)):
        head = ",".join([*cxc.KINDS[kind], "agg_score", "sampling_method"])
        files[f"data/{kind}_test.csv"] = "\n".join([head, *(f"{a},{b},{r},c2i_intrasim" for a, b, r in rows)]) + "\n"
    return write(root, files | {f"images/{name}": picture(n) for n, name in enumerate(VAL2014)})


ENTITIES = """<annotation>
  <filename>36979.jpg</filename>
  <size><width>500</width><height>400</height><depth>3</depth></size>
  <object><name>1</name><name>7</name><bndbox><xmin>1</xmin><ymin>101</ymin><xmax>250</xmax><ymax>200</ymax></bndbox></object>
  <object><name>1</name><bndbox><xmin>251</xmin><ymin>1</ymin><xmax>500</xmax><ymax>100</ymax></bndbox></object>
  <object><name>3</name><scene>1</scene><nobndbox>0</nobndbox></object>
</annotation>"""


def entities(root: Path) -> Path:
    sentences = "[/EN#1/people/animals A red circle] above [/EN#2/other a star] .\n"
    sentences += "[/EN#7/other blue ring] in [/EN#3/scene white] .\n"
    files = {"Sentences/36979.txt": sentences, "Annotations/36979.xml": ENTITIES, "test.txt": "36979\n"}
    return write(root, files | {"images/36979.jpg": picture(1)})


def captions(root: Path) -> Path:
    texts = ("A red circle is on the left of a blue star.", "Red!", "a blue star, a red circle", "Red circle.")
    images = [
        {"filename": name, "split": "test" if n else "val", "sentences": [{"raw": text} for text in texts], "imgid": n}
        for n, name in enumerate(FLICKR)
    ]
    files = {"dataset_flickr8k.json": {"dataset": "flickr8k", "images": images}}
    return write(root, files | {f"images/{name}": picture(n) for n, name in enumerate(FLICKR)})


def classes(root: Path) -> Path:
    counts = {"red_circle": 3, "blue_star": 2, "ring": 1}
    files = {
        f"{name}/a/{n}.png": picture(10 * k + n) for k, (name, count) in enumerate(counts.items()) for n in range(count)
    }
    return write(root, files | {"stray.png": picture(99)})


LAYOUTS: dict[str, tuple[Callable[[Path], Path], Suite]] = {
    "sugarcrepe": (sugarcrepe, SugarCrepe()),
    "aro": (aro, Aro()),
    "vsr": (vsr, Vsr()),
    "flickr8k_judgements": (flickr8k, Flickr8kJudgements()),
    "cxc": (crisscrossed, Cxc()),
    "pointing": (entities, Pointing()),
    "aro_order": (captions, AroOrder()),
    "zeroshot": (classes, Zeroshot()),
}


def read(name: str, root: Path) -> ItemRows:
    make, suite = LAYOUTS[name]
    return suite.read(make(root), None)


# ---------------------------------------------------------------------- readers


def test_sugarcrepe_reads_its_seven_files(tmp_path: Path) -> None:
    rows = read("sugarcrepe", tmp_path)
    assert rows.skipped == {}
    assert len(rows.notes) == 5  # of seven files two are there
    first = next(item for item in rows.items if item.kind == "swap_att")
    assert first.texts == ("a red circle and a blue star", "a blue circle and a red star")
    assert first.image_ids == ("coco 139",)
    assert [Path(str(item.images[0])).name for item in rows.items] == [COCO[2], COCO[0], COCO[1]]


def test_vsr_reads_its_lines_and_finds_images_below_the_folder(tmp_path: Path) -> None:
    rows = read("vsr", tmp_path)
    assert [(item.texts, item.truth, item.kind) for item in rows.items] == [
        (("The circle is left of the star.",), 1, "left of"),
        (("The star is above.",), 0, "above"),
    ]
    assert all("train2017" in str(item.images[0]) for item in rows.items)


def test_judgements_leave_out_an_images_own_captions_for_experts_alone(tmp_path: Path) -> None:
    """As published: they are the references of the measures that are compared so."""
    rows = read("flickr8k_judgements", tmp_path)
    assert [(item.kind, item.texts[0], item.truth) for item in rows.items] == [
        ("experts", "a blue circle on 1", [1.0, 1.0, 2.0]),
        ("experts", "a red circle on 0", [3.0, 3.0, 4.0]),
        ("crowd", "a blue circle on 0", [0.25]),
        ("crowd", "a green circle on 1", [1.0]),
        ("crowd", "a green circle on 0", [0.0]),
    ]
    assert rows.items[0].image_ids == ("flickr 1056338697",)
    assert rows.notes == ["1 judged pairs of an image and its own caption are left out, as published"]


def test_aro_reads_both_tests_with_boxes_and_ids_of_coco(tmp_path: Path) -> None:
    rows = read("aro", tmp_path)
    assert [(item.kind, item.image_ids, item.box) for item in rows.items] == [
        ("relation: above", ("coco 139",), (0, 0, 10, 8)),
        ("relation: above", ("coco 139",), (10, 8, 20, 16)),
        ("attribution: red_blue", ("vg 2344",), (5, 5, 104, 104)),
    ]
    assert rows.items[0].texts == ("the circle is above the star", "the star is above the circle")
    assert rows.ids_known
    (tmp_path / "image_data.json").unlink()
    rows = Aro().read(tmp_path, None)
    assert not rows.ids_known  # of "vg 2343" nobody can tell whether it is COCO's
    (tmp_path / "visual_genome_relation.json").unlink()
    assert Aro().read(tmp_path, None).notes == ["visual_genome_relation.json is missing"]


@pytest.mark.parametrize("suite", [Aro(), SugarCrepe()])
def test_a_folder_with_none_of_several_files_is_refused(suite: Suite, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of this suite's files") as caught:
        suite.read(tmp_path, None)
    assert caught.value.code == ExitCode.MISSING_INPUT


def test_only_the_box_of_an_image_is_looked_at(tmp_path: Path, model: PretrainedMaskVLM) -> None:
    suite, rows = Aro(), read("aro", tmp_path)
    upper, lower, edge = (scores for scores in suite.ask(model, rows.items, "match"))
    whole = Image.open(tmp_path / "images/2343.jpg")
    for scores, box in ((upper, (0, 0, 10, 8)), (lower, (10, 8, 20, 16))):
        np.testing.assert_allclose(scores, model.match(whole.crop(box), list(rows.items[0].texts)), atol=1e-6)
    assert upper != lower
    # A box that leads over the edge ends there.
    other = Image.open(tmp_path / "images/2344.jpg").crop((5, 5, 20, 16))
    np.testing.assert_allclose(edge, model.match(other, list(rows.items[2].texts)), atol=1e-6)


def test_a_box_outside_of_its_image_is_left_out(tmp_path: Path, model: PretrainedMaskVLM) -> None:
    rows = read("aro", tmp_path)
    rows.items[1] = rows.items[1]._replace(box=(20, 0, 10**9, 10**9))
    report = run_suite(Aro(), model, rows)
    assert len(report.items) == 2
    assert "lies outside of the image of 20 by 16 pixels" in report.skipped["box outside of its image"][0]


def test_cxc_reads_pairs_of_three_kinds(tmp_path: Path) -> None:
    rows = read("cxc", tmp_path)
    kinds = {kind: [item for item in rows.items if item.kind == kind] for kind in cxc.KINDS}
    assert {kind: len(items) for kind, items in kinds.items()} == {"sits": 12, "sis": 4, "sts": 4}
    assert (len(kinds["sits"][0].images), kinds["sits"][0].texts) == (1, ("a red thing 0",))
    assert (len(kinds["sis"][0].images), kinds["sis"][0].texts) == (2, ())
    assert (kinds["sts"][1].images, kinds["sts"][1].texts) == ((), ("a red thing 1", "a blue thing 0"))
    assert kinds["sits"][0].truth == (4.9, "COCO_val2014:sentid:0")


def test_pointing_reads_phrases_that_have_boxes(tmp_path: Path) -> None:
    rows = read("pointing", tmp_path)
    assert [(item.texts[0], item.truth, item.kind) for item in rows.items] == [
        (
            "A red circle above a star .",
            Boxed("A red circle", ((0.0, 0.25, 0.5, 0.5), (0.5, 0.0, 1.0, 0.25))),
            "people/animals",
        ),
        ("blue ring in white .", Boxed("blue ring", ((0.0, 0.25, 0.5, 0.5),)), "other"),
    ]


def test_order_reads_a_captioned_set(tmp_path: Path) -> None:
    rows = read("aro_order", tmp_path)
    assert [item.texts[0] for item in rows.items] == [
        "a red circle is on the left of a blue star",
        "a blue star, a red circle",
        "red circle",
    ]
    assert [item.truth for item in rows.items] == [[*aro_order.SHUFFLES], [*aro_order.SHUFFLES], ["all words"]]
    assert list(rows.skipped) == ["no other order"]  # "red"
    assert AroOrder(seed=1).read(tmp_path, None).items != rows.items
    assert AroOrder(seed=0).read(tmp_path, None).items == rows.items


def test_zeroshot_takes_folders_for_classes(tmp_path: Path) -> None:
    rows = read("zeroshot", tmp_path)
    assert rows.items[0].texts == ("a photo of a blue star", "a photo of a red circle", "a photo of a ring")
    assert [item.truth for item in rows.items] == [0, 0, 1, 1, 1, 2]
    assert rows.skipped == {"in no class": [f"{tmp_path}/stray.png: it is not in a folder of a class"]}
    names = tmp_path / "names.json"
    names.write_text('{"ring": "hollow circle"}')
    lines = tmp_path / "templates.txt"
    lines.write_text("a {}\n\nthis is a {}\n")
    named = Zeroshot(templates=lines, names=names).read(tmp_path, None)
    assert named.items[0].texts[-2:] == ("a hollow circle", "this is a hollow circle")


def test_names_of_a_strangers_files_cannot_reach_the_terminal(tmp_path: Path) -> None:
    root = write(tmp_path, {name: picture(0) for name in ("a/0.png", "b\x1b[31m/0.png", "stray\x1b[2J\x9b.png")})
    rows = Zeroshot().read(root, None)
    lines = lines_of_suite(SuiteReport({}, {}, rows.items, 2, rows.skipped, [], rows.notes, None))
    assert [line.partition(" ")[0] for line in lines] == ["2", "left"]
    assert all(line.isprintable() for line in lines)


def test_a_set_at_hand_in_its_published_form(shared_data: Path, tmp_path: Path) -> None:
    """A few true rows of each, whose images are not there: each is counted, and nothing else is wrong with it."""
    true = shared_data / "formats" / "suites"
    if not true.is_dir():
        pytest.skip("needs formats/suites of the shared data")
    for suite, name, image in (
        (SugarCrepe(), "sugarcrepe_swap_att.json", "000000565045.jpg"),
        (Vsr(), "vsr_zeroshot_test.jsonl", "000000017697.jpg"),
    ):
        folder = tmp_path / name
        write(folder, {name: (true / name).read_bytes(), image: picture(0)})
        rows = suite.read(folder, None)
        assert len(rows.items) == 1
        assert list(rows.skipped) == ["missing image"]
    experts = true / "flickr8k_ExpertAnnotations.txt"
    tokens = "".join(f"{line.split(chr(9))[1]}\ta dog\n" for line in experts.read_text().splitlines())
    photos = {line.split("\t")[0]: picture(0) for line in experts.read_text().splitlines()}
    folder = write(tmp_path / "judged", {"ExpertAnnotations.txt": experts.read_bytes(), "Flickr8k.token.txt": tokens})
    assert len(Flickr8kJudgements().read(write(folder, photos), None).items) == 2  # the third is of its own caption


# ---------------------------------------------------------------------- what is wrong with a file


def change(file: str, old: str, new: str) -> Callable[[Path], None]:
    def change_in(root: Path) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))

    return change_in


ROWS = [
    (
        "sugarcrepe",
        change("swap_att.json", '"caption"', '"capt"'),
        "malformed row",
        "swap_att.json item 0: key 'caption'",
    ),
    ("sugarcrepe", change("swap_att.json", COCO[0], "../x.jpg"), "malformed row", "leads out"),
    ("sugarcrepe", change("swap_att.json", COCO[0], "9.jpg"), "missing image", "9.jpg"),
    (
        "sugarcrepe",
        change("swap_att.json", '"a green square"', '" "'),
        "malformed row",
        "item 1: 'caption' has no words",
    ),
    ("aro", change("visual_genome_relation.json", '"bbox_w": 10', '"bbox_w": 0'), "malformed row", "a box of 0 by 8"),
    *(
        (
            "aro",
            change("visual_genome_relation.json", '"bbox_w": 10', f'"bbox_w": {value}'),
            "malformed row",
            "'bbox_w' is",
        )
        for value in ('"9"', "true", "1e99", "9" * 400)
    ),
    ("aro", change("visual_genome_attribution.json", '["red", ', "["), "malformed row", "has 1 entries instead of two"),
    (
        "vsr",
        change("data/splits/zeroshot/test.jsonl", '"label": 0', '"label": 2'),
        "malformed row",
        "test.jsonl:2: 'label'",
    ),
    (
        "vsr",
        change("data/splits/zeroshot/test.jsonl", '"label": 0', '"label": true'),
        "malformed row",
        "bool instead of int",
    ),
    (
        "vsr",
        change("data/splits/zeroshot/test.jsonl", '{"image"', '"image"'),
        "malformed row",
        "test.jsonl:1: not JSON",
    ),
    (
        "flickr8k_judgements",
        change("ExpertAnnotations.txt", "\t1\t1\t2", "\t1\t1\t5"),
        "malformed row",
        ":1: judgement '5'",
    ),
    ("flickr8k_judgements", change("ExpertAnnotations.txt", "\t1\t1\t2", "\t1\t1"), "malformed row", ":1: 4 fields"),
    ("flickr8k_judgements", change("CrowdFlowerAnnotations.txt", "0.25", "0.5"), "malformed row", ":1: '0.5 1 3'"),
    (
        "flickr8k_judgements",
        change("CrowdFlowerAnnotations.txt", "\t0\t0\t3", "\t0\t0\t0"),
        "malformed row",
        ":3: '0 0 0'",
    ),
    ("flickr8k_judgements", change("ExpertAnnotations.txt", "#1", "#9"), "malformed row", "#9' is not a caption of"),
    ("cxc", change("data/sits_test.csv", ",4.9,", ",5.9,"), "malformed row", "sits_test.csv:2: agg_score '5.9'"),
    ("cxc", change("data/sits_test.csv", ",4.9,", ",nan,"), "malformed row", "agg_score 'nan'"),
    ("cxc", change("data/sits_test.csv", "sentid:0", "sentid:77"), "malformed row", "sentid:77' is not a caption"),
    (
        "cxc",
        change("annotations/captions_val2014.json", '"caption": "a red thing 1"', '"x": 1'),
        "malformed row",
        "annotations[1]",
    ),
    (
        "pointing",
        change("Annotations/36979.xml", "<xmax>250", "<xmax>501"),
        "malformed row",
        "box 1,101,501,200 is not within",
    ),
    ("pointing", change("Annotations/36979.xml", "<xmax>250", "<xmax>x"), "malformed row", "<bndbox/xmax> is 'x'"),
    ("pointing", change("Annotations/36979.xml", "</size>", ""), "malformed row", "not XML"),
    (
        "pointing",
        change("Annotations/36979.xml", "<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>'),
        "malformed row",
        "declarations",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "reason", "message"), ROWS, ids=range(len(ROWS)))
def test_a_bad_row_is_left_out_counted_and_named(
    name: str, spoil: Callable[[Path], None], reason: str, message: str, tmp_path: Path
) -> None:
    make, suite = LAYOUTS[name]
    root = make(tmp_path)
    whole = len(suite.read(root, None).items)
    spoil(root)
    rows = suite.read(root, None)
    assert len(rows.items) < whole
    assert message in rows.skipped[reason][0]
    assert "\n" not in rows.skipped[reason][0]


FILES = [
    ("sugarcrepe", "swap_att.json", "[]", 65, "list instead of an object of numbered items"),
    ("sugarcrepe", "swap_att.json", "{", 65, "not JSON"),
    ("aro", "visual_genome_relation.json", "{}", 65, "dict instead of a list of items"),
    ("cxc", "data/sits_test.csv", "image,caption\n", 65, "the first line is 'image,caption'"),
    ("cxc", "annotations/captions_val2014.json", "{}", 65, "key 'images' is missing"),
    ("flickr8k_judgements", "Flickr8k.token.txt", None, 66, "none of this set's files"),
    ("vsr", "data/splits/zeroshot/test.jsonl", None, 66, "none of this set's files"),
    ("pointing", "test.txt", None, 66, "none of this set's files"),
]


@pytest.mark.parametrize(("name", "file", "content", "code", "message"), FILES, ids=range(len(FILES)))
def test_a_file_of_another_form_is_refused(
    name: str, file: str, content: str | None, code: int, message: str, tmp_path: Path
) -> None:
    make, suite = LAYOUTS[name]
    root = make(tmp_path)
    if content is None:
        (root / file).unlink()
    else:
        (root / file).write_text(content)
    with pytest.raises(UserError) as caught:
        suite.read(root, None)
    assert caught.value.code == code
    assert message in str(caught.value)


def test_a_link_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    root = sugarcrepe(tmp_path / "suite")
    outside = write(tmp_path / "outside", {"swap_att.json": "{}", "x.jpg": picture(3)})
    (root / "images" / COCO[0]).unlink()
    (root / "images" / COCO[0]).symlink_to(outside / "x.jpg")
    assert "link leads out" in SugarCrepe().read(root, None).skipped
    (root / "swap_att.json").unlink()
    (root / "swap_att.json").symlink_to(outside / "swap_att.json")
    with pytest.raises(UserError, match="leads out"):
        SugarCrepe().read(root, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Zeroshot(template=["a photo"]), "no place for the class"),
        (lambda: Vsr("zeroshot/all").read(Path(), None), "is not a split"),
        (lambda: Pointing().read(Path(), None), "no folder Sentences"),
        (lambda: AroOrder(set="nope").read(Path(), None), "no set 'nope'"),
        (lambda: SugarCrepe().read(Path("nowhere"), None), "no such file or folder"),
        (lambda: suite_class("sugar"), "no such suite"),
        (lambda: suite_class("json.loads"), "is not a suite"),
        (lambda: suite_class("acme.nowhere.Mine"), "cannot be imported"),
    ],
)
def test_a_wrong_word_is_told(
    make: Callable[[], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        make()


# ---------------------------------------------------------------------- orders


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=13), st.integers(0, 99))
def test_orders_have_the_same_words(words: list[str], seed: int) -> None:
    orders = aro_order.other_orders(words, random.Random(seed))
    texts = [" ".join(words), *orders.values()]
    assert len(set(texts)) == len(texts)
    threes = [words[start : start + 3] for start in range(0, len(words), 3)]
    for name, text in orders.items():
        assert sorted(text.split()) == sorted(words)
        if name == "within trigrams":
            for start, three in zip(range(0, len(words), 3), threes, strict=True):
                assert sorted(text.split()[start : start + 3]) == sorted(three)
        if name == "trigrams":
            assert text in {" ".join(itertools.chain(*order)) for order in itertools.permutations(threes)}
    if len(set(words)) == 1:
        assert not orders


@pytest.fixture
def tagger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NLTK's tagger in its true layout, for a few words; of others it has no idea."""
    nltk_data = pytest.importorskip("nltk.data", reason="nltk is in the extra 'suites'")
    tags = {"a": "DT", "red": "JJ", "green": "JJ", "dog": "NN", "cats": "NNS", "sees": "VBZ", "two": "CD"}
    folder = tmp_path / "nltk_data/taggers/averaged_perceptron_tagger_eng"
    folder.mkdir(parents=True)
    for name, content in {"weights": {}, "tagdict": tags, "classes": sorted(set(tags.values()))}.items():
        (folder / f"averaged_perceptron_tagger_eng.{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(nltk_data, "path", [str(tmp_path / "nltk_data")])


def test_aros_own_four_shuffles(tagger: None) -> None:
    words = ["a", "red", "dog,", "sees", "two", "green", "cats"]
    tags = aro_order.part_of_speech_tagger()(words)
    assert tags == ["DT", "JJ", "NN", "VBZ", "CD", "JJ", "NNS"]
    orders = [aro_order.other_orders(words, random.Random(seed), tags, aro_order.OF_ARO) for seed in range(40)]
    # Two nouns and two adjectives: three other orders.
    assert {each["nouns and adjectives"] for each in orders} == {
        "a green cats sees two red dog,",
        "a red cats sees two green dog,",
        "a green dog, sees two red cats",
    }
    others = itertools.permutations(["a", "sees", "two"])
    expected = {f"{one} red dog, {two} {three} green cats" for one, two, three in others} - {" ".join(words)}
    assert {each["all but nouns and adjectives"] for each in orders} == expected
    # The other two are those that need no tagger.
    assert {*orders[0]} == {*aro_order.OF_ARO}


def test_aros_order_test_reads_and_counts_its_four(tagger: None, tmp_path: Path) -> None:
    suite = AroOrder(set="csv", split="train", name="mine", tagged=True)
    write(tmp_path, {"one.png": picture(0), "pairs.csv": b"image,caption\none.png,a red dog sees two green cats\n"})
    items = suite.read(tmp_path / "pairs.csv", None).items
    assert [item.truth for item in items] == [[*aro_order.OF_ARO]]
    # a table's images may be elsewhere; a set with its own layout says where they are
    (tmp_path / "photos").mkdir()
    (tmp_path / "one.png").rename(tmp_path / "photos" / "one.png")
    assert suite.read(tmp_path / "pairs.csv", None).items == []
    assert suite.read(tmp_path / "pairs.csv", tmp_path / "photos").items[0].texts == items[0].texts
    with pytest.raises(UserError, match="the set itself tells where its images are"):
        AroOrder().read(tmp_path, tmp_path)
    figures = suite.metrics(items, [[3.0, 1.0, 4.0, 1.0, 2.0]], "match")
    assert (figures[0].value, figures[0].chance) == (0.0, 20.0)
    assert by_name(figures)["better than nouns and adjectives shuffled"] == 100
    assert by_name(figures)["better than all but nouns and adjectives shuffled"] == 0


@pytest.mark.parametrize("lacks", ["nltk", "weights"])
def test_a_tagger_that_is_not_there_is_told(
    lacks: str, tagger: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacks == "nltk":
        monkeypatch.setitem(sys.modules, "nltk.tag.perceptron", None)
    else:
        shutil.rmtree(tmp_path / "nltk_data/taggers")
    message = {
        "nltk": r"nltk is not installed.*maskvlm\[suites\]",
        "weights": "no tagger.*nltk.downloader",
    }
    with pytest.raises(UserError, match=message[lacks]) as raised:
        AroOrder(tagged=True).read(tmp_path, None)
    assert raised.value.code == ExitCode.UNAVAILABLE


def test_words_are_those_that_aro_shuffles() -> None:
    assert aro_order.plain_words('A "big" Dog (brown) runs: fast!') == ["a", "big", "dog", "brown", "runs", "fast"]
    assert len(aro_order.plain_words("a " * 50)) == 30


# ---------------------------------------------------------------------- figures

GRADES = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.9, 2.0]), st.sampled_from([1.0, 2.0, 3.0, 4.0])),
    min_size=4,
    max_size=30,
)


@given(GRADES)
def test_correlations_are_scipys(pairs: list[tuple[float, float]]) -> None:
    predicted, rated = [a for a, _ in pairs], [b for _, b in pairs]
    if len(set(predicted)) > 1 and len(set(rated)) > 1:
        for variant in "bc":
            expected = stats.kendalltau(predicted, rated, variant=variant).statistic
            assert metrics.kendall_tau(predicted, rated, variant) == pytest.approx(expected, abs=1e-5)
        assert metrics.spearman_rho(predicted, rated) == pytest.approx(
            stats.spearmanr(predicted, rated).statistic, abs=1e-5
        )


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_area_under_the_curve_counts_pairs(positives: list[int], negatives: list[int]) -> None:
    u = stats.mannwhitneyu(positives, negatives).statistic
    assert metrics.area_under_curve(positives, negatives) == pytest.approx(u / len(positives) / len(negatives))


def test_scores_that_tell_nothing_are_told_so() -> None:
    """All alike: 0. No number: the lowest."""
    for variant in "bc":
        assert metrics.kendall_tau([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], variant) == 0
        assert metrics.kendall_tau([math.nan, 1.0, 2.0], [3.0, 1.0, 2.0], variant) == pytest.approx(-1 / 3)
    assert metrics.spearman_rho([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0
    assert metrics.spearman_rho([math.nan, 2.0, 3.0], [1.0, 2.0, 3.0]) == pytest.approx(1)


def test_groups_that_do_not_differ_say_nothing_of_the_spread() -> None:
    assert metrics.clustered_interval([1, 0, 1, 0], ["a", "a", "b", "b"]) is None
    assert metrics.percent_right("x", [True, False, True, False], 50, ["a", "a", "b", "b"]).interval is None


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.integers(2, 4))
def test_an_interval_is_students_and_does_not_shrink_by_saying_it_again(values: list[float], times: int) -> None:
    mean, count = sum(values) / len(values), len(values)
    if mean in (0, 1):
        return
    alone = metrics.clustered_interval(values, range(count))
    if statistics.stdev(values) < 1e-9:
        return
    margin = stats.t.ppf(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count)
    assert alone == pytest.approx((max(0, mean - margin), min(1, mean + margin)), abs=1e-9)
    again = metrics.clustered_interval(values * times, [*range(count)] * times)
    assert again == pytest.approx(alone, abs=1e-9)


def test_an_interval_of_all_right_is_wilsons_and_of_one_image_none() -> None:
    low, high = metrics.clustered_interval([1.0] * 5, range(5)) or (0, 0)
    z2 = stats.norm.ppf(0.975) ** 2
    assert (low, high) == pytest.approx((5 / (5 + z2), 1))
    assert metrics.clustered_interval([0.0] * 5, range(5)) == pytest.approx((0, 1 - low))
    assert metrics.clustered_interval([1.0, 0.0, 1.0], ["a", "a", "a"]) is None


def test_a_phrase_that_stands_twice_is_left_out(tmp_path: Path) -> None:
    """Which of its places is meant cannot be told to the model."""
    entities(tmp_path)
    file = tmp_path / "Sentences" / "36979.txt"
    file.write_text(file.read_text().replace("a star] .", "a star] and a red circle ."))
    rows = Pointing().read(tmp_path, None)
    assert rows.skipped == {"phrase stands there twice": [f"{file}:1: 'A red circle'"]}
    assert len(rows.items) == 1


def test_order_tells_bad_rows_and_a_split_that_is_not_there(tmp_path: Path) -> None:
    captions(tmp_path)
    with pytest.raises(UserError, match=r"--split: no row of 'validation'; there are: .*val"):
        AroOrder(split="validation").read(tmp_path, None)


@pytest.mark.parametrize(("relevant", "total"), [(1, 1), (1, 4), (2, 4), (3, 5), (4, 4)])
def test_chance_of_map_at_r_is_the_mean_over_all_orders(relevant: int, total: int) -> None:
    def map_at_r(order: tuple[int, ...]) -> float:
        return sum(
            sum(one < relevant for one in order[: r + 1]) / (r + 1) for r in range(relevant) if order[r] < relevant
        )

    mean = statistics.fmean(map_at_r(order) / relevant for order in itertools.permutations(range(total)))
    assert metrics.map_at_r_chance(relevant, total) == pytest.approx(mean)


def random_scores(items: list[SuiteItem], seed: int = 0) -> list[list[float]]:
    rng = random.Random(seed)
    return [[round(rng.random(), 1) for _ in item.texts] for item in items]


def test_sugarcrepe_counts_as_the_official_script(tmp_path: Path) -> None:
    """`1 if pos_score > neg_score else 0`, by file."""
    items = read("sugarcrepe", tmp_path).items * 20
    scores = random_scores(items)
    values = by_name(SugarCrepe().metrics(items, scores, "match"))
    shares = {}
    for kind in ("add_obj", "swap_att"):
        right = [a > b for (a, b), item in zip(scores, items, strict=True) if item.kind == kind]
        shares[kind] = 100 * sum(right) / len(right)
        assert values[kind] == pytest.approx(shares[kind])
    assert values["mean of 2 kinds"] == pytest.approx(sum(shares.values()) / 2)


def test_a_tie_counts_against_the_model() -> None:
    assert metrics.first_is_best([0.5, 0.4])
    assert not metrics.first_is_best([0.5, 0.5])
    assert not metrics.first_is_best([math.nan, 0.1])
    assert not metrics.first_is_best([0.5, math.nan])


def test_order_counts_all_and_each_shuffle(tmp_path: Path) -> None:
    items = read("aro_order", tmp_path).items * 15
    scores = random_scores(items)
    suite_metrics = AroOrder().metrics(items, scores, "match")
    best = [all(each[0] > other for other in each[1:]) for each in scores]
    assert suite_metrics[0].value == pytest.approx(100 * sum(best) / len(best))
    # Of two words there is one other order.
    assert {len(item.texts) for item in items} == {2, 4}
    assert suite_metrics[0].chance == pytest.approx(statistics.fmean(100 / len(item.texts) for item in items))
    at = [(row, item.truth.index("trigrams") + 1) for row, item in enumerate(items) if "trigrams" in item.truth]
    right = [scores[row][0] > scores[row][place] for row, place in at]
    assert by_name(suite_metrics)["better than trigrams shuffled"] == pytest.approx(100 * sum(right) / len(right))


def test_aro_is_the_mean_over_relations_that_have_enough_items() -> None:
    kinds = (
        ["relation: above"] * 30 + ["relation: near"] * 25 + ["relation: rare"] * 24 + ["attribution: red_blue"] * 25
    )
    items = [SuiteItem((f"{n}.jpg",), ("a", "b"), 0, kind, "") for n, kind in enumerate(kinds)]
    # Of `above` 10 of 30 are right, of `near` all, of `rare` none; ties count against the model.
    right = [True] * 10 + [False] * 20 + [True] * 25 + [False] * 24 + [True] * 5 + [False] * 20
    figures = Aro().metrics(items, [[1.0, 0.5] if each else [1.0, 1.0] for each in right], "match")
    assert by_name(figures) == pytest.approx(
        {
            "relation, mean over 2 kinds": 100 * (10 / 30 + 1) / 2,
            "relation, all items": 100 * 35 / 79,
            "relation: above": 100 / 3,
            "relation: near": 100,
            "attribution, mean over 1 kinds": 20,
            "attribution, all items": 20,
            "attribution: red_blue": 20,
        }
    )
    assert figures[0].name == "relation, mean over 2 kinds"


def test_vsr_has_a_threshold_by_match_alone(tmp_path: Path) -> None:
    items = read("vsr", tmp_path).items * 25
    items += items[:10:2]
    scores = random_scores(items)
    suite_metrics = Vsr().metrics(items, scores, "match")
    labels = [item.truth for item in items]
    right = [(each[0] > 0.5) == (label == 1) for each, label in zip(scores, labels, strict=True)]
    assert suite_metrics[0].value == pytest.approx(100 * sum(right) / len(right))
    assert suite_metrics[0].chance == pytest.approx(100 * max(sum(labels), len(labels) - sum(labels)) / len(labels))
    sides = [[each[0] for each, label in zip(scores, labels, strict=True) if label == side] for side in (1, 0)]
    u = stats.mannwhitneyu(*sides).statistic / len(sides[0]) / len(sides[1])
    assert by_name(suite_metrics)["area under the curve"] == pytest.approx(100 * u)
    assert {each.name for each in suite_metrics} >= {"accuracy, left of", "accuracy, above"}
    unknown = Vsr().metrics(items, [[math.nan]] * len(items), "match")
    assert unknown[0].value == 0  # a score that is no number is no right answer, whatever is true
    assert [each.name for each in Vsr().metrics(items, scores, "contrast")] == ["area under the curve"]


def test_judgements_are_correlated_as_in_clipscores_script(tmp_path: Path) -> None:
    """tau-c over each expert's judgement by itself, tau-b over the crowd's share of yes."""
    items = read("flickr8k_judgements", tmp_path).items * 6
    scores = random_scores(items)
    values = by_name(Flickr8kJudgements().metrics(items, scores, "match"))
    predicted, rated = [], []
    for each, item in zip(scores, items, strict=True):
        if item.kind == "experts":
            for judged in item.truth:
                predicted.append(each[0])
                rated.append(judged)
    crowd = [(each[0], item.truth[0]) for each, item in zip(scores, items, strict=True) if item.kind == "crowd"]
    assert values["experts, Kendall's tau-c x 100"] == pytest.approx(
        100 * stats.kendalltau(predicted, rated, variant="c")[0], abs=1e-3
    )
    assert values["crowd, Kendall's tau-b x 100"] == pytest.approx(
        100 * stats.kendalltau(*zip(*crowd, strict=True))[0], abs=1e-3
    )


def test_cxc_samples_one_pair_of_half_of_the_queries(tmp_path: Path) -> None:
    items = read("cxc", tmp_path).items
    scores = [[item.truth[0] ** 3] for item in items]  # the same order as people's
    values = by_name(Cxc().metrics(items, scores, "contrast"))
    assert all(value == pytest.approx(100, abs=1e-3) for name, value in values.items() if "STS" not in name)
    # Queries a and b, each with two pairs: half of them is at least two.
    predicted, rated, queries = [1.0, 2.0, 3.0, 4.0], [1.0, 1.5, 0.5, 4.0], ["a", "a", "b", "b"]
    assert cxc.sampled_spearman([1.0] * 4, [1.0, 2.0, 3.0, 4.0], ["one"] * 4, seed=0, samples=3) == [0.0] * 3
    samples = cxc.sampled_spearman(predicted, rated, queries, seed=0, samples=400)
    # Of the four choices of a pair of a and one of b, the two with the second of b are in people's order.
    assert {round(each) for each in samples} == {-1, 1}
    assert statistics.fmean(samples) == pytest.approx(0.0, abs=0.2)


def test_zeroshot_counts_classes(tmp_path: Path) -> None:
    items = read("zeroshot", tmp_path).items * 5
    scores = random_scores(items)
    values = by_name(Zeroshot().metrics(items, scores, "match"))
    right = [
        all(each[item.truth] > other for k, other in enumerate(each) if k != item.truth)
        for each, item in zip(scores, items, strict=True)
    ]
    assert values["top-1"] == pytest.approx(100 * sum(right) / len(right))
    shares = [statistics.fmean(r for r, item in zip(right, items, strict=True) if item.truth == k) for k in range(3)]
    assert values["mean per class"] == pytest.approx(100 * statistics.fmean(shares))
    assert values["always the largest class"] == pytest.approx(50)
    nan = [[math.nan if k == item.truth else 0.0 for k in range(3)] for item in items]
    assert by_name(Zeroshot().metrics(items, nan, "match"))["top-1"] == 0


def test_pointing_hits_boxes(tmp_path: Path) -> None:
    items = read("pointing", tmp_path).items
    # Attention: within the second box of the first, outside of the second's; Grad-CAM: the other way round.
    scores = [[0.75, 0.1, 0.9, 0.9], [0.75, 0.1, 0.1, 0.3]]
    suite_metrics = Pointing().metrics(items, scores, "explain")
    assert [each.value for each in suite_metrics] == [50.0, 50.0, 100.0]
    assert suite_metrics[0].chance == pytest.approx(100 * (0.25 + 0.125) / 2)
    assert pointing.peak(np.array([[0, 1, 0, 0], [0, 0, 0, 0]])) == (0.375, 0.25)
    # A map without a peak points nowhere: it would be the first patch, and might be right.
    for nowhere in (np.zeros((2, 4)), np.full((2, 4), np.nan), np.array([[1, 0], [1, 0]])):
        assert not pointing.inside(pointing.peak(nowhere), [(0, 0, 1, 1)])
    assert pointing.covered_share(((0.0, 0.0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.5))) == pytest.approx(0.25 + 0.0625)


# ---------------------------------------------------------------------- ECCV Caption


@pytest.fixture
def small_judge(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package's metrics, of a gallery of three images and six captions."""
    official = pytest.importorskip("eccv_caption").Metrics()
    images, caption_ids = [int(name[:-4]) for name in COCO], [0, 1, 100, 101, 200, 201]
    own = {image: [100 * n, 100 * n + 1] for n, image in enumerate(images)}
    more = {images[0]: [0, 1, 101], images[2]: [200, 201]}  # no query for the second image
    official.coco_ids = np.array(caption_ids)
    official.coco_gts = {"i2t": own, "t2i": {each: [images[each // 100]] for each in caption_ids}}
    official.cxc_gts = {"i2t": own | more, "t2i": official.coco_gts["t2i"] | {101: images[:2]}}
    official.eccv_gts = {"i2t": more, "t2i": {101: images[:2], 0: [images[0]]}}
    monkeypatch.setattr(eccv_caption, "judge", lambda: official)
    return official


def test_eccv_caption_is_the_packages(small_judge: Any, tmp_path: Path) -> None:
    root = crisscrossed(tmp_path)
    items = EccvCaption().read(root, None).items
    assert [item.texts for item in items] == [
        tuple(f"a {c} thing {k}" for k in (0, 1)) for c in ("red", "blue", "green")
    ]
    contrast_BC = torch.rand(3, 6, generator=torch.Generator().manual_seed(3))
    ours = by_name(EccvCaption().metrics(items, list(contrast_BC), "contrast"))
    images, caption_ids = [int(name[:-4]) for name in COCO], [0, 1, 100, 101, 200, 201]
    i2t = {
        image: [caption_ids[k] for k in row.argsort(descending=True)]
        for image, row in zip(images, contrast_BC, strict=True)
    }
    t2i = {
        c: [images[k] for k in row.argsort(descending=True)] for c, row in zip(caption_ids, contrast_BC.T, strict=True)
    }
    official = small_judge.compute_all_metrics(i2t, t2i, ["eccv_map_at_r", "cxc_recalls", "coco_5k_recalls"])
    for side, name in (("i2t", "captions of an image"), ("t2i", "images of a caption")):
        assert ours[f"ECCV mAP@R, {name}"] == pytest.approx(100 * official["eccv_map_at_r"][side])
        for k in (1, 5, 10):
            assert ours[f"CxC R@{k}, {name}"] == pytest.approx(100 * official[f"cxc_r{k}"][side])
            assert ours[f"COCO R@{k}, {name}"] == pytest.approx(100 * official[f"coco_5k_r{k}"][side])
    # mAP@R by itself: of the R first, the precision at each that is relevant.
    values = []
    for image, relevant in small_judge.eccv_gts["i2t"].items():
        hits = [each in relevant for each in i2t[image][: len(relevant)]]
        values.append(sum(sum(hits[: r + 1]) / (r + 1) for r, hit in enumerate(hits) if hit) / len(relevant))
    assert ours["ECCV mAP@R, captions of an image"] == pytest.approx(100 * statistics.fmean(values))


def test_eccv_caption_needs_its_whole_gallery(small_judge: Any, tmp_path: Path, model: PretrainedMaskVLM) -> None:
    root = crisscrossed(tmp_path)
    assert run_suite(EccvCaption(), model, EccvCaption().read(root, None)).metrics["contrast"][0].items == 2
    with pytest.raises(UserError, match="ranks all its items"):
        run_suite(EccvCaption(), model, EccvCaption().read(root, None), limit=1)
    (root / "images" / VAL2014[0]).unlink()
    with pytest.raises(UserError, match="needs all its items"):
        run_suite(EccvCaption(), model, EccvCaption().read(root, None))
    small_judge.coco_ids = np.array([0, 77])
    with pytest.raises(UserError, match="1 of 2 captions are missing, the first is 77"):
        EccvCaption().read(root, None)


# ---------------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "best.ckpt"
    saved(path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PretrainedMaskVLM:
    return PretrainedMaskVLM.from_pretrained(checkpoint)


def test_a_score_per_word_counts_the_words_that_are_read(model: PretrainedMaskVLM, tmp_path: Path) -> None:
    """What is cut would make a text look likelier."""
    longest = "a red circle " * 40
    item = read("sugarcrepe", tmp_path).items[0]._replace(texts=(longest, longest + longest))
    ((once, twice),) = pair_scores(model, [item], "score_per_word")
    assert once == pytest.approx(twice, abs=1e-5)


def test_scores_are_what_the_methods_say(model: PretrainedMaskVLM, tmp_path: Path) -> None:
    """Whichever items share an image."""
    items = [
        item._replace(images=read("sugarcrepe", tmp_path).items[0].images)
        for item in read("sugarcrepe", tmp_path).items
    ]
    image = str(items[0].images[0])
    ways: dict[str, Callable[[str], Any]] = {
        "contrast": lambda text: float(model.encode_image(image) @ model.encode_text(text)),
        "match": lambda text: model.match(image, text),
        "score": lambda text: model.score(image, text),
        "score_per_word": lambda text: float(model.score(image, text)) / len(text.split()),  # type: ignore[arg-type]
        "score_no_image": lambda text: model.score(None, text),
    }
    assert tuple(ways) == WAYS
    for way, ask in ways.items():
        for item, scores in zip(items, pair_scores(model, items, way), strict=True):
            assert scores == pytest.approx([ask(text) for text in item.texts], abs=1e-4)


def test_zeroshot_averages_templates(model: PretrainedMaskVLM, tmp_path: Path) -> None:
    suite = Zeroshot(template=["a {}", "the {}"])
    items = suite.read(classes(tmp_path), None).items
    image = model.encode_image(str(items[0].images[0]))
    text = model.encode_text(["a red circle", "the red circle"]).mean(0)
    assert suite.ask(model, items, "contrast")[0][1] == pytest.approx(float(image @ text / text.norm()), abs=1e-5)
    match: Any = model.match(str(items[0].images[0]), ["a red circle", "the red circle"])
    assert suite.ask(model, items, "match")[0][1] == pytest.approx(sum(match) / 2, abs=1e-5)


def test_cxc_compares_any_two_sides(model: PretrainedMaskVLM, tmp_path: Path) -> None:
    items = read("cxc", tmp_path).items
    scores = Cxc().ask(model, items, "contrast")
    for item, score in zip(items, scores, strict=True):
        vectors = [model.encode_image(str(each)) for each in item.images] + [model.encode_text(t) for t in item.texts]
        assert score == pytest.approx([float(vectors[0] @ vectors[1])], abs=1e-5)
    matched = Cxc().ask(model, items, "match")
    assert [len(each) for each in matched] == [int(item.kind == "sits") for item in items]


def test_pointing_asks_explain(model: PretrainedMaskVLM, tmp_path: Path) -> None:
    items = read("pointing", tmp_path).items
    far = items[0]._replace(texts=("a star " * 30 + "red circle",), truth=Boxed("red circle", items[0].truth.boxes))
    scores = Pointing().ask(model, [*items, far], "explain")
    explanation: Any = model.explain(str(items[0].images[0]), items[0].texts[0], "A red circle")
    assert scores[0] == [*pointing.peak(explanation.attention), *pointing.peak(explanation.gradcam)]
    assert scores[2] == []  # beyond what the model reads


def test_a_run_counts_and_lists_what_it_leaves_out(model: PretrainedMaskVLM, tmp_path: Path) -> None:
    root = sugarcrepe(tmp_path)
    (root / "images" / COCO[0]).write_bytes(b"<html>")
    rows = SugarCrepe().read(root, None)
    report = run_suite(SugarCrepe(), model, rows, ways=["match"])
    assert (len(report.items), report.of) == (2, 3)
    assert (len(rows.items), rows.skipped) == (3, {})
    assert run_suite(SugarCrepe(), model, rows, ways=["match"]) == report  # nothing is counted twice
    assert "swap_att.json item 0" in report.skipped["not an image (text/html)"][0]
    assert report.trained_on is None or report.trained_on == 0
    for name in COCO:
        (root / "images" / name).write_bytes(b"")
    with pytest.raises(UserError, match="no item can be used"):
        run_suite(SugarCrepe(), model, SugarCrepe().read(root, None))
    with pytest.raises(UserError, match="cannot be scored by nope"):
        run_suite(SugarCrepe(), model, SugarCrepe().read(root, None), ways=["nope"])


def test_a_subset_keeps_all_items_of_an_image(tmp_path: Path) -> None:
    items = read("cxc", tmp_path).items
    for limit in (1, 2, 3):
        part = subset(items, limit, seed=0)
        images = {image for item in part for image in item.images}
        assert 0 < len(images) <= limit
        # All items that ask for no other image, those about no image among them.
        assert [item for item in items if images.issuperset(item.images)] == part
        assert any(not item.images for item in part) == any(not item.images for item in items)
    assert subset(items, 99, seed=0) == items


def test_a_subset_of_single_images_has_as_many_as_are_asked_for() -> None:
    items = [SuiteItem((f"{n // 2}",), ("a",), 0, "", "", ()) for n in range(20)]
    assert [len(subset(items, limit, seed=1)) for limit in (1, 4, 10)] == [2, 8, 20]


def test_of_own_data_nobody_knows_what_was_trained_on_without_its_name(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "1000268201_693b08cb0e.jpg")
    (tmp_path / "p.csv").write_text("image,caption,split\n1000268201_693b08cb0e.jpg,a red dog on a hill,val\n")
    path = tmp_path / "p.csv"
    assert not AroOrder("csv").read(path, None).ids_known
    rows = AroOrder("csv", name="mine").read(path, None)
    assert rows.ids_known
    assert rows.items[0].image_ids == ("mine 1000268201_693b08cb0e.jpg",)
    (tmp_path / "flickr8k").mkdir()
    assert read("aro_order", tmp_path / "flickr8k").ids_known


def test_images_that_were_trained_on_are_counted(model: PretrainedMaskVLM) -> None:
    from maskvlm.data.caption_text import stable_id

    items = [SuiteItem(("x",), ("a",), 0, "", "", (f"coco {n}",)) for n in (1, 1, 2, 3)]
    history = (model.origin.history[0]._replace(ids=torch.tensor(sorted([stable_id("coco 1"), stable_id("coco 3")]))),)
    stub = type("Told", (), {"origin": model.origin._replace(history=history)})()
    assert trained_on(stub, items) == 2
    # As training hashes them: a photo of Flickr by its own number, whatever the set calls it.
    photo = SuiteItem(("x",), ("a",), 0, "", "", ("mine 1000268201_693b08cb0e.jpg",))
    flickr = (history[0]._replace(ids=torch.tensor([stable_id("flickr 1000268201")])),)
    assert trained_on(type("Told", (), {"origin": model.origin._replace(history=flickr)})(), [photo]) == 1
    unknown = (*history, history[0]._replace(ids=None))
    stub = type("Told", (), {"origin": model.origin._replace(history=unknown)})()
    assert trained_on(stub, items) is None


def test_scores_of_an_earlier_measurement_do_not_stay(
    model: PretrainedMaskVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are too many to be written, the figures would stand beside those of another way."""
    report = run_suite(SugarCrepe(), model, read("sugarcrepe", tmp_path), ("contrast",))
    write_result(tmp_path, "sugarcrepe", SugarCrepe(), {}, report, model)
    assert (tmp_path / "scores.jsonl").is_file()
    monkeypatch.setattr("maskvlm.suites.run.MAX_SCORES", 0)
    write_result(tmp_path, "sugarcrepe", SugarCrepe(), {}, report, model)
    assert not (tmp_path / "scores.jsonl").exists()


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_the_command_runs_each_suite(
    name: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = LAYOUTS[name][0](tmp_path / "suite"), tmp_path / "out"
    by = ["--by", LAYOUTS[name][1].ways[0]]
    assert main(["suite", name, f"from={checkpoint}", "--path", str(root), "--out", str(out), *by]) == 0
    output = capsys.readouterr().out
    assert LAYOUTS[name][1].traps[0] in output
    result = json.loads((out / "result.json").read_text())
    (figures,) = result["metrics"].values()
    assert figures
    assert all(math.isfinite(each["value"]) for each in figures.values())
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == result["items"] > 0
    assert all(line["origin"] for line in lines)


def test_the_model_that_comes_along_is_asked_where_none_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = LAYOUTS["vsr"][0](tmp_path / "suite"), tmp_path / "out"
    long = f"The star is above{' a star' * 20}."
    lines = vsr_line(COCO[0], "The giraffe is left of the zebra.", 1) + vsr_line(COCO[1], long, 0)
    (root / "data/splits/zeroshot/test.jsonl").write_text(lines)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # strange words and images are no Python warnings
        assert main(["suite", "vsr", "--path", str(root), "--out", str(out)]) == 0
    output = capsys.readouterr()
    assert output.err.startswith("no checkpoint named: the bundled model scenes-tiny is used")
    assert len(output.err.splitlines()) == 1
    assert "words that the model's tokenizer does not know, of some of the texts: giraffe, zebra, '.'\n" in output.out
    assert "some texts are longer than the model reads, such as text 'The star is above a star" in output.out
    assert re.search(r"(\d) of \1 images checked are unlike those that the model was trained on", output.out)
    assert json.loads((out / "result.json").read_text())["options"]["source"] == "scenes-tiny"
    scenes: Any = Scenes(val=3).split("val")
    for row, path in enumerate(sorted((root / "images").rglob("*.jpg"))):
        scenes[row]["image"].save(path, quality=95)
    assert main(["suite", "vsr", "--path", str(root), "--out", str(out)]) == 0
    assert "unlike" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nope"], 2, "no such suite"),
        (["vsr"], 2, "--path is missing"),
        (["vsr", "from=x.ckpt"], 2, "--path is missing"),
        (["vsr", "from=x.ckpt", "--path", "."], 66, "none of this set's files"),
        (["vsr", "from=x.ckpt", "--path", ".", "--by", "score"], 2, "cannot be scored by score"),
        (["eccv_caption", "from=x.ckpt", "--path", ".", "--limit", "3"], 2, "ranks all its items"),
        (["vsr", "from=x.ckpt", "--path", ".", "--limit", "0"], 2, "--limit"),
        ([], 2, "NAME"),
        (
            ["from=x.ckpt", "vsr", "--path", "."],
            2,
            "before everything else. Write maskvlm suite vsr --from",
        ),
    ],
)
def test_the_command_says_what_is_missing(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["suite", *words]) == code
    stderr = capsys.readouterr().err
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_a_suite_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one of the page, in a module of one's own, named by the path of its class."""
    page = (ROOT / "docs" / "suites.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    rows = "a.png\tred\tblue\nb.png\tred\t \nc.png\tred\tblue\n"
    write(tmp_path, {"acme_birds.py": code, "set/birds.txt": rows, "set/a.png": picture(0), "set/b.png": picture(1)})
    monkeypatch.chdir(tmp_path)
    assert main(["suite", "acme_birds.BirdPairs", f"from={checkpoint}", "--path", "set", "--out", "out"]) == 0
    assert "which of two birds" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["items"] == 1
    assert result["skipped"].keys() == {"malformed row", "missing image"}


class Names(Suite):
    """Lines of `image<TAB>name<TAB>other name`."""

    question, licence, traps = "which of two names an image shows", "CC0", ("there are few",)

    def read(self, path: Path, images: Path | None) -> ItemRows:
        rows = ItemRows(path, images)
        for where, line in rows.lines("names.txt"):
            name, *texts = line.split("\t")
            rows.items.append(SuiteItem((rows.image(name, where),), tuple(texts), 0, "", where))
        return rows

    def metrics(self, items: Any, scores: Any, way: str) -> Any:
        return [SuiteMetric("right", np.float32(50.0), 50.0, len(items))]  # type: ignore[arg-type]


class Bare(Suite):
    """Says nothing about itself, and measures nothing."""

    def read(self, path: Path, images: Path | None) -> ItemRows:
        raise NotImplementedError


class Unnamed(Bare):
    """Says nothing about itself."""

    def metrics(self, items: Sequence[SuiteItem], scores: Sequence[Any], way: str) -> list[SuiteMetric]:
        raise NotImplementedError


class Sized(Names):
    """Has an argument without an option and without a default."""

    def __init__(self, size: int) -> None:
        self.size = size


class Chosen(Names):
    """Has an argument without an option: its default is taken."""

    def __init__(self, size: int = 3) -> None:
        self.size = size


def changed(**methods: Any) -> type[Suite]:
    """A suite with other methods."""
    return type("Changed", (Names,), methods)


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (changed(read=lambda self, path, images: []), "Changed.read: gave a list. Return the ItemRows"),
        (changed(read=lambda self, path: None), "Changed.read: is called as read(path, images)"),
        (changed(metrics=lambda self, items, scores: []), "Changed.metrics: is called as metrics(items, scores, way)"),
        (changed(metrics=lambda *_: {"right": 1.0}), "Changed.metrics: gave a dict. Return a list of SuiteMetric"),
        (changed(metrics=lambda *_: [1.0]), "Changed.metrics: gave a float. Return a list of SuiteMetric"),
        (
            changed(metrics=lambda *_: [SuiteMetric("right", torch.ones(1), None, 1)]),  # type: ignore[arg-type]
            "Changed.metrics: gave the value of right as a Tensor. Give a number",
        ),
        (changed(ask=lambda *_: None), "Changed.ask: gave a NoneType. Return the scores of each item"),
        (changed(ask=lambda *_: [[1.0, 0.0]]), "Changed.ask: gave scores of 1 items, there are 2"),
        (Bare, "suite names_of_ours.Bare: has no metrics. Define it in the class"),
        (Unnamed, "suite test_suites.Unnamed: has no question, licence, traps. Define them in the class"),
        (Sized, "suite names_of_ours.Sized: its argument size has no option. Add --size to the parser in its"),
    ],
)
def test_a_mistake_in_a_suite_of_ones_own_is_told(
    suite: type[Suite],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in ask_of_ours(suite, tmp_path, monkeypatch, checkpoint, capsys, ExitCode.USAGE).err


@pytest.mark.parametrize("suite", [Names, Chosen])
def test_a_number_of_numpy_and_a_default_are_enough(
    suite: type[Suite],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ask_of_ours(suite, tmp_path, monkeypatch, checkpoint, capsys, ExitCode.DONE)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["metrics"]["contrast"]["right"]["value"] == 50.0


def ask_of_ours(
    suite: type[Suite],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    code: ExitCode,
) -> Any:
    """What the command prints for a suite of two items in a module of one's own."""
    write(folder, {"names.txt": "a.png\tred\tblue\nb.png\tred\tblue\n", "a.png": picture(0), "b.png": picture(1)})
    module = ModuleType("names_of_ours")
    setattr(module, suite.__name__, suite)
    monkeypatch.setitem(sys.modules, "names_of_ours", module)
    words = [f"names_of_ours.{suite.__name__}", f"from={checkpoint}", "--path", str(folder)]
    assert main(["suite", *words, "--out", str(folder / "out")]) == code
    return capsys.readouterr()


# ---------------------------------------------------------------------- the page


def test_the_page_has_a_card_for_each_suite() -> None:
    page = " ".join((ROOT / "docs" / "suites.md").read_text(encoding="utf-8").split())
    assert suite_names() == sorted({*LAYOUTS, "eccv_caption"})
    for name in suite_names():
        kind = suite_class(name)
        card = page[page.index(f"## {name} ") :].partition(" ## ")[0] if f" ## {name} " in page else ""
        for text in (kind.question, kind.licence, *kind.traps, f"maskvlm suite {name}"):
            assert text in card, f"docs/suites.md: the card of {name} lacks '{text}'"
