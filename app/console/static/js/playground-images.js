// Images: what the page knows of them, and what can be done with them.

import { send, Unreachable } from "./api.js";
import { numbersOf } from "./playground-fields.js";
import { Store } from "./playground-store.js";
import { maskFile, marksAnything } from "./playground-mask.js";

/** The fields of a request that are numbers, by their names in it. Those left empty are not sent. */
export const NUMBERS = {
  width: "Width", height: "Height", n: "Number", steps: "Steps", guidance_scale: "Guidance", seed: "Seed",
};
const EDIT_NUMBERS = { ...NUMBERS, strength: "Strength" };
const KEPT = 30;

/**
 * `source`: the image to edit, `{ file, url, width, height }`, or null for a new one. `strokes`: its mask
 * (playground-mask.js). `batches`: what was made, newest first, as `newBatch` gives it. `running`: the AbortController
 * of the request that runs, or null.
 */
export const images = new Store({
  params: {
    model: "", prompt: "", negative_prompt: "", width: "", height: "", n: "1", steps: "", guidance_scale: "", seed: "",
    strength: "",
  },
  source: null,
  strokes: [],
  batches: [],
  running: null,
  problem: "",
});

let lastId = 0;

/** What one request makes. `images`: each `{ file, url, seed }`; `began`: by performance.now(). */
function newBatch({ params, source, strokes }) {
  return {
    id: (lastId += 1), params, source, strokes, state: "running", problem: "", images: [], totalMs: null,
    began: performance.now(),
  };
}

/** Make images of the parameters, or edit the source. */
export async function make() {
  const { running, batches, params, source } = images.state;
  if (running || !params.prompt.trim() || !params.model) return;
  let fields;
  try {
    fields = { ...numbersOf(params, source ? EDIT_NUMBERS : NUMBERS), response_format: "b64_json" };
  } catch (error) {
    images.set({ problem: error.message });
    return;
  }
  for (const name of ["model", "prompt", "negative_prompt"]) if (params[name].trim()) fields[name] = params[name];
  const batch = newBatch(images.state);
  const controller = new AbortController();
  images.set({ batches: [batch, ...batches], running: controller, problem: "" });
  for (const { images: old } of batches.slice(KEPT - 1)) for (const { url } of old) URL.revokeObjectURL(url);
  try {
    await request(batch, fields, controller.signal);
    batch.state = "complete";
  } catch (error) {
    batch.state = controller.signal.aborted ? "cancelled" : "failed";
    batch.problem = error.message;
  }
  const kept = images.state.batches.filter(({ state }) => state !== "cancelled").slice(0, KEPT);
  images.set({ batches: kept, running: null });
}

/** Give the request up. The connection closes, and with it the worker stops. */
export function cancel() {
  images.state.running?.abort();
}

/** Make one image again, with all that it was made of. */
export function makeAgain(batch, image) {
  const params = { ...batch.params, n: "1", seed: String(image.seed) };
  images.set({ params, source: batch.source, strokes: batch.strokes });
  make();
}

/** Take an image, a File or Blob, as the one to edit; null for none. */
export async function edit(file) {
  if (!file) {
    images.set({ source: null, strokes: [], problem: "" });
    return;
  }
  const url = URL.createObjectURL(file);
  try {
    const { width, height } = await sizeOf(url);
    images.set({ source: { file, url, width, height }, strokes: [], problem: "" });
  } catch {
    URL.revokeObjectURL(url);
    images.set({ problem: "This browser can't read the file as an image." });
  }
}

async function sizeOf(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return { width: image.naturalWidth, height: image.naturalHeight };
}

async function request(batch, fields, signal) {
  const options = { method: "POST", signal };
  if (batch.source) options.body = await editForm(batch, fields);
  else options.json = fields;
  const response = await send(batch.source ? "v1/images/edits" : "v1/images/generations", options);
  let answer;
  try {
    answer = await response.json();
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Unreachable("the connection broke before the images had arrived");
  }
  const total = response.headers.get("X-Total-Ms");
  batch.totalMs = total === null ? performance.now() - batch.began : Number(total);
  batch.images = answer.data.map(({ b64_json: text, seed }) => {
    const file = new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type: "image/png" });
    return { file, url: URL.createObjectURL(file), seed };
  });
}

async function editForm({ source, strokes }, fields) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  form.append("image", source.file, "image");
  if (marksAnything(strokes)) form.append("mask", await maskFile(source, strokes), "mask.png");
  return form;
}
