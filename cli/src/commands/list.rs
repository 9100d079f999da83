//! `sluice list`: the models in the folder of models.

use std::time::UNIX_EPOCH;

use serde_json::json;
use sluice_hub::models::{Entry, Models};
use sluice_model::memory::Bytes;

use crate::error::CliError;
use crate::terminal::{print, print_json};

const EXAMPLES: &str = "\
`sluice convert hf:NAME` without a name for the model file puts it there, and `run`, `serve` and the others find it by hf:NAME.

Examples:
  sluice list
  sluice list --json";

/// List the converted models in the folder of models
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let models = Models::of_user()?;
    models.check()?;
    let entries = models.list();
    if args.json {
        let entry = |e: &Entry| {
            json!({
                "name": e.name, "path": e.path, "bytes": e.bytes, "family": e.family, "interrupted": e.interrupted,
                "modified": e.modified.and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map(|t| t.as_secs()),
            })
        };
        return print_json(
            &json!({ "folder": models.folder(), "models": entries.iter().map(entry).collect::<Vec<_>>() }),
        );
    }
    if entries.is_empty() {
        return print(&format!("no models in {}\n", models.folder().display()));
    }
    let width = entries.iter().map(|e| e.name.chars().count()).max().unwrap_or(0);
    let line = |e: &Entry| {
        let what = match (&e.family, e.interrupted) {
            (_, true) => "interrupted: `sluice convert` continues it",
            (Some(family), _) => family,
            (None, _) => "cannot be opened: `sluice verify` says why",
        };
        // What has the same name is told apart by its file.
        let is_alone = entries.iter().filter(|other| other.name == e.name).count() == 1;
        let file = if is_alone { String::new() } else { format!("  {}", e.path.display()) };
        format!("{:width$}  {:>12}  {what}{file}\n", e.name, Bytes(e.bytes).to_string())
    };
    let total: u64 = entries.iter().map(|e| e.bytes).sum();
    let lines: String = entries.iter().map(line).collect();
    print(&format!("{lines}{} in {}\n", Bytes(total), models.folder().display()))
}
