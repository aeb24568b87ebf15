"""The report in a real browser: the interactive deferral curve, and the links between decisions and posts."""

from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Browser, Locator, Page, expect

from tests import report_pages
from tests.report_pages import HOSTILE, cascade, decision, deferral_rows, post

HINT = "Point at a curve"

expect.set_options(timeout=30_000)  # milliseconds; a busy machine answers slowly


def write(folder: Path, policies: tuple[str, ...] = ("entropy", "random")) -> str:
    """Write a report with one listed decision; returns its address."""
    wrong = decision(30, id=HOSTILE)
    posts = [post(index=index, id=f"t{index}", decision=decision(index)) for index in range(30)]
    report_pages.page(
        folder,
        cascade=cascade(currency=2.0, deferral=deferral_rows(policies, currency="2.0")),
        gallery=[*posts, post(index=30, id=HOSTILE, text=HOSTILE, decision=wrong)],
        decisions=[{"title": "Wrong answers of the cascade", "total": 1, "rows": [wrong]}],
    )
    return (folder / "report.html").as_uri()


@pytest.fixture
def opened(page: Page, tmp_path: Path) -> Page:
    """The report; requests for other files fail the test."""
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url))
    page.goto(write(tmp_path))
    assert all(url.startswith(("file:", "data:")) for url in loaded)
    return page


def picked(page: Page) -> Locator:
    return page.locator(".readout .picked")


def hover(page: Page, chart: int, share: float, height: float) -> None:
    """Move the pointer over a chart: share of the x axis from the left, and of the y axis from the bottom."""
    page.locator(".deferral svg").nth(chart).scroll_into_view_if_needed()
    box = page.locator(".deferral svg").nth(chart).bounding_box()
    assert box is not None
    scale = box["width"] / 440  # units of the SVG, whose axes are from 44 to 430 and from 192 to 10
    page.mouse.move(box["x"] + (44 + 386 * share) * scale, box["y"] + (192 - 182 * height) * scale)


def test_the_point_under_the_pointer_is_read_out(opened: Page) -> None:
    expect(opened.locator(".readout tbody tr").first).to_contain_text("this cascade0.3000.950–0.410.8")
    hover(opened, 0, 1.0, 1.0)
    expect(picked(opened)).to_have_text("entropy (in use)1.0001.0000.700 to 1.0001.012")
    hover(opened, 2, 0.0, 0.0)  # in the chart of the price
    expect(picked(opened)).to_contain_text("0.0000.800")
    assert opened.locator(".deferral .cursor").count() == 3
    for cursor in opened.locator(".deferral .cursor").all():
        expect(cursor).to_be_visible()
        expect(cursor).to_have_attribute("class", "cursor s0")


def test_keys_change_the_share_and_the_policy(opened: Page) -> None:
    chart = opened.locator(".deferral svg").first
    chart.focus()
    opened.keyboard.press("End")
    expect(chart).to_have_attribute("aria-valuenow", "1")
    opened.keyboard.press("ArrowLeft")
    expect(chart).to_have_attribute(
        "aria-valuetext",
        "policy entropy (in use), deferred 0.500, accuracy 0.900, 95% interval 0.700 to 1.000, seconds per post 0.51, "
        "currency per post 1",
    )
    opened.keyboard.press("ArrowDown")
    expect(picked(opened)).to_contain_text("random0.500")
    opened.keyboard.press("ArrowDown")
    expect(picked(opened)).to_contain_text("entropy")
    for _ in range(4):
        opened.keyboard.press("ArrowLeft")
    expect(picked(opened)).to_contain_text("entropy (in use)0.000")


def test_policies_are_hidden_and_shown(opened: Page) -> None:
    lines = opened.locator(".deferral svg").first.locator("polyline")
    entropy, random = (opened.get_by_label(name) for name in ("entropy (in use)", "random"))
    entropy.uncheck()
    expect(lines.nth(0)).to_be_hidden()
    expect(lines.nth(1)).to_be_visible()
    expect(opened.locator(".deferral .band")).to_be_hidden()
    expect(picked(opened)).to_contain_text("random")
    hover(opened, 0, 1.0, 1.0)
    expect(picked(opened)).to_contain_text("random1.000")  # the hidden curve is not picked
    random.uncheck()
    expect(picked(opened)).to_have_text("no policy is shown")
    entropy.check()
    expect(lines.nth(0)).to_be_visible()
    expect(picked(opened)).to_contain_text("entropy (in use)1.000")


def test_a_decision_leads_to_its_post_and_back(opened: Page) -> None:
    card = opened.locator("#post-30")
    expect(card).not_to_be_in_viewport()
    opened.get_by_role("link", name=HOSTILE).click()
    expect(card).to_be_in_viewport()
    expect(card).to_contain_text(HOSTILE)
    card.get_by_role("link", name="decision").click()
    expect(opened.locator("#decision-30")).to_be_in_viewport()
    assert opened.locator("img, article b").count() == 0


def test_names_of_policies_are_shown_as_text(page: Page, tmp_path: Path) -> None:
    page.goto(write(tmp_path, (HOSTILE, "entropy")))
    page.get_by_label("entropy (in use)").uncheck()
    expect(picked(page)).to_contain_text(HOSTILE.replace("_", " "))
    assert page.locator("img").count() == 0 and page.title() == "quickstart"


def test_without_scripts_the_curves_are_a_picture(browser: Browser, tmp_path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(write(tmp_path))
    expect(page.locator(".deferral polyline").first).to_be_visible()
    expect(page.locator(".deferral .marker").first).to_be_visible()
    expect(page.locator(".readout")).to_contain_text("this cascade")
    for part in (picked(page), page.get_by_text(HINT), page.locator(".deferral input").first):
        expect(part).to_be_hidden()
    context.close()
