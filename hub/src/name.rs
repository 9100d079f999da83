//! Names of repositories and files on the hub.

use std::fmt;
use std::str::FromStr;

use crate::error::HubError;

/// The prefix of names on the hub on the command line.
pub const PREFIX: &str = "hf:";

/// Longest name of an owner, or of a repository, on the hub.
const LONGEST: usize = 96;

/// What a user names: a repository, and optionally a revision and some of its files.
///
/// As text `hf:OWNER/NAME@REVISION:PART`; prefix, revision and part may be left out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    /// `OWNER/NAME`; the oldest models on the hub have no owner.
    pub repo: String,
    /// A branch, a tag or a commit; `None` means the branch `main`.
    pub revision: Option<String>,
    /// Which of several models in a repository is meant: a file, or a quantisation such as `Q4_K_M`.
    pub part: Option<String>,
}

/// The default revision.
pub const MAIN: &str = "main";

impl Reference {
    /// Whether a text on the command line names something on the hub, not a file.
    pub fn is_meant(text: &str) -> bool {
        text.starts_with(PREFIX)
    }

    /// The revision, named or not.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(MAIN)
    }

    /// The repository's name without its owner.
    pub fn short_name(&self) -> &str {
        self.repo.rsplit('/').next().unwrap_or(&self.repo)
    }
}

impl FromStr for Reference {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let wrong = |problem| HubError::Name { text: text.to_owned(), problem };
        let rest = text.strip_prefix(PREFIX).unwrap_or(text);
        let rest = rest.strip_prefix("//").unwrap_or(rest);
        let (name, part) = match rest.split_once(':') {
            Some((name, part)) => (name, Some(part)),
            None => (rest, None),
        };
        let (repo, revision) = match name.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (name, None),
        };
        let segments: Vec<&str> = repo.split('/').collect();
        if segments.len() > 2 {
            return Err(wrong("it has more than one `/`"));
        }
        if !segments.iter().all(|segment| is_segment(segment)) {
            return Err(wrong(
                "owner and name are letters, digits, `-`, `_` and `.`, begin and end with neither `-` nor `.`, and have neither \
                 `--` nor `..`",
            ));
        }
        if revision.is_some_and(|revision| !is_revision(revision)) {
            return Err(wrong("what follows `@` is no revision"));
        }
        if part.is_some_and(|part| part.is_empty() || part.chars().any(char::is_control)) {
            return Err(wrong("what follows `:` is no part of a repository"));
        }
        let owned = |text: &str| text.to_owned();
        Ok(Reference { repo: repo.to_owned(), revision: revision.map(owned), part: part.map(owned) })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.repo)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        self.part.iter().try_for_each(|part| write!(f, ":{part}"))
    }
}

fn is_segment(text: &str) -> bool {
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    let edge = |c: char| matches!(c, '.' | '-');
    plain
        && (1..=LONGEST).contains(&text.len())
        && !text.starts_with(edge)
        && !text.ends_with(edge)
        // The hub has no such names, and folders of models and caches write `--` for the `/`.
        && !text.contains("..")
        && !text.contains("--")
}

fn is_revision(text: &str) -> bool {
    let strange = |c: char| c.is_control() || c.is_whitespace() || matches!(c, '?' | '*' | '[' | '\\' | '^' | '~');
    !text.is_empty() && text.len() <= 255 && !text.contains(strange) && !text.contains("..")
}

/// A text as one segment of the path of an address: everything but letters, digits and `-_.` is escaped.
pub(crate) fn escaped(segment: &str) -> String {
    let mut out = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

/// A path of a file in a repository as the path of an address.
pub(crate) fn escaped_path(path: &str) -> String {
    let segments: Vec<String> = path.split('/').map(escaped).collect();
    segments.join("/")
}

/// Whether a path from the hub stays inside the folder to which it would be written, and can be shown on a terminal.
pub(crate) fn stays_inside(path: &str) -> bool {
    let plain = |segment: &str| !segment.is_empty() && segment != "." && segment != "..";
    !path.contains(|c: char| c == '\\' || c.is_control()) && path.split('/').all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        let full: Reference = "hf:deepseek-ai/DeepSeek-R1@refs/pr/7:Q4_K_M".parse().unwrap();
        assert_eq!(
            (full.repo.as_str(), full.revision(), full.part.as_deref()),
            ("deepseek-ai/DeepSeek-R1", "refs/pr/7", Some("Q4_K_M"))
        );
        assert_eq!(full.short_name(), "DeepSeek-R1");
        assert_eq!(full.to_string(), "hf:deepseek-ai/DeepSeek-R1@refs/pr/7:Q4_K_M");
        let short: Reference = "gpt2".parse().unwrap();
        assert_eq!((short.repo.as_str(), short.revision(), &short.part), ("gpt2", "main", &None));
        assert_eq!("hf://a/b".parse::<Reference>().unwrap().to_string(), "hf:a/b");
        assert!(Reference::is_meant("hf:a/b") && !Reference::is_meant("a/b") && !Reference::is_meant("./hf:a"));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "", "hf:", "a/b/c", "../etc", "a/..", "a/b@", "a/b@x y", "a/b:", "a/.b", "/b", "a/", "a b/c", "a/b@../c",
            "-a/b", "a--b/c", "a/b--c",
        ] {
            assert!(matches!(text.parse::<Reference>(), Err(HubError::Name { .. })), "{text:?}");
        }
    }

    #[test]
    fn paths_stay_inside() {
        assert!(stays_inside("a.json") && stays_inside("Q4_K_M/a-00001-of-00002.gguf"));
        for path in ["", "/etc/passwd", "../a", "a/../../b", "a//b", "a/./b", "a\\b", "a/", "a\0", "a\u{1b}[2J", "a\nb"]
        {
            assert!(!stays_inside(path), "{path}");
        }
        assert_eq!(escaped_path("a b/c#d?.json"), "a%20b/c%23d%3F.json");
        assert_eq!(escaped("refs/pr/7"), "refs%2Fpr%2F7");
    }
}
