//! The commands that work on files: convert, inspect, verify.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::{assert_fails, copy_checkpoint, demo_checkpoint, demo_model, json, sluice, stderr, stdout};

#[test]
fn convert_says_what_it_did() {
    let folder = tempfile::tempdir().unwrap();
    let (source, path) = (demo_checkpoint(), folder.path().join("m.sluice"));
    let (source, path) = (source.to_str().unwrap(), path.to_str().unwrap());

    let plan = json(&sluice(&["convert", source, path, "--dry-run", "--json"]));
    assert_eq!((&plan["dry_run"], &plan["expert_type"]), (&true.into(), &"keep".into()));
    assert_eq!(plan["types"]["expert.gate_up"], serde_json::json!(["bf16"]));
    assert!(!fs::exists(path).unwrap());

    let plan = json(&sluice(&["convert", source, path, "--dry-run", "--type", "q8", "--json"]));
    let done = json(&sluice(&["convert", source, path, "--type", "q8", "--json"]));
    let length = fs::metadata(path).unwrap().len();
    assert_eq!(done["file_bytes"], length);
    assert!(plan["file_bytes"].as_u64().unwrap() >= length);
    assert_eq!(done["types"]["expert.gate_up"], serde_json::json!(["q8"]));
    assert!(done["errors"]["expert.gate_up"].as_f64().unwrap() < 0.01);

    assert_fails(&sluice(&["convert", source, path]), 2, &["exists", "--overwrite"]);
    let again = sluice(&["convert", source, path, "--overwrite", "--type", "keep", "--page-size", "16384"]);
    assert!(stdout(&again).contains("bf16"));
    let said = stderr(&again);
    assert!(said.contains("no chat template") && said.lines().count() == 1, "{said}");
    assert_eq!(json(&sluice(&["inspect", path, "--json"]))["page_size"], 16384);
}

#[test]
fn convert_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().to_str().unwrap();
    let target = folder.path().join("m.sluice");
    let target = target.to_str().unwrap();
    assert_fails(&sluice(&["convert", empty, target]), 1, &["config.json"]);
    assert_fails(&sluice(&["convert", empty, target, "--type", "q9"]), 2, &["q9", "keep"]);
    assert_fails(&sluice(&["convert", empty, target, "--page-size", "5"]), 2, &["4096", "16384"]);
    assert_fails(&sluice(&["convert", empty]), 2, &["model file to write"]);
}

#[test]
fn convert_refuses_what_run_could_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("checkpoint");
    copy_checkpoint(&source, None);
    let target = folder.path().join("m.sluice");
    let args = ["convert", source.to_str().unwrap(), target.to_str().unwrap(), "--dry-run"];
    stdout(&sluice(&args));
    for (name, content, word) in [
        ("generation_config.json", r#"{"eos_token_id": "last"}"#, "`eos_token_id`"),
        ("tokenizer.json", r#"{"version": "1.0"}"#, "cannot be used"),
        ("tokenizer.json", r#"{"version": "#, "not a JSON object"),
    ] {
        let whole = fs::read(source.join(name)).unwrap();
        fs::write(source.join(name), content).unwrap();
        assert_fails(&sluice(&args), 1, &["checkpoint", name, word]);
        fs::write(source.join(name), whole).unwrap();
    }
    // None at all is fine: the model takes token ids then.
    fs::remove_file(source.join("generation_config.json")).unwrap();
    fs::remove_file(source.join("tokenizer.json")).unwrap();
    stdout(&sluice(&args));
}

#[test]
fn inspect_describes() {
    let text = stdout(&sluice(&["inspect", demo_model()]));
    for word in ["deepseek_v3", "token cycle", "least budget", "expert"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let report = json(&sluice(&["inspect", demo_model(), "--json", "--extents"]));
    assert_eq!(report["family"], "deepseek_v3");
    assert_eq!((&report["layers"], &report["moe_layers"]), (&6.into(), &5.into()));
    assert_eq!((&report["expert_count"], &report["top_k"]), (&160.into(), &4.into()));
    let cycle = report["token_cycle_bytes"].as_u64().unwrap();
    assert_eq!(cycle, 20 * report["expert_bytes"].as_u64().unwrap());
    let extents = report["extents"].as_array().unwrap();
    let bytes: u64 = extents.iter().map(|e| e["stored_bytes"].as_u64().unwrap()).sum();
    let by_kind: u64 = report["kinds"].as_array().unwrap().iter().map(|k| k["bytes"].as_u64().unwrap()).sum();
    assert_eq!(bytes, by_kind);
    assert!(extents.iter().any(|e| e["name"] == "layer 5 expert 31"));
    assert_eq!(report["has_tokenizer"], true);
}

#[test]
fn experts_of_several_sizes_have_a_range() {
    let folder = tempfile::tempdir().unwrap();
    let (recipe, path) = (folder.path().join("r.recipe"), folder.path().join("m.sluice"));
    fs::write(&recipe, "layers.{3-5}.expert.* bf16\n").unwrap();
    let (source, path) = (demo_checkpoint(), path.to_str().unwrap());
    let types = ["--type", "f32", "--dense-type", "f32", "--recipe", recipe.to_str().unwrap()];
    stdout(&sluice(&[&["convert", source.to_str().unwrap(), path], &types[..]].concat()));
    let report = json(&sluice(&["inspect", path, "--json"]));
    let [least, most] = ["smallest_expert_bytes", "expert_bytes"].map(|name| report[name].as_u64().unwrap());
    assert!(least < most && least * 20 < report["token_cycle_bytes"].as_u64().unwrap(), "{report}");
    for (args, is_range) in
        [(&["inspect", path][..], true), (&["plan", path, "--ram", "1GiB"], true), (&["inspect", demo_model()], false)]
    {
        let text = stdout(&sluice(args));
        let line = text.lines().find(|line| line.starts_with("experts  ") || line.contains("token cycle: ")).unwrap();
        assert!(line.contains(" to ") == is_range && line.ends_with(" each"), "{line}");
    }
}

#[test]
fn verify_names_every_damaged_extent() {
    let sound = json(&sluice(&["verify", demo_model(), "--json"]));
    assert_eq!((&sound["intact"], sound["damaged"].as_array().unwrap().len()), (&true.into(), 0));

    let inspected = json(&sluice(&["inspect", demo_model(), "--json", "--extents"]));
    let offset = |name: &str| {
        let extents = inspected["extents"].as_array().unwrap();
        let extent = extents.iter().find(|e| e["name"] == name).unwrap();
        let (offset, stored) = (extent["offset"].as_u64().unwrap(), extent["stored_bytes"].as_u64().unwrap());
        (offset + stored - 1) as usize
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.sluice");
    let mut bytes = fs::read(demo_model()).unwrap();
    // The last bytes: padding, or not. Checksums cover both.
    for name in ["layer 2 expert 7", "layer 0 dense"] {
        bytes[offset(name)] ^= 1;
    }
    fs::write(&path, &bytes).unwrap();
    let path = path.to_str().unwrap();
    let output = sluice(&["verify", path]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(text.contains("layer 2 expert 7") && text.contains("layer 0 dense"), "{text}");
    assert!(stderr(&output).contains("2 of 183"), "{}", stderr(&output));

    let output = sluice(&["verify", path, "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let names: Vec<_> = report["damaged"].as_array().unwrap().iter().map(|d| d["extent"].as_str().unwrap()).collect();
    assert_eq!(names, ["layer 0 dense", "layer 2 expert 7"]);
}

#[test]
fn files_that_are_no_models() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let sound = fs::read(demo_model()).unwrap();
    let text = path("text", b"hello");
    let zeros = path("zeros", &[0; 8192]);
    let short = path("short", &sound[..sound.len() - 4096]);
    let mut flipped = sound.clone();
    flipped[17] ^= 4;
    let flipped = path("flipped", &flipped);
    let missing = folder.path().join("missing");
    let pipe = pipe(folder.path(), "pipe");
    let cases = [
        (text.as_str(), "not a Sluice model"),
        (&zeros, "unfinished conversion"),
        (&short, "incomplete"),
        (&flipped, "superblock"),
        (missing.to_str().unwrap(), "cannot open"),
        (&pipe, "not a regular file"),
    ];
    for (path, words) in cases {
        for command in [&["inspect", path][..], &["verify", path], &["run", path, "--prompt", "x"]] {
            assert_fails(&sluice(command), 1, &[words, path]);
        }
        let output = sluice(&["verify", path, "--json"]);
        assert_eq!(output.status.code(), Some(1));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["intact"], false);
        assert!(report["error"].as_str().unwrap().contains(words), "{report}");
    }
}

#[test]
fn names_in_files_cannot_command_the_terminal() {
    let source = tempfile::tempdir().unwrap();
    copy_checkpoint(source.path(), Some(&["config.json"]));
    let header = r#"{"a\u001b[2J\u009b":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#;
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat();
    fs::write(source.path().join("model.safetensors"), bytes).unwrap();
    let output = sluice(&["convert", source.path().to_str().unwrap(), "never-written.sluice"]);
    assert_fails(&output, 1, &["model.safetensors", r"a\u{1b}[2J\u{9b}"]);
    assert!(!stderr(&output).trim_end().contains(char::is_control));

    let trace = source.path().join("trace.jsonl");
    let header = r#"{"sluice_trace":1,"layers":1,"experts":4,"top_k":2,"model":"a\u001b[2J"}"#;
    fs::write(&trace, format!("{header}\n{}\n", r#"{"tok":0,"layers":[[0,1]]}"#)).unwrap();
    let stats = stdout(&sluice(&["trace", "stats", trace.to_str().unwrap()]));
    assert!(stats.contains(r"a\u{1b}[2J") && !stats.contains('\u{1b}'), "{stats}");
}

/// A named pipe without a writer.
fn pipe(folder: &Path, name: &str) -> String {
    let path = folder.join(name);
    let _ = fs::remove_file(&path);
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    path.to_str().unwrap().to_owned()
}

#[test]
fn pipes_are_refused_where_a_file_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("m.sluice");
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        let source = tempfile::tempdir().unwrap();
        copy_checkpoint(source.path(), Some(&["model.safetensors", "config.json"]));
        let pipe = pipe(source.path(), name);
        let args = ["convert", source.path().to_str().unwrap(), target.to_str().unwrap()];
        assert_fails(&sluice(&args), 1, &[&pipe, "not a regular file"]);
    }
    let path = pipe(folder.path(), "pipe");
    assert_fails(&sluice(&["bench", "disk", &path]), 1, &[&path, "not a regular file"]);
    let path = pipe(folder.path(), "config.json");
    assert_fails(&sluice(&["plan", &path]), 1, &[&path, "not a regular file"]);
}

#[test]
fn a_prompt_may_come_through_a_pipe() {
    let folder = tempfile::tempdir().unwrap();
    let path = pipe(folder.path(), "prompt");
    let writer = std::thread::spawn({
        let path = path.clone();
        move || fs::write(path, "To be").unwrap()
    });
    let piped = stdout(&sluice(&["run", demo_model(), "--prompt-file", &path, "-n", "4", "--temperature", "0"]));
    writer.join().unwrap();
    assert_eq!(piped, stdout(&sluice(&["run", demo_model(), "--prompt", "To be", "-n", "4", "--temperature", "0"])));
}

#[test]
fn what_is_read_is_never_written_to() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (checkpoint, model, text) = (at("checkpoint"), at("m.sluice"), at("t.txt"));
    copy_checkpoint(Path::new(&checkpoint), None);
    fs::copy(demo_model(), &model).unwrap();
    fs::write(&text, "To be, or not to be: that is the question. ".repeat(4)).unwrap();
    let link = at("link.sluice");
    std::os::unix::fs::symlink(&model, &link).unwrap();

    for name in ["model.safetensors", "config.json", "."] {
        let target = format!("{checkpoint}/{name}");
        let before = fs::read(&target).ok();
        assert_fails(
            &sluice(&["convert", &checkpoint, &target, "--overwrite"]),
            2,
            &["only model files are overwritten", &target],
        );
        assert_eq!(fs::read(&target).ok(), before);
    }
    let before = fs::read(&model).unwrap();
    for commands in [
        vec!["logits", &model, "--ids", "1,2", "--out", &link],
        vec!["run", &model, "--prompt-ids", "1,2", "--ids", "--trace", &model],
        vec!["run", &model, "--prompt-file", &text, "--trace", &text],
        vec!["calibrate", &model, "--text", &text, "--out", &model],
        vec!["calibrate", &model, "--text", &text, "--out", &text],
        vec!["bench", "decode", &model, "-n", "2", "--plot", &link],
        vec!["bench", "disk", &model, "--plot", &model],
    ] {
        assert_fails(&sluice(&commands), 2, &["that is read"]);
    }
    assert!(fs::read(&model).unwrap() == before && fs::read_to_string(&text).unwrap().starts_with("To be"));
}

#[test]
fn only_model_files_are_replaced_and_only_by_model_files() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (source, own, model) = (demo_checkpoint(), at("own"), at("m.sluice"));
    let source = source.to_str().unwrap();
    fs::write(&own, "mine").unwrap();
    fs::copy(demo_model(), &model).unwrap();
    assert_fails(&sluice(&["convert", source, &own, "--overwrite"]), 2, &["own", "no model file"]);
    assert_fails(&sluice(&["convert", source, &at(""), "--overwrite"]), 2, &["it is a folder"]);
    assert_fails(&sluice(&["convert", source, &at("nowhere/x")]), 1, &["nowhere does not exist"]);
    // A dry run reports it too.
    for (target, word) in [(&own, "exists"), (&at("nowhere/x"), "nowhere does not exist")] {
        let rehearsal = sluice(&["convert", source, target, "--dry-run"]);
        stdout(&rehearsal);
        assert!(stderr(&rehearsal).contains(word), "{}", stderr(&rehearsal));
    }
    // A journal that no conversion has written.
    let journal = at("q.partial.journal");
    fs::write(&journal, "mine").unwrap();
    assert_fails(&sluice(&["convert", source, &at("q")]), 2, &["q.partial.journal", "in the way"]);
    assert_eq!((fs::read(&own).unwrap(), fs::read(&journal).unwrap()), (b"mine".to_vec(), b"mine".to_vec()));

    let text = at("t.txt");
    fs::write(&text, "To be, or not to be: that is the question. ".repeat(4)).unwrap();
    let other = demo_model();
    for command in [
        vec!["calibrate", other, "--text", &text, "--out", &model],
        vec!["run", other, "--prompt", "a", "-n", "1", "--trace", &model],
        vec!["logits", other, "--ids", "1,2", "--out", &model],
    ] {
        assert_fails(&sluice(&command), 2, &["m.sluice is a model file"]);
        assert!(fs::read(&model).unwrap() == fs::read(other).unwrap(), "{command:?}");
    }
}

#[test]
fn a_trace_without_routing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("empty.jsonl");
    fs::write(&trace, "{\"layers\": [[], []]}\n").unwrap();
    for command in ["replay", "stats"] {
        assert_fails(&sluice(&["trace", command, trace.to_str().unwrap()]), 1, &["empty.jsonl", "no routing"]);
    }
}

/// A name without a folder that is no file is that of a model in the folder of models.
#[test]
fn a_bare_name_is_looked_for_in_the_folder_of_models() {
    let folder = tempfile::tempdir().unwrap();
    let (here, models) = (folder.path().join("here"), folder.path().join("home/models"));
    fs::create_dir_all(&here).unwrap();
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.env("SLUICE_HOME", folder.path().join("home")).current_dir(&here);
        command.args(args).stdin(Stdio::null()).output().unwrap()
    };
    let both = ["mine: there is no such file", models.to_str().unwrap(), "`sluice list`"];
    assert_fails(&run(&["inspect", "mine"]), 1, &both);
    fs::create_dir_all(&models).unwrap();
    for name in ["mine.sluice", "them--small.sluice", "us--small+q4-q8.sluice"] {
        fs::copy(demo_model(), models.join(name)).unwrap();
    }
    let ids = ["--prompt-ids", "838,29", "-n", "3", "--ids", "--forget"];
    let want = stdout(&sluice(&[&["run", demo_model()], &ids[..]].concat()));
    for name in ["mine", "mine.sluice", "small"] {
        assert_eq!(stdout(&run(&[&["run", name], &ids[..]].concat())), want, "{name}");
    }
    assert_eq!(json(&run(&["plan", "mine", "--json"]))["target"], models.join("mine.sluice").to_str().unwrap());
    // A file goes before a model of the folder, and a path is a path.
    fs::write(here.join("mine"), "no model").unwrap();
    assert_fails(&run(&["inspect", "mine"]), 1, &["mine is not a Sluice model file"]);
    for path in ["./small", "nowhere/mine"] {
        assert_fails(&run(&["inspect", path]), 1, &[path, "No such file"]);
    }
    // Which of two is meant has to be said.
    fs::copy(demo_model(), models.join("us--small.sluice")).unwrap();
    assert_fails(&run(&["inspect", "small"]), 2, &["several times", "them--small.sluice", "us--small.sluice"]);
}
