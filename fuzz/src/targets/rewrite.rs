//! Files whose metadata are being replaced: what an interrupted `sluice set` has left is finished or undone, and then the metadata
//! of the file, if it is one now, are replaced once more.

use std::fs;
use std::path::Path;

use sluice_checksum::xxh3_128;
use sluice_format::fields::{rewrite_footer as footer, superblock, table_ref};
use sluice_format::{
    MAGIC, ModelFile, PAGE_SIZES, REWRITE_MAGIC, REWRITE_VERSION, TOKENIZER_BLOB, checksum, recover, rewrite_metadata,
};

use super::model::support::{self, at, get, set};
use super::{Seeds, choice};

pub(crate) fn run(input: &[u8], folder: &Path) {
    let path = folder.join("model.sluice");
    let now = || fs::read(&path).expect("it was written");
    fs::write(&path, input).expect("the folder can be written");
    let opened = ModelFile::open(&path);
    match recover(&path) {
        Ok(None) => assert!(opened.is_ok() && now() == input, "a sound file was changed"),
        Ok(Some(_)) => {
            assert!(opened.is_err(), "a sound file was recovered");
            let model = ModelFile::open(&path).expect("what was recovered opens");
            let weights = model.superblock().page_size as usize..model.superblock().metadata.offset as usize;
            assert!(now()[weights.clone()] == input[weights], "the weights were changed");
            assert_eq!(recover(&path).expect("what was recovered is sound"), None);
        }
        Err(error) => {
            drop(error.to_string());
            assert!(opened.is_err() && now() == input, "a file that was refused was changed");
        }
    }
    let Ok(model) = ModelFile::open(&path) else { return };
    let before = now();
    let mut metadata = model.metadata().clone();
    metadata.insert(TOKENIZER_BLOB, vec![b' '; choice(input) as usize % 20_000]);
    match rewrite_metadata(&model, &metadata) {
        Ok(new) => assert_eq!(*new.metadata(), metadata),
        Err(error) => {
            drop(error.to_string());
            assert!(now() == before, "a file that was refused was changed");
        }
    }
}

/// Where the log begins, and the length of a page, if the footer says what is possible.
pub(crate) fn log_of(file: &[u8]) -> Option<(usize, usize)> {
    if file.len() < superblock::LEN || !file.starts_with(&MAGIC) {
        return None;
    }
    let page = get(file, at(&superblock::FIELDS, "page_size").0, 4);
    let page = usize::try_from(page).ok().filter(|&page| PAGE_SIZES.contains(&(page as u32)))?;
    let start = get(file, file.len() - footer::LEN + at(&footer::FIELDS, "log_offset").0, 8);
    let start = usize::try_from(start).ok()?;
    (start.checked_add(2 * page)? <= file.len()).then_some((start, page))
}

/// Makes lengths and checksums of a log right.
pub(crate) fn seal(file: &mut [u8]) {
    let Some((start, page)) = log_of(file) else { return };
    let (rest, log) = file.split_at_mut(start);
    let (log, last) = log.split_at_mut(log.len() - page);
    let (head, metadata) = log.split_at_mut(page);
    let field = |name, part| at(&superblock::FIELDS, name).0 + at(&table_ref::FIELDS, part).0;
    let mut ids = Vec::new();
    for name in ["extents", "tensors"] {
        let number = |part| usize::try_from(get(head, field(name, part), 8)).unwrap_or(usize::MAX);
        let offset = number("offset");
        let table = offset.checked_add(number("logical_len")).and_then(|end| rest.get(offset..end));
        ids.extend(xxh3_128(table.unwrap_or_default()).to_le_bytes());
    }
    let len = usize::try_from(get(head, field("metadata", "logical_len"), 8)).unwrap_or(usize::MAX);
    let region = metadata.get(..len).unwrap_or_default();
    ids.extend(xxh3_128(support::blobs(head, region).as_deref().unwrap_or(region)).to_le_bytes());
    let id = at(&superblock::FIELDS, "model_id").0;
    head[id..id + 16].copy_from_slice(&xxh3_128(&ids).to_le_bytes());
    set(head, field("metadata", "checksum"), 8, checksum(metadata));
    support::seal_superblock(head);

    let metadata_len = metadata.len() as u64;
    let footer = &mut last[page - footer::LEN..];
    let mut put = |name, value| {
        let (offset, len) = at(&footer::FIELDS, name);
        set(footer, offset, len, value);
    };
    put("magic", u64::from_le_bytes(REWRITE_MAGIC));
    put("version", u64::from(REWRITE_VERSION));
    put("page_size", page as u64);
    put("metadata_len", metadata_len);
    put("log_checksum", checksum(log));
    put("checksum", 0);
    let sum = checksum(footer);
    set(footer, at(&footer::FIELDS, "checksum").0, 8, sum);
}

pub(crate) fn seeds(folder: &Path) -> Seeds {
    let old = support::small_file(PAGE_SIZES[0]);
    let path = folder.join("model.sluice");
    let mut seeds = Seeds::new();
    for (name, len) in [("shorter", 3), ("longer", 9_000)] {
        fs::write(&path, &old).expect("the folder can be written");
        let model = ModelFile::open(&path).expect("it is sound");
        let mut metadata = model.metadata().clone();
        metadata.insert(TOKENIZER_BLOB, vec![b'x'; len]);
        let new = rewrite_metadata(&model, &metadata).expect("they are metadata");
        let (page, start) = (new.superblock().page_size as usize, new.superblock().metadata.offset as usize);
        let new = fs::read(&path).expect("it was written");
        let log_offset = old.len().max(new.len());
        // The log is on the drive, and nothing has changed yet.
        let mut file = old.clone();
        file.resize(log_offset, 0);
        file.extend([&new[..page], &new[start..], &vec![0; page]].concat());
        let field = file.len() - footer::LEN + at(&footer::FIELDS, "log_offset").0;
        set(&mut file, field, 8, log_offset as u64);
        seal(&mut file);
        // The first page is torn; the log is not whole.
        let mut torn = file.clone();
        torn[..page / 2].copy_from_slice(&new[..page / 2]);
        let begun = file[..file.len() - page / 2].to_vec();
        seeds.extend([(name, file), ("torn", torn), ("begun", begun)].map(|(n, f)| (format!("{n}-{len}"), f)));
    }
    seeds.push(("sound".to_owned(), old));
    seeds
}
