//! `sluice verify`: every checksum of a model file.

use std::path::PathBuf;

use serde::Serialize;
use sluice_format::{FormatError, ModelFile};
use sluice_runtime::memory::Bytes;

use crate::error::CliError;
use crate::terminal::{byte_bar, print, print_json};

const EXAMPLES: &str = "\
Reads the whole file. `sluice run` also checks every byte that it reads; this command finds damage before it \
is needed, and names all of it.

Examples:
  sluice verify r1.sluice
  sluice verify r1.sluice --json | jq .damaged";

/// Check every checksum of a model file; name what is damaged
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model file
    file: PathBuf,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    file: String,
    intact: bool,
    extents: usize,
    bytes: u64,
    damaged: Vec<Damage>,
    /// Why the file could not even be opened.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Damage {
    pub(crate) extent: String,
    offset: u64,
    problem: String,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let file = ModelFile::open(&args.file);
    let mut report = Report {
        file: args.file.display().to_string(),
        intact: false,
        extents: 0,
        bytes: 0,
        damaged: Vec::new(),
        error: None,
    };
    match file {
        Ok(file) => {
            report.extents = file.extents().len();
            report.bytes = file.superblock().file_len;
            report.damaged = damage(&file);
            report.intact = report.damaged.is_empty();
        }
        Err(e) if args.json => {
            report.error = Some(e.to_string());
            print_json(&report)?;
            return Err(e.into());
        }
        Err(e) => return Err(e.into()),
    }
    if args.json {
        print_json(&report)?;
    } else {
        print(&describe(&report))?;
    }
    if report.intact {
        return Ok(());
    }
    Err(CliError::Failure(format!(
        "{}: {} of {} extents are damaged. Copy the file again or convert it again",
        report.file,
        report.damaged.len(),
        report.extents
    )))
}

/// All damaged extents. Superblock, tables and metadata were checked when the file was opened.
pub(crate) fn damage(file: &ModelFile) -> Vec<Damage> {
    let bar = byte_bar("verifying", file.extent_bytes());
    let wrong = file.verify_all(&mut |done| bar.set_position(done));
    bar.finish_and_clear();
    wrong.into_iter().map(Damage::from).collect()
}

impl From<FormatError> for Damage {
    fn from(error: FormatError) -> Self {
        let problem = error.to_string();
        match error {
            FormatError::ExtentChecksum { extent, offset, .. } => {
                Damage { extent, offset, problem: "its checksum does not match".into() }
            }
            FormatError::ExtentRead { extent, offset, source, .. } => {
                Damage { extent, offset, problem: format!("it cannot be read: {source}") }
            }
            _ => Damage { extent: "file".into(), offset: 0, problem },
        }
    }
}

fn describe(report: &Report) -> String {
    if report.intact {
        let (extents, bytes) = (report.extents, Bytes(report.bytes));
        return format!("{}: intact; {extents} extents, {bytes}, every checksum matches\n", report.file);
    }
    let line = |d: &Damage| format!("damaged: {} at offset {}: {}\n", d.extent, d.offset, d.problem);
    report.damaged.iter().map(line).collect()
}
