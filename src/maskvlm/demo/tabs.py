"""The tabs of the page. Each takes the desk that all share, and offers what it does to who changes the image."""

import random
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import gradio as gr
import torch

from maskvlm.data.inputs import open_image
from maskvlm.demo import answers, input_limits
from maskvlm.demo.models import Loaded, Run
from maskvlm.demo.samples import PageSample, Searched, enlarged
from maskvlm.utils.errors import UserError

if TYPE_CHECKING:
    from maskvlm.demo.page import Desk

MOST_IMAGES = 4  # of a task's example


class WordsTab:
    """Words of the text as buttons; what is covered is guessed with the image and without it."""

    def __init__(self, desk: "Desk", first: PageSample) -> None:
        self.desk, self.model = desk, desk.models.core()
        parts, chosen = answers.taken_apart(first.text), self.telling(first)
        with gr.Tab("Words"):
            self.chips = gr.CheckboxGroup(
                choices=[(word, number) for number, word in enumerate(parts.words)],
                value=chosen,
                label="Click words to cover them",
                elem_id="chips",
            )
            filled = desk.worker.run(answers.words_filled, self.model, first.image, first.text, chosen)
            self.result = gr.HTML(filled, elem_id="words")
            # The text that the buttons were made of.
            self.known = gr.State(first.text)
        self.results = [self.result]
        inputs = [desk.image, desk.text, self.chips]
        desk.on(self.chips.input, self.answer, inputs, self.results, {self.result: ""})

    def answer(self, path: str | None, text: str, chosen: list[int]) -> dict[Any, Any]:
        """Raises UserError, but not for want of an image: words are guessed without one, too."""
        text = input_limits.checked_text(text)
        image = self.desk.open(path) if path else None
        return {self.result: answers.words_filled(self.model, image, text, [int(each) for each in chosen or []])}

    def offered(self, text: str, sample: PageSample | None = None) -> dict[Any, Any]:
        """The words of a new text."""
        parts = answers.taken_apart(input_limits.checked_text(text))
        choices = [(word, number) for number, word in enumerate(parts.words)]
        value = self.telling(sample) if sample else []
        return {self.chips: gr.update(choices=choices, value=value), self.known: text}

    def telling(self, sample: PageSample) -> list[int]:
        """The words that the wrong caption has otherwise: the image tells them."""
        # Both captions have as many words (`PageSample`), so they are compared place by place.
        right, wrong = (answers.taken_apart(text).words for text in (sample.text, sample.other))
        return [number for number, pair in enumerate(zip(right, wrong, strict=True)) if pair[0] != pair[1]][:2]


class Patches:
    """The image in patches; what is covered is filled in from two texts."""

    def __init__(self, desk: "Desk", first: PageSample) -> None:
        self.desk, self.model = desk, desk.models.core()
        made = desk.worker.run(self.drawn, first.image, first.text, first.masked, first.other)
        show: dict[str, Any] = {"interactive": False, "format": "png", "buttons": [], "show_label": False}
        with gr.Tab("Patches", elem_id="patches"):
            self.mask = gr.State(first.masked)
            self.other = gr.Textbox(
                first.other, label="Another text", max_length=input_limits.MAX_TEXT, elem_id="other"
            )
            titles = {"board": "Click patches to cover them", "left": "From your text", "right": "From the other"}
            images = []
            with gr.Row(elem_classes="three"):
                for (name, title), image in zip(titles.items(), made, strict=True):
                    with gr.Column(min_width=120):
                        gr.HTML(f'<p class="over">{title}</p>', padding=False)
                        images.append(gr.Image(image, label=title, elem_id=name, **show))
            self.board, self.left, self.right = images
            with gr.Row():
                lot = gr.Button("Cover six in ten at random", size="sm")
                clear = gr.Button("Uncover all", size="sm", elem_id="uncover")
        self.results = [self.board, self.left, self.right]
        inputs, outputs = [desk.image, desk.text, self.mask, self.other], [self.mask, *self.results]

        def turned(path: str, text: str, mask: answers.Mask, other: str, place: Any) -> dict[Any, Any]:
            image = desk.open(path)
            size = answers.enlarge(self.model, answers.seen(self.model, image)).size
            # Turned at the place of the click on the enlarged image.
            return self.with_mask(path, text, answers.clicked(mask, place, size), other)

        # Gradio hands the place in for the annotation `gr.SelectData`, which `desk.on` would hide.
        def pressed(path: str, text: str, mask: answers.Mask, other: str, event: gr.SelectData) -> dict[Any, Any]:
            return safely(path, text, mask, other, event.index)

        safely = desk.asked(turned, {})
        self.board.select(
            pressed,
            inputs,
            [desk.status, *outputs],
            concurrency_limit=1,
            concurrency_id="model",
            show_progress="minimal",
            api_visibility="private",
        )
        desk.on(
            lot.click,
            lambda path, text, mask, other: self.with_mask(path, text, answers.by_lot(self.model.grid), other),
            inputs,
            outputs,
        )
        desk.on(
            clear.click,
            lambda path, text, mask, other: self.with_mask(path, text, answers.empty(self.model.grid), other),
            inputs,
            outputs,
        )
        for trigger in (self.other.blur, self.other.submit):
            desk.on(trigger, self.answer, inputs, self.results)

    def with_mask(self, path: str, text: str, mask: answers.Mask, other: str) -> dict[Any, Any]:
        """All of the tab for another mask."""
        return {self.mask: mask, **self.answer(path, text, mask, other)}

    def answer(self, path: str | None, text: str, mask: answers.Mask, other: str) -> dict[Any, Any]:
        """Raises UserError."""
        return self.of(
            self.desk.open(path),
            input_limits.checked_text(text),
            mask,
            input_limits.checked_text(other, "another text"),
        )

    def of(self, image: Any, text: str, mask: answers.Mask, other: str) -> dict[Any, Any]:
        """The tab's images for an image that is open."""
        return dict(zip(self.results, self.drawn(image, text, mask, other), strict=True))

    def drawn(self, image: Any, text: str, mask: answers.Mask, other: str) -> list[Any]:
        """The image with masked patches covered, and filled in from each text; None where nothing is masked."""
        if not any(map(any, mask)):
            return [answers.board(self.model, image, mask), None, None]
        return [answers.board(self.model, image, mask), *answers.painted(self.model, image, mask, (text, other))]


def match_and_caption(desk: "Desk", first: PageSample) -> gr.Textbox:
    """Two tabs; returns the box of texts to match."""
    model = desk.models.core()
    others = [sample.text for sample in desk.samples[1:3]]
    with gr.Tab("Match"):
        label = f"Texts, one a line (at most {input_limits.MAX_LINES})"
        texts = gr.Textbox("\n".join([first.text, first.other, *others]), label=label, lines=4, elem_id="texts")
        button = gr.Button("Which belong to the image?", variant="primary", elem_id="match")
        likely = gr.HTML("", elem_id="matches")
    with gr.Tab("Caption"):
        write = gr.Button("Write a caption", variant="primary", elem_id="write")
        written = gr.HTML("", elem_id="caption")

    def matched(path: str | None, lines: str) -> dict[Any, Any]:
        given = input_limits.lines_of(lines)
        return {likely: answers.matches(model, desk.open(path), given)}

    def captioned(path: str | None) -> dict[Any, Any]:
        return {written: answers.captioned(model, desk.open(path))}

    desk.on(button.click, matched, [desk.image, texts], [likely], {likely: ""})
    desk.on(write.click, captioned, [desk.image], [written], {written: ""})
    # Answers about another image must not stay.
    stale = {likely: "", written: ""}
    desk.image.change(lambda: stale, None, list(stale), api_visibility="private")
    return texts


def search_tab(desk: "Desk", searched: Searched, line: str | None, indexed: bool) -> None:
    """Images by a text, or by the image on the left."""
    with gr.Tab("Search"):
        if line is not None:
            gr.HTML(answers.problem(line))
        told = f"In {searched.told}."
        if not indexed:
            told += " For your own: `maskvlm index --from CHECKPOINT -c ...`, then `maskvlm demo`."
        gr.HTML(answers.note(told))
        query = gr.Textbox(searched.query, label="What to look for", max_length=input_limits.MAX_TEXT, elem_id="query")
        with gr.Row():
            by_text = gr.Button("Find by the text", variant="primary", elem_id="find")
            by_image = gr.Button("Find by the image", elem_id="find-like")
        found = gr.Gallery(
            [], label="The best first", columns=4, object_fit="contain", format="png", buttons=[],
            height="auto", elem_id="found",
        )  # fmt: skip

    def texted(text: str) -> dict[Any, Any]:
        return {found: [tuple(hit) for hit in searched.by_text(input_limits.checked_text(text))]}

    def imaged(path: str | None) -> dict[Any, Any]:
        return {found: [tuple(hit) for hit in searched.by_image(desk.open(path))]}

    for trigger in (by_text.click, query.submit):
        desk.on(trigger, texted, [query], [found], {found: []})
    desk.on(by_image.click, imaged, [desk.image], [found], {found: []})


def upload_image(**settings: Any) -> gr.Image:
    """An image that comes in as the path of its upload: nothing decodes it before `safe_open` does.

    Not a subclass: Gradio would write an interface file beside this one.
    """
    made = gr.Image(type="filepath", format="png", sources=["upload", "clipboard"], buttons=[], **settings)
    # On this one object: see the docstring.
    vars(made)["preprocess"] = lambda given: None if given is None else given.path
    return made


def digest(image: Any) -> str:
    """What an image shows, in short."""
    rgb = image.convert("RGB")
    return sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()


def task(desk: "Desk", run: Run) -> None:
    """A fine-tuned task; its model is loaded when the tab is first opened."""
    name = run.title.lower()
    with gr.Tab(run.title, elem_id=f"tab-{name}") as tab:
        told = gr.HTML(answers.note(f"{run.shown} is loaded when it is first asked ..."))
        places: list[gr.Column] = []
        more: list[Any] = []
        with gr.Row():
            # As many as the largest task may need; those of this one are shown when its model is known.
            for number in range(2, MOST_IMAGES + 1):
                with gr.Column(min_width=200, visible=False) as place:
                    more.append(upload_image(label=f"Image {number}", height=220, elem_id=f"{name}-image-{number}"))
                places.append(place)
        text = gr.Textbox("", label="Text", max_length=input_limits.MAX_TEXT, elem_id=f"{name}-text")
        with gr.Row():
            ask = gr.Button("Answer", variant="primary", elem_id=f"{name}-ask")
            another = gr.Button("Another example", elem_id=f"{name}-example")
        answer = gr.HTML("", elem_id=f"{name}-answer")
        truth = gr.State(("", ""))  # of an example, and the image that it belongs to
        started = gr.State(False)

    def shown(loaded: Loaded) -> dict[Any, Any]:
        if loaded.method.images > MOST_IMAGES:
            raise UserError(run.shown, f"takes {loaded.method.images} images", "Ask it in the shell")
        # The image on the left is the first; boxes beyond the task's number stay hidden.
        updates = {each: gr.update(visible=number < loaded.method.images) for number, each in enumerate(places, 1)}
        label, line = loaded.method.text.capitalize(), f"{run.shown}: {loaded.method.told}."
        return {told: answers.note(line), text: gr.update(label=label), **updates, started: True}

    def drawn(loaded: Loaded) -> dict[Any, Any]:
        if loaded.examples is None:
            return {another: gr.update(visible=False)}
        example = loaded.examples[random.randrange(min(len(loaded.examples), 500))]
        # The first image goes to the desk, the others to boxes of this tab.
        first, *others = [enlarged(open_image(each, "example")) for each in example["images"]]
        filled = dict(zip(more, others, strict=False))
        said = ", ".join(dict.fromkeys(example["answers"]))
        label = gr.update(value=example["text"], label=loaded.method.text.capitalize())
        return {desk.image: first, **filled, text: label, truth: (said, digest(first)), answer: ""}

    # The first click on the tab loads the model; later ones change nothing.
    def opening(begun: bool, own: bool) -> dict[Any, Any]:
        if begun:
            return {}
        loaded = desk.models.task(run)
        return {**shown(loaded), **(drawn(loaded) if own else {})}  # nobody's own image is taken away

    def exemplary() -> dict[Any, Any]:
        return drawn(desk.models.task(run))

    def answered(path: str | None, *others: Any) -> dict[Any, Any]:
        *paths, words, said = others
        loaded = desk.models.task(run)
        images = [desk.open(path)]
        # Boxes that are hidden may still hold images of an example before.
        images += [desk.open(each, f"image {n}") for n, each in enumerate(paths[: loaded.method.images - 1], 2)]
        example = (*images, input_limits.checked_text(words, loaded.method.text))
        with torch.no_grad():
            (found,) = loaded.method.run(loaded.model.task, loaded.model, [example])
        own = said[0] and said[1] == digest(images[0])  # other tabs change the image, too
        known = answers.note(f"The example's own answer: {said[0]}") if own else ""
        return {answer: answers.decided(found) + known}

    everything = [told, *places, *more, text, another, answer, truth, started, desk.image]
    desk.on(tab.select, opening, [started, desk.own], everything)
    desk.on(another.click, exemplary, [], [desk.image, *more, text, another, truth, answer])
    for trigger in (ask.click, text.submit):
        desk.on(trigger, answered, [desk.image, *more, text, truth], [answer], {answer: ""})
    for each in (text, *more):  # the example's answer is of the example alone
        each.input(lambda: ("", ""), None, truth, api_visibility="private")
    desk.image.change(lambda: "", None, answer, api_visibility="private")
