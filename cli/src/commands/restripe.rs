//! `sluice restripe`: the extents of a model file divided among drives in another way, or joined again.

use std::path::PathBuf;
use std::time::Instant;

use sluice_converter::{UpgradeOptions, restripe, upgrade};

use super::convert::{Bar, explain};
use super::upgrade::finish;
use crate::error::CliError;
use crate::progress::byte_bar;
use crate::striping::{StripingArgs, note_rounded};

const EXAMPLES: &str = "\
Each expert, and each dense part, is cut into a stripe for every drive, so one read of it uses all drives at once. The weights stay what \
they are to the bit, and so do saved sessions. The model that was there stays too: remove it once the new one has been verified.

Every volume is needed. `run` and the others open the first one; it knows the folders of the others, and they are also looked for beside \
it, and first of all in the folders that the variable SLUICE_VOLUMES names, for drives that are mounted elsewhere now.

Examples:
  sluice restripe r1.sluice --volumes /mnt/a,/mnt/b           r1-00001-of-00002.sluice in /mnt/a, the other in /mnt/b
  sluice restripe r1.sluice --volumes /mnt/a,/mnt/b --shares 2,1
  sluice restripe /mnt/a/r1-00001-of-00002.sluice --into r1.sluice    one file again";

const USAGE: &str = "\
sluice restripe <FILE> --volumes <DIR1,DIR2…> [--shares <N1,N2…>] [OPTIONS]
       sluice restripe <FILE> --into <FILE> [OPTIONS]";

/// Divide a model file among several drives, which are then read at the same time, or join it to one file again
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, override_usage = USAGE)]
pub(crate) struct Args {
    /// The model file, or the first of its volumes
    pub(crate) file: PathBuf,

    #[command(flatten)]
    striping: StripingArgs,

    /// Join the volumes to this one file, instead of dividing it among --volumes
    #[arg(long, value_name = "FILE", conflicts_with = "volumes", required_unless_present = "volumes")]
    into: Option<PathBuf>,

    /// Replace model files that exist, once the new ones are complete; what is no model file is never replaced
    #[arg(long)]
    overwrite: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let striping = args.striping.striping()?;
    let started = Instant::now();
    let bar = Bar(byte_bar("restriping", 0));
    let outcome = match (&striping, &args.into) {
        (Some(striping), _) => restripe(&args.file, None, striping, args.overwrite, &bar),
        (None, into) => {
            let options = UpgradeOptions { overwrite: args.overwrite, ..UpgradeOptions::default() };
            upgrade(&args.file, into.as_deref(), &options, &bar)
        }
    };
    bar.0.finish_and_clear();
    let summary = outcome.map_err(explain)?;
    if summary.written {
        note_rounded(&summary.files);
    }
    finish(&args.file, &summary, started, args.json)
}
