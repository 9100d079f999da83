//! Journals of interrupted batches: one lies beside the results, and the next run goes on from there.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use sluice_batch::{
    Answerer, Batch, Ending, Event, Identity, JOURNAL_MAGIC, Job, Ongoing, Options, Sync, SystemFiles, Token, number_of,
};
use sluice_checksum::{xxh3_64, xxh3_64_with_seed};

use super::Seeds;

/// Requests, of which the last is none.
const REQUESTS: usize = 6;
/// What the header of a journal begins with: magic, length of the rest, digest and length of the input.
const LENGTH: usize = 8;
const HEADER_START: usize = LENGTH + 4;
const INPUT: usize = 16 + 8;
const CHECKSUM: usize = 8;

/// Answers with tokens that follow from the request's name. Those of earlier runs come first, whatever they are: a forged journal can say
/// anything that a model could have sampled.
struct Teller<'a> {
    /// Answers before it is told to stop, and the switch for that.
    left: std::cell::Cell<usize>,
    stop: &'a AtomicBool,
}

impl Answerer for Teller<'_> {
    fn begin(&self, job: Job) -> Ongoing {
        let Job { request, line, sampled, events, .. } = job;
        let is_last = self.left.get() == 0;
        self.left.set(self.left.get().saturating_sub(1));
        let mut said = Vec::new();
        for answer in 0..line.wanted().answers.min(8) {
            let mut tokens: Vec<Token> = sampled.get(answer as usize).cloned().unwrap_or_default();
            let all = 20 + number_of(&line.custom_id, "length") % 20;
            for number in tokens.len() as u64..all {
                let id = number_of(&line.custom_id, &format!("{answer} {number}")) as u32;
                let top = if answer > 0 { vec![(id / 2, -1.5)] } else { Vec::new() };
                let token = Token { id, logprob: (answer > 0).then_some(-0.25), top };
                events.send(Event::Sampled { request, answer, token: token.clone() });
                tokens.push(token);
            }
            said.push(tokens.iter().map(|token| token.id).collect::<Vec<_>>());
        }
        match is_last {
            // Its tokens are in the journal, and it has no result.
            true => self.stop.store(true, Ordering::Relaxed),
            false => {
                let ending = Ending { body: json!({"said": said}), generated: 1 };
                events.send(Event::Ended { request, outcome: Ok(ending) });
            }
        }
        Box::new(())
    }
}

fn input() -> String {
    let line = |number: usize| match number {
        0 => json!({"custom_id": "two", "prompt": "a", "n": 2}).to_string(),
        5 => "this is no request".to_owned(),
        number => json!({"custom_id": format!("r{number}"), "prompt": "b".repeat(number)}).to_string(),
    };
    (0..REQUESTS).map(|number| line(number) + "\n").collect()
}

fn options(folder: &Path) -> Options {
    Options {
        input: folder.join("in.jsonl"),
        output: folder.join("out.jsonl"),
        sync: Sync::Never,
        identity: Identity { model: "m".into(), settings: "s".into(), ..Identity::default() },
        now: 1,
        longest_answer: None,
    }
}

/// Goes on with the batch in the folder until so many requests are answered in this run.
fn go_on(options: &Options, answers: usize) -> Result<(), String> {
    let mut batch = Batch::open(&SystemFiles, options.clone()).map_err(|error| error.to_string())?;
    let stop = AtomicBool::new(false);
    let teller = Teller { left: std::cell::Cell::new(answers), stop: &stop };
    let run = batch.run(&teller, 2, &stop, &mut |_| ControlFlow::Continue(()));
    run.map(drop).map_err(|error| error.to_string())
}

/// A batch that was interrupted: its journal, its results, and the results in the end.
struct Interrupted {
    journal: Vec<u8>,
    output: Vec<u8>,
    whole: Vec<String>,
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).expect("the batch has written it")
}

/// The results by name, without an order.
fn results(output: &[u8]) -> Vec<String> {
    let mut lines: Vec<String> = String::from_utf8_lossy(output).lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

fn interrupted(folder: &Path) -> &'static Interrupted {
    static MADE: OnceLock<Interrupted> = OnceLock::new();
    MADE.get_or_init(|| {
        let options = options(folder);
        fs::write(&options.input, input()).expect("the folder can be written");
        for path in [options.journal(), options.output.clone()] {
            let _ = fs::remove_file(path);
        }
        go_on(&options, 3).expect("nothing is wrong");
        // A result that was lost comes again, so there is a record of that too.
        let output = read(&options.output);
        fs::write(&options.output, &output[..output.len() - 1]).expect("the folder can be written");
        go_on(&options, 1).expect("nothing is wrong");
        let (journal, output) = (read(&options.journal()), read(&options.output));
        go_on(&options, usize::MAX).expect("nothing is wrong");
        let whole = results(&read(&options.output));
        assert_eq!(whole.len(), REQUESTS, "the run has ended");
        Interrupted { journal, output, whole }
    })
}

/// Makes what the header says of the input right, and the checksums of header and records, so that what was mutated behind them is
/// looked at.
#[allow(dead_code, reason = "the test that replays inputs mutates none")]
pub(crate) fn seal(journal: &mut [u8], folder: &Path) {
    let sound = &interrupted(folder).journal;
    let prefix = journal.get(LENGTH..HEADER_START).and_then(|bytes| bytes.first_chunk()).copied();
    let Some(rest) = prefix.map(|bytes| u32::from_le_bytes(bytes) as usize) else { return };
    let Some(end) = HEADER_START.checked_add(rest).filter(|end| end + CHECKSUM <= journal.len()) else { return };
    if rest < INPUT || !journal.starts_with(&JOURNAL_MAGIC) {
        return;
    }
    journal[HEADER_START..HEADER_START + INPUT].copy_from_slice(&sound[HEADER_START..HEADER_START + INPUT]);
    let seed = xxh3_64(&journal[..end]);
    journal[end..end + CHECKSUM].copy_from_slice(&seed.to_le_bytes());
    let mut at = end + CHECKSUM;
    while let Some(prefix) = journal.get(at..).and_then(|rest| rest.first_chunk::<4>()) {
        let end = at + 4 + u32::from_le_bytes(*prefix) as usize;
        if end + CHECKSUM > journal.len() {
            return;
        }
        let sum = xxh3_64_with_seed(&journal[at..end], seed);
        journal[end..end + CHECKSUM].copy_from_slice(&sum.to_le_bytes());
        at = end + CHECKSUM;
    }
}

pub(crate) fn run(input: &[u8], folder: &Path) {
    let interrupted = interrupted(folder);
    let options = options(folder);
    fs::write(options.journal(), input).expect("the folder can be written");
    fs::write(&options.output, &interrupted.output).expect("the folder can be written");
    let outcome = go_on(&options, usize::MAX);
    let now = read(&options.output);
    // What a crash can have left ends as if there had been none.
    let is_torn = interrupted.journal.starts_with(input);
    match outcome {
        Ok(()) if is_torn => assert!(results(&now) == interrupted.whole, "other results"),
        Ok(()) => {
            let lines = results(&now);
            assert!(lines.iter().all(|line| serde_json::from_str::<Value>(line).is_ok()), "a result is no JSON");
            assert!(lines.len() <= REQUESTS, "a result is there twice");
        }
        Err(_) => {
            assert!(interrupted.output.starts_with(&now) || now.starts_with(&interrupted.output), "results are gone")
        }
    }
}

pub(crate) fn seeds(folder: &Path) -> Seeds {
    let Interrupted { journal, .. } = interrupted(folder);
    let cut = |part: usize| (format!("{part}-of-4"), journal[..journal.len() * part / 4].to_vec());
    let mut flipped = journal.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    (1..=4).map(cut).chain([("flipped".to_owned(), flipped)]).collect()
}
