"""Opens reports in headless Chromium, and says what is wrong with them.

    python -m robustness.render_reports runs/demo/report.html --output looks

Each at 1400 and 390 pixels width, light and dark: the whole page as a picture to be looked at. An
error is: a message on the console, a request for anything outside the page, a page that scrolls
sideways, a picture that does not load, text of low contrast. Needs Chromium on the path.
"""

import argparse
import asyncio
import base64
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient
from tornado.websocket import WebSocketClientConnection, websocket_connect

WIDTHS, SCHEMES = (1400, 390), ("light", "dark")
_TALLEST = 16_000  # pixels of a picture
_LOOK = """
(() => {
  const wrong = [];
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width)
    wrong.push("scrolls sideways: " + document.documentElement.scrollWidth + " of " + width);
  for (const image of document.images)
    if (image.complete && !image.naturalWidth) wrong.push("broken picture: " + image.alt);
  const level = (c) => (c <= 10 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * level(r) + 0.7152 * level(g) + 0.0722 * level(b);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const seen = new Set();
  for (const element of document.querySelectorAll("main *, header *, footer *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || element.closest("svg")) continue;
    const colour = parse(getComputedStyle(element).color);
    let ground = element, paper = [0, 0, 0, 0];
    while (ground) {
      paper = parse(getComputedStyle(ground).backgroundColor);
      if (paper.length < 4 || paper[3] > 0) break;
      ground = ground.parentElement;
    }
    const [a, b] = [luminance(colour), luminance(paper)].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    const what = element.tagName + "." + element.className;
    if (contrast < 4.5 && !seen.has(what)) {
      seen.add(what);
      wrong.push("contrast " + contrast.toFixed(1) + " of " + what);
    }
  }
  return JSON.stringify({ wrong, height: document.documentElement.scrollHeight });
})()
"""


@contextmanager
def chromium() -> Iterator[int]:
    """Starts the browser; gives the port of its DevTools."""
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if program is None:
        raise SystemExit("error: found no chromium on the path")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, "--headless", "--no-sandbox", "--remote-debugging-port=0"]
        command += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND"]
        command += ["--hide-scrollbars", "about:blank"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as browser:
            assert browser.stderr is not None
            try:
                for line in browser.stderr:
                    if "DevTools listening on" in line:
                        yield int(line.split(":")[-1].split("/")[0])
                        return
                raise SystemExit("error: chromium does not start")
            finally:
                browser.terminate()


class Tab:
    """One page of the browser, by its DevTools protocol."""

    def __init__(self, connection: WebSocketClientConnection) -> None:
        self._connection, self._next = connection, 0
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command; events that come meanwhile are kept."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": parameters}
        await self._connection.write_message(json.dumps(message))
        while True:
            answer = json.loads(await self._connection.read_message() or "{}")
            if answer.get("id") == self._next:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    async def until(self, method: str) -> None:
        """Waits for an event."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(json.loads(await self._connection.read_message() or "{}"))


async def look(port: int, report: Path, width: int, scheme: str, picture: Path) -> list[str]:
    """Opens a report once; what is wrong with it."""
    answer = await AsyncHTTPClient().fetch(
        f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT", body=b""
    )
    url = json.loads(answer.body)["webSocketDebuggerUrl"]
    connection = await websocket_connect(url, max_message_size=2**28)
    tab = Tab(connection)
    for domain in ("Page", "Runtime", "Log", "Network"):
        await tab.call(f"{domain}.enable")
    feature = {"name": "prefers-color-scheme", "value": scheme}
    await tab.call("Emulation.setEmulatedMedia", features=[feature])
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    await tab.call("Emulation.setDeviceMetricsOverride", **size)
    await tab.call("Page.navigate", url=report.resolve().as_uri())
    await tab.until("Page.loadEventFired")
    found = await tab.call("Runtime.evaluate", expression=_LOOK, returnByValue=True)
    seen = json.loads(found["result"]["value"])
    # Not captureBeyondViewport: pictures that are loaded late would be missing.
    await tab.call(
        "Emulation.setDeviceMetricsOverride", **{**size, "height": min(seen["height"], _TALLEST)}
    )
    await asyncio.sleep(0.5)
    shot = await tab.call("Page.captureScreenshot", format="png")
    picture.write_bytes(base64.b64decode(shot["data"]))
    wrong = list(seen["wrong"])
    for event in tab.events:
        kind, values = event.get("method"), event.get("params", {})
        if kind == "Network.requestWillBeSent":
            asked = values["request"]["url"]
            if not asked.startswith("data:") and asked != report.resolve().as_uri():
                wrong.append(f"asks for {asked[:200]}")
        elif kind == "Log.entryAdded":
            wrong.append(f"console: {values['entry']['text']}")
        elif kind in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            wrong.append(f"console: {json.dumps(values)[:300]}")
    await tab.call("Page.close")
    connection.close()
    return wrong


async def look_at_all(reports: Sequence[Path], output: Path) -> int:
    """Opens every report in every way; how many errors there are."""
    errors = 0
    with chromium() as port:
        for number, report in enumerate(reports):
            for width in WIDTHS:
                for scheme in SCHEMES:
                    picture = output / f"{number}_{report.stem}_{width}_{scheme}.png"
                    wrong = await look(port, report, width, scheme, picture)
                    errors += len(wrong)
                    print(f"{picture}: {'; '.join(wrong) or 'well'}", flush=True)
    return errors


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--output", required=True, type=Path, help="folder for the pictures")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    return int(asyncio.run(look_at_all(options.reports, options.output)) > 0)


if __name__ == "__main__":
    sys.exit(main())
