//! Saves sequences.

use std::io::{self, Write};
use std::path::Path;

use sluice_checksum::Xxh3;
use sluice_format::{may_replace, remove_leftovers, replace_private_file_with};

use super::header::Header;
use super::{SESSION_MAGIC, Section, SessionError, file_len, stretches};
use crate::cache::PAGE_TOKENS;
use crate::sequence::{Sequence, Snapshot};

impl Sequence {
    /// Writes the sequence with its marks, in the format of `docs/SESSIONS.md`, in pieces of a few hundred kilobytes.
    ///
    /// # Errors
    /// The errors of `out`.
    pub fn save(&self, out: &mut dyn Write) -> io::Result<()> {
        self.write_from(0, out)
    }

    /// Writes the sequence from token `start` on, a multiple of [`PAGE_TOKENS`], with the marks from there on. Restoring it
    /// requires the tokens before (`Engine::restore_onto`).
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if no segment can begin at `start`; otherwise the errors of `out`.
    pub fn save_from(&self, start: usize, out: &mut dyn Write) -> io::Result<()> {
        self.check_start(start).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        self.write_from(start, out)
    }

    /// Saves the sequence under a name, atomically: whatever happens, the file is the old one or the new one. Only a session is
    /// replaced. Files that killed processes left beside it while saving are removed. Only its owner can read it.
    ///
    /// # Errors
    /// [`SessionError::Occupied`] and [`SessionError::Save`].
    pub fn save_file(&self, path: &Path) -> Result<(), SessionError> {
        self.save_file_from(path, 0)
    }

    /// Saves the sequence from token `start` on ([`Sequence::save_from`]), in the way of [`Sequence::save_file`].
    ///
    /// # Errors
    /// [`SessionError::Start`] if no segment can begin there, [`SessionError::Occupied`] and [`SessionError::Save`].
    pub fn save_file_from(&self, path: &Path, start: usize) -> Result<(), SessionError> {
        self.check_start(start)?;
        let failed = |source| SessionError::Save { path: path.to_owned(), source };
        if !may_replace(path, &SESSION_MAGIC).map_err(failed)? {
            return Err(SessionError::Occupied { path: path.to_owned() });
        }
        remove_leftovers(path, &SESSION_MAGIC);
        replace_private_file_with(path, |file| self.write_from(start, file)).map_err(failed)
    }

    /// Bytes that [`Sequence::save_from`] writes.
    ///
    /// # Errors
    /// [`SessionError::Start`].
    pub fn saved_len(&self, start: usize) -> Result<u64, SessionError> {
        self.check_start(start)?;
        Ok(file_len(self, start..self.position(), self.marks_from(start).iter().map(Snapshot::position)))
    }

    fn check_start(&self, start: usize) -> Result<(), SessionError> {
        match start == 0 || start.is_multiple_of(PAGE_TOKENS) && start < self.position() {
            true => Ok(()),
            false => Err(SessionError::Start { start, position: self.position() }),
        }
    }

    /// The marks from token `start` on; they are in ascending order of positions.
    fn marks_from(&self, start: usize) -> &[Snapshot] {
        let marks = self.snapshots();
        &marks[marks.partition_point(|mark| mark.position() < start)..]
    }

    fn write_from(&self, start: usize, out: &mut dyn Write) -> io::Result<()> {
        let (position, marks) = (self.position(), self.marks_from(start));
        let length = file_len(self, start..position, marks.iter().map(Snapshot::position));
        let header = Header::new(self, start, marks.len(), length).to_bytes();
        out.write_all(&header)?;
        let mut writer = Writer { out, seed: Header::seed(&header), buffer: Vec::new() };
        writer.section(&Section::tokens(start..position), |record, bytes| {
            bytes.copy_from_slice(&self.phased()[record].to_le_bytes());
        })?;
        writer.section(&Section::marks(marks.len()), |record, bytes| {
            let (position, asked) = bytes.split_at_mut(8);
            position.copy_from_slice(&(marks[record].position() as u64).to_le_bytes());
            asked.copy_from_slice(&u32::from(!marks[record].is_automatic()).to_le_bytes());
        })?;
        for positions in stretches(start..position) {
            for (i, store) in self.remembering_stores().map(|i| (i, self.store(i))) {
                let section = Section::rows(self.layer_of(i), store, store.records_of(positions.clone()));
                writer.section(&section, |record, bytes| store.record_to_bytes(record, bytes))?;
            }
        }
        for (i, store) in self.forgetting_stores().map(|i| (i, self.store(i))) {
            let section = Section::kept(self.layer_of(i), store, position);
            writer.section(&section, |record, bytes| store.record_to_bytes(record, bytes))?;
        }
        for mark in marks {
            for (i, store) in self.forgetting_stores().filter_map(|i| Some((i, self.store_at(mark, i)?))) {
                let section = Section::kept(self.layer_of(i), store, mark.position());
                writer.section(&section, |record, bytes| store.record_to_bytes(record, bytes))?;
            }
        }
        writer.out.flush()
    }
}

struct Writer<'a> {
    out: &'a mut dyn Write,
    /// Seed of the checksum of every section.
    seed: u64,
    buffer: Vec<u8>,
}

impl Writer<'_> {
    /// Writes a section; `record` gives the bytes of each record.
    fn section(&mut self, section: &Section, record: impl Fn(usize, &mut [u8])) -> io::Result<()> {
        let Writer { out, seed, buffer } = self;
        let mut hash = Xxh3::with_seed(*seed);
        hash.update(&section.begin);
        out.write_all(&section.begin)?;
        section.blocks(buffer, |records, bytes| {
            records.zip(bytes.chunks_exact_mut(section.record_len)).for_each(|(i, bytes)| record(i, bytes));
            hash.update(bytes);
            out.write_all(bytes)
        })?;
        out.write_all(&hash.digest().to_le_bytes())
    }
}
