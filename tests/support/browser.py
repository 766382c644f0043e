"""Headless Chromium over its debugging pipe, with the standard library alone."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 120.0
"""Seconds that the browser may take for one answer, on a busy machine."""

# What is wrong with a page, as JavaScript expressions: wider than the window, pictures that fail, too little contrast.
WIDE = """(() => [...document.querySelectorAll("body *")].filter(e => {
    if (e.closest(".scroll") && !e.classList.contains("scroll")) return false;
    const box = e.getBoundingClientRect();
    return box.width > 0 && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(e => e.tagName + "." + e.getAttribute("class") + " " + e.textContent.slice(0, 40)))()"""
BROKEN = "[...document.images].filter(i => !i.complete || i.naturalWidth === 0).length"
UNREADABLE = """(() => {
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(x => x / 255).map(
        x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
        if (c !== "rgba(0, 0, 0, 0)") return c; } return "rgb(255, 255, 255)"; };
    const all = "p, a, b, td, th, small, li, summary, dt, dd, text, circle, .swatch";
    return [...document.querySelectorAll(all)].filter(e => {
        const style = getComputedStyle(e), graphic = e.matches("circle, .swatch");
        const ink = e.matches("text, circle") ? style.fill : graphic ? style.backgroundColor : style.color;
        const ground = e.matches(".swatch") ? behind(e.parentElement) : behind(e);
        const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05) < (graphic ? 3 : 4.5);
    }).map(e => e.tagName + "." + e.getAttribute("class") + " " + e.textContent.slice(0, 40));
})()"""


def find() -> str | None:
    """The browser's path, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a running browser; every event that it reports is kept."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._rest, self._count = read, write, b"", 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result; see https://chromedevtools.github.io/devtools-protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], PATIENCE)[0]:
                raise TimeoutError("the browser does not answer")
            if not (more := os.read(self._read, 2**20)):
                raise ConnectionError("the browser has gone")
            self._rest += more
        line, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def seen(self, *methods: str) -> list[dict[str, Any]]:
        """Parameters of all events so far of these kinds."""
        return [event["params"] for event in self.events if event["method"] in methods]

    def open(self, url: str, *, width: int, dark: bool = False, height: int = 900) -> None:
        """Load a page in a window of this width, to the end; earlier events are forgotten."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=url)
        end = time.monotonic() + PATIENCE
        while not self.seen("Page.loadEventFired"):
            if time.monotonic() > end:
                raise TimeoutError(f"{url} does not load")
            self._next()

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG, however long."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(executable: str, profile: Path) -> Iterator[Browser]:
    """Start the browser with an empty profile and without network, and end it.

    Without its sandbox, which containers do not allow: it opens only files that the tests have made.
    """
    command = [
        *(executable, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update"),
        *("--hide-scrollbars", "--proxy-server=127.0.0.1:9", f"--user-data-dir={profile}"),
    ]
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()

    def at_three_and_four() -> None:
        """Where the browser looks for its pipe; by way of high numbers, as 3 and 4 may be taken by the pipe itself."""
        for handle, high in ((in_read, 103), (out_write, 104)):
            os.dup2(handle, high)
        for high, low in ((103, 3), (104, 4)):
            os.dup2(high, low)
            os.close(high)

    process = subprocess.Popen(
        command,
        preexec_fn=at_three_and_four,
        close_fds=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(in_read)
    os.close(out_write)
    try:
        yield Browser(out_read, in_write)
    finally:
        os.close(in_write)  # the browser ends when its pipe does
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(out_read)
