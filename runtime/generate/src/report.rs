//! Reports on a model's inner state, for pages and metrics: where the time goes, and what is in memory.
//!
//! The thread that runs the model publishes a report after a turn, but only while something reads reports. A turn that is not
//! watched costs only one look at a clock.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use sluice_model::PageCount;
use sluice_model::engine::{Engine, LayerExperts, Stats};
use sluice_model::memory::MemoryPlan;

/// The least time between two reports while there is work.
const EVERY: Duration = Duration::from_millis(250);
/// A reader that has asked within this time is still watching.
const WATCHING: Duration = Duration::from_secs(5);
/// Length of a window.
const WINDOW: Duration = Duration::from_secs(5);

/// The inner state of a model.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name of the model file, without folder and extension.
    pub name: String,
    /// The family that its checkpoint names.
    pub family: String,
    /// Whether the model has given its memory back to the system until the next request.
    pub at_rest: bool,
    /// How the file is read, in words.
    pub read_path: String,
    /// Name of the instruction set that the kernels use.
    pub isa: &'static str,
    /// Worker threads.
    pub threads: usize,
    /// Totals since the model was opened.
    pub total: Stats,
    /// Figures for the latest seconds of work during which reports were read; `None` before the first.
    pub window: Option<Window>,
    /// How the budget is spent.
    pub memory: MemoryPlan,
    /// Pages of each kind.
    pub pages: Vec<Pages>,
    /// The experts of each layer that has any, and which of them are in memory.
    pub experts: Vec<LayerExperts>,
}

/// Figures for some seconds of work.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Window {
    /// Seconds by the clock, including the time between steps.
    pub seconds: f64,
    /// What the steps have added to the totals. Tokens are those that went through the layers, both of prompts and generated.
    pub stats: Stats,
    /// Those tokens per second.
    pub tokens_per_second: f64,
    /// Share of the needed experts that were found in memory; `None` if none were needed.
    pub hit_rate: Option<f64>,
    /// Bytes per second from the drive: experts, dense parts and embedding.
    pub drive_bytes_per_second: f64,
}

/// Pages of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pages {
    /// Contents of a page, in words.
    pub kind: String,
    /// Bytes of one page.
    pub bytes: u64,
    /// Number of pages.
    pub total: usize,
    /// Number of free pages.
    pub free: usize,
}

impl Window {
    /// The figures between two samples of the totals; `None` if no token went through the layers.
    fn between(earlier: &Stats, later: &Stats, elapsed: Duration) -> Option<Self> {
        let (stats, seconds) = (difference(earlier, later), elapsed.as_secs_f64());
        if stats.tokens == 0 || seconds <= 0.0 {
            return None;
        }
        let needed = stats.hits + stats.misses;
        Some(Window {
            seconds,
            tokens_per_second: stats.tokens as f64 / seconds,
            hit_rate: (needed > 0).then(|| stats.hits as f64 / needed as f64),
            drive_bytes_per_second: (stats.expert_bytes_read + stats.dense_bytes_read) as f64 / seconds,
            stats,
        })
    }
}

fn difference(earlier: &Stats, later: &Stats) -> Stats {
    let (count, time) = (u64::saturating_sub, |later: f64, earlier: f64| (later - earlier).max(0.0));
    Stats {
        tokens: count(later.tokens, earlier.tokens),
        seconds: time(later.seconds, earlier.seconds),
        attention_seconds: time(later.attention_seconds, earlier.attention_seconds),
        expert_seconds: time(later.expert_seconds, earlier.expert_seconds),
        io_wait_seconds: time(later.io_wait_seconds, earlier.io_wait_seconds),
        head_seconds: time(later.head_seconds, earlier.head_seconds),
        other_seconds: time(later.other_seconds, earlier.other_seconds),
        hits: count(later.hits, earlier.hits),
        misses: count(later.misses, earlier.misses),
        prefetched: count(later.prefetched, earlier.prefetched),
        prefetched_used: count(later.prefetched_used, earlier.prefetched_used),
        prefetched_wasted: count(later.prefetched_wasted, earlier.prefetched_wasted),
        expert_bytes_read: count(later.expert_bytes_read, earlier.expert_bytes_read),
        dense_bytes_read: count(later.dense_bytes_read, earlier.dense_bytes_read),
        replaced: count(later.replaced, earlier.replaced),
        warmed: count(later.warmed, earlier.warmed),
        warmed_bytes: count(later.warmed_bytes, earlier.warmed_bytes),
    }
}

/// The board where reports are published and read.
#[derive(Debug)]
pub(super) struct Board {
    start: Instant,
    /// Milliseconds from `start` to the latest reading, plus one; 0 before the first.
    looked: AtomicU64,
    /// Whether something has changed since the last report.
    stale: AtomicBool,
    /// Whether a reader waits for a report although there is no work.
    wanted: AtomicBool,
    latest: Mutex<Option<Arc<Report>>>,
}

impl Board {
    pub(super) fn new() -> Self {
        Board {
            start: Instant::now(),
            looked: AtomicU64::new(0),
            stale: AtomicBool::new(true),
            wanted: AtomicBool::new(false),
            latest: Mutex::default(),
        }
    }

    /// The latest report, and whether a thread that waits for work has to make a newer one.
    pub(super) fn look(&self) -> (Option<Arc<Report>>, bool) {
        self.looked.store(self.millis(Instant::now()) + 1, Relaxed);
        let stale = self.stale.swap(false, Relaxed);
        if stale {
            self.wanted.store(true, Relaxed);
        }
        (self.lock().clone(), stale)
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Relaxed)
    }

    /// Records that the last report no longer describes the model's memory.
    pub(super) fn outdate(&self) {
        self.stale.store(true, Relaxed);
    }

    fn put_up(&self, report: Report) {
        self.stale.store(false, Relaxed);
        self.wanted.store(false, Relaxed);
        *self.lock() = Some(Arc::new(report));
    }

    fn is_watched(&self, now: Instant) -> bool {
        let looked = self.looked.load(Relaxed);
        looked > 0 && self.millis(now).saturating_sub(looked) <= WATCHING.as_millis() as u64
    }

    fn millis(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_millis() as u64
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Report>>> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the reports, on the thread that runs the model.
#[derive(Debug, Default)]
pub(super) struct Reporter {
    /// Earlier totals during the present work, oldest first.
    samples: VecDeque<(Instant, Stats)>,
    window: Option<Window>,
}

impl Reporter {
    /// A turn begins; the scheduler may have been idle before it.
    pub(super) fn begin(&mut self, board: &Board, engine: &Engine, idle: bool) {
        let now = Instant::now();
        if !board.is_watched(now) {
            self.samples.clear();
        } else if idle || self.samples.is_empty() {
            self.samples.clear();
            self.samples.push_back((now, engine.stats()));
        }
    }

    /// A turn has ended, and the scheduler may now become idle.
    pub(super) fn end(&mut self, board: &Board, engine: &Engine, idle: bool) {
        let now = Instant::now();
        let newest = self.samples.back().map(|sample| sample.0);
        let due = match idle {
            true => board.is_watched(now) || board.is_wanted(),
            false => board.is_watched(now) && newest.is_none_or(|newest| now.duration_since(newest) >= EVERY),
        };
        match due {
            true => board.put_up(self.report(engine, now)),
            false => board.outdate(),
        }
    }

    fn report(&mut self, engine: &Engine, now: Instant) -> Report {
        let total = engine.stats();
        // The window begins at the oldest sample that is recent enough, or at the one before it, because turns can take long.
        while self.samples.get(1).is_some_and(|next| now.duration_since(next.0) >= WINDOW) {
            self.samples.pop_front();
        }
        let oldest = self.samples.front();
        let window = oldest.and_then(|(at, stats)| Window::between(stats, &total, now.duration_since(*at)));
        self.window = window.or(self.window.take());
        self.samples.push_back((now, total.clone()));
        let pages =
            |PageCount { kind, bytes, total, free }: PageCount| Pages { kind: kind.to_string(), bytes, total, free };
        Report {
            name: engine.file().path().file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default(),
            family: engine.spec().family.clone(),
            at_rest: engine.is_at_rest(),
            read_path: engine.read_path(),
            isa: engine.isa(),
            threads: engine.threads(),
            total,
            window: self.window.clone(),
            memory: engine.memory().clone(),
            pages: engine.pages().into_iter().map(pages).collect(),
            experts: engine.residency(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_what_was_added() {
        let earlier = Stats { tokens: 10, seconds: 1.0, hits: 5, misses: 5, ..Stats::default() };
        let later = Stats {
            tokens: 30,
            seconds: 3.5,
            hits: 35,
            misses: 15,
            expert_bytes_read: 800,
            dense_bytes_read: 200,
            ..Stats::default()
        };
        let window = Window::between(&earlier, &later, Duration::from_secs(4)).unwrap();
        assert_eq!((window.stats.tokens, window.stats.seconds, window.stats.hits), (20, 2.5, 30));
        assert_eq!((window.tokens_per_second, window.drive_bytes_per_second), (5.0, 250.0));
        assert_eq!(window.hit_rate, Some(0.75));
        assert_eq!(Window::between(&later, &later, Duration::from_secs(4)), None);
    }

    #[test]
    fn whoever_looks_is_told_once_that_the_report_is_old() {
        let board = Board::new();
        assert!(!board.is_watched(Instant::now()));
        assert!(board.look().1, "there is none yet");
        assert!(board.is_wanted() && !board.look().1, "it has been asked for");
        let now = Instant::now();
        assert!(board.is_watched(now) && !board.is_watched(now + WATCHING + Duration::from_secs(1)));
        board.outdate();
        assert!(board.look().1);
    }
}
