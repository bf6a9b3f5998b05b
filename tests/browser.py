"""A page in headless Chromium, driven by the DevTools protocol; the browser ends when the test does."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_START, _WAIT = 60, 60
_KEYS = {"Tab": 9, "Enter": 13, "ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "ArrowDown": 40, " ": 32}


def chromium() -> str:
    """The browser's program; no test of the page is left out for want of it."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    assert found, "no Chromium: `make chromium` installs the one of Debian or Ubuntu (docs/contributing.md)"
    return found


class Tab:
    """One page. ``requests`` are the addresses that it asked for, ``errors`` what went wrong in it."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._loaded = 0
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            told = json.loads(self._socket.recv(_WAIT))
            if told.get("id") == number:
                assert "error" not in told, (method, told["error"])
                return dict(told["result"])
            self._note(told["method"], told["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded += 1
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(str(params["entry"]))

    def open(self, url: str) -> None:
        """Go to an address, and wait until its page is there."""
        before = self._loaded
        self.call("Page.navigate", url=url)
        while self._loaded == before:
            told = json.loads(self._socket.recv(_WAIT))
            self._note(told["method"], told["params"])

    def run(self, script: str) -> Any:
        """The value of an expression, or of the promise that it is."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = _WAIT) -> Any:
        """Wait for an expression to become true."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < deadline, f"never true: {script}; {self.errors}"
            time.sleep(0.05)
        return found

    def press(self, key: str, *, ctrl: bool = False, shift: bool = False) -> None:
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else None)
        common = {"key": key, "windowsVirtualKeyCode": _KEYS[key], "modifiers": 2 * ctrl + 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text and not ctrl else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def write(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def look(self, *, dark: bool = False, width: int = 1280, height: int = 900) -> None:
        """How wide the window is, and which colours its owner prefers."""
        preferred = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=preferred)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )  # fmt: skip

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@contextlib.contextmanager
def browsing(folder: Path) -> Iterator[Tab]:
    """A tab of a browser of its own, whose files lie in ``folder``."""
    errors = folder / "chromium-stderr"
    with errors.open("w") as stream:
        process = subprocess.Popen(
            [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={folder / 'chromium'}",
             "about:blank"],
            stdout=subprocess.DEVNULL, stderr=stream, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + _START
        while not (found := re.search(r"ws://([\d.]+:\d+)/", errors.read_text(errors="replace"))):
            assert process.poll() is None and time.monotonic() < deadline, errors.read_text(errors="replace")
            time.sleep(0.05)
        with urllib.request.urlopen(f"http://{found[1]}/json", timeout=_WAIT) as answer:
            address = next(page["webSocketDebuggerUrl"] for page in json.load(answer) if page["type"] == "page")
        with connect(address, max_size=None, open_timeout=_WAIT) as socket:
            yield Tab(socket)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait(30)
