# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""A web page on which a visitor chooses a picture and sees what a model makes of it, and what the model looks at."""

import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from html import escape
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import of gradio, which reads it

import gradio as gr  # noqa: E402
import numpy as np  # noqa: E402
import PIL.Image  # noqa: E402
from matplotlib import colormaps  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from starlette.datastructures import Headers, MutableHeaders  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402
from transformers.utils import logging  # noqa: E402

from ..evaluation.colours import class_colours  # noqa: E402
from ..evaluation.detections import Detections, detect, enlarged  # noqa: E402
from ..evaluation.explanation import BRANCH_COLOURS, Explanation, explain, stage_name  # noqa: E402
from .visitors import DENSE_TYPES, Models, Refusal, read_picture, reduced, uploaded_file  # noqa: E402


logger = logging.get_logger(__name__)

MAX_FILE_SIZE = "20mb"
MOST_WAITING = 20
"""How many visitors can wait for an explanation. Further ones are told to come back later."""
SESSIONS = 200
"""For how many visitors the last explanation is kept, each less than a megabyte."""
KEPT_SECONDS = 3600
"""How long pictures and explanations of a visitor are kept."""

MAPS = {
    "Attention": "where attention looks, mean over heads and tokens",
    "Branches": "what adds more to each token, convolution (orange) or attention (purple)",
    "Rollout": "where the attention of all its cells looks, one after the other",
    "Grad-CAM": "what speaks for this label at the end of the network",
    "Picture": "what the network gets, resized and cropped",
}
"""The kinds of maps that a visitor can choose, and what each one shows."""
BUTTONS: list[Any] = ["download", "fullscreen"]  # not "share", which would upload the picture
TITLE = "What does ViTAE see?"
WELCOME = "Choose a picture, drop one, or take one of the examples."
NO_MATRIX = "random features, which never make a matrix of attention; look at the branches here"
DONE = "seconds for label and maps. Choose another label to see what speaks for it."
FOUND = "seconds to find {count}. Choose a class to see its objects alone."
OBJECTS = "what the detector found with a score above 0.5; choose the map “Picture” to see none of it"
CLASSES_FOUND = "seconds to find {count} and how much of the picture each fills. Choose a class to see it alone."
CLASSES = "the class of each pixel; choose the map “Picture” to see none of it"
FAILURE = "This did not work, and it is not your fault. The log of the machine that serves this page says why."
BUSY = "Too many people are waiting for this page: please come back in a minute."
NO_MODEL = "There is no trained model here yet: run `make demo` (three minutes), then load this page again."

PURPLE, ORANGE = (to_hex(colormaps[BRANCH_COLOURS](place)) for place in (0.85, 0.2))
CSS = f"""
.gradio-container {{ max-width: 1080px !important; margin: auto !important }}
#title h1 {{ font-size: clamp(1.3rem, 5vw, 1.7rem); margin: 0 }}
#picture img, #view img {{ width: 100%; height: 100%; object-fit: contain }}
#notice p {{ margin: 0; padding: .6em .9em; overflow-wrap: anywhere; background: var(--block-background-fill) }}
#notice .html-container, #caption .html-container {{ padding: 0 }}
#caption {{ padding: 0 var(--block-padding) }}
#caption p {{ margin: .4em 0 }}
#caption .scale {{ display: flex; gap: .6em; align-items: center }}
#caption .scale i {{ flex: 1; height: 8px; border-radius: 4px }}
#caption .bars {{ display: flex; gap: 2px; height: 72px; margin-top: 14px }}
#caption .bars i {{ flex: 1; display: flex; align-items: flex-end; background: {ORANGE}; opacity: .5 }}
#caption .bars b {{ flex: 1; background: {PURPLE} }}
#caption .bars .now {{ opacity: 1; outline: 2px solid var(--body-text-color) }}
#caption .key i {{ display: inline-block; width: .8em; height: .8em; background: {ORANGE} }}
#caption .key span {{ white-space: nowrap; margin-right: .8em }}
#caption .key .attention {{ background: {PURPLE} }}
"""
# The fonts are those of the visitor's machine, since gradio's themes may fetch fonts from other servers.
THEME = gr.themes.Soft(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def pick_map(explanation: Explanation, kind: str, index: int) -> tuple[np.ndarray | None, tuple[str, str]]:
    """Choose the map to show.

    Args:
        kind: one of `MAPS`.
        index: of the cell among the explanation's cells, from 0.

    Returns:
        A map `(h, w)` from 0 to 1, or `None` if there is none to show; and what the lowest and highest value mean.
    """
    if kind == "Picture":
        return None, ("", "")
    if kind == "Branches":
        return explanation.attention_share[index], ("convolution", "attention")
    if kind == "Grad-CAM":
        return explanation.grad_cam, ("least", "most")
    rollout = explanation.rollout.get(explanation.stages[index])
    values = explanation.attention[index] if kind == "Attention" else rollout
    return None if values is None else values / values.max(), ("none", "most")


def picture_under_map(image: np.ndarray, values: np.ndarray | None, colours: str, side: int = 448) -> np.ndarray:
    """The image in grey under a map, enlarged until both sides have at least `side` pixels.

    Args:
        image: uint8 `(height, width, 3)`.
        values: the map `(h, w)` from 0 to 1; `None` gives the image in its own colours.
        colours: name of a colour map of matplotlib.
    """
    picture = PIL.Image.fromarray(image)
    picture = picture.resize(enlarged(picture.size, side), PIL.Image.Resampling.BICUBIC)
    if values is None:
        return np.asarray(picture)
    smooth = PIL.Image.fromarray(values.astype(np.float32)).resize(picture.size, PIL.Image.Resampling.BILINEAR)
    coloured = colormaps[colours](np.asarray(smooth).clip(0, 1), bytes=True)[..., :3]
    grey = picture.convert("L").convert("RGB")
    return np.asarray(PIL.Image.blend(grey, PIL.Image.fromarray(coloured), alpha=0.65))


def colours_of(kind: str) -> str:
    return BRANCH_COLOURS if kind == "Branches" else "inferno"


def map_caption(explanation: Explanation, kind: str, index: int) -> str:
    """Name and meaning of a map, and its scale of colours, as HTML. See [`pick_map`] for the arguments."""
    values, (least, most) = pick_map(explanation, kind, index)
    stage = stage_name(explanation.stages[index])
    names = {"Rollout": stage, "Grad-CAM": explanation.target_label, "Picture": "Picture"}
    title = f"<b>{escape(str(names.get(kind, explanation.cells[index])))}</b>: "
    if values is None:
        return f"<p>{title}{MAPS[kind] if kind == 'Picture' else NO_MATRIX}</p>"
    colours = ", ".join(map(to_hex, colormaps[colours_of(kind)](np.linspace(0, 1, 9))))
    scale = f'{least}<i style="background: linear-gradient(to right, {colours})"></i>{most}'
    return f'<p>{title}{MAPS[kind]}</p><p class="scale">{scale}</p>'


def bars_of_cells(explanation: Explanation, shown: int) -> str:
    """A bar for each cell with the share of attention in what it adds, as HTML. The cell with the index `shown` is
    marked."""
    shares = [(name, float(share.mean())) for name, share in zip(explanation.cells, explanation.attention_share)]
    bars = "".join(
        f'<i{" class=now" if index == shown else ""} title="{escape(name)}: {share:.0%} attention">'
        f'<b style="height: {share:.1%}"></b></i>'
        for index, (name, share) in enumerate(shares)
    )
    key = '<i class="attention"></i> attention and <i></i> convolution in what each cell adds'
    return f'<div class="bars">{bars}</div><p class="key">{key}</p>'


def show(explanation: Explanation | Detections | None, kind: str, cell: int) -> tuple[np.ndarray | None, str]:
    """The image under the chosen map, or with the objects in it, and its caption as HTML.

    Args:
        kind: one of `MAPS`.
        cell: the number on the slider, from 1. A number beyond the last cell means the last cell.
    """
    if explanation is None:
        return None, ""
    if isinstance(explanation, Detections):
        if kind == "Picture":
            return picture_under_map(np.asarray(explanation.picture), None, ""), "<p><b>Picture</b></p>"
        return explanation.drawn(), caption_of(explanation)
    index = min(max(int(cell), 1), len(explanation.cells)) - 1
    picture = picture_under_map(explanation.image, pick_map(explanation, kind, index)[0], colours_of(kind))
    return picture, map_caption(explanation, kind, index) + bars_of_cells(explanation, index)


def caption_of(found: Detections) -> str:
    """What the colours in the picture mean, as HTML: those of a detector's boxes stand beside them."""
    if "boxes" in found.objects:
        return f"<p><b>Objects</b>: {OBJECTS}</p>"
    colours = class_colours(len(found.names))
    shown = [index for index in found.objects["labels"].tolist() if found.chosen in (None, found.names[index])]
    key = [
        f'<span><i style="background: {to_hex(colours[index])}"></i> {escape(str(found.names[index]))}</span>'
        for index in shown
    ]
    return f'<p><b>Classes</b>: {CLASSES}</p><p class="key">{" ".join(key)}</p>'


class Turns:
    """Lets one explanation run at a time, since it changes the model while it runs, and limits how many wait.

    The queue of gradio does both too, but an explanation that its visitor cancels leaves the queue while it still runs.
    """

    def __init__(self, most_waiting: int):
        self._room = threading.BoundedSemaphore(1 + most_waiting)
        self._one = threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until nobody else has the turn, and keep it until the end of the block.

        Raises:
            Refusal: too many are waiting already.
        """
        if not self._room.acquire(blocking=False):
            raise Refusal(BUSY)
        try:
            with self._one:
                yield
        finally:
            self._room.release()


TURNS = Turns(MOST_WAITING)


def examine(
    models: Models, file: dict[str, Any] | None, name: str | None, label: str | None = None
) -> tuple[Explanation | Detections | None, str]:
    """Explain how a model classifies a picture that a visitor sent, or find the objects or classes in it.

    Args:
        file: the `path` of an upload, which [`UploadsOnly`] has checked.
        name: the model.
        label: the label that Grad-CAM explains, or the class that is shown; default: the likeliest, or all.

    Returns:
        The explanation, or `None` if there is none, and a sentence for the visitor.
    """
    if not name and not models.names():
        return None, NO_MODEL
    try:
        with TURNS.turn():
            model, processor = models.load(name)
            if not file:
                return None, WELCOME
            picture, notice = read_picture(file["path"])
            if model.config.model_type in DENSE_TYPES:
                return look_for(model, processor, picture, notice, label)
            explanation = explain(model, processor, picture, label)
    except Refusal as refusal:
        return None, str(refusal)
    except Exception:  # an error in one visitor's model or picture must not end the page
        logger.exception("%s with %s", name, file)
        return None, FAILURE
    return explanation, f"{notice} {explanation.seconds:.2f} {DONE}".strip()


def look_for(
    model: Any, processor: Any, picture: PIL.Image.Image, notice: str, label: str | None
) -> tuple[Detections, str]:
    """The objects or classes in a picture, one class or all, and a sentence for the visitor; see [`examine`]."""
    found = detect(model, processor, reduced(picture))
    number = len(found.objects["labels"])
    one, many, sentence = (
        ("object", "objects", FOUND) if "boxes" in found.objects else ("class", "classes", CLASSES_FOUND)
    )
    count = f"one {one}" if number == 1 else f"{number or 'no'} {many}"
    found.chosen = label
    return found, f"{notice} {found.seconds:.2f} {sentence.format(count=count)}".strip()


def respond(
    models: Models,
    file: dict[str, Any] | None,
    name: str | None,
    last: Explanation | Detections | None,
    label: str | None = None,
) -> tuple[Any, ...]:
    """The new contents of the page when a visitor chooses a picture, model or label.

    Args:
        last: the explanation that is shown so far. If the new one has the same cells, the slider stays where it is.

    Returns:
        Explanation, notice, scores, and slider.
    """
    explanation, sentence = examine(models, file, name, label)
    notice = f"<p>{escape(sentence)}</p>"
    if explanation is None:
        return None, notice, None, gr.skip()
    if isinstance(explanation, Detections):
        return explanation, notice, explanation.scores() or None, gr.Slider(visible=False)
    scores = {entry["label"]: entry["score"] for entry in explanation.labels}
    if isinstance(last, Explanation) and last.cells == explanation.cells:
        return explanation, notice, scores, gr.skip()
    last_cell = len(explanation.cells)
    return explanation, notice, scores, gr.Slider(maximum=max(2, last_cell), value=last_cell, visible=True)


def choose_model(models: Models) -> gr.Dropdown:
    """The list of models, made anew whenever somebody opens the page, so that newly trained models are in it."""
    names = models.names()
    hint = "or type a Hub name: organisation/model" if models.hub_names else None
    return gr.Dropdown(names, value=names[0] if names else None, info=hint)


class UploadsOnly(gr.Blocks):
    """`gr.Blocks` whose functions get no files but those that were uploaded to this page, on every route.

    gradio itself only checks files whose `meta` says that they are files. It passes others on unchecked, and it
    downloads a file that is named by a web address.

    Args:
        uploads: folder of uploads; its path contains no links.
        **options: as for `gr.Blocks`.
    """

    def __init__(self, uploads: Path, **options: Any):
        super().__init__(**options)
        self.uploads = uploads

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **options: Any) -> list[Any]:
        """Check the values of a request before gradio prepares them for a function. Requests of every route come here.

        Raises:
            gr.Error: a picture, or any value that is a list or an object, is not a file in `uploads`.
        """
        try:
            values = [self._check(block, value) for block, value in zip(block_fn.inputs, inputs)]
        except Refusal as refusal:
            raise gr.Error(str(refusal), print_exception=False) from None
        return await super().preprocess_data(block_fn, values, *args, **options)

    def _check(self, block: gr.blocks.Block, value: object) -> object:
        """The value. Of a file only its path is kept, in the form that gradio expects."""
        if value is None or not (isinstance(block, gr.Image) or isinstance(value, dict | list)):
            return value
        return {"path": str(uploaded_file(value, self.uploads)), "meta": {"_type": "gradio.FileData"}}


class Page:
    """The page. gradio serves its attribute `blocks`.

    Args:
        models: the models that visitors can choose.
        uploads: folder of uploads, which is also gradio's `GRADIO_TEMP_DIR`.
        examples: pictures that visitors can try.
    """

    blocks: UploadsOnly
    explanation: gr.State
    name: gr.Dropdown
    picture: gr.Image
    notice: gr.HTML
    label: gr.Label
    view: gr.Image
    kind: gr.Radio
    cell: gr.Slider
    caption: gr.HTML

    def __init__(self, models: Models, uploads: Path, examples: Sequence[Path] = ()):
        self.models = models
        options: dict[str, Any] = {"title": TITLE, "analytics_enabled": False, "delete_cache": (600, KEPT_SECONDS)}
        with UploadsOnly(uploads, **options) as self.blocks:
            gr.Markdown(f"# {TITLE}\nAttention and convolutions side by side, cell by cell.", elem_id="title")
            with gr.Row():
                with gr.Column(min_width=300):
                    self._lay_out_question(examples)
                with gr.Column(min_width=300):
                    self._lay_out_answer()
            self.explanation = gr.State(time_to_live=KEPT_SECONDS)
            self._connect()

    def _lay_out_question(self, examples: Sequence[Path]) -> None:
        self.name = gr.Dropdown(label="Model", allow_custom_value=self.models.hub_names, elem_id="model")
        self.picture = gr.Image(label="Picture", type="filepath", height=300, buttons=[], elem_id="picture")
        if examples:
            gr.Examples([[str(path)] for path in examples], self.picture, cache_examples=False)
        self.notice = gr.HTML(elem_id="notice")
        self.label = gr.Label(label="What it is", num_top_classes=5, elem_id="label")

    def _lay_out_answer(self) -> None:
        self.view = gr.Image(label="What it looks at", interactive=False, format="png", elem_id="view", buttons=BUTTONS)
        self.kind = gr.Radio(list(MAPS), value="Attention", label="Map", elem_id="kind")
        self.cell = gr.Slider(1, 2, value=1, step=1, label="Cell, from first to last", elem_id="cell")
        self.caption = gr.HTML(elem_id="caption")

    def _connect(self) -> None:
        """Say which function runs when a visitor chooses something.

        One explanation runs at a time. The others wait in gradio's queue, which tells visitors their place. Inputs are
        not preprocessed, since gradio would decode a picture before its size is checked.
        """

        def explain_picture(file: Any, name: Any, last: Any) -> tuple[Any, ...]:
            return respond(self.models, file, name, last)

        def explain_label(file: Any, name: Any, last: Any, event: gr.SelectData) -> tuple[Any, ...]:
            return *respond(self.models, file, name, last, event.value), "Grad-CAM"

        explaining: dict[str, Any] = {
            "inputs": [self.picture, self.name, self.explanation],
            "preprocess": False,
            "concurrency_limit": 1,
            "concurrency_id": "explaining",
        }
        showing: dict[str, Any] = {
            "fn": show,
            "inputs": [self.explanation, self.kind, self.cell],
            "outputs": [self.view, self.caption],
            "show_progress": "hidden",
        }
        answer = [self.explanation, self.notice, self.label, self.cell]
        opened = self.blocks.load(lambda: choose_model(self.models), None, self.name)
        opened.then(explain_picture, outputs=answer, **explaining)
        gr.on([self.picture.change, self.name.change], explain_picture, outputs=answer, **explaining).then(**showing)
        self.label.select(explain_label, outputs=[*answer, self.kind], **explaining).then(**showing)
        gr.on([self.kind.input, self.cell.input], trigger_mode="always_last", **showing)


def host_name(netloc: str) -> str | None:
    """The name or address in `host:port` or `host`, in lower case; `None` if it cannot be read."""
    try:
        return urlsplit(f"//{netloc}").hostname
    except ValueError:
        return None


def address(name: str | None) -> IPv4Address | IPv6Address | None:
    """The IP address that is written in a string, or `None` if it is something else."""
    try:
        return ip_address(name or "")
    except ValueError:
        return None


class StayHere:
    """ASGI middleware that refuses requests from other web sites, and requests under names that are not the page's own.

    Without it, any web site that a visitor has open could use the page: by sending requests from the visitor's browser,
    or under a name that its owner points to this machine (DNS rebinding). gradio answers under any name and lets the
    other site read the answer. It also fetches any public web address that follows `/file=`, and runs ffmpeg on
    uploaded recordings; both are refused too.

    Args:
        host: address to listen on. If other machines can reach it, the page also answers under this machine's names and
            under any IP address, which nobody can point elsewhere.
        trusted_hosts: further names under which the page is reached, for example through a proxy.

    Raises:
        ValueError: one of `trusted_hosts` is no host name.
    """

    CLOSED = ("/file=http", "/file/http", "/proxy=", "/process_recording")
    POLICY = (
        "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval';"
        " style-src 'self' 'unsafe-inline'"
    )

    def __init__(self, host: str, trusted_hosts: Sequence[str] = ()):
        for name in trusted_hosts:
            if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
                raise ValueError(f"expected the name of a host as page.example, without port and path, got {name!r}")
        own = host.strip("[]").lower()
        ip = address(own)
        self.is_local: bool = own == "localhost" or (ip is not None and ip.is_loopback)
        self.trusted: set[str] = {name.lower() for name in trusted_hosts}
        self.names: set[str] = {"localhost", "127.0.0.1", "::1", own, *self.trusted}
        if not self.is_local:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    @asynccontextmanager
    async def surround(self, app: Any) -> AsyncIterator[None]:
        """The lifespan of gradio's app, in which this middleware puts itself around all other middleware.

        Middleware that is passed to gradio would come after gradio's own, which already answers other sites.
        """
        self.app: Any = app.middleware_stack
        app.middleware_stack = self
        yield

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = self.POLICY
            await send(message)

        refusal = self._refusal(Headers(scope=scope), scope["path"])
        await (refusal or self.app)(scope, receive, send_with_policy)

    def _refusal(self, headers: Headers, path: str) -> PlainTextResponse | None:
        host = headers.get("host", "").lower()
        name = host_name(host)
        if name not in self.names and (self.is_local or address(name) is None):
            return PlainTextResponse("this page has another name; who serves it can add one: --trusted_host NAME", 400)
        site = headers.get("origin", f"http://{host}").lower().partition("://")[2]
        if site != host and host_name(site) not in self.trusted:
            return PlainTextResponse("other sites cannot use this page", 403)
        if any(part in path for part in self.CLOSED):
            return PlainTextResponse("nothing is fetched from elsewhere, and no recording is taken", 403)
        return None


def check_port(host: str, port: int | None) -> None:
    """See that a port is free, since gradio's own error speaks of its functions.

    Raises:
        OSError: it is taken.
    """
    if port is not None:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            raise OSError(f"the page cannot have port {port} of {host}: {error.strerror or error}") from error


def serve(
    models: Models,
    examples: Sequence[Path] = (),
    host: str = "127.0.0.1",
    port: int | None = None,
    trusted_hosts: Sequence[str] = (),
) -> None:
    """Serve the page until the process is told to end. All uploads are deleted at the end.

    Args:
        models: the models that visitors can choose.
        examples: pictures that visitors can try.
        host: address to listen on. `"0.0.0.0"` serves everybody who can reach this machine.
        port: default: the first free one from 7860 on.
        trusted_hosts: further names under which the page is reached, see [`StayHere`].

    Raises:
        OSError: the port is taken.
        ValueError: one of `trusted_hosts` is no host name.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    surroundings = StayHere(host, trusted_hosts)
    check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="vitae-hf-") as folder:
        uploads = Path(folder).resolve()
        # gradio serves the files in these folders. By default they may hold what other pages have left there.
        os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_EXAMPLES_CACHE": str(uploads)}
        copies = [Path(shutil.copy(path, uploads)) for path in examples]  # only files in there are accepted
        blocks = Page(models, uploads, copies).blocks
        blocks.queue(max_size=MOST_WAITING, default_concurrency_limit=4, api_open=False)  # every request must queue
        blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=MAX_FILE_SIZE,
            state_session_capacity=SESSIONS,
            app_kwargs={"lifespan": surroundings.surround},
            theme=THEME,
            css=CSS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"The page is at {blocks.local_url}", flush=True)
        blocks.block_thread()
