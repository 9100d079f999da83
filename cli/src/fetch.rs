//! Models by their names on the hub: requests for them, progress for people, and the place of converted ones.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::MultiProgress;
use sluice_converter::{ConvertError, Options, Plan, Progress, check_destination, plan_source};
use sluice_format::{VolumeName, model_path};
use sluice_hub::models::Models;
use sluice_hub::{Client, HubConversion, HubError, Needs, Notice, Observer, Patience, Reference, Settings};
use sluice_lab::estimate;
use sluice_model::KvType;
use sluice_model::memory::{Bytes, available_memory};

use crate::commands::convert::{Job, convert_file};
use crate::error::CliError;
use crate::progress::{Meter, byte_bar};
use crate::terminal::note;

/// Weights per second and core for quantisation to a type, the slowest first: with a measurement, and without, from
/// `docs/notes/2026-11-30-benchmarks.md`.
const QUANTISED_PER_CORE: [(&str, f64, f64); 3] = [("q2", 5e5, 8e5), ("q3", 3.1e6, 3.4e6), ("q4", 3.2e6, 4.9e6)];

impl From<HubError> for CliError {
    fn from(error: HubError) -> Self {
        match error {
            HubError::Name { .. } | HubError::InTheWay { .. } => CliError::Usage(error.to_string()),
            other => CliError::Failure(other.to_string()),
        }
    }
}

/// The name on the hub in an argument; `None` for an argument that names a file.
///
/// # Errors
/// Usage, for `hf:` without a name.
pub(crate) fn reference(argument: &Path) -> Result<Option<Reference>, CliError> {
    match argument.to_str() {
        Some(text) if Reference::is_meant(text) && !argument.exists() => Ok(Some(text.parse()?)),
        _ => Ok(None),
    }
}

/// A client configured by the environment.
pub(crate) fn client() -> Result<Arc<Client>, CliError> {
    let notice: Notice = Arc::new(|text: &str| note(&format_args!("note: {text}")));
    Ok(Arc::new(Client::with_patience(Settings::from_env()?, Patience::default(), Some(notice))?))
}

/// Progress of a download, and of the conversion of the downloaded files.
pub(crate) struct Bars {
    all: MultiProgress,
    download: Meter,
    convert: Option<Meter>,
    /// The notes on the download.
    heard: Mutex<Vec<String>>,
}

impl Bars {
    /// A bar for a download of this many bytes.
    pub(crate) fn download(bytes: u64) -> Arc<Self> {
        let all = MultiProgress::new();
        let download = byte_bar("downloading", bytes).beside(&all);
        Arc::new(Bars { all, download, convert: None, heard: Mutex::default() })
    }

    /// Bars for both.
    fn both() -> Arc<Self> {
        let all = MultiProgress::new();
        let download = byte_bar("downloading", 0).beside(&all);
        let convert = Some(byte_bar("converting ", 0).beside(&all));
        Arc::new(Bars { all, download, convert, heard: Mutex::default() })
    }

    pub(crate) fn finish(&self) {
        self.download.finish_and_clear();
        self.convert.iter().for_each(Meter::finish_and_clear);
    }

    fn say(&self, text: &str) {
        self.all.suspend(|| note(&text));
    }

    /// The notes on the download so far.
    pub(crate) fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Observer for Bars {
    fn expects(&self, bytes: u64) {
        self.download.set_length(bytes);
    }

    fn arrived(&self, bytes: u64) {
        self.download.inc(bytes);
    }

    fn lost(&self, bytes: u64) {
        self.download.set_position(self.download.position().saturating_sub(bytes));
    }

    fn note(&self, text: &str) {
        self.say(&format!("note: {text}"));
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).push(text.to_owned());
    }
}

impl Progress for Bars {
    fn started(&self, total_bytes: u64, already_done: u64) {
        let Some(bar) = &self.convert else { return };
        bar.set_length(total_bytes);
        bar.set_position(already_done);
        bar.reset_eta();
        if already_done > 0 {
            self.say(&format!("resuming: {} of {} are there already", Bytes(already_done), Bytes(total_bytes)));
        }
    }

    fn advanced(&self, bytes: u64) {
        self.convert.iter().for_each(|bar| bar.inc(bytes));
    }

    fn note(&self, text: &str) {
        self.say(text);
    }
}

/// A conversion from the hub: its source, and what has to be said and done before and after.
pub(crate) struct Fetched {
    hub: HubConversion,
    pub(crate) bars: Arc<Bars>,
}

impl Fetched {
    /// Asks for the repository and plans its conversion to `dst`.
    pub(crate) fn plan(
        reference: &Reference,
        dst: &Path,
        options: &Options,
        keep: bool,
    ) -> Result<(Self, Plan), CliError> {
        let bars = Bars::both();
        let hub = HubConversion::prepare(client()?, reference, dst, keep, Arc::clone(&bars) as Arc<dyn Observer>)?;
        hub.notes().iter().for_each(|text| Observer::note(&*bars, text));
        let plan = plan_source(hub.source(), options)?;
        Ok((Fetched { hub, bars }, plan))
    }

    /// Size, time and fit, for people. `kept`: bytes that the measurement keeps from layer to layer.
    pub(crate) fn facts(&self, plan: &Plan, dst: &Path, kept: u64) -> Result<String, CliError> {
        let Needs { download, cached, scratch, measuring, file, free } = self.hub.needs(plan, dst, kept);
        let commit = self.hub.commit();
        let mut out = format!("{} at {}\n", plan.spec().family, commit.get(..12).unwrap_or(commit));
        let line = self.hub.measure_line()?;
        let time = line.map_or_else(String::new, |rate| {
            let seconds = (download as f64 / rate).max(conversion_seconds(plan));
            format!(", about {} at {}/s", duration(seconds), Bytes(rate as u64))
        });
        let cached = match cached {
            0 => String::new(),
            cached => format!("; {} are in the cache of the hub's own programs", Bytes(cached)),
        };
        out += &format!("download    {}{time}{cached}\n", Bytes(download));
        let free = free.map_or_else(String::new, |free| format!("; {} are free there", Bytes(free)));
        let measuring = if measuring == 0 { String::new() } else { format!(" and {} to measure", Bytes(measuring)) };
        out +=
            &format!("model file  {}, and {} for downloads{measuring} meanwhile{free}\n", Bytes(file), Bytes(scratch));
        let needs =
            estimate::Needs::of(plan.spec(), plan.extents(), 4096.min(plan.spec().max_positions), KvType::default());
        let here = available_memory();
        let verdict = if here >= needs.least_memory { "it runs here" } else { "more than there is here" };
        out += &format!(
            "memory      at least {}; with {} nothing is read twice; {} here: {verdict}\n",
            Bytes::at_least(needs.least_memory),
            Bytes(needs.best_memory),
            Bytes(here)
        );
        Ok(out)
    }

    /// Refuses a conversion for which the drive has no room, and makes the folder for the downloads.
    pub(crate) fn begin(&self, plan: &Plan, dst: &Path, kept: u64) -> Result<(), CliError> {
        let Needs { scratch, measuring, file, free, .. } = self.hub.needs(plan, dst, kept);
        // The space that an interrupted conversion already uses is used again.
        let taken = self.hub.taken(dst);
        if let Some(free) = free.filter(|free| free + taken < file + scratch + measuring) {
            return Err(CliError::Failure(format!(
                "{}: the model file takes {}, downloads and measuring {} meanwhile; {} are free there. Free some space, or choose \
                 another drive",
                dst.display(),
                Bytes(file),
                Bytes(scratch + measuring),
                Bytes(free + taken)
            )));
        }
        self.hub.begin()?;
        Ok(())
    }

    /// Cleans up after an earlier run that was interrupted when its model file was already complete.
    pub(crate) fn settle(&self, plan: &Plan, dst: &Path) -> Result<(), CliError> {
        if !matches!(check_destination(plan, dst), Err(ConvertError::Exists { .. })) || !self.hub.is_unfinished(dst) {
            return Ok(());
        }
        let said = match self.hub.finish(dst)? {
            Some(kept) => format!("what was downloaded for it is in {}", kept.display()),
            None => "what was left of its downloads has been removed".into(),
        };
        note(&format_args!("note: {} was complete when its conversion was interrupted; {said}", dst.display()));
        Ok(())
    }

    /// Finishes the conversion; returns the place of files that were kept.
    pub(crate) fn finish(&self, dst: &Path) -> Result<Option<PathBuf>, CliError> {
        Ok(self.hub.finish(dst)?)
    }
}

/// Seconds that quantising takes at least.
fn conversion_seconds(plan: &Plan) -> f64 {
    let types = plan.types();
    let becomes = |name: &str| types.values().flatten().any(|ty| ty == name);
    let Some((_, measured, plain)) = QUANTISED_PER_CORE.into_iter().find(|(name, ..)| becomes(name)) else {
        return 0.0;
    };
    let per_core = if plan.is_measured() { measured } else { plain };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    // Each weight takes about half a byte.
    2.0 * plan.file_bytes() as f64 / (per_core * cores as f64)
}

/// A time in words.
fn duration(seconds: f64) -> String {
    match Duration::from_secs_f64(seconds.clamp(1.0, 1e9)).as_secs() {
        s @ 0..100 => format!("{s} s"),
        s @ 100..7200 => format!("{} min", s.div_ceil(60)),
        s => format!("{:.1} h", s as f64 / 3600.0),
    }
}

/// The model file that an argument names: the file itself, its first volume, a model in the folder of models if it is a name without a
/// folder, or the file made from a name on the hub. If there is none of the latter yet, it is made after the user has agreed, by `yes` or at
/// the terminal.
pub(crate) fn model_file(argument: &Path, yes: bool) -> Result<PathBuf, CliError> {
    let Some(reference) = reference(argument)? else {
        let Some((path, folder)) = in_folder(argument)? else { return Ok(model_path(argument)?) };
        return path.ok_or_else(|| {
            CliError::Failure(format!(
                "{}: there is no such file, and no model of that name in {} (`sluice list` shows its models)",
                argument.display(),
                folder.display()
            ))
        });
    };
    let models = Models::of_user()?;
    models.check()?;
    let found = models.find(&reference);
    if let [usual, others @ ..] = &found[..] {
        if !others.is_empty() && *usual != models.path(&reference, None) {
            let names: Vec<String> = found.iter().map(|path| format!("\n  {}", path.display())).collect();
            return Err(CliError::Usage(format!(
                "{reference} is there several times; name one of these files:{}",
                names.concat()
            )));
        }
        return Ok(usual.clone());
    }
    let dst = models.path(&reference, None);
    let command = format!("sluice convert {reference}");
    let can_ask = io::stdin().is_terminal() && io::stderr().is_terminal();
    if !yes && !can_ask {
        return Err(CliError::Failure(format!(
            "{reference} is not among the models in {}. `{command}` makes it, and so does --yes where a command has it",
            models.folder().display()
        )));
    }
    models.create()?;
    note(&format_args!("{reference} is not here yet; it would become {}", dst.display()));
    let job = Job { options: Options::default(), confirm: !yes };
    convert_file(&reference, &dst, &job)?;
    Ok(dst)
}

/// As [`model_file`], of an argument that can also be something else.
pub(crate) fn model_file_or(argument: &Path) -> Result<PathBuf, CliError> {
    match reference(argument)? {
        Some(_) => model_file(argument, false),
        None => match in_folder(argument)? {
            Some((Some(found), _)) => Ok(found),
            _ => Ok(model_path(argument)?),
        },
    }
}

/// The model of the folder of models that a name stands for, and the folder. `None` for what names a file, or a place for one, and where no
/// variable says where the folder is. Also for the name of a volume, and for that of a model of which only other volumes are here: the error
/// of opening it says which is missing, and where it was looked for.
fn in_folder(argument: &Path) -> Result<Option<(Option<PathBuf>, PathBuf)>, CliError> {
    let name = match (argument.to_str(), argument.file_name()) {
        (Some(text), Some(name)) if name == text => text,
        _ => return Ok(None),
    };
    let here = model_path(argument)?;
    if here.symlink_metadata().is_ok() {
        return Ok(None);
    }
    let Ok(models) = Models::of_user() else { return Ok(None) };
    models.check()?;
    let folder = models.folder().to_owned();
    match &models.called(name)[..] {
        [] if VolumeName::parse(&here).is_some() => Ok(None),
        [] => Ok(Some((missing_first(&folder, name)?, folder))),
        [one] => Ok(Some((Some(one.path.clone()), folder))),
        several => {
            let names: Vec<String> = several.iter().map(|entry| format!("\n  {}", entry.path.display())).collect();
            Err(CliError::Usage(format!("{name} is there several times; name one of these files:{}", names.concat())))
        }
    }
}

/// Where the first volume of a model should be of which the folder of models has only others.
fn missing_first(folder: &Path, name: &str) -> Result<Option<PathBuf>, CliError> {
    for whole in [folder.join(name), folder.join(format!("{name}.sluice"))] {
        let first = model_path(&whole)?;
        if first != whole && first.parent() == Some(folder) {
            return Ok(Some(first));
        }
    }
    Ok(None)
}

/// Asks at the terminal.
pub(crate) fn confirm(question: &str) -> Result<bool, CliError> {
    let _ = write!(io::stderr().lock(), "{question} [Y/n] ");
    let mut answer = String::new();
    let read = io::stdin().read_line(&mut answer);
    read.map_err(|e| CliError::Failure(format!("cannot read the answer from standard input: {e}")))?;
    // An empty answer is the end of the input.
    Ok(!answer.is_empty() && matches!(answer.trim().to_lowercase().as_str(), "" | "y" | "yes"))
}
