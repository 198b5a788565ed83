use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::UNIX_EPOCH;

use serde_json::json;

use self::signer::{Signer, base64, unsigned};
use super::*;
use crate::authenticator::tests::headers;
use crate::claim::Claim;
use crate::secret::Secret;

#[path = "../../../tests/support/signer.rs"]
mod signer;

const NOW: u64 = 1_800_000_000;

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

/// An authenticator built of issuers in JSON, whose keys are these.
fn jwt(issuers: &Value, keys: &Arc<KeySet>) -> Result<Built, Vec<Wrong>> {
    jwt_keeping(&[], issuers, keys)
}

/// The same that keeps these claims.
fn jwt_keeping(claims: &[Arc<str>], issuers: &Value, keys: &Arc<KeySet>) -> Result<Built, Vec<Wrong>> {
    let config: Config = serde_json::from_value(json!({"issuers": issuers})).unwrap();
    let mut world = World {
        secret: &mut |_| Ok(Secret::new("")),
        entries: &mut |_| Err(Vec::new()),
        key_set: &mut |_| Ok(keys.clone()),
        claims,
        time: |_| None,
    };
    build(&config, &mut world)
}

fn set(keys: &[Value]) -> String {
    json!({"keys": keys}).to_string()
}

/// A set with these keys that counts its wishes.
fn key_set(keys: &[Value]) -> (Arc<KeySet>, Arc<AtomicUsize>) {
    let wishes = Arc::new(AtomicUsize::new(0));
    let counted = wishes.clone();
    let keys_known = KeySet::new(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    if !keys.is_empty() {
        keys_known.put(set(keys).as_bytes()).unwrap();
    }
    (Arc::new(keys_known), wishes)
}

fn issuer() -> Value {
    json!({
        "issuer": "https://id.test", "name": "corp", "audience": ["infergate", "other"],
        "algorithms": ["RS256", "ES256", "EdDSA"], "tenant": {"claim": "team"},
    })
}

fn claims() -> Value {
    json!({"iss": "https://id.test", "aud": "infergate", "sub": "alice", "team": "search", "exp": NOW + 60})
}

/// Claims in which something is another.
fn but(name: &str, value: Value) -> Value {
    let mut claims = claims();
    match value {
        Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
        value => claims[name] = value,
    }
    claims
}

fn ask(jwt: &dyn Authenticator, token: &str) -> Answer {
    ask_at(jwt, token, NOW)
}

fn ask_at(jwt: &dyn Authenticator, token: &str, seconds: u64) -> Answer {
    jwt.ask(&Credentials::of(&headers(&[("authorization", &format!("Bearer {token}"))])), at(seconds))
}

#[track_caller]
fn yes(answer: Answer) -> Identity {
    match answer {
        Answer::Yes(identity) => identity,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn no(answer: Answer) -> String {
    match answer {
        Answer::No(Fault::Refused(why)) => why.into_owned(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_token_of_each_kind_of_key_says_who_asks_and_who_pays() {
    let signers = [Signer::rsa(), Signer::p256(), Signer::ed25519()];
    let keys: Vec<Value> = signers.iter().enumerate().map(|(n, signer)| signer.jwk(&format!("k{n}"))).collect();
    let jwt = jwt(&json!([issuer()]), &key_set(&keys).0).ok().unwrap().authenticator;
    for (n, signer) in signers.iter().enumerate() {
        let token = signer.token(&format!("k{n}"), &claims());
        for round in ["verified", "known by its hash"] {
            let identity = yes(ask(&*jwt, &token));
            assert_eq!((&*identity.principal, &*identity.tenant), ("corp:alice", "search"), "{round}");
            assert_eq!((&*identity.by, identity.expires), ("a token of corp", Some(at(NOW + 70))));
            assert!(jwt.still_knows(&identity.mark));
        }
    }
    let other = jwt_of_another_issuer(&keys);
    assert!(!other.still_knows(&yes(ask(&*jwt, &signers[0].token("k0", &claims()))).mark));
}

#[test]
fn of_the_claims_those_that_rules_name_are_kept_and_no_others() {
    let signer = Signer::ed25519();
    let keys = key_set(&[signer.jwk("k")]).0;
    let names: [Arc<str>; 2] = ["account.plan".into(), "team".into()];
    let jwt = jwt_keeping(&names, &json!([issuer()]), &keys).ok().unwrap().authenticator;
    let token = signer.token("k", &but("account", json!({"plan": "gold", "iban": "DE02"})));
    for round in ["verified", "known by its hash"] {
        let claims = yes(ask(&*jwt, &token)).claims;
        let kept: Vec<_> = claims.iter().map(|(name, claim)| (&**name, claim.clone())).collect();
        let text = |text: &str| Claim::Text(text.into());
        assert_eq!(kept, [("account.plan", text("gold")), ("team", text("search"))], "{round}");
    }
}

fn jwt_of_another_issuer(keys: &[Value]) -> Arc<dyn Authenticator> {
    let mut other = issuer();
    other["issuer"] = json!("https://other.test");
    jwt(&json!([other]), &key_set(keys).0).ok().unwrap().authenticator
}

#[test]
fn what_is_no_token_or_somebody_elses_is_left_to_the_next() {
    let signer = Signer::ed25519();
    let jwt = jwt(&json!([issuer()]), &key_set(&[signer.jwk("k")]).0).ok().unwrap().authenticator;
    for token in [
        "ig_abc",
        "sk-1.2.3",
        "eyJ.a",
        "eyJ.a.b.c",
        "eyJ.!.c",
        "eyJhbGciOiJub25lIn0.W10.",
        &signer.token("k", &but("iss", json!("https://stranger.test"))),
        &signer.token("k", &but("iss", json!("https://id.test/"))),
        &signer.token("k", &but("iss", json!(["https://id.test"]))),
        &signer.token("k", &but("iss", Value::Null)),
    ] {
        assert_eq!(ask(&*jwt, token), Answer::Pass, "{token}");
    }
}

#[test]
fn each_flaw_is_refused_and_told_apart_for_the_record() {
    let (signer, stranger, rsa) = (Signer::ed25519(), Signer::ed25519(), Signer::rsa());
    let keys = [signer.jwk("k"), rsa.jwk("r")];
    let jwt = jwt(&json!([issuer()]), &key_set(&keys).0).ok().unwrap().authenticator;
    let good = |claims: &Value| signer.token("k", claims);
    let headed = |header: Value| signer.token_with(&header, &claims());
    let mut changed = good(&claims());
    changed = changed.replacen(
        &base64(claims().to_string().as_bytes()),
        &base64(but("sub", json!("bob")).to_string().as_bytes()),
        1,
    );
    // The classic: the public key as the secret of an HMAC.
    let text = unsigned(&json!({"alg": "HS256", "kid": "r"}), &claims());
    let tag =
        aws_lc_rs::hmac::sign(&aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &rsa.public()), text.as_bytes());
    let hmac = format!("{text}.{}", base64(tag.as_ref()));
    let none = format!("{}.", unsigned(&json!({"alg": "none"}), &claims()));
    let cases = [
        (none, "the algorithm none is not listed"),
        (hmac, "the algorithm HS256 is not listed"),
        (headed(json!({"kid": "k"})), "is not listed"),
        (rsa.token_with(&json!({"alg": "RS512", "kid": "r"}), &claims()), "the algorithm RS512 is not listed"),
        (rsa.token_with(&json!({"alg": "EdDSA", "kid": "r"}), &claims()), "the key is none for EdDSA"),
        (headed(json!({"alg": "EdDSA", "kid": "x"})), "no key `x`"),
        (headed(json!({"alg": "EdDSA", "kid": 7})), "`kid` is no text"),
        (headed(json!({"alg": "EdDSA", "kid": "k", "crit": ["b64"], "b64": false})), "extension"),
        (changed, "signature is wrong"),
        (stranger.token("k", &claims()), "signature is wrong"),
        (format!("{}!", good(&claims())), "no base64url"),
        (good(&but("exp", json!(NOW - 10))), "has expired"),
        (good(&but("exp", Value::Null)), "no `exp`"),
        (good(&but("exp", json!("tomorrow"))), "`exp` is no time"),
        (good(&but("exp", json!(-5))), "`exp` is no time"),
        (good(&but("exp", json!(1e300))), "`exp` is no time"),
        (good(&but("nbf", json!(NOW + 11))), "is not good yet"),
        (good(&but("aud", Value::Null)), "no `aud`"),
        (good(&but("aud", json!("somebody"))), "`aud` names somebody else"),
        (good(&but("aud", json!(["a", "b"]))), "`aud` names somebody else"),
        (good(&but("sub", Value::Null)), "no `sub`"),
        (good(&but("sub", json!(""))), "no `sub`"),
        (good(&but("sub", json!("a\nb"))), "no `sub`"),
        (good(&but("sub", json!("x".repeat(257)))), "no `sub`"),
        (good(&but("team", Value::Null)), "names no tenant"),
        (good(&but("team", json!("x".repeat(129)))), "no tenant's name"),
        (good(&but("team", json!(["a", "b"]))), "names several tenants"),
        (good(&but("pad", json!("x".repeat(20_000)))), "longer than 16384 bytes"),
    ];
    for (token, why) in cases {
        let told = no(ask(&*jwt, &token));
        assert!(told.contains(why) && told.len() < 200, "{why}: {told}");
    }
    let two = headers(&[
        ("authorization", &format!("Bearer {}", good(&claims()))),
        ("x-api-key", &good(&but("sub", json!("b")))),
    ]);
    assert_eq!(jwt.ask(&Credentials::of(&two), at(NOW)), Answer::No(Fault::Ambiguous));
}

#[test]
fn a_token_that_is_known_still_ends_in_time() {
    let signer = Signer::ed25519();
    let jwt = jwt(&json!([issuer()]), &key_set(&[signer.jwk("k")]).0).ok().unwrap().authenticator;
    let mut with_beginning = claims();
    with_beginning["nbf"] = json!(NOW);
    let token = signer.token("k", &with_beginning);
    yes(ask_at(&*jwt, &token, NOW - 10));
    yes(ask_at(&*jwt, &token, NOW + 69));
    assert!(no(ask_at(&*jwt, &token, NOW + 70)).contains("has expired"));
    assert!(no(ask_at(&*jwt, &token, NOW - 11)).contains("not good yet"), "the clock was set back");
}

#[test]
fn a_token_whose_key_is_taken_out_is_not_known_any_more() {
    let (old, new) = (Signer::ed25519(), Signer::ed25519());
    let (keys, wishes) = key_set(&[old.jwk("old")]);
    let jwt = jwt(&json!([issuer()]), &keys).ok().unwrap().authenticator;
    let [first, second] = [old.token("old", &claims()), new.token("new", &claims())];
    yes(ask(&*jwt, &first));
    for _ in 0..3 {
        assert!(no(ask(&*jwt, &second)).contains("no key `new`"));
    }
    assert_eq!(wishes.load(Ordering::Relaxed), 1, "one wish until somebody looks");
    keys.looking();
    assert!(no(ask(&*jwt, &second)).contains("no key `new`"));
    assert_eq!(wishes.load(Ordering::Relaxed), 2);
    // Both, in another order: who was known stays so.
    keys.put(set(&[new.jwk("new"), old.jwk("old")]).as_bytes()).unwrap();
    let generation = keys.generation();
    keys.put(set(&[old.jwk("old"), new.jwk("new")]).as_bytes()).unwrap();
    assert_eq!(keys.generation(), generation, "the same keys");
    yes(ask(&*jwt, &first));
    yes(ask(&*jwt, &second));
    keys.put(set(&[new.jwk("new")]).as_bytes()).unwrap();
    assert!(no(ask(&*jwt, &first)).contains("no key `old`"));
    yes(ask(&*jwt, &second));
    // A key of the same name is another one.
    keys.put(set(&[old.jwk("new")]).as_bytes()).unwrap();
    assert!(no(ask(&*jwt, &second)).contains("signature is wrong"));
    assert!(keys.put(b"{}").is_err() && keys.put(br#"{"keys":[]}"#).is_err());
    assert_eq!(keys.count(), 1, "the last ones stay");
}

#[test]
fn without_keys_nobody_is_let_in() {
    let (keys, wishes) = key_set(&[]);
    let jwt = jwt(&json!([issuer()]), &keys).ok().unwrap().authenticator;
    assert!(
        no(ask(&*jwt, &Signer::ed25519().token("k", &claims()))).contains("none of its issuer's keys is known yet")
    );
    assert_eq!(wishes.load(Ordering::Relaxed), 1);
}

#[test]
fn a_key_is_used_for_nothing_but_what_it_says() {
    let (signer, rsa) = (Signer::ed25519(), Signer::rsa());
    let with = |mut key: Value, name: &str, value: Value| {
        key[name] = value;
        key
    };
    for key in [
        with(signer.jwk("k"), "use", json!("enc")),
        with(signer.jwk("k"), "key_ops", json!(["sign"])),
        with(signer.jwk("k"), "kty", json!("oct")),
        with(signer.jwk("k"), "crv", json!("X25519")),
        with(signer.jwk("k"), "x", json!("AAAA")),
        with(signer.jwk("k"), "alg", json!("RS256")),
        with(rsa.jwk("k"), "n", json!(base64(&[255; 128]))),
        with(rsa.jwk("k"), "e", json!("")),
        json!("no object"),
        json!({"kty": "oct", "k": "c2VjcmV0"}),
    ] {
        assert!(KeySet::fixed(set(std::slice::from_ref(&key)).as_bytes()).is_err(), "{key}");
    }
    let only = with(rsa.jwk("r"), "alg", json!("PS256"));
    let mut config = issuer();
    config["algorithms"] = json!(["RS256", "PS256"]);
    let jwt = jwt(&json!([config]), &key_set(&[only]).0).ok().unwrap().authenticator;
    let signed = |algorithm: &str| rsa.token_with(&json!({"alg": algorithm, "kid": "r"}), &claims());
    assert!(no(ask(&*jwt, &signed("RS256"))).contains("the key is none for RS256"));
    yes(ask(&*jwt, &signed("PS256")));
    // Without `kid`, every key that fits is tried.
    yes(ask(&*jwt, &rsa.token_with(&json!({"alg": "PS256"}), &claims())));
}

#[test]
fn claims_lead_to_tenants_by_name_by_map_and_by_default() {
    let signer = Signer::ed25519();
    let keys = key_set(&[signer.jwk("k")]).0;
    let with = |tenant: Value| {
        let mut issuer = issuer();
        issuer["tenant"] = tenant;
        jwt(&json!([issuer]), &keys).ok().unwrap()
    };
    let mapped = with(json!({"claim": "groups", "map": {"a": "one", "b": "one", "c": "two"}, "default": "rest"}));
    let named: Vec<_> = mapped.tenants.iter().map(|named| (&*named.path, &*named.tenant)).collect();
    let at = |key: &str| format!(".jwt.issuers[0].tenant{key}");
    assert_eq!(
        named,
        [(&*at(".map.a"), "one"), (&at(".map.b"), "one"), (&at(".map.c"), "two"), (&at(".default"), "rest")]
    );
    let ask =
        |built: &Built, name: &str, value: Value| ask(&*built.authenticator, &signer.token("k", &but(name, value)));
    for (groups, tenant) in [
        (json!(["x", "a"]), "one"),
        (json!(["b", "y", "a"]), "one"),
        (json!("c"), "two"),
        (json!([]), "rest"),
        (json!(7), "rest"),
    ] {
        assert_eq!(&*yes(ask(&mapped, "groups", groups.clone())).tenant, tenant, "{groups}");
    }
    assert!(no(ask(&mapped, "groups", json!(["a", "c"]))).contains("several tenants"));
    let (of_a, of_rest) = (yes(ask(&mapped, "groups", json!("a"))).mark, yes(ask(&mapped, "groups", json!("z"))).mark);
    let moved = with(json!({"claim": "groups", "map": {"a": "two", "b": "one"}}));
    assert!(mapped.authenticator.still_knows(&of_a) && !moved.authenticator.still_knows(&of_a));
    assert!(!moved.authenticator.still_knows(&of_rest));
    let deep = with(json!({"claim": "resource.team"}));
    assert_eq!(&*yes(ask(&deep, "resource", json!({"team": "deep"}))).tenant, "deep");
    assert_eq!(&*yes(ask(&deep, "resource.team", json!("flat"))).tenant, "flat", "the name to the letter comes first");
    let fixed = with(json!({"default": "all"}));
    assert_eq!(&*yes(ask(&fixed, "groups", json!("a"))).tenant, "all");
}

#[test]
fn who_lacks_the_role_is_refused() {
    let signer = Signer::ed25519();
    let mut config = issuer();
    config["roles"] = json!({"claim": "scope", "one_of": ["llm.use", "llm.admin"]});
    let jwt = jwt(&json!([config]), &key_set(&[signer.jwk("k")]).0).ok().unwrap().authenticator;
    for (scope, good) in [
        (json!("openid llm.use"), true),
        (json!(["llm.admin"]), true),
        (json!("llm.user"), false),
        (Value::Null, false),
    ] {
        let answer = ask(&*jwt, &signer.token("k", &but("scope", scope.clone())));
        assert_eq!(matches!(answer, Answer::Yes(_)), good, "{scope}: {answer:?}");
    }
}

#[test]
fn wrong_issuers_are_told_at_their_places() {
    let with = |changes: Value| {
        let mut issuer = issuer();
        for (name, value) in changes.as_object().unwrap() {
            issuer[name] = value.clone();
        }
        issuer
    };
    let (keys, _) = key_set(&[]);
    for (changes, key, told) in [
        (json!({"issuer": "http://id.test"}), ".issuer", "over https"),
        (json!({"issuer": "accounts"}), ".issuer", "over https"),
        (json!({"issuer": "/accounts"}), ".issuer", "no address of a server"),
        (json!({"jwks": {"url": "http://id.test/keys"}}), ".jwks.url", "over https"),
        (json!({"jwks": {"url": "http://127.0.0.1.evil.test/keys"}}), ".jwks.url", "over https"),
        (json!({"jwks": {"url": "https://user:canary@id.test/"}}), ".jwks.url", "no address"),
        (json!({"jwks": {}}), ".jwks", "give either url or file"),
        (json!({"tenant": {}}), ".tenant", "nobody pays"),
        (json!({"tenant": {"default": "t", "map": {"a": "b"}}}), ".tenant.map", "no `claim`"),
    ] {
        let wrong = jwt(&json!([with(changes.clone())]), &keys).err().unwrap();
        assert_eq!(wrong[0].0, format!(".jwt.issuers[0]{key}"), "{changes}");
        assert!(wrong[0].1.contains(told) && !wrong[0].1.contains("canary"), "{changes}: {}", wrong[0].1);
    }
    for url in ["http://localhost:1/x", "http://127.9.9.9/x", "http://[::1]:3/x", "https://id.test"] {
        assert!(jwt(&json!([with(json!({"jwks": {"url": url}}))]), &keys).is_ok(), "{url}");
    }
    let twice = jwt(&json!([issuer(), issuer()]), &keys).err().unwrap();
    assert_eq!(twice[0].0, ".jwt.issuers[1].issuer");
    let named = jwt(&json!([issuer(), with(json!({"issuer": "https://b.test"}))]), &keys).err().unwrap();
    assert!(named[0].0 == ".jwt.issuers[1].name" && named[0].1.contains("a `name` of its own"));
    // What the schema refuses: no audience, an algorithm that is none or symmetric.
    for (name, value) in [
        ("audience", Value::Null),
        ("algorithms", json!(["HS256"])),
        ("algorithms", json!(["none"])),
        ("leeway_s", json!(-1)),
    ] {
        let mut wrong = issuer();
        match value {
            Value::Null => drop(wrong.as_object_mut().unwrap().remove(name)),
            value => wrong[name] = value,
        }
        assert!(serde_json::from_value::<Issuer>(wrong).is_err(), "{name}");
    }
}

#[test]
fn many_threads_ask_at_once() {
    let signer = Signer::ed25519();
    let jwt = jwt(&json!([issuer()]), &key_set(&[signer.jwk("k")]).0).ok().unwrap().authenticator;
    let tokens: Vec<String> = (0..16).map(|n| signer.token("k", &but("sub", json!(format!("s{n}"))))).collect();
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for (n, token) in tokens.iter().enumerate().cycle().take(400) {
                    let identity = yes(ask(&*jwt, token));
                    if *identity.principal != *format!("corp:s{n}") {
                        wrong.lock().unwrap().push(n);
                    }
                }
            });
        }
    });
    assert_eq!(wrong.into_inner().unwrap(), Vec::<usize>::new());
}

#[test]
fn nothing_but_the_token_itself_is_let_in_whatever_bytes_are_changed() {
    let signer = Signer::ed25519();
    let jwt = jwt(&json!([issuer()]), &key_set(&[signer.jwk("k")]).0).ok().unwrap().authenticator;
    let token = signer.token("k", &claims());
    let mut random: u64 = 7;
    let mut chance = |below: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % below
    };
    for round in 0..20_000 {
        let mut bytes = token.clone().into_bytes();
        for _ in 0..=chance(3) {
            let at = chance(bytes.len());
            match chance(3) {
                0 => drop(bytes.remove(at)),
                1 => bytes.insert(at, b"._-=A0z{"[chance(8)]),
                _ => bytes[at] = b' ' + chance(95) as u8,
            }
        }
        let changed = String::from_utf8(bytes).unwrap();
        let answer = ask(&*jwt, &changed);
        assert!(!matches!(answer, Answer::Yes(_)) || changed.trim() == token, "{round}: {changed}");
    }
    yes(ask(&*jwt, &token));
}
