//! The commands about models that do not exist yet: plan, synth.

use crate::common;

use std::path::Path;

use std::fs;

use crate::common::{assert_fails, demo_checkpoint, demo_model, json, sluice, stderr, stdout};

#[test]
fn synth_writes_a_file_that_runs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.sluice");
    let (demo, path) = (demo_checkpoint(), path.to_str().unwrap());
    let args = ["synth", demo.to_str().unwrap(), path, "--layers", "3", "--type", "q4", "--dense-type", "bf16"];
    let text = stdout(&sluice(&args));
    for word in ["random weights", "deepseek_v3", "experts q4", "the rest bf16", "expert"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert_eq!(json(&sluice(&["verify", path, "--json"]))["intact"], true);
    let inspected = json(&sluice(&["inspect", path, "--json"]));
    assert_eq!((&inspected["layers"], &inspected["provenance"]["synthetic"]), (&3.into(), &true.into()));
    let run = json(&sluice(&["run", path, "--prompt-ids", "1,2,3", "-n", "4", "--json"]));
    assert_eq!(run["ids"].as_array().unwrap().len(), 4);

    assert_fails(&sluice(&args), 2, &["exists", "--overwrite"]);
    let again = json(&sluice(&[&args[..], &["--overwrite", "--json"]].concat()));
    assert_eq!(again["model_id"], inspected["model_id"]);
    assert_eq!(again["file_bytes"], fs::metadata(path).unwrap().len());
    assert_eq!((&again["family"], &again["hole_bytes"]), (&"deepseek_v3".into(), &0.into()));
    assert!(again["sizes"].as_array().unwrap().iter().any(|s| s["kind"] == "expert"));
}

#[test]
fn synth_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.sluice");
    let path = path.to_str().unwrap();
    assert_fails(&sluice(&["synth", "no-such-model", path]), 2, &["no-such-model", "deepseek-r1", "config.json"]);
    assert_fails(&sluice(&["synth", "bench-34x128", path, "--layers", "35"]), 2, &["34 layers"]);
    assert_fails(&sluice(&["synth", "bench-34x128", path, "--skew=-1"]), 2, &["skew", "0 to 100"]);
    assert_fails(&sluice(&["synth", "bench-34x128", path, "--type", "f16"]), 2, &["f16", "int4"]);
    let config = folder.path().join("other.json");
    fs::write(&config, r#"{"model_type": "no_such_family"}"#).unwrap();
    assert_fails(
        &sluice(&["synth", config.to_str().unwrap(), path]),
        1,
        &["no_such_family", "supported", "deepseek_v3"],
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_plan_of_a_known_model() {
    let asked = ["--type", "int4", "--dense-type", "q8"];
    let machine = ["--ram", "64GiB", "--ssd", "3GB/s", "--mem-bandwidth", "50GB/s"];
    let args = [&["plan", "deepseek-r1"], &asked[..], &machine].concat();
    let text = stdout(&sluice(&args));
    for word in [
        "deepseek_v3",
        "11.49 GB",
        "token cycle: 464 of 24.8 MB",
        "trace of qwen3-30b-a3b",
        "the drive is the limit",
        "as requested",
        "left over ",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let plan = json(&sluice(&[&args[..], &["--json"]].concat()));
    assert_eq!(plan["token_cycle_bytes"], 24_772_608u64 * 464);
    assert!((370e9..400e9).contains(&plan["disk_bytes"].as_f64().unwrap()));
    let number = |key: &str| plan["speed"][key].as_f64().unwrap_or_else(|| panic!("{key} in {plan}"));
    assert!((number("drive_seconds") - number("missed_bytes") / 3e9).abs() < 1e-9);
    assert!((number("memory_seconds") - number("touched_bytes") / 50e9).abs() < 1e-9);
    assert!((number("tokens_per_second") * number("drive_seconds") - 1.0).abs() < 1e-9);
    assert_eq!((&plan["speed"]["bound"], &plan["warnings"]), (&"drive".into(), &serde_json::json!([])));
    assert!(plan["speed"]["memory"]["slots"].as_u64().unwrap() > 464);

    // Wider experts take longer.
    let wide = [&["plan", "deepseek-r1", "--type", "q8", "--dense-type", "q8", "--json"], &machine[..]].concat();
    let wide = json(&sluice(&wide));
    assert!(wide["speed"]["tokens_per_second"].as_f64() < plan["speed"]["tokens_per_second"].as_f64());
}

/// Without types, a plan describes what `convert` writes: the published types, and the plan says so.
#[test]
fn a_plan_is_of_what_convert_writes() {
    let planned =
        |target: &str, more: &[&str]| json(&sluice(&[&["plan", target, "--ram", "64GiB", "--json"], more].concat()));
    for (name, experts, dense, bytes) in [
        ("deepseek-r1", "fp8", vec!["fp8", "bf16"], 675.9),
        ("kimi-k2", "fp8", vec!["fp8", "bf16"], 1033.3),
        ("gpt-oss-120b", "mxfp4", vec!["bf16"], 65.6),
        ("qwen3-30b", "bf16", vec!["bf16"], 61.1),
        // This one has never been released.
        ("bench-34x128", "int4", vec!["q8"], 12.5),
    ] {
        let plan = planned(name, &[]);
        let (expert_types, dense_types) = (serde_json::json!([experts]), serde_json::json!(dense));
        assert_eq!((&plan["expert_types"], &plan["dense_types"]), (&expert_types, &dense_types), "{name}");
        assert!((plan["disk_bytes"].as_f64().unwrap() / 1e9 - bytes).abs() < 0.05, "{name}: {plan}");
    }
    assert!(planned("deepseek-r1", &[])["types_from"].as_str().unwrap().contains("as published, fp8"));
    assert!(stdout(&sluice(&["plan", "deepseek-r1"])).contains("as published, fp8, which `sluice convert` keeps"));
    let q4 = planned("deepseek-r1", &["--type", "q4"]);
    assert_eq!(
        (&q4["expert_types"], &q4["dense_types"]),
        (&serde_json::json!(["q4"]), &serde_json::json!(["fp8", "bf16"]))
    );
    assert!(q4["types_from"].as_str().unwrap().starts_with("experts as requested, the rest as published"));

    // A checkpoint, to the byte except for the provenance.
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden");
    let folder = tempfile::tempdir().unwrap();
    for (family, more) in [("deepseek_v3_fp8", &[][..]), ("qwen3_moe_gptq", &[]), ("kimi_k2_int4", &["--type", "q8"])] {
        let (source, file) = (golden.join(family), folder.path().join(family));
        let (source, file) = (source.to_str().unwrap(), file.to_str().unwrap());
        let plan = planned(source, more);
        json(&sluice(&[&["convert", source, file, "--json"], more].concat()));
        let made = planned(file, &[]);
        for key in ["expert_types", "dense_types", "token_cycle_bytes", "dense_bytes", "least_memory"] {
            assert_eq!(plan[key], made[key], "{family}: {key}");
        }
        let [plan, made] = [&plan, &made].map(|p| p["disk_bytes"].as_u64().unwrap());
        assert!(plan >= made && plan - made <= 128 << 10, "{family}: {plan} {made}");
    }
    // With only `config.json`, the plan follows that.
    let config = golden.join("deepseek_v3_fp8/config.json");
    let alone = planned(config.to_str().unwrap(), &[]);
    assert_eq!(alone["expert_types"], serde_json::json!(["fp8"]));
    // A checkpoint that convert would refuse is still planned, with the reason.
    let broken = folder.path().join("broken");
    fs::create_dir(&broken).unwrap();
    fs::copy(&config, broken.join("config.json")).unwrap();
    fs::copy(
        golden.join("deepseek_v3_fp8/model-00001-of-00002.safetensors"),
        broken.join("model-00001-of-00002.safetensors"),
    )
    .unwrap();
    let plan = planned(broken.to_str().unwrap(), &[]);
    assert_eq!(plan["disk_bytes"], alone["disk_bytes"]);
    let warning = plan["warnings"][0].as_str().unwrap();
    assert!(warning.contains("config.json alone") && warning.contains("1 of 2"), "{warning}");
}

#[test]
fn a_plan_of_what_is_no_model_says_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("m.gguf"), b"GGUF\x03\0\0\0").unwrap();
    fs::write(path("config.json"), "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n").unwrap();
    assert_fails(&sluice(&["plan", &path("m.gguf")]), 1, &["m.gguf", "damaged"]);
    assert_fails(&sluice(&["plan", &path("config.json")]), 1, &["config.json", "Git LFS"]);
    let hub = sluice(&["plan", "some-owner/Some-Model"]);
    assert_fails(&hub, 2, &["`sluice pull some-owner/Some-Model --include config.json --to Some-Model`"]);
    let hub = sluice(&["convert", "some-owner/Some-Model", &path("out")]);
    assert_fails(&hub, 1, &["`hf:some-owner/Some-Model`"]);
}

#[test]
fn a_plan_warns() {
    let below =
        json(&sluice(&["plan", "deepseek-r1", "--type", "int4", "--dense-type", "q8", "--ram", "24GiB", "--json"]));
    assert!(below["warnings"][0].as_str().unwrap().contains("less than one token cycle"), "{below}");
    let streamed =
        json(&sluice(&["plan", "deepseek-r1", "--type", "int4", "--dense-type", "q8", "--ram", "8GiB", "--json"]));
    assert!(streamed["speed"]["streamed_bytes"].as_u64().unwrap() > 0);
    assert!(streamed["warnings"][1].as_str().unwrap().contains("dense parts do not fit"), "{streamed}");
    let refused =
        json(&sluice(&["plan", "deepseek-r1", "--type", "int4", "--dense-type", "q8", "--ram", "1GiB", "--json"]));
    assert!(refused["speed"].is_null() && refused["warnings"][0].as_str().unwrap().contains("at least"));
    let text = stdout(&sluice(&["plan", "deepseek-r1", "--type", "int4", "--dense-type", "q8", "--ram", "1GiB"]));
    assert!(text.contains("warning: this memory does not suffice"), "{text}");
}

#[test]
fn a_plan_of_a_file() {
    let plan = json(&sluice(&["plan", demo_model(), "--ram", "4GiB", "--json"]));
    let inspected = json(&sluice(&["inspect", demo_model(), "--json"]));
    for (ours, theirs) in
        [("disk_bytes", "file_bytes"), ("token_cycle_bytes", "token_cycle_bytes"), ("least_memory", "least_budget")]
    {
        assert_eq!(plan[ours], inspected[theirs], "{ours}");
    }
    assert_eq!((&plan["speed"]["hit_rate"], &plan["speed"]["curve"]), (&1.0.into(), &serde_json::Value::Null));
    assert_eq!(plan["expert_types"], serde_json::json!(["f32"]));
    assert!(stdout(&sluice(&["plan", demo_model(), "--ram", "4GiB"])).contains("everything fits"));
    assert_fails(&sluice(&["plan", demo_model(), "--type", "q8"]), 2, &["--type"]);
    assert_fails(&sluice(&["plan", "no-such-model"]), 2, &["no-such-model", "deepseek-r1"]);
    assert_fails(&sluice(&["plan", "deepseek-r1", "--ssd", "fast"]), 2, &["fast", "3GB/s"]);
    assert!(stderr(&sluice(&["plan", demo_model()])).is_empty());
    // Figures for another context than the requested one say so.
    for command in ["plan", "inspect"] {
        let said = stderr(&sluice(&[command, demo_model(), "--context", "100000"]));
        assert!(said.contains("note: this is for 512 tokens"), "{said}");
    }
}

/// A cold cache misses each expert at first, even where all fit: so does a run.
#[test]
fn a_plan_takes_the_misses_of_a_trace() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("demo.jsonl").to_str().unwrap().to_owned();
    stdout(&sluice(&[
        "run",
        demo_model(),
        "--prompt-ids",
        "1,2,3",
        "-n",
        "8",
        "--ignore-eos",
        "--trace",
        &trace,
        "--ids",
    ]));
    let plan = json(&sluice(&["plan", demo_model(), "--ram", "4GiB", "--trace", &trace, "--json"]));
    let hits = plan["forecast"]["hit_rate"].as_f64().unwrap();
    assert!((0.05..1.0).contains(&hits), "{plan}");
    assert_eq!((plan["trace"].as_str(), plan["speed"]["hit_rate"].as_f64()), (Some(&*trace), Some(1.0)));
    let seconds = |name: &str| plan["forecast"][name].as_f64().unwrap();
    assert!(seconds("token_seconds") > seconds("computing_seconds").max(seconds("drive_seconds")), "{plan}");
    assert_fails(
        &sluice(&["plan", "qwen3-30b", "--ram", "16GiB", "--trace", &trace]),
        2,
        &["demo.jsonl", "no trace of"],
    );
}

#[test]
fn a_plan_of_a_dense_model_does_not_speak_of_experts() {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden/llama/config.json");
    let text = stdout(&sluice(&["plan", config.to_str().unwrap(), "--ram", "4GiB"]));
    let (facts, warning) = text.split_once("\nwarning: ").unwrap();
    assert!(facts.contains("none with experts; all bf16") && warning.contains("no routed experts"), "{text}");
    assert!(facts.contains("\n  left over "), "{text}");
    for word in ["experts ", "hit rate", "token cycle"] {
        assert!(!facts.contains(word), "`{word}`: {text}");
    }
}

#[test]
fn synth_replaces_only_model_files() {
    let folder = tempfile::tempdir().unwrap();
    common::copy_checkpoint(folder.path(), Some(&["config.json"]));
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let config = std::fs::read(path("config.json")).unwrap();
    let synth = |to: &str| sluice(&["synth", folder.path().to_str().unwrap(), &path(to), "--overwrite"]);
    assert_fails(&synth("config.json"), 2, &["config.json", "is read"]);
    assert_eq!(std::fs::read(path("config.json")).unwrap(), config);
    for name in ["letter.txt", "new.sluice.partial"] {
        std::fs::write(path(name), "mine").unwrap();
        assert_fails(&synth(name.trim_end_matches(".partial")), 2, &[name]);
        assert_eq!(std::fs::read(path(name)).unwrap(), b"mine");
    }
    std::fs::remove_file(path("new.sluice.partial")).unwrap();
    std::os::unix::fs::symlink("letter.txt", path("new.sluice.partial")).unwrap();
    assert_fails(&synth("new.sluice"), 2, &["new.sluice.partial"]);
    assert_eq!(std::fs::read(path("letter.txt")).unwrap(), b"mine");
    std::fs::remove_file(path("new.sluice.partial")).unwrap();
    for _ in 0..2 {
        stdout(&synth("new.sluice"));
    }
}

#[test]
fn speeds_need_their_unit() {
    for option in ["--ssd", "--mem-bandwidth"] {
        assert_fails(&sluice(&["plan", "deepseek-r1", option, "3"]), 2, &[option, "3GB/s"]);
    }
    let plan = ["plan", "deepseek-r1", "--ram", "64GiB", "--ssd", "3GB/s"];
    let text = stdout(&sluice(&plan));
    assert!(!text.contains("iB"), "units of one kind: {text}");
}
