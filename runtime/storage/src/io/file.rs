//! Opening data files for direct I/O, and proving that it is engaged.
//!
//! Direct I/O moves bytes from the drive straight into slots: no copy through the page cache, and no second copy of
//! the model in it. Not all filesystems support it, and some accept the flag but then use the page cache. So direct
//! I/O is proven when a file is opened. If it is refused, the file is read through the page cache, and the reason is
//! kept for the user.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

#[cfg_attr(not(target_os = "linux"), allow(unused_imports, reason = "elsewhere only comments and tests name it"))]
use super::arena::PAGE_BYTES;
use super::error::{FileInfo, IoError};
use super::sys;

/// Whether to ask for direct I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectMode {
    /// Use it if the filesystem supports it.
    #[default]
    Prefer,
    /// Read through the page cache.
    Never,
}

/// Whether a file is read directly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DirectIo {
    /// Reads bypass the page cache.
    Engaged {
        /// How they do, and how that was proven.
        how: String,
    },
    /// Reads go through the page cache: every byte is copied once more, and the system keeps a
    /// second copy of what fits into memory.
    Refused {
        /// Why.
        reason: String,
    },
}

impl DirectIo {
    /// True if reads bypass the page cache.
    #[must_use]
    pub fn is_engaged(&self) -> bool {
        matches!(self, DirectIo::Engaged { .. })
    }

    fn refused(reason: impl Into<String>) -> Self {
        DirectIo::Refused { reason: reason.into() }
    }
}

impl fmt::Display for DirectIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DirectIo::Engaged { how } => write!(f, "direct ({how})"),
            DirectIo::Refused { reason } => write!(
                f,
                "through the page cache ({reason}); this costs a copy of every byte \
                 and memory outside the budget"
            ),
        }
    }
}

/// A file from which extents are read.
#[derive(Debug)]
pub struct DataFile {
    file: File,
    path: PathBuf,
    len: u64,
    direct: DirectIo,
}

impl DataFile {
    /// Opens a file for reading, directly if `mode` says so and the filesystem supports it.
    ///
    /// # Errors
    /// [`IoError::Open`] if it cannot be opened or read. A filesystem without direct I/O is not an error: see
    /// [`direct`](Self::direct).
    pub fn open(path: &Path, mode: DirectMode) -> Result<DataFile, IoError> {
        Self::open_as(path, path, mode)
    }

    /// Opens the file at `place`, which messages call `path`.
    pub(crate) fn open_as(place: &Path, path: &Path, mode: DirectMode) -> Result<DataFile, IoError> {
        let failed = |source| IoError::Open { path: path.to_owned(), source };
        let buffered = File::open(place).map_err(failed)?;
        let len = buffered.metadata().map_err(failed)?.len();
        let (file, direct) = match mode {
            DirectMode::Never => (buffered, DirectIo::refused("direct I/O is turned off")),
            DirectMode::Prefer => engage(place, buffered, len).map_err(failed)?,
        };
        if !direct.is_engaged() {
            advise_random(&file);
        }
        Ok(DataFile { file, path: path.to_owned(), len, direct })
    }

    /// Whether reads bypass the page cache, and how that is known.
    #[must_use]
    pub fn direct(&self) -> &DirectIo {
        &self.direct
    }

    /// Length in bytes at the time of opening.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True for a file without bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The path as it was given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path and length.
    #[must_use]
    pub fn info(&self) -> FileInfo {
        FileInfo::new(&self.path, self.len)
    }

    /// Reads once at a byte offset; may read less than asked for. With direct I/O, offset,
    /// length and address are multiples of [`PAGE_BYTES`].
    pub(crate) fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(bytes, offset)
    }

    /// The same open file once more, for another engine.
    pub(crate) fn reopen(&self) -> io::Result<DataFile> {
        let Self { file, path, len, direct } = self;
        Ok(DataFile { file: file.try_clone()?, path: path.clone(), len: *len, direct: direct.clone() })
    }

    /// What the filesystem says about the file.
    pub(crate) fn metadata(&self) -> io::Result<std::fs::Metadata> {
        self.file.metadata()
    }

    /// The id of the filesystem; 0 if it has none, or if the system does not tell.
    pub(crate) fn filesystem_id(&self) -> u64 {
        #[allow(clippy::unnecessary_cast, reason = "the type differs between systems")]
        nix::sys::statvfs::fstatvfs(&self.file).map_or(0, |fs| fs.filesystem_id() as u64)
    }

    /// True if the page at `offset`, a multiple of [`PAGE_BYTES`], is in the page cache; `None` if the system does not
    /// tell.
    pub(crate) fn is_cached(&self, offset: u64) -> Option<bool> {
        #[cfg(target_os = "linux")]
        return sys::in_page_cache(&self.file, offset, PAGE_BYTES);
        #[cfg(not(target_os = "linux"))]
        {
            let _ = offset;
            None
        }
    }

    /// Another descriptor of the same open file, for an engine to own.
    #[cfg(target_os = "linux")]
    pub(crate) fn duplicate(&self) -> io::Result<File> {
        self.file.try_clone()
    }
}

#[cfg(target_os = "linux")]
fn advise_random(file: &File) {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    // Without this, the kernel reads ahead past each extent. A refusal costs only speed.
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
}

#[cfg(not(target_os = "linux"))]
fn advise_random(_: &File) {}

/// Turns on direct I/O and proves it; returns the file to use and the verdict.
#[cfg(target_os = "linux")]
fn engage(path: &Path, buffered: File, len: u64) -> io::Result<(File, DirectIo)> {
    use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
    use std::os::unix::fs::OpenOptionsExt;

    if fstatfs(&buffered).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC) {
        return Ok((buffered, DirectIo::refused("tmpfs keeps its files in memory")));
    }
    let mut options = File::options();
    let direct = match options.read(true).custom_flags(libc::O_DIRECT).open(path) {
        Ok(direct) => direct,
        Err(error) if is_refusal(&error) => {
            let reason = "the filesystem does not accept O_DIRECT";
            return Ok((buffered, DirectIo::refused(reason)));
        }
        Err(error) => return Err(error),
    };
    let alignment = sys::direct_alignment(&direct);
    let verdict = match alignment {
        Some(align) if align.offset_bytes == 0 => {
            DirectIo::refused("the filesystem says that this file cannot be read directly")
        }
        Some(align) if align.offset_bytes.max(align.memory_bytes) as usize > PAGE_BYTES => DirectIo::refused(format!(
            "the drive wants reads aligned to {} bytes, the file has {PAGE_BYTES}",
            align.offset_bytes.max(align.memory_bytes)
        )),
        _ => prove(&direct, &buffered, len, alignment)?,
    };
    let file = if verdict.is_engaged() { direct } else { buffered };
    Ok((file, verdict))
}

/// Whether a filesystem uses this error to say that it has no direct I/O: usually `EINVAL`, others in filesystems in user
/// space.
#[cfg(target_os = "linux")]
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS))
}

/// Reads a page directly and looks whether it went through the page cache.
#[cfg(target_os = "linux")]
fn prove(direct: &File, buffered: &File, len: u64, alignment: Option<sys::DirectAlignment>) -> io::Result<DirectIo> {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

    let how = match alignment {
        Some(align) => format!("O_DIRECT, alignment {} bytes", align.offset_bytes),
        None => "O_DIRECT".to_owned(),
    };
    let page = PAGE_BYTES as u64;
    if len < page {
        return Ok(DirectIo::refused("the file is smaller than a page"));
    }
    let mut buffer = ProbePage([0; PAGE_BYTES]);
    // The middle and the end are less likely than the start to be in use by someone else.
    for offset in [len / 2, len - page, 0].map(|at| at / page * page) {
        match direct.read_at(&mut buffer.0, offset) {
            Ok(_) => {}
            Err(error) if is_refusal(&error) => {
                return Ok(DirectIo::refused("the filesystem refuses direct reads of a page"));
            }
            Err(error) => return Err(error),
        }
        // A page that was cached before stays cached: drop it (it is clean after the direct
        // read, which writes dirty pages back first), then see whether a read brings it back.
        let at = libc::off_t::try_from(offset).unwrap_or(0);
        let drop_page = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        let _ = posix_fadvise(buffered, at, PAGE_BYTES as libc::off_t, drop_page);
        if sys::in_page_cache(buffered, offset, PAGE_BYTES) != Some(false) {
            continue;
        }
        direct.read_at(&mut buffer.0, offset)?;
        return Ok(match sys::in_page_cache(buffered, offset, PAGE_BYTES) {
            Some(false) => DirectIo::Engaged { how: format!("{how}; the page cache stays empty") },
            _ => DirectIo::refused("O_DIRECT is accepted, but reads fill the page cache"),
        });
    }
    Ok(DirectIo::Engaged { how: format!("{how}; not proven: the page cache cannot be observed") })
}

/// One page of memory, aligned as direct I/O wants it.
#[cfg(target_os = "linux")]
#[repr(align(4096))]
struct ProbePage([u8; PAGE_BYTES]);

/// Turns off caching of what is read. macOS has no way to prove it.
#[cfg(target_os = "macos")]
fn engage(_: &Path, file: File, _: u64) -> io::Result<(File, DirectIo)> {
    let verdict = match sys::set_no_cache(&file) {
        Ok(()) => DirectIo::Engaged { how: "F_NOCACHE".to_owned() },
        Err(error) => DirectIo::refused(format!("the filesystem refuses F_NOCACHE: {error}")),
    };
    Ok((file, verdict))
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn engage(_: &Path, file: File, _: u64) -> io::Result<(File, DirectIo)> {
    Ok((file, DirectIo::refused("not supported on this system")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn direct_io_is_engaged_or_says_why_not() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), vec![7u8; 64 * PAGE_BYTES]).expect("written");
        let data = DataFile::open(file.path(), DirectMode::Prefer).expect("open");
        let text = data.direct().to_string();
        if data.direct().is_engaged() {
            assert!(text.starts_with("direct ("), "{text}");
        } else {
            assert!(text.starts_with("through the page cache ("), "{text}");
        }
        assert_eq!(data.len(), 64 * PAGE_BYTES as u64);
    }

    #[test]
    fn off_means_off_and_missing_files_are_named() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let data = DataFile::open(file.path(), DirectMode::Never).expect("open");
        assert!(!data.direct().is_engaged() && data.is_empty());
        let error = DataFile::open(Path::new("/nowhere/x.sluice"), DirectMode::Prefer);
        assert!(error.expect_err("missing").to_string().contains("/nowhere/x.sluice"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn tmpfs_is_refused_by_name() {
        let Ok(file) = tempfile::NamedTempFile::new_in("/dev/shm") else {
            return;
        };
        std::fs::write(file.path(), vec![7u8; PAGE_BYTES]).expect("written");
        let data = DataFile::open(file.path(), DirectMode::Prefer).expect("open");
        assert!(data.direct().to_string().contains("tmpfs"), "{}", data.direct());
    }
}
