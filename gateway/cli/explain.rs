//! `infergate explain`: what happened to this request, in a few lines.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::Value;

use super::counted;
use crate::audit::capture::{self, Mark};
use crate::audit::search::{self, Filter};
use crate::audit::{read, story};

/// The longest answer that is read.
const LONGEST: u64 = 8 << 20;
/// How long the gateway may look for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Explain one request.
#[derive(Args)]
pub(super) struct Explain {
    /// The request's id, as in x-request-id of its answer; with --directory also what the client called it
    #[arg(value_name = "REQUEST_ID")]
    id: String,
    /// Read the journal in this directory; no gateway needs to run
    #[arg(long, value_name = "DIR", conflicts_with = "admin")]
    directory: Option<PathBuf>,
    /// Ask the gateway with this admin listener, IP:PORT or unix:PATH
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9090")]
    admin: String,
    /// The environment variable with an operator's key, where the gateway asks for one
    #[arg(long, value_name = "NAME", default_value = "INFERGATE_ADMIN_KEY")]
    key_env: String,
    /// Print the record itself
    #[arg(long)]
    json: bool,
    /// Print what was captured of its text too (policy: audit.capture)
    #[arg(long, requires = "directory")]
    text: bool,
}

impl Explain {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        let record = match &self.directory {
            Some(directory) => self.look(directory)?,
            None => ask(&self.admin, &self.id, std::env::var(&self.key_env).ok().as_deref())?,
        };
        let text = String::from_utf8_lossy(record.trim_ascii_end()).into_owned();
        if self.json {
            println!("{}", shown(&text, io::stdout().is_terminal()));
            return Ok(ExitCode::SUCCESS);
        }
        let record: Value = serde_json::from_str(&text).map_err(|error| format!("this is no record: {error}"))?;
        print!("{}", story::tell(&record));
        if let Some(directory) = self.directory.as_ref().filter(|_| self.text) {
            print_text(directory, &record)?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Looks in the journal itself, first for our own id and then for the client's.
    fn look(&self, directory: &Path) -> Result<Vec<u8>, String> {
        let unreadable = |error: io::Error| format!("the journal in {} cannot be read: {error}", directory.display());
        if let Some(record) = read::find(directory, &self.id).map_err(unreadable)? {
            return Ok(record);
        }
        let mut filter = Filter::default();
        filter.with(&["client.request_id"], &self.id);
        let (mut lines, count) = search::newest(directory, &filter, 1).map_err(unreadable)?;
        if count > 1 {
            eprintln!("{} have the client's id {}; this is the newest", counted(count, "request"), self.id);
        }
        lines.pop_back().ok_or_else(|| {
            format!(
                "the journal in {} has no request {}: it is still running, older than what is kept, or of another gateway",
                directory.display(),
                self.id
            )
        })
    }
}

/// What was captured of a request, and whether its record proves it.
fn print_text(directory: &Path, record: &Value) -> Result<(), String> {
    let unreadable = |error: io::Error| format!("the captures in {} cannot be read: {error}", directory.display());
    let Ok(mark) = serde_json::from_value::<Mark>(record["capture"].clone()) else {
        return Err("nothing of its text was captured: the policy did not ask for it".to_owned());
    };
    let id = record["id"].as_str().unwrap_or_default();
    let Some(captured) = capture::find(directory, id).map_err(unreadable)? else {
        return Err("its text was captured and is gone: older than what is kept, or removed".to_owned());
    };
    let cut = if mark.cut { ", cut at the policy's bytes_max" } else { "" };
    for (name, text, sum) in [("request", captured.request, mark.request), ("answer", captured.answer, mark.answer)] {
        let proof = match capture::sum(text.as_bytes()) == sum {
            true => "as the record proves",
            // Odd bytes are replaced on disk.
            false if text.contains('\u{fffd}') => "not all of it is text, so the record cannot prove it",
            false => "CHANGED: it is not what the record proves",
        };
        println!(
            "\n--- {name} ({}, {proof}{cut})\n{}",
            counted(text.len() as u64, "byte"),
            shown(&text, io::stdout().is_terminal())
        );
    }
    Ok(())
}

/// What clients and models wrote, as it is; on a terminal without what could upset that.
fn shown(text: &str, terminal: bool) -> Cow<'_, str> {
    if terminal { story::plain(text, &['\n', '\t']).into() } else { text.into() }
}

/// Asks the admin listener of a running gateway.
fn ask(address: &str, id: &str, key: Option<&str>) -> Result<Vec<u8>, String> {
    let answer = exchange(address, id, key).map_err(|error| {
        format!("no gateway answers on {address}: {error}; give its admin listener with --admin, or --directory DIR")
    })?;
    let (status, body) = parse(&answer).ok_or_else(|| format!("{address} does not answer like a gateway"))?;
    match status {
        200 => Ok(body.to_vec()),
        401 | 403 => {
            Err(format!("the gateway on {address} asks for an operator's key: name its variable with --key-env"))
        }
        status => Err(format!(
            "the gateway on {address} does not know it ({status}: {}); a request that still runs has no record, and \
             what the client called it is only found with --directory DIR",
            String::from_utf8_lossy(body).trim()
        )),
    }
}

fn exchange(address: &str, id: &str, key: Option<&str>) -> io::Result<Vec<u8>> {
    match address.strip_prefix("unix:") {
        Some(path) => {
            let socket = UnixStream::connect(path)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            get(socket, id, key)
        }
        None => {
            let socket = TcpStream::connect(address)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            get(socket, id, key)
        }
    }
}

/// One request of HTTP/1.0: the other end closes the connection behind its answer.
fn get(mut socket: impl Read + Write, id: &str, key: Option<&str>) -> io::Result<Vec<u8>> {
    let path = format!("/admin/v1/requests/{}", escaped(id));
    let key = key.map(|key| format!("authorization: Bearer {}\r\n", key.trim())).unwrap_or_default();
    let request = format!("GET {path} HTTP/1.0\r\nhost: localhost\r\naccept: application/json\r\n{key}\r\n");
    socket.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    socket.take(LONGEST).read_to_end(&mut answer)?;
    Ok(answer)
}

/// `text` as a segment of a path.
fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// The status and the body of an answer.
fn parse(answer: &[u8]) -> Option<(u16, &[u8])> {
    let end = memchr::memmem::find(answer, b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some((status, &answer[end + 4..]))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_running_gateway_is_asked_in_plain_http() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let read = socket.read(&mut request).unwrap();
            socket.write_all(b"HTTP/1.0 404 Not Found\r\na: b\r\n\r\nno such request\n").unwrap();
            String::from_utf8_lossy(&request[..read]).into_owned()
        });
        let error = ask(&address, "a b/c", Some("ig_x")).unwrap_err();
        assert!(error.contains("(404: no such request)") && error.contains("--directory"), "{error}");
        let request = server.join().unwrap();
        assert!(request.starts_with("GET /admin/v1/requests/a%20b%2Fc HTTP/1.0\r\n"), "{request}");
        assert!(request.ends_with("\r\nauthorization: Bearer ig_x\r\n\r\n"), "{request}");
    }

    #[test]
    fn captured_text_cannot_upset_a_terminal() {
        let text = "one\n\ttwo \u{1b}]0;owned\u{7} \u{9b}2J\u{7f}\r\u{8}é";
        assert_eq!(shown(text, true), "one\n\ttwo \u{fffd}]0;owned\u{fffd} \u{fffd}2J\u{fffd}\u{fffd}\u{fffd}é");
        assert_eq!(shown(text, false), text, "a file gets what was captured");
    }

    #[test]
    fn where_no_gateway_runs_that_is_said() {
        let error = ask("127.0.0.1:1", "x", None).unwrap_err();
        assert!(error.starts_with("no gateway answers on 127.0.0.1:1") && error.contains("--admin"), "{error}");
    }
}
