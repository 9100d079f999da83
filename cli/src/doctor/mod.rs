//! What the machine is like for this program, finding by finding, and how to mend what is not well.
//!
//! What a probe reads lies below a root folder, `/` except in tests, or is handed to it, so that every verdict can be tested on any
//! machine. Where a system does not have what a probe looks at, there is no finding.

pub(crate) mod drive;
pub(crate) mod limits;
pub(crate) mod memory;
pub(crate) mod processor;

use std::fs;
use std::path::Path;

use serde::Serialize;

/// How well something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// Nothing to mend.
    Ok,
    /// It works, and something costs speed or room.
    CouldBeBetter,
    /// It does not work so.
    Wrong,
}

impl Verdict {
    pub(crate) fn words(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::CouldBeBetter => "could be better",
            Verdict::Wrong => "wrong",
        }
    }
}

/// What was found of one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// The thing.
    pub(crate) of: &'static str,
    pub(crate) verdict: Verdict,
    /// How it is.
    pub(crate) is: String,
    /// What to do about it; `None` if nothing.
    pub(crate) mend: Option<String>,
}

impl Finding {
    pub(crate) fn ok(of: &'static str, is: impl Into<String>) -> Finding {
        Finding { of, verdict: Verdict::Ok, is: is.into(), mend: None }
    }

    pub(crate) fn better(of: &'static str, is: impl Into<String>, mend: impl Into<String>) -> Finding {
        Finding { of, verdict: Verdict::CouldBeBetter, is: is.into(), mend: Some(mend.into()) }
    }

    pub(crate) fn wrong(of: &'static str, is: impl Into<String>, mend: impl Into<String>) -> Finding {
        Finding { of, verdict: Verdict::Wrong, is: is.into(), mend: Some(mend.into()) }
    }
}

/// The worst verdict of all; ok if there is none.
pub(crate) fn worst(findings: &[Finding]) -> Verdict {
    findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok)
}

/// For people: a line for each finding, and below it how to mend it.
pub(crate) fn describe(findings: &[Finding]) -> String {
    let verdicts = Verdict::CouldBeBetter.words().len();
    let line = |f: &Finding| {
        let mend = f.mend.as_ref().map_or(String::new(), |mend| format!("{:verdicts$}  {:13}  → {mend}\n", "", ""));
        format!("{:verdicts$}  {:13}  {}\n{mend}", f.verdict.words(), f.of, f.is)
    };
    findings.iter().map(line).collect()
}

/// A short file of the system, without the white space around it.
fn read(root: &Path, place: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(root.join(place)).ok().map(|text| text.trim().to_owned())
}

/// The word in brackets of a file such as `always [madvise] never`.
fn chosen(text: &str) -> Option<&str> {
    text.split_once('[')?.1.split_once(']').map(|(word, _)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with files, as the root of a system.
    pub(crate) fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_worst_counts_and_mending_is_said_below() {
        let findings = [
            Finding::ok("memory", "a lot"),
            Finding::wrong("io_uring", "gone", "get it"),
            Finding::better("x", "y", "z"),
        ];
        assert_eq!((worst(&findings), worst(&findings[..1]), worst(&[])), (Verdict::Wrong, Verdict::Ok, Verdict::Ok));
        let said = describe(&findings);
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines.len(), 5, "{said}");
        assert!(
            lines[1].starts_with("wrong ") && lines[1].ends_with("gone") && lines[2].ends_with("→ get it"),
            "{said}"
        );
    }
}
