//! `sluice upgrade`: rewrites a model file in the newest version of the format, compressed or not, in one file or in volumes.

use std::path::{Path, PathBuf};
use std::time::Instant;

use sluice_converter::{UpgradeOptions, UpgradeSummary, upgrade};
use sluice_format::{FORMAT_VERSION, ModelFile};
use sluice_model::counts;
use sluice_model::memory::Bytes;

use super::convert::{Bar, explain};
use crate::error::CliError;
use crate::progress::byte_bar;
use crate::size::parse_bytes;
use crate::terminal::{counted, note, print, print_json, seconds};

const EXAMPLES: &str = "\
The weights stay what they are to the bit, and so do saved sessions and what is known of the experts: nothing is \
converted again. What is written has another name until it is whole, so there must be room for both. Without \
another name, the new file takes the place of the old one at the end.

Compression loses nothing. It helps weights that were trained in bf16 (a third less), f16 and fp8 (a sixth less), and \
leaves others as they are. Whether it makes tokens come faster depends on the drive: `sluice plan` and `sluice bench \
decode --drive` say so.

Examples:
  sluice upgrade r1.sluice                              in its own place
  sluice upgrade r1.sluice r1-small.sluice --compress
  sluice upgrade r1.sluice publish/r1.sluice --split-size 50GB
  sluice upgrade publish/r1-00001-of-00014.sluice r1.sluice    one file again";

/// Rewrite a model file in the newest version of the format: compressed, in volumes, or as one file again
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model file, or one of its volumes
    pub(crate) file: PathBuf,

    /// Model file to write [default: replace the input]
    dst: Option<PathBuf>,

    /// Compress the weights where that saves at least 8 %, without loss
    #[arg(long)]
    compress: bool,

    /// Store all weights as they are in memory
    #[arg(long, conflicts_with = "compress")]
    decompress: bool,

    /// Most bytes of one file, such as 50GB: a larger model becomes NAME-00001-of-00014.sluice and so on
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    split_size: Option<u64>,

    /// Replace the model file if it exists, once the new one is complete; only model files are ever replaced
    #[arg(long)]
    overwrite: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let options = UpgradeOptions {
        compress: if args.decompress { Some(false) } else { args.compress.then_some(true) },
        split_size: args.split_size,
        overwrite: args.overwrite,
    };
    let started = Instant::now();
    let bar = Bar(byte_bar("rewriting", 0));
    let outcome = upgrade(&args.file, args.dst.as_deref(), &options, &bar);
    bar.0.finish_and_clear();
    finish(&args.file, &outcome.map_err(explain)?, started, args.json)
}

/// What follows when a model has been written again: what was learned of it goes along, and the summary is printed.
pub(crate) fn finish(file: &Path, summary: &UpgradeSummary, started: Instant, json: bool) -> Result<(), CliError> {
    // Also where nothing was to do: an earlier run may have been killed before it came to that.
    if let Some(dst) = summary.files.first() {
        carry_counts(file, dst);
    }
    if json {
        return print_json(summary);
    }
    print(&describe(summary, started.elapsed().as_secs_f64()))
}

/// What runs have learned of the experts is true of the new file as well. Without it, the first run is slower.
fn carry_counts(src: &Path, dst: &Path) {
    let carried = ModelFile::open(dst).map(|model| counts::carry(src, dst, model.state_id()));
    if let Ok(Err(e)) = carried {
        note(&format_args!("note: what runs have learned about the experts is not known of the new file: {e}"));
    }
}

fn describe(s: &UpgradeSummary, elapsed: f64) -> String {
    let files = match &s.files[..] {
        [one] => one.display().to_string(),
        [first, .., last] => format!("{} to {}", first.display(), last.display()),
        [] => String::new(),
    };
    if !s.written {
        return format!(
            "{files}: nothing to do; it is of version {FORMAT_VERSION} of the format already, and as was asked for\n"
        );
    }
    let compressed = match s.compressed_extents {
        0 => String::new(),
        n => format!(", {} compressed", counted(n, "extent")),
    };
    format!(
        "{files}: version {FORMAT_VERSION} of the format{compressed}; {} of version {} became {} in {}\n",
        Bytes(s.bytes_before),
        s.from_version,
        Bytes(s.file_bytes),
        seconds(elapsed)
    )
}
