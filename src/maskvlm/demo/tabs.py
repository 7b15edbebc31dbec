"""The tabs of the page. Each takes the shared desk, and offers functions to whatever changes the image."""

import random
from abc import ABCMeta
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import gradio as gr
import torch

from maskvlm.data.inputs import open_image
from maskvlm.demo import answers, input_limits
from maskvlm.demo.models import Loaded, Run
from maskvlm.demo.samples import PageSample, enlarged
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.utils.errors import UserError

if TYPE_CHECKING:
    from maskvlm.demo.page import ChosenRun, Desk

MOST_IMAGES = 4  # in a task's example
NO_HEAD = answers.note("This run was trained without the loss that this tab needs: choose another one.")
PRESSED = """
element.addEventListener("click", (event) => {
  const pressed = event.target.closest("[data-index]");
  if (pressed) trigger("click", {index: Number(pressed.dataset.index)});
});
"""
"""Reports which button of an HTML component was pressed."""


class WordsTab:
    """Words of the text as buttons; covered words are guessed with the image and without it."""

    def __init__(self, desk: "Desk", first: PageSample) -> None:
        self.desk = desk
        parts, chosen = answers.split_words(first.text), self.telling(first)
        with gr.Tab("Words"):
            self.chips = gr.CheckboxGroup(
                choices=[(word, number) for number, word in enumerate(parts.words)],
                value=chosen,
                label="Click words to cover them",
                elem_id="chips",
            )
            model = desk.chosen(0).model
            self.result = gr.HTML(elem_id="words")
            self.result.value = desk.worker.run(self.of, model, first.image, first.text, chosen)[self.result]
            # The text that the buttons were made from.
            self.known = gr.State(first.text)
        self.results = [self.result]
        desk.on(self.chips.input, self.answer, [*desk.inputs, self.chips], self.results, {self.result: ""})

    def answer(self, number: int, path: str | None, text: str, covered: list[int]) -> dict[Any, Any]:
        """The tab's answer. Raises UserError, but not for a missing image: words can be guessed without one."""
        image = self.desk.open(path) if path else None
        return self.of(self.desk.chosen(number).model, image, input_limits.checked_text(text), covered)

    def of(self, model: PretrainedMaskVLM, image: Any, text: str, covered: list[int]) -> dict[Any, Any]:
        """The tab's answer for an opened image."""
        if not hasattr(model.task, "tokens"):
            return {self.result: NO_HEAD}
        return {self.result: answers.words_filled(model, image, text, [int(each) for each in covered or []])}

    def offered(self, text: str, covered: list[int]) -> dict[Any, Any]:
        """Updates of the buttons for a new text."""
        parts = answers.split_words(input_limits.checked_text(text))
        choices = [(word, number) for number, word in enumerate(parts.words)]
        return {self.chips: gr.update(choices=choices, value=covered), self.known: text}

    def telling(self, sample: PageSample) -> list[int]:
        """The words that differ in the wrong caption, and can be told from the image."""
        # Both captions have the same number of words (`PageSample`), so they are compared word by word.
        right, wrong = (answers.split_words(text).words for text in (sample.text, sample.other))
        return [number for number, pair in enumerate(zip(right, wrong, strict=True)) if pair[0] != pair[1]][:2]


class Patches:
    """The image in patches; covered patches are filled in from two texts."""

    def __init__(self, desk: "Desk", first: PageSample) -> None:
        self.desk = desk
        model = desk.chosen(0).model
        contents = desk.worker.run(self.drawn, model, first.image, first.text, first.masked, first.other)
        with gr.Tab("Patches", elem_id="patches"):
            self.mask = gr.State(first.masked)
            self.other = gr.Textbox(
                first.other, label="Another text", max_length=input_limits.MAX_TEXT, elem_id="other"
            )
            titles = {"board": "Click patches to cover them", "left": "From your text", "right": "From the other"}
            with gr.Row(elem_classes="three"):
                for (name, title), content in zip(titles.items(), contents, strict=True):
                    with gr.Column(min_width=120):
                        gr.HTML(f'<h2 class="over">{title}</h2>')
                        part = gr.HTML(content, elem_id=name, js_on_load=PRESSED if name == "board" else None)
                        setattr(self, name, part)
            with gr.Row():
                lot = gr.Button("Cover six in ten at random", size="sm", elem_id="lot")
                clear = gr.Button("Uncover all", size="sm", elem_id="uncover")
        self.results: list[Any] = [self.board, self.left, self.right]
        inputs, outputs = [*desk.inputs, self.mask, self.other], [self.mask, desk.sample, *self.results]
        nothing = dict.fromkeys(self.results, "")

        def turned(number: int, path: str, text: str, mask: answers.Mask, other: str, place: Any) -> dict[Any, Any]:
            mask = answers.fitted(mask, desk.chosen(number).model.grid)
            return self.with_mask(number, path, text, answers.turned(mask, place), other)

        # Gradio passes the event because of the annotation `gr.EventData`, which `desk.on` would hide.
        def pressed(
            number: int, path: str, text: str, mask: answers.Mask, other: str, event: gr.EventData
        ) -> dict[Any, Any]:
            return safely(number, path, text, mask, other, event.index)

        safely = desk.safe_handler(turned, nothing)
        desk.listen(self.board.click, pressed, inputs, outputs)

        def by_lot(number: int, path: str, text: str, _: answers.Mask, other: str) -> dict[Any, Any]:
            grid = desk.chosen(number).model.grid
            return self.with_mask(number, path, text, answers.by_lot(grid), other)

        def uncovered(number: int, path: str, text: str, _: answers.Mask, other: str) -> dict[Any, Any]:
            grid = desk.chosen(number).model.grid
            return self.with_mask(number, path, text, answers.empty(grid), other)

        desk.on(lot.click, by_lot, inputs, outputs, nothing)
        desk.on(clear.click, uncovered, inputs, outputs, nothing)
        for trigger in (self.other.blur, self.other.submit):
            desk.on(trigger, self.answer, inputs, self.results, nothing)

    board: gr.HTML
    left: gr.HTML
    right: gr.HTML

    def with_mask(self, number: int, path: str, text: str, mask: answers.Mask, other: str) -> dict[Any, Any]:
        """All updates of the tab for another mask."""
        # No longer an example, as with a text of the visitor's own.
        return {self.mask: mask, self.desk.sample: None, **self.answer(number, path, text, mask, other)}

    def answer(self, number: int, path: str | None, text: str, mask: answers.Mask, other: str) -> dict[Any, Any]:
        """The tab's images for the inputs. Raises UserError."""
        image, text = self.desk.open(path), input_limits.checked_text(text)
        return self.of(self.desk.chosen(number).model, image, text, mask, other)

    def of(self, model: PretrainedMaskVLM, image: Any, text: str, mask: answers.Mask, other: str) -> dict[Any, Any]:
        """The tab's images for an opened image."""
        other = input_limits.checked_text(other, "another text")
        return dict(zip(self.results, self.drawn(model, image, text, mask, other), strict=True))

    def drawn(self, model: PretrainedMaskVLM, image: Any, text: str, mask: answers.Mask, other: str) -> list[str]:
        """The image with masked patches covered, and filled in from each text; "" if nothing is masked."""
        if not hasattr(model.task, "pixels"):
            return [NO_HEAD, "", ""]
        mask = answers.fitted(mask, model.grid)
        board = answers.buttons(answers.board(model, image, mask), mask)
        if not any(map(any, mask)):
            return [board, "", ""]
        texts = (text, other)
        paintings = answers.painted(model, image, mask, texts)
        pictures = [
            answers.picture(each, f"The covered patches, from: {of}") for each, of in zip(paintings, texts, strict=True)
        ]
        pictures[1] += answers.text_notes(model, [other])  # for the first text it is shown under the image
        return [board, *pictures]


def match_and_caption(desk: "Desk", first: PageSample) -> gr.Textbox:
    """Create the tabs Match and Caption; returns the box of texts to match."""
    with gr.Tab("Match"):
        label = f"Texts, one a line (at most {input_limits.MAX_LINES})"
        texts = gr.Textbox(desk.chosen(0).texts_of(first), label=label, lines=4, elem_id="texts")
        button = gr.Button("Which belong to the image?", variant="primary", elem_id="match")
        likely = gr.HTML("", elem_id="matches")
    with gr.Tab("Caption"):
        write = gr.Button("Write a caption", variant="primary", elem_id="write")
        written = gr.HTML("", elem_id="caption")

    def matched(number: int, path: str | None, lines: str) -> dict[Any, Any]:
        candidates = input_limits.lines_of(lines)
        model = desk.chosen(number).model
        return {likely: answers.matches(model, desk.open(path), candidates) + answers.text_notes(model, candidates)}

    def captioned(number: int, path: str | None) -> dict[Any, Any]:
        return {written: answers.captioned(desk.chosen(number).model, desk.open(path))}

    desk.on(button.click, matched, [desk.run, desk.image, texts], [likely], {likely: ""})
    desk.on(write.click, captioned, [desk.run, desk.image], [written], {written: ""})
    desk.stale += [likely, written]
    return texts


class SearchTab:
    """Search for images by a text, or by the image on the left."""

    def __init__(self, desk: "Desk", indexed: bool) -> None:
        self.desk, self.indexed = desk, indexed
        with gr.Tab("Search"):
            first = desk.chosen(0)
            self.description = gr.HTML(self.about(first), elem_id="searched")
            self.query = gr.Textbox(
                first.searched.query, label="What to look for", max_length=input_limits.MAX_TEXT, elem_id="query"
            )
            with gr.Row():
                by_text = gr.Button("Find by the text", variant="primary", elem_id="find")
                by_image = gr.Button("Find by the image", elem_id="find-like")
            self.hits = gr.HTML("", elem_id="found")

        def texted(number: int, text: str) -> dict[Any, Any]:
            chosen = desk.chosen(number)
            hits = chosen.searched.by_text(input_limits.checked_text(text))
            notes = answers.text_notes(chosen.model, [text])
            return {self.hits: notes + answers.hits(hits, f"The best first, for: {text}")}

        def imaged(number: int, path: str | None) -> dict[Any, Any]:
            hits = desk.chosen(number).searched.by_image(desk.open(path))
            return {self.hits: answers.hits(hits, "The best first, for the image")}

        for trigger in (by_text.click, self.query.submit):
            desk.on(trigger, texted, [desk.run, self.query], [self.hits], {self.hits: ""})
        desk.on(by_image.click, imaged, [desk.run, desk.image], [self.hits], {self.hits: ""})
        desk.stale.append(self.hits)

    def about(self, chosen: "ChosenRun") -> str:
        """Describes the images that are searched, and any problem with the index."""
        searched = chosen.searched
        line = f"In {searched.description}."
        if not self.indexed:
            line += " For your own: `maskvlm index --from CHECKPOINT -c ...`, then `maskvlm demo`."
        return (answers.problem(chosen.line) if chosen.line else "") + answers.note(line)


def upload_image(desk: "Desk", image: Any = None, **settings: Any) -> gr.Image:
    """An image component whose uploads arrive as paths: nothing decodes them before `safe_open` does. The page's own
    images are sent as data URLs, and come back under the names that `Opener.keep` gave them.

    It needs a class of its own: Gradio recreates the component from its class in each visitor's session, so methods set
    on a single object would be lost, and Gradio would decode uploads itself.
    """

    def to_path(_: gr.Image, file: Any) -> str | None:
        return None if file is None else file.path

    def to_browser(_: gr.Image, picture: Any) -> dict[str, str] | None:
        return None if picture is None else {"path": desk.open.keep(picture), "url": answers.data_address(picture)}

    methods = {"preprocess": to_path, "postprocess": to_browser, "__module__": gr.Image.__module__}
    # Not with a `class` statement: Gradio would write an interface file beside this one.
    kind = ABCMeta.__new__(type(gr.Image), "Image", (gr.Image,), methods)
    component: gr.Image = kind(type="filepath", format="png", sources=["upload", "clipboard"], buttons=[], **settings)
    component.value = to_browser(component, image)
    return component


def digest(image: Any) -> str:
    """A hash of an image's size and pixels."""
    rgb = image.convert("RGB")
    return sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()


class TaskTab:
    """A fine-tuned task; its model is loaded when the tab is first opened."""

    def __init__(self, desk: "Desk", run: Run) -> None:
        self.desk, self.run = desk, run
        name = run.title.lower()
        with gr.Tab(run.title, elem_id=f"tab-{name}") as self.tab:
            self.note = gr.HTML(answers.note(f"{run.short_path} is loaded when it is first asked ..."))
            self.places, self.more = [], list[Any]()
            with gr.Row():
                for number in range(2, MOST_IMAGES + 1):
                    with gr.Column(min_width=160, visible=False) as place:
                        title, name_of = f"Image {number}", f"{name}-image-{number}"
                        box = upload_image(desk, label=title, alt_text=title, height=200, elem_id=name_of)
                        self.more.append(box)
                    self.places.append(place)
            self.text = gr.Textbox("", label="Text", max_length=input_limits.MAX_TEXT, elem_id=f"{name}-text")
            with gr.Row():
                self.ask = gr.Button("Answer", variant="primary", elem_id=f"{name}-ask")
                self.another = gr.Button("Another example", elem_id=f"{name}-example")
            self.answer = gr.HTML("", elem_id=f"{name}-answer")
            self.truth = gr.State(("", ""))  # the example's answer, and the digest of its image
            self.started = gr.State(False)
        desk.stale.append(self.answer)

    def wire(self) -> None:
        """Register the events, once every tab exists, since an example changes the image of all tabs."""
        desk, answer = self.desk, self.answer
        own = [self.note, *self.places, *self.more, self.text, self.another, answer, self.truth, self.started]
        outputs = list(dict.fromkeys([*own, *desk.shared]))
        nothing = dict.fromkeys([answer, *desk.results], "")
        desk.on(self.tab.select, self.opening, [self.started, *desk.change_inputs], outputs, nothing)
        desk.on(self.another.click, self.exemplary, desk.change_inputs, outputs, nothing)
        for trigger in (self.ask.click, self.text.submit):
            inputs = [desk.image, *self.more, self.text, self.truth]
            desk.on(trigger, self.answered, inputs, [answer], {answer: ""})
        # The example's own answer belongs to the example only, and an answer to the inputs that it was given for.
        for each in (self.text.input, *(event for box in self.more for event in (box.upload, box.clear))):
            desk.listen(each, lambda: {self.truth: ("", ""), answer: ""}, [], [self.truth, answer])

    def input_updates(self, loaded: Loaded) -> dict[Any, Any]:
        """Updates that show the inputs that the task takes."""
        if loaded.method.images > MOST_IMAGES:
            raise UserError(self.run.short_path, f"takes {loaded.method.images} images", "Ask it in the shell")
        # The first image is the one on the left; boxes beyond the task's number of images stay hidden.
        updates = {each: gr.update(visible=number < loaded.method.images) for number, each in enumerate(self.places, 1)}
        label, line = loaded.method.text.capitalize(), f"{self.run.short_path}: {loaded.method.description}."
        box = gr.update(label=label, visible=bool(label))
        return {self.note: answers.note(line), self.text: box, **updates, self.started: True}

    def drawn(self, loaded: Loaded, number: int, mask: Any, other: str) -> dict[Any, Any]:
        """An example of the task's data; its first image and its text are shown on the left."""
        if loaded.examples is None:
            return {self.another: gr.update(visible=False)}
        example = loaded.examples[random.randrange(min(len(loaded.examples), 500))]
        # The first image goes to the left, the others to boxes of this tab.
        first, *others = [enlarged(open_image(each, "example")) for each in example["images"]]
        filled = dict(zip(self.more, others, strict=False))
        truth = ", ".join(dict.fromkeys(example["answers"]))
        label = gr.update(value=example["text"], label=loaded.method.text.capitalize())
        updates = self.desk.changed(number, first, example["text"], mask, other)
        return {**updates, **filled, self.text: label, self.truth: (truth, digest(first)), self.answer: ""}

    def opening(self, begun: bool, number: int, sample: int | None, mask: Any, other: str) -> dict[Any, Any]:
        """Updates when the tab is opened: the first time loads the model, later times change nothing."""
        if begun:
            return {}
        loaded = self.desk.models.task(self.run)
        # Do not replace a visitor's own image.
        drawn = {} if sample is None else self.drawn(loaded, number, mask, other)
        return {**self.input_updates(loaded), **drawn}

    def exemplary(self, number: int, _: int | None, mask: Any, other: str) -> dict[Any, Any]:
        """Another example, whatever is shown at present."""
        return self.drawn(self.desk.models.task(self.run), number, mask, other)

    def answered(self, path: str | None, *others: Any) -> dict[Any, Any]:
        """The task's answer for the inputs. Raises UserError."""
        *paths, words, truth = others
        loaded = self.desk.models.task(self.run)
        images = [self.desk.open(path)]
        # Hidden boxes may still hold images of an earlier example.
        images += [self.desk.open(each, f"image {n}") for n, each in enumerate(paths[: loaded.method.images - 1], 2)]
        texts = [input_limits.checked_text(words, loaded.method.text)] if loaded.method.text else []
        with torch.no_grad():
            (answer,) = loaded.method.run(loaded.model.task, loaded.model, [(*images, *texts)])
        own = truth[0] and truth[1] == digest(images[0])  # other tabs change the image, too
        known = answers.note(f"The example's own answer: {truth[0]}") if own else ""
        return {self.answer: answers.decided(answer) + known + answers.text_notes(loaded.model, texts)}
