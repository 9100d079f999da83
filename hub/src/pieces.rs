//! A file that is being downloaded: `NAME.partial` has the pieces that have arrived, and `NAME.partial.pieces` lists them.
//!
//! The list of pieces does not vouch for the content. The digest of the whole file decides, whoever wrote the file and
//! whatever a power cut has left of it.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::error::HubError;
use crate::snapshot::RemoteFile;

const MAGIC: [u8; 8] = *b"SLPIECE\x01";
/// Number of a piece, and its complement.
const RECORD: usize = 8;
const SHORTEST: u64 = 64 << 10;
const LONGEST: u64 = 16 << 20;
/// Number of pieces of a file of medium length: enough for all connections.
const PIECES: u64 = 32;

/// Bytes of every piece of a file but the last.
pub(crate) fn piece_len(size: u64) -> u64 {
    (size.div_ceil(PIECES).next_multiple_of(SHORTEST)).clamp(SHORTEST, LONGEST)
}

/// How many pieces a file has.
pub(crate) fn piece_count(size: u64) -> usize {
    size.div_ceil(piece_len(size)) as usize
}

/// First byte and length of a piece.
pub(crate) fn piece(size: u64, number: usize) -> (u64, u64) {
    let first = number as u64 * piece_len(size);
    (first, piece_len(size).min(size - first))
}

/// `path` with a suffix.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The open partial file of a download.
#[derive(Debug)]
pub(crate) struct PartialFile {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    list_path: PathBuf,
    list: File,
    header: Vec<u8>,
}

impl PartialFile {
    /// Opens what an earlier process has left of the download to `target`, or begins anew; returns it with the pieces that it
    /// has.
    pub(crate) fn open(target: &Path, remote: &RemoteFile) -> Result<(Self, Vec<bool>), HubError> {
        let path = with_suffix(target, ".partial");
        let list_path = with_suffix(target, ".partial.pieces");
        for path in [&path, &list_path] {
            refuse_strange(path)?;
        }
        let open = |path: &Path| File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = open(&path).map_err(HubError::io(&path, "create it"))?;
        let list = open(&list_path).map_err(HubError::io(&list_path, "create it"))?;
        let mut bytes = Vec::new();
        let count = piece_count(remote.size);
        let header = header(&remote.digest, remote.size);
        // A list never has more than a few records for each piece.
        let most = (header.len() + RECORD * count * 4) as u64;
        (&list).take(most).read_to_end(&mut bytes).map_err(HubError::io(&list_path, "read it"))?;
        let mut partial = PartialFile { path, file, list_path, list, header };
        let len = partial.file.metadata().map_err(HubError::io(&partial.path, "read its length"))?.len();
        let mut there = vec![false; count];
        match bytes.strip_prefix(partial.header.as_slice()) {
            None => partial.clear()?,
            Some(records) => {
                let numbers = records.chunks_exact(RECORD).map_while(number).take_while(|&number| number < count);
                let mut whole = partial.header.len();
                for number in numbers {
                    let (first, piece_len) = piece(remote.size, number);
                    there[number] = first + piece_len <= len;
                    whole += RECORD;
                }
                // Half a record may follow; it is cut off, and the next record begins there.
                partial.list.set_len(whole as u64).map_err(HubError::io(&partial.list_path, "cut it"))?;
                let end = partial.list.seek(SeekFrom::Start(whole as u64));
                end.map_err(HubError::io(&partial.list_path, "write it"))?;
            }
        }
        Ok((partial, there))
    }

    /// Notes that a piece has arrived.
    pub(crate) fn add(&self, number: usize) -> Result<(), HubError> {
        let mut record = (number as u32).to_le_bytes().to_vec();
        record.extend((!(number as u32)).to_le_bytes());
        (&self.list).write_all(&record).map_err(HubError::io(&self.list_path, "write it"))
    }

    /// Begins anew.
    pub(crate) fn clear(&mut self) -> Result<(), HubError> {
        let action = "empty it";
        // The list comes first: pieces that it names must exist.
        let list = File::create(&self.list_path).map_err(HubError::io(&self.list_path, action))?;
        self.list = list;
        self.file.set_len(0).map_err(HubError::io(&self.path, action))?;
        (&self.list).write_all(&self.header).map_err(HubError::io(&self.list_path, action))
    }

    /// Gives the verified file its name.
    pub(crate) fn finish(&self, target: &Path) -> Result<(), HubError> {
        fs::rename(&self.path, target).map_err(HubError::io(&self.path, "rename it"))?;
        remove(&self.list_path)
    }
}

/// Removes the remains of a download to `target`, if there are any.
pub(crate) fn remove_remains(target: &Path) -> Result<(), HubError> {
    remove(&with_suffix(target, ".partial"))?;
    remove(&with_suffix(target, ".partial.pieces"))
}

/// Removes a file, if it exists.
pub(crate) fn remove(path: &Path) -> Result<(), HubError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(HubError::io(path, "remove it")(e)),
        _ => Ok(()),
    }
}

/// Refuses to write through a link or to a device, which no download has left there.
pub(crate) fn refuse_strange(path: &Path) -> Result<(), HubError> {
    match path.symlink_metadata() {
        Ok(found) if !found.is_file() => Err(HubError::InTheWay {
            path: path.to_owned(),
            problem: "it is no regular file. Remove it, or download to another folder".into(),
        }),
        _ => Ok(()),
    }
}

fn header(digest: &Digest, size: u64) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend(size.to_le_bytes());
    header.extend(piece_len(size).to_le_bytes());
    header.extend(digest.bytes());
    header
}

/// The number in a whole record.
fn number(record: &[u8]) -> Option<usize> {
    let (number, complement) = record.split_first_chunk()?;
    let number = u32::from_le_bytes(*number);
    (u32::from_le_bytes(*complement.first_chunk()?) == !number).then_some(number as usize)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn pieces_cover_a_file() {
        for size in [0, 1, SHORTEST, SHORTEST + 1, 40 << 20, (5 << 30) + 17] {
            let mut next = 0;
            for n in 0..piece_count(size) {
                let (first, len) = piece(size, n);
                assert!(first == next && len > 0, "{size}");
                next = first + len;
            }
            assert_eq!(next, size);
        }
    }

    #[test]
    fn what_an_interruption_leaves_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("f");
        let remote = RemoteFile { path: "f".into(), size: 5 * SHORTEST - 3, digest: Digest::Git([7; 20]) };
        let (partial, there) = PartialFile::open(&target, &remote).unwrap();
        assert_eq!(there, [false; 5]);
        partial.file.write_all_at(&[1; 10], 2 * SHORTEST).unwrap();
        for number in [0, 3] {
            partial.add(number).unwrap();
        }
        drop(partial);
        // Half a record, and a piece beyond the end of the file.
        let list = with_suffix(&target, ".partial.pieces");
        let mut bytes = fs::read(&list).unwrap();
        bytes.extend([4, 0, 0]);
        fs::write(&list, &bytes).unwrap();
        let (partial, there) = PartialFile::open(&target, &remote).unwrap();
        assert_eq!(there, [true, false, false, false, false]);
        partial.file.set_len(2 * SHORTEST).unwrap();
        partial.add(1).unwrap();
        assert_eq!(PartialFile::open(&target, &remote).unwrap().1, [true, true, false, false, false]);
        let other = RemoteFile { digest: Digest::Git([8; 20]), ..remote.clone() };
        assert_eq!(PartialFile::open(&target, &other).unwrap().1, [false; 5]);
        assert_eq!(PartialFile::open(&target, &remote).unwrap().1, [false; 5]);
        fs::remove_file(with_suffix(&target, ".partial")).unwrap();
        std::os::unix::fs::symlink("/dev/null", with_suffix(&target, ".partial")).unwrap();
        assert!(matches!(PartialFile::open(&target, &remote), Err(HubError::InTheWay { .. })));
    }
}
