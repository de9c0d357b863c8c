"""The report in a real browser, where one is installed: it loads without complaint, fits its window, and its filter
works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from align.report.html.page import write_report
from align.runs.record import read_run
from tests.support.browser import Page, browser, installed
from tests.support.report_run import write_run

pytestmark = pytest.mark.skipif(installed() is None, reason="needs a Chromium")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(read_run(write_run(tmp_path_factory.mktemp("report") / "everything")))


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    program = installed()
    assert program is not None
    with browser(program) as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 800, 1280, 2000])
def test_it_loads_without_complaint_and_fits(page: Page, report: Path, width: int, scheme: str) -> None:
    page.open(report, width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), (
        "the page scrolls sideways"
    )
    assert page.said("Log.entryAdded", "Runtime.exceptionThrown") == [], (
        "an error, or something that the policy refused"
    )
    assert [request["request"]["url"] for request in page.said("Network.requestWillBeSent")] == [report.as_uri()]
    paper, ink = page.evaluate(
        "[getComputedStyle(document.documentElement).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert paper != ink and paper == {"light": "rgb(252, 252, 250)", "dark": "rgb(23, 24, 27)"}[scheme]
    assert page.evaluate("getComputedStyle(document.querySelector('polyline')).fill") == "none", (
        "the style applies to drawings"
    )


def shown(page: Page) -> int:
    return int(page.evaluate("document.querySelectorAll('.asked:not([hidden])').length"))


def test_the_filter_finds_answers(page: Page, report: Path) -> None:
    page.open(report)
    everything = page.evaluate("document.querySelectorAll('.asked').length")
    assert everything == 63 and shown(page) == 10
    page.evaluate("document.getElementById('filter').focus()")
    page.call("Input.insertText", text="OTTAWA")
    assert shown(page) == 1 and page.evaluate("document.getElementById('filter-count').textContent") == "1 of 63"
    page.evaluate(
        "document.getElementById('filter').value = ''; document.getElementById('filter').dispatchEvent(new"
        " Event('input'))"
    )
    page.evaluate("document.getElementById('show-all').click()")
    assert shown(page) == everything


def test_hostile_answers_do_nothing(page: Page, report: Path) -> None:
    page.open(report)
    assert page.evaluate("document.images.length") == 0 and page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.body.textContent.includes('<img src=x onerror=alert(1)>')")
    assert page.said("Page.javascriptDialogOpening") == []
