use serde_json::json;

use super::*;
use crate::audit::journal::{Act, By, Journal};
use crate::audit::made::{Made, pack, rechain};
use crate::audit::verify;
use crate::policy::file::Audit;
use crate::telemetry::Telemetry;

fn proof(made: &Made) -> Report {
    proof_with(made, Options { keys: vec![PublicKey::parse(&made.public()).unwrap()], ..Options::default() })
}

fn proof_with(made: &Made, options: Options<'_>) -> Report {
    directory(made.path(), &options).unwrap()
}

#[track_caller]
fn fine(made: &Made) -> Report {
    let report = proof(made);
    assert!(report.problems.is_empty(), "{:#?}", told(&report));
    report
}

fn told(report: &Report) -> Vec<String> {
    report.problems.iter().map(ToString::to_string).collect()
}

/// The only problem.
#[track_caller]
fn only(made: &Made) -> Problem {
    let report = proof(made);
    assert_eq!(report.problems.len(), 1, "{:#?}", told(&report));
    report.problems[0].clone()
}

#[track_caller]
fn at(problem: &Problem) -> (What, u64, u64) {
    (problem.what, problem.line.unwrap(), problem.seq.unwrap())
}

/// One run of two segments and 20 records, closed.
///
/// Lines 1 to 12 are in the first segment: open, 10 records, checkpoint; 13 to 24 in the second: segment, 10 records,
/// close.
fn journal() -> Made {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(10).rotate();
    run.records(10);
    run.close();
    made
}

/// The same, and a second run that names its end.
fn two_runs() -> Made {
    let mut made = journal();
    let mut run = made.run(2);
    run.records(3);
    run.close();
    made
}

#[test]
fn a_journal_that_nobody_touched_is_proved() {
    let report = fine(&two_runs());
    assert_eq!((report.records, report.lines, report.notes.len()), (23, 29, 0));
    assert_eq!(report.runs[0].end, End::Closed);
    assert_eq!((report.runs[0].segments, report.runs[0].signed_to), (2, 24));
    assert_eq!(report.runs[0].from, "2026-11-22T14:00:01.000001Z");
}

#[test]
fn compressed_segments_are_proved_as_they_are() {
    let made = journal();
    pack(&made.file(1, 1));
    assert_eq!(fine(&made).records, 20);
    let packed = made.file(1, 1).with_extension("jsonl.zst");
    let bytes = std::fs::read(&packed).unwrap();
    std::fs::write(&packed, &bytes[..bytes.len() / 2]).unwrap();
    let problem = &proof(&made).problems[0];
    assert_eq!(problem.what, What::Malformed);
    assert_eq!(problem.segment.as_deref(), Some("000001.jsonl.zst"));
}

#[test]
fn a_changed_byte_is_found_in_its_line() {
    let made = journal();
    made.edit(1, 1, |lines| lines[4] = lines[4].replace("\"status\":200", "\"status\":201"));
    let problem = only(&made);
    assert_eq!(at(&problem), (What::Chain, 5, 5));
    let text = problem.to_string();
    let expected = "20261122T140001Z-00000001/000001.jsonl:5: seq 5: this line or the one before it was changed, \
                    removed or moved: its chain does not follow";
    assert_eq!(text, expected);
}

#[test]
fn every_byte_of_a_journal_counts() {
    let made = journal();
    let path = made.file(1, 1);
    let bytes = std::fs::read(&path).unwrap();
    for place in (0..bytes.len()).step_by(7) {
        let mut changed = bytes.clone();
        changed[place] ^= 1;
        std::fs::write(&path, changed).unwrap();
        let problems = proof(&made).problems;
        assert!(!problems.is_empty(), "byte {place} was changed");
        // It is found where it is: line ends that vanish make the line before too long.
        let line = bytes[..place].iter().filter(|byte| **byte == b'\n').count() as u64 + 1;
        let first = problems[0].line.unwrap();
        assert!(first == line || first == line + 1, "byte {place} of line {line}: {}", problems[0]);
    }
}

#[test]
fn a_deleted_line_is_a_hole() {
    let made = journal();
    made.edit(1, 1, |lines| drop(lines.remove(4)));
    let problem = only(&made);
    assert_eq!(at(&problem), (What::Hole, 5, 6));
    assert!(problem.message.contains("line 5 is missing"), "{problem}");
}

#[test]
fn the_last_line_of_a_finished_segment_cannot_go() {
    let made = journal();
    made.edit(1, 1, |lines| drop(lines.pop()));
    let problem = only(&made);
    assert_eq!((problem.segment.as_deref(), at(&problem)), (Some("000002.jsonl"), (What::Hole, 1, 13)));
}

#[test]
fn a_swapped_pair_is_out_of_order() {
    let made = journal();
    made.edit(1, 1, |lines| lines.swap(4, 5));
    let report = proof(&made);
    let problems: Vec<_> = report.problems.iter().map(at).collect();
    assert_eq!(problems, [(What::Hole, 5, 6), (What::Repeat, 6, 5)]);
}

#[test]
fn a_duplicated_line_is_a_repeat() {
    let made = journal();
    made.edit(1, 1, |lines| lines.insert(4, lines[3].clone()));
    assert_eq!(at(&only(&made)), (What::Repeat, 5, 4));
}

#[test]
fn a_checkpoint_cannot_be_forged() {
    let made = journal();
    made.edit(1, 1, |lines| {
        let place = lines[11].find("\"signature\":\"").unwrap() + 13;
        let digit = if lines[11].as_bytes()[place] == b'0' { "1" } else { "0" };
        lines[11].replace_range(place..=place, digit);
        rechain(lines, 11);
    });
    let problems: Vec<_> = proof(&made).problems.iter().map(|problem| (problem.what, problem.seq)).collect();
    // The second segment still goes on from the genuine line.
    assert_eq!(problems, [(What::Signature, Some(12)), (What::Chain, Some(13))]);
}

#[test]
fn a_chain_computed_anew_fails_at_the_next_signature() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(5).checkpoint();
    run.records(2);
    run.close();
    made.edit(1, 1, |lines| {
        lines[2] = lines[2].replace("\"status\":200", "\"status\":201");
        rechain(lines, 2);
    });
    let report = proof(&made);
    let problems: Vec<_> = report.problems.iter().map(at).collect();
    assert_eq!(problems, [(What::Signature, 7, 7), (What::Signature, 10, 10)]);
    assert!(report.problems[0].message.contains("chained anew"));
}

#[test]
fn a_signature_for_another_head_does_not_help() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(5);
    run.close();
    // The forger takes a record out, numbers and chains everything anew, and has no key.
    made.edit(1, 1, |lines| {
        lines.remove(3);
        for (at, line) in lines.iter_mut().enumerate() {
            *line = line.replacen(&format!("\"seq\":{},", at + 2), &format!("\"seq\":{},", at + 1), 1);
        }
        rechain(lines, 3);
    });
    let whats: Vec<_> = proof(&made).problems.iter().map(|problem| problem.what).collect();
    assert_eq!(whats, [What::Count, What::Signature]);
}

#[test]
fn the_wrong_key_is_told_once() {
    let made = journal();
    let other = PublicKey::parse(&Made::new().public()).unwrap();
    let report = proof_with(&made, Options { keys: vec![other], ..Options::default() });
    assert_eq!(report.problems.len(), 1, "{:?}", told(&report));
    assert_eq!(at(&report.problems[0]), (What::Signature, 1, 1));
    assert_eq!(report.runs[0].signed_to, 0);
}

#[test]
fn the_directorys_own_key_proves_less_and_says_so() {
    let report = proof_with(&journal(), Options::default());
    assert!(report.problems.is_empty());
    assert!(report.notes[0].contains("pin it with --key"), "{:?}", report.notes);
}

#[test]
fn a_removed_segment_is_missed() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(2).rotate();
    run.records(2).rotate();
    run.records(2);
    run.close();
    std::fs::remove_file(made.file(1, 2)).unwrap();
    let problem = only(&made);
    assert_eq!((problem.what, problem.segment.as_deref()), (What::MissingSegment, Some("000002.jsonl")));
    assert!(problem.message.contains("between seq 4 and 9"), "{problem}");
    std::fs::remove_file(made.file(1, 1)).unwrap();
    assert_eq!(proof(&made).problems.len(), 2);
}

#[test]
fn a_removed_run_is_missed() {
    let made = two_runs();
    std::fs::remove_dir_all(made.file(1, 1).parent().unwrap()).unwrap();
    let problem = only(&made);
    assert_eq!((problem.what, problem.run.as_str()), (What::MissingRun, "20261122T140001Z-00000001"));
}

#[test]
fn a_tail_cut_off_after_the_seal_is_missed() {
    let made = two_runs();
    made.edit(1, 2, |lines| lines.truncate(5));
    let problem = only_ignoring(&made, What::Unsealed);
    assert_eq!(problem.what, What::Hole);
    assert!(problem.message.contains("up to seq 24") && problem.message.contains("behind seq 17"), "{problem}");
}

/// The only problem besides those of a kind.
#[track_caller]
fn only_ignoring(made: &Made, what: What) -> Problem {
    let mut problems = proof(made).problems;
    problems.retain(|problem| problem.what != what);
    assert_eq!(problems.len(), 1, "{problems:#?}");
    problems.remove(0)
}

#[test]
fn a_whole_segment_cut_off_after_the_seal_is_missed() {
    let made = two_runs();
    std::fs::remove_file(made.file(1, 2)).unwrap();
    assert_eq!(only_ignoring(&made, What::Unsealed).what, What::Hole);
}

#[test]
fn lines_behind_the_end_were_added() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(2).checkpoint();
    run.tip(0, false);
    run.records(1);
    made.run(2).close();
    assert_eq!(only_ignoring(&made, What::Unsealed).what, What::Added);

    let made = journal();
    made.edit(1, 2, |lines| {
        let line = lines[3].replacen("\"seq\":16", "\"seq\":25", 1).replace(&Made::id(12), &Made::id(99));
        lines.push(line);
        rechain(lines, 12);
    });
    assert_eq!(at(&only(&made)), (What::Added, 13, 25));
}

#[test]
fn a_killed_run_is_sealed_by_the_next() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(3).checkpoint();
    run.records(2);
    run.kill("{\"v\":1,\"se");
    assert_eq!(only(&made).what, What::Unsealed);
    let accepted = proof_with(&made, Options { open_end: true, ..Options::default() });
    assert!(accepted.problems.is_empty() && accepted.notes[1].contains("--open-end"), "{:?}", accepted.notes);
    made.run(2).close();
    let report = fine(&made);
    assert_eq!(report.runs[0].end, End::Sealed { by: "20261122T140002Z-00000002".to_owned() });
    let signed = (report.runs[0].signed_to, report.unsigned);
    assert_eq!(signed, (7, 0), "the seal signs for what stands behind the last checkpoint");
}

#[test]
fn half_a_line_must_be_as_long_as_the_seal_says() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(3);
    run.kill("{\"v\":1,\"se");
    made.run(2).close();
    let path = made.file(1, 1);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, &text[..text.len() - 1]).unwrap();
    assert_eq!(only_ignoring(&made, What::Unsealed).what, What::Torn);
    std::fs::write(&path, text.clone() + "x\n").unwrap();
    assert!(proof(&made).problems.iter().any(|problem| problem.what == What::Malformed));
}

#[test]
fn a_tail_cut_off_before_the_seal_is_unsealed_and_an_anchor_shows_it() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(3);
    let kept = run.checkpoint();
    run.records(2);
    let last = run.checkpoint();
    let anchor = made.path().join("anchors");
    std::fs::write(&anchor, kept + &last).unwrap();
    let anchored = |made: &Made| {
        let options = Options { anchors: vec![anchor.clone()], open_end: true, ..Options::default() };
        proof_with(made, options).problems
    };
    assert!(anchored(&made).is_empty());
    made.edit(1, 1, |lines| lines.truncate(6));
    assert_eq!(only(&made).what, What::Unsealed);
    let problems = anchored(&made);
    assert!(problems.iter().all(|problem| problem.what == What::Anchor) && problems.len() == 2, "{problems:?}");
    assert!(problems[0].message.contains("anchors:2 saw this line: the journal was cut off"), "{}", problems[0]);
    std::fs::remove_dir_all(made.file(1, 1).parent().unwrap()).unwrap();
    assert!(anchored(&made)[0].message.contains("the whole run was removed"));
}

#[test]
fn what_the_log_told_of_a_checkpoint_is_an_anchor_too() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(3);
    let (seq, head, name) = (run.seq + 1, run.chain.clone(), run.name.clone());
    run.close();
    let anchor = made.path().join("anchors");
    let told = |head: &str| json!({"level": "INFO", "run": name, "seq": seq, "head": head}).to_string();
    std::fs::write(&anchor, told(&head)).unwrap();
    let options = || Options { anchors: vec![anchor.clone()], ..Options::default() };
    assert!(proof_with(&made, options()).problems.is_empty());
    std::fs::write(&anchor, told(&"1".repeat(64))).unwrap();
    assert_eq!(proof_with(&made, options()).problems[0].what, What::Anchor);
}

#[test]
fn a_run_that_is_being_written_is_fine() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(3).checkpoint();
    run.records(2);
    let path = run.path.join("lock");
    run.kill("{\"v\"");
    let lock = std::fs::File::open(path).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let report = fine(&made);
    assert_eq!((&report.runs[0].end, report.unsigned), (&End::Live, 2));
}

#[test]
fn an_upgrade_leaves_two_runs_that_vouch_for_each_other() {
    let mut made = Made::new();
    let mut old = made.run(1);
    old.records(3);
    old.tip(0, true);
    old.records(2);
    drop(old.checkpoint());
    old.line("act", &json!({"act": "drain", "key": {"by": 1}, "z": 0}));
    // The end of the old one, as the run after the next finds it.
    old.tip(0, false);
    let end = made.previous.pop().unwrap();
    made.run(2).records(1).checkpoint();
    made.previous.push(end);
    made.run(3).close();
    let report = proof(&made);
    let whats: Vec<_> = report.problems.iter().map(|problem| (problem.what, problem.run.clone())).collect();
    assert_eq!(whats, [(What::Unsealed, "20261122T140002Z-00000002".to_owned())]);
    assert!(matches!(report.runs[0].end, End::Sealed { .. }));
    // A line of the old run that the second one saw is changed.
    made.edit(1, 1, |lines| {
        lines[3] = lines[3].replace("\"status\":200", "\"status\":201");
        rechain(lines, 3);
    });
    let report = proof(&made);
    assert!(
        report.problems.iter().any(|problem| problem.what == What::Chain && problem.message.contains("found another"))
    );
}

#[test]
fn what_retention_removed_is_not_missed() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(10);
    let first = run.rotate();
    run.records(10);
    let second = run.rotate();
    run.records(1);
    run.line("retired", &first);
    run.line("retired", &second);
    run.records(4);
    run.close();
    std::fs::remove_file(made.file(1, 1)).unwrap();
    fine(&made);
    std::fs::remove_file(made.file(1, 2)).unwrap();
    let report = fine(&made);
    assert_eq!((report.runs[0].retired, report.records), (2, 5));
}

#[test]
fn the_line_that_tells_of_a_removed_segment_may_go_with_another() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(10);
    let first = run.rotate();
    run.line("retired", &first);
    let second = run.rotate();
    run.records(3).rotate();
    run.records(2);
    run.close();
    std::fs::remove_file(made.file(1, 1)).unwrap();
    std::fs::remove_file(made.file(1, 2)).unwrap();
    // Nothing tells of the second.
    let problems: Vec<_> = proof(&made).problems.into_iter().map(|problem| problem.segment).collect();
    assert_eq!(problems, [Some("000001.jsonl".to_owned()), Some("000002.jsonl".to_owned())]);

    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(10);
    let first = run.rotate();
    run.line("retired", &first);
    let second_of_this = run.rotate();
    run.line("retired", &second_of_this);
    run.rotate();
    run.close();
    assert_ne!(second, second_of_this);
    std::fs::remove_file(made.file(1, 1)).unwrap();
    std::fs::remove_file(made.file(1, 2)).unwrap();
    assert_eq!(fine(&made).runs[0].retired, 2);
    // In the middle nothing may be missing untold.
    std::fs::remove_file(made.file(1, 3)).unwrap();
    assert!(!proof(&made).problems.is_empty());
}

#[test]
fn a_removed_run_is_not_missed_if_retention_says_so() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(10);
    let first = run.rotate();
    run.records(1).checkpoint();
    let second = run.retired();
    run.tip(0, false);
    let kept = made.file(1, 2);
    let anchor = made.path().join("anchors");
    std::fs::copy(&kept, &anchor).unwrap();
    let mut run = made.run(2);
    run.line("retired", &first);
    run.line("retired", &second);
    run.close();
    fine(&made);
    std::fs::remove_file(made.file(1, 1)).unwrap();
    fine(&made);
    std::fs::remove_file(made.file(1, 2)).unwrap();
    assert_eq!(fine(&made).runs[0].end, End::Retired);
    std::fs::remove_dir_all(kept.parent().unwrap()).unwrap();
    fine(&made);
    let report = proof_with(&made, Options { anchors: vec![anchor], ..Options::default() });
    assert!(report.problems.is_empty(), "{:?}", told(&report));
}

#[test]
fn a_retired_line_must_fit_what_is_left() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(10);
    let mut first = run.rotate();
    first["records"] = json!(9);
    run.line("retired", &first);
    run.close();
    std::fs::remove_file(made.file(1, 1)).unwrap();
    assert_eq!(only(&made).what, What::Count);

    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(10);
    let mut first = run.rotate();
    first["head"] = json!("a".repeat(64));
    run.line("retired", &first);
    run.close();
    std::fs::remove_file(made.file(1, 1)).unwrap();
    assert_eq!(only(&made).what, What::Chain);
}

#[test]
fn a_retired_line_that_its_own_run_did_not_sign_excuses_nothing() {
    let attacked = |sign: bool, gone: &[u32]| {
        let mut made = Made::new();
        let mut run = made.run(1);
        run.records(10);
        let first = run.rotate();
        run.records(10).checkpoint();
        let second = run.retired();
        run.tip(0, false);
        let mut run = made.run(2);
        run.records(3).checkpoint();
        // The process is killed. Somebody without the key writes what stands behind the last signature, chains it well
        // and removes what it tells of. The next start finds that tip, and signs for it.
        run.line("retired", &first);
        run.line("retired", &second);
        if sign {
            run.checkpoint();
        }
        run.kill("");
        made.run(3).close();
        gone.iter().for_each(|segment| std::fs::remove_file(made.file(1, *segment)).unwrap());
        if gone.len() == 2 {
            std::fs::remove_dir_all(made.file(1, 1).parent().unwrap()).unwrap();
        }
        made
    };
    let problem = only(&attacked(false, &[1]));
    assert_eq!((problem.what, problem.segment.as_deref()), (What::MissingSegment, Some("000001.jsonl")));
    assert!(problem.message.contains("was not signed in its own run"), "{problem}");
    assert_eq!(only_ignoring(&attacked(false, &[2]), What::Unsealed).what, What::Hole);
    assert_eq!(only(&attacked(false, &[1, 2])).what, What::MissingRun);
    // What is still there needs no excuse; and the gateway itself signs before it removes anything.
    fine(&attacked(false, &[]));
    for gone in [&[1][..], &[2], &[1, 2]] {
        fine(&attacked(true, gone));
    }
}

#[test]
fn an_id_stands_once_in_the_whole_directory() {
    let mut made = Made::new();
    let mut run = made.run(1);
    let id = run.record();
    run.close();
    let mut run = made.run(2);
    run.record_with(&json!({"id": id, "outcome": "ok"}));
    run.close();
    let problem = only(&made);
    assert_eq!((problem.what, problem.run.as_str()), (What::DuplicateId, "20261122T140002Z-00000002"));
}

#[test]
fn a_copied_run_is_no_run() {
    let made = two_runs();
    let (from, to) = (made.file(2, 1), made.file(3, 1));
    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
    std::fs::copy(from, to).unwrap();
    let whats: Vec<_> = proof(&made).problems.iter().map(|problem| problem.what).collect();
    assert!(whats.contains(&What::Malformed) && whats.contains(&What::DuplicateId), "{whats:?}");
}

#[test]
fn a_checkpoint_counts_the_records() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(2);
    run.line("request", &json!({"id": Made::id(77), "z": 0}));
    run.close();
    let problem = only(&made);
    assert_eq!((problem.what, problem.seq), (What::Count, Some(5)));
}

/// What the gateway itself writes, of several segments: the two have nothing in common but the format.
fn written(directory: &Path, policy: &Audit) {
    let journal = Journal::open(directory, None, policy.clone(), Telemetry::new().journal).unwrap();
    for _ in 0..60 {
        let by = By::itself("process");
        let entry = journal.act(&Act { act: "reload", by, change: json!({"to": "x".repeat(200)}) });
        assert!(journal.signed(entry));
    }
    journal.close("test");
}

#[test]
fn what_the_gateway_writes_is_proved() {
    let directory = tempfile::tempdir().unwrap();
    let policy = Audit { commit_ms: 1, segment_bytes: 4_096, ..Audit::default() };
    written(directory.path(), &policy);
    written(directory.path(), &policy);
    let report = verify::directory(directory.path(), &Options::default()).unwrap();
    assert!(report.problems.is_empty(), "{:#?}", told(&report));
    assert_eq!((report.runs.len(), &report.runs[0].end, &report.runs[1].end), (2, &End::Closed, &End::Closed));
    assert!(report.lines > 120 && report.runs[0].segments > 3, "{report:?}");
}

#[test]
fn what_the_gateways_retention_removed_is_not_missed() {
    let directory = tempfile::tempdir().unwrap();
    let policy = Audit { commit_ms: 1, segment_bytes: 4_096, keep_bytes: Some(4_096), ..Audit::default() };
    written(directory.path(), &policy);
    // Runs sort by the second in which they began.
    let begun = read::runs(directory.path()).unwrap()[0].started().unwrap();
    while crate::audit::search::time("0s").unwrap() < begun + 1_000_000 {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    written(directory.path(), &policy);
    let report = verify::directory(directory.path(), &Options::default()).unwrap();
    assert!(report.problems.is_empty(), "{:#?}", told(&report));
    assert!(report.runs.iter().any(|run| run.retired > 0) || report.runs.len() == 1, "{report:?}");
}

#[test]
fn strangers_lines_are_told_and_never_panic() {
    for text in ["", "\n", "{}\n", "{\"v\":1,\"seq\":1,\"kind\":\"open\"", "\u{0}\u{0}\n\n", "[]\n{\"v\":1}\n"] {
        let made = Made::new();
        let path = made.file(1, 1);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        assert!(!proof(&made).problems.is_empty(), "{text:?}");
    }
}

#[test]
fn a_run_that_never_wrote_a_line_is_nothing_to_worry_about() {
    let mut made = Made::new();
    let path = made.file(1, 1);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, "").unwrap();
    assert_eq!(only(&made).what, What::Unsealed);
    made.run(2).close();
    assert_eq!(fine(&made).runs[0].end, End::Empty);
}

#[test]
fn twenty_problems_of_a_run_are_told() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.records(60);
    run.close();
    made.edit(1, 1, |lines| {
        for line in lines.iter_mut().skip(1).step_by(2) {
            *line = line.replace("\"status\":200", "\"status\":201");
        }
    });
    let report = proof(&made);
    assert_eq!((report.problems.len(), report.runs[0].problems), (20, 30));
    assert!(report.notes.iter().any(|note| note.contains("10 more problems")));
}

#[test]
fn a_line_that_is_too_long_is_told_and_passed_over() {
    let mut made = Made::new();
    let mut run = made.run(1);
    run.record_with(&json!({"id": Made::id(1), "long": "x".repeat(5 << 20), "z": 0}));
    run.records(3);
    run.close();
    let report = proof(&made);
    let whats: Vec<_> = report.problems.iter().map(|problem| (problem.what, problem.line)).collect();
    assert_eq!(whats, [(What::Malformed, Some(2))]);
    assert_eq!(report.lines, 5);
}
