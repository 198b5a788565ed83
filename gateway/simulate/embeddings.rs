//! Answers without tokens: `/v1/embeddings`, `/v1/pooling`, `/v1/score` and `/v1/rerank`.

use serde_json::Value;

use super::answer::{Answer, Refusal, Whole, unix_seconds};
use super::encoding::{base64, quoted};
use super::engine::Work;
use super::input::{Input, Text, texts};
use super::options::Engine;
use super::routes::Call;
use super::{draft, tokens};

/// The length of a vector that nobody asked to be shorter.
const DIMENSIONS: u64 = 64;

/// Longer vectors than any model has.
const MOST_DIMENSIONS: u64 = 16_384;

pub(super) async fn embed(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    let model = call.model(&input)?;
    let inputs = inputs(&input)?;
    let dimensions = dimensions(&input)?;
    let encoded = encoded(&input)?;
    let total = compute(call, &inputs).await?;
    let data: Vec<String> = inputs
        .iter()
        .enumerate()
        .map(|(index, text)| {
            let vector = written(&vector(&model, &text.text, dimensions), encoded);
            match call.engine() {
                Engine::Openai => format!(r#"{{"object":"embedding","index":{index},"embedding":{vector}}}"#),
                _ => format!(r#"{{"index":{index},"object":"embedding","embedding":{vector}}}"#),
            }
        })
        .collect();
    let data = data.join(",");
    let (usage, model) = (usage(call, total), quoted(&model));
    let body = match call.engine() {
        Engine::Openai => format!(
            r#"{{"object":"list","data":[{data}],"model":{model},"usage":{{"prompt_tokens":{total},"total_tokens":{total}}}}}"#
        ),
        _ => format!("{},\"data\":[{data}]{usage}}}", head(call, "embd-", &model)),
    };
    Ok(Whole::json(body).into())
}

pub(super) async fn pool(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    let model = call.model(&input)?;
    let inputs = inputs(&input)?;
    let dimensions = dimensions(&input)?;
    let encoded = encoded(&input)?;
    let total = compute(call, &inputs).await?;
    let data: Vec<String> = inputs
        .iter()
        .enumerate()
        .map(|(index, text)| {
            let vector = written(&vector(&model, &text.text, dimensions), encoded);
            format!(r#"{{"index":{index},"object":"pooling","data":{vector}}}"#)
        })
        .collect();
    let usage = usage(call, total);
    let body = format!("{},\"data\":[{}]{usage}}}", head(call, "pool-", &quoted(&model)), data.join(","));
    Ok(Whole::json(body).into())
}

pub(super) async fn score(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    let model = call.model(&input)?;
    let side = |names: [&str; 3]| -> Result<Vec<Text>, Refusal> {
        let found = names.iter().find_map(|name| input.get(name).map(|value| texts(value, name)));
        found.unwrap_or_else(|| input.needed(names[0]).and_then(|value| texts(value, names[0])))
    };
    let left = side(["text_1", "queries", "data_1"])?;
    let right = side(["text_2", "documents", "data_2"])?;
    if left.len() != 1 && left.len() != right.len() {
        return Err(Refusal::new(400, "Input lengths must be either 1:1, 1:N or N:N").about("text_2"));
    }
    let all: Vec<Text> = left.iter().chain(&right).cloned().collect();
    let total = compute(call, &all).await?;
    let data: Vec<String> = right
        .iter()
        .enumerate()
        .map(|(index, text)| {
            let query = left.get(index).unwrap_or(&left[0]);
            format!(r#"{{"index":{index},"object":"score","score":{:?}}}"#, relevance(&query.text, &text.text))
        })
        .collect();
    let usage = usage(call, total);
    let body = format!("{},\"data\":[{}]{usage}}}", head(call, "score-", &quoted(&model)), data.join(","));
    Ok(Whole::json(body).into())
}

pub(super) async fn rerank(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    let model = call.model(&input)?;
    input.needed("query")?;
    let query = input.text("query")?.unwrap_or_default();
    let documents = texts(input.needed("documents")?, "documents")?;
    let wanted = input.integer("top_n")?.and_then(|top| usize::try_from(top).ok()).filter(|top| *top > 0);
    let mut all = documents.clone();
    all.push(Text::new(query));
    let total = compute(call, &all).await?;
    let mut ranked: Vec<(usize, f64)> =
        documents.iter().map(|document| relevance(query, &document.text)).enumerate().collect();
    ranked.sort_by(|one, other| other.1.total_cmp(&one.1).then(one.0.cmp(&other.0)));
    ranked.truncate(wanted.unwrap_or(usize::MAX));
    let results: Vec<String> = ranked
        .iter()
        .map(|(index, score)| {
            let text = quoted(&documents[*index].text);
            format!(
                r#"{{"index":{index},"document":{{"text":{text},"multi_modal":null}},"relevance_score":{score:?}}}"#
            )
        })
        .collect();
    let (id, model) = (quoted(&call.id("rerank-")), quoted(&model));
    let usage = match call.trouble.no_usage {
        true => String::new(),
        false => format!(r#""usage":{{"prompt_tokens":{total},"total_tokens":{total}}},"#),
    };
    let body = format!(r#"{{"id":{id},"model":{model},{usage}"results":[{}]}}"#, results.join(","));
    Ok(Whole::json(body).into())
}

fn head(call: &Call, prefix: &str, model: &str) -> String {
    let (id, created) = (quoted(&call.id(prefix)), unix_seconds());
    format!(r#"{{"id":{id},"object":"list","created":{created},"model":{model}"#)
}

fn usage(call: &Call, total: u64) -> String {
    match call.trouble.no_usage {
        true => String::new(),
        false => format!(
            r#","usage":{{"prompt_tokens":{total},"total_tokens":{total},"completion_tokens":0,"prompt_tokens_details":null}}"#
        ),
    }
}

fn inputs(input: &Input) -> Result<Vec<Text>, Refusal> {
    if let Some(messages) = input.get("messages").and_then(Value::as_array) {
        let contents = messages.iter().map(|message| message.get("content").unwrap_or(&Value::Null).to_string());
        return Ok(vec![Text::new(&contents.collect::<String>())]);
    }
    texts(input.needed("input")?, "input")
}

fn dimensions(input: &Input) -> Result<usize, Refusal> {
    match input.count("dimensions")? {
        Some(wanted) if wanted > MOST_DIMENSIONS => {
            Err(Refusal::value("dimensions", &format!("dimensions must be at most {MOST_DIMENSIONS}"), wanted))
        }
        wanted => Ok(wanted.unwrap_or(DIMENSIONS) as usize),
    }
}

fn encoded(input: &Input) -> Result<bool, Refusal> {
    match input.text("encoding_format")? {
        None | Some("float") => Ok(false),
        Some("base64") => Ok(true),
        Some(other) => Err(Refusal::value("encoding_format", "encoding_format must be float or base64", other)),
    }
}

/// Runs the inputs through the engine; their tokens.
async fn compute(call: &Call, inputs: &[Text]) -> Result<u64, Refusal> {
    let longest = call.server.options.max_model_len;
    let too_long = inputs.iter().find(|text| text.tokens > longest);
    if let Some(text) = too_long {
        return Err(draft::too_long(call.engine(), longest, text.tokens));
    }
    let total = inputs.iter().map(|text| text.tokens).sum();
    call.compute(Work { prompt_tokens: total, choices: 1, ..Work::default() }).await;
    Ok(total)
}

/// A unit vector that follows from the text alone. Texts that share words point in similar directions.
fn vector(model: &str, text: &str, dimensions: usize) -> Vec<f32> {
    let mut sum = vec![0.0_f64; dimensions];
    let mut add = |seed: u64, weight: f64| {
        let mut state = seed | 1;
        for value in &mut sum {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *value += weight * ((state >> 11) as f64 / (1_u64 << 53) as f64 - 0.5);
        }
    };
    add(tokens::hash((model, text)), 0.3);
    // A long text is described by its first words: the vector need not be good, only cheap and stable.
    for word in text.split_whitespace().take(256) {
        add(tokens::hash((model, word.to_lowercase())), 1.0);
    }
    let length = sum.iter().map(|value| value * value).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    sum.iter().map(|value| (value / length) as f32).collect()
}

fn written(vector: &[f32], encoded: bool) -> String {
    if encoded {
        let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
        return quoted(&base64(&bytes));
    }
    let values: Vec<String> = vector.iter().map(|value| format!("{value:?}")).collect();
    format!("[{}]", values.join(","))
}

/// The share of the query's words that a document has, moved a little so that ties are rare.
fn relevance(query: &str, document: &str) -> f64 {
    let lower = document.to_lowercase();
    let words: Vec<String> = query.split_whitespace().map(str::to_lowercase).collect();
    let shared = words.iter().filter(|word| lower.contains(word.as_str())).count();
    let noise = (tokens::hash((query, document)) % 1000) as f64 / 20_000.0;
    (shared as f64 / words.len().max(1) as f64 * 0.9 + noise).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_have_length_one_and_depend_on_the_text() {
        let [one, again, other] = ["a cat", "a cat", "a dog"].map(|text| vector("m", text, 64));
        let length: f32 = one.iter().map(|value| value * value).sum();
        assert!((length - 1.0).abs() < 1e-5);
        assert_eq!(one, again);
        assert_ne!(one, other);
    }

    #[test]
    fn a_document_that_has_the_words_is_more_relevant() {
        assert!(relevance("red fox", "The red fox jumps") > relevance("red fox", "A blue whale"));
    }
}
