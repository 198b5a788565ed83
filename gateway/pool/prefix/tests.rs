//! What an index promises, and that a naive one would say the same.

use std::collections::HashSet;

use super::*;

fn index(capacity: usize) -> Arc<Prefixes> {
    Arc::new(Prefixes::new(capacity, 7))
}

/// A prompt that begins like every other with the same words, word by word a block.
fn chain(index: &Prefixes, words: &[u32]) -> Chain {
    let text: String = words.iter().map(|word| format!("{word:>255} ")).collect();
    index.chain(Blocks::default(), "m", [("prompt", text.as_bytes())].into_iter())
}

fn upto(count: u32) -> Vec<u32> {
    (0..count).collect()
}

#[test]
fn a_look_up_tells_how_far_each_endpoint_has_read() {
    let index = index(1 << 14);
    let [one, two, none] = [(); 3].map(|()| index.seat().unwrap());
    index.learn(&chain(&index, &upto(700)), &one);
    index.learn(&chain(&index, &upto(31)), &two);
    let held = index.held(&chain(&index, &upto(900)));
    assert_eq!([&one, &two, &none].map(|seat| held.by(seat)), [700, 31, 0]);
    assert_eq!(held.deepest, 700);
    assert_eq!(index.held(&chain(&index, &[5, 6])).deepest, 0);
    assert_eq!(index.held(&Chain::default()).deepest, 0);
}

#[test]
fn an_endpoint_that_went_leaves_nothing_to_the_next_on_its_seat() {
    let index = index(1 << 10);
    let asked = chain(&index, &upto(20));
    let mut numbers = HashSet::new();
    for _ in 0..2 * SEATS {
        let seat = index.seat().unwrap();
        assert_eq!(index.held(&asked).by(&seat), 0);
        index.learn(&asked, &seat);
        assert_eq!(index.held(&asked).by(&seat), 20);
        numbers.insert(seat.number());
    }
    assert_eq!(numbers.len(), SEATS, "seats are taken in turn until they are cleaned");
    let taken: Vec<_> = std::iter::from_fn(|| index.seat()).collect();
    assert_eq!(taken.len(), SEATS);
    assert!(index.seat().is_none());
}

#[test]
fn what_an_endpoint_forgets_is_not_told_even_before_anybody_tidies() {
    let index = index(1 << 10);
    let (one, two) = (index.seat().unwrap(), index.seat().unwrap());
    let asked = chain(&index, &upto(20));
    index.learn(&asked, &one);
    index.learn(&asked, &two);
    index.forget(&one);
    index.learn(&asked, &one);
    let held = index.held(&asked);
    assert_eq!((held.by(&one), held.by(&two)), (0, 20));
    index.tidy();
    assert!(!index.is_untidy());
    assert_eq!(index.held(&asked).by(&one), 0);
    index.learn(&asked, &one);
    assert_eq!(index.held(&asked).by(&one), 20);
}

#[test]
fn an_endpoint_keeps_what_it_uses_and_forgets_what_its_engine_has_no_room_for() {
    let index = index(1 << 14);
    let seat = index.seat().unwrap();
    seat.holds(1000);
    let (hot, cold) = (chain(&index, &upto(50)), chain(&index, &[77; 50]));
    index.learn(&cold, &seat);
    for other in 0..40 {
        index.learn(&hot, &seat);
        let others: Vec<u32> = (1000 * other + 1000..).take(50).collect();
        index.learn(&chain(&index, &others), &seat);
        if index.is_untidy() {
            index.tidy();
        }
    }
    let held = |asked: &Chain| index.held(asked).by(&seat);
    assert_eq!((held(&hot), held(&cold)), (50, 0));
    index.wrote(&seat, 500);
    index.tidy();
    index.wrote(&seat, 500);
    index.tidy();
    assert_eq!(held(&hot), 0, "answers take room, too");
}

#[test]
fn a_full_table_forgets_ends_before_beginnings() {
    let index = index(512);
    let seat = index.seat().unwrap();
    let asked = chain(&index, &upto(2000));
    index.learn(&asked, &seat);
    let (used, capacity) = index.sizes();
    assert!(used <= capacity, "{used}");
    // The last block is learned first, so the first 100 came when the table was full of later ones.
    assert_eq!(index.held(&chain(&index, &upto(100))).by(&seat), 100);
}

#[test]
fn an_index_says_what_a_naive_one_says() {
    let mut random = fastrand::Rng::with_seed(11);
    for round in 0..20 {
        let index = index(1 << 14);
        let seats: Vec<_> = (0..100).map(|_| index.seat().unwrap()).collect();
        let mut naive: HashSet<(Vec<u32>, u8)> = HashSet::new();
        let mut prompts = vec![Vec::new()];
        for _ in 0..60 {
            let words = grown(&mut random, &prompts);
            let seat = &seats[random.usize(..seats.len().min(1 + 5 * round))];
            index.learn(&chain(&index, &words), seat);
            naive.extend((1..=words.len()).map(|depth| (words[..depth].to_vec(), seat.number())));
            prompts.push(words);
            let asked = grown(&mut random, &prompts);
            let held = index.held(&chain(&index, &asked));
            for seat in &seats {
                let has = |depth: &usize| naive.contains(&(asked[..*depth].to_vec(), seat.number()));
                let expected = (1..=asked.len()).take_while(has).count();
                assert_eq!(usize::from(held.by(seat)), expected, "round {round}");
            }
        }
    }
}

/// A prompt that begins like one before, up to some place, and goes on in its own way.
fn grown(random: &mut fastrand::Rng, prompts: &[Vec<u32>]) -> Vec<u32> {
    let before = &prompts[random.usize(..prompts.len())];
    let mut words = before[..random.usize(..=before.len())].to_vec();
    words.extend((0..random.usize(1..20)).map(|_| random.u32(..3)));
    words
}

#[test]
fn however_small_its_table_and_whatever_is_forgotten_an_index_never_claims_what_was_not_learned() {
    let mut random = fastrand::Rng::with_seed(12);
    for capacity in [7, 64, 512] {
        let index = index(capacity);
        let mut seats: Vec<_> = (0..40).map(|_| index.seat().unwrap()).collect();
        let mut learned: HashSet<(Vec<u32>, usize)> = HashSet::new();
        let mut prompts = vec![Vec::new()];
        for _ in 0..1500 {
            let (words, place) = (grown(&mut random, &prompts), random.usize(..seats.len()));
            match random.u8(..20) {
                0 => {
                    seats[place] = index.seat().unwrap();
                    learned.retain(|(_, of)| *of != place);
                }
                1 => {
                    index.forget(&seats[place]);
                    learned.retain(|(_, of)| *of != place);
                }
                2 => seats[place].holds(random.u32(..100)),
                3 => index.tidy(),
                _ => {
                    index.learn(&chain(&index, &words), &seats[place]);
                    learned.extend((1..=words.len()).map(|depth| (words[..depth].to_vec(), place)));
                }
            }
            let asked = grown(&mut random, &prompts);
            let held = index.held(&chain(&index, &asked));
            for (place, seat) in seats.iter().enumerate() {
                let depth = usize::from(held.by(seat));
                assert!(depth == 0 || learned.contains(&(asked[..depth].to_vec(), place)), "{capacity}: {depth}");
            }
            if prompts.len() < 200 {
                prompts.push(words);
            }
        }
    }
}

#[test]
fn whoever_reads_while_others_write_is_told_nothing_that_was_not_learned() {
    // One bucket, so that every block that is learned takes the place of another.
    let index = index(7);
    let seats: Vec<_> = (0..4).map(|_| index.seat().unwrap()).collect();
    // Each seat has its own prompts, so that one that is told of another's is told wrong.
    let prompts: Vec<Vec<Chain>> =
        (0..4).map(|seat| (0..6).map(|n| chain(&index, &[seat * 100 + n, 1])).collect()).collect();
    std::thread::scope(|threads| {
        for (seat, own) in seats.iter().zip(&prompts) {
            let index = &index;
            threads.spawn(move || (0..10_000).for_each(|n| index.learn(&own[n % own.len()], seat)));
        }
        for round in 0..20_000 {
            let of = round % 4;
            let held = index.held(&prompts[of][round % 6]);
            for (other, seat) in seats.iter().enumerate() {
                assert!(other == of || held.by(seat) == 0, "{round}");
            }
        }
    });
    // And none was left with another's entry.
    for (of, own) in prompts.iter().enumerate() {
        let told = |seat: &Seat| own.iter().any(|asked| index.held(asked).by(seat) > 0);
        assert!(seats.iter().enumerate().all(|(other, seat)| other == of || !told(seat)));
    }
}

#[test]
fn a_look_up_allocates_nothing() {
    let index = index(1 << 14);
    let seats: Vec<_> = (0..100).map(|_| index.seat().unwrap()).collect();
    let asked = chain(&index, &upto(2000));
    for (seat, depth) in seats.iter().zip([2000, 300, 1200, 7].into_iter().cycle()) {
        index.learn(&chain(&index, &upto(depth)), seat);
    }
    let counted = allocation_counter::measure(|| {
        std::hint::black_box(index.held(&asked));
        index.learn(&asked, &seats[0]);
    });
    assert_eq!(counted.count_total, 0);
}
