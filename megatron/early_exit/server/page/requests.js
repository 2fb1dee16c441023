"use strict";
// What the page asks of the server, and what it says when the server does not answer as it should.

/** An answer of the server that is no success. status: 0 if it could not be reached or the connection broke. */
class RequestError extends Error {
  constructor(status, message, { code = null, retryAfter = null, isMidStream = false } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter, isMidStream });
  }
}

/** Fetch a path of this server; addresses are relative, so that a gateway may put the page into a folder. */
async function request(path, { key, body, signal } = {}) {
  const headers = {};
  if (key) headers["Authorization"] = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new RequestError(0, "");
  }
  if (response.ok) return response;
  const error = await response.json().then((json) => json.error, () => null);
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  throw new RequestError(response.status, error?.message ?? "", { code: error?.code, retryAfter });
}

/** The JSON of each server-sent event up to [DONE]. Throws RequestError for an event that is an error, and if the
 * connection ends before [DONE]. */
async function* events(path, options) {
  const response = await request(path, options);
  let rest = "", isDone = false; // behind [DONE] only the end of the body comes; read, it frees the connection
  try {
    for await (const text of decoded(response.body)) {
      const blocks = (rest + text).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.replace(/^data: ?/, "");
        if (data === "[DONE]") isDone = true;
        if (isDone) continue;
        const event = JSON.parse(data);
        if (event.error) throw new RequestError(500, event.error.message, { isMidStream: true });
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof RequestError || options.signal?.aborted) throw error;
  }
  if (!isDone) throw new RequestError(0, "the connection ended", { isMidStream: true });
}

/** The text of a stream of bytes, which is let go when the loop over it ends. */
async function* decoded(stream) {
  const reader = stream.getReader(), decoder = new TextDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield decoder.decode(value, { stream: true });
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** An error in plain words, with what to do. */
function inWords(error) {
  const said = error.message ? `: ${error.message.replace(/[.\s]+$/, "")}.` : ".";
  const later = error.retryAfter ? `Try again in ${error.retryAfter} s.` : "Try again in a moment.";
  if (error.isMidStream) return `The answer broke off${said} What has come is kept; send the request again.`;
  if (error.status === 0) return "The server cannot be reached. See whether it still runs, then try again.";
  if (error.status === 401) return "The server asks for an API key. Enter it under “API key”, then try again.";
  if (error.status === 429) return `The server has too many requests${said} ${later}`;
  if (error.status === 503) return `The server is not ready${said} ${later}`;
  if (error.code === "context_length_exceeded") {
    return `This does not fit into the model${said} Shorten the prompt, ask for fewer tokens, or begin a new chat.`;
  }
  if (error.status < 500) return `The server refuses the request${said} Change it and send it again.`;
  return `The server failed${said} Send the request again; if that does not help, its log says more.`;
}
