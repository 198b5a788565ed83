//! The rules that are built in: what providers document about the shape of their keys.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::{Allow, Pattern, Rule, Wants};

/// Name, expression, the least entropy.
const RULES: &[(&str, &str, f32)] = &[
    ("age-key", r"\bAGE-SECRET-KEY-1[QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L]{58}", 0.0),
    ("airtable-token", r"\b(pat[A-Za-z0-9]{14}\.[a-f0-9]{64})\b", 3.0),
    ("anthropic-key", r"\bsk-ant-(?:api|admin|sid|oat)[0-9]{2}-[A-Za-z0-9_\-]{80,120}", 3.5),
    ("atlassian-token", r"\bATATT3[A-Za-z0-9_\-=]{150,220}", 3.5),
    ("aws-access-key", r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b", 3.0),
    ("aws-secret-key", r#"(?i)aws.{0,20}(?:secret|access|key).{0,20}[=:]\s{0,3}["']?([a-z0-9/+]{40})\b"#, 4.0),
    ("azure-storage-key", r"\bAccountKey=([A-Za-z0-9+/]{86}==)", 4.0),
    ("crates-io-token", r"\bcio[A-Za-z0-9]{32}\b", 3.5),
    ("databricks-token", r"\bdapi[a-f0-9]{32}(?:-[0-9])?\b", 3.0),
    ("digitalocean-token", r"\bdo[opr]_v1_[a-f0-9]{64}\b", 3.0),
    ("discord-token", r"\b[MNO][A-Za-z0-9_\-]{23,25}\.[A-Za-z0-9_\-]{6}\.[A-Za-z0-9_\-]{27,38}", 4.0),
    (
        "discord-webhook",
        r"\bhttps://(?:ptb\.|canary\.)?discord(?:app)?\.com/api/webhooks/[0-9]{17,20}/[A-Za-z0-9_\-]{60,80}",
        4.0,
    ),
    ("docker-token", r"\bdckr_(?:pat|oat)_[A-Za-z0-9_\-]{27,36}", 3.0),
    ("doppler-token", r"\bdp\.(?:pt|st|ct|sa|scim|audit)\.(?:[a-z0-9_\-]{2,35}\.)?[A-Za-z0-9]{40,44}\b", 3.5),
    ("dropbox-token", r"\bsl\.[A-Za-z0-9_\-]{130,200}", 4.0),
    ("facebook-token", r"\bEAA[MC][A-Za-z0-9]{80,250}\b", 4.0),
    ("figma-token", r"\bfig[dorp]_[A-Za-z0-9_\-]{40,50}", 3.5),
    ("github-fine-grained-token", r"\bgithub_pat_[A-Za-z0-9_]{82}\b", 3.5),
    ("github-token", r"\bgh[pousr]_[A-Za-z0-9]{36,251}\b", 3.0),
    (
        "gitlab-token",
        r"\bgl(?:pat|dt|rt|cbt|ptt|ft|soat|agent|imt|oas|ffct)-(?:[a-z0-9]{1,4}_)?[A-Za-z0-9_\-]{20,64}",
        3.0,
    ),
    ("google-api-key", r"\bAIza[A-Za-z0-9_\-]{35}", 3.5),
    ("google-oauth-secret", r"\bGOCSPX-[A-Za-z0-9_\-]{28}", 3.0),
    ("google-oauth-token", r"\bya29\.[A-Za-z0-9_\-]{30,400}", 3.5),
    ("grafana-token", r"\bgls?[ac]_[A-Za-z0-9+/]{32,400}(?:_[a-f0-9]{8})?", 3.5),
    ("groq-key", r"\bgsk_[A-Za-z0-9]{48,56}\b", 3.5),
    ("heroku-key", r"\bHRKU-[A-Za-z0-9_\-]{36,60}", 3.0),
    ("huggingface-token", r"\b(?:hf_|api_org_)[A-Za-z0-9]{34}\b", 3.0),
    ("hubspot-token", r"\bpat-(?:na|eu|ap)[0-9]-[a-f0-9]{8}-[a-f0-9]{4}-[a-f0-9]{4}-[a-f0-9]{4}-[a-f0-9]{12}\b", 3.0),
    ("infracost-token", r"\bico-[A-Za-z0-9]{32}\b", 3.0),
    ("linear-key", r"\blin_(?:api|oauth)_[A-Za-z0-9]{40,64}\b", 3.0),
    ("mailchimp-key", r"\b[0-9a-f]{32}-us[0-9]{1,2}\b", 3.0),
    ("mailgun-key", r"\bkey-[0-9a-f]{32}\b", 3.0),
    ("newrelic-key", r"\bNRAK-[A-Z0-9]{27}\b", 3.0),
    ("notion-token", r"\b(?:ntn_[A-Za-z0-9]{40,50}|secret_[A-Za-z0-9]{43})\b", 3.5),
    ("npm-token", r"\bnpm_[A-Za-z0-9]{36}\b", 3.0),
    ("openai-key", r"\bsk-(?:(?:proj|svcacct|admin|None)-[A-Za-z0-9_\-]{40,200}|[A-Za-z0-9]{32,64}\b)", 3.5),
    ("openrouter-key", r"\bsk-or-v1-[a-f0-9]{64}\b", 3.0),
    ("perplexity-key", r"\bpplx-[A-Za-z0-9]{40,64}\b", 3.5),
    ("planetscale-token", r"\bpscale_(?:tkn|pw|oauth)_[A-Za-z0-9=._\-]{32,64}", 3.0),
    ("postman-key", r"\bPMAK-[a-f0-9]{24}-[a-f0-9]{34}\b", 3.0),
    ("pulumi-token", r"\bpul-[a-f0-9]{40}\b", 3.0),
    ("pypi-token", r"\bpypi-AgE[A-Za-z0-9_\-]{50,300}", 3.5),
    ("replicate-token", r"\br8_[A-Za-z0-9]{37,40}\b", 3.5),
    ("rubygems-key", r"\brubygems_[a-f0-9]{48}\b", 3.0),
    ("sendgrid-key", r"\bSG\.[A-Za-z0-9_\-]{22}\.[A-Za-z0-9_\-]{43}", 3.5),
    ("sentry-token", r"\bsntry[su]_[A-Za-z0-9+/=_]{60,300}", 3.5),
    ("shopify-token", r"\bshp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}\b", 3.0),
    ("slack-app-token", r"\bxapp-[0-9]-[A-Z0-9]{8,14}-[0-9]{8,16}-[a-z0-9]{40,70}\b", 3.0),
    ("slack-token", r"\bxox[abeoprs](?:\.xox[bp])?-(?:[0-9]{1,14}-){0,3}[A-Za-z0-9\-]{10,160}", 3.0),
    (
        "slack-webhook",
        r"\bhttps://hooks\.slack\.com/(?:services|workflows|triggers)/[A-Z0-9]{8,12}/[A-Z0-9]{8,20}/[A-Za-z0-9/]{20,46}",
        3.5,
    ),
    ("square-token", r"\b(?:EAAA|sq0(?:atp|csp|idp)-)[A-Za-z0-9_\-]{22,64}", 3.5),
    ("stripe-key", r"\b(?:sk|rk)_(?:live|test|prod)_[A-Za-z0-9]{16,120}\b", 3.0),
    ("stripe-webhook-secret", r"\bwhsec_[A-Za-z0-9+/]{32,64}", 3.5),
    ("supabase-token", r"\bsb(?:p_[a-f0-9]{40}|_secret_[A-Za-z0-9_\-]{30,45})\b", 3.0),
    ("telegram-token", r"\b[0-9]{8,10}:AA[A-Za-z0-9_\-]{33}\b", 3.5),
    ("terraform-token", r"\b[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_\-]{60,70}", 3.5),
    ("twilio-key", r"\b(?:AC|SK)[0-9a-f]{32}\b", 3.0),
    ("vault-token", r"\bhv[sb]\.[A-Za-z0-9_\-]{90,300}", 3.5),
    ("xai-key", r"\bxai-[A-Za-z0-9]{70,90}\b", 3.5),
];

/// What only a window bounds: its size, and what the match must be.
type Open = (&'static str, &'static str, usize, fn(&str) -> bool);

const OPEN: &[Open] = &[
    ("jwt", r"\beyJ[A-Za-z0-9_\-]+\.eyJ[A-Za-z0-9_\-]+\.[A-Za-z0-9_\-]+", 4096, is_jwt),
    (
        "private-key",
        r#"-----BEGIN (?:[A-Z0-9]{2,10} ){0,3}PRIVATE KEY(?: BLOCK)?-----[A-Za-z0-9+/=\s\\:,.()\-"]+"#,
        8192,
        |text| text.len() > 120,
    ),
];

/// Passwords in addresses: `postgres://user:password@host`.
const ADDRESS: &str = r#"\b[a-zA-Z][a-zA-Z0-9+.\-]{1,15}://[^\s/:@"'<>]{0,64}:([^\s/:@"'<>]{3,100})@[a-zA-Z0-9\[]"#;

const ASSIGNED: &str = r#"(?i)(?:password|passwd|passphrase|pwd|secret|token|api[_\-]?key|access[_\-]?key|auth[_\-]?key|private[_\-]?key|account[_\-]?key|encryption[_\-]?key|client[_\-]?secret|credential)s?["'\]]{0,2}\s{0,3}(?::=|=>|=|:)\s{0,3}["'`]?([^\s"'`,;<>{}()$]{8,150})"#;

/// All rules but [`assigned`].
pub(super) fn rules(rule: usize) -> Result<Vec<Rule>, String> {
    let shaped = RULES.iter().map(|(name, expression, entropy)| {
        let group = usize::from(expression.contains("([") || expression.contains("(pat"));
        let pattern = Pattern::ascii(rule, name, expression, None, group)?;
        Ok(Rule { pattern, wants: Wants { entropy: *entropy, allow: vec![samples()], ..Wants::default() } })
    });
    let open = OPEN.iter().map(|(name, expression, window, check)| {
        let pattern = Pattern::ascii(rule, name, expression, Some(*window), 0)?;
        Ok(Rule { pattern, wants: Wants { check: Some(*check), ..Wants::default() } })
    });
    let address = Pattern::ascii(rule, "password-in-url", ADDRESS, None, 1).map(|pattern| {
        let check: Option<fn(&str) -> bool> = Some(|text| !is_placeholder(text));
        Rule { pattern, wants: Wants { check, ..Wants::default() } }
    });
    shaped.chain(open).chain([address]).collect()
}

/// Whatever looks random and is assigned to something called a secret.
pub(super) fn assigned(rule: usize) -> Result<Rule, String> {
    let pattern = Pattern::ascii(rule, "assigned-secret", ASSIGNED, None, 1)?;
    let check: Option<fn(&str) -> bool> = Some(|text| looks_random(text) && !is_placeholder(text));
    Ok(Rule { pattern, wants: Wants { entropy: 2.9, check, allow: vec![samples()], ..Wants::default() } })
}

/// Keys of documentation.
fn samples() -> Allow {
    let stopwords =
        ["example", "xxxxxx", "your_", "your-", "placeholder", "abcdefghijklmnop", "0123456789ab", "redacted"];
    Allow { stopwords: stopwords.map(str::to_owned).to_vec(), ..Allow::default() }
}

/// Letters and digits, or letters and signs: not a word, not a number, not a path.
fn looks_random(text: &str) -> bool {
    let any = |wanted: fn(&u8) -> bool| text.as_bytes().iter().any(wanted);
    let digit = any(u8::is_ascii_digit);
    let letter = any(u8::is_ascii_alphabetic);
    let sign = any(|byte| b"!@#%^&*~?".contains(byte));
    let code = text.contains("::") || text.contains("->") || text.starts_with('/') || text.contains("://");
    letter && (digit || sign) && !code
}

fn is_placeholder(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    let masked = lower.bytes().all(|byte| byte == b'*' || byte == b'x' || byte == b'.' || byte == b'-');
    let word =
        ["password", "passwd", "pass", "secret", "changeme", "pwd", "token", "example"].contains(&lower.as_str());
    let hint = ["your", "example", "placeholder", "changeme", "redacted", "process.env", "os.environ", "getenv"];
    masked || word || text.starts_with(['$', '%', '{', '[']) || hint.iter().any(|hint| lower.contains(hint))
}

/// Whether its head says how it is signed.
fn is_jwt(text: &str) -> bool {
    let head = text.split('.').next().unwrap_or_default();
    let decoded = URL_SAFE_NO_PAD.decode(head).ok();
    let head: Option<serde_json::Value> = decoded.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    head.is_some_and(|head| head.get("alg").is_some_and(serde_json::Value::is_string))
}
