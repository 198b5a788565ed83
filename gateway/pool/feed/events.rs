//! Batches of events, read from MessagePack: `[time, [event, ...], ...]`.
//!
//! An event is a list that begins with its name (vLLM, and SGLang before it changed that) or a map that has its name under
//! `type`. Nothing is kept and nothing allocated: lists of hashes and tokens are counted and passed over.

/// What happened to the cache that matters here: so many blocks, those in the GPU's own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Blocks were stored.
    Stored(u64),
    /// Blocks were evicted.
    Removed(u64),
    /// Nothing is left.
    Cleared,
}

/// Tells every event of a batch, in their order. Returns whether the batch could be read to its end; if not, some events
/// of it may have been told.
pub(super) fn read(batch: &[u8], mut tell: impl FnMut(Event)) -> bool {
    let mut pack = Pack(batch);
    whole(&mut pack, &mut tell).is_some() && pack.0.is_empty()
}

fn whole(pack: &mut Pack<'_>, tell: &mut impl FnMut(Event)) -> Option<()> {
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
fn event(pack: &mut Pack<'_>) -> Option<Option<Event>> {
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
                    b"medium" => Field::Medium,
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
    Medium,
    Other,
}

/// `block_hashes, parent_block_hash, token_ids, block_size, lora_id, medium`.
const STORED: [Field; 6] = [Field::Blocks, Field::Other, Field::Other, Field::Other, Field::Other, Field::Medium];
/// `block_hashes, medium`.
const REMOVED: [Field; 2] = [Field::Blocks, Field::Medium];

#[derive(Default)]
struct Seen<'a> {
    name: &'a [u8],
    blocks: u64,
    /// Absent from older engines, which have one kind only.
    medium: Option<&'a [u8]>,
}

impl<'a> Seen<'a> {
    fn take(&mut self, field: Field, pack: &mut Pack<'a>) -> Option<()> {
        match field {
            Field::Name => self.name = pack.text()?,
            Field::Blocks => {
                let Head::List(blocks) = pack.head()? else { return None };
                self.blocks = blocks.into();
                pack.skip(blocks)?;
            }
            Field::Medium => match pack.head()? {
                Head::Text(medium) => self.medium = Some(medium),
                Head::Scalar => {}
                _ => return None,
            },
            Field::Other => pack.skip(1)?,
        }
        Some(())
    }

    fn event(&self) -> Option<Event> {
        let on_gpu = self.medium.is_none_or(|medium| medium.eq_ignore_ascii_case(b"gpu"));
        match self.name {
            b"BlockStored" if on_gpu => Some(Event::Stored(self.blocks)),
            b"BlockRemoved" if on_gpu => Some(Event::Removed(self.blocks)),
            b"AllBlocksCleared" => Some(Event::Cleared),
            _ => None,
        }
    }
}

/// What is left of a text in MessagePack.
struct Pack<'a>(&'a [u8]);

/// How a value begins: of a list or a map its members are still to come.
enum Head<'a> {
    List(u32),
    Map(u32),
    Text(&'a [u8]),
    /// A number, bytes, nothing.
    Scalar,
}

impl<'a> Pack<'a> {
    fn head(&mut self) -> Option<Head<'a>> {
        let scalar = |_| Head::Scalar;
        match self.take(1)?[0] {
            0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => Some(Head::Scalar),
            byte @ 0x80..=0x8f => Some(Head::Map(u32::from(byte & 0xf))),
            byte @ 0x90..=0x9f => Some(Head::List(u32::from(byte & 0xf))),
            byte @ 0xa0..=0xbf => self.take(usize::from(byte & 0x1f)).map(Head::Text),
            0xc4 => self.run(1, 0).map(scalar),
            0xc5 => self.run(2, 0).map(scalar),
            0xc6 => self.run(4, 0).map(scalar),
            0xc7 => self.run(1, 1).map(scalar),
            0xc8 => self.run(2, 1).map(scalar),
            0xc9 => self.run(4, 1).map(scalar),
            0xcc | 0xd0 => self.take(1).map(scalar),
            0xcd | 0xd1 | 0xd4 => self.take(2).map(scalar),
            0xd5 => self.take(3).map(scalar),
            0xca | 0xce | 0xd2 => self.take(4).map(scalar),
            0xd6 => self.take(5).map(scalar),
            0xcb | 0xcf | 0xd3 => self.take(8).map(scalar),
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
        Some(self.take(digits)?.iter().fold(0, |length, byte| length << 8 | u32::from(*byte)))
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, left) = self.0.split_at_checked(count)?;
        self.0 = left;
        Some(taken)
    }
}
