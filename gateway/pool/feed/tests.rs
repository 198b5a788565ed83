//! What an engine's events are good for, told by a publisher that is not ours (`zeromq`), in what engines send.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

use super::events::read;
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
    Text(&'static str),
    Bytes(Vec<u8>),
    List(Vec<Value>),
    Map(Vec<(&'static str, Value)>),
}

impl Value {
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
                    Self::Text(name).write(out);
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
        Value::Text("BlockStored"),
        hashes(count),
        Value::Nothing,
        tokens,
        Value::Number(16),
        Value::Nothing,
        Value::Text("GPU"),
    ])
}

fn removed(count: u64) -> Value {
    Value::List(vec![Value::Text("BlockRemoved"), hashes(count), Value::Text("GPU")])
}

fn cleared() -> Value {
    Value::List(vec![Value::Text("AllBlocksCleared")])
}

fn batch(events: Vec<Value>) -> Vec<u8> {
    let mut out = Vec::new();
    Value::List(vec![Value::Seconds(1.5), Value::List(events), Value::Number(0)]).write(&mut out);
    out
}

fn told(batch: &[u8]) -> Option<Vec<Event>> {
    let mut events = Vec::new();
    read(batch, |event| events.push(event)).then_some(events)
}

#[test]
fn both_spellings_of_events_are_read_and_other_memories_are_passed_over() {
    let map = |name, more: Vec<(&'static str, Value)>| Value::Map([vec![("type", Value::Text(name))], more].concat());
    let as_bytes = Value::List(vec![Value::Bytes(vec![7; 32]); 3]);
    let events = vec![
        stored(20),
        removed(2),
        cleared(),
        Value::List(vec![
            Value::Text("BlockStored"),
            hashes(2),
            Value::Number(9),
            Value::List(vec![]),
            Value::Number(16),
        ]),
        Value::List(vec![Value::Text("BlockRemoved"), hashes(5), Value::Text("CPU")]),
        Value::List(vec![Value::Text("SomethingNew"), hashes(5)]),
        map(
            "BlockStored",
            vec![("block_hashes", as_bytes.clone()), ("block_size", Value::Number(16)), ("medium", Value::Nothing)],
        ),
        map("BlockRemoved", vec![("medium", Value::Text("CPU_TIER1")), ("block_hashes", as_bytes.clone())]),
        map("BlockRemoved", vec![("block_hashes", as_bytes), ("group_idx", Value::Number(1))]),
        map("AllBlocksCleared", vec![]),
    ];
    use Event::{Cleared, Removed, Stored};
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
            Event::Stored(count) | Event::Removed(count) => blocks += count,
            Event::Cleared => {}
        });
        assert!(blocks <= bytes.len() as u64, "{blocks} of {bytes:?}");
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
    endpoint.follows(Step::Next, &batch(vec![stored(80)]));
    prefixes.learn(&asked, seat);
    for other in 1..60 {
        prefixes.learn(&prompt(&prefixes, other, 100), seat);
        endpoint.follows(Step::Next, &batch(vec![stored(400)]));
        assert_eq!(held(&prefixes, &endpoint, &asked), 20, "{other}");
    }
    // Twice half of the thousand blocks of 64 tokens that it holds, in its own of 16.
    for _ in 0..2 {
        (0..20).for_each(|_| endpoint.follows(Step::Next, &batch(vec![removed(100)])));
        held(&prefixes, &endpoint, &asked);
    }
    assert_eq!(held(&prefixes, &endpoint, &asked), 0);
}

#[test]
fn one_that_tells_nothing_of_what_it_learns_is_guessed_at_again() {
    let (endpoint, prefixes) = seated();
    let (asked, seat) = (prompt(&prefixes, 0, 20), endpoint.seated().unwrap());
    endpoint.follows(Step::Next, &batch(vec![]));
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
        endpoint.follows(Step::Next, &batch(vec![stored(1)]));
        assert!(seat.is_followed());
        let broken = if gap == 1 { batch(vec![stored(1)]) } else { b"broken".to_vec() };
        endpoint.follows(if gap == 1 { Step::Gap } else { Step::Next }, &broken);
        assert!(!seat.is_followed());
        assert_eq!(endpoint.feed.heard().map(|heard| heard.gaps), Some(gap));
    }
    assert_eq!(held(&prefixes, &endpoint, &asked), 0, "two generations");
    endpoint.follows(Step::Distrusted, &batch(vec![stored(1)]));
    assert!(!seat.is_followed());
}

#[test]
fn a_cache_that_was_cleared_and_an_engine_that_was_started_anew_have_nothing() {
    let (endpoint, prefixes) = seated();
    let (asked, seat) = (prompt(&prefixes, 0, 20), endpoint.seated().unwrap());
    for (step, events) in [(Step::Next, vec![stored(3), cleared()]), (Step::Restart, vec![])] {
        prefixes.learn(&asked, seat);
        assert_eq!(held(&prefixes, &endpoint, &asked), 20);
        endpoint.follows(step, &batch(events));
        assert_eq!(prefixes.held(&asked).by(seat), 0, "at once, and not when somebody tidies");
        assert_eq!(held(&prefixes, &endpoint, &asked), 0);
        assert!(seat.is_followed());
    }
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
