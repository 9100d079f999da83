//! Stripes: the parts of an extent that lie in different volumes, so that reading it keeps several drives busy at once.
//!
//! A record of the extent table describes a stripe, and the records of an extent stand together. Most models are not striped: then each
//! extent has one stripe, which is all of it.

use crate::extent::{Codec, ExtentKind, ExtentRecord};
use crate::limits::MAX_STRIPES;

/// Largest share of a volume.
pub const MAX_SHARE: u32 = 100;

/// A part of an extent that lies in one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stripe {
    /// The volume, counted from 0.
    pub volume: u16,
    /// Byte offset in its file, a multiple of the page size.
    pub offset: u64,
    /// Stored bytes, a multiple of the page size. They follow those of the stripe before.
    pub len: u64,
    /// xxh3-64 of them.
    pub checksum: u64,
}

/// How the pages of extents are divided among volumes.
///
/// The pages of an extent are dealt out in a fixed cycle in which each volume has as many turns as its share says, as evenly as
/// possible; a volume's pages are then one contiguous stripe. So a shorter extent never has a longer stripe in any volume, which lets
/// extents that turn out to be compressed be moved towards the beginning of their files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares {
    shares: Vec<u32>,
    /// The volume of each page of a cycle.
    cycle: Vec<u16>,
}

impl Shares {
    /// Shares of that size, one for each volume.
    ///
    /// # Errors
    /// In words: fewer than two volumes, too many, or an impossible share.
    pub fn new(shares: &[u32]) -> Result<Self, String> {
        if !(2..=MAX_STRIPES).contains(&shares.len()) {
            return Err(format!("a model can be striped over 2 to {MAX_STRIPES} volumes, not {}", shares.len()));
        }
        if let Some(share) = shares.iter().find(|share| !(1..=MAX_SHARE).contains(*share)) {
            return Err(format!("a share is 1 to {MAX_SHARE}, not {share}"));
        }
        let common = shares.iter().fold(0, |a, &b| greatest_common_divisor(a, b));
        let shares: Vec<u32> = shares.iter().map(|share| share / common).collect();
        let mut turns = vec![0u32; shares.len()];
        let next = |_| {
            // The method of Sainte-Laguë: the next turn goes to the largest quotient of share and 2 · turns + 1.
            let quotient = |v: usize, other: usize| shares[v] * (2 * turns[other] + 1);
            let best =
                (1..shares.len()).fold(0, |best, v| if quotient(v, best) > quotient(best, v) { v } else { best });
            turns[best] += 1;
            best as u16
        };
        let cycle = (0..shares.iter().sum()).map(next).collect();
        Ok(Shares { shares, cycle })
    }

    /// Shares in proportion to rates, such as the bytes per second of drives.
    ///
    /// # Errors
    /// As [`Shares::new`]; also for rates that are not positive numbers.
    pub fn of_rates(rates: &[f64]) -> Result<Self, String> {
        let most = rates.iter().copied().fold(0.0, f64::max);
        if rates.iter().any(|rate| !(rate.is_finite() && *rate > 0.0)) {
            return Err("the rates of drives are positive numbers".into());
        }
        let share = |rate: &f64| ((rate / most * f64::from(MAX_SHARE)).round() as u32).max(1);
        Self::new(&rates.iter().map(share).collect::<Vec<_>>())
    }

    /// The shares, in lowest terms, one for each volume.
    pub fn shares(&self) -> &[u32] {
        &self.shares
    }

    /// How many volumes there are.
    pub fn volumes(&self) -> usize {
        self.shares.len()
    }

    /// How many of the `pages` of an extent lie in each volume.
    fn divide(&self, pages: u64) -> Vec<u64> {
        let cycle = self.cycle.len() as u64;
        let mut of_volume: Vec<u64> = self.shares.iter().map(|&share| pages / cycle * u64::from(share)).collect();
        for &volume in &self.cycle[..(pages % cycle) as usize] {
            of_volume[usize::from(volume)] += 1;
        }
        of_volume
    }

    /// The bytes of an extent of `stored_len` bytes in each volume: a part of a table is whole in one of them, because its sectors are
    /// read one by one; all others are divided.
    pub(crate) fn lens(&self, kind: ExtentKind, index: u32, stored_len: u64, page_size: u32) -> Vec<u64> {
        if kind == ExtentKind::Table {
            let volume = self.cycle[index as usize % self.cycle.len()];
            return (0..self.volumes()).map(|v| if v == usize::from(volume) { stored_len } else { 0 }).collect();
        }
        let page = u64::from(page_size);
        self.divide(stored_len / page).into_iter().map(|pages| pages * page).collect()
    }
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// An extent and its stripes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The extent; volume and offset are those of its first stripe.
    pub record: ExtentRecord,
    /// Its stripes, in the order of their bytes and of their volumes.
    pub stripes: Vec<Stripe>,
}

/// The content of the extent table.
#[derive(Clone, Debug, Default)]
pub(crate) struct ExtentTable {
    pub(crate) extents: Vec<ExtentRecord>,
    stripes: Vec<Stripe>,
    /// Of each extent, where its stripes end in that list.
    ends: Vec<usize>,
}

impl ExtentTable {
    /// Takes the extents in the order of the table.
    pub(crate) fn of_placed(placed: Vec<Placed>) -> Self {
        let mut table = ExtentTable::default();
        for Placed { record, stripes } in placed {
            table.extents.push(record);
            table.stripes.extend(stripes);
            table.ends.push(table.stripes.len());
        }
        table
    }

    /// Joins the records of the table, each with the number of its stripe, into extents.
    pub(crate) fn of_records(records: Vec<(ExtentRecord, u16)>) -> Result<Self, String> {
        let mut table = ExtentTable::default();
        for (record, number) in records {
            let stripe = Stripe {
                volume: record.volume,
                offset: record.offset,
                len: record.stored_len,
                checksum: record.checksum,
            };
            if number == 0 {
                table.extents.push(record);
                table.ends.push(table.stripes.len());
            } else {
                table.extend_last(&record, usize::from(number))?;
            }
            table.stripes.push(stripe);
            *table.ends.last_mut().expect("an extent has been begun") += 1;
        }
        Ok(table)
    }

    /// Adds a further stripe, with this number, to the last extent.
    fn extend_last(&mut self, record: &ExtentRecord, number: usize) -> Result<(), String> {
        let out_of_order = || format!("stripe {number} of {} does not follow the one before it", record.name());
        let before = match self.ends.len() {
            0 => return Err(out_of_order()),
            1 => self.stripes.len(),
            extents => self.stripes.len() - self.ends[extents - 2],
        };
        let (Some(first), Some(last)) = (self.extents.last_mut(), self.stripes.last()) else {
            return Err(out_of_order());
        };
        let key = |e: &ExtentRecord| (e.kind, e.layer, e.index);
        if key(first) != key(record) || number != before {
            return Err(out_of_order());
        }
        if number >= MAX_STRIPES || record.volume <= last.volume {
            return Err(format!(
                "the stripes of {} are not in ascending volumes, {MAX_STRIPES} at most",
                record.name()
            ));
        }
        let common = |e: &ExtentRecord| (e.codec, e.logical_len, e.logical_checksum);
        if common(first) != common(record) {
            return Err(format!("the stripes of {} disagree on what it is", record.name()));
        }
        let sum = first.stored_len.checked_add(record.stored_len);
        first.stored_len = sum.ok_or_else(|| format!("{} is longer than 2^64 bytes", record.name()))?;
        first.checksum = first.checksum_in_stripes();
        Ok(())
    }

    /// The stripes of extent number `number`.
    pub(crate) fn stripes(&self, number: usize) -> &[Stripe] {
        let start = number.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.stripes[start..self.ends[number]]
    }

    /// All extents with their stripes.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&ExtentRecord, &[Stripe])> {
        self.extents.iter().enumerate().map(|(number, extent)| (extent, self.stripes(number)))
    }

    /// Whether any extent has more than one stripe.
    pub(crate) fn is_striped(&self) -> bool {
        self.stripes.len() > self.extents.len()
    }

    /// The bytes of the table in a file of this version of the format.
    pub(crate) fn to_bytes(&self, version: u32) -> Vec<u8> {
        let of_stripe = |extent: &ExtentRecord, (number, stripe): (u16, &Stripe)| {
            let Stripe { volume, offset, len, checksum } = *stripe;
            let record = ExtentRecord { volume, offset, stored_len: len, checksum, ..*extent };
            record.to_bytes_of_stripe(version, number)
        };
        self.iter().flat_map(|(e, stripes)| (0..).zip(stripes).flat_map(move |stripe| of_stripe(e, stripe))).collect()
    }
}

impl ExtentRecord {
    /// The field [`ExtentRecord::checksum`] of an extent with several stripes.
    pub(crate) fn checksum_in_stripes(&self) -> u64 {
        if self.codec == Codec::Raw { self.logical_checksum } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_dealt_out_by_share_and_a_shorter_extent_has_no_longer_stripe() {
        for shares in [&[1, 1][..], &[2, 1], &[1, 1, 1], &[100, 44], &[7, 1, 3, 5], &[1; MAX_STRIPES]] {
            let made = Shares::new(shares).unwrap();
            let sum: u32 = made.shares().iter().sum();
            let mut before = vec![0; shares.len()];
            for pages in 0..3 * u64::from(sum) {
                let now = made.divide(pages);
                assert_eq!(now.iter().sum::<u64>(), pages);
                assert!(now.iter().zip(&before).all(|(now, before)| now >= before), "{shares:?} {pages}");
                for (&pages_here, &share) in now.iter().zip(made.shares()) {
                    let fair = pages as f64 * f64::from(share) / f64::from(sum);
                    assert!((pages_here as f64 - fair).abs() < 2.0, "{shares:?} {pages} {now:?}");
                }
                before = now;
            }
        }
        assert_eq!(Shares::new(&[50, 25]).unwrap().shares(), [2, 1]);
        assert_eq!(Shares::new(&[2, 1]).unwrap().divide(6), [4, 2]);
        assert_eq!(Shares::new(&[1, 1, 1]).unwrap().divide(1), [1, 0, 0]);
    }

    #[test]
    fn shares_follow_rates() {
        assert_eq!(Shares::of_rates(&[3e9, 3e9]).unwrap().shares(), [1, 1]);
        assert_eq!(Shares::of_rates(&[7e9, 3.5e9]).unwrap().shares(), [2, 1]);
        assert_eq!(Shares::of_rates(&[7e9, 1.0]).unwrap().shares(), [100, 1]);
        for rates in [&[1.0][..], &[1.0, 0.0], &[1.0, f64::NAN], &[1.0; 17]] {
            assert!(Shares::of_rates(rates).is_err(), "{rates:?}");
        }
        assert!(Shares::new(&[1, 0]).is_err() && Shares::new(&[101, 1]).is_err() && Shares::new(&[1]).is_err());
    }

    #[test]
    fn a_part_of_a_table_is_whole_and_parts_are_dealt_out() {
        let shares = Shares::new(&[2, 1]).unwrap();
        let volumes = (0..6).map(|index| {
            let lens = shares.lens(ExtentKind::Table, index, 8192, 4096);
            assert_eq!(lens.iter().filter(|len| **len == 8192).count(), 1);
            lens.iter().position(|len| *len > 0).unwrap()
        });
        let volumes: Vec<_> = volumes.collect();
        assert_eq!(volumes.iter().filter(|volume| **volume == 1).count(), 2, "{volumes:?}");
    }
}
