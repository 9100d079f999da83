//! Rows of tables that are far larger than memory. Their sectors are read when they are wanted, and the most recently wanted
//! stay in memory.
//!
//! A table's rows follow from tokens, so they are known before the layer that needs them. A caller that needs many rows first announces
//! them all with [`SectorCache::want`], which starts the reads, and then takes them one by one with [`SectorCache::row`], which waits. A
//! sector has its own checksum, so only that sector has to be read, and no row is handed out before the checksum has been compared.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sluice_format::sectors::{SectorId, Sectors};

use super::PoolError;
use crate::io::{Arena, Check, Class, ExtentName, ExtentRead, PendingRead, ReadError, Scheduler, Slot};

/// How many places are compared to find the one whose sector has not been wanted for longest.
const SAMPLED: usize = 16;

/// Where a table is.
#[derive(Clone, Debug)]
pub struct TableLocation {
    /// The layer of the table.
    pub layer: u32,
    /// How its rows lie.
    pub sectors: Sectors,
    /// Rows of each part but the last.
    pub part_rows: u64,
    /// File and byte offset of each part.
    pub parts: Vec<(u16, u64)>,
}

impl TableLocation {
    /// The sector of a row, and the place of its first byte there.
    fn place(&self, row: u64) -> (SectorId, usize) {
        let (sector, byte) = self.sectors.place((row % self.part_rows) as usize);
        (SectorId { layer: self.layer, part: (row / self.part_rows) as u32, sector: sector as u32 }, byte)
    }
}

/// The sectors of tables that are in memory or on their way there.
#[derive(Debug)]
pub struct SectorCache {
    io: Arc<Scheduler>,
    tables: Vec<TableLocation>,
    places: Vec<Place>,
    /// Where each sector is.
    found: HashMap<SectorId, usize>,
    /// Where the next search for a place begins.
    hand: usize,
    /// Counts how often sectors were wanted.
    clock: u64,
    bytes_read: u64,
    wait: Duration,
    /// The memory has been given back to the system.
    away: bool,
}

/// A slot for a sector.
#[derive(Debug)]
struct Place {
    id: Option<SectorId>,
    /// When it was wanted last.
    used: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// Nothing, or bytes that are not verified.
    Free(Slot),
    Reading(PendingRead),
    /// Verified.
    Ready(Slot),
    /// The slot is gone: the I/O thread died while a drive could write to it.
    Lost,
}

impl SectorCache {
    /// Reserves addresses for `places` sectors of the longest kind, or none if there are no tables.
    ///
    /// # Errors
    /// [`PoolError::Io`] if the system does not give the addresses.
    pub fn reserve(tables: &[TableLocation], places: usize) -> Result<Arena, PoolError> {
        let longest = tables.iter().map(|table| table.sectors.len).max();
        let places = if longest.is_some() { places.max(1) } else { 0 };
        Ok(Arena::uniform(longest.unwrap_or(0), places, "rows of tables")?)
    }

    /// A cache in the memory that [`reserve`](Self::reserve) took for the same tables.
    pub fn new(io: &Arc<Scheduler>, memory: Arena, tables: Vec<TableLocation>) -> Self {
        let place = |slot| Place { id: None, used: 0, content: Content::Free(slot) };
        let places: Vec<Place> = memory.into_slots().into_iter().map(place).collect();
        SectorCache {
            io: Arc::clone(io),
            tables,
            found: HashMap::with_capacity(2 * places.len()),
            places,
            hand: 0,
            clock: 0,
            bytes_read: 0,
            wait: Duration::ZERO,
            away: false,
        }
    }

    /// How many rows can be wanted before they are taken, so that none of them has to be read twice.
    pub fn ahead(&self) -> usize {
        (self.places.len() / 2).max(1)
    }

    /// Bytes read so far.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Time in which [`SectorCache::row`] was blocked.
    pub fn wait(&self) -> Duration {
        self.wait
    }

    /// Starts to read the sector with row `row` of table number `table`, unless it is in memory or already being
    /// read.
    ///
    /// # Errors
    /// [`PoolError::Read`] if the read cannot even be queued, [`PoolError::NoSlots`] if there is no memory left to read into.
    ///
    /// # Panics
    /// If there is no such table or row, or the memory has been given back.
    pub fn want(&mut self, table: usize, row: u64, class: Class) -> Result<(), PoolError> {
        self.find(table, self.tables[table].place(row).0, class).map(drop)
    }

    /// The bytes of row `row` of table number `table`, verified.
    ///
    /// # Errors
    /// [`PoolError::Read`] if it cannot be read, or is damaged, also when it is read again; [`PoolError::NoSlots`] as
    /// [`SectorCache::want`].
    ///
    /// # Panics
    /// As [`SectorCache::want`].
    pub fn row(&mut self, table: usize, row: u64) -> Result<&[u8], PoolError> {
        let (id, byte) = self.tables[table].place(row);
        let number = self.find(table, id, Class::Demand)?;
        if matches!(self.places[number].content, Content::Reading(_)) {
            self.finish(table, id, number)?;
        }
        let Content::Ready(slot) = &self.places[number].content else { return Err(PoolError::NoSlots) };
        Ok(&slot.bytes()[byte..byte + self.tables[table].sectors.row_len])
    }

    /// The place of a sector; starts to read the sector if it is not in memory.
    fn find(&mut self, table: usize, id: SectorId, class: Class) -> Result<usize, PoolError> {
        assert!(!self.away, "the rows of tables have been given back");
        self.clock += 1;
        let number = match self.found.get(&id) {
            Some(&number) => number,
            None => {
                let (number, slot) = self.free_place()?;
                self.submit(table, id, (number, slot), class)?;
                number
            }
        };
        self.places[number].used = self.clock;
        Ok(number)
    }

    /// Queues the read of a sector into the slot of a place.
    fn submit(
        &mut self,
        table: usize,
        id: SectorId,
        (number, slot): (usize, Slot),
        class: Class,
    ) -> Result<(), PoolError> {
        let read = self.read_of(table, id, class);
        match self.io.submit(slot, read) {
            Ok(pending) => {
                self.places[number].id = Some(id);
                self.places[number].content = Content::Reading(pending);
                self.found.insert(id, number);
                Ok(())
            }
            Err(failure) => {
                self.places[number].content = failure.slot.map_or(Content::Lost, Content::Free);
                Err((*failure.error).into())
            }
        }
    }

    fn read_of(&self, table: usize, id: SectorId, class: Class) -> ExtentRead {
        let TableLocation { sectors, parts, .. } = &self.tables[table];
        let (file, offset) = parts[id.part as usize];
        ExtentRead {
            file,
            offset: offset + u64::from(id.sector) * sectors.len as u64,
            len: sectors.len,
            checksum: 0,
            class,
            // The sector itself says what its checksum must be.
            check: Check::ByReceiver,
            name: ExtentName { kind: "table", layer: Some(id.layer), index: Some(id.part) },
        }
    }

    /// Waits for the read of a sector and verifies what has come; a damaged one is read once more.
    fn finish(&mut self, table: usize, id: SectorId, number: usize) -> Result<(), PoolError> {
        let started = Instant::now();
        let outcome = self.finish_read(table, id, number);
        self.wait += started.elapsed();
        if outcome.is_err() {
            self.found.remove(&id);
            self.places[number].id = None;
        }
        outcome
    }

    fn finish_read(&mut self, table: usize, id: SectorId, number: usize) -> Result<(), PoolError> {
        let sectors = self.tables[table].sectors;
        let mut again = false;
        loop {
            let content = std::mem::replace(&mut self.places[number].content, Content::Lost);
            let Content::Reading(read) = content else { return Err(PoolError::NoSlots) };
            read.promote();
            let slot = match read.finish() {
                Ok(slot) => slot,
                Err(failure) => {
                    self.places[number].content = failure.slot.map_or(Content::Lost, Content::Free);
                    return Err((*failure.error).into());
                }
            };
            self.bytes_read += slot.bytes().len() as u64;
            let (expected, got) = match sectors.check(id, slot.bytes()) {
                Err(sums) if self.io.verifies() => sums,
                _ => {
                    self.places[number].content = Content::Ready(slot);
                    return Ok(());
                }
            };
            if again {
                let ExtentRead { file, offset, len, name: extent, .. } = self.read_of(table, id, Class::Demand);
                let path = self.io.path(file).to_owned();
                self.places[number].content = Content::Free(slot);
                return Err(ReadError::Checksum { extent, path, offset, len, expected, got }.into());
            }
            self.submit(table, id, (number, slot), Class::Demand)?;
            again = true;
        }
    }

    /// Frees a place whose sector has not been wanted for long, and returns it with its slot. The most recently wanted
    /// sectors, as many as [`SectorCache::ahead`], keep theirs.
    fn free_place(&mut self) -> Result<(usize, Slot), PoolError> {
        let (count, recent) = (self.places.len(), self.clock.saturating_sub(self.ahead() as u64));
        let in_turn = (0..count).map(|i| (self.hand + i) % count);
        let usable = |&number: &usize| {
            let Place { id, used, content } = &self.places[number];
            !matches!(content, Content::Lost) && (id.is_none() || *used < recent || count == 1)
        };
        let oldest = in_turn.filter(usable).take(SAMPLED).min_by_key(|&number| {
            let Place { id, used, .. } = &self.places[number];
            (id.is_some(), *used)
        });
        let number = oldest.or_else(|| self.oldest_of_all()).ok_or(PoolError::NoSlots)?;
        self.hand = (number + 1) % count;
        let place = &mut self.places[number];
        if let Some(id) = place.id.take() {
            self.found.remove(&id);
        }
        match std::mem::replace(&mut place.content, Content::Lost) {
            Content::Free(slot) | Content::Ready(slot) => Ok((number, slot)),
            Content::Reading(read) => {
                read.cancel();
                let slot = read.finish().or_else(|failure| failure.slot.ok_or(PoolError::NoSlots))?;
                Ok((number, slot))
            }
            Content::Lost => Err(PoolError::NoSlots),
        }
    }

    /// If slots have been lost, all remaining sectors may have been wanted lately.
    fn oldest_of_all(&self) -> Option<usize> {
        let there = (0..self.places.len()).filter(|&number| !matches!(self.places[number].content, Content::Lost));
        there.min_by_key(|&number| self.places[number].used)
    }

    /// Gives all memory back to the system. Nothing can be asked for until [`take_again`](Self::take_again).
    pub fn give_back(&mut self) {
        self.away = true;
        self.found.clear();
        for place in &mut self.places {
            place.id = None;
            let slot = match std::mem::replace(&mut place.content, Content::Lost) {
                Content::Free(slot) | Content::Ready(slot) => Some(slot),
                Content::Reading(read) => {
                    read.cancel();
                    read.finish().map_or_else(|failure| failure.slot, Some)
                }
                Content::Lost => None,
            };
            if let Some(mut slot) = slot {
                // A system that does not take the pages keeps them.
                let _ = slot.give_back();
                place.content = Content::Free(slot);
            }
        }
        self.io.wake();
    }

    /// Ends the rest that began with [`give_back`](Self::give_back). Memory comes back as rows are read.
    pub fn take_again(&mut self) {
        self.away = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::sim::{Fault, FaultKind, SimDrive};
    use crate::io::{IoConfig, PAGE_BYTES};

    const ROW: usize = 1000;
    const PARTS: u64 = 3;
    const PART_ROWS: u64 = 22;

    /// A row says which it is.
    fn row(number: u64) -> Vec<u8> {
        (0..ROW).map(|i| (number as usize * 7 + i) as u8).collect()
    }

    /// A table of layer 5 behind a page of something else; the last part has half as many rows.
    fn table() -> (Vec<u8>, TableLocation) {
        let sectors = Sectors::of_rows(ROW).unwrap();
        let (mut file, mut parts) = (vec![0xaa; PAGE_BYTES], Vec::new());
        for part in 0..PARTS {
            parts.push((0, file.len() as u64));
            let first = part * PART_ROWS;
            let rows: Vec<u64> = (first..first + if part + 1 < PARTS { PART_ROWS } else { PART_ROWS / 2 }).collect();
            for (sector, rows) in rows.chunks(sectors.rows).enumerate() {
                let bytes: Vec<u8> = rows.iter().flat_map(|&number| row(number)).collect();
                let start = file.len();
                file.resize(start + sectors.len, 0);
                let id = SectorId { layer: 5, part: part as u32, sector: sector as u32 };
                sectors.seal(id, &bytes, &mut file[start..]);
            }
        }
        (file, TableLocation { layer: 5, sectors, part_rows: PART_ROWS, parts })
    }

    fn cache(drive: &SimDrive, places: usize) -> SectorCache {
        let config = IoConfig { chunk_bytes: PAGE_BYTES, depth: 4, prefetch_depth: 2, verify: true };
        let io = Arc::new(Scheduler::start(Box::new(drive.engine(config.depth, 1)), config).unwrap());
        let tables = vec![table().1];
        let memory = SectorCache::reserve(&tables, places).unwrap();
        SectorCache::new(&io, memory, tables)
    }

    const ROWS: u64 = PART_ROWS * (PARTS - 1) + PART_ROWS / 2;

    #[test]
    fn every_row_is_found_whatever_was_wanted_before() {
        let drive = SimDrive::new(vec![table().0]);
        drive.set_short_reads(300);
        for places in [1, 2, 3, 8, 64] {
            let mut cache = cache(&drive, places);
            let numbers: Vec<u64> = (0..4 * ROWS).map(|i| i * i * 31 % ROWS).collect();
            for wanted in numbers.chunks(cache.ahead()) {
                wanted.iter().for_each(|&row| cache.want(0, row, Class::Prefetch).unwrap());
                for &number in wanted {
                    assert_eq!(cache.row(0, number).unwrap(), row(number), "row {number}, {places} places");
                }
            }
            // The most recently wanted rows are still in memory.
            let read = cache.bytes_read();
            cache.row(0, *numbers.last().unwrap()).unwrap();
            assert_eq!(cache.bytes_read(), read);
        }
    }

    #[test]
    fn what_is_wanted_ahead_is_read_once() {
        let drive = SimDrive::new(vec![table().0]);
        let mut cache = cache(&drive, 12);
        let wanted: Vec<u64> = (0..ROWS).step_by(11).collect();
        assert!(wanted.len() <= cache.ahead());
        wanted.iter().for_each(|&row| cache.want(0, row, Class::Demand).unwrap());
        wanted.iter().for_each(|&number| assert_eq!(cache.row(0, number).unwrap(), row(number)));
        let reads = drive.log().len();
        assert_eq!(reads, wanted.len());
        wanted.iter().rev().for_each(|&number| assert_eq!(cache.row(0, number).unwrap(), row(number)));
        assert_eq!(drive.log().len(), reads);
    }

    #[test]
    fn damage_is_read_again_and_named() {
        let (file, table) = table();
        let (flipped, last) = (table.parts[1].1 + PAGE_BYTES as u64 + 10, 2 * PART_ROWS - 1);
        let drive = SimDrive::new(vec![file]);
        let fault = Fault { kind: FaultKind::Flip, file: 0, range: flipped..flipped + 1, times: 1 };
        drive.add_fault(fault.clone());
        let mut cache = cache(&drive, 4);
        assert_eq!(cache.row(0, PART_ROWS + 5).unwrap(), row(PART_ROWS + 5), "damaged once only");
        cache.give_back();
        cache.take_again();
        drive.add_fault(Fault { times: u32::MAX, ..fault });
        for _ in 0..2 {
            let error = cache.row(0, PART_ROWS + 4).expect_err("damaged for good");
            let PoolError::Read(ReadError::Checksum { extent, offset, .. }) = &error else { panic!("{error}") };
            assert_eq!((extent.to_string().as_str(), *offset), ("layer 5 table 1", flipped - 10));
        }
        assert_eq!(cache.row(0, last).unwrap(), row(last), "others are unharmed");
        drive.heal();
        assert_eq!(cache.row(0, PART_ROWS + 4).unwrap(), row(PART_ROWS + 4), "and so is it once the drive is");
    }

    #[test]
    fn a_sector_in_the_place_of_another_is_damage() {
        let (mut file, table) = table();
        let at = table.parts[0].1 as usize;
        let (len, second) = (table.sectors.len, at + table.sectors.len);
        file.copy_within(second..second + len, at);
        let mut cache = cache(&SimDrive::new(vec![file]), 4);
        assert!(matches!(cache.row(0, 0), Err(PoolError::Read(ReadError::Checksum { .. }))));
        assert_eq!(cache.row(0, 4).unwrap(), row(4));
    }

    #[test]
    fn memory_that_was_given_back_is_read_again() {
        let drive = SimDrive::new(vec![table().0]);
        let mut cache = cache(&drive, 6);
        (0..3).for_each(|i| cache.want(0, i * 4, Class::Prefetch).unwrap());
        cache.row(0, 0).unwrap();
        cache.give_back();
        cache.take_again();
        assert_eq!(cache.row(0, 0).unwrap(), row(0));
    }
}
