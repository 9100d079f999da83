//! Slices to which tasks write in parallel.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering};

/// An output to which tasks write rows.
///
/// The stores are relaxed atomic stores, which are plain stores on every target. So a mistake in the partition of the output would
/// be a wrong result, not a data race.
pub(crate) struct SharedRows<'a>(&'a [AtomicU32]);

impl<'a> SharedRows<'a> {
    pub(crate) fn new(slice: &'a mut [f32]) -> Self {
        let (start, len) = (slice.as_mut_ptr(), slice.len());
        // SAFETY: `AtomicU32` has the size and alignment of `f32` and any bits are valid for both; the slice is mutably
        // borrowed for 'a, so nothing but this view reaches it.
        SharedRows(unsafe { std::slice::from_raw_parts(start.cast::<AtomicU32>(), len) })
    }

    /// Copies `values` to the elements from `at`.
    ///
    /// # Panics
    /// If they do not fit.
    pub(crate) fn write(&self, at: usize, values: &[f32]) {
        for (to, value) in self.0[at..at + values.len()].iter().zip(values) {
            to.store(value.to_bits(), Ordering::Relaxed);
        }
    }
}

/// A mutable slice that is cut into pieces on different threads.
pub(crate) struct Pieces<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: elements are only reached through `piece`, whose callers promise disjoint ranges; sharing the wrapper then
// amounts to sending `&mut T`s to other threads.
unsafe impl<T: Send> Sync for Pieces<'_, T> {}

impl<'a, T> Pieces<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Pieces { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// The elements `at..at + len`.
    ///
    /// # Safety
    /// While the result lives, no other piece may overlap it.
    ///
    /// # Panics
    /// If they are not all inside the slice.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn piece(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at <= self.len && len <= self.len - at, "{len} at {at} of {}", self.len);
        // SAFETY: in bounds as just checked; unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}
