//! Every dialect, every cut, and nothing that only looks like usage.

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Map, Value, json};
use tokio::net::TcpStream;

use super::*;
use crate::simulate::{Fault, Options, Simulated};

const TOKENS: [&str; 11] = [
    "input",
    "output",
    "cached",
    "cache_write",
    "for an hour",
    "reasoning",
    "heard",
    "spoken",
    "seen",
    "drawn",
    "milliseconds",
];

/// `input 6, output 14`: what an answer says of itself.
fn told(usage: Usage) -> String {
    let numbers = [
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_tokens,
        usage.cache_write_tokens,
        usage.cache_write_1h_tokens,
        usage.reasoning_tokens,
        usage.audio_input_tokens,
        usage.audio_output_tokens,
        usage.image_input_tokens,
        usage.image_output_tokens,
        usage.audio_ms,
    ];
    let known = TOKENS.iter().zip(numbers).filter_map(|(name, number)| Some(format!("{name} {}", number?)));
    format!("{}: {}", usage.source.name(), known.collect::<Vec<_>>().join(", "))
}

fn metered<'a>(operation: Operation, events: bool, pieces: impl IntoIterator<Item = &'a [u8]>) -> Usage {
    let mut meter = Meter::new(operation, events);
    for piece in pieces {
        meter.push(piece);
        let held = meter.finds.as_ref().map_or(0, |finds| finds.held.len());
        assert!(held <= REPORT_MAX + 1, "{held} bytes are held");
    }
    meter.usage()
}

/// What the answer says, the same for every place to cut it and for single bytes.
fn usage(operation: Operation, events: bool, body: &str) -> String {
    let body = body.as_bytes();
    let whole = metered(operation, events, [body]);
    for cut in 0..=body.len() {
        let (one, other) = body.split_at(cut);
        assert_eq!(metered(operation, events, [one, other]), whole, "cut at {cut}");
    }
    for size in [1, 2, 3, 7, 64] {
        assert_eq!(metered(operation, events, body.chunks(size)), whole, "in pieces of {size}");
    }
    told(whole)
}

fn plain(operation: Operation, body: &str) -> String {
    usage(operation, false, body)
}

fn streamed(operation: Operation, body: &str) -> String {
    usage(operation, true, body)
}

/// A recorded answer without its head.
macro_rules! recorded {
    ($name:literal) => {
        include_str!(concat!("../../tests/fixtures/vllm-0.32/", $name, ".txt")).split_once("\n\n").unwrap().1
    };
}

#[test]
fn what_vllm_says_is_read_wherever_the_bytes_are_cut() {
    use Operation::{Chat, Completions, CountTokens, Messages, Responses, Tokenize};
    let vllm = "upstream: input 6, output 8, cached 0, cache_write 0";
    let short = "upstream: input 6, output 4, cached 0, cache_write 0";
    let turn = "upstream: input 6, output 6, cached 0, cache_write 0";
    assert_eq!(plain(Chat, recorded!("chat")), vllm);
    assert_eq!(plain(Chat, recorded!("chat_orca_json")), short);
    assert_eq!(plain(Chat, recorded!("chat_orca_text")), short);
    assert_eq!(streamed(Chat, recorded!("chat_stream_usage")), vllm);
    assert_eq!(streamed(Chat, recorded!("chat_stream_continuous_usage")), short);
    assert_eq!(plain(Completions, recorded!("completion")), "upstream: input 2, output 4, cached 0");
    assert_eq!(streamed(Completions, recorded!("completion_stream_usage")), "upstream: input 2, output 4, cached 0");
    assert_eq!(plain(Messages, recorded!("messages")), turn);
    assert_eq!(streamed(Messages, recorded!("messages_stream")), turn);
    assert_eq!(plain(CountTokens, recorded!("messages_count")), "upstream: input 6");
    assert_eq!(plain(Responses, recorded!("responses")), format!("{turn}, reasoning 0"));
    assert_eq!(streamed(Responses, recorded!("responses_stream")), format!("{turn}, reasoning 0"));
    assert_eq!(plain(Tokenize, recorded!("tokenize")), "none: ");
}

#[test]
fn the_other_recorded_answers_say_what_a_json_reader_finds_in_them() {
    for body in [recorded!("chat_n2_logprobs"), recorded!("chat_prefill_continue"), recorded!("chat_json_schema")] {
        let whole: Value = serde_json::from_str(body).unwrap();
        let number = |name: &str| whole["usage"][name].as_u64().unwrap();
        let details = &whole["usage"]["prompt_tokens_details"];
        let expected = format!(
            "upstream: input {}, output {}, cached {}, cache_write {}",
            number("prompt_tokens"),
            number("completion_tokens"),
            details["cached_tokens"],
            details["created_cache_tokens"]
        );
        assert_eq!(plain(Operation::Chat, body), expected);
    }
    for body in [recorded!("err_model"), recorded!("err_json"), recorded!("models")] {
        assert_eq!(plain(Operation::Chat, body), "none: ");
    }
}

#[test]
fn a_stream_that_says_nothing_is_counted() {
    assert_eq!(streamed(Operation::Chat, recorded!("chat_stream")), "estimated: output 9");
    assert_eq!(streamed(Operation::Chat, &recorded!("chat_stream").replace('\n', "\r\n")), "estimated: output 9");
    assert_eq!(streamed(Operation::Chat, recorded!("chat_n2_stream")), "estimated: output 8");
    let silent = recorded!("completion_stream_usage").replace("\"usage\"", "\"spent\"");
    assert_eq!(streamed(Operation::Completions, &silent), "estimated: output 5");
    let silent = recorded!("messages_stream").replace("\"usage\"", "\"spent\"");
    assert_eq!(streamed(Operation::Messages, &silent), "estimated: output 6");
    let silent = recorded!("responses_stream").replace("\"usage\"", "\"spent\"");
    assert_eq!(streamed(Operation::Responses, &silent), "estimated: output 2");
    assert_eq!(streamed(Operation::Chat, "data: [DONE]\n\n: ping\n\ndata:\n\n"), "none: ");
    assert_eq!(streamed(Operation::Embeddings, "data: {}\n\n"), "none: ");
    assert_eq!(plain(Operation::Chat, "{\"choices\":[]}"), "none: ");
}

#[test]
fn a_message_that_breaks_off_has_its_prompt_reported_and_its_answer_counted() {
    let whole = recorded!("messages_stream");
    let cut = whole.find("event: content_block_stop").unwrap();
    assert_eq!(streamed(Operation::Messages, &whole[..cut]), "estimated: input 6, output 5");
    let start = whole.find("event: content_block_start").unwrap();
    assert_eq!(streamed(Operation::Messages, &whole[..start]), "upstream: input 6, output 0");
}

#[test]
fn of_an_answer_that_breaks_off_a_part_is_known() {
    let part = |operation, events, body: &str| {
        let mut meter = Meter::new(operation, events);
        meter.push(body.as_bytes());
        told(meter.usage_of_a_part())
    };
    let whole = recorded!("messages_stream");
    let cut = whole.find("event: content_block_stop").unwrap();
    assert_eq!(part(Operation::Messages, true, &whole[..cut]), "partial: input 6, output 5");
    assert_eq!(part(Operation::Messages, true, whole), "upstream: input 6, output 6, cached 0, cache_write 0");
    assert_eq!(part(Operation::Chat, true, "data: {\"choices\":[]}\n\n"), "partial: output 1");
    assert_eq!(part(Operation::Chat, true, ""), "none: ");
    assert_eq!(part(Operation::Chat, false, recorded!("chat")), "upstream: input 6, output 8, cached 0, cache_write 0");
}

#[test]
fn the_class_of_service_is_told_within_the_report_and_beside_it() {
    let tier = |operation, events, body: &str| {
        let mut meter = Meter::new(operation, events).with_service_tier();
        meter.push(body.as_bytes());
        meter.usage().service_tier
    };
    let messages =
        r#"{"content":[{"input":{"service_tier":"priority"}}],"usage":{"input_tokens":1,"service_tier":"batch"}}"#;
    assert_eq!(tier(Operation::Messages, false, messages), Some(ServiceTier::Batch));
    assert_eq!(
        tier(Operation::Chat, false, r#"{"service_tier":"flex","usage":{"prompt_tokens":1}}"#),
        Some(ServiceTier::Flex)
    );
    let event = "data: {\"response\":{\"service_tier\":\"priority\",\"usage\":{\"input_tokens\":1}}}\n\n";
    assert_eq!(tier(Operation::Responses, true, event), Some(ServiceTier::Priority));
}

#[test]
fn anthropic_reports_are_cumulative_and_never_summed() {
    let stream = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":25,\
        \"cache_creation_input_tokens\":100,\"cache_read_input_tokens\":2000,\"cache_creation\":{\"ephemeral_5m_input_tokens\":100},\
        \"output_tokens\":1,\"service_tier\":\"standard\"}}}\n\n\
        event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{},\"usage\":{\"output_tokens\":7}}\n\n\
        event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{},\"usage\":{\"input_tokens\":0,\"output_tokens\":15}}\n\n\
        event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";
    let expected = "upstream: input 25, output 15, cached 2000, cache_write 100";
    assert_eq!(streamed(Operation::Messages, stream), expected);
    // A proxy that does not know the prompt's length at the start.
    let late = "data: {\"message\":{\"usage\":{\"input_tokens\":0,\"output_tokens\":0}}}\n\ndata: {\"usage\":{\"input_tokens\":9,\"output_tokens\":3}}\n\n";
    assert_eq!(streamed(Operation::Messages, late), "upstream: input 9, output 3");
}

#[test]
fn every_shape_of_the_last_chunk_is_read() {
    for choices in ["[]", "[{\"delta\":{}}]", "[{\"delta\":{\"content\":\"\"},\"finish_reason\":\"stop\"}]"] {
        let usage = "\"usage\" : \t{\"prompt_tokens\":3,\"completion_tokens\":4,\"total_tokens\":7}";
        let stream = format!(
            "data: {{\"choices\":[],\"usage\":null}}\n\ndata: {{\"choices\":{choices},{usage}}}\n\ndata: {{\"choices\":[],\"usage\":null}}\n\ndata: [DONE]\n\n"
        );
        assert_eq!(streamed(Operation::Chat, &stream), "upstream: input 3, output 4");
        assert_eq!(streamed(Operation::Chat, &stream.replace('\n', "\r\n")), "upstream: input 3, output 4");
        assert_eq!(streamed(Operation::Chat, &stream.replace('\n', "\r")), "upstream: input 3, output 4");
    }
    let open_end = "data: {\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}";
    assert_eq!(streamed(Operation::Chat, open_end), "upstream: input 3, output 4");
    // Chunks after the report that know nothing.
    let zeros = "data: {\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}\n\ndata: {\"usage\":{\"prompt_tokens\":0,\"completion_tokens\":0}}\n\n";
    assert_eq!(streamed(Operation::Chat, zeros), "upstream: input 3, output 4");
}

#[test]
fn other_dialects_words_are_understood() {
    let said = |operation, usage: Value| plain(operation, &json!({"data": [], "usage": usage}).to_string());
    assert_eq!(said(Operation::Embeddings, json!({"total_tokens": 8})), "upstream: input 8");
    assert_eq!(said(Operation::Rerank, json!({"prompt_tokens": 8, "total_tokens": 8})), "upstream: input 8");
    let audio = json!({"type": "tokens", "input_tokens": 14, "input_token_details": {"text_tokens": 0, "audio_tokens": 14}, "output_tokens": 45, "total_tokens": 59});
    assert_eq!(said(Operation::Transcription, audio), "upstream: input 14, output 45, heard 14");
    let seconds = |seconds: &str| plain(Operation::Transcription, &format!(r#"{{"usage":{{"seconds":{seconds}}}}}"#));
    assert_eq!(seconds("3"), "upstream: milliseconds 3000");
    assert_eq!(seconds("8.4701"), "upstream: milliseconds 8470");
    assert_eq!(seconds("-1"), "none: ");
    assert_eq!(seconds("1e3"), "none: ");
    let drawn = json!({"input_tokens": 60, "input_tokens_details": {"text_tokens": 50, "image_tokens": 10}, "output_tokens": 9, "output_tokens_details": {"image_tokens": 8}});
    assert_eq!(said(Operation::Images, drawn), "upstream: input 60, output 9, seen 10, drawn 8");
    let spoken = json!({"prompt_tokens": 9, "completion_tokens": 8, "prompt_tokens_details": {"audio_tokens": 7}, "completion_tokens_details": {"audio_tokens": 6}});
    assert_eq!(said(Operation::Chat, spoken), "upstream: input 9, output 8, heard 7, spoken 6");
    // xAI's answer tokens are told without the reasoning; only the total knows.
    let beside = json!({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 22, "completion_tokens_details": {"reasoning_tokens": 7}});
    assert_eq!(said(Operation::Chat, beside), "upstream: input 10, output 12, reasoning 7");
    let hour = json!({"input_tokens": 3, "output_tokens": 4, "cache_creation_input_tokens": 30, "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20}});
    assert_eq!(said(Operation::Messages, hour), "upstream: input 3, output 4, cache_write 30, for an hour 20");
    let reasons = json!({"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30, "completion_tokens_details": {"reasoning_tokens": 12}});
    assert_eq!(said(Operation::Chat, reasons), "upstream: input 10, output 20, reasoning 12");
    let twice = json!({"prompt_tokens": 10, "completion_tokens": 20, "input_tokens": 0, "output_tokens": 0, "input_tokens_details": null});
    assert_eq!(said(Operation::Chat, twice), "upstream: input 10, output 20");
    let deepseek = json!({"prompt_tokens": 10, "completion_tokens": 2, "prompt_cache_hit_tokens": 8, "prompt_cache_miss_tokens": 2});
    assert_eq!(said(Operation::Chat, deepseek), "upstream: input 10, output 2, cached 8");
    let pretty =
        serde_json::to_string_pretty(&json!({"a": {}, "usage": {"prompt_tokens": 1, "completion_tokens": 2}})).unwrap();
    assert_eq!(plain(Operation::Chat, &format!("\n {pretty}\n")), "upstream: input 1, output 2");
}

#[test]
fn what_is_no_number_of_tokens_is_ignored() {
    let usage = r#"{"usage":{"prompt_tokens":null,"completion_tokens":-3,"total_tokens":"x","prompt_tokens_details":7,"completion_tokens_details":{"reasoning_tokens":[{}]},"cached_tokens":1.5}}"#;
    assert_eq!(plain(Operation::Chat, usage), "none: ");
    let partly = r#"{"usage":{"prompt_tokens":4,"completion_tokens":99999999999999999999,"x":{"y":[1,"}"]}}}"#;
    assert_eq!(plain(Operation::Chat, partly), "upstream: input 4");
    for broken in
        ["{\"usage\":{\"prompt_tokens\":4 5}}", "{\"usage\":{prompt_tokens:4}}", "{\"usage\":{\"prompt_tokens\":4"]
    {
        assert_eq!(plain(Operation::Chat, broken), "none: ", "{broken}");
    }
}

#[test]
fn tgi_and_sglang_report_under_names_of_their_own() {
    use Operation::Generate;
    let tgi = r#"{"generated_text":"a \"details\":{\"generated_tokens\":99}","details":{"finish_reason":"length","generated_tokens":3,"seed":null,"prefill":[{"id":1,"text":"<s>"},{"id":2,"text":"}"}],"tokens":[{"id":5,"text":"{","logprob":-1.5,"special":false}]}}"#;
    assert_eq!(plain(Generate, tgi), "upstream: input 2, output 3");
    assert_eq!(plain(Generate, &format!("[{tgi}]")), "upstream: input 2, output 3");
    assert_eq!(plain(Generate, r#"{"generated_text":"x"}"#), "none: ");
    let token = "data:{\"index\":1,\"token\":{\"id\":1},\"generated_text\":null,\"details\":null}\n\n";
    let last = "data:{\"index\":2,\"generated_text\":\"ab\",\"details\":{\"finish_reason\":\"length\",\"generated_tokens\":2,\"input_length\":11}}\n\n";
    assert_eq!(streamed(Generate, &format!("{token}{last}")), "upstream: input 11, output 2");
    assert_eq!(streamed(Generate, token), "estimated: output 1");
    let sglang = r#"{"text":"x","meta_info":{"id":"a","finish_reason":{"type":"stop"},"prompt_tokens":5,"completion_tokens":4,"cached_tokens":2}}"#;
    assert_eq!(plain(Generate, sglang), "upstream: input 5, output 4, cached 2");
    // A list of prompts has a list of answers.
    assert_eq!(plain(Generate, &format!("[{sglang}, {sglang}]")), "upstream: input 10, output 8, cached 4");
    let stream = format!(
        "data: {}\n\ndata: {sglang}\n\ndata: [DONE]\n\n",
        sglang.replace("\"completion_tokens\":4", "\"completion_tokens\":3")
    );
    assert_eq!(streamed(Generate, &stream), "upstream: input 5, output 4, cached 2");
}

#[test]
fn the_tokens_of_a_long_tgi_answer_may_be_longer_than_a_report() {
    let token = r#"{"id":5,"text":"{\"details\":{","logprob":-1.5,"special":false}"#;
    let tokens = vec![token; 600].join(",");
    let body = format!(
        r#"{{"generated_text":"x","details":{{"generated_tokens":600,"prefill":[{{"id":1}}],"tokens":[{tokens}]}}}}"#
    );
    assert!(body.len() > 2 * REPORT_MAX);
    let whole = told(metered(Operation::Generate, false, [body.as_bytes()]));
    assert_eq!(whole, "upstream: input 1, output 600");
    for size in [1, 1000, REPORT_MAX, REPORT_MAX + 1] {
        assert_eq!(told(metered(Operation::Generate, false, body.as_bytes().chunks(size))), whole);
    }
}

#[test]
fn usage_in_a_text_is_text() {
    let lie = json!({"usage": {"prompt_tokens": 1, "completion_tokens": 1, "input_tokens": 1, "output_tokens": 1}})
        .to_string();
    for lie in [lie.clone(), format!("\\{lie}"), lie.replace('"', "\\\""), format!("{{{lie}")] {
        let chat =
            json!({"choices": [{"message": {"content": lie, "tool_calls": [{"function": {"arguments": lie}}]}}]})
                .to_string();
        assert_eq!(plain(Operation::Chat, &chat), "none: ");
        let mut honest: Value = serde_json::from_str(&chat).unwrap();
        honest["usage"] = json!({"prompt_tokens": 70, "completion_tokens": 80});
        assert_eq!(plain(Operation::Chat, &honest.to_string()), "upstream: input 70, output 80");
        honest["zzz"] = json!(lie);
        assert_eq!(plain(Operation::Chat, &honest.to_string()), "upstream: input 70, output 80");
        let event = format!("data: {}\n\n", json!({"choices": [{"delta": {"content": lie}}]}));
        assert_eq!(streamed(Operation::Chat, &event), "estimated: output 1");
        assert_eq!(
            streamed(Operation::Chat, &format!("{event}data: {honest}\n\n{event}")),
            "upstream: input 70, output 80"
        );
    }
    // A transcript in plain text, and sound.
    assert_eq!(plain(Operation::Transcription, &format!("He said {lie}\n")), "none: ");
    assert_eq!(plain(Operation::Speech, &format!("RIFF{lie}")), "none: ");
}

#[test]
fn usage_in_what_the_client_or_the_model_wrote_is_too_deep_to_count() {
    let lie = json!({"usage": {"input_tokens": 1, "output_tokens": 1, "cache_read_input_tokens": 1_000_000}});
    let tool = json!({"type": "tool_use", "input": lie});
    let honest = json!({"input_tokens": 70, "output_tokens": 80});
    let told = "upstream: input 70, output 80";
    let before = format!(r#"{{"content":[{tool}],"usage":{honest},"role":"assistant"}}"#);
    let after = format!(r#"{{"usage":{honest},"content":[{tool},{tool}],"role":"assistant"}}"#);
    let alone = format!(r#"{{"content":[{tool}],"role":"assistant"}}"#);
    assert_eq!(plain(Operation::Messages, &before), told);
    assert_eq!(plain(Operation::Messages, &after), told);
    assert_eq!(plain(Operation::Messages, &alone), "none: ");
    // Responses repeats what was asked.
    for (one, other) in
        [(json!(null), &lie), (lie.clone(), &lie), (json!({"parameters": {"properties": lie}}), &json!(null))]
    {
        let response = format!(r#"{{"tools":[{one}],"usage":{honest},"metadata":{other}}}"#);
        assert_eq!(plain(Operation::Responses, &response), told);
        let event =
            format!("event: response.completed\ndata: {{\"response\":{response},\"type\":\"response.completed\"}}\n\n");
        assert_eq!(streamed(Operation::Responses, &event), told);
        let silent = response.replace(&honest.to_string(), "null");
        assert_eq!(plain(Operation::Responses, &silent), "none: ");
        assert_eq!(streamed(Operation::Responses, &format!("data: {{\"response\":{silent}}}\n\n")), "none: ");
    }
}

#[test]
fn an_object_that_never_ends_is_not_held_for_ever() {
    let mut meter = Meter::new(Operation::Chat, true);
    meter.push(b"data: {\"usage\":{");
    for _ in 0..10_000 {
        meter.push(b"\"x\":{\"usage\":{\"prompt_tokens\":1,");
    }
    assert_eq!(meter.finds.as_ref().unwrap().held.len(), REPORT_MAX + 1);
    meter.push(b"\n\ndata: {\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}\n\n");
    assert_eq!(told(meter.usage()), "upstream: input 3, output 4");
    assert_eq!(meter.finds.as_ref().unwrap().held.capacity(), 0);
    let long = format!(r#"{{"usage":{{"prompt_tokens":1,"x":"{}"}}}}"#, "y".repeat(REPORT_MAX));
    for size in [long.len(), 1000] {
        assert_eq!(told(metered(Operation::Chat, false, long.as_bytes().chunks(size))), "none: ");
    }
}

#[test]
fn a_line_that_breaks_off_does_not_reach_into_the_next_one() {
    let broken = "data: {\"usage\":{\"output_tokens\":3},\"us\nage\":{\"input_tokens\":9}}\n\n";
    assert_eq!(streamed(Operation::Chat, broken), "estimated: output 1");
    assert_eq!(
        streamed(Operation::Messages, "event: x.ddelta\n\nevent: delta.x\n\nevent: del\nta"),
        "estimated: output 1"
    );
}

#[test]
fn details_within_details_are_no_ladder() {
    let deep =
        format!(r#"{{"usage":{}1{}}}"#, r#"{"prompt_tokens":1,"prompt_tokens_details":"#.repeat(300), "}".repeat(300));
    assert_eq!(plain(Operation::Chat, &deep), "upstream: input 1");
}

#[test]
fn a_long_event_full_of_keys_takes_time_in_step_with_its_length() {
    let line =
        |keys: usize| format!("data: {{\"usage\":{{\"input_tokens\":1}}{}", ",\"usage\":{},\"usage\":0".repeat(keys));
    let time = |line: &str| {
        let begun = std::time::Instant::now();
        assert_eq!(told(metered(Operation::Passthrough, true, [line.as_bytes()])), "none: ");
        begun.elapsed()
    };
    let (short, long) = (line(1000), line(100_000));
    let fastest = (0..5).map(|_| time(&short)).min().unwrap();
    assert!(time(&long) < fastest * 1000, "{:?} and {:?}", fastest, time(&long));
}

#[test]
fn a_meter_is_small() {
    assert!(size_of::<Meter>() < 100, "{}", size_of::<Meter>());
}

/// A JSON value with usage in every wrong place.
fn random_value(random: &mut fastrand::Rng, depth: usize) -> Value {
    let names = ["usage", "a", "x\"usage", "\\", "\"usage\":{", "prompt_tokens", "completion_tokens"];
    match random.u8(..if depth == 0 { 4 } else { 8 }) {
        0 => json!(random.u64(1..1000)),
        1 => json!(null),
        2 => json!(
            *random
                .choice(["\\\"usage\":{\"prompt_tokens\":1}", "{\"usage\":{", "}}\\", "\"usage\"", "\n\u{e9}"].iter())
                .unwrap()
        ),
        3 => json!({"prompt_tokens": random.u64(1..1000), "completion_tokens": random.u64(1..1000)}),
        4 => (0..random.usize(..4)).map(|_| random_value(random, depth - 1)).collect(),
        _ => {
            let members = (0..random.usize(..5))
                .map(|_| (*random.choice(names.iter()).unwrap(), random_value(random, depth - 1)));
            members.map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>().into()
        }
    }
}

#[test]
fn any_json_says_what_a_json_reader_finds_at_its_top() {
    let mut random = fastrand::Rng::with_seed(1);
    let mut reported = 0;
    for _ in 0..20_000 {
        let members = (0..4).map(|_| {
            (random.choice(["usage", "a", "x\"usage"].iter()).unwrap().to_string(), random_value(&mut random, 5))
        });
        let value: Value = members.collect::<Map<_, _>>().into();
        let number = |name: &str| value.get("usage").and_then(|usage| usage.get(name)).and_then(Value::as_u64);
        let expected = (number("prompt_tokens"), number("completion_tokens"));
        reported += u32::from(expected != (None, None));
        let body = if random.bool() { value.to_string() } else { serde_json::to_string_pretty(&value).unwrap() };
        let event = format!("data: {value}\n\n");
        for (events, body) in [(false, body.as_str()), (true, &event)] {
            let (one, other) = body.as_bytes().split_at(random.usize(..=body.len()));
            let usage = metered(Operation::Embeddings, events, [one, other]);
            assert_eq!((usage.input_tokens, usage.output_tokens), expected, "{body}");
        }
    }
    assert!(reported > 1000);
}

#[test]
fn any_bytes_are_read_the_same_however_they_are_cut() {
    let words: [&[u8]; 22] = [
        b"\"us",
        b"age\":{\"input_tokens\":9}",
        b"\"usage\"",
        b":",
        b"{",
        b"}",
        b"\"",
        b"\\",
        b"\n",
        b"\r\n",
        b" ",
        b"data: ",
        b"event: x.delta",
        b"[",
        b"null",
        b"\"prompt_tokens\":7",
        b",",
        b"\"completion_tokens\":5",
        b"\"details\"",
        b"\"meta_info\":{",
        b"\xff",
        b"\"usage\":{\"output_tokens\":3}",
    ];
    let operations =
        [Operation::Chat, Operation::Messages, Operation::Responses, Operation::Generate, Operation::CountTokens];
    let mut random = fastrand::Rng::with_seed(2);
    for round in 0..30_000 {
        let mut bytes = Vec::new();
        if random.bool() {
            bytes.extend_from_slice(b"{");
        }
        for _ in 0..random.usize(..40) {
            bytes.extend_from_slice(random.choice(words.iter()).unwrap());
        }
        if random.u8(..8) == 0 {
            let at = random.usize(..=bytes.len());
            bytes.splice(at..at, std::iter::repeat_n(b'{', 20_000));
        }
        let (operation, events) = (operations[round % 5], random.bool());
        let whole = metered(operation, events, [bytes.as_slice()]);
        let mut pieces = Vec::new();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(random.usize(1..=rest.len().min(12)));
            pieces.push(piece);
            rest = behind;
        }
        assert_eq!(metered(operation, events, pieces), whole, "{operation:?} {events} {}", bytes.escape_ascii());
    }
}

/// An answer of the embedded model server.
async fn simulated(server: &Simulated, path: &str, body: &Value) -> String {
    let stream = TcpStream::connect(server.address()).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request =
        Request::post(format!("{}{path}", server.url())).body(Full::new(Bytes::from(body.to_string()))).unwrap();
    let answer = sender.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(answer.into()).unwrap()
}

#[tokio::test]
async fn every_surface_of_the_embedded_model_server_is_understood() {
    use Operation::{Chat, Completions, CountTokens, Embeddings, Images, Messages, Pooling, Rerank, Responses, Score};
    let server = Simulated::start(Options { tokens_per_second: 0.0, ..Options::default() }).await.unwrap();
    let messages = json!([{"role": "user", "content": "What does \"usage\":{ mean?"}]);
    let streaming = json!({"include_usage": true});
    let asked = [
        (Chat, "/v1/chat/completions", json!({"messages": messages, "stream_options": streaming, "max_tokens": 9})),
        (Completions, "/v1/completions", json!({"prompt": "Say it", "stream_options": streaming, "max_tokens": 9})),
        (Responses, "/v1/responses", json!({"input": "Say it", "max_output_tokens": 9})),
        (Messages, "/v1/messages", json!({"messages": messages, "max_tokens": 9})),
        (CountTokens, "/v1/messages/count_tokens", json!({"messages": messages})),
        (Embeddings, "/v1/embeddings", json!({"input": ["a", "b"]})),
        (Rerank, "/v1/rerank", json!({"query": "a", "documents": ["a", "b"]})),
        (Score, "/v1/score", json!({"text_1": "a", "text_2": ["a", "b"]})),
        (Pooling, "/v1/pooling", json!({"input": "a"})),
        (Images, "/v1/images/generations", json!({"prompt": "a cat"})),
    ];
    for (operation, path, mut body) in asked {
        let answer = simulated(&server, path, &body).await;
        let whole = told(metered(operation, false, [answer.as_bytes()]));
        assert!(whole.starts_with("upstream: input "), "{path}: {whole} of {answer}");
        if !matches!(operation, Chat | Completions | Responses | Messages) {
            continue;
        }
        assert!(whole.contains("output 9"), "{path}: {whole} of {answer}");
        body["stream"] = json!(true);
        server.set_faults(Vec::new());
        let answer = simulated(&server, path, &body).await;
        let stream = metered(operation, true, [answer.as_bytes()]);
        assert_eq!((stream.output_tokens, stream.source), (Some(9), Source::Upstream), "{path}: {answer}");
        assert_eq!(metered(operation, true, answer.as_bytes().chunks(11)), stream);
        server.set_faults(vec!["no-usage".parse::<Fault>().unwrap()]);
        let answer = simulated(&server, path, &body).await;
        let counted = metered(operation, true, [answer.as_bytes()]);
        assert_eq!(counted.source, Source::Estimated, "{path}: {answer}");
        assert!(counted.output_tokens >= Some(8), "{path}: {counted:?} of {answer}");
        server.set_faults(Vec::new());
    }
}
