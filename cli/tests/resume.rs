//! `convert` when it is killed, and what `verify --source` reports about sources.

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::{assert_fails, copy_checkpoint, demo_checkpoint, demo_model, json, sluice, stderr, stdout};

/// The demo checkpoint with all signs changed: another model of the same shape.
fn other_checkpoint(folder: &Path) {
    copy_checkpoint(folder, None);
    let path = folder.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[data..].iter_mut().skip(1).step_by(2).for_each(|b| *b ^= 0x80);
    fs::write(path, bytes).unwrap();
}

#[test]
fn killed_at_any_moment_while_the_source_changes_it_gets_to_the_clean_file() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (first, second) = (at("first"), at("second"));
    copy_checkpoint(Path::new(&first), None);
    other_checkpoint(Path::new(&second));
    let clean = |source: &str| {
        let target = format!("{source}.sluice");
        stdout(&sluice(&["convert", source, &target, "--type", "q8"]));
        fs::read(target).unwrap()
    };
    let wanted = [clean(&first), clean(&second)];
    let (target, mut state) = (at("m.sluice"), 1u64);
    let mut killed = 0;
    for round in 0..24 {
        let source = if round / 3 % 2 == 0 { &first } else { &second };
        let mut child = Command::new(env!("CARGO_BIN_EXE_sluice"))
            .args(["convert", source, &target, "--type", "q8"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Some are killed at once, so that some are killed on any machine.
        std::thread::sleep(Duration::from_micros(if round % 4 == 0 { 0 } else { (state >> 33) % 120_000 }));
        child.kill().unwrap();
        killed += usize::from(!child.wait().unwrap().success());
        if round % 3 == 2 && !fs::exists(&target).unwrap() {
            stdout(&sluice(&["convert", source, &target, "--type", "q8"]));
        }
        if fs::exists(&target).unwrap() {
            assert!(fs::read(&target).unwrap() == wanted[round / 3 % 2], "round {round}");
            fs::remove_file(&target).unwrap();
        }
    }
    assert!(killed > 0);
}

#[test]
fn links_beside_the_destination_are_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (precious, target, checkpoint) = (at("precious"), at("m.sluice"), demo_checkpoint());
    let checkpoint = checkpoint.to_str().unwrap();
    fs::write(&precious, "precious").unwrap();
    let commands = [["convert", checkpoint, &target], ["synth", checkpoint, &target]];
    for (command, name) in [(0, ".partial"), (0, ".partial.journal"), (1, ".partial")] {
        let place = target.clone() + name;
        symlink(&precious, &place).unwrap();
        assert_fails(&sluice(&commands[command]), 2, &[&place, "link", "Remove it"]);
        fs::remove_file(&place).unwrap();
        fs::hard_link(&precious, &place).unwrap();
        assert_fails(&sluice(&commands[command]), 2, &[&place, "hard link", "Remove it"]);
        fs::remove_file(&place).unwrap();
        fs::create_dir(&place).unwrap();
        assert_fails(&sluice(&commands[command]), 2, &[&place, "folder", "Remove it"]);
        fs::remove_dir(&place).unwrap();
        assert!(Command::new("mkfifo").arg(&place).status().unwrap().success());
        assert_fails(&sluice(&commands[command]), 2, &[&place, "pipe", "Remove it"]);
        fs::remove_file(&place).unwrap();
    }
    // A file that happens to have the name belongs to somebody else.
    fs::write(target.clone() + ".partial", "a novel").unwrap();
    for command in &commands {
        assert_fails(&sluice(command), 2, &[".partial", "not what a conversion leaves"]);
    }
    assert_eq!(fs::read_to_string(target.clone() + ".partial").unwrap(), "a novel");
    assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
    assert!(!fs::exists(&target).unwrap());
}

#[test]
fn verify_compares_with_the_source() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    copy_checkpoint(&source, None);
    let args = ["verify", demo_model(), "--source", source.to_str().unwrap()];
    let same = stdout(&sluice(&args));
    assert!(same.contains("every checksum matches") && same.contains("what it was made of"), "{same}");
    let report = json(&sluice(&[&args[..], &["--json"]].concat()));
    assert_eq!((&report["intact"], &report["source"]["same"]), (&true.into(), &true.into()));
    let shard = source.join("model.safetensors");
    let bytes = fs::metadata(&shard).unwrap().len();
    let inspected = json(&sluice(&["inspect", demo_model(), "--json"]));
    let record = &inspected["provenance"]["source_files"][0];
    assert_eq!(record["bytes"], bytes);
    assert_eq!(record["xxh3_128"].as_str().unwrap().len(), 32);

    // The last byte of the last tensor.
    let file = fs::File::options().read(true).write(true).open(&shard).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, bytes - 1).unwrap();
    file.write_all_at(&[byte[0] ^ 1], bytes - 1).unwrap();
    fs::write(source.join("generation_config.json"), "{}").unwrap();
    fs::remove_file(source.join("tokenizer.json")).unwrap();
    let output = sluice(&[&args[..], &["--json"]].concat());
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["intact"], &report["source"]["same"]), (&true.into(), &false.into()));
    let named = |name: &str| report["source"]["files"].as_array().unwrap().iter().find(|f| f["name"] == name).unwrap();
    assert_eq!(named("model.safetensors")["tensors"].as_array().unwrap().len(), 1);
    assert!(named("tokenizer.json")["difference"].as_str().unwrap().contains("missing"));
    assert!(named("config.json")["difference"].is_null());
    let output = sluice(&args);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    for word in
        ["1 of ", "tensors differs", named("model.safetensors")["tensors"][0].as_str().unwrap(), "generation_config"]
    {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert!(stderr(&output).contains("is not what"));

    file.set_len(bytes - 1).unwrap();
    let text = String::from_utf8(sluice(&args).stdout).unwrap();
    assert!(text.contains(&format!("had {bytes}")), "{text}");
    fs::remove_file(&shard).unwrap();
    let text = String::from_utf8(sluice(&args).stdout).unwrap();
    assert!(text.contains("model.safetensors: it is missing"), "{text}");
    assert_fails(&sluice(&["verify", demo_model(), "--source", "no-such-folder"]), 1, &["no-such-folder"]);
}

#[test]
fn verify_says_when_there_is_nothing_to_compare() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.sluice");
    let (checkpoint, path) = (demo_checkpoint(), path.to_str().unwrap());
    stdout(&sluice(&["synth", checkpoint.to_str().unwrap(), path, "--layers", "1"]));
    let args = ["verify", path, "--source", checkpoint.to_str().unwrap()];
    assert_fails(&sluice(&args), 1, &["random weights"]);
    // A file that an older version has written.
    let old = Path::new(env!("CARGO_MANIFEST_DIR")).join("../format/tests/data/v1-small.sluice");
    let args = ["verify", old.to_str().unwrap(), "--source", checkpoint.to_str().unwrap()];
    assert_fails(&sluice(&args), 1, &["v1-small.sluice", "Convert the checkpoint again"]);
}
