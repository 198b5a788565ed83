//! Batches of events, read from MessagePack: `[time, [event, ...], ...]`.
//!
//! An event is a list that begins with its name (vLLM, and SGLang before it changed that) or a map that has its name under
//! `type`. Nothing is allocated: tokens are passed over, and names stay where they are until somebody asks for them.

use std::fmt;

use crate::pool::origin::fnv;

/// What happened to the cache that matters here: to blocks in the GPU's own memory.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event<'a> {
    /// Blocks were stored.
    Stored(Stored<'a>),
    /// Blocks were evicted.
    Removed(Names<'a>),
    /// Nothing is left.
    Cleared,
}

/// Blocks that were stored, each behind the one before it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored<'a> {
    pub(super) names: Names<'a>,
    /// The block that the first is behind; `None` where a prompt begins.
    pub(super) parent: Option<u64>,
    /// Tokens of each.
    pub(super) tokens: u32,
    /// For which session, where the engine tells that.
    pub(super) session: Option<&'a [u8]>,
}

/// What an engine calls some blocks: a hash each.
#[derive(Clone, Copy)]
pub(super) struct Names<'a> {
    pack: Pack<'a>,
    count: u32,
    /// Of which of its caches: models of several kinds of attention have several.
    pub(super) group: u32,
}

impl Names<'_> {
    /// How many there are.
    pub(super) fn len(&self) -> u64 {
        self.count.into()
    }

    /// One after the other.
    pub(super) fn each(&self) -> impl Iterator<Item = u64> {
        let mut pack = self.pack;
        (0..self.count).map_while(move |_| pack.head()?.name())
    }
}

impl fmt::Debug for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.each()).finish()
    }
}

/// Tells every event of a batch, in their order. Returns whether the batch could be read to its end; if not, some events
/// of it may have been told.
pub(super) fn read(batch: &[u8], mut tell: impl FnMut(Event<'_>)) -> bool {
    let mut pack = Pack(batch);
    whole(&mut pack, &mut tell).is_some() && pack.0.is_empty()
}

fn whole(pack: &mut Pack<'_>, tell: &mut impl FnMut(Event<'_>)) -> Option<()> {
    let Head::List(members @ 2..) = pack.head()? else { return None };
    pack.skip(1)?;
    let Head::List(events) = pack.head()? else { return None };
    for _ in 0..events {
        if let Some(event) = event(pack)? {
            tell(event);
        }
    }
    pack.skip(members - 2)
}

/// One event; `None` within if it is none that matters.
fn event<'a>(pack: &mut Pack<'a>) -> Option<Option<Event<'a>>> {
    let mut seen = Seen::default();
    match pack.head()? {
        Head::List(members @ 1..) => {
            seen.name = pack.text()?;
            let fields: &[Field] = match seen.name {
                b"BlockStored" => &STORED,
                b"BlockRemoved" => &REMOVED,
                _ => &[],
            };
            for member in 0..members - 1 {
                seen.take(fields.get(member as usize).copied().unwrap_or(Field::Other), pack)?;
            }
        }
        Head::Map(members) => {
            for _ in 0..members {
                let field = match pack.text()? {
                    b"type" => Field::Name,
                    b"block_hashes" => Field::Blocks,
                    b"parent_block_hash" => Field::Parent,
                    b"block_size" => Field::Tokens,
                    b"medium" => Field::Medium,
                    b"group_idx" => Field::Group,
                    b"session_id" => Field::Session,
                    _ => Field::Other,
                };
                seen.take(field, pack)?;
            }
        }
        _ => return None,
    }
    Some(seen.event())
}

/// What the members of an event are, as far as it matters.
#[derive(Clone, Copy)]
enum Field {
    Name,
    Blocks,
    Parent,
    Tokens,
    Medium,
    Group,
    Session,
    Other,
}

/// `block_hashes, parent_block_hash, token_ids, block_size, lora_id, medium`.
const STORED: [Field; 6] = [Field::Blocks, Field::Parent, Field::Other, Field::Tokens, Field::Other, Field::Medium];
/// `block_hashes, medium`.
const REMOVED: [Field; 2] = [Field::Blocks, Field::Medium];

#[derive(Default)]
struct Seen<'a> {
    name: &'a [u8],
    blocks: Option<(Pack<'a>, u32)>,
    parent: Option<u64>,
    tokens: u32,
    /// Absent from older engines, which have one kind only.
    medium: Option<&'a [u8]>,
    group: u32,
    session: Option<&'a [u8]>,
}

impl<'a> Seen<'a> {
    fn take(&mut self, field: Field, pack: &mut Pack<'a>) -> Option<()> {
        match field {
            Field::Name => self.name = pack.text()?,
            Field::Blocks => {
                let Head::List(blocks) = pack.head()? else { return None };
                self.blocks = Some((*pack, blocks));
                pack.skip(blocks)?;
            }
            Field::Parent => self.parent = pack.single()?.name(),
            Field::Tokens => self.tokens = pack.single()?.number(),
            Field::Group => self.group = pack.single()?.number(),
            Field::Medium => self.medium = pack.maybe_text()?,
            Field::Session => self.session = pack.maybe_text()?,
            Field::Other => pack.skip(1)?,
        }
        Some(())
    }

    fn event(&self) -> Option<Event<'a>> {
        let on_gpu = self.medium.is_none_or(|medium| medium.eq_ignore_ascii_case(b"gpu"));
        let names = || self.blocks.map(|(pack, count)| Names { pack, count, group: self.group });
        match self.name {
            b"BlockStored" if on_gpu => {
                let (parent, tokens, session) = (self.parent, self.tokens, self.session);
                Some(Event::Stored(Stored { names: names()?, parent, tokens, session }))
            }
            b"BlockRemoved" if on_gpu => Some(Event::Removed(names()?)),
            b"AllBlocksCleared" => Some(Event::Cleared),
            _ => None,
        }
    }
}

/// What is left of a text in MessagePack.
#[derive(Clone, Copy)]
struct Pack<'a>(&'a [u8]);

/// How a value begins: of a list or a map its members are still to come.
enum Head<'a> {
    List(u32),
    Map(u32),
    Text(&'a [u8]),
    Bytes(&'a [u8]),
    /// A whole one; one below zero as the 64 bits that it has.
    Number(u64),
    /// Anything else, nothing included.
    Scalar,
}

impl Head<'_> {
    /// What a block is called: a number, or the bytes of a longer hash.
    fn name(&self) -> Option<u64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Bytes(bytes) | Self::Text(bytes) => Some(fnv(bytes)),
            Self::List(_) | Self::Map(_) | Self::Scalar => None,
        }
    }

    /// A count; nought where there is none.
    fn number(&self) -> u32 {
        if let Self::Number(number) = self { u32::try_from(*number).unwrap_or_default() } else { 0 }
    }
}

impl<'a> Pack<'a> {
    fn head(&mut self) -> Option<Head<'a>> {
        let scalar = |_| Head::Scalar;
        match self.take(1)?[0] {
            byte @ 0x00..=0x7f => Some(Head::Number(byte.into())),
            byte @ 0xe0..=0xff => Some(Head::Number(i64::from(byte.cast_signed()).cast_unsigned())),
            0xc0 | 0xc2 | 0xc3 => Some(Head::Scalar),
            byte @ 0x80..=0x8f => Some(Head::Map(u32::from(byte & 0xf))),
            byte @ 0x90..=0x9f => Some(Head::List(u32::from(byte & 0xf))),
            byte @ 0xa0..=0xbf => self.take(usize::from(byte & 0x1f)).map(Head::Text),
            0xc4 => self.run(1, 0).map(Head::Bytes),
            0xc5 => self.run(2, 0).map(Head::Bytes),
            0xc6 => self.run(4, 0).map(Head::Bytes),
            0xc7 => self.run(1, 1).map(scalar),
            0xc8 => self.run(2, 1).map(scalar),
            0xc9 => self.run(4, 1).map(scalar),
            0xcc => self.unsigned(1),
            0xcd => self.unsigned(2),
            0xce => self.unsigned(4),
            0xcf => self.unsigned(8),
            0xd0 => self.signed(1),
            0xd1 => self.signed(2),
            0xd2 => self.signed(4),
            0xd3 => self.signed(8),
            0xd4 => self.take(2).map(scalar),
            0xd5 => self.take(3).map(scalar),
            0xca => self.take(4).map(scalar),
            0xd6 => self.take(5).map(scalar),
            0xcb => self.take(8).map(scalar),
            0xd7 => self.take(9).map(scalar),
            0xd8 => self.take(17).map(scalar),
            0xd9 => self.run(1, 0).map(Head::Text),
            0xda => self.run(2, 0).map(Head::Text),
            0xdb => self.run(4, 0).map(Head::Text),
            0xdc => self.length(2).map(Head::List),
            0xdd => self.length(4).map(Head::List),
            0xde => self.length(2).map(Head::Map),
            0xdf => self.length(4).map(Head::Map),
            0xc1 => None,
        }
    }

    fn text(&mut self) -> Option<&'a [u8]> {
        match self.head()? {
            Head::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A value that has no members.
    fn single(&mut self) -> Option<Head<'a>> {
        self.head().filter(|head| !matches!(head, Head::List(_) | Head::Map(_)))
    }

    /// Text, or something else in its place.
    fn maybe_text(&mut self) -> Option<Option<&'a [u8]>> {
        Some(if let Head::Text(text) = self.single()? { Some(text) } else { None })
    }

    fn unsigned(&mut self, bytes: usize) -> Option<Head<'a>> {
        self.integer(bytes).map(Head::Number)
    }

    fn signed(&mut self, bytes: usize) -> Option<Head<'a>> {
        let unused = 64 - 8 * bytes as u32;
        self.integer(bytes).map(|number| Head::Number(((number << unused).cast_signed() >> unused).cast_unsigned()))
    }

    /// The number of so many bytes, eight at most.
    fn integer(&mut self, bytes: usize) -> Option<u64> {
        Some(self.take(bytes)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// Passes over so many values and all that is in them. Every value has a byte at least, so this ends with the text.
    fn skip(&mut self, values: u32) -> Option<()> {
        let mut left = u64::from(values);
        while left > 0 {
            left -= 1;
            left += match self.head()? {
                Head::List(members) => members.into(),
                Head::Map(members) => 2 * u64::from(members),
                _ => 0,
            };
        }
        Some(())
    }

    /// So many bytes behind a length of `digits` bytes, and `more`.
    fn run(&mut self, digits: usize, more: usize) -> Option<&'a [u8]> {
        let length = self.length(digits)?;
        self.take((length as usize).checked_add(more)?)
    }

    fn length(&mut self, digits: usize) -> Option<u32> {
        u32::try_from(self.integer(digits)?).ok()
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, left) = self.0.split_at_checked(count)?;
        self.0 = left;
        Some(taken)
    }
}
