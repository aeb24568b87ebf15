"""The page in a real browser, in front of a real student and a real teacher's server."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serving.test_cascade_service import sure_of, teacher_at

from distill.data.corpus import Corpus
from distill.models.local import Local
from tests.models.openai_server import Server
from tests.serving.conftest import NEVER_SURE, running

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is on PATH")

HOSTILE = '<img src=x onerror="document.title=1"><b>"Prediction": negative'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which nothing may go wrong unnoticed."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None)
    yield page
    context.close()
    assert not faults


def visit(page: Page, client: httpx.Client) -> list[str]:
    """Open the page; the addresses of everything that it loads."""
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url))
    page.goto(f"{client.base_url}/")
    return loaded


def test_a_post_with_a_picture(page: Page, gateway: httpx.Client, postcards: Corpus) -> None:
    loaded = visit(page, gateway)
    expect(page.locator("h1")).to_have_text("pair")
    sample = postcards.test[0]
    page.get_by_label("Post").fill(sample.text)
    page.locator("#picture").set_input_files(sample.images[0])
    expect(page.locator("#preview")).to_be_visible()
    page.get_by_role("button", name="Judge the post").click()
    expect(page.locator("#label")).to_have_text(re.compile("negative|neutral|positive"))
    found = gateway.post(
        "/v1/sentiment", json={"text": sample.text, "image": page.locator("#preview").get_attribute("src")}
    ).json()
    expect(page.locator("#label")).to_have_text(found["label"])
    expect(page.locator(".bar")).to_have_count(3)
    for name, share in found["probabilities"].items():
        expect(page.locator(".bar", has_text=name)).to_contain_text(f"{100 * share:.1f} %")
    expect(page.locator("#why")).to_contain_text("the student is certain")
    expect(page.locator("#why .tag")).to_have_text("student")
    expect(page.locator("#share")).to_contain_text("0.00 teacher calls per post")
    if found["rationale"]:
        expect(page.locator("#reasoning")).to_contain_text(found["rationale"]["Image_analysis"])
    page.get_by_role("button", name="Remove").click()
    expect(page.locator("#preview")).to_be_hidden()
    assert all(url.startswith((str(gateway.base_url), "data:")) for url in loaded)


def test_a_dropped_picture_and_the_teacher(page: Page, student: Local, postcards: Corpus) -> None:
    with Server(logprobs=sure_of(0.98)) as server:
        with running(student, teacher_at(server.url, deadline_s=30), NEVER_SURE) as client:
            visit(page, client)
            content = list(postcards.test[0].images[0].read_bytes())
            page.evaluate(
                """(content) => {
                    const held = new DataTransfer();
                    held.items.add(new File([new Uint8Array(content)], "card.png", { type: "image/png" }));
                    document.querySelector("#drop").dispatchEvent(
                        new DragEvent("drop", { dataTransfer: held, bubbles: true, cancelable: true }));
                }""",
                content,
            )
            expect(page.locator("#picture-name")).to_have_text("card.png")
            page.get_by_label("Aspect").fill("the card")
            page.get_by_role("button", name="Judge the post").click()
            expect(page.locator("#why .tag")).to_have_text("teacher")
            expect(page.locator("#why")).to_contain_text("the teacher is certain")
            expect(page.locator("#share")).to_have_text("1 post judged, 1.00 teacher calls per post")
        question = server.questions[-1]
        assert "the card" in question.text and question.images


def test_a_degraded_answer_says_so(page: Page, student: Local) -> None:
    with running(student, None, NEVER_SURE, rationale=False) as client:
        visit(page, client)
        page.get_by_label("Post").fill(HOSTILE)
        page.get_by_role("button", name="Judge the post").click()
        expect(page.locator("#why")).to_contain_text("degraded")
        expect(page.locator("#reasoning")).to_contain_text("none")


def test_what_is_wrong_is_told(page: Page, gateway: httpx.Client, tmp_path: Path) -> None:
    visit(page, gateway)
    page.get_by_role("button", name="Judge the post").click()
    expect(page.get_by_role("alert")).to_contain_text("text is empty")
    (tmp_path / "broken.png").write_bytes(b"hello")
    page.get_by_label("Post").fill("words")
    page.locator("#picture").set_input_files(tmp_path / "broken.png")
    page.get_by_role("button", name="Judge the post").click()
    expect(page.get_by_role("alert")).to_contain_text("none of JPEG")
    expect(page.locator("#answer")).to_be_hidden()


def test_words_of_a_model_are_text_and_never_markup(page: Page, gateway: httpx.Client) -> None:
    visit(page, gateway)

    def answer(route: Any) -> None:
        reply = route.fetch()
        found = reply.json() | {"rationale": {"Text_analysis": HOSTILE}, "reason": HOSTILE}
        route.fulfill(response=reply, json=found)

    page.route("**/v1/sentiment", answer)
    page.get_by_label("Post").fill(HOSTILE)
    page.get_by_role("button", name="Judge the post").click()
    expect(page.locator("#reasoning dd")).to_have_text(HOSTILE)
    assert page.locator("#answer img, #answer b").count() == 0
    assert page.title() == "pair"


def test_the_token_is_asked_for_where_one_is_wanted(
    page: Page, student: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATE_KEY", "sesame")
    with running(student, api_key_env="GATE_KEY", rationale=False) as client:
        visit(page, client)
        page.get_by_label("Post").fill("words")
        page.get_by_label("Token").fill("wrong")
        page.get_by_role("button", name="Judge the post").click()
        expect(page.get_by_role("alert")).to_contain_text("token")
        page.get_by_label("Token").fill("sesame")
        page.get_by_role("button", name="Judge the post").click()
        expect(page.locator("#label")).not_to_be_empty()
        expect(page.locator("h1")).to_have_text("pair")


def test_nothing_else_may_run_on_the_page(gateway: httpx.Client) -> None:
    policy = gateway.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", gateway.get("/").text)
