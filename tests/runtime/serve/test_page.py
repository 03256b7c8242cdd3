"""The page, in a real browser: what it shows, when it shows nothing, and what it says to copy."""

import base64
import http.server
import json
import os
import shlex
import shutil
import subprocess
import threading
import time
from importlib.resources import files

import pytest

from invariclip.preprocessing.find import find_images
from invariclip.serve.service import Batching

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

ANSWERED = "!document.getElementById('result').hidden && document.getElementById('busy').hidden"
BUSY = "!document.getElementById('busy').hidden && document.getElementById('answers').ariaBusy === 'true'"
LABELS = (
    "[...document.querySelectorAll('#result .answer')].filter(one => one.checkVisibility()).map(one => one.textContent)"
)
INTRODUCED = "document.getElementById('facts').textContent.includes('space')"


class Browser:
    """A headless Chromium with one page, driven over its DevTools protocol by a pipe."""

    def __init__(self, folder):
        ours, theirs = os.pipe(), os.pipe()  # what it reads, what it writes

        def wired():  # first to numbers that are neither 3 nor 4, which may be ends of these pipes
            os.dup2(ours[0], 60)
            os.dup2(theirs[1], 61)
            os.dup2(60, 3)
            os.dup2(61, 4)

        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        self.process = subprocess.Popen(
            [CHROMIUM, *options, f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=wired, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(ours[0])
        os.close(theirs[1])
        self._out, self._in, self._number, self._session = ours[1], os.fdopen(theirs[0], "rb"), 0, None
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.tell("Page.enable")

    def tell(self, method, **params):
        """Sends a command; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            said = json.loads(self._read())
            if said.get("id") == self._number:
                assert "error" not in said, said
                return said["result"]

    def _read(self):
        said = b""
        while not said.endswith(b"\0"):
            byte = self._in.read(1)
            assert byte, "the browser has ended"
            said += byte
        return said[:-1]

    def open(self, url, width=1280, height=800, dark=False):
        """Shows a page, and waits until it is loaded."""
        self.tell("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])
        self.tell("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def ask(self, expression):
        """A JavaScript expression's value."""
        said = self.tell("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def until(self, expression, seconds=20):
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.ask(expression):
            assert time.monotonic() < end, f"never: {expression}; the page says {self.ask('document.body.innerText')!r}"
            time.sleep(0.01)

    def choose(self, selector, paths):
        """Gives files to a file input, as its dialog does."""
        root = self.tell("DOM.getDocument")["root"]["nodeId"]
        node = self.tell("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.tell("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def screenshot(self, path):
        """Writes a PNG of the whole page."""
        size = self.tell("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.tell("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        """Ends it."""
        self.process.kill()
        self.process.wait()
        os.close(self._out)
        self._in.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    one = Browser(tmp_path_factory.mktemp("browser"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def paths(tiny_images, tmp_path_factory):
    """Images whose names a shell would take apart."""
    folder = tmp_path_factory.mktemp("named")
    names = ("plain.png", "two words.png", "it's; $HOME.png")
    return [
        shutil.copy(path, folder / name)
        for path, name in zip(find_images([tiny_images])[:3], names, strict=True)
    ]  # fmt: skip


@pytest.fixture
def service(unsure_model, gated):
    return gated(unsure_model, batching=Batching(max_batch=1))


@pytest.fixture
def ask(serving, service):
    with serving(service) as client:
        yield client


def typed(browser, field, value):
    browser.ask(
        f"(one => {{ one.value = {json.dumps(value)}; one.dispatchEvent(new Event('input')); }})"
        f"(document.getElementById('{field}'))"
    )


def labels(model, paths, **options):
    return [one.label or "Not sure" for one in model.classify(list(map(str, paths)), **options)]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_an_answer_is_never_shown_beside_another_image(browser, ask, service, unsure_model, paths, width, dark):
    browser.open(f"http://127.0.0.1:{ask.port}/", width, 844, dark)
    browser.until(INTRODUCED)
    assert browser.ask("document.documentElement.scrollWidth") <= width
    service.gate.set()
    typed(browser, "limit", 1)
    for path in paths[:2]:
        browser.choose("#file", [path])
        # The engine waits for the second image: while it does, nothing is shown beside it
        if not service.gate.is_set():
            assert service.begun.acquire(timeout=20)
            assert browser.ask(BUSY)
            assert browser.ask("document.getElementById('doing').textContent").startswith("Classifying the image …")
            assert browser.ask(LABELS) == []
            assert browser.ask("document.querySelector('#previews img').alt") == path.name
            service.gate.set()
        browser.until(ANSWERED)
        assert browser.ask(LABELS) == labels(unsure_model, [path])
        assert browser.ask("document.documentElement.scrollWidth") <= width
        service.gate.clear()
        while service.begun.acquire(blocking=False):
            pass


def test_several_images_at_a_time(browser, ask, service, unsure_model, paths):
    service.gate.set()
    browser.open(f"http://127.0.0.1:{ask.port}/")
    browser.until(INTRODUCED)
    typed(browser, "limit", 1)
    browser.choose("#file", paths)
    browser.until(ANSWERED)
    assert browser.ask(LABELS) == labels(unsure_model, paths)
    names = browser.ask("[...document.querySelectorAll('#items .name')].map(one => one.textContent)")
    assert names == [path.name for path in paths]
    browser.choose("#file", paths[:1])
    browser.until(ANSWERED)
    assert browser.ask(LABELS) == labels(unsure_model, paths[:1])


def test_other_classes_clear_the_answer_and_another_threshold_fades_it(browser, ask, service, unsure_model, paths):
    service.gate.set()
    browser.open(f"http://127.0.0.1:{ask.port}/")
    browser.until(INTRODUCED)
    typed(browser, "limit", 0)
    browser.choose("#file", paths[:1])
    browser.until(ANSWERED)
    assert browser.ask(LABELS) == ["Not sure"]
    service.gate.clear()
    typed(browser, "limit", 1)
    assert browser.ask(BUSY)
    assert browser.ask("getComputedStyle(document.getElementById('items')).opacity") == "0.45"
    service.gate.set()
    browser.until(ANSWERED)
    assert browser.ask(LABELS) == labels(unsure_model, paths[:1])
    assert browser.ask("getComputedStyle(document.getElementById('items')).opacity") == "1"
    service.gate.clear()
    typed(browser, "classes", "sun, moon")
    assert browser.ask(BUSY)
    assert browser.ask(LABELS) == []
    service.gate.set()
    browser.until(ANSWERED)
    assert browser.ask(LABELS) == labels(unsure_model.with_classes(["sun", "moon"]), paths[:1])


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_curl_line_asks_the_same(browser, ask, service, unsure_model, paths):
    service.gate.set()
    browser.open(f"http://127.0.0.1:{ask.port}/")
    browser.until(INTRODUCED)
    classes = "sun, it's @home; $HOME"
    typed(browser, "limit", 0.25)
    typed(browser, "classes", classes)
    browser.choose("#file", paths)
    browser.until(ANSWERED)
    line = browser.ask("document.getElementById('curl').textContent")
    assert "abstain_above=0.25" in line
    assert len([word for word in shlex.split(line) if word.startswith("images=")]) == 3
    done = subprocess.run(
        ["sh", "-c", f"{line} --silent --fail-with-body"], cwd=paths[0].parent, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout
    model = unsure_model.with_classes(["sun", "it's @home; $HOME"])
    expected = model.classify(list(map(str, paths)), abstain_above=0.25)
    told = json.loads(done.stdout)["predictions"]
    assert [(one["image"], one["label"]) for one in told] == [
        (path.name, one.label) for path, one in zip(paths, expected, strict=True)
    ]
    assert browser.ask(LABELS) == [one.label or "Not sure" for one in expected]


def test_errors_are_words(browser, ask, service, paths, tmp_path):
    service.gate.set()
    browser.open(f"http://127.0.0.1:{ask.port}/")
    browser.until(INTRODUCED)
    problem = "document.getElementById('problem').hidden ? '' : document.getElementById('problem').textContent"
    (tmp_path / "note.txt").write_text("no image")
    browser.choose("#file", [tmp_path / "note.txt"])
    browser.until(f"({problem}).includes('image note.txt: not an image of a known format')")
    assert browser.ask(LABELS) == []
    browser.choose("#file", [paths[0]] * 65)
    browser.until(f"({problem}) === 'Up to 64 images are taken at once, and 65 were given.'")
    browser.choose("#file", paths[:1])
    browser.until(ANSWERED)
    assert browser.ask(problem) == ""


class Proxy(http.server.BaseHTTPRequestHandler):
    """Gives the page, and has nothing but its own HTML for questions."""

    def do_GET(self):
        page = self.path == "/"
        body = files("invariclip.serve").joinpath("page.html").read_bytes() if page else b"{}"
        self.send_response(200 if page else 503)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(502)
        self.end_headers()
        self.wfile.write(
            b"<html><head><title>502 Bad Gateway</title></head><body><h1>no</h1><script>x</script></body></html>"
        )

    def log_message(self, *_):
        pass


def test_a_proxy_s_page_is_told_in_words(browser, paths):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            browser.open(f"http://127.0.0.1:{proxy.server_port}/")
            browser.choose("#file", paths[:1])
            browser.until("!document.getElementById('problem').hidden")
            told = browser.ask("document.getElementById('problem').textContent")
        finally:
            proxy.shutdown()
            thread.join()
    assert told == (
        "The answer is not of this server: status 502 Bad Gateway, “502 Bad Gateway”. "
        "A proxy between it and this page may have given it."
    )
