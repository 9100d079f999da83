//! Whatever goes wrong with the files, at whichever operation, the same command goes on, and the results are those of a run in which
//! nothing went wrong: each once, none missing.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use common::{FAULTS, Fault, FaultyFiles, Random, Teller};
use serde_json::Value;
use sluice_batch::{Batch, BatchError, Earlier, Files, Identity, Options, Summary, Sync, SystemFiles};

/// Histories of each fault. `SLUICE_BATCH_HISTORIES` asks for more.
const HISTORIES: u64 = 8;
/// Runs of a history in which something goes wrong.
const WRONG: usize = 6;

fn input() -> String {
    let mut text = String::new();
    for number in 0..60 {
        text += &match number % 10 {
            3 => "this is no request\n".to_owned(),
            5 => format!("{{\"custom_id\": \"f{number}\", \"prompt\": \"x\", \"fails\": \"on_purpose\"}}\r\n"),
            7 => format!("{{\"prompt\": \"{}\", \"n\": 2}}\n\n", "long ".repeat(200)),
            _ => format!("{{\"custom_id\": \"r{number}\", \"prompt\": \"{}\"}}\n", "ab".repeat(number)),
        };
    }
    text
}

fn options(folder: &Path, sync: Sync) -> Options {
    Options {
        input: folder.join("in.jsonl"),
        output: folder.join("out.jsonl"),
        sync,
        identity: Identity { model: "m".into(), settings: "s".into(), ..Identity::default() },
        now: 1,
        longest_answer: None,
    }
}

fn run(files: &dyn Files, options: &Options, teller: &Teller) -> Result<Summary, BatchError> {
    let mut batch = Batch::open(files, options.clone())?;
    batch.run(teller, 8, &AtomicBool::new(false), &mut |_| ControlFlow::Continue(()))
}

/// The lines of the output by name; none may be there twice.
fn results(options: &Options) -> BTreeMap<String, String> {
    let text = fs::read_to_string(&options.output).unwrap();
    let mut results = BTreeMap::new();
    for line in text.lines() {
        let value: Value = serde_json::from_str(line).unwrap();
        let twice = results.insert(value["custom_id"].as_str().unwrap().to_owned(), line.to_owned());
        assert_eq!(twice, None, "a result is there twice");
    }
    results
}

fn reference() -> BTreeMap<String, String> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("in.jsonl"), input()).unwrap();
    let options = options(folder.path(), Sync::Never);
    let summary = run(&SystemFiles, &options, &Teller::default()).unwrap();
    assert_eq!(summary, Summary { requests: 60, finished: 60, failed: 12, interrupted: false });
    results(&options)
}

#[test]
fn whatever_fails_the_results_are_those_of_a_run_without() {
    let histories = std::env::var("SLUICE_BATCH_HISTORIES").map_or(HISTORIES, |n| n.parse().unwrap());
    let want = reference();
    let mut fired = BTreeMap::new();
    let teller = Teller::default();
    for seed in 0..histories {
        for fault in FAULTS {
            let mut random = Random(seed * FAULTS.len() as u64 + fault as u64);
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("in.jsonl"), input()).unwrap();
            let sync = if random.below(4) == 0 { Sync::Always } else { Sync::Seconds };
            let options = options(folder.path(), sync);
            for _ in 0..WRONG {
                let files = FaultyFiles::new(random.next(), fault, random.below(120));
                let outcome = run(&files, &options, &teller);
                let has_fired = files.has_fired();
                *fired.entry(fault).or_insert(0) += u32::from(has_fired);
                match outcome {
                    Ok(summary) => assert!(!summary.interrupted && (fault == Fault::Short || !has_fired)),
                    Err(BatchError::File { .. } | BatchError::Start { .. }) => {
                        assert!(has_fired, "seed {seed}, {fault:?}")
                    }
                    Err(error) => panic!("seed {seed}, {fault:?}: {error}"),
                }
                files.settle();
            }
            let summary =
                run(&SystemFiles, &options, &teller).unwrap_or_else(|e| panic!("seed {seed}, {fault:?}: {e}"));
            assert_eq!((summary.finished, summary.failed), (60, 12), "seed {seed}, {fault:?}");
            assert_eq!(results(&options), want, "seed {seed}, {fault:?}");
        }
    }
    // Or nothing was tried.
    assert!(
        FAULTS.iter().all(|fault| fired.get(fault).is_some_and(|count| u64::from(*count) > histories)),
        "{fired:?}"
    );
    assert!(*teller.resumed.lock().unwrap() > 100, "tokens of earlier runs come back");
}

#[test]
fn a_run_that_is_told_to_stop_goes_on_later() {
    let want = reference();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("in.jsonl"), input()).unwrap();
    let options = options(folder.path(), Sync::Always);
    for _ in 0..3 {
        let mut batch = Batch::open(&SystemFiles, options.clone()).unwrap();
        let before = batch.summary().finished;
        let mut looks = 0;
        let mut watch = |_: &sluice_batch::Progress| {
            looks += 1;
            if looks > 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let summary = batch.run(&Teller::default(), 1, &AtomicBool::new(false), &mut watch).unwrap();
        assert!(summary.finished >= before);
    }
    let mut batch = Batch::open(&SystemFiles, options.clone()).unwrap();
    let summary = batch.run(&Teller::default(), 4, &AtomicBool::new(true), &mut |_| ControlFlow::Continue(())).unwrap();
    assert!(summary.interrupted || summary.finished == 60);
    drop(batch);
    run(&SystemFiles, &options, &Teller::default()).unwrap();
    assert_eq!(results(&options), want);
    // The same command once more has nothing to do.
    let (before, teller) = (fs::read(&options.output).unwrap(), Teller::default());
    assert_eq!(run(&SystemFiles, &options, &teller).unwrap().finished, 60);
    assert_eq!(fs::read(&options.output).unwrap(), before);
}

#[test]
fn what_a_run_does_not_belong_to_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("in.jsonl"), input()).unwrap();
    let options = options(folder.path(), Sync::Never);
    let open = |options: &Options| Batch::open(&SystemFiles, options.clone());

    fs::write(&options.output, "precious\n").unwrap();
    assert!(matches!(open(&options), Err(BatchError::OutputExists { .. })));
    assert!(!options.journal().exists());
    fs::write(options.journal(), "something else").unwrap();
    assert!(matches!(open(&options), Err(BatchError::NotAJournal { .. })));
    fs::write(options.journal(), "").unwrap();
    assert!(matches!(open(&options), Err(BatchError::JournalLost { .. })));
    assert_eq!(fs::read(&options.output).unwrap(), b"precious\n");
    fs::remove_file(options.journal()).unwrap();
    fs::remove_file(&options.output).unwrap();

    let first = open(&options).unwrap();
    assert!(matches!(open(&options), Err(BatchError::Busy { .. })));
    drop(first);
    run(&SystemFiles, &options, &Teller::default()).unwrap();
    let done = fs::read(&options.output).unwrap();
    let with = |model: &str, settings: &str| Options {
        identity: Identity { model: model.into(), settings: settings.into(), ..Identity::default() },
        ..options.clone()
    };
    assert!(matches!(open(&with("other", "s")), Err(BatchError::OtherModel { .. })));
    assert!(matches!(open(&with("m", "other")), Err(BatchError::OtherSettings { .. })));
    fs::write(&options.input, input() + "{\"prompt\": \"more\"}\n").unwrap();
    assert!(matches!(open(&options), Err(BatchError::InputChanged { .. })));
    fs::write(&options.input, input()).unwrap();
    let mut changed = done.clone();
    changed[20] ^= 1;
    fs::write(&options.output, &changed).unwrap();
    assert!(matches!(open(&options), Err(BatchError::OutputChanged { line: 1, .. })));
    assert_eq!(fs::read(&options.output).unwrap(), changed);
    fs::write(&options.output, &done).unwrap();
    assert!(open(&options).unwrap().is_finished());
}

#[test]
fn a_damaged_journal_is_refused_and_the_results_stay() {
    let want = reference();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("in.jsonl"), input()).unwrap();
    let options = options(folder.path(), Sync::Never);
    run(&SystemFiles, &options, &Teller::default()).unwrap();
    let (journal, output) = (fs::read(options.journal()).unwrap(), fs::read(&options.output).unwrap());
    let mut random = Random(3);
    let mut refused = 0;
    for _ in 0..200 {
        let at = random.below(journal.len() as u64) as usize;
        let mut damaged = journal.clone();
        damaged[at] ^= 1 << random.below(8);
        fs::write(options.journal(), &damaged).unwrap();
        match Batch::open(&SystemFiles, options.clone()) {
            Err(error @ (BatchError::JournalDamaged { .. } | BatchError::NotAJournal { .. })) => {
                assert!(error.to_string().contains(&options.journal().display().to_string()));
                assert_eq!(fs::read(options.journal()).unwrap(), damaged, "{at}");
                assert_eq!(fs::read(&options.output).unwrap(), output, "{at}");
                refused += 1;
            }
            // The length of the header, or the last record, which an interruption can leave like this.
            Err(BatchError::JournalLost { .. }) => assert_eq!(fs::read(&options.output).unwrap(), output),
            Ok(batch) => assert_eq!(batch.summary().finished, 59, "{at}"),
            Err(error) => panic!("{at}: {error}"),
        }
        fs::write(&options.output, &output).unwrap();
    }
    assert!(refused > 150, "{refused}");
    fs::write(options.journal(), &journal).unwrap();
    run(&SystemFiles, &options, &Teller::default()).unwrap();
    assert_eq!(results(&options), want);
}

#[test]
fn what_does_not_begin_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path(), Sync::Never);
    let refused = |options: &Options| Batch::open(&SystemFiles, options.clone()).unwrap_err().to_string();
    assert!(!refused(&options).contains("lost"), "{}", refused(&options));
    fs::create_dir(&options.input).unwrap();
    assert!(!refused(&options).contains("lost"), "{}", refused(&options));
    fs::remove_dir(&options.input).unwrap();
    fs::write(&options.input, input()).unwrap();
    std::os::unix::fs::symlink(folder.path().join("nowhere/out.jsonl"), &options.output).unwrap();
    let said = refused(&options);
    assert!(said.contains("out.jsonl: cannot open it") && !said.contains("lost"), "{said}");
    assert!(!options.journal().exists());
    fs::create_dir(folder.path().join("nowhere")).unwrap();
    run(&SystemFiles, &options, &Teller::default()).unwrap();
    assert_eq!(results(&options), reference());
}

/// Cannot go on with the first request that it is given.
struct Breaking;

impl sluice_batch::Answerer for Breaking {
    fn begin(&self, job: sluice_batch::Job) -> sluice_batch::Ongoing {
        let request = Some(job.request);
        job.events.send(sluice_batch::Event::Broken { request, message: "the drive is gone".into() });
        Box::new(())
    }
}

#[test]
fn what_was_given_up_before_anything_was_kept_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("in.jsonl"), input()).unwrap();
    let options = options(folder.path(), Sync::Never);
    let stop = AtomicBool::new(false);
    let mut watch = |_: &sluice_batch::Progress| ControlFlow::Continue(());
    let open = || Batch::open(&SystemFiles, options.clone()).unwrap();
    // A journal that a crash has left empty is no run.
    for begins in [false, true] {
        if begins {
            fs::write(options.journal(), "").unwrap();
        }
        let mut batch = open();
        assert!(batch.is_untouched());
        assert!(batch.run(&Breaking, 1, &stop, &mut watch).is_err());
        batch.give_up(&SystemFiles);
        assert!(!options.journal().exists() && !options.output.exists());
    }
    // An output that somebody else has made stays, and so does all that was kept.
    fs::write(&options.output, "").unwrap();
    open().give_up(&SystemFiles);
    assert!(!options.journal().exists() && options.output.exists());
    fs::remove_file(&options.output).unwrap();
    let mut batch = open();
    let mut looks = 0;
    let mut once = |_: &sluice_batch::Progress| {
        looks += 1;
        if looks > 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    batch.run(&Teller::default(), 60, &stop, &mut once).unwrap();
    assert!(!batch.is_untouched());
    batch.give_up(&SystemFiles);
    run(&SystemFiles, &options, &Teller::default()).unwrap();
    assert_eq!(results(&options), reference());
    open().give_up(&SystemFiles);
    assert_eq!(results(&options), reference());
}

#[test]
fn what_earlier_runs_have_done_is_seen_without_touching_it() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("in.jsonl"), input()).unwrap();
    let options = options(folder.path(), Sync::Never);
    let index = options.index(&SystemFiles).unwrap();
    let look = || Earlier::look(&SystemFiles, &options, &index);
    assert_eq!(look().unwrap(), None);
    assert!(!options.journal().exists() && !options.output.exists());

    // Also while a run goes on.
    let mut batch = Batch::open(&SystemFiles, options.clone()).unwrap();
    let seen = look().unwrap().unwrap();
    assert_eq!((seen.finished, seen.answers, seen.generated), (0, 0, 0));
    batch.run(&Teller::default(), 8, &AtomicBool::new(false), &mut |_| ControlFlow::Continue(())).unwrap();
    let (journal, output) = (fs::read(options.journal()).unwrap(), fs::read(&options.output).unwrap());
    let seen = look().unwrap().unwrap();
    let told = |line: &str| serde_json::from_str::<Value>(line).unwrap()["response"]["body"]["said"].clone();
    let answers: Vec<Value> = results(&options).values().map(|line| told(line)).filter(Value::is_array).collect();
    let answers: Vec<&Value> = answers.iter().flat_map(|said| said.as_array().unwrap()).collect();
    let generated: usize = answers.iter().map(|answer| answer.as_array().unwrap().len()).sum();
    assert_eq!((seen.finished, seen.failed), (60, 12));
    assert_eq!((seen.answers, seen.generated), (answers.len() as u64, generated as u64));
    assert!(seen.done.iter().all(|done| *done) && seen.sampled.is_empty());

    // A torn record, and results that are gone: nothing is cut.
    drop(batch);
    fs::write(options.journal(), &journal[..journal.len() - 1]).unwrap();
    assert_eq!(look().unwrap().unwrap().finished, 59);
    assert_eq!(fs::read(options.journal()).unwrap().len(), journal.len() - 1);
    fs::write(options.journal(), &journal).unwrap();
    fs::write(&options.output, &output[..output.len() - 1]).unwrap();
    assert_eq!(look().unwrap().unwrap().finished, 59);
    assert_eq!(fs::read(&options.output).unwrap().len(), output.len() - 1);

    // What a run would refuse is refused.
    let other =
        Options { identity: Identity { settings: "other".into(), ..options.identity.clone() }, ..options.clone() };
    assert!(matches!(Earlier::look(&SystemFiles, &other, &index), Err(BatchError::OtherSettings { .. })));
    fs::write(options.journal(), "").unwrap();
    assert!(matches!(look(), Err(BatchError::JournalLost { .. })));
    fs::remove_file(options.journal()).unwrap();
    assert!(matches!(look(), Err(BatchError::OutputExists { .. })));
}

#[test]
fn failures_name_the_line_and_the_request() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("in.jsonl"), input()).unwrap();
    let options = options(folder.path(), Sync::Never);
    let mut batch = Batch::open(&SystemFiles, options).unwrap();
    batch.run(&Teller::default(), 8, &AtomicBool::new(false), &mut |_| ControlFlow::Continue(())).unwrap();
    let said: Vec<String> = batch.failures().iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 12);
    assert!(said.contains(&"line 6, custom_id \"f5\": as it was asked to".to_owned()), "{said:?}");
    assert!(said.iter().any(|said| said.starts_with("line 4 is not JSON")), "{said:?}");
    let value = serde_json::to_value(&batch.failures()[0]).unwrap();
    assert!(value["line"].is_u64() && value["custom_id"].is_string() && value["message"].is_string(), "{value}");
}

#[test]
fn results_that_are_gone_come_again() {
    let want = reference();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("in.jsonl"), input()).unwrap();
    let options = options(folder.path(), Sync::Never);
    run(&SystemFiles, &options, &Teller::default()).unwrap();
    let whole = fs::read(&options.output).unwrap().len();
    for length in [0, 1, whole / 2, whole - 1] {
        // In the order of the latest run.
        let done = fs::read(&options.output).unwrap();
        fs::write(&options.output, &done[..length]).unwrap();
        run(&SystemFiles, &options, &Teller::default()).unwrap();
        assert_eq!(results(&options), want, "{length} bytes were left");
    }
}

#[test]
fn an_input_that_changes_during_the_run_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("in.jsonl"), input()).unwrap();
    let options = options(folder.path(), Sync::Never);
    let mut batch = Batch::open(&SystemFiles, options.clone()).unwrap();
    fs::write(&options.input, input().replace("\"prompt\"", "\"Prompt\"")).unwrap();
    let outcome = batch.run(&Teller::default(), 4, &AtomicBool::new(false), &mut |_| ControlFlow::Continue(()));
    assert!(matches!(outcome, Err(BatchError::InputChanged { .. })), "{outcome:?}");
}

#[test]
fn an_answerer_that_cannot_go_on_ends_the_run_and_loses_nothing() {
    let want = reference();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("in.jsonl"), input()).unwrap();
    let options = options(folder.path(), Sync::Seconds);
    let mut batch = Batch::open(&SystemFiles, options.clone()).unwrap();
    let outcome = batch.run(&Breaking, 4, &AtomicBool::new(false), &mut |_| ControlFlow::Continue(()));
    let said = outcome.unwrap_err().to_string();
    assert!(said.starts_with("line ") && said.contains("custom_id \"r0\": the drive is gone"), "{said}");
    drop(batch);
    run(&SystemFiles, &options, &Teller::default()).unwrap();
    assert_eq!(results(&options), want);
}
