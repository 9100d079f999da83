//! Reads files that the command line names, up to a limit, because some have no end.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sluice_model::memory::Bytes;

use crate::error::CliError;

/// Most bytes of a text: a prompt, or a text for measuring a model. This is two million tokens of English, more than models take;
/// tokenising it takes some 150 times its size.
pub(crate) const MAX_TEXT: u64 = 8 << 20;
/// Most bytes of a file that becomes a part of a model file's metadata.
pub(crate) const MAX_SIDE_FILE: u64 = 128 << 20;

/// A text file, which may be a pipe: `--prompt-file <(program)` is one.
pub(crate) fn read_text(path: &Path, action: &'static str) -> Result<String, CliError> {
    let text = File::open(path).and_then(|file| text_of(file, MAX_TEXT));
    text.map_err(CliError::file(path, action))
}

/// A file that becomes a part of a model file.
pub(crate) fn read_side_file(path: &Path) -> Result<Vec<u8>, CliError> {
    let bytes = File::open(path).and_then(|file| read_to_limit(file, MAX_SIDE_FILE));
    bytes.map_err(CliError::file(path, "read it"))
}

/// All of the source, as text.
pub(crate) fn text_of(source: impl Read, limit: u64) -> io::Result<String> {
    let invalid = |_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8 text");
    String::from_utf8(read_to_limit(source, limit)?).map_err(invalid)
}

/// All of the source; an error if it has more than `limit` bytes.
fn read_to_limit(source: impl Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let problem = format!("it has more than {}, the most that is read", Bytes(limit));
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, problem));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_end_is_refused() {
        let endless = || io::repeat(b'a');
        assert_eq!(text_of(endless().take(10), 10).unwrap(), "aaaaaaaaaa");
        assert_eq!(text_of(endless(), 10).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert!(read_text(Path::new("/dev/zero"), "read it").unwrap_err().to_string().contains("8.0 MiB"));
        assert!(read_side_file(Path::new("/dev/zero")).is_err());
        assert_eq!(text_of(&[0xff][..], 10).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
