//! The data that a scheduler shares with callers that submit, watch and cancel generations, on any thread.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use sluice_model::control::{Cancel, Progress};
use sluice_model::engine::Stats;

use super::report::{Board, Report};
use super::{Event, Generation, GenerationError, Priority, Request, Shape};

/// First number of generations in the background. All orders go by number, so these come after all others.
const BACKGROUND: u64 = 1 << 63;

/// Whether this number belongs to a generation in the background.
pub(super) fn is_background(id: u64) -> bool {
    id >= BACKGROUND
}

/// Receives a generation's events, between steps; `Break` cancels the generation.
pub(super) type Owner = Box<dyn FnMut(Event) -> ControlFlow<()> + Send>;

/// State of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Waiting for pages.
    Queued {
        /// Generations that come before it.
        ahead: usize,
    },
    /// Its prompt is being read.
    Reading {
        /// Tokens read so far.
        read: usize,
        /// Tokens of the prompt.
        prompt: usize,
    },
    /// It is generating.
    Decoding {
        /// Tokens generated so far.
        generated: usize,
    },
    /// It was saved because older generations needed its pages. It continues before everything in the queue.
    Saved {
        /// Tokens generated so far.
        generated: usize,
    },
}

/// What a scheduler is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Status {
    /// Generations that wait for pages.
    pub queued: usize,
    /// Generations whose prompt is being read.
    pub reading: usize,
    /// Generations that are generating.
    pub decoding: usize,
    /// Generations that were saved because older ones needed their pages, and that will continue.
    pub saved: usize,
    /// How often a generation was saved since the start.
    pub preemptions: u64,
    /// Tokens that drafts have proposed since the start.
    pub proposed: u64,
    /// Proposed tokens that came true.
    pub came_true: u64,
    /// Whether the model's prediction layer proposes no tokens any more, because a part of it cannot be read.
    pub drafts_failed: bool,
    /// Tokens of prompts read per second, over the latest turns, of all generations together.
    pub prompt_tokens_per_second: f64,
    /// Tokens generated per second, over the latest turns, of all generations together.
    pub tokens_per_second: f64,
    /// Sequences of generations that have ended, which are kept in memory for later requests.
    pub kept: usize,
    /// Tokens that these sequences have seen; tokens that several share count for each.
    pub kept_tokens: usize,
    /// Totals since the start.
    pub totals: Totals,
}

/// Tokens since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Tokens of the prompts of generations that have begun.
    pub prompt_tokens: u64,
    /// Tokens of prompts that were not computed, because a stored sequence began with them.
    pub cached_tokens: u64,
    /// Cached tokens that were read from the drive.
    pub restored_tokens: u64,
    /// Tokens that were generated.
    pub generated_tokens: u64,
    /// Steps of the engine.
    pub steps: u64,
}

/// A generation that has not been admitted.
pub(super) struct Arrival {
    pub(super) id: u64,
    pub(super) generation: Generation,
    pub(super) owner: Owner,
}

/// The data that the lock protects. No owner is called or dropped while it is held.
#[derive(Default)]
pub(super) struct State {
    next: u64,
    pub(super) queue: VecDeque<Arrival>,
    /// Generations that will be ended; each of them is queued, saved or running.
    pub(super) cancelled: BTreeSet<u64>,
    /// The switch that ends the running step.
    step: Cancel,
    /// The generations in the running step: cancelling one of them ends it.
    in_step: Vec<u64>,
    /// The progress of the running step; `None` between steps.
    progress: Option<Progress>,
    /// The engine's statistics at the end of the last step.
    stats: Stats,
    /// Places of the generations that have been admitted.
    pub(super) places: BTreeMap<u64, Place>,
    pub(super) rates: (f64, f64),
    pub(super) preemptions: u64,
    pub(super) proposals: (u64, u64),
    pub(super) drafts_failed: bool,
    /// Number of kept sequences, and of their tokens.
    pub(super) kept: (usize, usize),
    pub(super) totals: Totals,
    /// A budget to apply at the next turn.
    pub(super) budget: Option<u64>,
    pub(super) closed: bool,
}

impl State {
    fn is_alive(&self, id: u64) -> bool {
        self.places.contains_key(&id) || self.ahead_of(id).is_some()
    }

    /// How many come before this one in the queue; `None` if it is not in the queue.
    fn ahead_of(&self, id: u64) -> Option<usize> {
        // Numbers ascend in the queue.
        self.queue.binary_search_by_key(&id, |arrival| arrival.id).ok()
    }

    fn cancel(&mut self, id: u64) {
        if self.is_alive(id) {
            self.cancelled.insert(id);
            if self.in_step.contains(&id) {
                self.step.cancel();
            }
        }
    }

    pub(super) fn cancel_all(&mut self) {
        let all: Vec<u64> = self.queue.iter().map(|a| a.id).chain(self.places.keys().copied()).collect();
        all.into_iter().for_each(|id| self.cancel(id));
    }

    /// Accepts no more generations, and cancels those that have not begun.
    fn drain(&mut self) {
        self.closed = true;
        let queued: Vec<u64> = self.queue.iter().map(|arrival| arrival.id).collect();
        self.cancelled.extend(queued);
    }
}

pub(super) struct Shared {
    state: Mutex<State>,
    /// Signals that there is work, or that the end has come.
    pub(super) work: Condvar,
    pub(super) shape: Shape,
    /// Reports of the engine.
    pub(super) board: Board,
    /// Most generations in the queue.
    limit: Option<usize>,
}

impl Shared {
    pub(super) fn new(shape: Shape, limit: Option<usize>) -> Arc<Self> {
        Arc::new(Shared { state: Mutex::default(), work: Condvar::new(), shape, board: Board::new(), limit })
    }

    /// The state is consistent between any two statements, so a panic elsewhere does not spoil it.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A step of these generations begins. Returns the switch that ends it; `None` if one of them has already been cancelled.
    pub(super) fn begin_step(&self, ids: impl Iterator<Item = u64>) -> Option<Cancel> {
        let mut state = self.lock();
        state.in_step.clear();
        state.in_step.extend(ids);
        if state.in_step.iter().any(|id| state.cancelled.contains(id)) {
            state.in_step.clear();
            return None;
        }
        if state.step.is_cancelled() {
            state.step = Cancel::new();
        }
        Some(state.step.clone())
    }

    /// The running step has completed another layer.
    pub(super) fn progress(&self, progress: Progress) {
        self.lock().progress = Some(progress);
    }

    /// The step is over, and these are the engine's statistics since it was opened.
    pub(super) fn end_step(&self, stats: Stats) {
        let mut state = self.lock();
        state.in_step.clear();
        state.progress = None;
        state.stats = stats;
    }

    fn status(&self) -> Status {
        let state = self.lock();
        let count = |is: fn(&Place) -> bool| state.places.values().filter(|place| is(place)).count();
        let reading = count(|place| matches!(place, Place::Reading { .. }));
        let saved = count(|place| matches!(place, Place::Saved { .. }));
        Status {
            queued: state.queue.len(),
            reading,
            decoding: state.places.len() - reading - saved,
            saved,
            preemptions: state.preemptions,
            proposed: state.proposals.0,
            came_true: state.proposals.1,
            drafts_failed: state.drafts_failed,
            prompt_tokens_per_second: state.rates.0,
            tokens_per_second: state.rates.1,
            kept: state.kept.0,
            kept_tokens: state.kept.1,
            totals: state.totals,
        }
    }
}

/// Puts generations into a scheduler's queue, from any thread. Clones are the same queue.
#[derive(Clone)]
pub struct Submitter(pub(super) Arc<Shared>);

impl Submitter {
    /// Puts a generation at the end of the queue, or of the part of the queue with its priority. `owner` is called with its events
    /// on the scheduler's thread, between steps, and should return quickly; `Break` cancels the generation.
    ///
    /// # Errors
    /// If the request is invalid, the queue is full, or the scheduler has been closed.
    pub fn submit(
        &self,
        request: Request,
        owner: impl FnMut(Event) -> ControlFlow<()> + Send + 'static,
    ) -> Result<Handle, GenerationError> {
        let generation = Generation::new(request, &self.0.shape)?;
        let mut state = self.0.lock();
        if state.closed {
            return Err(GenerationError::Closed);
        }
        let background = generation.priority() == Priority::Background;
        let queued = state.queue.partition_point(|arrival| !is_background(arrival.id));
        if let Some(limit) = self.0.limit.filter(|&limit| queued >= limit && !background) {
            return Err(GenerationError::QueueFull { queued, limit });
        }
        let id = state.next + if background { BACKGROUND } else { 0 };
        state.next += 1;
        let place = state.queue.partition_point(|arrival| arrival.id < id);
        state.queue.insert(place, Arrival { id, generation, owner: Box::new(owner) });
        drop(state);
        self.0.work.notify_all();
        Ok(Handle { id, shared: Arc::clone(&self.0) })
    }

    /// What the scheduler is doing.
    pub fn status(&self) -> Status {
        self.0.status()
    }

    /// The progress of the running step through the layers; `None` between steps. A step that reads a prompt can take minutes.
    pub fn progress(&self) -> Option<Progress> {
        self.0.lock().progress
    }

    /// The engine's statistics at the end of its last step, since it was opened. When an owner gets a generation's tokens or its
    /// end, the steps of that generation are included.
    pub fn stats(&self) -> Stats {
        self.0.lock().stats.clone()
    }

    /// The latest report on the engine's inner state; `None` for a moment after the start. If this is called every few seconds,
    /// there is a new report up to four times a second during work, and one when the work is done.
    pub fn report(&self) -> Option<Arc<Report>> {
        let (report, stale) = self.0.board.look();
        if stale {
            // A thread that is about to wait for work holds the lock until it waits.
            drop(self.0.lock());
            self.0.work.notify_all();
        }
        report
    }

    /// Changes the engine's budget before its next step ([`Engine::set_budget`](sluice_model::Engine::set_budget)). A budget below
    /// the least possible one is raised to it.
    pub fn set_budget(&self, bytes: u64) {
        self.0.lock().budget = Some(bytes);
        self.0.work.notify_all();
    }

    /// Closes the queue, and cancels the generations that wait in it. Running generations continue.
    pub fn drain(&self) {
        self.0.lock().drain();
        self.0.work.notify_all();
    }

    /// Closes the queue, and cancels all generations.
    pub fn close(&self) {
        let mut state = self.0.lock();
        state.closed = true;
        state.cancel_all();
        drop(state);
        self.0.work.notify_all();
    }
}

impl fmt::Debug for Submitter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Submitter").field(&self.status()).finish()
    }
}

/// A generation that was submitted. Dropping it changes nothing.
#[derive(Clone)]
pub struct Handle {
    id: u64,
    shared: Arc<Shared>,
}

impl Handle {
    /// Its number: numbers ascend in order of arrival, and those in the background come after all others.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Ends the generation. If it takes part in the running step, this ends the step as well. Its last event is a finish with
    /// [`Cancelled`](super::Finish::Cancelled). Does nothing if the generation has ended.
    pub fn cancel(&self) {
        self.shared.lock().cancel(self.id);
        self.shared.work.notify_all();
    }

    /// Its state; `None` once it has ended.
    pub fn place(&self) -> Option<Place> {
        let state = self.shared.lock();
        let ahead = state.ahead_of(self.id);
        ahead.map(|ahead| Place::Queued { ahead }).or_else(|| state.places.get(&self.id).copied())
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("id", &self.id).field("place", &self.place()).finish()
    }
}
