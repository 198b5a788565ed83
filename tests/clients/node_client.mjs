// Drives the gateway with the official `openai` package for Node, next to the model server behind it.
//
// Most checks run twice, directly and through the gateway, and pass when both saw the same, apart from what is new
// in each answer (ids, times) and what depends on the requests before it (cached tokens).
//
//     BASE_URL=http://gateway DIRECT_URL=http://model-server node tests/clients/node_client.mjs [NAME]

import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { createRequire } from 'node:module';
import { resolve } from 'node:path';
import { isDeepStrictEqual } from 'node:util';

// tests/run installs the package below target/, not next to this file.
const installed = resolve(process.env.NODE_CLIENTS ?? 'target/clients/node', 'package.json');
const { default: OpenAI, toFile } = createRequire(installed)('openai');

const MODEL = process.env.MODEL ?? 'sim-small';
const CHECKS = [];

// The client of one of the two servers, set up as an application sets it up.
class Side {
  constructor(url) {
    this.url = url;
    this.openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'sk-client', maxRetries: 0, timeout: 60_000 });
  }

  chat(content, more = {}, options = {}) {
    const messages = [{ role: 'user', content }];
    const body = { model: MODEL, messages, seed: 7, temperature: 0, max_tokens: 24, ...more };
    return this.openai.chat.completions.create(body, options);
  }
}

// --- how checks are written ------------------------------------------------------------------------------------------

// A check that runs against both servers; what it returns must be the same.
function same(name, check) {
  CHECKS.push([`node: ${name}`, async (direct, gateway) => {
    const expected = normal(await check(direct));
    const got = normal(await check(gateway));
    assert.ok(isDeepStrictEqual(got, expected), `direct and gateway differ${difference(expected, got)}`);
  }]);
}

// A check of something that only the gateway does.
function gatewayOnly(name, check) {
  CHECKS.push([`node: ${name}`, (_, gateway) => check(gateway)]);
}

const DROPPED = new Set([
  // New in each answer.
  'id', 'call_id', 'item_id', 'created', 'created_at', 'completed_at', '_request_id', 'request_id',
  // From earlier requests.
  'cached_tokens', 'created_cache_tokens', 'cache_write_tokens', 'input_tokens_per_turn', 'cached_tokens_per_turn',
]);

// What must be the same on both sides, as plain arrays and objects.
function normal(value) {
  if (value instanceof Uint8Array) {
    return `${value.length} bytes, SHA-256 ${createHash('sha256').update(value).digest('hex')}`;
  }
  if (Array.isArray(value)) return value.map(normal);
  if (value === null || typeof value !== 'object') return value;
  const kept = Object.entries(value).filter(([key]) => !DROPPED.has(key));
  return Object.fromEntries(kept.map(([key, item]) => [key, normal(item)]));
}

function difference(expected, got, place = '') {
  const [a, b] = [expected, got].map((value) => (JSON.stringify(value) ?? 'nothing').slice(0, 300));
  if (!isTree(expected) || !isTree(got)) return ` at ${place || '.'}: direct ${a}, gateway ${b}`;
  const keys = new Set([...Object.keys(expected), ...Object.keys(got)]);
  for (const key of keys) {
    const [left, right] = [JSON.stringify(expected[key]), JSON.stringify(got[key])];
    if (left !== right) return difference(expected[key], got[key], `${place}.${key}`);
  }
  return '';
}

function isTree(value) {
  return value !== null && typeof value === 'object';
}

// The error of exactly this class that `call` must end with.
async function refused(kind, call) {
  try {
    await call();
  } catch (error) {
    assert.equal(error.constructor, kind, `wanted ${kind.name}, got ${error.constructor.name}: ${error.message}`);
    return error;
  }
  throw new Error(`wanted ${kind.name}, got an answer`);
}

async function all(stream) {
  const events = [];
  for await (const event of await stream) events.push(event);
  return events;
}

// The embedded model server does this to one request.
const fault = (text) => ({ headers: { 'x-simulate-fault': text } });

// --- chat ------------------------------------------------------------------------------------------------------------

const WEATHER = {
  name: 'get_weather',
  description: 'The weather in a city',
  parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
};
const ASK_WEATHER = {
  tools: [{ type: 'function', function: WEATHER }],
  tool_choice: { type: 'function', function: { name: 'get_weather' } },
};
const PERSON = {
  type: 'object',
  properties: { name: { type: 'string' }, age: { type: 'integer' } },
  required: ['name', 'age'],
  additionalProperties: false,
};

const deltasOf = (chunks) => chunks.flatMap((chunk) => chunk.choices).map((choice) => choice.delta);
const textOf = (chunks) => deltasOf(chunks).map((delta) => delta.content ?? '').join('');

same('chat', async (side) => {
  const answer = await side.chat('Say this is a test');
  assert.ok(answer.choices[0].message.content, 'the answer has no text');
  assert.ok(answer.usage.completion_tokens > 0, 'the usage is empty');
  return answer;
});

same('chat in many languages', (side) => {
  return side.chat('Grüße, 你好, 👩‍👩‍👧‍👦 and \u2028 a "quote" and a tab\t.', { max_tokens: 64 });
});

same('chat streaming', async (side) => {
  const chunks = await all(side.chat('Count to ten', { stream: true }));
  const whole = await side.chat('Count to ten');
  assert.equal(textOf(chunks), whole.choices[0].message.content, 'the joined stream is not the whole answer');
  assert.ok(chunks.every((chunk) => !chunk.usage), 'usage came although nobody asked');
  return chunks;
});

same('chat streaming with usage', async (side) => {
  const chunks = await all(side.chat('Count to ten', { stream: true, stream_options: { include_usage: true } }));
  assert.ok(chunks.at(-1).usage.completion_tokens > 0, 'the usage is empty');
  return chunks;
});

same('chat with two choices and logprobs', async (side) => {
  const answer = await side.chat('Two, please', { n: 2, logprobs: true, top_logprobs: 2 });
  assert.equal(answer.choices.length, 2);
  assert.equal(answer.choices[1].logprobs.content[0].top_logprobs.length, 2);
  return answer;
});

same('chat with a tool', async (side) => {
  const answer = await side.chat('Weather in Paris?', ASK_WEATHER);
  const [call] = answer.choices[0].message.tool_calls;
  assert.equal(call.function.name, 'get_weather');
  assert.equal(typeof JSON.parse(call.function.arguments), 'object');
  return answer;
});

same('chat with a tool streaming', async (side) => {
  const chunks = await all(side.chat('Weather in Paris?', { ...ASK_WEATHER, stream: true }));
  const calls = deltasOf(chunks).flatMap((delta) => delta.tool_calls ?? []);
  assert.equal(calls.map((call) => call.function.name ?? '').join(''), 'get_weather');
  assert.equal(typeof JSON.parse(calls.map((call) => call.function.arguments ?? '').join('')), 'object');
  return chunks;
});

same('chat joined by the SDK', async (side) => {
  const messages = [{ role: 'user', content: 'Weather in Paris?' }];
  const stream = side.openai.chat.completions.stream({ model: MODEL, messages, seed: 7, ...ASK_WEATHER });
  return stream.finalChatCompletion();
});

same('chat with a JSON schema', async (side) => {
  const format = { type: 'json_schema', json_schema: { name: 'person', strict: true, schema: PERSON } };
  const answer = await side.chat('Invent a person', { response_format: format, max_tokens: 200 });
  assert.deepEqual(Object.keys(JSON.parse(answer.choices[0].message.content)).sort(), ['age', 'name']);
  return answer;
});

for (const megabytes of [1, 5, 20]) {
  same(`vision with ${megabytes} MiB`, (side) => {
    // Not all one letter, so that a lost or doubled piece changes the body.
    const picture = Buffer.allocUnsafe(megabytes * 768 * 1024);
    for (let at = 0; at < picture.length; at += 4) picture.writeUInt32LE(Math.imul(at, 2654435761) >>> 0, at);
    const url = `data:image/png;base64,${picture.toString('base64')}`;
    assert.equal(url.length >> 20, megabytes, 'the size of the data URL in MiB');
    return side.chat([{ type: 'text', text: 'What is this?' }, { type: 'image_url', image_url: { url } }]);
  });
}

// --- the other surfaces ----------------------------------------------------------------------------------------------

same('completion', async (side) => {
  const answer = await side.openai.completions.create({ model: MODEL, prompt: 'Once upon', max_tokens: 16, seed: 7 });
  assert.ok(answer.choices[0].text, 'the answer has no text');
  return answer;
});

same('completion streaming', async (side) => {
  const body = { model: MODEL, prompt: 'Once upon', max_tokens: 16, seed: 7, stream: true };
  const chunks = await all(side.openai.completions.create(body));
  assert.ok(chunks.flatMap((chunk) => chunk.choices).map((choice) => choice.text).join(''), 'the stream has no text');
  return chunks;
});

same('embeddings as floats', async (side) => {
  const body = { model: MODEL, input: ['one', 'two'], encoding_format: 'float' };
  const answer = await side.openai.embeddings.create(body);
  assert.equal(answer.data.length, 2);
  return answer;
});

same('embeddings as base64', async (side) => {
  // Without encoding_format the SDK asks for base64 and decodes it itself.
  const answer = await side.openai.embeddings.create({ model: MODEL, input: 'one' });
  assert.equal(typeof answer.data[0].embedding[0], 'number');
  return answer;
});

same('response', async (side) => {
  const body = { model: MODEL, input: 'Say this is a test', max_output_tokens: 24 };
  const answer = await side.openai.responses.create(body);
  assert.ok(answer.output_text, 'the answer has no text');
  return answer;
});

same('response streaming', async (side) => {
  const body = { model: MODEL, input: 'Count', max_output_tokens: 24, stream: true };
  const events = await all(side.openai.responses.create(body));
  assert.equal(events[0].type, 'response.created');
  const deltas = events.filter((event) => event.type === 'response.output_text.delta').map((event) => event.delta);
  assert.equal(deltas.join(''), events.at(-1).response.output[0].content[0].text, 'the joined stream differs');
  return events;
});

same('models', async (side) => {
  const names = (await all(side.openai.models.list())).map((model) => model.id).sort();
  assert.ok(names.includes(MODEL), `${MODEL} is not among ${names}`);
  return names;
});

same('transcription', async (side) => {
  const audio = Buffer.from(Array.from({ length: 2 << 20 }, (_, index) => (index * 31) % 251));
  const file = await toFile(audio, 'speech.wav', { type: 'audio/wav' });
  const answer = await side.openai.audio.transcriptions.create({ model: MODEL, file });
  assert.ok(answer.text, 'the answer has no text');
  return answer;
});

same('speech', async (side) => {
  const answer = await side.openai.audio.speech.create({ model: MODEL, voice: 'alloy', input: 'Hello' });
  return [answer.headers.get('content-type'), new Uint8Array(await answer.arrayBuffer())];
});

same('image', async (side) => {
  const body = { model: MODEL, prompt: 'A gateway at dusk', n: 1, response_format: 'b64_json' };
  const answer = await side.openai.images.generate(body);
  assert.ok(answer.data[0].b64_json, 'the image is empty');
  return answer;
});

same('moderation', (side) => side.openai.moderations.create({ model: MODEL, input: 'I like trains' }));

// --- errors ----------------------------------------------------------------------------------------------------------

same('an unknown model', async (side) => {
  const error = await refused(OpenAI.NotFoundError, () => side.chat('Hello', { model: 'no-such-model' }));
  assert.match(error.message, /no-such-model/);
  return error.status;
});

same('a bad parameter', async (side) => {
  // The model server finds this one: its own words must arrive, status and all.
  const error = await refused(OpenAI.BadRequestError, () => side.chat('Hello', { temperature: 9 }));
  return [error.status, error.error];
});

same('a 400 that the SDK does not retry', async (side) => {
  let asked = 0;
  const counted = (url, init) => ((asked += 1), fetch(url, init));
  const patient = side.openai.withOptions({ maxRetries: 2, fetch: counted });
  const body = { model: MODEL, messages: [{ role: 'user', content: 'Hello' }], temperature: 9 };
  await refused(OpenAI.BadRequestError, () => patient.chat.completions.create(body));
  assert.equal(asked, 1);
});

same('a path that nobody knows', async (side) => {
  return (await refused(OpenAI.NotFoundError, () => side.openai.get('/no/such/path'))).status;
});

gatewayOnly('a refusal of the gateway is in OpenAI\'s words', async (side) => {
  const error = await refused(OpenAI.NotFoundError, () => side.openai.get('/no/such/path'));
  assert.ok(error.code && error.type && error.requestID, 'code, type or x-request-id is missing');
});

gatewayOnly('a request id of its own is given to every request', async (side) => {
  const answer = await side.chat('Hello');
  assert.ok(answer._request_id, 'x-request-id is missing');
  const other = await side.chat('Hello', {}, { headers: { 'x-request-id': 'my-id-1234' } });
  assert.match(other._request_id, /^[0-9a-f]{8}-[0-9a-f]{4}-7/);
  assert.notEqual(other._request_id, answer._request_id);
});

// --- interruptions and load ------------------------------------------------------------------------------------------

same('a stream left early', async (side) => {
  const slow = fault('delay-between=20');
  const stream = await side.chat('Count to a thousand', { stream: true, max_tokens: 2000 }, slow);
  const begin = [];
  for await (const chunk of stream) {
    begin.push(chunk);
    if (begin.length === 3) break; // which aborts the request
  }
  return [begin, await side.chat('And now something else')];
});

same('an aborted stream', async (side) => {
  const leave = new AbortController();
  const slow = { ...fault('delay-between=20'), signal: leave.signal };
  const stream = await side.chat('Count to a thousand', { stream: true, max_tokens: 2000 }, slow);
  for await (const _ of stream) leave.abort();
  return side.chat('And now something else');
});

same('a timeout before the first byte', async (side) => {
  const impatient = { ...fault('hang'), timeout: 500 };
  await refused(OpenAI.APIConnectionTimeoutError, () => side.chat('Hello', {}, impatient));
  return side.chat('And now something else');
});

same('two hundred at once', (side) => {
  const ask = (number) => {
    const more = { max_tokens: 16, stream: number % 2 === 0 };
    return more.stream ? all(side.chat(`Number ${number}`, more)) : side.chat(`Number ${number}`, more);
  };
  return Promise.all(Array.from({ length: 200 }, (_, number) => ask(number)));
});

same('a 503 that the SDK retries', async (side) => {
  await recover(side);
  const asked = [];
  const firstTimeFails = (url, init) => {
    asked.push(init.headers.get('x-stainless-retry-count'));
    if (asked.length === 1) init.headers.set('x-simulate-fault', 'status=503,retry_after=1');
    return fetch(url, init);
  };
  const patient = side.openai.withOptions({ maxRetries: 2, fetch: firstTimeFails });
  const messages = [{ role: 'user', content: 'Try again' }];
  const answer = await patient.chat.completions.create({ model: MODEL, messages, seed: 7, max_tokens: 24 });
  assert.deepEqual(asked, ['0', '1']);
  return answer;
});

gatewayOnly('a stream that is cut ends with an error event', async (side) => {
  await recover(side);
  const stream = await side.chat('Count to ten', { stream: true }, fault('cut,after=4'));
  const error = await refused(OpenAI.APIError, () => all(stream));
  assert.ok(error.code, `the error event has no code: ${error.message}`);
});

gatewayOnly('after the faults all is well', recover);

// Waits for a breaker that earlier faults may have opened; it must close again by itself.
async function recover(side) {
  const deadline = Date.now() + 15_000;
  for (;;) {
    try {
      return await side.chat('All well?');
    } catch (error) {
      if (!(error instanceof OpenAI.InternalServerError) || Date.now() > deadline) throw error;
      await new Promise((wake) => setTimeout(wake, 200));
    }
  }
}

// --- the run ---------------------------------------------------------------------------------------------------------

async function succeeds(name, run, direct, gateway) {
  try {
    await run(direct, gateway);
  } catch (error) {
    const line = /node_client\.mjs:(\d+)/.exec(error.stack ?? '')?.[1] ?? '?';
    const why = error.message.replace(/\s+/g, ' ').slice(0, 600);
    console.log(`FAIL ${name}: ${error.constructor.name}: ${why} (line ${line})`);
    return false;
  }
  console.log(`ok ${name}`);
  return true;
}

const [direct, gateway] = [process.env.DIRECT_URL, process.env.BASE_URL].map((url) => new Side(url.replace(/\/$/, '')));
const chosen = CHECKS.filter(([name]) => name.includes(process.argv[2] ?? ''));
let failed = 0;
for (const [name, run] of chosen) failed += (await succeeds(name, run, direct, gateway)) ? 0 : 1;
console.log(`${chosen.length - failed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
