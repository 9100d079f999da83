//! `/v1/files` and `/v1/batches`: files of requests that clients upload, and the batches that are made of them, in a folder, so that both
//! survive a restart.
//!
//! One thread ([`worker`]) works on one batch after another, behind the requests that somebody waits for.

mod object;
mod store;
pub mod worker;

pub use object::{BatchObject, Counts, FileObject, Problem, Status};
pub use store::{Batches, NewBatch, Upload};
