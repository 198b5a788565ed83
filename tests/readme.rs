//! The README, the guides and the other pages say what is true. Each is carried out as a reader would do it: its files
//! written, its policies compiled, its commands run, in order, in one shell. `config/guides/README.md` tells how pages
//! are marked; what is not marked and cannot be carried out fails here.

use std::fmt::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::dns::Dns;
use crate::support::signer::Signer;
use crate::support::{Client, Gateway, free_port};

const HOME: &str = env!("CARGO_MANIFEST_DIR");
const PROGRAM: &str = env!("CARGO_BIN_EXE_infergate");
/// What a page's script begins with.
const SHELL: &str = include_str!("support/page.sh");
/// Longer than any page takes.
const LONGEST: Duration = Duration::from_secs(120);
/// Stands in a script's output before what a command of a `console` prints.
const MARK: char = '\u{1e}';
/// Fences that show something and say nothing that could be carried out.
const SHOWN: [&str; 6] = ["text", "json", "rust", "python", "ini", "dockerfile"];

fn infergate(arguments: &[&str]) -> (bool, String) {
    let done = Command::new(PROGRAM).args(arguments).output().unwrap();
    (done.status.success(), String::from_utf8(done.stdout).unwrap())
}

#[test]
fn the_reference_is_what_the_code_says() {
    for of in ["policy", "settings", "metrics", "headers", "commands"] {
        let file = if of == "policy" { "config/reference.md".to_owned() } else { format!("config/reference/{of}.md") };
        let (_, reference) = infergate(&["reference", "--of", of]);
        assert!(reference.lines().count() > 20, "{of}: {reference}");
        let page = std::fs::read_to_string(Path::new(HOME).join(&file)).unwrap();
        let told = format!("{file} is out of date: run `cargo run -- reference --of {of} --into {file}`");
        let (_, rest) = page.split_once("<!-- reference -->\n").unwrap();
        assert_eq!(rest.strip_prefix(&*reference), Some("<!-- /reference -->\n"), "{told}");
    }
}

#[test]
fn every_page_can_be_carried_out() {
    let pages = Page::all();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let told = std::sync::Mutex::new(Vec::new());
    let work = || {
        while let Some(page) = pages.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
            if let Err(why) = page.carry_out() {
                told.lock().unwrap().push(format!("{}: {why}", page.name));
            }
        }
    };
    std::thread::scope(|threads| (0..3).for_each(|_| drop(threads.spawn(work))));
    let told = told.into_inner().unwrap();
    assert!(told.is_empty(), "{}", told.join("\n\n"));
}

/// Examples name servers, keys and files that nobody ships: names lead to this machine, keys are made up, files are empty.
#[tokio::test]
async fn every_example_is_served() {
    let dns = Dns::start(&[Ipv4Addr::LOCALHOST], 60).await;
    let settings = format!("threads: 1\ndns_servers: ['{}']\n", dns.address);
    let beside = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = beside.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let keys = file("keys.yaml", "[]\n");
    let provider = serde_json::json!({"keys": [Signer::rsa().jwk("k")]}).to_string();
    let moved = [
        ("../prices.yaml", format!("{HOME}/config/prices.yaml")),
        ("/run/secrets/anthropic", file("anthropic", "a-key")),
        ("cluster-keys.json", file("keys.json", &provider)),
        ("file: keys.list.yaml", format!("file: {keys}")),
        ("file: keys.yaml", format!("file: {keys}")),
    ];
    let secret = "a secret of more than thirty-two characters";
    let env = ["INFERGATE_PEPPER", "INFERGATE_GUARDRAIL_KEY", "OPENAI_API_KEY", "GPU_KEY"].map(|name| (name, secret));
    let mut examples = 0;
    for entry in std::fs::read_dir(Path::new(HOME).join("config/examples")).unwrap() {
        let path = entry.unwrap().path();
        let policy = std::fs::read_to_string(&path).unwrap();
        let policy = moved.iter().fold(policy, |policy, (from, to)| policy.replace(from, to));
        let gateway = Gateway::spawn(&policy, &settings, &[], &env);
        gateway.ready().await;
        let answer = Client::h1().get(gateway.address, "/v1/models").await;
        assert!([200, 401].contains(&answer.status), "{}: {}", path.display(), answer.text());
        examples += 1;
    }
    assert!(examples >= 15);
}

#[test]
fn every_option_that_pages_name_is_one() {
    let pages = Page::all();
    let lines = pages.iter().flat_map(|page| page.fences()).filter(|fence| fence.is_shell()).flat_map(|fence| {
        let lines = fence.text.replace("\\\n", " ");
        lines.lines().map(str::to_owned).collect::<Vec<_>>()
    });
    let ours: Vec<String> = lines.filter_map(|line| Some(ours(&line)?.to_owned())).collect();
    assert!(ours.len() >= 30, "only {} commands were found", ours.len());
    for line in ours {
        let words =
            line.split([' ', '|', '<', '>']).take_while(|word| !word.starts_with('#')).filter(|word| !word.is_empty());
        let flags = words.clone().filter(|word| word.starts_with("--"));
        let mut subcommand: Vec<&str> = words.clone().take(1).collect();
        if ["audit", "guard", "key", "prices", "route", "import"].contains(&subcommand[0]) {
            subcommand.extend(words.clone().nth(1));
        }
        let (known, help) = infergate(&[&subcommand[..], &["--help"]].concat());
        assert!(known, "{line}");
        for flag in flags {
            assert!(help.contains(flag), "{line}: {flag}");
        }
    }
}

#[test]
fn every_link_leads_somewhere() {
    for page in Page::all() {
        let here = Path::new(HOME).join(&page.name);
        for link in page.text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            if path.contains("://") {
                continue;
            }
            let there = if path.is_empty() { here.clone() } else { here.parent().unwrap().join(path) };
            assert!(there.exists(), "{}: {link} leads nowhere", page.name);
            let text = if anchor.is_empty() { String::new() } else { std::fs::read_to_string(there).unwrap() };
            let found = anchor.is_empty() || text.lines().any(|line| is_heading(line, anchor));
            assert!(found, "{}: no heading is called {link}", page.name);
        }
    }
}

#[test]
fn the_index_lists_every_guide() {
    let index = std::fs::read_to_string(Path::new(HOME).join("config/guides/README.md")).unwrap();
    for page in Page::all().iter().filter_map(|page| page.name.strip_prefix("config/guides/")) {
        assert!(page == "README.md" || index.contains(&format!("]({page})")), "config/guides/README.md lacks {page}");
    }
}

#[test]
fn every_alert_has_a_line_in_the_runbook() {
    let alerts = std::fs::read_to_string(Path::new(HOME).join("docker/prometheus/alerts.yaml")).unwrap();
    let runbook = std::fs::read_to_string(Path::new(HOME).join("config/guides/incidents.md")).unwrap();
    let names: Vec<&str> = alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(names.len() > 20);
    for name in names {
        assert!(
            runbook.contains(&format!("`{name}`")),
            "config/guides/incidents.md does not say what to do about {name}"
        );
    }
}

/// What a line says behind `infergate`, where that is a command.
fn ours(line: &str) -> Option<&str> {
    let (before, behind) = line.split_once("infergate ")?;
    let before = before.trim_end();
    (before.is_empty() || before.ends_with(['$', '|', ';', '&', '('])).then_some(behind)
}

/// Whether a line is the heading that GitHub gives this anchor.
fn is_heading(line: &str, anchor: &str) -> bool {
    let Some(text) = line.starts_with('#').then(|| line.trim_start_matches('#').trim()) else { return false };
    let kept = text.to_lowercase().replace(' ', "-");
    kept.chars().filter(|letter| letter.is_alphanumeric() || "-_".contains(*letter)).eq(anchor.chars())
}

/// A page of the documentation.
struct Page {
    /// Its path below the repository.
    name: String,
    text: String,
}

/// A fenced block of a page.
struct Fence {
    /// The line on which it begins.
    line: usize,
    /// The word behind the fence: `sh`, `yaml`.
    language: String,
    /// What stands behind that word: a file, `fails`, `skipped: why`.
    mark: String,
    text: String,
}

impl Page {
    /// The pages at the top, then every guide.
    fn all() -> Vec<Self> {
        let named = |name: &Path| {
            let text = std::fs::read_to_string(Path::new(HOME).join(name)).unwrap();
            Self { name: name.display().to_string(), text }
        };
        let top = ["README.md", "CONTRIBUTING.md", "SECURITY.md"].map(PathBuf::from);
        let guides = std::fs::read_dir(Path::new(HOME).join("config/guides")).unwrap();
        let mut guides: Vec<PathBuf> =
            guides.map(|entry| Path::new("config/guides").join(entry.unwrap().file_name())).collect();
        guides.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
        guides.sort();
        top.iter().chain(&guides).map(|path| named(path)).collect()
    }

    fn fences(&self) -> Vec<Fence> {
        let mut fences: Vec<Fence> = Vec::new();
        let mut open = false;
        for (at, line) in self.text.lines().enumerate() {
            match line.strip_prefix("```") {
                Some(info) if !open => {
                    let (language, mark) = info.split_once(' ').unwrap_or((info, ""));
                    let (language, mark) = (language.to_owned(), mark.to_owned());
                    fences.push(Fence { line: at + 1, language, mark, text: String::new() });
                    open = true;
                }
                Some(_) => open = false,
                None if open => fences.last_mut().unwrap().text.extend([line, "\n"]),
                None => {}
            }
        }
        fences
    }

    /// Does all that it says, in a directory that has `config/` and `docker/` as the repository has them.
    fn carry_out(&self) -> Result<(), String> {
        let (script, shown) = self.script()?;
        let directory = tempfile::tempdir().unwrap();
        for copied in ["config", "docker"] {
            let copy = Command::new("cp").args(["-r", &format!("{HOME}/{copied}")]).arg(directory.path()).status();
            assert!(copy.unwrap().success());
        }
        let mut ports = Ports::default();
        let policy = directory.path().join("config/policy.yaml");
        let moved = ports.moved(&std::fs::read_to_string(&policy).unwrap());
        std::fs::write(&policy, moved).unwrap();
        let script = ports.moved(&format!("{SHELL}\n{script}\nat=end\n"));
        let (good, said) = run(&script, directory.path());
        if !good {
            return Err(format!("it cannot be carried out:\n{}", said.replace(MARK, "")));
        }
        let printed: Vec<&str> = said.split(MARK).skip(1).collect();
        assert_eq!(printed.len(), 2 * shown.len(), "{said}");
        for (printed, (line, shown)) in printed.chunks(2).zip(&shown) {
            fits(shown, printed[0]).map_err(|why| format!("line {line}: {why}"))?;
        }
        Ok(())
    }

    /// The page as a script of bash, and what each command of a `console` prints, with its line.
    fn script(&self) -> Result<(String, Vec<(usize, String)>), String> {
        let (mut script, mut shown) = (String::new(), Vec::new());
        for fence in self.fences() {
            let place = |why: &str| format!("line {}: {why}", fence.line);
            let _ = writeln!(script, "at='line {}'", fence.line);
            match (fence.language.as_str(), fence.mark.as_str()) {
                (_, mark) if mark.starts_with("skipped:") => {
                    let why = mark.strip_prefix("skipped:").unwrap_or_default().trim();
                    (why.len() > 10).then_some(()).ok_or_else(|| place("say why it is skipped"))?;
                }
                ("sh", "") => script += &format!("strict=yes\n{}strict=\n", fence.commands()),
                ("sh", "fails") => {
                    let _ = write!(
                        script,
                        "set +e\nstrict=yes\n{}status=$?\nstrict=\nset -e\n((status != 0))\n",
                        fence.commands()
                    );
                }
                ("console", "") => fence.console(&mut script, &mut shown),
                ("yaml", "") if fence.text.contains("version: 1") => {
                    fence.file(&mut script, ">", &format!("policy-{}.yaml", fence.line));
                }
                ("yaml", "") => {
                    let file = format!("policy-{}.yaml", fence.line);
                    let _ = writeln!(script, "cp .shipped {file}");
                    fence.file(&mut script, ">>", &file);
                }
                (language, "") if SHOWN.contains(&language) => {}
                (_, file) if !file.is_empty() => {
                    let (how, file) = file.strip_prefix(">> ").map_or((">", file), |file| (">>", file));
                    fence.file(&mut script, how, file);
                }
                (language, _) => return Err(place(&format!("what is ```{language}?"))),
            }
        }
        Ok((script, shown))
    }
}

impl Fence {
    fn is_shell(&self) -> bool {
        matches!(self.language.as_str(), "sh" | "console")
    }

    /// Its commands; a gateway or a model server runs beside the rest, as in another terminal.
    fn commands(&self) -> String {
        let lines = self.text.replace("\\\n", " ");
        lines.lines().map(|line| beside(line).unwrap_or_else(|| line.to_owned()) + "\n").collect()
    }

    /// Its commands with marks between what they print.
    fn console(&self, script: &mut String, shown: &mut Vec<(usize, String)>) {
        let mut lines = self.text.lines().peekable();
        while let Some(line) = lines.next() {
            let Some(first) = line.strip_prefix("$ ") else { continue };
            let mut command = first.to_owned();
            while let Some(more) = lines.peek().and_then(|line| line.strip_prefix("> ")) {
                command = format!("{command}\n{more}");
                lines.next();
            }
            let mut output = String::new();
            while let Some(said) = lines.next_if(|line| !line.starts_with("$ ")) {
                output.extend([said, "\n"]);
            }
            let _ = write!(script, "printf '{MARK}'\n{{ {command}\n}} 2>&1\nprintf '{MARK}'\n");
            shown.push((self.line, output));
        }
    }

    /// A file; what the gateway reads is checked, and in force when it goes on.
    fn file(&self, script: &mut String, how: &str, file: &str) {
        let _ = write!(script, "cat {how} {file} <<'END OF FILE'\n{}END OF FILE\nwritten {file}\n", self.text);
    }
}

/// How a command that does not end by itself is begun.
fn beside(line: &str) -> Option<String> {
    let line = line.split(" #").next()?.trim_end().trim_end_matches('&').trim_end();
    let ours = ["infergate serve", "infergate simulate", "cargo run --release"];
    ours.iter().any(|ours| line.starts_with(ours)).then(|| format!("begin {line}"))
}

/// Runs a script to its end; everything that it left running is ended.
fn run(script: &str, directory: &Path) -> (bool, String) {
    use std::os::unix::process::CommandExt;
    let said = std::fs::File::create(directory.join(".said")).unwrap();
    std::fs::write(directory.join(".script"), script).unwrap();
    let path = format!("{}:{}", Path::new(PROGRAM).parent().unwrap().display(), std::env::var("PATH").unwrap());
    let mut child = Command::new("bash")
        .arg(".script")
        .env("PATH", path)
        .env("XDG_STATE_HOME", directory.join(".state"))
        .env_remove("INFERGATE_JOURNAL")
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(said.try_clone().unwrap())
        .stderr(said)
        .process_group(0)
        .spawn()
        .unwrap();
    let ended = ended(&mut child);
    let group = format!("-{}", child.id());
    let _ = Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
    let _ = child.wait();
    (ended, String::from_utf8_lossy(&std::fs::read(directory.join(".said")).unwrap()).into_owned())
}

fn ended(child: &mut Child) -> bool {
    let start = Instant::now();
    while start.elapsed() < LONGEST {
        if let Some(status) = child.try_wait().unwrap() {
            return status.success();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

/// The ports of a page, each moved to a free one: many pages are read at once.
#[derive(Default)]
struct Ports(std::collections::BTreeMap<String, u16>);

impl Ports {
    fn moved(&mut self, text: &str) -> String {
        let mut moved = text.to_owned();
        for host in ["127.0.0.1:", "localhost:", "0.0.0.0:"] {
            let mut parts = moved.split(host);
            let mut out = parts.next().unwrap_or_default().to_owned();
            for part in parts {
                let digits = part.len() - part.trim_start_matches(|letter: char| letter.is_ascii_digit()).len();
                let (port, rest) = part.split_at(digits);
                out += host;
                if port.is_empty() {
                    out += rest;
                } else {
                    let _ = write!(out, "{}{rest}", self.0.entry(port.to_owned()).or_insert_with(free_port));
                }
            }
            moved = out;
        }
        moved
    }
}

/// Whether what a page shows is what was printed: numbers and spaces may differ, `…` stands for anything.
fn fits(shown: &str, printed: &str) -> Result<(), String> {
    let (wanted, got) = (plain(shown), plain(printed));
    let told = || format!("the page shows\n{shown}\nbut it is\n{printed}");
    let mut pieces = wanted.split('…').map(str::trim);
    let mut rest = got.strip_prefix(pieces.next().unwrap_or_default()).ok_or_else(told)?;
    let mut open = false;
    for piece in pieces {
        open = piece.is_empty();
        rest = rest.split_once(piece).ok_or_else(told)?.1;
    }
    if open || rest.trim().is_empty() { Ok(()) } else { Err(told()) }
}

/// A text with every number as 0 and every space as one.
fn plain(text: &str) -> String {
    let mut out = String::new();
    for letter in text.chars() {
        let letter = if letter.is_ascii_digit() { '0' } else { letter };
        let letter = if letter.is_whitespace() { ' ' } else { letter };
        if !(out.ends_with(letter) && (letter == '0' || letter == ' ')) {
            out.push(letter);
        }
    }
    out.trim().to_owned()
}

#[test]
fn what_a_page_shows_is_held_to_what_is_printed() {
    assert!(fits("200 sim-large $0.001915000 \n", "200 sim-large $0.002 ").is_ok());
    assert!(fits("id … is\nmine", "id 0af-2 is mine").is_ok());
    assert!(fits("a …", "a b c").is_ok());
    for (shown, printed) in [("200 small", "200 large"), ("200", "200 more"), ("a … c", "a b"), ("… c", "c d")] {
        assert!(fits(shown, printed).is_err(), "{shown}");
    }
    assert_eq!(
        beside("infergate serve --policy p.yaml &  # in a terminal").unwrap(),
        "begin infergate serve --policy p.yaml"
    );
    let mut ports = Ports::default();
    let moved = ports.moved("curl 127.0.0.1:8080/x localhost:8080 gpu:8080");
    assert!(!moved.contains("1:8080") && moved.ends_with("gpu:8080"), "{moved}");
    let part = |text: &str| Page { name: String::new(), text: format!("```yaml\n{text}\n```\n") }.carry_out();
    assert!(part("limits: [{requests: 1, per: 1m}]").is_ok());
    assert!(part("limits: [{requests: 1, per: never}]").unwrap_err().contains("line 1"));
    assert!(Page { name: String::new(), text: "```perl\nexit\n```\n".to_owned() }.script().is_err());
    let failing = Page { name: String::new(), text: "```sh\nfalse\n```\n".to_owned() };
    assert!(failing.carry_out().unwrap_err().contains("line 1"));
    let missing = "```sh\ncargo run --release\ncurl -s 127.0.0.1:8080/nowhere\n```\n";
    let missing = Page { name: String::new(), text: missing.to_owned() };
    assert!(missing.carry_out().unwrap_err().contains("not_found"));
    let broken = Page { name: String::new(), text: "```yaml\nversion: 1\nlimit: []\n```\n".to_owned() };
    assert!(broken.carry_out().unwrap_err().contains("did you mean limits?"));
    let wrong = Page { name: String::new(), text: "```console\n$ echo a\nb\n```\n".to_owned() };
    assert!(wrong.carry_out().unwrap_err().contains("but it is"));
}
