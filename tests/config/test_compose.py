"""The words of a command as the stack of files that they stand for."""

import re
import sys
from pathlib import Path

import pytest

from maskvlm.cli.commands import COMMANDS
from maskvlm.config import compose
from maskvlm.config.compose import choices, read_words
from maskvlm.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(compose.RUN_NAME, "when")


def composed(command: str) -> list[str]:
    name, *words = command.split()
    return COMMANDS[name].full(words)


def stack(*names: str) -> list[str]:
    return [word for name in names for word in ("-c", f"{name}.yaml")]


def test_pretraining_is_a_stack_of_files_and_then_the_options() -> None:
    assert composed("pretrain model=compact data=flickr8k where=cpu run=x --model.lr 2") == [
        "fit", "--folder", "checkpoints/x",
        *stack("conf/base", "conf/model/compact", "conf/pretrain", "conf/pretrain-compact", "conf/data/flickr8k"),
        *stack("conf/where/cpu"), "--model.lr", "2",
    ]  # fmt: skip


def test_a_recipe_stands_in_the_place_of_the_models_own() -> None:
    own, named = composed("pretrain model=compact run=x"), composed("pretrain model=compact recipe=ours run=x")
    assert named == [word.replace("conf/pretrain-compact", "conf/recipe/ours") for word in own] != own
    for command in ("config", "submit", "bench", "doctor"):
        assert "conf/recipe/ours.yaml" in composed(f"{command} model=base recipe=ours")
    goes_on = composed("pretrain recipe=ours from=a/b.ckpt")
    assert goes_on.index("conf/recipe/ours.yaml") < goes_on.index("conf/continue.yaml")


def test_training_images_are_searched_under_their_own_name() -> None:
    argv = composed("index data=flickr8k from=x.ckpt split=train")
    assert argv[:7] == ["index", "--from", "x.ckpt", "--split", "train", "--out", "checkpoints/index-flickr8k-train"]
    for words in ("--split train", "split=val --split=train"):
        with pytest.raises(UserError, match="index: --split: is given without dashes"):
            composed(f"index data=flickr8k from=x.ckpt {words}")


def test_vectors_of_a_set_by_its_name() -> None:
    argv = composed("embed data=flickr8k from=x.ckpt split=train --no-captions")
    assert argv[:5] == ["embed", "--from", "x.ckpt", "--split", "train"]
    assert "conf/data/flickr8k.yaml" in argv
    assert argv[-1] == "--no-captions"
    assert argv[5:7] == ["--out", "checkpoints/vectors-flickr8k-train"]
    assert "--out" not in composed("embed from=x.ckpt --out x")[:6]
    with pytest.raises(UserError, match="embed: --split: is given without dashes"):
        composed("embed from=x.ckpt --split val")


def test_without_a_word_the_built_in_world_is_learned() -> None:
    assert composed("pretrain")[:2] == ["fit", "--folder"]
    assert composed("pretrain") == composed("pretrain model=tiny data=scenes where=auto run=when")


def test_a_checkpoint_keeps_its_model_and_goes_on_by_another_recipe() -> None:
    files = ("base", "pretrain", "pretrain-compact", "data/flickr8k", "where/cpu", "continue", "continue-compact")
    argv = composed("pretrain model=compact data=flickr8k where=cpu run=x from=a/b.ckpt")
    assert argv == ["fit", "--folder", "checkpoints/x", "--from", "a/b.ckpt", *stack(*(f"conf/{n}" for n in files))]


@pytest.mark.parametrize(("split", "command"), [("val", "validate"), ("test", "test")])
def test_all_of_a_split_is_measured(split: str, command: str) -> None:
    assert composed(f"evaluate nlvr from=a/b.ckpt where=cpu run=x split={split} --model.lr 2") == [
        command, "--folder", "checkpoints/x", "--from", "a/b.ckpt",
        *stack("conf/base", "conf/finetune", "tasks/nlvr/conf", "conf/where/cpu"),
        "--settings_from", "a/b.ckpt", "--trainer.limit_val_batches", "1.0", "--model.lr", "2",
    ]  # fmt: skip


def test_without_a_task_pretraining_is_measured() -> None:
    argv = composed("evaluate model=compact data=flickr8k from=a/b.ckpt where=cpu run=x")
    fitted = composed("pretrain model=compact data=flickr8k from=a/b.ckpt where=cpu run=x")
    own = ["--task_from", "a/b.ckpt"]
    assert argv == ["validate", *fitted[1:], *own, "--trainer.limit_val_batches", "1.0"]


def test_the_control_begins_with_random_weights_of_the_model() -> None:
    argv = composed("finetune vqa data=daquar from=random model=small where=cpu run=x")
    assert argv[3:7] == ["--model.random_init", "true", "-c", "conf/model/small.yaml"]
    assert "--from" not in argv
    assert "tasks/vqa/daquar.yaml" in argv


def test_a_prepared_set_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").touch()
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    argv = composed("pretrain data=mine")
    assert argv[argv.index("conf/data/prepared.yaml") - 1 :][-2:] == ["--data.source.root", str(tmp_path / "mine")]


def test_encoders_out_of_a_folder(tmp_path: Path) -> None:
    """The one with a tokenizer is the text's, whatever their names are."""
    for name in ("a-text/tokenizer.json", "a-text/model.safetensors", "vit/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    text, image = f"{tmp_path}/a-text", f"{tmp_path}/vit/model.safetensors"
    argv = composed(f"pretrain model=compact encoders={tmp_path}")
    assert argv[-4:] == ["--model.backbone.image.weights", image, "--model.backbone.text.name", text]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("pretrain model=nope", "model=nope: no such model. Available: base, compact, large, small, tiny."),
        ("pretrain model=../base", "model=../base: no such model"),
        ("pretrain recipe=theirs", "recipe=theirs: no such recipe. Available: ours."),
        ("pretrain recipe=", "recipe=: no such recipe"),
        ("finetune vqa recipe=ours", "finetune: recipe=ours: no such word"),
        ("config vqa recipe=ours", "recipe=ours: applies to pre-training only; a task has its own. Leave it out"),
        ("pretrain where=here", "where=here: no such where"),
        ("pretrain data=", "data=: no such data set"),
        ("pretrain data=a/../coco", "no such data set"),
        ("pretrain data=scenez", "data=scenez: no such data set (did you mean scenes?). Available: "),
        ("finetune vqa from=x data=daqar", "data=daqar: no such data set of vqa (did you mean daquar?)"),
        ("pretrain data=photos/pairs.csv",
         "data=photos/pairs.csv: no such data set. Prepare it first: maskvlm data csv raw=photos/pairs.csv name=NAME."),
        ("pretrain modle=tiny", "pretrain: modle=tiny: no such word. Available: model= recipe= data= where= run="),
        ("pretrain tiny", "pretrain: tiny: no such word"),
        ("finetune task=vqa from=x", "first word goes without a name. Write maskvlm finetune vqa."),
        ("data SET=coco raw=x", "data: SET=coco: SET= is a variable of make"),
        ("pretrain task=vqa", "pretrain: task=vqa: no such word"),
        ("pretrain model=tiny model=base", "model is given twice"),
        ("finetune", "finetune: no task was given. Give one of captioning, entailment, nlvr, retrieval, vqa"),
        ("finetune nope from=x", "task nope: no such task. Available: captioning, entailment, nlvr, retrieval, vqa"),
        ("finetune acme.nothing from=x", "task acme.nothing: no such task"),
        ("config pretrain data=scenes", "pretrain: is not a task. Leave the word out"),
        ("submit pretrain where=slurm4x8", "pretrain: is not a task. Leave the word out"),
        ("finetune pretrain from=x", "task pretrain: no such task. Available: captioning"),
        ("evaluate from=random", "from=random: has no training to evaluate"),
        ("evaluate vqa from=x split=train", "split=train: no such split. Available: val, test."),
        ("finetune vqa from=x data=coco", "data=coco: no such data set of vqa. Available: daquar, scenes, vqav2."),
        ("finetune nlvr from=x data=conf", "data=conf: no such data set of nlvr"),
        ("pretrain run=x --run y", "run=x: the folder is also given as an option"),
        ("pretrain run=x --folder=y", "run=x: the folder is also given as an option"),
        ("data", "data: no set was given"),
        ("data coco", "data: raw= is missing. maskvlm data coco raw=FOLDER."),
        ("data csv name=b8", "data: raw= is missing. maskvlm data csv raw=FILE.csv."),
        ("data coco x y", "data: y: no such word"),
        ("data csv x name=a/b", "name=a/b: is not a valid name for a set"),
        ("data csv x name=..", "name=..: is not a valid name for a set"),
        ("data-check", "data-check: no set was given. Give one of those prepared in "),
        ("index from=x split=dev", "split=dev: no such split"),
        ("pretrain encoders=nowhere", "encoders=nowhere: has no folder of image weights"),
        ("finetune vqa from=x encoders=e", "encoders=e: has no effect: the encoders are those of the checkpoint"),
        ("pretrain from=x encoders=e", "encoders=e: has no effect: the encoders are those of the checkpoint"),
        ("evaluate vqa from=random encoders=e", "encoders=e: has no effect: from=random is the model with random"),
        *((f"{name} run={run}", f"run={run}: is not a valid folder name") for name in ("pretrain", "config")
          for run in ("", "../x", "/tmp/x", ".", "a/../../x")),
    ],
)  # fmt: skip
def test_a_wrong_word_is_one_line(command: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        composed(command)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_place_where_a_set_belongs_is_told(tmp_path: Path) -> None:
    (tmp_path / "five.csv").write_text("image,caption\n")
    for place, kind in ((tmp_path / "five.csv", "csv"), (tmp_path, "folder")):
        with pytest.raises(UserError) as error:
            composed(f"data {place}")
        assert f"data: {place} is a path, not a set's name. maskvlm data {kind} raw={place} name=NAME." in str(
            error.value
        )


def test_a_folder_here_may_have_the_name_of_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("coco").mkdir()
    with pytest.raises(UserError, match=r"raw= is missing\. maskvlm data coco raw=FOLDER"):
        composed("data coco")


def test_a_task_without_yaml_files_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bare_task").mkdir()
    (tmp_path / "bare_task" / "__init__.py").write_text("")
    (tmp_path / "bare_task" / "counting").mkdir()
    (tmp_path / "bare_task" / "counting" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"the task bare_task\.counting has no data sets: there is no YAML file"):
        composed("finetune bare_task.counting from=x")


def test_all_processes_of_a_run_share_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a run starts repeat its command; the time of day is another one then."""
    monkeypatch.delenv(compose.RUN_NAME)
    monkeypatch.setattr(compose, "moment", iter(("1", "2")).__next__)
    assert (
        composed("pretrain")[:3]
        == composed("pretrain")[:3]
        == ["fit", "--folder", "checkpoints/pretrain-scenes-tiny-1"]
    )


def test_a_run_is_called_after_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compose, "moment", lambda: "1")
    monkeypatch.setattr(compose, "moment_of_evaluation", lambda: "1")
    for command, name in (
        ("pretrain model=base data=coco recipe=ours", "pretrain-coco-base-ours-1"),
        ("pretrain data=flickr8k model=small", "pretrain-flickr8k-small-1"),
        ("finetune vqa data=daquar from=x", "finetune-vqa-daquar-1"),
        ("evaluate from=x", "evaluate-pretraining-scenes-1"),
    ):
        monkeypatch.delenv(compose.RUN_NAME, raising=False)
        assert composed(command)[2] == f"checkpoints/{name}"


def test_under_torchrun_a_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process would else name it by its own time of day."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert composed("pretrain run=x")[2] == "checkpoints/x"
    with pytest.raises(UserError, match="run=: torchrun starts several processes"):
        composed("pretrain")


def test_words_end_where_options_begin() -> None:
    words = read_words("x", ["vqa", "model=a", "--model.lr", "1", "data=b"], ("model", "data"), 1)
    assert words == (["vqa"], {"model": "a"}, ["--model.lr", "1", "data=b"])


def test_there_are_models_data_and_places() -> None:
    assert "compact" in choices("model")
    assert "scenes" in choices("data")
    assert "gpu8" in choices("where")


def test_a_set_is_a_folder_of_the_data_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", "/d")
    assert composed("data csv a/b.csv name=mine --look") == ["data", "csv", "a/b.csv", "--out", "/d/mine", "--look"]
    assert composed("data coco raw=/x") == ["data", "coco", "/x", "--out", "/d/coco"]
    assert composed("data csv x --out y/z") == ["data", "csv", "x", "--out", "y/z"]
    assert composed("data-check coco --all") == ["data-check", "/d/coco", "--all"]
    assert composed("data-check name=mine") == ["data-check", "/d/mine"]
    assert composed("data-check some/folder") == ["data-check", "some/folder"]


def test_options_name_a_checkpoint_as_words_do() -> None:
    for option in ("--from a.ckpt", "--from=a.ckpt"):
        assert composed(f"finetune vqa {option} --model.lr 1") == composed("finetune vqa from=a.ckpt --model.lr 1")
    with pytest.raises(UserError, match="from is given twice"):
        composed("finetune vqa from=a.ckpt --from=b.ckpt")
    stack = "index --from a.ckpt -c conf/base.yaml"
    assert composed(stack) == stack.split()


def test_a_command_with_a_whole_stack_is_taken_as_it_is() -> None:
    for command in ("bench -c conf/base.yaml --model.lr 1", "submit --config=/x/base.yaml", "data --help"):
        assert composed(command) == command.split()


@pytest.mark.parametrize("name", ["bench", "preview", "submit", "pretrain"])
def test_other_files_come_on_top(name: str) -> None:
    argv = composed(f"{name} model=small where=cpu -c mine.yaml --model.lr 1")
    assert argv[-6:] == ["-c", "conf/where/cpu.yaml", "-c", "mine.yaml", "--model.lr", "1"]
    assert "conf/model/small.yaml" in argv


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that is no part of the project, of which Python knows nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", str(ROOT))])
    return tmp_path


def test_tasks_of_the_working_directory_are_found_only_where_that_is_asked_for(elsewhere: Path) -> None:
    (elsewhere / "conf").mkdir()
    (elsewhere / "tasks").mkdir()
    (elsewhere / "conf" / "base.yaml").touch()
    compose.find_tasks()
    assert (sys.path[0], sys.path.count(str(elsewhere))) == (str(ROOT), 0)
    compose.find_tasks(here=True)
    assert sys.path[:2] == [str(elsewhere), str(ROOT)]


@pytest.mark.parametrize(
    ("names", "on_path"),
    [(["acme"], True), (["acme.x.Y"], True), (["one"], True), (["other.x.Y"], False), ([""], False), ([], False)],
)
def test_packages_of_the_working_directory_are_found_where_the_command_names_one(
    elsewhere: Path, names: list[str], on_path: bool
) -> None:
    (elsewhere / "acme").mkdir()
    (elsewhere / "one.py").touch()
    compose.find_packages(names)
    assert (sys.path[-1] == str(elsewhere)) == on_path


def test_a_task_on_images_with_captions_takes_a_set_of_your_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    for name in ("mine", "flickr8k", "empty"):
        (tmp_path / name).mkdir()
    for name in ("mine", "flickr8k"):
        (tmp_path / name / "manifest.json").touch()
    for task in ("captioning", "retrieval"):
        argv = composed(f"finetune {task} from=x data=mine")
        assert f"tasks/{task}/prepared.yaml" in argv
        assert argv[argv.index("--data.source.root") + 1] == str(tmp_path / "mine")
        # a set with settings of its own keeps them
        argv = composed(f"evaluate {task} from=x data=flickr8k")
        assert f"tasks/{task}/flickr8k.yaml" in argv
        assert "--data.source.root" not in argv
        for name in ("other", "empty", ".."):
            with pytest.raises(UserError, match=rf"data={re.escape(name)}: no such data set of {task}"):
                composed(f"finetune {task} from=x data={name}")
    with pytest.raises(UserError, match=r"of captioning \(did you mean mine\?\).*prepared in .*: flickr8k, mine\."):
        composed("finetune captioning from=x data=min")
    with pytest.raises(UserError, match=r"data=mine: is a prepared set, but not one of vqa. Available: daquar"):
        composed("finetune vqa from=x data=mine")


@pytest.mark.parametrize(
    ("task", "words", "suffix"),
    [
        ("acme.counting", {}, ""),
        ("acme.counting", {"data": "more"}, "-more"),
        ("vqa", {}, "-scenes"),
        ("", {"data": "flickr8k"}, "-flickr8k"),
    ],
)
def test_a_folder_names_the_data_that_was_named(task: str, words: dict[str, str], suffix: str) -> None:
    """A task of a package has data of its own, and no drawn scenes."""
    assert compose.data_of(task, compose.CommandWords([task], words, [])) == suffix


def test_evaluations_of_one_job_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training goes on in the folder of its job; results would be written over."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    assert compose.moment() == "17"
    assert len(compose.moment_of_evaluation()) == len("20261130-120000")
    monkeypatch.setenv("SLURM_NTASKS", "8")  # whose processes share one
    monkeypatch.setenv("SLURM_STEP_ID", "2")
    assert compose.moment_of_evaluation() == "17-2"
