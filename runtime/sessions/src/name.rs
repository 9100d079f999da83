//! Names of files in the folder.

use std::fmt;

use sluice_checksum::xxh3_128;
use sluice_model::session::{Binding, PrefixHash, kv_code, thrift_codes};

/// The end of a segment's name.
const SUFFIX: &str = ".session";
/// Hexadecimal digits of an id.
const DIGITS: usize = 32;

/// The id of a segment, made from the model and settings that computed it, where it begins, and its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SegmentId(u128);

impl SegmentId {
    pub(crate) fn new(binding: Binding, start: usize, text: PrefixHash) -> Self {
        let mut bytes = binding.state_id.0.to_vec();
        bytes.extend(kv_code(binding.kv_type).to_le_bytes());
        bytes.extend(u16::from(binding.exact).to_le_bytes());
        thrift_codes(binding.thrift).iter().for_each(|code| bytes.extend(code.to_le_bytes()));
        if binding.prompt_attention.tells_phases_apart() {
            bytes.extend(binding.prompt_attention.code().to_le_bytes());
        }
        bytes.extend((start as u64).to_le_bytes());
        bytes.extend(text.0.to_le_bytes());
        SegmentId(xxh3_128(&bytes))
    }

    /// Parses an id that a caller wrote down; `None` for anything but the digits of an id.
    pub(crate) fn parse(digits: &str) -> Option<Self> {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let is_id = digits.len() == DIGITS && digits.bytes().all(is_digit);
        is_id.then(|| u128::from_str_radix(digits, 16).ok()).flatten().map(SegmentId)
    }

    /// The name of the segment's file.
    pub(crate) fn file_name(self) -> String {
        format!("{self}{SUFFIX}")
    }
}

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// What a file is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileName {
    /// A segment.
    Segment(SegmentId),
    /// The unfinished file of a writer: of this segment, or of the list of uses.
    Unfinished(Option<SegmentId>),
    /// Not a file of this program.
    Foreign,
}

/// When and how often segments were used, and their titles.
pub(crate) const USES: &str = "sessions.json";
/// The file that the process which uses the folder locks.
pub(crate) const LOCK: &str = "lock";

impl FileName {
    pub(crate) fn of(name: &str) -> Self {
        let segment = name.get(..DIGITS).and_then(SegmentId::parse);
        let behind = name.get(DIGITS..).and_then(|rest| rest.strip_prefix(SUFFIX));
        match (segment, behind) {
            (Some(id), Some("")) => FileName::Segment(id),
            (Some(id), Some(rest)) if is_unfinished(rest) => FileName::Unfinished(Some(id)),
            _ if name.strip_prefix(USES).is_some_and(is_unfinished) => FileName::Unfinished(None),
            _ => FileName::Foreign,
        }
    }
}

/// Whether this is the suffix that a file's name has while it is written: `.PID-N`.
fn is_unfinished(rest: &str) -> bool {
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let numbers = rest.strip_prefix('.').and_then(|rest| rest.split_once('-'));
    numbers.is_some_and(|(pid, number)| is_number(pid) && is_number(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        let id = SegmentId::new(Binding::default(), 64, PrefixHash::of(&[1, 2, 3]));
        assert_ne!(id, SegmentId::new(Binding::default(), 0, PrefixHash::of(&[1, 2, 3])));
        let name = id.file_name();
        assert_eq!((FileName::of(&name), SegmentId::parse(&id.to_string())), (FileName::Segment(id), Some(id)));
        for (unfinished, of) in [(format!("{name}.12-0"), Some(id)), ("sessions.json.1-99".to_owned(), None)] {
            assert_eq!(FileName::of(&unfinished), FileName::Unfinished(of));
        }
        for foreign in
            ["lock", "sessions.json", "notes", "", "ä", &name[1..], &format!("{name}.1-"), &format!("{name}x")]
        {
            assert_eq!(FileName::of(foreign), FileName::Foreign, "{foreign}");
        }
        for no_id in ["", "../../etc/passwd", &name, &id.to_string()[1..], &format!("+{}", &id.to_string()[1..])] {
            assert_eq!(SegmentId::parse(no_id), None, "{no_id}");
        }
        assert_eq!(SegmentId::parse("0000000000000000000000000000000A"), None);
    }
}
