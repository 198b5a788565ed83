//! A DNS server over UDP with one name's A records, which a test changes as it likes.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

/// A running DNS server; it stops when dropped.
pub struct Dns {
    /// Where it listens.
    pub address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
    serving: JoinHandle<()>,
}

/// What a DNS server says to every question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Says {
    /// These addresses.
    Addresses(Vec<Ipv4Addr>),
    /// That there are none.
    Empty,
    /// That there is no such name.
    NoSuchName,
    /// That it cannot tell.
    Failure,
    /// Nothing at all.
    Nothing,
}

struct Zone {
    says: Says,
    ttl_s: u32,
    asked: usize,
}

impl Dns {
    /// A server whose every name has these addresses.
    pub async fn start(addresses: &[Ipv4Addr], ttl_s: u32) -> Self {
        Self::saying(Says::Addresses(addresses.to_vec()), ttl_s).await
    }

    /// A server that says this.
    pub async fn saying(says: Says, ttl_s: u32) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let zone = Arc::new(Mutex::new(Zone { says, ttl_s, asked: 0 }));
        let serving = tokio::spawn(serve(socket, zone.clone()));
        Self { address, zone, serving }
    }

    /// Says something else from now on.
    pub fn says(&self, says: Says) {
        self.zone.lock().unwrap().says = says;
    }

    /// How many questions it got.
    pub fn asked(&self) -> usize {
        self.zone.lock().unwrap().asked
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(socket: UdpSocket, zone: Arc<Mutex<Zone>>) {
    let mut question = [0; 1500];
    while let Ok((length, from)) = socket.recv_from(&mut question).await {
        let answer = answer(&question[..length], &mut zone.lock().unwrap());
        if let Some(answer) = answer {
            let _ = socket.send_to(&answer, from).await;
        }
    }
}

/// RFC 1035, 4.1: header, the question as it came, the records (whose name points back at the question).
fn answer(question: &[u8], zone: &mut Zone) -> Option<Vec<u8>> {
    let name_end = 12 + question.get(12..)?.iter().position(|byte| *byte == 0)? + 1;
    let asks_for_a = question.get(name_end..name_end + 2)? == [0, 1];
    zone.asked += 1;
    let none = Vec::new();
    let (code, addresses) = match &zone.says {
        Says::Addresses(addresses) => (0, addresses),
        Says::Empty => (0, &none),
        Says::NoSuchName => (3, &none),
        Says::Failure => (2, &none),
        Says::Nothing => return None,
    };
    let addresses = if asks_for_a { addresses } else { &none };
    let mut out = vec![question[0], question[1], 0x81, 0x80 | code, 0, 1, 0, addresses.len() as u8, 0, 0, 0, 0];
    out.extend_from_slice(question.get(12..name_end + 4)?);
    for address in addresses {
        out.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1]);
        out.extend_from_slice(&zone.ttl_s.to_be_bytes());
        out.extend_from_slice(&[0, 4]);
        out.extend_from_slice(&address.octets());
    }
    Some(out)
}
