//! The options that every command which computes has in common.

use std::num::NonZeroUsize;

use clap::ValueEnum;
use sluice_runtime::{EngineOptions, ReadEngineKind};

use crate::size::parse_size;

/// How the model is opened.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArgs {
    /// Memory for everything large: dense weights, key-value cache and expert slots [default: as much as is useful and
    /// available]
    ///
    /// `sluice inspect` prints the least that works. The result does not depend on it, only the speed.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) budget: Option<u64>,

    /// How the file is read [default: the best that works here]
    #[arg(long, value_name = "ENGINE")]
    pub(crate) engine: Option<EngineChoice>,

    /// Threads that compute [default: one per core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,

    /// Compute with f32 activations throughout: slower; for comparison with reference implementations
    #[arg(long)]
    pub(crate) exact: bool,
}

/// Names of the read engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineChoice {
    /// io_uring with direct I/O (Linux)
    Uring,
    /// A pool of threads that read, with direct I/O where the system has it
    Pread,
}

impl EngineArgs {
    /// The engine's options for sessions of `context` tokens.
    pub(crate) fn options(&self, context: usize) -> EngineOptions {
        EngineOptions {
            budget: self.budget,
            read_engine: self.engine.map(|e| match e {
                EngineChoice::Uring => ReadEngineKind::Uring,
                EngineChoice::Pread => ReadEngineKind::Pread,
            }),
            threads: self.threads.map(NonZeroUsize::get),
            exact: self.exact,
            context: Some(context),
        }
    }
}
