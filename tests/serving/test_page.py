"""The web page in a real browser, with a real student and a teacher's HTTP server."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from distill.data.corpus import Corpus
from distill.models.local import Local
from tests.clip_files import write_clip
from tests.models.openai_server import COLOURS, Server
from tests.serving.conftest import DEFER_ALL, running
from tests.serving.test_cascade_service import teacher_at, with_confidence
from tests.serving.test_clips_gateway import tiny

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Page, expect

MARKUP = '<img src=x onerror="document.title=1"><b>"Prediction": negative'

expect.set_options(timeout=30_000)  # milliseconds; a busy machine answers slowly


def open_page(page: Page, client: httpx.Client) -> list[str]:
    """Open the page and return the list of addresses that it loads."""
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url))
    page.goto(f"{client.base_url}/")
    return loaded


def test_a_post_with_an_image(page: Page, gateway: httpx.Client, postcards: Corpus) -> None:
    loaded = open_page(page, gateway)
    expect(page.locator("h1")).to_have_text("cascade")
    sample = postcards.test[0]
    page.get_by_label("Post").fill(sample.text)
    page.locator("#image").set_input_files(sample.images[0])
    expect(page.locator("#preview")).to_be_visible()
    page.get_by_role("button", name="Classify the post").click()
    expect(page.locator("#label")).to_have_text(re.compile("negative|neutral|positive"))
    found = gateway.post(
        "/v1/sentiment", json={"text": sample.text, "image": page.locator("#preview").get_attribute("src")}
    ).json()
    expect(page.locator("#label")).to_have_text(found["label"])
    expect(page.locator(".bar")).to_have_count(3)
    for name, probability in found["probabilities"].items():
        expect(page.locator(".bar", has_text=name)).to_contain_text(f"{100 * probability:.1f} %")
    expect(page.locator("#decision")).to_contain_text("the student is certain")
    expect(page.locator("#decision .tag")).to_have_text("student")
    expect(page.locator("#usage")).to_contain_text("0.00 teacher calls per post")
    if found["rationale"]:
        expect(page.locator("#rationale")).to_contain_text(found["rationale"]["Image_analysis"])
        expect(page.locator("#rationale")).to_contain_text(
            "Written by the student. It argues for the label; its grounding"
        )
    expect(page.locator("#cost")).to_have_text(
        re.compile(r"0 teacher calls, \d+ prompt tokens, \d+ completion tokens, \d+\.\d\d s of model time, price –")
    )
    page.get_by_role("button", name="Remove").click()
    expect(page.locator("#preview")).to_be_hidden()
    assert all(url.startswith((str(gateway.base_url), "data:")) for url in loaded)


def test_a_dropped_image_and_the_teacher(page: Page, student: Local, postcards: Corpus) -> None:
    with Server(logprobs=with_confidence(0.98)) as server:
        with running(student, teacher_at(server.url, deadline_s=30), DEFER_ALL) as client:
            open_page(page, client)
            content = list(postcards.test[0].images[0].read_bytes())
            page.evaluate(
                """(content) => {
                    const transfer = new DataTransfer();
                    transfer.items.add(new File([new Uint8Array(content)], "card.png", { type: "image/png" }));
                    document.querySelector("#drop").dispatchEvent(
                        new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
                }""",
                content,
            )
            expect(page.locator("#image-name")).to_have_text("card.png")
            page.get_by_label("Aspect").fill("the card")
            page.get_by_role("button", name="Classify the post").click()
            expect(page.locator("#decision .tag")).to_have_text("teacher")
            expect(page.locator("#decision")).to_contain_text("the teacher is certain")
            expect(page.locator("#usage")).to_have_text("1 post classified, 1.00 teacher calls per post")
        request = server.received[-1]
        assert "the card" in request.text and request.images


def test_a_degraded_answer_is_marked(page: Page, student: Local) -> None:
    with running(student, None, DEFER_ALL, rationale=False) as client:
        open_page(page, client)
        page.get_by_label("Post").fill(MARKUP)
        page.get_by_role("button", name="Classify the post").click()
        expect(page.locator("#decision")).to_contain_text("degraded")
        expect(page.locator("#rationale")).to_contain_text("no rationale")


def test_errors_are_shown(page: Page, gateway: httpx.Client, tmp_path: Path) -> None:
    open_page(page, gateway)
    page.get_by_role("button", name="Classify the post").click()
    expect(page.get_by_role("alert")).to_contain_text("text is empty")
    (tmp_path / "broken.png").write_bytes(b"hello")
    page.get_by_label("Post").fill("words")
    page.locator("#image").set_input_files(tmp_path / "broken.png")
    page.get_by_role("button", name="Classify the post").click()
    expect(page.get_by_role("alert")).to_contain_text("none of JPEG")
    expect(page.locator("#answer")).to_be_hidden()


def test_model_output_is_shown_as_text_and_not_as_markup(page: Page, gateway: httpx.Client) -> None:
    open_page(page, gateway)

    def answer(route: Any) -> None:
        reply = route.fetch()
        found = reply.json() | {"rationale": {"Text_analysis": MARKUP}, "rationale_by": MARKUP, "reason": MARKUP}
        found["cost"] |= {"price": 0.01234}
        route.fulfill(response=reply, json=found)

    page.route("**/v1/sentiment", answer)
    page.get_by_label("Post").fill(MARKUP)
    page.get_by_role("button", name="Classify the post").click()
    expect(page.locator("#rationale dd")).to_have_text(MARKUP)
    expect(page.locator("#rationale")).to_contain_text(f"Written by the {MARKUP}.")
    expect(page.locator("#cost")).to_contain_text("price 0.0123")
    assert page.locator("#answer img, #answer b").count() == 0
    assert page.title() == "cascade"


def test_the_token_field_appears_if_a_token_is_required(
    page: Page, student: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_KEY", "sesame")
    with running(student, api_key_env="GATEWAY_KEY", rationale=False) as client:
        open_page(page, client)
        page.get_by_label("Post").fill("words")
        page.get_by_label("Token").fill("wrong")
        page.get_by_role("button", name="Classify the post").click()
        expect(page.get_by_role("alert")).to_contain_text("token")
        page.get_by_label("Token").fill("sesame")
        page.get_by_role("button", name="Classify the post").click()
        expect(page.locator("#label")).not_to_be_empty()
        expect(page.locator("h1")).to_have_text("cascade")


def test_the_content_security_policy_allows_only_the_pages_own_code(gateway: httpx.Client) -> None:
    policy = gateway.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", gateway.get("/").text)


# ---- videos and sounds ----


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with running(tiny(tmp_path_factory.mktemp("hearing"), 16), rationale=False) as client:
        yield client


def test_a_video_is_shown_as_its_sampled_frames(page: Page, hearing: httpx.Client, tmp_path: Path) -> None:
    loaded = open_page(page, hearing)
    colours = [COLOURS["negative"]] * 10 + [COLOURS["positive"]] * 10
    page.get_by_label("Video or sound").set_input_files(write_clip(tmp_path / "a.mp4", colours, 300.0, seconds=2.0))
    expect(page.locator("#video")).to_be_visible()
    page.get_by_label("Post").fill("spoken words")
    page.get_by_role("button", name="Classify the post").click()
    expect(page.locator("#frames canvas")).to_have_count(8)
    expect(page.locator("#frames figcaption").nth(7)).to_have_text(re.compile(r"1\.\d s"))
    pixels = "(canvas) => [...canvas.getContext('2d').getImageData(9, 9, 1, 1).data].slice(0, 3)"
    shown = [page.locator("#frames canvas").nth(n).evaluate(pixels) for n in (0, 7)]
    assert shown[0] == pytest.approx(COLOURS["negative"], abs=12) and shown[1] == pytest.approx(
        COLOURS["positive"], abs=12
    )
    expect(page.locator("#transcript")).to_have_text("spoken words")
    page.get_by_role("button", name="Remove").click()
    expect(page.locator("#video")).to_be_hidden()
    assert all(url.startswith((str(hearing.base_url), "data:", "blob:")) for url in loaded)


@pytest.mark.parametrize("kind", ["video", "sound"])
def test_a_recording_is_classified(page: Page, hearing: httpx.Client, kind: str) -> None:
    open_page(page, hearing)
    page.get_by_role("button", name=f"Record a {kind}").click()
    expect(page.locator("#record-time")).to_contain_text("1 s of at most 60 s")
    expect(page.get_by_role("button", name="Classify the post")).to_be_disabled()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#clip-name")).to_have_text(f"Recorded {kind}")
    page.get_by_role("button", name="Classify the post").click()
    expect(page.locator("#label")).to_have_text(re.compile("negative|neutral|positive"))
    if kind == "video":
        expect(page.locator("#frames canvas").first).to_be_visible()
    expect(page.locator("#frames-problem")).to_be_hidden()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("NotAllowedError", "The browser denies access to the camera and microphone."),
        ("NotFoundError", "There is no camera and microphone that can be used (NotFoundError)."),
    ],
)
def test_it_is_said_why_nothing_is_recorded(page: Page, hearing: httpx.Client, error: str, expected: str) -> None:
    page.add_init_script(
        f"navigator.mediaDevices.getUserMedia = async () => {{ throw new DOMException('', '{error}'); }}"
    )
    open_page(page, hearing)
    page.get_by_role("button", name="Record a video").click()
    expect(page.locator("#clip-problem")).to_contain_text(expected)


def test_a_broken_video_is_an_error(page: Page, hearing: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"hello")
    open_page(page, hearing)
    page.get_by_label("Video or sound").set_input_files(tmp_path / "broken.mp4")
    page.get_by_role("button", name="Classify the post").click()
    expect(page.get_by_role("alert")).to_contain_text("send another file")
