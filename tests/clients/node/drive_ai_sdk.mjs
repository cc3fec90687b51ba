// Drives the server with the Vercel AI SDK, through its provider for OpenAI (chats, completions and
// responses) and the one for compatible servers. Arguments as of drive_openai.mjs.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [url, endless, failing, pausing, calling] = process.argv.slice(2);
const TEXT = "Hello, 😀!";
const openai = (address, apiKey = "sesame") =>
  createOpenAI({ baseURL: `${address}/v1`, apiKey });
const compatible = (address, apiKey = "sesame") =>
  createOpenAICompatible({ name: "local", baseURL: `${address}/v1`, apiKey, includeUsage: true });

// The state of a conversation stays with the client.
const providerOptions = { openai: { store: false } };
const kinds = {
  "openai.chat": (address, key) => openai(address, key).chat("tiny"),
  "openai.completion": (address, key) => openai(address, key).completion("tiny"),
  "openai.responses": (address, key) => openai(address, key).responses("tiny"),
  "compatible.chatModel": (address, key) => compatible(address, key).chatModel("tiny"),
  "compatible.completionModel": (address, key) => compatible(address, key).completionModel("tiny"),
};

for (const [name, model] of Object.entries(kinds)) {
  const whole = await generateText({
    model: model(url), prompt: "Hi", temperature: 0.5, maxOutputTokens: 50, providerOptions,
  });
  assert.equal(whole.text, TEXT);
  assert.equal(whole.finishReason, "stop");
  assert.ok(whole.usage.outputTokens > 3);

  const messages = [
    { role: "user", content: "Hi" }, ...whole.response.messages, { role: "user", content: "So" },
  ];
  const next = await generateText({ model: model(url), messages, providerOptions });
  assert.equal(next.text, TEXT);

  const cut = await generateText({
    model: model(url), prompt: "Hi", maxOutputTokens: 2, providerOptions,
  });
  assert.equal(cut.finishReason, "length");

  for (const address of [url, pausing]) {
    const stream = streamText({ model: model(address), prompt: "Hi", providerOptions });
    let text = "";
    for await (const delta of stream.textStream) text += delta;
    assert.equal(text, TEXT);
    assert.equal(await stream.finishReason, "stop");
    assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
  }

  const controller = new AbortController();
  const aborted = streamText({
    model: model(endless), prompt: "Hi", abortSignal: controller.signal, providerOptions,
    maxOutputTokens: 100_000,
  });
  let deltas = 0;
  for await (const _ of aborted.textStream) if (++deltas === 10) controller.abort();
  assert.ok(deltas >= 10);

  const failures = [];
  const failed = streamText({
    model: model(failing), prompt: "Hi", providerOptions, onError: ({ error }) => failures.push(error),
  });
  await failed.consumeStream();
  assert.equal(failures.length, 1);

  for (const [address, key, status] of [[url, "wrong", 401], [`${url}/nowhere`, "sesame", 404]]) {
    await assert.rejects(
      generateText({ model: model(address, key), prompt: "Hi", maxRetries: 0, providerOptions }),
      (error) => APICallError.isInstance(error) && error.statusCode === status,
    );
  }
  const full = { "x-test-full-queue": "always" };
  await assert.rejects(
    generateText({ model: model(url), prompt: "Hi", maxRetries: 0, headers: full, providerOptions }),
    (error) => error.statusCode === 429 && error.isRetryable,
  );
  console.log(name);
}

// Tools and objects, which completions do not have.
const tools = {
  get_weather: tool({
    description: "Tells the weather.",
    inputSchema: z.object({ city: z.string(), days: z.array(z.number()) }),
    execute: async (input) => `21 degrees in ${input.city}`,
  }),
};
for (const name of ["openai.chat", "openai.responses", "compatible.chatModel"]) {
  const model = kinds[name](calling);
  const given = { model, prompt: "Hi", tools, stopWhen: stepCountIs(3), providerOptions };
  const whole = await generateText(given);
  const streamed = streamText(given);
  await streamed.consumeStream();
  for (const { text, steps } of [whole, { text: await streamed.text, steps: await streamed.steps }]) {
    assert.equal(text, "It has 21 degrees.");
    assert.equal(steps.length, 2);
    assert.deepEqual(steps[0].toolCalls[0].input, { city: "Paris", days: [1, 2] });
  }
  const schema = z.object({ city: z.string() });
  const object = await generateText({
    model, prompt: "Hi", output: Output.object({ schema }), providerOptions,
  });
  assert.deepEqual(object.output, { city: "Paris" });
  console.log(name, "with tools");
}
