"""What is built without the command line: the how-to page runs as it stands, and its checkpoint is one of ours."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from acme.lengths import TextLength as TextCount
from torch import Tensor
from toy_examples import Questions, bare_backbone, data_for, trainer_in
from toys import toy_backbone

from maskvlm import MaskVLM
from maskvlm.checkpoint.model_spec import spec_of_modules
from maskvlm.data.module import PairData
from maskvlm.data.scenes.source import Scenes
from maskvlm.inference.rebuild import read_arguments
from maskvlm.model.encoders import ImageEncoder, TextEncoder
from maskvlm.model.maskvlm import MaskVLM as Backbone
from maskvlm.objectives.classification import Classification
from maskvlm.objectives.masking import RandomBlocks
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.training.checkpointing import KeepState
from maskvlm.training.lit import LitModel, check_data_labels, check_length, check_source
from maskvlm.utils.constructor import given_arguments
from maskvlm.utils.distributed import Draw
from maskvlm.utils.errors import UserError
from tasks.captioning.task import Captioning
from tasks.retrieval.task import Retrieval
from tasks.vqa.scenes import SceneQuestions
from tasks.vqa.task import Vqa

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/how-to/in-python.md"
SIZES = ["--data.steps=1", "--data.batch_size=4", "--data.source.train=8", "--data.source.val=4"]


def maskvlm(*words: str, folder: Path) -> None:
    """Run a command in a folder."""
    subprocess.run([sys.executable, "-m", "maskvlm", *words], cwd=folder, check=True, capture_output=True)


def test_the_page_runs_and_its_checkpoint_is_one_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    maskvlm("scene", "3", folder=tmp_path)
    known: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), known)
    assert known["terms"].keys() == {"itc", "itm", "mlm", "mim"}
    # The checkpoint of the second block says what it is of.
    model, content = MaskVLM.from_pretrained("mine.ckpt"), torch.load("mine.ckpt", weights_only=True)
    trained: dict[str, Tensor] = content["state_dict"]
    for name, value in model.backbone.state_dict().items():
        torch.testing.assert_close(value, trained[f"backbone.{name}"], rtol=0, atol=0)
    assert model.task.arguments["contrast_dim"] == 32
    assert "data.source" not in content["model"]  # nor where anything lay
    assert content["lineage"][0]["steps"] == 20
    maskvlm("finetune", "vqa", "from=mine.ckpt", "run=vqa", "where=cpu", *SIZES, folder=tmp_path)
    assert (tmp_path / "checkpoints/vqa/card.json").is_file()
    more = ("model=tiny", "from=mine.ckpt", "run=more", "where=cpu", "--task_from", "mine.ckpt", *SIZES)
    maskvlm("pretrain", *more, folder=tmp_path)
    assert (tmp_path / "checkpoints/more/best.ckpt").is_file()
    # The folder of the third block holds what was trained there.
    reloaded = MaskVLM.from_pretrained("mine")
    for name, value in reloaded.task.state_dict().items():
        torch.testing.assert_close(value, known["task"].state_dict()[name], rtol=0, atol=0)


class Keyed(MaskedPretraining):
    """Hands on what it does not know itself."""

    def __init__(self, extra: float = 0.5, **kw: Any) -> None:
        super().__init__(**kw)
        self.extra = extra


class Listed(MaskedPretraining):
    """Hands on what it does not name."""

    def __init__(self, extra: float = 0.5, *rest: Any) -> None:
        super().__init__(*rest)


class Untyped(MaskedPretraining):
    """Does not say what it takes."""

    def __init__(self, extra=0.5) -> None:  # type: ignore[no-untyped-def]
        super().__init__()


def read(task: MaskedPretraining) -> dict[str, Any]:
    """The arguments of its class, as they are read from a checkpoint."""
    spec = spec_of_modules(toy_backbone(), task)
    assert spec is not None
    assert spec.task is not None
    return read_arguments(type(task), spec.task["init_args"], "x.ckpt: task")


def test_a_class_that_hands_on_arguments_comes_back_with_them() -> None:
    arguments = read(Keyed(0.25, mask_block=16, image_mask_ratio=0.9))
    assert (arguments["extra"], arguments["mask_block"], arguments["image_mask_ratio"]) == (0.25, 16, 0.9)
    with pytest.raises(UserError, match=r"x\.ckpt: task\.extra: its class does not say of which type it is\. Annotate"):
        read(Untyped(0.75))
    spec = spec_of_modules(toy_backbone(), Listed(0.25, 0.9, 0.15))
    assert spec is not None
    assert spec.task is None  # no name says which of them is which


def test_what_is_changed_after_a_model_was_built_is_not_told() -> None:
    vit = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    image = ImageEncoder("vit_tiny_patch16_224", 32, config=vit, random_init=True, drop_path=np.float32(0.5))  # type: ignore[arg-type]
    vit["num_heads"] = 4
    backbone = toy_backbone()
    backbone.image = image
    spec = spec_of_modules(backbone, MaskedPretraining())
    assert spec is not None
    args = spec.backbone["init_args"]["image"]["init_args"]
    assert (args["config"]["num_heads"], args["drop_path"]) == (2, 0.5)


def test_heads_that_are_there_stay() -> None:
    """Of an earlier training, or of a loaded model, which is in the mode of evaluation."""
    backbone, task = toy_backbone(), MaskedPretraining(mask_block=8, contrast_dim=8)
    LitModel(backbone, task)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    model = MaskVLM.from_modules(backbone, task)
    assert not model.task.training
    again = LitModel(model.backbone, model.task)
    assert all(module.training for module in again.modules())
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(UserError, match="MaskedPretraining has no heads yet"):
        MaskVLM.from_modules(toy_backbone(), MaskedPretraining())
    with pytest.raises(UserError, match="cannot be told"):
        MaskVLM.from_modules(backbone, MaskedPretraining(image_masking=RandomBlocks(0.5, 16, 0.0)))


def data() -> PairData:
    return PairData(Scenes(train=8, val=4), toy_backbone().input_spec, batch_size=4, steps=2, accumulate=1)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: MaskedPretraining(losses=TextCount()), "model.task.losses: expected a list of objects of Pretr"),
        (lambda: MaskedPretraining(image_masking=RandomBlocks), "image_masking: expected an object of ImageMasking"),
        (lambda: MaskedPretraining(text_masking="words"), "text_masking: expected an object of TextMasking"),
        (lambda: LitModel(MaskedPretraining(), toy_backbone()), "LitModel: MaskedPretraining and MaskVLM were given"),
        (lambda: PairData(Scenes, toy_backbone().input_spec, steps=1), "source is the class Scenes and spec InputSpec"),
        (lambda: PairData(Scenes(), toy_backbone(), steps=1), "source is Scenes and spec MaskVLM"),
        (
            lambda: check_length(L.Trainer(max_epochs=3, logger=False), data()),
            r"Trainer\(max_epochs\): 3, but",
        ),
        (lambda: check_length(L.Trainer(max_epochs=1, max_steps=1, logger=False), data()), r"Trainer\(max_steps\): 1"),
        (
            lambda: check_length(L.Trainer(max_epochs=1, accumulate_grad_batches=2, logger=False), data()),
            r"accumulate_grad_batches\): 2, and PairData\(accumulate\) is 1",
        ),
        (
            lambda: KeepState("x").setup(L.Trainer(logger=False), Any, "fit"),
            r"KeepState: .*Use Trainer\(plugins=\[SafeCheckpointIO\(\)\]\)",
        ),
    ],
)
def test_a_mistake_in_a_script_is_one_line(ask: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        ask()
    assert "\n" not in str(caught.value).removesuffix("\nexit status 2")


def test_a_model_is_not_trained_on_loaders_alone() -> None:
    trainer = L.Trainer(max_epochs=1, logger=False, accelerator="cpu", enable_checkpointing=False)
    with pytest.raises(UserError, match="trainer: has no PairData"):
        trainer.fit(LitModel(toy_backbone(), MaskedPretraining(mask_block=8)), [1])


def test_a_task_of_pairs_is_not_trained_on_examples_nor_the_other_way_round() -> None:
    pairs, examples = Scenes(train=8, val=4), SceneQuestions(train=8, val=4, test=4)
    spec, kinds = toy_backbone().input_spec, ("pairs of images and captions", "examples of a downstream task")
    vqa = Vqa(labels=["red"], head="classify")
    for task, source, right in (
        (MaskedPretraining(), pairs, True),
        (MaskedPretraining(), examples, False),
        (Retrieval(), examples, False),
        (Captioning(), examples, False),
        (vqa, examples, True),
        (vqa, pairs, False),
    ):
        data = PairData(source, spec, batch_size=4, steps=1)
        if right:
            check_source(task, data)
            continue
        source_kind, task_kind = kinds[::-1] if source is examples else kinds
        words = f"data.source: {type(source).__name__} gives {source_kind}, {type(task).__name__} needs {task_kind}"
        with pytest.raises(UserError, match=words):
            check_source(task, data)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("green", "red", "blue"), "the task's 3 are not the data's 3: label 1 is 'green', not 'red'"),
        (("red", "green"), "the task's 2 are not the data's 3: label 3 is None, not 'blue'"),
    ],
)
def test_labels_of_a_task_are_those_of_its_data(labels: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """In another order each target would stand for another label."""
    backbone = bare_backbone()
    data, trainer = data_for(backbone, Questions(), steps=1), trainer_in(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"Classification(labels): {message}. Give the data's own")):
        trainer.fit(LitModel(backbone, Classification(labels)), data)
    check_data_labels(Classification(list(Questions().labels)), data)
    check_data_labels(Vqa(labels, head="generate"), data)


def test_what_a_loop_of_ones_own_forgets_is_told_step_by_step() -> None:
    backbone, task = bare_backbone(), MaskedPretraining(mask_block=8, decoder_layers=1, contrast_dim=8)
    data = PairData(Scenes(train=8, val=4), backbone.input_spec, batch_size=4, steps=1)

    def step() -> dict[str, Tensor]:
        return task(backbone, data.normalised(next(iter(data.train_dataloader()))))  # type: ignore[no-any-return]

    for loader, split, stage in (
        (data.train_dataloader, "train", "fit"),
        (data.val_dataloader, "val", "validate"),
        (data.test_dataloader, "test", "test"),
    ):
        with pytest.raises(UserError, match=rf"PairData: the {split} split .* Call data\.setup\('{stage}'\)"):
            loader()
    data.setup("fit")
    assert data.tokenizer is not None
    with pytest.raises(UserError, match=r"MaskedPretraining: has no heads yet\. Call task\.build_once"):
        step()
    task.build_once(backbone)
    with pytest.raises(UserError, match=r"MaskedPretraining: has no random numbers .* Call task\.set_uniform"):
        step()
    task.set_uniform(Draw(0, 0, "cpu"))
    with pytest.raises(UserError, match=r"TextEncoder: has no tokenizer yet\. Call backbone\.text\.set_tokenizer"):
        step()
    backbone.text.set_tokenizer(data.tokenizer)
    with pytest.raises(UserError, match=r"ImageEncoder: its pixels are torch\.uint8\. Normalise them"):
        task(backbone, next(iter(data.train_dataloader())))
    assert step().keys() == {"itc", "itm", "mlm", "mim"}


def test_exchanged_encoders_are_told() -> None:
    one = toy_backbone()
    encoders: list[Any] = [one.image, one.text]
    with pytest.raises(UserError, match="MaskVLM: TextEncoder and ImageEncoder were given as image and text"):
        Backbone(*reversed(encoders))
    with pytest.raises(UserError, match="MaskVLM: ImageEncoder and TextEncoder were given"):
        Backbone(*map(type, encoders))  # type: ignore[arg-type]


class Narrow(ImageEncoder):
    """An encoder of one's own, which no checkpoint may name."""


def test_what_a_checkpoint_cannot_say_it_does_not_say() -> None:
    backbone, task = toy_backbone(), MaskedPretraining(contrast_dim=8, temperature=0.1)
    spec = spec_of_modules(backbone, task)
    assert spec is not None
    assert spec.task is not None
    assert spec.task["init_args"]["contrast_dim"] == 8
    assert spec.task["init_args"]["mask_block"] == 32  # a default, too
    assert yaml.safe_load(yaml.safe_dump(spec.backbone)) == spec.backbone
    spec = spec_of_modules(backbone, MaskedPretraining(image_masking=RandomBlocks(0.5, 16, 0.0)))
    assert spec is not None
    assert spec.task is None
    backbone.image.__class__ = Narrow
    assert spec_of_modules(backbone, task) is None


class Base:
    """Notes what its most specific class was built with."""

    def __init__(self, number: int) -> None:
        self.number, self.arguments = number, given_arguments(self)


class Middle(Base):
    def __init__(self, name: str = "none") -> None:
        super().__init__(7)
        self.name = name


class Whole(Middle):
    """Builds another one within its own constructor."""

    def __init__(self, *, size: float, **more: int) -> None:
        self.part = Middle("part")
        super().__init__()
        self.size = size


def test_a_base_class_sees_what_the_most_specific_class_was_given() -> None:
    whole = Whole(size=0.5, extra=2)
    assert whole.arguments == {"size": 0.5, "extra": 2}
    assert whole.part.arguments == {"name": "part"}
    assert Base(number=3).arguments == {"number": 3}
    names: Any = ["a"]
    later = Middle(names)
    names.append("b")
    assert later.arguments == {"name": ["a"]}


@pytest.mark.parametrize(("special", "vocab_size"), [(["[PAD]", "[UNK]"], None), (["[UNK]", "[PAD]"], 40)])
def test_a_text_encoder_that_starts_from_nothing_with_a_tokenizer_comes_back(
    tmp_path: Path, special: list[str], vocab_size: int | None
) -> None:
    """Its rows, its padding and its positions follow from the tokenizer, which a checkpoint keeps apart."""
    words = [*special, "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(35))]
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("\n".join(words) + "\n")
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = TextEncoder(
        "bert", 12, random_init=True, config=config, tokenizer=str(tmp_path / "tokenizer"), vocab_size=vocab_size
    )
    vit = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    backbone = Backbone(ImageEncoder("vit_tiny_patch16_224", 48, config=vit, random_init=True), text, 1, 2)
    task = MaskedPretraining(mask_block=16, decoder_layers=1, contrast_dim=32)
    task.build_once(backbone)
    MaskVLM.from_modules(backbone, task).save_pretrained(tmp_path / "out")
    loaded = MaskVLM.from_pretrained(tmp_path / "out")
    for name, value in backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[name], value), name
