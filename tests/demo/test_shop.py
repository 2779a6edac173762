"""The example shop as its visitors see it: the real server, and a real browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright

SERVE = Path(__file__).parents[2] / "examples" / "shop" / "serve.py"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
STOP_SECONDS = 20.0  # what a stop may take on a busy machine
WAIT_MS = 20_000  # what a page may take there; twenty clicks alone take 1,100

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


class Shop:
    """A running server: where it listens, and what it wrote."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self.process = process
        self._errors = errors
        assert process.stdout is not None
        self.said = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", self.said)
        assert found is not None, self.said + self.complaints
        self.url = found[0]

    @property
    def complaints(self) -> str:
        return self._errors.read_text()

    def stop(self, signal_number: int) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(STOP_SECONDS)


def environment(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("HOST", "WORKERS")}
    return {**kept, "PORT": "0", "GRID": "memory://", **settings}


@contextmanager
def serve(folder: Path, **settings: str) -> Iterator[Shop]:
    errors = folder / "stderr"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, SERVE],
            cwd=folder,  # it must not matter
            env=environment(**settings),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield Shop(process, errors)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)  # its workers as well
                    raise


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    grid = f"embedded://{folder}/grid?max_size=16MiB"
    with serve(folder, WORKERS="2", GRID=grid) as running:
        yield running
        assert running.stop(signal.SIGTERM) == 0
        assert running.complaints == ""


# -- in the browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser: Browser, shop: Shop) -> Iterator[BrowserContext]:
    context = browser.new_context(base_url=shop.url, viewport={"width": 1280, "height": 900})
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page that may write no error to its console."""
    problems: list[str] = []
    page = context.new_page()
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto("/")
    yield page
    assert problems == []


def run(page: Page, panel: str) -> tuple[int, str]:
    """Send the clicks of one panel; how many arrived, and what stands behind that number."""
    page.locator(f"{panel} button").click()
    expect(page.locator(f"{panel} .detail")).to_contain_text("arrived")
    expect(page.locator(f"{panel} button")).to_be_enabled()
    count = page.locator(f"{panel} .count").inner_text()
    assert count.endswith(" of 20")
    return int(count.split()[0]), page.locator(f"{panel} .detail").inner_text()


def overflow(page: Page) -> int:
    """By how many pixels the page is wider than the window."""
    width: int = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return width


@needs_browser
def test_locked_clicks_all_arrive_and_unlocked_ones_get_lost(page: Page) -> None:
    page.get_by_role("button", name="Add Honey to cart").click()
    expect(page.locator("#cart")).to_contain_text("1 × Honey")
    expect(page.locator("#cart .total")).to_contain_text("€ 7.40")

    arrived, detail = run(page, ".locked")
    assert (arrived, "lost" in detail) == (20, False)
    expect(page.locator("#cart")).to_contain_text("20 × Lemon")
    expect(page.locator("#cart")).to_contain_text("1 × Honey")
    written = page.locator(".locked .lemons").all_text_contents()
    assert sorted(map(int, written)) == list(range(1, 21))

    arrived, detail = run(page, ".unlocked")
    assert 0 < arrived < 20
    assert f"{20 - arrived} lost" in detail
    expect(page.locator("#cart")).to_contain_text("20 × Lemon")  # another store

    # Each click is drawn: waiting only where there is a lock, and by whom it was answered.
    assert page.locator(".locked rect.working").count() == 20
    assert page.locator(".unlocked rect.working").count() == 20
    assert page.locator(".locked rect.waiting").count() > 10
    assert page.locator(".unlocked rect.waiting").count() == 0
    marks = page.locator("rect[data-worker]")
    assert len(set(marks.evaluate_all("marks => marks.map(m => m.dataset.worker)"))) == 2
    assert len(set(marks.evaluate_all("marks => marks.map(m => m.dataset.colour)"))) == 2
    expect(page.locator("#session .badge")).to_have_count(2)
    expect(page.locator("#requests")).to_have_text("23")  # the page, honey, a visit, 20 clicks


@needs_browser
def test_both_stores_on_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 375, "height": 812})
    assert overflow(page) == 0
    page.get_by_role("button", name="Try both stores").click()
    expect(page.locator(".locked .count")).to_have_text("20 of 20")
    expect(page.locator(".unlocked .detail")).to_contain_text("lost")
    expect(page.get_by_role("button", name="Try both stores")).to_be_enabled()
    assert overflow(page) == 0


@needs_browser
def test_without_javascript(browser: Browser, shop: Shop) -> None:
    context = browser.new_context(base_url=shop.url, java_script_enabled=False)
    try:
        page = context.new_page()
        page.goto("/")
        assert "needs JavaScript" in page.content()  # Playwright renders no <noscript>
        expect(page.get_by_role("button", name="Try both stores")).to_be_disabled()
        page.get_by_role("button", name="Add Bread to cart").click()
        page.get_by_role("button", name="Add Bread to cart").click()
        expect(page.locator("#cart")).to_contain_text("2 × Bread")
        page.get_by_role("button", name="Start over").click()
        expect(page.locator("#cart")).to_contain_text("Nothing in it yet")
    finally:
        context.close()


@needs_browser
def test_start_over_ends_the_session(page: Page, context: BrowserContext) -> None:
    def cookies() -> dict[str, str]:
        return {str(cookie["name"]): str(cookie["value"]) for cookie in context.cookies()}

    page.get_by_role("button", name="Add Apple to cart").click()
    expect(page.locator("#cart")).to_contain_text("1 × Apple")
    before = cookies()
    assert before["shop"] not in page.content()  # the id is a secret

    page.get_by_role("button", name="Start over").click()
    expect(page.locator("#cart")).to_contain_text("Nothing in it yet")
    expect(page.locator("#requests")).to_have_text("1")
    assert cookies()["shop"] != before["shop"]
    context.add_cookies([{"name": "shop", "value": before["shop"], "url": page.url}])
    page.reload()
    expect(page.locator("#cart")).to_contain_text("Nothing in it yet")  # ended, not forgotten


@needs_browser
def test_refused_clicks_are_told_from_lost_ones(context: BrowserContext) -> None:
    page = context.new_page()
    clicks = 0

    def refuse_three(route: Route) -> None:
        nonlocal clicks
        clicks += route.request.method == "POST"
        if route.request.method == "POST" and clicks <= 3:
            body = "Service Unavailable. Please try again.\n"
            route.fulfill(status=503, content_type="text/plain", body=body)
        else:
            route.continue_()

    page.goto("/")
    page.route("/cart", refuse_three)
    arrived, detail = run(page, ".locked")
    assert arrived == 17
    assert "3 refused" in detail
    assert "lost" not in detail
    problem = page.locator(".locked .problem")
    expect(problem).to_have_text("503: Service Unavailable. Please try again.")
    assert page.locator(".locked rect.error").count() == 3

    page.route("**/*", lambda route: route.abort())
    page.get_by_role("button", name="Add Apple to cart").click()
    expect(page.locator("#said")).to_have_text("The server does not answer. Is it still running?")
    expect(page.get_by_role("button", name="Add Apple to cart")).to_be_enabled()


# -- the server itself -----------------------------------------------------------------------------


def test_unknown_product(shop: Shop) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{shop.url}cart", data=b"sku=elephant", timeout=10)
    with caught.value as answer:
        assert answer.code == 404
        assert answer.headers["set-cookie"] is None


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_stops_cleanly(tmp_path: Path, signal_number: int) -> None:
    with serve(tmp_path, WORKERS="1") as shop:
        assert "· 1 worker, sessions in memory://" in shop.said
        assert shop.said.endswith("Ctrl-C stops it\n")
        with urllib.request.urlopen(shop.url, timeout=10) as answer:
            assert b"Lemon Lane" in answer.read()
        # As a terminal does it: Ctrl-C reaches the workers as well.
        os.killpg(shop.process.pid, signal_number)
        assert shop.process.wait(STOP_SECONDS) == 0
        assert shop.complaints == ""


def complaint(**settings: str) -> str:
    """What a server says that does not start."""
    ended = subprocess.run(
        [sys.executable, SERVE],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    return ended.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PORT": "http"}, "PORT='http': must be a whole number from 0 to 65535"),
        ({"PORT": "65536"}, "PORT='65536': must be a whole number from 0 to 65535"),
        ({"WORKERS": "0"}, "WORKERS='0': must be a whole number from 1 to 64"),
        ({"WORKERS": "-2"}, "WORKERS='-2': must be a whole number from 1 to 64"),
        ({"WORKERS": "2", "GRID": "memory://"}, "memory:// keeps sessions in one process"),
        ({"GRID": "nowhere://"}, "there is no grid for the scheme 'nowhere'"),
        ({"WORKERS": "1", "HOST": "256.0.0.1"}, "cannot listen at HOST='256.0.0.1'"),
    ],
)
def test_says_what_is_wrong_with_its_environment(settings: dict[str, str], message: str) -> None:
    said = complaint(**settings)
    assert said.startswith("serve.py: ")
    assert message in said
    assert said.count("\n") == 1


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"PORT={port}: another program listens there" in complaint(
            PORT=str(port), WORKERS="1"
        )
