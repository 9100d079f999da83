//! The folder of models: it records which file was made from which name, so the name is enough to find the file.

use std::env;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sluice_format::{ModelFile, Volume, VolumeName};

use crate::error::HubError;
use crate::name::{PREFIX, Reference};
use crate::pieces::with_suffix;

const EXTENSION: &str = ".sluice";
/// Replaces the `/` of a name.
const SLASH: &str = "--";
/// Stands before the part of a repository, and before a type. No name contains it.
const PLUS: char = '+';

/// The folder of models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Models {
    folder: PathBuf,
}

/// A model of the folder.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its name on the hub, or that of the file without its extension, if that is not a name on the hub.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// Bytes on the drive.
    pub bytes: u64,
    /// The model type; `None` if the file cannot be opened.
    pub family: Option<String>,
    /// When it was made.
    pub modified: Option<SystemTime>,
    /// Whether it is a conversion that was interrupted.
    pub interrupted: bool,
}

impl Models {
    /// The user's folder: `models` in `SLUICE_HOME`; otherwise `sluice/models` in `XDG_DATA_HOME` or `~/.local/share`, on
    /// macOS in `~/Library/Application Support`.
    ///
    /// # Errors
    /// [`HubError::Setting`] if no variable gives a folder.
    pub fn of_user() -> Result<Self, HubError> {
        Self::from(&|name| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from))
    }

    fn from(variable: &dyn Fn(&str) -> Option<PathBuf>) -> Result<Self, HubError> {
        let data = if cfg!(target_os = "macos") { "Library/Application Support" } else { ".local/share" };
        let home = variable("SLUICE_HOME").or_else(|| {
            let data = variable("XDG_DATA_HOME").or_else(|| Some(variable("HOME")?.join(data)))?;
            Some(data.join("sluice"))
        });
        let problem = "neither it nor HOME says where models are kept. Set it, or name files".to_owned();
        let home = home.ok_or(HubError::Setting { variable: "SLUICE_HOME", problem })?;
        Ok(Models { folder: home.join("models") })
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Checks that the folder, if it exists, can be read; otherwise its models would seem to be missing.
    ///
    /// # Errors
    /// [`HubError::Io`].
    pub fn check(&self) -> Result<(), HubError> {
        match fs::read_dir(&self.folder) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(HubError::io(&self.folder, "list it")(e)),
            _ => Ok(()),
        }
    }

    /// Makes the folder.
    ///
    /// # Errors
    /// [`HubError::Io`].
    pub fn create(&self) -> Result<(), HubError> {
        fs::create_dir_all(&self.folder).map_err(HubError::io(&self.folder, "create it"))
    }

    /// The file for a name on the hub; `types` names the weight types if they are not the default.
    pub fn path(&self, reference: &Reference, types: Option<&str>) -> PathBuf {
        let types = types.map(|types| format!("{PLUS}{types}")).unwrap_or_default();
        self.folder.join(format!("{}{types}{EXTENSION}", stem(reference)))
    }

    /// Files that were made from a name on the hub: first with the default types, then with others.
    pub fn find(&self, reference: &Reference) -> Vec<PathBuf> {
        let stem = stem(reference);
        let with_types = format!("{stem}{PLUS}");
        let is_meant = |name: &str| {
            let name = whole_name(name)?;
            let name = name.strip_suffix(EXTENSION)?;
            let types = if name == stem { "" } else { name.strip_prefix(&with_types)? };
            // Types follow the part, and a part is not a type.
            (reference.part.is_some() || is_types(types)).then(|| types.to_owned())
        };
        let names = self.names();
        let mut found: Vec<(String, &String)> = names.iter().filter_map(|n| Some((is_meant(n)?, n))).collect();
        found.sort();
        found.into_iter().map(|(_, name)| self.folder.join(name)).collect()
    }

    /// Everything in the folder, by name.
    pub fn list(&self) -> Vec<Entry> {
        let mut entries: Vec<Entry> = Vec::new();
        for name in self.names() {
            let path = self.folder.join(&name);
            let (whole, interrupted) = match name.strip_suffix(".partial") {
                Some(whole) => (whole, true),
                None => (name.as_str(), false),
            };
            let whole = whole_name(whole);
            let Some(stem) = whole.as_deref().and_then(|whole| whole.strip_suffix(EXTENSION)) else { continue };
            let Ok(found) =
                path.metadata().and_then(|m| if m.is_file() { Ok(m) } else { Err(std::io::ErrorKind::Other.into()) })
            else {
                continue;
            };
            let model = (!interrupted).then(|| ModelFile::open(&path).ok()).flatten();
            let files = match &model {
                Some(model) => model.volumes().iter().map(|volume| volume.path().to_owned()).collect(),
                None => self.files(&path),
            };
            entries.push(Entry {
                name: name_of(stem),
                bytes: files.iter().filter_map(|file| file.metadata().ok()).map(|m| occupied(&m)).sum(),
                family: model.map(|model| model.spec().family.clone()),
                modified: found.modified().ok(),
                interrupted,
                path,
            });
        }
        entries.sort_by(|a, b| (&a.name, a.interrupted).cmp(&(&b.name, b.interrupted)));
        entries
    }

    /// The entries to which a name refers: a path or the name of a file as it stands, or else a name on the hub as [`Models::list`] gives
    /// it, with or without `hf:`, or the name of the file without the number of its volume or its extension. Several models can have one
    /// name: in one file, and in so many volumes.
    pub fn named(&self, name: &str) -> Vec<Entry> {
        let all = self.list();
        let is_file = |entry: &&Entry| {
            let (path, named) = (&entry.path, Path::new(name));
            path.file_name().is_some_and(|file| file == name)
                || path == named
                || fs::canonicalize(path).is_ok_and(|path| fs::canonicalize(named).is_ok_and(|named| named == path))
        };
        let exact: Vec<Entry> = all.iter().filter(is_file).cloned().collect();
        if !exact.is_empty() {
            return exact;
        }
        let bare = |name: &str| name.strip_prefix(PREFIX).unwrap_or(name).to_owned();
        let is_meant = |entry: &Entry| {
            let file = entry.path.file_name().map(|f| f.to_string_lossy().into_owned()).unwrap_or_default();
            let whole = whole_name(&file).unwrap_or_default();
            bare(&entry.name) == bare(name)
                || [&file, &whole].iter().any(|f| *f == name || **f == format!("{name}{EXTENSION}"))
        };
        all.into_iter().filter(is_meant).collect()
    }

    /// The models that a name without a folder stands for: as in [`named`](Self::named), or else the name on the hub without its owner. A model
    /// of the default types goes before others, and interrupted conversions are no models yet.
    pub fn called(&self, name: &str) -> Vec<Entry> {
        let whole = |entries: Vec<Entry>| entries.into_iter().filter(|e| !e.interrupted).collect::<Vec<_>>();
        let named = whole(self.named(name));
        if !named.is_empty() {
            return named;
        }
        let short = |entry: &Entry| Some(entry.name.strip_prefix(PREFIX)?.split_once('/')?.1.to_owned());
        let all: Vec<(String, Entry)> = whole(self.list()).into_iter().filter_map(|e| Some((short(&e)?, e))).collect();
        let of = |is_meant: &dyn Fn(&str) -> bool| -> Vec<Entry> {
            all.iter().filter(|(short, _)| is_meant(short)).map(|(_, entry)| entry.clone()).collect()
        };
        let exact = of(&|short| short == name);
        if exact.is_empty() { of(&|short| short.split(':').next() == Some(name)) } else { exact }
    }

    /// The files that [`remove`](Self::remove) removes of an entry at `path`: that one, and its other volumes. Of a model behind a link
    /// these are the links in the folder: what they lead to is kept by whoever has put it there.
    pub fn files(&self, path: &Path) -> Vec<PathBuf> {
        let mut files = self.others(path);
        files.insert(0, path.to_owned());
        files
    }

    /// Bytes on the drive of these files. A link has none.
    pub fn frees(&self, entry: &Entry) -> u64 {
        let files = self.files(&entry.path);
        let found = files.iter().filter_map(|path| path.symlink_metadata().ok());
        found.filter(fs::Metadata::is_file).map(|found| occupied(&found)).sum()
    }

    /// The files that a model is read from and that [`remove`](Self::remove) leaves: what links lead to, and volumes that were only found in
    /// folders that `SLUICE_VOLUMES` names.
    pub fn kept(&self, entry: &Entry) -> Vec<PathBuf> {
        let place = |path: &Path| fs::canonicalize(path).ok();
        let is_link = |path: &PathBuf| path.symlink_metadata().is_ok_and(|found| found.is_symlink());
        let gone: Vec<PathBuf> = self.files(&entry.path).into_iter().filter(|path| !is_link(path)).collect();
        let gone: Vec<Option<PathBuf>> = gone.iter().map(|path| place(path)).collect();
        let model = (!entry.interrupted).then(|| ModelFile::open(&entry.path).ok()).flatten();
        let volumes = model.iter().flat_map(ModelFile::volumes).map(|volume| place(volume.path()));
        volumes.filter(|volume| !gone.contains(volume)).flatten().collect()
    }

    /// Removes a model, or what an interrupted conversion has left of one; returns the bytes that this frees.
    ///
    /// # Errors
    /// [`HubError::Io`]; [`HubError::Locked`] for a conversion that is running.
    pub fn remove(&self, entry: &Entry) -> Result<u64, HubError> {
        if entry.interrupted
            && File::open(&entry.path).is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
        {
            return Err(HubError::Locked { path: entry.path.clone() });
        }
        let others = self.others(&entry.path);
        let mut freed = self.frees(entry);
        fs::remove_file(&entry.path).map_err(HubError::io(&entry.path, "remove it"))?;
        others.iter().try_for_each(|path| crate::pieces::remove(path))?;
        let whole = VolumeName::parse(&entry.path).map_or_else(|| entry.path.clone(), |name| name.whole());
        let mut beside = vec![with_suffix(&whole, ".counts")];
        let mut partial = with_suffix(&whole, ".partial");
        if entry.interrupted {
            partial.clone_from(&entry.path);
            let kinds = [".journal", ".journal.new", ".states", ".states.new", ".layer"];
            beside.extend(kinds.map(|kind| with_suffix(&partial, kind)));
        }
        // A complete model still has downloads if its conversion was interrupted in the last moment. Downloads of another
        // conversion stay.
        let source = with_suffix(&partial, ".source");
        if source.is_dir() && !partial.exists() {
            for file in fs::read_dir(&source).into_iter().flatten().flatten() {
                freed += file.metadata().map_or(0, |m| occupied(&m));
            }
            fs::remove_dir_all(&source).map_err(HubError::io(&source, "remove it"))?;
        }
        beside.iter().try_for_each(|path| crate::pieces::remove(path))?;
        Ok(freed)
    }

    /// The other volumes of a model, or of what an interrupted conversion has left of one, as far as they belong to it.
    fn others(&self, first: &Path) -> Vec<PathBuf> {
        let is_link = |path: &Path| path.symlink_metadata().is_ok_and(|found| found.is_symlink());
        if let Some(name) = VolumeName::parse(first) {
            let mut beside: Vec<PathBuf> = (1..name.count()).map(|volume| name.path_of(volume)).collect();
            if is_link(first) {
                beside.retain(|path| is_link(path));
                return beside;
            }
            // Of a first volume that cannot be read, what lies beside it under its name.
            let Ok(volume) = Volume::open(first) else { return beside };
            let mut own = volume.own_others();
            // So it is with a volume that is damaged, while one that belongs to another model stays.
            beside.retain(|path| {
                let is_found = own.iter().any(|own| own.file_name() == path.file_name());
                !is_found && path.symlink_metadata().is_ok() && Volume::open(path).is_err()
            });
            own.extend(beside);
            return own;
        }
        let is_interrupted = first.extension().is_some_and(|extension| extension == "partial");
        if !is_interrupted || is_link(first) {
            return Vec::new();
        }
        let elsewhere = sluice_converter::left_elsewhere(&first.with_extension(""));
        if !elsewhere.is_empty() {
            // What has the name of another volume in this folder is of another conversion.
            return elsewhere;
        }
        let first = first.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let is_other = |name: &String| {
            let digits = name.strip_prefix(&first).and_then(|rest| rest.strip_prefix('-'));
            digits.is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit()))
        };
        self.names().into_iter().filter(is_other).map(|name| self.folder.join(name)).collect()
    }

    /// Names of the files in the folder, sorted.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }
}

/// The name of the file if its model were one file; `None` for volumes after the first.
fn whole_name(name: &str) -> Option<String> {
    match VolumeName::parse(Path::new(name)) {
        None => Some(name.to_owned()),
        Some(volume) if volume.volume() == 0 => Some(volume.whole().to_string_lossy().into_owned()),
        Some(_) => None,
    }
}

/// Bytes that a file takes on its drive.
fn occupied(found: &fs::Metadata) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    found.len().min(found.blocks() * 512)
}

/// Whether a text has the form in which [`Models::path`] writes types.
fn is_types(text: &str) -> bool {
    let is_type = |word: &str| word.len() <= 8 && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    text.split('-').all(is_type)
}

/// The name of the file of a reference, without types.
fn stem(reference: &Reference) -> String {
    let mut stem = reference.repo.replace('/', SLASH);
    if let Some(revision) = &reference.revision {
        stem += &format!("@{}", plain(revision));
    }
    if let Some(part) = &reference.part {
        stem += &format!("{PLUS}{}", plain(part));
    }
    stem
}

/// A text without characters that names of files cannot have.
fn plain(text: &str) -> String {
    text.replace(['/', PLUS], "_")
}

/// The name on the hub from which a file was made.
fn name_of(stem: &str) -> String {
    let as_reference = || {
        let (name, rest) = stem.split_once(PLUS).map_or((stem, None), |(name, rest)| (name, Some(rest)));
        let text =
            format!("{PREFIX}{}{}", name.replacen(SLASH, "/", 1), rest.map(|r| format!(":{r}")).unwrap_or_default());
        text.parse::<Reference>().ok().filter(|r| r.repo.contains('/')).map(|_| text)
    };
    as_reference().unwrap_or_else(|| stem.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_where_variables_say() {
        let of = |variables: &[(&str, &str)]| {
            Models::from(&|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| PathBuf::from(value)))
        };
        assert_eq!(of(&[("SLUICE_HOME", "/s"), ("HOME", "/h")]).unwrap().folder(), Path::new("/s/models"));
        assert_eq!(of(&[("XDG_DATA_HOME", "/d"), ("HOME", "/h")]).unwrap().folder(), Path::new("/d/sluice/models"));
        assert!(of(&[("HOME", "/h")]).unwrap().folder().ends_with("sluice/models"));
        assert!(matches!(of(&[]), Err(HubError::Setting { .. })));
        let folder = tempfile::tempdir().unwrap();
        let models = of(&[("SLUICE_HOME", folder.path().to_str().unwrap())]).unwrap();
        models.check().unwrap();
        fs::write(models.folder(), "no folder").unwrap();
        assert!(matches!(models.check(), Err(HubError::Io { .. })));
    }

    #[test]
    fn a_short_name_is_enough() {
        let folder = tempfile::tempdir().unwrap();
        let models = Models { folder: folder.path().to_owned() };
        for name in ["a/b", "a/b-c", "a/b:Q4_K_M", "e/f:Q8_0"] {
            fs::write(models.path(&name.parse().unwrap(), None), "x").unwrap();
        }
        fs::write(folder.path().join("mine.sluice"), "x").unwrap();
        fs::write(folder.path().join("a--d.sluice.partial"), "x").unwrap();
        let called = |name: &str| models.called(name).into_iter().map(|e| e.name).collect::<Vec<_>>().join(" ");
        for (name, found) in [
            ("mine", "mine"),
            ("mine.sluice", "mine"),
            ("b", "hf:a/b"),
            ("b-c", "hf:a/b-c"),
            ("b:Q4_K_M", "hf:a/b:Q4_K_M"),
            ("f", "hf:e/f:Q8_0"),
            ("d", ""),
            ("none", ""),
        ] {
            assert_eq!(called(name), found, "{name}");
        }
    }

    #[test]
    fn names_lead_to_files_and_back() {
        let folder = tempfile::tempdir().unwrap();
        let models = Models { folder: folder.path().to_owned() };
        let of = |text: &str, types| models.path(&text.parse().unwrap(), types);
        for (text, types) in [
            ("a/b", None),
            ("a/b", Some("q4-q8")),
            ("a/b-c", None),
            ("a/b@v2", None),
            ("a/b:Q4_K_M", None),
            ("a/b@refs/pr/1:x.gguf", Some("q8")),
        ] {
            fs::write(of(text, types), "x").unwrap();
        }
        fs::write(folder.path().join("mine.sluice"), "x").unwrap();
        fs::write(folder.path().join("a--d.sluice.partial"), "x").unwrap();
        for beside in ["journal", "states", "states.new", "layer"] {
            fs::write(folder.path().join(format!("a--d.sluice.partial.{beside}")), "x").unwrap();
        }
        fs::create_dir(folder.path().join("a--d.sluice.partial.source")).unwrap();
        let find = |text: &str| models.find(&text.parse().unwrap());
        assert_eq!(find("a/b"), [of("a/b", None), of("a/b", Some("q4-q8"))]);
        assert_eq!(find("hf:a/b:Q4_K_M"), [of("a/b:Q4_K_M", None)]);
        assert_eq!(find("a/b@v2"), [of("a/b@v2", None)]);
        assert_eq!(find("a/c"), [] as [PathBuf; 0]);
        let names: Vec<String> = models.list().into_iter().map(|e| e.name).collect();
        let expected = [
            "hf:a/b",
            "hf:a/b-c",
            "hf:a/b:Q4_K_M",
            "hf:a/b:q4-q8",
            "hf:a/b@refs_pr_1:x.gguf+q8",
            "hf:a/b@v2",
            "hf:a/d",
            "mine",
        ];
        assert_eq!(names, expected);
        assert_eq!(models.named("a/b").len(), 1);
        assert_eq!(models.named("mine").len(), 1);
        let [left] = &models.named("hf:a/d")[..] else { panic!("one is there") };
        assert!(left.interrupted);
        let running = File::open(&left.path).unwrap();
        running.lock().unwrap();
        assert!(matches!(models.remove(left), Err(HubError::Locked { .. })));
        drop(running);
        models.remove(left).unwrap();
        // Several models of one name are told apart by their files.
        for other in ["mine-00001-of-00002.sluice", "mine-00002-of-00002.sluice"] {
            fs::write(folder.path().join(other), "x").unwrap();
        }
        assert_eq!(models.named("mine").len(), 2);
        for one in ["mine.sluice", "mine-00001-of-00002.sluice"] {
            let path = folder.path().join(one);
            for name in [one, path.to_str().unwrap()] {
                let named = models.named(name);
                assert!(matches!(&named[..], [entry] if entry.path == path), "{name}: {named:?}");
            }
        }
        // A conversion that was interrupted when only its downloads remained.
        fs::write(folder.path().join("a--d.sluice"), "x").unwrap();
        fs::create_dir(folder.path().join("a--d.sluice.partial.source")).unwrap();
        models.remove(&models.named("hf:a/d")[0]).unwrap();
        assert!(
            fs::read_dir(folder.path()).unwrap().all(|e| !e.unwrap().file_name().to_str().unwrap().starts_with("a--d"))
        );
    }
}
