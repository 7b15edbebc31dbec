"""The page itself, in Gradio: one image and one text on the left, what can be asked about them in tabs."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from maskvlm.data.images import BadImage
from maskvlm.data.inputs import MASK
from maskvlm.demo import answers, input_limits, upload_store
from maskvlm.demo.models import Models
from maskvlm.demo.samples import PageSample, Searched, photo_samples, samples
from maskvlm.demo.tabs import Patches, WordsTab, digest, match_and_caption, search_tab, task, upload_image
from maskvlm.utils.errors import UserError

CSS = Path(__file__).with_name("page.css")
SESSIONS = 200  # visitors whose covered patches are remembered; each keeps a copy of the page's settings in memory
INTRO = (
    "<h1>MaskVLM</h1><p>Cover words and they are filled in from the image; cover patches of the image and they are "
    "filled in from the words.</p>"
)


class Desk:
    """What all tabs share.

    Attributes:
        image, text, status, examples: components. own: whether the image is one of the page's. shown: digest of the
            image that the tabs' answers are about. strange: whether it is unlike the training data.
        samples: what the examples show. photos: whether they are photographs, as the model was trained on some.
    """

    image: gr.Image
    text: gr.Textbox
    status: gr.HTML
    strange: gr.HTML
    examples: gr.Dataset
    own: gr.State
    shown: gr.State

    def __init__(self, models: Models, worker: input_limits.Worker) -> None:
        self.models, self.worker, self.open = models, worker, input_limits.Opener()
        self.samples: list[PageSample] = []
        self.photos = models.photographs > 0
        if models.pretrained is not None:
            size, grid = models.pretrained.image_size, models.pretrained.grid
            # Images are decoded and drawn on the worker's thread alone.
            self.samples = worker.run(photo_samples, grid) if self.photos else worker.run(samples, size, grid)

    def asked(self, function: Callable[..., dict[Any, Any]], clear: dict[Any, Any]) -> Callable[..., dict[Any, Any]]:
        """A function of an event: computed by the worker, its mistakes one line under the image.

        Args:
            function: returns component -> value.
            clear: the same where there is no answer.
        """

        def answered(*inputs: Any) -> dict[Any, Any]:
            try:
                return {self.status: "", **self.worker.run(function, *inputs)}
            except UserError as error:
                # What a bad image advises is meant for data sets, too; here there is no row.
                line = str(error).replace(" or drop its row", "") if isinstance(error, BadImage) else str(error)
                return {**clear, self.status: answers.problem(" ".join(line.split())[:400])}
            except Exception as error:
                # The traceback is for the terminal: a visitor sees the kind of error alone.
                traceback.print_exc(file=sys.stderr)
                what = f"{type(error).__name__}. This is a bug; the terminal has its traceback."
                return {**clear, self.status: answers.problem(what)}

        return answered

    def on(
        self,
        trigger: Any,
        function: Callable[..., dict[Any, Any]],
        inputs: list[Any],
        outputs: list[Any],
        clear: dict[Any, Any] | None = None,
    ) -> Any:
        """Ask when something happens; one question at a time."""
        return trigger(
            self.asked(function, clear or {}),
            inputs,
            [self.status, *outputs],
            # One question of all tabs at a time: they share the model.
            concurrency_limit=1,
            concurrency_id="model",
            show_progress="minimal",
            api_visibility="private",
        )


def page(models: Models, worker: input_limits.Worker, index: Path | None, images: Path | None = None) -> gr.Blocks:
    """The whole page.

    Args:
        models: what was found.
        index: a folder to search; None for scenes of the built-in world.
        images: where its images lie, as the user says.
    """
    desk = Desk(models, worker)
    # delete_cache: once a minute Gradio removes files that are older than KEPT_SECONDS.
    with gr.Blocks(
        title="MaskVLM", analytics_enabled=False, delete_cache=(60, upload_store.KEPT_SECONDS), fill_width=True
    ) as blocks:
        gr.HTML(INTRO + about(models), elem_id="intro")
        if models.pretrained is None and not models.found.tasks:
            return blocks
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=2, min_width=300, elem_id="given"):
                inputs_column(desk)
            with gr.Column(scale=5, min_width=320), gr.Tabs(elem_id="tabs"):
                if models.pretrained is not None:
                    of_pretraining(desk, index, images)
                for run in models.found.tasks:
                    task(desk, run)
                if not models.found.tasks:
                    with gr.Tab("Tasks"):
                        gr.HTML(answers.note(no_task(models)))
    # api_open: else a question could go past the queue.
    blocks.queue(max_size=input_limits.QUEUE, default_concurrency_limit=1, api_open=False)
    blocks.state_session_capacity = SESSIONS
    blocks.has_launched = (
        True  # else Gradio does not check at all which files a call names: it is mounted, not launched
    )
    return blocks


def about(models: Models) -> str:
    """Which checkpoints are asked, or what to run."""
    lines = [f"Not used: {each}" for each in models.found.problems]
    if models.pretrained is not None and models.found.pretrained is not None:
        rows, columns = models.pretrained.grid
        side = models.pretrained.image_size
        told = f"{models.found.pretrained.shown}: images of {side} × {side} pixels in {rows} × {columns} patches"
        if (trained := models.found.pretrained.trained) is not None:
            told += f", trained on {trained.told}"
        told += "."
        return answers.note(told) + "".join(map(answers.problem, lines))
    todo = "No checkpoint of pre-training is here. Run `maskvlm pretrain` (16 minutes on two cores), "
    todo += "then `maskvlm demo`."
    return "".join(map(answers.problem, [todo, *lines]))


def no_task(models: Models) -> str:
    """What the tab of fine-tuned tasks says where there is none."""
    source = models.found.pretrained.path if models.found.pretrained else "checkpoints/RUN/best.ckpt"
    name = "/".join(Path(source).parts[-3:])
    return f"No fine-tuned checkpoint is here. Run `maskvlm finetune vqa from={name}`, then `maskvlm demo` again."


def inputs_column(desk: Desk) -> None:
    """Image, text and examples."""
    first = desk.samples[0] if desk.samples else None
    desk.image = upload_image(
        value=first.image if first else None,
        label="Image",
        height=280,
        elem_id="image",
    )
    desk.text = gr.Textbox(
        value=first.text if first else "",
        label=f"Text (write {MASK} or click words in the first tab to cover them)",
        max_length=input_limits.MAX_TEXT,
        lines=2,
        max_lines=3,
        elem_id="text",
        visible=bool(desk.samples),
    )
    # Until somebody uploads an image: an example of a task may take the place of the page's own.
    desk.own = gr.State(True)
    desk.image.upload(lambda: False, None, desk.own, api_visibility="private")
    desk.shown = gr.State(digest(first.image) if first else "")
    desk.status = gr.HTML("", elem_id="status")
    desk.strange = gr.HTML(desk.worker.run(strange, desk.models, first.image) if first else "", elem_id="strange")
    if desk.samples:
        desk.examples = gr.Dataset(
            components=[gr.Image(visible=False, render=False)],
            samples=[[sample.image] for sample in desk.samples],
            label="Examples" if desk.photos else "Examples, none of them seen in training",
            type="index",
            samples_per_page=20,
            layout="gallery",
            elem_id="examples",
        )


def strange(models: Models, image: Image.Image) -> str:
    """A line where an image is unlike what the pre-trained model has seen, else nothing."""
    line = models.core().far([image])[0]
    return answers.note(f"{line[0].upper()}{line[1:]}.") if line else ""


def of_pretraining(desk: Desk, index: Path | None, images: Path | None) -> None:
    """The tabs of the core's methods, and what happens where several of them are concerned."""
    model = desk.models.core()
    first = desk.samples[0]
    worded, painted = WordsTab(desk, first), Patches(desk, first)
    compared = match_and_caption(desk, first)
    line = None
    try:
        # Not by `worker.run`: encoding the images may take longer than an answer may.
        searched = desk.worker.pool.submit(Searched, model, index, images, desk.photos).result()
    except UserError as error:
        # The tab tells what is wrong with an index, and searches what the page brings along.
        line = str(error)
        searched = desk.worker.pool.submit(Searched, model, None, None, desk.photos).result()
    search_tab(desk, searched, line, index is not None)

    # Image and text concern both tabs, so one question answers for both.
    def all_anew(path: str | None, text: str, chosen: list[int], mask: answers.Mask, other: str) -> dict[Any, Any]:
        return {**worded.answer(path, text, chosen), **painted.answer(path, text, mask, other)}

    def another(
        path: str | None, text: str, chosen: list[int], mask: answers.Mask, other: str, shown: str
    ) -> dict[Any, Any]:
        image = desk.open(path) if path else None
        told, now = {desk.strange: strange(desk.models, image) if image else ""}, digest(image) if image else ""
        # Gradio tells of an image that `exemplary` has set, too: its answers are there already.
        if now and now == shown:
            return told
        return {**told, desk.shown: now, **all_anew(path, text, chosen, mask, other)}

    inputs = [desk.image, desk.text, worded.chips, painted.mask, painted.other]
    results = [*worded.results, *painted.results]
    nothing = {**dict.fromkeys(results), desk.strange: "", desk.shown: ""}
    desk.on(desk.image.change, another, [*inputs, desk.shown], [desk.strange, desk.shown, *results], nothing)

    def retold(path: str | None, text: str, chosen: list[int], known: str, mask: Any, other: str) -> dict[Any, Any]:
        # The box was left without a change.
        if text == known:
            return {}
        chips, kept = worded.offered(text), list[int]()
        return {**chips, **all_anew(path, text, kept, mask, other)}

    # In the order of `retold`'s arguments.
    with_known = [*inputs[:3], worded.known, *inputs[3:]]
    for trigger in (desk.text.blur, desk.text.submit):
        desk.on(trigger, retold, with_known, [worded.chips, worded.known, *results])

    def exemplary(number: int) -> dict[Any, Any]:
        sample = desk.samples[int(number)]
        chips = worded.offered(sample.text, sample)
        chosen = chips[worded.chips]["value"]
        drawn = desk_answer(sample, chosen)
        told = {desk.image: sample.image, desk.text: sample.text, painted.other: sample.other, desk.own: True}
        told[desk.shown] = digest(sample.image)
        return {**told, **chips, painted.mask: sample.masked, compared: texts_of(desk, sample), **drawn}

    def desk_answer(sample: PageSample, chosen: list[int]) -> dict[Any, Any]:
        filled = answers.words_filled(model, sample.image, sample.text, chosen)
        return {worded.results[0]: filled, **painted.of(sample.image, sample.text, sample.masked, sample.other)}

    outputs = [
        desk.image,
        desk.own,
        desk.shown,
        desk.text,
        worded.chips,
        worded.known,
        painted.mask,
        painted.other,
        compared,
        *results,
    ]
    desk.on(desk.examples.click, exemplary, [desk.examples], outputs)


def texts_of(desk: Desk, sample: PageSample) -> str:
    """What an example is matched with: what is true, what is nearly true, and what is said of others."""
    others = [each.text for each in desk.samples if each is not sample]
    return "\n".join([sample.text, sample.other, *others[:2]])
