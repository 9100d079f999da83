//! Reads the head of a GGUF file from front to back. Nothing in it is trusted: every length is compared with the file and with a
//! limit before memory is allocated for it.

use std::path::Path;

use super::metadata::Kind;
use crate::error::ConvertError;

/// Most bytes of a head. The largest known head, with vocabulary and merges of 200,000 tokens, has 16 MB.
pub(crate) const MAX_HEAD: u64 = 256 << 20;
/// Bytes of the first read; each further read doubles the buffer.
const FIRST_READ: usize = 1 << 20;

/// Fills a buffer with a file's bytes from an offset on.
pub(crate) type ReadAt<'a> = dyn Fn(u64, &mut [u8]) -> Result<(), ConvertError> + 'a;

/// A position in the head of a file.
pub(crate) struct Cursor<'a> {
    path: &'a Path,
    read: &'a ReadAt<'a>,
    file_len: u64,
    /// The bytes read so far, from the beginning of the file.
    buffer: Vec<u8>,
    at: usize,
}

impl<'a> Cursor<'a> {
    /// Starts at the beginning of a file of `file_len` bytes; `path` is for messages.
    pub(crate) fn new(path: &'a Path, file_len: u64, read: &'a ReadAt<'a>) -> Self {
        Cursor { path, read, file_len, buffer: Vec::new(), at: 0 }
    }

    /// The position, from the beginning of the file.
    pub(crate) fn at(&self) -> u64 {
        self.at as u64
    }

    /// Bytes of the file after the position.
    pub(crate) fn rest(&self) -> u64 {
        self.file_len - self.at()
    }

    /// The head up to the position.
    pub(crate) fn into_head(mut self) -> Vec<u8> {
        self.buffer.truncate(self.at);
        self.buffer
    }

    /// The error that something before the position is wrong.
    pub(crate) fn damaged(&self, problem: impl std::fmt::Display) -> ConvertError {
        ConvertError::Damaged { path: self.path.to_owned(), problem: format!("before byte {}: {problem}", self.at) }
    }

    /// The next `len` bytes; `what` names them for messages.
    pub(crate) fn take(&mut self, len: u64, what: &str) -> Result<&[u8], ConvertError> {
        if len > self.rest() {
            return Err(self.damaged(format!("{what} would have {len} bytes, the file ends {} bytes on", self.rest())));
        }
        let end = self.at() + len;
        if end > MAX_HEAD {
            return Err(self.damaged(format!("{what} would make the head longer than {MAX_HEAD} bytes")));
        }
        let end = end as usize;
        if end > self.buffer.len() {
            let known = self.buffer.len();
            let enough = end.max(2 * known).max(FIRST_READ);
            let enough = (enough as u64).min(self.file_len).min(MAX_HEAD) as usize;
            self.buffer.resize(enough, 0);
            (self.read)(known as u64, &mut self.buffer[known..])?;
        }
        let start = std::mem::replace(&mut self.at, end);
        Ok(&self.buffer[start..end])
    }

    /// The next integer of 32 bits.
    pub(crate) fn u32(&mut self, what: &str) -> Result<u32, ConvertError> {
        let bytes = self.take(Kind::U32.len() as u64, what)?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("four bytes were asked for")))
    }

    /// The next integer of 64 bits.
    pub(crate) fn u64(&mut self, what: &str) -> Result<u64, ConvertError> {
        let bytes = self.take(Kind::U64.len() as u64, what)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes were asked for")))
    }

    /// A count of things that take at least `least` bytes each; there may be at most `most`.
    pub(crate) fn count(&mut self, least: u64, most: u64, what: &str) -> Result<usize, ConvertError> {
        let count = self.u64(what)?;
        self.check_count(count, least, most, what)
    }

    /// Refuses a count that the rest of the file cannot hold, or that exceeds `most`.
    pub(crate) fn check_count(&self, count: u64, least: u64, most: u64, what: &str) -> Result<usize, ConvertError> {
        let room = self.rest() / least.max(1);
        if count > room || count > most {
            return Err(self.damaged(format!("{what} is {count}, and there is room for {}", room.min(most))));
        }
        usize::try_from(count).map_err(|_| self.damaged(format!("{what} is {count}")))
    }

    /// A text of at most `most` bytes, after its length.
    pub(crate) fn string(&mut self, most: u64, what: &str) -> Result<&[u8], ConvertError> {
        let len = self.u64(what)?;
        if len > most {
            return Err(self.damaged(format!("{what} would have {len} bytes, more than {most}")));
        }
        self.take(len, what)
    }

    /// A printable text in UTF-8: messages contain it, and a terminal would obey control characters.
    pub(crate) fn name(&mut self, most: u64, what: &str) -> Result<String, ConvertError> {
        match std::str::from_utf8(self.string(most, what)?).map(str::to_owned) {
            Ok(name) if !name.contains(char::is_control) => Ok(name),
            Ok(name) => Err(self.damaged(format!("{what}, {name:?}, has control characters"))),
            Err(_) => Err(self.damaged(format!("{what} is not UTF-8"))),
        }
    }
}
