"""Publishing and loading by name, with the real client against the hub of hub_server.py."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from helpers import (
    DATA,
    IMAGE,
    REPOSITORY,
    autoencoder_weights,
    class_token_config,
    original_weights,
    png,
    pyramid_config,
    python_path_without,
    write_malicious,
    write_several_columns,
)
from hub_server import READER, WRITER, HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save, save_file

from vitae_hf import (
    ViTAEForImageClassification,
    ViTAEForMaskedImageModeling,
    ViTAEImageProcessor,
    config_from_preset,
    convert_original_state_dict,
)
from vitae_hf.heads_vitae import DPTConfig, DPTForDepthEstimation
from vitae_hf.hub.checksums import SUMS_NAME, sha256, verify_checkpoint, write_sums
from vitae_hf.hub.publishing import check_folder, compute_outputs


SCENES = REPOSITORY / "examples" / "garment_scenes"


CARD = "---\npipeline_tag: image-classification\nlibrary_name: transformers\n---\n\n# A model for tests\n"
UPLOADED = {
    "README.md",
    "SHA256SUMS",
    "config.json",
    "configuration_vitae.py",
    "image_processing_vitae.py",
    "model.safetensors",
    "attention_vitae.py",
    "decoder_vitae.py",
    "embeddings_vitae.py",
    "layers_vitae.py",
    "modeling_base_vitae.py",
    "modeling_vitae.py",
    "preprocessor_config.json",
    "rotated_windows_vitae.py",
}


@dataclass
class Client:
    """A process that holds the real client; what it writes to stderr by itself is in the file `errors`."""

    process: subprocess.Popen
    errors: Path

    def ask(self, **task) -> dict:
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.errors.read_text()[-3000:]
        return json.loads(answer)

    def run(self, command: str, *arguments, token: str | None = WRITER) -> dict:
        answer = self.ask(command=command, arguments=[str(argument) for argument in arguments], token=token)
        written = answer["stdout"] + answer["stderr"] + self.errors.read_text()
        assert "Traceback" not in written
        assert not any(secret in written for secret in (WRITER, READER, "hf_wrong"))
        return answer

    def push(self, *arguments, **options) -> dict:
        """The record of a push that works."""
        answer = self.run("push", *arguments, **options)
        assert answer["status"] == 0, answer["stderr"]
        return json.loads(answer["stdout"].splitlines()[-1])

    def refusal(self, command: str, *arguments, **options) -> str:
        """The sentence in which a command says what failed."""
        answer = self.run(command, *arguments, **options)
        assert answer["status"] == 1, answer["stdout"]
        sentence = answer["stderr"].splitlines()[-1]
        assert sentence.startswith("error: ")
        return sentence

    def load(self, name: str, output: Path, revision: str | None = None) -> dict:
        self.ask(load=name, revision=revision, image=str(IMAGE), output=str(output))
        return torch.load(output)


def start_client(folder: Path, variables: dict, flags: tuple = ()) -> Client:
    folder.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    command = [sys.executable, *flags, Path(__file__).with_name("hub_client.py")]
    process = subprocess.Popen(
        command,
        env={**environment, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=open(folder / "stderr.txt", "w"),
        text=True,
        cwd=folder,
        start_new_session=True,
    )
    return Client(process, folder / "stderr.txt")


def stop_client(client: Client) -> None:
    os.killpg(client.process.pid, signal.SIGKILL)  # its workers too, which would keep the pipe open
    client.process.communicate()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(autouse=True)
def no_fault_is_left_over(hub):
    yield
    left, hub.faults[:] = list(hub.faults), []
    assert not left


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("client")
    client = start_client(folder, hub.environment(folder / "home", token=None))
    yield client
    stop_client(client)


def write_folder(folder: Path, seed: int = 0) -> Path:
    """A small classifier as `save_pretrained` leaves it, and a card."""
    torch.manual_seed(seed)
    ViTAEForImageClassification(pyramid_config()).save_pretrained(folder)
    ViTAEImageProcessor(size=64).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "folder")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# Loading by name


@pytest.fixture(scope="module")
def loaders(hub, tmp_path_factory):
    """Fresh processes with empty caches, with and without the package; the third is offline, with the second's cache.

    All start at once, since it is importing that takes them long.
    """
    root = tmp_path_factory.mktemp("loaders")
    path = python_path_without("vitae_hf", "__editable__", folder=root / "site")
    bare = {**hub.environment(root / "bare", token=None), "PYTHONPATH": str(path)}
    offline = {**bare, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    started = {
        "with_package": start_client(root / "1", hub.environment(root / "home", token=None)),
        "without_package": start_client(root / "2", bare, flags=("-S",)),
        "offline": start_client(root / "3", offline, flags=("-S",)),
    }
    yield started
    for client in started.values():
        stop_client(client)


@pytest.fixture(scope="module")
def published(hub, client, loaders, tmp_path_factory):
    """Folders and the names under which they were pushed: a converted vitae-t, and a vitae-nano trained elsewhere."""
    root = tmp_path_factory.mktemp("published")
    torch.save(original_weights(config_from_preset("vitae-t")), root / "t.pth")
    answer = client.run("convert", root / "t.pth", "--output", root / "converted")
    assert answer["status"] == 0, answer["stderr"]
    assert verify_checkpoint(root / "converted")["unchecked"] == ["SHA256SUMS"]
    torch.manual_seed(0)
    ViTAEForImageClassification(config_from_preset("vitae-nano")).save_pretrained(root / "nano")
    arguments = ["--dataset", DATA, "--model_name_or_path", root / "nano"]
    arguments += ["--output_dir", root / "trained", "--max_steps", 2, "--train_share", 0.02, "--learning_rate", 0.1]
    arguments += ["--ema_decay", 0.5, "--save_strategy", "no", "--eval_strategy", "no", "--report_to", "none"]
    arguments += ["--push_to_hub", "--hub_model_id", "org/vitae-nano-trained", "--per_device_eval_batch_size", 100]
    answer = client.run("train", *arguments)
    assert answer["status"] == 0, answer["stderr"]
    record = json.loads(answer["stdout"].splitlines()[-1])
    assert record["hub_commit"] == hub.repository("org/vitae-nano-trained").refs["main"]
    client.push(root / "converted", "--repo_id", "org/vitae-t")
    return {"org/vitae-t": root / "converted", "org/vitae-nano-trained": root / "trained" / "ema"}


@pytest.mark.parametrize("kind", ["with_package", "without_package", "offline"])
def test_pushed_models_load_by_name_and_give_the_same_bits(loaders, published, tmp_path, kind):
    for name, folder in published.items():
        record = loaders[kind].load(name, tmp_path / "out.pt")
        assert record["module"].startswith("vitae_hf." if kind == "with_package" else "transformers_modules.")
        assert record["model_type"] == "vitae"
        model = ViTAEForImageClassification.from_pretrained(folder).eval()
        pixel_values = ViTAEImageProcessor.from_pretrained(folder)(IMAGE, return_tensors="pt").pixel_values
        with torch.no_grad():
            assert torch.equal(record["logits"], model(pixel_values).logits)
            assert torch.equal(record["pooled"], model.vitae(pixel_values).pooler_output)
        assert record["pipeline"] == model.config.id2label[record["logits"].argmax().item()]


def test_a_training_run_publishes_the_same_layout_as_the_script(hub, published):
    pushed = {"ema": "org/vitae-nano-trained", "converted": "org/vitae-t"}
    files = {name: set(hub.repository(repo_id).find("main")["files"]) for name, repo_id in pushed.items()}
    assert files["converted"] == UPLOADED | {".gitattributes"}
    assert files["ema"] == UPLOADED | {".gitattributes", "training_curves.png"}
    averaged = (published["org/vitae-nano-trained"] / "model.safetensors").read_bytes()
    assert hub.content("org/vitae-nano-trained", "model.safetensors") == averaged


def test_a_converted_folder_is_published_with_the_card_that_conversion_wrote(hub, published):
    card = ModelCard(hub.content("org/vitae-t", "README.md").decode())
    record = {"name": "t.pth", "sum": sha256(published["org/vitae-t"].parent / "t.pth")}
    assert "converted from `{name}` (SHA-256 `{sum}`)".format(**record) in card.text
    assert [result.metric_value for result in card.data.eval_results] == [75.3, 92.7, 82.9]
    assert (
        f"{sha256(published['org/vitae-t'] / 'README.md')}  README.md" in hub.content("org/vitae-t", SUMS_NAME).decode()
    )


def test_an_interrupted_download_of_large_weights_is_resumed_where_it_stopped(hub, published, client):
    hub.fail("GET", "resolve.*/model.safetensors", "cut", at=12 * 2**20)
    hub.log.clear()
    answer = client.run("verify", "org/vitae-t")
    assert answer["status"] == 0, answer["stderr"]
    ranges = [(begin, status) for method, path, begin, status in hub.log if "GET" == method and begin]
    assert len(ranges) == 1 and ranges[0][1] == 206 and 10**7 < int(ranges[0][0][6:-1]) <= 12 * 2**20


def test_a_revision_can_be_pinned(hub, client, folder, tmp_path):
    first = client.push(folder, "--repo_id", "org/pinned")
    other = write_folder(tmp_path / "other", seed=1)
    second = client.push(other, "--repo_id", "org/pinned")
    client.push(folder, "--repo_id", "org/pinned", "--revision", "v1")
    expected = {None: other, first["hub_commit"]: folder, second["hub_commit"]: other, "v1": folder}
    for revision, source in expected.items():
        record = client.load("org/pinned", tmp_path / "out.pt", revision)
        assert torch.equal(record["logits"], compute_outputs(source, IMAGE))
    assert not torch.equal(compute_outputs(folder, IMAGE), compute_outputs(other, IMAGE))


def test_a_masked_image_model_is_compared_by_what_it_reconstructs(tmp_path):
    model = ViTAEForMaskedImageModeling(config_from_preset("vitae-nano")).eval()
    model.save_pretrained(tmp_path)
    processor = ViTAEImageProcessor(size=64)
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**processor(IMAGE, return_tensors="pt")).reconstruction
    assert torch.equal(compute_outputs(tmp_path, IMAGE), expected.flatten(1))


# Converting by name


def as_bytes(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def original(hub):
    """A repository with a masked autoencoder in the authors' format, and a commit before it, with twice its weights."""
    weights = autoencoder_weights(config_from_preset("vitae-nano-mae", conv_kernel_size=1))
    hub.create("org/original")
    hub.commit_from_elsewhere(
        "org/original", "pytorch_model.bin", as_bytes({name: 2 * weights[name] for name in weights})
    )
    before = hub.repository("org/original").refs["main"]
    hub.commit_from_elsewhere("org/original", "pytorch_model.bin", as_bytes(weights))
    return "org/original", before


@pytest.mark.parametrize("source", ["{}", "hf://{}", "hf://{}/pytorch_model.bin", "hf://{}@{}/pytorch_model.bin"])
def test_a_checkpoint_on_the_hub_is_converted_by_its_name(client, original, tmp_path, source):
    answer = client.run("convert", source.format(*original), "--output", tmp_path / "out", "--verify", token=None)
    assert answer["status"] == 0, answer["stderr"]
    record = json.loads(answer["stdout"].splitlines()[-1])
    assert (record["class"], record["file"]) == ("ViTAEForPreTraining", "pytorch_model.bin")
    config = config_from_preset("vitae-nano-mae", conv_kernel_size=1)
    expected = convert_original_state_dict(autoencoder_weights(config))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    factor = 2 if "@" in source else 1
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], factor * expected[name]) for name in saved)


def test_safetensors_are_taken_before_pickles_and_of_several_files_one_must_be_named(hub, client, tmp_path):
    weights = original_weights(config_from_preset("vitae-nano"))
    hub.create("org/several")
    for name in ("one.pth", "two.pth"):
        hub.commit_from_elsewhere("org/several", name, as_bytes({"state_dict": weights}))
    said = client.refusal("convert", "org/several", "--output", tmp_path / "out")
    assert "hf://org/several has several files of weights, name one of them: one.pth, two.pth" in said
    hub.commit_from_elsewhere("org/several", "three.safetensors", save(weights))
    answer = client.run("convert", "org/several", "--output", tmp_path / "out")
    assert json.loads(answer["stdout"].splitlines()[-1])["file"] == "three.safetensors"


def test_a_file_of_the_hub_that_asks_for_code_or_arrives_damaged_is_refused(hub, client, tmp_path):
    write_malicious(tmp_path / "bad.pth", original_weights(config_from_preset("vitae-nano")))
    hub.create("org/bad")
    hub.commit_from_elsewhere("org/bad", "bad.pth", (tmp_path / "bad.pth").read_bytes())
    said = client.refusal("convert", "org/bad", "--output", tmp_path / "out")
    assert "asks to run posix.system when it is read; refused" in said and not list(tmp_path.glob("*.executed"))
    hub.create("org/flipped")
    hub.commit_from_elsewhere("org/flipped", "good.pth", as_bytes({"state_dict": {"a": torch.zeros(9)}}))
    hub.fail("GET", "resolve.*/good.pth", "flip", at=-9)
    assert "the download of good.pth from org/flipped is damaged" in client.refusal(
        "convert", "org/flipped", "--output", tmp_path / "out"
    )


@pytest.mark.parametrize(
    "source, said",
    [
        ("org/nowhere", "org/nowhere is not on the Hub"),
        ("hf://org/original/none.pth", "hf://org/original/none.pth is not on the Hub"),
        ("hf://original", "hf://original must be hf://OWNER/NAME"),
        ("runs/latest.pth", "runs/latest.pth"),
    ],
)
def test_a_source_that_leads_nowhere_is_named(client, original, tmp_path, source, said):
    assert said in client.refusal("convert", source, "--output", tmp_path / "out")


# Pushing


def test_only_what_belongs_to_the_model_is_pushed_and_only_once(hub, client, folder):
    for name in ("checkpoint-10/model.safetensors", "runs/events", "optimizer.pt", "training_args.bin", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"of this machine")
    (folder / "model.safetensors.unfinished").write_bytes(b"half of it")
    first = client.push(folder, "--repo_id", "org/once")
    assert set(hub.repository("org/once").find("main")["files"]) == UPLOADED | {".gitattributes"}
    second = client.push(folder, "--repo_id", "org/once")
    assert (first["uploaded"], second["uploaded"]) == (True, False)
    assert first["hub_commit"] == second["hub_commit"]
    assert hub.repository("org/once").history() == ["Upload a ViTAE model", "initial commit"]
    sums = hub.content("org/once", "SHA256SUMS").decode()
    subprocess.run(["sha256sum", "--check", "--strict"], input=sums, cwd=folder, check=True, text=True)


def test_a_dry_run_lists_the_files_and_neither_writes_nor_sends_anything(hub, client, folder):
    hub.log.clear()
    before = sorted(folder.iterdir())
    answer = client.run("push", folder, "--repo_id", "org/dry", "--dry-run")
    assert answer["status"] == 0 and not hub.log and sorted(folder.iterdir()) == before
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in answer["stdout"]


def test_what_the_library_pushes_has_the_same_layout(hub, client, folder, tmp_path):
    client.ask(library="org/library", folder=str(folder), token=WRITER)
    model_files = UPLOADED - {"SHA256SUMS"} | {".gitattributes"}
    assert set(hub.repository("org/library").find("main")["files"]) == model_files
    trained = set(hub.repository("org/library-trainer").find("main")["files"])
    assert trained == model_files | {"training_args.bin"}
    for name in ("org/library", "org/library-trainer"):
        for code in (file for file in model_files if file.endswith(".py")):
            assert hub.content(name, code) == (REPOSITORY / "src" / "vitae_hf" / code).read_bytes()
        record = client.load(name, tmp_path / "out.pt")
        assert record["logits"].shape == (1, 5)
    client.push(folder, "--repo_id", "org/library")
    assert set(hub.repository("org/library").find("main")["files"]) == model_files | {"SHA256SUMS"}


def test_weights_of_before_do_not_stay_beside_shards(hub, client, folder, tmp_path):
    client.push(folder, "--repo_id", "org/shards")
    torch.manual_seed(1)
    (folder / "model.safetensors").unlink()
    ViTAEForImageClassification(pyramid_config()).save_pretrained(folder, max_shard_size="50KB")
    client.push(folder, "--repo_id", "org/shards")  # compares logits
    files = set(hub.repository("org/shards").find("main")["files"])
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files


def test_a_repository_that_makes_another_model_of_the_files_is_noticed(hub, client, folder):
    hub.create("org/foreign")
    processor = {**json.loads((folder / "preprocessor_config.json").read_text()), "image_mean": [0, 0, 0]}
    foreign = json.dumps({"image_processor": processor}).encode()
    hub.commit_from_elsewhere("org/foreign", "processor_config.json", foreign)  # read before preprocessor_config.json
    assert "org/foreign gives other logits" in client.refusal("push", folder, "--repo_id", "org/foreign")


def test_pull_requests_and_private_repositories(hub, client, folder, tmp_path):
    client.push(folder, "--repo_id", "org/closed", "--private")
    assert hub.repository("org/closed").private
    assert "token is missing" in client.refusal("verify", "org/closed", token=None)
    before = hub.repository("org/closed").refs["main"]
    record = client.push(write_folder(tmp_path / "other", seed=1), "--repo_id", "org/closed", "--create_pr")
    assert record["pull_request"].endswith("/org/closed/discussions/1")
    assert hub.repository("org/closed").refs == {"main": before, "refs/pr/1": record["hub_commit"]}
    client.push(folder, "--repo_id", "open")
    assert not hub.repository("tester/open").private
    assert "exists already and is public" in client.refusal(
        "push", write_folder(tmp_path / "open", seed=2), "--repo_id", "open", "--private"
    )
    assert len(hub.repository("tester/open").history()) == 2


@pytest.mark.parametrize(
    "method, path, kind",
    [
        ("PUT", "/lfs/", 500),
        ("PUT", "/lfs/", "drop"),
        ("POST", "/preupload/", 500),
        ("POST", "/lfs/.*verify", 500),
        ("GET", "resolve.*/model.safetensors", "drop"),
        ("GET", "resolve.*/model.safetensors", "cut"),
    ],
)
def test_what_the_client_repeats_ends_well(hub, client, folder, method, path, kind):
    name = f"org/repeated-{method}-{kind}-{len(path)}".lower()
    hub.fail(method, path, kind, at=1000)
    client.push(folder, "--repo_id", name)
    assert hub.content(name, "model.safetensors") == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "method, path, kind, sentence",
    [
        ("POST", "/repos/create", 500, "failed with status 500"),
        ("PUT", "/lfs/", 403, "may not do this"),
        ("POST", "/commit/", 500, "failed with status 500"),
        ("POST", "/commit/", "drop", "no connection"),
        ("POST", "/commit/", "lost", "no connection"),
        ("POST", "/commit/", "race", "changed by somebody else"),
        ("GET", "resolve.*/model.safetensors", "flip", "model.safetensors: its SHA-256"),
        ("GET", "resolve.*/model.safetensors", 500, "failed with status 500"),
    ],
)
def test_a_failed_push_says_so_and_the_next_completes_it(hub, client, folder, method, path, kind, sentence):
    name = f"org/failed-{method}-{kind}-{len(path)}".lower()
    hub.fail(method, path, kind, at=-1)
    assert sentence in client.refusal("push", folder, "--repo_id", name)
    is_done = kind in ("lost", "flip") or method == "GET"
    assert client.push(folder, "--repo_id", name)["uploaded"] is not is_done
    assert hub.content(name, "model.safetensors") == (folder / "model.safetensors").read_bytes()
    theirs = ["from elsewhere"] if kind == "race" else []
    assert hub.repository(name).history() == ["Upload a ViTAE model", *theirs, "initial commit"]
    assert ("NEWS.md" in hub.repository(name).find("main")["files"]) == (kind == "race")


@pytest.mark.parametrize("exists", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("token", [None, "hf_wrong", READER], ids=["missing", "wrong", "read_only"])
def test_a_token_that_may_not_write_is_refused(hub, client, folder, token, exists):
    name = f"org/secret-{str(token)[-4:].lower()}-{exists}".lower()
    if exists:
        hub.create(name)
    sentence = client.refusal("push", folder, "--repo_id", name, token=token)
    said = {None: "token is missing", "hf_wrong": "token is not accepted", READER: "takes one that may write"}
    assert said[token] in sentence
    assert (hub.folder / f"{name}.json").exists() == exists
    assert not exists or hub.repository(name).history() == ["initial commit"]


def test_a_training_run_that_could_not_publish_is_refused_before_it_trains(hub, client, tmp_path):
    arguments = ["--dataset", "nowhere", "--preset", "vitae-nano", "--output_dir", tmp_path / "out", "--push_to_hub"]
    sentence = client.refusal("train", *arguments, "--hub_model_id", "org/too-late", token=READER)
    assert "org/too-late: it takes one that may write" in sentence


def push_in_a_process_of_its_own(folder: Path, repo_id: str, variables: dict) -> str:
    """Exit status and all are a shell's: what stderr ends with when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "vitae_hf", "push", folder, "--repo_id", repo_id],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and not done.stdout.startswith("{")
    assert "Traceback" not in done.stderr and variables["HF_TOKEN"] not in done.stdout + done.stderr
    assert [line for line in done.stderr.splitlines() if line][-1].startswith("error: ")
    return done.stderr.splitlines()[-1]


def test_where_nothing_listens_the_script_ends_with_one_sentence(hub, folder, tmp_path):
    variables = {**hub.environment(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    sentence = push_in_a_process_of_its_own(folder, "org/nowhere", variables)
    assert sentence.startswith("error: no connection to http://127.0.0.1:9 for org/nowhere")


def test_with_a_wrong_token_the_script_ends_with_one_sentence(hub, folder, tmp_path):
    variables = hub.environment(tmp_path / "home", token="hf_wrong")
    sentence = push_in_a_process_of_its_own(folder, "org/not-mine", variables)
    assert sentence.startswith("error: org/not-mine is not there for you: the Hub token is not accepted")


def test_a_card_that_the_hub_does_not_take_is_refused_with_its_reason(hub, client, folder):
    (folder / "README.md").write_text(CARD.replace("---\n", "---\nlicense: mine\n", 1))
    sentence = client.refusal("push", folder, "--repo_id", "org/mine")
    assert 'Invalid metadata in README.md. - "license" must be one of' in sentence
    assert hub.repository("org/mine").history() == ["initial commit"]


# Checks before a push


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def change_weights(change):
    def apply(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (shutil.rmtree, "is no folder"),
        (remove("README.md"), "lacks README.md"),
        (remove("preprocessor_config.json"), "lacks preprocessor_config.json"),
        (remove("modeling_vitae.py"), "modeling_vitae.py is missing"),
        (remove("layers_vitae.py"), "layers_vitae.py is missing"),
        (remove("model.safetensors"), "holds no weights"),
        (write("modeling_vitae.py", "import os\n"), "modeling_vitae.py differs from this package's"),
        (write("README.md", "---\nlicense: [\n---\n"), "README.md has no valid metadata"),
        (write("pytorch_model.bin", "anything"), "holds pytorch_model.bin, a format that can run code"),
        (lambda folder: flip(folder / "model.safetensors", 5), "model.safetensors is damaged"),
        (lambda folder: (folder / "ema").mkdir(), "publish .*ema"),
        (change_weights(lambda weights: weights["classifier.bias"].fill_(float("nan"))), "are finite: classifier.bias"),
        (change_weights(lambda weights: weights.pop("classifier.bias")), "lack 1 tensors .* classifier.bias"),
    ],
)
def test_a_folder_that_should_not_be_published_is_refused(folder, spoil, sentence):
    spoil(folder)
    with pytest.raises(ValueError, match=sentence):
        check_folder(folder, IMAGE)


# Checksums


def test_a_flipped_byte_of_a_folder_is_found_and_its_file_named(folder):
    files = write_sums(folder, check_folder(folder, IMAGE)[0])
    assert verify_checkpoint(folder)["problems"] == {} and len(files) == len(UPLOADED)
    flip(folder / "model.safetensors", -1)
    assert list(verify_checkpoint(folder)["problems"]) == ["model.safetensors"]
    flip(folder / "config.json", 20)
    (folder / "modeling_vitae.py").unlink()
    for name in ("onnx", ".git"):
        (folder / name).mkdir()
        (folder / name / "part").write_text("")
    assert "onnx/part" in (report := verify_checkpoint(folder))["unchecked"] and ".git/part" not in report["unchecked"]
    problems = report["problems"]
    assert set(problems) == {"model.safetensors", "config.json", "modeling_vitae.py"}
    assert problems["modeling_vitae.py"] == ["missing"]


def test_sums_that_cannot_be_read_and_a_folder_without_code_are_told(folder):
    (folder / SUMS_NAME).write_text("no sum")
    with pytest.raises(ValueError, match="is damaged: expected a SHA-256 and a file name, got 'no sum'"):
        verify_checkpoint(folder)
    for name in ("config.json", "preprocessor_config.json"):
        fields = json.loads((folder / name).read_text())
        fields.pop("auto_map")
        (folder / name).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="names no code in its `auto_map`"):
        check_folder(folder, IMAGE)


def test_a_damaged_header_names_its_file_without_checksums(folder):
    flip(folder / "model.safetensors", 5)
    assert "no safetensors file" in verify_checkpoint(folder)["problems"]["model.safetensors"][0]


def test_damage_in_the_cache_is_found_by_name(hub, client, folder):
    client.push(folder, "--repo_id", "org/cached")
    assert client.run("verify", "org/cached")["status"] == 0
    cache = client.errors.parent / "home" / "hub" / "models--org--cached"
    for name, kind in (("model.safetensors", "SHA-256"), ("config.json", "git SHA-1"), (".gitattributes", "git SHA-1")):
        (copy,) = cache.glob(f"snapshots/*/{name}")
        flip(copy.resolve(), -1)
        sentence = client.refusal("verify", "org/cached")
        assert f"{name}: " in sentence and f"its {kind} is not the Hub's" in sentence.split(f"{name}: ")[1]
    assert "org/nothing is not on the Hub" in client.refusal("verify", "org/nothing")


@dataclass
class Run:
    """A command that trains something else than a classifier, and what it publishes.

    `task` is of the pipeline that uses it; `code` a file that its folder loads by, `picture` one that its card shows.
    """

    command: str
    words: tuple
    code: str
    picture: str
    task: str | None = None


SMALL_HEAD = ("--preset", "vitae-nano", "--dataset", SCENES, "--head_channels", 32)
SMALL_DETECTOR = (*SMALL_HEAD, "--decoder_layers", 1, "--num_queries", 5, "--image_size", 32, "--pictures", 1)
RUNS = {
    "rt_detr": Run("detect", SMALL_DETECTOR, "heads_vitae.py", "predictions.png", "object-detection"),
    "mask2former": Run("detect", SMALL_DETECTOR, "heads_vitae.py", "predictions.png", "image-segmentation"),
    "mask_rcnn": Run("detect", SMALL_DETECTOR, "modeling_rcnn_vitae.py", "predictions.png", "object-detection"),
    "upernet": Run(
        "segment",
        (*SMALL_HEAD, "--short_side", 32, "--crop_size", 32, "--overlays", 1),
        "heads_vitae.py",
        "overlays.png",
        "image-segmentation",
    ),
    "masked": Run(
        "pretrain",
        ("--preset", "vitae-nano", "--dataset", DATA, "--image_size", 32, "--mask_patch_size", 16, "--pictures", 1),
        "modeling_vitae.py",
        "reconstructions.png",
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("rt_detr", "masked") else pytest.mark.slow)  # one of each kind of code
        for name in RUNS
    ],
)
def test_what_is_no_classifier_is_published_by_its_run_or_by_itself_and_found_by_name(hub, client, tmp_path, name):
    run = RUNS[name]
    words = [*run.words, "--output_dir", tmp_path / "out", "--max_steps", 1, "--report_to", "none"]
    words += ["--detector", name] if run.command == "detect" else []
    words += ["--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 80]
    answer = client.run(run.command, *words, "--push_to_hub", "--hub_model_id", f"org/{name}")
    assert answer["status"] == 0, answer["stderr"][-3000:]
    record = json.loads(answer["stdout"].splitlines()[-1])
    assert record["same_logits"] and record["hub_commit"] == hub.repository(f"org/{name}").refs["main"]
    files = set(hub.repository(f"org/{name}").find("main")["files"])
    shown = re.findall(r"!\[[^]]*\]\((.*?)\)", hub.content(f"org/{name}", "README.md").decode())
    assert run.picture in shown and {"model.safetensors", run.code, *shown} <= files
    client.push(tmp_path / "out", "--repo_id", f"org/{name}-again")
    if run.task is not None:
        by_name = client.ask(find=f"org/{name}-again", task=run.task, image=str(IMAGE))["found"]
        assert by_name and by_name == client.ask(find=str(tmp_path / "out"), task=run.task, image=str(IMAGE))["found"]


def test_a_network_for_depth_is_compared_by_its_map(tmp_path):
    backbone = class_token_config(cell_stages=True, reshape_hidden_states=False, out_indices=[1, 2])
    model = DPTForDepthEstimation(DPTConfig(backbone_config=backbone, neck_hidden_sizes=[8, 8], fusion_hidden_size=8))
    model.save_pretrained(tmp_path)
    ViTAEImageProcessor(size=64).save_pretrained(tmp_path)
    assert compute_outputs(tmp_path, IMAGE).shape == (1, 64 * 64)


# Data sets by name


DATA_CARD = """---
dataset_info:
- config_name: garments
  splits:
  - {name: train, num_bytes: 1, num_examples: 40}
  - {name: test, num_bytes: 1, num_examples: 20}
configs:
- config_name: garments
  data_files: [{split: train, path: garments/train-*}, {split: test, path: garments/test-*}]
- config_name: several
  data_files: [{split: train, path: several/train-*}]
---
"""


@pytest.fixture(scope="module")
def data_set(hub, tmp_path_factory) -> str:
    """One with two configurations: `garments` has two splits, `several` several columns of pictures and labels."""
    root, name = tmp_path_factory.mktemp("data"), "datasets/org/pictures"
    (root / "several").mkdir()
    write_several_columns(root / "several")
    for split, rows in {"train": 40, "test": 20}.items():
        part = datasets.load_dataset(str(DATA), split=split).select(range(rows))
        part.to_parquet(root / "garments" / f"{split}-0.parquet")
    hub.create(name)
    hub.commit_from_elsewhere(name, "README.md", DATA_CARD.encode())
    for path in sorted(root.rglob("*.parquet")):
        hub.commit_from_elsewhere(name, str(path.relative_to(root)), path.read_bytes())
    return "org/pictures"


def record_of(answer: dict) -> dict:
    assert answer["status"] == 0, answer["stderr"][-3000:]
    return json.loads(answer["stdout"].splitlines()[-1])


def test_an_evaluation_downloads_the_split_that_it_evaluates(hub, client, data_set, tmp_path):
    words = ["--model_name_or_path", "vitae-nano-fashion", "--output", tmp_path / "out", "--dataset", data_set]
    hub.log.clear()
    record = record_of(client.run("evaluate", *words, "--dataset_name", "garments"))
    assert (record["images"], record["split"]) == (20, "test") and record["top1_percent"] > 70
    read = {path.rpartition("/")[2] for method, path, *_ in hub.log if method == "GET" and path.endswith(".parquet")}
    assert read == {"test-0.parquet"}
    assert "BuilderConfig 'none' not found" in client.refusal("evaluate", *words, "--dataset_name", "none")


def test_a_configuration_of_a_data_set_is_streamed(client, data_set, tmp_path):
    words = ["--preset", "vitae-nano", "--dataset", data_set, "--dataset_name", "several", "--streaming", "true"]
    words += ["--image_column_name", "picture", "--label_column_name", "fine", "--eval_split", "train"]
    words += ["--max_steps", 1, "--per_device_train_batch_size", 3, "--output_dir", tmp_path / "out"]
    record = record_of(client.run("train", *words, "--report_to", "none"))
    config = ViTAEForImageClassification.from_pretrained(record["model"]).config
    assert list(config.id2label.values()) == ["ant", "bee", "cat", "dog"]


def test_tars_of_numbered_imagenet_classes_are_trained_on_and_evaluated(hub, client, tmp_path):
    """As `timm/imagenet-1k-wds` has them."""
    hub.create("datasets/org/tars")
    for name in ("train-0000.tar", "validation-0000.tar"):
        with tarfile.open(tmp_path / name, "w") as archive:
            for number in range(6):
                for ending, content in (("png", png(number)), ("cls", b"517"), ("json", b"{}")):
                    member = tarfile.TarInfo(f"{number:06}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        hub.commit_from_elsewhere("datasets/org/tars", name, (tmp_path / name).read_bytes())
    words = ["--dataset", "org/tars", "--class_names", "imagenet-1k"]
    training = ["--preset", "vitae-nano", "--streaming", "true", "--max_steps", 1, "--per_device_train_batch_size", 6]
    training += ["--output_dir", tmp_path / "out", "--report_to", "none"]
    record = record_of(client.run("train", *words, *training))
    assert ViTAEForImageClassification.from_pretrained(record["model"]).config.id2label[517] == "crane2"
    found = record_of(
        client.run("evaluate", *words, "--model_name_or_path", record["model"], "--output", tmp_path / "e")
    )
    assert (found["images"], found["split"]) == (6, "validation")
    assert found["loss"] == pytest.approx(record["eval_loss"], rel=1e-3)


def test_a_split_of_a_configuration_is_predicted(client, data_set, tmp_path):
    words = [data_set, "--model", "vitae-nano-fashion", "--output", tmp_path / "out"]
    record = record_of(client.run("predict", *words, "--dataset_name", "garments", "--split", "test"))
    assert record["pictures"] == 20 and record["errors"] == 0
    said = client.refusal("predict", *words, "--dataset_name", "garments", "--split", "none")
    assert said.endswith("there is no split 'none'; there are 'train', 'test'")
    said = client.refusal("predict", IMAGE, *words[1:], "--split", "test")
    assert f"--dataset_name and --split are for data sets of the Hub, and {IMAGE} is none" in said
