//! The laboratory: tools that measure and predict the behaviour of a model on a machine, before and after a run. Within the
//! program, only the command line depends on it.
//!
//! [`trace`] records, measures and replays routing; [`estimate`] computes how fast a model can be; [`calibrate`] measures the
//! inputs of matrices; [`batch`] computes how many sequences at a time pay; [`compare`] compares two models; [`compression`] finds
//! out when compressed experts are faster.

pub mod batch;
pub mod calibrate;
pub mod compare;
pub mod compression;
pub mod estimate;
pub mod trace;
