"""A headless Chromium, driven over the DevTools protocol with the standard library alone, for tests and screenshots.

The browser talks through two pipes (`--remote-debugging-pipe`): no port that others could reach, no client library, and
it ends by itself when this process does. A fresh profile each time.

    python -m tests.chromium PAGE PICTURE [WIDTH] [HEIGHT]       takes a screenshot of a page on disk
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--disable-gpu",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb", "--font-render-hinting=none",
]  # fmt: skip
PATIENCE = 60  # seconds for any answer


def find_chromium() -> str | None:
    """Path of the browser; None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """The process and its two pipes."""

    def __init__(self, profile: Path) -> None:
        program = find_chromium()
        assert program is not None, "no Chromium: apt-get install chromium"
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Out of the way of 3 and 4, which are the numbers that the browser looks for.
        high = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 20) for number in (theirs_in, theirs_out)]
        log = str(profile / "log.txt")
        actions = [
            (os.POSIX_SPAWN_DUP2, high[0], 3),
            (os.POSIX_SPAWN_DUP2, high[1], 4),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root with it
        words = [program, *FLAGS, *sandbox, f"--user-data-dir={profile}", "about:blank"]
        self.pid = os.posix_spawn(program, words, os.environ, file_actions=actions, setsid=True)
        for number in (*high, theirs_in, theirs_out):
            os.close(number)
        self._number, self._rest = 0, b""
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The answer; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        text = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while text:
            text = text[os.write(self._out, text) :]
        number, end = self._number, time.monotonic() + PATIENCE
        while True:
            answer = self.receive(end)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def receive(self, end: float) -> dict[str, Any]:
        """The next message; an event is also kept. Raises TimeoutError."""
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError("Chromium does not answer")
            data = os.read(self._in, 1 << 20)
            assert data, "Chromium has ended"
            self._rest += data
        raw, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(raw)
        if "method" in message:
            self.events.append(message)
        return message

    def close(self) -> None:
        for number in (self._in, self._out):
            os.close(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Killed at the end whatever happens, and its profile removed."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        browser = Browser(Path(profile))
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A page that is looked at. All that it complains about or asks the network for is kept."""

    def __init__(self, browser: Browser, width: int = 1400, height: int = 900) -> None:
        self.browser = browser
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.send(method, self.session, **parameters)

    def open(self, page: Path) -> None:
        self.send("Page.navigate", url=page.resolve().as_uri())
        self.wait_for("Page.loadEventFired")

    def wait_for(self, method: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.events(method):
            self.browser.receive(end)

    def events(self, method: str) -> list[dict[str, Any]]:
        return [
            event["params"]
            for event in self.browser.events
            if event.get("sessionId") == self.session and event["method"] == method
        ]

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are awaited."""
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def press(self, key: str) -> None:
        codes = {"Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text)

    def choose(self, name: str, value: object) -> None:
        """In a field of the page, as a hand would."""
        told = json.dumps(str(value))
        self.run(f"(() => {{ const one = document.getElementById('{name}'); one.value = {told};"
                 " one.dispatchEvent(new Event('input', {bubbles: true})) })()")  # fmt: skip

    def reset(self) -> None:
        """The filters of the page."""
        self.run("new Promise((done) => { find('filters').reset(); setTimeout(done, 20) })")

    def numbers(self, kind: str) -> list[int]:
        """Of all rows that are shown, elements of this class, in order, after the last chunk has been asked for."""
        self.run("(() => { while (!find('more').hidden) find('more').click() })()")
        return self.run(f"[...document.querySelectorAll('.{kind}')].map((one) => Number(one.dataset.row))")

    def load_images(self) -> int:
        """How many there are, all of them decoded."""
        loaded = "Promise.all([...document.images].map((one) => { one.loading = 'eager'; return one.decode() }))"
        return self.run(f"{loaded}.then((all) => all.length)")

    def broken_policies(self) -> set[str]:
        """What the page's policy says of a picture from elsewhere, a style, a handler, a script and a request."""
        self.run("""(() => {
          window.broken = [];
          document.addEventListener("securitypolicyviolation", (event) => broken.push(event.effectiveDirective));
          const picture = "<img src=http://127.0.0.1:9/x><p style='color:red' onclick='1'>";
          document.body.insertAdjacentHTML("beforeend", picture);
          const script = document.createElement("script");
          script.textContent = "document.title = 'owned'";
          document.body.append(script);
          return fetch("http://127.0.0.1:9/").catch(() => 0);
        })()""")
        return set(self.run("new Promise((done) => setTimeout(() => done(broken), 100))"))

    def complaints(self) -> list[Any]:
        """Errors, warnings of the console, broken policies, requests that are not for data or the page itself."""
        found: list[Any] = [event["exceptionDetails"]["text"] for event in self.events("Runtime.exceptionThrown")]
        found += [event["type"] for event in self.events("Runtime.consoleAPICalled")]
        found += [event["entry"]["text"] for event in self.events("Log.entryAdded")]
        found += [event["issue"]["code"] for event in self.events("Audits.issueAdded")]
        return found

    def requests(self) -> list[str]:
        """Addresses of all requests but those for data in the page itself."""
        urls = [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    def screenshot(self) -> bytes:
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])


if __name__ == "__main__":
    page, picture, *size = sys.argv[1:]
    with chromium() as started:
        tab = Tab(started, *map(int, size))
        tab.open(Path(page))
        tab.run("new Promise((done) => setTimeout(done, 300))")
        Path(picture).write_bytes(tab.screenshot())
