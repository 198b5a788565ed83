//! What an engine's events are good for, told by a publisher that is not ours (`zeromq`), in what engines send.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

use super::events::{Names, Stored, read};
use super::*;
use crate::policy::file::Http2;
use crate::pool::origin::{Origin, OriginState};
use crate::pool::prefix::{Chain, Prefixes};

/// A value as engines write it.
#[derive(Clone, Debug)]
enum Value {
    Nothing,
    Number(u64),
    Seconds(f64),
    Text(String),
    Bytes(Vec<u8>),
    List(Vec<Value>),
    Map(Vec<(&'static str, Value)>),
}

impl Value {
    fn text(text: &str) -> Self {
        Self::Text(text.to_owned())
    }

    fn write(&self, out: &mut Vec<u8>) {
        let sized = |out: &mut Vec<u8>, byte: u8, length: usize| {
            out.push(byte);
            out.extend_from_slice(&(length as u32).to_be_bytes());
        };
        match self {
            Self::Nothing => out.push(0xc0),
            Self::Number(small @ 0..=0x7f) => out.push(*small as u8),
            Self::Number(number) => {
                out.push(0xcf);
                out.extend_from_slice(&number.to_be_bytes());
            }
            Self::Seconds(seconds) => {
                out.push(0xcb);
                out.extend_from_slice(&seconds.to_be_bytes());
            }
            Self::Text(text) => {
                out.extend_from_slice(&[0xd9, text.len() as u8]);
                out.extend_from_slice(text.as_bytes());
            }
            Self::Bytes(bytes) => {
                out.extend_from_slice(&[0xc4, bytes.len() as u8]);
                out.extend_from_slice(bytes);
            }
            Self::List(members) => {
                if members.len() < 16 {
                    out.push(0x90 | members.len() as u8);
                } else {
                    sized(out, 0xdd, members.len());
                }
                members.iter().for_each(|member| member.write(out));
            }
            Self::Map(members) => {
                out.push(0x80 | members.len() as u8);
                for (name, value) in members {
                    Self::text(name).write(out);
                    value.write(out);
                }
            }
        }
    }
}

fn hashes(count: u64) -> Value {
    Value::List((0..count).map(|n| Value::Number(u64::MAX - n)).collect())
}

fn stored(count: u64) -> Value {
    let tokens = Value::List((0..16 * count).map(Value::Number).collect());
    Value::List(vec![
        Value::text("BlockStored"),
        hashes(count),
        Value::Nothing,
        tokens,
        Value::Number(16),
        Value::Nothing,
        Value::text("GPU"),
    ])
}

fn removed(count: u64) -> Value {
    Value::List(vec![Value::text("BlockRemoved"), hashes(count), Value::text("GPU")])
}

fn cleared() -> Value {
    Value::List(vec![Value::text("AllBlocksCleared")])
}

fn batch(events: Vec<Value>) -> Vec<u8> {
    let mut out = Vec::new();
    Value::List(vec![Value::Seconds(1.5), Value::List(events), Value::Number(0)]).write(&mut out);
    out
}

/// How many blocks an event is about.
#[derive(Debug, PartialEq)]
enum Told {
    Stored(u64),
    Removed(u64),
    Cleared,
}

fn told(batch: &[u8]) -> Option<Vec<Told>> {
    let mut events = Vec::new();
    let count = |names: Names<'_>| {
        assert_eq!(names.each().count() as u64, names.len());
        names.len()
    };
    let is_whole = read(batch, |event| {
        events.push(match event {
            Event::Stored(stored) => Told::Stored(count(stored.names)),
            Event::Removed(names) => Told::Removed(count(names)),
            Event::Cleared => Told::Cleared,
        });
    });
    is_whole.then_some(events)
}

#[test]
fn both_spellings_of_events_are_read_and_other_memories_are_passed_over() {
    let map = |name, more: Vec<(&'static str, Value)>| Value::Map([vec![("type", Value::text(name))], more].concat());
    let as_bytes = Value::List(vec![Value::Bytes(vec![7; 32]); 3]);
    let events = vec![
        stored(20),
        removed(2),
        cleared(),
        Value::List(vec![
            Value::text("BlockStored"),
            hashes(2),
            Value::Number(9),
            Value::List(vec![]),
            Value::Number(16),
        ]),
        Value::List(vec![Value::text("BlockRemoved"), hashes(5), Value::text("CPU")]),
        Value::List(vec![Value::text("SomethingNew"), hashes(5)]),
        map(
            "BlockStored",
            vec![("block_hashes", as_bytes.clone()), ("block_size", Value::Number(16)), ("medium", Value::Nothing)],
        ),
        map("BlockRemoved", vec![("medium", Value::text("CPU_TIER1")), ("block_hashes", as_bytes.clone())]),
        map("BlockRemoved", vec![("block_hashes", as_bytes), ("group_idx", Value::Number(1))]),
        map("AllBlocksCleared", vec![]),
    ];
    use Told::{Cleared, Removed, Stored};
    let expected = [Stored(20), Removed(2), Cleared, Stored(2), Stored(3), Removed(3), Cleared];
    assert_eq!(told(&batch(events)).as_deref(), Some(&expected[..]));
    let mut without_rank = Vec::new();
    Value::List(vec![Value::Seconds(1.5), Value::List(vec![cleared()])]).write(&mut without_rank);
    assert_eq!(told(&without_rank), Some(vec![Cleared]));
}

#[test]
fn whatever_comes_is_read_to_its_end_or_not_at_all_and_never_tells_more_than_its_bytes() {
    let mut random = fastrand::Rng::with_seed(5);
    let whole = batch(vec![stored(3), removed(2), cleared()]);
    for cut in 0..whole.len() {
        assert_eq!(told(&whole[..cut]), None, "{cut}");
    }
    assert_eq!(told(&[&whole[..], b"\xc0"].concat()), None, "something behind it");
    for round in 0..20_000 {
        let mut bytes = whole.clone();
        for _ in 0..random.usize(1..4) {
            let at = random.usize(..bytes.len());
            bytes[at] = random.u8(..);
        }
        if round % 3 == 0 {
            bytes = (0..random.usize(..64)).map(|_| random.u8(..)).collect();
        }
        let mut blocks = 0;
        read(&bytes, |event| match event {
            Event::Stored(Stored { names, .. }) | Event::Removed(names) => blocks += names.each().count(),
            Event::Cleared => {}
        });
        assert!(blocks <= bytes.len(), "{blocks} of {bytes:?}");
    }
    // Lists that say they have four thousand million members each, one within another.
    assert_eq!(told(&[0xdd, 0xff, 0xff, 0xff, 0xff].repeat(10_000)), None);
}

#[test]
fn a_sequence_tells_what_is_missing_and_when_it_is_trusted_again() {
    let mut sequence = Sequence::default();
    assert_eq!([7, 8, 9].map(|number| sequence.step(number)), [Step::Next; 3], "it begins anywhere");
    assert_eq!(sequence.step(11), Step::Gap);
    let after: Vec<Step> = (12..12 + u64::from(IN_A_ROW)).map(|number| sequence.step(number)).collect();
    assert!(after[..after.len() - 1].iter().all(|step| *step == Step::Distrusted));
    assert_eq!(after.last(), Some(&Step::Next));
    assert_eq!(sequence.lose(), Step::Gap);
    assert_eq!(sequence.step(0), Step::Restart, "an engine that was started anew has nothing that could be missing");
    assert_eq!(sequence.step(1), Step::Next);
}

/// An endpoint at an address of this machine, an index, and the seat of the one in the other.
fn seated() -> (Arc<Endpoint>, Arc<Prefixes>) {
    let (origin, _) = Origin::parse("http://127.0.0.1:1", Http2::Tls).unwrap();
    let endpoint = OriginState::new(origin, Instant::now()).endpoints()[0].clone();
    let prefixes = Arc::new(Prefixes::new(1 << 14, 7));
    endpoint.seat(&prefixes).unwrap().holds(1_000);
    (endpoint, prefixes)
}

fn prompt(prefixes: &Prefixes, which: u32, blocks: usize) -> Chain {
    let text = format!("{which:>255} ").repeat(blocks);
    prefixes.chain(Blocks::default(), "m", [("messages", text.as_bytes())].into_iter())
}

fn held(prefixes: &Prefixes, endpoint: &Endpoint, asked: &Chain) -> u16 {
    if prefixes.is_untidy() {
        prefixes.tidy();
    }
    prefixes.held(asked).by(endpoint.seated().unwrap())
}

#[test]
fn what_an_engine_has_not_evicted_is_not_forgotten_however_much_it_learns() {
    let (endpoint, prefixes) = seated();
    let asked = prompt(&prefixes, 0, 20);
    let seat = endpoint.seated().unwrap();
    endpoint.follows(Step::Next, &batch(vec![stored(80)]), Instant::now());
    prefixes.learn(&asked, seat);
    for other in 1..60 {
        prefixes.learn(&prompt(&prefixes, other, 100), seat);
        endpoint.follows(Step::Next, &batch(vec![stored(400)]), Instant::now());
        assert_eq!(held(&prefixes, &endpoint, &asked), 20, "{other}");
    }
    // Twice half of the thousand blocks of 64 tokens that it holds, in its own of 16.
    for _ in 0..2 {
        (0..20).for_each(|_| endpoint.follows(Step::Next, &batch(vec![removed(100)]), Instant::now()));
        held(&prefixes, &endpoint, &asked);
    }
    assert_eq!(held(&prefixes, &endpoint, &asked), 0);
}

#[test]
fn one_that_tells_nothing_of_what_it_learns_is_guessed_at_again() {
    let (endpoint, prefixes) = seated();
    let (asked, seat) = (prompt(&prefixes, 0, 20), endpoint.seated().unwrap());
    endpoint.follows(Step::Next, &batch(vec![]), Instant::now());
    assert!(seat.is_followed());
    prefixes.learn(&asked, seat);
    for other in 1..20 {
        prefixes.learn(&prompt(&prefixes, other, 100), seat);
        held(&prefixes, &endpoint, &asked);
    }
    assert!(!seat.is_followed());
    assert_eq!(held(&prefixes, &endpoint, &asked), 0);
}

#[test]
fn after_a_gap_it_is_guessed_at_and_what_is_not_read_again_gets_old() {
    let (endpoint, prefixes) = seated();
    let (asked, seat) = (prompt(&prefixes, 0, 20), endpoint.seated().unwrap());
    prefixes.learn(&asked, seat);
    for gap in 1..=2 {
        assert_eq!(held(&prefixes, &endpoint, &asked), 20);
        endpoint.follows(Step::Next, &batch(vec![stored(1)]), Instant::now());
        assert!(seat.is_followed());
        let broken = if gap == 1 { batch(vec![stored(1)]) } else { b"broken".to_vec() };
        endpoint.follows(if gap == 1 { Step::Gap } else { Step::Next }, &broken, Instant::now());
        assert!(!seat.is_followed());
        assert_eq!(endpoint.feed.heard().map(|heard| heard.gaps), Some(gap));
    }
    assert_eq!(held(&prefixes, &endpoint, &asked), 0, "two generations");
    endpoint.follows(Step::Distrusted, &batch(vec![stored(1)]), Instant::now());
    assert!(!seat.is_followed());
}

#[test]
fn a_cache_that_was_cleared_and_an_engine_that_was_started_anew_have_nothing() {
    let (endpoint, prefixes) = seated();
    let (asked, seat) = (prompt(&prefixes, 0, 20), endpoint.seated().unwrap());
    for (step, events) in [(Step::Next, vec![stored(3), cleared()]), (Step::Restart, vec![])] {
        prefixes.learn(&asked, seat);
        assert_eq!(held(&prefixes, &endpoint, &asked), 20);
        endpoint.follows(step, &batch(events), Instant::now());
        assert_eq!(prefixes.held(&asked).by(seat), 0, "at once, and not when somebody tidies");
        assert_eq!(held(&prefixes, &endpoint, &asked), 0);
        assert!(seat.is_followed());
    }
}

/// What an engine with blocks of 16 tokens tells of those that it stored for a session, or evicted.
fn named(name: &str, blocks: &[u64], parent: Option<u64>, session: &str) -> Value {
    sized(16, name, blocks, parent, session)
}

/// The same of one whose blocks have so many tokens.
fn sized(tokens: u64, name: &str, blocks: &[u64], parent: Option<u64>, session: &str) -> Value {
    let parent = parent.map_or(Value::Nothing, Value::Number);
    let blocks = blocks.iter().copied().map(Value::Number).collect();
    Value::Map(vec![
        ("type", Value::text(name)),
        ("block_hashes", Value::List(blocks)),
        ("parent_block_hash", parent),
        ("block_size", Value::Number(tokens)),
        ("medium", Value::text("GPU")),
        ("group_idx", Value::Number(0)),
        ("session_id", Value::text(session)),
    ])
}

/// The names of an engine's blocks: those `which` begins with, counted from `from`.
fn blocks(which: u64, from: u64, count: u64) -> Vec<u64> {
    (from..from + count).map(|block| which << 32 | block).collect()
}

fn stores(blocks: &[u64], parent: Option<u64>, session: &str) -> Vec<u8> {
    batch(vec![named("BlockStored", blocks, parent, session)])
}

fn evicts(blocks: &[u64]) -> Vec<u8> {
    batch(vec![named("BlockRemoved", blocks, None, "")])
}

/// The name of a session.
fn session(number: u64) -> String {
    format!("{number:036}")
}

/// The engine has read a prompt of so many tokens, as request `number`, and has answered.
fn has_read(endpoint: &Endpoint, prefixes: &Prefixes, (number, chain): (u64, &Chain), tokens: u32) {
    prefixes.learn(chain, endpoint.seated().unwrap());
    endpoint.feed.read(session(number).as_bytes().try_into().unwrap(), chain.clone(), (tokens, 1), Instant::now());
}

/// What the endpoint's engine tells next.
fn tells(endpoint: &Endpoint, batch: &[u8]) {
    endpoint.follows(Step::Next, batch, Instant::now());
}

#[test]
fn of_a_prompt_is_forgotten_what_its_engine_evicts_of_it_and_nothing_else() {
    let (endpoint, prefixes) = seated();
    let (asked, other) = (prompt(&prefixes, 0, 20), prompt(&prefixes, 1, 20));
    // 20 blocks of 64 tokens are 80 of 16.
    for (number, chain) in [(1, &asked), (2, &other)] {
        tells(&endpoint, &stores(&blocks(number, 0, 80), None, &session(number)));
        has_read(&endpoint, &prefixes, (number, chain), 1280);
    }
    for (evicted, left) in [(72, 18), (71, 17), (48, 12), (40, 10)] {
        tells(&endpoint, &evicts(&blocks(1, evicted, 80 - evicted)));
        assert_eq!(prefixes.held(&asked).by(endpoint.seated().unwrap()), left, "{evicted}");
    }
    assert_eq!(prefixes.held(&other).by(endpoint.seated().unwrap()), 20);
    let heard = endpoint.feed.heard().unwrap();
    assert_eq!((heard.held, heard.placed), (120, 30));
    // It is sent again, and what is missing is stored again.
    tells(&endpoint, &stores(&blocks(1, 40, 40), Some(1 << 32 | 39), &session(3)));
    has_read(&endpoint, &prefixes, (3, &asked), 1280);
    tells(&endpoint, &evicts(&blocks(1, 76, 4)));
    assert_eq!(prefixes.held(&asked).by(endpoint.seated().unwrap()), 19);
}

#[test]
fn what_an_engine_is_known_to_hold_does_not_get_old() {
    let (endpoint, prefixes) = seated();
    let (asked, unknown) = (prompt(&prefixes, 0, 20), prompt(&prefixes, 1, 20));
    tells(&endpoint, &stores(&blocks(1, 0, 80), None, &session(1)));
    has_read(&endpoint, &prefixes, (1, &asked), 1280);
    prefixes.learn(&unknown, endpoint.seated().unwrap());
    for round in 0..80 {
        tells(&endpoint, &evicts(&blocks(9, round * 100, 100)));
        assert_eq!(held(&prefixes, &endpoint, &asked), 20, "{round}");
    }
    assert_eq!(held(&prefixes, &endpoint, &unknown), 0, "of this it is guessed, by what was evicted in all");
}

#[test]
fn behind_what_an_engine_held_before_anybody_listened_it_is_known_what_it_holds() {
    let (endpoint, prefixes) = seated();
    let (asked, seat) = (prompt(&prefixes, 0, 20), endpoint.seated().unwrap());
    // Half of the prompt was there; two blocks more are the answer's, whose last token is not kept.
    tells(&endpoint, &stores(&blocks(1, 40, 42), Some(1 << 32 | 39), &session(1)));
    prefixes.learn(&asked, seat);
    endpoint.feed.read(session(1).as_bytes().try_into().unwrap(), asked.clone(), (1280, 33), Instant::now());
    tells(&endpoint, &batch(vec![]));
    assert_eq!(endpoint.feed.heard().unwrap().placed, 0, "there may be more to be told");
    endpoint.follows(Step::Next, &batch(vec![]), Instant::now() + ALL_TOLD);
    assert_eq!(endpoint.feed.heard().unwrap().placed, 11);
    for (evicted, left) in [(72, 18), (44, 11), (39, 9)] {
        tells(&endpoint, &evicts(&blocks(1, evicted, 82 - evicted)));
        assert_eq!(prefixes.held(&asked).by(seat), left, "{evicted}");
    }
}

#[test]
fn where_two_prompts_part_what_they_share_ends() {
    let (endpoint, prefixes) = seated();
    // Ten blocks that are 200 tokens, and ten that are 1000: by their bytes the first ten end at token 600.
    let chain = |tail: &str| {
        let text = format!("{}{}", "shared, ".repeat(320), tail.repeat(320));
        prefixes.chain(Blocks::default(), "m", [("messages", text.as_bytes())].into_iter())
    };
    let (one, other) = (chain("this is "), chain("that was"));
    let by = |chain: &Chain| prefixes.held(chain).by(endpoint.seated().unwrap());
    tells(&endpoint, &stores(&blocks(1, 0, 75), None, &session(1)));
    has_read(&endpoint, &prefixes, (1, &one), 1200);
    tells(&endpoint, &stores(&blocks(2, 12, 63), Some(1 << 32 | 11), &session(2)));
    has_read(&endpoint, &prefixes, (2, &other), 1200);
    tells(&endpoint, &evicts(&blocks(1, 12, 63)));
    assert_eq!((by(&one), by(&other)), (10, 20));
    tells(&endpoint, &evicts(&blocks(2, 12, 63)));
    assert_eq!((by(&one), by(&other)), (10, 10));
    tells(&endpoint, &evicts(&blocks(1, 0, 12)));
    assert_eq!((by(&one), by(&other)), (0, 0));
}

#[test]
fn a_block_that_is_held_twice_is_gone_when_it_was_evicted_twice() {
    let (endpoint, prefixes) = seated();
    let asked = prompt(&prefixes, 0, 20);
    for number in [1, 2] {
        tells(&endpoint, &stores(&blocks(1, 0, 80), None, &session(number)));
        has_read(&endpoint, &prefixes, (number, &asked), 1280);
    }
    for left in [20, 0] {
        tells(&endpoint, &evicts(&blocks(1, 0, 80)));
        assert_eq!(prefixes.held(&asked).by(endpoint.seated().unwrap()), left);
    }
}

#[test]
fn after_a_gap_a_clearing_a_restart_and_nonsense_nothing_is_known() {
    let end: [(Step, Vec<u8>); 4] = [
        (Step::Gap, batch(vec![])),
        (Step::Next, batch(vec![cleared()])),
        (Step::Restart, batch(vec![])),
        (Step::Next, b"nonsense".to_vec()),
    ];
    for (step, told) in end {
        let (endpoint, prefixes) = seated();
        let asked = prompt(&prefixes, 0, 20);
        tells(&endpoint, &stores(&blocks(1, 0, 80), None, &session(1)));
        has_read(&endpoint, &prefixes, (1, &asked), 1280);
        tells(&endpoint, &batch(vec![]));
        assert_eq!(endpoint.feed.heard().unwrap().placed, 20);
        endpoint.follows(step, &told, Instant::now());
        let heard = endpoint.feed.heard().unwrap();
        assert_eq!((heard.held, heard.placed), (0, 0), "{step:?}");
    }
}

#[test]
fn only_what_was_stored_for_a_request_of_ours_from_its_beginning_on_is_placed() {
    let (endpoint, prefixes) = seated();
    let asked = prompt(&prefixes, 0, 20);
    let placed = || endpoint.feed.heard().unwrap().placed;
    // Behind a block that is not known; for somebody else; not all of it; in another cache than the first.
    tells(&endpoint, &stores(&blocks(1, 0, 80), Some(7), &session(1)));
    has_read(&endpoint, &prefixes, (1, &asked), 1280);
    tells(&endpoint, &stores(&blocks(2, 0, 80), None, "somebody"));
    has_read(&endpoint, &prefixes, (2, &asked), 1280);
    tells(&endpoint, &stores(&blocks(3, 0, 40), None, &session(3)));
    has_read(&endpoint, &prefixes, (3, &asked), 1280);
    let Value::Map(mut members) = named("BlockStored", &blocks(4, 0, 80), None, &session(4)) else { panic!() };
    members[5].1 = Value::Number(1);
    tells(&endpoint, &batch(vec![Value::Map(members)]));
    has_read(&endpoint, &prefixes, (4, &asked), 1280);
    tells(&endpoint, &batch(vec![]));
    assert_eq!(placed(), 0);
    // The rest of the third comes late, and in time.
    tells(&endpoint, &stores(&blocks(3, 40, 40), Some(3 << 32 | 39), &session(3)));
    tells(&endpoint, &batch(vec![]));
    assert_eq!(placed(), 20);
    assert_eq!(endpoint.feed.read.lock().len(), 3);
    endpoint.follows(Step::Next, &batch(vec![]), Instant::now() + PATIENCE);
    assert_eq!(endpoint.feed.read.lock().len(), 0, "the others have waited long enough");
}

#[test]
fn whatever_an_engine_tells_is_bounded_and_ends() {
    let (endpoint, prefixes) = seated();
    let mut random = fastrand::Rng::with_seed(11);
    for round in 0..3_000_u64 {
        let some =
            |random: &mut fastrand::Rng| -> Vec<u64> { (0..random.u64(..9)).map(|_| random.u64(..40)).collect() };
        let (blocks, number) = (some(&mut random), random.u64(..5));
        let parent = random.bool().then(|| random.u64(..40));
        let tokens = [16, 16, 1, 0, u64::from(u32::MAX), u64::MAX][random.usize(..6)];
        let stores = || batch(vec![sized(tokens, "BlockStored", &blocks, parent, &session(number))]);
        let told = if random.u8(..3) > 0 { stores() } else { evicts(&blocks) };
        let asked = prompt(&prefixes, number as u32, random.usize(1..6));
        let length = if random.u8(..9) == 0 { u32::MAX } else { random.u32(..2000) };
        has_read(&endpoint, &prefixes, (number, &asked), length);
        endpoint.follows(Step::Next, &told, Instant::now() + if round % 50 == 0 { PATIENCE } else { Duration::ZERO });
        let heard = endpoint.feed.heard().unwrap();
        assert!(heard.held <= 40 && heard.placed <= 8 * heard.held, "{heard:?}");
    }
    // More than can be known, and more sessions; a prompt that nobody tells of.
    for number in 0..2_000 {
        tells(&endpoint, &stores(&blocks(50 + number, 0, 150), None, &session(number)));
        has_read(&endpoint, &prefixes, (number + 5_000, &prompt(&prefixes, 1, 1)), 64);
    }
    assert_eq!(endpoint.feed.heard().unwrap().held, 1 << 18);
    assert!(endpoint.feed.read.lock().len() <= READ_MAX);
}

/// A publisher of the `zeromq` crate's, and its port.
async fn publisher() -> (PubSocket, u16) {
    let mut publisher = PubSocket::new();
    match publisher.bind("tcp://127.0.0.1:0").await.unwrap() {
        zeromq::Endpoint::Tcp(_, port) => (publisher, port),
        other => panic!("{other:?}"),
    }
}

async fn publish(publisher: &mut PubSocket, number: u64, events: Vec<Value>) {
    let frames =
        [Bytes::from_static(b"kv-events"), Bytes::copy_from_slice(&number.to_be_bytes()), batch(events).into()];
    publisher.send(ZmqMessage::try_from(frames.to_vec()).unwrap()).await.unwrap();
}

/// Waits until `heard` is as it is wanted.
async fn hears(endpoint: &Endpoint, wanted: impl Fn(Heard) -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !wanted(endpoint.feed.heard().unwrap_or_default()) {
        assert!(Instant::now() < until, "{:?}", endpoint.feed.heard());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_publisher_is_heard_its_gaps_are_and_its_restart_too() {
    let (mut engine, port) = publisher().await;
    let (endpoint, prefixes) = seated();
    let (asked, seat) = (prompt(&prefixes, 0, 20), endpoint.seated().unwrap());
    prefixes.learn(&asked, seat);
    let listener = tokio::spawn(follow(Arc::downgrade(&endpoint), port));
    // Until the subscription has arrived what is published goes to nobody.
    let mut number = 0;
    while endpoint.feed.heard().is_none() {
        publish(&mut engine, number, vec![stored(1)]).await;
        number += 1;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    publish(&mut engine, number, vec![stored(10_000), removed(2)]).await;
    hears(&endpoint, |heard| heard.removed == 2 && heard.stored > 10_000 && heard.gaps == 0).await;
    assert!(seat.is_followed());
    publish(&mut engine, number + 2, vec![stored(1)]).await;
    hears(&endpoint, |heard| heard.gaps == 1).await;
    assert!(!seat.is_followed());
    publish(&mut engine, number + 3, vec![removed(1)]).await;
    hears(&endpoint, |heard| heard.removed == 3).await;
    assert!(!seat.is_followed());
    assert_eq!(held(&prefixes, &endpoint, &asked), 20);
    // Another publisher at the same port, as an engine that was started anew.
    let before = endpoint.feed.heard().unwrap().batches;
    drop(engine);
    let mut engine = PubSocket::new();
    let until = Instant::now() + Duration::from_secs(60);
    while engine.bind(&format!("tcp://127.0.0.1:{port}")).await.is_err() {
        assert!(Instant::now() < until, "the port does not come free");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    while endpoint.feed.heard().unwrap().batches == before {
        publish(&mut engine, 0, vec![]).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert!(seat.is_followed());
    assert_eq!(held(&prefixes, &endpoint, &asked), 0, "what it had read is gone");
    listener.abort();
}

#[tokio::test]
async fn whoever_follows_stops_when_the_endpoint_is_gone() {
    let (mut engine, port) = publisher().await;
    let (endpoint, _prefixes) = seated();
    let listener = tokio::spawn(follow(Arc::downgrade(&endpoint), port));
    while endpoint.feed.heard().is_none() {
        publish(&mut engine, 0, vec![]).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    drop(endpoint);
    while !listener.is_finished() {
        publish(&mut engine, 1, vec![]).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert!(listener.await.is_ok());
}

#[tokio::test]
async fn the_system_asks_whether_a_silent_engine_is_still_there() {
    let engine = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = connect(engine.local_addr().unwrap()).await.unwrap();
    assert!(sockopt::socket_keepalive(&stream).unwrap());
    let asks = (
        sockopt::tcp_keepidle(&stream).unwrap(),
        sockopt::tcp_keepintvl(&stream).unwrap(),
        sockopt::tcp_keepcnt(&stream).unwrap(),
    );
    assert_eq!(asks, SILENCE);
}
