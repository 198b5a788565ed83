//! How much memory there is, how much of it this process has, and when that is too much.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::house::House;

/// How often the process looks at itself.
const EVERY: Duration = Duration::from_millis(250);

/// Looks at the process's memory until it ends: above the ceiling new requests are refused, until a tenth of it is
/// free again.
pub async fn watch(house: Arc<House>) {
    let ceiling = house.settings.memory_ceiling();
    loop {
        let resident = resident();
        let was = house.state.shedding.load(Ordering::Relaxed);
        let sheds = resident > if was { ceiling / 10 * 9 } else { ceiling };
        if sheds != was {
            tracing::warn!(resident, ceiling, sheds, "memory ceiling");
            house.state.shedding.store(sheds, Ordering::Relaxed);
        }
        house.telemetry.memory(resident, sheds);
        if sheds {
            give_back();
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Makes the allocator return what is free to the system: it looks for that only when a large piece comes back to
/// it, and while everything is refused none does. The piece is never touched, so it costs no memory.
fn give_back() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(PIECE)));
}

const PIECE: usize = 64 << 20;

/// Bytes this process may have: the container's limit, or the machine's memory.
pub fn available() -> u64 {
    let machine = machine_bytes().unwrap_or(u64::MAX);
    let container = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit = container.iter().find_map(|path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok());
    machine.min(limit.unwrap_or(u64::MAX))
}

/// Bytes of this process that are resident.
pub fn resident() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm").ok().and_then(|text| text.split(' ').nth(1)?.parse().ok());
    pages.unwrap_or(0_u64) * PAGE
}

const PAGE: u64 = 4096;

fn machine_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_less_than_there_is() {
        assert!(resident() > 0 && resident() < available());
    }
}
