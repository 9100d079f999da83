//! The journal: what has been sampled for each request, and which results the output has.
//!
//! A header names the input, the model and the settings. Records follow, each with a checksum that is bound to the header. Whatever
//! follows the last whole record, such as the half of one that a crash left, is cut off. Records are only ever appended.
//!
//! All numbers are little-endian. The header: magic, length of the rest, digest and length of the input, seconds since 1970 at which
//! the batch began, model, settings, checksum. A record: length, kind, body, checksum.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use sluice_checksum::{xxh3_64, xxh3_64_with_seed};

use crate::error::BatchError;
use crate::files::{OpenFile, Scan, read_full, write_all};

/// What a journal begins with. The last number but one is the version.
pub const JOURNAL_MAGIC: [u8; 8] = *b"SLBTCH\x01\n";
const CHECKSUM: usize = 8;
/// Magic and length of the rest.
const HEADER_START: usize = JOURNAL_MAGIC.len() + 4;
/// Digest, length, seconds.
const HEADER_FIXED: usize = 16 + 8 + 8;
/// Most bytes of the rest of a header.
const HEADER_MOST: usize = 64 << 10;
/// Most bytes of a record. Longer ones are not written, and what claims to be one is none.
const RECORD_MOST: usize = 16 << 20;
/// Most answers of a request.
const ANSWERS_MOST: u32 = 1 << 16;

const SAMPLED: u8 = 1;
const RESULT: u8 = 2;
const CUT: u8 = 3;
/// Stands for the number of likeliest tokens where no log probability was asked for.
const NO_LOGPROB: u8 = u8::MAX;

/// A token that was sampled, and what was said of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability, if that was asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens with theirs, fewer than 255.
    pub top: Vec<(u32, f32)>,
}

/// What a journal belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) digest: u128,
    pub(crate) length: u64,
    /// Seconds since 1970.
    pub(crate) started: u64,
    pub(crate) model: String,
    pub(crate) settings: String,
}

/// A result that the output has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) request: u32,
    /// Bytes of its line, line end included.
    pub(crate) bytes: u32,
    /// xxh3-64 of these.
    pub(crate) checksum: u64,
    pub(crate) failed: bool,
    /// Tokens that were generated for it.
    pub(crate) generated: u32,
}

/// What a journal says.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Content {
    /// In the order of the output.
    pub(crate) results: Vec<Written>,
    /// Tokens of requests without result, by request and answer.
    pub(crate) sampled: HashMap<u32, Vec<Vec<Token>>>,
}

/// New tokens of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sampled {
    pub(crate) request: u32,
    pub(crate) answer: u32,
    pub(crate) tokens: Vec<Token>,
}

/// An open journal, which this process has locked.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: Box<dyn OpenFile>,
    /// What the checksums of records begin with.
    seed: u64,
    end: u64,
}

impl Header {
    fn to_bytes(&self) -> Vec<u8> {
        let texts = [&self.model, &self.settings];
        let mut rest = Vec::new();
        rest.extend(self.digest.to_le_bytes());
        rest.extend(self.length.to_le_bytes());
        rest.extend(self.started.to_le_bytes());
        for text in texts {
            rest.extend((text.len() as u32).to_le_bytes());
            rest.extend(text.as_bytes());
        }
        let mut bytes = JOURNAL_MAGIC.to_vec();
        bytes.extend((rest.len() as u32).to_le_bytes());
        bytes.extend(rest);
        bytes.extend(xxh3_64(&bytes).to_le_bytes());
        bytes
    }

    /// The header that a file begins with, and its checksum and length; `None` if there is no whole one.
    fn parse(bytes: &[u8]) -> Option<(Header, u64, usize)> {
        let rest = Reader(bytes.strip_prefix(&JOURNAL_MAGIC)?).u32()? as usize;
        let length = HEADER_START + rest.min(HEADER_MOST) + CHECKSUM;
        let (sealed, checksum) = bytes.get(..length)?.split_last_chunk::<CHECKSUM>()?;
        let checksum = u64::from_le_bytes(*checksum);
        if !(HEADER_FIXED..=HEADER_MOST).contains(&rest) || xxh3_64(sealed) != checksum {
            return None;
        }
        let mut reader = Reader(&sealed[HEADER_START..]);
        let header = Header {
            digest: u128::from_le_bytes(*reader.array()?),
            length: reader.u64()?,
            started: reader.u64()?,
            model: reader.text()?,
            settings: reader.text()?,
        };
        Some((header, checksum, length))
    }
}

impl Journal {
    /// Locks the journal, an empty file perhaps, and reads its header; `None` if there is no whole one. Nothing is changed.
    pub(crate) fn claim(path: &Path, file: Box<dyn OpenFile>) -> Result<(Self, Option<Header>), BatchError> {
        let io = |action| BatchError::file(path, action);
        if !file.is_regular().map_err(io("look at the journal"))? {
            return Err(BatchError::NotRegular { path: path.to_owned() });
        }
        if !file.lock().map_err(io("lock the journal"))? {
            return Err(BatchError::Busy { path: path.to_owned() });
        }
        let mut bytes = vec![0; HEADER_START + HEADER_MOST + CHECKSUM];
        let count = read_full(&*file, &mut bytes, 0).map_err(io("read the journal"))?;
        bytes.truncate(count);
        let found = Header::parse(&bytes);
        // A crash of the system can leave zeros in the place of what was not written yet.
        let written = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let is_torn = JOURNAL_MAGIC.starts_with(&bytes[..written.min(JOURNAL_MAGIC.len())]);
        if found.is_none() && !is_torn {
            return Err(BatchError::NotAJournal { path: path.to_owned() });
        }
        let (header, seed, end) = match found {
            Some((header, seed, end)) => (Some(header), seed, end as u64),
            None => (None, 0, 0),
        };
        Ok((Journal { path: path.to_owned(), file, seed, end }, header))
    }

    /// Begins anew with this header, durably.
    pub(crate) fn begin(&mut self, header: &Header) -> Result<(), BatchError> {
        let bytes = header.to_bytes();
        self.cut(0)?;
        write_all(&*self.file, &bytes, 0).map_err(BatchError::file(&self.path, "write the journal"))?;
        (self.seed, self.end) = (xxh3_64(&bytes[..bytes.len() - CHECKSUM]), bytes.len() as u64);
        self.sync()
    }

    /// Reads what follows the header, and cuts off what is no whole record. `requests`: how many there are.
    pub(crate) fn read(&mut self, requests: usize) -> Result<Content, BatchError> {
        let io = |action| BatchError::file(&self.path, action);
        let length = self.file.len().map_err(io("read the journal"))?;
        let mut content = Content::default();
        let mut done = vec![false; requests];
        let mut scan = Scan::new(&*self.file, self.end);
        let mut end = self.end;
        let mut record = Vec::new();
        loop {
            let mut prefix = [0; 4];
            if !scan.fill(&mut prefix).map_err(io("read the journal"))? {
                break;
            }
            let body = u32::from_le_bytes(prefix) as usize;
            let whole = (prefix.len() + body + CHECKSUM) as u64;
            if body == 0 || body > RECORD_MOST || end + whole > length {
                break;
            }
            record.clear();
            record.extend(prefix);
            record.resize(whole as usize, 0);
            if !scan.fill(&mut record[prefix.len()..]).map_err(io("read the journal"))? {
                break;
            }
            let (sealed, checksum) = record.split_last_chunk::<CHECKSUM>().expect("longer than that");
            let is_whole = u64::from_le_bytes(*checksum) == xxh3_64_with_seed(sealed, self.seed);
            if !is_whole || content.take(&sealed[prefix.len()..], &mut done).is_none() {
                break;
            }
            end += whole;
        }
        if end < length {
            self.cut(end)?;
        }
        self.end = end;
        Ok(content)
    }

    /// Appends tokens.
    pub(crate) fn sampled(&mut self, all: &[Sampled]) -> Result<(), BatchError> {
        let mut body = vec![SAMPLED];
        for Sampled { request, answer, tokens } in all {
            body.extend([*request, *answer, tokens.len() as u32].map(u32::to_le_bytes).as_flattened());
            tokens.iter().for_each(|token| token.write(&mut body));
            // Far below what a record can have.
            if body.len() > RECORD_MOST / 4 {
                self.append(&body)?;
                body.truncate(1);
            }
        }
        if body.len() > 1 { self.append(&body) } else { Ok(()) }
    }

    /// Appends that the output has one more result.
    pub(crate) fn result(&mut self, written: &Written) -> Result<(), BatchError> {
        let mut body = vec![RESULT];
        body.extend([written.request, written.bytes, written.generated].map(u32::to_le_bytes).as_flattened());
        body.push(u8::from(written.failed));
        body.extend(written.checksum.to_le_bytes());
        self.append(&body)
    }

    /// Appends that the output has only the first `count` results.
    pub(crate) fn kept(&mut self, count: usize) -> Result<(), BatchError> {
        let mut body = vec![CUT];
        body.extend((count as u32).to_le_bytes());
        self.append(&body)
    }

    /// Makes everything durable.
    pub(crate) fn sync(&self) -> Result<(), BatchError> {
        self.file.sync().map_err(BatchError::file(&self.path, "sync the journal"))
    }

    fn append(&mut self, body: &[u8]) -> Result<(), BatchError> {
        let mut record = (body.len() as u32).to_le_bytes().to_vec();
        record.extend(body);
        record.extend(xxh3_64_with_seed(&record, self.seed).to_le_bytes());
        write_all(&*self.file, &record, self.end).map_err(BatchError::file(&self.path, "write the journal"))?;
        self.end += record.len() as u64;
        Ok(())
    }

    fn cut(&self, length: u64) -> Result<(), BatchError> {
        self.file.cut(length).map_err(BatchError::file(&self.path, "cut the journal"))
    }
}

impl Content {
    /// Takes the body of a record; `None` if it makes no sense.
    fn take(&mut self, body: &[u8], done: &mut [bool]) -> Option<()> {
        let (kind, rest) = body.split_first()?;
        let mut reader = Reader(rest);
        match *kind {
            SAMPLED => {
                while !reader.0.is_empty() {
                    let (request, answer, count) = (reader.u32()?, reader.u32()?, reader.u32()?);
                    let is_done = *done.get(request as usize)?;
                    if answer >= ANSWERS_MOST {
                        return None;
                    }
                    let mut tokens = Vec::new();
                    for _ in 0..count {
                        tokens.push(Token::read(&mut reader)?);
                    }
                    if !is_done {
                        let answers = self.sampled.entry(request).or_default();
                        answers.resize_with(answers.len().max(answer as usize + 1), Vec::new);
                        answers[answer as usize].extend(tokens);
                    }
                }
            }
            RESULT => {
                let (request, bytes, generated) = (reader.u32()?, reader.u32()?, reader.u32()?);
                let (failed, checksum) = (reader.u8()? != 0, reader.u64()?);
                // No request has two results.
                if std::mem::replace(done.get_mut(request as usize)?, true) {
                    return None;
                }
                self.sampled.remove(&request);
                self.results.push(Written { request, bytes, checksum, failed, generated });
            }
            CUT => {
                let count = reader.u32()? as usize;
                let gone = self.results.get(count..)?.to_vec();
                gone.iter().for_each(|written| done[written.request as usize] = false);
                self.results.truncate(count);
            }
            _ => return None,
        }
        reader.0.is_empty().then_some(())
    }
}

impl Token {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.id.to_le_bytes());
        let Some(logprob) = self.logprob else { return out.push(NO_LOGPROB) };
        let top = &self.top[..self.top.len().min(NO_LOGPROB as usize - 1)];
        out.push(top.len() as u8);
        out.extend(logprob.to_le_bytes());
        for (id, logprob) in top {
            out.extend(id.to_le_bytes());
            out.extend(logprob.to_le_bytes());
        }
    }

    fn read(reader: &mut Reader<'_>) -> Option<Token> {
        let (id, count) = (reader.u32()?, reader.u8()?);
        if count == NO_LOGPROB {
            return Some(Token { id, logprob: None, top: Vec::new() });
        }
        let logprob = Some(reader.f32()?);
        let top = (0..count).map(|_| Some((reader.u32()?, reader.f32()?))).collect::<Option<_>>()?;
        Some(Token { id, logprob, top })
    }
}

/// Takes numbers off the front of bytes.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Option<&'a [u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(|&[byte]| byte)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(|bytes| u32::from_le_bytes(*bytes))
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(|bytes| u64::from_le_bytes(*bytes))
    }

    fn f32(&mut self) -> Option<f32> {
        self.array().map(|bytes| f32::from_le_bytes(*bytes))
    }

    fn text(&mut self) -> Option<String> {
        let length = self.u32()? as usize;
        let (text, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        String::from_utf8(text.to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::{Access, Files as _, SystemFiles};

    const REQUESTS: usize = 5;

    fn header() -> Header {
        Header { digest: 7 << 100, length: 9, started: 11, model: "m".into(), settings: "s".into() }
    }

    fn open(path: &Path) -> (Journal, Option<Header>) {
        Journal::claim(path, SystemFiles.open(path, Access::Write).unwrap()).unwrap()
    }

    fn tokens(from: u32) -> Vec<Token> {
        let top = vec![(3, -0.5), (4, f32::NEG_INFINITY)];
        let with = Token { id: from, logprob: Some(-0.25), top };
        vec![with, Token { id: from + 1, logprob: None, top: Vec::new() }]
    }

    fn written(request: u32) -> Written {
        Written { request, bytes: 100 + request, checksum: 1 << 60, failed: request == 3, generated: 8 }
    }

    /// A journal with some of everything, and what it says.
    fn sample(path: &Path) -> Content {
        let (mut journal, found) = open(path);
        assert_eq!(found, None);
        journal.begin(&header()).unwrap();
        let sampled = |request, answer, from| Sampled { request, answer, tokens: tokens(from) };
        journal.sampled(&[sampled(0, 0, 10), sampled(2, 1, 20)]).unwrap();
        journal.sampled(&[sampled(0, 0, 12)]).unwrap();
        journal.result(&written(0)).unwrap();
        journal.result(&written(3)).unwrap();
        journal.kept(1).unwrap();
        journal.sampled(&[sampled(3, 0, 30)]).unwrap();
        let sampled = HashMap::from([(2, vec![Vec::new(), tokens(20)]), (3, vec![tokens(30)])]);
        Content { results: vec![written(0)], sampled }
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let content = sample(&path);
        let (mut journal, found) = open(&path);
        assert_eq!(found, Some(header()));
        assert_eq!(journal.read(REQUESTS).unwrap(), content);
        journal.result(&written(2)).unwrap();
        drop(journal);
        let (mut journal, _) = open(&path);
        assert_eq!(journal.read(REQUESTS).unwrap().results, [written(0), written(2)]);
    }

    #[test]
    fn one_process_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let first = open(&path);
        let second = Journal::claim(&path, SystemFiles.open(&path, Access::Write).unwrap());
        assert!(matches!(second, Err(BatchError::Busy { .. })));
        drop(first);
        open(&path);
    }

    #[test]
    fn every_torn_tail_leaves_whole_records() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        sample(&path);
        let bytes = std::fs::read(&path).unwrap();
        let start = header().to_bytes().len();
        for length in 0..bytes.len() {
            // Half of the cases: the file has its length, but the tail was never written.
            let mut torn = bytes[..length].to_vec();
            torn.resize(if length % 2 == 0 { bytes.len() } else { length }, 0);
            std::fs::write(&path, &torn).unwrap();
            let (mut journal, found) = open(&path);
            assert_eq!(found.is_some(), length >= start || bytes[length..start].iter().all(|b| *b == 0), "{length}");
            if found.is_some() {
                journal.read(REQUESTS).unwrap();
                let left = std::fs::read(&path).unwrap();
                assert!(bytes.starts_with(&left) && left.len() <= length + 1, "{length}");
                // What is appended to it is found.
                journal.result(&written(4)).unwrap();
                drop(journal);
                let (mut journal, _) = open(&path);
                assert_eq!(journal.read(REQUESTS).unwrap().results.last(), Some(&written(4)), "{length}");
            }
        }
    }

    #[test]
    fn no_changed_byte_is_believed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        sample(&path);
        let bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            std::fs::write(&path, &damaged).unwrap();
            let claimed = Journal::claim(&path, SystemFiles.open(&path, Access::Write).unwrap());
            if let Ok((mut journal, Some(found))) = claimed {
                assert_eq!(found, header());
                journal.read(REQUESTS).unwrap();
                assert!(bytes.starts_with(&std::fs::read(&path).unwrap()), "{at}");
            }
        }
    }

    #[test]
    fn other_files_are_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        std::fs::write(&path, "precious").unwrap();
        let claimed = Journal::claim(&path, SystemFiles.open(&path, Access::Write).unwrap());
        assert!(matches!(claimed, Err(BatchError::NotAJournal { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn records_of_another_input_are_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        sample(&path);
        let (mut journal, _) = open(&path);
        assert_eq!(journal.read(1).unwrap().results, [], "the first record names a request that is not there");
    }
}
