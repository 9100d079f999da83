//! A file with which to measure a drive that has no model file yet.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use sluice_format::Syncer;

use super::{BenchError, splitmix};

/// Bytes of a scratch file when nothing else is asked for: more than the memory of most drives.
pub const DEFAULT_BYTES: u64 = 2 << 30;

/// Fewest bytes of a scratch file: a smaller one has too few places for random reads.
pub const LEAST_BYTES: u64 = 64 << 20;

/// Bytes written at a time.
const PIECE_BYTES: usize = 4 << 20;

/// A file full of noise that has no name: however the program ends, the system takes the file back.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    file: File,
}

impl Scratch {
    /// Makes a scratch file at `path`, which must not exist, and removes the name again before the first byte is
    /// written. The file has `bytes` of noise that no drive can compress, on the drive and not in the page cache.
    /// Without `bytes`, [`DEFAULT_BYTES`], or half of the free space if that is less. `progress` hears of bytes
    /// written and the whole.
    ///
    /// # Errors
    /// [`BenchError::ScratchSize`] if `bytes` are less than [`LEAST_BYTES`], [`BenchError::Unsuitable`] if there is too
    /// little space, [`BenchError::Scratch`].
    pub fn create(path: &Path, bytes: Option<u64>, progress: &mut dyn FnMut(u64, u64)) -> Result<Scratch, BenchError> {
        if let Some(bytes) = bytes.filter(|bytes| *bytes < LEAST_BYTES) {
            return Err(BenchError::ScratchSize { bytes });
        }
        let failed = |action| {
            let path = path.to_owned();
            move |source| BenchError::Scratch { path, action, source }
        };
        // Readable too: on some systems, opening it once more gives no more rights than this descriptor has.
        let mut file = File::options().read(true).write(true).create_new(true).open(path).map_err(failed("create"))?;
        fs::remove_file(path).map_err(failed("take its name from"))?;
        let free = free_bytes(&file).unwrap_or(u64::MAX);
        let bytes = bytes.unwrap_or(DEFAULT_BYTES.min(free / 2));
        let reason = match bytes {
            _ if bytes > free => format!("{bytes} bytes are requested, {free} are free. Give a smaller --size"),
            _ if bytes < LEAST_BYTES => format!(
                "a scratch file takes half of the free space at most, which is {bytes} bytes: {LEAST_BYTES} are needed. \
                 Free some space"
            ),
            _ => {
                write_noise(&mut file, bytes, progress).map_err(failed("write"))?;
                Syncer::default().all(&file).map_err(failed("write"))?;
                forget_pages(&file);
                return Ok(Scratch { path: path.to_owned(), file });
            }
        };
        Err(BenchError::Unsuitable { path: path.to_owned(), reason })
    }

    /// Where it was made, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path that opens the file while this value lives.
    pub(super) fn handle(&self) -> PathBuf {
        // Not `/dev/fd` on Linux, which is a link that some containers lack.
        let folder = if cfg!(target_os = "linux") { "/proc/self/fd" } else { "/dev/fd" };
        Path::new(folder).join(self.file.as_raw_fd().to_string())
    }
}

fn write_noise(file: &mut File, bytes: u64, progress: &mut dyn FnMut(u64, u64)) -> std::io::Result<()> {
    let mut state = 0;
    let mut piece = vec![0; PIECE_BYTES];
    let mut written = 0;
    while written < bytes {
        for word in piece.as_chunks_mut::<8>().0 {
            *word = splitmix(&mut state).to_le_bytes();
        }
        let len = PIECE_BYTES.min(usize::try_from(bytes - written).unwrap_or(PIECE_BYTES));
        file.write_all(&piece[..len])?;
        written += len as u64;
        progress(written, bytes);
    }
    Ok(())
}

/// Bytes that an ordinary user may still write.
fn free_bytes(file: &File) -> Option<u64> {
    let fs = nix::sys::statvfs::fstatvfs(file).ok()?;
    (fs.blocks_available() as u64).checked_mul(fs.fragment_size() as u64)
}

/// Drops the file's pages from the page cache. The proof notices pages that stay.
pub(super) fn forget_pages(file: &File) {
    #[cfg(target_os = "linux")]
    {
        use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
        let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = file;
}
