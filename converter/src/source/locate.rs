//! Finds the files of the checkpoint in a folder, in the order of precedence of transformers: `model.safetensors`, otherwise the
//! files in the index. Without an index, shards that are complete by their names are used, as in vLLM.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::folder::read_side_file;
use super::recognise::{self, entries};
use super::{INDEX, MAX_FILES, SINGLE};
use crate::error::{ConvertError, first_few};

/// The files of a checkpoint, and the information from the index.
#[derive(Debug, Default)]
pub(crate) struct Located {
    /// Files that exist, sorted.
    pub(crate) files: Vec<String>,
    /// Where the index places tensors; `None`: there is no index, or it is not used.
    pub(crate) places: Option<BTreeMap<String, String>>,
    /// Files that the index names but that do not exist.
    pub(crate) absent: BTreeSet<String>,
    /// Remarks for the user.
    pub(crate) notes: Vec<String>,
    /// A possible explanation for a tensor that is not found.
    pub(crate) hint: Option<String>,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: WeightMap,
}

/// The index's map as a list, because a map type would hide a tensor that is named twice.
struct WeightMap(Vec<(String, String)>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of file names")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<WeightMap, M::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(WeightMap(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// A folder, on this machine or on the hub.
pub(super) struct Listing<'a> {
    /// Where it is, for messages.
    pub(super) path: &'a Path,
    /// Names in it, sorted.
    pub(super) names: &'a [String],
    /// Whether there is a file with that name.
    pub(super) exists: &'a dyn Fn(&str) -> bool,
    /// The contents of the index.
    pub(super) index: &'a dyn Fn() -> Result<Vec<u8>, ConvertError>,
}

/// Finds the files of the checkpoint in `dir`.
pub(super) fn locate(dir: &Path) -> Result<Located, ConvertError> {
    let names = entries(dir);
    let exists = |name: &str| dir.join(name).exists();
    let index = || read_side_file(&dir.join(INDEX));
    let located = of_listing(&Listing { path: dir, names: &names, exists: &exists, index: &index })?;
    recognise::refuse_pointers(dir, &located.files)?;
    Ok(located)
}

/// Finds the files of the checkpoint in a folder.
pub(super) fn of_listing(listing: &Listing<'_>) -> Result<Located, ConvertError> {
    if (listing.exists)(SINGLE) {
        Ok(beside_single(listing))
    } else if (listing.exists)(INDEX) {
        indexed(listing)
    } else {
        by_name(listing)
    }
}

/// What the index, if there is one, says about files that are already known.
pub(super) fn of_files(path: &Path, index: Option<Vec<u8>>, files: &BTreeSet<String>) -> Result<Located, ConvertError> {
    let Some(index) = index.filter(|_| !files.contains(SINGLE)) else { return Ok(Located::default()) };
    let places = parse_index(path, &index)?;
    let absent = places.values().filter(|file| !files.contains(*file)).cloned().collect();
    Ok(Located { places: Some(places), absent, ..Located::default() })
}

/// `model.safetensors`, with a note about an index beside it.
fn beside_single(listing: &Listing<'_>) -> Located {
    let mut located = Located { files: vec![SINGLE.to_owned()], ..Located::default() };
    if !(listing.exists)(INDEX) {
        return located;
    }
    let others = read_index(listing).map(|places| {
        let files: BTreeSet<String> = places.into_values().filter(|file| file != SINGLE).collect();
        files.into_iter().collect::<Vec<_>>()
    });
    match others {
        // MLX writes an index of its only file.
        Ok(others) if others.is_empty() => {}
        Ok(others) => {
            let names = first_few(&others);
            located.notes.push(format!(
                "`{SINGLE}` is the model, as for transformers; `{INDEX}` beside it, which names {names}, is not used"
            ));
            located.hint = Some(format!(
                "`{SINGLE}` exists, so it is the model; to use the files that `{INDEX}` names, move `{SINGLE}` away"
            ));
        }
        Err(problem) => located.notes.push(format!("`{INDEX}` beside `{SINGLE}` is not used: {problem}")),
    }
    located
}

/// The files that the index names.
fn indexed(listing: &Listing<'_>) -> Result<Located, ConvertError> {
    let places = read_index(listing)?;
    let named: BTreeSet<String> = places.values().cloned().collect();
    if named.is_empty() || named.len() > MAX_FILES {
        let problem = format!("it names {} files", named.len());
        return Err(ConvertError::Damaged { path: listing.path.join(INDEX), problem });
    }
    let (files, absent): (BTreeSet<_>, BTreeSet<_>) = named.into_iter().partition(|file| (listing.exists)(file));
    let others = listing.names.iter().filter(|n| n.ends_with(".safetensors") && !files.contains(*n)).cloned();
    let others: Vec<String> = others.collect();
    let mut located = Located { places: Some(places), absent, ..Located::default() };
    if !others.is_empty() {
        let note = format!("`{INDEX}` does not name {}, so that is not read", first_few(&others));
        located.hint = Some(note.clone());
        located.notes.push(note);
    }
    located.files = files.into_iter().collect();
    Ok(located)
}

/// Shards that are known only by their names, if all of them exist.
fn by_name(listing: &Listing<'_>) -> Result<Located, ConvertError> {
    let path = listing.path.to_owned();
    let shards = listing.names.iter().filter_map(|n| Some((n, Shard::parse(n)?)));
    let shards: Vec<(&String, Shard<'_>)> = shards.collect();
    let Some((_, first)) = shards.first() else {
        return Err(ConvertError::NotACheckpoint { problem: recognise::no_weights(&path, listing.names), path });
    };
    let of_set: BTreeMap<usize, &String> =
        shards.iter().filter(|(_, s)| s.same_set(first)).map(|(n, s)| (s.number, *n)).collect();
    let missing: Vec<usize> = (1..=first.total.min(MAX_FILES)).filter(|n| !of_set.contains_key(n)).collect();
    if !missing.is_empty() || first.total > MAX_FILES {
        let names: Vec<String> = missing.iter().map(|&n| first.name(n)).collect();
        return Err(ConvertError::Incomplete {
            missing: first.total - of_set.len(),
            total: first.total,
            names: first_few(&names),
            unfinished: recognise::unfinished(&path),
            path,
        });
    }
    let files: Vec<String> = of_set.into_values().cloned().collect();
    let note = format!("there is no `{INDEX}`: the {} files of {} are the model", files.len(), first_few(&files));
    Ok(Located { files, notes: vec![note], ..Located::default() })
}

/// A name such as `model-00001-of-00163.safetensors`.
struct Shard<'a> {
    stem: &'a str,
    number: usize,
    total: usize,
    /// Digits of number and total.
    digits: [usize; 2],
}

impl<'a> Shard<'a> {
    fn parse(name: &'a str) -> Option<Self> {
        let (rest, total) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let count = |text: &str| text.parse().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()));
        let (digits, number, total) = ([number.len(), total.len()], count(number)?, count(total)?);
        (1..=total).contains(&number).then_some(Shard { stem, number, total, digits })
    }

    fn same_set(&self, other: &Shard<'_>) -> bool {
        (self.stem, self.total, self.digits) == (other.stem, other.total, other.digits)
    }

    /// The name of another shard of the set.
    fn name(&self, number: usize) -> String {
        let [a, b] = self.digits;
        format!("{}-{number:0a$}-of-{:0b$}.safetensors", self.stem, self.total)
    }
}

fn read_index(listing: &Listing<'_>) -> Result<BTreeMap<String, String>, ConvertError> {
    parse_index(&listing.path.join(INDEX), &(listing.index)()?)
}

/// Tensor → name of its file.
fn parse_index(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, String>, ConvertError> {
    let damaged = |problem: String| ConvertError::Damaged { path: path.to_owned(), problem };
    let index = sluice_format::json::from_slice::<ShardIndex>(bytes);
    let index = index.map_err(|e| damaged(format!("it is not valid: {e}")))?;
    let mut places: BTreeMap<String, String> = BTreeMap::new();
    for (tensor, file) in index.weight_map.0 {
        if !is_plain_name(&file) {
            return Err(damaged(format!(
                "it places `{tensor}` in {file:?}, which is not a name of a file in this folder"
            )));
        }
        if places.get(&tensor).is_some_and(|other| *other != file) {
            return Err(damaged(format!("it places `{tensor}` in `{}` and in `{file}`", places[&tensor])));
        }
        places.insert(tensor, file);
    }
    Ok(places)
}

/// Whether `name` names a file directly inside a folder: an index must not lead anywhere else.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}
