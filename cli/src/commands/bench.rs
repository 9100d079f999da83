//! `sluice bench`: measurements, one command each.

use std::path::PathBuf;

use clap::Subcommand;

use super::{bench_decode, bench_disk, bench_kernels, bench_machine};
use crate::error::CliError;

const EXAMPLES: &str = "\
Examples:
  sluice bench disk r1.sluice            how fast the drive is, and how best to read it
  sluice bench disk /mnt/fast            the same, with a file made for it
  sluice bench kernels                   how fast weights of each type are multiplied
  sluice bench machine                   the same for the usual types, and the memory, kept for `sluice plan`
  sluice bench decode r1.sluice          tokens per second, and how close that is to what the machine allows";

/// Measure this machine
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Disk(bench_disk::Args),
    Decode(bench_decode::Args),
    Kernels(bench_kernels::Args),
    Machine(bench_machine::Args),
}

impl Args {
    /// The model file that is measured, if there is one.
    pub(crate) fn file(&mut self) -> Option<&mut PathBuf> {
        match &mut self.what {
            What::Decode(args) => Some(&mut args.file),
            _ => None,
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    match &args.what {
        What::Disk(args) => bench_disk::run(args),
        What::Decode(args) => bench_decode::run(args),
        What::Kernels(args) => bench_kernels::run(args),
        What::Machine(args) => bench_machine::run(args),
    }
}
