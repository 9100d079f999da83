//! The answers that are being made, for `/slots`, limits and the end of the server.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};
use sluice_generate::Handle;

/// An answer that is being made.
#[derive(Clone, Debug)]
pub struct LiveAnswer {
    /// Its API.
    pub api: &'static str,
    /// The model's name.
    pub model: String,
    /// When it began.
    pub since: Instant,
    /// The generation.
    pub handle: Handle,
}

/// All answers that are being made.
#[derive(Clone, Debug, Default)]
pub struct Live(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    next: u64,
    answers: BTreeMap<u64, LiveAnswer>,
}

impl Live {
    /// Adds an answer; it stays until the guard is dropped, which also ends its generation.
    pub fn enter(&self, answer: LiveAnswer) -> LiveGuard {
        let mut state = self.lock();
        let id = state.next;
        state.next += 1;
        state.answers.insert(id, answer);
        LiveGuard { live: self.clone(), id }
    }

    /// Number of answers.
    pub fn count(&self) -> usize {
        self.lock().answers.len()
    }

    /// Ends all of them.
    pub fn cancel_all(&self) {
        let answers: Vec<LiveAnswer> = self.lock().answers.values().cloned().collect();
        answers.iter().for_each(|answer| answer.handle.cancel());
    }

    /// The description for clients.
    pub fn to_json(&self) -> Value {
        let answers: Vec<(u64, LiveAnswer)> = self.lock().answers.iter().map(|(id, a)| (*id, a.clone())).collect();
        let slot = |(id, answer): (u64, LiveAnswer)| {
            json!({
                "id": id,
                "api": answer.api,
                "model": answer.model,
                "seconds": answer.since.elapsed().as_secs_f64(),
                "progress": answer.handle.place(),
            })
        };
        Value::Array(answers.into_iter().map(slot).collect())
    }

    /// The state is consistent between any two statements, so a panic elsewhere does no harm.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps an answer in the list. Dropping it ends the generation.
#[derive(Debug)]
pub struct LiveGuard {
    live: Live,
    id: u64,
}

impl Drop for LiveGuard {
    fn drop(&mut self) {
        let answer = self.live.lock().answers.remove(&self.id);
        if let Some(answer) = answer {
            answer.handle.cancel();
        }
    }
}
