//! What an answer has said so far, as far as it is kept: enough to count its tokens should nobody tell them.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use infergate_plugins::operation::Operation;

use super::Encoding;
use crate::ending::ends;
use crate::text::{self, Place, Text};

/// The beginning of an answer, as it came. Of a longer one, the rest is taken to have as many tokens a byte.
#[derive(Debug)]
pub struct Said {
    operation: Operation,
    events: bool,
    encoding: Encoding,
    kept: Vec<u8>,
    /// Bytes of the whole answer.
    bytes: u64,
    tokens: OnceLock<Option<u64>>,
}

/// The most that is kept of an answer. Of a stream, some hundred events.
const KEPT: usize = 32 << 10;

impl Said {
    /// An answer to `operation` begins.
    pub fn begin(operation: Operation, events: bool, encoding: Encoding) -> Self {
        Self { operation, events, encoding, kept: Vec::new(), bytes: 0, tokens: OnceLock::new() }
    }

    /// More of it.
    pub fn push(&mut self, piece: &[u8]) {
        self.bytes += piece.len() as u64;
        let room = KEPT - self.kept.len();
        self.kept.extend_from_slice(&piece[..piece.len().min(room)]);
    }

    /// How many tokens it has, once it is over. `None` where it cannot be counted, or says nothing.
    pub fn tokens(&self) -> Option<u64> {
        *self.tokens.get_or_init(|| if self.events { self.of_events() } else { self.of_whole() })
    }

    fn of_events(&self) -> Option<u64> {
        let (mut read, mut events) = (0, text::Events::default());
        // Each text is put together before it is counted: parts of words have more tokens than words.
        let mut texts: BTreeMap<(Place, u64), String> = BTreeMap::new();
        for end in ends(&self.kept) {
            let event = &self.kept[read..end];
            read = end;
            let Some(data) = text::data(event) else { continue };
            let data = &event[data];
            let Ok(told) = events.read(self.operation, data) else { continue };
            for part in told.texts.iter().filter(|part| told.is_part && !self.repeats(part)) {
                texts.entry((part.place, part.channel)).or_default().push_str(&text::unescaped(data, part)?);
            }
        }
        let counted = texts.values().map(|text| self.encoding.count(text)).sum::<Option<u64>>()?;
        let all = u128::from(counted) * u128::from(self.bytes);
        let all = u64::try_from(all.div_ceil(read.max(1) as u128)).ok()?;
        (counted > 0).then_some(if self.bytes as usize == self.kept.len() { counted } else { all })
    }

    /// TGI's last event says all once more.
    fn repeats(&self, part: &Text) -> bool {
        self.operation == Operation::Generate && part.channel & 1 == 1
    }

    fn of_whole(&self) -> Option<u64> {
        let all = Some(&self.kept).filter(|kept| kept.len() as u64 == self.bytes)?;
        let texts = text::answer(self.operation, all).ok()?;
        let counted =
            texts.iter().map(|text| self.encoding.count(&text::unescaped(all, text)?)).sum::<Option<u64>>()?;
        (counted > 0).then_some(counted)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Tokenizer;
    use super::*;

    fn said(operation: Operation, events: bool, answer: &str) -> Said {
        let encoding = Tokenizer::O200k.of("m").unwrap();
        encoding.load();
        let mut said = Said::begin(operation, events, encoding);
        answer.as_bytes().chunks(7).for_each(|piece| said.push(piece));
        said
    }

    fn chat(parts: &[&str]) -> String {
        let event = |part| format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{part}\"}}}}]}}\n\n");
        parts.iter().map(event).collect::<String>() + "data: [DONE]\n\n"
    }

    #[test]
    fn a_text_is_counted_whole_however_it_was_cut_on_its_way() {
        let whole = chat(&["hello world, internationalization"]);
        let tokens = said(Operation::Chat, true, &whole).tokens();
        assert!(tokens.is_some_and(|tokens| (4..=7).contains(&tokens)), "{tokens:?}");
        let cut = chat(&["hel", "lo w", "orld, inter", "nation", "ali", "zat", "i\\u006fn"]);
        assert_eq!(said(Operation::Chat, true, &cut).tokens(), tokens);
    }

    #[test]
    fn what_the_end_repeats_and_what_says_nothing_is_not_counted() {
        let response = "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"output_index\":0,\"delta\":\"hello world\"}\n\nevent: response.output_text.done\ndata: {\"type\":\"response.output_text.done\",\"output_index\":0,\"text\":\"hello world\"}\n\n";
        assert_eq!(said(Operation::Responses, true, response).tokens(), Some(2));
        let tgi = "data:{\"token\":{\"text\":\"hello\"},\"generated_text\":null}\n\ndata:{\"token\":{\"text\":\" world\"},\"generated_text\":\"hello world\"}\n\n";
        assert_eq!(said(Operation::Generate, true, tgi).tokens(), Some(2));
        assert_eq!(said(Operation::Chat, true, &chat(&[""])).tokens(), None);
        let whole = r#"{"choices":[{"message":{"content":"hello world"}}]}"#;
        assert_eq!(said(Operation::Chat, false, whole).tokens(), Some(2));
    }

    #[test]
    fn a_stream_that_is_longer_than_is_kept_is_near_what_it_has_and_keeps_no_more() {
        let words = [" The", " quick", " brown", " fox", " jumps", " over", " the", " lazy", " dog", "."];
        let parts: Vec<&str> = words.iter().copied().cycle().take(4_000).collect();
        let said = said(Operation::Chat, true, &chat(&parts));
        assert!(said.kept.len() <= KEPT && said.bytes > 4 * KEPT as u64);
        let tokens = said.tokens().unwrap();
        assert!((3_960..=4_040).contains(&tokens), "{tokens} of 4000");
    }

    #[test]
    fn an_event_that_is_cut_off_or_no_json_is_passed_over() {
        let mut text = chat(&["hello", " world"]).replace("data: [DONE]\n\n", "data: {\"choices\":[{\n\n");
        text.push_str("data: {\"choices\":[{\"delta\":{\"content\":\" and");
        assert_eq!(said(Operation::Chat, true, &text).tokens(), Some(2));
    }
}
