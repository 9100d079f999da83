//! The laboratory: what is known of a model and a machine before and after a run. Nothing depends on it but the command line.
//!
//! [`trace`] records, measures and replays routing; [`estimate`] says how fast a model can be; [`calibrate`] measures the inputs
//! that matrices meet.

pub mod calibrate;
pub mod estimate;
pub mod trace;
