//! How inputs are changed: by what their format is, so that they get past its first checks, and from time to time as the
//! bytes that they are.

mod json;
mod random;
mod sealed;
mod template;

use std::path::Path;
use std::sync::OnceLock;

use libfuzzer_sys::fuzzer_mutate;
use serde_json::Value;

use crate::targets::{Shape, Target, batch, journal, rewrite, tokenizer};
pub(crate) use random::Random;

/// Sound inputs of the target, for parts of them.
struct Sound {
    json: json::Pool,
    templates: Vec<String>,
}

impl Sound {
    fn of(target: &Target, folder: &Path) -> &'static Self {
        static SOUND: OnceLock<Sound> = OnceLock::new();
        SOUND.get_or_init(|| {
            let seeds = (target.seeds)(folder);
            let files = || seeds.iter().map(|(_, file)| file.as_slice());
            let parse = |json: &[u8]| serde_json::from_slice::<Value>(json).ok();
            let lines = || files().flat_map(|file| file.split(|&b| b == b'\n'));
            let documents: Vec<Value> = match target.shape {
                Shape::JsonLines => lines().filter_map(parse).collect(),
                Shape::Header => files().filter_map(|file| parse(&file[8..])).collect(),
                Shape::Template => Vec::new(),
                _ => files().filter_map(parse).chain(tokenizer_parts(target)).collect(),
            };
            let text = |file: &[u8]| String::from_utf8(file.to_vec()).ok();
            Sound { json: json::Pool::of(documents), templates: files().filter_map(text).collect() }
        })
    }
}

fn tokenizer_parts(target: &Target) -> Vec<Value> {
    if target.name == "tokenizer" { tokenizer::parts() } else { Vec::new() }
}

/// The next input after `input`, no longer than `most`.
pub(crate) fn mutate(target: &Target, input: &[u8], most: usize, seed: u32, folder: &Path) -> Vec<u8> {
    let mut random = Random(u64::from(seed));
    let mut next = input.to_vec();
    let raw = random.one_in(4);
    if !raw && let Some(changed) = change(target, &next, folder, &mut random).filter(|c| c.len() <= most) {
        next = changed;
    } else {
        next.resize(most.max(input.len()), 0);
        let len = fuzzer_mutate(&mut next, input.len(), most);
        next.truncate(len);
    }
    // One in sixteen stays unsealed: checksums are to be checked, too.
    if !random.one_in(16) {
        seal(target, &mut next, folder);
    }
    next
}

/// `input` changed as its format asks for; `None` where it is too broken for that.
fn change(target: &Target, input: &[u8], folder: &Path, random: &mut Random) -> Option<Vec<u8>> {
    let sound = Sound::of(target, folder);
    let mut json = |bytes: &[u8]| {
        let mut document: Value = serde_json::from_slice(bytes).ok()?;
        json::mutate(&mut document, &sound.json, random);
        Some(document.to_string().into_bytes())
    };
    let mut bytes = input.to_vec();
    match target.shape {
        Shape::Json => return json(input),
        Shape::Header => return header(&json(input.get(8..)?)?, input, random),
        Shape::Model if input.starts_with(b"{") => return json(input),
        Shape::JsonLines => return lines(input, json),
        Shape::Template => {
            let source = std::str::from_utf8(input).ok()?;
            return Some(template::mutate(source, &sound.templates, random).into_bytes());
        }
        Shape::Model => sealed::model(&mut bytes, random),
        Shape::Rewrite => sealed::rewrite(&mut bytes, random),
        Shape::Journal => sealed::journal(&mut bytes, random),
        Shape::Batch => sealed::batch(&mut bytes, random),
        Shape::Importance => sealed::importance(&mut bytes, random),
        Shape::Counts => sealed::counts(&mut bytes, random),
        Shape::Session => sealed::session(&mut bytes, random),
        // Nothing in it is sealed, and lengths stand where they are used: bytes are as good to change as anything.
        Shape::Gguf => return None,
    }
    Some(bytes)
}

/// One line of many changed.
fn lines(input: &[u8], mut json: impl FnMut(&[u8]) -> Option<Vec<u8>>) -> Option<Vec<u8>> {
    let mut lines: Vec<Vec<u8>> = input.split(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
    // Which one follows from the input: every mutation of it begins with another line only if the line has changed.
    let mut at = Random(sluice_format::checksum(input)).below(lines.len());
    while lines[at].is_empty() && at > 0 {
        at -= 1;
    }
    lines[at] = json(&lines[at])?;
    Some(lines.join(&b'\n'))
}

/// A safetensors file with this header: mostly with tensors that follow one another as they must, and a length that is right.
fn header(json: &[u8], old: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let mut header: Value = serde_json::from_slice(json).ok()?;
    if !random.one_in(4) {
        let mut end = 0u64;
        for tensor in header.as_object_mut()?.values_mut().filter(|t| t.get("dtype").is_some()) {
            let bits = match tensor["dtype"].as_str() {
                Some("F64" | "I64" | "U64") => 64,
                Some("F32" | "I32" | "U32") => 32,
                Some("BF16" | "F16" | "I16" | "U16") => 16,
                Some("F4") => 4,
                _ => 8,
            };
            let shape = tensor["shape"].as_array().into_iter().flatten();
            let elements = shape.fold(1u64, |n, d| n.saturating_mul(d.as_u64().unwrap_or(1)));
            let start = end;
            end = end.saturating_add(elements.saturating_mul(bits) / 8);
            tensor["data_offsets"] = serde_json::json!([start, end]);
        }
    }
    let json = header.to_string().into_bytes();
    let field = if random.one_in(8) { *old.first_chunk()? } else { (json.len() as u64).to_le_bytes() };
    Some([&field[..], &json].concat())
}

/// Makes lengths and checksums right.
fn seal(target: &Target, input: &mut [u8], folder: &Path) {
    match target.shape {
        Shape::Model => sealed::seal_model(input),
        Shape::Rewrite => rewrite::seal(input),
        Shape::Journal => journal::seal(input, folder),
        Shape::Batch => batch::seal(input, folder),
        Shape::Importance => sealed::seal_importance(input),
        Shape::Counts => sealed::seal_counts(input),
        Shape::Session => sealed::seal_session(input),
        Shape::Header | Shape::Json | Shape::JsonLines | Shape::Template | Shape::Gguf => {}
    }
}
