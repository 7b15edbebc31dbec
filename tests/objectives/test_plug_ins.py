"""A loss and two ways of masking from a package of somebody else's: each is one file and a line of YAML."""

import csv
import importlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from acme.lengths import TextLength
from acme.masks import LastWords, Middle
from data.toy_raw import encoded, photo
from slow_step import build, each_token_a_word, eventful_batch
from torch import Tensor, nn
from toys import toy_batch

from maskvlm.cli.main import main
from maskvlm.data.prepared.source import Prepared
from maskvlm.data.raw import open_raw
from maskvlm.data.raw.base import BadRow, Facts, RawRow, RawSet, checked_rows
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.inference.rebuild import make_part
from maskvlm.objectives.masking import ChosenPhrases, RandomBlocks, RandomTokens, TextMasking
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.objectives.pretraining_losses import EvaluatedBatch, ImageTextContrast, Need, PretrainingLoss, Step
from maskvlm.training.failure import report
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


def test_they_are_named_in_a_file_trained_measured_and_loaded(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(HERE.parent)
    (tmp_path / "mine.yaml").write_text(YAML)
    words = ["fit", "--run", str(tmp_path / "run"), *stack(WHERE="cpu"), "-c", str(tmp_path / "mine.yaml")]
    assert main([*words, *SHORT.split()]) == ExitCode.REFUSED  # nobody said that it may be named
    assert "class acme." in capsys.readouterr().err
    assert main([*words, "--allow-import", "acme", *SHORT.split()]) == 0, capsys.readouterr().err
    # The last line's command can be pasted: without the package it would be refused.
    assert (
        f"try it: maskvlm fill --allow-import acme --from {tmp_path / 'run' / 'best.ckpt'} " in capsys.readouterr().err
    )
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/length")]
    assert len(rows) == 2
    assert float(rows[-1]["train/length"]) >= 0
    assert float(rows[-1]["level/length"]) > 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["mlm/accuracy"] >= 0
    assert metrics["length/error"] >= 0
    path = tmp_path / "run" / "best.ckpt"
    assert {"length.weight", "length.bias"} <= PretrainedMaskVLM.from_pretrained(
        path, allow_import=["acme"]
    ).task.state_dict().keys()
    exact = ["acme.lengths.TextLength", "acme.masks.Middle", "acme.masks.LastWords"]
    for allowed in (exact, "acme"):
        assert PretrainedMaskVLM.from_pretrained(path, allow_import=allowed).task.state_dict()
    for allowed in ([], ["acm"], exact[:1]):
        with pytest.raises(UserError) as refused:
            PretrainedMaskVLM.from_pretrained(path, allow_import=allowed)
        assert refused.value.code == ExitCode.REFUSED
    with pytest.raises(UserError, match="which is not a pretraining loss of this project") as refused:
        PretrainedMaskVLM.from_pretrained(path)
    assert refused.value.code == ExitCode.REFUSED
    # Measured as it was trained, without the file that named them; a training from it says what it leaves behind.
    own = ["--allow-import", "acme", *SHORT.split()]
    files = [
        word for pair in zip(*[iter(stack(WHERE="cpu"))] * 2, strict=True) if "model/" not in pair[1] for word in pair
    ]
    measure = ["validate", "--run", str(tmp_path / "measured"), "--from", str(path), *files, "--task_from", str(path)]
    assert main(measure) == ExitCode.REFUSED
    assert main([*measure, *own]) == 0
    composed = yaml.safe_load((tmp_path / "measured" / "config-validate.yaml").read_text())["model"]["task"]
    assert composed["init_args"]["image_masking"]["class_path"] == "acme.masks.Middle"
    assert "--task_from" not in capsys.readouterr().err  # nothing is left behind
    assert main(["fit", "--run", str(tmp_path / "more"), "--from", str(path), *files, *own]) == 0
    lines = capsys.readouterr().err.splitlines()
    warnings = [line for line in lines if "--task_from CHECKPOINT takes the checkpoint's whole task" in line]
    assert len(warnings) == 3
    assert warnings[0].startswith(
        "warning: model.task.image_masking: the default; the checkpoint's was acme.masks.Middle"
    )


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
    task(backbone, batch)
    masks = task.masks
    assert masks.patch is not None
    assert masks.token is not None
    assert masks.patch.mask_BN.sum(1).tolist() == [4 * int(valid) for valid in batch.valid_B]  # 2 x 2 of 4 x 4 patches
    words_C = (~batch.special_CT).sum(1)
    assert masks.token.mask_CT.sum(1).tolist() == [min(1, int(count)) for count in words_C]
    later = task.mask(backbone, batch, task.uniform)
    assert later.patch is not None
    assert torch.equal(later.patch.mask_BN, masks.patch.mask_BN)


def test_phrases_are_found_by_the_models_tokenizer() -> None:
    backbone, task = build(text_masking=ChosenPhrases(["these"]))
    batch = each_token_a_word(eventful_batch())
    word = int(batch.token_CT[0][~batch.special_CT[0]][0])
    ids_of_words = {"these": [word], "nowhere": [1]}  # 1: the id of what it does not know
    backbone.text.tokenizer = SimpleNamespace(
        mask_token_id=backbone.text.mask_id, pad_token_id=0, unk_token_id=1,
        encode=lambda words, add_special_tokens: (
            ids_of_words[words.strip()] if not add_special_tokens else [2, *ids_of_words[words.strip()], 3]
        ),
    )  # fmt: skip
    assert [backbone.text.ids_of(words) for words in ids_of_words] == [[word], []]
    task(backbone, batch)
    assert task.masks.token is not None
    holds_CT = (batch.token_CT == word) & ~batch.special_CT
    rows = holds_CT.any(1)
    assert torch.equal(task.masks.token.mask_CT[rows], holds_CT[rows])
    assert (task.masks.token.token_CT[rows][holds_CT[rows]] == backbone.text.mask_id).all()


def test_a_checkpoint_may_name_the_masking_and_its_phrases() -> None:
    options = {"phrases": ["left of", "above"], "share": 0.5, "most": None}
    path = "maskvlm.objectives.masking.ChosenPhrases"
    masking = make_part({"class_path": path, "init_args": options}, TextMasking, "task", ())
    assert isinstance(masking, ChosenPhrases)
    assert (masking.phrases, masking.share) == (["left of", "above"], 0.5)
    for wrong in ({"phrases": "above"}, {"phrases": [7]}, {"phrases": ["above"], "more": 1}):
        with pytest.raises(UserError) as refused:
            make_part({"class_path": path, "init_args": wrong}, TextMasking, "task", ())
        assert refused.value.code == ExitCode.REFUSED


def test_the_paper_masks_unless_told_otherwise() -> None:
    _, task = build(image_mask_ratio=0.5, text_mask_ratio=0.25)
    assert isinstance(task.image_masking, RandomBlocks)
    assert isinstance(task.text_masking, RandomTokens)
    assert (task.image_masking.ratio, task.text_masking.ratio) == (0.5, 0.25)


class Again(ImageTextContrast):
    """A second loss of the same name."""


class Twin(TextLength):
    """Another name, the same head."""

    name = "twin"


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([Again()], "two losses are called itc"),
        ([TextLength(), Twin()], "its head length already exists"),
    ],
)
def test_names_are_told_apart(losses: list[PretrainingLoss], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(losses=losses)


class Rows(TextLength):
    """Forgets to take the mean."""

    def __call__(self, heads: Any, step: Step) -> Tensor:
        return self.words(step)


class Number(TextLength):
    """Gives no tensor."""

    def __call__(self, heads: Any, step: Step) -> Tensor:
        return 1.0  # type: ignore[return-value]


class Spread(TextLength):
    """Measures rows that are weighed by a number."""

    def measure(self, heads: Any, seen: EvaluatedBatch) -> Mapping[str, tuple[Tensor, Tensor]]:
        return {"error": (seen.image_BLD[:, 0, 0], torch.ones(()))}


def test_a_loss_is_measured_on_held_out_images() -> None:
    """The weighted mean over all batches, and nothing of a loss without weight."""
    batches = [toy_batch(3, captions=2), toy_batch(5, captions=2)]
    batches[1] = batches[1]._replace(index_B=batches[1].index_B + 3)  # other images
    backbone, task = build(losses=[TextLength(0.5)])
    for batch in batches:
        task.update(backbone, batch)
    mean_error = task.compute(backbone)["length/error"]
    errors = []
    for batch in batches:
        predicted_C = task.length(backbone.image(batch.image_BCHW)[:, 0])[:, 0][batch.owner_C]
        errors.append((predicted_C - (~batch.special_CT).sum(1) / 10).square())
    assert mean_error == pytest.approx(torch.cat(errors).mean().item(), rel=1e-6)
    backbone, task = build(losses=[Spread()])
    with pytest.raises(UserError, match=r"Spread.measure: error has values \[3\] and weights \[\]"):
        task.update(backbone, batches[0])
    backbone, task = build(losses=[Spread(0.0)])
    task.update(backbone, batches[0])


@pytest.mark.parametrize(("loss", "gave"), [(Rows, "a tensor of shape [8]"), (Number, "1.0")])
def test_a_loss_is_a_scalar(loss: type[TextLength], gave: str) -> None:
    backbone, task = build(losses=[loss()])
    with pytest.raises(UserError, match=re.escape(f"model.task.losses: {loss.__name__}: gave {gave}")):
        task(backbone, eventful_batch())


class Bare(Middle):
    """Gives the mask alone."""

    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args).mask_BN


class Nothing(LastWords):
    """Gives nothing."""

    def __call__(self, *args: Any) -> Any:
        return None


class Short(Middle):
    """Leaves the last patch out."""

    def __call__(self, *args: Any) -> Any:
        mask = super().__call__(*args)
        return mask._replace(mask_BN=mask.mask_BN[:, :-1])


class Numbers(LastWords):
    """Gives numbers in the place of true and false."""

    def __call__(self, *args: Any) -> Any:
        mask = super().__call__(*args)
        return mask._replace(mask_CT=mask.mask_CT.long())


class Uneven(LastWords):
    """Gives fewer weights than places."""

    def __call__(self, *args: Any) -> Any:
        mask = super().__call__(*args)
        return mask._replace(index_CK=mask.index_CK.repeat(1, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_masking": Short()}, "model.task: Short: gave mask_BN of shape ["),
        ({"text_masking": Numbers()}, "torch.int64. Return ["),
        ({"text_masking": Uneven()}, "model.task: Uneven: gave weight_CK of shape ["),
        ({"image_masking": Bare()}, "model.task: Bare: gave a Tensor. Return a masking.PatchMask"),
        ({"text_masking": Nothing()}, "model.task: Nothing: gave a NoneType. Return a masking.TokenMask"),
    ],
)
def test_a_masking_gives_a_mask(settings: dict[str, Any], message: str) -> None:
    backbone, task = build(**settings)
    with pytest.raises(UserError, match=re.escape(message)):
        task(backbone, eventful_batch())


class NoWords(LastWords):
    """Masks nothing."""

    def __init__(self) -> None:
        super().__init__(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_masking": Middle(margin=9)}, "model.task: Middle: masks no patch of the first batch"),
        ({"text_masking": NoWords()}, "model.task: NoWords: masks no token of the first batch"),
    ],
)
def test_a_masking_that_masks_nothing_is_told_in_the_first_step(settings: dict[str, Any], message: str) -> None:
    backbone, task = build(**settings)
    with pytest.raises(UserError, match=re.escape(message)):
        task(backbone, eventful_batch())
    backbone, task = build(**settings, contrast_first=0.5)
    task.run_progress = 0.0  # one pair alone is masked, of which a sound masking may mask nothing
    task(backbone, eventful_batch())
    task.run_progress = 0.5
    with pytest.raises(UserError, match=re.escape(message)):
        task(backbone, eventful_batch())
    backbone, task = build(image_masking=Middle(margin=9), weight_mim=0.0)  # no loss asks for it
    task(backbone, eventful_batch())
    backbone, task = build(image_mask_ratio=0.0, text_mask_ratio=0.0)  # somebody's wish
    task(backbone, eventful_batch())


def test_a_loss_that_forgets_its_base_class_is_named() -> None:
    class Forgetful(TextLength):
        name = "forgetful"

        def __init__(self) -> None:
            self.extra = 1.0

    with pytest.raises(UserError, match=r"losses: Forgetful: has no weight\. Call super\(\)\.__init__\(weight\)"):
        MaskedPretraining(losses=[Forgetful()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"build": lambda self, backbone: None}, "build: gave a NoneType. Return a dict: each head by its name"),
        ({"build": lambda self, backbone: nn.Linear(2, 1)}, "build: gave a Linear"),
        ({"build": lambda self, backbone: {"length": nn.Parameter(Tensor(1))}}, "build: gave 'length' as a Parameter"),
        ({"measure": lambda self, heads, seen: 1.0}, "measure: gave a float. Return a dict: each metric by its name"),
        ({"measure": lambda self, heads, seen: {"error": torch.ones(())}}, "measure: gave error as Tensor"),
        ({"measure": lambda self, heads, seen: {"error": (1.0, 1.0)}}, "measure: gave error as tuple"),
    ],
)
def test_what_a_loss_gives_is_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"model.task.losses: Wrong.{message}")):  # noqa: PT012
        backbone, task = build(losses=[type("Wrong", (TextLength,), settings)()])
        task.update(backbone, toy_batch(3))


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (TextLength, {"chance": lambda self, batch_size: 1.0}, "chance(batch_size, texts_per_image)"),
        (TextLength, {"observe": lambda self, step: None}, "observe(heads, step)"),
        (TextLength, {"__call__": lambda self, step: None}, "__call__(heads, step)"),
        (Middle, {"__call__": lambda self, grid: None}, "__call__(valid_B, grid, patch_size, uniform, training)"),
        (LastWords, {"__call__": lambda self, texts, *, uniform: None}, "__call__(texts, vocabulary, uniform)"),
    ],
)
def test_a_method_that_does_not_take_its_arguments_is_told_before_the_run(
    base: type, settings: dict[str, Any], message: str
) -> None:
    keys = {TextLength: "losses", Middle: "image_masking", LastWords: "text_masking"}
    with pytest.raises(UserError, match=re.escape(f"is called as {message}. Let it take")):  # noqa: PT012
        wrong = type("Wrong", (base,), settings)()
        MaskedPretraining(**{keys[base]: [wrong] if base is TextLength else wrong})


def test_a_method_may_take_more_and_have_other_names() -> None:
    class More(TextLength):
        name = "more"

        def chance(self, size: int, texts: int, more: int = 1) -> float | None:
            return 1.0

        def observe(self, *rest: Any) -> None:
            return

    assert MaskedPretraining(losses=[More()]).losses[-1].name == "more"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": ""}, "has no name"),
        ({"name": "a b/c"}, "has no name"),
        (
            {"needs": frozenset({"imgae"})},
            "needs frozenset({'imgae'}). Give its class `needs`, a frozenset of some of ",
        ),
        ({"needs": {Need.IMAGE}}, "needs {<Need.IMAGE"),
        ({"needs": frozenset()}, "needs frozenset()"),
    ],
)
def test_a_loss_says_its_name_and_what_it_needs(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"model.task.losses: Wrong: {message}")):
        type("Wrong", (TextLength,), settings)()


def test_a_mistake_in_a_plug_in_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "strange_of_this_test.py").write_text("def fails():\n    return {}['nothing']\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("strange_of_this_test")
    with pytest.raises(KeyError) as caught:
        module.fails()
    assert report(caught.value, tmp_path) == ExitCode.OUR_BUG
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: {tmp_path}/strange_of_this_test.py:2: KeyError: 'nothing'. Fix it there; ")


# ---------------------------------------------------------------------- a data format


def test_a_reader_of_somebody_elses_prepares_a_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(4):
        (raw / f"{number}.jpg").write_bytes(encoded(photo(number)))
    (raw / "birds.txt").write_text("".join(f"{n}.jpg\ta bird of kind {n}\n" for n in range(4)) + "nothing\n")
    assert main(["data", "acme.birds.Birds", str(raw), "--out", str(tmp_path / "birds"), "--workers", "1"]) == 0
    output = capsys.readouterr().out
    assert "Birds" not in output.split("licence: ")[0]
    assert "licence: CC0" in output
    assert "left out: 1 row (no tab: 1)" in output
    split = Prepared(str(tmp_path / "birds")).split("train")
    assert [split[row]["captions"] for row in range(4)] == [[f"a bird of kind {n}"] for n in range(4)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acme.birds.Nothing", "cannot be imported"),
        ("acme.lengths.TextLength", "does not read a set"),
        ("x.y", "imported"),
    ],
)
def test_what_is_no_reader_is_one_line(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_raw(name, str(tmp_path))
    assert error.value.code == ExitCode.MISSING_INPUT


class Reader(RawSet):
    """Gives what it was told to give."""

    facts = Facts("Toys", None, None, "CC0")
    given: Any = None

    def rows(self) -> Any:
        return self.given


class Factless(RawSet):
    """Does not say what it reads."""

    def rows(self) -> Any:
        return []


GOOD = RawRow("a.png", ("a bird",), "toys 1", "train", "toys.txt:1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "Reader.rows: gave a NoneType. Yield the rows"),
        ([GOOD, tuple(GOOD)], "Reader.rows: gave a tuple. Yield a RawRow or a BadRow"),
        ([GOOD._replace(image_id=1)], "Reader.rows: gave image_id as a int in toys.txt:1. Give str"),  # type: ignore[arg-type]
        ([GOOD._replace(image=3)], "Reader.rows: gave image as a int in toys.txt:1. Give str or bytes"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_row_of_a_reader_is_told(given: Any, message: str, tmp_path: Path) -> None:
    reader = Reader(str(tmp_path), "toys")
    reader.given = given
    with pytest.raises(UserError, match=re.escape(message)):
        list(checked_rows(reader))
    good: list[Any] = [GOOD, BadRow("no tab", "toys.txt:2", "no tab", "train")]
    reader.given = good
    assert list(checked_rows(reader)) == good
    reader.given = [GOOD._replace(image=Path("a.png"))]  # type: ignore[arg-type]
    assert list(checked_rows(reader)) == [GOOD]


def test_a_reader_has_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("acme.birds.Factless", Factless, raising=False)
    with pytest.raises(UserError, match=r"acme\.birds\.Factless has no facts\. Define them in the class"):
        open_raw("acme.birds.Factless", str(tmp_path))


# ---------------------------------------------------------------------- the page that says so


def test_the_page_shows_the_files_of_this_package() -> None:
    page = (HERE.parent / "docs" / "extending.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"```python\n# (acme/\w+\.py)\n(.*?)```", page, re.DOTALL))
    assert files.keys() == {"acme/lengths.py", "acme/masks.py", "acme/birds.py"}
    for name, text in files.items():
        assert text == (HERE / name).read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(model:\n  task:.*?)```", page, re.DOTALL)
    assert yaml.safe_load(block) == yaml.safe_load(YAML)
