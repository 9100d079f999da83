//! The recent speed of tokens.

use std::collections::VecDeque;
use std::time::Instant;

/// Turns over which the speed is measured.
const TURNS: usize = 64;

/// Tokens of the latest turns.
#[derive(Debug)]
pub(super) struct Meter {
    /// When a turn ended, and how many tokens of prompts it read, and how many it generated.
    turns: VecDeque<(Instant, u64, u64)>,
}

impl Meter {
    pub(super) fn new() -> Self {
        Meter { turns: VecDeque::with_capacity(TURNS + 1) }
    }

    /// A turn begins. If the scheduler was idle before, the idle time is not counted.
    pub(super) fn resume(&mut self, idle: bool) {
        if idle || self.turns.is_empty() {
            self.turns.clear();
            self.turns.push_back((Instant::now(), 0, 0));
        }
    }

    /// A turn has ended.
    pub(super) fn record(&mut self, read: u64, generated: u64) {
        if self.turns.len() > TURNS {
            self.turns.pop_front();
        }
        self.turns.push_back((Instant::now(), read, generated));
    }

    /// Tokens per second: tokens of prompts, and generated tokens.
    pub(super) fn rates(&self) -> (f64, f64) {
        let (Some(first), Some(last)) = (self.turns.front(), self.turns.back()) else { return (0.0, 0.0) };
        let seconds = last.0.duration_since(first.0).as_secs_f64();
        let sum = |part: fn(&(Instant, u64, u64)) -> u64| self.turns.iter().skip(1).map(part).sum::<u64>() as f64;
        match seconds > 0.0 {
            true => (sum(|t| t.1) / seconds, sum(|t| t.2) / seconds),
            false => (0.0, 0.0),
        }
    }
}
