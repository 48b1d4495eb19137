"""Chromium without a window: what a page looks like at two widths, in light and in dark."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

WIDTHS = (400, 1200)
SCHEMES = ("light", "dark")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Runs in the page that holds the report in frames: a report has no script of its own. A frame is
# as narrow as it is asked to be, a window is not. `color-scheme` of a frame is what its page sees
# as the reader's preference.
_MEASURE = (Path(__file__).parent / "measure.js").read_text()


def measure(page, *, opened=True):
    """Return what `measure.js` says of a page, by (width, scheme)."""
    frames = "".join(
        _frame(page, width, scheme, f'data-key="{width} {scheme}"')
        for width in WIDTHS
        for scheme in SCHEMES
    )
    document = (
        f"<!DOCTYPE html><meta charset=utf-8>{frames}<pre id=result></pre>"
        f"<script>const opened = {json.dumps(opened)};\n{_MEASURE}</script>"
    )
    dom = _chromium(document, "--virtual-time-budget=20000", "--dump-dom")
    encoded = re.search(r'<pre id="result">([^<]*)</pre>', dom).group(1)
    results = json.loads(base64.b64decode(encoded))
    return {(width, scheme): results[f"{width} {scheme}"] for width in WIDTHS for scheme in SCHEMES}


def screenshot(page, file, width, scheme="light", *, height=1600, opened=False):
    """Write a PNG of the upper part of a page."""
    if opened:
        page = page.replace("<details", "<details open")
    document = (
        "<!DOCTYPE html><meta charset=utf-8><style>body { margin: 0; }</style>"
        f"{_frame(page, width, scheme, '', height)}"
    )
    _chromium(document, f"--screenshot={file}", f"--window-size={max(width, 500)},{height}")


def printed_pages(page):
    """Return the number of pages on paper."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.pdf"
        _chromium(page, f"--print-to-pdf={file}", "--no-pdf-header-footer")
        return len(re.findall(rb"/Type\s*/Page\b", file.read_bytes()))


def _frame(page, width, scheme, attributes, height=1000):
    return (
        f'<iframe srcdoc="{html.escape(page)}" {attributes} style="width: {width}px; '
        f'height: {height}px; border: 0; display: block; color-scheme: {scheme}"></iframe>'
    )


def _chromium(document, *options):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(document)
        profile = f"--user-data-dir={folder}/profile"
        done = subprocess.run(
            [CHROMIUM, *_OPTIONS, profile, *options, file.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"HOME": folder},
        )
    assert done.returncode == 0, done.stderr
    return done.stdout
