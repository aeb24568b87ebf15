"""The page of the review in a real browser, by keyboard and by mouse, with hostile texts."""

import re
import shutil
from collections.abc import Iterator

import httpx
import pytest

from distill.recipe import Recipe
from tests.models.openai_server import rationale
from tests.review.conftest import ANALYSIS, MARKUP, decisions

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is on PATH")

expect.set_options(timeout=30_000)  # milliseconds; a busy machine answers slowly


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, client: httpx.Client) -> Iterator[Page]:
    """The opened page; script errors, violations of its policy and requests to other hosts fail."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    errors, loaded = list[str](), list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda log: errors.append(log.text) if "Content Security Policy" in log.text else None)
    page.on("request", lambda request: loaded.append(request.url))
    page.goto(f"{client.base_url}/")
    expect(page.locator("#tags code")).to_have_text("plain")
    yield page
    context.close()
    assert not errors and all(url.startswith((str(client.base_url), "data:")) for url in loaded)


def at(page: Page, name: str) -> None:
    expect(page.locator("#tags code")).to_have_text(name)


def test_a_review_by_keyboard(page: Page, recipe: Recipe) -> None:
    page.keyboard.press("y")
    at(page, "other")
    expect(page.locator("#progress")).to_have_text("reviewed 1 of 6")
    expect(page.locator("#tags")).to_contain_text("disagreement")
    page.keyboard.press("3")  # positive, as the teacher predicted
    at(page, "../odd id?&#")
    expect(page.locator("#waiting")).to_have_text("· 1 change waits for distill run")
    page.keyboard.press("ArrowRight")
    at(page, "leaky")
    page.keyboard.press("k")
    at(page, "../odd id?&#")
    page.keyboard.press("d")
    at(page, "leaky")
    page.keyboard.press("Enter")  # kept although it leaks
    at(page, "broken")
    page.keyboard.press("r")
    page.keyboard.press("Enter")  # the first other label
    at(page, "last")
    expected = [
        ["plain", "keep", None], ["other", "relabel", "positive"], ["../odd id?&#", "drop", None],
        ["leaky", "edit", "positive"], ["broken", "relabel", "neutral"],
    ]  # fmt: skip
    assert decisions(recipe) == expected
    for name in ("broken", "leaky", "../odd id?&#"):
        page.keyboard.press("u")
        at(page, name)
        expected.append([name, "reset", None])
    expect(page.locator("#progress")).to_have_text("reviewed 2 of 6")
    assert decisions(recipe) == expected


def test_an_edit_is_checked_saved_and_taken_back(page: Page, recipe: Recipe) -> None:
    page.keyboard.press("e")
    draft = page.locator("#draft")
    expect(draft).to_have_value(re.compile('^"Text_analysis": '))
    expect(page.locator("#actions")).to_be_hidden()
    draft.fill("hello d y 3")  # keys of the page are letters here
    page.keyboard.press("Control+Enter")
    expect(page.locator("#invalid")).to_have_text("Text_analysis is missing.")
    draft.fill(rationale("neutral", ANALYSIS))
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#invalid")).to_have_text("The text predicts neutral, the label is positive.")
    assert decisions(recipe) == []
    page.locator("#draft-label").select_option("neutral")
    page.get_by_role("button", name="Save").click()
    at(page, "other")
    page.keyboard.press("ArrowLeft")
    at(page, "plain")
    expect(page.locator("#tags")).to_contain_text("edited")
    expect(page.locator("#fields dd").first).to_have_text(ANALYSIS)
    expect(page.locator("#labels .current")).to_contain_text("neutral")
    page.keyboard.press("y")  # the edited text is what is kept
    at(page, "other")
    assert decisions(recipe) == [["plain", "edit", "neutral"]]
    page.keyboard.press("u")
    at(page, "plain")
    expect(page.locator("#tags")).not_to_contain_text("edited")
    page.keyboard.press("e")
    page.keyboard.press("Escape")
    expect(page.locator("#editor")).to_be_hidden()
    assert decisions(recipe) == [["plain", "edit", "neutral"], ["plain", "reset", None]]


def test_an_edit_of_an_edit_is_undone_to_the_first(page: Page, recipe: Recipe) -> None:
    page.get_by_role("button", name=re.compile("^Drop")).click()
    at(page, "other")
    page.get_by_role("button", name="Previous").click()
    at(page, "plain")
    page.get_by_role("button", name=re.compile("^neutral")).click()
    at(page, "other")
    page.get_by_role("button", name=re.compile("^Undo")).click()
    at(page, "plain")
    expect(page.locator("#tags")).to_contain_text("dropped")
    page.get_by_role("button", name="Remove decision").click()
    expect(page.locator("#tags")).not_to_contain_text("dropped")
    at(page, "plain")
    assert [action for _, action, _ in decisions(recipe)] == ["drop", "relabel", "drop", "reset"]


def test_filters_and_search(page: Page) -> None:
    show = page.get_by_label("Show")
    show.select_option("quarantined")
    at(page, "leaky")
    expect(page.locator("#position")).to_have_text("1 of 2")
    expect(page.locator("#why")).to_have_text("leaks: says 'is labeled as'")
    page.get_by_label("Reason").select_option("malformed")
    at(page, "broken")
    expect(page.locator("#raw")).to_have_text(f"No fields. {MARKUP}")
    page.keyboard.press("y")
    expect(page.locator("#notice")).to_have_text("Text_analysis is missing.")
    page.get_by_label("Reason").select_option("")
    show.select_option("disagreement")
    at(page, "other")
    show.select_option("all")
    page.keyboard.press("/")
    page.keyboard.type("camera")
    at(page, "last")
    expect(page.locator("#aspect")).to_have_text("Aspect: the camera")
    expect(page.locator("#tags")).to_contain_text("not grounded")
    page.get_by_label("Search").fill("nothing has this")
    expect(page.locator("#empty")).to_be_visible()
    page.get_by_label("Search").fill("")
    page.keyboard.press("Enter")  # leaves the field
    at(page, "plain")
    page.keyboard.press("d")
    at(page, "other")
    show.select_option("undecided")
    expect(page.locator("#position")).to_contain_text("of 5")


def test_hostile_texts_are_shown_as_text(page: Page) -> None:
    expect(page.locator("#text")).to_have_text(f"hello {MARKUP}")
    expect(page.locator("#fields dd").first).to_have_text(ANALYSIS)
    assert page.locator("#text *, #fields dd *").count() == 0
    assert page.title() == "Review of micro"


def test_pictures_of_a_post_are_loaded(page: Page) -> None:
    page.keyboard.press("j")
    page.keyboard.press("j")
    at(page, "../odd id?&#")
    images = page.locator("#images img")
    expect(images).to_have_count(2)
    for image in images.all():
        expect(image).to_have_js_property("naturalWidth", 40)


def test_a_server_that_has_ended_is_named(page: Page) -> None:
    page.context.set_offline(True)
    page.keyboard.press("y")
    expect(page.locator("#notice")).to_have_text("The server cannot be reached.")
    at(page, "plain")
