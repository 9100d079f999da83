//! The commands that compute: run, logits, perplexity, demo.

use std::fs;
use std::path::Path;
use std::process::Output;

use crate::common::{
    assert_fails, copy_checkpoint, demo_checkpoint, demo_model, expected, json, sluice, sluice_with_input, stderr,
    stdout,
};
use serde_json::Value;

fn list(ids: &Value) -> String {
    let ids: Vec<_> = ids.as_array().unwrap().iter().map(ToString::to_string).collect();
    ids.join(",")
}

#[test]
fn greedy_ids_and_text_are_the_references() {
    for case in expected()["greedy"].as_array().unwrap() {
        let count = case["ids"].as_array().unwrap().len().to_string();
        let base = ["run", demo_model(), "--temperature", "0", "-n", &count, "--exact"];
        let prompt = case["prompt"].as_str().unwrap();

        let from_ids = sluice(&[&base[..], &["--ids", "--prompt-ids", &list(&case["prompt_ids"])]].concat());
        assert_eq!(stdout(&from_ids), list(&case["ids"]) + "\n");
        let from_text = sluice(&[&base[..], &["--prompt", prompt]].concat());
        assert_eq!(stdout(&from_text), format!("{}\n", case["text"].as_str().unwrap()));
        let report = json(&sluice_with_input(&[&base[..], &["--json"]].concat(), prompt.as_bytes()));
        assert_eq!((&report["ids"], &report["text"]), (&case["ids"], &case["text"]));
        assert_eq!(report["finish"], "length");
    }
}

#[test]
fn the_profile_adds_up() {
    let args = ["run", demo_model(), "--prompt", "ROMEO:\n", "-n", "20", "--temperature", "0", "--budget", "8MiB"];
    // Rows of proposals that do not come true use experts too.
    let args = [&args[..], &["--drafts", "off"]].concat();
    let report = json(&sluice(&[&args[..], &["--json", "--engine", "pread", "--threads", "2"]].concat()));
    let profile = &report["profile"];
    assert_eq!((&report["prompt_tokens"], &profile["prefill"]["tokens"]), (&3.into(), &3.into()));
    let decode = &profile["decode"];
    assert_eq!(decode["tokens"], 19);
    let number = |value: &Value| value.as_u64().unwrap();
    assert_eq!(number(&decode["hits"]) + number(&decode["misses"]), 19 * 20);
    let expert = json(&sluice(&["inspect", demo_model(), "--json"]))["expert_bytes"].as_u64().unwrap();
    assert!(number(&decode["prefetched"]) >= number(&decode["prefetched_used"]));
    // Without prefetch, every miss is one read.
    let plain = json(&sluice(&[&args[..], &["--json", "--no-prefetch"]].concat()));
    let plain = &plain["profile"]["decode"];
    assert_eq!(number(&plain["expert_bytes_read"]), number(&plain["misses"]) * expert);
    assert_eq!((&profile["memory"]["requested"], &profile["threads"]), (&(8 << 20).into(), &2.into()));
    assert!(profile["read_path"].as_str().unwrap().contains("pread"));
    // The first token comes after the prompt, and before the others.
    let seconds = |value: &Value| value.as_f64().unwrap();
    let first = seconds(&profile["first_token_seconds"]);
    assert!(first >= seconds(&profile["open_seconds"]) + seconds(&profile["prefill"]["seconds"]) * 0.9);
    let read = number(&profile["first_token_bytes_read"]);
    let of_prompt = number(&profile["prefill"]["expert_bytes_read"]);
    assert!(read > of_prompt && read <= of_prompt + number(&profile["dense_bytes_read"]), "{read}, {of_prompt}");

    let output = sluice(&[&args[..], &["--profile"]].concat());
    let said = stderr(&output);
    for word in ["prefill", "decode", "tokens/s", "per token", "in memory", "requested 8.0 MiB", "the first token came"]
    {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(stdout(&output), format!("{}\n", report["text"].as_str().unwrap()));
}

#[test]
fn narrow_keys_and_values_are_asked_for_and_said() {
    let run = |kv_type: &str| {
        let args = ["run", demo_model(), "--prompt", "ROMEO:\n", "-n", "8", "--temperature", "0", "--context", "64"];
        sluice(&[&args[..], &["--json", "--profile", "--kv-type", kv_type]].concat())
    };
    let cache_bytes = |kv_type: &str| {
        let output = run(kv_type);
        let memory = &json(&output)["profile"]["memory"];
        assert_eq!(memory["kv_type"], kv_type);
        let note = format!("keys and values are rounded to {kv_type}");
        assert_eq!(stderr(&output).contains(&note), kv_type != "f32", "{}", stderr(&output));
        assert!(stderr(&output).contains(&format!("({kv_type})")));
        for command in ["inspect", "plan"] {
            let report = json(&sluice(&[command, demo_model(), "--json", "--context", "64", "--kv-type", kv_type]));
            assert_eq!((&report["kv_cache_bytes"], &report["kv_type"]), (&memory["kv_cache"], &kv_type.into()));
        }
        memory["kv_cache"].as_u64().unwrap()
    };
    let plain = cache_bytes("f32");
    assert_eq!((cache_bytes("f16"), cache_bytes("bf16")), (plain / 2, plain / 2));
    let q8 = cache_bytes("q8");
    assert!(plain / 4 < q8 && q8 <= plain * 9 / 32, "{q8} of {plain}");
    assert_fails(&run("q4"), 2, &["--kv-type", "q8"]);
}

#[test]
fn other_experts_are_asked_for_and_said() {
    let least =
        json(&sluice(&["inspect", demo_model(), "--json", "--context", "64"]))["least_budget"].as_u64().unwrap();
    let budget = (least + (5 << 20)).to_string();
    let args = ["run", demo_model(), "--prompt", "ROMEO:\n", "-n", "40", "--temperature", "0", "--budget", &budget];
    let run = |more: &[&str]| {
        sluice(&[&args[..], &["--json", "--profile", "--forget", "--no-prefetch", "--drafts", "off"], more].concat())
    };
    let own = run(&[]);
    assert_eq!(json(&own)["profile"]["lossy"], Value::Null);
    let missed = |output: &Output| json(output)["profile"]["decode"]["misses"].as_u64().unwrap();
    for (option, value, words) in [
        ("--expert-preference", "0.5", "experts in memory replace others that score better by up to 50 % of the range"),
        ("--top-k-experts", "2", "at most 2 experts per token and layer"),
    ] {
        let output = run(&[option, value]);
        assert_eq!(json(&output)["profile"]["lossy"], words);
        assert_eq!(stderr(&output).matches(words).count(), 2, "{}", stderr(&output));
        assert_ne!(json(&output)["text"], json(&own)["text"]);
        assert!(missed(&output) < missed(&own), "{option}: {} of {}", missed(&output), missed(&own));
        let trace = tempfile::tempdir().unwrap();
        let file = trace.path().join("t.jsonl");
        assert_fails(&run(&[option, value, "--trace", file.to_str().unwrap()]), 2, &["--trace", option]);
    }
    let same = run(&["--top-k-experts", "4"]);
    assert_eq!(json(&same)["ids"], json(&own)["ids"]);
    assert!(stderr(&same).contains("as the model's routers say"), "{}", stderr(&same));
    for wrong in [["--expert-preference", "0"], ["--expert-preference", "2"], ["--top-k-experts", "0"]] {
        assert_fails(&run(&wrong), 2, &[wrong[0]]);
    }
}

#[test]
fn what_other_experts_cost_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let eval = folder.path().join("beginning.txt");
    fs::write(&eval, &fs::read(demo_checkpoint().join("eval.txt")).unwrap()[..1000]).unwrap();
    let of = |command: &[&str], more: &[&str]| {
        let text = ["--text", eval.to_str().unwrap(), "--window", "64", "--json"];
        json(&sluice(&[command, &text, more].concat()))
    };
    let perplexity = |more: &[&str]| of(&["perplexity", demo_model()], more);
    let compare = |more: &[&str]| of(&["compare", demo_model(), demo_model()], more);
    let number = |value: &Value| value.as_f64().unwrap();
    let (own, few) = (perplexity(&[]), perplexity(&["--top-k-experts", "1"]));
    assert!(number(&few["perplexity"]) > number(&own["perplexity"]), "{few} against {own}");
    assert_eq!((&own["lossy"], few["lossy"].as_str()), (&Value::Null, Some("at most 1 expert per token and layer")));
    assert_eq!(number(&compare(&[])["divergence"]), 0.0);
    let compared = compare(&["--top-k-experts", "1"]);
    assert!(number(&compared["divergence"]) > 0.0);
    for (side, alone) in [&own, &few].into_iter().enumerate() {
        let ratio = number(&compared["perplexity"][side]) / number(&alone["perplexity"]);
        assert!((ratio - 1.0).abs() < 1e-9, "{compared}");
    }
    assert_eq!(compared["lossy"], few["lossy"]);
}

#[test]
fn the_form_of_prompts_is_asked_for_and_said() {
    let args = ["run", demo_model(), "--prompt", "ROMEO:\n", "-n", "8", "--temperature", "0", "--json", "--profile"];
    let run = |form: &str| sluice(&[&args[..], &["--prompt-attention", form]].concat());
    for (form, said) in [("absorbed", Value::Null), ("expanded", "expanded".into())] {
        let output = run(form);
        assert_eq!(json(&output)["profile"]["prompt_attention"], said);
        assert_eq!(stderr(&output).contains("expanded form of latent attention"), form == "expanded");
    }
    assert_fails(&run("other"), 2, &["--prompt-attention", "expanded"]);
    let folder = tempfile::tempdir().unwrap();
    let eval = folder.path().join("beginning.txt");
    fs::write(&eval, &fs::read(demo_checkpoint().join("eval.txt")).unwrap()[..1000]).unwrap();
    let text = ["--text", eval.to_str().unwrap(), "--prompt-attention", "expanded"];
    let compared = json(&sluice(&[&["compare", demo_model(), demo_model(), "--json"], &text[..]].concat()));
    assert_eq!(compared["prompt_attention"], "expanded");
    let difference = compared["max_logit_difference"].as_f64().unwrap();
    assert!(difference > 0.0 && difference < 0.5, "{compared}");
    let imatrix = folder.path().join("importance");
    let measured = ["calibrate", demo_model(), "--out", imatrix.to_str().unwrap()];
    assert_fails(&sluice(&[&measured, &text[..]].concat()), 2, &["calibrate", "--prompt-attention"]);
}

#[test]
fn drafts_are_counted_and_change_no_text() {
    let args = ["run", demo_model(), "--prompt", "ROMEO:\nROMEO:\n", "-n", "48", "--json", "--profile"];
    let run = |more: &[&str]| sluice(&[&args[..], more].concat());
    let own = json(&run(&["--drafts", "off"]));
    let none = serde_json::json!({"proposed": 0, "accepted": 0});
    assert_eq!(own["profile"]["drafts"], none);
    for more in
        [&["--drafts", "lookup", "--draft-tokens", "3"][..], &["--drafts", "lookup"], &["--drafts", "auto"], &[]]
    {
        let output = run(more);
        let report = json(&output);
        assert_eq!((&report["ids"], &report["text"]), (&own["ids"], &own["text"]), "{more:?}");
        assert_eq!(report["profile"]["decode"]["tokens"], own["profile"]["decode"]["tokens"], "{more:?}");
        let proposed = report["profile"]["drafts"]["proposed"].as_u64().unwrap();
        assert!(!more.contains(&"--draft-tokens") || proposed > 0, "{report}");
        let said = format!("{proposed} tokens were proposed");
        assert_eq!(stderr(&output).contains(&said), proposed > 0, "{}", stderr(&output));
    }
    // Unless something else is said, the text itself proposes; but neither where all rows are recorded, nor where the text depends on steps.
    let three = |more: &[&str]| run(&[&["--draft-tokens", "3"], more].concat());
    assert_ne!(json(&three(&[]))["profile"]["drafts"], none);
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("t.jsonl");
    for more in [["--trace", trace.to_str().unwrap()], ["--expert-preference", "0.1"]] {
        assert_fails(&three(&more), 2, &["no tokens are proposed", "--drafts lookup"]);
    }
    assert_fails(&run(&["--drafts", "mtp"]), 1, &["multi-token prediction"]);
    assert_fails(&run(&["--drafts", "always"]), 2, &["--drafts", "lookup"]);
}

#[test]
fn sampling_follows_the_seed() {
    let text =
        |more: &[&str]| stdout(&sluice(&[&["run", demo_model(), "--prompt", "JULIET:", "-n", "24"], more].concat()));
    // The model's own generation_config.json asks for sampling.
    let own = text(&[]);
    assert_eq!(own, text(&["--temperature", "0.7", "--top-p", "0.9", "--seed", "0"]));
    assert_ne!(own, text(&["--seed", "1"]));
    assert_ne!(own, text(&["--temperature", "0"]));
    assert_eq!(text(&["--top-k", "1"]), text(&["--temperature", "0"]));
}

#[test]
fn generation_stops() {
    let run = |more: &[&str]| json(&sluice(&[&["run", demo_model(), "--temperature", "0", "--json"], more].concat()));
    let stopped = run(&["--prompt", "ROMEO:\n", "-n", "64", "--stop", "\n\nNurse"]);
    assert_eq!(stopped["finish"], "stop_string");
    assert!(stopped["text"].as_str().unwrap().ends_with("to-morrow."), "{stopped}");
    let full = run(&["--prompt", "ROMEO:\n", "-n", "64", "--context", "8"]);
    assert_eq!((&full["finish"], full["ids"].as_array().unwrap().len()), (&"context".into(), 6));
    let nothing = run(&["--prompt", "ROMEO:\n", "-n", "0"]);
    assert_eq!((&nothing["text"], &nothing["finish"]), (&"".into(), &"length".into()));
}

/// The demo checkpoint without a tokenizer, converted.
fn mute_model(folder: &std::path::Path) -> String {
    let checkpoint = folder.join("mute");
    copy_checkpoint(&checkpoint, Some(&["config.json", "model.safetensors"]));
    let model = folder.join("mute.sluice").to_str().unwrap().to_owned();
    stdout(&sluice(&["convert", checkpoint.to_str().unwrap(), &model, "--type", "f32", "--dense-type", "f32"]));
    model
}

#[test]
fn models_without_a_tokenizer_speak_in_ids() {
    let folder = tempfile::tempdir().unwrap();
    let model = mute_model(folder.path());
    let case = &expected()["greedy"][0];
    let ids = list(&case["prompt_ids"]);
    // Without generation_config.json too: greedy.
    let output = sluice(&["run", &model, "--prompt-ids", &ids, "-n", "64", "--ids", "--exact"]);
    assert_eq!(stdout(&output), list(&case["ids"]) + "\n");
    let report = json(&sluice(&["run", &model, "--prompt-ids", &ids, "-n", "2", "--json"]));
    assert_eq!(report["text"], Value::Null);
    assert_fails(&sluice(&["run", &model, "--prompt-ids", &ids]), 2, &["no tokenizer", "--ids"]);
    assert_fails(&sluice(&["run", &model, "--prompt", "x", "--ids"]), 2, &["no tokenizer", "--prompt-ids"]);
    assert_fails(&sluice(&["run", &model, "--prompt-ids", &ids, "--ids", "--stop", "x"]), 2, &["--stop"]);
    let eval = demo_checkpoint().join("eval.txt");
    assert_fails(&sluice(&["perplexity", &model, "--text", eval.to_str().unwrap()]), 1, &["no tokenizer"]);
}

#[test]
fn damage_ends_a_run_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.sluice");
    let mut bytes = fs::read(demo_model()).unwrap();
    let inspected = json(&sluice(&["inspect", demo_model(), "--json", "--extents"]));
    for extent in inspected["extents"].as_array().unwrap().iter().filter(|e| e["kind"] == "expert") {
        bytes[extent["offset"].as_u64().unwrap() as usize] ^= 0x80;
    }
    fs::write(&path, bytes).unwrap();
    let output = sluice(&["run", path.to_str().unwrap(), "--prompt", "ROMEO:"]);
    assert_fails(&output, 1, &["expert", "checksum"]);
    assert_eq!(output.stdout, b"");
}

fn npy(path: &std::path::Path) -> (String, Vec<f32>) {
    let bytes = fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let data = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let elements = bytes[data..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    (String::from_utf8(bytes[10..data].to_vec()).unwrap(), elements.collect())
}

#[test]
fn logits_are_a_numpy_array() {
    let folder = tempfile::tempdir().unwrap();
    let case = &expected()["greedy"][1];
    let ids = list(&case["prompt_ids"]);
    let write = |name: &str, more: &[&str]| {
        let path = folder.path().join(name);
        let args = ["logits", demo_model(), "--ids", &ids, "--exact", "--out", path.to_str().unwrap()];
        assert_eq!(stdout(&sluice(&[&args[..], more].concat())), "");
        npy(&path)
    };
    let (header, at_once) = write("a.npy", &[]);
    assert!(header.contains("'descr': '<f4'") && header.contains("'shape': (10, 1536)"), "{header}");
    assert_eq!(at_once.len(), 10 * 1536);
    let last = &at_once[9 * 1536..];
    let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
    assert_eq!(best as u64, case["ids"][0].as_u64().unwrap());
    assert_eq!(write("b.npy", &["--step", "--threads", "1"]), (header, at_once));
}

#[test]
fn output_that_is_not_a_number_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (checkpoint, model, out) = (path("checkpoint"), path("model.sluice"), path("logits.npy"));
    copy_checkpoint(Path::new(&checkpoint), None);
    // The weights of the last norm are as large as bf16 allows: each is a number, but their result is not.
    let weights = Path::new(&checkpoint).join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    let norm = &header["model.norm.weight"];
    assert_eq!(norm["dtype"], "BF16");
    let at = |i: usize| data + norm["data_offsets"][i].as_u64().unwrap() as usize;
    for weight in bytes[at(0)..at(1)].chunks_mut(2) {
        weight.copy_from_slice(&[0x7f, 0x7f]);
    }
    fs::write(&weights, bytes).unwrap();
    stdout(&sluice(&["convert", &checkpoint, &model, "--type", "f32", "--dense-type", "f32"]));
    assert_fails(&sluice(&["logits", &model, "--ids", "1,2", "--exact", "--out", &out]), 1, &[&model, "not a number"]);
    assert!(!Path::new(&out).exists());
    let eval = demo_checkpoint().join("eval.txt");
    let args = ["perplexity", &model, "--text", eval.to_str().unwrap(), "--exact"];
    assert_fails(&sluice(&args), 1, &[&model, "not a number"]);
}

#[test]
fn perplexity_is_the_references() {
    let eval = demo_checkpoint().join("eval.txt");
    let args = ["perplexity", demo_model(), "--text", eval.to_str().unwrap(), "--exact"];
    let score = json(&sluice(&[&args[..], &["--json"]].concat()));
    let reference = &expected()["perplexity"];
    assert_eq!(score["tokens"], reference["tokens_scored"]);
    for (ours, theirs) in [("perplexity", "perplexity"), ("nll", "nll_sum")] {
        let ratio = score[ours].as_f64().unwrap() / reference[theirs].as_f64().unwrap();
        assert!((ratio - 1.0).abs() < 1e-3, "{ours}: {score}");
    }
    assert!(stdout(&sluice(&args)).starts_with("perplexity 28.6"));
}

#[test]
fn a_conversion_is_compared_with_its_reference() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (checkpoint, rounded) = (demo_checkpoint(), path("q3.sluice"));
    let eval = checkpoint.join("eval.txt").to_str().unwrap().to_owned();
    let convert = ["convert", checkpoint.to_str().unwrap(), &rounded, "--type", "q3"];
    stdout(&sluice(&convert));
    let compare = |other: &str| json(&sluice(&["compare", demo_model(), other, "--text", &eval, "--json"]));
    let perplexity = |model: &str| json(&sluice(&["perplexity", model, "--text", &eval, "--json"]));

    let same = compare(demo_model());
    assert_eq!((&same["divergence"], &same["agreement"]), (&0.0.into(), &1.0.into()), "{same}");
    assert_eq!(same["max_logit_difference"], 0.0, "{same}");

    let compared = compare(&rounded);
    for (at, model) in [demo_model(), &rounded].into_iter().enumerate() {
        let alone = perplexity(model);
        assert_eq!(compared["tokens"], alone["tokens"]);
        assert_eq!(
            (&compared["perplexity"][at], &compared["nll"][at]),
            (&alone["perplexity"], &alone["nll"]),
            "{model}"
        );
    }
    let figure = |name: &str| compared[name].as_f64().unwrap();
    assert!(0.0 < figure("divergence") && figure("divergence") < figure("max_divergence"), "{compared}");
    assert!(0.5 < figure("agreement") && figure("agreement") < 1.0, "{compared}");
    assert!(0.0 < figure("max_logit_difference"), "{compared}");
    let text = stdout(&sluice(&["compare", demo_model(), &rounded, "--text", &eval, "--window", "64"]));
    assert!(text.starts_with("divergence ") && text.contains("windows of 64"), "{text}");
}

#[test]
fn calibration_weights_a_conversion() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (checkpoint, imatrix) = (demo_checkpoint(), path("imatrix.bin"));
    let eval = checkpoint.join("eval.txt");
    let calibrate = ["calibrate", demo_model(), "--text", eval.to_str().unwrap(), "--out", &imatrix, "--json"];
    let measured = json(&sluice(&calibrate));
    assert_eq!((measured["experts"].as_u64(), measured["experts_reached"].as_u64()), (Some(160), Some(160)));
    let source = checkpoint.to_str().unwrap();
    for (name, more) in [("plain", &[][..]), ("weighted", &["--imatrix", imatrix.as_str()])] {
        stdout(&sluice(&[&["convert", source, &path(name), "--type", "q3"], more].concat()));
    }
    assert_ne!(std::fs::read(path("plain")).unwrap(), std::fs::read(path("weighted")).unwrap());
    std::fs::write(&imatrix, b"SLUICEIM and no more").unwrap();
    let hostile = ["convert", source, &path("third"), "--type", "q3", "--imatrix", &imatrix];
    assert_fails(&sluice(&hostile), 1, &["imatrix.bin", "damaged", "calibrate again"]);
}

#[test]
fn bench_kernels_prints_every_type() {
    let args = ["bench", "kernels", "--threads", "2", "--bytes", "256KiB"];
    let report = json(&sluice(&[&args[..], &["--json"]].concat()));
    for side in report["runs"].as_array().unwrap() {
        let names: Vec<_> = side["types"].as_array().unwrap().iter().map(|t| t["type"].as_str().unwrap()).collect();
        assert!(
            names.len() > 40
                && ["q4", "q4_k", "iq2_xxs", "nvfp4", "u4-g128-f16-zero"].iter().all(|n| names.contains(n))
        );
        let rates = ["gemv_gb_per_s", "read_gb_per_s", "share_of_reading"];
        assert!(rates.iter().all(|rate| side["types"][0][rate].as_f64().unwrap() > 0.0));
    }
    let args = [&args[..], &["--types", "q4_k,q8"]].concat();
    assert!(["plain reading", "q4_k ", "q8 "].iter().all(|word| stdout(&sluice(&args)).contains(word)));
    assert_fails(&sluice(&["bench", "kernels", "--types", "q9"]), 2, &["q9", "q4_k"]);
    let many = ["bench", "kernels", "--threads", "1000000", "--bytes", "256KiB", "--types", "q4", "--json"];
    let many = json(&sluice(&many));
    let threads = many["runs"][1]["threads"].as_u64().unwrap();
    assert!((1..=1024).contains(&threads), "{threads} is what the pool has, not what was asked for");
}

#[test]
fn demo_shows_that_it_streams() {
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("kept");
    let text = stdout(&sluice(&["demo", "--keep", kept.to_str().unwrap()]));
    for word in
        ["Convert", "Verify", "every checksum matches", "room for", "streamed", "tokens/s", "the same 96 tokens"]
    {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert!(stdout(&sluice(&["verify", kept.join("demo.sluice").to_str().unwrap()])).contains("intact"));
}
