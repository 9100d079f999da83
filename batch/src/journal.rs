//! The journal: what has been sampled for each request, and which results the output has.
//!
//! A header names the input, the model and the settings. Records follow, each with a checksum that is bound to the header. Records are
//! only ever appended, so a crash can damage only the end. What follows the last whole record, such as the half of one that a crash left,
//! is cut off. A damaged record in front of whole ones is no trace of a crash: nothing is cut then, and the run is refused.
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
/// Bytes behind a damaged record in which a whole one is searched for. What a crash leaves of a record is shorter.
const SEARCHED: usize = 2 * RECORD_MOST;
/// Bytes that this search hashes at most, which bounds its time.
const HASHED: usize = 256 << 20;
/// A drive writes sectors of this many bytes, whole or not at all. A crash of the system leaves zeros in the place of one that was not
/// written.
const SECTOR: u64 = 512;
/// Most answers of a request.
const ANSWERS_MOST: u32 = 1 << 16;

const SAMPLED: u8 = 1;
const RESULT: u8 = 2;
const CUT: u8 = 3;
/// Bytes of the length that a record begins with.
const PREFIX: usize = 4;
/// Bytes of the bodies of results and cuts.
const RESULT_BODY: usize = 1 + 3 * 4 + 1 + 8;
const CUT_BODY: usize = 1 + 4;
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

impl Header {
    /// Whether the bytes in front of the last zeros of a file are too few for the header that they begin.
    fn is_torn(written: &[u8]) -> bool {
        let rest = written.get(JOURNAL_MAGIC.len()..).and_then(|rest| Reader(rest).u32());
        match rest.map(|rest| rest as usize) {
            // The length itself is cut off.
            None => true,
            Some(rest) => rest <= HEADER_MOST && written.len() < HEADER_START + rest + CHECKSUM,
        }
    }
}

impl Journal {
    /// Locks the journal, an empty file perhaps, and reads its header; `None` if it was never written as a whole. Nothing is changed.
    ///
    /// # Errors
    /// The filesystem's, and that the file is no journal, is damaged, or is in use.
    pub(crate) fn claim(path: &Path, file: Box<dyn OpenFile>) -> Result<(Self, Option<Header>), BatchError> {
        let io = |action| BatchError::file(path, action);
        if !file.is_regular().map_err(io("look at the journal"))? {
            return Err(BatchError::NotRegular { path: path.to_owned() });
        }
        if !file.lock().map_err(io("lock the journal"))? {
            return Err(BatchError::Busy { path: path.to_owned() });
        }
        Self::look(path, file)
    }

    /// Like [`Journal::claim`], without locking it: another process may be appending to it.
    pub(crate) fn look(path: &Path, file: Box<dyn OpenFile>) -> Result<(Self, Option<Header>), BatchError> {
        let io = |action| BatchError::file(path, action);
        if !file.is_regular().map_err(io("look at the journal"))? {
            return Err(BatchError::NotRegular { path: path.to_owned() });
        }
        let mut bytes = vec![0; HEADER_START + HEADER_MOST + CHECKSUM];
        let count = read_full(&*file, &mut bytes, 0).map_err(io("read the journal"))?;
        bytes.truncate(count);
        let found = Header::parse(&bytes);
        if found.is_none() {
            // A crash of the system can leave zeros in the place of what was not written yet.
            let written = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            let written = &bytes[..written];
            if !JOURNAL_MAGIC.starts_with(&written[..written.len().min(JOURNAL_MAGIC.len())]) {
                return Err(BatchError::NotAJournal { path: path.to_owned() });
            }
            if !Header::is_torn(written) {
                return Err(BatchError::JournalDamaged { path: path.to_owned(), offset: 0, results: 0 });
            }
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

    /// Reads what follows the header, and cuts off what a crash has left behind the last whole record. `requests`: how many there are.
    ///
    /// # Errors
    /// The filesystem's, and [`BatchError::JournalDamaged`] where a damaged record is no trace of a crash. Nothing is changed then.
    pub(crate) fn read(&mut self, requests: usize) -> Result<Content, BatchError> {
        let (content, end, length) = self.scan(requests)?;
        if end < length {
            self.cut(end)?;
        }
        self.end = end;
        Ok(content)
    }

    /// What follows the header, where its last whole record ends, and the length of the file. Changes nothing.
    ///
    /// # Errors
    /// Like [`Journal::read`].
    pub(crate) fn scan(&self, requests: usize) -> Result<(Content, u64, u64), BatchError> {
        let io = |action| BatchError::file(&self.path, action);
        let length = self.file.len().map_err(io("read the journal"))?;
        let mut content = Content::default();
        let mut done = vec![false; requests];
        let mut scan = Scan::new(&*self.file, self.end);
        let mut end = self.end;
        let mut record = Vec::new();
        while next_record(&mut scan, self.seed, length - end, &mut record).map_err(io("read the journal"))? {
            let body = &record[PREFIX..record.len() - CHECKSUM];
            if content.take(body, &mut done).is_none() {
                // Its checksum is right, so no crash has made it.
                return Err(self.damaged(end, &content));
            }
            end += record.len() as u64;
        }
        if end < length && !self.is_torn(end, length).map_err(io("read the journal"))? {
            return Err(self.damaged(end, &content));
        }
        Ok((content, end, length))
    }

    fn damaged(&self, offset: u64, content: &Content) -> BatchError {
        BatchError::JournalDamaged { path: self.path.clone(), offset, results: content.results.len() }
    }

    /// Whether what begins at `from`, where no whole record is, can be what a crash has left: no whole record follows it, or a sector of
    /// the damaged one was never written.
    fn is_torn(&self, from: u64, length: u64) -> std::io::Result<bool> {
        let mut bytes = vec![0; usize::try_from(length - from).unwrap_or(usize::MAX).min(SEARCHED)];
        let count = read_full(&*self.file, &mut bytes, from)?;
        bytes.truncate(count);
        let next = match find_record(&bytes, self.seed) {
            Search::Found(next) => next,
            Search::None => return Ok(from + bytes.len() as u64 >= length),
            Search::GivenUp => return Ok(false),
        };
        let first = (from.next_multiple_of(SECTOR) - from) as usize;
        let sectors = bytes.get(first..next).unwrap_or_default().chunks_exact(SECTOR as usize);
        Ok(sectors.into_iter().any(|sector| sector.iter().all(|byte| *byte == 0)))
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

/// Reads the next record, with its length and checksum, into `record`; false if there is no whole one in the `left` bytes up to the end.
fn next_record(scan: &mut Scan<'_>, seed: u64, left: u64, record: &mut Vec<u8>) -> std::io::Result<bool> {
    let mut prefix = [0; PREFIX];
    if !scan.fill(&mut prefix)? {
        return Ok(false);
    }
    let body = u32::from_le_bytes(prefix) as usize;
    let whole = PREFIX + body + CHECKSUM;
    if body == 0 || body > RECORD_MOST || whole as u64 > left {
        return Ok(false);
    }
    record.clear();
    record.extend(prefix);
    record.resize(whole, 0);
    Ok(scan.fill(&mut record[PREFIX..])? && is_whole(record, seed))
}

/// Whether a record has the checksum that it ends with.
fn is_whole(record: &[u8], seed: u64) -> bool {
    let sealed = record.split_last_chunk::<CHECKSUM>();
    sealed.is_some_and(|(sealed, checksum)| u64::from_le_bytes(*checksum) == xxh3_64_with_seed(sealed, seed))
}

/// What a search for a whole record has found.
enum Search {
    /// One begins here.
    Found(usize),
    /// There is none.
    None,
    /// It would take too long to say.
    GivenUp,
}

/// Searches for a whole record behind the first byte, where there is none.
fn find_record(bytes: &[u8], seed: u64) -> Search {
    let mut hashed = 0;
    for at in 1..bytes.len().saturating_sub(PREFIX + CHECKSUM) {
        let (prefix, rest) = bytes[at..].split_first_chunk::<PREFIX>().expect("the loop ends before");
        let body = u32::from_le_bytes(*prefix) as usize;
        let is_plausible = match rest[0] {
            SAMPLED => body > 1 && body <= RECORD_MOST,
            RESULT => body == RESULT_BODY,
            CUT => body == CUT_BODY,
            _ => false,
        };
        let record = bytes[at..].get(..PREFIX + body + CHECKSUM).filter(|_| is_plausible);
        let Some(record) = record else { continue };
        if is_whole(record, seed) {
            return Search::Found(at);
        }
        hashed += record.len();
        if hashed > HASHED {
            return Search::GivenUp;
        }
    }
    Search::None
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
    fn a_changed_byte_is_found_and_nothing_is_cut_in_front_of_whole_records() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        sample(&path);
        let bytes = std::fs::read(&path).unwrap();
        let start = header().to_bytes().len();
        let records = records(&bytes[start..]);
        let last = start + records.last().unwrap();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            std::fs::write(&path, &damaged).unwrap();
            let claimed = Journal::claim(&path, SystemFiles.open(&path, Access::Write).unwrap());
            let Ok((mut journal, Some(found))) = claimed else {
                assert!(at < start, "{at}");
                continue;
            };
            assert_eq!(found, header());
            match journal.read(REQUESTS) {
                Ok(_) => {
                    assert!(at >= last, "{at}: a record is left out though others follow it");
                    assert_eq!(std::fs::read(&path).unwrap(), bytes[..last], "{at}");
                }
                Err(BatchError::JournalDamaged { offset, .. }) => {
                    let record = records.iter().rev().map(|record| start + record).find(|record| *record <= at);
                    assert_eq!(Some(offset as usize), record, "{at}");
                    assert_eq!(std::fs::read(&path).unwrap(), damaged, "{at}: nothing is changed");
                }
                Err(error) => panic!("{at}: {error}"),
            }
        }
    }

    /// Where the records begin.
    fn records(bytes: &[u8]) -> Vec<usize> {
        let next = |at: &usize| {
            let body = u32::from_le_bytes(*bytes[*at..].first_chunk()?) as usize;
            Some(at + PREFIX + body + CHECKSUM).filter(|next| *next < bytes.len())
        };
        std::iter::successors(Some(0), next).collect()
    }

    #[test]
    fn sectors_that_a_crash_has_not_written_are_no_damage() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let (mut journal, _) = open(&path);
        journal.begin(&header()).unwrap();
        journal.result(&written(1)).unwrap();
        let begin = journal.end as usize;
        let many = (0..400).flat_map(|number| tokens(number * 2)).collect();
        journal.sampled(&[Sampled { request: 0, answer: 0, tokens: many }]).unwrap();
        let end = journal.end as usize;
        journal.result(&written(2)).unwrap();
        drop(journal);
        let bytes = std::fs::read(&path).unwrap();
        let sector = (begin.next_multiple_of(SECTOR as usize)..).step_by(SECTOR as usize).nth(1).unwrap();
        assert!(sector + SECTOR as usize <= end);
        let mut torn = bytes.clone();
        torn[sector..sector + SECTOR as usize].fill(0);
        std::fs::write(&path, &torn).unwrap();
        let (mut journal, _) = open(&path);
        assert_eq!(journal.read(REQUESTS).unwrap().results, [written(1)]);
        assert_eq!(std::fs::read(&path).unwrap(), bytes[..begin]);
        drop(journal);
        let mut flipped = bytes.clone();
        flipped[sector] ^= 1;
        std::fs::write(&path, &flipped).unwrap();
        let (mut journal, _) = open(&path);
        let refused = journal.read(REQUESTS);
        let Err(BatchError::JournalDamaged { offset, results: 1, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(offset as usize, begin);
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
        let refused = journal.read(1);
        assert!(
            matches!(refused, Err(BatchError::JournalDamaged { results: 0, .. })),
            "no request has the number: {refused:?}"
        );
    }
}
