"""Drives the gateway with the official `openai` and `anthropic` packages, next to the model server behind it.

Most checks run twice, directly and through the gateway, and pass when both saw the same: every field of every
answer and of every stream event, apart from what is new in each answer (ids, times) and what depends on the
requests before it (cached tokens).

    BASE_URL=http://gateway DIRECT_URL=http://model-server python tests/clients/python_client.py [NAME]
"""

import asyncio
import base64
import hashlib
import itertools
import json
import os
import sys
import time
import traceback

import anthropic
import httpx2
import openai

MODEL = os.environ.get("MODEL", "sim-small")
CHECKS = []


class Side:
    """The clients of one of the two servers, set up as an application sets them up."""

    def __init__(self, name, url):
        self.name = name
        self.url = url
        http = {"trust_env": False}
        self.openai = openai.OpenAI(
            base_url=f"{url}/v1", api_key="sk-client", max_retries=0, timeout=60, http_client=httpx2.Client(**http)
        )
        self.anthropic = anthropic.Anthropic(
            base_url=url, api_key="sk-client", max_retries=0, timeout=60, http_client=httpx2.Client(**http)
        )
        self.plain = httpx2.Client(base_url=url, timeout=60, **http)

    def chat(self, content, **more):
        more = {"model": MODEL, "seed": 7, "temperature": 0, "max_tokens": 24, **more}
        return self.openai.chat.completions.create(messages=[{"role": "user", "content": content}], **more)

    def message(self, content, **more):
        more = {"model": MODEL, "max_tokens": 24, **more}
        return self.anthropic.messages.create(messages=[{"role": "user", "content": content}], **more)


# --- how checks are written ------------------------------------------------------------------------------------------


def same(check):
    """A check that runs against both servers; what it returns must be the same."""

    def run(direct, gateway):
        expected, got = normal(check(direct)), normal(check(gateway))
        difference = first_difference(expected, got)
        if difference:
            raise AssertionError(f"direct and gateway differ at {difference}")

    CHECKS.append((check.__name__.replace("_", " "), run))
    return check


def gateway_only(check):
    """A check of something that only the gateway does."""
    CHECKS.append((check.__name__.replace("_", " "), lambda _, gateway: check(gateway)))
    return check


def expect(condition, why):
    if not condition:
        raise AssertionError(why)


def equal(got, wanted, what):
    expect(got == wanted, f"{what}: wanted {shorten(wanted)}, got {shorten(got)}")


def refused(kind, call):
    """The error that `call` must end with, as far as both servers must agree on it."""
    try:
        call()
    except kind as error:
        expect(type(error) is kind, f"wanted exactly {kind.__name__}, got {type(error).__name__}: {error}")
        return error
    raise AssertionError(f"wanted {kind.__name__}, got an answer")


NEW_IN_EACH_ANSWER = {"id", "call_id", "item_id", "request_id", "_request_id", "created", "created_at", "completed_at"}
FROM_EARLIER_REQUESTS = {
    "cached_tokens",
    "created_cache_tokens",
    "cache_write_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "input_tokens_per_turn",
    "cached_tokens_per_turn",
}
DROPPED = NEW_IN_EACH_ANSWER | FROM_EARLIER_REQUESTS


def normal(value):
    """What must be the same on both sides, as plain lists and dictionaries."""
    if hasattr(value, "model_dump"):
        # Some of the SDK's models narrow a field that servers widen; that is not the gateway's doing.
        value = value.model_dump(mode="json", warnings=False)
    if isinstance(value, dict):
        kept = {key: normal(item) for key, item in value.items() if key not in DROPPED}
        if "cache_read_input_tokens" in value:
            # Anthropic's input_tokens are those that came from no cache.
            kept["input_tokens"] += value["cache_read_input_tokens"] or 0
        return kept
    if isinstance(value, (list, tuple)):
        return [normal(item) for item in value]
    if isinstance(value, bytes):
        return f"{len(value)} bytes, SHA-256 {hashlib.sha256(value).hexdigest()}"
    return value


def first_difference(expected, got, place="."):
    if isinstance(expected, dict) and isinstance(got, dict):
        keys = dict.fromkeys([*expected, *got])
        inside = (first_difference(expected.get(k, "absent"), got.get(k, "absent"), f"{place}{k}.") for k in keys)
        return next((difference for difference in inside if difference), None)
    if isinstance(expected, list) and isinstance(got, list):
        pairs = enumerate(itertools.zip_longest(expected, got, fillvalue="absent"))
        inside = (first_difference(a, b, f"{place}{index}.") for index, (a, b) in pairs)
        return next((difference for difference in inside if difference), None)
    if expected == got and type(expected) is type(got):
        return None
    return f"{place}: direct {shorten(expected)}, gateway {shorten(got)}"


def shorten(value):
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}… ({len(text)} characters)"


# --- chat ------------------------------------------------------------------------------------------------------------

WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def text_of(chunks):
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


@same
def chat(side):
    answer = side.chat("Say this is a test")
    expect(answer.choices[0].message.content, "the answer has no text")
    expect(answer.usage.prompt_tokens > 0 and answer.usage.completion_tokens > 0, "the usage is empty")
    return answer


@same
def chat_in_many_languages(side):
    return side.chat("Grüße, 你好, こんにちは, 👩‍👩‍👧‍👦 and \u2028 a \\u0041 \"quote\" and a tab\t.", max_tokens=64)


@same
def chat_with_what_only_vllm_knows(side):
    more = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "chat_template_kwargs": {"enable_thinking": False}}
    return side.chat("Unknown fields must arrive", extra_body=more)


@same
def chat_streaming(side):
    chunks = list(side.chat("Count to ten", stream=True))
    whole = side.chat("Count to ten")
    equal(text_of(chunks), whole.choices[0].message.content, "the joined stream")
    expect(len(chunks) > 3, f"only {len(chunks)} events came")
    expect(all(chunk.usage is None for chunk in chunks), "usage came although nobody asked")
    return chunks


@same
def chat_streaming_with_usage(side):
    chunks = list(side.chat("Count to ten", stream=True, stream_options={"include_usage": True}))
    expect(chunks[-1].usage and chunks[-1].choices == [], f"the last event is no usage event: {chunks[-1]}")
    expect(chunks[-1].usage.completion_tokens > 0, "the usage is empty")
    return chunks


@same
def chat_streaming_asynchronously(side):
    async def stream():
        async with asynchronous(side) as client:
            messages = [{"role": "user", "content": "Count to ten"}]
            events = await client.chat.completions.create(model=MODEL, messages=messages, seed=7, stream=True)
            return [event async for event in events]

    return asyncio.run(stream())


@same
def chat_with_two_choices(side):
    answer = side.chat("Two, please", n=2)
    equal(len(answer.choices), 2, "choices")
    return answer


@same
def chat_with_two_choices_streaming(side):
    chunks = list(side.chat("Two, please", n=2, stream=True))
    equal({choice.index for chunk in chunks for choice in chunk.choices}, {0, 1}, "choices")
    # How the two interleave is the model server's affair.
    return [[normal(c) for chunk in chunks for c in chunk.choices if c.index == index] for index in (0, 1)]


@same
def chat_with_logprobs(side):
    answer = side.chat("How sure are you?", logprobs=True, top_logprobs=2)
    expect(len(answer.choices[0].logprobs.content[0].top_logprobs) == 2, "top_logprobs are missing")
    return answer


@same
def chat_with_a_tool(side):
    tools = [{"type": "function", "function": WEATHER}]
    choice = {"type": "function", "function": {"name": "get_weather"}}
    answer = side.chat("Weather in Paris?", tools=tools, tool_choice=choice)
    call = answer.choices[0].message.tool_calls[0]
    equal(call.function.name, "get_weather", "the tool")
    expect(isinstance(json.loads(call.function.arguments), dict), "the arguments are no object")
    return answer


@same
def chat_with_a_tool_streaming(side):
    tools = [{"type": "function", "function": WEATHER}]
    choice = {"type": "function", "function": {"name": "get_weather"}}
    chunks = list(side.chat("Weather in Paris?", tools=tools, tool_choice=choice, stream=True))
    calls = [call for chunk in chunks for c in chunk.choices for call in c.delta.tool_calls or []]
    equal("".join(call.function.name or "" for call in calls), "get_weather", "the tool")
    arguments = "".join(call.function.arguments or "" for call in calls)
    expect(isinstance(json.loads(arguments), dict), f"the joined arguments are no object: {arguments}")
    return chunks


@same
def chat_with_the_answer_of_a_tool(side):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
    messages = [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"celsius": 21}'},
    ]
    return side.openai.chat.completions.create(model=MODEL, messages=messages, seed=7, max_tokens=24)


@same
def chat_with_a_json_schema(side):
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    answer = side.chat("Invent a person", response_format=wanted, max_tokens=200)
    person = json.loads(answer.choices[0].message.content)
    equal(set(person), {"name", "age"}, "the fields")
    return answer


@same
def chat_parsed_by_the_sdk(side):
    with side.openai.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": "Count to five"}], seed=7
    ) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_completion()
    expect("content.delta" in kinds and "content.done" in kinds, f"events are missing: {sorted(set(kinds))}")
    return [kinds, answer]


def picture(megabytes):
    """Base64 of that many MiB, nowhere twice the same, so that a lost or doubled piece changes the body."""
    pieces = (hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(megabytes * 24 * 1024))
    return base64.b64encode(b"".join(pieces)).decode()


def vision(side, megabytes):
    url = "data:image/png;base64," + picture(megabytes)
    equal(len(url) >> 20, megabytes, "the data URL's size in MiB")
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    return side.chat(parts)


@same
def vision_with_1_MiB(side):
    return vision(side, 1)


@same
def vision_with_5_MiB(side):
    return vision(side, 5)


@same
def vision_with_20_MiB(side):
    return vision(side, 20)


# --- the other surfaces of OpenAI ------------------------------------------------------------------------------------


@same
def completion(side):
    answer = side.openai.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=16, seed=7)
    expect(answer.choices[0].text, "the answer has no text")
    return answer


@same
def completion_streaming(side):
    more = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(side.openai.completions.create(model=MODEL, prompt="Once upon", max_tokens=16, seed=7, **more))
    expect("".join(c.text for chunk in chunks for c in chunk.choices), "the stream has no text")
    expect(chunks[-1].usage.completion_tokens > 0, "the usage is empty")
    return chunks


@same
def embeddings_as_floats(side):
    answer = side.openai.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float")
    equal(len(answer.data), 2, "vectors")
    expect(all(isinstance(number, float) for number in answer.data[0].embedding), "a vector is not of floats")
    return answer


@same
def embeddings_as_base64(side):
    # Without encoding_format the SDK asks for base64 and decodes it itself.
    answer = side.openai.embeddings.create(model=MODEL, input="one")
    expect(isinstance(answer.data[0].embedding[0], float), "the SDK did not decode the vector")
    return answer


@same
def response(side):
    answer = side.openai.responses.create(model=MODEL, input="Say this is a test", max_output_tokens=24)
    expect(answer.output_text, "the answer has no text")
    return answer


@same
def response_streaming(side):
    events = list(side.openai.responses.create(model=MODEL, input="Count", max_output_tokens=24, stream=True))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    equal(deltas, events[-1].response.output_text, "the joined stream")
    equal(events[0].type, "response.created", "the first event")
    return events


@same
def models(side):
    names = sorted(model.id for model in side.openai.models.list())
    expect(MODEL in names, f"{MODEL} is not among the models: {names}")
    return names


@same
def transcription(side):
    audio = b"RIFF" + bytes(i * 31 % 251 for i in range(2 << 20))
    answer = side.openai.audio.transcriptions.create(model=MODEL, file=("speech.wav", audio, "audio/wav"))
    expect(answer.text, "the answer has no text")
    return answer


@same
def speech(side):
    answer = side.openai.audio.speech.create(model=MODEL, voice="alloy", input="Hello")
    expect(len(answer.content) > 100, f"only {len(answer.content)} bytes of audio")
    return [answer.response.headers["content-type"], answer.content]


@same
def image(side):
    answer = side.openai.images.generate(model=MODEL, prompt="A gateway at dusk", n=1, response_format="b64_json")
    expect(base64.b64decode(answer.data[0].b64_json, validate=True), "the image is empty")
    return answer


@same
def moderation(side):
    answer = side.openai.moderations.create(model=MODEL, input="I like trains")
    expect(isinstance(answer.results[0].flagged, bool), "flagged is no boolean")
    return answer


# --- Anthropic -------------------------------------------------------------------------------------------------------


@same
def message(side):
    answer = side.message("Say this is a test", system="Be brief")
    expect(answer.content[0].text, "the answer has no text")
    expect(answer.usage.output_tokens > 0, "the usage is empty")
    return answer


@same
def message_streaming(side):
    events = list(side.message("Count to ten", stream=True))
    equal(events[0].type, "message_start", "the first event")
    equal(events[-1].type, "message_stop", "the last event")
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    expect("".join(delta.text for delta in deltas), "the stream has no text")
    return events


@same
def message_joined_by_the_sdk(side):
    messages = [{"role": "user", "content": "Count to ten"}]
    with side.anthropic.messages.stream(model=MODEL, max_tokens=24, messages=messages) as stream:
        text = "".join(stream.text_stream)
        whole = stream.get_final_message()
    equal(text, whole.content[0].text, "the joined stream")
    return whole


@same
def message_with_a_tool(side):
    tool = {"name": WEATHER["name"], "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}
    answer = side.message("Weather in Paris?", tools=[tool], tool_choice={"type": "tool", "name": "get_weather"})
    used = [block for block in answer.content if block.type == "tool_use"]
    expect(used and isinstance(used[0].input, dict), f"no tool was used: {answer.content}")
    equal(answer.stop_reason, "tool_use", "stop_reason")
    return answer


@same
def message_with_a_tool_streaming(side):
    tool = {"name": WEATHER["name"], "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}
    choice = {"type": "tool", "name": "get_weather"}
    events = list(side.message("Weather in Paris?", tools=[tool], tool_choice=choice, stream=True))
    pieces = [getattr(event.delta, "partial_json", "") for event in events if event.type == "content_block_delta"]
    expect(isinstance(json.loads("".join(pieces)), dict), f"the joined input is no object: {pieces}")
    return events


@same
def message_with_a_picture_of_5_MiB(side):
    source = {"type": "base64", "media_type": "image/png", "data": picture(5)}
    return side.message([{"type": "text", "text": "What is this?"}, {"type": "image", "source": source}])


@same
def message_tokens_counted(side):
    counted = side.anthropic.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "Count me"}])
    expect(counted.input_tokens > 0, "nothing was counted")
    return counted


# --- errors ----------------------------------------------------------------------------------------------------------


@same
def an_unknown_model(side):
    error = refused(openai.NotFoundError, lambda: side.chat("Hello", model="no-such-model"))
    expect("no-such-model" in error.message, f"the message does not name the model: {error.message}")
    return error.status_code


@same
def an_unknown_model_streaming(side):
    return refused(openai.NotFoundError, lambda: side.chat("Hello", model="no-such-model", stream=True)).status_code


@same
def an_unknown_model_for_anthropic(side):
    error = refused(anthropic.NotFoundError, lambda: side.message("Hello", model="no-such-model"))
    equal(error.body["type"], "error", "the envelope")
    equal(error.body["error"]["type"], "not_found_error", "the error's type")
    return error.status_code


@same
def a_bad_parameter(side):
    # The model server finds this one: its own words must arrive, status and all.
    error = refused(openai.BadRequestError, lambda: side.chat("Hello", temperature=9))
    return [error.status_code, error.body]


@same
def a_bad_parameter_for_anthropic(side):
    error = refused(anthropic.BadRequestError, lambda: side.message("Hello", max_tokens=-1))
    equal(error.body["error"]["type"], "invalid_request_error", "the error's type")
    return [error.status_code, error.body]


@same
def a_prompt_that_is_too_long(side):
    error = refused(openai.BadRequestError, lambda: side.chat("word " * 100_000))
    expect("context length" in error.message, f"the message is another one: {error.message}")
    return [error.status_code, error.body]


@same
def a_400_that_the_sdk_does_not_retry(side):
    asked = []
    http = httpx2.Client(trust_env=False, event_hooks={"request": [asked.append]})
    patient = side.openai.with_options(max_retries=2, http_client=http)
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "temperature": 9}
    refused(openai.BadRequestError, lambda: patient.chat.completions.create(**ask))
    equal(len(asked), 1, "requests")


@same
def a_body_that_is_not_json(side):
    headers = {"content-type": "application/json"}
    answer = side.plain.post("/v1/chat/completions", content=b'{"model": "sim-small", ', headers=headers)
    expect(answer.json()["error"]["message"], "the error has no message")
    return answer.status_code


@same
def a_path_that_nobody_knows(side):
    return refused(openai.NotFoundError, lambda: side.openai.get("/no/such/path", cast_to=object)).status_code


@gateway_only
def a_refusal_of_the_gateway_is_in_openai_words(side):
    error = refused(openai.NotFoundError, lambda: side.openai.get("/no/such/path", cast_to=object))
    expect(error.code and error.type and error.message, f"code, type or message is missing: {error.body}")
    expect(error.request_id, "x-request-id is missing")


@gateway_only
def a_request_id_of_its_own_is_given_to_every_request(side):
    given = side.chat("Hello")
    expect(given._request_id, "x-request-id is missing")
    raw = side.openai.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], extra_headers={"x-request-id": "my-id-1234"}
    )
    equal(raw.headers["x-client-request-id"], "my-id-1234", "x-client-request-id")
    expect(raw.headers["x-request-id"] != given._request_id, "an x-request-id was given twice")
    expect(raw.headers["x-infergate-upstream"], "x-infergate-upstream is missing")
    message = side.message("Hello")
    expect(message.id, "the message has no id")


# --- interruptions and load ------------------------------------------------------------------------------------------


@same
def a_stream_left_early(side):
    stream = side.chat("Count to a thousand", stream=True, max_tokens=2000, extra_headers=fault("delay-between=20"))
    begin = [next(stream) for _ in range(3)]
    stream.close()
    return [begin, side.chat("And now something else")]


@same
def a_timeout_before_the_first_byte(side):
    started = time.monotonic()
    impatient = side.openai.with_options(timeout=0.5)
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "extra_headers": fault("hang")}
    refused(openai.APITimeoutError, lambda: impatient.chat.completions.create(**ask))
    expect(time.monotonic() - started < 5, "the timeout came late")
    return side.chat("And now something else")


@same
def a_timeout_within_a_stream(side):
    impatient = side.openai.with_options(timeout=0.5)
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "extra_headers": fault("stall,after=3")}
    refused(openai.APITimeoutError, lambda: list(impatient.chat.completions.create(**ask, stream=True)))
    return side.chat("And now something else")


@same
def two_hundred_at_once(side):
    async def ask(client, number):
        messages = [{"role": "user", "content": f"Number {number}"}]
        more = {"model": MODEL, "messages": messages, "seed": 7, "max_tokens": 16}
        if number % 2:
            return await client.chat.completions.create(**more)
        return [chunk async for chunk in await client.chat.completions.create(**more, stream=True)]

    async def everything():
        async with asynchronous(side) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(200)))

    return asyncio.run(everything())


@same
def a_503_that_the_sdk_retries(side):
    recover(side)
    asked = []

    def first_time_only(request):
        asked.append(request.headers["x-stainless-retry-count"])
        if len(asked) == 1:
            request.headers.update(fault("status=503,retry_after=1"))

    http = httpx2.Client(trust_env=False, event_hooks={"request": [first_time_only]})
    patient = side.openai.with_options(max_retries=2, http_client=http)
    answer = patient.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Try again"}], seed=7, max_tokens=24
    )
    equal(asked, ["0", "1"], "the SDK's retries")
    return answer


@same
def a_503_when_the_sdk_does_not_retry(side):
    recover(side)
    headers = fault("status=503,retry_after=1")
    error = refused(openai.InternalServerError, lambda: side.chat("Hello", extra_headers=headers))
    return [error.status_code, "retry-after" in error.response.headers]


@same
def a_stream_that_is_cut(side):
    recover(side)
    headers = fault("cut,after=4")
    # Never a clean end: the SDK must see an error, through the gateway a proper error event.
    try:
        list(side.chat("Count to ten", stream=True, extra_headers=headers))
    except (openai.APIError, httpx2.HTTPError):
        return "an error"
    raise AssertionError("the stream seemed complete")


@gateway_only
def a_stream_that_is_cut_ends_with_an_error_event(side):
    recover(side)
    stream = side.chat("Count to ten", stream=True, extra_headers=fault("cut,after=4"))
    error = refused(openai.APIError, lambda: list(stream))
    expect(error.body and error.body.get("code"), f"the error event has no code: {error.body}")


@gateway_only
def an_anthropic_stream_that_is_cut_ends_with_an_error_event(side):
    recover(side)
    stream = side.message("Count to ten", stream=True, extra_headers=fault("cut,after=4"))
    try:
        list(stream)
    except anthropic.APIStatusError as error:
        equal(error.body["type"], "error", "the envelope")
        return
    raise AssertionError("the stream seemed complete")


@gateway_only
def after_the_faults_all_is_well(side):
    recover(side)


def recover(side):
    """Waits for a breaker that earlier faults may have opened; it must close again by itself."""
    deadline = time.monotonic() + 15
    while True:
        try:
            return side.chat("All well?")
        except openai.InternalServerError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def fault(text):
    """The embedded model server does this to one request."""
    return {"x-simulate-fault": text}


def asynchronous(side):
    http = openai.DefaultAsyncHttpxClient(trust_env=False, timeout=60)
    return openai.AsyncOpenAI(base_url=f"{side.url}/v1", api_key="sk-client", max_retries=0, http_client=http)


# --- the run ---------------------------------------------------------------------------------------------------------


def main():
    direct = Side("direct", os.environ["DIRECT_URL"].rstrip("/"))
    gateway = Side("gateway", os.environ["BASE_URL"].rstrip("/"))
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [(f"python: {name}", run) for name, run in CHECKS if wanted in f"python: {name}"]
    failed = sum(not succeeds(name, run, direct, gateway) for name, run in chosen)
    print(f"{len(chosen) - failed} passed, {failed} failed")
    return 1 if failed else 0


def succeeds(name, run, direct, gateway):
    try:
        run(direct, gateway)
    except Exception as error:
        why = " ".join(str(error).split()) or "no message"
        where = traceback.extract_tb(error.__traceback__)
        mine = [frame.lineno for frame in where if frame.filename == __file__]
        print(f"FAIL {name}: {type(error).__name__}: {why[:600]} (lines {', '.join(map(str, mine[1:]))})", flush=True)
        return False
    print(f"ok {name}", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
