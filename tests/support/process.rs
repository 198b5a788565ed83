//! The `infergate` command with any arguments: what it says, and how it ends.

use std::fs::File;
use std::io::Write;
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
        let child = Self::command(arguments)
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

    /// A command that is not started yet.
    pub fn command(arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_infergate"));
        command.args(arguments);
        command
    }

    /// Runs it to its end with this on its standard input.
    pub fn given(arguments: &[&str], input: &str) -> (Option<i32>, String, String) {
        Self::fed(Self::command(arguments), input)
    }

    /// The same of a command that was made ready.
    pub fn fed(mut command: Command, input: &str) -> (Option<i32>, String, String) {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let done = child.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (done.status.code(), text(done.stdout), text(done.stderr))
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
