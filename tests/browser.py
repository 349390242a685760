"""A real headless Chromium without an external network, driven through its DevTools protocol to inspect pages.

The protocol runs over two pipes, so neither a port nor a WebSocket library is needed.
"""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAM = shutil.which("chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",  # root cannot use the sandbox
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no network but this machine
    "--remote-debugging-pipe",
)


def obstacle() -> str | None:
    """The reason why no browser can start here, in one line; None if one can."""
    return None if PROGRAM else "no Chromium; on Debian: sudo apt-get install chromium"


class Browser:
    """Chromium with one empty page, running within its context. `profile` is an empty folder for its files."""

    def __init__(self, profile: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._sent = 0
        to_chromium, self._write = os.pipe()
        self._read, from_chromium = os.pipe()
        # Chromium reads commands from file descriptor 3 and answers on 4, so map our pipes to these numbers.
        pipes = f'exec "$0" "$@" 3<&{to_chromium} 4>&{from_chromium}'
        self._process = subprocess.Popen(
            ["bash", "-c", pipes, str(PROGRAM), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_chromium, from_chromium),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_chromium)
        os.close(from_chromium)
        self._answers = os.fdopen(self._read, "rb")
        self._session = ""

    def __enter__(self) -> "Browser":  # noqa: PYI034  (Self needs Python 3.11)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._write)  # Chromium exits when its pipe closes
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """Calls a protocol method and returns its answer; events received meanwhile are added to `events`."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._sent:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("Chromium has ended")
            content += byte
        answer: dict[str, Any] = json.loads(content)
        return answer

    def open(self, page: Path | str, width: int, height: int = 900) -> None:
        """Opens a page (file or address) in a window of this size in CSS pixels; waits until its images are loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def ask(self, expression: str) -> Any:  # noqa: ANN401 - any JavaScript value
        """Evaluates a JavaScript expression on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']['text']}")
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Console messages since the page was opened: its own errors, and requests that the browser refused."""
        kinds = {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed"}
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        """Addresses that the page has requested since it was opened."""
        sent = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def screenshot(self) -> bytes:
        """A PNG screenshot of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def pdf(self) -> bytes:
        """The page in its print layout."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])
