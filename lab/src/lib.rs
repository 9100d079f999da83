//! The laboratory: tools that say something about a model and a machine before and after a run. Of the program, only the command
//! line depends on it.
//!
//! [`trace`] records, measures and replays routing; [`estimate`] says how fast a model can be, and [`schedule`] how fast it
//! will be; [`calibrate`] measures the inputs
//! of matrices; [`batch`] says how many sequences at a time pay, and [`course`] how long a batch takes with them; [`compare`] puts two models beside each other; [`compression`] says when compressed experts come faster.

pub mod batch;
pub mod calibrate;
pub mod compare;
pub mod compression;
pub mod course;
pub mod estimate;
pub mod schedule;
pub mod trace;
