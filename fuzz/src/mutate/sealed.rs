//! Mutations of binary formats that protect themselves by checksums: a field is changed, then every length and checksum is
//! made right again, so that the checks behind them are reached.

use std::ops::Range;

use sluice_checksum::{Xxh3, xxh3_64, xxh3_128};
use sluice_format::fields::{
    Field, extent, importance, importance_entry, rewrite_footer, superblock, table_ref, tensor,
};
use sluice_format::{MAGIC, PAGE_SIZES, checksum};
use sluice_model::session::{HEADER_FIELDS, PrefixHash, SECTION_FIELDS};

use super::random::Random;
use crate::targets::model::second_volume;
use crate::targets::model::support::{self, at, get, set};
use crate::targets::rewrite;

/// The number in a field, and its change.
fn change(bytes: &mut [u8], record: usize, fields: &[Field], random: &mut Random) {
    let Some(field) = random.pick(fields) else { return };
    let (start, len) = (record + field.offset, field.len.min(8));
    if bytes.len() < start + len {
        return;
    }
    if field.len > 8 {
        // A name or an id.
        bytes[start + random.below(field.len.min(bytes.len() - start))] = random.next() as u8;
        return;
    }
    let old = get(bytes, start, len);
    set(bytes, start, len, random.number(old));
}

/// Where a table of a model file is, if it is inside.
fn table(file: &[u8], name: &str) -> Option<Range<usize>> {
    let reference = at(&superblock::FIELDS, name).0;
    if file.len() < superblock::LEN {
        return None;
    }
    let number = |field| get(file, reference + at(&table_ref::FIELDS, field).0, 8);
    let start = usize::try_from(number("offset")).ok()?;
    let end = start.checked_add(usize::try_from(number("logical_len")).ok()?)?;
    (end <= file.len()).then_some(start..end)
}

/// Changes a few fields of a model file.
pub(crate) fn model(file: &mut [u8], random: &mut Random) {
    let tables = ["extents", "tensors", "metadata"];
    for _ in 0..1 + random.below(3) {
        match random.below(8) {
            0 => change(file, 0, &superblock::FIELDS, random),
            1 => {
                let name = random.pick(&tables).copied().unwrap_or(tables[0]);
                change(file, at(&superblock::FIELDS, name).0, &table_ref::FIELDS, random);
            }
            2..=6 => {
                let (name, len) = if random.one_in(2) { (tables[0], extent::LEN) } else { (tables[1], tensor::LEN) };
                let Some(range) = table(file, name) else { return };
                let count = range.len() / len;
                let record = range.start + random.below(count) * len;
                if count > 0 && random.one_in(6) {
                    let other = range.start + random.below(count) * len;
                    file.copy_within(other..other + len, record);
                } else {
                    let fields: &[Field] = if name == tables[0] { &extent::FIELDS } else { &tensor::FIELDS };
                    change(file, record, fields, random);
                }
            }
            _ => {
                let Some(range) = table(file, tables[2]).filter(|range| !range.is_empty()) else { return };
                let digits: Vec<usize> = range.clone().filter(|&i| file[i].is_ascii_digit()).collect();
                match random.pick(&digits) {
                    Some(&digit) if !random.one_in(4) => file[digit] = b'0' + random.below(10) as u8,
                    _ => file[range.start + random.below(range.len())] = random.next() as u8,
                }
            }
        }
    }
}

/// Makes the checksums of a model file right, and its length: those of extents, of tables, of the superblock, and the id. Of a model of
/// two volumes, the second gets the tables of the first.
pub(crate) fn seal_model(file: &mut [u8]) {
    let second = second_volume(file).unwrap_or(file.len());
    let (first, second) = file.split_at_mut(second);
    let mut volumes: Vec<&mut [u8]> = [first, second].into_iter().filter(|file| !file.is_empty()).collect();
    if !volumes.iter().all(|file| is_whole(file)) {
        return;
    }
    if let Some(range) = table(volumes[0], "extents") {
        seal_extents(&mut volumes, range);
    }
    for number in 0..volumes.len() {
        if number > 0 {
            copy_tables(&mut volumes);
        }
        seal_tables(volumes[number], number == 0);
    }
}

/// Whether a file has a superblock.
fn is_whole(file: &[u8]) -> bool {
    let page = if file.len() >= superblock::LEN { get(file, at(&superblock::FIELDS, "page_size").0, 4) } else { 0 };
    file.starts_with(&MAGIC) && PAGE_SIZES.contains(&(page as u32)) && file.len() >= page as usize
}

/// Gives the records of the extent table of the first volume, which is at `range`, the checksums of what they refer to.
fn seal_extents(volumes: &mut [&mut [u8]], range: Range<usize>) {
    let version = get(volumes[0], at(&superblock::FIELDS, "version").0, 4);
    let end = range.end.min(volumes[0].len());
    for record in range.step_by(extent::LEN).filter(|r| r + extent::LEN <= end).collect::<Vec<_>>() {
        let field = |record: usize, name| {
            let (offset, len) = at(&extent::FIELDS, name);
            get(volumes[0], record + offset, len)
        };
        let start = field(record, "offset") as usize;
        let Some(file) = volumes.get(field(record, "volume") as usize) else { continue };
        let stored = start.checked_add(field(record, "stored_len") as usize).and_then(|end| file.get(start..end));
        let Some(sum) = stored.map(checksum) else { continue };
        let next = record + extent::LEN;
        let alone = field(record, "stripe") == 0 && (next + extent::LEN > end || field(next, "stripe") == 0);
        let raw = field(record, "codec") == 0;
        set(volumes[0], record + at(&extent::FIELDS, "checksum").0, 8, sum);
        if raw && alone && version > 1 {
            set(volumes[0], record + at(&extent::FIELDS, "logical_checksum").0, 8, sum);
        }
    }
}

/// Gives the second volume the tables of the first, if they fit.
fn copy_tables(volumes: &mut [&mut [u8]]) {
    let [first, second] = volumes else { return };
    for name in ["extents", "tensors"] {
        if let (Some(from), Some(to)) = (table(first, name), table(second, name))
            && from.len() == to.len()
        {
            second[to].copy_from_slice(&first[from]);
        }
    }
}

/// Makes the checksums of tables, the id, the length and the checksum of the superblock right. Only the first volume has metadata.
fn seal_tables(file: &mut [u8], first: bool) {
    let mut ids = Vec::new();
    for name in ["extents", "tensors", "metadata"] {
        let reference = at(&superblock::FIELDS, name).0;
        let number = |field| get(file, reference + at(&table_ref::FIELDS, field).0, 8) as usize;
        let (start, stored) = (number("offset"), number("stored_len"));
        if let Some(bytes) = start.checked_add(stored).and_then(|end| file.get(start..end)) {
            let sum = checksum(bytes);
            set(file, reference + at(&table_ref::FIELDS, "checksum").0, 8, sum);
        }
        let bytes = table(file, name).map_or(&[][..], |range| &file[range]);
        let blobs = if first && name == "metadata" { support::blobs(file, bytes) } else { None };
        ids.extend(xxh3_128(blobs.as_deref().unwrap_or(bytes)).to_le_bytes());
    }
    let id = at(&superblock::FIELDS, "model_id").0;
    file[id..id + 16].copy_from_slice(&xxh3_128(&ids).to_le_bytes());
    let len = file.len() as u64;
    set(file, at(&superblock::FIELDS, "file_len").0, 8, len);
    let page = get(file, at(&superblock::FIELDS, "page_size").0, 4) as usize;
    support::seal_superblock(&mut file[..page]);
}

/// Changes the log at the end of a file, or the file before it.
pub(crate) fn rewrite(file: &mut [u8], random: &mut Random) {
    let Some((log, page)) = rewrite::log_of(file) else { return model(file, random) };
    let metadata = log + page..file.len() - page;
    match random.below(6) {
        0 => change(file, file.len() - rewrite_footer::LEN, &rewrite_footer::FIELDS, random),
        1 | 2 => change(file, log, &superblock::FIELDS, random),
        3 => {
            let tables = ["extents", "tensors", "metadata"];
            let name = random.pick(&tables).copied().unwrap_or(tables[0]);
            change(file, log + at(&superblock::FIELDS, name).0, &table_ref::FIELDS, random);
        }
        4 if !metadata.is_empty() => file[metadata.start + random.below(metadata.len())] = random.next() as u8,
        _ => model(file, random),
    }
}

/// Changes a field of an importance file: of its header, or of a matrix.
pub(crate) fn importance(file: &mut [u8], random: &mut Random) {
    let mut entries = Vec::new();
    let mut next = importance::LEN;
    while next + importance_entry::LEN <= file.len() {
        entries.push(next);
        let columns = get(file, next + at(&importance_entry::FIELDS, "columns").0, 4) as usize;
        next += importance_entry::LEN + 4 * columns;
    }
    match random.pick(&entries).copied() {
        Some(entry) if random.one_in(3) => {
            let at = entry + importance_entry::LEN + random.below(64);
            let odd = [f32::NAN, f32::INFINITY, f32::MAX, -0.0, -1.0, 1e-45, 0.0];
            let number = random.pick(&odd).copied().unwrap_or(0.0).to_le_bytes();
            if let Some(bytes) = file.get_mut(at & !3..(at & !3) + 4) {
                bytes.copy_from_slice(&number);
            }
        }
        Some(entry) if !random.one_in(4) => change(file, entry, &importance_entry::FIELDS, random),
        _ => change(file, 0, &importance::FIELDS, random),
    }
}

/// Makes length and checksum of an importance file right.
pub(crate) fn seal_importance(file: &mut [u8]) {
    if file.len() < importance::LEN {
        return;
    }
    let len = (file.len() - importance::LEN) as u64;
    set(file, at(&importance::FIELDS, "body_len").0, 8, len);
    let (start, len) = at(&importance::FIELDS, "checksum");
    let mut hash = Xxh3::new();
    hash.update(&file[..start]);
    hash.update(&file[start + len..]);
    set(file, start, len, hash.digest());
}

/// Magic, model id and length of counts.
const COUNTS_HEADER: usize = 8 + 16 + 8;

/// Makes model, length and checksum of counts right.
pub(crate) fn seal_counts(file: &mut [u8]) {
    let Some(end) = file.len().checked_sub(8).filter(|&end| end >= COUNTS_HEADER) else { return };
    file[8..24].copy_from_slice(&[7; 16]);
    set(file, 24, 8, (end - COUNTS_HEADER) as u64);
    let sum = checksum(&file[..end]);
    set(file, end, 8, sum);
}

/// Changes a number in what follows the header of counts.
pub(crate) fn counts(file: &mut [u8], random: &mut Random) {
    let words = file.len().saturating_sub(COUNTS_HEADER + 8) / 4;
    let word = COUNTS_HEADER + 4 * random.below(words);
    let odd = [f32::NAN, f32::INFINITY, -1.0, -0.0, 1.0, 1.0005, 1.1, 0.5, 1e-45, f32::MAX];
    if words > 0 {
        let odd = random.pick(&odd).copied().unwrap_or(0.0);
        file[word..word + 4].copy_from_slice(&odd.to_le_bytes());
    }
}

/// Where the sections of a saved sequence begin and end, as far as they are whole.
fn sections(file: &[u8]) -> Vec<Range<usize>> {
    let number = |start: usize, name| get(file, start + at(&SECTION_FIELDS, name).0, 8) as usize;
    let (mut sections, mut start) = (Vec::new(), SESSION_HEADER);
    while start + SECTION_LEN <= file.len() {
        let len = number(start, "records").checked_mul(number(start, "record_len"));
        let end = len.and_then(|len| len.checked_add(start + SECTION_LEN + 8));
        let Some(end) = end.filter(|&end| end <= file.len()) else { break };
        sections.push(start..end);
        start = end;
    }
    sections
}

/// Bytes of the header of a saved sequence, with its checksum.
const SESSION_HEADER: usize = 128;
const SECTION_LEN: usize = 32;

/// Makes length, hash and checksums of a saved sequence right: that of the header is the seed of those of the sections.
pub(crate) fn seal_session(file: &mut [u8]) {
    if file.len() < SESSION_HEADER {
        return;
    }
    let sections = sections(file);
    if let Some(tokens) = sections.first() {
        let ids = file[tokens.start + SECTION_LEN..tokens.end - 8].as_chunks::<4>().0.iter();
        let ids: Vec<u32> = ids.map(|&id| u32::from_le_bytes(id)).collect();
        let (before, text) = (at(&HEADER_FIELDS, "before").0, at(&HEADER_FIELDS, "text").0);
        let before = PrefixHash(u128::from_le_bytes(file[before..before + 16].try_into().expect("a hash")));
        file[text..text + 16].copy_from_slice(&before.then(&ids).0.to_le_bytes());
    }
    let len = file.len() as u64;
    set(file, at(&HEADER_FIELDS, "length").0, 8, len);
    let seed = xxh3_64(&file[..SESSION_HEADER - 8]);
    set(file, SESSION_HEADER - 8, 8, seed);
    for section in sections {
        let end = section.end - 8;
        let mut hash = Xxh3::with_seed(seed);
        hash.update(&file[section.start..end]);
        set(file, end, 8, hash.digest());
    }
}

/// Changes a field of a saved sequence: of its header, of a section, or a number in one.
pub(crate) fn session(file: &mut [u8], random: &mut Random) {
    let sections = sections(file);
    match random.pick(&sections).cloned() {
        Some(section) if !random.one_in(4) => {
            let words = (section.len() - SECTION_LEN - 8) / 4;
            if words == 0 || random.one_in(4) {
                return change(file, section.start, &SECTION_FIELDS, random);
            }
            let word = section.start + SECTION_LEN + 4 * random.below(words);
            let odd =
                [f32::NAN, f32::INFINITY, f32::MAX, -0.0, -1.0, 1e-45, 0.0, f32::from_bits(1), f32::from_bits(70)];
            let odd = random.pick(&odd).copied().unwrap_or(0.0);
            file[word..word + 4].copy_from_slice(&odd.to_le_bytes());
        }
        _ => change(file, 0, &HEADER_FIELDS, random),
    }
}

/// Changes a number of a journal: all of them have eight bytes.
pub(crate) fn journal(file: &mut [u8], random: &mut Random) {
    let words = file.len() / 8;
    let word = 8 * random.below(words);
    if words > 0 {
        let old = get(file, word, 8);
        set(file, word, 8, random.number(old));
    }
}

/// Changes a number of the journal of a batch: most have four bytes, at any place.
pub(crate) fn batch(file: &mut [u8], random: &mut Random) {
    const LEN: usize = 4;
    if file.len() < LEN {
        return;
    }
    let at = random.below(file.len() - LEN + 1);
    let old = get(file, at, LEN);
    set(file, at, LEN, random.number(old));
}
