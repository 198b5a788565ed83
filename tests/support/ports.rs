//! Ports for servers of tests: no two get the same, whether tests run in this process or in another.
//!
//! A process takes a block of ports for itself, which it marks with a UDP socket on the block's first port, and hands
//! them out in turn. They lie below those that the system gives to connections.

use std::net::{TcpListener, UdpSocket};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, Ordering};

const BLOCK: u16 = 1000;

struct Block {
    first: u16,
    given: AtomicU16,
    _mark: UdpSocket,
}

static OURS: LazyLock<Block> = LazyLock::new(|| {
    let marked = |first| Some(Block { first, given: AtomicU16::new(0), _mark: mark(first)? });
    (10_000..32_000).step_by(usize::from(BLOCK)).find_map(marked).expect("22 processes run tests")
});

fn mark(port: u16) -> Option<UdpSocket> {
    UdpSocket::bind(("127.0.0.1", port)).ok()
}

/// A port that nobody listens on, that no other test gets for a long time, and that the system gives to no connection.
pub fn free_port() -> u16 {
    let next = || OURS.first + 1 + OURS.given.fetch_add(1, Ordering::Relaxed) % (BLOCK - 1);
    std::iter::repeat_with(next).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).unwrap()
}
