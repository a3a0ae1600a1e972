"""A headless Chromium that tests ask things over its DevTools pipe: one page, its console, its width, its picture."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One tab. `complaints`: what the console, the log and uncaught errors said, refusals of a policy among them."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._number, self._rest = write, read, 0, b""
        self.complaints: list[str] = []
        target = self._ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = ""
        self._session = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable", {})

    _session = ""

    def size(self, width: int, height: int, *, dark: bool) -> None:
        facts = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._ask("Emulation.setDeviceMetricsOverride", facts)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._ask("Emulation.setEmulatedMedia", {"features": scheme})

    def trust_anything(self) -> None:
        """As a person does who goes on past the warning about an unknown authority."""
        self._ask("Security.setIgnoreCertificateErrors", {"ignore": True})

    def open(self, address: str) -> None:
        self._ask("Page.navigate", {"url": address})
        self.wait("document.readyState === 'complete'")

    def value(self, script: str) -> Any:
        answer = self._ask("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, f"{script} did not become true; {self.value('document.body.innerText')}"
            time.sleep(0.1)

    def picture(self, path: Path) -> None:
        """The whole page, from top to bottom."""
        high = self.value("document.documentElement.scrollHeight")
        wide = self.value("window.innerWidth")
        clip = {"x": 0, "y": 0, "width": wide, "height": high, "scale": 1}
        answer = self._ask("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(answer["data"]))

    def press(self, key: str) -> None:
        code, text = {"Tab": (9, ""), "Enter": (13, "\r")}[key]
        pressed = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", {"type": kind} | pressed)

    def _ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        asked = {"id": self._number, "method": method, "params": params}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._number:
                assert "error" not in message, message
                found: dict[str, Any] = message["result"]
                return found
            self._note(message)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._read, 65536)
            assert block, "the browser has ended"
            self._rest += block
        line, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(params["args"]))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser of its own, ended by its process id."""
    theirs, write = os.pipe()
    read, others = os.pipe()
    words = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--remote-debugging-pipe",
    ]
    words += [f"--user-data-dir={profile}", "--no-first-run", "about:blank"]
    shell = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{others}', "bash", *words]
    started = subprocess.Popen(shell, pass_fds=(theirs, others), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(theirs)
    os.close(others)
    try:
        yield Browser(write, read)
    finally:
        os.close(write)
        os.close(read)
        started.terminate()
        started.wait(timeout=15)
