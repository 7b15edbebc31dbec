"""The page: what it finds and shows, what it refuses, and the server as it is started by the command."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from html import escape
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from live_page import GOOD, Asker, encoded, noise
from toy_pretrained import saved

from maskvlm.data.images import BadImage
from maskvlm.demo import answers
from maskvlm.demo.input_limits import MAX_LINES, MAX_TEXT, Opener, Worker, checked_text, lines_of
from maskvlm.demo.models import Models, find_models
from maskvlm.demo.samples import Searched, otherwise, samples
from maskvlm.demo.serve import listen, main
from maskvlm.utils.errors import ExitCode, UserError

TEXT = "a red circle on the left"
SCRIPT = "<script>document.title='taken'</script><img src=x onerror=document.title='taken'>"
needs_gradio = pytest.mark.skipif(
    find_spec("gradio") is None, reason="gradio is not installed (pip install -e .[demo])"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `checkpoints/`: two runs of pre-training, one of VQA, one that is damaged."""
    folder = tmp_path_factory.mktemp("demo")
    saved(folder / "checkpoints" / "old" / "best.ckpt")
    saved(folder / "checkpoints" / "new" / "last.ckpt")
    saved(folder / "checkpoints" / "asked" / "best.ckpt", "vqa")
    saved(folder / "checkpoints" / "compared" / "best.ckpt", "nlvr")
    (folder / "checkpoints" / "bad").mkdir()
    (folder / "checkpoints" / "bad" / "best.ckpt").write_bytes(b"no checkpoint")
    os.utime(folder / "checkpoints" / "old" / "best.ckpt", (1, 1))
    return folder


@pytest.fixture(scope="module")
def models(place: Path) -> Models:
    return Models(find_models(place / "checkpoints"))


def test_the_newest_checkpoint_of_each_task_is_found(place: Path, models: Models, tmp_path: Path) -> None:
    listing = models.listing
    assert listing.pretrained is not None
    assert listing.pretrained.short_path == "new/last.ckpt"
    assert [run.title for run in listing.tasks] == ["NLVR", "VQA"]
    (problem,) = listing.problems
    assert "bad/best.ckpt" in problem
    card = place / "checkpoints" / "old" / "card.json"  # it is believed before the checkpoint is read
    card.write_text(json.dumps({"task": "tasks.entailment.task.Entailment"}))
    assert "Entailment" in [run.title for run in find_models(place / "checkpoints").tasks]
    card.unlink()
    loaded = models.task(listing.tasks[0])
    assert loaded is models.task(listing.tasks[0])
    assert (loaded.method.images, loaded.method.text, loaded.examples) == (2, "sentence", None)
    with pytest.raises(UserError, match="maskvlm pretrain"):
        Models(find_models(tmp_path)).core()


@needs_gradio
def test_a_task_that_takes_no_text_is_asked_with_the_image_alone(models: Models, tmp_path: Path) -> None:
    from maskvlm.demo.tabs import TaskTab

    saved(tmp_path / "c" / "best.ckpt", "captioning")
    (run,) = find_models(tmp_path).tasks
    loaded = models.task(run)
    assert (run.title, loaded.method.text) == ("Captioning", "")
    image = noise()
    tab: Any = SimpleNamespace(desk=SimpleNamespace(models=models, open=lambda path: image), run=run, answer="answer")
    (answer,) = TaskTab.answered(tab, "path", None, None, None, "left from another task", ("", "")).values()
    assert escape(loaded.model.caption(image)) in answer
    models.tasks.pop(run.task)


def test_what_is_shown_equals_what_the_model_says(models: Models) -> None:
    assert answers.covered("red circle, red star.", [1, 2]) == ("red [MASK], [MASK] star.", ["circle", "red"])
    assert otherwise("a red circle, blue") == "a turquoise diamond, orange"
    model, image = models.core(), noise()
    html = answers.words_filled(model, image, TEXT, [1])
    guesses: Any = model.fill_mask(image, "a [MASK] circle on the left")
    assert all(f"{100 * guess.probability:.1f} %" in html for guess in guesses[0])
    mask = answers.turned(answers.empty(model.grid), 0)
    assert np.argwhere(mask).tolist() == [[0, 0]]
    assert np.argwhere(answers.turned(mask, model.grid[1] + 1)).tolist() == [[0, 0], [1, 1]]
    assert not np.any(answers.turned(mask, 0))
    for number in (None, "1", [1, 1], -1, 99, 1.0, True):  # a click beside the image
        with pytest.raises(UserError, match="not a patch of the image"):
            answers.turned(mask, number)
    one, other = answers.painted(model, image, mask, (TEXT, "a blue star"))
    wanted: Any = model.reconstruct(image, mask, TEXT)
    assert one.getpixel((48, 48)) == wanted.getpixel((4, 4)) != other.getpixel((48, 48))
    assert sum(map(sum, answers.by_lot(model.grid))) == round(0.6 * model.grid[0] * model.grid[1])


def test_every_word_is_escaped(models: Models) -> None:
    model, image = models.core(), noise()
    for html in (
        answers.words_filled(model, image, f"red [MASK] {SCRIPT}", [0]),
        answers.matches(model, image, [SCRIPT, TEXT]),
        answers.problem(SCRIPT),
        answers.decided((SCRIPT, 0.5, {SCRIPT: 0.5})),
    ):
        assert "&lt;script" in html
        assert "<script" not in html
        assert "<img" not in html


def bomb() -> bytes:
    """More pixels than we allow and fewer than Pillow does, in some bytes."""
    head = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


UPLOADS = {
    "bomb": bomb(),
    "bomb of scans": b"\xff\xd8" + b"\xff\xda" * 1000 + b"\xff\xd9",
    "page as an image": b"<!doctype html>" + SCRIPT.encode(),
    "polyglot of PDF and JPEG": b"%PDF-1.4\n" + encoded(noise(), "JPEG"),
    "polyglot of GIF and script": b"GIF89a/*" + SCRIPT.encode() + b"*/=1;",
    "script in SVG": f'<svg xmlns="http://www.w3.org/2000/svg">{SCRIPT}</svg>'.encode(),
    "archive": b"PK\x03\x04" + bytes(100),
    "nothing": b"",
    "half an image": GOOD[: len(GOOD) // 2],
    "wrong checksum": GOOD[:60] + b"\x00\x01" + GOOD[62:],
}


@pytest.mark.parametrize("name", UPLOADS)
def test_a_hostile_image_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(UPLOADS[name])
    with pytest.raises(BadImage) as caught:
        Opener()(str(tmp_path / "image"))
    assert "\n" not in str(caught.value)


def test_texts_and_images_are_bounded(tmp_path: Path) -> None:
    for text in (None, 5, "", " \u200b ", "a" * (MAX_TEXT + 1)):
        with pytest.raises(UserError):
            checked_text(text)
    for lines in ("", "a\n" * (MAX_LINES + 1), 3, "x" * 10**6):
        with pytest.raises(UserError):
            lines_of(lines)
    assert lines_of("one\n\n two \n") == ["one", "two"]
    opener, path = Opener(most=1), tmp_path / "a.png"
    path.write_bytes(encoded(noise(0, 2000)))
    assert max(opener(str(path)).size) == 1024
    for nothing in (None, "", str(tmp_path), str(tmp_path / "b.png"), f"own-{'a' * 64}"):
        with pytest.raises(UserError):
            opener(nothing)
    name = opener.keep(noise(1))
    assert opener(name).tobytes() == noise(1).tobytes()
    assert len(opener.known) == 1


def test_what_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what waits behind it, and what ends just after its time; what runs out of time by itself says so."""
    worker = Worker(0.05)
    for function in (lambda: time.sleep(0.4), lambda: 1):
        with pytest.raises(UserError, match="no answer within"):
            worker.run(function)
    time.sleep(0.5)
    assert Worker(60).run(lambda: 1) == 1

    class Late(Future[int]):
        def done(self) -> bool:
            self.set_result(1)
            return True

    monkeypatch.setattr(worker.pool, "submit", lambda *_: Late())
    with pytest.raises(UserError, match="no answer within"):
        worker.run(lambda: 1)

    def own() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        Worker(60).run(own)


def test_examples_and_what_is_searched_come_from_the_built_in_world(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.core()
    examples = samples(model.image_size, model.grid)
    assert len(examples) == 8
    assert all(np.any(sample.masked) and sample.text != sample.other for sample in examples)
    searched = Searched(model, None)
    assert len(searched.by_text("/etc/passwd")) == len(searched.by_image(noise())) == 8  # a text, not a file
    monkeypatch.delattr(model.task, "projection")
    with pytest.raises(UserError, match="no head for it"):
        Searched(model, None).by_text("a red circle")


def test_a_wrong_option_is_one_line() -> None:
    with pytest.raises(UserError, match="--port"):
        main(["--port", "high"], [])
    with pytest.raises(UserError, match="cannot be listened on"):
        listen("127.0.0.1", 99_999)
    with listen("127.0.0.1", 0) as busy_socket, pytest.raises(UserError, match="Give another --port") as caught:
        listen("127.0.0.1", busy_socket.getsockname()[1])
    assert caught.value.code == ExitCode.UNAVAILABLE


# ---------------------------------------------------------------------- the server

DRIVER = """
import os, sys
log = open(sys.argv.pop(1), "a", buffering=1)
def watch(event, arguments):
    made = event in ("os.mkdir", "os.rename", "os.symlink", "os.link", "shutil.move", "os.remove")
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        mode, flags = arguments[1] or "", arguments[2] or 0
        made = any(c in mode for c in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if made and isinstance(arguments[0], (str, bytes)):
        log.write(event + " " + os.path.abspath(os.fsdecode(arguments[0])) + "\\n")
sys.addaudithook(watch)
from maskvlm.demo.serve import main
sys.exit(main(sys.argv[1:], []))
"""


class Server(NamedTuple):
    """A page that is served. temp: where its folder of uploads is made; log: what it wrote outside of that."""

    process: subprocess.Popen[str]
    base: str
    temp: Path
    log: Path


@pytest.fixture
def server(place: Path, root: Path) -> Iterator[Server]:
    temp, log = place / "temp", place / "written.txt"
    temp.mkdir()
    paths = os.pathsep.join([str(root / "src"), str(root)])
    environment = os.environ | {"TMPDIR": str(temp), "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", DRIVER, str(log), "--port", "0"]
    process = subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        base = next(match.group() for line in process.stdout if (match := re.search(r"http://[\d.:]+", line)))
        yield Server(process, base, temp, log)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert list(temp.iterdir()) == [], "the folder of uploads goes with the page"


@pytest.mark.slow
@needs_gradio
def test_the_command_answers_and_writes_nothing_elsewhere(server: Server) -> None:
    """Also a hundred hostile questions and uploads later: by an audit hook within the server."""
    asker = Asker(server.base)
    assert "scenes-tiny: step 4,500, score 94.3" in json.dumps(asker.config)  # the model that comes along
    image, text = asker.image(GOOD), "a red zebrafish <b>"
    for data in UPLOADS.values():
        assert 'role=\\"alert\\"' in asker.ask("match", image=asker.image(data, "../../evil.png"), texts=TEXT)
    for part, values in (("match", {"image": image, "texts": text}), ("find", {"query": text})):
        answer = asker.ask(part, **values)
        assert "tokenizer does not know" in answer
        assert "<b>" not in answer
    for part, event, data, values in (
        ("match", "click", None, {"image": image, "texts": "a\n" * 100}),
        ("find", "click", None, {"query": "\u200b"}),
        ("board", "click", {"index": 10**6}, {}),
        ("examples", "click", {"index": 10**6}, {}),
    ):
        assert 'role=\\"alert\\"' in asker.ask(part, event, data, **values)
    with ThreadPoolExecutor(50) as pool:
        joined = list(pool.map(lambda _: asker.join("write", "click", image=image), range(50)))
        assert {reply.status_code for _, reply in joined} <= {200, 503}
        waiting = [body["session_hash"] for body, reply in joined if reply.status_code == 200]
        assert all("belongs" in answer.lower() for answer in pool.map(asker.answer, waiting))
    own = re.compile(rf"\w+\.?\w* {re.escape(str(server.temp))}/maskvlm-demo-[^/]+(/|$)")
    probe = re.compile(rf"[\w.]+ {re.escape(str(server.temp))}/[a-z0-9_]{{8}}$")  # tempfile tries where it can write
    known = re.compile(r"os.mkdir .*(/matplotlib|/torchinductor_\w+)$")  # when they are imported, as for every command
    first = re.compile(r"open .*/gradio/hash_seed\.txt$")  # Gradio's own, in its package, once after it was installed
    kinds = (own, probe, known, first)
    lines = {line for line in server.log.read_text().splitlines() if not any(kind.match(line) for kind in kinds)}
    assert {line for line in lines if not line.endswith(" /dev/null")} == set()
    assert server.process.poll() is None
