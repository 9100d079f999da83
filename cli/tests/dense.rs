//! Models without experts: nothing is said of experts that there are not, and types for them are refused everywhere alike.

use std::path::{Path, PathBuf};

use crate::common::{assert_fails, demo_checkpoint, json, sluice, stderr, stdout};

fn dense() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden/llama")
}

#[test]
fn no_text_counts_experts_that_there_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("d.sluice");
    let (source, file) = (dense(), file.to_str().unwrap());
    let converted = stdout(&sluice(&["convert", source.to_str().unwrap(), file]));
    let inspected = stdout(&sluice(&["inspect", file]));
    let planned = stdout(&sluice(&["plan", file, "--ram", "1GiB"]));
    let run = sluice(&["run", file, "--prompt-ids", "5,6,7", "-n", "3", "--ids", "--profile"]);
    stdout(&run);
    let profile = stderr(&run);
    for text in [&converted, &inspected, &planned, &profile] {
        for word in ["0 experts", "0 of 0", "0 in each", "0 with experts", "0 per token", "token cycle"] {
            assert!(!text.contains(word), "{word}: {text}");
        }
    }
    assert!(inspected.contains("none with experts") && inspected.contains("every token reads"), "{inspected}");
    assert!(planned.contains("none with experts"), "{planned}");
    assert!(profile.contains("tokens/s") && !profile.contains("experts"), "{profile}");
    assert_eq!(json(&sluice(&["inspect", file, "--json"]))["expert_count"], 0);
}

#[test]
fn types_that_change_nothing_are_refused_alike() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("d.sluice");
    let (source, file) = (dense(), file.to_str().unwrap());
    let source = source.to_str().unwrap();
    let says = |args: &[&str]| {
        let output = sluice(args);
        assert_fails(&output, 2, &["--type q4 would change nothing", "--dense-type q4"]);
        stderr(&output)
    };
    let converted = says(&["convert", source, file, "--type", "q4"]);
    assert_eq!(says(&["plan", source, "--type", "q4"]), converted);
    let config = format!("{source}/config.json");
    says(&["plan", &config, "--type", "q4"]);
    // Where the other type does something, it is a remark.
    let planned = json(&sluice(&["plan", source, "--type", "q4", "--dense-type", "q8", "--json"]));
    let warnings = planned["warnings"].as_array().unwrap();
    assert!(warnings.iter().any(|w| w.as_str().unwrap().contains("--type q4 changes nothing")), "{warnings:?}");
    json(&sluice(&["plan", demo_checkpoint().to_str().unwrap(), "--type", "q4", "--json"]));
}

#[test]
fn what_is_said_is_in_the_json_too() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("m.sluice");
    let (source, file) = (demo_checkpoint(), file.to_str().unwrap());
    let source = source.to_str().unwrap();
    for more in [&["--dry-run"][..], &[]] {
        let args = [&["convert", source, file, "--json"], more].concat();
        let output = sluice(&args);
        let notes: Vec<String> = serde_json::from_value(json(&output)["notes"].clone()).unwrap();
        let said: Vec<String> =
            stderr(&output).lines().map(|line| line.trim_start_matches("note: ").to_owned()).collect();
        assert!(!said.is_empty() && said.iter().any(|line| line.contains("no chat template")), "{said:?}");
        assert_eq!(notes, said, "{args:?}");
    }
    let recipe = folder.path().join("r.recipe");
    std::fs::write(&recipe, "layers.99.* q8\n").unwrap();
    let args = ["convert", source, file, "--json", "--overwrite", "--recipe", recipe.to_str().unwrap()];
    let notes = json(&sluice(&args))["notes"].to_string();
    assert!(notes.contains("match no tensor") && notes.contains("layers.99.*"), "{notes}");
}
