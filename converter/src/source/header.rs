//! The header of a safetensors file. Its contents are not trusted: every length is compared with the file.

use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, de};

use super::dtype::Dtype;

/// Longest header that is read; the reference implementation has the same limit.
pub(crate) const MAX_HEADER_LEN: u64 = 100_000_000;
/// Bytes of the header's length field.
pub(crate) const LENGTH_FIELD: u64 = 8;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeaderEntry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// First byte of the data, from the beginning of the file.
    pub(crate) start: u64,
    /// Bytes of data.
    pub(crate) len: u64,
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The header's map as a list, because a map type would hide a name that appears twice.
struct RawHeader(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<RawHeader, M::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let entry = map.next_value().map_err(|e| de::Error::custom(format!("tensor `{name}`: {e}")))?;
                    entries.push((name, entry));
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// The header's length from the first 8 bytes of a file of `file_len` bytes; `Err` says what is wrong.
pub(crate) fn header_len(field: [u8; 8], file_len: u64) -> Result<u64, String> {
    let len = u64::from_le_bytes(field);
    if len > MAX_HEADER_LEN || len > file_len.saturating_sub(LENGTH_FIELD) {
        return Err(format!("its header claims {len} bytes, the file has {file_len}"));
    }
    Ok(len)
}

/// Parses the JSON of a header that begins after the length field of a file of `file_len` bytes.
pub(crate) fn parse(json: &[u8], file_len: u64) -> Result<Vec<HeaderEntry>, String> {
    let raw: RawHeader = serde_json::from_slice(json).map_err(|e| format!("its header is not valid: {e}"))?;
    let data_start = LENGTH_FIELD + json.len() as u64;
    let data_len = file_len.checked_sub(data_start).ok_or("it is shorter than its header")?;
    let mut entries = Vec::with_capacity(raw.0.len());
    for (name, entry) in raw.0 {
        entries.push(check_entry(name, entry, data_start, data_len)?);
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = entries.windows(2).find(|p| p[0].name == p[1].name) {
        return Err(format!("its header names `{}` twice", pair[0].name));
    }
    check_overlap(&entries, data_start, data_len)?;
    Ok(entries)
}

fn check_entry(name: String, raw: RawEntry, data_start: u64, data_len: u64) -> Result<HeaderEntry, String> {
    let [begin, end] = raw.data_offsets;
    // Messages contain the name, and a terminal would obey control characters.
    if name.contains(char::is_control) {
        return Err(format!("the name of a tensor, {name:?}, has control characters"));
    }
    if begin > end {
        return Err(format!("`{name}` ends before it begins"));
    }
    if end > data_len {
        return Err(format!("`{name}` ends at byte {end} of its data, the file has only {data_len}"));
    }
    let dtype = Dtype::from_name(&raw.dtype);
    let elements = raw.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    if let Some(bits) = dtype.bits() {
        let expected = elements.and_then(|n| n.checked_mul(bits)).map(|bits| bits.div_ceil(8));
        if expected != Some(end - begin) {
            return Err(format!(
                "`{name}` has {} bytes, which its shape {:?} does not explain",
                end - begin,
                raw.shape
            ));
        }
    }
    let shape: Option<Vec<usize>> = raw.shape.iter().map(|&d| usize::try_from(d).ok()).collect();
    let shape = shape.ok_or_else(|| format!("`{name}` has an impossible shape {:?}", raw.shape))?;
    Ok(HeaderEntry { name, dtype, shape, start: data_start + begin, len: end - begin })
}

/// Checks that the tensors fill the data without gaps or overlap, as the format requires; a gap is a sign of damage.
fn check_overlap(entries: &[HeaderEntry], data_start: u64, data_len: u64) -> Result<(), String> {
    let mut order: Vec<&HeaderEntry> = entries.iter().collect();
    order.sort_by_key(|e| (e.start, e.len));
    let mut end = data_start;
    for e in order {
        if e.start != end {
            return Err(format!("`{}` begins at byte {}, its predecessor ends at {end}", e.name, e.start));
        }
        end += e.len;
    }
    if end != data_start + data_len {
        return Err(format!("its tensors end at byte {end}, the file at {}", data_start + data_len));
    }
    Ok(())
}
