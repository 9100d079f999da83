//! One answer: it is requested, shown as it arrives, stopped by Ctrl-C, and measured.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sluice_dialect::Piece;
use sluice_model::Stats;
use sluice_model::memory::Bytes;
use sluice_server::answer::{Answer, Ending, Step, Waiting, Why};
use sluice_server::ask::Ask;
use sluice_server::error::ApiError;
use sluice_server::live::Live;
use sluice_server::served::Served;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{interval, timeout};

use crate::chat::conversation::Said;
use crate::chat::screen::{Quiet, Screen};
use crate::chat::settings::Shown;
use crate::error::CliError;
use crate::terminal::{counted, percent, seconds};

/// How often the transient line is written.
const TICK: Duration = Duration::from_millis(100);
/// Until this time, nothing is said about how long a prompt takes, because it would be inaccurate.
const SETTLE: Duration = Duration::from_secs(1);

/// Why an answer did not end by itself.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The model, or the request.
    Api(ApiError),
    /// The terminal.
    Terminal(CliError),
}

impl From<CliError> for Failure {
    fn from(error: CliError) -> Self {
        Failure::Terminal(error)
    }
}

/// The outcome of a question.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) said: Said,
    pub(crate) ending: How,
    pub(crate) took: Took,
}

/// How an answer ended.
#[derive(Debug)]
pub(crate) enum How {
    /// By itself.
    Ended(Ending),
    /// By Ctrl-C.
    Stopped(Ending),
    /// By a second Ctrl-C: the user does not want to wait.
    Abandoned,
    /// Something went wrong.
    Failed(ApiError),
}

/// Tokens, time and bytes of an answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Took {
    /// Tokens of the prompt, and the number of them that did not have to be read.
    pub(crate) prompt: usize,
    pub(crate) cached: usize,
    /// Tokens of the answer, and the number of them that were thinking.
    pub(crate) generated: usize,
    pub(crate) thinking: usize,
    /// Time until the first tokens, and from there to the end.
    prompt_seconds: f64,
    answer_seconds: f64,
    /// Tokens that arrived in the latter time.
    timed: usize,
    /// The engine's work for the prompt, and for the answer.
    for_prompt: Work,
    for_answer: Work,
}

/// The engine's work.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    hits: u64,
    misses: u64,
    expert_bytes: u64,
    dense_bytes: u64,
}

impl Work {
    fn between(before: &Stats, after: &Stats) -> Self {
        Work {
            hits: after.hits - before.hits,
            misses: after.misses - before.misses,
            expert_bytes: after.expert_bytes_read - before.expert_bytes_read,
            dense_bytes: after.dense_bytes_read - before.dense_bytes_read,
        }
    }

    /// Experts that were found in memory, in percent; `None` if none were needed.
    fn hit_rate(&self) -> Option<f64> {
        let needed = self.hits + self.misses;
        (needed > 0).then(|| percent(self.hits as f64, needed as f64))
    }

    fn describe(&self) -> String {
        let experts = match self.hit_rate() {
            Some(rate) => format!(
                "{} used, {rate:.0} % found in memory, {} read",
                counted(self.hits + self.misses, "expert"),
                Bytes(self.expert_bytes)
            ),
            None => "no experts used".into(),
        };
        match self.dense_bytes {
            0 => experts,
            bytes => format!("{experts}; {} of other weights read", Bytes(bytes)),
        }
    }
}

impl Took {
    /// Tokens of the answer per second; those that arrived with the prompt do not count.
    fn speed(&self) -> Option<f64> {
        (self.timed > 0 && self.answer_seconds > 0.0).then(|| self.timed as f64 / self.answer_seconds)
    }

    /// The line below an answer.
    pub(crate) fn status(&self, context: usize) -> String {
        let speed = self.speed().map(|speed| format!("{speed:.1} tokens/s"));
        let hits = self.for_answer.hit_rate().map(|rate| format!("{rate:.0} % of experts found in memory"));
        let tokens = counted(self.generated, "token");
        let full = format!("context {} of {context}", self.prompt + self.generated);
        let parts: Vec<String> = speed.into_iter().chain(hits).chain([tokens, full]).collect();
        format!("[{}]", parts.join(" · "))
    }

    /// The output of `/stats`.
    pub(crate) fn describe(&self) -> String {
        let read = self.prompt - self.cached.min(self.prompt);
        let thinking = if self.thinking > 0 { format!(", {} of them thinking", self.thinking) } else { String::new() };
        let speed = self.speed().map_or(String::new(), |speed| format!(", {speed:.1} tokens/s"));
        format!(
            "prompt   {}: {} remembered, {read} read in {}\n         {}\n\
             answer   {}{thinking} in {}{speed}\n         {}",
            counted(self.prompt, "token"),
            self.cached,
            seconds(self.prompt_seconds),
            self.for_prompt.describe(),
            counted(self.generated, "token"),
            seconds(self.answer_seconds),
            self.for_answer.describe(),
        )
    }
}

/// Asks a model, and shows its answers.
pub(crate) struct Talk {
    served: Arc<Served>,
    runtime: Runtime,
    /// Ctrl-C, once the first question has been asked.
    interrupts: Option<Signal>,
    live: Live,
}

impl Talk {
    /// Something that asks this model.
    ///
    /// # Errors
    /// If the system has no means to wait for events.
    pub(crate) fn new(served: Served) -> Result<Self, CliError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| CliError::Failure(format!("cannot wait for the model: {error}")))?;
        Ok(Talk { served: Arc::new(served), runtime, interrupts: None, live: Live::default() })
    }

    /// The model.
    pub(crate) fn served(&self) -> &Served {
        &self.served
    }

    /// Closes the model.
    pub(crate) fn close(self) {
        if let Some(served) = Arc::into_inner(self.served) {
            served.close();
        }
    }

    /// Asks, and shows the answer on the screen as it arrives. On a terminal, Ctrl-C stops it.
    ///
    /// # Errors
    /// If there is no answer, or it cannot be shown.
    pub(crate) fn ask(&mut self, ask: &Ask, shown: Shown, screen: &mut Screen) -> Result<Outcome, Failure> {
        let Talk { served, runtime, interrupts, live } = self;
        runtime.block_on(async {
            let quiet = screen.is_terminal().then(Quiet::new);
            if screen.is_terminal() && interrupts.is_none() {
                let listens = signal(SignalKind::interrupt());
                *interrupts = Some(listens.map_err(|e| CliError::Failure(format!("cannot listen for Ctrl-C: {e}")))?);
            }
            // Discards earlier signals.
            if let Some(interrupts) = interrupts.as_mut() {
                while timeout(Duration::ZERO, interrupts.recv()).await.is_ok_and(|came| came.is_some()) {}
            }
            let before = served.model().stats();
            let answers = served.prepare(ask, None).and_then(|prepared| served.start(ask, None, prepared, live));
            let answer = answers.map_err(Failure::Api)?.into_iter().next();
            let answer = answer.ok_or_else(|| CliError::Failure("the model has not answered".into()))?;
            let showing = Showing::new(answer, before, shown, screen);
            let outcome = showing.run(interrupts.as_mut()).await;
            drop(quiet);
            outcome
        })
    }
}

/// An answer that is shown.
struct Showing<'a> {
    answer: Answer,
    screen: &'a mut Screen,
    shown: Shown,
    said: Said,
    began: Instant,
    before: Stats,
    /// When the first tokens arrived, how many there were, and the engine's statistics at that time.
    first: Option<(Instant, usize, Stats)>,
    /// Tokens of the prompt that were remembered, if known.
    cached: Option<usize>,
    /// Whether the last piece was thinking.
    thinks: bool,
    stopping: bool,
}

impl<'a> Showing<'a> {
    fn new(answer: Answer, before: Stats, shown: Shown, screen: &'a mut Screen) -> Self {
        Showing {
            answer,
            screen,
            shown,
            said: Said::default(),
            began: Instant::now(),
            before,
            first: None,
            cached: None,
            thinks: false,
            stopping: false,
        }
    }

    async fn run(mut self, mut interrupts: Option<&mut Signal>) -> Result<Outcome, Failure> {
        let mut ticks = interval(TICK);
        let ending = loop {
            tokio::select! {
                biased;
                () = next(&mut interrupts) => {
                    if self.stopping {
                        break How::Abandoned;
                    }
                    self.stopping = true;
                    self.answer.stop();
                }
                step = self.answer.next() => match step {
                    Some(Step::Piece(piece, _)) => self.piece(piece)?,
                    Some(Step::End(ending)) => break self.ended(ending),
                    Some(Step::Failed(error)) => break How::Failed(error),
                    Some(Step::Waiting(_) | Step::Echo(..)) => {}
                    None => break How::Failed(ApiError::invalid("the answer has no end")),
                },
                _ = ticks.tick() => self.tick()?,
            }
        };
        self.end_thinking()?;
        self.screen.end_line()?;
        let took = self.took(&ending);
        Ok(Outcome { said: self.said, ending, took })
    }

    fn ended(&self, ending: Ending) -> How {
        if self.stopping { How::Stopped(ending) } else { How::Ended(ending) }
    }

    fn piece(&mut self, piece: Piece) -> Result<(), CliError> {
        self.begin();
        match piece {
            Piece::Thinking(text) => {
                self.said.thinking += &text;
                let begins = !std::mem::replace(&mut self.thinks, true);
                // A program gets only the answer.
                if self.shown == Shown::Folded || !self.screen.is_terminal() {
                    return Ok(());
                }
                if begins {
                    self.screen.remark("[thinking]")?;
                }
                self.screen.thought(&text)
            }
            Piece::Text(text) => self.say(&text),
            // There are no tools here: text that looks like a call is text.
            Piece::Call { name, .. } => self.say(&format!("{name} ")),
            Piece::Arguments { delta, .. } => self.say(&delta),
        }
    }

    fn say(&mut self, text: &str) -> Result<(), CliError> {
        self.end_thinking()?;
        let begins = self.said.text.trim().is_empty();
        self.said.text += text;
        // People need no empty lines before an answer. Programs get the answer unchanged.
        let text = if begins && self.screen.is_terminal() { text.trim_start() } else { text };
        self.screen.said(text)
    }

    fn end_thinking(&mut self) -> Result<(), CliError> {
        if !std::mem::take(&mut self.thinks) {
            return Ok(());
        }
        self.screen.end_line()?;
        match self.shown {
            Shown::Open => self.screen.remark("[end of thinking]"),
            Shown::Folded => self.screen.remark("[thinking folded: /thinking shows it]"),
        }
    }

    /// The first tokens have arrived.
    fn begin(&mut self) {
        if self.first.is_none() {
            let tokens = match self.answer.waiting() {
                Waiting::Generating { generated } => generated,
                _ => 1,
            };
            self.first = Some((Instant::now(), tokens, self.answer.served().model().stats()));
        }
    }

    /// Reports progress while there is nothing to read.
    fn tick(&mut self) -> Result<(), CliError> {
        let waiting = self.answer.waiting();
        if matches!(waiting, Waiting::Generating { generated } if generated > 0) {
            self.begin();
        }
        let line = match waiting {
            _ if self.stopping => "stopping; Ctrl-C again ends the chat".to_owned(),
            Waiting::Loading => "loading the model".to_owned(),
            Waiting::Queued { .. } => "waiting for the model".to_owned(),
            Waiting::Reading { read, prompt } => self.reading(read, prompt),
            Waiting::Generating { generated } if self.thinks && self.shown == Shown::Folded => {
                format!("thinking: {}", counted(generated, "token"))
            }
            Waiting::Generating { .. } => return Ok(()),
        };
        self.screen.pass(&line)
    }

    /// How much of the prompt has been read: tokens, layers, time left.
    fn reading(&mut self, read: usize, prompt: usize) -> String {
        let model = self.answer.served().model();
        let cached = *self.cached.get_or_insert(read);
        let layers = model.layers();
        let Some(step) = model.progress() else { return format!("reading the prompt: {read} of {prompt} tokens") };
        let whole = (prompt - cached.min(prompt)) * layers;
        let done = (read - cached.min(read) + step.rows_before) * layers + step.rows * step.layers;
        let left = time_left(done as f64 / whole.max(1) as f64, self.began.elapsed());
        let left = left.map_or(String::new(), |left| format!(", about {left} left"));
        format!(
            "reading the prompt: {} of {prompt} tokens, layer {} of {layers}{left}",
            read + step.rows_before,
            step.layers
        )
    }

    fn took(&self, ending: &How) -> Took {
        let (now, after) = (Instant::now(), self.answer.served().model().stats());
        let usage = match ending {
            How::Ended(ending) | How::Stopped(ending) => ending.usage,
            How::Abandoned | How::Failed(_) => Default::default(),
        };
        let (mut first, mut with_prompt, mut between) = self.first.clone().unwrap_or((now, 0, after.clone()));
        let idle = Work::between(&between, &after).hit_rate().is_none();
        if idle && usage.generated > with_prompt && Work::between(&self.before, &after).hit_rate().is_some() {
            // The system let this thread run only when the model was done: the answer cannot be told apart from the prompt.
            (first, with_prompt, between) = (self.began, 0, self.before.clone());
        }
        Took {
            prompt: self.answer.prompt_tokens(),
            cached: usage.cached,
            generated: usage.generated,
            thinking: usage.thinking,
            prompt_seconds: (first - self.began).as_secs_f64(),
            answer_seconds: (now - first).as_secs_f64(),
            timed: usage.generated.saturating_sub(with_prompt),
            for_prompt: Work::between(&self.before, &between),
            for_answer: Work::between(&between, &after),
        }
    }
}

impl How {
    /// What the reader should know about the end, if it is unusual. `full`: what makes room, if the context has no room for more.
    pub(crate) fn remark(&self, full: Option<&str>) -> Option<String> {
        match self {
            How::Stopped(_) => Some("[stopped]".into()),
            How::Ended(Ending { why: Why::Length, .. }) => Some(match full {
                None => "[cut off after max_tokens]".into(),
                Some(advice) => format!("[cut off: the context is full. {advice}]"),
            }),
            _ => None,
        }
    }
}

/// What makes room in a context of so many tokens for a model that takes at most `most`.
pub(crate) fn more_room(context: usize, most: usize) -> &'static str {
    if context < most {
        "/undo and /reset make room, and so does a larger --context"
    } else {
        "/undo and /reset make room; the model itself takes no more tokens"
    }
}

/// Waits for Ctrl-C; for ever, if there is no receiver for it.
async fn next(interrupts: &mut Option<&mut Signal>) {
    let came = match interrupts {
        Some(interrupts) => interrupts.recv().await,
        None => None,
    };
    if came.is_none() {
        std::future::pending::<()>().await;
    }
}

/// The remaining time, in words, if this part of the whole has taken so long; `None` if it cannot be estimated yet.
fn time_left(done: f64, elapsed: Duration) -> Option<String> {
    if done <= 0.0 || elapsed < SETTLE {
        return None;
    }
    let left = elapsed.as_secs_f64() * (1.0 - done).max(0.0) / done;
    Some(match left {
        left if left < 90.0 => format!("{left:.0} s"),
        left if left < 5400.0 => format!("{:.0} min", left / 60.0),
        left => format!("{:.1} h", left / 3600.0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_follows_from_what_is_done() {
        let left = |done, elapsed| time_left(done, Duration::from_secs(elapsed));
        assert_eq!(left(0.5, 0), None);
        assert_eq!(left(0.0, 100), None);
        assert_eq!(left(0.25, 10).unwrap(), "30 s");
        assert_eq!(left(0.1, 60).unwrap(), "9 min");
        assert_eq!(left(0.01, 360).unwrap(), "9.9 h");
        assert_eq!(left(1.5, 10).unwrap(), "0 s");
    }

    #[test]
    fn a_larger_context_is_advised_only_where_the_model_takes_one() {
        assert!(more_room(4096, 8192).contains("--context"));
        assert!(!more_room(8192, 8192).contains("--context") && more_room(8192, 8192).contains("/undo"));
    }

    #[test]
    fn a_status_says_what_is_known() {
        let mut took = Took { prompt: 10, generated: 5, timed: 4, answer_seconds: 2.0, ..Took::default() };
        assert_eq!(took.status(100), "[2.0 tokens/s · 5 tokens · context 15 of 100]");
        took.for_answer = Work { hits: 3, misses: 1, ..Work::default() };
        assert_eq!(took.status(100), "[2.0 tokens/s · 75 % of experts found in memory · 5 tokens · context 15 of 100]");
    }
}
