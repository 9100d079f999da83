//! Calls code that callers supply: a panic there ends only the generation to which the code belongs.

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
    // Data that a panic has left half changed are not used again, because their generation ends.
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

/// Tells an owner of an event. An owner that panics is not called again, and counts as one that returns `Break`.
pub(super) fn tell(owner: &mut Owner, event: Event) -> ControlFlow<()> {
    match guarded("the owner", || owner(event)) {
        Ok(flow) => flow,
        Err(_) => {
            discard(std::mem::replace(owner, Box::new(|_| ControlFlow::Break(()))));
            ControlFlow::Break(())
        }
    }
}

/// Drops something that a caller supplied.
pub(super) fn discard<T>(value: T) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(move || drop(value))) {
        // The payload of a panic could itself panic when it is dropped. Only code that provokes this has such payloads.
        std::mem::forget(panic);
    }
}
