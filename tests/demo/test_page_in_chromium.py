"""The page as somebody sees it who chooses, looks, reads on a telephone, listens, or has no mouse: in Chromium."""

import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("gradio") is None:
    pytest.skip("gradio is not installed (pip install -e .[demo])", allow_module_level=True)

from live_page import CHROMIUM, FLAGS, GOOD, Live, encoded, live, noise
from toy_pretrained import saved

from maskvlm.demo import answers
from maskvlm.utils.errors import UserError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="needs playwright (pip install -e .[test])"),
]
TABS = ["Words", "Patches", "Match", "Caption", "Search", "NLVR", "VQA"]
DESK, TELEPHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
ANSWERS = ("#words", "#board", "#left", "#matches", "#caption", "#found", "#vqa-answer")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Two runs of pre-training and two of tasks, none of them named."""
    folder = tmp_path_factory.mktemp("runs")
    for name, kind in (("first", "pretrain"), ("second", "pretrain"), ("asked", "vqa"), ("compared", "nlvr")):
        saved(folder / name / "best.ckpt", kind)
    for name, score in (("first", 20), ("second", 10)):
        (folder / name / "metrics.json").write_text(f'{{"score": {score}, "retrieval/pictures": 500}}')
    with live(tmp_path_factory.mktemp("page"), folder) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield opened
        opened.close()


@pytest.fixture
def opened(page: Live, browser: Any) -> Iterator[Any]:
    """Opens the page; `opened(viewport, scheme)` gives a tab of the browser."""
    tabs: list[Any] = []

    def start(viewport: dict[str, int] = DESK, scheme: str = "light") -> Any:
        tab = browser.new_page(viewport=viewport, color_scheme=scheme)
        tabs.append(tab)
        tab.goto(page.base)
        tab.wait_for_selector("#words .side")
        return tab

    yield start
    for each in tabs:
        each.close()


def go(tab: Any, name: str) -> None:
    tab.get_by_role("tab", name=name, exact=True).click()


def box(tab: Any, selector: str) -> dict[str, float]:
    bounds: dict[str, float] = tab.locator(selector).first.bounding_box()
    return bounds


def answer_texts(tab: Any) -> dict[str, str]:
    """What each answer says to who looks, hidden ones by their text alone; left out where it is empty."""
    script = "each => { const e = document.querySelector(each + ' .prose'); return e ? e.innerHTML : '' }"
    return {each: html for each in ANSWERS if (html := tab.evaluate(script, each))}


def answer_all(tab: Any) -> None:
    """Ask every tab about the image that is there."""
    go(tab, "Patches")
    tab.wait_for_selector("#board button")
    go(tab, "Match")
    tab.click("#match")
    tab.wait_for_selector("#matches tr")
    go(tab, "Caption")
    tab.click("#write")
    tab.wait_for_selector("#caption p")
    go(tab, "Search")
    tab.click("#find-like")
    tab.wait_for_selector("#found li")
    go(tab, "VQA")
    tab.wait_for_function("document.querySelector('#tab-vqa .note').innerText.includes('question')")
    tab.fill("#vqa-text textarea", "what colour is it")
    tab.click("#vqa-ask")
    tab.wait_for_selector("#vqa-answer .answer")


# ---------------------------------------------------------------------- who listens, and who sees little


@pytest.mark.parametrize(
    ("viewport", "scheme"), [(DESK, "light"), (DESK, "dark"), (TELEPHONE, "light"), (TELEPHONE, "dark")]
)
def test_axe_finds_nothing_serious(opened: Any, viewport: dict[str, int], scheme: str) -> None:
    """On every tab, with answers. It checks contrast (4.5:1), names, alternative texts, roles and more."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    tab, violations = opened(viewport, scheme), list[str]()
    answer_all(tab)
    for name in [*TABS, "chooser"]:
        if name == "chooser":
            tab.click("#run input")
            tab.wait_for_selector("[role=option]")
        else:
            go(tab, name)
        tab.wait_for_timeout(250)  # colours change in steps
        for each in axe.run(tab).response["violations"]:
            if each["impact"] in ("serious", "critical"):
                violations += [f"{name}: {each['id']}: {node['html'][:150]}" for node in each["nodes"]]
    assert violations == []


def test_buttons_and_images_have_names(opened: Any) -> None:
    tab = opened()
    answer_all(tab)
    for name in TABS:
        go(tab, name)
        tab.wait_for_timeout(100)
        snapshot = tab.locator("body").aria_snapshot()
        assert not [line for line in snapshot.splitlines() if line.strip() in ("- button", "- textbox")], name
        images = "[...document.images].filter(e => e.checkVisibility() && !e.alt && !e.closest('button[aria-label]'))"
        assert tab.evaluate(f"{images}.map(e => e.outerHTML.slice(0, 80))") == [], name
    assert tab.locator("#image img").get_attribute("alt") == "The image that is asked about"
    assert tab.locator("#examples button").nth(1).get_attribute("aria-label").startswith("Example 2: a ")
    assert "from: " in tab.locator("#left img").get_attribute("alt")


# ---------------------------------------------------------------------- which run


def test_the_chooser_has_the_best_first_and_another_run_answers(opened: Any) -> None:
    tab = opened()
    assert [each.inner_text() for each in tab.get_by_role("tab").all()] == TABS
    first = tab.locator("#run input").input_value()
    assert first.startswith("first: step 7, score 20.0, drawn scenes of the built-in world")
    answer_all(tab)
    tab.click("#run input")
    tab.get_by_role("option").nth(1).click()
    tab.wait_for_function("document.querySelector('#about').innerText.startsWith('second/best.ckpt')")
    assert tab.locator("#run input").input_value().startswith("second: step 7, score 10.0, ")
    assert "score 10.0, trained on drawn scenes" in tab.locator("#about").inner_text()
    tab.wait_for_function("!document.querySelector('#tabs.old')")
    assert answer_texts(tab).keys() == {"#words", "#board", "#left"}  # nothing else that the other one said


def test_another_run_leaves_what_somebody_wrote(opened: Any) -> None:
    """And takes an example's text for that of its own, where nobody has written."""
    tab = opened()
    tab.fill("#text textarea", "a green ring somewhere")
    tab.press("#text textarea", "Tab")
    tab.wait_for_function("[...document.querySelectorAll('#chips label')].some(x => x.innerText.includes('somewhere'))")
    tab.click("#run input")
    tab.get_by_role("option").nth(1).click()
    tab.wait_for_function("document.querySelector('#about').innerText.startsWith('second/best.ckpt')")
    tab.wait_for_function("!document.querySelector('#tabs.old')")
    assert tab.locator("#text textarea").input_value() == "a green ring somewhere"


# ---------------------------------------------------------------------- old answers


def test_no_old_answer_beside_a_new_image(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that was on its way when the image changed, and not for a frame."""
    tab = opened()
    answer_all(tab)
    go(tab, "Caption")
    real = answers.captioned

    def slow(*arguments: Any) -> str:
        time.sleep(1.0)
        return real(*arguments)

    monkeypatch.setattr(answers, "captioned", slow)
    tab.evaluate(
        """() => { window.seen = []; const look = () => {  // what each frame shows
          const old = document.querySelector("#caption .answer"), image = document.querySelector("#image img");
          if (old && image && !image.src.startsWith("data:") && getComputedStyle(old).visibility == "visible")
            seen.push(1);
          requestAnimationFrame(look);
        }; look(); }"""
    )
    tab.click("#write")
    tab.wait_for_timeout(200)
    words = answer_texts(tab)["#words"]
    file = {"name": "b.png", "mimeType": "image/png", "buffer": encoded(noise(3))}
    tab.locator("#image input[type=file]").set_input_files(file)
    tab.wait_for_function("!document.querySelector('#image img')?.src.startsWith('data:')")
    tab.wait_for_function(
        """html => { const now = document.querySelector("#words .prose").innerHTML;
          return now && now != html && !document.querySelector("#tabs.old"); }""",
        arg=words,
    )
    tab.wait_for_timeout(300)
    assert answer_texts(tab).keys() == {"#words", "#board", "#left"}
    assert answer_texts(tab)["#words"] != words
    assert tab.evaluate("seen") == []


def test_no_old_answer_beside_an_error_and_none_without_an_image(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tab = opened()
    answer_all(tab)
    tab.locator("#image input[type=file]").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": GOOD[: len(GOOD) // 2]}
    )
    tab.wait_for_function("document.querySelector('#status').innerText.includes('truncated')")
    assert answer_texts(tab).keys() == set()
    tab.get_by_role("button", name="Remove Image").click()
    tab.wait_for_function("document.querySelector('#words .side') && !document.querySelector('#status p')")
    assert answer_texts(tab).keys() == {"#words"}  # guessed without an image
    go(tab, "Match")
    tab.locator("#examples button").first.click()
    tab.wait_for_selector("#image img[src^='data:']")
    tab.click("#match")
    tab.wait_for_selector("#matches tr")

    def refuse(*_: Any) -> str:
        raise UserError("texts", "are wrong", "Write others")

    monkeypatch.setattr(answers, "matches", refuse)
    tab.click("#match")
    tab.wait_for_selector("#status p")
    assert "#matches" not in answer_texts(tab)


def test_the_text_changes_with_the_example(opened: Any) -> None:
    tab = opened()
    answer_all(tab)
    before, text = answer_texts(tab), tab.locator("#text textarea").input_value()
    tab.locator("#examples button").nth(2).click()
    tab.wait_for_function("text => document.querySelector('#text textarea').value != text", arg=text)
    text = tab.locator("#text textarea").input_value()
    label = tab.locator("#examples button").nth(2).get_attribute("aria-label")
    assert label == f"Example 3: {text}"
    tab.wait_for_function("html => document.querySelector('#words .prose').innerHTML != html", arg=before["#words"])
    after = answer_texts(tab)
    assert after.keys() == {"#words", "#board", "#left"}
    assert not [each for each in after if after[each] == before[each]]
    go(tab, "Words")
    assert "".join(tab.locator("#chips label").all_inner_texts()) == text.replace(" ", "").replace(",", "")
    go(tab, "Match")
    assert tab.locator("#texts textarea").input_value().splitlines()[0] == text


# ---------------------------------------------------------------------- where things stand


@pytest.mark.parametrize("viewport", [DESK, TELEPHONE])
def test_nothing_jumps_between_tabs(opened: Any, viewport: dict[str, int]) -> None:
    tab = opened(viewport)
    tab.evaluate("document.querySelector('#tabs').scrollIntoView()")
    for name in TABS:
        go(tab, name)
        tab.wait_for_timeout(100)
        place = tab.evaluate("(e => [e.top, e.left, e.width])(document.querySelector('#tabs').getBoundingClientRect())")
        if name == "Words":
            first = place
        assert place == first


def test_a_telephone_shows_tabs_and_answer_first(opened: Any) -> None:
    tab = opened(TELEPHONE)
    assert tab.evaluate("scrollY") == 0
    places = [box(tab, each)["y"] for each in ("#run", "#image", "[role=tablist]", "#words", "#text", "#examples")]
    assert places == sorted(places)
    (bars,) = [box(tab, "#words table.bars")]
    assert bars["y"] + 60 < TELEPHONE["height"]  # some of the answer, above the fold
    assert len([each for each in tab.get_by_role("tab").all() if each.is_visible()]) == len(TABS)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_captions_are_not_clipped(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskvlm.demo.samples import Hit, Searched

    long = "a very long caption of a scene with many things in it, " * 6 + "x" * 80
    monkeypatch.setattr(Searched, "by_text", lambda *_: [Hit(noise(), long)] * 3)
    for viewport in (DESK, TELEPHONE):
        tab = opened(viewport)
        go(tab, "Search")
        tab.click("#find")
        tab.wait_for_selector("#found figcaption")
        assert tab.locator("#found figcaption").first.inner_text() == long
        clipped = "[...document.querySelectorAll('#found figcaption')].map(e => e.scrollWidth > e.clientWidth)"
        assert tab.evaluate(clipped) == [False] * 3
        assert box(tab, "#found figcaption")["height"] > 100
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


# ---------------------------------------------------------------------- who has no mouse


def test_the_keyboard_turns_patches_and_opens_tabs(opened: Any) -> None:
    tab = opened()
    tab.get_by_role("tab", name="Words").focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#board button", state="visible")
    assert tab.evaluate("document.activeElement.innerText") == "Patches"
    tab.keyboard.press("End")
    assert tab.evaluate("document.activeElement.innerText") == TABS[-1]
    tab.focus("#other textarea")
    tab.keyboard.press("Tab")
    where = "document.activeElement.getAttribute('aria-label')"
    assert tab.evaluate(where) == "Row 1, column 1"  # the board is one stop of the Tab key
    for key, place in (("ArrowRight", "1, column 2"), ("ArrowDown", "2, column 2"), ("ArrowUp", "1, column 2")):
        tab.keyboard.press(key)
        assert tab.evaluate(where) == f"Row {place}"
    before = tab.evaluate("document.activeElement.getAttribute('aria-pressed')")
    other = {"true": "false", "false": "true"}[before]
    tab.keyboard.press("Space")
    tab.wait_for_function(f"document.activeElement.getAttribute('aria-pressed') == '{other}'")
    assert tab.evaluate(where) == "Row 1, column 2"  # where it was, though the board is another
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "lot"


# ---------------------------------------------------------------------- the page's own images


def test_own_images_come_from_memory(page: Live, opened: Any) -> None:
    """No file is written for them, so none can be gone, and none counts against the room for uploads."""
    before, urls = set(page.folder.rglob("*")), list[str]()
    tab = opened()
    tab.on("request", lambda request: urls.append(request.url))
    answer_all(tab)
    tab.locator("#examples button").nth(1).click()
    tab.wait_for_timeout(500)
    go(tab, "Patches")
    tab.click("#uncover")
    tab.wait_for_function("!document.querySelector('#left img')")
    script = "[...document.images].filter(e => !e.src.startsWith('data:') || !e.complete || !e.naturalWidth).length"
    assert tab.evaluate(script) == 0
    assert not [url for url in urls if "file=" in url]
    assert {path for path in page.folder.rglob("*") if path.is_file()} <= before
