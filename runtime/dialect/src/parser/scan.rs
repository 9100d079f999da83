//! Finds markers in text that arrives in pieces.

/// The result of [`scan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scan {
    /// The marker with this number is at this byte, and none is before it.
    Found { at: usize, marker: usize },
    /// No marker is complete. This many bytes certainly belong to none.
    Safe(usize),
}

/// Searches for the first of `markers` in `text`. If two are at the same place, the longer one counts. With `end`, no more text
/// will come.
pub(super) fn scan(text: &str, markers: &[&str], end: bool) -> Scan {
    let found = markers.iter().enumerate().filter_map(|(i, marker)| Some((text.find(marker)?, i)));
    let first = found.min_by_key(|&(at, i)| (at, usize::MAX - markers[i].len()));
    let safe = if end { text.len() } else { text.len() - held(text, markers) };
    match first {
        Some((at, marker)) if at < safe => Scan::Found { at, marker },
        // Text from here on could still become another marker.
        _ => Scan::Safe(safe),
    }
}

/// Bytes at the end of `text` that could be the beginning of a marker.
pub(super) fn held(text: &str, markers: &[&str]) -> usize {
    markers.iter().map(|marker| begun(text, marker)).max().unwrap_or(0)
}

/// Length of the longest end of `text` that is a beginning of `marker`, but not the whole marker.
fn begun(text: &str, marker: &str) -> usize {
    let most = text.len().min(marker.len() - 1);
    let is_begun = |&n: &usize| marker.is_char_boundary(n) && text.as_bytes().ends_with(&marker.as_bytes()[..n]);
    (1..=most).rev().find(is_begun).unwrap_or(0)
}

/// Whether `text` is a beginning of `marker`, but not all of it.
pub(super) fn begins(text: &str, marker: &str) -> bool {
    text.len() < marker.len() && marker.starts_with(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_held_back_only_where_a_marker_may_begin() {
        let markers = ["<tool_call>", "</think>"];
        assert_eq!(scan("some text", &markers, false), Scan::Safe(9));
        assert_eq!(scan("a < b", &markers, false), Scan::Safe(5));
        assert_eq!(scan("a <", &markers, false), Scan::Safe(2));
        assert_eq!(scan("a <tool_", &markers, false), Scan::Safe(2));
        assert_eq!(scan("a <tool_", &markers, true), Scan::Safe(8));
        assert_eq!(scan("a <tool_call>x", &markers, false), Scan::Found { at: 2, marker: 0 });
        assert_eq!(scan("</think><tool_call>", &markers, false), Scan::Found { at: 0, marker: 1 });
        assert_eq!(scan("\u{ff5c}<\u{ff5c}", &["<\u{ff5c}a>"], false), Scan::Safe(3));
    }

    #[test]
    fn the_longer_of_two_markers_counts() {
        let markers = ["<a", "<ab>"];
        assert_eq!(scan("x<a", &markers, false), Scan::Safe(1));
        assert_eq!(scan("x<a", &markers, true), Scan::Found { at: 1, marker: 0 });
        assert_eq!(scan("x<ac", &markers, false), Scan::Found { at: 1, marker: 0 });
        assert_eq!(scan("x<ab>", &markers, false), Scan::Found { at: 1, marker: 1 });
    }
}
