//! Restores sequences.

use std::io::{self, Read, Seek as _, SeekFrom};
use std::ops::Range;
use std::path::Path;

use sluice_checksum::Xxh3;

use super::header::Header;
use super::{Part, PrefixHash, Section, SegmentFile, SessionError, file_len, kept_len, mark_len, rows_len, stretches};
use crate::cache::LayerCacheMut;
use crate::sequence::Sequence;

/// A file that is being read, part by part.
pub(super) struct Reader<'a> {
    pub input: &'a mut dyn Read,
    pub path: &'a Path,
    pub part: Part,
    /// Offset at which the part begins.
    pub begin: u64,
    pub offset: u64,
    /// Seed of the checksum of every section: the checksum of the header, so that no section can come from another file.
    pub seed: u64,
    pub buffer: Vec<u8>,
}

impl<'a> Reader<'a> {
    pub fn new(input: &'a mut dyn Read, path: &'a Path) -> Self {
        Reader { input, path, part: Part::Header, begin: 0, offset: 0, seed: 0, buffer: Vec::new() }
    }

    pub fn exact(&mut self, out: &mut [u8]) -> Result<(), SessionError> {
        let (path, part) = (self.path, self.part);
        self.input.read_exact(out).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => SessionError::Truncated { path: path.to_owned(), part, offset: self.begin },
            _ => SessionError::Read { path: path.to_owned(), part, offset: self.offset, source },
        })?;
        self.offset += out.len() as u64;
        Ok(())
    }

    pub fn damaged(&self) -> SessionError {
        SessionError::Damaged { path: self.path.to_owned(), part: self.part, offset: self.begin }
    }

    pub fn misplaced(&self) -> SessionError {
        SessionError::Misplaced { path: self.path.to_owned(), part: self.part, offset: self.begin }
    }

    /// Reads a section, which must be this one; `record` gets each record before the checksum has been verified.
    fn section(
        &mut self,
        part: Part,
        section: &Section,
        mut record: impl FnMut(usize, &[u8]),
    ) -> Result<(), SessionError> {
        (self.part, self.begin) = (part, self.offset);
        let mut hash = Xxh3::with_seed(self.seed);
        let mut found = section.begin;
        self.exact(&mut found)?;
        if found != section.begin {
            return Err(self.misplaced());
        }
        hash.update(&found);
        let mut buffer = std::mem::take(&mut self.buffer);
        section.blocks(&mut buffer, |records, bytes| {
            self.exact(bytes)?;
            hash.update(bytes);
            records.zip(bytes.chunks_exact(section.record_len)).for_each(|(i, bytes)| record(i, bytes));
            Ok(())
        })?;
        self.buffer = buffer;
        let mut sum = [0; 8];
        self.exact(&mut sum)?;
        if hash.digest().to_le_bytes() == sum { Ok(()) } else { Err(self.damaged()) }
    }

    /// An error if the file, of `found` bytes, is not as long as its header says.
    pub fn is_whole(&self, header: &Header, found: u64) -> Result<(), SessionError> {
        let path = || self.path.to_owned();
        match found.cmp(&header.length) {
            std::cmp::Ordering::Less => {
                Err(SessionError::Truncated { path: path(), part: Part::End, offset: header.length })
            }
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => {
                Err(SessionError::Misplaced { path: path(), part: Part::End, offset: header.length })
            }
        }
    }

    /// Reads the tokens; `token` gets each before their checksum has been verified. Nothing is allocated for them.
    pub fn tokens(&mut self, header: &Header, mut token: impl FnMut(u32)) -> Result<(), SessionError> {
        let section = Section::tokens(header.start as usize..header.position as usize);
        self.section(Part::Tokens, &section, |_, bytes| token(u32_at(bytes, 0)))
    }

    /// Reads the marks: their positions, and whether they were made automatically.
    pub fn marks(&mut self, header: &Header) -> Result<Vec<(usize, bool)>, SessionError> {
        let mut marks = Vec::new();
        self.section(Part::Marks, &Section::marks(header.marks as usize), |_, bytes| {
            marks.push((u64_at(bytes, 0), u32_at(bytes, 8) == 0));
        })?;
        let positions = header.start..=header.position;
        let inside = marks.iter().all(|(position, _)| positions.contains(position));
        match inside && marks.is_sorted_by(|a, b| a.0 < b.0) {
            true => Ok(marks.into_iter().map(|(position, automatic)| (position as usize, automatic)).collect()),
            false => Err(self.misplaced()),
        }
    }

    /// Reads the rows of these positions, the first of which is the first of the file. The last stretch may have rows after them,
    /// which are read and not kept.
    fn rows(&mut self, sequence: &mut Sequence, header: &Header, until: usize) -> Result<(), SessionError> {
        for positions in stretches(header.start as usize..header.position as usize) {
            if positions.start >= until {
                break;
            }
            for i in 0..sequence.stores() {
                if sequence.forgets(i) {
                    continue;
                }
                let layer = sequence.layer_of(i);
                let part = Part::Rows { first: positions.start, layer };
                let mut store = sequence.store_mut(i);
                let end = store.as_ref().records_of(0..until).end;
                let section = Section::rows(layer, store.as_ref(), store.as_ref().records_of(positions.clone()));
                self.section(part, &section, |record, bytes| {
                    if record < end {
                        store.record_from_bytes(record, bytes);
                    }
                })?;
            }
        }
        Ok(())
    }

    /// Reads what a layer with a window or a state remembers of `position` tokens.
    fn kept(
        &mut self,
        part: Part,
        index: usize,
        mut layer: LayerCacheMut<'_>,
        position: usize,
    ) -> Result<(), SessionError> {
        let section = Section::kept(index, layer.as_ref(), position);
        self.section(part, &section, |record, bytes| layer.record_from_bytes(record, bytes))
    }

    /// Checks that nothing follows.
    fn end(&mut self) -> Result<(), SessionError> {
        (self.part, self.begin) = (Part::End, self.offset);
        match self.exact(&mut [0]) {
            Err(SessionError::Truncated { .. }) => Ok(()),
            Err(error) => Err(error),
            Ok(()) => Err(self.misplaced()),
        }
    }
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// A sequence that has the tokens of `base` before the segment in `input`, and then those of the segment, with its marks. `base`
/// does not change.
///
/// # Errors
/// [`SessionError`].
pub(crate) fn append(
    base: &Sequence,
    vocab: usize,
    input: &mut dyn Read,
    path: &Path,
) -> Result<Sequence, SessionError> {
    let mut reader = Reader::new(input, path);
    let header = Header::read(&mut reader)?;
    header.check(base, &reader)?;
    let (start, position) = header.range(path, base.capacity())?;
    if start > base.position() {
        let path = path.to_owned();
        return Err(SessionError::Continues { path, start: header.start, position: base.position() });
    }
    if PrefixHash::of(&base.phased()[..start]) != header.before {
        return Err(SessionError::OtherText { path: path.to_owned(), start: header.start });
    }
    let mut tokens = Vec::new();
    reader.tokens(&header, |token| tokens.push(token))?;
    in_vocabulary(base, &tokens, vocab, &reader)?;
    if header.before.then(&tokens) != header.text {
        return Err(reader.misplaced());
    }
    let marks = reader.marks(&header)?;
    let full = |full| SessionError::PagesFull { path: path.to_owned(), full };
    let mut sequence = base.beginning(start);
    sequence.make_room(position).map_err(full)?;
    if header.length != file_len(&sequence, start..position, marks.iter().map(|mark| mark.0)) {
        return Err(SessionError::Misplaced { path: path.to_owned(), part: Part::Header, offset: 0 });
    }
    reader.rows(&mut sequence, &header, position)?;
    for i in 0..sequence.stores() {
        if sequence.forgets(i) {
            let layer = sequence.layer_of(i);
            reader.kept(Part::Layer(layer), layer, sequence.store_mut(i), position)?;
        }
    }
    sequence.restored(&tokens);
    append_marks(&mut reader, &mut sequence, &marks)?;
    sequence.limit_marks();
    reader.end()?;
    Ok(sequence)
}

/// Reads the contents of marks. Of the marks that keep something, the newest stay, as many as there is room for.
fn append_marks(reader: &mut Reader<'_>, sequence: &mut Sequence, marks: &[(usize, bool)]) -> Result<(), SessionError> {
    for (i, &(position, automatic)) in marks.iter().enumerate() {
        let mut mark = sequence.room_for_mark(marks.len() - i, position, automatic);
        for i in (0..sequence.stores()).filter(|&i| position > 0 && sequence.forgets(i)) {
            let layer = sequence.layer_of(i);
            let part = Part::Mark { position, layer };
            let store = mark.as_mut().and_then(|mark| sequence.store_at_mut(mark, i));
            match store {
                Some(store) => reader.kept(part, layer, store, position)?,
                None => reader.section(part, &Section::kept(layer, sequence.store(i), position), |_, _| ())?,
            }
        }
        mark.into_iter().for_each(|mark| sequence.restore_mark(mark));
    }
    Ok(())
}

/// An error if the tokens that were just read, with phases as in `base`, are not all in the vocabulary.
fn in_vocabulary(base: &Sequence, tokens: &[u32], vocab: usize, reader: &Reader<'_>) -> Result<(), SessionError> {
    let Some(at) = tokens.iter().position(|&token| base.id_of(token) as usize >= vocab) else { return Ok(()) };
    let offset = reader.begin + (super::SECTION_LEN + 4 * at) as u64;
    Err(SessionError::Token { path: reader.path.to_owned(), offset, token: tokens[at], vocab })
}

/// A segment whose header, tokens and marks have been read.
struct Opened<'a> {
    file: &'a mut SegmentFile,
    header: Header,
    seed: u64,
    marks: Vec<usize>,
    /// Offset at which the rows begin.
    rows_at: u64,
    /// Tokens of the wanted text that it has, including those before it.
    agreed: usize,
}

/// A place where a sequence can continue: the segment, the position, and the number of the mark there if it is not the segment's
/// end.
#[derive(Clone, Copy)]
struct Target {
    segment: usize,
    position: usize,
    mark: Option<usize>,
}

impl<'a> Opened<'a> {
    /// Reads the parts before the rows, and compares them with the model and with the wanted text.
    fn open(file: &'a mut SegmentFile, sequence: &Sequence, tokens: &[u32]) -> Result<Self, SessionError> {
        let path = file.path.as_path();
        let found = file.file.metadata().map_err(|source| SessionError::Open { path: path.to_owned(), source })?.len();
        let mut reader = Reader::new(&mut file.file, path);
        let header = Header::read(&mut reader)?;
        header.check(sequence, &reader)?;
        let (start, position) = header.range(path, usize::MAX)?;
        reader.is_whole(&header, found)?;
        let before = tokens.get(..start).map(PrefixHash::of);
        if before != Some(header.before) {
            return Err(SessionError::OtherText { path: path.to_owned(), start: header.start });
        }
        let mut wanted = tokens[start..].iter();
        let (mut agreed, mut text) = (start, Vec::new());
        reader.tokens(&header, |token| {
            text.push(token);
            if wanted.next() == Some(&token) && agreed + 1 == start + text.len() {
                agreed += 1;
            }
        })?;
        if header.before.then(&text) != header.text {
            return Err(reader.misplaced());
        }
        let marks: Vec<_> = reader.marks(&header)?.into_iter().map(|(position, _)| position).collect();
        if header.length != file_len(sequence, start..position, marks.iter().copied()) {
            return Err(SessionError::Misplaced { path: path.to_owned(), part: Part::Header, offset: 0 });
        }
        let (seed, rows_at) = (reader.seed, reader.offset);
        Ok(Opened { file, header, seed, marks, rows_at, agreed })
    }

    fn positions(&self) -> Range<usize> {
        self.header.start as usize..self.header.position as usize
    }

    /// The last place in this segment where a sequence of up to `most` tokens can continue.
    fn target(&self, segment: usize, most: usize) -> Option<Target> {
        let most = most.min(self.agreed);
        let end = self.positions().end;
        if self.header.forgetting == 0 || end <= most {
            return Some(Target { segment, position: end.min(most), mark: None });
        }
        let mark = self.marks.iter().rposition(|&position| position <= most && position > 0)?;
        Some(Target { segment, position: self.marks[mark], mark: Some(mark) })
    }

    /// Reads rows up to a position.
    fn rows(&mut self, sequence: &mut Sequence, until: usize) -> Result<(), SessionError> {
        let mut reader = Reader::new(&mut self.file.file, &self.file.path);
        (reader.seed, reader.offset) = (self.seed, self.rows_at);
        reader.rows(sequence, &self.header, until)
    }

    /// Reads what layers with windows and states must remember to continue at the target.
    fn kept(&mut self, sequence: &mut Sequence, target: Target) -> Result<(), SessionError> {
        let end = self.positions().end;
        let rows_end = self.rows_at + rows_len(sequence, self.positions());
        let before = self.marks[..target.mark.unwrap_or(0)].iter();
        let skipped = match target.mark {
            Some(_) => kept_len(sequence, end) + before.map(|&mark| mark_len(sequence, mark)).sum::<u64>(),
            None => 0,
        };
        let SegmentFile { file, path } = &mut *self.file;
        let offset = file.seek(SeekFrom::Start(rows_end + skipped)).map_err(|source| SessionError::Read {
            path: path.clone(),
            part: Part::End,
            offset: rows_end,
            source,
        })?;
        let mut reader = Reader::new(file, path);
        (reader.seed, reader.offset) = (self.seed, offset);
        for i in 0..sequence.stores() {
            if sequence.forgets(i) {
                let layer = sequence.layer_of(i);
                let part = match target.mark {
                    Some(_) => Part::Mark { position: target.position, layer },
                    None => Part::Layer(layer),
                };
                reader.kept(part, layer, sequence.store_mut(i), target.position)?;
            }
        }
        Ok(())
    }
}

/// Fills an empty sequence with what a chain of segments has of a text, as far as a sequence can go on there. `tokens`: those of the
/// text, with their phases where these are told apart.
///
/// # Errors
/// [`SessionError`].
pub(crate) fn restore_segments(
    mut sequence: Sequence,
    vocab: usize,
    files: &mut [SegmentFile],
    tokens: &[u32],
) -> Result<Sequence, SessionError> {
    let mut segments: Vec<Opened<'_>> = Vec::new();
    for file in files {
        let opened = Opened::open(file, &sequence, tokens)?;
        let start = opened.positions().start;
        // The segment before has all tokens before this one, and they are those of the text.
        let follows =
            segments.last().map_or(start == 0, |before| before.positions().start < start && start <= before.agreed);
        if !follows {
            let position = segments.last().map_or(0, |before| before.agreed);
            let path = opened.file.path.clone();
            return Err(SessionError::Continues { path, start: start as u64, position });
        }
        segments.push(opened);
    }
    let capacity = sequence.capacity();
    let targets = segments.iter().enumerate().filter_map(|(i, segment)| segment.target(i, capacity));
    // If two segments lead to the same position, using the first saves reading the other.
    let target = targets.reduce(|best, target| if target.position > best.position { target } else { best });
    let Some(target) = target.filter(|target| target.position > 0) else { return Ok(sequence) };
    let last = &segments[target.segment];
    let wanted = &tokens[..target.position];
    if let Some(at) = wanted.iter().position(|&token| sequence.id_of(token) as usize >= vocab) {
        let path = last.file.path.clone();
        return Err(SessionError::Token { path, offset: 0, token: tokens[at], vocab });
    }
    let path = last.file.path.clone();
    sequence.make_room(target.position).map_err(|full| SessionError::PagesFull { path, full })?;
    for i in 0..=target.segment {
        let next = segments.get(i + 1).filter(|_| i < target.segment).map(|next| next.positions().start);
        segments[i].rows(&mut sequence, next.unwrap_or(target.position).min(target.position))?;
    }
    segments[target.segment].kept(&mut sequence, target)?;
    sequence.restored(wanted);
    Ok(sequence)
}
