"""The page of jobs in a real browser: log in, and watch a job go on without touching anything."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from tests.support.front_end import front_end
from tests.support.stack import ROOT

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 60_000
SCREENSHOTS = ROOT / ".tunewright" / "screenshots"


@contextlib.contextmanager
def a_browser_page(name: str) -> Iterator[Page]:
    """A page of a fresh browser; it must not report errors, and where the test fails its picture is kept in ``SCREENSHOTS``."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        try:
            yield page
            assert not [error for error in errors if "401" not in error]  # the refused login is one, and meant
        except BaseException:
            SCREENSHOTS.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
            raise
        finally:
            browser.close()


def test_a_person_logs_in_and_watches_a_job(tmp_path: Path) -> None:
    expect.set_options(timeout=PATIENCE_MS)
    with front_end(tmp_path) as front:
        ours, theirs = front.make_tenant(), front.make_tenant()
        token = front.kubectl.token("owner", ours)
        for namespace, name in ((ours, "assistant"), (ours, "broken"), (theirs, "secret")):
            front.make_job(namespace, name)
        progress = {"step": 3, "maxSteps": 10, "percent": 30, "loss": "2.5", "remaining": "4m", "lastUpdated": "2026-01-02T03:04:05Z"}
        front.set_status(ours, "assistant", phase="Training", progress=progress)
        with a_browser_page("jobs") as page:
            page.goto(front.url)
            expect(page).to_have_url(f"{front.url}/login")
            page.keyboard.type("not a token")  # the field has the focus
            page.get_by_role("button", name="Log in").click()
            expect(page.get_by_role("alert")).to_contain_text("does not know this token")
            page.get_by_label("Kubernetes token").fill(token)
            page.get_by_role("button", name="Log in").press("Enter")

            job = page.get_by_role("row", name="assistant")
            expect(job).to_contain_text("3 of 10")
            expect(job.get_by_role("progressbar", name="Progress of assistant")).to_have_attribute("value", "30")
            expect(page.get_by_role("columnheader", name="Loss")).to_be_visible()
            expect(page.get_by_text("secret")).to_have_count(0)

            phases = page.get_by_label("Phase")
            phases.focus()
            found = {
                "metrics": [{"task": "test", "metric": "f1", "base": 0.25, "tuned": 0.9}],
                "examples": 40,
                "reportUri": "s3://b/report.html",
            }
            done = progress | {"step": 10, "percent": 100}
            front.set_status(ours, "assistant", phase="Succeeded", progress=done, model={"name": "tuned-one"}, evaluation=found)
            front.set_status(
                ours, "broken", phase="Failed", error={"code": "DataInvalid", "message": "row 7 <b>", "advice": "Mend the row."}
            )
            expect(job).to_contain_text("10 of 10")
            expect(job).to_contain_text("tuned-one")
            expect(page.locator("tr.measured")).to_contain_text("Measured on 40 held-out rows")
            expect(page.locator("tr.measured tbody")).to_contain_text("test: f1")
            expect(page.get_by_role("cell", name="DataInvalid: row 7 <b> Mend the row.")).to_be_visible()
            expect(page.locator("#summary")).to_have_text("2 jobs: 1 succeeded, 1 failed")
            expect(phases).to_be_focused()

            phases.select_option("Failed")
            expect(job).to_have_count(0)
            expect(page.get_by_role("row", name="broken")).to_be_visible()

            light = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            page.emulate_media(color_scheme="dark")
            assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != light

            page.get_by_role("button", name="Log out").click()
            expect(page).to_have_url(f"{front.url}/login")
            page.goto(front.url)
            expect(page).to_have_url(f"{front.url}/login")
