// Images: what the page knows of them, and what can be done with them.

import { numbersOf } from "./playground-fields.js";
import { Store } from "./playground-store.js";
import { streamImages } from "./playground-stream.js";
import { maskFile, marksAnything } from "./playground-mask.js";

/** The fields of a request that are numbers, by their names in it. Those left empty are not sent. */
export const NUMBERS = {
  width: "Width", height: "Height", n: "Number", steps: "Steps", guidance_scale: "Guidance", seed: "Seed",
};
const EDIT_NUMBERS = { ...NUMBERS, strength: "Strength" };
const KEPT = 30;
/** Of each image: the most that the API takes. */
const PREVIEWS = 3;

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

/**
 * What one request makes. `images`: each `{ index, file, url, seed }`, or `{ index, url, preview: true }` as long as it is
 * being made; `step`, `total`: how far they all are, 0 before the first step; `began`: by performance.now().
 */
function newBatch({ params, source, strokes }) {
  return {
    id: (lastId += 1), params, source, strokes, state: "running", problem: "", images: [], step: 0, total: 0,
    totalMs: null, began: performance.now(),
  };
}

/** Make images of the parameters, or edit the source. */
export async function make() {
  const { running, batches, params, source } = images.state;
  if (running || !params.prompt.trim() || !params.model) return;
  let fields;
  try {
    fields = { ...numbersOf(params, source ? EDIT_NUMBERS : NUMBERS), stream: true, partial_images: PREVIEWS };
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
    batch.images = batch.images.filter(({ preview }) => !preview);
  }
  const kept = images.state.batches.filter(({ state }) => state !== "cancelled").slice(0, KEPT);
  images.set({ batches: kept, running: null });
  if (batch.state === "cancelled") for (const { url } of batch.images) URL.revokeObjectURL(url);
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
  const options = { signal };
  if (batch.source) options.body = await editForm(batch, fields);
  else options.json = fields;
  const onStep = (step, total) => {
    Object.assign(batch, { step, total });
    images.touch();
  };
  const onImage = (event) => {
    const image = imageOf(event);
    const others = batch.images.filter(({ index }) => index !== image.index);
    batch.images = [...others, image].sort((one, other) => one.index - other.index);
    batch.totalMs = event.timings?.total_ms ?? batch.totalMs;
    images.touch();
  };
  const path = batch.source ? "v1/images/edits" : "v1/images/generations";
  await streamImages(path, options, { count: fields.n ?? 1, onStep, onImage });
}

/** The image of an event of the stream. */
function imageOf({ type, b64_json: text, image_index: index, output_format: format, seed }) {
  if (type.endsWith(".partial_image")) return { index, url: `data:image/${format};base64,${text}`, preview: true };
  const file = new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type: "image/png" });
  return { index, file, url: URL.createObjectURL(file), seed };
}

async function editForm({ source, strokes }, fields) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  form.append("image", source.file, "image");
  if (marksAnything(strokes)) form.append("mask", await maskFile(source, strokes), "mask.png");
  return form;
}
