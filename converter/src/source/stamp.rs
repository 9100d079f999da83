//! The identity of a file in its filesystem, to notice that it is not the one that was read before.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Times of files advance in ticks of the kernel's clock, at most 10 ms apart. If a file was changed less than this long ago,
/// another change might not show.
const SETTLED: Duration = Duration::from_millis(20);
/// Attempts to find a file that is not being changed. After these, every change shows anyway, because each one was seen.
const ATTEMPTS: usize = 3;

/// The identity of a file: its filesystem's number and its own, its length, and when its content and its state last changed.
/// Ordinary means cannot set back a file's `ctime`, so equal stamps mean equal bytes. Files on other machines are identified by the
/// digest of their content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp([i64; 7]);

impl Stamp {
    /// Bytes of a stamp in the journal.
    pub(crate) const LEN: usize = 7 * 8;

    /// The current stamp of an open file.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let m = file.metadata()?;
        let numbers = [m.dev() as i64, m.ino() as i64, m.len() as i64];
        let [dev, ino, len] = numbers;
        Ok(Stamp([dev, ino, len, m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()]))
    }

    /// The stamp of an open file, such that the stamp after any later change differs. Waits a moment if the file has just been
    /// written.
    pub(crate) fn settled(file: &File) -> io::Result<Self> {
        let mut stamp = Self::of(file)?;
        for _ in 0..ATTEMPTS {
            let Some(age) = stamp.age().filter(|age| *age < SETTLED) else { break };
            sleep(SETTLED - age);
            stamp = Self::of(file)?;
        }
        Ok(stamp)
    }

    /// Time since the last change; `None` for a future time, which can only come from another machine's clock.
    fn age(&self) -> Option<Duration> {
        let (seconds, nanos) = (u64::try_from(self.0[5]).ok()?, u32::try_from(self.0[6]).ok()?);
        let changed = UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))?;
        SystemTime::now().duration_since(changed).ok()
    }

    /// The stamp of a file that is identified by its length and a SHA-256 of all its bytes, or of something that determines them.
    pub fn of_content(len: u64, sha256: &[u8; 32]) -> Self {
        // No filesystem has a negative number of this size, so this cannot be a file of a folder.
        let mut numbers = [i64::MIN, 0, 0, 0, 0, len as i64, 0];
        let words = sha256.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b));
        numbers[1..5].iter_mut().zip(words).for_each(|(slot, word)| *slot = word);
        Stamp(numbers)
    }

    /// Bytes for the journal.
    pub(crate) fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes.as_chunks_mut::<8>().0.iter_mut().zip(self.0).for_each(|(slot, n)| *slot = n.to_le_bytes());
        bytes
    }

    /// A stamp from the journal.
    pub(crate) fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let mut numbers = [0; 7];
        bytes.as_chunks::<8>().0.iter().zip(&mut numbers).for_each(|(b, n)| *n = i64::from_le_bytes(*b));
        Stamp(numbers)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn every_change_shows_even_with_the_old_times() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        fs::write(&path, "content").unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        for round in 0..5 {
            let before = Stamp::settled(&file).unwrap();
            assert_eq!(Stamp::from_bytes(&before.to_bytes()), before);
            assert_eq!(Stamp::of(&file).unwrap(), before);
            let modified = file.metadata().unwrap().modified().unwrap();
            file.write_all_at(b"CONTENT", 0).unwrap();
            file.set_modified(modified).unwrap();
            assert_ne!(Stamp::of(&file).unwrap(), before, "round {round}");
        }
        let before = Stamp::settled(&file).unwrap();
        fs::write(folder.path().join("g"), "content").unwrap();
        fs::rename(folder.path().join("g"), &path).unwrap();
        assert_ne!(Stamp::of(&file).unwrap(), before, "the replaced file has lost its name");
        assert_ne!(Stamp::of(&File::open(&path).unwrap()).unwrap(), before);
    }
}
