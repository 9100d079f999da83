//! Verifying a whole file: every extent, in bounded memory.

use std::os::unix::fs::FileExt;

use sluice_checksum::Xxh3;

use crate::error::FormatError;
use crate::extent::ExtentRecord;
use crate::reader::{ModelFile, checksum_error};

/// Bytes read at once: far above what a drive needs to reach its full rate, far below any extent that would hurt.
const PIECE: usize = 8 << 20;

impl ModelFile {
    /// Reads every extent in file order, through the page cache and a buffer of 8 MiB, and returns what is wrong: one
    /// [`FormatError::ExtentChecksum`] or [`FormatError::ExtentRead`] for each damaged extent, none for a sound file.
    /// Superblock, tables and metadata have been verified by [`ModelFile::open`]; together that is every byte of the file.
    ///
    /// `progress` is told the bytes done so far, up to [`ModelFile::extent_bytes`].
    pub fn verify_all(&self, progress: &mut dyn FnMut(u64)) -> Vec<FormatError> {
        let longest = self.extents().iter().map(|e| e.stored_len).max().unwrap_or(0);
        let mut buffer = vec![0; longest.min(PIECE as u64) as usize];
        let mut damaged = Vec::new();
        let mut done = 0;
        for extent in self.extents() {
            damaged.extend(self.verify_streaming(extent, &mut buffer, &mut |part| progress(done + part)).err());
            done += extent.stored_len;
            progress(done);
        }
        damaged
    }

    fn verify_streaming(
        &self,
        extent: &ExtentRecord,
        buffer: &mut [u8],
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), FormatError> {
        let mut hash = Xxh3::new();
        let mut done = 0;
        while done < extent.stored_len {
            let len = (extent.stored_len - done).min(buffer.len() as u64);
            let piece = &mut buffer[..len as usize];
            let read = self.file().read_exact_at(piece, extent.offset + done);
            read.map_err(|source| self.extent_read(extent, source))?;
            hash.update(piece);
            done += len;
            if done < extent.stored_len {
                progress(done);
            }
        }
        if hash.digest() == extent.checksum { Ok(()) } else { Err(checksum_error(self.path(), extent)) }
    }
}
