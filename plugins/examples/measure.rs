use infergate_plugins::guardrail::{self, Config, Place, World, redact::Placeholders};
use std::collections::BTreeMap;
fn main() {
    let path = std::env::args().nth(1).unwrap();
    let rules = r#"[{"name":"p","in":["prompt.user"],"verdict":"redact","pii":{"find":["email","url","iban","card","ip","phone","birth_date"],"countries":["us"]}}]"#;
    let configs: Vec<Config> = serde_json::from_str(rules).unwrap();
    let g = guardrail::build(&configs, &mut World { file: &mut |_| Err(String::new()), key: b"k" }).unwrap();
    let s = g.scanner(Place::PromptUser).unwrap();
    let map: BTreeMap<&str, &str> = [
        ("email", "EMAIL_ADDRESS"),
        ("url", "DOMAIN_NAME"),
        ("iban", "IBAN_CODE"),
        ("card", "CREDIT_CARD"),
        ("ip", "IP_ADDRESS"),
        ("phone", "PHONE_NUMBER"),
        ("us_ssn", "US_SSN"),
        ("birth_date", "DATE_TIME"),
    ]
    .into();
    let mut t: BTreeMap<String, [usize; 4]> = BTreeMap::new(); // gold, hit, found, right
    for line in std::fs::read_to_string(path).unwrap().lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let text = row["text"].as_str().unwrap();
        let byte = |n: usize| text.char_indices().nth(n).map_or(text.len(), |(i, _)| i);
        let spans: Vec<(String, usize, usize)> = row["spans"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| {
                (
                    s[0].as_str().unwrap().to_owned(),
                    byte(s[1].as_u64().unwrap() as usize),
                    byte(s[2].as_u64().unwrap() as usize),
                )
            })
            .collect();
        let p = s.judge(text, &mut Placeholders::default());
        let found: Vec<(String, usize, usize)> = p
            .found
            .iter()
            .map(|f| {
                (map.get(&*f.label).copied().unwrap_or("?").to_owned(), f.range.start as usize, f.range.end as usize)
            })
            .collect();
        let over = |a: &(String, usize, usize), b: &(String, usize, usize)| a.0 == b.0 && a.1 < b.2 && b.1 < a.2;
        for g in &spans {
            let e = t.entry(g.0.clone()).or_default();
            e[0] += 1;
            if found.iter().any(|f| over(f, g)) {
                e[1] += 1
            } else if map.values().any(|v| *v == g.0) && g.0 != "DATE_TIME" {
                println!("MISS {} {:?} in {:?}", g.0, &text[g.1..g.2], text)
            }
        }
        for f in &found {
            let e = t.entry(f.0.clone()).or_default();
            e[2] += 1;
            if spans.iter().any(|g| over(f, g)) {
                e[3] += 1
            } else {
                println!("FALSE {} {:?} in {:?}", f.0, &text[f.1..f.2], text)
            }
        }
    }
    for (k, [gold, hit, found, right]) in t {
        if found > 0 || map.values().any(|v| *v == k) {
            println!("{k}: recall {hit}/{gold} precision {right}/{found}")
        }
    }
}
