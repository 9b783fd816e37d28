"""The web page as people use it: Chromium, a trained model, and no way out of this machine."""

import io
import json
import sys
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import pytest
from helpers import ASSETS, last_line, run, write_bad_files
from huggingface_hub.utils import httpx
from photograph_app import choose_picture, chromium, serving, shown_picture, wait
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from vitae_hf.web.page import MAPS


pytestmark = pytest.mark.browser
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
SNEAKER, CAT = (ASSETS / name for name in ("sneaker.png", "chelsea.png"))


class Outside(BaseHTTPRequestHandler):
    """A proxy that lets nothing through, and remembers what wanted to."""

    def refuse(self):
        self.server.asked.append(self.path)
        self.send_error(502)

    do_CONNECT = do_GET = do_HEAD = do_POST = refuse

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def outside():
    with ThreadingHTTPServer(("127.0.0.1", 0), Outside) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def page(tmp_path_factory, outside):
    """Address of the page with a model that a short demo trained; the server too finds the proxy in its way."""
    root = tmp_path_factory.mktemp("browser")
    last_line(run("demo", "--epochs", 2, "--output", root / "outputs" / "vitae-nano-fashion"))
    proxy = f"http://127.0.0.1:{outside.server_port}"
    variables = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": "127.0.0.1,localhost", "HF_HUB_OFFLINE": "0"}
    variables |= {name.lower(): value for name, value in variables.items() if name.endswith("PROXY")}
    variables["HF_ENDPOINT"] = "https://huggingface.co"
    with serving([sys.executable, "-m", "vitae_hf", "app"], cwd=root, **variables) as address:
        yield address


@pytest.fixture
def open_page(page, outside):
    """A function that opens the page in a browser of its own.

    In the end, neither browsers nor server have asked another machine for anything. (Chromium itself would, but can
    find none.)
    """
    with ExitStack() as stack:
        drivers = []

        def open_page(**size):
            drivers.append(stack.enter_context(chromium(OFFLINE, **size)))
            drivers[-1].get(page)
            wait(drivers[-1], lambda d: "Choose a picture" in notice(d), "page")
            return drivers[-1]

        yield open_page
        for driver in drivers:
            messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
            urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
            asked = [urlsplit(url) for url in urls if urlsplit(url).scheme not in ("data", "blob", "chrome")]
            assert len(asked) > 20 and {url.hostname for url in asked} == {"127.0.0.1"}
    assert outside.asked == []


def text(driver, selector: str) -> str:
    return driver.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)


def notice(driver) -> str:
    return text(driver, "#notice")


def explain(driver, path) -> str:
    """Choose a picture, and return what the page calls it, once its map is there."""
    before = shown_picture(driver)
    choose_picture(driver, path)
    wait(driver, lambda d: shown_picture(d) not in (None, before), "new map")
    wait(driver, lambda d: "seconds" in notice(d), "time")
    return text(driver, "#label h2")


def pixels(driver) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(httpx.get(shown_picture(driver)).content)).convert("RGB"), int)


def change(driver, act) -> np.ndarray:
    """The picture that the page shows after `act`, which must be another one than before."""
    before = shown_picture(driver)
    act()
    wait(driver, lambda d: shown_picture(d) not in (None, before), "change of the map")
    return pixels(driver)


def test_a_photograph_gets_a_label_and_maps_that_follow_the_slider(open_page):
    driver = open_page()
    assert explain(driver, CAT)  # whatever garment it takes the cat for
    assert explain(driver, SNEAKER) == "Sneaker"
    bars = text(driver, "#label").splitlines()
    assert sum(line.endswith("%") for line in bars) == 5
    last = pixels(driver)
    slider = driver.find_element(By.CSS_SELECTOR, "#cell input[type=range]")
    assert "stage 3, cell 3" in text(driver, "#caption")
    first = change(driver, lambda: slider.send_keys(Keys.ARROW_LEFT))
    assert "stage 3, cell 2" in text(driver, "#caption")
    assert np.abs(first - last).mean() > 1
    seen = {kind: None for kind in MAPS if kind != "Attention"}
    for kind in seen:
        choice = driver.find_element(By.CSS_SELECTOR, f"#kind input[value='{kind}']")
        seen[kind] = change(driver, lambda choice=choice: choice.click()).tobytes()
    assert len(set(seen.values())) == len(seen)


def test_choosing_a_label_shows_what_speaks_for_it(open_page):
    driver = open_page()
    explain(driver, SNEAKER)
    buttons = driver.find_elements(By.CSS_SELECTOR, "#label button")
    change(driver, buttons[2].click)
    other = text(driver, "#label").splitlines()
    caption = wait(driver, lambda d: "speaks for" in (found := text(d, "#caption")) and found, "Grad-CAM")
    assert caption.split(":")[0] in other and not caption.startswith("Sneaker")


def test_bad_files_get_their_message_and_the_page_goes_on(open_page, tmp_path):
    driver, files = open_page(), write_bad_files(tmp_path)
    messages = {"text": "not a picture", "truncated": "damaged", "bomb": "too many pixels"}
    for name, message in messages.items():
        choose_picture(driver, files[name])
        wait(driver, lambda d, message=message: message in notice(d), message)
        assert shown_picture(driver) is None and "%" not in text(driver, "#label")
    assert explain(driver, SNEAKER) == "Sneaker"


def test_a_moving_gif_is_its_first_frame_and_a_large_file_is_refused(open_page, tmp_path):
    driver = open_page()
    frames = [PIL.Image.open(SNEAKER).convert("RGB"), PIL.Image.new("RGB", (28, 28), "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert explain(driver, tmp_path / "moving.gif") == "Sneaker" and "first frame" in notice(driver)
    (tmp_path / "large.png").write_bytes(SNEAKER.read_bytes() + bytes(21 * 2**20))
    choose_picture(driver, tmp_path / "large.png")
    wait(driver, lambda d: "exceed the maximum allowed size" in text(d, "body"), "message about the size")
    assert explain(driver, CAT)


def test_an_unknown_model_gets_a_message_and_the_page_goes_on(open_page, outside):
    driver = open_page()
    explain(driver, SNEAKER)
    field = driver.find_element(By.CSS_SELECTOR, "#model input")
    for name, message in (
        ("org/no-such-model", "cannot be fetched from the Hub"),
        ("/etc/passwd", "There is no model"),
    ):
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(name, Keys.ENTER)
        wait(driver, lambda d, message=message: message in notice(d), message)
        wait(driver, lambda d: shown_picture(d) is None, "no picture")
    assert {urlsplit(f"//{asked}").hostname for asked in outside.asked} == {"huggingface.co"}  # as was asked for
    outside.asked.clear()
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("outputs/vitae-nano-fashion", Keys.ENTER)
    wait(driver, shown_picture, "map")


def test_two_users_at_once_see_their_own(open_page):
    """Each asks for the other's picture in turn, and waits for neither."""
    drivers, pictures = [open_page(), open_page()], [SNEAKER, CAT]
    alone = [explain(driver, picture) for driver, picture in zip(drivers, pictures)]
    own = [pixels(driver) for driver in drivers]
    for _ in range(2):
        drivers.reverse()
        before = [shown_picture(driver) for driver in drivers]
        for driver, picture in zip(drivers, pictures):
            choose_picture(driver, picture)
        for driver, old in zip(drivers, before):
            wait(driver, lambda d, old=old: shown_picture(d) not in (None, old), "new map")
        assert [text(driver, "#label h2") for driver in drivers] == alone
        assert all(np.array_equal(pixels(driver), picture) for driver, picture in zip(drivers, own))


def test_the_page_fits_a_phone(open_page):
    driver = open_page(width=360, height=740)
    explain(driver, SNEAKER)
    assert driver.execute_script("return document.documentElement.scrollWidth") == 360
    wide = "return [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 361).length"
    assert driver.execute_script(wide) == 0
