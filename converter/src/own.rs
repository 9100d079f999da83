//! Files that only this program writes, beside a model file that is being made. One rule for all of them: they are regular files of a
//! single name that begin as such files do; whatever else lies in their places is somebody's, stays as it is, and is said to be in the
//! way where its place is needed.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use sluice_format::{MAGIC, Volume, VolumeName};

use crate::error::ConvertError;
use crate::journal::{Elsewhere, LastWritten};
use crate::upgrade::is_same;
use crate::{journal, states};

/// What a file is, by how it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Own {
    /// A model file, finished or not.
    Model,
    Journal,
    States,
}

impl Own {
    fn magic(self) -> &'static [u8] {
        match self {
            Own::Model => &MAGIC,
            Own::Journal => journal::FAMILY,
            Own::States => states::FAMILY,
        }
    }

    /// Whether a file begins so, as far as it goes. A crash of the machine can leave nothing, or zeros.
    pub(crate) fn is(self, file: &File) -> io::Result<bool> {
        let mut start = vec![0; self.magic().len()];
        let len = file.metadata()?.len().min(start.len() as u64) as usize;
        start.truncate(len);
        file.read_exact_at(&mut start, 0)?;
        Ok(self.magic().starts_with(&start) || start.iter().all(|&byte| byte == 0))
    }
}

/// Opens a file for reading and writing that only this program writes; `None` if there is none and it is not to be created.
/// Never follows a link, nor opens anything but a regular file of a single name: what else is there stays as it is.
pub(crate) fn open_own(path: &Path, create: bool) -> Result<Option<File>, ConvertError> {
    let in_the_way = |problem| Err(ConvertError::InTheWay { path: path.to_owned(), problem });
    match path.symlink_metadata() {
        Ok(found) => {
            if let Some(problem) = obstacle(&found) {
                return in_the_way(problem);
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(ConvertError::io(path, "read its state")(e)),
    }
    // Whatever takes its place in this moment: no link is followed, and no pipe waited for.
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file =
        File::options().read(true).write(true).create(create).truncate(false).custom_flags(flags.bits()).open(path);
    let file = match file {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound && !create => return Ok(None),
        Err(e) => return Err(ConvertError::io(path, if create { "create it" } else { "open it" })(e)),
    };
    let opened = file.metadata().map_err(ConvertError::io(path, "read its state"))?;
    obstacle(&opened).map_or(Ok(Some(file)), in_the_way)
}

/// Why something is no file that this program has made.
fn obstacle(found: &fs::Metadata) -> Option<&'static str> {
    let kind = found.file_type();
    if kind.is_symlink() {
        Some("it is a link, which is not followed")
    } else if kind.is_dir() {
        Some("it is a folder")
    } else if kind.is_fifo() || kind.is_socket() {
        Some("it is a pipe or a socket")
    } else if !kind.is_file() {
        Some("it is a device")
    } else if found.nlink() > 1 {
        Some("it has another name too (a hard link), whose content would change with it")
    } else {
        None
    }
}

/// Whether there is such a file at `path`.
///
/// # Errors
/// [`ConvertError::InTheWay`] if there is something else.
pub(crate) fn check(path: &Path, own: Own) -> Result<bool, ConvertError> {
    let Some(file) = open_own(path, false)? else { return Ok(false) };
    if own.is(&file).map_err(ConvertError::io(path, "read it"))? {
        return Ok(true);
    }
    let problem = "it is not what a conversion leaves when it is interrupted";
    Err(ConvertError::InTheWay { path: path.to_owned(), problem })
}

/// Makes room for such a file at `path`.
///
/// # Errors
/// As [`check`]: only such files are removed.
pub(crate) fn make_room(path: &Path, own: Own) -> Result<(), ConvertError> {
    if check(path, own)? { remove(path) } else { Ok(()) }
}

/// Removes such a file, if there is one that nobody holds; anything else at `path` is in nobody's way, and stays.
pub(crate) fn clear(path: &Path, own: Own) -> Result<(), ConvertError> {
    let Ok(Some(file)) = open_own(path, false) else { return Ok(()) };
    let is_held = matches!(file.try_lock(), Err(TryLockError::WouldBlock));
    if is_held || !own.is(&file).unwrap_or(false) { Ok(()) } else { remove(path) }
}

fn remove(path: &Path) -> Result<(), ConvertError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(ConvertError::io(path, "remove it")(e)),
        _ => Ok(()),
    }
}

/// `path` with something behind its name.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The name under which a file is written that is to take the place of another one as a whole.
pub(crate) fn new_of(path: &Path) -> PathBuf {
    with_suffix(path, ".new")
}

/// Where the partial file of a volume is.
pub(crate) fn partial_path(destination: &Path, volume: usize) -> PathBuf {
    match volume {
        0 => with_suffix(destination, ".partial"),
        volume => with_suffix(destination, &format!("{VOLUME}{:05}", volume + 1)),
    }
}

/// What the number of a volume behind the first follows.
const VOLUME: &str = ".partial-";

/// Where the partial file of a volume is that lies in another folder than the first. Conversions of one name to different places can share
/// that folder: `id` tells their files apart.
pub(crate) fn partial_elsewhere(destination: &Path, folder: &Path, volume: usize, id: u64) -> PathBuf {
    let beside = with_suffix(&partial_path(destination, volume), &format!("-{id:016x}"));
    folder.join(beside.file_name().unwrap_or_default())
}

/// Where the journal is.
pub(crate) fn journal_path(destination: &Path) -> PathBuf {
    with_suffix(destination, ".partial.journal")
}

/// Where measuring keeps what it goes on with.
pub(crate) fn states_path(destination: &Path) -> PathBuf {
    with_suffix(destination, ".partial.states")
}

/// Where the file of a layer is while it is measured.
pub(crate) fn layer_path(destination: &Path) -> PathBuf {
    with_suffix(destination, ".partial.layer")
}

/// No partial file beside the first is one too many: where a model is striped, its others are in other folders, and what has the name of one
/// in this folder is of another conversion.
pub(crate) const ANY: usize = usize::MAX;

/// Files that any conversion to `destination` may have left and that are of no use to another one of `volumes` volumes: those that
/// were to take the place of others, the file of a layer, and partial files of further volumes.
fn idle(destination: &Path, volumes: usize) -> Vec<(PathBuf, Own)> {
    let mut files = vec![
        (layer_path(destination), Own::Model),
        (new_of(&states_path(destination)), Own::States),
        (new_of(&journal_path(destination)), Own::Journal),
    ];
    let name = destination.file_name().unwrap_or_default().as_encoded_bytes();
    for entry in fs::read_dir(folder_of(destination)).into_iter().flatten().flatten() {
        let found = entry.file_name();
        let rest = found.as_encoded_bytes().strip_prefix(name).and_then(|rest| rest.strip_prefix(VOLUME.as_bytes()));
        let number = rest.filter(|rest| rest.len() == 5).and_then(|rest| std::str::from_utf8(rest).ok()?.parse().ok());
        if number.is_some_and(|number: usize| number > volumes.max(1)) {
            files.push((folder_of(destination).join(found), Own::Model));
        }
    }
    files
}

/// Removes what conversions to `destination` have left that is of no use to one of `volumes` volumes, whose first partial file the caller
/// has locked. For a striped model this is [`ANY`].
pub(crate) fn clear_idle(destination: &Path, volumes: usize) -> Result<(), ConvertError> {
    idle(destination, volumes).into_iter().try_for_each(|(path, own)| clear(&path, own))
}

/// Files of a striped model that was interrupted on its way to `destination` and left them in other folders, as far as its journal says
/// where: partial files, and volumes that had got their names already, before the first one had.
pub fn left_elsewhere(destination: &Path) -> Vec<PathBuf> {
    let Some(Elsewhere { id, folders }) = journal::elsewhere_at(&journal_path(destination)) else { return Vec::new() };
    let count = folders.len() + 1;
    let name = VolumeName::first_of(&whole_of(destination), u16::try_from(count).unwrap_or(u16::MAX));
    let first = Volume::open(&partial_path(destination, 0)).ok();
    let finished = journal::named_at(&journal_path(destination), count).unwrap_or_default();
    let left = |(folder, volume): (&PathBuf, u16)| {
        let partial = partial_elsewhere(destination, folder, usize::from(volume), id);
        if matches!(check(&partial, Own::Model), Ok(true)) {
            return Some(partial);
        }
        let named = folder.join(name.path_of(volume).file_name().unwrap_or_default());
        first.as_ref().is_some_and(|first| is_twin(first, &named, usize::from(volume), &finished)).then_some(named)
    };
    folders.iter().zip(1..).filter_map(left).collect()
}

/// Whether the file at `path` is a finished volume of the model whose first volume, finished as well, is `first`, and which the journal
/// says to have `finished` volumes behind it: it repeats the tables, and was last written then. Tables alone do not tell copies of a model
/// apart.
pub(crate) fn is_twin(first: &Volume, path: &Path, volume: usize, finished: &[LastWritten]) -> bool {
    let is_it = |found: &Volume| {
        let sb = found.superblock();
        (usize::from(sb.volume), usize::from(sb.volume_count)) == (volume, finished.len() + 1)
            && tables_of(found) == tables_of(first)
    };
    let written = path.symlink_metadata().ok().filter(|found| found.is_file()).map(|found| LastWritten::of(&found));
    let is_named = written.is_some() && written.as_ref() == volume.checked_sub(1).and_then(|at| finished.get(at));
    is_named && Volume::open(path).is_ok_and(|found| is_it(&found))
}

/// The checksums of the tables that each volume of a model repeats.
pub(crate) fn tables_of(volume: &Volume) -> [u64; 2] {
    [volume.superblock().extents, volume.superblock().tensors].map(|table| table.checksum)
}

/// The name that a model has as one file.
pub(crate) fn whole_of(path: &Path) -> PathBuf {
    VolumeName::parse(path).map_or_else(|| path.to_owned(), |name| name.whole())
}

/// Removes them, except for those that are `used` further on; returns which were there.
pub(crate) fn clear_elsewhere(destination: &Path, used: &[PathBuf]) -> Vec<PathBuf> {
    let mut left = left_elsewhere(destination);
    left.retain(|path| !used.iter().any(|used| is_same(used, path)));
    // What cannot be removed is in nobody's way.
    left.retain(|path| clear(path, Own::Model).is_ok() && path.symlink_metadata().is_err());
    left
}

/// Partial files in the folders of a striped model that are of another conversion by the same name: one to other folders, or to these in
/// another order. `used`: those of this conversion, of which the first is beside `destination`.
pub(crate) fn of_others(destination: &Path, used: &[PathBuf]) -> Vec<PathBuf> {
    let name = destination.file_name().unwrap_or_default();
    let is_volume = |rest: &[u8]| {
        let Some((number, id)) = rest.split_at_checked(5) else { return false };
        let is_id = |id: &[u8]| id.len() == 17 && id[0] == b'-' && id[1..].iter().all(u8::is_ascii_hexdigit);
        number.iter().all(u8::is_ascii_digit) && (id.is_empty() || is_id(id))
    };
    let is_partial = |found: &OsStr| {
        let rest = found.as_encoded_bytes().strip_prefix(name.as_encoded_bytes());
        let volume = rest.and_then(|rest| rest.strip_prefix(VOLUME.as_bytes()));
        rest == Some(b".partial".as_slice()) || volume.is_some_and(is_volume)
    };
    let mut found = Vec::new();
    for folder in used.iter().map(|path| folder_of(path)) {
        let names = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
        let paths = names.filter(|name| is_partial(name)).map(|name| folder.join(name));
        let is_used = |path: &Path| used.iter().any(|used| is_same(used, path));
        found.extend(paths.filter(|path| !is_used(path) && matches!(check(path, Own::Model), Ok(true))));
    }
    found.sort();
    found
}

/// Removes everything that conversions to `destination` have left beside its first partial file; the journal last, since it says whose
/// the others are.
pub(crate) fn clear_all(destination: &Path, is_striped: bool) -> Result<(), ConvertError> {
    clear_idle(destination, if is_striped { ANY } else { 0 })?;
    clear(&states_path(destination), Own::States)?;
    clear(&journal_path(destination), Own::Journal)
}

/// The folder that a file is in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
