//! Places for the grammars that are compiled at once. A grammar cannot be stopped while it is compiled, so each keeps its place for as long as it
//! takes, even when nobody waits for it any more.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::GrammarError;

/// Most grammars of a vocabulary that are compiled at once, including those that take too long.
const PLACES: usize = 16;

/// How long compiling may take. Real grammars take milliseconds.
pub(crate) const MAX_TIME: Duration = Duration::from_secs(20);

/// All places of a vocabulary.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// When the grammars that are being compiled have begun.
    begun: Mutex<Vec<Instant>>,
    freed: Condvar,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    begun: Instant,
}

impl Places {
    /// Takes a place. If there is none, waits for as long as one of the grammars may still end in time.
    ///
    /// # Errors
    /// If all places are held by grammars that have taken too long: these may never end.
    pub(crate) fn take(self: &Arc<Self>) -> Result<Place, GrammarError> {
        let mut begun = self.lock();
        loop {
            let now = Instant::now();
            if begun.len() < PLACES {
                begun.push(now);
                return Ok(Place { places: Arc::clone(self), begun: now });
            }
            let ages = begun.iter().map(|begun| now.saturating_duration_since(*begun));
            let left = MAX_TIME.saturating_sub(ages.min().unwrap_or_default());
            if left.is_zero() {
                return Err(GrammarError::Busy { running: PLACES, seconds: MAX_TIME.as_secs() });
            }
            begun = self.freed.wait_timeout(begun, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The list is right between any two statements, so a panic elsewhere does no harm.
    fn lock(&self) -> MutexGuard<'_, Vec<Instant>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut begun = self.places.lock();
        // Those that have begun at the same time are as good as this one.
        if let Some(at) = begun.iter().position(|begun| *begun == self.begun) {
            begun.swap_remove(at);
        }
        drop(begun);
        self.places.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn whoever_finds_no_place_waits_for_one() {
        let places = Arc::new(Places::default());
        let mut taken: Vec<Place> = (0..PLACES).map(|_| places.take().unwrap()).collect();
        let waiting: Vec<_> = (0..PLACES)
            .map(|_| {
                let places = Arc::clone(&places);
                thread::spawn(move || places.take().map(drop))
            })
            .collect();
        // All of them find no place, unless the machine is very slow.
        thread::sleep(Duration::from_millis(20));
        taken.pop();
        for waiting in waiting {
            waiting.join().unwrap().unwrap();
        }
        drop(taken);
        assert!(places.lock().is_empty());
    }

    #[test]
    fn nobody_waits_for_grammars_that_may_never_end() {
        let Some(long_ago) = Instant::now().checked_sub(MAX_TIME) else { return };
        let places = Arc::new(Places::default());
        let taken: Vec<Place> = (0..PLACES).map(|_| places.take().unwrap()).collect();
        places.lock().fill(long_ago);
        assert!(matches!(places.take(), Err(GrammarError::Busy { running: PLACES, .. })));
        places.lock().pop();
        assert!(places.take().is_ok());
        drop(taken);
    }
}
