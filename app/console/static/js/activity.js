// What /v1/activity tells, put together from many polls.

import { sendForJson } from "./api.js";

export const SAMPLE_S = 5;
export const SHOWN_S = 900;
const REQUESTS = 100;
// from the upper bound of one class of times to the next (app/dispatch/activity.py)
const GROWTH = 1.2;

/**
 * Make a function for `usePoll` that asks for what is new and returns all that is known:
 * {now, queues, samples: Map of `at` to the models, requests: newest first, underDrain: Set of names}.
 */
export function activityLoader() {
  let cursor = "";
  let samples = new Map();
  let requests = [];
  let now = 0;

  return async (signal) => {
    const found = await sendForJson(`v1/activity${cursor && `?after=${cursor}`}`, { signal });
    if (found.now < now - SAMPLE_S) {
      // another Redis, whose clock is behind
      samples = new Map();
      requests = [];
    }
    now = found.now;
    cursor = found.cursor;
    samples = new Map([...samples].filter(([at]) => at > now - SHOWN_S - SAMPLE_S));
    for (const { at, models } of found.samples) samples.set(at, models);
    const known = new Set(requests.map(({ id }) => id));
    requests = [...found.requests.filter(({ id }) => !known.has(id)), ...requests]
      .sort((one, other) => other.ended_at - one.ended_at)
      .slice(0, REQUESTS);
    return { now, queues: found.queues, samples, requests, underDrain: new Set(found.under_drain) };
  };
}

/** The names of the models in a choice: all, or one. */
function chosen(models, model) {
  return model ? (model in models ? [models[model]] : []) : Object.values(models);
}

/** Add up the classes of times of several samples: [[bound, requests], …], the shortest first. */
function merged(samples) {
  const counts = new Map();
  for (const { first_token_ms: classes } of samples) {
    for (const [bound, requests] of Object.entries(classes)) {
      counts.set(Number(bound), (counts.get(Number(bound)) ?? 0) + requests);
    }
  }
  return [...counts].sort(([one], [other]) => one - other);
}

/** The time within which the part `share` of the requests had a first token, in ms; null without requests. */
function quantile(classes, share) {
  const total = classes.reduce((sum, [, requests]) => sum + requests, 0);
  let left = total * share;
  for (const [bound, requests] of classes) {
    // times are taken for evenly spread, on a scale of factors, within their class
    if (left <= requests) return bound * GROWTH ** (left / requests - 1);
    left -= requests;
  }
  return null;
}

/** Median and 95th percentile of the time to first token in the last `seconds`: {median, high, requests}. */
export function firstTokens(activity, model, seconds) {
  const from = activity.now - seconds - SAMPLE_S;
  const recent = [...activity.samples].filter(([at]) => at > from).flatMap(([, models]) => chosen(models, model));
  const classes = merged(recent);
  const requests = classes.reduce((sum, [, number]) => sum + number, 0);
  return { median: quantile(classes, 0.5), high: quantile(classes, 0.95), requests };
}

/** The series of the plots over SHOWN_S, one value for each sample, null where nothing is known. */
export function series(activity, model) {
  const last = Math.floor(activity.now / SAMPLE_S) * SAMPLE_S;
  const found = { at: [], waiting: [], running: [], median: [], high: [] };
  for (let at = last - SHOWN_S + SAMPLE_S; at <= last; at += SAMPLE_S) {
    const models = activity.samples.get(at);
    const samples = models ? chosen(models, model) : [];
    const sum = (name) => (models ? samples.reduce((total, sample) => total + sample[name], 0) : null);
    const classes = merged(samples);
    found.at.push(at);
    found.waiting.push(sum("waiting"));
    found.running.push(sum("running"));
    found.median.push(quantile(classes, 0.5));
    found.high.push(quantile(classes, 0.95));
  }
  return found;
}
