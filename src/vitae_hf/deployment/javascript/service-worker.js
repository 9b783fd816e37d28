// Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
/** Keeps the files of the page for the time without a connection, and lets it use threads. */

const PREFIX = `${self.registration.scope} `; // other pages of this address keep theirs
const VERSION = PREFIX + "{version}"; // of all files; another one replaces what is kept
const SHELL = ["./", "page.js", "preprocessing.mjs", "style.css"];

/** A request that asks the server whether a file has changed. */
const fresh = (request) => new Request(request, { cache: "no-cache" });

self.addEventListener("install", (event) => {
  self.skipWaiting();
  event.waitUntil(caches.open(VERSION).then((cache) => cache.addAll(SHELL.map(fresh))));
});

self.addEventListener("activate", (event) => {
  const others = async () => (await caches.keys()).filter((name) => name.startsWith(PREFIX) && name !== VERSION);
  const forget = async () => Promise.all((await others()).map((name) => caches.delete(name)));
  event.waitUntil(forget());
});

/** The response with the headers that make the page cross-origin isolated, without which browsers give no threads. */
function isolated(response) {
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

async function answer(request) {
  const cache = await caches.open(VERSION);
  const kept = await cache.match(request, { ignoreSearch: true });
  if (kept) return isolated(kept);
  const response = await fetch(request.mode === "navigate" ? request : fresh(request));
  if (response.ok) await cache.put(request, response.clone());
  return isolated(response);
}

self.addEventListener("fetch", (event) => {
  const isOurs = new URL(event.request.url).origin === self.location.origin;
  if (isOurs && event.request.method === "GET") event.respondWith(answer(event.request));
});
