// A plot of some series over the last minutes, with uPlot.

import { clock } from "./format.js";
import { html } from "./ui.js";
import { useEffect, useLayoutEffect, useRef, useState } from "../vendor/preact-hooks.js";
import uPlot from "../vendor/uplot.js";

const HEIGHT = 168;
const DARK = matchMedia("(prefers-color-scheme: dark)");

/**
 * `title`; `at`: Unix times, another array for other data; `lines`: [{name, values, dashed}, …], at most two; `text(value)`: a value with its unit;
 * `axis(value)`: the same for the axis; `empty`: what to say when no line has a value; `whole`: values are whole.
 */
export function Plot({ title, at, lines, text, axis, empty, whole = false }) {
  const box = useRef(null);
  const plot = useRef(null);
  const [place, setPlace] = useState(null);
  const [dark, setDark] = useState(DARK.matches);
  const data = [at, ...lines.map((line) => line.values)];
  const latest = useRef(data);
  latest.current = data;

  useEffect(() => {
    const update = () => setDark(DARK.matches);
    DARK.addEventListener("change", update);
    return () => DARK.removeEventListener("change", update);
  }, []);

  useLayoutEffect(() => {
    const made = new uPlot(options(box.current, { lines, axis, whole, onPlace: setPlace }), latest.current, box.current);
    plot.current = made;
    const resized = new ResizeObserver(() => made.setSize({ width: box.current.clientWidth, height: HEIGHT }));
    resized.observe(box.current);
    return () => {
      resized.disconnect();
      made.destroy();
    };
  }, [dark]);

  useEffect(() => plot.current.setData(latest.current), [at]);

  const shown = place ?? at.length - 1;
  const known = lines.some((line) => line.values.some((value) => value !== null));
  return html`<figure class="plot">
    <figcaption>
      <h3>${title}</h3>
      <ul class="legend">
        ${lines.map((line, number) => html`<li>
          <svg width="18" height="8" aria-hidden="true" class="line-${number + 1}">
            <line x1="0" y1="4" x2="18" y2="4" stroke-width="2" stroke-dasharray=${line.dashed ? "4 3" : undefined} />
          </svg>
          ${line.name} <b>${latestText(line.values, shown, place, text)}</b>
        </li>`)}
        <li class="when">${place === null ? "" : clock(at[place])}</li>
      </ul>
    </figcaption>
    <div class="canvas" ref=${box} role="img" aria-label=${summary(title, lines, text)}></div>
    ${!known && html`<p class="nothing">${empty}</p>`}
  </figure>`;
}

/** The value under the pointer, or the last one. */
function latestText(values, shown, place, text) {
  const value = place === null ? values.findLast((one) => one !== null) : values[shown];
  return value === null || value === undefined ? "–" : text(value);
}

function summary(title, lines, text) {
  const parts = lines.map(({ name, values }) => {
    const known = values.filter((value) => value !== null);
    if (!known.length) return `${name}: nothing`;
    return `${name}: ${text(known.at(-1))} last, ${text(Math.max(...known))} at most`;
  });
  return `${title} over the last 15 minutes. ${parts.join("; ")}.`;
}

function options(box, { lines, axis, whole, onPlace }) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const font = `12px ${style.getPropertyValue("--sans")}`;
  const common = {
    font,
    stroke: colour("ink-2"),
    grid: { stroke: colour("line"), width: 1 },
    ticks: { show: false },
  };
  return {
    width: Math.max(box.clientWidth, 1),
    height: HEIGHT,
    padding: [8, 6, 0, 0],
    legend: { show: false },
    cursor: { y: false, points: { size: 7 }, drag: { x: false, y: false } },
    scales: { y: { range: (_plot, _min, max) => [0, Math.max(whole ? 4 : 100, (max ?? 0) * 1.12)] } },
    hooks: { setCursor: [(plot) => onPlace(plot.cursor.left < 0 ? null : (plot.cursor.idx ?? null))] },
    axes: [
      { ...common, size: 30, space: 70, values: (_plot, ticks) => ticks.map((tick) => clock(tick).slice(0, 5)), incrs: [60, 180, 300, 600] },
      {
        ...common,
        size: 58,
        space: 34,
        incrs: whole ? [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000] : undefined,
        values: (_plot, ticks) => ticks.map(axis),
      },
    ],
    series: [
      {},
      ...lines.map((line, number) => ({
        stroke: colour(`plot-${number + 1}`),
        width: 1.75,
        dash: line.dashed ? [5, 4] : undefined,
        spanGaps: false,
        paths: whole ? uPlot.paths.stepped({ align: 1 }) : undefined,
        points: { show: whole ? false : undefined, size: 5 },
      })),
    ],
  };
}
