//! Logs are for people: readable on a terminal, JSON lines elsewhere, their levels changed while the process runs.

use std::sync::Arc;

use parking_lot::Mutex;
use tracing::level_filters::LevelFilter;
use tracing_log::{AsLog, log};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, registry, reload};

/// The longest text that can name levels.
const LENGTH_MAX: usize = 4096;
/// What our libraries have to say is mostly the same at every start; their warnings are worth hearing.
const LIBRARIES: &str = "hickory_resolver=error,hickory_proto=error,h2=warn,hyper=warn,async_nats=warn";

/// The levels in force: a level for everything, or levels by module (`info,infergate=debug`).
#[derive(Clone, Debug)]
pub struct Levels {
    filter: reload::Handle<EnvFilter, Registry>,
    text: Arc<Mutex<String>>,
}

/// Sends logs to the standard error: lines for people, or JSON lines.
pub fn start(levels: &str, json: bool) -> Result<Levels, String> {
    let (filter, handle) = reload::Layer::new(filter(levels)?);
    let filtered = registry().with(filter);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let started = match json {
        true => filtered.with(lines.json().flatten_event(true)).try_init(),
        false => filtered.with(lines.with_target(false)).try_init(),
    };
    started.map_err(|error| format!("the log cannot be started: {error}"))?;
    Ok(Levels { filter: handle, text: Arc::new(Mutex::new(levels.to_owned())) })
}

impl Levels {
    /// The levels as they were last given.
    pub fn get(&self) -> String {
        self.text.lock().clone()
    }

    /// Puts other levels in force at once. The error says what is wrong; then nothing has changed.
    pub fn set(&self, levels: &str) -> Result<(), String> {
        let filter = filter(levels)?;
        let mut text = self.text.lock();
        self.filter.reload(filter).map_err(|error| error.to_string())?;
        // Libraries that log by the older interface ask this before they write.
        log::set_max_level(LevelFilter::current().as_log());
        levels.clone_into(&mut text);
        Ok(())
    }
}

/// One word is the level of everything but the libraries' chatter; anything longer means what it says.
fn filter(levels: &str) -> Result<EnvFilter, String> {
    if levels.len() > LENGTH_MAX {
        return Err(format!("more than {LENGTH_MAX} bytes"));
    }
    let directives: Vec<&str> = levels.split(',').map(str::trim).collect();
    directives.iter().copied().try_for_each(check)?;
    let all = match levels.contains(['=', ',']) {
        true => directives.join(","),
        false => format!("{levels},{},{LIBRARIES}", crate::relay::LOG_LEVELS),
    };
    EnvFilter::try_new(all).map_err(|error| error.to_string())
}

/// Whether `directive` says a level. The filter itself takes a mistyped level for a module's name.
fn check(directive: &str) -> Result<(), String> {
    let level = directive.rsplit('=').next().unwrap_or_default();
    match level.parse::<LevelFilter>() {
        // A number is one too, but nobody remembers which.
        Ok(_) if level.bytes().all(|byte| byte.is_ascii_alphabetic()) && !level.is_empty() => Ok(()),
        _ => Err(format!("`{level}` is no level: give error, warn, info, debug, trace or off, or MODULE=LEVEL")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(levels: &str) -> String {
        filter(levels).unwrap_err()
    }

    #[test]
    fn levels_are_one_for_all_or_one_for_each_module() {
        for good in ["info", "DEBUG", "off", "info,infergate=debug", "warn, infergate::relay=trace", "infergate=debug"]
        {
            assert!(filter(good).is_ok(), "{good}");
        }
        let all = filter("debug").unwrap().to_string();
        assert!(
            all.contains("debug")
                && all.contains("h2=warn")
                && crate::relay::LOG_LEVELS.split(',').all(|one| all.contains(one)),
            "{all}"
        );
        assert!(!filter("debug,h2=debug").unwrap().to_string().contains("warn"), "what is spelt out is meant");
    }

    #[test]
    fn what_is_no_level_is_refused_by_its_name() {
        assert!(refused("debgu").starts_with("`debgu` is no level"));
        assert!(refused("info,infergate").starts_with("`infergate` is no level"));
        assert!(refused("infergate=loud").starts_with("`loud` is no level"));
        assert!(refused("").starts_with("`` is no level"));
        assert!(refused("info,,debug").starts_with("`` is no level"));
        assert!(refused("3").starts_with("`3` is no level"));
        assert!(refused(&"info,".repeat(1000)).starts_with("more than"));
    }
}
