//! Many generations on one engine: which of them take part in the next step, and with how many rows.

use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use sluice_model::control::{Cancel, Control, Progress, ProgressObserver, RoutingObserver};
use sluice_model::engine::{Engine, RuntimeError};
use sluice_model::router::Choice;
use sluice_model::rows::{Phase, Span, Want};
use sluice_model::{ModelError, PagesFull, Sequence};
use sluice_sessions::Store;
use sluice_text::Tokenizer;

use super::drive::Drive;
use super::guard::{discard, tell};
use super::kept::Kept;
use super::meter::Meter;
use super::predicted::Wanted;
use super::proposing::{Ahead, Drafts, Proposer};
use super::report::Reporter;
use super::room::{Saved, pages_full};
use super::shared::{Arrival, Owner, Place, Shared, State, Totals, is_background};
use super::start::Follows;
use super::{Event, Generation, GenerationError, Handle, Request, Shape, Status, Submitter};

/// How many steps of a turn cancelling may interrupt. The next step runs to its end, so that callers who come and go cannot keep
/// the others from their tokens.
const INTERRUPTIONS: usize = 3;

/// Most tokens of a draft that are checked in one step.
const DRAFT: usize = 16;

/// How a scheduler divides the engine.
#[derive(Clone, Debug)]
pub struct SchedulerOptions {
    /// Tokens of prompts in a step in which other generations decode, at least 1. With more, prompts are read faster, because every
    /// step reads the experts that it needs once; with fewer, the others' tokens come more steadily. While no generation decodes, a
    /// step takes as many as memory has rows for.
    pub prompt_rows: usize,
    /// Most generations that have a sequence at the same time; `None`: as many as there are pages for.
    pub running: Option<usize>,
    /// Folder for the sequences of generations that have to wait because the pages have run out. `None`: the sequences are dropped,
    /// and their tokens are read again later. A file is deleted when its generation continues or ends. A program that is killed
    /// leaves its files behind; they can be deleted.
    pub spill: Option<PathBuf>,
    /// A [`Model`](super::Model) that has had no work for this long gives its memory back to the system ([`Engine::release_idle`]),
    /// including that of kept sequences; `None`: never.
    pub rest_after: Option<Duration>,
    /// Most sequences of ended generations to keep in memory, so that a later request that begins with the same tokens need not
    /// read them again. They hold only pages that nothing else needs.
    pub kept: usize,
    /// Most generations in the queue, without those in the background; `None`: any number.
    pub queue: Option<usize>,
    /// Sequences on the drive. The sequence of an ended generation is written there, and a later request that begins with the same
    /// tokens continues from it, also in another run of the program. Several models can share a store.
    pub store: Option<Arc<Store>>,
    /// If there is a store, a generation is saved whenever this many tokens are new, and once a prompt with this many new tokens
    /// has been read, so that little is lost when the program is killed.
    pub save_every: usize,
    /// Where there is a store, whether sequences of generations that have come to their end are saved as well, and not only those of
    /// generations that were cancelled or still go on.
    pub save_ended: bool,
    /// Who proposes tokens to generations that have no draft of their own.
    pub drafts: Drafts,
    /// How many tokens are proposed to a generation in a step; `None`: as many as pay, often none, which is learned from the steps.
    pub draft_tokens: Option<usize>,
}

impl Default for SchedulerOptions {
    fn default() -> Self {
        SchedulerOptions {
            prompt_rows: 256,
            running: None,
            spill: None,
            rest_after: None,
            kept: 64,
            queue: None,
            store: None,
            save_every: 2048,
            save_ended: true,
            drafts: Drafts::Off,
            draft_tokens: None,
        }
    }
}

/// Observers of the steps. The default has none.
#[derive(Default)]
pub struct Watch<'a> {
    /// Is told the progress of the step after every layer.
    pub progress: Option<&'a mut ProgressObserver<'a>>,
    /// Sees the routing.
    pub routing: Option<&'a mut RoutingObserver<'a>>,
}

impl fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

/// A generation that has a sequence.
pub(super) struct Running {
    pub(super) id: u64,
    pub(super) generation: Generation,
    pub(super) sequence: Sequence,
    pub(super) owner: Owner,
    /// Events that the owner has not got yet.
    pub(super) events: Vec<Event>,
    /// Tokens of the prompt that have been reported to the owner.
    pub(super) reported: usize,
    pub(super) failed: bool,
    /// The generation that reads what both share, if this one waits for it; its own sequence is empty until then.
    pub(super) follows: Option<Follows>,
    /// Tokens that have been saved.
    pub(super) saved: usize,
    /// The proposals to it.
    pub(super) ahead: Ahead,
}

impl Running {
    pub(super) fn fail(&mut self, error: GenerationError) {
        self.events.push(Event::Failed(error));
        self.failed = true;
    }

    pub(super) fn is_over(&self) -> bool {
        self.failed || self.generation.finish().is_some()
    }

    fn place(&self) -> Place {
        let (read, prompt) = (self.sequence.position(), self.generation.usage().prompt_tokens);
        match read < prompt {
            true => Place::Reading { read, prompt },
            false => Place::Decoding { generated: self.generation.generated().len() },
        }
    }

    /// Reports how much of the prompt has been read, if that has changed.
    pub(super) fn report(&mut self, read: usize) {
        let prompt = self.generation.usage().prompt_tokens;
        let read = read.min(prompt);
        if read > self.reported {
            self.reported = read;
            self.events.push(Event::Progress { read, prompt });
        }
    }
}

/// What one of the generations in a step needs, besides its sequence.
struct Taker<'a> {
    generation: &'a mut Generation,
    events: &'a mut Vec<Event>,
    reported: &'a mut usize,
    failed: &'a mut bool,
    /// Whether its span has proposals.
    draft: bool,
    /// The position of the first token of its span, if the tokens of its prompt are scored.
    scores_from: Option<usize>,
    /// The token of the span whose logits the next choice needs.
    chooses_at: Option<usize>,
}

impl Taker<'_> {
    fn accept(&mut self, token: usize, logits: &[f32]) {
        let prompt = self.generation.usage().prompt_tokens;
        if *self.reported < prompt && self.chooses_at.is_none_or(|at| at == token) {
            *self.reported = prompt;
            self.events.push(Event::Progress { read: prompt, prompt });
        }
        let mut sink = |event| self.events.push(event);
        if let Some(from) = self.scores_from {
            self.generation.score(from + token, logits, &mut sink);
        }
        if self.chooses_at.is_some_and(|at| at != token) {
            return;
        }
        let accepted = match self.draft {
            true => self.generation.accept_draft(token, logits, &mut sink),
            false => self.generation.accept(logits, &mut sink),
        };
        if let Err(error) = accepted {
            self.events.push(Event::Failed(error));
            *self.failed = true;
        }
    }
}

/// Runs many generations on one engine, turn by turn. A turn is one step, with all generations that decode, and with a bounded
/// number of rows of the prompts that are being read.
///
/// Generations are admitted in order of arrival, while there are pages for them. When the pages run out, the youngest generation is
/// saved, and it continues where it was once there are pages again. Prompts share the rows equally; rows that a short prompt does
/// not need go to the next. The text of a generation does not depend on the others.
pub struct Scheduler {
    pub(super) shared: Arc<Shared>,
    pub(super) options: SchedulerOptions,
    /// In order of arrival.
    pub(super) running: Vec<Running>,
    /// Generations that gave up their pages, in order of arrival. They are admitted before the queue.
    pub(super) saved: Vec<Saved>,
    /// How often a generation has been saved.
    pub(super) preemptions: u64,
    /// An empty sequence for the next generation in the queue; it has no pages.
    pub(super) spare: Option<Sequence>,
    /// Number and tokens of the next generation in the queue.
    pub(super) next: Option<(u64, Arc<[u32]>)>,
    pub(super) kept: Kept,
    pub(super) drive: Option<Drive>,
    /// Whether this turn has waited for the drive, to free pages.
    waited: bool,
    /// Whether there are layers with windows or states, so that a sequence cannot go back to every position.
    pub(super) forgets: bool,
    /// Marks that a sequence can keep in such a model.
    pub(super) marks: usize,
    pub(super) totals: Totals,
    /// Tokens of the spans of a step.
    tokens: Vec<u32>,
    /// Tokens that were read as parts of prompts, and that were generated, in the current turn.
    read: u64,
    generated: u64,
    /// Whether drafts are checked in this turn; not once there were too few pages for them.
    pub(super) drafts: bool,
    /// Tokens that drafts have proposed since the start, and those that came true.
    proposals: (u64, u64),
    pub(super) proposer: Proposer,
    meter: Meter,
    reporter: Reporter,
    /// Whether the last turn had nothing to do.
    idle: bool,
}

/// The work that there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A turn.
    Ready,
    /// None, for as long as requested.
    Idle,
    /// None any more: the scheduler has been closed and no generation is left.
    Closed,
}

impl Scheduler {
    /// A scheduler for `engine`; each turn must be given this engine. Without a tokenizer there is no text.
    pub fn new(engine: &Engine, tokenizer: Option<Tokenizer>, options: SchedulerOptions) -> Self {
        let phases = engine.prompt_attention().tells_phases_apart();
        let (vocab, most_context) = (engine.spec().vocab_size, engine.spec().max_positions);
        let shape = Shape { vocab, context: engine.memory().context, most_context, tokenizer, phases };
        let forgets = engine.pages().iter().any(|pages| pages.kind.forgets());
        Scheduler {
            shared: Shared::new(shape, options.queue.map(|limit| limit.max(1))),
            kept: Kept::new(options.kept),
            drive: options.store.clone().map(|store| Drive::new(engine, store, options.save_every)),
            waited: false,
            next: None,
            forgets,
            marks: if forgets { engine.memory().marks } else { 0 },
            totals: Totals::default(),
            proposer: Proposer::new(options.drafts, options.draft_tokens.map(|most| most.min(DRAFT)), engine),
            options,
            running: Vec::new(),
            saved: Vec::new(),
            preemptions: 0,
            spare: None,
            tokens: Vec::new(),
            read: 0,
            generated: 0,
            drafts: true,
            proposals: (0, 0),
            meter: Meter::new(),
            reporter: Reporter::default(),
            idle: true,
        }
    }

    /// Puts generations into the queue, from any thread.
    pub fn submitter(&self) -> Submitter {
        Submitter(Arc::clone(&self.shared))
    }

    /// Like [`Submitter::submit`].
    ///
    /// # Errors
    /// Like [`Submitter::submit`].
    pub fn submit(
        &self,
        request: Request,
        owner: impl FnMut(Event) -> ControlFlow<()> + Send + 'static,
    ) -> Result<Handle, GenerationError> {
        self.submitter().submit(request, owner)
    }

    /// What the scheduler is doing.
    pub fn status(&self) -> Status {
        self.submitter().status()
    }

    /// Why the model's prediction layer proposes no more tokens, if it has failed: because a part of it cannot be read, for
    /// instance.
    pub fn draft_failure(&self) -> Option<&str> {
        self.proposer.failure()
    }

    /// Whether there is no generation, running, saved or in the queue.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.saved.is_empty() && self.shared.lock().queue.is_empty()
    }

    /// Waits until there is something to do; false once the scheduler has been closed and nothing is left.
    pub fn wait(&self) -> bool {
        self.wait_for(None) == Work::Ready
    }

    /// Like [`wait`](Self::wait), for at most this long.
    pub fn wait_for(&self, most: Option<Duration>) -> Work {
        let mut state = self.shared.lock();
        let nothing =
            |state: &State| state.queue.is_empty() && state.budget.is_none() && !self.shared.board.is_wanted();
        while self.running.is_empty() && self.saved.is_empty() && nothing(&state) {
            if state.closed {
                return Work::Closed;
            }
            let waited = match most {
                None => (self.shared.work.wait(state).unwrap_or_else(PoisonError::into_inner), false),
                Some(most) => {
                    let (state, timeout) =
                        self.shared.work.wait_timeout(state, most).unwrap_or_else(PoisonError::into_inner);
                    (state, timeout.timed_out())
                }
            };
            state = waited.0;
            if waited.1 && state.queue.is_empty() && !state.closed {
                return Work::Idle;
            }
        }
        Work::Ready
    }

    /// The engine has given its memory back, or other experts are in memory, so that reports of it are out of date.
    pub(super) fn outdate_report(&self) {
        self.shared.board.outdate();
    }

    /// Takes one step with every generation that has something to append, and delivers the events to the owners. False if there was
    /// no work.
    ///
    /// A step that fails ends those generations that cannot take it alone, with the error; the others continue.
    pub fn turn(&mut self, engine: &mut Engine, watch: &mut Watch<'_>) -> bool {
        self.meter.resume(self.idle);
        self.reporter.begin(&self.shared.board, engine, self.idle);
        self.follow_budget(engine);
        (self.read, self.generated, self.drafts, self.waited) = (0, 0, true, false);
        let (mut interruptions, mut crowded) = (0, false);
        loop {
            self.sweep();
            self.follow_up(engine);
            if !crowded {
                self.admit(engine);
            }
            if self.running.is_empty() {
                break;
            }
            let cancellable = interruptions < INTERRUPTIONS;
            match self.step(engine, watch, None, cancellable) {
                Ok(()) => break,
                Err(error) if is_cancelled(&error) => interruptions += 1,
                Err(error) => match pages_full(&error) {
                    Some(full) if self.find_pages(&full) => {}
                    Some(_) => {
                        self.give_way(error);
                        crowded = true;
                    }
                    None if self.blame(engine, watch, error, cancellable) => break,
                    None => interruptions += 1,
                },
            }
        }
        let worked = !self.running.is_empty();
        if worked {
            self.meter.record(self.read, self.generated);
        }
        self.deliver();
        // Those that have ended are gone now.
        self.idle = self.running.is_empty();
        self.reporter.end(&self.shared.board, engine, self.idle && self.saved.is_empty());
        worked
    }

    /// Applies a budget that was requested, and follows the system's reports on its memory.
    fn follow_budget(&mut self, engine: &mut Engine) {
        // The lock is released first, because returning memory to the system takes time.
        let budget = self.shared.lock().budget.take();
        if let Some(bytes) = budget {
            // A budget below the least was raised to it; memory that the system did not give shows in the engine's memory plan.
            let _ = engine.set_budget(bytes.max(engine.memory().least()));
        }
        engine.heed_pressure();
    }

    /// Ends the generations that were cancelled, whether queued, saved or running.
    fn sweep(&mut self) {
        let mut state = self.shared.lock();
        let cancelled = std::mem::take(&mut state.cancelled);
        if cancelled.is_empty() {
            return;
        }
        let (queued, kept) = state.queue.drain(..).partition::<Vec<_>, _>(|arrival| cancelled.contains(&arrival.id));
        state.queue.extend(kept);
        let (ended, kept) = self.running.drain(..).partition::<Vec<_>, _>(|running| cancelled.contains(&running.id));
        self.running = kept;
        let saved: Vec<Saved> = self.saved.extract_if(.., |saved| cancelled.contains(&saved.id)).collect();
        for id in ended.iter().map(|r| r.id).chain(saved.iter().map(|s| s.id)) {
            state.places.remove(&id);
        }
        drop(state);
        for Saved { generation, owner, .. } in saved {
            end(generation, owner, Vec::new());
        }
        for Running { mut generation, sequence, owner, events, .. } in ended {
            self.keep(&mut generation, sequence, true);
            end(generation, owner, events);
        }
        for Arrival { generation, owner, .. } in queued {
            end(generation, owner, Vec::new());
        }
    }

    /// Takes sequences back to the positions that their generations need, and asks for drafts. `all`: whether all generations take
    /// part in the step.
    fn prepare(&mut self, engine: &mut Engine, all: bool) {
        let rows = engine.memory().rows;
        let most = if self.drafts { (rows / self.running.len().max(1)).clamp(1, DRAFT + 1) } else { 1 };
        for running in &mut self.running {
            let Running { generation, sequence, ahead, .. } = running;
            go_back(generation, sequence);
            ahead.go_back(sequence.position());
            if let Err(error) = generation.draft(sequence.position(), most - 1) {
                running.fail(error);
            }
        }
        match all {
            true => self.propose(engine, most - 1),
            false => self.proposer.pause(),
        }
    }

    /// Keeps what a generation that has ended leaves behind, also on the drive if it is to be `saved`.
    fn keep(&mut self, generation: &mut Generation, mut sequence: Sequence, saved: bool) {
        if generation.keeps().0 {
            go_back(generation, &mut sequence);
            if let Some(drive) = self.drive.as_ref().filter(|_| saved) {
                drive.keep(&sequence, generation.keeps().1);
                if !self.options.save_ended {
                    // Nothing is saved once more in the end, so none may be left out because many come at a time.
                    drive.flush();
                }
            }
            // A fork has no page for the next pass to write.
            self.kept.insert(sequence.fork());
        }
    }

    /// Frees pages: kept sequences give theirs up. That is useless while the pages belong to sequences that are being written. Then
    /// it waits for those, once per turn, but not while `others` could continue. False if no pages were freed.
    pub(super) fn shed(&mut self, full: &PagesFull, others: bool) -> bool {
        if !self.kept.has_pages() && !self.waited && self.is_writing() {
            if !others {
                self.waited = true;
                self.drive.iter().for_each(Drive::flush);
            }
            return !others;
        }
        self.kept.shed(full)
    }

    /// One step: of all generations, or of one of them, `only`.
    fn step(
        &mut self,
        engine: &mut Engine,
        watch: &mut Watch<'_>,
        only: Option<u64>,
        cancellable: bool,
    ) -> Result<(), RuntimeError> {
        let before = said(&self.running);
        self.prepare(engine, only.is_none());
        self.save_running();
        let takes_part = |r: &Running| !r.is_over() && r.follows.is_none() && only.is_none_or(|id| id == r.id);
        let (rows, left_to_read) = self.rows(engine, &takes_part);
        self.room_for_step(engine, &rows);
        self.tokens.clear();
        for (running, &count) in self.running.iter().zip(&rows) {
            self.tokens.extend_from_slice(&running.generation.offer(running.sequence.position()).0[..count]);
        }
        if self.tokens.is_empty() {
            return Ok(());
        }
        let cancel = if cancellable {
            let ids = self.running.iter().filter(|r| takes_part(r)).map(|r| r.id);
            Some(self.shared.begin_step(ids).ok_or(ModelError::Cancelled)?)
        } else {
            None
        };
        let mut prompt_rows = 0;
        let (mut spans, mut takers) = (Vec::new(), Vec::new());
        let mut left = self.tokens.as_slice();
        for (running, &count) in self.running.iter_mut().zip(&rows).filter(|(_, count)| **count > 0) {
            let Running { generation, sequence, events, reported, failed, .. } = running;
            let (tokens, rest) = left.split_at(count);
            left = rest;
            let (_, phase) = generation.offer(sequence.position());
            let scores_from = (phase == Phase::Prompt && generation.scores_prompt()).then(|| sequence.position());
            let left_to_see = generation.len() - sequence.position();
            let chooses_at = scores_from.map(|_| left_to_see - 1);
            let logits = match phase {
                Phase::Draft => Want::All,
                _ if scores_from.is_some() => Want::All,
                _ if count == left_to_see => Want::Last,
                _ => Want::Nothing,
            };
            prompt_rows += if phase.reads() { count } else { 0 };
            spans.push(Span { sequence, tokens, phase, logits });
            let draft = phase == Phase::Draft;
            takers.push(Taker { generation, events, reported, failed, draft, scores_from, chooses_at });
        }
        let counts: Vec<usize> = spans.iter().map(|span| span.tokens.len()).collect();
        let mut wanted = self.proposer.wanted(&counts, engine);
        let started = Instant::now();
        let outcome = take_step(
            engine,
            &self.shared,
            (&mut spans, &mut takers),
            watch,
            (cancel.as_ref(), left_to_read),
            wanted.as_mut(),
        );
        let seconds = started.elapsed().as_secs_f64();
        self.shared.end_step(engine.stats());
        let generated = self.account(before, if outcome.is_ok() { Some(prompt_rows) } else { None });
        if outcome.is_ok() {
            self.learn(&rows, wanted, seconds, generated);
        }
        outcome
    }

    /// Counts the results of a step since `before`. `read`: rows of prompts, if the step was completed. Returns the number of
    /// generated tokens.
    fn account(&mut self, before: (u64, u64, u64), read: Option<usize>) -> u64 {
        let after = said(&self.running);
        self.generated += after.0 - before.0;
        self.totals.generated_tokens += after.0 - before.0;
        self.proposals = (self.proposals.0 + after.1 - before.1, self.proposals.1 + after.2 - before.2);
        self.read += read.unwrap_or(0) as u64;
        self.totals.steps += u64::from(read.is_some());
        for running in &mut self.running {
            running.report(running.sequence.position());
            // A step without pages has made no progress, and sets no marks.
            if read.is_some() {
                running.mark();
            }
        }
        after.0 - before.0
    }

    /// Kept sequences give up the pages that a step needs. Otherwise the engine would first give up automatic marks, which are
    /// worth more.
    fn room_for_step(&mut self, engine: &Engine, rows: &[usize]) {
        while !self.kept.is_empty() {
            let parts = self.running.iter().zip(rows).filter(|(_, rows)| **rows > 0);
            match engine.room_for(parts.map(|(running, &rows)| (&running.sequence, rows))) {
                Ok(()) => break,
                Err(full) => _ = self.shed(&full, false),
            }
        }
    }

    /// Rows of each running generation in a step, and the tokens of prompts that later steps read, if the step is one of prompts alone.
    fn rows(&self, engine: &Engine, takes_part: &dyn Fn(&Running) -> bool) -> (Vec<usize>, usize) {
        let wanted = |prompt: bool| -> Vec<usize> {
            let of = |r: &Running| match r.generation.offer(r.sequence.position()) {
                (tokens, phase) if phase.reads() == prompt && takes_part(r) => match prompt {
                    true => tokens.len().min(self.rows_to_stop(r)),
                    false => tokens.len(),
                },
                _ => 0,
            };
            self.running.iter().map(of).collect()
        };
        let decoding = wanted(false);
        let decoded: usize = decoding.iter().sum();
        let wanted = wanted(true);
        let rows = match decoded {
            0 => {
                let reading = self.running.iter().zip(&wanted).filter(|(_, wanted)| **wanted > 0);
                let before = reading.map(|(r, _)| r.sequence.position()).sum();
                engine.rows_together(wanted.iter().sum(), before).max(1)
            }
            _ => self.options.prompt_rows.min(engine.memory().rows.saturating_sub(decoded)).max(1),
        };
        // Generations in the background read with the rows that the others leave.
        let of = |background: bool, rows| {
            let each = self.running.iter().zip(&wanted);
            let each = each.map(|(r, &wanted)| if is_background(r.id) == background { wanted } else { 0 });
            shares(&each.collect::<Vec<_>>(), rows)
        };
        let usual = of(false, rows);
        let left = of(true, rows - usual.iter().sum::<usize>());
        let reading: Vec<usize> = usual.into_iter().zip(left).map(|(usual, left)| usual + left).collect();
        let later = wanted.iter().sum::<usize>() - reading.iter().sum::<usize>();
        let rows = reading.into_iter().zip(decoding).map(|(a, b)| a + b).collect();
        (rows, if decoded == 0 { later } else { 0 })
    }

    /// Repeats a failed step for each generation alone, and ends those whose step fails again. False if this was interrupted by a
    /// cancellation.
    fn blame(&mut self, engine: &mut Engine, watch: &mut Watch<'_>, error: RuntimeError, cancellable: bool) -> bool {
        let ids = self.running.iter().filter(|r| !r.is_over() && r.follows.is_none()).map(|r| r.id);
        let ids: Vec<u64> = ids.collect();
        if let [id] = ids[..] {
            if let Some(running) = self.running.iter_mut().find(|r| r.id == id) {
                running.fail(error.into());
            }
            return true;
        }
        for id in ids {
            match self.step(engine, watch, Some(id), cancellable) {
                Ok(()) => {}
                // This generation did not cause it: it takes part in the next turn.
                Err(error) if pages_full(&error).is_some() => {}
                Err(error) if is_cancelled(&error) => return false,
                Err(error) => {
                    if let Some(running) = self.running.iter_mut().find(|r| r.id == id) {
                        running.fail(error.into());
                    }
                }
            }
        }
        true
    }

    /// Delivers the events to the owners, and removes the generations that have ended.
    fn deliver(&mut self) {
        let over: Vec<Running> = self.running.extract_if(.., |r| r.is_over()).collect();
        let ended = over.iter().map(|r| r.id).collect::<Vec<_>>();
        // What is to be remembered is being written before anybody hears of the end: who hears of it may kill the program.
        let mut owners: Vec<_> = over.into_iter().map(|running| self.retire(running)).collect();
        for (_, owner, events) in &mut owners {
            // It has ended, whatever the owner says.
            let _ = events.drain(..).try_for_each(|event| tell(owner, event));
        }
        let mut gone = Vec::new();
        for Running { id, events, owner, .. } in &mut self.running {
            if events.drain(..).try_for_each(|event| tell(owner, event)).is_break() {
                gone.push(*id);
            }
        }
        let mut state = self.shared.lock();
        state.cancelled.extend(gone);
        for id in &ended {
            state.places.remove(id);
            state.cancelled.remove(id);
        }
        for running in &self.running {
            state.places.insert(running.id, running.place());
        }
        state.rates = self.meter.rates();
        state.preemptions = self.preemptions;
        state.proposals = self.proposals;
        state.drafts_failed = self.proposer.failure().is_some();
        state.kept = (self.kept.len(), self.kept.tokens());
        state.totals = self.totals;
        drop(state);
        // Owners are dropped outside the lock, because an owner may drop a handle that cancels others, or the model.
        owners.into_iter().for_each(discard);
    }

    /// A generation has ended: its sequence is kept, and the rest is returned, with the events that its owner has not got yet.
    fn retire(&mut self, running: Running) -> (Generation, Owner, Vec<Event>) {
        let Running { mut generation, sequence, owner, events, .. } = running;
        let saved = self.options.save_ended;
        self.keep(&mut generation, sequence, saved);
        (generation, owner, events)
    }
}

impl fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scheduler")
            .field("options", &self.options)
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

/// Takes a step with these spans, each of which has its taker. `wanted`: takes the head's inputs.
fn take_step(
    engine: &mut Engine,
    shared: &Shared,
    (spans, takers): (&mut [Span<'_>], &mut [Taker<'_>]),
    watch: &mut Watch<'_>,
    (cancel, left_to_read): (Option<&Cancel>, usize),
    wanted: Option<&mut Wanted>,
) -> Result<(), RuntimeError> {
    let Watch { progress, routing } = watch;
    let sees_routing = routing.is_some();
    let mut on_progress = |p: Progress| {
        shared.progress(p);
        progress.iter_mut().for_each(|progress| progress(p));
    };
    let mut on_routing = |layer: usize, position: usize, top_k: usize, choices: &[Choice]| {
        routing.iter_mut().for_each(|routing| routing(layer, position, top_k, choices));
    };
    let mut on_head_inputs = wanted.map(|wanted| move |rows: &[f32]| wanted.see(rows));
    let mut control = Control { cancel, left_to_read, progress: Some(&mut on_progress), ..Control::default() };
    if sees_routing {
        control.routing = Some(&mut on_routing);
    }
    if let Some(observer) = &mut on_head_inputs {
        control.head_inputs = Some(observer);
    }
    // A generation takes its logits at once: keeping a row of the vocabulary for each would take memory that no plan counts. If the
    // step fails afterwards, the sequence lacks one more token, which the next offer has.
    engine.step(spans, &mut control, &mut |span, token, logits| takers[span].accept(token, logits))
}

/// Ends a generation that was cancelled, and delivers its last events.
fn end(mut generation: Generation, mut owner: Owner, mut events: Vec<Event>) {
    let failed = matches!(events.last(), Some(Event::Failed(_)));
    if !failed && let Err(error) = generation.cancel(&mut |event| events.push(event)) {
        events.push(Event::Failed(error));
    }
    let _ = events.into_iter().try_for_each(|event| tell(&mut owner, event));
    discard((generation, owner));
}

/// Takes a sequence back to the position that its generation needs.
fn go_back(generation: &mut Generation, sequence: &mut Sequence) {
    if let Some(position) = generation.take_back_to() {
        // A sequence that cannot go there goes further back, and more tokens are read again.
        let _ = sequence.rewind_to(position.min(sequence.position()));
    }
}

/// Tokens that these have generated, tokens that their drafts have proposed, and how many of those have come true.
fn said(running: &[Running]) -> (u64, u64, u64) {
    running.iter().fold((0, 0, 0), |(generated, proposed, came_true), r| {
        let proposals = r.generation.proposals();
        (generated + r.generation.generated().len() as u64, proposed + proposals.0, came_true + proposals.1)
    })
}

fn is_cancelled(error: &RuntimeError) -> bool {
    matches!(error, RuntimeError::Model(ModelError::Cancelled))
}

/// Divides `rows` equally among generations that want `wanted` rows each. Rows that one does not need go to those after it, then to
/// those before it.
fn shares(wanted: &[usize], rows: usize) -> Vec<usize> {
    let mut given = vec![0; wanted.len()];
    let mut left = rows;
    loop {
        let mut hungry = wanted.iter().zip(&given).filter(|(wanted, given)| given < wanted).count();
        if hungry == 0 || left == 0 {
            return given;
        }
        for (wanted, given) in wanted.iter().zip(&mut given).filter(|(wanted, given)| **given < **wanted) {
            let share = left.div_ceil(hungry).min(wanted - *given);
            *given += share;
            left -= share;
            hungry -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::shares;

    #[test]
    fn prompts_share_rows_equally() {
        assert!(shares(&[], 8).is_empty());
        assert_eq!(shares(&[100], 8), [8]);
        assert_eq!(shares(&[3], 8), [3]);
        assert_eq!(shares(&[100, 100], 8), [4, 4]);
        assert_eq!(shares(&[100, 0, 2, 100], 9), [3, 0, 2, 4], "what the third leaves goes to the fourth");
        assert_eq!(shares(&[100, 1], 9), [8, 1], "what the second leaves goes back to the first");
        assert_eq!(shares(&[5, 5, 5], 1), [1, 0, 0]);
        assert_eq!(shares(&[1, 2, 3], 100), [1, 2, 3]);
    }
}
