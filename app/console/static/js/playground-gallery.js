// The images: what is asked for, the image to edit with its mask, and what was made.

import { count, duration } from "./format.js";
import { Aside, ModelField, NumberField, setParam, TextField } from "./playground-fields.js";
import { cancel, edit, images, make, makeAgain } from "./playground-images.js";
import { MaskCanvas } from "./playground-mask.js";
import { useStore } from "./playground-store.js";
import { useTick } from "./poll.js";
import { html, Notice } from "./ui.js";
import { useEffect, useRef, useState } from "../vendor/preact-hooks.js";

/** The panel. `models`: the rows of /v1/models that make or edit images. */
export function Images({ models }) {
  const { params, source, batches, problem } = useStore(images);
  const able = models.filter(({ endpoints }) => (source ? "edit" : "generation") in endpoints);
  const top = useRef(null);
  useEffect(() => {
    if (!able.some(({ id }) => id === params.model)) setParam(images, "model", able[0]?.id ?? "");
  }, [models, source]);

  const editAgain = async (file) => {
    await edit(file);
    top.current.scrollIntoView({ block: "start" });
  };
  return html`<div class="bench" ref=${top}>
    <${Parameters} models=${able} editing=${source !== null} />
    <div class="gallery">
      <${Order} able=${able.length > 0} />
      ${problem && html`<${Notice} kind="error">${problem}<//>`}
      <p class="hidden" role="status">${spoken(batches[0])}</p>
      ${batches.map((batch) => html`<${Batch} key=${batch.id} batch=${batch} onEdit=${editAgain} />`)}
    </div>
  </div>`;
}

function spoken(batch) {
  if (!batch || batch.state === "failed") return "";
  if (batch.state === "running") return "The images are being made.";
  return `${count(batch.images.length, "image")} made of: ${batch.params.prompt}`;
}

/** What to make, and of what. */
function Order({ able }) {
  const { params, source, running } = useStore(images);
  const onSubmit = (event) => {
    event.preventDefault();
    make();
  };
  return html`<form class="order" onSubmit=${onSubmit}>
    ${source && html`<${Source} source=${source} />`}
    <${TextField} store=${images} name="prompt" label=${source ? "What the edit should show" : "Prompt"} rows=${2} />
    <div class="buttons">
      ${running
        ? html`<button type="button" class="stop" key="stop" onClick=${cancel}>Cancel</button>`
        : html`<button type="submit" class="primary" key="make" disabled=${!params.prompt.trim() || !able}>
            ${source ? "Edit" : "Make"}</button>`}
      <label class="file"><span>${source ? "Another image from disk" : "Edit an image from disk"}</span>
        <input type="file" class="hidden" accept="image/png,image/jpeg,image/webp" onChange=${(event) => {
          if (event.target.files[0]) edit(event.target.files[0]);
          event.target.value = "";
        }} /></label>
    </div>
    ${!able && html`<p class="hint">No model of the catalogue can ${source ? "edit images" : "make images of a text alone"}.</p>`}
  </form>`;
}

/** The image to edit. */
function Source({ source }) {
  const { strokes } = useStore(images);
  const longest = Math.max(source.width, source.height);
  const [size, setSize] = useState(12);
  const [erase, setErase] = useState(false);
  return html`<div class="source">
    <${MaskCanvas} source=${source} strokes=${strokes} size=${(longest * size) / 100} erase=${erase}
      onStroke=${(stroke) => images.set({ strokes: [...images.state.strokes, stroke] })} />
    <div class="tools">
      <p>${strokes.length ? "Only what is painted may change." : "Paint over what may change, or nothing to let all of it change."}</p>
      <label class="field"><span>Brush</span>
        <input type="range" min="2" max="40" value=${size} onInput=${(event) => setSize(Number(event.target.value))} /></label>
      <div class="buttons">
        <button type="button" aria-pressed=${erase} onClick=${() => setErase(!erase)}>Erase</button>
        <button type="button" disabled=${!strokes.length} onClick=${() => images.set({ strokes: strokes.slice(0, -1) })}>Undo</button>
        <button type="button" disabled=${!strokes.length} onClick=${() => images.set({ strokes: [] })}>Clear mask</button>
        <button type="button" class="quiet" onClick=${() => edit(null)}>Don't edit</button>
      </div>
    </div>
  </div>`;
}

function Batch({ batch, onEdit }) {
  const { params, state, problem, source, images: made, totalMs } = batch;
  return html`<article class="batch" aria-label=${params.prompt} aria-busy=${state === "running"}>
    <p class="prompt">${params.prompt}</p>
    <p class="figures">
      <span>${params.model}</span>${source && html`<span>edit</span>`}
      ${params.negative_prompt.trim() && html`<span>without: ${params.negative_prompt}</span>`}
      ${params.steps && html`<span>${params.steps} steps</span>`}
      ${state === "complete" && html`<span>${duration(totalMs)}</span>`}
    </p>
    ${state === "running" && html`<${Running} batch=${batch} />`}
    ${state === "failed" && html`<${Notice} kind="error">${problem.charAt(0).toUpperCase()}${problem.slice(1)}.<//>`}
    <div class="made">
      ${made.map((image) => html`<${Made} key=${image.index} batch=${batch} image=${image} onEdit=${onEdit} />`)}
    </div>
  </article>`;
}

function Running({ batch: { began, step, total } }) {
  useTick(1000);
  const seconds = Math.floor((performance.now() - began) / 1000);
  // without a value the bar shows that nothing is known
  const known = step ? { value: step, max: total } : {};
  return html`<div class="running">
    <progress aria-label="Being made" ...${known}></progress>
    ${step > 0 && html`<span>step ${step} of ${total}</span>`}<span>${seconds} s</span>
  </div>`;
}

function Made({ batch, image, onEdit }) {
  const { running } = useStore(images);
  const [size, setSize] = useState("");
  const onLoad = ({ target }) => setSize(`${target.naturalWidth} × ${target.naturalHeight}`);
  // one element for previews and image, so that each stays until the next one is there
  if (image.preview) {
    return html`<figure class="preview">
      <img src=${image.url} alt="Preview of: ${batch.params.prompt}" onLoad=${onLoad} />
      <figcaption><span class="figures"><span>preview</span></span></figcaption>
    </figure>`;
  }
  return html`<figure>
    <img src=${image.url} alt=${batch.params.prompt} onLoad=${onLoad} />
    <figcaption>
      <span class="figures"><span>${size}</span><span>seed ${image.seed}</span></span>
      <span class="buttons">
        <a class="button" href=${image.url} download="${batch.params.model}-${image.seed}.png">Download</a>
        <button type="button" onClick=${() => onEdit(image.file)}>Edit</button>
        <button type="button" disabled=${running !== null} onClick=${() => makeAgain(batch, image)}>Make again</button>
      </span>
    </figcaption>
  </figure>`;
}

function Parameters({ models, editing }) {
  return html`<${Aside} title="Parameters">
    <${ModelField} store=${images} models=${models} />
    <div class="pair">
      <${NumberField} store=${images} name="width" label="Width" whole=${true} />
      <${NumberField} store=${images} name="height" label="Height" whole=${true} />
      <${NumberField} store=${images} name="n" label="Number" whole=${true} empty="1" />
      <${NumberField} store=${images} name="steps" label="Steps" whole=${true} />
      <${NumberField} store=${images} name="guidance_scale" label="Guidance" />
      <${NumberField} store=${images} name="seed" label="Seed" whole=${true} empty="random" />
      ${editing && html`<${NumberField} store=${images} name="strength" label="Strength" />`}
    </div>
    <${TextField} store=${images} name="negative_prompt" label="Negative prompt" rows=${2} placeholder="none" />
  <//>`;
}
