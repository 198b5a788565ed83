//! From guardrails as they are written to those that texts meet.

use std::sync::Arc;

use infergate_plugins::guardrail::redact::Redaction;
use infergate_plugins::guardrail::{self, Config};

use super::{Compiler, file};
use crate::guard::Rails;

impl Compiler<'_> {
    /// The guardrails, if the policy has any.
    pub(super) fn guardrails(&mut self, file: &file::File) -> Option<Arc<Rails>> {
        if file.guardrails.is_empty() {
            if file.audit.capture.text == file::CaptureText::Redacted {
                self.wrong("audit.capture.text", "nothing redacts: give the policy `guardrails`, or say none or full");
            }
            return None;
        }
        let key = self.guardrail_key(file);
        let built = self.with_files(|open, secret| {
            guardrail::build(&file.guardrails, &mut guardrail::World { file: open, secret, key: &key })
        });
        let rules = built.map_err(|wrongs| {
            for (path, message) in wrongs {
                self.wrong(&format!("guardrails{path}"), message);
            }
        });
        let rules = rules.ok()?;
        for (path, message) in guardrail::warnings(&file.guardrails) {
            self.warn(&format!("guardrails{path}"), message);
        }
        let meters = rules.rules().iter().map(|rule| self.world.telemetry.guardrail(&rule.name)).collect();
        let rails = Rails::new(rules, meters);
        self.unread_paths(file, &rails);
        Some(Arc::new(rails))
    }

    fn guardrail_key(&mut self, file: &file::File) -> Vec<u8> {
        if let Some(source) = &file.guardrail_key {
            return self
                .secret("guardrail_key", source)
                .map(|key| key.reveal().as_bytes().to_vec())
                .unwrap_or_default();
        }
        let hashes = |config: &Config| config.redact == Some(Redaction::Hash);
        if let Some(index) = file.guardrails.iter().position(hashes) {
            let message = "a hash needs a key, or anybody could try all card numbers: give the policy `guardrail_key`";
            self.wrong(&format!("guardrails[{index}].redact"), message);
        }
        Vec::new()
    }

    /// What passes through unread passes rules that must read it.
    fn unread_paths(&mut self, file: &file::File, rails: &Rails) {
        let Some(rule) = rails.insists(true).or_else(|| rails.insists(false)).cloned() else { return };
        for (index, entry) in file.passthrough.iter().enumerate().filter(|(_, entry)| !entry.unguarded) {
            let message = format!(
                "{} passes through unread, and the guardrail {rule} must read everything: say `unguarded: true` if this is meant",
                entry.path
            );
            self.wrong(&format!("passthrough[{index}]"), message);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::policy::tests::{POOLS, compiled, problems};

    const BLOCKS: &str = "guardrails:\n  - {name: words, in: [prompt.user], verdict: block, words: {list: [secret]}}\n";

    #[test]
    fn what_is_wrong_with_a_rule_is_told_at_its_line() {
        let told = problems(&format!(
            "{POOLS}guardrails:\n  - {{name: a, in: [prompt.user], verdict: block}}\n  - {{name: b, in: [prompt.user], verdict: redact, redact: hash, pii: {{find: [card]}}}}\n"
        ));
        assert!(told.iter().any(|line| line.starts_with("policy.yaml:6:")), "{told:?}");
        assert!(
            told.iter().any(|line| line.contains("guardrail_key") && line.starts_with("policy.yaml:7:")),
            "{told:?}"
        );
    }

    #[test]
    fn topics_that_are_only_forbidden_are_a_warning() {
        let topic = |name: &str| {
            format!(
                "{{name: {name}, examples: [my {name} hurts, what helps my {name}, is my {name} ill, see a doctor for the {name}, a pill for my {name}]}}"
            )
        };
        let rule = |topics: String| {
            format!("{POOLS}guardrails:\n  - {{name: a, in: [prompt.user], verdict: block, topic: {{{topics}}}}}\n")
        };
        let forbid = format!("forbid: [{}]", topic("head"));
        let warnings = compiled(&rule(forbid.clone())).unwrap().warnings;
        let [warning] = &warnings[..] else { panic!("{warnings:?}") };
        assert_eq!(warning.path, "guardrails[0].topic.forbid");
        assert!(warning.message.contains("name under `allow`") && warning.place.is_some(), "{warning:?}");
        for fine in [format!("{forbid}, allow: [{}]", topic("car")), format!("allow: [{}]", topic("car"))] {
            assert!(compiled(&rule(fine)).unwrap().warnings.is_empty());
        }
    }

    #[test]
    fn a_path_that_nobody_reads_and_a_rule_that_must_read_everything_do_not_go_together() {
        let passes = "passthrough: [{path: /x, pool: fast}]\n";
        let told = problems(&format!("{POOLS}{BLOCKS}{passes}"));
        assert!(told[0].contains("unguarded: true"), "{told:?}");
        let meant = passes.replace("pool: fast", "pool: fast, unguarded: true");
        assert!(compiled(&format!("{POOLS}{BLOCKS}{meant}")).is_ok());
        let lenient = BLOCKS.replace("verdict: block", "verdict: block, on_error: allow");
        assert!(compiled(&format!("{POOLS}{lenient}{passes}")).is_ok());
    }
}
