"""Models in JavaScript: transformers.js in Node, and the page in Chromium, with no way out of this machine."""

import functools
import json
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import photograph_app
import PIL.Image
import pytest
import torch
from helpers import ASSETS, REPOSITORY, last_line, run, write_bad_files
from measure_web import OFFLINE, in_chromium
from photograph_app import chromium, serving_files, wait
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from transformers import AutoModel, AutoModelForImageClassification

from vitae_hf import ViTAEImageProcessorPil, find_model


pytestmark = pytest.mark.browser
PACKAGES = REPOSITORY / "tests" / "javascript"
MODEL = find_model("vitae-nano-fashion")
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
WEBGPU = (
    *("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"),
    *("--use-angle=swiftshader", "--use-vulkan=swiftshader", "--ignore-gpu-blocklist"),
)
REMEMBER = """
    document.addEventListener("classified", ({ detail }) => {
        window.classified = { pixels: Array.from(detail.pixels), logits: Array.from(detail.logits) };
    })
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An exported model with its page."""
    output = tmp_path_factory.mktemp("web") / "nano"
    last_line(run("export", MODEL, "--format", "web", "--page", "--runtime", PACKAGES, "--output", output))
    return output


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """A photograph, grey, odd sides, tiny, turned and mirrored by EXIF, transparent."""
    root = tmp_path_factory.mktemp("pictures")
    cat = PIL.Image.open(ASSETS / "chelsea.png").convert("RGB")
    turned, transparent = PIL.Image.Exif(), cat.convert("RGBA")
    turned[0x0112] = 7  # orientation
    transparent.putalpha(PIL.Image.linear_gradient("L").resize(cat.size))
    cat.save(root / "photograph.jpg", quality=85)
    cat.crop((3, 5, 130, 242)).save(root / "odd.png")
    cat.crop((200, 100, 203, 102)).save(root / "tiny.png")
    cat.save(root / "turned.jpg", exif=turned)
    transparent.save(root / "transparent.png")
    shutil.copy(ASSETS / "sneaker.png", root / "grey.png")
    return [
        root / name for name in ("photograph.jpg", "grey.png", "odd.png", "tiny.png", "turned.jpg", "transparent.png")
    ]


@functools.cache
def by_python(picture: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Pixels, logits and label of the model in torch."""
    pixel_values = ViTAEImageProcessorPil.from_pretrained(MODEL)(picture, return_tensors="pt").pixel_values
    model = AutoModelForImageClassification.from_pretrained(MODEL).eval()
    with torch.no_grad():
        logits = model(pixel_values).logits[0].numpy()
    return pixel_values.numpy().ravel(), logits, model.config.id2label[logits.argmax()]


def check_as_python(picture: Path, pixels: list[float], logits: list[float]) -> None:
    expected_pixels, expected_logits, _ = by_python(picture)
    np.testing.assert_array_equal(np.float32(pixels), expected_pixels, picture.name)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-5 * expected_logits.std(), err_msg=picture.name)


@pytest.fixture(scope="module")
def in_node(folder, pictures) -> dict:
    command = ["node", PACKAGES / "transformers_js.mjs", folder, *pictures]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_transformers_js_computes_what_the_model_computes(in_node, pictures):
    for picture, outputs in zip(pictures, in_node["pictures"]):
        check_as_python(picture, outputs["pixels"], outputs["logits"])
    headless = AutoModel.from_pretrained(MODEL).eval()
    with torch.no_grad():
        features = headless(torch.from_numpy(by_python(pictures[0])[0]).reshape(1, 3, 64, 64))
    for name in ("pooler_output", "last_hidden_state"):
        expected = features[name].numpy().ravel()
        np.testing.assert_allclose(in_node["pictures"][0][name], expected, rtol=0, atol=1e-5 * expected.std())


def test_pipelines_of_transformers_js_find_every_program_and_come_near(in_node, pictures):
    upright = [index for index, picture in enumerate(pictures) if picture.name != "turned.jpg"]  # it turns no picture
    labels = [by_python(pictures[index])[2] for index in upright]
    for dtype in ("fp32", "fp16", "q8"):
        assert [in_node["labels"][dtype][index] for index in upright] == labels
    photograph = in_node["pictures"][0]
    difference = np.abs(np.subtract(photograph["own_pixels"], photograph["pixels"])).mean() * 255 * 0.225
    assert 0.1 < difference < 2  # grey levels, of 31 with the settings of the model as they are
    features, expected = np.squeeze(in_node["features"]), photograph["pooler_output"]
    assert np.corrcoef(features, expected)[0, 1] > 0.99


def test_the_settings_come_near_in_a_browser_too(folder, pictures):
    with_ours, own = (case["mean"] for case in in_chromium(folder, pictures[:1])["photograph.jpg"][::2])
    assert 0.1 < with_ours == own < 2  # grey levels; browsers know one filter


def test_the_example_for_node_says_what_python_says(folder, pictures, tmp_path):
    shutil.copy(REPOSITORY / "examples" / "run_node.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(PACKAGES / "node_modules")
    command = ["node", tmp_path / "run_node.mjs", folder, pictures[1]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split(":")[0] == by_python(pictures[1])[2], done.stderr


@contextmanager
def open_page(folder: Path, *flags: str, **size: int):
    """The page in a browser of its own. In the end, it has asked for nothing but its own files."""
    with serving_files(folder) as (_, address), chromium(OFFLINE, *flags, **size) as driver:
        driver.get(address)
        wait(driver, lambda d: "Choose a picture" in notice(d), "network")
        driver.execute_script(REMEMBER)
        yield driver
        messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        asked = [urlsplit(url) for url in urls if urlsplit(url).scheme not in ("data", "blob", "chrome")]
        assert len(asked) > 8 and {url.hostname for url in asked} == {"127.0.0.1"}
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def text(driver, selector: str) -> str:
    return driver.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)


def notice(driver) -> str:
    return text(driver, "#notice")


def choose(driver, path: Path) -> str:
    """Choose a file, and return what the page says of it."""
    driver.execute_script("document.querySelector('#notice').textContent = ''")
    driver.find_element(By.ID, "file").send_keys(str(path))
    done = wait(driver, lambda d: (found := notice(d)) and not found.startswith("Reading") and found, "answer")
    return done


def check_page(driver, picture: Path) -> None:
    said, (*_, label) = choose(driver, picture), by_python(picture)
    check_as_python(picture, **driver.execute_script("return window.classified"))
    assert said.startswith(f"{label}. ") and text(driver, "#labels").startswith(label)


def shares(driver) -> list[float]:
    """The percentages that the page shows."""
    return [float(line.split(" %")[0]) for line in text(driver, "#labels").splitlines() if line.endswith("%")]


def test_each_of_several_labels_has_a_probability_of_its_own(folder, pictures, tmp_path):
    several = shutil.copytree(folder, tmp_path / "several")
    config = json.loads((several / "config.json").read_text())
    (several / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    with open_page(several) as driver:
        choose(driver, pictures[0])
        logits = torch.tensor(driver.execute_script("return window.classified.logits"))
        assert shares(driver) == pytest.approx((100 * logits.sigmoid()).topk(5).values.tolist(), abs=0.06)


def test_the_page_computes_what_the_model_computes(folder, pictures):
    with open_page(folder) as driver:
        for picture in pictures:
            check_page(driver, picture)
        found = shares(driver)
        assert len(found) == 5 and found == sorted(found, reverse=True)
        for index, dtype in enumerate(("float32", "float16", "int8")):
            Select(driver.find_element(By.ID, "precision")).select_by_index(index)
            wait(driver, lambda d: "ms in the network" in notice(d), dtype)
            assert notice(driver).startswith(by_python(pictures[-1])[2])


def test_the_page_uses_threads_and_needs_no_connection_after_the_first_visit(folder, pictures):
    with serving_files(folder) as (server, address), chromium(OFFLINE) as driver:
        driver.get(address)
        wait(driver, lambda d: "Choose a picture" in notice(d), "network")
        assert driver.execute_script("return crossOriginIsolated")
        server.shutdown()
        server.server_close()
        driver.get("about:blank")
        driver.get(address)
        wait(driver, lambda d: "Choose a picture" in notice(d), "network without a connection")
        assert choose(driver, pictures[0]).startswith(by_python(pictures[0])[2])


def test_the_page_computes_the_same_on_webgpu(folder, pictures, monkeypatch):
    flags = [flag for flag in photograph_app.FLAGS if flag != "--disable-gpu"]
    monkeypatch.setattr(photograph_app, "FLAGS", flags)
    with serving_files(folder) as (_, address), chromium(OFFLINE, *WEBGPU) as driver:
        driver.get(address)
        wait(driver, lambda d: "Choose a picture" in notice(d), "network", 120)
        assert "WebGPU" in text(driver, "#runtime")
        driver.execute_script(REMEMBER)
        for picture in pictures[:2]:
            check_page(driver, picture)


def test_bad_files_get_a_sentence_and_the_page_goes_on(folder, pictures, tmp_path):
    files = write_bad_files(tmp_path)
    (tmp_path / "short.jpg").write_bytes(pictures[0].read_bytes()[:9000])
    sentences = {"text": "not a picture", "postscript": "not a picture", "empty": "not a picture"}
    sentences |= {"truncated": "damaged", "bomb": "too many pixels", "pixels": "too many pixels"}
    with open_page(folder) as driver:
        for name, sentence in sentences.items():
            assert sentence in choose(driver, files[name])
            assert text(driver, "#labels") == ""
        assert "damaged" in choose(driver, tmp_path / "short.jpg")
        check_page(driver, pictures[1])


def test_a_picture_can_be_dropped_or_photographed_and_a_link_gets_a_sentence(folder):
    drop = """
        const data = new DataTransfer();
        if (arguments[0]) data.items.add(arguments[0]);
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    """
    picture = "new File([await (await fetch('original/../style.css')).blob()], 'style.png')"
    with open_page(folder, *CAMERA) as driver:
        driver.execute_script(drop)
        assert "this one is a link" in notice(driver)
        driver.execute_script(f"return (async () => {{ {drop.replace('arguments[0]', picture)} }})()")
        wait(driver, lambda d: "not a picture" in notice(d), "sentence about what was dropped")
        driver.find_element(By.ID, "camera").click()
        wait(driver, lambda d: d.find_element(By.ID, "take").is_displayed(), "camera")
        driver.find_element(By.ID, "take").click()
        wait(driver, lambda d: "ms in the network" in notice(d), "answer about the photograph")
        assert driver.execute_script("return document.querySelector('#video').srcObject") is None  # it is off again


def test_the_page_fits_a_phone_and_works_by_keyboard_and_screen_reader(folder, pictures):
    with open_page(folder, width=360, height=740) as driver:
        reached = []
        for _ in range(3):
            ActionChains(driver).send_keys(Keys.TAB).perform()
            reached.append(driver.switch_to.active_element.accessible_name)
        assert reached == ["Choose a picture", "Photograph one", "Precision"]
        choose(driver, pictures[0])
        assert driver.execute_script("return document.documentElement.scrollWidth") == 360
        everything = "[...document.querySelectorAll('body *')]"
        assert driver.execute_script(f"return {everything}.every(e => e.getBoundingClientRect().right <= 360)")
        seen = driver.find_element(By.ID, "seen")
        assert seen.aria_role == "image" and "photograph.jpg" in seen.accessible_name
        assert driver.find_element(By.ID, "notice").get_attribute("role") == "status"


def test_the_example_for_the_browser_says_what_python_says(folder, pictures, tmp_path):
    shutil.copytree(folder, tmp_path / "web")
    shutil.copy(REPOSITORY / "examples" / "run_browser.html", tmp_path / "web")
    with serving_files(tmp_path / "web") as (_, address), chromium(OFFLINE) as driver:
        driver.get(f"{address}run_browser.html")
        wait(driver, lambda d: d.execute_script("return document.querySelector('input').onchange !== null"), "network")
        driver.find_element(By.TAG_NAME, "input").send_keys(str(pictures[1]))
        said = wait(driver, lambda d: text(d, "output"), "answer")
        assert said.split(":")[0] == by_python(pictures[1])[2]
