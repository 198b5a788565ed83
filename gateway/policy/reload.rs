//! Reload: watch -> compile -> swap. The last good policy stays until a better one has been compiled whole.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use notify_debouncer_full::notify::RecursiveMode;
use notify_debouncer_full::{DebounceEventResult, new_debouncer};
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::{mpsc, watch};

use super::kept::Kept;
use super::{Policy, Problems, World, compile_in, read};
use crate::audit::journal::By;
use crate::house::House;

/// The policy in force.
#[derive(Debug, Default)]
pub struct InForce {
    policy: ArcSwapOption<Policy>,
    /// Held from reading a file to its swap, so that an older reading cannot overtake a newer one.
    loading: Mutex<()>,
    last: Mutex<Last>,
    changed: watch::Sender<u64>,
}

/// What the newest load came to.
#[derive(Clone, Debug, Default)]
pub struct Last {
    /// When the policy in force was loaded.
    pub loaded: Option<SystemTime>,
    /// What was wrong with the newest file, if it was refused.
    pub problems: Vec<String>,
}

impl InForce {
    /// The policy of this moment. Before the first one it is empty: everything gets 404.
    pub fn get(&self) -> Arc<Policy> {
        self.policy.load_full().unwrap_or_else(|| Arc::new(Policy::empty()))
    }

    /// Tells of each policy that comes into force from now on.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// What the newest load came to.
    pub fn last(&self) -> Last {
        self.last.lock().clone()
    }
}

/// What a reload did.
#[derive(Debug)]
pub enum Reloaded {
    /// A new policy is in force: its revision and hash.
    Swapped(u64, String),
    /// The policy in force is the same already.
    Unchanged,
}

/// Puts `policy` in force.
pub fn swap(house: &House, mut policy: Policy, by: By) -> Reloaded {
    let mut last = house.policy.last.lock();
    let before = house.policy.policy.load_full();
    last.problems.clear();
    if before.as_ref().is_some_and(|before| before.hash == policy.hash) {
        house.telemetry.policy_kept();
        return Reloaded::Unchanged;
    }
    let from = before.as_ref().map(|before| before.hash.clone());
    for warning in &policy.warnings {
        tracing::warn!("{warning}");
    }
    let revision = before.map_or(1, |before| before.revision + 1);
    let hash = policy.hash.clone();
    policy.revision = revision;
    if let Some(journal) = &house.journal {
        journal.configure(&policy.audit);
    }
    let open = policy.authenticators.is_none() && !house.settings.is_local();
    let unseen = policy.asks_for_certificates() && !house.settings.takes_certificates();
    house.policy.policy.store(Some(Arc::new(policy)));
    house.policy.changed.send_replace(revision);
    last.loaded = Some(SystemTime::now());
    drop(last);
    house.telemetry.policy_loaded(revision, &hash);
    forget(house);
    house.act("reload", by, json!({"from": from, "to": hash, "revision": revision}));
    tracing::info!(revision, hash = %&hash[..12], "policy in force");
    if open {
        tracing::warn!(
            "everybody who reaches a listener may ask, and nobody is known: give the policy `authenticators`"
        );
    }
    if unseen {
        tracing::warn!("no listener takes client certificates, which the policy knows callers by: name `client_ca`");
    }
    Reloaded::Swapped(revision, hash)
}

/// Puts the first policy in force: that of the file at `path`, or, if it is broken and the settings say so, the last
/// that was good.
pub fn start(house: &House, path: &Path) -> Result<(), Problems> {
    let by = || By::itself("process");
    let Err(problems) = put_in_force(house, path, by()) else { return Ok(()) };
    let Some(text) = Kept::of(house, path).and_then(|kept| kept.text().ok()) else { return Err(problems) };
    // What is wrong with the file is what has to be mended, whatever may be wrong with the other.
    let Ok(policy) = compiled(house, path, &text) else { return Err(problems) };
    swap(house, policy, by());
    refused(house, path, by(), &problems);
    Ok(())
}

/// Loads the file at `path` and puts it in force, or leaves everything as it is and says what is wrong.
pub fn reload(house: &House, path: &Path, by: By) -> Result<Reloaded, Problems> {
    let _one_at_a_time = house.policy.loading.lock();
    put_in_force(house, path, by.clone()).inspect_err(|problems| {
        forget(house);
        refused(house, path, by, problems);
    })
}

fn put_in_force(house: &House, path: &Path, by: By) -> Result<Reloaded, Problems> {
    let text = read(path)?;
    let done = swap(house, compiled(house, path, &text)?, by);
    if let (Some(kept), Reloaded::Swapped(..)) = (Kept::of(house, path), &done)
        && let Err(error) = kept.keep(&text)
    {
        tracing::warn!(%error, ?kept, "this policy cannot be kept for a start with a broken file");
    }
    Ok(done)
}

fn compiled(house: &House, path: &Path, text: &str) -> Result<Policy, Problems> {
    let env = |name: &str| std::env::var(name).ok();
    compile_in(path.parent(), text, &World::new(&env, &house.state, &house.telemetry, &house.settings))
}

/// What the policy in force does not name is forgotten, and what one that was refused has left.
fn forget(house: &House) {
    house.state.sweep(&house.telemetry);
    house.telemetry.keep(&house.policy.get());
}

/// Tells everybody what is wrong with the newest file.
fn refused(house: &House, path: &Path, by: By, problems: &Problems) {
    house.telemetry.policy_refused();
    let lines = problems.lines(&path.display().to_string());
    for line in &lines {
        tracing::error!("{line}");
    }
    tracing::error!("the policy was refused; the last good one is in force");
    house.act("reload_refused", by, json!({"problems": lines}));
    house.policy.last.lock().problems = lines;
}

/// Why the file should be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nudge {
    /// Something changed on the disk, or enough time went by.
    Maybe,
    /// Somebody asked.
    Asked,
}

/// Watches the file until the process ends: its directory (so that atomic renames and a mounted ConfigMap's symlink
/// swap are seen), SIGHUP, and every ten seconds in case the file system tells nothing.
///
/// `others` are files that are looked at too; `changed` is called whenever anything was read again.
pub async fn watch(house: Arc<House>, path: PathBuf, others: Vec<PathBuf>, changed: impl Fn() + Send) {
    let (sender, mut nudges) = mpsc::channel(8);
    let mut watched = Watched::new(sender)
        .inspect_err(|error| tracing::warn!(%error, "no directory can be watched; files are read every 10 s"))
        .ok();
    let mut hangups = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()).ok();
    let mut seen = fingerprint(&house, &path, &others);
    loop {
        if let Some(watched) = &mut watched {
            watched.add([&path].into_iter().chain(&house.policy.get().secret_files));
        }
        let nudge = tokio::select! {
            nudge = nudges.recv() => nudge.unwrap_or(Nudge::Maybe),
            () = hangup(&mut hangups) => Nudge::Asked,
            () = tokio::time::sleep(Duration::from_secs(10)) => Nudge::Maybe,
        };
        let now = fingerprint(&house, &path, &others);
        if nudge == Nudge::Maybe && now == seen {
            continue;
        }
        seen = now;
        let by = By::itself(if nudge == Nudge::Asked { "signal" } else { "file" });
        let _told_in_the_log = reload(&house, &path, by);
        changed();
    }
}

async fn hangup(signal: &mut Option<tokio::signal::unix::Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// The directories that are watched: that of the policy, and those of the files that it names.
struct Watched {
    watcher: notify_debouncer_full::Debouncer<
        notify_debouncer_full::notify::RecommendedWatcher,
        notify_debouncer_full::RecommendedCache,
    >,
    directories: HashSet<PathBuf>,
}

impl Watched {
    fn new(sender: mpsc::Sender<Nudge>) -> notify_debouncer_full::notify::Result<Self> {
        let tell = move |_: DebounceEventResult| {
            // A full channel holds a nudge already.
            let _ = sender.try_send(Nudge::Maybe);
        };
        let watcher = new_debouncer(Duration::from_millis(200), None, tell)?;
        Ok(Self { watcher, directories: HashSet::new() })
    }

    /// Watches the directories of these files too.
    fn add<'a>(&mut self, files: impl Iterator<Item = &'a PathBuf>) {
        for file in files {
            let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if !self.directories.insert(directory.to_owned()) {
                continue;
            }
            if let Err(error) = self.watcher.watch(directory, RecursiveMode::NonRecursive) {
                tracing::warn!(%error, ?directory, "this directory cannot be watched; its files are read every 10 s");
            }
        }
    }
}

/// The contents of the file, of every secret file that the policy in force names, and of `others`.
fn fingerprint(house: &House, path: &Path, others: &[PathBuf]) -> Vec<Option<Vec<u8>>> {
    let policy = house.policy.get();
    std::iter::once(path.to_owned())
        .chain(policy.secret_files.iter().chain(others).cloned())
        .map(|path| std::fs::read(path).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Settings;

    fn write(path: &Path, pool: &str) {
        let text = format!(
            "version: 1\npools:\n  {pool}: {{upstreams: [{{url: 'http://127.0.0.1:1'}}]}}\nmodels: [{{name: m, pool: {pool}}}]\n"
        );
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn a_broken_policy_changes_nothing_and_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("policy.yaml");
        let house = House::new(Settings::default());
        write(&path, "good");
        assert!(matches!(reload(&house, &path, By::itself("file")), Ok(Reloaded::Swapped(1, _))));
        assert!(matches!(reload(&house, &path, By::itself("file")), Ok(Reloaded::Unchanged)));
        std::fs::write(&path, "version: 1\npools: {p: {}}\n").unwrap();
        assert!(reload(&house, &path, By::itself("file")).is_err());
        assert!(house.policy.get().pools.contains_key("good"));
        assert!(house.policy.last().problems[0].contains("policy.yaml:2:"), "{:?}", house.policy.last());
        write(&path, "better");
        assert!(matches!(reload(&house, &path, By::itself("file")), Ok(Reloaded::Swapped(2, _))));
        assert!(house.policy.last().problems.is_empty());
        assert_eq!(house.state.sizes(), (1, 1), "what no policy names is forgotten");
    }

    /// A policy in which every name is one of its own.
    fn named(n: usize, broken: bool) -> String {
        let version = if broken { 2 } else { 1 };
        format!(
            "version: {version}
pools: {{pool{n}: {{upstreams: [{{name: upstream{n}, url: 'http://127.0.0.1:{port}'}}]}}}}
models: [{{name: model{n}, pool: pool{n}}}]
routers: {{router{n}: {{ask: [{{cel: {{name: rule{n}, when: 'true', model: model{n}}}}}], default: model{n}}}}}
tenants: {{tenant{n}: {{}}}}
limits: [{{name: limit{n}, each: [user], requests: 1, per: 1m}}]
guardrails: [{{name: guard{n}, in: [prompt.user], verdict: flag, words: {{list: [word{n}]}}}}]
telemetry: {{tenants: [tenant{n}]}}
",
            port = n + 1
        )
    }

    #[test]
    fn names_come_and_go_and_nothing_is_left_of_those_that_went() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("policy.yaml");
        let house = House::new(Settings::default());
        let mut sizes = Vec::new();
        for n in 0..8 {
            let broken = n % 3 == 2;
            std::fs::write(&path, named(n, broken)).unwrap();
            let loaded = reload(&house, &path, By::itself("file"));
            assert_eq!(loaded.is_err(), broken, "{loaded:?}");
            house.telemetry.tables(house.tables());
            let page = house.telemetry.text();
            let in_force = if broken { n - 1 } else { n };
            let is_named = |word: &str, n: usize| page.contains(&format!("\"{word}{n}\""));
            for word in ["pool", "upstream", "guard", "limit"] {
                let left: Vec<usize> = (0..8).filter(|other| is_named(word, *other)).collect();
                assert_eq!(left, [in_force], "{word}");
            }
            sizes.push(page.lines().count());
        }
        assert!(sizes.iter().all(|size| *size == sizes[0]), "{sizes:?}");
    }
}
