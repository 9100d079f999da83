//! `sluice rm`: removes a model from the folder of models.

use std::io::{self, IsTerminal as _};
use std::path::PathBuf;

use sluice_hub::models::{Entry, Models};
use sluice_model::memory::Bytes;

use crate::error::CliError;
use crate::fetch::confirm;
use crate::terminal::{note, print};

const EXAMPLES: &str = "\
Only what `sluice list` shows is removed: models of the folder of models, and what interrupted conversions have left there.

Examples:
  sluice rm hf:deepseek-ai/DeepSeek-R1
  sluice rm unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M --yes";

/// Remove a converted model from the folder of models
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Its name, as `sluice list` shows it, or its file, where several models have that name
    name: String,

    /// Do not ask
    #[arg(long)]
    yes: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let models = Models::of_user()?;
    models.check()?;
    let found = models.named(&args.name);
    if found.is_empty() {
        return Err(CliError::Failure(format!(
            "{} has no model called {}; `sluice list` shows all of them",
            models.folder().display(),
            args.name
        )));
    }
    if found.iter().filter(|entry| !entry.interrupted).count() > 1 {
        let paths: String = found.iter().map(|entry| format!("\n  {}", entry.path.display())).collect();
        return Err(CliError::Usage(format!(
            "{} is the name of several models; name one of these files:{paths}",
            args.name
        )));
    }
    let kept: Vec<PathBuf> = found.iter().flat_map(|entry| models.kept(entry)).collect();
    if !args.yes && io::stdin().is_terminal() && io::stderr().is_terminal() && !confirm(&question(&models, &found))? {
        return Err(CliError::Failure("nothing was removed".into()));
    }
    let freed: u64 = found.iter().map(|e: &Entry| models.remove(e)).sum::<Result<u64, _>>()?;
    if let [first, others @ ..] = &kept[..] {
        let others = if others.is_empty() { String::new() } else { format!(" and {} more of its files", others.len()) };
        let first = first.display();
        note(&format_args!("note: {first}{others} stayed: links or SLUICE_VOLUMES led there"));
    }
    print(&format!("removed {}, {}\n", args.name, Bytes(freed)))
}

/// Names what would be removed: the entries, and those of their volumes that lie in other folders.
fn question(models: &Models, found: &[Entry]) -> String {
    let mut names = Vec::new();
    for entry in found {
        let others = models.files(&entry.path).into_iter().skip(1);
        let elsewhere = others.filter(|file| file.parent() != Some(models.folder()));
        names.extend([entry.path.clone()].into_iter().chain(elsewhere).map(|file| file.display().to_string()));
    }
    let bytes: u64 = found.iter().map(|entry| models.frees(entry)).sum();
    format!("Remove {} ({})?", names.join(" and "), Bytes(bytes))
}
