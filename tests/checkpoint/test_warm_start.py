"""What a checkpoint hands on to the next run, and one line for each that cannot."""

import errno
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import save_file
from toy_examples import LABELS, Nameless, Questions, bare_backbone, data_for, fit, trainer_in
from toy_pretrained import BACKBONE, saved
from toys import PATCH, SIZE, WIDTH, toy_backbone

from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.model_spec import model_spec_of
from maskvlm.checkpoint.warm_start import LineageEntry, Start, overlap, part, read_content, read_start
from maskvlm.checkpoint.weights import read_state
from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.cli.main import main
from maskvlm.data.caption_text import stable_id
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.text import tokenizer_hash
from maskvlm.model.encoders import ImageEncoder, TextEncoder
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.training.lit import LitModel
from maskvlm.utils.errors import ExitCode, UserError
from tasks.entailment.task import Entailment
from tasks.nlvr.task import Nlvr
from tasks.retrieval.task import Retrieval
from tasks.vqa.task import Vqa

ROOT = Path(__file__).resolve().parents[2]


def scenes() -> Scenes:
    return Scenes(train=24, val=6, test=5, size=SIZE)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two steps of pre-training on scenes."""
    path = tmp_path_factory.mktemp("pretrained") / "last.ckpt"
    backbone = bare_backbone()
    task = MaskedPretraining(
        mask_block=16, decoder_layers=1, contrast_dim=8, rerank_k=3, contrast_reads="class_and_mean"
    )
    model = LitModel(backbone, task)
    model.model_yaml = yaml.safe_dump({"model": {"random_init": True, "backbone": BACKBONE}})
    fit(model, data_for(backbone, scenes()), path)
    return path


@pytest.fixture(scope="module")
def tuned(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three steps of entailment that began from it."""
    path = tmp_path_factory.mktemp("tuned") / "last.ckpt"
    backbone = bare_backbone(pretrained)
    fit(LitModel(backbone, Entailment(LABELS)), data_for(backbone, Questions(), steps=3), path)
    return path


# ---------------------------------------------------------------------- what is handed on


def test_backbone_heads_tokenizer_and_history_are_handed_on(pretrained: Path) -> None:
    content, start = checkpoint.load(pretrained), read_start(str(pretrained))
    assert {f"backbone.{name}" for name in start.backbone} | {f"task.{name}" for name in start.heads} == set(
        content["state_dict"]
    )
    assert torch.equal(start.heads["matching.classify.weight"], content["state_dict"]["task.matching.classify.weight"])
    assert start.labels is None
    ids = sorted({stable_id(name) for name in scenes().split("train").image_ids()})
    (entry,) = start.history
    assert entry.words() == {
        "task": "maskvlm.objectives.pretraining.MaskedPretraining",
        "source": "maskvlm.data.scenes.source.Scenes",
        "sha": scenes().split("train").fingerprint,
        "pictures": len(ids),
        "steps": 2,
    }
    assert entry.ids is not None
    assert entry.ids.tolist() == ids
    backbone = bare_backbone(pretrained, seed=9)  # other random weights
    for name, value in start.backbone.items():
        assert torch.equal(backbone.state_dict()[name], value), name
    assert start.tokenizer is not None
    assert tokenizer_hash(backbone.text.tokenizer) == tokenizer_hash(start.tokenizer)
    assert backbone.input_spec.tokenizer is backbone.text.tokenizer  # the data trains no other
    assert {origin.source for origin in backbone.provenance.tensors.values()} == {str(pretrained)}
    assert set(backbone.provenance.tensors) == set(backbone.state_dict())


def test_a_fine_tuned_checkpoint_tells_both_parts_of_its_history(tuned: Path) -> None:
    start = read_start(str(tuned))
    assert [
        (entry.task.rpartition(".")[2], entry.source.rpartition(".")[2], entry.steps) for entry in start.history
    ] == [
        ("MaskedPretraining", "Scenes", 2),
        ("Entailment", "Questions", 3),
    ]
    assert start.history[1].images == 16
    assert start.labels == LABELS


def test_heads_that_fit_are_taken_over_and_counted(pretrained: Path, tuned: Path) -> None:
    model = LitModel(bare_backbone(tuned), Entailment(LABELS))
    heads = read_start(str(tuned)).heads
    assert model.warm_started == set(heads) == set(model.task.state_dict())
    for name, value in model.task.state_dict().items():
        assert torch.equal(value, heads[name])
    assert all(origin.how == "loaded" for origin in model.provenance.tensors.values())
    retrieval = LitModel(bare_backbone(pretrained), Retrieval(rerank_k=3))
    assert retrieval.warm_started == set(retrieval.task.state_dict())
    fresh = LitModel(bare_backbone(pretrained), Nlvr(LABELS, images_per_example=1))
    assert fresh.warm_started == set()
    assert {n for n, o in fresh.provenance.tensors.items() if o.how == "random"} == {
        f"task.{name}" for name in fresh.task.state_dict()
    }


def test_heads_of_losses_that_the_run_does_not_have_are_named(
    pretrained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"mask_block": 16, "decoder_layers": 1, "contrast_dim": 8, "rerank_k": 3}
    settings |= {"contrast_reads": "class_and_mean"}
    LitModel(bare_backbone(pretrained), MaskedPretraining(**settings))
    LitModel(bare_backbone(pretrained), Retrieval(rerank_k=3))  # another task has heads of its own
    assert caplog.text == ""
    LitModel(bare_backbone(pretrained), MaskedPretraining(**settings, weight_mlm=0.0, weight_itm=0.0))
    assert (
        "unused heads of the checkpoint: matching, tokens; to keep training them, give their losses a weight"
        in caplog.text
    )


def test_heads_that_decide_among_other_labels_are_not(tuned: Path) -> None:
    """As many labels, so the shapes would fit."""
    assert LitModel(bare_backbone(tuned), Entailment(("red", "blue", "green"))).warm_started == set()
    assert LitModel(bare_backbone(tuned), Entailment(LABELS)).warm_started != set()


def test_projections_take_the_width_of_the_checkpoint_and_what_they_read(pretrained: Path) -> None:
    assert Retrieval().contrast_dim is None
    for task in (
        LitModel(bare_backbone(pretrained), Retrieval()).task,
        LitModel(bare_backbone(pretrained), Retrieval(contrast_dim=8)).task,
    ):
        assert task.projection.image.out_features == 8  # type: ignore[union-attr]
        assert task.projection.image.in_features == 32  # type: ignore[union-attr]
        assert task.projection.mean  # type: ignore[union-attr]
    task = LitModel(bare_backbone(), Retrieval()).task
    assert task.projection.image.out_features == 256  # type: ignore[union-attr]
    frozen = LitModel(bare_backbone(pretrained), Retrieval(weight_itc=0.0)).task
    assert not any(parameter.requires_grad for parameter in frozen.projection.parameters())  # type: ignore[union-attr]
    with pytest.raises(UserError) as caught:
        LitModel(bare_backbone(pretrained), Retrieval(contrast_dim=16))
    assert str(caught.value) == (
        "model.task.contrast_dim: 16, but the checkpoint's projections are 8 wide. Leave it out, or give 8."
    )


def test_positions_follow_the_image_size_and_a_step_runs(pretrained: Path, tmp_path: Path) -> None:
    backbone = toy_backbone(length=24, vocab=150, start=str(pretrained), size=48)
    before = read_start(str(pretrained)).backbone["image.vit.pos_embed"]
    assert before.shape == (1, 1 + 16, 16)
    assert backbone.image.vit.pos_embed.shape == (1, 1 + 36, 16)
    origin = backbone.provenance.tensors["image.vit.pos_embed"]
    assert (origin.how, origin.was) == ("resized", (1, 17, 16))
    torch.testing.assert_close(backbone.image.vit.pos_embed[:, 0], before[:, 0])  # the class token's
    trainer = fit(LitModel(backbone, Entailment(LABELS)), data_for(backbone, Questions(), steps=1), tmp_path / "x.ckpt")
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


# ---------------------------------------------------------------------- history


def test_overlap_counts_images_that_any_part_of_the_history_saw() -> None:
    def entry(ids: list[int] | None) -> LineageEntry:
        return LineageEntry("t", "s", "sha", 3, 1, None if ids is None else torch.tensor(ids))

    image_ids = torch.tensor([2, 3, 5, 7])
    assert overlap(image_ids, ()) == 0
    assert overlap(image_ids, (entry([1, 2]), entry([2, 7, 9]))) == 2
    assert overlap(image_ids, (entry([1, 4]),)) == 0
    assert overlap(image_ids, (entry([2]), entry(None))) is None
    assert overlap(torch.tensor([], dtype=torch.long), (entry([2]),)) == 0


def test_a_source_without_ids_leaves_the_history_unknown(tmp_path: Path) -> None:
    backbone = bare_backbone()
    fit(LitModel(backbone, Entailment(LABELS)), data_for(backbone, Nameless()), tmp_path / "x.ckpt")
    (entry,) = read_start(str(tmp_path / "x.ckpt")).history
    assert (entry.ids, entry.images, entry.steps) == (None, 16, 2)


class Saving(L.Callback):
    """Leaves a checkpoint of the second step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def test_a_run_that_goes_on_states_its_own_part_once(pretrained: Path, tmp_path: Path) -> None:
    half, whole = tmp_path / "half.ckpt", tmp_path / "whole.ckpt"
    for settings in ({}, {"ckpt_path": half, "weights_only": True}):
        backbone = bare_backbone(pretrained)
        model = LitModel(backbone, Entailment(LABELS))
        fit(model, data_for(backbone, Questions(), steps=5), whole, Saving(half), **settings)
        for path, steps in ((half, 2), (whole, 5)):
            history = [(entry.task.rpartition(".")[2], entry.steps) for entry in read_start(str(path)).history]
            assert history == [("MaskedPretraining", 2), ("Entailment", steps)]


def test_a_checkpoint_that_is_only_measured_keeps_its_history(pretrained: Path, tuned: Path, tmp_path: Path) -> None:
    """By --ckpt_path a run brings its own part of the history, not only that of what it started from."""
    backbone = bare_backbone(pretrained)
    model = LitModel(backbone, Entailment(LABELS))
    trainer = trainer_in(tmp_path)
    trainer.validate(model, data_for(backbone, Questions()), ckpt_path=tuned, weights_only=True, verbose=False)
    assert [entry.steps for entry in model.history] == [2, 3]
    trainer.save_checkpoint(tmp_path / "copy.ckpt", weights_only=True)
    assert [entry.steps for entry in read_start(str(tmp_path / "copy.ckpt")).history] == [2, 3]


def test_a_run_that_learned_nothing_has_seen_nothing(tmp_path: Path) -> None:
    backbone = bare_backbone()
    model = LitModel(backbone, Entailment(LABELS))
    trainer_in(tmp_path, fast_dev_run=1).validate(model, data_for(backbone, Questions()), verbose=False)
    assert model.history == ()


# ---------------------------------------------------------------------- older checkpoints


def older(path: Path, content: dict[str, Any], config: dict[str, Any] | None = None) -> str:
    """A checkpoint file with this content, and perhaps its run's configuration beside it."""
    checkpoint.save({"state_dict": {}, **content}, path)
    if config is not None:
        path.with_name("config-fit.yaml").write_text(yaml.safe_dump(config))
    return str(path)


def test_an_older_checkpoint_takes_the_configuration_beside_it(tmp_path: Path) -> None:
    task = {
        "class_path": "maskvlm.objectives.pretraining.MaskedPretraining",
        "init_args": {"mask_block": 16, "labels": None},
    }
    config = {
        "model": {"lr": 3.0, "random_init": True, "backbone": BACKBONE, "task": task},
        "trainer": {"any": "thing"},
    }
    path = older(tmp_path / "x.ckpt", {}, config)
    spec = model_spec_of(read_content(path), path)
    args = spec.backbone["init_args"]
    assert (args["cross_layers"], args["image"]["init_args"]["name"]) == (2, "vit_tiny_patch16_224")
    assert spec.task == {
        "class_path": "maskvlm.objectives.pretraining.MaskedPretraining",
        "init_args": {"mask_block": 16},
    }


def test_without_both_it_is_one_line(tmp_path: Path) -> None:
    path = older(tmp_path / "x.ckpt", {})
    with pytest.raises(UserError) as caught:
        model_spec_of(read_content(path), path)
    assert str(caught.value) == (
        f"{path}: does not say which model it is, and there is no config-fit.yaml beside it. "
        "Put that file from its run beside it; if a script built the model, build it there: "
        "MaskVLM(..., start=this file)."
    )
    assert caught.value.code == ExitCode.MISSING_INPUT


def test_a_damaged_configuration_beside_it_is_damaged_data(tmp_path: Path) -> None:
    """It came with the checkpoint: no mistake in the command (2)."""
    path = older(tmp_path / "x.ckpt", {}, {})
    (tmp_path / "config-fit.yaml").write_text("model: [1, 2")
    with pytest.raises(UserError, match=r"config-fit\.yaml") as caught:
        model_spec_of(read_content(path), path)
    assert caught.value.code == ExitCode.BAD_DATA


def test_weights_that_may_not_be_read_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("maskvlm.data.safe_open._at_once", denied)  # root may read any file
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read \(Permission denied\)") as caught:
        read_state(tmp_path)
    assert caught.value.code == ExitCode.IO_ERROR


def test_an_older_checkpoint_has_seen_unknown_data(tmp_path: Path) -> None:
    start = read_start(older(tmp_path / "x.ckpt", {"global_step": 7}))
    assert (start.tokenizer, start.labels) == (None, None)
    assert [(entry.task, entry.steps, entry.ids) for entry in start.history] == [("unknown", 7, None)]
    assert overlap(torch.tensor([1]), start.history) is None


def test_part() -> None:
    one = torch.ones(1)
    assert part({"a.b": one, "ab": one, "a.a.c": one}, "a.") == {"b": one, "a.c": one}


# ---------------------------------------------------------------------- other labels


def with_other_labels(**settings: Any) -> set[str]:
    """What VQA takes over from a checkpoint of VQA with other answers; and of all its tensors, which there are."""
    backbone, before = toy_backbone(), Vqa(("red", "blue"), **settings)
    before.build(backbone)
    backbone.origin = Start("x.ckpt", {}, before.state_dict(), None, ("red", "blue"), ())
    model = LitModel(backbone, Vqa(("red", "blue", "green"), **settings))
    for name in model.warm_started:
        assert torch.equal(model.task.state_dict()[name], before.state_dict()[name]), name
    return set(model.task.state_dict()) - model.warm_started


def test_an_answer_that_is_written_is_taken_over_whatever_the_vocabulary_was() -> None:
    assert with_other_labels() == set()


def test_a_head_among_other_labels_is_new() -> None:
    new_names = with_other_labels(head="classify")
    assert new_names
    assert all(name.startswith("head.") for name in new_names)


# ---------------------------------------------------------------------- measuring what cannot be measured


def refused(start: Path, task: Any, tmp_path: Path, source: Any) -> UserError:
    backbone = bare_backbone(start)
    with pytest.raises(UserError) as caught:
        trainer_in(tmp_path).validate(LitModel(backbone, task), data_for(backbone, source), verbose=False)
    assert caught.value.code == ExitCode.BAD_DATA
    return caught.value


def test_heads_that_a_checkpoint_lacks_are_named(pretrained: Path, tmp_path: Path) -> None:
    error = refused(pretrained, Entailment(LABELS), tmp_path, Questions())
    assert f"{pretrained}: holds no heads of Entailment (head.layers.0.weight, head.layers.0.bias, " in str(error)
    assert "Fine-tune it first: maskvlm finetune" in error.todo


def test_labels_that_a_checkpoint_does_not_know_are_named(tuned: Path, tmp_path: Path) -> None:
    names = ("red", "green", "blue", "grey")
    error = refused(tuned, Entailment(names), tmp_path, Questions(names=names))
    what = (
        "its head predicts 3 labels, which are not the data's 4: label 4 is missing in the checkpoint and 'grey' in the"
    )
    what += " data"
    assert error.what == what


@pytest.mark.parametrize("fitted", [False, True])
def test_other_labels_of_the_same_number_are_refused_where_a_checkpoint_is_loaded(
    fitted: bool, tuned: Path, tmp_path: Path
) -> None:
    """All its tensors fit. Its figures would be those of other words."""
    names = ("red", "blue", "green")
    model, trainer = LitModel(bare_backbone(tuned), Entailment(names)), trainer_in(tmp_path)
    data = data_for(model.backbone, Questions(names=names))
    with pytest.raises(UserError) as caught:
        (trainer.fit if fitted else trainer.validate)(model, data, ckpt_path=str(tuned), weights_only=True)
    what = (
        "its head predicts 3 labels, which are not the data's 3: label 2 is 'green' in the checkpoint and 'blue' in the"
    )
    what += " data"
    assert (caught.value.where, caught.value.what, caught.value.code) == (str(tuned), what, ExitCode.BAD_DATA)


def test_heads_that_no_loss_trains_come_from_a_checkpoint() -> None:
    """Fails where random heads are frozen, without a word, because no checkpoint was named."""
    with pytest.raises(UserError, match=r"model.task.reads: scores, but there is no checkpoint that holds "):
        LitModel(toy_backbone(), Entailment(LABELS, reads="scores"))
    with pytest.raises(UserError, match=r"model.task.weight_itc: 0, but there is no checkpoint with contrast"):
        LitModel(toy_backbone(), Retrieval(weight_itc=0))
    LitModel(toy_backbone(), Retrieval())


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ({}, ""),
        ({"cross_heads": 4}, "model.backbone.cross_heads 4 instead of 2"),
        ({"normalisation": "clip"}, "model.backbone.image.normalisation clip instead of model"),
        ({"image_heads": 4}, "attention heads of the image encoder 4 instead of 2"),
        ({"text_heads": 4}, "attention heads of the text encoder 4 instead of 2"),
    ],
)
def test_settings_that_no_tensor_tells_are_compared(
    pretrained: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], other: str
) -> None:
    """All of these load every tensor, and compute something else."""
    vit = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": 1, "num_heads": change.get("image_heads", 2)}
    bert = {
        "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": change.get("text_heads", 2),
        "intermediate_size": 2 * WIDTH,
    }  # fmt: skip
    image = ImageEncoder(
        "vit_tiny_patch16_224", SIZE, random_init=True, config=vit, normalisation=change.get("normalisation", "model")
    )
    text = TextEncoder("bert", 24, random_init=True, vocab_size=150, config=bert)
    MaskVLM(image, text, cross_layers=2, cross_heads=change.get("cross_heads", 2), start=str(pretrained))
    warned = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    expected = f"warning: {pretrained} was trained with other settings than this model has: {other}."
    assert warned == ([f"{expected} Its weights may not work with them"] if other else [])


def test_scores_are_not_read_from_heads_that_a_checkpoint_lacks(tuned: Path, pretrained: Path) -> None:
    with pytest.raises(UserError, match=r"model.task.reads: scores, but there is no checkpoint that holds "):
        LitModel(bare_backbone(tuned), Entailment(("red", "green", "blue", "grey"), reads="scores"))
    heads = LitModel(bare_backbone(pretrained), Entailment(LABELS, reads="scores")).warm_started
    assert {name.partition(".")[0] for name in heads} == {"projection", "matching"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 32}, r"last.ckpt: does not fit MaskVLM: \d+ of another shape \("),
        ({"cross_layers": 1}, r"last.ckpt: does not fit MaskVLM: \d+ left over of the file's \d+ \("),
        ({"vocab": 90}, r"last.ckpt: tokenizer: 150 entries, but the model has rows for 90"),
        ({"vocab": 180}, r"last.ckpt: does not fit .* of another shape \(text.model.embeddings.word_embeddings.weight"),
    ],
)
def test_another_model_is_one_line(pretrained: Path, settings: dict[str, int], message: str) -> None:
    whole = {"length": 24, "vocab": 150, **settings}
    with pytest.raises(UserError, match=message) as caught:
        toy_backbone(start=str(pretrained), **whole)
    assert caught.value.code == ExitCode.BAD_DATA


# ---------------------------------------------------------------------- the command line


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of a run from a toy checkpoint, whose images have 32 pixels."""
    monkeypatch.chdir(ROOT)
    path = str(tmp_path / "x.ckpt")
    saved(Path(path))
    files = ("conf/base.yaml", "conf/finetune.yaml", "tasks/nlvr/conf.yaml", "conf/where/cpu.yaml")
    return ["--from", path, *(word for file in files for word in ("-c", file))]


def test_the_checkpoints_model_comes_first_and_everything_overrides_it(named: list[str], tmp_path: Path) -> None:
    def image_size(*more: str) -> int:
        settings = run_command(Parsed, ["fit", *named, *more]).settings
        assert settings.model.backbone.init_args.text.init_args.vocab_size == 256
        assert settings.model.backbone.init_args.start == settings["from"] == named[1]
        return int(settings.model.backbone.init_args.image.init_args.image_size)

    (tmp_path / "mine.yaml").write_text("model: {backbone: {init_args: {image: {init_args: {image_size: 96}}}}}\n")
    assert image_size() == 32
    assert image_size("-c", str(tmp_path / "mine.yaml")) == 96
    assert image_size("-c", str(tmp_path / "mine.yaml"), "--model.backbone.image.image_size", "112") == 112


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, ExitCode.MISSING_INPUT, "not there ("),
        (b"", ExitCode.BAD_DATA, "truncated (0 of unknown bytes)"),
        (b"hello world", ExitCode.BAD_DATA, "is not a checkpoint"),
        ("folder", ExitCode.MISSING_INPUT, "is a folder without config.json"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(
    named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, code: ExitCode, message: str
) -> None:
    path = tmp_path / "other.ckpt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert main(["fit", "--run", str(tmp_path / "run"), "--from", str(path), *named[2:]]) == code
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: {message}")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model.lrr 3", "--model.lrr: unknown key (did you mean model.lr?)"),
        ("--data.batch_size 1.5", "--data.batch_size: 1.5 does not fit. Give a whole number."),
        ("--from", "--from: expected one argument"),
    ],
)
def test_a_wrong_option_beside_a_checkpoint_is_one_line(
    named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    """The checkpoint's part of the configuration is a file of its own, which is gone when a mistake is explained."""
    assert main(["fit", "--run", str(tmp_path / "run"), *named, *words.split()]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert len(error.splitlines()) == 1
