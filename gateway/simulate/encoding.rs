//! The small encodings that the simulated server writes itself: JSON strings, base64, gzip, SHA-1.

/// Appends `text` as the inside of a JSON string, escaped as Python's `json` and pydantic do.
pub(super) fn escape(out: &mut Vec<u8>, text: &str) {
    let bytes = text.as_bytes();
    let mut start = 0;
    for (at, byte) in bytes.iter().enumerate() {
        if *byte >= 0x20 && *byte != b'"' && *byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&bytes[start..at]);
        start = at + 1;
        escape_byte(out, *byte);
    }
    out.extend_from_slice(&bytes[start..]);
}

fn escape_byte(out: &mut Vec<u8>, byte: u8) {
    match byte {
        b'"' => out.extend_from_slice(b"\\\""),
        b'\\' => out.extend_from_slice(b"\\\\"),
        b'\n' => out.extend_from_slice(b"\\n"),
        b'\r' => out.extend_from_slice(b"\\r"),
        b'\t' => out.extend_from_slice(b"\\t"),
        0x08 => out.extend_from_slice(b"\\b"),
        0x0c => out.extend_from_slice(b"\\f"),
        other => out.extend_from_slice(format!("\\u{other:04x}").as_bytes()),
    }
}

/// `text` as a JSON string, quotes included.
pub(super) fn quoted(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len() + 2);
    out.push(b'"');
    escape(&mut out, text);
    out.push(b'"');
    String::from_utf8(out).unwrap_or_default()
}

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Standard base64 with padding.
pub(super) fn base64(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let padded = [group[0], *group.get(1).unwrap_or(&0), *group.get(2).unwrap_or(&0)];
        let number = u32::from_be_bytes([0, padded[0], padded[1], padded[2]]);
        for digit in 0..4 {
            let missing = digit > group.len();
            let symbol = BASE64[(number >> (18 - 6 * digit)) as usize & 63];
            out.push(if missing { '=' } else { char::from(symbol) });
        }
    }
    out
}

/// A gzip file of stored blocks: nothing is compressed, but every reader has to unpack it.
pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = Gzip::default();
    let mut out = gzip.block(bytes);
    out.extend(gzip.end());
    out
}

/// A gzip file that is written as its content comes.
#[derive(Default)]
pub(super) struct Gzip {
    begun: bool,
    crc: Crc32,
    length: u32,
}

impl Gzip {
    pub(super) fn block(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len() + bytes.len() / 1000 + 64);
        if !std::mem::replace(&mut self.begun, true) {
            out.extend_from_slice(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255]);
        }
        for block in bytes.chunks(usize::from(u16::MAX)) {
            let length = block.len() as u16;
            out.push(0);
            out.extend_from_slice(&length.to_le_bytes());
            out.extend_from_slice(&(!length).to_le_bytes());
            out.extend_from_slice(block);
        }
        self.crc.add(bytes);
        self.length = self.length.wrapping_add(bytes.len() as u32);
        out
    }

    pub(super) fn end(mut self) -> Vec<u8> {
        let mut out = self.block(&[]);
        out.extend_from_slice(&[1, 0, 0, 255, 255]);
        out.extend_from_slice(&self.crc.sum().to_le_bytes());
        out.extend_from_slice(&self.length.to_le_bytes());
        out
    }
}

/// The checksum of gzip and PNG.
pub(super) struct Crc32(u32);

impl Default for Crc32 {
    fn default() -> Self {
        Self(u32::MAX)
    }
}

impl Crc32 {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let mixed = self.0 ^ u32::from(*byte);
            self.0 = (0..8).fold(mixed, |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 });
        }
    }

    pub(super) fn sum(&self) -> u32 {
        !self.0
    }
}

/// SHA-1, which the WebSocket handshake asks for.
pub(super) fn sha1(bytes: &[u8]) -> [u8; 20] {
    let mut padded = bytes.to_vec();
    padded.push(0x80);
    padded.resize((bytes.len() + 9).next_multiple_of(64), 0);
    let end = padded.len() - 8;
    padded[end..].copy_from_slice(&(bytes.len() as u64 * 8).to_be_bytes());
    let mut state = [0x6745_2301_u32, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0];
    padded.chunks_exact(64).for_each(|block| sha1_block(&mut state, block));
    let mut out = [0; 20];
    for (to, word) in out.chunks_exact_mut(4).zip(state) {
        to.copy_from_slice(&word.to_be_bytes());
    }
    out
}

fn sha1_block(state: &mut [u32; 5], block: &[u8]) {
    let mut words = [0_u32; 80];
    for (word, bytes) in words.iter_mut().zip(block.chunks_exact(4)) {
        *word = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    for at in 16..80 {
        words[at] = (words[at - 3] ^ words[at - 8] ^ words[at - 14] ^ words[at - 16]).rotate_left(1);
    }
    let [mut a, mut b, mut c, mut d, mut e] = *state;
    for (at, word) in words.iter().enumerate() {
        let (mix, constant) = match at / 20 {
            0 => ((b & c) | (!b & d), 0x5a82_7999),
            1 => (b ^ c ^ d, 0x6ed9_eba1),
            2 => ((b & c) | (b & d) | (c & d), 0x8f1b_bcdc),
            _ => (b ^ c ^ d, 0xca62_c1d6_u32),
        };
        let sum = a.rotate_left(5).wrapping_add(mix).wrapping_add(e).wrapping_add(constant);
        (e, d, c, b, a) = (d, c, b.rotate_left(30), a, sum.wrapping_add(*word));
    }
    for (held, new) in state.iter_mut().zip([a, b, c, d, e]) {
        *held = held.wrapping_add(new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_padded() {
        let encoded = [b"".as_slice(), b"f", b"fo", b"foo", b"foob"].map(base64);
        assert_eq!(encoded, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg=="]);
    }

    #[test]
    fn sha1_answers_the_handshake_of_rfc_6455() {
        let digest = sha1(b"dGhlIHNhbXBsZSBub25jZQ==258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
        assert_eq!(base64(&digest), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        for (length, expected) in [
            (55, "wci73CJ5bijA4VFj0giZtlYh1lo="),
            (56, "wtszD2CDhUyZ1LW/tujynyAb5pk="),
            (63, "A/CfWxWKeoza2SC93Cm4HBilUfU="),
            (64, "AJi6gktcFkJ716ESKlpEKiXsZE0="),
            (119, "7pcQZaqgF+BjKoymx3uzv4sd/FY="),
        ] {
            assert_eq!(base64(&sha1(&vec![b'a'; length])), expected, "{length}");
        }
    }

    #[test]
    fn crc32_is_that_of_gzip() {
        let mut crc = Crc32::default();
        crc.add(b"123456789");
        assert_eq!(crc.sum(), 0xcbf4_3926);
    }

    #[test]
    fn strings_are_escaped_as_json() {
        let text = "a\"b\\c\n\u{1}é😀";
        assert_eq!(serde_json::from_str::<String>(&quoted(text)).unwrap(), text);
        assert_eq!(quoted("\u{1c}"), "\"\\u001c\"");
    }
}
