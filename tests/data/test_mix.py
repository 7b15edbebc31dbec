"""Mixes of prepared sets: how often each image comes, who it is from, what two sets share."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prepared_sets import jpeg, make, raw, toy_image
from toy_pairs import SPEC

from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.data.caption_text import stable_id
from maskvlm.data.mix import Mix
from maskvlm.data.module import PairData
from maskvlm.data.raw.base import BadRow
from maskvlm.data.subset import row_hashes, row_ids
from maskvlm.utils.errors import ExitCode, UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """coco: 20 images to train on, 3 each to evaluate; vg: ten of its own, and five of coco's with other bytes."""
    folder = tmp_path_factory.mktemp("sets")
    splits = ["train"] * 20 + ["val"] * 3 + ["test"] * 3
    make(folder, "coco", [raw(number, split, f"coco {number}") for number, split in enumerate(splits)])
    own = [raw(number, image_id=f"vg {number}") for number in range(100, 110)]
    shared = [raw(number, image_id=f"coco {number}", image=jpeg(toy_image(number), 60)) for number in range(5)]
    make(folder, "vg", [*own, BadRow("no image", "row 7", "is not there", "train"), *shared])
    return folder


def mixed(root: Path, seed: int = 0, **sets: float) -> Any:
    return Mix(sets, "coco", str(root), seed).split("train")


def counts(pairs: Any) -> Counter[str]:
    return Counter(pairs[index]["image_id"] for index in range(len(pairs)))


def test_a_weight_says_how_often_each_image_comes(root: Path) -> None:
    pairs = mixed(root, coco=2.0, vg=1.0)
    image_counts = counts(pairs)
    assert len(pairs) == 55
    assert {image_counts[f"coco {number}"] for number in range(5, 20)} == {2}
    assert {image_counts[f"coco {number}"] for number in range(5)} == {3}  # of both
    assert {image_counts[f"vg {number}"] for number in range(100, 110)} == {1}


def test_parts_of_weights_are_nested_and_seeded(root: Path) -> None:
    part = {weight: counts(mixed(root, coco=weight)) for weight in (0.1, 0.25, 0.5, 1.5)}
    assert [part[weight].total() for weight in (0.1, 0.25, 0.5, 1.5)] == [2, 5, 10, 30]
    assert part[0.1].keys() < part[0.25].keys() < part[0.5].keys()
    assert {name for name, often in part[1.5].items() if often == 2} == part[0.5].keys()
    assert counts(mixed(root, seed=1, coco=0.5)) != part[0.5]


def test_rows_say_which_set_they_are_from(root: Path) -> None:
    pairs = mixed(root, vg=1.0, coco=0.5)
    assert [pairs.source(index) for index in (0, 14, 15, 24)] == ["vg", "vg", "coco", "coco"]
    assert pairs[0]["origin"].startswith("vg: ")
    assert pairs[20]["origin"].startswith("coco: ")
    assert pairs.captions(3) == pairs[3]["captions"] == ["number 103"]
    for index in (-1, 25):
        with pytest.raises(IndexError):
            pairs[index]


def test_columns_and_ids_follow_the_rows(root: Path) -> None:
    pairs = mixed(root, coco=1.5, vg=0.4)
    names = [pairs[index]["image_id"] for index in range(len(pairs))]
    assert pairs.column("image_id").to_pylist() == names
    assert pairs.column("source").to_pylist() == [pairs.source(index) for index in range(len(pairs))]
    assert row_ids(pairs)[:, 0].tolist() == [stable_id(name) for name in names]  # type: ignore[index]
    assert row_hashes(pairs).shape == (len(pairs),)  # type: ignore[union-attr]
    assert sorted(pairs.image_ids()) == sorted(set(names))


def test_what_two_sets_share_is_told_and_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = mixed(root, coco=1.0, vg=1.0)
    output = capsys.readouterr().out
    assert "mix of 35 rows per epoch: coco 20, vg 15" in output
    assert "5 images are in coco and in vg: kept in both" in output
    assert pairs.shared() == {("coco", "vg"): 5}


def test_left_out_rows_carry_the_name_of_their_set(root: Path) -> None:
    pairs = mixed(root, coco=1.0, vg=1.0)
    assert (pairs.unprepared, pairs.skipped) == ({"no image": ["vg: row 7"]}, {})


def test_the_fingerprint_is_of_the_parts_and_the_weights(root: Path) -> None:
    one = mixed(root, coco=1.0, vg=1.0).fingerprint
    assert one == mixed(root, coco=1.0, vg=1.0).fingerprint
    others = [mixed(root, coco=1.0), mixed(root, coco=1.0, vg=2.0), mixed(root, seed=1, coco=1.0, vg=1.0)]
    assert len({one, *(pairs.fingerprint for pairs in others)}) == 4


def test_one_set_evaluates(root: Path) -> None:
    mix = Mix({"vg": 1.0}, "coco", str(root))
    assert (len(mix.split("val")), len(mix.split("test"))) == (3, 3)
    with pytest.raises(UserError, match="no split 'val'"):
        Mix({"coco": 1.0}, "vg", str(root)).split("val")


def test_a_set_that_is_not_there_is_one_line_with_the_command(root: Path) -> None:
    with pytest.raises(UserError) as raised:
        mixed(root, coco=1.0, sbu=1.0, cc3m=1.0)
    message = str(raised.value)
    assert "no prepared data set sbu, cc3m" in message
    assert "maskvlm data sbu <its folder>; maskvlm data cc3m " in message
    assert "\n" not in message
    assert raised.value.code == ExitCode.MISSING_INPUT


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_shows_nothing_is_refused(weight: float) -> None:
    with pytest.raises(UserError, match=r"data\.source\.sets\.coco"):
        Mix({"coco": weight}, "coco")


def test_a_weight_too_small_for_its_set_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"sets.vg: weight 0.01 leaves it no images"):
        mixed(root, coco=1.0, vg=0.01)
    with pytest.raises(UserError, match="no data set was given"):
        Mix({}, "coco")


def test_a_mix_trains_with_any_number_of_workers(root: Path) -> None:
    """Two epochs with every row once each, in data workers as in the main process."""
    batches = {}
    for workers in (0, 2):
        data = PairData(Mix({"coco": 1.0, "vg": 0.8}, "coco", str(root)), SPEC, batch_size=8, steps=8, workers=workers)
        data.setup("fit")
        batches[workers] = [batch.index_B.tolist() for batch in data.train_dataloader()]
    assert batches[0] == batches[2]
    assert sorted(index for batch in batches[0][:4] for index in batch) == [*range(32)]


def test_the_papers_mix_composes(stack: Any) -> None:
    """`make pretrain DATA=4m`, with a part of one set or of all."""
    options = ["--data.source.sets.cc3m", "0.5", "--data.fraction", "0.4"]
    settings = run_command(
        Parsed, ["fit", *stack(MODEL="base", DATA="4m", WHERE="cpu"), *options]
    ).settings.data.init_args
    assert settings.source.init_args.sets == {"cc3m": 0.5, "sbu": 1.0, "vg": 1.0, "coco": 1.0}
    assert (settings.fraction, settings.contamination, settings.epochs) == (0.4, "drop", 50)
    assert [place.rsplit("/", 2)[1:] for place in settings.held_out] == [["coco", "val"], ["coco", "test"]]
