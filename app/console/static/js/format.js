// Numbers with their units, as texts.

const NONE = "–";

/** Milliseconds: "84 ms", "1.24 s", "2 min 5 s"; a dash for null. */
export function duration(ms) {
  if (ms === null || ms === undefined) return NONE;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  const seconds = ms / 1000;
  if (seconds < 99.95) return `${seconds.toPrecision(3)} s`;
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** Milliseconds at an axis: "0", "500 ms", "1.5 s". */
export function shortDuration(ms) {
  if (ms === 0) return "0";
  return ms < 1000 ? `${ms} ms` : `${ms / 1000} s`;
}

/** How long ago something was, in seconds: "now", "12 s", "5 min", "3 h". */
export function ago(seconds) {
  if (seconds < 1) return "now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  return `${Math.floor(seconds / 3600)} h ago`;
}

/** Bytes in GiB: "31.2 GiB". */
export function gibibytes(bytes) {
  return `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}

/** A part of one: "62 %". */
export function percent(part) {
  return `${Math.round(part * 100)} %`;
}

/** A number of things: "1 image", "2 images". */
export function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

/** Tokens in a second: "35.2 tokens/s". */
export function rate(tokens, ms) {
  const perSecond = (tokens * 1000) / ms;
  return `${perSecond < 100 ? perSecond.toPrecision(3) : Math.round(perSecond)} tokens/s`;
}

/** The time of day of a Unix time: "14:03:27". */
export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
}

/** A text in which `code` is between backticks, as elements. */
export function withCode(text, html) {
  return text.split("`").map((part, place) => (place % 2 ? html`<code>${part}</code>` : part));
}
