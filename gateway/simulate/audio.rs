//! `/v1/audio/transcriptions`, `/v1/audio/translations` and `/v1/audio/speech`.

use http::StatusCode;
use memchr::memmem;

use super::answer::{Answer, Refusal, Whole};
use super::encoding::quoted;
use super::engine::{Finish, Work};
use super::input::Input;
use super::routes::Call;
use super::tokens;

/// Bytes of speech at 16 kHz and 16 bits a second: what an upload is taken for.
const BYTES_A_SECOND: usize = 32_000;

pub(super) async fn transcribe(call: &Call) -> Result<Answer, Refusal> {
    let form = Form::parse(call)?;
    let model = form.text("model").unwrap_or_else(|| call.server.options.first_model().to_owned());
    call.check_model(&model)?;
    let file = form.part("file").ok_or_else(|| Refusal::new(400, "the form has no file").about("file"))?;
    let (bytes, seconds) = (file.len(), file.len().div_ceil(BYTES_A_SECOND));
    let text = format!("This is the transcript of {bytes} bytes of simulated speech.");
    let work = Work { prompt_tokens: 50 * seconds as u64, choices: 1, ..Work::default() };
    let count = tokens::count(&text);
    call.generate(work, count, count).await.finish(Finish::Stop);
    let task = if call.path.ends_with("translations") { "translate" } else { "transcribe" };
    let whole = match form.text("response_format").as_deref() {
        Some("text") => Whole::new(StatusCode::OK, "text/plain; charset=utf-8", format!("{text}\n")),
        Some("verbose_json") => Whole::json(verbose(&text, seconds, task)),
        None | Some("json") => {
            Whole::json(format!(r#"{{"text":{},"usage":{{"type":"duration","seconds":{seconds}}}}}"#, quoted(&text)))
        }
        Some(other) => {
            return Err(Refusal::value("response_format", "response_format must be json, text or verbose_json", other));
        }
    };
    Ok(whole.into())
}

fn verbose(text: &str, seconds: usize, task: &str) -> String {
    let (text, end) = (quoted(text), seconds as f64);
    format!(
        r#"{{"task":"{task}","duration":"{end:?}","language":"en","text":{text},"segments":[{{"id":0,"avg_logprob":-0.25,"compression_ratio":1.0,"end":{end:?},"seek":0,"start":0.0,"temperature":0.0,"text":{text},"tokens":[],"no_speech_prob":0.01}}],"words":null,"usage":{{"type":"duration","seconds":{seconds}}}}}"#
    )
}

/// A multipart form.
struct Form<'a>(Vec<(String, &'a [u8])>);

impl<'a> Form<'a> {
    fn parse(call: &'a Call) -> Result<Self, Refusal> {
        let wrong = |why: &str| Refusal::new(400, format!("the body must be multipart/form-data: {why}"));
        let kind = call.headers.get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if !kind.starts_with("multipart/form-data") {
            return Err(wrong("the content-type is another one"));
        }
        let boundary = kind.split(';').find_map(|part| part.trim().strip_prefix("boundary="));
        let boundary = boundary.ok_or_else(|| wrong("the content-type names no boundary"))?.trim_matches('"');
        let parts = split(&call.body, boundary).ok_or_else(|| wrong("the last boundary is missing"))?;
        Ok(Self(parts.into_iter().filter_map(named).collect()))
    }

    fn part(&self, name: &str) -> Option<&'a [u8]> {
        self.0.iter().find(|(part, _)| part == name).map(|(_, content)| *content)
    }

    fn text(&self, name: &str) -> Option<String> {
        self.part(name).map(|content| String::from_utf8_lossy(content).into_owned())
    }
}

/// What is between the boundaries, if the closing one is there.
fn split<'a>(body: &'a [u8], boundary: &str) -> Option<Vec<&'a [u8]>> {
    let first = format!("--{boundary}");
    let next = format!("\r\n--{boundary}");
    let mut rest = body.get(memmem::find(body, first.as_bytes())? + first.len()..)?;
    let mut parts = Vec::new();
    while !rest.starts_with(b"--") {
        let end = memmem::find(rest, next.as_bytes())?;
        parts.push(rest[..end].strip_prefix(b"\r\n")?);
        rest = &rest[end + next.len()..];
    }
    Some(parts)
}

/// The name and the content of a part.
fn named(part: &[u8]) -> Option<(String, &[u8])> {
    let end = memmem::find(part, b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&part[..end]);
    let name = head.split("name=\"").nth(1)?.split('"').next()?;
    Some((name.to_owned(), &part[end + 4..]))
}

/// The rate of the simulated voice.
const RATE: u32 = 8000;

pub(super) async fn speak(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    call.model(&input)?;
    input.needed("input")?;
    let said = input.text("input")?.unwrap_or_default();
    call.compute(Work { prompt_tokens: tokens::count(said), choices: 1, ..Work::default() }).await;
    let whole = match input.text("response_format")? {
        None | Some("wav") => Whole::new(StatusCode::OK, "audio/wav", wav(said)),
        Some("pcm") => Whole::new(StatusCode::OK, "audio/pcm", samples(said)),
        Some(other) => return Err(Refusal::value("response_format", "response_format must be wav or pcm", other)),
    };
    Ok(whole.into())
}

fn wav(said: &str) -> Vec<u8> {
    let samples = samples(said);
    let length = samples.len() as u32;
    let mut out = b"RIFF".to_vec();
    out.extend_from_slice(&(36 + length).to_le_bytes());
    out.extend_from_slice(b"WAVEfmt \x10\0\0\0\x01\0\x01\0");
    out.extend_from_slice(&RATE.to_le_bytes());
    out.extend_from_slice(&(2 * RATE).to_le_bytes());
    out.extend_from_slice(b"\x02\0\x10\0data");
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&samples);
    out
}

/// A tone of 10 ms a character, ten seconds at most.
fn samples(said: &str) -> Vec<u8> {
    let step = |character: char| 200 + 37 * (character as u32 % 29);
    let tone = |character: char| {
        (0..RATE / 100).flat_map(move |at| (((at * step(character)) % 8192) as i16 - 4096).to_le_bytes())
    };
    said.chars().take(1000).flat_map(tone).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_is_taken_apart_even_with_binary_content() {
        let body = b"--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\r\n--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"x.wav\"\r\n\r\n\0\r\n\r\n--\xff\r\n--b--\r\n";
        let parts: Vec<_> = split(body, "b").unwrap().into_iter().filter_map(named).collect();
        assert_eq!(parts[0], ("model".to_owned(), b"m".as_slice()));
        assert_eq!(parts[1], ("file".to_owned(), b"\0\r\n\r\n--\xff".as_slice()));
        assert!(split(&body[..body.len() - 8], "b").is_none());
    }

    #[test]
    fn speech_is_a_wav_of_the_length_it_says() {
        let wav = wav("hi");
        assert_eq!(wav.len(), 44 + 2 * 80 * 2);
        assert_eq!(&wav[40..44], (wav.len() as u32 - 44).to_le_bytes());
    }
}
