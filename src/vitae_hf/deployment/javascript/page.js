// Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
/** The page: a picture in, the likeliest labels out, all in the browser. */

import { normalize, readPicture, resizeAndCrop } from "./preprocessing.mjs";

const TOP = 5;
/** More threads than this make a small network no faster. */
const MOST_THREADS = 8;
const SETTINGS = "original/preprocessor_config.json";

const element = (id) => document.getElementById(id);
const readJson = async (path) => (await fetch(path)).json();
const tell = (sentence) => (element("notice").textContent = sentence);

/**
 * Let a service worker keep every file for the time without a connection. It also sends the headers that threads need.
 * It sees what a page loads from the next visit on, so that the first visit begins anew once it is there.
 */
async function startServiceWorker() {
  const { active, installing } = await navigator.serviceWorker.register("service-worker.js");
  if (active || !installing) return;
  await new Promise((resolve) => {
    installing.onstatechange = () => ["activated", "redundant"].includes(installing.state) && resolve();
  });
  if (installing.state === "activated") {
    addEventListener("pageshow", () => location.reload()); // should the browser bring this visit back
    location.reload();
    await new Promise(() => {}); // nothing more of this visit
  }
}

/** ONNX Runtime, with WebGPU where there is one, and what to run on, the best first. */
async function loadRuntime() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const runtime = await import(`./onnxruntime/ort.${adapter ? "webgpu" : "wasm"}.min.mjs`);
  runtime.env.wasm.wasmPaths = new URL("onnxruntime/", location.href).href;
  runtime.env.wasm.numThreads = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MOST_THREADS) : 1;
  return { runtime, providers: adapter ? ["webgpu", "wasm"] : ["wasm"] };
}

/** Open a program with the first provider that runs it. The run on zeros also makes later ones faster. */
async function openProgram({ runtime, providers }, path, { size }) {
  const bytes = new Uint8Array(await (await fetch(path)).arrayBuffer());
  for (const provider of providers) {
    try {
      const session = await runtime.InferenceSession.create(bytes, { executionProviders: [provider] });
      const dims = [1, 3, size.height, size.width];
      const zeros = new Float32Array(3 * size.height * size.width);
      await session.run({ pixel_values: new runtime.Tensor("float32", zeros, dims) }, ["logits"]);
      return { session, provider };
    } catch (error) {
      if (provider === providers.at(-1)) throw error;
      console.warn(`${provider} does not run this program:`, error);
    }
  }
}

function softmax(logits) {
  const highest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const exponentials = Array.from(logits, (logit) => Math.exp(logit - highest));
  const sum = exponentials.reduce((a, b) => a + b, 0);
  return exponentials.map((value) => value / sum);
}

/** A probability for each label; where a picture may have several labels, each by itself. */
function probabilities(logits, { problem_type: kind }) {
  if (kind !== "multi_label_classification") return softmax(logits);
  return Array.from(logits, (logit) => 1 / (1 + Math.exp(-logit)));
}

function showPicture({ data, width, height }, name) {
  const rgba = new Uint8ClampedArray(width * height * 4).fill(255);
  for (let from = 0, to = 0; from < data.length; from += 3, to += 4) rgba.set(data.subarray(from, from + 3), to);
  const canvas = Object.assign(element("seen"), { width, height });
  canvas.setAttribute("aria-label", `The part of ${name} that the network gets`);
  canvas.getContext("2d").putImageData(new ImageData(rgba, width, height), 0, 0);
}

function showLabels(scores, names) {
  const order = scores.map((_, index) => index).sort((a, b) => scores[b] - scores[a]);
  const rows = order.slice(0, TOP).map((index) => {
    const percent = `${(100 * scores[index]).toFixed(1)} %`;
    const row = document.createElement("li");
    const [name, share, bar] = ["span", "span", "div"].map((tag) => row.appendChild(document.createElement(tag)));
    name.textContent = names[index];
    share.textContent = percent;
    bar.className = "bar";
    bar.setAttribute("aria-hidden", "true");
    bar.appendChild(document.createElement("i")).style.width = `${100 * scores[index]}%`;
    return row;
  });
  element("labels").replaceChildren(...rows);
  return names[order[0]];
}

/** What the page holds, and what it does with a picture. Of several pictures or networks at once the last one counts. */
class Page {
  turn = 0;
  choice = 0;

  async load() {
    await startServiceWorker().catch((error) => console.warn("The page will need a connection:", error));
    [this.config, this.settings, this.manifest] = await Promise.all(["config.json", SETTINGS, "export.json"].map(readJson));
    element("model").textContent = this.manifest.name;
    document.title = `What is in the picture? ${this.manifest.name}`;
    for (const [dtype, { file, bytes }] of Object.entries(this.manifest.programs)) {
      element("precision").append(new Option(`${dtype}, ${(bytes / 1e6).toFixed(1)} MB`, file));
    }
    this.runtime = await loadRuntime();
    await this.choosePrecision();
    for (const id of ["file", "camera", "precision"]) element(id).disabled = false;
  }

  async choosePrecision() {
    const choice = ++this.choice;
    tell("Loading the network …");
    const program = await openProgram(this.runtime, element("precision").value, this.settings);
    if (choice !== this.choice) return;
    this.program = program;
    const { numThreads } = this.runtime.runtime.env.wasm;
    const threads = numThreads === 1 ? "one thread" : `${numThreads} threads`;
    element("runtime").textContent = program.provider === "webgpu" ? "on WebGPU" : `on WebAssembly, ${threads}`;
    tell("Choose a picture, drop one, or photograph one.");
    if (this.file) await this.classify(this.file);
  }

  async classify(file) {
    const turn = ++this.turn;
    element("answer").hidden = true;
    tell(`Reading ${file.name} …`);
    try {
      const picture = await readPicture(file);
      const started = performance.now();
      const seen = resizeAndCrop(picture, this.settings);
      const pixels = normalize(seen, this.settings);
      const prepared = performance.now();
      const feeds = { pixel_values: new this.runtime.runtime.Tensor("float32", pixels.data, pixels.dims) };
      const { logits } = await this.program.session.run(feeds, ["logits"]);
      const finished = performance.now();
      if (turn !== this.turn) return;
      this.file = file;
      this.show(file, seen, logits.data, [prepared - started, finished - prepared]);
      document.dispatchEvent(new CustomEvent("classified", { detail: { pixels: pixels.data, logits: logits.data } }));
    } catch (error) {
      if (turn === this.turn) tell(error.message);
    }
  }

  show(file, seen, logits, [preparing, running]) {
    showPicture(seen, file.name);
    const label = showLabels(probabilities(logits, this.config), this.config.id2label);
    element("answer").hidden = false;
    tell(`${label}. ${running.toFixed(0)} ms in the network, ${preparing.toFixed(0)} ms to resize the picture.`);
  }
}

/** The camera: frames in a video element, one of which becomes a file. */
const camera = {
  async open() {
    try {
      const wanted = { video: { facingMode: "environment" } };
      element("video").srcObject = await navigator.mediaDevices.getUserMedia(wanted);
      await element("video").play();
      element("finder").hidden = false;
      element("take").focus();
    } catch (error) {
      tell(`The camera cannot be used: ${error.message}.`);
    }
  },
  close() {
    for (const track of element("video").srcObject?.getTracks() ?? []) track.stop();
    element("video").srcObject = null;
    element("finder").hidden = true;
    element("camera").focus();
  },
  async take() {
    const { videoWidth, videoHeight } = element("video");
    const canvas = new OffscreenCanvas(videoWidth, videoHeight);
    canvas.getContext("2d").drawImage(element("video"), 0, 0);
    const blob = await canvas.convertToBlob(); // PNG, which loses nothing
    this.close();
    return new File([blob], "photograph.png");
  },
};

function listen(page) {
  const place = element("place");
  const on = (target, event, act) => target.addEventListener(event, act);
  on(element("file"), "change", ({ target }) => {
    if (target.files.length) page.classify(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  });
  on(document, "dragover", (event) => (event.preventDefault(), place.classList.add("over")));
  on(document, "dragleave", () => place.classList.remove("over"));
  on(document, "drop", (event) => {
    event.preventDefault();
    place.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (!page.program) return;
    if (file) page.classify(file);
    else tell("Drop a picture from a folder of this device: this one is a link.");
  });
  on(element("camera"), "click", () => camera.open());
  on(element("close"), "click", () => camera.close());
  on(element("take"), "click", async () => page.classify(await camera.take()));
  on(element("precision"), "change", () => page.choosePrecision().catch((error) => tell(error.message)));
}

const page = new Page();
listen(page);
page.load().catch((error) => tell(`The network could not be loaded: ${error.message}`));
