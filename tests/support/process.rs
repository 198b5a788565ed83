//! The `infergate` command with any arguments: what it says, and how it ends.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// A command that runs in an empty directory of its own; it is killed when dropped.
pub struct Process {
    child: Child,
    directory: TempDir,
}

impl Process {
    /// Starts `infergate` with these arguments and, beyond the usual, this environment.
    pub fn start(arguments: &[&str], env: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| File::create(directory.path().join(name)).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_infergate"))
            .args(arguments)
            .env("INFERGATE_JOURNAL", directory.path().join("journal"))
            .envs(env.iter().copied())
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(file(".out"))
            .stderr(file(".err"))
            .spawn()
            .unwrap();
        Self { child, directory }
    }

    /// Runs it to its end: the exit code, the standard output, the standard error.
    pub fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
        let mut process = Self::start(arguments, &[]);
        let start = Instant::now();
        while process.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(20), "{arguments:?} does not end: {}", process.err());
            std::thread::sleep(Duration::from_millis(5));
        }
        (process.child.wait().unwrap().code(), process.out(), process.err())
    }

    /// What it has said so far.
    pub fn out(&self) -> String {
        self.read(".out")
    }

    /// What it has complained about so far.
    pub fn err(&self) -> String {
        self.read(".err")
    }

    /// Where it runs.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.directory.path().join(name)).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
