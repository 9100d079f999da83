//! Runs foreign code that reports errors by panicking.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use super::TextError;
use super::limits::clip;

thread_local! {
    /// How many guards this thread is in.
    static GUARDED: Cell<usize> = const { Cell::new(0) };
}

/// Runs foreign code and turns its panic into an error. The `tokenizers` crate indexes and unwraps values from the
/// file in places that we cannot all know. This is sound without `unsafe`: the code only reads the crate's state,
/// apart from a cache that the crate guards with locks.
///
/// Such a panic is not a fault of this program, and the user needs the error, so the panic prints nothing. Panics of
/// other threads, and of this one outside guards, are reported as always.
pub(super) fn guard<T>(during: &'static str, work: impl FnOnce() -> T) -> Result<T, TextError> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let report = take_hook();
        set_hook(Box::new(move |info| {
            // A thread that is ending has no counter any more, and no guard.
            if GUARDED.try_with(Cell::get).unwrap_or(0) == 0 {
                report(info);
            }
        }));
    });
    GUARDED.with(|inside| inside.set(inside.get() + 1));
    let outcome = catch_unwind(AssertUnwindSafe(work));
    GUARDED.with(|inside| inside.set(inside.get() - 1));
    outcome.map_err(|panic| {
        let reason = panic
            .downcast_ref::<&str>()
            .map(|s| clip(s))
            .or_else(|| panic.downcast_ref::<String>().map(|s| clip(s)))
            .unwrap_or_else(|| "no message".to_owned());
        TextError::Crashed { during, reason }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_the_library_becomes_an_error() {
        let error = guard("testing", || -> u32 { panic!("on {}", "purpose") }).unwrap_err();
        let want = TextError::Crashed { during: "testing", reason: "on purpose".into() };
        assert_eq!(error, want);
        let nested = guard("outside", || guard("inside", || -> u32 { panic!("{}", "x".repeat(10_000)) }).unwrap_err());
        assert!(matches!(nested, Ok(TextError::Crashed { during: "inside", reason }) if reason.len() < 1000));
        assert_eq!(GUARDED.with(Cell::get), 0);
    }
}
