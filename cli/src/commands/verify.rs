//! `sluice verify`: checks every checksum of a model file, and whether it was made from a checkpoint.

use std::path::{Path, PathBuf};

use serde::Serialize;
use sluice_converter::provenance::{Comparison, SourceFile};
use sluice_format::{FormatError, ModelFile, TEXT_FILES};
use sluice_model::memory::Bytes;

use crate::error::CliError;
use crate::progress::byte_bar;
use crate::terminal::{counted, print, print_json};

const EXAMPLES: &str = "\
Reads the whole file. `sluice run` also checks every byte that it reads; this command finds damage before it \
is needed, and names all of it.

With --source it also reads the checkpoint, once, and says which of its files and tensors are not those that the model \
file was made of. Every byte of the safetensors files counts, and the files that the model file holds verbatim.

Examples:
  sluice verify r1.sluice
  sluice verify r1.sluice --source DeepSeek-R1/
  sluice verify r1.sluice --json | jq .damaged";

/// Check every checksum of a model file and name what is damaged; compare it with its checkpoint
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model file, its name in the folder of models, or hf:NAME
    pub(crate) file: PathBuf,

    /// Also compare the model file with the checkpoint in this folder
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Tensors of a file that are listed for people.
const TENSORS_SHOWN: usize = 8;

#[derive(Debug, Serialize)]
struct Report {
    file: String,
    intact: bool,
    extents: usize,
    bytes: u64,
    damaged: Vec<Damage>,
    /// The result of the comparison, if a checkpoint was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<Source>,
    /// Why the file could not even be opened.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// A checkpoint compared with the one from which the model file was made.
#[derive(Debug, Serialize)]
struct Source {
    folder: String,
    same: bool,
    files: Vec<SourceFile>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Damage {
    /// Its name, or that of a table.
    pub(crate) extent: String,
    /// The file that it is in, if the model has several.
    #[serde(skip_serializing_if = "Option::is_none")]
    volume: Option<String>,
    /// Of an extent.
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    problem: String,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let mut report = Report {
        file: args.file.display().to_string(),
        intact: false,
        extents: 0,
        bytes: 0,
        damaged: Vec::new(),
        source: None,
        error: None,
    };
    if let Err(e) = examine(args, &mut report) {
        if args.json {
            report.error = Some(e.to_string());
            print_json(&report)?;
        }
        return Err(e);
    }
    if args.json {
        print_json(&report)?;
    } else {
        print(&describe(&report))?;
    }
    if !report.intact {
        let (file, damaged) = (&report.file, how_much(&report.damaged, report.extents));
        return Err(CliError::Failure(format!("{file}: {damaged} damaged. Copy the file again or convert it again")));
    }
    match report.source {
        Some(Source { folder, same: false, files }) if files.iter().all(|f| f.difference.is_none() || is_text(f)) => {
            Err(CliError::Failure(format!(
                "{folder} has the weights and the config.json that {} was made of; only files differ that `sluice set` \
                 replaces, so there is no need to convert it again",
                report.file
            )))
        }
        Some(Source { folder, same: false, .. }) => Err(CliError::Failure(format!(
            "{folder} is not what {} was made of. Convert it again, or find the checkpoint that it was made of",
            report.file
        ))),
        _ => Ok(()),
    }
}

/// How many extents, and tables of volumes, are damaged, with the verb.
fn how_much(damaged: &[Damage], extents: usize) -> String {
    let of_extents = damaged.iter().filter(|damage| damage.offset.is_some()).count();
    let tables = damaged.len() - of_extents;
    let mut parts = Vec::new();
    if of_extents > 0 {
        parts.push(format!("{of_extents} of {}", counted(extents, "extent")));
    }
    if tables > 0 {
        parts.push(format!("{} of its volumes", counted(tables, "table")));
    }
    format!("{} {}", parts.join(" and "), if damaged.len() == 1 { "is" } else { "are" })
}

/// Whether `sluice set` replaces this file.
fn is_text(file: &SourceFile) -> bool {
    TEXT_FILES.contains(&file.name.as_str())
}

fn examine(args: &Args, report: &mut Report) -> Result<(), CliError> {
    let file = ModelFile::open(&args.file)?;
    // Before the model file is read, which may lack what the comparison needs.
    let comparison = args.source.as_deref().map(|folder| Comparison::new(&file, folder)).transpose()?;
    report.extents = file.extents().len();
    report.bytes = file.file_bytes();
    report.damaged = damage(&file);
    report.intact = report.damaged.is_empty();
    if let (Some(comparison), Some(folder)) = (comparison, &args.source) {
        report.source = Some(compare(&comparison, folder)?);
    }
    Ok(())
}

fn compare(comparison: &Comparison, folder: &Path) -> Result<Source, CliError> {
    let bar = byte_bar("comparing", comparison.bytes());
    let files = comparison.run(&|bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let files = files?;
    let same = files.iter().all(|f| f.difference.is_none());
    Ok(Source { folder: folder.display().to_string(), same, files })
}

/// All damaged extents. Superblock, tables and metadata were checked when the file was opened.
pub(crate) fn damage(file: &ModelFile) -> Vec<Damage> {
    let bar = byte_bar("verifying", file.extent_bytes());
    let wrong = file.verify_all(&mut |done| bar.set_position(done));
    bar.finish_and_clear();
    let several = file.volumes().len() > 1;
    let damage = |error: FormatError| {
        let volume = volume_of(&error).filter(|_| several);
        Damage { volume, ..Damage::from(error) }
    };
    wrong.into_iter().map(damage).collect()
}

/// The file in which this is wrong.
fn volume_of(error: &FormatError) -> Option<String> {
    match error {
        FormatError::ExtentChecksum { path, .. }
        | FormatError::ExtentCode { path, .. }
        | FormatError::ExtentRead { path, .. }
        | FormatError::RegionChecksum { path, .. }
        | FormatError::Io { path, .. } => Some(path.display().to_string()),
        _ => None,
    }
}

impl From<FormatError> for Damage {
    fn from(error: FormatError) -> Self {
        let problem = error.to_string();
        let of = |extent, offset, problem| Damage { extent, volume: None, offset, problem };
        match error {
            FormatError::ExtentChecksum { extent, offset, .. } => {
                of(extent, Some(offset), "its checksum does not match".into())
            }
            FormatError::ExtentCode { extent, offset, problem, .. } => {
                of(extent, Some(offset), format!("it cannot be decompressed: {problem}"))
            }
            FormatError::ExtentRead { extent, offset, source, .. } => {
                of(extent, Some(offset), format!("it cannot be read: {source}"))
            }
            FormatError::RegionChecksum { region, .. } => {
                of(format!("the {region}"), None, "its checksum does not match".into())
            }
            _ => of("the tables".into(), None, problem),
        }
    }
}

/// How many files are the same. With GGUF, the other files of the list are made from it.
fn same(files: &[SourceFile]) -> String {
    let (gguf, others): (Vec<&SourceFile>, Vec<&SourceFile>) = files.iter().partition(|f| f.name.ends_with(".gguf"));
    let number =
        |n: usize| if n == 1 { "the file is the same".to_owned() } else { format!("all {n} files are the same") };
    if gguf.is_empty() || others.is_empty() {
        return number(files.len());
    }
    let made: Vec<&str> = others.iter().map(|f| f.name.as_str()).collect();
    format!("{}, and so is what is made of it: {}", number(gguf.len()), made.join(", "))
}

fn describe(report: &Report) -> String {
    let mut out = String::new();
    if report.intact {
        let (extents, bytes) = (counted(report.extents, "extent"), Bytes(report.bytes));
        out = format!("{}: intact; {extents}, {bytes}, every checksum matches\n", report.file);
    }
    for d in &report.damaged {
        let volume = d.volume.as_ref().map(|path| format!(" of {path}")).unwrap_or_default();
        let offset = d.offset.map(|offset| format!(" at offset {offset}")).unwrap_or_default();
        out += &format!("damaged: {}{offset}{volume}: {}\n", d.extent, d.problem);
    }
    let Some(source) = &report.source else { return out };
    if source.same {
        out += &format!("{}: what it was made of; {}\n", source.folder, same(&source.files));
    }
    for f in &source.files {
        let Some(difference) = &f.difference else { continue };
        out += &format!("differs: {}: {difference}\n", f.name);
        for tensor in f.tensors.iter().take(TENSORS_SHOWN) {
            out += &format!("         {tensor}\n");
        }
        if f.tensors.len() > TENSORS_SHOWN {
            out += &format!("         and {} more, which --json lists\n", f.tensors.len() - TENSORS_SHOWN);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_that_are_there_are_counted() {
        let said = |names: &[&str]| {
            let file = |name: &&str| SourceFile { name: (*name).to_owned(), difference: None, tensors: Vec::new() };
            same(&names.iter().map(file).collect::<Vec<_>>())
        };
        assert_eq!(said(&["model.safetensors", "config.json"]), "all 2 files are the same");
        assert_eq!(
            said(&["m.gguf", "config.json", "tokenizer.json"]),
            "the file is the same, and so is what is made of it: config.json, tokenizer.json"
        );
        let parts = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "config.json"];
        assert_eq!(said(&parts), "all 2 files are the same, and so is what is made of it: config.json");
    }
}
