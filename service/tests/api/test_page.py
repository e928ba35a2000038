"""The page at `/` in a real browser against a real service: what a visitor does, and what a hostile
label must not do.
"""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from service.access.token import read_token

if TYPE_CHECKING:
    from service.tests.conftest import Server

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 30_000
LABELS = ("cup of coffee", "cat", "astronaut", "rocket", "bowl of fruit", "bicycle")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no browser: install Debian's chromium to test the page")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page as a visitor finds it; at the end nothing was asked of another host, and no script
    failed.
    """
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        context.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        page = context.new_page()
        asked, failed = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.on(
            "console",
            lambda message: failed.append(message.text) if "Content Security Policy" in message.text else None,
        )
        page.goto(f"{server.url}/#token={read_token(server.store)}")
        expect(page.locator("#serving")).to_contain_text("grocery@all")
        yield page
        assert [url for url in asked if not url.startswith((f"{server.url}/", f"blob:{server.url}/", "data:,"))] == []
        assert failed == []


def use_labels(page: Page, *labels: str) -> None:
    page.get_by_text("My own").click()
    page.get_by_label("One label a line").fill("\n".join(labels))


def drop(page: Page, name: str, data: bytes, kind: str = "image/jpeg") -> None:
    """What the browser does when a file is let go over the page."""
    transfer = page.evaluate_handle(
        """([name, kind, text]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name, { type: kind }));
            return transfer;
        }""",
        [name, kind, base64.b64encode(data).decode()],
    )
    for event in ("dragover", "drop"):
        page.dispatch_event("#drop", event, {"dataTransfer": transfer})


def bars(page: Page, column: str) -> list[str]:
    names: list[str] = page.locator(f"[data-column={column}] .bar .name").evaluate_all(
        "all => all.map((name) => name.firstChild.textContent)"
    )
    return names


def asked_over_http(server: Server, photo: bytes, enhance: str) -> dict[str, Any]:
    form = {"labels": list(LABELS), "enhance": enhance, "neighbors": "true", "top_k": "5"}
    with server.client() as client:
        reply = client.post("/classify", files={"file": photo}, data=form)
    reply.raise_for_status()
    body: dict[str, Any] = reply.json()
    return body


def test_a_dropped_photo_is_answered_plain_and_enhanced_side_by_side(
    page: Page, server: Server, photos: dict[str, bytes]
) -> None:
    expect(page.get_by_role("heading", name="Does the memory see it better?")).to_be_visible()
    use_labels(page, *LABELS)
    drop(page, "coffee.jpg", photos["coffee"])
    expect(page.locator("#neighbors tr")).to_have_count(10)
    expect(page.locator("#preview")).to_be_visible()
    expect(page.locator("#answered-by")).to_have_text("with grocery@all")
    plain, enhanced = (
        asked_over_http(server, photos["coffee"], "none"),
        asked_over_http(server, photos["coffee"], "both"),
    )
    assert bars(page, "plain") == [row["label"] for row in plain["data"][0]]
    assert bars(page, "enhanced") == [row["label"] for row in enhanced["data"][0]]
    first = page.locator("#neighbors tr").first
    expect(first.locator("th")).to_have_text(enhanced["neighbors"][0][0]["caption"])
    expect(first.locator("td").first).to_have_text(f"{enhanced['neighbors'][0][0]['score']:.3f}")
    expect(first.locator("td").last).to_have_text(f"{100 * enhanced['neighbors'][0][0]['weight']:.1f} %")
    changed = plain["data"][0][0]["label"] != enhanced["data"][0][0]["label"]
    expect(page.locator("#verdict")).to_contain_text("The memory changed the answer" if changed else "Both say")
    expect(page.locator("[data-column=enhanced] .bar").first.locator(".tag")).to_have_count(int(changed))


def test_the_memory_is_swapped_from_the_menu_while_an_answer_is_shown(page: Page, photos: dict[str, bytes]) -> None:
    use_labels(page, *LABELS)
    page.locator("#file").set_input_files(
        {"name": "chelsea.jpg", "mimeType": "image/jpeg", "buffer": photos["chelsea"]}
    )
    expect(page.locator("#answered-by")).to_have_text("with grocery@all")
    # there and back: other tests share this service
    for version in ("fruit-and-vegetables", "all"):
        expect(page.get_by_label("Name", exact=True)).to_have_value("grocery")
        expect(page.get_by_role("button", name="Swap")).to_be_hidden()
        page.get_by_label("Version").select_option(version)
        page.get_by_role("button", name=f"Swap grocery to {version}").click()
        expect(page.locator("#serving")).to_contain_text(f"grocery@{version}")
        expect(page.locator("#answered-by")).to_have_text(f"with grocery@{version}")
        expect(page.locator("#swap-note")).to_have_text(f"Serving grocery@{version}.")
        expect(page.get_by_label("Version").locator("option:checked")).to_have_text(f"{version} · live")


def test_a_file_that_is_no_image_is_told_and_the_next_photo_is_answered(page: Page, photos: dict[str, bytes]) -> None:
    use_labels(page, *LABELS)
    drop(page, "notes.txt", b"these are notes", "text/plain")
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.locator("#error")).to_contain_text("not an image of a type read here")
    expect(page.locator(".answer")).to_be_hidden()
    drop(page, "astronaut.jpg", photos["astronaut"])
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#enhanced .bar .value").first).to_have_text(re.compile(r"^\d+\.\d %$"))


def test_asking_without_a_photo_or_without_labels_is_told(page: Page, photos: dict[str, bytes]) -> None:
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#error")).to_contain_text("There is no photo yet")
    use_labels(page, "  ", "")
    drop(page, "coffee.jpg", photos["coffee"])
    expect(page.locator("#error")).to_contain_text("There are no labels to choose from")


def test_a_hostile_label_is_shown_as_the_text_it_is(page: Page, photos: dict[str, bytes]) -> None:
    hostile = "<img src=x onerror=\"document.title='taken'\">"
    use_labels(page, hostile, "cat")
    drop(page, "chelsea.jpg", photos["chelsea"])
    expect(page.locator("#enhanced .bar")).to_have_count(2)
    assert hostile in bars(page, "plain")
    assert page.locator(".results img").count() == 0
    assert page.title() == "RECO Serve"


def test_it_is_usable_by_keyboard_and_on_a_narrow_screen(page: Page, photos: dict[str, bytes]) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.locator("#file").focus()
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
    assert {"source", "memory", "version", "go"} <= set(reached)
    use_labels(page, *LABELS, "a label of " + "many" * 40)
    page.locator("#file").set_input_files({"name": "coffee.jpg", "mimeType": "image/jpeg", "buffer": photos["coffee"]})
    expect(page.locator("#neighbors tr")).to_have_count(10)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_stored_label_set_can_be_chosen(page: Page, server: Server, photos: dict[str, bytes]) -> None:
    with server.client() as client:
        client.put("/label-sets/animals", json={"labels": ["cat", "dog", "horse"]}).raise_for_status()
        try:
            page.reload()
            page.get_by_text("Label set", exact=True).click()
            page.get_by_label("Stored label set").select_option("animals")
            drop(page, "chelsea.jpg", photos["chelsea"])
            expect(page.locator("#plain .bar")).to_have_count(3)
            assert set(bars(page, "enhanced")) == {"cat", "dog", "horse"}
        finally:
            client.delete("/label-sets/animals").raise_for_status()


def test_the_reference_needs_no_other_host_and_no_script(page: Page, server: Server) -> None:
    with server.client() as client:
        document, text = client.get("/openapi.json").json(), client.get("/docs").text
        assert client.get("/redoc", follow_redirects=True).text == text
    assert "<script" not in text
    assert "://" not in text
    page.get_by_role("link", name="API").click()
    expect(page.get_by_role("heading", name="RECO Serve: reference")).to_be_visible()
    titles = page.locator("section h2").all_text_contents()
    assert titles == [f"{method.upper()} {path}" for path in document["paths"] for method in document["paths"][path]]
    classify = page.locator("section", has=page.get_by_role("heading", name="POST /classify", exact=True))
    expect(classify.get_by_role("cell", name="a stored label set", exact=False).first).to_be_visible()
    # its style sheet is its own, and allowed
    assert page.locator("body").evaluate("body => getComputedStyle(body).maxWidth") == "980px"


def test_keys_are_asked_for_and_used(
    browser: Browser, serve: Callable[..., Server], tmp_path: Path, photos: dict[str, bytes]
) -> None:
    guarded = serve(tmp_path, RECO_API_KEYS="open-sesame", RECO_ADMIN_KEY="swordfish")
    with browser.new_context() as context:
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.goto(guarded.url)
        expect(page.locator("#error")).to_contain_text("no valid key")
        page.get_by_label("API key").fill("open-sesame")
        page.get_by_label("API key").press("Tab")
        expect(page.locator("#swap-note")).to_contain_text("The default memory answers")
        use_labels(page, *LABELS)
        drop(page, "coffee.jpg", photos["coffee"])
        expect(page.locator("#answered-by")).to_have_text("with grocery@all")
        page.get_by_label("Admin key").fill("swordfish")
        page.get_by_label("Admin key").press("Tab")
        expect(page.get_by_label("Name", exact=True)).to_have_value("grocery")
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
