"""Importing the package registers it, twice if need be, and costs little; the model that it carries works."""

import ast
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import threading
from configparser import ConfigParser
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from helpers import DATA, REPOSITORY
from huggingface_hub import ModelCard
from huggingface_hub.utils import _http
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline

import vitae_hf
from vitae_hf.commands import evaluate, train, verify
from vitae_hf.data.sources import load_labelled_images
from vitae_hf.failures import EXTRAS
from vitae_hf.files import ASSETS, find_model, write_json
from vitae_hf.hub.variants import VITAE, VITAE_V2
from vitae_hf.web.visitors import Models


NANO = "vitae-nano-fashion"


def test_everything_is_registered_and_importing_twice_is_fine():
    importlib.reload(vitae_hf)
    config = AutoConfig.for_model("vitae", depths=(0, 0, 1))
    assert type(config) is vitae_hf.ViTAEConfig
    assert type(AutoModel.from_config(config)) is vitae_hf.ViTAEModel
    assert type(AutoModelForImageClassification.from_config(config)) is vitae_hf.ViTAEForImageClassification


def test_every_public_name_exists_and_has_a_docstring():
    for name in vitae_hf.__all__:
        public = getattr(vitae_hf, name)
        assert public.__doc__ or not callable(public), name


def test_importing_it_loads_nothing_heavy_beyond_the_auto_classes_and_prints_nothing():
    baseline = "from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, "
    baseline += "PreTrainedModel; import transformers.image_processing_backends, transformers.modeling_layers"
    no_dir = "type(sys.modules['transformers']).__dir__ = None"  # listing its names would double the time of the import
    program = f"import sys; {baseline}; before = set(sys.modules); {no_dir}; import vitae_hf\n"
    program += "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    packages = set(done.stdout.split())
    heavy = {"accelerate", "datasets", "evaluate", "matplotlib", "pandas", "scipy", "timm", "torchvision"}
    assert "vitae_hf" in packages and not heavy & packages
    assert len(done.stdout.splitlines()) == 1


def test_every_text_file_is_utf_8_on_every_system():
    for path in [*REPOSITORY.glob("src/**/*.py"), *REPOSITORY.glob("scripts/*.py")]:
        for call in (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)):
            if getattr(call.func, "attr", None) in ("read_text", "write_text"):
                assert "encoding" in [keyword.arg for keyword in call.keywords], f"{path}:{call.lineno}"


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system has no forks")
def test_a_child_does_not_wait_for_what_a_thread_of_its_parent_asks_of_the_hub(monkeypatch):
    lock = threading.Lock()
    client = type("Client", (), {"close": lambda self: lock.acquire()})()  # as a pool of connections, which has a lock
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT", client)
    with lock:  # a thread that asks holds it
        child = multiprocessing.get_context("fork").Process(target=abs, args=(1,))
        child.start()
        child.join(30)
        child.kill()
    assert child.exitcode == 0 and _http.get_session() is client
    client.close()
    assert lock.locked()  # in the parent it closes


def test_the_model_that_ships_is_small_and_whole_and_has_no_code():
    folder = ASSETS / NANO
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(files) == {"config.json", "preprocessor_config.json", "model.safetensors", "README.md", "SHA256SUMS"}
    assert sum(files.values()) < 10**6
    assert not any("auto_map" in json.loads((folder / name).read_text()) for name in files if name.endswith("json"))
    assert verify.main([NANO])["whole"]


def test_the_model_that_ships_is_as_good_as_its_card_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = evaluate.main(["--model_name_or_path", NANO, "--dataset", str(DATA)])
    card = ModelCard.load(ASSETS / NANO / "README.md")
    printed = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert (record["images"], record["output"]) == (1000, f"outputs/evaluation-{NANO}")
    assert record["top1_percent"] >= 85
    assert record["top1_percent"] == pytest.approx(printed["top-1 accuracy (%)"], abs=0.11)  # one image, by rounding
    assert record["top5_percent"] == pytest.approx(printed["top-5 accuracy (%)"], abs=0.11)


def test_a_pipeline_takes_the_model_that_ships():
    row = load_labelled_images(str(DATA), splits=["test"])["test"][3]
    classify = pipeline("image-classification", model=find_model(NANO))
    found = classify(Image.open(BytesIO(row["image"]["bytes"])), top_k=1)[0]["label"]
    assert found == classify.model.config.id2label[row["label"]]


def test_the_page_offers_the_model_that_ships_by_its_name():
    models = Models([NANO])
    model, processor = models.load(NANO)
    assert models.names() == [NANO] and model.config.num_labels == 10 and processor.size.height == 64


def test_a_folder_in_the_working_directory_goes_before_the_model_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model(NANO) == str(ASSETS / NANO)
    assert find_model("org/other") == "org/other" and find_model(f"../assets/{NANO}") == f"../assets/{NANO}"
    (tmp_path / NANO).mkdir()
    assert find_model(NANO) == NANO


def test_training_begins_with_the_model_that_ships_and_says_so(tmp_path):
    words = f"--model_name_or_path {NANO} --dataset {DATA} --output_dir {tmp_path} --train_share 0.02 --max_steps 1"
    train.main([*words.split(), *"--report_to none --save_strategy no --learning_rate 1e-5 --image_size 64".split()])
    card = (tmp_path / "README.md").read_text()
    assert f"fine-tuned from `{NANO}`" in card and (tmp_path / "modeling_vitae.py").is_file()


def test_a_json_file_is_left_as_it_was_if_it_cannot_be_written_to_its_end(tmp_path, monkeypatch):
    write_json({"a": 1}, tmp_path / "record.json")
    write_text = Path.write_text

    def disk_is_full(path, text, **options):
        write_text(path, text[:3])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", disk_is_full)
    with pytest.raises(OSError, match="no space"):
        write_json({"a": 2}, tmp_path / "record.json")
    assert json.loads((tmp_path / "record.json").read_text()) == {"a": 1}


def test_the_citation_names_this_version_and_both_papers():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == vitae_hf.__version__ and citation["license"] == "Apache-2.0"
    assert [paper["title"] for paper in citation["references"]] == [VITAE.title, VITAE_V2.title]
    assert [paper["url"] for paper in citation["references"]] == [VITAE.url, VITAE_V2.url]


def test_the_extras_that_a_failure_names_install_what_it_misses():
    config = ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    for extra, modules in EXTRAS.items():
        named = re.sub(r"vitae-hf\[.*\]", "", config["options.extras_require"][extra]).split()
        imported = {"grad-cam": "pytorch_grad_cam", "scikit-learn": "sklearn", "litert-torch": "litert_torch"}
        required = {imported.get(package, package) for package in (name.partition(">")[0] for name in named)}
        whole = {"demo": ("train", "explain"), "detection": ("train",)}.get(extra, ())
        inherited = {module for name in whole for module in EXTRAS[name]}
        assert required - {"transformers"} | inherited == set(modules), extra
