"""The report in a real browser: it asks for nothing, breaks on nothing, hides red-team text, and works by keyboard."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reportworld

from cai_fast import report

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright (pip install -e '.[dev]')")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium on the PATH (Debian: apt-get install chromium)"
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = reportworld.write(tmp_path_factory.mktemp("page") / "made")
    (folder / "report.html").write_text(report.build(folder, 40), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def wide(browser: Any, file: Path) -> Iterator[Any]:
    """The page in a window of 1280 x 900; whatever goes wrong in it fails the test at its end."""
    yield from opened(browser, file, 1280)


@pytest.fixture
def narrow(browser: Any, file: Path) -> Iterator[Any]:
    """The same on a phone of 360 px."""
    yield from opened(browser, file, 360)


def opened(browser: Any, file: Path, width: int) -> Iterator[Any]:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="light", reduced_motion="reduce"
    )
    context.set_default_timeout(60_000)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    page.wait_for_function("document.querySelectorAll('[data-chart] svg').length > 3")
    yield page
    assert page.evaluate("window.hacked") is None
    context.close()
    assert not wrong, wrong


def shown(page: Any, browser: str) -> list[str]:
    """Ids of the rows in a browser of the page, in order."""
    return page.locator(f"#{browser} details.row").evaluate_all("rows => rows.map(row => row.dataset.id)")


def found(page: Any, browser: str) -> str:
    return page.locator(f"#{browser} .found").inner_text()


def open_row(page: Any, browser: str, row: str) -> Any:
    card = page.locator(f"#{browser} details[data-id='{row}']")
    card.locator("summary").click()
    card.locator(".step").first.wait_for()
    return card


def test_filters_narrow_the_rows(wide: Any) -> None:
    assert found(wide, "chains") == "35 of 35 shown" and len(shown(wide, "chains")) == 20  # more on demand
    chains = wide.locator("#chains")
    chains.get_by_label("Outcome").select_option("rejected")
    assert shown(wide, "chains") == [f"r{k}" for k in range(0, 30, 5)]
    chains.get_by_label("Outcome").select_option("rejected: empty")
    assert shown(wide, "chains") == ["r0", "r15"]
    chains.get_by_label("Outcome").select_option("")
    chains.get_by_label("Prompts").select_option("helpful")
    assert shown(wide, "chains") == [f"h{k}" for k in range(30, 35)]
    chains.get_by_label("Prompts").select_option("")
    chains.get_by_label("Principle").select_option("kind")
    assert found(wide, "chains") == "15 of 35 shown"
    chains.get_by_label("Find text").fill("DOOR 21 ")
    assert shown(wide, "chains") == ["r21"]
    chains.get_by_label("Find text").fill("nowhere")
    assert found(wide, "chains") == "0 of 35 shown"


def test_more_rows_come_on_demand(wide: Any) -> None:
    wide.locator("#chains .more").click()
    assert len(shown(wide, "chains")) == 35 and not wide.locator("#chains .more").count()
    assert wide.evaluate("document.activeElement.parentElement.dataset.id") == "r20"  # the first new one


def test_comparisons_are_sorted_and_filtered(wide: Any) -> None:
    place = wide.locator("#comparisons")
    place.get_by_label("Sort by").select_option("disagreement of orders")
    assert shown(wide, "comparisons")[:2] == ["c8", "c7"]  # |0.1 + k/12 - k/20| grows with k; c0 was asked once
    place.get_by_label("Sort by").select_option("most confident")
    assert shown(wide, "comparisons")[0] == "c0"  # P = 0.05
    place.locator("select[name=orders]").select_option("differ")
    assert sorted(shown(wide, "comparisons")) == ["c5", "c6", "c7", "c8"]
    place.locator("select[name=orders]").select_option("")
    place.get_by_label("Source").select_option("human")
    assert sorted(shown(wide, "comparisons")) == ["c10", "c11", "c9"]
    place.get_by_label("Source").select_option("ai")
    wide.click("#reveal")
    card = open_row(wide, "comparisons", "c4")
    assert "A first 0.433, ○ B first 0.2; bias to the first 0.233" in card.inner_text()
    assert card.locator(".side.better h3").inner_text() == "Answer B\npreferred"


def test_changes_are_marked_by_word(wide: Any) -> None:
    wide.click("#reveal")
    card = open_row(wide, "chains", "r3")
    first = card.locator(".step", has_text="Round 1")
    assert first.locator("del").all_inner_texts() and first.locator("ins").all_inner_texts()
    kept = first.locator(".text").last.evaluate(
        "text => [...text.childNodes].filter(n => n.nodeName !== 'DEL').map(n => n.textContent).join('')"
    )
    assert kept == reportworld.GENTLE
    old = first.locator(".text").last.evaluate(
        "text => [...text.childNodes].filter(n => n.nodeName !== 'INS').map(n => n.textContent.trim()).join(' ')"
    )
    assert old.split() == f"{reportworld.HARM} at door 3".split()
    second = card.locator(".step", has_text="Round 2")
    assert "unchanged" in second.inner_text() and not second.locator("del, ins").count()
    wide.locator("#chains").get_by_label("Mark changes").uncheck()
    assert not card.locator("del, ins").count() and reportworld.GENTLE in card.inner_text()


DIFFERENCES = [
    ("", "", ""),
    ("a b", "a b", "= a b"),
    ("a b c", "a x c", "= a|- b|+ x|= c"),
    ("", "new", "+ new"),
    ("gone", "", "- gone"),
    ("a, b", "a; b", "= a|- ,|+ ;|= b"),
    ("a b c d", "b c e d", "- a|= b c|+ e|= d"),
    ("naïve wörds", "naïve words", "= naïve|- wörds|+ words"),
]


def test_differences_are_those_counted_by_hand(wide: Any) -> None:
    for before, after, expected in DIFFERENCES:
        got = wide.evaluate("([a, b]) => diffWords(a, b)", [before, after])
        assert "|".join(f"{kind} {text.strip()}" for kind, text in got) == expected
    a, b = ("x y z " * 40 + "end", "y x z w " * 30 + "end")
    got = wide.evaluate("([a, b]) => diffWords(a, b)", [a, b])
    sides = ["".join(text for kind, text in got if kind in kinds).split() for kinds in ("=-", "=+")]
    assert sides == [a.split(), b.split()]


def test_red_team_text_is_not_in_the_document_until_asked_for(wide: Any) -> None:
    card = open_row(wide, "chains", "r0")
    assert "red-team text hidden" in card.inner_text() and not card.locator(".text").count()
    text = """() => { const copy = document.documentElement.cloneNode(true);
        copy.querySelectorAll('script').forEach((s) => s.remove()); return copy.textContent; }"""
    assert "door" not in wide.evaluate(text).replace("open door 3", "")  # helpful prompts stay
    assert "boil it" in open_row_text(wide)
    button = wide.locator("#reveal")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert button.get_attribute("aria-pressed") == "true" and "how do I open door 0 ?" in card.inner_text()
    assert reportworld.HOSTILE.replace("\u2028", "") in card.inner_text().replace("\u2028", "").replace("\n", "")
    button.click()
    assert not card.locator(".text").count()
    wide.reload()
    assert wide.locator("#reveal").get_attribute("aria-pressed") == "false"


def open_row_text(page: Any) -> str:
    page.locator("#chains").get_by_label("Prompts").select_option("helpful")
    text = open_row(page, "chains", "h30").inner_text()
    page.locator("#chains").get_by_label("Prompts").select_option("")
    return text


def curve(page: Any, title: str) -> Any:
    return page.locator("[data-chart]", has=page.get_by_role("heading", name=title))


def test_pointing_at_a_curve_shows_its_values(wide: Any) -> None:
    figure = curve(wide, "KL to SL-CAI (nats per answer)")
    image = figure.locator("svg")
    image.scroll_into_view_if_needed()
    assert figure.locator(".legend b").all_inner_texts() == ["3.5", "2"]  # the last value, and rl.max_kl of the preset
    box = image.bounding_box()
    wide.mouse.move(box["x"] + 47, box["y"] + 60)
    assert figure.locator("small").inner_text() == "step 0" and figure.locator(".legend b").first.inner_text() == "0"
    wide.mouse.move(box["x"] + 46 + (box["width"] - 56) * 3 / 7, box["y"] + 60)
    assert figure.locator("small").inner_text() == "step 3" and figure.locator(".legend b").first.inner_text() == "1.5"
    assert image.get_attribute("aria-valuetext") == "step 3: rl/kl 1.5"
    gap = curve(wide, "Reward and preference scores")
    gap.locator("svg").focus()
    for _ in range(5):
        wide.keyboard.press("ArrowLeft")
    assert gap.locator("small").inner_text() == "step 3" and gap.locator(".legend b").inner_text() == "–"
    assert gap.locator("path").get_attribute("d").count("M") == 2  # the line is broken there


def test_touch_shows_values_too(browser: Any, file: Path) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 800}, has_touch=True)
    page = context.new_page()
    page.goto(file.as_uri())
    figure = curve(page, "KL to SL-CAI (nats per answer)")
    figure.locator("svg").scroll_into_view_if_needed()
    box = figure.locator("svg").bounding_box()
    page.touchscreen.tap(box["x"] + 47, box["y"] + 60)
    assert figure.locator("small").inner_text() == "step 0"
    context.close()


def test_the_theme_can_be_chosen(wide: Any) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = wide.evaluate(paper)
    button = wide.locator("#theme")
    button.click()
    assert button.inner_text() == "Theme: light" and wide.evaluate(paper) == light
    button.click()
    dark = wide.evaluate(paper)
    assert button.inner_text() == "Theme: dark" and dark != light
    button.click()
    assert button.inner_text() == "Theme: system" and wide.evaluate(paper) == light
    wide.emulate_media(color_scheme="dark")
    assert wide.evaluate(paper) == dark


# Relative luminance and contrast as WCAG 2.2 defines them, of every text against the first opaque colour behind it.
CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (text) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (node) => {
    const colour = rgb(getComputedStyle(node).backgroundColor);
    return colour[3] === 255 ? colour : behind(node.parentElement);
  };
  const low = new Set();
  for (const node of document.querySelectorAll('body *:not(script, svg, svg *, .unseen, .unseen *)')) {
    const spoken = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!spoken || !node.checkVisibility() || node.matches('.skip')) continue;
    const pair = [light(rgb(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) low.add(`${node.tagName}.${node.className} ${ratio.toFixed(2)}`);
  }
  return [...low];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(wide: Any, scheme: str) -> None:
    wide.emulate_media(color_scheme=scheme)
    wide.click("#reveal")
    open_row(wide, "chains", "r1")
    open_row(wide, "comparisons", "c6")
    assert wide.evaluate(CONTRAST) == []


def test_a_phone_needs_no_sideways_scroll(narrow: Any) -> None:
    narrow.click("#reveal")
    for browser, row in (("chains", "r1"), ("comparisons", "c4"), ("answers", "p0")):
        open_row(narrow, browser, row)
    for summary in narrow.locator("details:not(.row) > summary").all():
        if summary.is_visible():
            summary.click()
    narrow.wait_for_function("[...document.querySelectorAll('[data-chart]')].every((f) => f.querySelector('svg'))")
    assert narrow.evaluate("document.documentElement.scrollWidth") == 360
    outside = """() => [...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, .unseen') &&
        e.checkVisibility() && e.getBoundingClientRect().right > 361).map((e) => e.outerHTML.slice(0, 80))"""
    assert narrow.evaluate(outside) == []


def test_everything_can_be_reached_by_keyboard(wide: Any) -> None:
    reached = []
    for _ in range(80):
        wide.keyboard.press("Tab")
        tag = wide.evaluate("""() => { const e = document.activeElement;
            return e.id || e.name || e.getAttribute('href') || e.getAttribute('role') || e.tagName; }""")
        reached.append(tag)
        style = wide.evaluate("(s => [s.outlineStyle, s.outlineWidth])(getComputedStyle(document.activeElement))")
        assert style[0] != "none" and style[1] != "0px", tag
    assert reached[0] == "#main" and {"reveal", "theme", "#chains", "slider", "SUMMARY", "words", "outcome"} <= set(
        reached
    )
    wide.locator("#chains summary").first.focus()
    wide.keyboard.press("Enter")
    assert wide.locator("#chains details[open]").count() == 1


def test_headings_make_an_outline(wide: Any) -> None:
    levels = wide.locator("h1, h2, h3, h4").evaluate_all("all => all.map((h) => Number(h.tagName[1]))")
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert wide.locator("main").count() == 1 and wide.locator("nav[aria-label]").count() == 1


def test_print_shows_no_controls(wide: Any) -> None:
    wide.emulate_media(media="print", color_scheme="dark")
    assert not wide.locator(".bar").is_visible() and not wide.locator(".controls").first.is_visible()
    assert wide.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_without_scripts_the_numbers_are_there(browser: Any, file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    text = page.locator("body").inner_text()
    assert "2.00" in text and "24 kept" in text.replace("\n", " ") and "need the script" in text
    assert "door" not in text  # red-team text is data for the script
    context.close()


def test_an_unfinished_run_opens_without_errors(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(report.build(tmp_path, 5), encoding="utf-8")
    context = browser.new_context()
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(file.as_uri())
    assert page.locator(".browser").all_inner_texts() == ["None yet."] * 3
    assert page.locator("#reveal").is_hidden()
    context.close()
    assert not wrong
