//! Models that are striped over several drives: into which folders their volumes go, and how much of each extent.

use std::fs;
use std::hash::{BuildHasher as _, RandomState};
use std::path::{Component, Path, PathBuf};

use sluice_format::{Shares, Volume, VolumeName};

use crate::error::ConvertError;
use crate::journal::{Elsewhere, elsewhere_at};
use crate::own::{folder_of, journal_path, partial_elsewhere, partial_path, whole_of};
use crate::upgrade::is_same;

/// The folders over which a model is striped, usually one on each drive, and the share of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Striping {
    folders: Vec<PathBuf>,
    shares: Shares,
}

impl Striping {
    /// Checks folders and shares.
    ///
    /// # Errors
    /// [`ConvertError::Options`] for a number of folders that is not that of the shares, or a folder that is named twice;
    /// [`ConvertError::NoFolder`] for one that does not exist; [`ConvertError::NotAFolder`].
    pub fn new(folders: Vec<PathBuf>, shares: Shares) -> Result<Self, ConvertError> {
        if folders.len() != shares.volumes() {
            return Err(ConvertError::Options(format!(
                "{} folders for volumes have {} shares: give one for each",
                folders.len(),
                shares.volumes()
            )));
        }
        let mut places = Vec::with_capacity(folders.len());
        for folder in &folders {
            check_folder(folder)?;
            let place = fs::canonicalize(folder).map_err(ConvertError::io(folder, "find out where it is"))?;
            if places.contains(&place) {
                let folder = folder.display();
                return Err(ConvertError::Options(format!("{folder} is named twice: name one folder on each drive")));
            }
            places.push(place);
        }
        Ok(Striping { folders, shares })
    }

    /// The folders, in the order of the volumes.
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    /// The share of each volume.
    pub fn shares(&self) -> &Shares {
        &self.shares
    }

    /// Where the model would be as one file, if it had this name: the first folder has everything that lies beside a model file.
    pub fn destination(&self, name: &Path) -> PathBuf {
        self.folders[0].join(whole_of(name).file_name().unwrap_or_default())
    }

    /// Where the folders of the volumes behind the first are, whatever the current folder is.
    pub(crate) fn other_places(&self) -> Vec<PathBuf> {
        self.folders[1..].iter().map(|folder| fs::canonicalize(folder).unwrap_or_else(|_| folder.clone())).collect()
    }

    /// How the first volume names the folders of the others: as they were given if that is absolute, or else relative to its own, so that
    /// the folders can be moved together.
    pub(crate) fn recorded(&self) -> Result<Vec<PathBuf>, ConvertError> {
        let name = |folder: &PathBuf| {
            if folder.is_absolute() {
                return Ok(folder.clone());
            }
            let place =
                |folder: &Path| fs::canonicalize(folder).map_err(ConvertError::io(folder, "find out where it is"));
            Ok(relative(&place(&self.folders[0])?, &place(folder)?))
        };
        self.folders[1..].iter().map(name).collect()
    }
}

/// Whether this is a folder that is there.
fn check_folder(folder: &Path) -> Result<(), ConvertError> {
    let path = folder.to_owned();
    match folder.metadata() {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(ConvertError::NotAFolder { path }),
        Err(_) => Err(ConvertError::NoFolder { path }),
    }
}

/// How an absolute path is named from an absolute folder.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let (mut from, mut to) = (from.components().peekable(), to.components().peekable());
    while let (Some(a), Some(b)) = (from.peek(), to.peek())
        && a == b
    {
        from.next();
        to.next();
    }
    from.map(|_| Component::ParentDir).chain(to).collect()
}

/// Where a model goes: the path that it has as one file, and the folders of its volumes if it is striped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Destination<'a> {
    pub(crate) path: &'a Path,
    pub(crate) striping: Option<&'a Striping>,
    /// What partial files in other folders have in their names: the journal's, or a new one.
    id: u64,
}

impl<'a> Destination<'a> {
    /// Where a model called `path` goes.
    pub(crate) fn new(path: &'a Path, striping: Option<&'a Striping>) -> Self {
        let journaled = || elsewhere_at(&journal_path(path)).map(|elsewhere| elsewhere.id);
        // The keys of `RandomState` are random.
        let id = striping.map_or(0, |_| journaled().unwrap_or_else(|| RandomState::new().hash_one(path)));
        Destination { path, striping, id }
    }

    /// What its journal says of the volumes behind the first.
    pub(crate) fn elsewhere(self) -> Option<Elsewhere> {
        self.striping.map(|striping| Elsewhere { id: self.id, folders: striping.other_places() })
    }

    /// Whether there is another model, in one file, that has the name of these volumes: it would be opened in their place. `own`: the
    /// model that is written again, which says the same.
    pub(crate) fn refuse_namesake(self, count: usize, own: Option<&Path>) -> Result<(), ConvertError> {
        let targets = self.targets(count);
        let Some(name) = targets.first().filter(|_| count > 1).and_then(|first| VolumeName::parse(first)) else {
            return Ok(());
        };
        let path = name.whole();
        if path.symlink_metadata().is_err() || own.is_some_and(|own| is_same(own, &path)) {
            return Ok(());
        }
        Err(ConvertError::Namesake { path, volume: targets[0].clone() })
    }

    /// Whether the folder is there that the files go to, or the first of them.
    pub(crate) fn check_folder(self) -> Result<(), ConvertError> {
        check_folder(folder_of(self.path))
    }

    /// Refuses the name of a volume for a model that may become one file, as it would be taken for a part of another model. `least`: the
    /// fewest files that it may become.
    pub(crate) fn refuse_name(self, least: usize) -> Result<(), ConvertError> {
        let name = VolumeName::parse(self.path).filter(|name| least == 1 && name.count() > 1);
        let Some(name) = name else { return Ok(()) };
        let (volume, count) = (name.volume() + 1, name.count());
        let problem = format!("it is the name of volume {volume} of {count} of a model, and one file is to be written");
        Err(ConvertError::IsVolume { path: self.path.to_owned(), problem })
    }

    /// Whether a file that would be overwritten belongs to another model than the one whose first volume would be, as volumes in other
    /// folders can. `targets`: the finished files; `early`: those of them that are there and known to be of this conversion.
    pub(crate) fn refuse_foreign(self, targets: &[PathBuf], early: &[usize]) -> Result<(), ConvertError> {
        let Some(first) = targets.first() else { return Ok(()) };
        // Under whatever name: the other volumes of its model are of no use without it.
        if let Some(found) = Volume::open(first).ok().filter(|found| found.superblock().volume > 0) {
            let (volume, count) = (found.superblock().volume + 1, found.superblock().volume_count);
            let problem = format!("it is volume {volume} of {count} of a model, all of which are needed");
            return Err(ConvertError::IsVolume { path: first.clone(), problem });
        }
        let others = (1..targets.len()).filter(|volume| !early.contains(volume));
        let there: Vec<Volume> = others.filter_map(|volume| Volume::open(&targets[volume]).ok()).collect();
        if there.is_empty() {
            return Ok(());
        }
        let own = Volume::open(first).map_or(Vec::new(), |first| first.own_others());
        let is_own = |volume: &Volume| own.iter().any(|known| is_same(known, volume.path()));
        match there.iter().find(|volume| !is_own(volume)) {
            Some(foreign) => Err(ConvertError::OtherModel { path: foreign.path().to_owned(), first: first.clone() }),
            None => Ok(()),
        }
    }

    /// The paths of the finished files, of which there are `count`.
    pub(crate) fn targets(self, count: usize) -> Vec<PathBuf> {
        let whole = whole_of(self.path);
        let Ok(volumes) = u16::try_from(count) else { return Vec::new() };
        if volumes == 1 {
            return vec![self.path.to_owned()];
        }
        let name = VolumeName::first_of(&whole, volumes);
        let target = |volume| {
            let beside = name.path_of(volume);
            match self.folder(usize::from(volume)) {
                Some(folder) => folder.join(beside.file_name().unwrap_or_default()),
                None => beside,
            }
        };
        (0..volumes).map(target).collect()
    }

    /// Where the partial file of a volume is.
    pub(crate) fn partial(self, volume: usize) -> PathBuf {
        match self.folder(volume) {
            Some(folder) if volume > 0 => partial_elsewhere(self.path, folder, volume, self.id),
            _ => partial_path(self.path, volume),
        }
    }

    /// The folders that have files of the model.
    pub(crate) fn folders(self) -> Vec<&'a Path> {
        match self.striping {
            Some(striping) => striping.folders.iter().map(PathBuf::as_path).collect(),
            None => vec![folder_of(self.path)],
        }
    }

    fn folder(self, volume: usize) -> Option<&'a PathBuf> {
        self.striping.and_then(|striping| striping.folders.get(volume))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::own::with_suffix;

    #[test]
    fn volumes_and_their_partial_files_lie_in_their_folders() {
        let dir = tempfile::tempdir().unwrap();
        let folders = ["a", "b"].map(|name| dir.path().join(name));
        let shares = || Shares::new(&[1, 1]).unwrap();
        let missing = Striping::new(folders.to_vec(), shares()).unwrap_err();
        assert!(matches!(missing, ConvertError::NoFolder { .. }), "{missing}");
        folders.iter().for_each(|folder| fs::create_dir(folder).unwrap());
        let twice = Striping::new(vec![folders[0].clone(), dir.path().join("b/../a")], shares()).unwrap_err();
        assert!(twice.to_string().contains("twice"), "{twice}");
        assert!(Striping::new(folders[..1].to_vec(), shares()).is_err());

        let striping = Striping::new(folders.to_vec(), shares()).unwrap();
        let path = striping.destination(Path::new("elsewhere/m-00001-of-00004.sluice"));
        assert_eq!(path, folders[0].join("m.sluice"));
        let destination = Destination { id: 0xab, ..Destination::new(&path, Some(&striping)) };
        let targets = [folders[0].join("m-00001-of-00002.sluice"), folders[1].join("m-00002-of-00002.sluice")];
        assert_eq!(destination.targets(2), targets);
        assert_eq!(destination.partial(0), with_suffix(&path, ".partial"));
        assert_eq!(destination.partial(1), folders[1].join("m.sluice.partial-00002-00000000000000ab"));
        assert_eq!(striping.recorded().unwrap(), [folders[1].clone()]);
    }

    #[test]
    fn folders_that_are_named_relative_are_recorded_so() {
        for (from, to, named) in [
            ("/mnt/a", "/mnt/b", "../b"),
            ("/mnt/a", "/mnt/a/b/c", "b/c"),
            ("/mnt/a/b", "/mnt", "../.."),
            ("/a", "/b/c", "../b/c"),
        ] {
            assert_eq!(relative(Path::new(from), Path::new(to)), Path::new(named), "{from} {to}");
        }
    }
}
