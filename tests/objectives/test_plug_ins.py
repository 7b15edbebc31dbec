"""A loss and two ways of masking from a package of somebody else's: each is one file and a line of YAML."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from acme.lengths import TextLength
from acme.masks import LastWords, Middle
from data.toy_raw import encoded, photo
from slow_step import build, eventful_batch
from toys import toy_batch

from maskvlm.cli.main import main
from maskvlm.data.prepared.source import Prepared
from maskvlm.data.raw import open_raw
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.objectives.pretraining_losses import ImageTextContrast
from maskvlm.utils.errors import ExitCode, UserError

HERE = Path(__file__).parents[1]
YAML = """
model:
  task:
    init_args:
      losses:
      - class_path: acme.lengths.TextLength
        init_args: {weight: 0.5, unit: 4.0}
      image_masking:
        class_path: acme.masks.Middle
      text_masking:
        class_path: acme.masks.LastWords
        init_args: {count: 1}
"""
SHORT = (
    "--data.steps=2 --data.batch_size=8 --data.source.train=40 --data.source.val=12 --trainer.log_every_n_steps=1 "
    "--model.task.rerank_k=2"
)


@pytest.mark.slow
def test_they_are_named_in_a_file_trained_measured_and_loaded(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE.parent)
    (tmp_path / "mine.yaml").write_text(YAML)
    words = ["fit", "--run", str(tmp_path / "run"), *stack(WHERE="cpu"), "-c", str(tmp_path / "mine.yaml")]
    assert main([*words, *SHORT.split()]) == ExitCode.REFUSED  # nobody said that it may be named
    assert main([*words, "--allow-import", "acme", *SHORT.split()]) == 0
    assert "train/length" in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["length/error"] >= 0
    path = tmp_path / "run" / "best.ckpt"
    exact = ["acme.lengths.TextLength", "acme.masks.Middle", "acme.masks.LastWords"]
    for allowed in (exact, "acme"):
        task = PretrainedMaskVLM.from_pretrained(path, allow_import=allowed).task
        assert {"length.weight", "length.bias"} <= task.state_dict().keys()
    for allowed in ([], ["acm"], exact[:1]):
        with pytest.raises(UserError) as refused:
            PretrainedMaskVLM.from_pretrained(path, allow_import=allowed)
        assert refused.value.code == ExitCode.REFUSED
    # Measured as it was trained, without the file that named them.
    pairs = zip(*[iter(stack(WHERE="cpu"))] * 2, strict=True)
    files = [word for pair in pairs if "model/" not in pair[1] for word in pair]
    measure = ["validate", "--run", str(tmp_path / "measured"), "--from", str(path), *files, "--task_from", str(path)]
    assert main(measure) == ExitCode.REFUSED
    assert main([*measure, "--allow-import", "acme", *SHORT.split()]) == 0
    composed = yaml.safe_load((tmp_path / "measured" / "config-validate.yaml").read_text())["model"]["task"]
    assert composed["init_args"]["image_masking"]["class_path"] == "acme.masks.Middle"


def test_a_loss_is_one_term_more_and_changes_no_other() -> None:
    batch = eventful_batch()
    plain_backbone, plain = build()
    backbone, task = build(losses=[TextLength(0.5)])
    assert task.weights == {**plain.weights, "length": 0.5}
    for name, value in plain.state_dict().items():
        task.state_dict()[name].copy_(value)
    backbone.load_state_dict(plain_backbone.state_dict())
    expected, terms = plain(plain_backbone, batch), task(backbone, batch)
    assert list(terms) == [*expected, "length"]
    assert all(torch.equal(terms[name], value) for name, value in expected.items())
    words_B = (~batch.special_CT).sum(1)[batch.valid_B].float() / 10
    predicted_B = task.length(backbone.image(batch.image_BCHW)[:, 0])[:, 0][batch.valid_B]
    torch.testing.assert_close(terms["length"], (predicted_B - words_B).square().mean())
    assert task.chance_levels(8)["length"] == pytest.approx(words_B.var(unbiased=False).item())


def test_maskings_are_asked_in_training_and_in_evaluation() -> None:
    backbone, task = build(image_masking=Middle(), text_masking=LastWords(1))
    batch = eventful_batch()
    for training in (True, False):
        patch, token = task.mask(backbone, batch, task.uniform, training)
        assert patch.mask_BN.sum(1).tolist() == [4 * int(valid) for valid in batch.valid_B]  # 2 x 2 of 4 x 4 patches
        assert token.mask_CT.sum(1).tolist() == [min(1, int(count)) for count in (~batch.special_CT).sum(1)]


def test_phrases_are_found_by_the_models_tokenizer() -> None:
    ids_of_words = {"these": [7], "nowhere": [1]}  # 1: the id of what it does not know

    def encode(words: str, add_special_tokens: bool) -> list[int]:
        return [2, *ids_of_words[words], 3] if add_special_tokens else ids_of_words[words]

    backbone, _ = build()
    backbone.text.tokenizer = SimpleNamespace(unk_token_id=1, encode=encode)
    assert [backbone.text.ids_of(words) for words in ids_of_words] == [[7], []]


def test_a_loss_is_measured_on_held_out_images() -> None:
    """The weighted mean over all batches, and nothing of a loss without weight."""
    batches = [toy_batch(3, captions=2), toy_batch(5, captions=2)]
    batches[1] = batches[1]._replace(index_B=batches[1].index_B + 3)  # other images
    backbone, task = build(losses=[TextLength(0.5)])
    errors = []
    for batch in batches:
        task.update(backbone, batch)
        predicted_C = task.length(backbone.image(batch.image_BCHW)[:, 0])[:, 0][batch.owner_C]
        errors.append((predicted_C - (~batch.special_CT).sum(1) / 10).square())
    assert task.compute(backbone)["length/error"] == pytest.approx(torch.cat(errors).mean().item(), rel=1e-6)
    backbone, task = build(losses=[wrong(TextLength, measure=lambda *_: 1 / 0)(0.0)])
    task.update(backbone, batches[0])


# ---------------------------------------------------------------------- what is not as it should be


def wrong(base: type, **members: Any) -> Any:
    """A class of somebody's whose members are these."""
    return type("Wrong", (base,), members)


def step(**settings: Any) -> None:
    """One step and one evaluated batch."""
    backbone, task = build(**settings)
    task(backbone, eventful_batch())
    task.update(backbone, toy_batch(3))


def of_loss(**members: Any) -> None:
    step(losses=[wrong(TextLength, **members)()])


SPOILT: list[tuple[Callable[[], Any], str]] = [
    (lambda: build(losses=[wrong(ImageTextContrast)()]), "two losses are called itc"),
    (lambda: wrong(TextLength, needs=frozenset({"imgae"}))(), "Wrong: needs frozenset({'imgae'})"),
    (lambda: build(image_masking=wrong(Middle, __call__=lambda self, grid: None)()), "is called as __call__(valid_B"),
    (lambda: of_loss(__call__=lambda self, heads, step: self.words(step)), "Wrong: gave a tensor of shape [8]"),
    (lambda: step(image_masking=Middle(margin=9)), "Middle: masks no patch"),
    (lambda: step(text_masking=LastWords(0)), "LastWords: masks no token"),
]


@pytest.mark.parametrize(("make", "message"), SPOILT, ids=[message for _, message in SPOILT])
def test_what_is_not_as_it_should_be_is_told(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make()


# ---------------------------------------------------------------------- a data format


def test_a_reader_of_somebody_elses_prepares_a_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(4):
        (raw / f"{number}.jpg").write_bytes(encoded(photo(number)))
    (raw / "birds.txt").write_text("".join(f"{n}.jpg\ta bird of kind {n}\n" for n in range(4)) + "nothing\n")
    assert main(["data", "acme.birds.Birds", str(raw), "--out", str(tmp_path / "birds"), "--workers", "1"]) == 0
    assert "left out: 1 row (no tab: 1)" in capsys.readouterr().out
    split = Prepared(str(tmp_path / "birds")).split("train")
    assert [split[row]["captions"] for row in range(4)] == [[f"a bird of kind {n}"] for n in range(4)]
    for name in ("acme.birds.Nothing", "acme.lengths.TextLength", "x.y"):
        with pytest.raises(UserError, match=re.escape(name)) as error:
            open_raw(name, str(tmp_path))
        assert error.value.code == ExitCode.MISSING_INPUT
