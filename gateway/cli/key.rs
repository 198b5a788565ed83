//! `infergate key`: makes API keys, and tells whose a key is.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use clap::{Args, Subcommand};
use http::{HeaderMap, HeaderValue};
use infergate_plugins::authenticator::keys::{Entry, Fresh};
use infergate_plugins::authenticator::{Credentials, Identity};
use serde_json::json;

use crate::identity;
use crate::policy::key_file::flow;
use crate::policy::problem::nearest;
use crate::policy::{self, Problems, World};
use crate::secret::{self, Secret, SecretSource};
use crate::settings::{AdminKey, Role, Settings};
use crate::state::State;
use crate::telemetry::Telemetry;
use crate::time;

/// Make and check keys.
#[derive(Args)]
pub(super) struct Key {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a key: prints it, which happens once, and the entry for the policy (or for the settings, with --role)
    Create(Create),
    /// Tell whose a key is: reads it from the standard input, exits with 1 if the policy does not let it in
    Check(Check),
}

#[derive(Args)]
struct Create {
    /// The tenant that pays
    #[arg(long, required_unless_present = "role")]
    tenant: Option<String>,
    /// Make an operator's key for the admin port instead; its entry goes into the settings
    #[arg(long, conflicts_with_all = ["tenant", "policy"], requires = "name")]
    role: Option<Role>,
    /// Who has it, for records; the key's prefix without it
    #[arg(long)]
    name: Option<String>,
    /// When it ends: 12h, 90d, 52w from now, or a time like 2027-02-01T00:00:00Z; never without it
    #[arg(long, value_name = "WHEN")]
    expires: Option<String>,
    /// The policy whose pepper is taken, and whose tenants are looked at
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// The environment variable with the pepper; INFERGATE_PEPPER if nothing else is said
    #[arg(long, value_name = "NAME", conflicts_with = "policy")]
    pepper_env: Option<String>,
    /// The file with the pepper
    #[arg(long, value_name = "FILE", conflicts_with_all = ["policy", "pepper_env"])]
    pepper_file: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Check {
    /// The policy
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Key {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        match self.command {
            Command::Create(create) => create.run().map(|()| ExitCode::SUCCESS),
            Command::Check(check) => check.run(),
        }
    }
}

impl Create {
    fn run(self) -> Result<(), String> {
        let expires = self.expires.as_deref().map(end).transpose()?;
        let pepper = self.pepper()?;
        secret::check_pepper(&pepper)?;
        let fresh =
            Fresh::make(|bytes| aws_lc_rs::rand::fill(bytes).map_err(|_| "the system gives no chance".to_owned()))?;
        let (prefix, hash) = (fresh.prefix().to_owned(), fresh.hash(&pepper));
        let entry = match (self.role, self.name) {
            (Some(role), name) => json!(AdminKey { name: name.unwrap_or_default(), role, prefix, hash, expires }),
            (None, name) => json!(Entry { name, tenant: self.tenant.unwrap_or_default(), prefix, hash, expires }),
        };
        if self.json {
            println!("{}", json!({"key": fresh.key().reveal(), "entry": entry}));
            return Ok(());
        }
        let place = if self.role.is_some() {
            "the settings, under `admin: keys:`"
        } else {
            "the policy's list of `keys`, or its file"
        };
        println!("The key, which is told only now:\n\n  {}\n", fresh.key().reveal());
        println!("Its entry for {place}:\n\n  - {}", flow(&entry));
        Ok(())
    }

    fn pepper(&self) -> Result<Secret, String> {
        let env = |name: &str| std::env::var(name).ok();
        if let Some(path) = &self.policy {
            return pepper_of(path, self.tenant.as_deref().unwrap_or_default(), &env);
        }
        let source = match (&self.pepper_env, &self.pepper_file) {
            (name, None) => {
                SecretSource { env: Some(name.clone().unwrap_or_else(|| "INFERGATE_PEPPER".to_owned())), file: None }
            }
            (_, file) => SecretSource { env: None, file: file.clone() },
        };
        secret::read(&source, &env)
            .map_err(|error| format!("the pepper: {error}; name it with --policy, --pepper-env or --pepper-file"))
    }
}

/// The pepper of the policy at `path`, which must know `tenant`.
fn pepper_of(path: &Path, tenant: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Secret, String> {
    let told = |problems: Problems| problems.lines(&path.display().to_string()).join("\n");
    let (_, file) = policy::read(path).and_then(|text| policy::parse(&text)).map_err(told)?;
    if !file.tenants.contains_key(tenant) {
        let hint = nearest(tenant, file.tenants.keys().map(String::as_str));
        return Err(format!("{}: no tenant is named {tenant}{hint}; add it under `tenants`", path.display()));
    }
    let keys = file.authenticators.iter().flatten().find_map(|authenticator| authenticator.keys.as_ref());
    let keys = keys.ok_or_else(|| {
        format!(
            "{}: there is no `keys` under `authenticators`: add `- keys: {{pepper: {{env: INFERGATE_PEPPER}}}}`",
            path.display()
        )
    })?;
    secret::read(&keys.pepper, env).map_err(|error| format!("{}: the pepper: {error}", path.display()))
}

impl Check {
    fn run(self) -> Result<ExitCode, String> {
        let mut key = String::new();
        io::stdin().take(4_096).read_to_string(&mut key).map_err(|error| format!("the standard input: {error}"))?;
        let key = HeaderValue::from_str(key.trim())
            .map_err(|_| "this is no key: it has characters that no header can carry")?;
        let found = self.ask(key)?;
        match (&found, self.json) {
            (Ok(who), true) => println!(
                "{}",
                json!({"known": true, "principal": &*who.principal, "tenant": &*who.tenant, "by": &*who.by})
            ),
            (Err(why), true) => println!("{}", json!({"known": false, "why": why})),
            (Ok(who), false) => println!("known: {} of tenant {}, by {}", who.principal, who.tenant, who.by),
            (Err(why), false) => println!("not let in: {why}"),
        }
        Ok(if found.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn ask(&self, key: HeaderValue) -> Result<Result<Identity, String>, String> {
        let (state, telemetry, settings) = (State::new(0), Telemetry::new(), Settings::default());
        let env = |name: &str| std::env::var(name).ok();
        let world = World::new(&env, &state, &telemetry, &settings);
        let told = |problems: Problems| problems.lines(&self.policy.display().to_string()).join("\n");
        let authenticators = policy::authenticators(&self.policy, &world).map_err(told)?;
        let headers: HeaderMap = [(http::HeaderName::from_static("x-api-key"), key)].into_iter().collect();
        Ok(identity::ask(&authenticators, &Credentials::of(&headers), SystemTime::now())
            .1
            .map_err(|fault| identity::why(&fault).as_str().to_owned()))
    }
}

/// When a key ends.
fn end(when: &str) -> Result<String, String> {
    time::end(when, SystemTime::now()).map_err(|told| format!("--expires {when}: {told}"))
}
