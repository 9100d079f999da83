//! One file per command.

pub(crate) mod bench;
pub(crate) mod bench_batch;
pub(crate) mod bench_decode;
pub(crate) mod bench_disk;
pub(crate) mod bench_drive;
pub(crate) mod bench_kernels;
pub(crate) mod calibrate;
pub(crate) mod compare;
pub(crate) mod convert;
pub(crate) mod demo;
pub(crate) mod inspect;
pub(crate) mod list;
pub(crate) mod logits;
pub(crate) mod perplexity;
pub(crate) mod plan;
pub(crate) mod pull;
pub(crate) mod rm;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod set;
pub(crate) mod synth;
pub(crate) mod tokenize;
pub(crate) mod trace;
pub(crate) mod upgrade;
pub(crate) mod verify;
