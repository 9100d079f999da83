//! Earlier messages, for the arrow keys: a file with one JSON string per line.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use sluice_format::{open_no_link, replace_private_file_with};

/// Most messages that are remembered.
pub(crate) const MOST: usize = 1000;
/// Most bytes of the file that are read. Older messages are forgotten.
const MOST_BYTES: u64 = 4 << 20;

/// The file. Several chats can append to it at the same time.
#[derive(Debug)]
pub(crate) struct History {
    /// `None`: messages are not saved.
    path: Option<PathBuf>,
}

impl History {
    /// A file, which need not exist yet, or none.
    pub(crate) fn new(path: Option<PathBuf>) -> Self {
        History { path }
    }

    /// The messages, the latest last. If the file has become long, it is shortened.
    pub(crate) fn load(&self) -> Vec<String> {
        let Some(path) = &self.path else { return Vec::new() };
        // History is a convenience, so a file that cannot be read is not an error.
        let Ok(lines) = read(path) else { return Vec::new() };
        let from = lines.len().saturating_sub(MOST);
        if from >= MOST {
            let write =
                |file: &mut File| lines[from..].iter().try_for_each(|line| file.write_all(entry(line).as_bytes()));
            let _ = replace_private_file_with::<io::Error>(path, write);
        }
        lines[from..].to_vec()
    }

    /// Adds a message.
    pub(crate) fn add(&self, message: &str) {
        let Some(path) = &self.path else { return };
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        // As above.
        let _ = file.and_then(|mut file| file.write_all(entry(message).as_bytes()));
    }
}

fn entry(message: &str) -> String {
    serde_json::Value::from(message).to_string() + "\n"
}

fn read(path: &Path) -> io::Result<Vec<String>> {
    let mut file = open_no_link(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(MOST_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(MOST_BYTES).read_to_end(&mut bytes)?;
    // A line whose beginning is missing is not JSON.
    let lines = bytes.split(|&byte| byte == b'\n');
    Ok(lines.filter_map(|line| serde_json::from_slice(line).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_in_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let history = History::new(Some(folder.path().join("history")));
        assert!(history.load().is_empty());
        for message in ["one", "two\nlines", "\u{1b}[31m drei ü"] {
            history.add(message);
        }
        assert_eq!(history.load(), ["one", "two\nlines", "\u{1b}[31m drei ü"]);
    }

    #[test]
    fn a_long_file_becomes_short() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("history");
        let history = History::new(Some(path.clone()));
        (0..2 * MOST).for_each(|i| history.add(&i.to_string()));
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"\"torn").unwrap();
        assert_eq!(history.load().len(), MOST);
        assert_eq!(history.load().last().unwrap(), &(2 * MOST - 1).to_string());
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), MOST);
    }
}
