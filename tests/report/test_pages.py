"""Pages in a browser: nothing is cut off or unreadable, on a phone or in the dark."""

import pytest

from jax_ordermerge.layout import SEARCH_VERSION, SearchLayout
from jax_ordermerge.report import comparison, document, results, run_report
from jax_ordermerge.report.run import read_runs
from jax_ordermerge.search.candidates import Candidate
from tests.report import browser
from tests.report import test_comparison as comparison_example
from tests.report import test_merges as search_example
from tests.report import test_results as results_example
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


def assert_readable(page, width):
    """Check that nothing is cut off, broken or without a text on a measured page."""
    assert page["width"] == width
    assert page["scrollWidth"] <= width
    assert page["overflows"] == []
    assert page["cutOff"] == []
    assert page["brokenWords"] == []
    assert page["faint"] == []
    assert page["withoutText"] == []


@pytest.mark.parametrize("width", browser.WIDTHS)
@pytest.mark.parametrize("scheme", browser.SCHEMES)
def test_the_report_fits_and_can_be_read(measured, width, scheme):
    page = measured[width, scheme]
    assert_readable(page, width)
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


def compared_page(folder):
    runs = [
        comparison_example.make(folder / name, name, level, slope, 0.05)
        for name, level, slope in (("free", "sample", -0.01), ("fixed", "batch", -0.02))
    ]
    return comparison.write(runs, folder / "out").read_text()


def search_page(folder):
    example.training(folder)
    search, content = folder / "search", search_example.search()
    # as long as names of candidates are
    content["candidates"][2]["name"] = Candidate(
        "della",
        {"density": 0.35, "epsilon": 0.15},
        seed=1234,
        scale=1.25,
        groups={"attention": 1.1},
    ).name
    example.dump(SearchLayout(search).results, {"version": SEARCH_VERSION} | content)
    return run_report.write_search(folder, search).read_text()


def results_page(folder):
    """Return the blocks of results.md as HTML, which is how its readers see them."""
    runs = [
        results_example.make(folder, name, average=average, seed=seed)
        for seed, (name, average) in enumerate((("first", 0.05), ("second", -0.05)))
    ]
    return document.render_html("Results", results.build(read_runs(runs)))


@pytest.mark.parametrize(
    ("make", "pictures", "tables"),
    [(compared_page, 1, 4), (search_page, 1, 1), (results_page, 0, 8)],
)
def test_other_pages_fit_too(make, pictures, tables, tmp_path):
    for (width, _), page in browser.measure(make(tmp_path)).items():
        assert_readable(page, width)
        assert page["pictures"] >= pictures
        assert page["tables"] >= tables


def test_what_is_wrong_is_seen():
    bad = (
        "<style>body { background: #fff; color: #eee; }</style><p>pale</p>"
        '<div style="width: 1300px">broad</div>'
        '<table style="width: 20px; table-layout: fixed; word-break: break-all">'
        "<tr><td>selection</td></tr></table>"
        '<svg width="50" height="20"><text x="30" y="10">cut off here</text></svg>'
        '<svg role="img" aria-labelledby="a b"><title id="a">a</title><desc id="b"></desc></svg>'
        '<svg role="img" aria-labelledby="c d"><title id="c">c</title><desc id="d">d</desc></svg>'
    )
    page = browser.measure(bad)[1200, "light"]
    assert page["scrollWidth"] > 1200
    assert "broad" in page["overflows"]
    assert "pale" in page["faint"]
    assert page["brokenWords"] == ["selection"]
    assert page["cutOff"] == ["cut off here"]
    assert page["withoutText"] == ["cut off here", "a"]
