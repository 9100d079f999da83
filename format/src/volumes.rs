//! The files of a model: one, or several volumes whose names say which they are.

use std::collections::BTreeSet;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::FormatError;
use crate::reader::{open_regular, read_superblock};
use crate::superblock::Superblock;

/// Ending of the names of model files.
const ENDING: &[u8] = b".sluice";
/// Digits of each number in the name of a volume.
const DIGITS: usize = 5;
/// Folders in which volumes are looked for first, separated as those of `PATH` are: for drives that are mounted elsewhere than they were.
const FOLDERS_VARIABLE: &str = "SLUICE_VOLUMES";

/// What the name of a volume says: `NAME-00001-of-00004.sluice`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeName {
    folder: PathBuf,
    stem: OsString,
    /// Counted from 0.
    volume: u16,
    count: u16,
}

impl VolumeName {
    /// The name of the first of `count` volumes of a model that would be called `path` if it were one file.
    pub fn first_of(path: &Path, count: u16) -> Self {
        let name = path.file_name().unwrap_or_default();
        let stem = name.as_bytes().strip_suffix(ENDING).unwrap_or(name.as_bytes());
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        VolumeName { folder, stem: OsStr::from_bytes(stem).to_owned(), volume: 0, count }
    }

    /// Parses the name of a volume; `None` for other names.
    pub fn parse(path: &Path) -> Option<Self> {
        let stem = path.file_name()?.as_bytes().strip_suffix(ENDING)?;
        let (stem, count) = number_behind(stem, b"-of-")?;
        let (stem, number) = number_behind(stem, b"-")?;
        let volume = number.checked_sub(1).filter(|&volume| volume < count && !stem.is_empty())?;
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        Some(VolumeName { folder, stem: OsString::from_vec(stem.to_vec()), volume, count })
    }

    /// Which volume it is, counted from 0.
    pub fn volume(&self) -> u16 {
        self.volume
    }

    /// Volumes in all.
    pub fn count(&self) -> u16 {
        self.count
    }

    /// The path of a volume of the same model, counted from 0.
    pub fn path_of(&self, volume: u16) -> PathBuf {
        let mut name = self.stem.clone();
        name.push(format!("-{:0DIGITS$}-of-{:0DIGITS$}.sluice", u32::from(volume) + 1, self.count));
        self.folder.join(name)
    }

    /// Where a volume of the same model may be, the likeliest place first. `recorded` is the folder that the first volume names for it, and
    /// `linked` the one in which the file is that was opened, if it was opened through a link.
    fn places_of(&self, volume: u16, recorded: Option<&Path>, linked: Option<&Path>) -> Places {
        let beside = self.path_of(volume);
        let name = beside.file_name().unwrap_or_default();
        // A relative name is relative to the folder of the first volume, and an empty one is that folder.
        let recorded_in =
            |folder: &Path| recorded.map_or_else(|| folder.join(name), |recorded| folder.join(recorded).join(name));
        let expected = if recorded.is_some() { recorded_in(&self.folder) } else { beside.clone() };
        let mut all: Vec<PathBuf> = named_folders().map(|folder| folder.join(name)).collect();
        let of_link = linked.into_iter().flat_map(|folder| [recorded_in(folder), folder.join(name)]);
        for place in [expected.clone(), beside.clone()].into_iter().chain(of_link) {
            if !all.contains(&place) {
                all.push(place);
            }
        }
        Places { all, expected }
    }

    /// The path that the model would have if it were one file.
    pub fn whole(&self) -> PathBuf {
        let mut name = self.stem.clone();
        name.push(".sluice");
        self.folder.join(name)
    }
}

/// Where a volume may be.
struct Places {
    /// In the order in which they are tried.
    all: Vec<PathBuf>,
    /// Where it should be: where the first volume says, or else beside it.
    expected: PathBuf,
}

/// The folders that the variable names.
fn named_folders() -> impl Iterator<Item = PathBuf> {
    let variable = env::var_os(FOLDERS_VARIABLE).unwrap_or_default();
    let folders: Vec<PathBuf> = env::split_paths(&variable).collect();
    folders.into_iter().filter(|folder| !folder.as_os_str().is_empty())
}

/// The file to open for a model that is called `path`: that file, or if it does not exist but volumes of a model of that name do, the first
/// of these. Where there is neither, volumes of that name are looked for in the folders that `SLUICE_VOLUMES` names.
///
/// # Errors
/// [`FormatError::Ambiguous`] for volumes of several models.
pub fn model_path(path: &Path) -> Result<PathBuf, FormatError> {
    if path.symlink_metadata().is_ok() {
        return Ok(path.to_owned());
    }
    let elsewhere = named_folders().map(|folder| folder.join(path.file_name().unwrap_or_default()));
    let is_volume = VolumeName::parse(path).is_some();
    // Where only other volumes are, the error says which is missing.
    let mut missing = None;
    for place in std::iter::once(path.to_owned()).chain(elsewhere) {
        match if is_volume { Some(place) } else { first_volume(&place)? } {
            Some(found) if found.is_file() => return Ok(found),
            found => missing = missing.or(found),
        }
    }
    Ok(missing.unwrap_or_else(|| path.to_owned()))
}

/// The first volumes of the models that would be called `path` if they were one file, whether these volumes are there or only others are.
pub fn first_volumes(path: &Path) -> BTreeSet<PathBuf> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let names = folder.read_dir().into_iter().flatten().flatten().filter_map(|entry| {
        let name = VolumeName::parse(&path.with_file_name(entry.file_name()))?;
        (name.whole() == path).then(|| name.path_of(0))
    });
    names.collect()
}

/// The only one of them.
fn first_volume(path: &Path) -> Result<Option<PathBuf>, FormatError> {
    let mut firsts = first_volumes(path).into_iter();
    match (firsts.next(), firsts.next()) {
        (Some(first), Some(second)) => Err(FormatError::Ambiguous { path: path.to_owned(), found: [first, second] }),
        (first, _) => Ok(first),
    }
}

/// The text before a separator and five digits, and the number that they give.
fn number_behind<'a>(name: &'a [u8], separator: &[u8]) -> Option<(&'a [u8], u16)> {
    let (before, digits) = name.split_at_checked(name.len().checked_sub(DIGITS)?)?;
    let number = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|c| c.is_ascii_digit()))?;
    Some((before.strip_suffix(separator)?, number.parse().ok()?))
}

/// The file of one volume.
#[derive(Debug)]
pub struct Volume {
    path: PathBuf,
    file: File,
    superblock: Superblock,
    /// Of the first volume: the folder of each of the others.
    folders: Vec<PathBuf>,
}

impl Volume {
    pub(crate) fn new(path: &Path, file: File, (superblock, folders): (Superblock, Vec<PathBuf>)) -> Self {
        Volume { path: path.to_owned(), file, superblock, folders }
    }

    /// Opens a file and checks its superblock: steps 1 to 9 of `docs/FORMAT.md`.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let io = |action| move |source| FormatError::Io { path: path.to_owned(), action, source };
        let file = open_regular(path).map_err(io("open it"))?;
        let actual = file.metadata().map_err(io("read its length"))?.len();
        let superblock = read_superblock(path, &file, actual).map_err(|refused| by_its_name(refused, actual))?;
        Ok(Volume::new(path, file, superblock))
    }

    /// All volumes of the model of which this is one, in order.
    pub(crate) fn with_others(self) -> Result<Vec<Volume>, FormatError> {
        let Superblock { volume, volume_count: count, .. } = self.superblock;
        if count == 1 {
            return Ok(vec![self]);
        }
        let reference = self.superblock;
        // A link may have any name.
        let resolved = self.path.canonicalize().ok();
        let fits = |name: &VolumeName| (name.volume, name.count) == (volume, count);
        let named = VolumeName::parse(&self.path).filter(fits);
        let Some(name) = named.or_else(|| resolved.as_deref().and_then(VolumeName::parse).filter(fits)) else {
            return Err(FormatError::VolumeName { path: self.path, volume, count });
        };
        let named = self.path.clone();
        let find = |places, number| other(&places, &Wanted { number, named: &named, reference: &reference });
        let mut own = Some(self);
        // Only the first says where the others are.
        let first = match own.take_if(|_| volume == 0) {
            Some(own) => own,
            None => find(name.places_of(0, None, resolved.as_deref().and_then(Path::parent)), 0)?,
        };
        let folders = first.folders.clone();
        let linked = first.path.canonicalize().ok();
        let linked = linked.as_deref().and_then(Path::parent);
        let name = VolumeName::parse(&first.path).filter(|first| first.count == count).unwrap_or(name);
        let mut volumes: Vec<Volume> = Vec::with_capacity(usize::from(count));
        volumes.push(first);
        for number in 1..count {
            let next = match own.take_if(|_| number == volume) {
                Some(own) => own,
                None => {
                    let recorded = folders.get(usize::from(number) - 1).map(PathBuf::as_path);
                    find(name.places_of(number, recorded, linked), number)?
                }
            };
            volumes.push(next);
        }
        Ok(volumes)
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its superblock.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Of the first volume: the folders in which the others are looked for, as they were recorded.
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    /// Of the first volume: the others as far as they belong to it, which are those beside it, or else those in the folders that it names.
    /// Others than these open the model just as well, such as those of a copy in a folder that `SLUICE_VOLUMES` names, or beside the file
    /// that a link leads to; but who replaces or removes the model must not take them for its files.
    pub fn own_others(&self) -> Vec<PathBuf> {
        let reference = &self.superblock;
        let is_first = |name: &VolumeName| name.volume == 0 && name.count == reference.volume_count;
        let Some(name) = VolumeName::parse(&self.path).filter(|name| reference.volume == 0 && is_first(name)) else {
            return Vec::new();
        };
        let own = |number: u16| {
            let beside = name.path_of(number);
            let recorded = self.folders.get(usize::from(number) - 1);
            let recorded = recorded.map(|folder| name.folder.join(folder).join(beside.file_name().unwrap_or_default()));
            let wanted = Wanted { number, named: &self.path, reference };
            [Some(beside), recorded].into_iter().flatten().find(|place| wanted.open(place).is_ok())
        };
        (1..name.count).filter_map(own).collect()
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

/// A file of `actual` bytes that has the name of a volume but is no model file has most likely been one: to convert a model would be
/// the wrong advice.
fn by_its_name(refused: FormatError, actual: u64) -> FormatError {
    match refused {
        FormatError::NotSluice { path } => match VolumeName::parse(&path) {
            Some(VolumeName { volume, count, .. }) if count > 1 => {
                let problem = if actual == 0 { "it is empty" } else { "it does not begin as a model file does" };
                FormatError::DamagedVolume { path, volume, count, problem }
            }
            _ => FormatError::NotSluice { path },
        },
        other => other,
    }
}

/// A volume that is looked for.
struct Wanted<'a> {
    number: u16,
    /// The file that was named, and its superblock.
    named: &'a Path,
    reference: &'a Superblock,
}

/// Opens another volume than the one that was named, in the first of these places that has it. What else is in these places hides no
/// better one.
fn other(places: &Places, wanted: &Wanted<'_>) -> Result<Volume, FormatError> {
    let (mut missing, mut refused) = (None, None);
    for place in &places.all {
        match wanted.open(place) {
            Err(FormatError::Io { source, .. }) if is_missing(&source) => {
                missing.get_or_insert(source);
            }
            Err(problem) => {
                refused.get_or_insert(problem);
            }
            found => return found,
        }
    }
    if let Some(problem) = refused {
        return Err(problem);
    }
    let source = missing.unwrap_or_else(|| io::ErrorKind::NotFound.into());
    let (named, count) = (wanted.named.to_owned(), wanted.reference.volume_count);
    Err(FormatError::MissingVolume { path: places.expected.clone(), named, count, searched: searched(), source })
}

/// Which folders the variable names, as a part of a sentence.
fn searched() -> String {
    let folders: Vec<String> = named_folders().map(|folder| folder.display().to_string()).collect();
    if folders.is_empty() { String::new() } else { format!(", which names only {} now", folders.join(" and ")) }
}

/// Whether an error says that there is no such file, which it also is where its folder is none.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

impl Wanted<'_> {
    /// Opens the file if it is this volume.
    fn open(&self, path: &Path) -> Result<Volume, FormatError> {
        let found = Volume::open(path)?;
        match difference(self.reference, &found.superblock, self.number) {
            None => Ok(found),
            Some(problem) => {
                Err(FormatError::ForeignVolume { path: path.to_owned(), named: self.named.to_owned(), problem })
            }
        }
    }
}

/// What is wrong where the file that was named could not be opened: if it has the name of a volume and is not there, its drive may be mounted
/// elsewhere.
pub(crate) fn missing(error: FormatError) -> FormatError {
    match error {
        FormatError::Io { path, action, source } if source.kind() == std::io::ErrorKind::NotFound => {
            match VolumeName::parse(&path) {
                Some(VolumeName { count, .. }) => {
                    FormatError::MissingVolume { named: path.clone(), path, count, searched: searched(), source }
                }
                None => FormatError::Io { path, action, source },
            }
        }
        other => other,
    }
}

/// Why a superblock is not that of volume `number` of the model that has this one.
fn difference(reference: &Superblock, other: &Superblock, number: u16) -> Option<&'static str> {
    let table = |t: crate::TableRef| (t.stored_len, t.logical_len, t.checksum);
    let tables = |s: &Superblock| (table(s.extents), table(s.tensors));
    if (other.volume, other.volume_count) != (number, reference.volume_count) {
        return Some("its superblock says that it is another volume than its name says");
    }
    if (other.version, other.page_size) != (reference.version, reference.page_size) {
        return Some("it has another version of the format, or another page size");
    }
    (tables(other) != tables(reference)).then_some("their tables differ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_which_volume_it_is() {
        let first = VolumeName::first_of(Path::new("folder/r1.sluice"), 12);
        assert_eq!(first.path_of(0), Path::new("folder/r1-00001-of-00012.sluice"));
        assert_eq!(first.path_of(11), Path::new("folder/r1-00012-of-00012.sluice"));
        assert_eq!(first.whole(), Path::new("folder/r1.sluice"));
        assert_eq!(VolumeName::first_of(Path::new("r1"), 2).path_of(1), Path::new("r1-00002-of-00002.sluice"));
        for number in 0..12 {
            let name = VolumeName::parse(&first.path_of(number)).unwrap();
            assert_eq!((name.volume(), name.count(), name.path_of(3)), (number, 12, first.path_of(3)));
        }
        for other in [
            "r1.sluice",
            "r1-00001-of-00012",
            "r1-00000-of-00002.sluice",
            "r1-00003-of-00002.sluice",
            "r1-1-of-2.sluice",
            "-00001-of-00002.sluice",
            "r1-00001_of-00002.sluice",
            "r1-0000a-of-00002.sluice",
            "r1-99999-of-99999.sluice",
            "",
        ] {
            assert_eq!(VolumeName::parse(Path::new(other)), None, "{other}");
        }
    }
}
