//! The runner: hands requests to an answerer, and keeps what comes of them.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};
use sluice_checksum::xxh3_64;

use crate::claim::{Claimed, begin, check, claim};
use crate::error::BatchError;
use crate::files::{Access, Files, OpenFile};
use crate::index::{Entry, Index};
use crate::journal::{Content, Journal, Sampled, Token, Written};
use crate::line::{Line, LineError, Named, Wanted, id_of};
use crate::output::Output;

/// How long the runner waits for news before it looks whether it has been told to stop.
const WAIT: Duration = Duration::from_millis(100);
/// How often files are made durable, with [`Sync::Seconds`].
const SYNC_EVERY: Duration = Duration::from_secs(5);
/// How often progress is reported.
const REPORT_EVERY: Duration = Duration::from_millis(500);
/// How far back the present rate reaches.
const RECENT: Duration = Duration::from_secs(30);
/// How long answers may take to end when the run is told to stop. They may have to be saved.
const LEAVE: Duration = Duration::from_secs(120);
/// Most events that are taken before something is written.
const AT_ONCE: usize = 4096;
/// Most failed requests that are remembered.
const MOST_FAILURES: usize = 64;

/// When what is written is made durable. Whatever this says, nothing is lost when the process is killed; it is for crashes of the system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sync {
    /// After every write.
    Always,
    /// Every few seconds, and at the end.
    #[default]
    Seconds,
    /// Whenever the system likes.
    Never,
}

/// What answers depend on besides the requests. A run only goes on with the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The model, for people and for comparison.
    pub model: String,
    /// The settings.
    pub settings: String,
    /// What makes answers differ from the model's own, if anything does. Each result says it.
    pub lossy: Option<String>,
    /// The form in which prompts are read, if it is not the usual one. Each result says it.
    pub prompt_attention: Option<String>,
}

/// What a batch is.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The requests.
    pub input: PathBuf,
    /// The results. The journal is beside it, as `OUTPUT.journal`.
    pub output: PathBuf,
    /// When what is written is made durable.
    pub sync: Sync,
    /// What answers depend on.
    pub identity: Identity,
    /// Seconds since 1970, for a batch that begins.
    pub now: u64,
    /// Most tokens of an answer whose request sets no limit, if that is known: for the longest time that is left.
    pub longest_answer: Option<u32>,
}

/// A request for an answerer.
#[derive(Debug)]
pub struct Job {
    /// Its number, which events repeat.
    pub request: u32,
    /// What it asks for.
    pub line: Line,
    /// Seconds since 1970 at which the batch began: what prompts say of the time is to follow from this.
    pub started: u64,
    /// What was sampled for each of its answers in earlier runs, as far as is known.
    pub sampled: Vec<Vec<Token>>,
    /// Where news of it go.
    pub events: Events,
}

/// Takes news of requests.
#[derive(Clone, Debug)]
pub struct Events(Sender<Event>);

impl Events {
    /// Sends news. They are lost once the run has ended.
    pub fn send(&self, event: Event) {
        // Nobody is left who could do something about it.
        let _ = self.0.send(event);
    }
}

/// News of a request.
#[derive(Debug)]
pub enum Event {
    /// A token was sampled: one behind those that the job has brought.
    Sampled {
        /// The request.
        request: u32,
        /// Which of its answers.
        answer: u32,
        /// The token.
        token: Token,
    },
    /// The request has ended, with the body of its response or because something is wrong with it.
    Ended {
        /// The request.
        request: u32,
        /// What came of it.
        outcome: Result<Ending, Failure>,
    },
    /// Nothing can go on, and it is not the request's fault.
    Broken {
        /// The request that was being answered, if it was one.
        request: Option<u32>,
        /// What is wrong.
        message: String,
    },
}

/// How a request has ended.
#[derive(Debug)]
pub struct Ending {
    /// The body of its response.
    pub body: Value,
    /// Tokens that were generated.
    pub generated: u32,
}

/// Why a request has failed.
#[derive(Debug)]
pub struct Failure {
    /// The status of the response.
    pub status: u16,
    /// A word for programs.
    pub code: String,
    /// What is wrong.
    pub message: String,
    /// The body of the response.
    pub body: Value,
}

/// A request that is being answered. Dropping it ends that.
pub type Ongoing = Box<dyn Any + Send>;

/// Answers requests. From the same request and the same sampled tokens it makes the same answer to the last byte, whatever else goes on.
pub trait Answerer {
    /// Begins to answer. Every job gets an [`Event::Ended`] or an [`Event::Broken`], unless it is dropped before.
    fn begin(&self, job: Job) -> Ongoing;

    /// Ends all answers that are being made, wherever they are, because the run is told to stop. If it says true, what was sampled until then
    /// is still heard, and each job then gets an event as if it had ended, which means nothing any more.
    fn end(&self) -> bool {
        false
    }
}

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Progress {
    /// Requests in all.
    pub requests: usize,
    /// Those that have a result, failed ones included.
    pub finished: usize,
    /// Those that failed.
    pub failed: usize,
    /// Those that are being answered.
    pub running: usize,
    /// Tokens that were generated in this run.
    pub generated: u64,
    /// Seconds since the run began.
    pub seconds: f64,
    /// Tokens per second lately.
    pub tokens_per_second: f64,
    /// Tokens per second since the run began.
    pub mean_tokens_per_second: f64,
    /// Seconds that are left, from the mean rate and the mean length of answers so far; `None` while nothing is known of these.
    pub seconds_left: Option<f64>,
    /// Seconds that are left at most at the mean rate: if all answers become as long as they may. `None` while nothing is known of the
    /// rate, or if an answer has no limit.
    pub seconds_left_at_most: Option<f64>,
}

/// Hears of the progress of a run, and stops it with `Break`.
pub type Watch<'a> = dyn FnMut(&Progress) -> ControlFlow<()> + 'a;

/// How a run has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Requests in all.
    pub requests: usize,
    /// Those that have a result, failed ones included.
    pub finished: usize,
    /// Those that failed.
    pub failed: usize,
    /// Whether it was told to stop before all had a result.
    pub interrupted: bool,
}

/// A request that cannot be answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failed {
    /// Which it is.
    #[serde(flatten)]
    pub request: Named,
    /// What is wrong, and what can be done.
    pub message: String,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failed { request, message } = self;
        match message.strip_prefix(&format!("line {}", request.line)) {
            // What is wrong with a line itself says which it is.
            Some(rest) => write!(f, "{request}{rest}"),
            None => write!(f, "{request}: {message}"),
        }
    }
}

/// A batch that this process works on.
pub struct Batch {
    options: Options,
    input: Box<dyn OpenFile>,
    index: Index,
    journal: Journal,
    output: Output,
    started: u64,
    /// Whether each request has a result.
    done: Vec<bool>,
    sampled: HashMap<u32, Vec<Vec<Token>>>,
    failed: usize,
    failures: Vec<Failed>,
    finished: usize,
    /// Files that this run has made, until something of it is kept.
    made: Vec<PathBuf>,
    /// Tokens of all results.
    answered_tokens: u64,
    /// Tokens that requests without result can have at most; `None`: there is no limit.
    tokens_left: Option<u64>,
    dirty: bool,
    synced: Instant,
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch")
            .field("options", &self.options)
            .field("finished", &self.finished)
            .finish_non_exhaustive()
    }
}

impl Options {
    /// Where the journal is.
    pub fn journal(&self) -> PathBuf {
        let mut name = self.output.clone().into_os_string();
        name.push(".journal");
        name.into()
    }

    /// The requests of the input.
    ///
    /// # Errors
    /// The filesystem's, and two requests with the same name.
    pub fn index(&self, files: &dyn Files) -> Result<Index, BatchError> {
        Index::read(&self.input, &*self.open_input(files)?).map_err(BatchError::at_start)
    }

    /// Opens the input.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn open_input(&self, files: &dyn Files) -> Result<Box<dyn OpenFile>, BatchError> {
        let opened = files.open(&self.input, Access::Read);
        opened.map_err(BatchError::file(&self.input, "read the requests")).map_err(BatchError::at_start)
    }
}

impl Batch {
    /// Reads the input, and begins a run or goes on with one.
    ///
    /// # Errors
    /// [`BatchError`]. Nothing that other programs have written is changed.
    pub fn open(files: &dyn Files, options: Options) -> Result<Batch, BatchError> {
        let input = options.open_input(files)?;
        let index = Index::read(&options.input, &*input).map_err(BatchError::at_start)?;
        let Claimed { journal, output, begun, made } = claim(files, &options)?;
        let (started, journal, output, content) = match begun {
            None => {
                let (journal, output) = begin(files, &options, &index, journal, output)?;
                (options.now, journal, output, Content::default())
            }
            Some(header) => {
                check(&header, &index, &options, &options.journal())?;
                let mut journal = journal;
                let mut content = journal.read(index.entries.len())?;
                let (output, kept) = Output::resume(&options.output, output, &content.results)?;
                if kept < content.results.len() {
                    // Before other results take the place of those that were lost: a journal that lists the old ones beside the new
                    // ones would be that of another output.
                    journal.kept(kept)?;
                    journal.sync()?;
                    content.results.truncate(kept);
                }
                (header.started, journal, output, content)
            }
        };
        let mut done = vec![false; index.entries.len()];
        content.results.iter().for_each(|written| done[written.request as usize] = true);
        let results = &content.results;
        let unfinished = index.entries.iter().zip(&done).filter(|(_, done)| !**done);
        let tokens_left: Option<u64> = unfinished.map(|(entry, _)| most_tokens(entry, &options)).sum();
        Ok(Batch {
            tokens_left,
            failed: results.iter().filter(|written| written.failed).count(),
            failures: Vec::new(),
            made,
            finished: results.len(),
            answered_tokens: results.iter().map(|written| u64::from(written.generated)).sum(),
            sampled: content.sampled,
            dirty: true,
            synced: Instant::now(),
            options,
            input,
            index,
            journal,
            output,
            started,
            done,
        })
    }

    /// Ends a batch that cannot go on. If nothing of it has been kept, the files that this run has made are removed, so that they bind no other run
    /// to its settings.
    pub fn give_up(self, files: &dyn Files) {
        let made = self.made.clone();
        drop(self);
        // What cannot be removed is empty, or names the settings with which the next run can go on.
        made.iter().for_each(|path| _ = files.remove(path));
    }

    /// Whether nothing of it has been kept, neither in this run nor in an earlier one.
    pub fn is_untouched(&self) -> bool {
        !self.made.is_empty()
    }

    /// Requests that have failed in this run, the first ones.
    pub fn failures(&self) -> &[Failed] {
        &self.failures
    }

    /// The requests.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Seconds since 1970 at which the batch began.
    pub fn started(&self) -> u64 {
        self.started
    }

    /// Whether all requests have results.
    pub fn is_finished(&self) -> bool {
        self.finished == self.index.entries.len()
    }

    /// How far it is, before or after a run.
    pub fn summary(&self) -> Summary {
        Summary {
            requests: self.index.entries.len(),
            finished: self.finished,
            failed: self.failed,
            interrupted: !self.is_finished(),
        }
    }

    /// Answers the requests that have no result yet, so many answers at a time, until all have one or `stop` is set. `watch` hears of
    /// the progress about twice a second, and stops the run as well with `Break`.
    ///
    /// # Errors
    /// [`BatchError`]. What has been written until then is kept, and the next run goes on from there.
    pub fn run(
        &mut self,
        answerer: &dyn Answerer,
        at_a_time: usize,
        stop: &AtomicBool,
        watch: &mut Watch<'_>,
    ) -> Result<Summary, BatchError> {
        let (sender, events) = channel();
        let queue = self.index.order.iter().copied().filter(|&request| !self.done[request as usize]).collect();
        let mut flight = Flight { queue, ongoing: HashMap::new(), answers: 0, at_a_time, events: Events(sender) };
        let mut meter = Meter::new();
        let outcome = self.steps(answerer, &mut flight, &events, stop, &mut meter, watch);
        let outcome = outcome.and_then(|()| self.leave(answerer, &mut flight, &events));
        // Answers that are being made end before anything else is done.
        drop(flight);
        if self.options.sync != Sync::Never {
            self.sync()?;
        }
        outcome?;
        // It has ended anyway.
        let _ = watch(&self.progress((0, 0), &mut meter));
        Ok(self.summary())
    }

    fn steps(
        &mut self,
        answerer: &dyn Answerer,
        flight: &mut Flight,
        events: &Receiver<Event>,
        stop: &AtomicBool,
        meter: &mut Meter,
        watch: &mut Watch<'_>,
    ) -> Result<(), BatchError> {
        let mut reported: Option<Instant> = None;
        loop {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            self.begin_more(answerer, flight)?;
            if flight.ongoing.is_empty() {
                return Ok(());
            }
            if reported.is_none_or(|at| at.elapsed() >= REPORT_EVERY) {
                reported = Some(Instant::now());
                if watch(&self.progress(flight.underway(), meter)).is_break() {
                    return Ok(());
                }
            }
            let first = events.recv_timeout(WAIT).ok();
            let news: Vec<Event> = first.into_iter().chain(events.try_iter().take(AT_ONCE)).collect();
            self.take(news, flight, meter)?;
            if self.options.sync == Sync::Seconds && self.dirty && self.synced.elapsed() >= SYNC_EVERY {
                self.sync()?;
            }
        }
    }

    /// The run is over: what was sampled for requests that have no result is kept, to the last token.
    fn leave(
        &mut self,
        answerer: &dyn Answerer,
        flight: &mut Flight,
        events: &Receiver<Event>,
    ) -> Result<(), BatchError> {
        if flight.ongoing.is_empty() || !answerer.end() {
            return Ok(());
        }
        let deadline = Instant::now() + LEAVE;
        while !flight.ongoing.is_empty() && Instant::now() < deadline {
            let first = events.recv_timeout(WAIT).ok();
            let mut tokens = Vec::new();
            for event in first.into_iter().chain(events.try_iter().take(AT_ONCE)) {
                match event {
                    Event::Sampled { request, answer, token } if flight.ongoing.contains_key(&request) => {
                        add(&mut tokens, request, answer, token);
                    }
                    Event::Sampled { .. } => {}
                    Event::Ended { request, .. } => _ = flight.ongoing.remove(&request),
                    Event::Broken { request: Some(request), .. } => _ = flight.ongoing.remove(&request),
                    Event::Broken { .. } => return Ok(()),
                }
            }
            if !tokens.is_empty() {
                self.journal.sampled(&tokens)?;
                self.written()?;
            }
        }
        Ok(())
    }

    /// Hands out requests while there is room for more.
    fn begin_more(&mut self, answerer: &dyn Answerer, flight: &mut Flight) -> Result<(), BatchError> {
        while flight.ongoing.is_empty() || flight.answers < flight.at_a_time {
            let Some(request) = flight.queue.pop_front() else { return Ok(()) };
            let entry = self.index.entries[request as usize];
            match Index::line(&self.options.input, &*self.input, &entry)? {
                Err(error) => self.refuse(request, error)?,
                Ok(line) => {
                    let sampled = self.sampled.remove(&request).unwrap_or_default();
                    let (started, events) = (self.started, flight.events.clone());
                    let custom_id = line.custom_id.clone();
                    let ongoing = answerer.begin(Job { request, line, started, sampled, events });
                    let answers = entry.wanted.answers as usize;
                    flight.answers += answers;
                    flight.ongoing.insert(request, Underway { custom_id, answers, generated: 0, _ongoing: ongoing });
                }
            }
        }
        Ok(())
    }

    /// Takes news: tokens go to the journal, results to the output.
    fn take(&mut self, news: Vec<Event>, flight: &mut Flight, meter: &mut Meter) -> Result<(), BatchError> {
        let (mut tokens, mut ended) = (Vec::<Sampled>::new(), Vec::new());
        for event in news {
            match event {
                Event::Sampled { request, answer, token } => {
                    let Some(underway) = flight.ongoing.get_mut(&request) else { continue };
                    underway.generated += 1;
                    meter.generated += 1;
                    add(&mut tokens, request, answer, token);
                }
                Event::Ended { request, outcome } => ended.push((request, outcome)),
                Event::Broken { request, message } => {
                    let named = |request: u32| {
                        let (entry, underway) =
                            (self.index.entries.get(request as usize)?, flight.ongoing.get(&request)?);
                        Some(Named { line: entry.line, custom_id: underway.custom_id.clone() })
                    };
                    return Err(BatchError::Broken { request: request.and_then(named), message });
                }
            }
        }
        // Those that have ended need no tokens any more.
        tokens.retain(|sampled| ended.iter().all(|(request, _)| *request != sampled.request));
        if !tokens.is_empty() {
            self.journal.sampled(&tokens)?;
            self.written()?;
        }
        for (request, outcome) in ended {
            let Some(underway) = flight.ongoing.remove(&request) else { continue };
            flight.answers -= underway.answers;
            self.finish(request, &underway.custom_id, outcome)?;
        }
        Ok(())
    }

    /// A line that is no request.
    fn refuse(&mut self, request: u32, error: LineError) -> Result<(), BatchError> {
        let LineError { custom_id, code, message } = error;
        let object = json!({"message": message, "type": "invalid_request_error", "param": null, "code": code});
        let failure = Failure { status: 400, code: code.to_owned(), message, body: json!({"error": object}) };
        self.finish(request, &custom_id, Err(failure))
    }

    /// Writes a result: to the output first, so that the journal never has one that the output has not.
    fn finish(&mut self, request: u32, custom_id: &str, outcome: Result<Ending, Failure>) -> Result<(), BatchError> {
        let (failed, generated) = (outcome.is_err(), outcome.as_ref().map_or(0, |ending| ending.generated));
        let entry = self.index.entries[request as usize];
        let failure = outcome.as_ref().err().map(|failure| Failed {
            request: Named { line: entry.line, custom_id: custom_id.to_owned() },
            message: failure.message.clone(),
        });
        let mut line = result(custom_id, outcome, &self.options.identity).to_string().into_bytes();
        line.push(b'\n');
        self.output.append(&line)?;
        if self.options.sync == Sync::Always {
            self.output.sync()?;
        }
        let bytes = u32::try_from(line.len()).map_err(|_| BatchError::Broken {
            request: Some(Named { line: entry.line, custom_id: custom_id.to_owned() }),
            message: "the result has more than 4 GiB, the most that a result can have".to_owned(),
        })?;
        self.journal.result(&Written { request, bytes, checksum: xxh3_64(&line), failed, generated })?;
        self.done[request as usize] = true;
        let most = most_tokens(&entry, &self.options);
        self.tokens_left = self.tokens_left.zip(most).map(|(left, most)| left.saturating_sub(most));
        self.finished += 1;
        self.failed += usize::from(failed);
        self.failures.extend(failure.filter(|_| self.failures.len() < MOST_FAILURES));
        self.answered_tokens += u64::from(generated);
        self.written()
    }

    /// Something has been written.
    fn written(&mut self) -> Result<(), BatchError> {
        self.dirty = true;
        self.made.clear();
        if self.options.sync == Sync::Always { self.sync() } else { Ok(()) }
    }

    /// Makes everything durable: the output first, for the same reason.
    fn sync(&mut self) -> Result<(), BatchError> {
        self.output.sync()?;
        self.journal.sync()?;
        (self.dirty, self.synced) = (false, Instant::now());
        Ok(())
    }

    /// `underway`: requests that are being answered, and the tokens that this run has generated for them.
    fn progress(&self, (running, underway): (usize, u64), meter: &mut Meter) -> Progress {
        let requests = self.index.entries.len();
        let (recent, mean) = meter.rates();
        let answered = self.finished - self.failed;
        let left = match (answered, requests - self.finished) {
            (_, 0) => Some(0.0),
            (0, _) => None,
            (answered, left) => {
                let tokens = self.answered_tokens as f64 / answered as f64 * left as f64;
                Some((tokens - underway as f64).max(0.0))
            }
        };
        Progress {
            requests,
            finished: self.finished,
            failed: self.failed,
            running,
            generated: meter.generated,
            seconds: meter.began.elapsed().as_secs_f64(),
            tokens_per_second: recent,
            mean_tokens_per_second: mean,
            seconds_left: left.and_then(|left| seconds_for(left, mean)),
            seconds_left_at_most: self
                .tokens_left
                .and_then(|most| seconds_for(most.saturating_sub(underway) as f64, mean)),
        }
    }
}

/// Adds a token to those of its answer.
fn add(tokens: &mut Vec<Sampled>, request: u32, answer: u32, token: Token) {
    match tokens.iter_mut().rev().find(|known| known.request == request && known.answer == answer) {
        Some(known) => known.tokens.push(token),
        None => tokens.push(Sampled { request, answer, tokens: vec![token] }),
    }
}

/// Seconds for so many tokens at this rate, if there is one.
fn seconds_for(tokens: f64, rate: f64) -> Option<f64> {
    (tokens == 0.0 || rate > 0.0).then(|| tokens / rate.max(f64::MIN_POSITIVE))
}

/// Tokens that the answers of a request can have at most.
fn most_tokens(entry: &Entry, options: &Options) -> Option<u64> {
    let Wanted { max_tokens, answers, .. } = entry.wanted;
    match (answers, max_tokens.or(options.longest_answer)) {
        (0, _) => Some(0),
        (answers, most) => Some(u64::from(answers) * u64::from(most?)),
    }
}

/// A line of the output, in the form of OpenAI's batches.
fn result(custom_id: &str, outcome: Result<Ending, Failure>, identity: &Identity) -> Value {
    let (status, body, error) = match outcome {
        Ok(Ending { body, .. }) => (200, body, Value::Null),
        Err(Failure { status, code, message, body }) => (status, body, json!({"code": code, "message": message})),
    };
    let request_id = format!("req_{}", id_of(custom_id, "request"));
    let mut line = json!({
        "id": format!("batch_req_{}", id_of(custom_id, "result")),
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": error,
    });
    for (field, said) in [("lossy", &identity.lossy), ("prompt_attention", &identity.prompt_attention)] {
        if let Some(said) = said {
            line[field] = said.as_str().into();
        }
    }
    line
}

/// Requests that are being answered.
struct Flight {
    queue: VecDeque<u32>,
    ongoing: HashMap<u32, Underway>,
    /// Their answers.
    answers: usize,
    at_a_time: usize,
    events: Events,
}

impl Flight {
    /// How many requests are being answered, and the tokens that this run has generated for them.
    fn underway(&self) -> (usize, u64) {
        (self.ongoing.len(), self.ongoing.values().map(|underway| underway.generated).sum())
    }
}

/// A request that is being answered.
struct Underway {
    custom_id: String,
    answers: usize,
    generated: u64,
    _ongoing: Ongoing,
}

/// How fast tokens come.
struct Meter {
    began: Instant,
    generated: u64,
    samples: VecDeque<(Instant, u64)>,
}

impl Meter {
    fn new() -> Self {
        let began = Instant::now();
        Meter { began, generated: 0, samples: VecDeque::from([(began, 0)]) }
    }

    /// Tokens per second lately, and since the beginning.
    fn rates(&mut self) -> (f64, f64) {
        let now = Instant::now();
        while self.samples.get(1).is_some_and(|next| now.duration_since(next.0) >= RECENT) {
            self.samples.pop_front();
        }
        self.samples.push_back((now, self.generated));
        let since = |(at, before): (Instant, u64)| {
            let seconds = now.duration_since(at).as_secs_f64();
            if seconds > 0.0 { (self.generated - before) as f64 / seconds } else { 0.0 }
        };
        (self.samples.front().map_or(0.0, |&oldest| since(oldest)), since((self.began, 0)))
    }
}
