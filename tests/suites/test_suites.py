"""Evaluation suites: each reader against its true layout, each figure against a few independent lines or the official
code, and what is wrong with a file told by its place."""

import io
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from toy_pretrained import saved

from maskvlm.cli.main import main
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.suites import aro_order, cxc, eccv_caption, metrics, pointing
from maskvlm.suites.aro import Aro
from maskvlm.suites.aro_order import AroOrder
from maskvlm.suites.cxc import Cxc
from maskvlm.suites.eccv_caption import EccvCaption
from maskvlm.suites.flickr8k_judgements import Flickr8kJudgements
from maskvlm.suites.pointing import Boxed, Pointing
from maskvlm.suites.run import run_suite, trained_on
from maskvlm.suites.scores import WAYS, pair_scores
from maskvlm.suites.sugarcrepe import SugarCrepe
from maskvlm.suites.suite import ItemRows, Suite, SuiteItem, SuiteMetric
from maskvlm.suites.vsr import Vsr
from maskvlm.suites.zeroshot import Zeroshot
from maskvlm.utils.errors import UserError

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

    rated = (4.9, 1.0, 0.2, 4.5, 2.0, 1.1, 0.8, 4.7, 2.2, 0.4, 3.0, 4.1)
    pairs = itertools.product((0, 1, 100, 201), VAL2014)
    sits = [(sent(number), image, rating) for (number, image), rating in zip(pairs, rated, strict=True)]
    one, two, three = VAL2014
    sis = [(one, two, 2.0), (one, three, 3.5), (two, three, 1.0), (two, one, 0.1)]
    sts = [(sent(0), sent(1), 5), (sent(1), sent(100), 2.5), (sent(100), sent(201), 1), (sent(201), sent(0), 0)]
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


ABOVE = ("the circle is above the star", "the star is above the circle")
SWAPPED = ("a red circle and a blue star", "a blue circle and a red star")
CLASSES = ("a photo of a blue star", "a photo of a red circle", "a photo of a ring")
READ: dict[str, list[tuple[str, tuple[str, ...], Any]]] = {
    "sugarcrepe": [
        ("add_obj", ("a ring", "a ring and a cross"), 0),
        ("swap_att", SWAPPED, 0),
        ("swap_att", ("a green square", "a square that is not green"), 0),
    ],
    "aro": [
        ("relation: above", ABOVE, 0),
        ("relation: above", ABOVE, 0),
        ("attribution: red_blue", ("the red ring and the blue square", "the blue ring and the red square"), 0),
    ],
    "vsr": [("left of", ("The circle is left of the star.",), 1), ("above", ("The star is above.",), 0)],
    # An image's own caption is left out for experts alone, as published: it is a reference of other measures.
    "flickr8k_judgements": [
        ("experts", ("a blue circle on 1",), [1.0, 1.0, 2.0]),
        ("experts", ("a red circle on 0",), [3.0, 3.0, 4.0]),
        ("crowd", ("a blue circle on 0",), [0.25]),
        ("crowd", ("a green circle on 1",), [1.0]),
        ("crowd", ("a green circle on 0",), [0.0]),
    ],
    "pointing": [
        (
            "people/animals",
            ("A red circle above a star .",),
            Boxed("A red circle", ((0.0, 0.25, 0.5, 0.5), (0.5, 0.0, 1.0, 0.25))),
        ),
        ("other", ("blue ring in white .",), Boxed("blue ring", ((0.0, 0.25, 0.5, 0.5),))),
    ],
    "zeroshot": [("", CLASSES, 0)] * 2 + [("", CLASSES, 1)] * 3 + [("", CLASSES, 2)],
}


@pytest.mark.parametrize("name", READ)
def test_each_true_layout_is_read(name: str, tmp_path: Path) -> None:
    rows = read(name, tmp_path)
    assert [(item.texts, item.truth) for item in rows.items] == [(texts, truth) for _, texts, truth in READ[name]]
    if name != "zeroshot":
        assert [item.kind for item in rows.items] == [kind for kind, _, _ in READ[name]]
    expected = {"zeroshot": {"in no class": [f"{tmp_path}/stray.png: it is not in a folder of a class"]}}
    assert rows.skipped == expected.get(name, {})
    assert len(rows.notes) == {"sugarcrepe": 5, "flickr8k_judgements": 1, "zeroshot": 1}.get(name, 0)


def test_cxc_reads_pairs_of_three_kinds(tmp_path: Path) -> None:
    rows = read("cxc", tmp_path)
    kinds = {kind: [item for item in rows.items if item.kind == kind] for kind in cxc.KINDS}
    assert {kind: len(items) for kind, items in kinds.items()} == {"sits": 12, "sis": 4, "sts": 4}
    assert (len(kinds["sits"][0].images), kinds["sits"][0].texts) == (1, ("a red thing 0",))
    assert (len(kinds["sis"][0].images), kinds["sis"][0].texts) == (2, ())
    assert (kinds["sts"][1].images, kinds["sts"][1].texts) == ((), ("a red thing 1", "a blue thing 0"))
    assert kinds["sits"][0].truth == (4.9, "COCO_val2014:sentid:0")


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


BAD = [
    ("sugarcrepe", "swap_att.json", '"caption"', '"capt"', "item 0: key 'caption'"),
    ("sugarcrepe", "swap_att.json", COCO[0], "../x.jpg", "leads out"),
    ("vsr", "data/splits/zeroshot/test.jsonl", '"label": 0', '"label": 2', "test.jsonl:2: 'label'"),
    ("cxc", "data/sits_test.csv", ",4.9,", ",nan,", "sits_test.csv:2: agg_score 'nan'"),
    ("pointing", "Annotations/36979.xml", "<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>', "declarations"),
]


@pytest.mark.parametrize(("name", "file", "old", "new", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_left_out_counted_and_named(
    name: str, file: str, old: str, new: str, message: str, tmp_path: Path
) -> None:
    make, suite = LAYOUTS[name]
    root = make(tmp_path)
    whole, text = len(suite.read(root, None).items), (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))
    rows = suite.read(root, None)
    assert len(rows.items) < whole
    assert message in rows.skipped["malformed row"][0]


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


def test_correlations_and_the_area_are_scipys() -> None:
    rng = random.Random(0)
    for _ in range(20):
        count = rng.randint(4, 30)
        predicted = [rng.choice([0.0, 0.1, 0.5, 0.9, 2.0]) for _ in range(count)] + [0.3]
        rated = [rng.choice([1.0, 2.0, 3.0]) for _ in range(count)] + [4.0]
        for variant in "bc":
            expected = stats.kendalltau(predicted, rated, variant=variant).statistic
            assert metrics.kendall_tau(predicted, rated, variant) == pytest.approx(expected, abs=1e-5)
        rho = stats.spearmanr(predicted, rated).statistic
        assert metrics.spearman_rho(predicted, rated) == pytest.approx(rho, abs=1e-5)
        u = stats.mannwhitneyu(predicted, rated).statistic
        assert metrics.area_under_curve(predicted, rated) == pytest.approx(u / len(predicted) / len(rated))


def test_an_interval_is_students_and_does_not_shrink_by_saying_it_again() -> None:
    values = [0.1, 0.9, 0.4, 0.5, 1.0]
    margin = stats.t.ppf(0.975, 4) * statistics.stdev(values) / math.sqrt(5)
    expected = pytest.approx((max(0, 0.58 - margin), min(1, 0.58 + margin)), abs=1e-9)
    assert metrics.clustered_interval(values, range(5)) == expected
    assert metrics.clustered_interval(values * 3, [*range(5)] * 3) == expected
    assert metrics.clustered_interval([1, 0, 1, 0], ["a", "a", "b", "b"]) is None  # groups do not differ
    # Of all right it is Wilson's, and of scores that tell nothing or are no number the correlation is no lead.
    z2 = stats.norm.ppf(0.975) ** 2
    assert metrics.clustered_interval([1.0] * 5, range(5)) == pytest.approx((5 / (5 + z2), 1))
    assert metrics.clustered_interval([0.0] * 5, range(5)) == pytest.approx((0, z2 / (5 + z2)))
    assert metrics.kendall_tau([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "b") == 0
    assert metrics.spearman_rho([math.nan, 2.0, 3.0], [1.0, 2.0, 3.0]) == pytest.approx(1)


NAN = math.nan
SCORED: dict[str, tuple[list[list[float]], dict[str, float]]] = {
    # A tie counts against the model, as in the official script: `1 if pos_score > neg_score else 0`.
    "sugarcrepe": ([[1, 0], [1, 0], [0.5, 0.5]], {"add_obj": 100, "swap_att": 50, "mean of 2 kinds": 75}),
    # The second is false, and both are called true.
    "vsr": (
        [[0.6], [0.7]],
        {"accuracy": 50, "area under the curve": 0, "accuracy, left of": 100, "accuracy, above": 0},
    ),
    "aro_order": (
        [[3, 1, 1, 1], [3, 4, 1, 1], [1, 0]],
        {
            "the true order is the best": 200 / 3,
            "better than all words shuffled": 200 / 3,
            "better than trigrams shuffled": 100,
        },
    ),
    "zeroshot": (
        [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 1], [0, 1, 0], [0, 0, NAN]],
        {"top-1": 50, "mean per class": 100 * (1 / 2 + 2 / 3) / 3, "always the largest class": 50},
    ),
}


@pytest.mark.parametrize("name", SCORED)
def test_figures_by_hand(name: str, tmp_path: Path) -> None:
    scores, expected = SCORED[name]
    items = read(name, tmp_path).items * 25  # so many that each kind has a figure of its own
    figures = LAYOUTS[name][1].metrics(items, scores * 25, "match")
    values = by_name(figures)
    assert {figure: values[figure] for figure in expected} == pytest.approx(expected)
    chance = {"aro_order": 100 * (1 / 4 + 1 / 4 + 1 / 2) / 3, "zeroshot": 100 / 3}  # of two words one other order
    assert figures[0].chance == pytest.approx(chance.get(name, 50))


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


def test_judgements_are_correlated_as_in_clipscores_script(tmp_path: Path) -> None:
    """tau-c over each expert's judgement by itself, tau-b over the crowd's share of yes."""
    items = read("flickr8k_judgements", tmp_path).items * 6
    rng = random.Random(0)
    scores = [[round(rng.random(), 1)] for _ in items]
    values = by_name(Flickr8kJudgements().metrics(items, scores, "match"))
    experts = [
        (each[0], judged)
        for each, item in zip(scores, items, strict=True)
        for judged in item.truth
        if item.kind == "experts"
    ]
    crowd = [(each[0], item.truth[0]) for each, item in zip(scores, items, strict=True) if item.kind == "crowd"]
    tau_c = stats.kendalltau(*zip(*experts, strict=True), variant="c")[0]
    assert values["experts, Kendall's tau-c x 100"] == pytest.approx(100 * tau_c, abs=1e-3)
    tau_b = stats.kendalltau(*zip(*crowd, strict=True))[0]
    assert values["crowd, Kendall's tau-b x 100"] == pytest.approx(100 * tau_b, abs=1e-3)


def test_cxc_samples_one_pair_of_half_of_the_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = read("cxc", tmp_path).items
    scores = [[item.truth[0] ** 3] for item in items]  # the same order as people's
    monkeypatch.setattr(cxc, "sampled_spearman", partial(cxc.sampled_spearman, samples=40))
    values = by_name(Cxc().metrics(items, scores, "contrast"))
    assert all(value == pytest.approx(100, abs=1e-3) for name, value in values.items() if "STS" not in name)
    # Queries a and b, each with two pairs: half of them is at least two.
    predicted, rated, queries = [1.0, 2.0, 3.0, 4.0], [1.0, 1.5, 0.5, 4.0], ["a", "a", "b", "b"]
    assert cxc.sampled_spearman([1.0] * 4, [1.0, 2.0, 3.0, 4.0], ["one"] * 4, seed=0, samples=3) == [0.0] * 3
    samples = cxc.sampled_spearman(predicted, rated, queries, seed=0, samples=400)
    # Of the four choices of a pair of a and one of b, the two with the second of b are in people's order.
    assert {round(each) for each in samples} == {-1, 1}
    assert statistics.fmean(samples) == pytest.approx(0.0, abs=0.2)


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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "best.ckpt"
    saved(path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PretrainedMaskVLM:
    return PretrainedMaskVLM.from_pretrained(checkpoint)


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


def test_a_run_counts_and_lists_what_it_leaves_out(model: PretrainedMaskVLM, tmp_path: Path) -> None:
    root = sugarcrepe(tmp_path)
    (root / "images" / COCO[0]).write_bytes(b"<html>")
    rows = SugarCrepe().read(root, None)
    report = run_suite(SugarCrepe(), model, rows, ways=["match"])
    assert (len(report.items), report.of) == (2, 3)
    assert (len(rows.items), rows.skipped) == (3, {})
    assert run_suite(SugarCrepe(), model, rows, ways=["match"]) == report  # nothing is counted twice
    assert "swap_att.json item 0" in report.skipped["not an image (text/html)"][0]
    for name in COCO:
        (root / "images" / name).write_bytes(b"")
    with pytest.raises(UserError, match="no item can be used"):
        run_suite(SugarCrepe(), model, SugarCrepe().read(root, None))


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


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_the_command_runs_each_suite(name: str, checkpoint: Path, tmp_path: Path) -> None:
    root, out = LAYOUTS[name][0](tmp_path / "suite"), tmp_path / "out"
    by = ["--by", LAYOUTS[name][1].ways[0]]
    assert main(["suite", name, f"from={checkpoint}", "--path", str(root), "--out", str(out), *by]) == 0
    result = json.loads((out / "result.json").read_text())
    (figures,) = result["metrics"].values()
    assert figures
    assert all(math.isfinite(each["value"]) for each in figures.values())
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == result["items"] > 0
    assert all(line["origin"] for line in lines)
