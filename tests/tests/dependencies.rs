//! Dependencies have one direction: between crates, and inside crates that have layers.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Crates of this workspace by folder, and the crates that each may use outside its own tests.
const CRATES: [(&str, &[&str]); 18] = [
    ("checksum", &[]),
    ("weights", &[]),
    ("format", &["checksum", "weights"]),
    ("kernels", &["weights"]),
    ("converter", &["checksum", "format", "kernels", "weights"]),
    ("runtime/storage", &["checksum", "format"]),
    ("runtime/model", &["checksum", "storage", "format", "kernels"]),
    ("runtime/text", &["format"]),
    ("runtime/sessions", &["checksum", "format", "model"]),
    ("runtime/generate", &["model", "sessions", "text"]),
    ("runtime/grammar", &["generate", "text"]),
    ("runtime/dialect", &["text"]),
    ("calibrate", &["checksum", "converter", "format", "kernels", "model", "text"]),
    ("lab", &["model", "storage", "format", "kernels"]),
    ("batch", &["checksum", "format"]),
    ("server", &["batch", "checksum", "dialect", "format", "generate", "grammar", "model", "sessions", "text"]),
    ("hub", &["converter", "format"]),
    (
        "cli",
        &[
            "batch",
            "calibrate",
            "checksum",
            "converter",
            "dialect",
            "generate",
            "hub",
            "lab",
            "model",
            "server",
            "sessions",
            "storage",
            "text",
            "format",
            "kernels",
        ],
    ),
];

/// Within a crate: modules, and the modules above them, which they may not use. Whatever a crate root re-exports counts as its
/// module.
const ABOVE: [(&str, &[&str], &[&str]); 4] = [
    ("runtime/storage", &["io"], &["pool"]),
    ("runtime/model", &[], &["engine", "Engine", "EngineOptions", "RuntimeError", "memory"]),
    ("runtime/model", &["memory"], &["engine", "Engine", "EngineOptions", "RuntimeError"]),
    ("runtime/generate", &["sampler"], &["scheduler", "Scheduler", "generation", "Generation", "model", "Model"]),
];

#[test]
fn crates_depend_downwards() {
    for (folder, allowed) in CRATES {
        let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        let section = manifest.split("[dependencies]").nth(1).unwrap();
        let section = section.split("\n[").next().unwrap();
        for line in section.lines().filter(|l| l.starts_with("sluice-")) {
            let used = line.trim_start_matches("sluice-").split(['.', ' ', '=']).next().unwrap();
            assert!(allowed.contains(&used), "{folder} depends on {used}");
        }
    }
}

/// Programs that embed a library get no simulated drives: only the command line requests them.
#[test]
fn only_the_command_line_simulates_drives() {
    for (folder, _) in CRATES {
        let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        let asks = |line: &str| line.starts_with("sluice-") && line.contains("\"sim\"");
        assert_eq!(manifest.lines().any(asks), folder == "cli", "{folder}");
        assert!(!manifest.lines().any(|line| line.starts_with("default")), "{folder} has default features");
    }
}

#[test]
fn there_is_one_xxh3() {
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    assert!(!lock.contains("name = \"twox-hash\""), "twox-hash is a second implementation beside checksum/");
    for (folder, _) in CRATES {
        let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        // Tests may compare with the library.
        let program = manifest.split("\n[").filter(|section| !section.starts_with("dev-dependencies]"));
        assert!(program.into_iter().all(|section| !section.contains("xxhash-rust")), "{folder} uses xxhash-rust");
    }
}

#[test]
fn every_crate_is_listed() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let members = manifest.split("members = [").nth(1).unwrap().split(']').next().unwrap();
    let members: BTreeSet<&str> = members.split('"').skip(1).step_by(2).filter(|m| *m != "tests").collect();
    assert_eq!(members, CRATES.iter().map(|c| c.0).collect());
}

#[test]
fn modules_depend_downwards() {
    for (folder, modules, above) in ABOVE {
        let mut files = Vec::new();
        collect(&root().join(folder).join("src"), &mut files);
        let of = |file: &PathBuf| module_of(file, &root().join(folder).join("src"));
        // Without named modules: all modules below the upper ones.
        files.retain(|file| match modules {
            [] => !above.contains(&of(file).as_str()) && of(file) != "lib",
            named => named.contains(&of(file).as_str()),
        });
        assert!(!files.is_empty(), "{folder} has no module {modules:?}");
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            for used in text.split("crate::").skip(1) {
                let used: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                assert!(!above.contains(&used.as_str()), "{} uses crate::{used}", file.display());
            }
        }
    }
}

/// The top-level module to which a file of a crate belongs.
fn module_of(file: &Path, source: &Path) -> String {
    let first = file.strip_prefix(source).unwrap().components().next().unwrap();
    first.as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.map(|e| e.unwrap().path()) {
        if entry.is_dir() {
            collect(&entry, files);
        } else if entry.extension().is_some_and(|e| e == "rs") && !entry.ends_with("tests.rs") {
            files.push(entry);
        }
    }
}
