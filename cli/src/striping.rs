//! Over which drives a model is striped, as the command line says it.

use std::fs;
use std::path::{Path, PathBuf};

use sluice_converter::Striping;
use sluice_format::limits::MAX_STRIPES;
use sluice_format::{MAX_SHARE, ModelFile, Shares};
use sluice_storage::io::CalibrationStore;
use sluice_storage::io::calibration::DeviceId;

use crate::commands::bench_machine::{calibrated, device};
use crate::error::CliError;
use crate::terminal::{counted, note};

/// Options for striping.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct StripingArgs {
    /// Stripe the model over these folders, one on each drive, so that every read uses all of them: DIR1,DIR2; the first volume is in DIR1
    #[arg(long, value_name = "DIRS", value_delimiter = ',')]
    volumes: Vec<PathBuf>,

    /// The share of each drive, one number for each folder, such as 2,1 [default: by what `sluice bench disk` has measured of them, or else
    /// equal]
    #[arg(long, value_name = "LIST", value_delimiter = ',', requires = "volumes", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_SHARE)))]
    shares: Vec<u32>,
}

impl StripingArgs {
    /// What was asked for, if anything was. Says so where shares are equal only because nothing was measured.
    pub(crate) fn striping(&self) -> Result<Option<Striping>, CliError> {
        if self.volumes.is_empty() {
            return Ok(None);
        }
        let refuse = |problem: String| CliError::Usage(format!("--volumes: {problem}"));
        let (folders, shares) = (self.volumes.len(), self.shares.len());
        if folders == 1 {
            return Err(refuse(format!(
                "one folder is not several drives: name 2 to {MAX_STRIPES}, such as DIR1,DIR2"
            )));
        }
        if ![0, folders].contains(&shares) {
            return Err(CliError::Usage(format!(
                "--shares: {} for {folders} folders: give each of them a number, such as --shares {}",
                counted(shares, "share"),
                vec!["1"; folders].join(",")
            )));
        }
        // First, so that nothing is said of the drives of folders that cannot be used.
        Striping::new(self.volumes.clone(), Shares::new(&vec![1; folders]).map_err(refuse)?)?;
        let shares = if self.shares.is_empty() { self.measured() } else { Shares::new(&self.shares) };
        let striping = Striping::new(self.volumes.clone(), shares.map_err(refuse)?)?;
        self.one_drive_notes().iter().for_each(|said| note(said));
        Ok(Some(striping))
    }

    /// Remarks about folders that are on one drive, which is then read no faster. What cannot be told is not said.
    fn one_drive_notes(&self) -> Vec<String> {
        let mut drives: Vec<(DeviceId, Vec<String>)> = Vec::new();
        for folder in &self.volumes {
            let Ok(device) = device(folder) else { continue };
            let name = folder.display().to_string();
            match drives.iter_mut().find(|(other, _)| other.is_same(&device)) {
                Some((_, folders)) => folders.push(name),
                None => drives.push((device, vec![name])),
            }
        }
        let shared = drives.into_iter().filter(|(_, folders)| folders.len() > 1);
        let said = |(_, folders): (_, Vec<String>)| {
            format!(
                "note: {} are on one drive, so reading is no faster than from one folder of it",
                folders.join(" and ")
            )
        };
        shared.map(said).collect()
    }

    /// Shares by the speeds of the drives, as far as they are known.
    fn measured(&self) -> Result<Shares, String> {
        let store = CalibrationStore::of_user().ok();
        let rates: Vec<Option<f64>> =
            self.volumes.iter().map(|folder| calibrated(store.as_ref()?, folder).ok().flatten()).collect();
        if let Some(known) = rates.iter().copied().collect::<Option<Vec<f64>>>() {
            return Shares::of_rates(&known);
        }
        let unknown = self.volumes.iter().zip(&rates).filter(|(_, rate)| rate.is_none());
        let unknown: Vec<String> = unknown.map(|(folder, _)| folder.display().to_string()).collect();
        note(&format_args!(
            "note: the drive of {} has not been measured, so all drives get equal shares: `sluice bench disk DIR` measures one, and --shares \
             says them",
            unknown.join(" and that of ")
        ));
        Shares::new(&vec![1; self.volumes.len()])
    }
}

/// A remark if experts of the striped model that was written to these files are too small for their shares.
pub(crate) fn note_rounded(files: &[PathBuf]) {
    let Some(Ok(model)) = files.first().map(|first| ModelFile::open(first)) else { return };
    let all = model.volumes().len();
    let Some((least, _)) = model.volumes_per_expert().filter(|(least, _)| model.is_striped() && *least < all) else {
        return;
    };
    let shares: Vec<String> = model.expert_shares().iter().map(|share| format!("{:.1} %", 100.0 * share)).collect();
    note(&format_args!(
        "note: experts are divided in whole pages of {} bytes, and some have too few for these shares: they lie in {} only. Of the experts, \
         the volumes have {}",
        model.superblock().page_size,
        counted(least, "volume"),
        shares.join(", ")
    ));
}

/// Where the model goes as one file, if `dst` was named: with volumes, into the first of their folders. `dst` may have that folder, or
/// none.
pub(crate) fn destination(dst: &Path, striping: Option<&Striping>) -> Result<PathBuf, CliError> {
    let Some(striping) = striping else { return Ok(dst.to_owned()) };
    let folder = dst.parent().filter(|folder| !folder.as_os_str().is_empty());
    let first = &striping.folders()[0];
    let same = |folder: &Path| fs::canonicalize(folder).is_ok_and(|a| fs::canonicalize(first).is_ok_and(|b| a == b));
    if let Some(other) = folder.filter(|folder| !same(folder)) {
        return Err(CliError::Usage(format!(
            "--volumes says that the first volume goes to {}, and the model file is named in {}: name it without a folder",
            first.display(),
            other.display()
        )));
    }
    Ok(striping.destination(dst))
}
