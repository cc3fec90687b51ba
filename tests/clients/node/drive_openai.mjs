// Drives the server with the openai package. Arguments: the addresses of five servers. The first four
// answer "Hello, 😀!": the second never ends, the third fails after two tokens, and the fourth sends
// comments before each token. The fifth calls get_weather and answers when it has the result, or with
// an object where a format is asked for.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, endless, failing, pausing, calling] = process.argv.slice(2);
const connect = (address, options = {}) =>
  new OpenAI({ baseURL: `${address}/v1`, apiKey: "sesame", maxRetries: 0, ...options });
const client = connect(url);
const model = "tiny";
const messages = [{ role: "user", content: "Hi" }];
const TEXT = "Hello, 😀!";
const ANSWER = "It has 21 degrees.";
const OBJECT = { city: "Paris" };
const ARGUMENTS = { city: "Paris", days: [1, 2] };
const GET_WEATHER = {
  name: "get_weather",
  description: "Tells the weather.",
  parameters: {
    type: "object",
    properties: { city: { type: "string" }, days: { type: "array", items: { type: "integer" } } },
    required: ["city"],
  },
};

const steps = {
  async models() {
    const names = [];
    for await (const entry of client.models.list()) names.push(entry.id);
    assert.deepEqual(names, [model]);
    assert.equal((await client.models.retrieve(model)).object, "model");
  },

  async chat() {
    const chat = await client.chat.completions.create({
      model, messages, n: 2, logprobs: true, top_logprobs: 2, seed: 7, max_completion_tokens: 50,
    });
    assert.deepEqual(chat.choices.map((choice) => choice.message.content), [TEXT, TEXT]);
    assert.equal(chat.choices[0].finish_reason, "stop");
    assert.equal(chat.choices[0].logprobs.content[0].top_logprobs.length, 2);
    assert.equal(chat.usage.total_tokens, chat.usage.prompt_tokens + chat.usage.completion_tokens);
  },

  async chatStream() {
    const stream = await client.chat.completions.create({
      model, messages, stream: true, stream_options: { include_usage: true },
    });
    const chunks = [];
    for await (const chunk of stream) chunks.push(chunk);
    const usage = chunks.pop();
    assert.deepEqual(usage.choices, []);
    assert.equal(usage.usage.completion_tokens, chunks.length);
    assert.equal(chunks[0].choices[0].delta.role, "assistant");
    assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content).join(""), TEXT);
  },

  async chatHelper() {
    const stream = client.chat.completions.stream({ model, messages });
    assert.equal(await stream.finalContent(), TEXT);
  },

  async completions() {
    const whole = await client.completions.create({
      model, prompt: ["Hi", "Ho"], max_tokens: 50, logprobs: 1,
    });
    assert.deepEqual(whole.choices.map((choice) => choice.text), [TEXT, TEXT]);
    assert.equal(whole.choices[1].logprobs.tokens.length, whole.usage.completion_tokens / 2);
    let text = "";
    const stream = await client.completions.create({
      model, prompt: "Hi", max_tokens: 50, stream: true,
    });
    for await (const chunk of stream) text += chunk.choices[0].text;
    assert.equal(text, TEXT);
  },

  async responses() {
    const first = await client.responses.create({ model, input: "Hi", instructions: "Be brief." });
    assert.equal(first.output_text, TEXT);
    assert.equal(first.status, "completed");
    const input = [{ role: "user", content: "Hi" }, ...first.output, { role: "user", content: "So" }];
    const second = await client.responses.create({ model, input, store: false });
    assert.equal(second.output_text, TEXT);
    const cut = await client.responses.create({ model, input: "Hi", max_output_tokens: 2 });
    assert.equal(cut.incomplete_details.reason, "max_output_tokens");
    await assert.rejects(
      client.responses.create({ model, input: "Hi", previous_response_id: first.id }),
      (error) => error.status === 400 && error.param === "previous_response_id",
    );
    await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);
  },

  async responsesStream() {
    const stream = await client.responses.create({ model, input: "Hi", stream: true });
    const events = [];
    for await (const event of stream) events.push(event);
    assert.deepEqual(events.map((event) => event.sequence_number), [...events.keys()]);
    const deltas = events.filter((event) => event.type === "response.output_text.delta");
    assert.equal(deltas.map((event) => event.delta).join(""), TEXT);
    assert.equal(events.at(-1).type, "response.completed");
    const final = await client.responses.stream({ model, input: "Hi" }).finalResponse();
    assert.equal(final.output[0].content[0].text, TEXT);
  },

  async comments() {
    const slow = connect(pausing);
    const chat = await slow.chat.completions.create({ model, messages, stream: true });
    let text = "";
    for await (const chunk of chat) text += chunk.choices[0].delta.content;
    assert.equal(text, TEXT);
    const response = await slow.responses.stream({ model, input: "Hi" }).finalResponse();
    assert.equal(response.output[0].content[0].text, TEXT);
  },

  async toolsInChats() {
    const weather = connect(calling);
    const given = { model, messages, tools: [{ type: "function", function: GET_WEATHER }] };
    const { message, finish_reason } = (await weather.chat.completions.create(given)).choices[0];
    assert.equal(finish_reason, "tool_calls");
    assert.equal(message.content, null);
    assert.deepEqual(JSON.parse(message.tool_calls[0].function.arguments), ARGUMENTS);
    const stream = weather.chat.completions.stream(given);
    const streamed = await stream.finalMessage();
    assert.deepEqual(JSON.parse(streamed.tool_calls[0].function.arguments), ARGUMENTS);
    for (const stream of [false, true]) {
      const asked = [];
      const callable = { ...GET_WEATHER, parse: JSON.parse, function: (args) => {
        asked.push(args);
        return "21";
      } };
      const runner = weather.chat.completions.runTools({
        model, messages, stream, tools: [{ type: "function", function: callable }],
      });
      assert.equal(await runner.finalContent(), ANSWER);
      assert.deepEqual(asked, [ARGUMENTS]);
    }
  },

  async toolsInResponses() {
    const weather = connect(calling);
    const tools = [{ type: "function", strict: false, ...GET_WEATHER }];
    const input = [{ role: "user", content: "Hi" }];
    const { output } = await weather.responses.create({ model, input, tools });
    assert.equal(output[0].type, "function_call");
    assert.deepEqual(JSON.parse(output[0].arguments), ARGUMENTS);
    const result = { type: "function_call_output", call_id: output[0].call_id, output: "21" };
    const answer = await weather.responses.create({
      model, input: [...input, ...output, result], tools,
    });
    assert.equal(answer.output_text, ANSWER);
    let written = "";
    const stream = weather.responses.stream({ model, input, tools });
    stream.on("response.function_call_arguments.delta", ({ delta }) => { written += delta; });
    const streamed = await stream.finalResponse();
    assert.equal(written, streamed.output[0].arguments);
    assert.deepEqual(JSON.parse(written), ARGUMENTS);
  },

  async formats() {
    const weather = connect(calling);
    const format = zodTextFormat(z.object({ city: z.string() }), "place");
    const response = await weather.responses.parse({ model, input: "Hi", text: { format } });
    assert.deepEqual(response.output_parsed, OBJECT);
    const chat = await weather.chat.completions.parse({
      model, messages, response_format: zodResponseFormat(z.object({ city: z.string() }), "place"),
    });
    assert.deepEqual(chat.choices[0].message.parsed, OBJECT);
  },

  async aborts() {
    for (const create of [
      (options) => connect(endless).chat.completions.create(
        { model, messages, stream: true, ignore_eos: true }, options),
      (options) => connect(endless).responses.create(
        { model, input: "Hi", stream: true, ignore_eos: true }, options),
    ]) {
      const controller = new AbortController();
      const stream = await create({ signal: controller.signal });
      let chunks = 0;
      for await (const _ of stream) if (++chunks === 10) controller.abort();
      assert.ok(chunks >= 10);
    }
  },

  async errors() {
    await assert.rejects(
      client.chat.completions.create({ model, messages, temperature: 5 }),
      (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
    );
    await assert.rejects(
      client.chat.completions.create({ model: "gpt-5", messages }),
      (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
    );
    await assert.rejects(
      connect(url, { apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);
    await assert.rejects(
      client.embeddings.create({ model, input: "Hi" }), OpenAI.NotFoundError);
  },

  async errorsInStreams() {
    const broken = connect(failing);
    const read = async (stream) => { for await (const _ of await stream); };
    await assert.rejects(
      read(broken.chat.completions.create({ model, messages, stream: true })),
      (error) => error instanceof OpenAI.APIError && error.code === "generation_failed",
    );
    const events = [];
    const stream = await broken.responses.create({ model, input: "Hi", stream: true });
    for await (const event of stream) events.push(event);
    assert.equal(events.at(-1).type, "response.failed");
    assert.equal(events.at(-1).response.error.code, "server_error");
  },

  async retries() {
    const full = { defaultHeaders: { "x-test-full-queue": "once" } };
    await assert.rejects(
      connect(url, full).chat.completions.create({ model, messages }), OpenAI.RateLimitError);
    const patient = connect(url, { ...full, maxRetries: 2 });
    const chat = await patient.chat.completions.create({ model, messages });
    assert.equal(chat.choices[0].message.content, TEXT);
  },
};

for (const [name, step] of Object.entries(steps)) {
  await step();
  console.log(name);
}
