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
from maskvlm.utils.distributed import Draw
from maskvlm.utils.errors import UserError, check_counts, check_least
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


@pytest.mark.slow
def test_the_page_runs_and_its_checkpoint_is_one_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    maskvlm("scene", "3", folder=tmp_path)
    known: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), known)
    assert known["terms"].keys() == {"itc", "itm", "mlm", "mim"}
    # The checkpoint of the second block says what it is of.
    model, content = MaskVLM.from_pretrained("mine.ckpt"), torch.load("mine.ckpt", weights_only=True)
    assert content["lineage"][0]["steps"] == 20
    assert model.task.arguments["contrast_dim"] == 32
    maskvlm("finetune", "vqa", "from=mine.ckpt", "run=vqa", "where=cpu", *SIZES, folder=tmp_path)
    assert (tmp_path / "checkpoints/vqa/card.json").is_file()
    more = ("model=tiny", "from=mine.ckpt", "run=more", "where=cpu", "--task_from", "mine.ckpt", *SIZES)
    maskvlm("pretrain", *more, folder=tmp_path)
    assert (tmp_path / "checkpoints/more/best.ckpt").is_file()
    # The folder of the third block holds what was trained there.
    reloaded = MaskVLM.from_pretrained("mine")
    for name, value in reloaded.task.state_dict().items():
        torch.testing.assert_close(value, known["task"].state_dict()[name], rtol=0, atol=0)


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


def fitted_on_loaders_alone() -> None:
    trainer = L.Trainer(max_epochs=1, logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.fit(LitModel(toy_backbone(), MaskedPretraining(mask_block=8)), [1])


def exchanged() -> Any:
    one = toy_backbone()
    encoders: list[Any] = [one.text, one.image]
    return Backbone(*encoders)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: MaskedPretraining(losses=TextCount()), "model.task.losses: expected a list"),
        (lambda: MaskedPretraining(image_masking=RandomBlocks), "image_masking: expected an object of ImageMasking"),
        (lambda: MaskedPretraining(text_masking="words"), "text_masking: expected an object of TextMasking"),
        (lambda: LitModel(MaskedPretraining(), toy_backbone()), "LitModel: MaskedPretraining and MaskVLM were given"),
        (exchanged, "MaskVLM: TextEncoder and ImageEncoder were given as image and text"),
        (lambda: PairData(Scenes, toy_backbone().input_spec, steps=1), "source is the class Scenes and spec InputSpec"),
        (lambda: PairData(Scenes(), toy_backbone(), steps=1), "source is Scenes and spec MaskVLM"),
        (lambda: check_length(L.Trainer(max_epochs=3, logger=False), data()), "max_epochs"),
        (lambda: check_length(L.Trainer(max_epochs=1, max_steps=1, logger=False), data()), "max_steps"),
        (
            lambda: check_length(L.Trainer(max_epochs=1, accumulate_grad_batches=2, logger=False), data()),
            "accumulate_grad_batches",
        ),
        (lambda: KeepState("x").setup(L.Trainer(logger=False), Any, "fit"), "SafeCheckpointIO"),
        (fitted_on_loaders_alone, "trainer: has no PairData"),
        (lambda: PairData(Scenes(8, 8), toy_backbone().input_spec, steps=2.5), "data.steps"),
        (lambda: MaskedPretraining(rerank_k=True), "model.task.rerank_k"),
        (lambda: LitModel(toy_backbone(), Retrieval(), chunk=0), "model.chunk"),
        (lambda: LitModel(toy_backbone(), Retrieval(), lr=float("nan")), "model.lr"),
    ],
)
def test_a_mistake_in_a_script_is_one_line(ask: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        ask()
    assert "\n" not in str(caught.value).removesuffix("\nexit status 2")


def test_numbers_are_finite_and_counts_are_whole() -> None:
    check_counts(1, {"a": 1, "b": None, "c": np.int64(3)})
    check_least(0, {"a": 0, "b": None, "c": 1e-9, "d": np.float32(2)})
    for count in (2.5, float("inf"), float("nan"), True, "2", 0):
        with pytest.raises(UserError, match=r"^a: "):
            check_counts(1, {"a": count})
    for rate in (float("inf"), float("nan"), -0.1, "1e-3"):
        with pytest.raises(UserError, match=r"^a: "):
            check_least(0, {"a": rate})


def test_a_task_of_pairs_is_not_trained_on_examples_nor_the_other_way_round() -> None:
    pairs, examples, spec = Scenes(train=8, val=4), SceneQuestions(train=8, val=4, test=4), toy_backbone().input_spec
    vqa = Vqa(labels=["red"], head="classify")
    for task, right, wrong in (
        (MaskedPretraining(), pairs, examples),
        (Retrieval(), pairs, examples),
        (Captioning(), pairs, examples),
        (vqa, examples, pairs),
    ):
        check_source(task, PairData(right, spec, batch_size=4, steps=1))
        with pytest.raises(UserError, match=r"data\.source"):
            check_source(task, PairData(wrong, spec, batch_size=4, steps=1))


def test_labels_of_a_task_are_those_of_its_data(tmp_path: Path) -> None:
    """In another order each target would stand for another label."""
    backbone = bare_backbone()
    data, trainer = data_for(backbone, Questions(), steps=1), trainer_in(tmp_path)
    with pytest.raises(UserError, match="label 1 is 'green', not 'red'"):
        trainer.fit(LitModel(backbone, Classification(("green", "red", "blue"))), data)
    with pytest.raises(UserError, match="label 3 is None, not 'blue'"):
        check_data_labels(Classification(("red", "green")), data)
    check_data_labels(Classification(list(Questions().labels)), data)
    check_data_labels(Vqa(("red", "green"), head="generate"), data)


def test_what_a_loop_of_ones_own_forgets_is_told_step_by_step() -> None:
    backbone, task = bare_backbone(), MaskedPretraining(mask_block=8, decoder_layers=1, contrast_dim=8)
    data = PairData(Scenes(train=8, val=4), backbone.input_spec, batch_size=4, steps=1)

    def step() -> dict[str, Tensor]:
        return task(backbone, data.normalised(next(iter(data.train_dataloader()))))  # type: ignore[no-any-return]

    with pytest.raises(UserError, match=r"data\.setup\('fit'\)"):
        data.train_dataloader()
    with pytest.raises(UserError, match=r"data\.setup\('validate'\)"):
        data.val_dataloader()
    with pytest.raises(UserError, match=r"data\.setup\('test'\)"):
        data.test_dataloader()
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


class Keyed(MaskedPretraining):
    """Hands on what it does not know itself."""

    def __init__(self, extra: float = 0.5, **kw: Any) -> None:
        super().__init__(**kw)


def test_a_class_that_hands_on_arguments_comes_back_with_them() -> None:
    spec = spec_of_modules(toy_backbone(), Keyed(0.25, mask_block=16, image_mask_ratio=0.9))
    assert spec is not None
    assert spec.task is not None
    arguments = read_arguments(Keyed, spec.task["init_args"], "x.ckpt: task")
    assert (arguments["extra"], arguments["mask_block"], arguments["image_mask_ratio"]) == (0.25, 16, 0.9)


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
