"""The page itself, in Gradio: an image and a text on the left, and tabs with what can be done with them."""

import sys
import traceback
from collections import OrderedDict
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
from maskvlm.demo.tabs import PRESSED, Patches, SearchTab, TaskTab, WordsTab, match_and_caption, upload_image
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.utils.errors import UserError

CSS, JS = (Path(__file__).with_name(name) for name in ("page.css", "page.js"))
SESSIONS = 200  # visitors whose covered patches are remembered; each keeps a copy of the page's settings in memory
LOADED_RUNS = 3  # runs that stay loaded, besides the first
INTRO = "<h1>MaskVLM</h1><p>Cover words: the image fills them in. Cover patches of the image: the words do.</p>"
HIDE = "() => { document.querySelector('#tabs').classList.add('old'); return [BLANK]; }"
SHOW = "() => { document.querySelector('#tabs').classList.remove('old'); }"
"""HIDE hides the answers about the previous image, SHOW shows answers again. HIDE runs in the browser at once, while
the new question is on its way, so that no answer that arrives in between is shown beside another image."""


class ChosenRun:
    """A loaded run of the chooser, with its examples and its search.

    Attributes:
        about: description of its model and data, as HTML. samples: the examples; photographs if the model was trained
            on any. searched: the images to search. line: what is wrong with the index; None if nothing is.
    """

    def __init__(self, models: Models, number: int, index: Path | None, images: Path | None) -> None:
        run = models.listing.runs[number]
        self.model: PretrainedMaskVLM = models.core(number)
        rows, columns = self.model.grid
        side = self.model.image_size
        description = f"{run.short_path}: images of {side} × {side} pixels in {rows} × {columns} patches"
        photos = run.trained is not None and run.trained.photographs > 0
        if run.trained is not None:
            description += f", {run.trained.measures}, trained on {run.trained.description}"
        self.about = answers.note(f"{description}.")
        self.samples: list[PageSample] = photo_samples(self.model.grid) if photos else samples(side, self.model.grid)
        self.title = "Examples" if photos else "Examples, none of them seen in training"
        self.line: str | None = None
        try:
            self.searched = Searched(self.model, index, images, photos)
        except UserError as error:
            # The tab shows what is wrong with the index, and searches the page's own images.
            self.line = str(error)
            self.searched = Searched(self.model, None, None, photos)

    @property
    def examples(self) -> str:
        """The samples as buttons."""
        buttons = answers.choice_buttons((sample.image, sample.text) for sample in self.samples)
        return f'<h2 class="over">{self.title}</h2>{buttons}'

    def texts_of(self, sample: PageSample) -> str:
        """Texts to match an example with: the true one, a nearly true one, and those of other examples."""
        others = [each.text for each in self.samples if each is not sample]
        return "\n".join([sample.text, sample.other, *others[:2]])

    def strange(self, image: Image.Image | None, text: str) -> str:
        """A note if the image is unlike the model's training data, and those on the text."""
        line = None if image is None else self.model.far([image])[0]
        far_note = answers.note(answers.sentence(line)) if line else ""
        return far_note + answers.text_notes(self.model, [text], fills=True)


class Desk:
    """State and components shared by all tabs.

    Attributes:
        run: the chosen run. image, text, status, strange, examples: components. sample: the example shown, -1 for an
            example of a task, None for the visitor's own image. mask, other: mask and other text of the patches tab.
        inputs: inputs of questions about image and text. change_inputs: inputs of `changed`.
        results: answers updated at once with image and text. stale: answers given on request, cleared with the image.
        shared: all components that change with the image.
    """

    run: gr.components.Component
    image: gr.Image
    text: gr.Textbox
    status: gr.HTML
    strange: gr.HTML
    about: gr.HTML
    examples: gr.HTML
    sample: gr.State
    worded: WordsTab
    painted: Patches
    compared: gr.Textbox
    search: SearchTab
    mask: gr.State
    other: gr.components.Component

    def __init__(
        self, models: Models, worker: input_limits.Worker, index: Path | None = None, images: Path | None = None
    ) -> None:
        self.models, self.worker, self.open = models, worker, input_limits.Opener()
        self.index, self.images = index, images
        self.loaded = OrderedDict[int, ChosenRun]()
        self.stale: list[Any] = []
        self.shared: list[Any] = []
        self.results: list[Any] = []

    @property
    def inputs(self) -> list[Any]:
        return [self.run, self.image, self.text]

    @property
    def change_inputs(self) -> list[Any]:
        return [self.run, self.sample, self.mask, self.other]

    def chosen(self, number: int) -> ChosenRun:
        """A run of the chooser; loaded on first use, and dropped once LOADED_RUNS others have been used since."""
        if number not in self.loaded:
            self.loaded[number] = ChosenRun(self.models, number, self.index, self.images)
            others = [each for each in self.loaded if each]  # the first is kept, as every visitor starts with it
            if len(others) > LOADED_RUNS:
                del self.loaded[others[0]]
        self.loaded.move_to_end(number)
        return self.loaded[number]

    def safe_handler(
        self, function: Callable[..., dict[Any, Any]], clear: dict[Any, Any]
    ) -> Callable[..., dict[Any, Any]]:
        """An event handler that runs `function` in the worker and shows errors as one line under the image.

        Args:
            function: returns component -> value.
            clear: component -> value if there is no answer.
        """

        def answered(*inputs: Any) -> dict[Any, Any]:
            try:
                return {self.status: "", **self.worker.run(function, *inputs)}
            except UserError as error:
                # The advice of BadImage is meant for data sets; here there is no row.
                line = str(error.without_row() if isinstance(error, BadImage) else error)
                return {**clear, self.status: answers.problem(" ".join(line.split())[:400])}
            except Exception as error:
                # The traceback is for the terminal: a visitor sees only the type of the error.
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
        clear: dict[Any, Any],
    ) -> Any:
        """Call `function` on an event; `clear` is shown along with an error."""
        return self.listen(trigger, self.safe_handler(function, clear), inputs, outputs)

    def listen(self, trigger: Any, function: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> Any:
        """Register an event handler. Questions of all tabs run one at a time, in order, as they share the model."""
        return trigger(
            function,
            inputs,
            [self.status, *outputs],
            concurrency_limit=1,
            concurrency_id="model",
            show_progress="minimal",
            show_progress_on=[each for each in outputs if isinstance(each, gr.HTML)] or None,
            api_visibility="private",
        )

    def changed(self, number: int, image: Image.Image, text: str, mask: answers.Mask, other: str) -> dict[Any, Any]:
        """All updates when one of a task's examples is shown."""
        updates = {self.image: image, self.sample: -1, **dict.fromkeys(self.stale, "")}
        model = self.chosen(number).model
        words = self.worded.offered(text, [])
        return {
            **updates,
            **words,
            self.text: text,
            self.strange: self.chosen(number).strange(image, text),
            **self.worded.of(model, image, text, []),
            **self.painted.of(model, image, text, mask, other),
        }

    def example(self, number: int, place: int) -> dict[Any, Any]:
        """All updates when one of the page's examples is shown."""
        chosen = self.chosen(number)
        sample = chosen.samples[place]
        covered = self.worded.telling(sample)
        updates = self.changed(number, sample.image, sample.text, sample.masked, sample.other)
        words = {
            **self.worded.offered(sample.text, covered),
            **self.worded.of(chosen.model, sample.image, sample.text, covered),
        }
        return {**updates, **words, self.sample: place, self.mask: sample.masked, self.other: sample.other}


def page(models: Models, worker: input_limits.Worker, index: Path | None, images: Path | None = None) -> gr.Blocks:
    """The whole page.

    Args:
        models: the models found, with at least one pre-training run (`serve.py` adds the bundled one).
        index: folder of the index to search; None for the page's own images.
        images: folder of the index's images, as given by the user.
    """
    desk = Desk(models, worker, index, images)
    listing = models.listing
    # delete_cache: once a minute Gradio removes files older than KEPT_SECONDS.
    with gr.Blocks(
        title="MaskVLM", analytics_enabled=False, delete_cache=(60, upload_store.KEPT_SECONDS), fill_width=True
    ) as blocks:
        gr.HTML(INTRO, elem_id="intro")
        # Not through `worker.run`: encoding the images to search may take longer than an answer may.
        worker.pool.submit(desk.chosen, 0).result()
        chooser(desk)
        problems = "".join(answers.problem(f"Not used: {each}") for each in listing.problems)
        # In the order of a phone screen and of the Tab key; on a wide screen, `page.css` puts the last part under the
        # first.
        with gr.Column(elem_id="desk"):
            with gr.Column(elem_id="given"):
                image_and_text(desk)
            with gr.Column(elem_id="asked"), gr.Tabs(elem_id="tabs"):
                tasks = tabs(desk)
            with gr.Column(elem_id="more"):
                more(desk)
                gr.HTML(problems, elem_id="problems", visible=bool(problems))
        of_pretraining(desk)
        for each in tasks:
            each.wire()
    # api_open: otherwise a question could bypass the queue.
    blocks.queue(max_size=input_limits.QUEUE, default_concurrency_limit=1, api_open=False)
    blocks.state_session_capacity = SESSIONS
    blocks.has_launched = (
        True  # otherwise Gradio does not check the files that a call names, as the page is mounted, not launched
    )
    return blocks


def chooser(desk: Desk) -> None:
    """The list of runs, best first, and a description of the chosen one."""
    desk.run = gr.Dropdown(
        [(run.choice, number) for number, run in enumerate(desk.models.listing.runs)],
        value=0,
        label="Run, the best first",
        filterable=False,
        elem_id="run",
    )
    desk.about = gr.HTML(desk.chosen(0).about, elem_id="about")


def image_and_text(desk: Desk) -> None:
    """Image and text, and notes on them."""
    first = desk.chosen(0).samples[0]
    desk.image = upload_image(
        desk,
        first.image,
        label="Image",
        alt_text="The image that is asked about",
        height=280,
        elem_id="image",
    )
    desk.status = gr.HTML("", elem_id="status")
    desk.strange = gr.HTML(desk.worker.run(desk.chosen(0).strange, first.image, first.text), elem_id="strange")
    desk.sample = gr.State(0)
    # Below the tabs on a phone: rendered by `more`.
    desk.text = gr.Textbox(
        value=first.text,
        label=f"Text (write {MASK} or click words in the first tab to cover them)",
        max_length=input_limits.MAX_TEXT,
        lines=2,
        max_lines=3,
        elem_id="text",
        render=False,
    )


def tabs(desk: Desk) -> list[TaskTab]:
    """Create all tabs; returns those of tasks, whose events are not wired yet."""
    listing = desk.models.listing
    first = desk.chosen(0).samples[0]
    desk.worded, desk.painted = WordsTab(desk, first), Patches(desk, first)
    desk.mask, desk.other = desk.painted.mask, desk.painted.other
    desk.compared = match_and_caption(desk, first)
    desk.search = SearchTab(desk, desk.index is not None)
    desk.results = [*desk.worded.results, *desk.painted.results]
    core = [desk.text, desk.strange, desk.worded.chips, desk.worded.known, *desk.results]
    tasks = [TaskTab(desk, run) for run in listing.tasks]
    if not tasks:
        with gr.Tab("Tasks"):
            gr.HTML(answers.note(no_task(desk.models)))
    desk.shared = [desk.image, desk.sample, *core, *desk.stale]
    return tasks


def no_task(models: Models) -> str:
    """Text of the tab for fine-tuned tasks if there are none."""
    name = "/".join(Path(models.listing.runs[0].path).parts[-3:])
    return f"No fine-tuned checkpoint is here. Run `maskvlm finetune vqa from={name}`, then `maskvlm demo` again."


def more(desk: Desk) -> None:
    """The text box and the examples."""
    desk.text.render()
    desk.examples = gr.HTML(desk.chosen(0).examples, elem_id="examples", js_on_load=PRESSED)


def hide(trigger: Any, old: list[Any]) -> None:
    """Clear answers in the browser, before the question is sent."""
    trigger(None, None, old, js=HIDE.replace("BLANK", ", ".join(["''"] * len(old))))


def of_pretraining(desk: Desk) -> None:
    """Wire changes of image, text and run. They concern all tabs, so one question answers for all."""
    worded, painted = desk.worded, desk.painted
    inputs = [*desk.inputs, worded.chips, desk.mask, desk.other]
    everything = [*desk.shared, desk.mask, desk.other, desk.compared, desk.about, desk.examples]
    everything += [desk.search.description, desk.search.query]
    old = [*desk.results, *desk.stale]
    nothing = dict.fromkeys(old, "")

    def all_anew(
        number: int, path: str | None, text: str, covered: list[int], mask: answers.Mask, other: str
    ) -> dict[Any, Any]:
        words = worded.answer(number, path, text, covered)
        line = desk.chosen(number).strange(desk.open(path) if path else None, text)
        if not path:  # words can be guessed without an image, too
            return {**dict.fromkeys(painted.results, ""), **words, desk.strange: line}
        return {**words, **painted.answer(number, path, text, mask, other), desk.strange: line}

    def brought(*values: Any) -> dict[Any, Any]:
        return {**nothing, **all_anew(*values), desk.sample: None}

    for trigger in (desk.image.upload, desk.image.clear):
        hide(trigger, old)
        event = desk.on(trigger, brought, inputs, [*desk.shared], {**nothing, desk.strange: "", desk.sample: None})
        event.then(None, js=SHOW)

    def text_changed(
        number: int, path: str | None, text: str, _: list[int], mask: answers.Mask, other: str, known: str
    ) -> dict[Any, Any]:
        # The box lost focus without a change.
        if text == known:
            return {}
        # No longer an example: choosing another run must not replace the visitor's text.
        return {**worded.offered(text, []), **all_anew(number, path, text, [], mask, other), desk.sample: None}

    followed = [worded.chips, worded.known, desk.strange, desk.sample, *desk.results]
    for trigger in (desk.text.blur, desk.text.submit):
        desk.on(trigger, text_changed, [*inputs, worded.known], followed, dict.fromkeys(desk.results, ""))

    def exemplary(number: int, place: Any) -> dict[Any, Any]:
        chosen = desk.chosen(number)
        if type(place) is not int or not 0 <= place < len(chosen.samples):
            raise UserError("example", "there is no such example", "Click one of those shown")
        return {**desk.example(number, place), desk.compared: chosen.texts_of(chosen.samples[place])}

    # Gradio passes the event because of the annotation `gr.EventData`, which `desk.on` would hide.
    def pressed(number: int, event: gr.EventData) -> dict[Any, Any]:
        return safely(number, event.index)

    safely = desk.safe_handler(exemplary, nothing)
    desk.listen(desk.examples.click, pressed, [desk.run], everything)

    def rerun(
        number: int,
        path: str | None,
        text: str,
        covered: list[int],
        mask: answers.Mask,
        other: str,
        sample: int | None,
    ) -> dict[Any, Any]:
        chosen = desk.chosen(number)
        updates: dict[Any, Any] = {desk.about: chosen.about, desk.examples: chosen.examples}
        updates |= {desk.search.description: desk.search.about(chosen), desk.search.query: chosen.searched.query}
        if sample is not None and sample >= 0:
            # Runs on drawn scenes and on photographs have different examples.
            return {**updates, **exemplary(number, sample if sample < len(chosen.samples) else 0)}
        mask = answers.fitted(mask, chosen.model.grid)
        return {**nothing, **updates, desk.mask: mask, **all_anew(number, path, text, covered, mask, other)}

    hide(desk.run.input, old)  # type: ignore[attr-defined]
    event = desk.on(desk.run.input, rerun, [*inputs, desk.sample], everything, nothing)  # type: ignore[attr-defined]
    event.then(None, js=SHOW)
