//! A gateway without a policy file: the upstreams are asked what they serve, and a policy is made of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use crate::audit::journal::By;
use crate::house::House;
use crate::policy::file::{Abilities, File, Model, Pool, Upstream};
use crate::policy::{Policy, World, compile_file, reload};
use crate::pool::watch::{Names, look_up_all};
use crate::relay;
use crate::secret::SecretSource;
use crate::tokens::Tokenizer;

/// How often the upstreams are asked again.
const AGAIN: Duration = Duration::from_secs(30);
/// The same while one of them has not answered yet.
const AGAIN_SOON: Duration = Duration::from_secs(2);
/// How long one may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// The upstreams of the command line.
#[derive(Clone, Debug)]
pub struct Upstreams {
    /// Their base URLs.
    pub urls: Vec<String>,
    /// The environment variable with the key that they want.
    pub key_env: Option<String>,
}

/// What one upstream serves.
struct Served {
    models: Vec<String>,
    provider: &'static str,
}

impl Upstreams {
    /// Asks every upstream once and puts what they serve in force. Returns whether all answered.
    pub async fn discover(&self, house: &House, names: &Arc<Names>) -> Result<bool, String> {
        // A policy that serves no model yet, only to have upstreams that can be asked.
        let probing = self.compile(house, &[])?;
        look_up_all(names, &probing).await;
        let mut served = Vec::new();
        for pool in probing.pools.values() {
            served.push(ask(house, pool).await);
        }
        let complete = served.iter().all(Option::is_some);
        let policy = self.compile(house, &served)?;
        for (name, _) in policy.listed() {
            tracing::debug!(model = %name, "found");
        }
        reload::swap(house, policy, By::itself("upstreams"));
        Ok(complete)
    }

    /// Asks again and again, until the process ends.
    pub async fn watch(self, house: Arc<House>, names: Arc<Names>, mut complete: bool) {
        loop {
            tokio::time::sleep(if complete { AGAIN } else { AGAIN_SOON }).await;
            match self.discover(&house, &names).await {
                Ok(all) => complete = all,
                Err(error) => tracing::error!(%error, "the upstreams' models make no policy"),
            }
        }
    }

    fn compile(&self, house: &House, served: &[Option<Served>]) -> Result<Policy, String> {
        let file = self.file(served);
        let source = format!("{file:?}");
        let env = |name: &str| std::env::var(name).ok();
        let world = World::new(&env, &house.state, &house.telemetry, &house.settings);
        compile_file(file, &source, &world).map_err(|problems| problems.lines("--upstream").join("\n"))
    }

    /// One pool for each set of upstreams that serve the same models.
    fn file(&self, served: &[Option<Served>]) -> File {
        let mut file = File { version: 1, ..File::default() };
        let mut by_model: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (index, served) in served.iter().enumerate() {
            for model in served.iter().flat_map(|served| &served.models) {
                by_model.entry(model).or_default().push(index);
            }
        }
        for (model, upstreams) in by_model {
            let pool = pool_name(&upstreams);
            file.pools.entry(pool.clone()).or_insert_with(|| self.pool(&upstreams, served));
            file.models.push(Model {
                name: model.to_owned(),
                aliases: Vec::new(),
                pool,
                rename: None,
                fallbacks: Vec::new(),
                priority: None,
                tokenizer: Tokenizer::Auto,
                can: Abilities::default(),
                description: None,
            });
        }
        // An upstream that has not answered has a pool of its own, so that it can be asked.
        for index in (0..self.urls.len()).filter(|index| served.get(*index).is_none_or(Option::is_none)) {
            file.pools.entry(pool_name(&[index])).or_insert_with(|| self.pool(&[index], served));
        }
        file
    }

    fn pool(&self, upstreams: &[usize], served: &[Option<Served>]) -> Pool {
        let key = self.key_env.clone().map(|name| SecretSource { env: Some(name), file: None });
        let upstream = |index: &usize| Upstream {
            url: self.urls[*index].clone(),
            provider: served.get(*index).and_then(Option::as_ref).map(|served| served.provider.to_owned()),
            key: key.clone(),
            weight: 1,
            ..Upstream::default()
        };
        Pool { upstreams: upstreams.iter().map(upstream).collect(), ..Pool::default() }
    }
}

fn pool_name(upstreams: &[usize]) -> String {
    let numbers: Vec<String> = upstreams.iter().map(|index| format!("{:03}", index + 1)).collect();
    format!("upstream-{}", numbers.join("-"))
}

#[derive(Deserialize)]
struct List {
    data: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    id: String,
    #[serde(default)]
    owned_by: String,
}

#[derive(Deserialize)]
struct Info {
    model_id: String,
}

/// What the first upstream of `pool` serves: `/v1/models`, or TGI's `/info`.
async fn ask(house: &House, pool: &crate::pool::Pool) -> Option<Served> {
    let list = get::<List>(house, pool, "/v1/models").await;
    let info = get::<Info>(house, pool, "/info").await;
    match (list, info) {
        (Some(list), info) => {
            let owner = list.data.first().map_or("", |entry| entry.owned_by.as_str());
            let provider = match owner {
                "sglang" => "sglang",
                _ if info.is_some() => "tgi",
                _ => "vllm",
            };
            Some(Served { models: list.data.into_iter().map(|entry| entry.id).collect(), provider })
        }
        (None, Some(info)) => Some(Served { models: vec![info.model_id], provider: "tgi" }),
        (None, None) => None,
    }
}

async fn get<T: for<'de> Deserialize<'de>>(house: &House, pool: &crate::pool::Pool, path: &str) -> Option<T> {
    let upstream = pool.upstreams.first()?;
    let endpoint = upstream.origin.endpoints().first().cloned()?;
    let path = format!("{}{path}", upstream.path);
    let asked = relay::fetch(&house.connections, &endpoint.target, upstream, &path);
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok((200, body))) => serde_json::from_slice(&body).ok(),
        Ok(Ok((status, _))) => {
            tracing::debug!(upstream = ?upstream.name, status, %path, "no list of models");
            None
        }
        Ok(Err(error)) => {
            tracing::warn!(upstream = ?upstream.name, %error, "does not answer");
            None
        }
        Err(_) => {
            tracing::warn!(upstream = ?upstream.name, "does not answer in time");
            None
        }
    }
}
