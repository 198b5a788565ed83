//! What the server tells of itself and of text: models, load, tokens, and the requests it has seen.

use std::sync::atomic::Ordering::Relaxed;

use serde_json::{Map, Value, json};

use super::answer::{Answer, Refusal, Whole, unix_seconds};
use super::draft;
use super::encoding::quoted;
use super::input::{Input, Text};
use super::options::Engine;
use super::routes::Call;
use super::visit::Seen;
use super::{chat, tokens};

pub(super) fn models(call: &Call) -> Answer {
    let models: Vec<String> = call.server.options.models.iter().map(|model| described(call, model)).collect();
    Whole::json(format!(r#"{{"object":"list","data":[{}]}}"#, models.join(","))).into()
}

pub(super) fn model(call: &Call) -> Result<Answer, Refusal> {
    let name = call.path.trim_start_matches("/v1/models/");
    call.check_model(name)?;
    Ok(Whole::json(described(call, name)).into())
}

fn described(call: &Call, model: &str) -> String {
    let (created, longest) = (unix_seconds(), call.server.options.max_model_len);
    let (id, root) = (quoted(model), quoted(&format!("./{model}")));
    match call.engine() {
        Engine::Vllm => format!(
            r#"{{"id":{id},"object":"model","created":{created},"owned_by":"vllm","root":{root},"parent":null,"max_model_len":{longest},"permission":[{{"id":"modelperm-{}","object":"model_permission","created":{created},"allow_create_engine":false,"allow_sampling":true,"allow_logprobs":true,"allow_search_indices":false,"allow_view":true,"allow_fine_tuning":false,"organization":"*","group":null,"is_blocking":false}}]}}"#,
            draft::hex_id()
        ),
        Engine::Sglang => format!(
            r#"{{"id":{id},"object":"model","created":{created},"owned_by":"sglang","root":{root},"parent":null,"max_model_len":{longest}}}"#
        ),
        Engine::Tgi => format!(r#"{{"id":{id},"object":"model","created":0,"owned_by":{id}}}"#),
        Engine::Openai => format!(r#"{{"id":{id},"object":"model","created":{created},"owned_by":"system"}}"#),
    }
}

pub(super) fn load(call: &Call) -> Answer {
    let metrics = &call.server.engine.metrics;
    let load = metrics.running.load(Relaxed) + metrics.waiting.load(Relaxed);
    Whole::json(format!(r#"{{"server_load":{load}}}"#)).into()
}

/// TGI's `/info`, SGLang's `/get_server_info` and `/get_model_info`.
pub(super) fn info(call: &Call) -> Result<Answer, Refusal> {
    let options = &call.server.options;
    let model = quoted(options.first_model());
    let (longest, slots) = (options.max_model_len, options.slots);
    let body = match (call.engine(), call.path.as_str()) {
        (Engine::Tgi, "/info") => format!(
            r#"{{"model_id":{model},"model_sha":"simulated","model_pipeline_tag":"text-generation","max_concurrent_requests":{slots},"max_best_of":2,"max_stop_sequences":4,"max_input_tokens":{},"max_total_tokens":{longest},"validation_workers":2,"max_client_batch_size":4,"router":"text-generation-router","version":"3.3.6","sha":"simulated","docker_label":null}}"#,
            longest.saturating_sub(1)
        ),
        (Engine::Sglang, "/get_server_info") => format!(
            r#"{{"model_path":{model},"served_model_name":{model},"context_length":{longest},"max_running_requests":{slots},"max_total_num_tokens":{},"version":"0.5.6","status":"ready","internal_states":[]}}"#,
            options.kv_tokens
        ),
        (Engine::Sglang, "/get_model_info") => {
            format!(r#"{{"model_path":{model},"tokenizer_path":{model},"is_generation":true}}"#)
        }
        _ => return Ok(super::routes::not_found().into()),
    };
    Ok(Whole::json(body).into())
}

/// The tokens of a text or of messages, with ids that `detokenize` turns back.
pub(super) fn tokenize(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    call.model(&input)?;
    let text = match input.get("messages") {
        Some(_) => chat::prompt(&input)?.text,
        None => {
            input.needed("prompt")?;
            input.text("prompt")?.unwrap_or_default().to_owned()
        }
    };
    let pieces: Vec<&str> = tokens::split(&text).collect();
    let ids: Vec<String> = pieces.iter().map(|piece| tokens::id(piece).to_string()).collect();
    let names = match input.flag("return_token_strs")? {
        true => format!("[{}]", pieces.iter().map(|piece| quoted(piece)).collect::<Vec<_>>().join(",")),
        false => "null".to_owned(),
    };
    let (count, longest) = (ids.len(), call.server.options.max_model_len);
    Ok(Whole::json(format!(
        r#"{{"count":{count},"max_model_len":{longest},"tokens":[{}],"token_strs":{names}}}"#,
        ids.join(",")
    ))
    .into())
}

pub(super) fn detokenize(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    call.model(&input)?;
    input.needed("tokens")?;
    let text = Text::from_ids(input.list("tokens")?, "tokens")?;
    Ok(Whole::json(format!(r#"{{"prompt":{}}}"#, quoted(&text.text))).into())
}

/// What a test in another process asks for.
pub(super) fn seen(call: &Call) -> Answer {
    let all: Vec<Value> = call.server.seen.list().iter().map(written).collect();
    Whole::json(Value::Array(all).to_string()).into()
}

fn written(seen: &Seen) -> Value {
    let mut headers = Map::new();
    for (name, value) in &seen.headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        let joined = match headers.get(name.as_str()).and_then(Value::as_str) {
            Some(before) => format!("{before}, {value}"),
            None => value.into_owned(),
        };
        headers.insert(name.to_string(), joined.into());
    }
    json!({
        "id": seen.id,
        "method": seen.method,
        "path": seen.path,
        "http2": seen.http2,
        "headers": headers,
        "body_bytes": seen.body_bytes,
        "body_sha256": seen.body_sha256,
        "body": String::from_utf8_lossy(&seen.body),
        "outcome": seen.outcome.name(),
        "outcome_after_ms": seen.outcome_after_ms,
    })
}
