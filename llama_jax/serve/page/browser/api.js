// Requests to the server, with the API key if there is one.

const key = sessionStorage.getItem("llama-jax-key"); // key_form.html has put it there

// An error that the server has answered with, or that kept it from answering.
// `message` is a sentence; `param` names the field of the request at fault, if any.
export class ApiError extends Error {
  constructor(message, param = null) {
    super(message);
    this.param = param;
  }
}

// Sends a request: GET, or POST if there is a body. Throws ApiError, or AbortError if aborted.
export async function call(path, { body, signal } = {}) {
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  const options = { headers, signal };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw unreachable(error);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

// The data of a stream of server-sent events, up to [DONE].
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw unreachable(error);
    }
    if (part.done) throw new ApiError("The server closed the connection before the end.");
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // an empty line, or a comment that keeps alive
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message, event.error.param);
      yield event;
    }
  }
}

function unreachable(error) {
  return error.name === "AbortError" ? error : new ApiError("The server cannot be reached.");
}

async function refusal(response) {
  try {
    const { error } = await response.json();
    return new ApiError(error.message, error.param);
  } catch {
    return new ApiError(`The server answered with status ${response.status}.`);
  }
}
