//! What the kernel says about a process and its cores: CPU time, resident memory, affinity.

use crate::Failure;
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

/// The kernel reports `stat` in hundredths of a second on every Linux there is.
const TICK: Duration = Duration::from_millis(10);

/// CPU time of all threads of a process, to the nanosecond.
///
/// Threads that have ended are missing: the proxies' threads live as long as they do, and
/// [`ticks`] shows whether that held.
pub fn time(pid: u32) -> Result<Duration, Failure> {
    let mut nanoseconds = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end between the listing and the reading.
        let Ok(line) = fs::read_to_string(task?.path().join("schedstat")) else {
            continue;
        };
        let on_a_core = line.split_whitespace().next().unwrap_or_default();
        nanoseconds += on_a_core.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

/// CPU time of a process, user and system, its ended threads included, to the clock tick.
pub fn ticks(pid: u32) -> Result<Duration, Failure> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name before this bracket may hold blanks; utime and stime are the 12th and 13th after it.
    let after = line.rsplit_once(')').ok_or("no process name")?.1;
    let ticks = after.split_whitespace().skip(11).take(2).map(str::parse::<u32>).sum::<Result<u32, _>>()?;
    Ok(TICK * ticks)
}

/// Resident memory of a process in KiB.
pub fn resident(pid: u32) -> Result<u64, Failure> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.ok_or("no VmRSS")?.parse()?)
}

/// Which cores the proxies and which the load side run on.
pub struct Cores {
    /// The proxies' core.
    pub proxy: String,
    /// Every other core.
    pub load: String,
}

impl Cores {
    /// Splits the cores this process may use; `None` if there is only one.
    fn split() -> Result<Option<Self>, Failure> {
        let status = fs::read_to_string("/proc/self/status")?;
        let list =
            status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).ok_or("no Cpus_allowed_list")?;
        let cores = listed(list.trim());
        let Some((proxy, rest)) = cores.split_first().filter(|(_, rest)| !rest.is_empty()) else {
            return Ok(None);
        };
        let rest: Vec<String> = rest.iter().map(u32::to_string).collect();
        Ok(Some(Self { proxy: proxy.to_string(), load: rest.join(",") }))
    }

    fn take_the_load_side(&self) -> Result<(), Failure> {
        let pid = std::process::id().to_string();
        run("taskset", &["--all-tasks", "-c", "-p", &self.load, &pid])
    }
}

/// Moves this process, and so every child that is not moved again, to the load side's cores, if there is more than one,
/// and asks for as many open files as it may have. Returns the cores, and how many files.
pub fn take_the_load_side() -> Result<(Option<Cores>, u64), Failure> {
    let cores = Cores::split()?;
    cores.iter().try_for_each(Cores::take_the_load_side)?;
    Ok((cores, raise_open_files()?))
}

/// `0-2,5` in full.
fn listed(list: &str) -> Vec<u32> {
    list.split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.parse().ok()?..=last.parse().ok()?)
        })
        .flatten()
        .collect()
}

/// Asks for as many open files as this process may have; children inherit it.
pub fn raise_open_files() -> Result<u64, Failure> {
    let limits = fs::read_to_string("/proc/self/limits")?;
    let hard = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .and_then(|line| line.split_whitespace().nth(1))
        .ok_or("no limit of open files")?;
    let wanted = hard.parse().unwrap_or(u64::MAX).min(65_536);
    let pid = std::process::id().to_string();
    run("prlimit", &["--pid", &pid, &format!("--nofile={wanted}:{hard}")])?;
    Ok(wanted)
}

/// Runs a program to its end.
pub fn run(program: &str, arguments: &[&str]) -> Result<(), Failure> {
    let status = Command::new(program)
        .args(arguments)
        .stdout(Stdio::null())
        .status()
        .map_err(|error| format!("{program} (of util-linux): {error}"))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{program} {}: {status}", arguments.join(" ")).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_cores_may_hold_ranges() {
        assert_eq!(listed("0-2,5"), [0, 1, 2, 5]);
        assert_eq!(listed("3"), [3]);
    }

    #[test]
    fn both_clocks_tell_the_same_time() -> Result<(), Failure> {
        let pid = std::process::id();
        let apart = time(pid)?.abs_diff(ticks(pid)?);
        assert!(apart < Duration::from_millis(100), "{apart:?} apart");
        Ok(())
    }
}
