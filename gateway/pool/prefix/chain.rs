//! A prompt as a chain of blocks: each named by a hash of its bytes and of all blocks before it.
//!
//! What is hashed are the bytes of the request as they came, in the order in which models' templates put them. Nothing
//! is read, decoded or copied: two requests of one client that begin alike are written alike, and of two clients that
//! write the same differently, each finds its own again.

use std::fmt;
use std::hash::Hasher as _;

use foldhash::SharedSeed;
use foldhash::quality::FoldHasher;
use smallvec::SmallVec;

/// Blocks of a prompt that are looked at: half a megabyte at the usual size. What is behind counts as new.
pub const BLOCKS_MAX: usize = 2048;

/// Bytes of a request that a token stands for, roughly, where nothing is known.
const BYTES_A_TOKEN: u32 = 4;
/// Tokens of a block at least: engines' own blocks of 16 would tell no more and cost four times as much.
const TOKENS_MIN: u32 = 64;
const TOKENS_MAX: u32 = 4096;

/// How prompts are cut. Two cuts know nothing of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    bytes: u32,
}

impl Default for Blocks {
    fn default() -> Self {
        Self::of_engine(1)
    }
}

impl Blocks {
    /// The cut for engines that keep blocks of so many tokens: a multiple of theirs.
    pub fn of_engine(tokens: u32) -> Self {
        let tokens = tokens.clamp(1, TOKENS_MAX);
        Self { bytes: TOKENS_MIN.next_multiple_of(tokens) * BYTES_A_TOKEN }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> u32 {
        self.bytes
    }

    /// How many blocks so many tokens fill: what [`Seat::holds`](super::Seat::holds) wants of a KV cache's size.
    pub fn in_tokens(self, tokens: u64) -> u32 {
        u32::try_from(tokens / u64::from(self.bytes / BYTES_A_TOKEN)).unwrap_or(u32::MAX)
    }
}

/// The names of a prompt's blocks. Up to 32 of them are kept in place, more in one allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    hashes: SmallVec<[u64; 32]>,
    /// Of the last whole block, how many bytes of prompt are before its end, and how many there are in all.
    cut: u64,
    bytes: u64,
}

impl Chain {
    /// The names, from the prompt's beginning.
    pub(in crate::pool) fn hashes(&self) -> &[u64] {
        &self.hashes
    }

    /// How many whole blocks there are.
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// Whether the prompt has not one whole block.
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Which share of the prompt the first `depth` blocks are, from 0 to 1.
    pub fn share(&self, depth: u16) -> f64 {
        let blocks = self.hashes.len().max(1) as f64;
        let whole = self.cut as f64 / (self.bytes.max(1)) as f64;
        (f64::from(depth) / blocks).min(1.0) * whole
    }
}

/// The key of a process's hashes.
pub(super) struct Key {
    shared: SharedSeed,
    seed: u64,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    pub(super) fn new(seed: u64) -> Self {
        Self { shared: SharedSeed::from_u64(seed), seed: seed.rotate_left(32) }
    }

    pub(super) fn chain<'a>(
        &self,
        cut: Blocks,
        model: &str,
        parts: impl Iterator<Item = (&'static str, &'a [u8])>,
    ) -> Chain {
        let mut hasher = self.hasher(self.seed ^ u64::from(cut.bytes));
        hasher.write(model.as_bytes());
        let mut cutter = Cutter::new(self, cut, hasher);
        for (name, value) in parts {
            cutter.hasher.write(name.as_bytes());
            cutter.push(value);
        }
        cutter.chain
    }

    fn hasher(&self, before: u64) -> FoldHasher<'_> {
        FoldHasher::with_seed(before, &self.shared)
    }
}

/// Cuts what is pushed.
struct Cutter<'a> {
    key: &'a Key,
    size: usize,
    /// What is missing of the block.
    left: usize,
    hasher: FoldHasher<'a>,
    /// Whether the block has had nothing but letters and digits so far, and whether the one before had.
    solid: (bool, bool),
    chain: Chain,
}

impl<'a> Cutter<'a> {
    fn new(key: &'a Key, cut: Blocks, hasher: FoldHasher<'a>) -> Self {
        let size = cut.bytes as usize;
        Self { key, size, left: size, hasher, solid: (true, false), chain: Chain::default() }
    }

    fn push(&mut self, mut bytes: &[u8]) {
        self.chain.bytes += bytes.len() as u64;
        while !bytes.is_empty() && self.chain.hashes.len() < BLOCKS_MAX {
            let (piece, rest) = bytes.split_at(self.left.min(bytes.len()));
            self.hasher.write(piece);
            self.solid.0 = self.solid.0 && piece.iter().all(is_base64);
            self.left -= piece.len();
            bytes = rest;
            if self.left == 0 {
                self.end_block();
            }
        }
    }

    /// Blocks without a space, a quote or a full stop are no prose but an image or a sound. It is told apart from
    /// others, but counts as one block however large it is: so do engines, nearly.
    fn end_block(&mut self) {
        // Zero is the name of nothing.
        let hash = self.hasher.finish().max(1);
        let (is_solid, was_solid) = self.solid;
        if is_solid && was_solid {
            self.chain.hashes.pop();
            self.chain.bytes -= self.size as u64;
        } else {
            self.chain.cut += self.size as u64;
        }
        self.chain.hashes.push(hash);
        (self.hasher, self.left, self.solid) = (self.key.hasher(hash), self.size, (true, is_solid));
    }
}

fn is_base64(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=' | b'-' | b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(model: &str, parts: &[(&'static str, &str)]) -> Chain {
        let parts = parts.iter().map(|(name, value)| (*name, value.as_bytes()));
        Key::new(7).chain(Blocks::default(), model, parts)
    }

    fn prose(words: usize) -> String {
        (0..words).map(|word| format!("word {word}, ")).collect()
    }

    fn common(a: &Chain, b: &Chain) -> usize {
        a.hashes().iter().zip(b.hashes()).take_while(|(a, b)| a == b).count()
    }

    #[test]
    fn prompts_share_the_blocks_of_their_common_beginning_and_no_others() {
        let text = prose(1000);
        let longer = format!("{text}and more {}", prose(200));
        let changed = format!("{}?{}", &text[..1300], &text[1301..]);
        let [text, longer, changed] = [text, longer, changed].map(|text| chain("m", &[("messages", &text)]));
        assert_eq!(common(&text, &longer), text.len());
        assert_eq!(common(&text, &changed), 1300 / 256);
        assert!(longer.len() > text.len() && !text.is_empty());
    }

    #[test]
    fn the_model_the_cut_the_key_and_the_field_are_part_of_every_name() {
        let text = prose(100);
        let base = chain("m", &[("messages", &text)]);
        let parts = || [("messages", text.as_bytes())].into_iter();
        for other in [
            chain("n", &[("messages", &text)]),
            chain("m", &[("prompt", &text)]),
            chain("m", &[("cache_salt", "\"s\""), ("messages", &text)]),
            Key::new(8).chain(Blocks::default(), "m", parts()),
            Key::new(7).chain(Blocks::of_engine(128), "m", parts()),
        ] {
            assert_eq!(common(&base, &other), 0);
        }
    }

    #[test]
    fn an_image_is_told_apart_and_counts_as_one_block() {
        let image = |letter: &str| format!("look at this: \"{}\" {}", letter.repeat(100_000), prose(100));
        let (one, other) = (chain("m", &[("messages", &image("A"))]), chain("m", &[("messages", &image("B"))]));
        assert!(one.len() < 12, "{}", one.len());
        assert_eq!(common(&one, &other), 0);
        assert_eq!(one, chain("m", &[("messages", &image("A"))]));
        assert!(one.share(one.len() as u16) > 0.8, "{}", one.share(one.len() as u16));
    }

    #[test]
    fn a_share_is_of_the_whole_prompt() {
        let text = &prose(1000)[..5 * 256 + 128];
        let chain = chain("m", &[("messages", text)]);
        let share = chain.share(2);
        assert!((share - 512.0 / 1408.0).abs() < 1e-9, "{share}");
        assert_eq!((chain.len(), chain.share(0)), (5, 0.0));
        assert!(chain.share(u16::MAX) < 1.0);
    }

    #[test]
    fn a_cut_is_a_multiple_of_the_engines_and_never_tiny() {
        let bytes = [0, 1, 16, 48, 128, u32::MAX].map(|tokens| Blocks::of_engine(tokens).bytes());
        assert_eq!(bytes, [256, 256, 256, 384, 512, 4 * TOKENS_MAX]);
        assert_eq!(Blocks::default().in_tokens(64_000), 1000);
    }

    #[test]
    fn there_is_an_end_to_what_is_looked_at() {
        let endless = chain("m", &[("messages", &"no end. ".repeat(200_000))]);
        assert_eq!(endless.len(), BLOCKS_MAX);
        assert!(endless.share(BLOCKS_MAX as u16) < 0.5);
    }
}
