//! Checks the machine for this program, finding by finding, with advice on how to mend what is wrong.
//!
//! Probes read only below a root folder, `/` except in tests, or get their data as arguments, so every verdict can be tested on any
//! machine. If a system lacks what a probe reads, there is no finding.

pub(crate) mod drive;
pub(crate) mod limits;
pub(crate) mod memory;
pub(crate) mod processor;

use std::fs;
use std::path::Path;

use serde::Serialize;

use crate::terminal::printable;

/// How well something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// Nothing to mend.
    Ok,
    /// It works, but costs speed or space.
    CouldBeBetter,
    /// It does not work.
    Wrong,
}

impl Verdict {
    /// How terminals show it.
    fn style(self) -> &'static str {
        match self {
            Verdict::Ok => "32",
            Verdict::CouldBeBetter => "33",
            Verdict::Wrong => "1;31",
        }
    }

    pub(crate) fn words(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::CouldBeBetter => "could be better",
            Verdict::Wrong => "wrong",
        }
    }
}

/// A finding about one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// The thing.
    pub(crate) of: &'static str,
    /// The volume whose drive it is about, of a striped model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) volume: Option<String>,
    pub(crate) verdict: Verdict,
    /// Its state.
    pub(crate) is: String,
    /// What to do about it; `None` if nothing is needed.
    pub(crate) mend: Option<String>,
}

impl Finding {
    pub(crate) fn ok(of: &'static str, is: impl Into<String>) -> Finding {
        Finding { of, volume: None, verdict: Verdict::Ok, is: is.into(), mend: None }
    }

    pub(crate) fn better(of: &'static str, is: impl Into<String>, mend: impl Into<String>) -> Finding {
        Finding { of, volume: None, verdict: Verdict::CouldBeBetter, is: is.into(), mend: Some(mend.into()) }
    }

    pub(crate) fn wrong(of: &'static str, is: impl Into<String>, mend: impl Into<String>) -> Finding {
        Finding { of, volume: None, verdict: Verdict::Wrong, is: is.into(), mend: Some(mend.into()) }
    }
}

/// The worst verdict of all findings; ok if there are none.
pub(crate) fn worst(findings: &[Finding]) -> Verdict {
    findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok)
}

/// For people: a line for each finding, and below it how to mend it. Nothing in it that files of the system say is obeyed by a terminal.
pub(crate) fn describe(findings: &[Finding], coloured: bool) -> String {
    let verdicts = Verdict::CouldBeBetter.words().len();
    let line = |f: &Finding| {
        let mend = f
            .mend
            .as_ref()
            .map_or(String::new(), |mend| format!("{:verdicts$}  {:13}  → {}\n", "", "", printable(mend)));
        let verdict = format!("{:verdicts$}", f.verdict.words());
        let verdict = if coloured { format!("\x1b[{}m{verdict}\x1b[0m", f.verdict.style()) } else { verdict };
        let volume = f.volume.as_ref().map_or(String::new(), |volume| format!("{}: ", printable(volume)));
        format!("{verdict}  {:13}  {volume}{}\n{mend}", f.of, printable(&f.is))
    };
    findings.iter().map(line).collect()
}

/// The contents of a short system file, without the white space around it.
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
        let said = describe(&findings, false);
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines.len(), 5, "{said}");
        assert!(
            lines[1].starts_with("wrong ") && lines[1].ends_with("gone") && lines[2].ends_with("→ get it"),
            "{said}"
        );
        let of_volume = Finding { volume: Some("m-1.sluice".into()), ..findings[0].clone() };
        assert!(describe(&[of_volume], false).contains("m-1.sluice: a lot"));
        let coloured = describe(&findings, true);
        assert!(coloured.starts_with("\x1b[32mok") && coloured.contains("\x1b[1;31mwrong"), "{coloured:?}");
        let hostile = describe(&[Finding::ok("x", "\x1b[2J")], false);
        assert!(!hostile.contains('\x1b'), "{hostile:?}");
    }
}
