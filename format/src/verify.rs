//! Verifying a whole file: every extent, in bounded memory.

use std::os::unix::fs::FileExt;

use sluice_checksum::Xxh3;

use crate::checksum;
use crate::error::{FormatError, Region};
use crate::extent::{Codec, ExtentRecord};
use crate::reader::{ModelFile, checksum_error, read_table, stripe_checksum_error};
use crate::volumes::Volume;

/// Bytes read at once: far more than a drive needs for its full rate, and little memory.
const PIECE: usize = 8 << 20;

impl ModelFile {
    /// Reads every extent in table order, through the page cache and a buffer of 8 MiB, and returns what is wrong: one
    /// [`FormatError::ExtentChecksum`], [`FormatError::ExtentCode`] or [`FormatError::ExtentRead`] for each damaged extent, one
    /// [`FormatError::RegionChecksum`] or [`FormatError::Io`] for each damaged table of a volume behind the first, none for a sound
    /// model. [`ModelFile::open`] has verified the other superblocks, tables and metadata, so together every byte of the files is
    /// checked. A compressed extent is in memory as a whole while it is decompressed.
    ///
    /// `progress` is told the bytes done so far, up to [`ModelFile::extent_bytes`].
    pub fn verify_all(&self, progress: &mut dyn FnMut(u64)) -> Vec<FormatError> {
        let longest = self.extents().iter().map(|e| e.stored_len).max().unwrap_or(0);
        let mut buffer = vec![0; longest.min(PIECE as u64) as usize];
        let mut damaged: Vec<FormatError> = self.volumes().iter().skip(1).flat_map(verify_tables).collect();
        let mut done = 0;
        for extent in self.extents() {
            let outcome = match extent.codec {
                Codec::Raw => self.verify_streaming(extent, &mut buffer, &mut |part| progress(done + part)),
                Codec::Planes => self.read_extent(extent, &mut Vec::new()),
            };
            damaged.extend(outcome.err());
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
        let stripes = self.stripes(extent);
        let mut whole = Xxh3::new();
        let mut done = 0;
        for stripe in stripes {
            let volume = self.volume_of(stripe);
            let (mut hash, mut of_stripe) = (Xxh3::new(), 0);
            while of_stripe < stripe.len {
                let len = (stripe.len - of_stripe).min(buffer.len() as u64);
                let piece = &mut buffer[..len as usize];
                let read = volume.file().read_exact_at(piece, stripe.offset + of_stripe);
                read.map_err(|source| self.stripe_read(extent, stripe, source))?;
                hash.update(piece);
                if stripes.len() > 1 {
                    whole.update(piece);
                }
                of_stripe += len;
                done += len;
                if done < extent.stored_len {
                    progress(done);
                }
            }
            if hash.digest() != stripe.checksum {
                return Err(stripe_checksum_error(volume.path(), extent, stripe));
            }
        }
        // That stripes are right does not say that they are in their order.
        match stripes.len() == 1 || whole.digest() == extent.checksum {
            true => Ok(()),
            false => Err(checksum_error(self.path_of(extent), extent)),
        }
    }
}

/// What is wrong with the tables of a volume.
fn verify_tables(volume: &Volume) -> Vec<FormatError> {
    let sb = volume.superblock();
    let tables =
        [(Region::ExtentTable, sb.extents), (Region::TensorTable, sb.tensors), (Region::Metadata, sb.metadata)];
    let verify = |(region, table): (Region, crate::TableRef)| {
        let bytes = read_table(volume.path(), volume.file(), sb, region, table)?;
        match checksum(&bytes) == table.checksum {
            true => Ok(()),
            false => Err(FormatError::RegionChecksum { path: volume.path().to_owned(), region }),
        }
    };
    tables.into_iter().filter_map(|table| verify(table).err()).collect()
}
