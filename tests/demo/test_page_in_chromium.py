"""The page as somebody sees it who chooses, looks, reads on a telephone, listens, or has no mouse: in Chromium."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("gradio") is None:
    pytest.skip("gradio is not installed (pip install -e .[demo])", allow_module_level=True)

from live_page import IN_CHROMIUM, Live, chromium, live
from toy_pretrained import saved

pytestmark = IN_CHROMIUM
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
    with chromium() as opened:
        yield opened


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


@pytest.mark.parametrize(("viewport", "scheme"), [(DESK, "light"), (TELEPHONE, "dark")])
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


def test_a_telephone_shows_tabs_and_answer_first(opened: Any) -> None:
    tab = opened(TELEPHONE)
    assert tab.evaluate("scrollY") == 0
    places = [box(tab, each)["y"] for each in ("#run", "#image", "[role=tablist]", "#words", "#text", "#examples")]
    assert places == sorted(places)
    (bars,) = [box(tab, "#words table.bars")]
    assert bars["y"] + 60 < TELEPHONE["height"]  # some of the answer, above the fold
    assert len([each for each in tab.get_by_role("tab").all() if each.is_visible()]) == len(TABS)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


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
