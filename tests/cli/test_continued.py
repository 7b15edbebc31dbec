"""Runs that go on from one another: pre-training, more of it on other data, fine-tuning, evaluation; what a checkpoint
brings, and what it cannot do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_examples import LABELS, Questions, bare_backbone, data_for, fit
from toys import SIZE

from maskvlm.checkpoint.io import load
from maskvlm.cli.commands import COMMANDS
from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.cli.main import main
from maskvlm.training.lit import LitModel
from maskvlm.utils.errors import ExitCode
from tasks.vqa.task import Vqa

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--data.batch_size=4", "--data.eval_batch_size=8", "--data.source.train=40", "--data.source.val=12"]
SMALL = [*SIZES, "--data.steps=2", "--model.task.weight_words=0", "--model.task.rerank_k=2"]
SHAPES = [
    "--model.backbone.image.config={patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}",
    "--model.backbone.text.config={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 64}",
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, stack: Callable[..., list[str]]) -> Path:
    """The folder of runs, with the checkpoint of a pre-training in `p`."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(["fit", "--run", str(folder / "p"), *stack(WHERE="cpu"), *SMALL, *SHAPES]) == 0
    return folder


@pytest.fixture(scope="session")
def finetuned(pretrained: Path) -> Path:
    """Beside it VQA from there on larger images in `f`, and its evaluation in `e`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        more = ["--data.steps=2", "--model.backbone.image.image_size=64"]
        start = ["--from", str(pretrained / "p" / "last.ckpt")]
        assert main(["fit", "--run", str(pretrained / "f"), *start, *task_files("vqa"), *SIZES, *more]) == 0
        start = ["--from", str(pretrained / "f" / "last.ckpt")]
        assert main(["validate", "--run", str(pretrained / "e"), *start, *task_files("vqa"), *SIZES]) == 0
    return pretrained


def task_files(task: str) -> list[str]:
    files = ("conf/base.yaml", "conf/finetune.yaml", f"tasks/{task}/conf.yaml", "conf/where/cpu.yaml")
    return [word for file in files for word in ("-c", file)]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_a_pretraining_goes_on_with_its_words_and_names_its_origin(
    pretrained: Path, stack: Callable[..., list[str]], tmp_path: Path
) -> None:
    origin = pretrained / "p" / "last.ckpt"
    pairs = zip(*[iter(stack(WHERE="cpu"))] * 2, strict=True)
    files = [word for option, file in pairs if "model/" not in file for word in (option, file)]
    other = ["--data.source.seed=5", "--model.task.weight_mim=0"]
    assert main(["fit", "--run", str(tmp_path / "r"), "--from", str(origin), *files, *SMALL, *other]) == 0
    before, after = load(origin), load(tmp_path / "r" / "last.ckpt")
    assert after["tokenizer"] == before["tokenizer"]
    assert [entry["steps"] for entry in after["lineage"]] == [2, 2]
    parts = read(tmp_path / "r" / "provenance.json")["tensors"]
    # The heads of the losses that are left, too.
    assert {(part["how"], part.get("source")) for part in parts.values()} == {("loaded", str(origin))}
    assert any(name.startswith("task.tokens") for name in parts)
    assert not any(name.startswith("task.pixels") for name in parts)
    measured = read(tmp_path / "r" / "metrics.json")
    assert {"retrieval/tr_r1", "mlm/accuracy_wrong_image"} <= set(measured)


@pytest.mark.slow
def test_a_checkpoint_measures_as_its_training_did(finetuned: Path) -> None:
    trained, measured = read(finetuned / "f" / "metrics.json"), read(finetuned / "e" / "metrics.json")
    assert trained["step"] == 2
    assert measured == pytest.approx(trained)
    assert (finetuned / "f" / "predictions.jsonl").read_text() == (finetuned / "e" / "predictions.jsonl").read_text()
    names = {path.name for path in (finetuned / "e").iterdir()}
    assert names >= {"card.json", "examples.png", "predictions.jsonl", "answers.json", "config-validate.yaml"}
    assert not [name for name in names if name.endswith(".ckpt")]
    card = read(finetuned / "e" / "card.json")
    tasks = ["maskvlm.objectives.pretraining.MaskedPretraining", "tasks.vqa.task.Vqa"]
    assert [step["task"] for step in card["lineage"]] == tasks
    assert card["resolution"] == 64  # larger than in pre-training
    assert card["images of the split seen in training"] == 0
    assert card["checkpoint"]["file"] == "f/last.ckpt"
    assert "pos_embed" in (finetuned / "f" / "provenance.json").read_text()


@pytest.mark.slow
def test_measuring_in_a_trainings_folder_touches_none_of_its_files(finetuned: Path) -> None:
    """By --ckpt_path, as README says of a finished run: its configuration names what it began with."""
    folder = finetuned / "f"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = ["-c", str(folder / "config-fit.yaml"), "--run", str(folder), "--ckpt_path", "last"]
    assert main(["validate", *again]) == 0
    assert {name: (folder / name).read_bytes() for name in before} == before
    added = {path.name for path in folder.iterdir()} - before.keys()
    assert added >= {"metrics-validate.json", "card-val.json", "predictions-val.jsonl", "examples-val.png"}
    assert read(folder / "card-val.json")["checkpoint"]["file"] == "f/last.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "task", "code", "message"),
    [
        ("--from p/last.ckpt", "nlvr", ExitCode.BAD_DATA, "holds no heads of Nlvr"),
        ("--from f/last.ckpt", "entailment", ExitCode.USAGE, "was fine-tuned as vqa"),
        ("--from p/last.ckpt --model.task.contrast_dim=64", "retrieval", ExitCode.USAGE, "model.task.contrast_dim: 64"),
        ("--from p/last.ckpt --model.backbone.cross_layers=1", "retrieval", ExitCode.BAD_DATA, "does not fit MaskVLM"),
    ],
)
def test_what_a_checkpoint_cannot_do_is_refused(
    finetuned: Path, capsys: pytest.CaptureFixture[str], words: str, task: str, code: ExitCode, message: str
) -> None:
    given = [str(finetuned / word) if word.endswith(".ckpt") else word for word in words.split()]
    assert main(["validate", "--run", str(finetuned / "no"), *task_files(task), *SIZES, *given]) == code
    assert message in capsys.readouterr().err
    assert not (finetuned / "no").exists()


def test_a_fine_tuned_checkpoint_is_measured_as_it_was_trained(tmp_path: Path) -> None:
    """The tasks' files say 384 pixels for trainings. What is typed comes after the checkpoint's settings."""
    backbone, path = bare_backbone(), tmp_path / "vqa.ckpt"
    task = Vqa(LABELS, head="classify", hidden=8, image_ablation=True)
    fit(LitModel(backbone, task, warmup=1), data_for(backbone, Questions()), path)

    def settings(command: str, *more: str) -> tuple[int, str, int | None, bool]:
        words = COMMANDS[command].full(["where=cpu", "run=x", "vqa", "data=vqav2", f"from={path}", *more])
        model = run_command(Parsed, words).settings.model
        args = model.task.init_args
        return model.backbone.init_args.image.init_args.image_size, args.head, args.hidden, args.image_ablation

    assert settings("evaluate") == (SIZE, "classify", 8, True)
    typed = ["--model.backbone.image.image_size=64", "--model.task.image_ablation=false"]
    assert settings("evaluate", *typed) == (64, "classify", 8, False)
    assert settings("finetune") == (384, "generate", None, False)
