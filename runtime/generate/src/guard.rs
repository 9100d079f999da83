//! Calls of what callers bring: a panic in there ends the one generation that it belongs to, and nothing else.

use std::any::Any;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::shared::Owner;
use super::{Event, GenerationError};

/// Calls a part of a request; `what` is its name.
///
/// # Errors
/// [`GenerationError::Panicked`].
pub(super) fn guarded<T>(what: &str, call: impl FnOnce() -> T) -> Result<T, GenerationError> {
    // What a panic has left half changed is not used again: the generation that it belongs to ends.
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| {
        let what = match message(&*panic) {
            Some(message) => format!("{what} ({message})"),
            None => what.to_owned(),
        };
        discard(panic);
        GenerationError::Panicked { what }
    })
}

fn message(panic: &(dyn Any + Send)) -> Option<&str> {
    panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied())
}

/// Tells an owner of an event. One that panics is not called again, and counts as one that breaks.
pub(super) fn tell(owner: &mut Owner, event: Event) -> ControlFlow<()> {
    match guarded("the owner", || owner(event)) {
        Ok(flow) => flow,
        Err(_) => {
            discard(std::mem::replace(owner, Box::new(|_| ControlFlow::Break(()))));
            ControlFlow::Break(())
        }
    }
}

/// Drops what a caller has brought.
pub(super) fn discard<T>(value: T) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(move || drop(value))) {
        // What a panic carries could panic in turn when it is dropped. Nobody does that but to see what happens.
        std::mem::forget(panic);
    }
}
