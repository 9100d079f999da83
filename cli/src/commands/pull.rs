//! `sluice pull`: downloads a repository on the hub into a folder.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use sluice_hub::{Digest, Filter, Observer, Pull, Reference};
use sluice_model::memory::Bytes;

use crate::error::CliError;
use crate::fetch::{Bars, client};
use crate::terminal::{counted, note, print, print_json, seconds};

const EXAMPLES: &str = "\
Interrupted? Run the same command again: it goes on where it stopped, with the commit with which it began. Every file is \
verified. `sluice convert hf:NAME` needs no more than a few files at once on the drive; this command is for those who want all of them.

Examples:
  sluice pull deepseek-ai/DeepSeek-R1
  sluice pull Qwen/Qwen3-30B-A3B@main --to /mnt/models/qwen3
  sluice pull unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M
  sluice pull mistralai/Mixtral-8x7B-v0.1 --include '*.json' --include 'tokenizer*'";

/// Download a model from the Hugging Face hub into a folder that `convert` takes
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Its name, such as deepseek-ai/DeepSeek-R1, with @REVISION and, for GGUF, :QUANT or :FILE
    #[arg(value_name = "REPO")]
    repo: String,

    /// Folder for the files [default: the name of the model, in the current folder]
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,

    /// Only files that match this pattern; may be given several times [default: the files that `convert` reads, and those that
    /// describe the model]
    #[arg(long, value_name = "GLOB")]
    include: Vec<String>,

    /// Leave out files that match this pattern; may be given several times
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,

    /// Only report what would be downloaded
    #[arg(long)]
    dry_run: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let reference: Reference = args.repo.parse()?;
    let folder = args.to.clone().unwrap_or_else(|| PathBuf::from(reference.short_name()));
    let filter = Filter { include: args.include.clone(), exclude: args.exclude.clone() };
    let client = client()?;
    if args.dry_run {
        let snapshot = client.snapshot(&reference.repo, reference.revision())?;
        let (files, _) = sluice_hub::to_pull(&snapshot, &reference, &filter)?;
        let bytes = files.iter().map(|file| file.size).sum();
        if args.json {
            let files: Vec<_> = files.iter().map(|f| json!({ "path": f.path, "bytes": f.size })).collect();
            return print_json(
                &json!({ "dry_run": true, "repo": reference.repo, "commit": snapshot.commit, "bytes": bytes, "files": files }),
            );
        }
        let lines: String = files.iter().map(|f| format!("{:>12}  {}\n", Bytes(f.size).to_string(), f.path)).collect();
        return print(&format!("{lines}would download {} of {}\n", Bytes(bytes), snapshot.commit));
    }
    let started = Instant::now();
    let pull = Pull::prepare(client, &reference, &folder, &filter)?;
    let left_out: u64 = pull.left_out().iter().map(|file| file.size).sum();
    if left_out > 0 {
        let (count, verb) = (pull.left_out().len(), if pull.left_out().len() == 1 { "is" } else { "are" });
        note(&format_args!(
            "note: {} of {} {verb} left out, which `convert` does not read; --include '*' takes everything",
            counted(count, "file"),
            Bytes(left_out)
        ));
    }
    pull.notes().iter().for_each(|text| note(&format_args!("note: {text}")));
    // If the server states no digest of a file, only its length can be checked, which a note says.
    let is_verified = pull.files().iter().all(|file| file.digest != Digest::Unstated);
    let (bytes, count, commit) = (pull.bytes(), pull.files().len(), pull.commit().to_owned());
    let files = counted(count, "file");
    note(&format_args!("{}: {files}, {}, to {}", reference, Bytes(bytes), folder.display()));
    let bars = Bars::download(bytes);
    let outcome = pull.run(Arc::clone(&bars) as Arc<dyn Observer>);
    bars.finish();
    outcome?;
    if args.json {
        return print_json(&json!({
            "repo": reference.repo, "commit": commit, "folder": folder, "files": count, "bytes": bytes,
            "seconds": started.elapsed().as_secs_f64(),
        }));
    }
    let elapsed = seconds(started.elapsed().as_secs_f64());
    let verified = if is_verified { ", verified," } else { "" };
    print(&format!("{}: {files}, {}{verified} in {elapsed}\n", folder.display(), Bytes(bytes)))
}
