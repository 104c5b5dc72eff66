// A mask drawn over an image, with a mouse, a finger, a pen or the keyboard: where the image may change.

import { html } from "./ui.js";
import { useEffect, useRef, useState } from "../vendor/preact-hooks.js";

const SHOWN_PX = 960;

// A stroke is { size, erase, points }: the width of the brush and the points [x, y] in pixels of the image.

/** Whether the strokes leave anything to mark. What later strokes erase is for the service to judge. */
export function marksAnything(strokes) {
  return strokes.some(({ erase }) => !erase);
}

/** The mask as a PNG file of the image's size: transparent where the image may change, as in OpenAI's API. */
export async function maskFile({ width, height }, strokes) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.fillRect(0, 0, width, height);
  for (const stroke of strokes) draw(context, stroke, !stroke.erase);
  return canvas.convertToBlob({ type: "image/png" });
}

/** Draw a stroke, or cut it `out` of what is there. */
function draw(context, { size, points }, out) {
  context.globalCompositeOperation = out ? "destination-out" : "source-over";
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = size;
  context.beginPath();
  // a line without a length would not be drawn: a dot is a very short one
  context.moveTo(points[0][0] - 0.01, points[0][1]);
  for (const point of points) context.lineTo(...point);
  context.stroke();
}

/**
 * An image with its mask. `source`: `{ url, width, height }`; `strokes`: those drawn, and `onStroke(stroke)` is called
 * for each new one. `size`: of the brush in pixels of the image; `erase`: whether it takes away.
 */
export function MaskCanvas({ source, strokes, onStroke, size, erase }) {
  const canvas = useRef(null);
  const current = useRef(null);
  const [at, setAt] = useState(null);
  const scale = SHOWN_PX / Math.max(source.width, source.height);
  const width = Math.max(1, Math.round(source.width * scale));
  const height = Math.max(1, Math.round(source.height * scale));

  const paint = () => {
    const context = canvas.current.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    context.setTransform(width / source.width, 0, 0, height / source.height, 0, 0);
    context.strokeStyle = stripes(context, source.width / canvas.current.clientWidth);
    for (const stroke of [...strokes, ...(current.current ? [current.current] : [])]) draw(context, stroke, stroke.erase);
    if (at) ring(context, at, size, source.width / canvas.current.clientWidth);
  };
  useEffect(paint);

  const pointOf = (event) => {
    const box = canvas.current.getBoundingClientRect();
    const place = (value, begin, extent, pixels) => Math.round((((value - begin) / extent) * pixels) * 10) / 10;
    return [place(event.clientX, box.left, box.width, source.width), place(event.clientY, box.top, box.height, source.height)];
  };
  const begin = (event) => {
    if (event.button !== 0 || !event.isPrimary) return;
    canvas.current.setPointerCapture(event.pointerId);
    current.current = { size, erase, points: [pointOf(event)] };
    setAt(pointOf(event));
  };
  const move = (event) => {
    if (!event.isPrimary) return;
    // a browser reports several points of a fast movement in one event
    const events = event.getCoalescedEvents?.() ?? [];
    current.current?.points.push(...(events.length ? events : [event]).map(pointOf));
    setAt(pointOf(event));
  };
  const end = (event) => {
    if (!event.isPrimary || !current.current) return;
    const stroke = current.current;
    current.current = null;
    if (event.pointerType !== "mouse") setAt(null);
    onStroke(stroke);
  };
  const onKeyDown = (event) => {
    const step = Math.max(1, size / 2) * (event.shiftKey ? 4 : 1);
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    const [x, y] = at ?? [source.width / 2, source.height / 2];
    if (event.key === " ") onStroke({ size, erase, points: [[x, y]] });
    else if (!dx && !dy) return;
    event.preventDefault();
    setAt([clamp(x + dx * step, source.width), clamp(y + dy * step, source.height)]);
  };

  return html`<div class="mask ${height > width ? "portrait" : ""}">
    <img src=${source.url} alt="The image to edit" width=${width} height=${height} />
    <canvas ref=${canvas} width=${width} height=${height} tabindex="0" role="application"
      aria-label="Mask: paint over what may change. With the keyboard, arrow keys move the brush and the space bar paints."
      onPointerDown=${begin} onPointerMove=${move} onPointerUp=${end} onPointerCancel=${end} onKeyDown=${onKeyDown}
      onPointerLeave=${() => current.current || setAt(null)} onBlur=${() => setAt(null)}></canvas>
  </div>`;
}

function clamp(value, limit) {
  return Math.min(limit, Math.max(0, value));
}

/** Stripes of two colours, so that a mask is seen on every image. `pixel`: that of the screen, in pixels of the image. */
function stripes(context, pixel) {
  const tile = new OffscreenCanvas(8, 8);
  const paint = tile.getContext("2d");
  paint.fillStyle = "#d4006a";
  paint.fillRect(0, 0, 8, 8);
  paint.fillStyle = "#fff";
  for (let place = 0; place < 8; place += 1) for (const shift of [0, 1]) paint.fillRect(place, (place + shift) % 8, 1, 1);
  const pattern = context.createPattern(tile, "repeat");
  pattern.setTransform(new DOMMatrix().scale(pixel));
  return pattern;
}

/** The outline of the brush. `pixel`: that of the screen, in pixels of the image. */
function ring(context, [x, y], size, pixel) {
  const colour = context.strokeStyle;
  context.globalCompositeOperation = "source-over";
  for (const [style, width] of [["#000", 3], ["#fff", 1.2]]) {
    context.strokeStyle = style;
    context.lineWidth = width * pixel;
    context.beginPath();
    context.arc(x, y, size / 2, 0, 2 * Math.PI);
    context.stroke();
  }
  context.strokeStyle = colour;
}
