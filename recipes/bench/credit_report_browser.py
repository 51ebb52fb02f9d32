"""
What a reader of the report waits for, in a browser: `python recipes/bench/credit_report_browser.py credit.html`.

    pip install playwright axe-core-python

It opens the page in headless Chromium from the disk, at two widths, light and dark; goes from group to group by
keyboard; searches; and asks axe-core whether the page is accessible. `credit_report.py` makes a page of any size.
`--screenshot FILE` keeps a picture of one group with the sum of one token.
"""

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

from axe_core_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright


# Light on a wide screen, dark on a telephone
LOOKS = ({"width": 1200, "height": 800, "scheme": "light"}, {"width": 400, "height": 800, "scheme": "dark"})
# The frame after next: what has been asked for is laid out and painted by then
PAINTED = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))"


def open_page(browser: Browser, path: Path, look: dict, errors: list[str]) -> tuple[Page, float]:
    """The page, and the seconds until its first screen was painted."""
    page = browser.new_page(
        viewport={"width": look["width"], "height": look["height"]}, color_scheme=look["scheme"], offline=True
    )
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    start = time.perf_counter()
    page.goto(path.resolve().as_uri(), wait_until="load")
    page.wait_for_selector("main h2")
    page.evaluate(PAINTED)
    return page, time.perf_counter() - start


def first_group(page: Page) -> None:
    """Open the first group of the first recorded step."""
    page.keyboard.press("n")
    page.wait_for_selector("td a")
    page.keyboard.press("]")
    page.wait_for_selector(".completion")
    page.evaluate(PAINTED)


def switch(page: Page, key: str) -> float | None:
    """Seconds until the next group (key `]`) or step (key `n`) is painted; `None` if there is none."""
    before = page.url
    start = time.perf_counter()
    page.keyboard.press(key)
    if page.url == before:
        return None
    _, step, group = page.url.split("#/")[1].split("/")
    wanted = f"Step {step}, group {group}"
    page.wait_for_function("(wanted) => document.querySelector('main h2').textContent === wanted", arg=wanted)
    page.evaluate(PAINTED)
    return time.perf_counter() - start


def search(page: Page, query: str) -> float:
    """Seconds until a search for a text has come to its end."""
    start = time.perf_counter()
    page.keyboard.press("/")
    page.keyboard.type(query)
    page.keyboard.press("Enter")
    page.wait_for_selector("[role=status]:not(:has-text('Searching'))", timeout=300_000)
    return time.perf_counter() - start


def accessibility(page: Page) -> list[str]:
    """Rules of axe-core that the page breaks, colour contrast among them."""
    return [violation["id"] for violation in Axe().run(page)["violations"]]


def keep_screenshot(page: Page, path: Path) -> None:
    """A picture of this group with the sum of the token in its third completion's middle."""
    page.set_viewport_size({"width": 1200, "height": 620})
    tokens = page.locator(".completion").nth(2).locator(".t")
    tokens.nth(tokens.count() // 2).click()
    page.evaluate(PAINTED)
    page.screenshot(path=str(path))


def main() -> int:
    """Print what was measured; 1 if the console showed an error or axe-core found a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="The report, `credit.html`.")
    parser.add_argument("--switches", type=int, default=20, help="Most switches to measure at each width.")
    parser.add_argument("--search", default="no such text", help="Text to search for.")
    parser.add_argument("--screenshot", type=Path, help="Picture to write.")
    options = parser.parse_args()
    errors: list[str] = []
    faults: set[str] = set()
    print(f"{options.report.stat().st_size / 1e6:.1f} MB")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for look in LOOKS:
            page, opened = open_page(browser, options.report, look, errors)
            faults |= set(accessibility(page))
            first_group(page)
            faults |= set(accessibility(page))
            waits = []
            while len(waits) < options.switches:
                wait = switch(page, "]") or switch(page, "n")
                if wait is None:
                    break
                waits.append(wait)
            print(
                f"{look['width']} px, {look['scheme']}: opens in {opened:.2f} s, switches in "
                f"{statistics.median(waits):.2f} s ({min(waits):.2f} to {max(waits):.2f}, {len(waits)} switches), "
                f"searches in {search(page, options.search):.1f} s"
            )
            page.close()
        if options.screenshot:
            page, _ = open_page(browser, options.report, LOOKS[0], errors)
            first_group(page)
            keep_screenshot(page, options.screenshot)
        browser.close()
    print(f"Console: {errors or 'no errors'}. axe-core: {sorted(faults) or 'no violations'}")
    return int(bool(errors or faults))


if __name__ == "__main__":
    sys.exit(main())
