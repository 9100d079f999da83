//! Rules about the code that no compiler checks. A failure names the place, and what to do.
//!
//! Exceptions are listed with the rules in `rules.rs`, each for one file; their number may only shrink.

mod rules;
mod samples;
mod source;
mod words;

use std::fs;
use std::path::Path;

use rules::{ANY, RULES, Rule};
use source::Source;

/// Folders that nobody wrote by hand.
const SKIPPED: [&str; 5] = ["target", "fixtures", "corpus", "findings", "regressions"];

#[test]
fn the_code_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut sources = Vec::new();
    collect(root, "", &mut sources);
    assert!(sources.len() > 100, "only {} files were found", sources.len());
    source::mark_test_modules(&mut sources);

    let complaints: Vec<String> = RULES.iter().flat_map(|rule| complaints(rule, rule.exceptions, &sources)).collect();
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

/// The complaints of a rule about all files: findings beyond its exceptions, and exceptions that are no longer needed.
fn complaints(rule: &Rule, exceptions: &[(&str, usize)], sources: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for source in sources {
        let found = (rule.check)(source);
        let allowed = exceptions.iter().find(|e| e.0 == source.path).map_or(0, |e| e.1);
        if found.len() > allowed {
            let known = if allowed > 0 { format!(" ({} here, {allowed} known)", found.len()) } else { String::new() };
            let places =
                found.iter().map(|f| format!("{}:{}: {}{known}: {}", source.path, f.line, f.what, rule.remedy));
            complaints.extend(places);
        } else if allowed == ANY && found.is_empty() || allowed != ANY && found.len() < allowed {
            let left = if found.is_empty() { "take it out".to_owned() } else { format!("write {}", found.len()) };
            complaints.push(format!("{}: exception to \"{}\" in rules.rs: {left}", source.path, rule.name));
        }
    }
    let gone = exceptions.iter().filter(|e| !sources.iter().any(|s| s.path == e.0));
    complaints.extend(gone.map(|e| format!("{}: no such file: take out its exception to \"{}\"", e.0, rule.name)));
    complaints
}

/// Reads Rust and prose below a folder, in the order of their names.
fn collect(root: &Path, folder: &str, sources: &mut Vec<Source>) {
    let entries = fs::read_dir(root.join(folder)).unwrap_or_else(|e| panic!("{folder}: {e}"));
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.expect("an entry").file_name().into_string().ok()).collect();
    names.sort();
    for name in names.into_iter().filter(|name| !name.starts_with('.') && !SKIPPED.contains(&name.as_str())) {
        let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
        let place = root.join(&path);
        if place.is_dir() {
            collect(root, &path, sources);
        } else if path.ends_with(".rs") || path.ends_with(".md") {
            let text = fs::read_to_string(&place).unwrap_or_else(|e| panic!("{path}: {e}"));
            sources.push(Source::new(&path, &text));
        }
    }
}
