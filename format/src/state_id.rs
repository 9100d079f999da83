//! The id that binds files to a model: those that are kept beside it and would be wrong with another model.

use std::fmt;

use serde_json::{Map, Value};
use sluice_checksum::{Xxh3, xxh3_128};

use crate::extent::{Codec, ExtentRecord};
use crate::metadata::{Metadata, SPEC_BLOB, TOKENIZER_BLOBS, TOKENIZER_CONFIG_BLOB};
use crate::tensor::TensorRecord;

/// Identity of everything on which a saved state of a model depends: its weights, what it computes, and its tokenizer.
/// Unlike the [`crate::ModelId`], it does not depend on anything else in the metadata, so it stays the same when a chat
/// template or sampling defaults are replaced. Like the model id, it is not cryptographic.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct StateId(pub [u8; 16]);

impl StateId {
    /// The id of a model of these extents and tensors.
    pub(crate) fn of_model(
        extents: &[ExtentRecord],
        page_size: u32,
        tensors: &[TensorRecord],
        metadata: &Metadata,
    ) -> Self {
        let tensors: Vec<u8> = tensors.iter().flat_map(TensorRecord::to_bytes).collect();
        StateId::of(&uncompressed_table(extents, page_size), &tensors, metadata)
    }

    /// The xxh3-128 of the digests of extent table and tensor table, and of name and content of the spec and of those
    /// [`TOKENIZER_BLOBS`] that exist. `tokenizer_config.json` counts without its `chat_template`.
    fn of(extents: &[u8], tensors: &[u8], metadata: &Metadata) -> Self {
        let mut hash = Xxh3::new();
        let mut add = |bytes: &[u8]| hash.update(&xxh3_128(bytes).to_le_bytes());
        add(extents);
        add(tensors);
        for name in [SPEC_BLOB].into_iter().chain(TOKENIZER_BLOBS) {
            let Some(blob) = metadata.get(name) else { continue };
            add(name.as_bytes());
            match (name == TOKENIZER_CONFIG_BLOB).then(|| without_template(blob)).flatten() {
                Some(stripped) => add(&stripped),
                None => add(blob),
            }
        }
        StateId(hash.digest128().to_le_bytes())
    }
}

/// The extent table of the same extents in a file of version 1: a state depends neither on compression nor on volumes.
fn uncompressed_table(extents: &[ExtentRecord], page_size: u32) -> Vec<u8> {
    let mut offset = u64::from(page_size);
    let mut record = |e: &ExtentRecord| {
        let place = offset;
        offset += e.padded_len;
        let (codec, volume, checksum) = (Codec::Raw, 0, e.logical_checksum);
        ExtentRecord { codec, volume, offset: place, stored_len: e.padded_len, checksum, ..*e }.to_bytes(1)
    };
    extents.iter().flat_map(&mut record).collect()
}

/// `tokenizer_config.json` as JSON without white space and chat template; `None` if there is nothing to leave out.
fn without_template(config: &[u8]) -> Option<Vec<u8>> {
    let mut config: Map<String, Value> = crate::json::from_slice(config).ok()?;
    // `remove` would change the order of the remaining keys.
    config.shift_remove("chat_template")?;
    serde_json::to_vec(&config).ok()
}

impl fmt::Display for StateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for StateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StateId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(blobs: &[(&str, &str)]) -> StateId {
        let mut metadata = Metadata::default();
        blobs.iter().for_each(|(name, blob)| metadata.insert(name, blob.as_bytes().to_vec()));
        StateId::of(b"extents", b"tensors", &metadata)
    }

    #[test]
    fn weights_spec_and_tokenizer_count_and_nothing_else() {
        let own = [(SPEC_BLOB, "{}"), ("tokenizer.json", "t"), (TOKENIZER_CONFIG_BLOB, r#"{"a": 1, "b": 2}"#)];
        let with = |name, blob| {
            let mut blobs = own.to_vec();
            blobs.retain(|(n, _)| *n != name);
            blobs.push((name, blob));
            id(&blobs)
        };
        for (name, blob) in [("chat_template.jinja", "x"), ("generation_config.json", "{}"), ("config.json", "{}")] {
            assert_eq!(with(name, blob), id(&own), "{name}");
        }
        for name in TOKENIZER_BLOBS.into_iter().chain([SPEC_BLOB]) {
            assert_ne!(with(name, "other"), id(&own), "{name}");
        }
        let metadata = Metadata::default();
        assert_ne!(StateId::of(b"a", b"b", &metadata), StateId::of(b"b", b"a", &metadata));
    }

    #[test]
    fn a_template_in_the_tokenizer_config_does_not_count() {
        let with = |config| id(&[(TOKENIZER_CONFIG_BLOB, config)]);
        let one = with(r#"{"a": 1, "chat_template": "x", "b": [1.5, 1e30]}"#);
        assert_eq!(one, with(r#"{"a": 1, "chat_template": "y", "b": [1.5, 1e30]}"#));
        assert_ne!(one, with(r#"{"a": 2, "chat_template": "x", "b": [1.5, 1e30]}"#));
    }
}
