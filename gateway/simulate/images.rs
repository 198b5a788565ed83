//! `/v1/images/generations` and `/v1/moderations`.

use super::answer::{Answer, Refusal, Whole, unix_seconds};
use super::encoding::{Crc32, base64, quoted};
use super::engine::Work;
use super::input::{Input, texts};
use super::routes::Call;
use super::tokens;

/// More pictures than this at once are refused.
const MOST_PICTURES: u64 = 10;

pub(super) async fn generate(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    call.model(&input)?;
    input.needed("prompt")?;
    let prompt = input.text("prompt")?.unwrap_or_default();
    let wanted = input.count("n")?.unwrap_or(1);
    if wanted > MOST_PICTURES {
        return Err(Refusal::value("n", &format!("n must be at most {MOST_PICTURES}"), wanted));
    }
    let prompt_tokens = tokens::count(prompt);
    call.compute(Work { prompt_tokens, choices: 1, ..Work::default() }).await;
    let picture = |number: u64| {
        let png = png(tokens::hash((prompt, number)));
        format!(r#"{{"b64_json":"{}","url":null,"revised_prompt":null}}"#, base64(&png))
    };
    let data: Vec<String> = (0..wanted).map(picture).collect();
    let usage = match call.trouble.no_usage {
        true => String::new(),
        false => {
            let (output, total) = (256 * wanted, prompt_tokens + 256 * wanted);
            format!(
                r#","usage":{{"total_tokens":{total},"input_tokens":{prompt_tokens},"output_tokens":{output},"input_tokens_details":{{"text_tokens":{prompt_tokens},"image_tokens":0}}}}"#
            )
        }
    };
    let created = unix_seconds();
    Ok(Whole::json(format!(r#"{{"created":{created},"data":[{}]{usage}}}"#, data.join(","))).into())
}

/// A picture of one pixel.
fn png(colour: u64) -> Vec<u8> {
    let [red, green, blue, ..] = colour.to_be_bytes();
    let row = [0, red, green, blue];
    let mut out = b"\x89PNG\r\n\x1a\n".to_vec();
    chunk(&mut out, b"IHDR", &[0, 0, 0, 1, 0, 0, 0, 1, 8, 2, 0, 0, 0]);
    // zlib with one stored block.
    let mut data = vec![0x78, 0x01, 1, 4, 0, 0xfb, 0xff];
    data.extend_from_slice(&row);
    data.extend_from_slice(&adler32(&row).to_be_bytes());
    chunk(&mut out, b"IDAT", &data);
    chunk(&mut out, b"IEND", &[]);
    out
}

fn chunk(out: &mut Vec<u8>, kind: &[u8; 4], data: &[u8]) {
    let mut crc = Crc32::default();
    crc.add(kind);
    crc.add(data);
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(kind);
    out.extend_from_slice(data);
    out.extend_from_slice(&crc.sum().to_be_bytes());
}

fn adler32(bytes: &[u8]) -> u32 {
    let (low, high) = bytes.iter().fold((1, 0), |(low, high): (u32, u32), byte| {
        let low = (low + u32::from(*byte)) % 65_521;
        (low, (high + low) % 65_521)
    });
    high << 16 | low
}

const CATEGORIES: [&str; 13] = [
    "harassment",
    "harassment/threatening",
    "sexual",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm/intent",
    "self-harm/instructions",
    "self-harm",
    "sexual/minors",
    "violence",
    "violence/graphic",
];

/// Finds violence where a text says so, and nothing else.
pub(super) async fn moderate(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    let model = call.model(&input)?;
    let inputs = texts(input.needed("input")?, "input")?;
    let prompt_tokens = inputs.iter().map(|text| text.tokens).sum();
    call.compute(Work { prompt_tokens, choices: 1, ..Work::default() }).await;
    let results: Vec<String> = inputs.iter().map(|text| judged(&text.text)).collect();
    let (id, model) = (quoted(&call.id("modr-")), quoted(&model));
    Ok(Whole::json(format!(r#"{{"id":{id},"model":{model},"results":[{}]}}"#, results.join(","))).into())
}

fn judged(text: &str) -> String {
    let violent = ["kill", "murder", "bomb"].iter().any(|word| text.to_lowercase().contains(word));
    let members = |written: &dyn Fn(bool) -> String| {
        let one = |category: &&str| format!("\"{category}\":{}", written(violent && *category == "violence"));
        CATEGORIES.iter().map(one).collect::<Vec<_>>().join(",")
    };
    let categories = members(&|yes| yes.to_string());
    let scores = members(&|yes| if yes { "0.98" } else { "0.0001" }.to_owned());
    let applied = members(&|_| r#"["text"]"#.to_owned());
    format!(
        r#"{{"flagged":{violent},"categories":{{{categories}}},"category_scores":{{{scores}}},"category_applied_input_types":{{{applied}}}}}"#
    )
}
