//! What the eviction policy has learned; it is kept beside the model, so that the next start begins warm.
//!
//! The file is `MODEL.counts`, and `NAME.sluice.counts` also for volumes. It consists of a magic (8 bytes), the state id of the
//! model (16), the length of the counts (u64), the counts, and the xxh3-64 of everything before it, little-endian. It only ever
//! changes speed: a file that is missing, damaged or of another model is ignored.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sluice_checksum::xxh3_64;
use sluice_format::{StateId, VolumeName, may_replace, open_regular, remove_leftovers, replace_file};

const MAGIC: [u8; 8] = *b"SLCOUNT1";
/// Bytes of a state id.
const STATE_ID_LEN: usize = 16;
const HEADER: usize = MAGIC.len() + STATE_ID_LEN + 8;
/// Longest counts that are read: a trillion-parameter model has 23,000 experts, with a few numbers each.
const MAX_COUNTS: usize = 64 << 20;

/// Path of the counts of a model. A model in volumes has the path that it would have as one file, because it may become one again.
pub fn path_of(model: &Path) -> PathBuf {
    let whole = VolumeName::parse(model).map_or_else(|| model.to_owned(), |name| name.whole());
    let mut name = whole.into_os_string();
    name.push(".counts");
    name.into()
}

/// Copies what was learned of a model for the copy of the model at `to`, unless that has counts already. Removes what is left there of
/// programs that were killed while they saved counts.
///
/// # Errors
/// As [`save`].
pub fn carry(from: &Path, to: &Path, id: StateId) -> io::Result<()> {
    remove_leftovers(&path_of(to), &MAGIC);
    match load(from, id) {
        Some(counts) if load(to, id).is_none() => save(to, id, &counts),
        _ => Ok(()),
    }
}

/// Reads the counts of a model; `None` if there are none that can be trusted.
pub fn load(model: &Path, id: StateId) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = (HEADER + MAX_COUNTS + 8) as u64;
    open_regular(&path_of(model)).ok()?.take(limit).read_to_end(&mut bytes).ok()?;
    let (content, sum) = bytes.split_last_chunk::<8>()?;
    if xxh3_64(content) != u64::from_le_bytes(*sum) || content.len() < HEADER {
        return None;
    }
    let (header, counts) = content.split_at(HEADER);
    let len = u64::try_from(counts.len()).ok()?;
    let expected = [&MAGIC[..], &id.0, &len.to_le_bytes()].concat();
    (header == expected).then(|| counts.to_vec())
}

/// Writes the counts of a model, atomically: a reader sees the old ones or the new ones. Only counts are replaced.
///
/// # Errors
/// The filesystem's error, for instance that the folder cannot be written; [`io::ErrorKind::AlreadyExists`] if something else is in
/// the place of the counts.
pub fn save(model: &Path, id: StateId, counts: &[u8]) -> io::Result<()> {
    let mut bytes = [&MAGIC[..], &id.0, &(counts.len() as u64).to_le_bytes(), counts].concat();
    bytes.extend(xxh3_64(&bytes).to_le_bytes());
    let path = path_of(model);
    if !may_replace(&path, &MAGIC)? {
        let problem = format!("{} is there already and is something else", path.display());
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, problem));
    }
    replace_file(&path, &bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_not_counts_is_neither_waited_for_nor_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("m.sluice");
        let (id, path) = (StateId([7; STATE_ID_LEN]), path_of(&model));
        fs::write(&path, "my own list").unwrap();
        assert_eq!(load(&model, id), None);
        assert_eq!(save(&model, id, b"c").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"my own list");

        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(load(&model, id), None);
        assert_eq!(save(&model, id, b"c").unwrap_err().kind(), io::ErrorKind::AlreadyExists);

        fs::remove_file(&path).unwrap();
        let precious = folder.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        for link in [path.clone(), folder.path().join(format!("m.sluice.counts.{}", std::process::id()))] {
            std::os::unix::fs::symlink(&precious, link).unwrap();
        }
        save(&model, id, b"c").unwrap();
        assert_eq!(load(&model, id).as_deref(), Some(&b"c"[..]));
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
    }

    #[test]
    fn counts_go_with_the_model() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let id = StateId([7; STATE_ID_LEN]);
        save(&at("m.sluice"), id, b"learned").unwrap();
        // Counts carry over to volumes in the same place, and back.
        assert_eq!(load(&at("m-00001-of-00003.sluice"), id).as_deref(), Some(&b"learned"[..]));
        carry(&at("m-00001-of-00003.sluice"), &at("copy.sluice"), id).unwrap();
        assert_eq!(load(&at("copy.sluice"), id).as_deref(), Some(&b"learned"[..]));
        // What is known of the copy counts; what is of another model does not, and nothing is no error.
        save(&at("copy.sluice"), id, b"more").unwrap();
        carry(&at("m.sluice"), &at("copy.sluice"), id).unwrap();
        assert_eq!(load(&at("copy.sluice"), id).as_deref(), Some(&b"more"[..]));
        carry(&at("m.sluice"), &at("other.sluice"), StateId([8; STATE_ID_LEN])).unwrap();
        carry(&at("none.sluice"), &at("other.sluice"), id).unwrap();
        assert!(!path_of(&at("other.sluice")).exists());
    }

    #[test]
    fn counts_come_back_only_unchanged_and_to_their_model() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("m.sluice");
        let id = StateId([7; STATE_ID_LEN]);
        assert_eq!(load(&model, id), None);
        save(&model, id, b"some counts").unwrap();
        assert_eq!(load(&model, id).as_deref(), Some(&b"some counts"[..]));
        assert_eq!(load(&model, StateId([8; STATE_ID_LEN])), None);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no partial file stays");

        let sound = fs::read(path_of(&model)).unwrap();
        for at in 0..sound.len() {
            let mut damaged = sound.clone();
            damaged[at] ^= 1;
            fs::write(path_of(&model), &damaged).unwrap();
            assert_eq!(load(&model, id), None, "byte {at}");
            fs::write(path_of(&model), &sound[..at]).unwrap();
            assert_eq!(load(&model, id), None, "cut at {at}");
        }
    }
}
