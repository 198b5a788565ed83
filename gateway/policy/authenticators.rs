//! What the policy says of callers: the authenticators, and the tenants that they name.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use infergate_plugins::authenticator::jwt::{KeySet, Source};
use infergate_plugins::authenticator::{self, Authenticator, Named, keys};
use infergate_plugins::router;
use serde_json::{Value, json};
use sha2::Digest;

use super::problem::{Document, nearest};
use super::{Compiler, Problems, World, file};
use crate::secret::{self, Secret, SecretSource};
use crate::time;

/// The gateway's own keys, as far as they may be told, and what it takes to make more of them.
#[derive(Clone, Debug)]
pub struct OwnKeys {
    /// What they are hashed with.
    pub pepper: Secret,
    /// The file that has some of them.
    pub file: Option<PathBuf>,
    /// All of them.
    pub list: Vec<OwnKey>,
}

/// What may be told of a key.
#[derive(Clone, Debug)]
pub struct OwnKey {
    /// Who has it.
    pub name: Option<String>,
    /// The tenant that pays.
    pub tenant: String,
    /// The part of it that may be shown.
    pub prefix: String,
    /// When it ends.
    pub expires: Option<String>,
    /// Whether it stands in the file.
    pub filed: bool,
}

impl OwnKey {
    fn of(entry: &keys::Entry, filed: bool) -> Self {
        let keys::Entry { name, tenant, prefix, expires, .. } = entry.clone();
        Self { name, tenant, prefix, expires, filed }
    }

    /// What operators see of it.
    pub fn shown(&self, now: SystemTime) -> Value {
        let is_over = self.expires.as_deref().and_then(time::parse).is_some_and(|expires| expires <= now);
        json!({
            "name": self.name, "tenant": self.tenant, "prefix": self.prefix, "expires": self.expires,
            "expired": is_over, "in": if self.filed { "file" } else { "policy" },
        })
    }
}

impl Compiler<'_> {
    /// The authenticators, if there are to be any: nobody else is let in then.
    pub(super) fn authenticators(&mut self, file: &file::File) -> Option<Vec<Arc<dyn Authenticator>>> {
        let configs = file.authenticators.as_ref()?;
        let built = self.built(configs, &claims_that_rules_name(file)).unwrap_or_else(|problems| {
            for (path, message) in problems {
                self.wrong(&format!("authenticators{path}"), message);
            }
            Vec::new()
        });
        let listed = configs.iter().filter_map(|config| config.keys.as_ref()).flat_map(|keys| &keys.list);
        if let Some(own) = &mut self.own_keys {
            own.list.splice(..0, listed.map(|entry| OwnKey::of(entry, false)));
        }
        for named in built.iter().flat_map(|built| &built.tenants) {
            self.named_tenant(named, file);
        }
        Some(built.into_iter().map(|built| built.authenticator).collect())
    }

    fn built(
        &mut self,
        configs: &[authenticator::Config],
        claims: &[Arc<str>],
    ) -> Result<Vec<authenticator::Built>, Vec<authenticator::Wrong>> {
        // All of them read something that counts for the hash.
        let compiler = RefCell::new(self);
        let mut world = authenticator::World {
            secret: &mut |source| compiler.borrow_mut().pepper(source),
            entries: &mut |path| compiler.borrow_mut().key_file(path),
            key_set: &mut |source| compiler.borrow_mut().key_set(source),
            claims,
            time: time::parse,
        };
        authenticator::build(configs, &mut world)
    }

    fn pepper(&mut self, source: &SecretSource) -> Result<Secret, String> {
        let pepper = self.resolve(source)?;
        self.own_keys = Some(OwnKeys { pepper: pepper.clone(), file: None, list: Vec::new() });
        // A check that makes do without secrets has a made-up one.
        if self.world.secret_files { secret::check_pepper(&pepper).map(|()| pepper) } else { Ok(pepper) }
    }

    /// The entries in a file beside the policy.
    fn key_file(&mut self, path: &Path) -> Result<keys::Listed, Vec<String>> {
        let path = self.beside(path);
        self.secret_files.push(path.clone());
        let name = path.display().to_string();
        if !self.world.secret_files {
            return Ok(keys::Listed { entries: Vec::new(), at: Box::new(|_| String::new()) });
        }
        let text = std::fs::read_to_string(&path).map_err(|error| vec![unread(&name, &error)])?;
        self.secrets.update(&text);
        let listed = listed(&text, name)?;
        if let Some(own) = &mut self.own_keys {
            own.list.extend(listed.entries.iter().map(|entry| OwnKey::of(entry, true)));
            own.file = Some(path);
        }
        Ok(listed)
    }

    /// The keys of an issuer: those in a file, or those that are read beside the requests.
    fn key_set(&mut self, source: &Source) -> Result<Arc<KeySet>, String> {
        let Source::File(path) = source else { return Ok(self.world.state.key_set(source)) };
        let path = self.beside(path);
        self.secret_files.push(path.clone());
        if !self.world.secret_files {
            return Ok(Arc::new(KeySet::new(|| {})));
        }
        let told = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = std::fs::read(&path).map_err(|error| told(&error))?;
        self.secrets.update(&text);
        KeySet::fixed(&text).map(Arc::new).map_err(|error| told(&error))
    }

    fn named_tenant(&mut self, named: &Named, file: &file::File) {
        if !file.tenants.contains_key(&named.tenant) {
            let hint = nearest(&named.tenant, file.tenants.keys().map(String::as_str));
            let message = format!("no tenant is named {}{hint}; add it under `tenants`", named.tenant);
            self.wrong(&format!("authenticators{}", named.path), named.within.clone() + &message);
        }
    }
}

/// The claims of tokens that some rule asks for, each once.
pub(super) fn claims_that_rules_name(file: &file::File) -> Vec<Arc<str>> {
    let rules = file.routers.values().flat_map(|written| &written.ask);
    let named: BTreeSet<&str> = rules.flat_map(router::Config::claims).map(String::as_str).collect();
    named.into_iter().map(Arc::from).collect()
}

/// A YAML list of keys. A file without any is good.
fn listed(text: &str, name: String) -> Result<keys::Listed, Vec<String>> {
    let lines = |problems: Vec<_>| Problems::in_order(problems).lines(&name);
    let document = Document::parse(text).map_err(|problem| lines(vec![problem]))?;
    if document.value.is_null() {
        return Ok(keys::Listed { entries: Vec::new(), at: Box::new(|_| String::new()) });
    }
    let entries = document.read().map_err(lines)?;
    let at = move |path: &str| format!("{name}:{}", document.problem(path, ""));
    Ok(keys::Listed { entries, at: Box::new(at) })
}

/// The authenticators of the policy at `path`, and nothing else of it.
pub fn authenticators(path: &Path, world: &World<'_>) -> Result<Vec<Arc<dyn Authenticator>>, Problems> {
    let text = super::read(path)?;
    let (document, file) = super::parse(&text)?;
    let mut compiler = Compiler::new(document, &text, world);
    compiler.directory = path.parent().map(Path::to_owned);
    let authenticators = compiler.authenticators(&file).unwrap_or_default();
    if compiler.problems.is_empty() { Ok(authenticators) } else { Err(Problems::in_order(compiler.problems)) }
}

/// A file of keys that is not there is made as the first step of most people.
fn unread(name: &str, error: &std::io::Error) -> String {
    let hint = match error.kind() {
        std::io::ErrorKind::NotFound => {
            "; write `[]` into it to begin with, then the entries that `infergate key create` prints, as a YAML list"
        }
        _ => "",
    };
    format!("{name} cannot be read: {error}{hint}")
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use http::HeaderMap;
    use infergate_plugins::authenticator::keys::Fresh;

    use super::*;
    use crate::identity;
    use crate::policy::{Policy, compile, load};
    use crate::settings::Settings;
    use crate::state::State;
    use crate::telemetry::Telemetry;

    const PEPPER: &str = "a pepper of thirty-two characters";
    const POOLS: &str = "version: 1\npools: {p: {upstreams: [{url: 'http://127.0.0.1:1'}]}}\n";

    fn within<T>(pepper: &'static str, work: impl FnOnce(&World<'_>) -> T) -> T {
        let (state, telemetry, settings) = (State::new(0), Telemetry::new(), Settings::default());
        let env = |name: &str| (name == "PEPPER").then(|| pepper.to_owned());
        work(&World::new(&env, &state, &telemetry, &settings))
    }

    fn problems(text: &str) -> Vec<String> {
        within(PEPPER, |world| compile(text, world).unwrap_err().lines("policy.yaml"))
    }

    fn fresh() -> (Fresh, String) {
        let fresh = Fresh::make(|bytes| {
            bytes.iter_mut().for_each(|byte| *byte = fastrand::u8(..));
            Ok(())
        });
        let fresh = fresh.unwrap();
        let entry = format!("{{tenant: t, prefix: {}, hash: '{}'}}", fresh.prefix(), fresh.hash(&Secret::new(PEPPER)));
        (fresh, entry)
    }

    fn knows(policy: &Policy, key: &Fresh) -> bool {
        let headers: HeaderMap =
            [(http::HeaderName::from_static("x-api-key"), key.key().reveal().parse().unwrap())].into_iter().collect();
        let credentials = authenticator::Credentials::of(&headers);
        identity::ask(policy.authenticators.as_ref().unwrap(), &credentials, SystemTime::now()).1.is_ok()
    }

    #[test]
    fn what_is_wrong_with_callers_is_told_at_its_line() {
        let (_, entry) = fresh();
        let text = format!(
            "{POOLS}tenants: {{t: {{}}}}\nauthenticators:\n  - keys:\n      pepper: {{env: NONE}}\n      list:\n        - {}\n        - {entry}\n        - {entry}\n        - {}\n  - anonymous: {{tenant: s}}\n",
            entry.replace("hash: '", "hash: '!"),
            entry.replace("hash", "expires: 'soon', hash"),
        );
        let told = problems(&text);
        let expected = [
            ("policy.yaml:6:7: authenticators[0].keys.pepper: ", "NONE is not set"),
            ("policy.yaml:8:", "authenticators[0].keys.list[0].hash: this is not 64 hexadecimal digits"),
            ("policy.yaml:10:", "authenticators[0].keys.list[2].hash: this is the hash of another entry too"),
            ("policy.yaml:11:", "authenticators[0].keys.list[3].expires: soon is no time"),
        ];
        assert_eq!(told.len(), expected.len(), "{told:#?}");
        for (line, (place, message)) in told.iter().zip(expected) {
            assert!(line.starts_with(place) && line.contains(message), "{line}");
        }
        let unknown = format!(
            "{POOLS}tenants: {{tt: {{}}}}\nauthenticators:\n  - keys:\n      pepper: {{env: PEPPER}}\n      list:\n        - {entry}\n  - anonymous: {{tenant: s}}\n"
        );
        let told = problems(&unknown);
        assert!(
            told[0].starts_with(
                "policy.yaml:8:12: authenticators[0].keys.list[0].tenant: no tenant is named t; did you mean tt?"
            ),
            "{told:#?}"
        );
        assert!(
            told[1].starts_with("policy.yaml:9:17: authenticators[1].anonymous.tenant: no tenant is named s"),
            "{told:#?}"
        );
        assert!(problems(&format!("{POOLS}authenticators: []\n"))[0].contains("at least 1 entry"));
        assert!(problems(&format!("{POOLS}authenticators: [{{keys: {{}}}}]\n"))[0].contains("`pepper` is missing"));
    }

    #[test]
    fn a_short_pepper_is_none() {
        let text = format!("{POOLS}authenticators: [{{keys: {{pepper: {{env: PEPPER}}}}}}]\n");
        assert!(within(PEPPER, |world| compile(&text, world).is_ok()));
        let told = within("short", |world| compile(&text, world).unwrap_err().lines("p"));
        assert!(told[0].contains("at least 32 characters") && !told[0].contains("short"), "{told:?}");
    }

    #[test]
    fn a_file_beside_the_policy_has_more_keys_and_its_faults_their_lines() {
        let directory = tempfile::tempdir().unwrap();
        let (path, file) = (directory.path().join("policy.yaml"), directory.path().join("keys.yaml"));
        let ((one, first), (two, second)) = (fresh(), fresh());
        let text = format!(
            "{POOLS}tenants: {{t: {{}}}}\nauthenticators:\n  - keys:\n      pepper: {{env: PEPPER}}\n      list: [{first}]\n      file: keys.yaml\n"
        );
        std::fs::write(&path, text).unwrap();
        let loaded = |keys: &str| {
            std::fs::write(&file, keys).unwrap();
            within(PEPPER, |world| load(&path, world).map_err(|problems| problems.lines("policy.yaml")))
        };
        let empty = loaded("# none yet\n").unwrap();
        assert!(knows(&empty, &one) && !knows(&empty, &two));
        let more = loaded(&format!("- {second}\n")).unwrap();
        assert!(knows(&more, &one) && knows(&more, &two));
        assert_ne!(empty.hash, more.hash, "it counts for the policy's hash");
        assert_eq!(more.secret_files, std::slice::from_ref(&file), "it is watched");
        let name = file.display();
        for (keys, place, message) in [
            (format!("- {second}\n- {first}\n"), format!("{name}:2:"), "the hash of another entry too"),
            (format!("- {}\n", second.replace("tenant: t", "tenant: u")), format!("{name}:1:"), "no tenant is named u"),
            (format!("- {second}\n- {{tenant: t}}\n"), format!("{name}:2:"), "`prefix` is missing"),
            (format!("- {}\n", second.replace("prefix", "prefx")), format!("{name}:1:"), "did you mean prefix?"),
            ("a: 1\n".to_owned(), format!("{name}:1:"), "must be a list"),
            ("- {\n".to_owned(), format!("{name}:"), ""),
        ] {
            let told = loaded(&keys).unwrap_err();
            assert!(told[0].starts_with("policy.yaml:8:7: authenticators[0].keys.file: "), "{keys}: {told:?}");
            assert!(told[0].contains(&place) && told.iter().any(|line| line.contains(message)), "{keys}: {told:?}");
        }
        std::fs::remove_file(&file).unwrap();
        let told = within(PEPPER, |world| load(&path, world).unwrap_err().lines("policy.yaml"));
        assert!(told[0].contains("keys.yaml cannot be read"), "{told:?}");
        assert!(told[0].contains("write `[]` into it") && told[0].contains("infergate key create"), "{told:?}");
        std::fs::write(&file, "[]\n").unwrap();
        assert!(within(PEPPER, |world| load(&path, world)).is_ok(), "what the hint says is enough");
    }
}
