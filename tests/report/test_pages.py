"""Pages in a browser: nothing is cut off or unreadable, on a phone or in the dark."""

import pytest

from jax_ordermerge.report import comparison, run_report
from tests.report import browser
from tests.report import test_comparison as comparison_example
from tests.report import test_run_report as example

pytestmark = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="no Chromium is installed: pages are not looked at"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    example.training(directory)
    example.evaluation(directory)
    example.analysis(directory)
    example.merges(directory)
    return run_report.write(directory).read_text()


@pytest.fixture(scope="module")
def measured(report):
    return browser.measure(report)


@pytest.mark.parametrize("width", browser.WIDTHS)
@pytest.mark.parametrize("scheme", browser.SCHEMES)
def test_the_report_fits_and_can_be_read(measured, width, scheme):
    page = measured[width, scheme]
    assert page["width"] == width
    assert page["scrollWidth"] <= width
    assert page["overflows"] == []
    assert page["cutOff"] == []
    assert page["brokenWords"] == []
    assert page["faint"] == []
    assert page["pictures"] >= 7
    assert page["tables"] >= 7


@pytest.mark.parametrize("width", browser.WIDTHS)
def test_the_dark_scheme_is_dark(measured, width):
    assert measured[width, "dark"]["dark"]
    assert measured[width, "dark"]["ground"] < 0.05
    assert measured[width, "light"]["ground"] > 0.9


@pytest.mark.parametrize("width", browser.WIDTHS)
def test_screenshots(report, width, tmp_path):
    file = tmp_path / "page.png"
    browser.screenshot(report, file, width)
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG")
    # an empty page of this size compresses to less
    assert len(content) > 20_000


def test_paper_shows_what_a_screen_folds_away(report):
    shown = report.replace("<details", "<details open")
    assert browser.printed_pages(report) == browser.printed_pages(shown) > 3


def test_other_pages_fit_too(tmp_path):
    runs = [
        comparison_example.make(tmp_path / name, name, level, slope, 0.05)
        for name, level, slope in (("free", "sample", -0.01), ("fixed", "batch", -0.02))
    ]
    page = comparison.write(runs, tmp_path / "out").read_text()
    for (width, _), measured in browser.measure(page).items():
        assert measured["scrollWidth"] <= width
        wrong = ("overflows", "cutOff", "brokenWords", "faint")
        assert [measured[name] for name in wrong] == [[]] * 4


def test_what_is_wrong_is_seen():
    bad = (
        "<style>body { background: #fff; color: #eee; }</style><p>pale</p>"
        '<div style="width: 1300px">broad</div>'
        '<table style="width: 20px; table-layout: fixed; word-break: break-all">'
        "<tr><td>selection</td></tr></table>"
        '<svg width="50" height="20"><text x="30" y="10">cut off here</text></svg>'
    )
    page = browser.measure(bad)[1200, "light"]
    assert page["scrollWidth"] > 1200
    assert "broad" in page["overflows"]
    assert "pale" in page["faint"]
    assert page["brokenWords"] == ["selection"]
    assert page["cutOff"] == ["cut off here"]
