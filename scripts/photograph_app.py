# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How do the web pages look? Opens one in Chromium, chooses a picture, and takes a screenshot.

    python scripts/photograph_app.py --output results/app.png  # after `make demo`; `make chromium` installs the browser
    python scripts/photograph_app.py --page outputs/mine/web --output results/page.png

The page is that of `vitae app`, or the one in a folder that `vitae export --format web --page` wrote. `--width 390`
shows it as on a phone.
"""

import argparse
import base64
import functools
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from vitae_hf.failures import run_command
from vitae_hf.files import PICTURES


FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run --hide-scrollbars"
    " --disable-background-networking --disable-component-update --disable-sync"
).split()


@contextmanager
def serving(command: list, cwd: Path | None = None, **environment: str) -> Iterator[str]:
    """Start a process that serves a page, give the address of the page, and stop the process at the end of the block.

    Args:
        command: what starts the process.
        cwd: the working directory of the process.
        environment: further environment variables for the process.

    Raises:
        RuntimeError: the process ended, or printed no address within a minute. The message contains its output.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=cwd, env={**os.environ, **environment})
        try:
            for _ in range(300):
                time.sleep(0.2)
                log.seek(0)
                text = log.read()
                if found := re.search(r"The page is at (\S+)", text):
                    yield found[1].rstrip("/")
                    return
                if process.poll() is not None:
                    break
            raise RuntimeError(f"{command} did not serve:\n{text}")
        finally:
            process.terminate()
            process.wait(20)


class Files(SimpleHTTPRequestHandler):
    """Gives files, without a word."""

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serving_files(folder: Path) -> Iterator[tuple[ThreadingHTTPServer, str]]:
    """A server of a folder's files, which sends no headers of its own, and its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextmanager
def chromium(*flags: str, width: int = 1100, height: int = 900) -> Iterator[webdriver.Chrome]:
    """Debian's Chromium without a window. It starts with an empty profile and logs every request."""
    options = webdriver.ChromeOptions()
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, *flags, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            yield driver
        finally:
            driver.quit()


def wait(driver: webdriver.Chrome, condition: Callable, what: str, seconds: float = 30):
    """Wait until `condition(driver)` is true, and return its value.

    Raises:
        selenium.common.TimeoutException: it was not true in time. `what` is for the message.
    """
    return WebDriverWait(driver, seconds, 0.1).until(condition, f"no {what} within {seconds} s")


def choose_picture(driver: webdriver.Chrome, path: Path) -> None:
    """Upload a file, after removing the picture that is there."""
    for button in driver.find_elements(
        By.CSS_SELECTOR, "#picture button[aria-label='Clear'], #picture button[title='Clear']"
    ):
        button.click()
    selector = "#picture input[type=file]"
    wait(driver, lambda d: d.find_elements(By.CSS_SELECTOR, selector), "place for a picture")[0].send_keys(str(path))


def shown_picture(driver: webdriver.Chrome) -> str | None:
    """The address of the picture that is shown under its map, or `None`."""
    return driver.execute_script("return document.querySelector('#view img')?.src")


def photograph(driver: webdriver.Chrome, path: Path) -> None:
    """Save a screenshot of the whole page, also of what is below the window."""
    size = driver.execute_script("return [innerWidth, document.documentElement.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(shot["data"]))


def photograph_app(model: str, picture: Path, width: int, output: Path) -> None:
    command = [sys.executable, "-m", "vitae_hf", "app", "--model", model]
    with serving(command) as address, chromium(width=width) as driver:
        driver.get(address)
        choose_picture(driver, picture)
        wait(driver, shown_picture, "map")
        time.sleep(1)  # for pictures to fade in
        photograph(driver, output)


def photograph_page(folder: Path, picture: Path, width: int, output: Path) -> None:
    with serving_files(folder) as (_, address), chromium(width=width) as driver:
        driver.get(address)
        field = wait(driver, lambda d: d.find_elements(By.CSS_SELECTOR, "#file:enabled"), "network")[0]
        for _ in range(2):  # the first run of a program is slow
            field.send_keys(str(picture))
            wait(driver, lambda d: d.find_element(By.ID, "answer").is_displayed(), "answer")
            time.sleep(1)
        photograph(driver, output)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/vitae-nano-fashion", help="folder or Hub name")
    parser.add_argument("--page", type=Path, help="folder with a page of its own, in place of the model")
    parser.add_argument("--picture", type=Path, default=PICTURES[1])
    parser.add_argument("--width", type=int, default=1100, help="of the window, in pixels")
    parser.add_argument("--output", type=Path, default=Path("outputs/app.png"), help="picture to write")
    arguments = parser.parse_args(argv)
    picture = arguments.picture.resolve()
    if arguments.page:
        photograph_page(arguments.page, picture, arguments.width, arguments.output)
    else:
        photograph_app(arguments.model, picture, arguments.width, arguments.output)
    return {"output": str(arguments.output), "model": str(arguments.page or arguments.model), "width": arguments.width}


if __name__ == "__main__":
    run_command(main)
