//! What prefixes cost a request: naming a prompt's blocks, and asking who of a hundred endpoints has read how many.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use infergate::pool::prefix::{Blocks, CAPACITY, Chain, Prefixes, Seat};

fn prose(bytes: usize) -> Vec<u8> {
    const LINE: &[u8] = b"The quick brown fox jumps over the lazy dog, and then it does so once more.\\n";
    LINE.iter().copied().cycle().take(bytes).collect()
}

fn chain(index: &Prefixes, text: &[u8]) -> Chain {
    index.chain(Blocks::default(), "llama-3", [("messages", text)].into_iter())
}

/// How many look-ups are timed one by one: two hundred of them are slower than the p99.
const ONE_BY_ONE: usize = 20_000;

/// The p50, p99 and slowest of look-ups timed one by one, the clock's own time in each.
fn told_one_by_one(name: &str, mut look_up: impl FnMut(usize)) {
    let timed = |n| {
        let begun = Instant::now();
        look_up(n);
        begun.elapsed()
    };
    let mut took: Vec<Duration> = (0..ONE_BY_ONE).map(timed).collect();
    took.sort_unstable();
    let at = |permille: usize| took[(ONE_BY_ONE - 1) * permille / 1000];
    println!("{name}, one by one: p50 {:?} p99 {:?} p99.9 {:?} most {:?}", at(500), at(990), at(999), at(1000));
}

/// A full table, and a hundred endpoints that have read a prompt of 2,048 blocks to different depths.
fn full(depths: &[usize]) -> (Arc<Prefixes>, Vec<Seat>, Chain) {
    let index = Arc::new(Prefixes::new(CAPACITY, 7));
    let seats: Vec<Seat> = std::iter::from_fn(|| index.seat()).take(100).collect();
    let mut text = prose(2048 * Blocks::default().bytes() as usize);
    for other in 0..40_u8 {
        text[0] = b'0' + other;
        index.learn(&chain(&index, &text), &seats[usize::from(other)]);
    }
    text[0] = b'!';
    for (seat, depth) in seats.iter().zip(depths.iter().cycle()) {
        index.learn(&chain(&index, &text[..depth * Blocks::default().bytes() as usize]), seat);
    }
    let asked = chain(&index, &text);
    (index, seats, asked)
}

fn look_ups(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("2,048 blocks, 100 endpoints");
    let usual: Vec<usize> = (0..100).map(|n| if n == 40 { 1900 } else { 30 }).collect();
    let all: Vec<usize> = (0..100).map(|n| 20 * n + 20).collect();
    for (name, depths) in [("a conversation on one", &usual), ("each as far as no other", &all)] {
        let (index, _seats, asked) = full(depths);
        let allocated = allocation_counter::measure(|| _ = black_box(index.held(&asked)));
        assert_eq!(allocated.count_total, 0, "a look-up allocates");
        group.bench_function(name, |bencher| bencher.iter(|| index.held(black_box(&asked)).deepest));
        told_one_by_one(name, |_| _ = black_box(index.held(black_box(&asked)).deepest));
    }
    in_turns(&usual);
    let (index, seats, asked) = full(&usual);
    group.bench_function("learned", |bencher| bencher.iter(|| index.learn(black_box(&asked), &seats[7])));
    group.bench_function("tidied", |bencher| {
        bencher.iter(|| {
            index.wrote(&seats[99], u32::MAX / 2);
            index.tidy();
        });
    });
}

/// Forty conversations that take turns, so that hardly one finds its blocks in the processor's nearest caches.
fn in_turns(depths: &[usize]) {
    let (index, _seats, _) = full(depths);
    let mut text = prose(2048 * Blocks::default().bytes() as usize);
    let mut other = |n: u8| {
        text[0] = b'0' + n;
        chain(&index, &text)
    };
    let others: Vec<Chain> = (0..40).map(&mut other).collect();
    told_one_by_one("forty conversations in turns", |n| {
        _ = black_box(index.held(black_box(&others[n * 7 % others.len()])).deepest);
    });
}

fn names(criterion: &mut Criterion) {
    let index = Prefixes::new(7, 7);
    let mut group = criterion.benchmark_group("naming blocks");
    for kib in [4, 32, 512] {
        let text = prose(kib << 10);
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function(format!("{kib} KiB"), |bencher| bencher.iter(|| chain(&index, black_box(&text)).len()));
    }
}

criterion_group!(benches, look_ups, names);
criterion_main!(benches);
