//! Which upstream a request goes to, under which name of the model, and with whose key.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::task::JoinSet;

use crate::support::dns::{Dns, Says};
use crate::support::{Client, Gateway, Options, Simulated, chat, eventually, faulty_server, model_server, policy};

const CHAT: &str = "/v1/chat/completions";
/// Slack for a loaded machine.
const SOON: Duration = Duration::from_secs(5);

/// A server that answers to every model's name.
async fn any_model() -> Simulated {
    Simulated::start(Options { models: Vec::new(), ..Options::default() }).await.unwrap()
}

fn asks(model: &str) -> String {
    format!(r#"{{"model": "{model}", "messages":[{{"role":"user","content":"Hello"}}],"max_tokens":1}}"#)
}

/// The bodies of the POSTs that a server got.
fn bodies(server: &Simulated) -> Vec<String> {
    let posts = server.seen().into_iter().filter(|seen| seen.method == "POST");
    posts.map(|seen| String::from_utf8(seen.body.to_vec()).unwrap()).collect()
}

fn posts(server: &Simulated) -> usize {
    server.seen().iter().filter(|seen| seen.method == "POST").count()
}

/// How many of `count` requests each upstream answered, one after the other or `at_once` at a time.
async fn shares(gateway: &Gateway, count: usize, at_once: usize) -> BTreeMap<String, usize> {
    let mut clients = JoinSet::new();
    for _ in 0..at_once {
        let address = gateway.address;
        clients.spawn(async move {
            let client = Client::h1();
            let mut names = Vec::new();
            for _ in 0..count / at_once {
                let answer = client.post(address, CHAT, chat(false, 1)).await;
                assert_eq!(answer.status, 200, "{}", answer.text());
                names.push(answer.header("x-infergate-upstream").to_owned());
            }
            names
        });
    }
    let mut shares = BTreeMap::new();
    for name in clients.join_all().await.into_iter().flatten() {
        *shares.entry(name).or_insert(0) += 1;
    }
    shares
}

fn share(shares: &BTreeMap<String, usize>, name: &str) -> usize {
    shares.get(name).copied().unwrap_or(0)
}

// Names.

fn names_policy(url: &str) -> String {
    let pool = |name: &str| format!("  {name}: {{upstreams: [{{url: '{url}', name: {name}}}]}}\n");
    let pools: String = ["exact", "short", "long", "tail", "rest"].map(pool).concat();
    format!(
        "version: 1\ndefault_model: fallback-model\npools:\n{pools}models:\n  \
         - {{name: llama-3, aliases: [llama, 'gpt-4o'], pool: exact}}\n  \
         - {{name: 'llama-*', pool: short}}\n  \
         - {{name: 'llama-3-*', pool: long}}\n  \
         - {{name: '*-mini', pool: tail}}\n  \
         - {{name: fallback-model, pool: rest}}\n"
    )
}

#[tokio::test]
async fn a_name_beats_a_pattern_a_long_pattern_a_short_one_and_the_default_takes_the_rest() {
    let server = any_model().await;
    let gateway = Gateway::start(&names_policy(&server.url())).await;
    for client in Client::both() {
        for (asked, pool) in [
            ("llama-3", "exact"),
            ("llama-2", "short"),
            ("llama-", "short"),
            ("llama-3-70b", "long"),
            ("gpt-mini", "tail"),
            ("-mini", "tail"),
            ("Llama-3", "rest"),
            ("who", "rest"),
            ("", "rest"),
        ] {
            let answer = client.post(gateway.address, CHAT, asks(asked)).await;
            let told = [answer.header("x-infergate-upstream"), answer.header("x-infergate-model")];
            assert_eq!((answer.status, told), (200, [pool, asked]), "{asked}: {}", answer.text());
        }
        for alias in ["llama", "gpt-4o"] {
            let answer = client.post(gateway.address, CHAT, asks(alias)).await;
            assert_eq!(answer.header("x-infergate-upstream"), "exact");
            assert_eq!(answer.header("x-infergate-model"), "llama-3", "an alias is ours: servers do not know it");
            assert_eq!(bodies(&server).last().unwrap(), &asks("llama-3"), "no other byte changes");
        }
        let nameless = client.post(gateway.address, CHAT, r#"{"messages":[{"role":"user","content":"x"}]}"#).await;
        assert_eq!(nameless.header("x-infergate-upstream"), "rest");
    }
}

#[tokio::test]
async fn a_model_that_nobody_serves_is_refused_before_any_upstream_is_asked() {
    let server = any_model().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    for client in Client::both() {
        for body in [asks("x"), asks(""), r#"{"messages":[]}"#.to_owned()] {
            let answer = client.post(gateway.address, CHAT, body).await;
            assert_eq!((answer.status, answer.code().as_str()), (404, "model_not_found"));
            assert_eq!(answer.header("x-should-retry"), "false");
        }
    }
    assert_eq!(posts(&server), 0);
}

#[tokio::test]
async fn a_rename_changes_the_names_bytes_and_no_others() {
    let server = any_model().await;
    let url = server.url();
    let text = format!(
        "version: 1\npools:\n  plain: {{upstreams: [{{url: '{url}'}}]}}\n  \
         own: {{upstreams: [{{url: '{url}', model: at-upstream}}]}}\nmodels:\n  \
         - {{name: kept, pool: plain}}\n  \
         - {{name: by-model, pool: plain, rename: at-model}}\n  \
         - {{name: by-upstream, pool: own}}\n  \
         - {{name: by-both, pool: own, rename: at-model}}\n  \
         - {{name: 'by-pattern-*', pool: plain, rename: 'quoted \"name\" \\ ü'}}\n"
    );
    let gateway = Gateway::start(&text).await;
    for client in Client::both() {
        for (asked, sent) in [
            ("kept", "kept"),
            ("by-model", "at-model"),
            ("by-upstream", "at-upstream"),
            ("by-both", "at-upstream"),
            ("by-pattern-7", r#"quoted \"name\" \\ ü"#),
        ] {
            let around = |name: &str| {
                format!(
                    "{{ \"temperature\" : 1.0 ,\"messages\":[{{\"role\":\"user\",\"content\":\"model\"}}],\t\"model\" :\"{name}\",\"x\":{{\"model\":\"{asked}\"}}}}"
                )
            };
            let answer = client.post(gateway.address, CHAT, around(asked)).await;
            let told = if sent.is_ascii() { sent } else { "" }; // a header carries no ü
            assert_eq!((answer.status, answer.header("x-infergate-model")), (200, told), "{}", answer.text());
            let got = bodies(&server).pop().unwrap();
            let parsed: serde_json::Value = serde_json::from_str(&got).unwrap();
            assert_eq!(parsed["model"], serde_json::from_str::<String>(&format!("\"{sent}\"")).unwrap(), "{asked}");
            assert!(
                got.starts_with("{ \"temperature\" : 1.0 ,")
                    && got.ends_with(&format!("\"x\":{{\"model\":\"{asked}\"}}}}")),
                "{got}"
            );
        }
    }
}

#[tokio::test]
async fn a_star_in_a_rename_is_what_the_star_of_the_name_stands_for() {
    let server = any_model().await;
    let text = format!(
        "version: 1\nmodels:\n  - {{name: 'vendor/*', aliases: [usual], rename: '*', pool: p}}\n  \
         - {{name: 'my-*-model', rename: '*', pool: p}}\npools: {{p: {{upstreams: [{{url: '{}'}}]}}}}\n",
        server.url()
    );
    let gateway = Gateway::start(&text).await;
    let asked = [("vendor/a/b", "a/b"), ("my-own-model", "own"), ("usual", "usual"), ("vendor/", "vendor/")];
    for (asked, there) in asked {
        let answer = Client::h1().post(gateway.address, CHAT, asks(asked)).await;
        assert_eq!(answer.header("x-infergate-model"), there, "{asked}: {}", answer.text());
        assert_eq!(bodies(&server).last().unwrap(), &asks(there), "no other byte changes");
    }
    let refused = gateway.reload(&text.replace("'vendor/*'", "vendor")).await;
    assert!(refused.status == 422 && refused.text().contains("models[0].rename: * is what"), "{}", refused.text());
}

#[tokio::test]
async fn a_fallbacks_own_rename_holds_there_and_the_models_elsewhere() {
    let (first, second) = (faulty_server(&["status=503"]).await, any_model().await);
    let text = format!(
        "version: 1\npools:\n  a: {{upstreams: [{{url: '{}'}}], retry: {{'on': []}}, breaker: {{failures: 0}}}}\n  b: {{upstreams: [{{url: '{}'}}]}}\nmodels:\n  \
         - {{name: x, pool: a, rename: here, fallbacks: [{{pool: b, rename: there}}]}}\n  \
         - {{name: z, pool: a, rename: here, fallbacks: [{{pool: b}}]}}\n",
        first.url(),
        second.url()
    );
    let gateway = Gateway::start(&text).await;
    for client in Client::both() {
        for (asked, sent) in [("x", "there"), ("z", "here")] {
            let answer = client.post(gateway.address, CHAT, asks(asked)).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            assert_eq!(bodies(&first).pop().unwrap(), asks("here"));
            assert_eq!(bodies(&second).pop().unwrap(), asks(sent));
        }
    }
}

// What an upstream is told beside the body.

#[tokio::test]
async fn the_policys_key_reaches_the_upstream_in_its_own_header_and_the_clients_never_does() {
    let server = any_model().await;
    let secrets = tempfile::tempdir().unwrap();
    let file = secrets.path().join("key");
    std::fs::write(&file, "from-file\n").unwrap();
    let table = [
        ("openai", "authorization", "Bearer "),
        ("vllm", "authorization", "Bearer "),
        ("sglang", "authorization", "Bearer "),
        ("tgi", "authorization", "Bearer "),
        ("azure", "api-key", ""),
        ("anthropic", "x-api-key", ""),
    ];
    let mut text = "version: 1\npools:\n".to_owned();
    let mut models = "models:\n".to_owned();
    for (provider, ..) in table {
        for (kind, source) in
            [("env", "{env: UPSTREAM_KEY}".to_owned()), ("file", format!("{{file: '{}'}}", file.display()))]
        {
            let url = server.url();
            text += &format!(
                "  {provider}-{kind}: {{upstreams: [{{url: '{url}', provider: {provider}, key: {source}}}]}}\n"
            );
            models += &format!("  - {{name: {provider}-{kind}, pool: {provider}-{kind}}}\n");
        }
    }
    let gateway = Gateway::spawn(&format!("{text}{models}"), "threads: 2\n", &[], &[("UPSTREAM_KEY", "from-env")]);
    gateway.ready().await;
    let theirs = [
        ("authorization", "Bearer canary"),
        ("x-api-key", "canary"),
        ("api-key", "canary"),
        ("cookie", "k=canary"),
        ("proxy-authorization", "canary"),
    ];
    for client in Client::both() {
        for (provider, header, scheme) in table {
            for kind in ["env", "file"] {
                let path = if provider == "anthropic" { "/v1/messages" } else { CHAT };
                let answer =
                    client.post_with(gateway.address, path, &theirs, asks(&format!("{provider}-{kind}"))).await;
                assert_eq!(answer.status, 200, "{provider}: {}", answer.text());
                let seen = server.seen().pop().unwrap();
                assert_eq!(seen.headers.get(header).unwrap(), &format!("{scheme}from-{kind}"), "{provider}");
                assert!(!format!("{:?}", seen.headers).contains("canary"), "{:?}", seen.headers);
            }
        }
    }
}

#[tokio::test]
async fn without_a_key_in_the_policy_the_upstream_gets_none() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    for client in Client::both() {
        let theirs = [("authorization", "Bearer canary"), ("x-api-key", "canary")];
        assert_eq!(client.post_with(gateway.address, CHAT, &theirs, chat(false, 1)).await.status, 200);
        let seen = server.seen().pop().unwrap();
        assert!(!["authorization", "x-api-key", "api-key"].iter().any(|name| seen.headers.contains_key(*name)));
    }
}

#[tokio::test]
async fn the_policys_headers_are_set_and_win_over_the_clients() {
    let server = model_server().await;
    let upstream = format!("{}\n        headers: {{x-team: ours, x-route: '7'}}", server.url());
    let gateway = Gateway::start(&policy(&[&upstream], "")).await;
    for client in Client::both() {
        let theirs = [("x-team", "theirs"), ("x-other", "kept")];
        assert_eq!(client.post_with(gateway.address, CHAT, &theirs, chat(false, 1)).await.status, 200);
        let headers = server.seen().pop().unwrap().headers;
        let all = |name: &str| headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect::<Vec<_>>();
        assert_eq!((all("x-team"), all("x-route"), all("x-other")), (vec!["ours"], vec!["7"], vec!["kept"]));
    }
}

#[tokio::test]
async fn the_path_in_an_upstreams_url_stands_before_ours() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&format!("{}/base/", server.url())], "health: {enabled: false}")).await;
    for client in Client::both() {
        client.post(gateway.address, &format!("{CHAT}?a=b"), chat(false, 1)).await;
        let seen = server.seen().pop().unwrap();
        assert_eq!(seen.path, format!("/base{CHAT}?a=b"));
        assert_eq!(seen.headers["host"], server.address().to_string());
    }
}

#[tokio::test]
async fn a_request_goes_only_to_upstreams_that_can_do_it() {
    let (cloud, own) = (any_model().await, any_model().await);
    let text = format!(
        "version: 1\nmodels: [{{name: m, pool: p}}, {{name: cloud-only, pool: c}}]\npools:\n  \
         p: {{upstreams: [{{url: '{0}', provider: openai}}, {{url: '{1}', provider: vllm}}]}}\n  \
         c: {{upstreams: [{{url: '{0}', provider: openai}}]}}\n",
        cloud.url(),
        own.url()
    );
    let gateway = Gateway::start(&text).await;
    let rerank = |model: &str| format!(r#"{{"model":"{model}","query":"q","documents":["a","b"]}}"#);
    for client in Client::both() {
        for _ in 0..8 {
            assert_eq!(client.post(gateway.address, "/v1/rerank", rerank("m")).await.status, 200);
        }
        let answer = client.post(gateway.address, "/v1/rerank", rerank("cloud-only")).await;
        assert_eq!((answer.status, answer.code().as_str()), (404, "not_found"));
    }
    assert_eq!((posts(&cloud), posts(&own)), (0, 16));
}

#[tokio::test]
async fn a_redirect_is_never_followed_and_does_not_tell_where_the_upstream_is() {
    let (server, elsewhere) = (model_server().await, model_server().await);
    let passthrough = format!(
        "  q: {{upstreams: [{{url: '{}'}}], health: {{enabled: false}}}}\npassthrough: [{{path: /files, pool: q}}]\n",
        server.url()
    );
    let gateway = Gateway::start(&(policy(&[&server.url()], "") + &passthrough)).await;
    let (own, foreign) = (format!("{}{CHAT}/?a=1", server.url()), format!("{}{CHAT}", elsewhere.url()));
    for client in Client::both() {
        let chats = [false, true].map(|stream| (CHAT, chat(stream, 1)));
        for (path, body) in chats.into_iter().chain([("/files", "{}".to_owned())]) {
            // What passes through unread may lead elsewhere, such as to a store of files.
            let elsewhere = if path == CHAT { "" } else { &foreign };
            for (to, leads) in [(&own, format!("{CHAT}/?a=1")), (&foreign, elsewhere.to_owned())] {
                let fault = format!("redirect={to}");
                let asks = [("x-simulate-fault", fault.as_str())];
                let answer = client.post_with(gateway.address, path, &asks, body.clone()).await;
                assert_eq!(
                    (answer.status, answer.header("location"), answer.header("x-infergate-attempts")),
                    (307, leads.as_str(), "1"),
                    "{path} to {to}"
                );
            }
        }
    }
    assert_eq!((posts(&server), posts(&elsewhere)), (12, 0));
}

// Weights.

fn weighted(upstreams: &[(&Simulated, &str, u32)], extra: &str) -> String {
    let urls: Vec<String> = upstreams
        .iter()
        .map(|(server, name, weight)| format!("{}\n        name: {name}\n        weight: {weight}", server.url()))
        .collect();
    policy(&urls.iter().map(String::as_str).collect::<Vec<_>>(), extra)
}

#[tokio::test]
async fn weights_are_shares_of_the_requests() {
    let (light, heavy) = (model_server().await, model_server().await);
    let gateway = Gateway::start(&weighted(&[(&light, "light", 1), (&heavy, "heavy", 3)], "")).await;
    for at_once in [1, 8] {
        let shares = shares(&gateway, 480, at_once).await;
        // 120 are expected; one in a million runs of fair draws is 45 off.
        assert!((70..=170).contains(&share(&shares, "light")), "{at_once} at once: {shares:?}");
    }
}

#[tokio::test]
async fn equal_weights_are_equal_shares_among_many() {
    let servers = [model_server().await, model_server().await, model_server().await, model_server().await];
    let upstreams: Vec<_> = servers.iter().zip(["a", "b", "c", "d"]).map(|(server, name)| (server, name, 1)).collect();
    let gateway = Gateway::start(&weighted(&upstreams, "")).await;
    let shares = shares(&gateway, 400, 4).await;
    assert!(["a", "b", "c", "d"].iter().all(|name| (60..=140).contains(&share(&shares, name))), "{shares:?}");
}

#[tokio::test]
async fn a_small_canary_gets_a_small_share_under_load() {
    let (canary, main) = (model_server().await, model_server().await);
    for server in [&canary, &main] {
        server.set_faults(vec!["slow-first=5".parse().unwrap()]);
    }
    let gateway = Gateway::start(&weighted(&[(&canary, "canary", 1), (&main, "main", 50)], "")).await;
    let shares = shares(&gateway, 800, 8).await;
    // Fair: 16.
    assert!((1..=60).contains(&share(&shares, "canary")), "{shares:?}");
}

#[tokio::test]
async fn weight_zero_gets_nothing_even_when_all_others_fail() {
    let (drained, broken) = (model_server().await, faulty_server(&["status=503"]).await);
    let gateway = Gateway::start(&weighted(&[(&drained, "a", 0), (&broken, "b", 1)], "retry: {backoff_ms: 0}")).await;
    for client in Client::both() {
        for _ in 0..5 {
            assert_eq!(client.post(gateway.address, CHAT, chat(false, 1)).await.status, 503);
        }
    }
    assert_eq!(posts(&drained), 0);
}

#[tokio::test]
async fn draining_an_upstream_lets_its_running_stream_end() {
    let (one, two) = (faulty_server(&["delay-between=50"]).await, model_server().await);
    let gateway = Gateway::start(&weighted(&[(&one, "one", 1), (&two, "two", 0)], "")).await;
    for client in Client::both() {
        assert_eq!(gateway.reload(&weighted(&[(&one, "one", 1), (&two, "two", 0)], "")).await.status, 200);
        let running = tokio::spawn({
            let (client, address) = (client.clone(), gateway.address);
            async move { client.post(address, CHAT, chat(true, 8)).await }
        });
        eventually("the stream runs", SOON, async || one.in_flight() == 1).await;
        assert_eq!(gateway.reload(&weighted(&[(&one, "one", 0), (&two, "two", 1)], "")).await.status, 200);
        let before = posts(&one);
        for _ in 0..10 {
            assert_eq!(client.post(gateway.address, CHAT, chat(false, 1)).await.header("x-infergate-upstream"), "two");
        }
        assert!(!running.is_finished(), "the stream still runs");
        let running = running.await.unwrap();
        assert!(running.whole && running.text().contains("[DONE]") && running.header("x-infergate-upstream") == "one");
        assert_eq!(posts(&one), before);
    }
}

#[tokio::test]
async fn the_own_zone_is_asked_first_and_another_only_in_need() {
    let (near, far) = (model_server().await, model_server().await);
    let urls = [format!("{}\n        zone: here", near.url()), format!("{}\n        zone: there", far.url())];
    let text = policy(&[&urls[0], &urls[1]], "health: {enabled: false}");
    let gateway = Gateway::with(&text, "threads: 2\nzone: here\n", &[]).await;
    shares(&gateway, 40, 4).await;
    assert_eq!((posts(&near), posts(&far)), (40, 0));
    near.set_faults(vec!["status=503".parse().unwrap()]);
    let answer = Client::h1().post(gateway.address, CHAT, chat(false, 1)).await;
    assert_eq!((answer.status, answer.header("x-infergate-attempts")), (200, "2"));
    assert_eq!(posts(&far), 1);
}

// The less busy one.

#[tokio::test]
async fn the_less_busy_of_two_gets_the_request() {
    let (slow, fast) = (faulty_server(&["slow-first=400"]).await, faulty_server(&["slow-first=5"]).await);
    let gateway = Gateway::start(&weighted(&[(&slow, "slow", 1), (&fast, "fast", 1)], "")).await;
    let shares = shares(&gateway, 320, 8).await;
    // A draw that did not look would give each one half.
    assert!(share(&shares, "slow") < 60, "{shares:?}");
}

#[tokio::test]
async fn an_upstream_busy_with_streams_is_left_alone_until_they_end() {
    let (busy, idle) = (faulty_server(&["delay-between=20"]).await, model_server().await);
    let gateway = Gateway::start(&weighted(&[(&busy, "busy", 1), (&idle, "idle", 0)], "")).await;
    let mut streams = Vec::new();
    for _ in 0..6 {
        streams.push(Client::h2().open(gateway.address, CHAT, &[], chat(true, 10_000)).await);
    }
    assert_eq!(gateway.reload(&weighted(&[(&busy, "busy", 1), (&idle, "idle", 1)], "")).await.status, 200);
    let during = shares(&gateway, 60, 1).await;
    assert_eq!(share(&during, "idle"), 60, "{during:?}");
    drop(streams);
    busy.set_faults(Vec::new());
    eventually("the streams are over", SOON, async || busy.in_flight() == 0).await;
    let after = shares(&gateway, 100, 1).await;
    assert!(share(&after, "busy") > 20, "{after:?}");
}

#[tokio::test]
async fn an_upstream_that_recovers_starts_slowly() {
    let (steady, fresh) = (model_server().await, faulty_server(&["status=500,path=/health"]).await);
    let health = "health: {interval_ms: 20, unhealthy_after: 1}\nslow_start_ms: 3000";
    let gateway = Gateway::start(&weighted(&[(&steady, "steady", 1), (&fresh, "fresh", 1)], health)).await;
    let healthy = format!(r#"infergate_endpoint_healthy{{pool="p",upstream="fresh",address="{}"}}"#, fresh.address());
    eventually("it is out", SOON, async || gateway.metric(&healthy).await == 0.0).await;
    fresh.set_faults(Vec::new());
    eventually("it is back", SOON, async || gateway.metric(&healthy).await == 1.0).await;
    let cold = shares(&gateway, 100, 1).await;
    // A tenth of its weight: 9 are expected, and more as it warms.
    assert!((1..=38).contains(&share(&cold, "fresh")), "{cold:?}");
    eventually("it has its full share", SOON, async || share(&shares(&gateway, 100, 1).await, "fresh") >= 40).await;
}

// Names in DNS.

/// A model server on each of 127.0.0.1 to 127.0.0.`count`, all on one port.
async fn same_port(count: u8) -> (Vec<Simulated>, u16) {
    'ports: loop {
        let first = model_server().await;
        let port = first.address().port();
        let mut servers = vec![first];
        for last in 2..=count {
            let listen = SocketAddr::from(([127, 0, 0, last], port));
            let options = Options { listen, models: vec!["m".to_owned()], ..Options::default() };
            match Simulated::start(options).await {
                Ok(server) => servers.push(server),
                Err(_) => continue 'ports,
            }
        }
        return (servers, port);
    }
}

fn loopback(lasts: &[u8]) -> Vec<Ipv4Addr> {
    lasts.iter().map(|last| Ipv4Addr::new(127, 0, 0, *last)).collect()
}

async fn named_gateway(dns: &Dns, port: u16, extra: &str) -> Gateway {
    let settings = format!("threads: 2\ndns_servers: ['{}']\n", dns.address);
    Gateway::with(&policy(&[&format!("http://models.test:{port}")], extra), &settings, &[]).await
}

#[tokio::test]
async fn every_address_behind_a_name_gets_requests() {
    let (servers, port) = same_port(4).await;
    let dns = Dns::start(&loopback(&[1, 2, 3, 4]), 60).await;
    let gateway = named_gateway(&dns, port, "").await;
    shares(&gateway, 200, 2).await;
    let counts: Vec<usize> = servers.iter().map(posts).collect();
    assert!(counts.iter().all(|count| (20..=80).contains(count)), "{counts:?}");
    assert_eq!(servers[3].seen().pop().unwrap().headers["host"], format!("models.test:{port}"));
    assert!(dns.asked() < 10, "no request asks the name service: {}", dns.asked());
}

#[tokio::test]
async fn each_address_has_its_own_breaker_and_failover_goes_to_the_next() {
    let (servers, port) = same_port(3).await;
    let dns = Dns::start(&loopback(&[1, 2, 3]), 60).await;
    let gateway = named_gateway(&dns, port, "breaker: {failures: 3, open_ms: 60000}\nhealth: {enabled: false}").await;
    servers[1].set_faults(vec!["status=500".parse().unwrap()]);
    shares(&gateway, 90, 1).await;
    assert_eq!(posts(&servers[1]), 3, "its breaker opened and nobody else's");
    assert!(posts(&servers[0]) > 20 && posts(&servers[2]) > 20);
}

#[tokio::test]
async fn a_change_of_the_records_takes_effect_after_the_ttl_and_no_request_fails() {
    let (mut servers, port) = same_port(3).await;
    let dns = Dns::start(&loopback(&[1, 2]), 1).await;
    let gateway = named_gateway(&dns, port, "").await;
    shares(&gateway, 40, 2).await;
    assert!(posts(&servers[0]) > 0 && posts(&servers[1]) > 0 && posts(&servers[2]) == 0);
    dns.says(Says::Addresses(loopback(&[2, 3])));
    // `shares` fails on any answer but 200.
    eventually("the new address is asked", Duration::from_secs(4), async || {
        shares(&gateway, 8, 2).await;
        posts(&servers[2]) > 0
    })
    .await;
    let before = posts(&servers[0]);
    // What is no longer in the records may go away.
    servers.remove(0).stop().await;
    shares(&gateway, 100, 2).await;
    assert!(before > 0);
}

#[tokio::test]
async fn a_resolver_in_trouble_changes_nothing() {
    for trouble in [Says::Nothing, Says::Failure, Says::NoSuchName, Says::Empty] {
        let (servers, port) = same_port(2).await;
        let dns = Dns::start(&loopback(&[1, 2]), 1).await;
        let gateway = named_gateway(&dns, port, "").await;
        dns.says(trouble.clone());
        let before = dns.asked();
        // The answers to the first questions (A and AAAA) are known at the latest when the next ones come.
        let questions = if trouble == Says::Nothing { 1 } else { 4 };
        eventually(&format!("the resolver is asked again ({trouble:?})"), Duration::from_secs(6), async || {
            shares(&gateway, 2, 1).await;
            dns.asked() >= before + questions
        })
        .await;
        shares(&gateway, 40, 2).await;
        assert!(servers.iter().all(|server| posts(server) > 5), "{trouble:?}");
    }
}

#[tokio::test]
async fn a_name_that_cannot_be_resolved_yet_is_refused_with_a_time_and_served_once_it_can() {
    let server = model_server().await;
    let dns = Dns::saying(Says::Failure, 1).await;
    let gateway = named_gateway(&dns, server.address().port(), "").await;
    let client = Client::h1();
    let answer = client.post(gateway.address, CHAT, chat(false, 1)).await;
    assert_eq!((answer.status, answer.code().as_str(), answer.header("retry-after")), (503, "no_upstream", "1"));
    dns.says(Says::Addresses(loopback(&[1])));
    eventually("it is served", SOON, async || client.post(gateway.address, CHAT, chat(false, 1)).await.status == 200)
        .await;
}
