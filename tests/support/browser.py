"""Headless Chromium by its debugging protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time

import httpx


def chromium():
    return next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )


class Browser:
    """One page. `errors`: of its scripts, and what its policy or the network refused."""

    def __init__(self, folder):
        from websockets.sync.client import connect

        self.process = subprocess.Popen(
            [
                chromium(), "--headless=new", "--no-sandbox", "--disable-gpu",
                "--remote-debugging-port=0", f"--user-data-dir={folder}", "--window-size=1280,900",
                "--disable-dev-shm-usage", "about:blank",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.port = int(self._until(lambda: (folder / "DevToolsActivePort").read_text().split()[0]))
        pages = self._until(
            lambda: [
                p for p in httpx.get(f"http://127.0.0.1:{self.port}/json").json()
                if p["type"] == "page"
            ]
        )  # fmt: skip
        self.opened = contextlib.ExitStack()
        self.socket = self.opened.enter_context(
            connect(pages[0]["webSocketDebuggerUrl"], max_size=None, open_timeout=90)
        )
        self.sent, self.errors = 0, []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def _until(self, found, seconds=90.0):
        end = time.monotonic() + seconds
        while True:
            try:
                value = found()
                if value:
                    return value
            except (OSError, IndexError, ValueError, httpx.HTTPError):
                pass
            assert time.monotonic() < end, "the browser did not answer"
            time.sleep(0.1)

    def call(self, method, **params):
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv(timeout=90))
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(answer["params"]["exceptionDetails"])
            if answer.get("method") == "Log.entryAdded":
                entry = answer["params"]["entry"]
                if entry["level"] == "error":
                    self.errors.append(entry["text"])
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script):
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script):
        return self._until(lambda: self.run(script))

    def open(self, url):
        """Loads it anew, also where only the fragment differs, and waits until it is ready."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.until("document.body && document.body.dataset.ready === '1'")

    def press(self, key):
        code = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}[key]
        same = dict(key=key, windowsVirtualKeyCode=code)
        typed = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **same, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **same)

    def size(self, width, height, mobile=False):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=mobile,
        )  # fmt: skip

    def dark(self, on):
        scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path, whole=False):
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        self.opened.close()
        self.process.kill()
        self.process.wait()
