// Requests to the server that sent this page. Paths are relative, so that they work below --root-path.

const KEY = "assent-api-key";

/** Tells of `unauthorized`, `gone` (no answer) and `answered`. */
export const connection = new EventTarget();

export const baseUrl = new URL(".", document.baseURI).href;

/** The API key, for as long as this tab is open. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

export class ApiError extends Error {
  /** status: of HTTP; 0 = the server does not answer. retryAfter: seconds, or null. */
  constructor(status, message, retryAfter = null) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

/** Send a request; an error of the server's, or no answer, is an ApiError. */
export async function send({ method, path, body }, signal) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  const options = { method, headers, signal, body: JSON.stringify(body) };
  const response = await answering(() => fetch(baseUrl + path, options));
  connection.dispatchEvent(new Event("answered"));
  if (!response.ok) throw await errorOf(response);
  return response;
}

export async function json(method, path, body, signal) {
  return (await send({ method, path, body }, signal)).json();
}

/** The events of a stream, as objects. Ends with an ApiError where the stream does. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await answering(() => reader.read());
      if (done) throw new ApiError(0, "The answer was cut off: the connection ended before it did.");
      const parts = (waiting + value).split("\n\n");
      waiting = parts.pop();
      for (const part of parts.filter((text) => text.startsWith("data: "))) {
        const data = part.slice("data: ".length);
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.code, event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed before
  }
}

async function answering(action) {
  try {
    return await action();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    connection.dispatchEvent(new Event("gone"));
    throw new ApiError(0, "The server does not answer. Is it still running?");
  }
}

async function errorOf(response) {
  const text = await response.text();
  let message = text;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    message ||= response.statusText;
  }
  if (response.status === 401) connection.dispatchEvent(new Event("unauthorized"));
  return new ApiError(response.status, message, response.headers.get("Retry-After"));
}
