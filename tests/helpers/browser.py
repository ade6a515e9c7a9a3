"""A headless Chromium that opens pages from this machine alone."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Frames of several widths, and what a script outside of the page finds in them: the page itself allows none.
HARNESS = """<!DOCTYPE html><title>frames</title>
{frames}
<pre id="found"></pre>
<script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map((frame) => {{
    const page = frame.contentDocument;
    return {{
      width: page.documentElement.clientWidth,
      needed: page.documentElement.scrollWidth,
      pictures: [...page.images].map((image) => [image.naturalWidth, image.alt]),
      charts: page.querySelectorAll("figure.chart svg[role=img]").length,
      background: getComputedStyle(page.body).backgroundColor,
      text: page.body.innerText,
      tallest: Math.max(...[...page.querySelectorAll("figure, tr, .verdict")].map((part) => part.offsetHeight)),
      folded: [...page.querySelectorAll("details > :not(summary)")].map((part) => part.offsetHeight),
      loaded: frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name),
    }};
  }});
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script>
"""


@dataclass(frozen=True)
class Opened:
    """What Chromium found: `frames`, one for each width, and the lines of its console."""

    frames: list[dict[str, Any]]
    console: list[str]


def install() -> str:
    """The path of Chromium, which is installed from Debian's packages if it is not there.

    Raises:
        RuntimeError: it cannot be installed; the message says why.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found:
        return found
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
        try:
            subprocess.run(
                ["apt-get", *command], check=True, env=environment, capture_output=True, text=True, timeout=1800
            )
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", None) or error
            raise RuntimeError(f"chromium cannot be installed by apt-get: {reason}") from error
    path = shutil.which("chromium")
    if path is None:
        raise RuntimeError("apt-get installed no program called chromium")
    return path


def open_page(program: str, page: Path, folder: Path, widths: tuple[int, ...], *, dark: bool = False) -> Opened:
    """Open a page in frames of some widths, in pixels, without a network.

    Args:
        folder: for the files of the browser.
    """
    frames = "\n".join(f'<iframe src="{page.as_uri()}" width="{width}" height="900"></iframe>' for width in widths)
    harness = folder / "frames.html"
    harness.write_text(HARNESS.format(frames=frames))
    done = _run(program, folder, "--dump-dom", harness.as_uri(), dark=dark)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Opened(json.loads(html.unescape(found[1])), console)


def print_page(program: str, page: Path, folder: Path, *, dark: bool = False) -> bytes:
    """The page as it is printed, a PDF file of letter paper.

    Args:
        folder: for the files of the browser.
    """
    printed = folder / "printed.pdf"
    done = _run(program, folder, "--no-pdf-header-footer", f"--print-to-pdf={printed}", page.as_uri(), dark=dark)
    assert printed.is_file(), done.stderr[-4000:]
    return printed.read_bytes()


def _run(program: str, folder: Path, *arguments: str, dark: bool) -> subprocess.CompletedProcess[str]:
    command = [
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--allow-file-access-from-files",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--user-data-dir={folder / 'profile'}",
    ]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=1200)
