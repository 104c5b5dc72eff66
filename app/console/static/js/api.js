// Requests to this service, with the API key of this tab.

const STORED_KEY = "modelservice.key";
const ANSWER_MS = 15000;

let key = read();

/** The service could not be reached, or its answer ended early. */
export class Unreachable extends Error {}

/** The service has refused a request. `status`: HTTP's, `message`: for people, `code`: for programs. */
export class Refused extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Whether this tab has a key. */
export function hasKey() {
  return key !== "";
}

/** Keep a key for this tab, "" to forget it. */
export function setKey(value) {
  key = value;
  try {
    if (key) sessionStorage.setItem(STORED_KEY, key);
    else sessionStorage.removeItem(STORED_KEY);
  } catch {
    // storage is switched off: the key lasts until the page is loaded again
  }
}

/** The headers that a request needs: the key, if there is one. As bytes of UTF-8, which no header value may exceed. */
export function keyHeaders() {
  if (!key) return {};
  const bytes = new TextEncoder().encode(key);
  return { Authorization: `Bearer ${String.fromCharCode(...bytes)}` };
}

/**
 * Send a request to a path such as "v1/workers", relative to the page, so that a proxy may add a prefix.
 *
 * Returns the response, whose status is below 400 or in `accept`. `options` are those of `fetch`; `json` is a body.
 * Throws Refused and Unreachable, and AbortError if `options.signal` was aborted.
 */
export async function send(path, { json, accept = [], headers = {}, ...options } = {}) {
  if (json !== undefined) {
    options.body = JSON.stringify(json);
    headers = { "Content-Type": "application/json", ...headers };
  }
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      cache: "no-store",
      credentials: "omit",
      ...options,
      headers: { ...headers, ...keyHeaders() },
    });
  } catch (error) {
    if (options.signal?.aborted && error.name === "AbortError") throw error;
    throw new Unreachable("the service does not answer");
  }
  if (response.ok || accept.includes(response.status)) return response;
  throw await refusal(response);
}

/** Send a request as `send` does, and return the JSON of its response. It must arrive within seconds. */
export async function sendForJson(path, options = {}) {
  const limit = AbortSignal.timeout(ANSWER_MS);
  const signal = options.signal ? AbortSignal.any([options.signal, limit]) : limit;
  const response = await send(path, { ...options, signal });
  try {
    return await response.json();
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Unreachable("the answer of the service was cut off");
  }
}

async function refusal(response) {
  let body = {};
  try {
    body = await response.json();
  } catch {
    // a proxy's page, perhaps
  }
  const message = body.message || `the service answered with status ${response.status}`;
  return new Refused(response.status, message, body.error?.code ?? "");
}

function read() {
  try {
    return sessionStorage.getItem(STORED_KEY) ?? "";
  } catch {
    return "";
  }
}
