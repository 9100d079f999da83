//! Reads files of this machine: cached bytes from the page cache, others from the drive, bypassing the cache.
//!
//! This is the fastest way to read cold files (`docs/notes/2026-11-30-benchmarks.md`), and data that is read only once should not
//! evict the pages of other programs. What has just been downloaded is still in memory, and comes from there.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use sluice_format::open_regular;

use super::Stamp;
use crate::error::ConvertError;

/// Reads shorter than this use the page cache and leave their pages there, because neighbours may share them.
const LARGE: usize = 256 << 10;
/// Bytes per read that bypasses the cache.
const WINDOW: usize = 4 << 20;
/// Drives require offsets and lengths to be multiples of this.
const ALIGN: usize = 4096;

/// A file opened for reading.
#[derive(Debug)]
pub(crate) struct LocalFile {
    file: File,
    /// The same file, opened to bypass the cache, if the filesystem allows that.
    direct: Option<File>,
    /// Whether the filesystem turned out not to allow it.
    refused: AtomicBool,
}

impl LocalFile {
    /// Opens a regular file; returns it with its identity and its length.
    pub(crate) fn open(path: &Path) -> Result<(Self, Stamp, u64), ConvertError> {
        let file = open_regular(path).map_err(ConvertError::io(path, "open it"))?;
        // First of all, so that every change from here on is noticed.
        let stamp = Stamp::settled(&file).map_err(ConvertError::io(path, "read its state"))?;
        let len = file.metadata().map_err(ConvertError::io(path, "read its length"))?.len();
        let direct = open_direct(path, &file);
        Ok((LocalFile { file, direct, refused: AtomicBool::new(false) }, stamp, len))
    }

    /// Its current identity.
    pub(crate) fn stamp(&self) -> io::Result<Stamp> {
        Stamp::of(&self.file)
    }

    /// Fills `out` from byte `at` on. A file that has become shorter is not damaged: another program is writing to it.
    pub(crate) fn read_at(&self, path: &Path, at: u64, out: &mut [u8]) -> Result<(), ConvertError> {
        self.read(at, out).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => ConvertError::SourceChanged { path: path.to_owned() },
            _ => ConvertError::io(path, "read its weights")(e),
        })
    }

    fn read(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        let Some(direct) = self.direct.as_ref().filter(|_| out.len() >= LARGE && !self.is_refused()) else {
            self.file.read_exact_at(out, at)?;
            drop_behind(&self.file, at, out.len());
            return Ok(());
        };
        let cached = read_cached(&self.file, at, out);
        drop_behind(&self.file, at, cached);
        let (at, rest) = (at + cached as u64, &mut out[cached..]);
        match read_direct(direct, at, rest) {
            // Some filesystems open such files but do not read them.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                self.refused.store(true, Ordering::Relaxed);
                self.file.read_exact_at(rest, at)
            }
            other => other,
        }
    }

    fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }
}

/// Opens an open file again, to bypass the cache.
#[cfg(target_os = "linux")]
fn open_direct(path: &Path, file: &File) -> Option<File> {
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

    use nix::fcntl::OFlag;
    // Without blocking, in case a pipe has taken the name.
    let flags = OFlag::O_DIRECT | OFlag::O_NONBLOCK;
    let direct = File::options().read(true).custom_flags(flags.bits()).open(path).ok()?;
    // Another file may have taken its name since then.
    let [a, b] = [file, &direct].map(|f| f.metadata().ok().map(|m| (m.dev(), m.ino())));
    (a.is_some() && a == b).then_some(direct)
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_path: &Path, _file: &File) -> Option<File> {
    None
}

/// Fills the beginning of `out`, up to the first byte that is not in the page cache, from byte `at` on; returns how much.
#[cfg(target_os = "linux")]
fn read_cached(file: &File, at: u64, out: &mut [u8]) -> usize {
    use rustix::io::{ReadWriteFlags, preadv2};
    let mut done = 0;
    while done < out.len() {
        let mut rest = [io::IoSliceMut::new(&mut out[done..])];
        match preadv2(file, &mut rest, at + done as u64, ReadWriteFlags::NOWAIT) {
            Ok(read) if read > 0 => done += read,
            _ => break,
        }
    }
    done
}

#[cfg(not(target_os = "linux"))]
fn read_cached(_file: &File, _at: u64, _out: &mut [u8]) -> usize {
    0
}

/// Fills `out`, bypassing the cache, through memory with the alignment that drives require.
fn read_direct(file: &File, at: u64, out: &mut [u8]) -> io::Result<()> {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    BUFFER.with_borrow_mut(|buffer| {
        if out.is_empty() {
            return Ok(());
        }
        buffer.resize(WINDOW + 2 * ALIGN, 0);
        let start = buffer.as_ptr().align_offset(ALIGN);
        let window = &mut buffer[start..][..WINDOW];
        let mut done = 0;
        while done < out.len() {
            let from = at + done as u64;
            let before = (from % ALIGN as u64) as usize;
            let wanted = (WINDOW - before).min(out.len() - done);
            let len = (before + wanted).next_multiple_of(ALIGN);
            let read = read_some(file, &mut window[..len], from - before as u64)?;
            if read <= before {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let got = wanted.min(read - before);
            out[done..][..got].copy_from_slice(&window[before..][..got]);
            done += got;
        }
        Ok(())
    })
}

fn read_some(file: &File, out: &mut [u8], at: u64) -> io::Result<usize> {
    loop {
        match file.read_at(out, at) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// What has been converted is not read again: its pages would only evict those of other programs.
#[cfg(target_os = "linux")]
fn drop_behind(file: &File, offset: u64, len: usize) {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    if len >= LARGE {
        // This is advice: if the system does not follow it, only cache is lost.
        let _ = posix_fadvise(file, offset as i64, len as i64, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

#[cfg(not(target_os = "linux"))]
fn drop_behind(_file: &File, _offset: u64, _len: usize) {}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Every range can be read from every offset, cached or not; missing bytes are an error.
    #[test]
    fn every_part_of_a_file_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let content: Vec<u8> = (0..3 * WINDOW + 777).map(|i| (i * 7 + i / 1001) as u8).collect();
        fs::write(&path, &content).unwrap();
        let (file, stamp, len) = LocalFile::open(&path).unwrap();
        assert_eq!((len, file.stamp().unwrap()), (content.len() as u64, stamp));
        let all = content.len();
        let parts =
            [(0, all), (0, LARGE), (1, LARGE), (4095, WINDOW), (5, 10), (all - LARGE, LARGE), (WINDOW, 2 * WINDOW)];
        for cold in [false, true] {
            for (at, len) in parts {
                if cold {
                    file.file.sync_all().unwrap();
                    drop_behind(&file.file, 0, all);
                }
                let mut out = vec![0; len];
                file.read_at(&path, at as u64, &mut out).unwrap();
                assert!(out == content[at..at + len], "{at}, {len}");
                if let Some(direct) = &file.direct {
                    out.fill(0);
                    read_direct(direct, at as u64, &mut out).unwrap();
                    assert!(out == content[at..at + len], "{at}, {len}, past the cache");
                }
            }
        }
        File::options().write(true).open(&path).unwrap().set_len(2 * WINDOW as u64).unwrap();
        for len in [10, LARGE, all] {
            let mut out = vec![0; len];
            let error = file.read_at(&path, (all - len) as u64, &mut out).unwrap_err();
            assert!(matches!(error, ConvertError::SourceChanged { .. }), "{error}");
        }
    }
}
