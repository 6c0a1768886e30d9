"""The page in a real browser: at the width of a desk and of a phone, light and dark."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
MEASURE = """
<script>
addEventListener("load", () => {
  const page = document.documentElement, colour = getComputedStyle(document.body);
  document.body.dataset.measured = [
    page.scrollWidth, innerWidth, document.querySelectorAll("svg").length,
    document.querySelectorAll("svg path").length, colour.backgroundColor, colour.color,
  ].join("; ");
});
</script>
"""


def measured(page: Path, folder: Path, width: int, *, dark: bool) -> list[str]:
    """What a script of ours, put into a copy of the page, finds there."""
    copy = folder / f"measured-{width}-{dark}.html"
    text = page.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>")
    # The page itself lets no script run.
    open_text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert open_text != text
    copy.write_text(open_text, encoding="utf-8")
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [
            str(BROWSER), *FLAGS, *theme, f"--user-data-dir={folder / f'profile-{width}-{dark}'}",
            f"--window-size={width},900", "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    (found,) = re.findall(r'data-measured="([^"]*)"', done.stdout)
    return found.split("; ")


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_nothing_is_wider_than_the_window(
    make_run: Any, page_of: Any, tmp_path: Path, width: int
) -> None:
    """500 pixels are the least that this browser makes a window of."""
    page = tmp_path / "page.html"
    page.write_text(page_of(make_run("one"), make_run("another-of-a-long-name" * 3)).html)
    light, dark = (measured(page, tmp_path, width, dark=dark) for dark in (False, True))
    assert int(light[0]) <= int(light[1])
    assert int(light[2]) > 5
    assert int(light[3]) > 50
    assert light[:4] == dark[:4]
    assert light[4:] != dark[4:]
