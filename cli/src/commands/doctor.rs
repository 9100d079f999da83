//! `sluice doctor`: checks the machine for this program, and how to mend what is wrong.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde_json::json;
use sluice_format::ModelFile;
use sluice_hub::free_space;
use sluice_kernels::Kernels;
use sluice_lab::estimate::Needs;
use sluice_model::KvType;
use sluice_model::memory::{Bytes, SystemMemory, available_memory, group_limits};
use sluice_storage::io::calibration::DeviceId;
use sluice_storage::io::{CalibrationStore, DataFile, DirectMode, try_uring};
use tempfile::NamedTempFile;

use crate::doctor::{Finding, Verdict, describe, drive, limits, memory, processor, worst};
use crate::error::CliError;
use crate::terminal::{is_coloured, print_as_is, print_json};

const EXAMPLES: &str = "\
Each line is ok, could be better, or wrong, with what to do about it below. A model file is opened but not read. Without one, the folder is the current one. To try \
direct reads in a folder, a file of 64 KiB is made there and removed.

Examples:
  sluice doctor
  sluice doctor /fast/models
  sluice doctor r1.sluice
  sluice doctor r1.sluice --json | jq '.findings[] | select(.verdict != \"ok\")'";

/// Bytes of the file with which direct reads are tried.
const TRIED: usize = 64 << 10;
/// Context for which a model's needs are computed, in tokens.
const CONTEXT: usize = 4096;

/// Report what on this machine keeps models from running well, and how to mend it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Model file, or folder for model files [default: the current folder]
    path: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Args {
    /// The model file to check, if there is one.
    pub(crate) fn file(&mut self) -> Option<&mut PathBuf> {
        self.path.as_mut().filter(|path| !path.is_dir())
    }
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let path = args.path.as_deref().unwrap_or(Path::new("."));
    let findings = examine(Path::new("/"), path)?;
    let worst = worst(&findings);
    if args.json {
        print_json(&json!({ "path": path.display().to_string(), "worst": worst, "findings": findings }))?;
    } else {
        print_as_is(&describe(&findings, is_coloured(&io::stdout())))?;
    }
    let wrong = findings.iter().filter(|finding| finding.verdict == Verdict::Wrong).count();
    match wrong {
        0 => Ok(()),
        1 => Err(CliError::Failure("one thing is wrong".into())),
        n => Err(CliError::Failure(format!("{n} things are wrong"))),
    }
}

/// All findings. `root`: the root folder of the system.
fn examine(root: &Path, path: &Path) -> Result<Vec<Finding>, CliError> {
    let folder = drive::folder_of(path).map_err(CliError::file(path, "find it"))?;
    let (system, available) = (SystemMemory::read(root), available_memory());
    let (model, needs) = if path.is_dir() { (None, None) } else { model(path) };
    let mut findings = vec![
        memory::memory(&system, available, needs.as_ref()),
        memory::control_groups(&group_limits(root), system.total),
    ];
    findings.extend(memory::swap(&system));
    findings.extend(memory::huge_pages(root));
    findings.extend(limits::locked_memory(root, available));
    findings.push(limits::io_uring(root, &try_uring()));
    findings.extend(limits::open_files(root));
    match &volumes(path)[..] {
        [] => findings.extend(storage(root, path, &folder)),
        volumes => {
            for volume in volumes {
                let folder = drive::folder_of(volume).map_err(CliError::file(volume, "find it"))?;
                let name = Some(volume.display().to_string());
                let of_volume = storage(root, volume, &folder);
                findings.extend(of_volume.into_iter().map(|finding| Finding { volume: name.clone(), ..finding }));
            }
        }
    }
    findings.push(processor::processor(root, std::thread::available_parallelism().map_or(1, usize::from)));
    findings.push(processor::instructions(&Kernels::detect()));
    findings.extend(model);
    Ok(findings)
}

/// Whether a model file can be opened, and its needs.
fn model(path: &Path) -> (Option<Finding>, Option<Needs>) {
    let file = match ModelFile::open(path) {
        Ok(file) => file,
        Err(refused) => {
            let mend = "`sluice verify` names what is damaged; `sluice convert` continues an interrupted conversion";
            return (Some(Finding::wrong("model", refused.to_string(), mend)), None);
        }
    };
    let spec = file.spec();
    let needs = Needs::of(spec, file.extents(), CONTEXT.min(spec.max_positions), KvType::default());
    let is = format!("{}, {}, can be opened", spec.family, Bytes(file.file_bytes()));
    (Some(Finding::ok("model", is)), Some(needs))
}

/// The volumes of a striped model, which usually lie on drives of their own; none for other models.
fn volumes(path: &Path) -> Vec<PathBuf> {
    let model = if path.is_dir() { None } else { ModelFile::open(path).ok().filter(ModelFile::is_striped) };
    let volumes = model.iter().flat_map(|model| model.volumes());
    volumes.map(|volume| volume.path().to_owned()).collect()
}

/// Filesystem, direct reads, drive and calibration of a model file, or of a folder for some.
fn storage(root: &Path, path: &Path, folder: &Path) -> Vec<Finding> {
    let mount = drive::Mount::of(root, folder);
    let mut findings: Vec<_> = mount.iter().map(|mount| drive::filesystem(mount, free_space(folder))).collect();
    let tried = if path.is_dir() { scratch(folder).map(Some) } else { Ok(None) };
    let opened = tried.map_err(|refused| refused.to_string()).and_then(|scratch| {
        let file = scratch.as_ref().map_or(path, NamedTempFile::path);
        DataFile::open(file, DirectMode::Prefer).map_err(|refused| refused.to_string())
    });
    let file = match opened {
        Ok(file) => file,
        Err(refused) => {
            let is = format!("cannot be tried in {}: {refused}", folder.display());
            findings.push(Finding::better("direct reads", is, "name a model file, or a folder that you may write to"));
            return findings;
        }
    };
    findings.push(drive::direct(file.direct()));
    if let Ok(device) = DeviceId::of(&file) {
        findings.extend(drive::drive(root, &device.device, mount.as_ref()));
        let found = CalibrationStore::of_user().and_then(|store| store.all());
        findings.push(drive::calibration(&found, &device, super::batch::now(), path));
    }
    findings
}

/// A file for trying direct reads, which is removed when it is dropped.
fn scratch(folder: &Path) -> std::io::Result<NamedTempFile> {
    let mut file = tempfile::Builder::new().prefix(".sluice-doctor-").tempfile_in(folder)?;
    file.write_all(&[0; TRIED])?;
    file.as_file().sync_all()?;
    Ok(file)
}
