//! What the input holds: where each request is, and in which order they are best answered. No request is kept in memory.

use std::collections::hash_map::Entry as Slot;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use sluice_checksum::{Xxh3, xxh3_64, xxh3_128};

use crate::error::BatchError;
use crate::files::{OpenFile, Scan};
use crate::line::{Line, Wanted, shown};

/// Most bytes of a line. Longer ones are not read.
pub const LONGEST_LINE: usize = 32 << 20;
/// Most requests: they are counted in 32 bits.
const MOST: usize = u32::MAX as usize;
/// What editors of some systems write before a text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// Most different fields of requests that are remembered, and most bytes of their names: a stranger's file can have as many as it likes.
const MOST_FIELDS: usize = 256;
const LONGEST_FIELD: usize = 64;
/// Lengths of beginnings of texts, in bytes, by which requests are brought together. Less than the first is not worth it.
const BEGINNINGS: [usize; 5] = [256, 1 << 10, 4 << 10, 16 << 10, 64 << 10];

/// A request of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where its line begins.
    pub offset: u64,
    /// Bytes of the line, without its end; `None`: it is too long.
    pub bytes: Option<u32>,
    /// The line's number, from 1.
    pub line: u32,
    /// xxh3-64 of the line, so that nobody can exchange it while the run goes on.
    pub checksum: u64,
    /// What it asks for; nothing if the line is wrong.
    pub wanted: Wanted,
}

/// The requests of an input.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    /// In the order of the lines.
    pub entries: Vec<Entry>,
    /// Numbers of entries in the order in which they are answered: those whose texts begin alike follow each other, and otherwise in the
    /// order of the lines.
    pub order: Vec<u32>,
    /// xxh3-128 of the whole input.
    pub digest: u128,
    /// Bytes of the input.
    pub length: u64,
    /// Fields that requests have, by the path that these name, and the first line with each. The path is empty for fields beside a body.
    /// Of very many fields, the first ones are here.
    pub fields: BTreeMap<(String, String), u32>,
}

/// What is gathered while the input is read.
#[derive(Default)]
struct Gathered {
    index: Index,
    /// Lines of names.
    names: HashMap<u128, u32>,
    /// For each entry and length of a beginning: the first entry that has the same.
    alike: Vec<[u32; BEGINNINGS.len()]>,
    firsts: [HashMap<u64, u32>; BEGINNINGS.len()],
}

impl Index {
    /// Reads the input at `path`.
    ///
    /// # Errors
    /// The filesystem's, two requests with the same name, or too many.
    pub fn read(path: &Path, file: &dyn OpenFile) -> Result<Index, BatchError> {
        let mut scan = Scan::new(file, 0);
        let mut digest = Xxh3::new();
        let mut gathered = Gathered::default();
        let (mut line, mut number) = (Vec::new(), 1);
        // Bytes of the line so far, which may be more than are kept, and where it begins.
        let (mut length, mut begin) = (0, 0);
        loop {
            let piece = scan.next(usize::MAX).map_err(BatchError::file(path, "read the requests"))?;
            if piece.is_empty() {
                break;
            }
            digest.update(piece);
            gathered.index.length += piece.len() as u64;
            for part in piece.split_inclusive(|&byte| byte == b'\n') {
                length += part.len();
                let room = (LONGEST_LINE + 1).saturating_sub(line.len());
                line.extend_from_slice(&part[..part.len().min(room)]);
                if part.ends_with(b"\n") {
                    gathered.take(path, &line, length, begin, number)?;
                    begin += length as u64;
                    (length, number) = (0, number + 1);
                    line.clear();
                }
            }
        }
        gathered.take(path, &line, length, begin, number)?;
        gathered.index.digest = digest.digest128();
        Ok(gathered.finish())
    }

    /// The request of an entry of the input at `path`, or what is wrong with it.
    ///
    /// # Errors
    /// The filesystem's, and that the input is another one by now.
    pub fn line(path: &Path, file: &dyn OpenFile, entry: &Entry) -> Result<Result<Line, crate::LineError>, BatchError> {
        let number = entry.line as usize;
        let Some(length) = entry.bytes else { return Ok(Err(too_long(number))) };
        let mut bytes = vec![0; length as usize];
        let read = crate::files::read_full(file, &mut bytes, entry.offset);
        match read.map_err(BatchError::file(path, "read the requests"))? {
            count if count == bytes.len() && xxh3_64(&bytes) == entry.checksum => Ok(Line::parse(&bytes, number)),
            _ => Err(BatchError::InputChanged { path: path.to_owned() }),
        }
    }
}

fn too_long(number: usize) -> crate::LineError {
    let message = format!("line {number} has more than {} MiB, the most that is read", LONGEST_LINE >> 20);
    crate::LineError { custom_id: format!("line-{number}"), code: "line_too_long", message }
}

impl Gathered {
    /// Takes a line of `length` bytes, of which `line` are kept, that begins at `begin`.
    fn take(&mut self, path: &Path, line: &[u8], length: usize, begin: u64, number: usize) -> Result<(), BatchError> {
        let mark = if begin == 0 && line.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
        let text = line[mark..].trim_ascii();
        if text.is_empty() && length <= LONGEST_LINE {
            return Ok(());
        }
        if self.index.entries.len() >= MOST || number >= MOST {
            return Err(BatchError::TooMany { path: path.to_owned(), most: MOST });
        }
        let lead = line.len() - line[mark..].trim_ascii_start().len();
        let fits = length <= LONGEST_LINE;
        let parsed = if fits { Line::parse(text, number) } else { Err(too_long(number)) };
        parsed.iter().for_each(|line| self.note_fields(line, number as u32));
        let (id, wanted, beginning) = match &parsed {
            Ok(line) => {
                let text = line.text();
                (&line.custom_id, line.wanted_of(text.len()), text)
            }
            Err(error) => (&error.custom_id, Wanted::default(), String::new()),
        };
        match self.names.entry(xxh3_128(id.as_bytes())) {
            Slot::Vacant(slot) => _ = slot.insert(number as u32),
            Slot::Occupied(slot) => {
                let (path, first, id) = (path.to_owned(), *slot.get() as usize, shown(id));
                return Err(BatchError::Duplicate { path, first, second: number, id });
            }
        }
        let at = self.index.entries.len() as u32;
        let alike = std::array::from_fn(|level| {
            let beginning = &beginning.as_bytes()[..beginning.len().min(BEGINNINGS[level])];
            *self.firsts[level].entry(xxh3_64(beginning)).or_insert(at)
        });
        self.alike.push(alike);
        let (offset, bytes) = (begin + lead as u64, fits.then_some(text.len() as u32));
        self.index.entries.push(Entry { offset, bytes, line: number as u32, checksum: xxh3_64(text), wanted });
        Ok(())
    }

    fn note_fields(&mut self, line: &Line, number: u32) {
        let fields = &mut self.index.fields;
        let of_body = line.body.keys().map(|field| (line.url.as_str(), field));
        for (url, field) in line.others.iter().map(|field| ("", field)).chain(of_body) {
            if field.len() <= LONGEST_FIELD && url.len() <= LONGEST_FIELD && fields.len() < MOST_FIELDS {
                fields.entry((url.to_owned(), field.clone())).or_insert(number);
            }
        }
    }

    fn finish(mut self) -> Index {
        self.index.order = (0..self.index.entries.len() as u32).collect();
        self.index.order.sort_by_key(|&at| self.alike[at as usize]);
        self.index
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::{Access, Files as _, SystemFiles};

    fn index(bytes: &[u8]) -> Result<Index, BatchError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in.jsonl");
        std::fs::write(&path, bytes).unwrap();
        Index::read(&path, &*SystemFiles.open(&path, Access::Read).unwrap())
    }

    #[test]
    fn lines_end_in_any_way_and_empty_ones_are_none() {
        let text = b"\xef\xbb\xbf{\"prompt\": \"a\"}\r\n\n  \t\r\n {\"prompt\": \"b\"} \nnonsense\n{\"prompt\": \"c\"}";
        let found = index(text).unwrap();
        let lines: Vec<u32> = found.entries.iter().map(|entry| entry.line).collect();
        assert_eq!(lines, [1, 4, 5, 6]);
        let whole = |entry: &Entry| &text[entry.offset as usize..][..entry.bytes.unwrap() as usize];
        assert_eq!(whole(&found.entries[0]), b"{\"prompt\": \"a\"}");
        assert_eq!(whole(&found.entries[1]), b"{\"prompt\": \"b\"}");
        assert_eq!(whole(&found.entries[3]), b"{\"prompt\": \"c\"}");
        assert_eq!(found.length, text.len() as u64);
        assert_eq!(found.digest, xxh3_128(text));
        assert_eq!(index(b"").unwrap().entries.len(), 0);
        assert_eq!(index(b"\xef\xbb\xbf\n").unwrap().entries.len(), 0);
    }

    #[test]
    fn a_name_that_comes_twice_is_refused() {
        let text = "{\"custom_id\": \"a\", \"prompt\": \"x\"}\n\n{\"custom_id\": \"a\", \"url\": 3}\n";
        let Err(BatchError::Duplicate { first: 1, second: 3, id, .. }) = index(text.as_bytes()) else { panic!() };
        assert_eq!(id, "a");
        let made_up = "{\"prompt\": \"x\"}\n{\"custom_id\": \"line-1\", \"prompt\": \"y\"}\n";
        assert!(matches!(index(made_up.as_bytes()), Err(BatchError::Duplicate { .. })));
    }

    #[test]
    fn fields_are_remembered_with_the_first_line_that_has_them() {
        let lines = [
            r#"{"prompt": "a"}"#,
            r#"{"prompt": "b", "max_token": 3}"#,
            r#"{"url": "/v1/x", "body": {"n": 1}, "custm_id": 3}"#,
        ];
        let found = index(lines.join("\n").as_bytes()).unwrap().fields;
        let field = |url: &str, name: &str| (url.to_owned(), name.to_owned());
        let want = [
            (field("", "custm_id"), 3),
            (field("/v1/completions", "max_token"), 2),
            (field("/v1/completions", "prompt"), 1),
            (field("/v1/x", "n"), 3),
        ];
        assert_eq!(found, BTreeMap::from(want));
        let many: String = (0..1000).map(|n| format!("{{\"prompt\": \"\", \"{n}\": 0}}\n")).collect();
        assert_eq!(index(many.as_bytes()).unwrap().fields.len(), MOST_FIELDS);
    }

    #[test]
    fn a_line_without_end_is_not_kept() {
        let mut text = b"{\"prompt\": \"".to_vec();
        text.resize(LONGEST_LINE + 100, b'x');
        text.extend(b"\"}\n{\"prompt\": \"b\"}\n");
        let found = index(&text).unwrap();
        assert_eq!((found.entries[0].bytes, found.entries[1].line), (None, 2));
    }

    #[test]
    fn texts_that_begin_alike_follow_each_other() {
        let (one, other) = ("a".repeat(2000), "b".repeat(300));
        let texts = [one.clone() + "1", other.clone() + "1", "short".into(), one + "2", "short".into(), other + "2"];
        let lines: Vec<String> = texts.iter().map(|text| format!("{{\"prompt\": \"{text}\"}}\n")).collect();
        assert_eq!(index(lines.concat().as_bytes()).unwrap().order, [0, 3, 1, 5, 2, 4]);
    }
}
