"""The web page: hostile pictures and names, what its server gives away, and the Space."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path

import build_space
import gradio
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from gradio_client import Client, handle_file
from helpers import ASSETS, class_token_config, pyramid_config, save_model, windowed_config, write_bad_files
from hub_server import HubServer
from huggingface_hub.utils import httpx
from matplotlib.colors import to_hex
from photograph_app import serving
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from transformers import SegformerImageProcessor

from vitae_hf import ViTAEImageProcessor
from vitae_hf.dense.backbone import dense_config
from vitae_hf.dense.detection.models import HeadSize, make_processor, new_detector
from vitae_hf.dense.segmentation.model import new_segmenter
from vitae_hf.evaluation.colours import class_colours
from vitae_hf.web.page import MAPS, MOST_WAITING, StayHere, examine, respond, show
from vitae_hf.web.visitors import Models, Refusal, read_picture


SNEAKER = ASSETS / "sneaker.png"
EVIL = "from pathlib import Path\nPath(__file__).with_suffix('.executed').touch()\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """`trained/v1`, `trained/v2` and `trained/large`, the first the latest; beside them a model that is not offered."""
    root = tmp_path_factory.mktemp("page")
    labels = {index: f"label {index}" for index in range(5)}
    configs = {"v1": pyramid_config(id2label=labels), "v2": windowed_config(), "large": class_token_config()}
    for age, (name, config) in enumerate(configs.items()):
        save_model(root / "trained" / name, config)
        os.utime(root / "trained" / name / "config.json", (2e9 - age, 2e9 - age))
    shutil.copytree(root / "trained" / "v1", root / "elsewhere")
    return root


@pytest.fixture(scope="module")
def models(root):
    return Models(root=root / "trained")


SENTENCES = {
    "text": "not a picture",
    "truncated": "damaged",
    "bomb": "too many pixels: at most 50 million",
    "pixels": "too many pixels",
    "postscript": "not a picture",
    "empty": "not a picture",
}


@pytest.mark.parametrize("problem", SENTENCES)
def test_a_bad_file_gets_a_plain_sentence(models, tmp_path, problem):
    explanation, sentence = examine(models, {"path": str(write_bad_files(tmp_path)[problem])}, "trained/v1")
    assert explanation is None and SENTENCES[problem] in sentence
    assert str(tmp_path) not in sentence


def test_whatever_goes_wrong_stays_in_the_log(models, monkeypatch):
    def fail(*args):
        raise MemoryError("40 GB in /home/somebody")

    monkeypatch.setattr("vitae_hf.web.page.explain", fail)
    explanation, sentence = examine(models, {"path": str(SNEAKER)}, "trained/v1")
    assert explanation is None and "did not work" in sentence and "somebody" not in sentence


def test_a_moving_picture_is_its_first_frame_and_says_so(tmp_path):
    frames = [PIL.Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    picture, sentence = read_picture(tmp_path / "moving.gif")
    assert picture.getpixel((5, 5)) == (255, 0, 0) and "first frame" in sentence
    frames[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "phone.jpg")[1] == ""  # a preview comes with it, nothing moves


def test_every_map_of_every_cell_can_be_shown(models):
    for name in models.names():
        explanation, sentence = examine(models, {"path": str(SNEAKER)}, name)
        assert "seconds" in sentence and len(explanation.cells) > 1
        for kind in MAPS:
            for cell in range(1, len(explanation.cells) + 1):
                picture, text = show(explanation, kind, cell)
                assert picture.shape == (448, 448, 3) and picture.dtype == np.uint8
                assert (explanation.cells[cell - 1] in text) or kind in ("Rollout", "Grad-CAM", "Picture")


def test_the_rollout_is_that_of_the_cells_stage(models):
    """Whatever the cells are called: the page reads no names."""
    explanation, _ = examine(models, {"path": str(SNEAKER)}, "trained/v1")
    explanation.cells = [f"cell no. {number}" for number in range(len(explanation.cells))]
    for number, stage in enumerate(explanation.stages, start=1):
        picture, text = show(explanation, "Rollout", number)
        assert f"<b>stage {stage}</b>" in text and ("random features" in text) == (stage not in explanation.rollout)
        explanation.rollout.setdefault(stage, np.pad(np.ones((1, 4)), ((0, 3), (0, 0))))
    assert "random features" not in show(explanation, "Rollout", 1)[1]


def test_maps_lie_where_they_belong(models):
    """A map that is 1 in its upper row colours the upper quarter alone."""
    explanation, _ = examine(models, {"path": str(SNEAKER)}, "trained/v1")
    explanation.image[:] = 0
    explanation.attention_share[-1] = np.pad(np.ones((1, 4)), ((0, 3), (0, 0)))
    picture, text = show(explanation, "Branches", len(explanation.cells))
    purple, orange = picture[20, 440], picture[440, 20]
    assert purple[2] > purple[1] + 20 and orange[0] > orange[2] + 20
    assert '<i class=now title="stage 3, cell 2: 25% attention"><b style="height: 25.0%">' in text


def test_a_label_can_be_asked_about_and_the_slider_stays(models):
    first, _, scores, slider = respond(models, {"path": str(SNEAKER)}, "trained/v1", None)
    assert len(scores) == 5 and slider.maximum == slider.value == len(first.cells)
    other = list(scores)[3]
    second, _, _, kept = respond(models, {"path": str(SNEAKER)}, "trained/v1", first, other)
    assert second.target_label == other and "value" not in kept
    assert not np.array_equal(first.grad_cam, second.grad_cam)


def test_the_latest_model_comes_first_and_without_one_the_page_says_how_to_get_one(models, tmp_path):
    assert models.names() == ["trained/v1", "trained/v2", "trained/large"]
    _, sentence = examine(Models(root=tmp_path / "nothing"), None, None)
    assert "make demo" in sentence


def test_what_is_typed_is_never_a_path(root, models, monkeypatch):
    """With Hub names or without; of a folder that is not offered, nothing can be told, not even that it exists."""
    monkeypatch.chdir(root)
    for names in (models, Models(root=root / "trained", hub_names=True)):
        for name in ("elsewhere", str(root / "elsewhere"), "../trained/v1", "./elsewhere", "trained/../elsewhere", "~"):
            with pytest.raises(Refusal) as refusal:
                names.load(name)
            with pytest.raises(Refusal) as nothing:
                names.load(name.replace("elsewhere", "nowhere").replace("v1", "v9"))
            assert str(refusal.value) == str(nothing.value).replace("nowhere", "elsewhere").replace("v9", "v1")
    with pytest.raises(ValueError, match="neither a folder nor a Hub name"):
        Models(["/no/such/folder"])


def test_a_folder_is_loaded_without_its_code_and_without_pickle(root):
    hostile = root / "hostile" / "model"
    shutil.copytree(root / "trained" / "v1", hostile)
    config = json.loads((hostile / "config.json").read_text())
    config["auto_map"] = {"AutoModelForImageClassification": "evil.Model", "AutoConfig": "evil.Config"}
    (hostile / "config.json").write_text(json.dumps(config))
    (hostile / "evil.py").write_text(EVIL)
    models = Models(root=root / "hostile")
    assert models.load("hostile/model")[0].config.num_labels == 5
    assert not (hostile / "evil.executed").exists()
    (hostile / "model.safetensors").rename(hostile / "pytorch_model.bin")
    with pytest.raises(Refusal, match="no weights in safetensors"):
        models.load("hostile/model")


def test_a_folder_without_an_image_processor_is_said_to_lack_it(root):
    folder = root / "bare" / "model"
    shutil.copytree(root / "trained" / "v1", folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(Refusal, match="bare/model cannot be used: .*image processor"):
        Models(root=root / "bare").load("bare/model")


def test_other_families_are_not_offered(root):
    other = root / "others" / "vit"
    shutil.copytree(root / "trained" / "v1", other)
    (other / "config.json").write_text(
        json.dumps({"model_type": "vit", "architectures": ["ViTForImageClassification"]})
    )
    assert Models(root=root / "others").names() == []
    with pytest.raises(ValueError, match="is no ViTAE"):
        Models([str(other)])


def test_models_in_memory_are_few_and_a_folder_trained_again_is_loaded_again(root, models):
    loaded = [models.load("trained/v1")[0] for _ in range(2)]
    assert loaded[0] is loaded[1]
    os.utime(root / "trained" / "v1" / "model.safetensors")
    assert models.load("trained/v1")[0] is not loaded[0]


ASK_THE_HUB = """
import sys
from vitae_hf.web.visitors import Models, Refusal

models = Models(hub_names=True)
for name in sys.argv[1:]:
    try:
        print(type(models.load(name)[0]).__name__)
    except Refusal as refusal:
        print(refusal)
"""


def test_hub_names_are_downloaded_or_refused_in_plain_words(root, tmp_path):
    """With the real client against the tests' hub, by a machine that has a token, which is not for visitors."""
    with HubServer(tmp_path / "hub") as hub:
        for name in ("org/v1", "org/private"):
            hub.create(name, private=name == "org/private")
            for path in (root / "trained" / "v1").iterdir():
                hub.commit_from_elsewhere(name, path.name, path.read_bytes())
        hub.create("org/empty")
        variables = {**os.environ, **hub.environment(tmp_path / "cache")}
        command = [sys.executable, "-c", ASK_THE_HUB, "org/none", "org/private", "org/empty", "org/v1", "org..v1"]
        told = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == [
        "There is no model org/none on the Hub, or it is not public.",
        "There is no model org/private on the Hub, or it is not public.",
        "org/empty on the Hub has no config.json: it is no model of Transformers.",
        "ViTAEForImageClassification",
        "There is no model “org..v1” here: a Hub name looks like organisation/model.",
    ]
    assert not any(path.endswith(".py") for _, path, *_ in hub.log)


def test_without_a_connection_a_hub_name_is_refused_in_plain_words():
    with pytest.raises(Refusal, match="org/none is not on this machine, and the Hub cannot be reached."):
        Models(hub_names=True).load("org/none")


@pytest.fixture(scope="module")
def address(root):
    """A page that `vitae app` serves, in a working directory with files that are nobody's business."""
    cached = root / ".gradio" / "cached_examples"  # of another page
    cached.mkdir(parents=True)
    for folder in (root, cached):
        (folder / "secret.txt").write_text("nobody's business")
    command = [sys.executable, "-m", "vitae_hf", "app", "--models", root / "trained"]
    with serving(command, cwd=root) as address:
        yield address


def test_the_page_answers_a_client(address):
    client = Client(address, verbose=False)
    notice, scores, _ = client.predict(handle_file(SNEAKER), "trained/v1", api_name="/explain_picture")
    assert "seconds" in notice and len(scores["confidences"]) == 5
    notice, scores, _ = client.predict(handle_file(SNEAKER), "trained/v9", api_name="/explain_picture")
    assert "trained/v9" in notice and not scores


def upload(address: str, content: bytes = SNEAKER.read_bytes()) -> Path:
    return Path(httpx.post(f"{address}/gradio_api/upload", files={"files": content}).json()[0])


def as_file(path, kind: str = "gradio.FileData") -> dict:
    return {"path": str(path), "meta": {"_type": kind}}


def ask(address: str, way: str, function: str, values: dict) -> str:
    """What a function answers to values by name, `last` being the page's own, by one of gradio's ways to call it."""
    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=f"{address}/gradio_api/", timeout=20, headers=headers) as client:
        if way == "queue/join":
            functions = client.get(f"{address}/config").json()["dependencies"]
            number = next(entry["id"] for entry in functions if entry["api_name"] == function)
            message = {"data": list(values.values()), "fn_index": number, "session_hash": "somebody"}
            client.post("queue/join", content=json.dumps(message)).raise_for_status()
            lines = client.get("queue/data", params={"session_hash": "somebody"}).text.splitlines()
            messages = [json.loads(line.removeprefix("data: ")) for line in lines if line]
            return json.dumps(next(message["output"] for message in messages if message["msg"] == "process_completed"))
        sent = {name: value for name, value in values.items() if name != "last"}
        sent = sent if way == "call/v2" else {"data": list(values.values())}
        answer = client.post(f"{way}/{function}", content=json.dumps(sent))
        if way in ("run", "api"):
            return answer.text
        return client.get(f"{way}/{function}/{answer.json()['event_id']}").text


def no_uploads(sent: Path, root: Path) -> list:
    """What a request can put in the place of a picture, none of it one that was sent to the page."""
    uploads, secret = sent.parents[1], root / "secret.png"
    secret.write_bytes(SNEAKER.read_bytes())
    os.mkfifo(uploads / "pipe.png")
    (uploads / "link.png").symlink_to(secret)
    up = f"{uploads}/{'../' * len(uploads.parts)}{secret}"
    paths = [secret, root / "missing.png", root, uploads, uploads / "missing.png", uploads / "pipe.png", up, "", "~"]
    paths += [uploads / "link.png", "secret.png", "/dev/zero", "/proc/self/environ", "\0", "\ud800", "x" * 10_000]
    paths += ["http://example.com/cat.png", "file:///etc/passwd"]
    found = [wrap(path) for path in paths for wrap in (lambda path: {"path": str(path)}, as_file)]
    for path in (secret, root / "missing.png"):
        file, other = as_file(path), as_file(path, "gradio.Other")
        found += [other, str(path), [file], {"path": file}, {"path": None, "url": None, "value": file}]
        found.append({"url": f"file://{path}", "meta": file["meta"]})
    return [*found, 5, {"path": 5}, {}, {"path": None}, []]


PICTURE = ("file", {"file": None, "name": "trained/v1", "last": None})
QUESTIONS = {  # of which value is to be a file; the others; of every way to ask, and of every function with such values
    ("queue/join", "explain_picture"): PICTURE,
    ("call", "explain_picture"): PICTURE,
    ("call/v2", "explain_picture"): PICTURE,
    ("run", "explain_picture"): PICTURE,
    ("api", "explain_picture"): PICTURE,
    ("call", "explain_label"): PICTURE,
    ("call", "show"): ("kind", {"last": None, "kind": None, "cell": 1}),
    ("run", "load_example"): ("example", {"example": None}),
}


@pytest.mark.parametrize(("way", "function"), QUESTIONS)
def test_no_file_but_an_upload_is_opened_and_all_others_get_one_sentence(root, address, way, function):
    sent = upload(address)
    place, values = QUESTIONS[way, function]
    try:
        payloads = no_uploads(sent, root)
        if place != "file":  # but a text or a number
            payloads = [value for value in payloads if isinstance(value, dict | list)]
        is_closed = way in ("run", "api") and function != "load_example"  # they go past the queue
        sentence = "Please join the queue" if is_closed else "is not one that was sent to this page"
        told = set()
        for value in payloads:
            told.add(ask(address, way, function, {**values, place: value}))
            assert len(told) == 1 and sentence in next(iter(told)), (value, told)
    finally:
        for name in ("pipe.png", "link.png"):
            (sent.parents[1] / name).unlink(missing_ok=True)


@pytest.mark.parametrize("way", ["queue/join", "call", "call/v2"])
def test_an_upload_is_explained_by_every_way_to_ask(address, way):
    values = {**PICTURE[1], "file": as_file(upload(address))}
    assert "seconds for label" in ask(address, way, "explain_picture", values)


def test_an_example_is_a_picture_that_can_be_taken(address):
    answer = httpx.post(f"{address}/gradio_api/run/load_example", json={"data": [0]}).json()["data"][0]["value"]
    assert "seconds for label" in ask(address, "call", "explain_picture", {**PICTURE[1], "file": answer})


def test_no_file_outside_the_uploads_can_be_fetched(root, address):
    own = [root / "secret.txt", root / "trained" / "v1" / "config.json", SNEAKER, Path("/etc/passwd"), Path(__file__)]
    relative = ["secret.txt", "../secret.txt", "%2e%2e/secret.txt", ".gradio/cached_examples/secret.txt"]
    for path in [*relative, *own]:
        answer = httpx.get(f"{address}/gradio_api/file={path}")
        assert answer.status_code in (403, 404), path


def test_an_upload_can_be_read_by_who_sent_it_and_is_bounded(address):
    sent = upload(address)
    assert httpx.get(f"{address}/gradio_api/file={sent}").content == SNEAKER.read_bytes()
    answer = httpx.post(f"{address}/gradio_api/upload", files={"files": bytes(21 * 2**20)})
    assert answer.status_code == 413


@pytest.mark.parametrize("way", ["queue/join", "call/explain_picture", "run/explain_picture", "api/explain_picture"])
def test_more_visitors_than_can_wait_are_told_so(address, way):
    """Nor can anybody go past the queue."""
    functions = httpx.get(f"{address}/config").json()["dependencies"]
    number = next(function["id"] for function in functions if function["api_name"] == "explain_picture")
    message = {"data": [as_file(upload(address)), "trained/v1", None], "fn_index": number}
    with httpx.Client(base_url=f"{address}/gradio_api/") as crowd:
        while crowd.get("queue/status").json()["queue_size"]:  # of the last crowd
            pass
        answers = [crowd.post(way, json={**message, "session_hash": f"visitor {index}"}) for index in range(100)]
    codes = [answer.status_code for answer in answers]
    if way.startswith(("run", "api")):
        assert codes == [404] * 100
    else:
        assert codes[:20] == [200] * 20 and codes.count(503) > 20


def test_a_model_explains_one_picture_at_a_time_whoever_asks_and_few_wait(models, monkeypatch):
    """Forty at once, as if there were no queue, whose place one can leave while the work goes on."""
    working, most, go = [], [], threading.Event()

    def explain(*args):
        working.append(None)
        most.append(len(working))
        go.wait(20)
        working.pop()
        raise Refusal("done")

    monkeypatch.setattr("vitae_hf.web.page.explain", explain)
    with ThreadPoolExecutor(40) as crowd:
        asking = [crowd.submit(examine, models, {"path": str(SNEAKER)}, "trained/v1") for _ in range(40)]
        refused = list(islice(as_completed(asking, timeout=20), 40 - 1 - MOST_WAITING))
        go.set()
        told = [answer.result()[1] for answer in asking]
    assert all("come back" in answer.result()[1] for answer in refused)
    assert told.count("done") == 1 + MOST_WAITING and max(most) == 1


def test_a_page_for_this_machine_answers_to_its_names_alone(address):
    """Not to a web site that lets its name point here."""
    port = address.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert httpx.get(f"{address}/config", headers={"Host": host}).status_code == 200, host
    for host in (f"evil.example:{port}", "localhost.evil.example", "192.0.2.7", "localhost@evil.example", "["):
        site = {"Host": host, "Origin": f"http://{host}", "Access-Control-Request-Method": "POST"}
        for method, path in (("GET", ""), ("GET", "config"), ("POST", "gradio_api/upload"), ("OPTIONS", "config")):
            answer = httpx.request(method, f"{address}/{path}", headers=site)
            assert answer.status_code == 400 and "--trusted_host" in answer.text, (host, path)
            assert "access-control-allow-origin" not in answer.headers


def test_other_sites_cannot_use_the_page(address):
    own = httpx.post(f"{address}/gradio_api/upload", headers={"Origin": address}, files={"files": b"mine"})
    assert own.status_code == 200
    for site in ("http://evil.example", "http://127.0.0.1:1", "http://localhost:3000", "null", "["):
        for method in ("GET", "POST", "OPTIONS"):
            headers = {"Origin": site, "Access-Control-Request-Method": "POST"}
            answer = httpx.request(method, f"{address}/gradio_api/upload", headers=headers)
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers, site


def test_a_page_for_others_answers_to_addresses_its_machine_and_those_it_is_told():
    def here(request):
        return PlainTextResponse("here")

    app = Starlette(routes=[Route("/", here)], lifespan=StayHere("0.0.0.0", ["Page.example"]).surround)
    with TestClient(app) as client:
        for host in ("192.0.2.7:7860", "[2001:db8::1]", socket.gethostname(), "localhost:7860", "page.example"):
            assert client.get("/", headers={"Host": host, "Origin": f"https://{host}"}).text == "here"
        behind_a_proxy = {"Host": "127.0.0.1:7860", "Origin": "https://page.example:8443"}
        assert client.get("/", headers=behind_a_proxy).text == "here"
        for host in ("evil.example", "page.example.evil.example", "evil.page.example", ""):
            assert client.get("/", headers={"Host": host}).status_code == 400
        assert client.get("/", headers={"Host": "192.0.2.7", "Origin": "http://192.0.2.8"}).status_code == 403
    for name in ("https://page.example", "page.example:80", "*", ""):
        with pytest.raises(ValueError, match="expected the name of a host"):
            StayHere("0.0.0.0", [name])


def test_nothing_is_fetched_from_elsewhere(address):
    """Neither by the browser nor, for a visitor, by the server."""
    page = httpx.get(address)
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=\"(?:https?:)?//[^\"]+", page.text)
    for scheme in ("http", "https"):
        for route in ("file=", "file/", "proxy="):
            answer = httpx.get(f"{address}/gradio_api/{route}{scheme}://example.com/cat.png")
            assert answer.status_code == 403 and "nothing is fetched from elsewhere" in answer.text
    assert httpx.post(f"{address}/gradio_api/process_recording", files={"video": b"for ffmpeg"}).status_code == 403


def test_it_listens_to_this_machine_alone_unless_told_otherwise(address):
    assert address.startswith("http://127.0.0.1:")
    with socket.socket() as other:
        other.settimeout(2)
        port = int(address.rstrip("/").rpartition(":")[2])
        assert other.connect_ex(("127.0.0.2", port)) != 0  # an address of this machine that is not the one


def test_a_space_runs_from_its_folder_with_nothing_but_its_requirements(root, tmp_path):
    """In an empty directory, by its own copy of the package, without what only training needs; and leaves nothing."""
    build = [str(root / "trained" / "v1"), "--output", str(tmp_path / "space")]
    assert build_space.main(build)["files"] > 30
    _, front, _ = (tmp_path / "space" / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert (fields["sdk"], fields["app_file"], fields["license"]) == ("gradio", "app.py", "apache-2.0")
    assert fields["sdk_version"] == gradio.__version__ and "models" not in fields
    wanted = (tmp_path / "space" / "requirements.txt").read_text()
    assert "gradio>=" in wanted and "torch>=" in wanted and "grad-cam>=" in wanted and "vitae" not in wanted
    for folder in ("empty", "site"):
        (tmp_path / folder).mkdir()
    missing = ["accelerate", "datasets", "evaluate", "timm", "peft", "selenium"]
    (tmp_path / "site" / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n")
    page = tmp_path / "space" / "vitae_hf" / "web" / "page.py"
    page.write_text(page.read_text().replace("What does ViTAE see?", "The copy in the Space"))
    command = [sys.executable, tmp_path / "space" / "app.py"]
    hub = {"SPACE_ID": "org/page", "SPACE_HOST": "org-page.hf.space,own.org"}
    with serving(command, cwd=tmp_path / "empty", PYTHONPATH=str(tmp_path / "site"), **hub) as address:
        for host in ("org-page.hf.space", "own.org"):
            names = {"Host": host, "Origin": f"https://{host}"}
            assert "The copy in the Space" in httpx.get(address, headers=names).text
        assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 400
        client = Client(address, verbose=False)
        notice, scores, _ = client.predict(handle_file(SNEAKER), "models/v1", api_name="/explain_picture")
        assert "seconds" in notice and scores["label"].startswith("label ")
        notice, scores, _ = client.predict(handle_file(SNEAKER), "org/other", api_name="/explain_picture")
        assert "choose one from the list" in notice  # a Space downloads nothing that visitors name
        sent = upload(address, b"mine")
        assert sent.read_bytes() == b"mine" and sent.parents[1].stat().st_mode & 0o077 == 0
    assert not sent.parents[1].exists()
    with pytest.raises(ValueError, match="is not empty"):
        build_space.main(build)


def test_a_space_of_a_hub_name_says_which_model_it_shows(tmp_path):
    build_space.main(["org/vitae-mine", "--output", str(tmp_path / "space")])
    fields = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---\n", 2)[1])
    assert fields["models"] == fields["preload_from_hub"] == ["org/vitae-mine"]
    assert "Models(['org/vitae-mine'])" in (tmp_path / "space" / "app.py").read_text()
    with pytest.raises(ValueError, match="neither a folder nor a Hub name"):
        build_space.main(["no such/model", "--output", str(tmp_path / "other")])
    build_space.main(["vitae-nano-fashion", "--output", str(tmp_path / "carried")])  # the Hub does not have it
    assert "models" not in yaml.safe_load((tmp_path / "carried" / "README.md").read_text().split("---\n", 2)[1])
    assert (tmp_path / "carried" / "models" / "vitae-nano-fashion" / "model.safetensors").is_file()
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def detectors(root):
    """Detectors with boxes and masks, and a segmenter, which find something everywhere; pictures of shoes are grey."""
    names = {index: f"label {index}" for index in range(5)}
    backbone = dense_config(pyramid_config())
    for name in ("rt_detr", "mask_rcnn"):
        torch.manual_seed(0)
        model = new_detector(name, backbone, names, HeadSize(16, 1, 10))
        for layer in (getattr(model, "class_embed", None), *model.modules()):
            if name == "rt_detr" and isinstance(layer, torch.nn.Linear) and layer.out_features == len(names):
                torch.nn.init.constant_(layer.bias, 1.0)
        if name == "mask_rcnn":
            torch.nn.init.constant_(model.roi_heads.box_predictor.cls_score.bias[3:4], 9.0)
        model.save_pretrained(root / "detectors" / name)
        make_processor(name, {"height": 64, "width": 64}).save_pretrained(root / "detectors" / name)
    new_segmenter(backbone, names, 16).save_pretrained(root / "detectors" / "upernet")
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(root / "detectors" / "upernet")
    return Models(root=root / "detectors")


@pytest.mark.parametrize("name", ["rt_detr", "mask_rcnn"])
def test_a_detector_shows_what_it_finds(detectors, name):
    found, notice, scores, slider = respond(detectors, {"path": str(SNEAKER)}, f"detectors/{name}", None)
    assert "objects. Choose a class" in notice and scores and slider.visible is False
    assert ("masks" in found.objects) == (name == "mask_rcnn")
    picture, caption = show(found, "Attention", 1)
    plain, _ = show(found, "Picture", 1)
    assert picture.shape == plain.shape == (448, 448, 3) and "what the detector found" in caption
    assert np.ptp(picture.astype(int), axis=-1).max() > 60 > np.ptp(plain.astype(int), axis=-1).max()
    one, _, again, _ = respond(detectors, {"path": str(SNEAKER)}, f"detectors/{name}", found, "label 4")
    assert again == scores and not np.array_equal(show(one, "Attention", 1)[0], picture)


def test_a_segmenter_shows_the_class_of_each_pixel_and_how_much_each_fills(detectors, tmp_path):
    PIL.Image.effect_noise((3000, 1500), 90).convert("RGB").save(tmp_path / "large.png")
    found, notice, shares, _ = respond(detectors, {"path": str(tmp_path / "large.png")}, "detectors/upernet", None)
    assert found.picture.size == (1333, 667)  # a mask of each class of a large photograph would fill the memory
    assert (
        "classes and how much of the picture each fills" in notice
        and sum(shares.values()) == pytest.approx(1)
        and len(shares) > 1
    )
    picture, caption = show(found, "Attention", 1)
    assert all(f"</i> {name}</span>" in caption for name in shares)
    first, last = (to_hex(class_colours(5)[int(name[-1])]) for name in (list(shares)[0], list(shares)[-1]))
    one, *_ = respond(detectors, {"path": str(tmp_path / "large.png")}, "detectors/upernet", found, list(shares)[0])
    alone, caption = show(one, "Attention", 1)
    assert first in caption and last not in caption and not np.array_equal(alone, picture)
    drawn = np.asarray(PIL.Image.fromarray(alone).resize((1024, 512)), float)  # coloured where the class is, else grey
    inside = np.asarray(PIL.Image.fromarray(np.asarray(one.objects["masks"][0])).resize((1024, 512)))
    assert np.ptp(drawn, axis=-1)[inside].mean() > 30 > 10 > np.ptp(drawn, axis=-1)[~inside].mean()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 4096, "width": 2048}, "makes pictures of more than 4,194,304 pixels"),
        ({"shortest_edge": 512}, "sets no bound for the longer side"),
        (None, "a ViTAEImageProcessor, is none for segmentation"),
    ],
)
def test_a_processor_with_which_a_picture_could_fail_is_refused(detectors, root, size, message, tmp_path):
    shutil.copytree(root / "detectors" / "upernet", tmp_path / "upernet")
    processor = ViTAEImageProcessor() if size is None else SegformerImageProcessor(size=size)
    processor.save_pretrained(tmp_path / "upernet")
    explanation, sentence = examine(
        Models([str(tmp_path / "upernet")]), {"path": str(SNEAKER)}, str(tmp_path / "upernet")
    )
    assert explanation is None and message in sentence


def test_a_narrow_picture_is_refused_by_a_segmenter_and_a_wide_one_is_drawn_small(detectors, tmp_path):
    for size in ((2048, 100), (3, 3000)):
        PIL.Image.new("RGB", size, "orange").save(tmp_path / "picture.png")
        found, sentence = examine(detectors, {"path": str(tmp_path / "picture.png")}, "detectors/upernet")
        assert "too narrow" in sentence and found is None
    PIL.Image.new("RGB", (30, 2), "orange").save(tmp_path / "picture.png")
    found, _ = examine(detectors, {"path": str(tmp_path / "picture.png")}, "detectors/upernet")
    assert show(found, "Attention", 1)[0].shape == show(found, "Picture", 1)[0].shape == (137, 2048, 3)


def test_a_detector_of_another_family_is_not_offered_and_none_is_fetched_for_a_visitor(detectors, root, tmp_path):
    assert sorted(detectors.names()) == ["detectors/mask_rcnn", "detectors/rt_detr", "detectors/upernet"]
    other = root / "other-detectors" / "model"
    shutil.copytree(root / "detectors" / "rt_detr", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "backbone_config": {"model_type": "resnet"}}))
    assert Models(root=other.parent).names() == []
    with HubServer(tmp_path / "hub") as hub:
        hub.create("org/detector")
        for path in (root / "detectors" / "rt_detr").iterdir():
            hub.commit_from_elsewhere("org/detector", path.name, path.read_bytes())
        variables = {**os.environ, **hub.environment(tmp_path / "cache")}
        command = [sys.executable, "-c", ASK_THE_HUB, "org/detector"]
        told = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    assert told == "org/detector is no classifier, and this page takes others only from the machine that serves it.\n"
