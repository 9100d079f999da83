//! Dependencies point one way: between crates, and between the modules of the runtime.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Crates of this workspace that a crate may use outside its own tests.
const CRATES: [(&str, &[&str]); 5] = [
    ("format", &[]),
    ("kernels", &[]),
    ("converter", &["format", "kernels"]),
    ("runtime", &["format", "kernels"]),
    ("cli", &["converter", "runtime", "format", "kernels"]),
];

/// Modules of the runtime that a module may use. `engine` may use all of them but `generate`, which is above it.
const MODULES: [(&str, &[&str]); 12] = [
    ("io", &[]),
    ("pool", &["io"]),
    ("model", &["pool"]),
    ("trace", &["pool"]),
    ("text", &[]),
    ("sampler", &[]),
    ("memory", &["model", "pool", "io"]),
    ("estimate", &["memory"]),
    ("calibrate", &["model"]),
    ("counts", &[]),
    ("engine", &["io", "pool", "model", "text", "memory", "counts"]),
    ("generate", &["engine", "model", "sampler", "text"]),
];

#[test]
fn crates_depend_downwards() {
    for (name, allowed) in CRATES {
        let manifest = fs::read_to_string(root().join(name).join("Cargo.toml")).unwrap();
        let section = manifest.split("[dependencies]").nth(1).unwrap();
        let section = section.split("\n[").next().unwrap();
        for line in section.lines().filter(|l| l.starts_with("sluice-")) {
            let used = line.trim_start_matches("sluice-").split(['.', ' ', '=']).next().unwrap();
            assert!(allowed.contains(&used), "{name} depends on {used}");
        }
    }
}

#[test]
fn runtime_modules_depend_downwards() {
    let names: BTreeSet<&str> = MODULES.iter().map(|m| m.0).collect();
    for (module, allowed) in MODULES {
        let mut files = Vec::new();
        let source = root().join("runtime/src");
        collect(&source.join(module), &mut files);
        let single = source.join(format!("{module}.rs"));
        if single.exists() {
            files.push(single);
        }
        assert!(!files.is_empty(), "the runtime has no module {module}");
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            for used in text.split("crate::").skip(1) {
                let used: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let upstream = names.contains(used.as_str()) && used != module && !allowed.contains(&used.as_str());
                assert!(!upstream, "{} uses crate::{used}", file.display());
            }
        }
    }
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
