//! `sluice bench disk`, its effect on `sluice run`, and the command line of `sluice bench`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::common::{assert_fails, demo_checkpoint, demo_model, json, sluice, stderr, stdout};
use serde_json::{Value, json};

/// Runs the program with its own cache folder.
fn sluice_with_cache(cache: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.env("XDG_CACHE_HOME", cache).args(args).stdin(Stdio::null()).output().unwrap()
}

/// The demo model may be in memory, where only the page cache can be measured.
fn bench(args: &[&str]) -> Output {
    let direct = sluice(&[&["bench", "disk", demo_model()], args].concat());
    if direct.status.success() || !stderr(&direct).contains("--buffered") {
        return direct;
    }
    sluice(&[&["bench", "disk", demo_model(), "--buffered"], args].concat())
}

#[test]
fn a_table_in_words_and_a_plot() {
    let folder = tempfile::tempdir().unwrap();
    let plot = folder.path().join("plot.svg");
    let args = ["--seconds", "0.3", "--engine", "pread", "--block", "64KiB,256KiB", "--depth", "1,4", "--no-save"];
    let text = stdout(&bench(&[&args[..], &["--plot", plot.to_str().unwrap()]].concat()));
    for word in ["Proof", "Engine     pread", "random, pread", "sequential, pread", "256KiB", "Knee"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let svg = fs::read_to_string(plot).unwrap();
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n") && svg.contains("64KiB pread"));
}

#[test]
fn one_point_as_json() {
    let args = ["--seconds", "0.2", "--engine", "pread", "--pattern", "random", "--block", "128KiB", "--depth", "2"];
    let report = json(&bench(&[&args[..], &["--json"]].concat()));
    let point = &report["points"][0];
    assert_eq!(report["points"].as_array().unwrap().len(), 1);
    assert_eq!((&point["block_bytes"], &point["depth"]), (&json!(131_072), &json!(2)));
    assert!(point["bytes_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(report["knee"]["engine"], "pread");
    assert_eq!((&report["saved"], &report["calibration"]), (&Value::Null, &Value::Null), "one point is no calibration");
    assert_eq!(report["proof"]["direct"], !report["buffered"].as_bool().unwrap());
}

#[test]
fn scratch_files_go_away() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let args = ["bench", "disk", path, "--size", "64MiB", "--seconds", "0.3", "--engine", "pread", "--buffered"];
    let text = stdout(&sluice(&args));
    assert!(text.contains("BUFFERED") && text.contains("through the page cache"), "{text}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_measured_says_why() {
    let model = demo_model();
    assert_fails(&sluice(&["bench", "disk", "/no/such/folder/file"]), 1, &["/no/such/folder/file"]);
    assert_fails(&sluice(&["bench", "disk", model, "--size", "1GiB"]), 2, &["--size", "folder"]);
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().to_str().unwrap();
    assert_fails(&sluice(&["bench", "disk", folder, "--size", "16MiB"]), 2, &["--size", "64MiB"]);
    assert_eq!(fs::read_dir(folder).unwrap().count(), 0);
    for block in ["1000", "0", "32MiB", "64MiB", "1MiB,64MiB"] {
        assert_fails(&sluice(&["bench", "disk", model, "--block", block]), 2, &["--block", "4096", "16MiB"]);
    }
    assert_fails(&sluice(&["bench", "disk", model, "--depth", "1000"]), 2, &["1000"]);
    assert_fails(&sluice(&["bench", "disk", model, "--seconds", "nan"]), 2, &["seconds"]);
    assert_fails(&sluice(&["bench", "disk", "/dev/null"]), 1, &["not a regular file"]);
    let Ok(file) = tempfile::NamedTempFile::new_in("/dev/shm") else { return };
    fs::write(file.path(), vec![1; 1 << 20]).unwrap();
    assert_fails(&sluice(&["bench", "disk", file.path().to_str().unwrap()]), 1, &["tmpfs", "--buffered"]);
}

#[test]
fn a_plot_that_cannot_be_written_is_known_before_measuring() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (missing, here, new) = (at("missing/plot.svg"), at("."), at("new.svg"));
    // Nothing can be measured either, but that is found out later.
    for plot in [&missing, &here] {
        for what in ["disk", "decode"] {
            let output = sluice(&["bench", what, "/dev/null", "--plot", plot]);
            assert_fails(&output, 1, &[plot, "write the chart"]);
        }
    }
    // An existing file is unchanged, and no other file is left.
    let old = at("old.svg");
    fs::write(&old, "precious").unwrap();
    for plot in [&old, &new] {
        assert_fails(&sluice(&["bench", "disk", "/dev/null", "--plot", plot]), 1, &["not a regular file"]);
        assert_fails(&sluice(&["bench", "decode", "/dev/null", "--plot", plot]), 1, &["/dev/null"]);
    }
    assert_eq!(fs::read_to_string(&old).unwrap(), "precious");
    assert!(!Path::new(&new).exists());
}

#[test]
fn a_comparison_takes_no_options_that_it_would_ignore() {
    for (options, word) in [
        (&["--compare", "prefetch", "--budgets", "8MiB,16MiB"][..], "--budgets"),
        (&["--compare", "checksums", "--plot", "/dev/null"], "--plot"),
        (&["--compare", "prefetch", "--no-prefetch"], "--no-prefetch"),
        (&["--compare", "engine", "--engine", "pread"], "--engine"),
        (&["--pairs", "3"], "--compare"),
    ] {
        let output = sluice(&[&["bench", "decode", demo_model(), "-n", "1", "--warm-up", "1"], options].concat());
        assert_fails(&output, 2, &[word]);
    }
    let args = ["bench", "decode", demo_model(), "-n", "1", "--warm-up", "1", "--compare", "prefetch", "--json"];
    assert_eq!(json(&sluice(&args))["pairs"].as_array().unwrap().len(), 8);
}

#[test]
fn sequences_that_decode_together_are_measured_beside_their_bounds() {
    let args = ["bench", "decode", demo_model(), "--sequences", "3", "-n", "4", "--warm-up", "2"];
    let report = json(&sluice(&[&args[..], &["--json", "--budgets", "4MiB,16MiB"]].concat()));
    let runs = report.as_array().unwrap();
    assert_eq!(runs.len(), 2);
    for run in runs {
        let number = |name: &str| run[name].as_f64().unwrap();
        let bounds = ["drive", "memory", "arithmetic"].map(|name| run["bounds"][name].as_f64().unwrap());
        assert_eq!((&run["sequences"], &run["steps"]), (&json!(3), &json!(4)));
        // Five layers with 4 of 32 experts: three tokens use at most 12 different experts, and one token at least 4.
        assert!((20.0..=60.0).contains(&number("union_of_experts")), "{run}");
        let largest = bounds.into_iter().fold(0.0, f64::max);
        let ratio = number("milliseconds_per_step") / largest;
        assert!((number("time_over_bound") / ratio - 1.0).abs() < 1e-9, "{run}");
    }
    // With everything in memory, a step reads little except rows of the embedding.
    assert!(runs[1]["bytes_per_step"].as_f64() <= runs[0]["bytes_per_step"].as_f64());
    let text = stdout(&sluice(&args));
    for word in ["3 sequences", "tokens/s in all", "different experts", "bounds of a step", "GOP/s"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert_fails(&sluice(&[&args[..], &["--compare", "prefetch"]].concat()), 2, &["--compare", "--sequences"]);
}

/// A model whose experts are holes: nothing else can use it, and the simulated drive does not read them.
fn without_experts(folder: &Path) -> String {
    let path = folder.join("shape.sluice").to_str().unwrap().to_owned();
    let checkpoint = demo_checkpoint();
    let text = stdout(&sluice(&["synth", checkpoint.to_str().unwrap(), &path, "--type", "q4", "--no-experts"]));
    assert!(text.contains("holes") && text.contains("the experts are missing"), "{text}");
    assert_eq!(json(&sluice(&["inspect", &path, "--json"]))["provenance"]["no_experts"], true);
    assert_fails(&sluice(&["verify", &path]), 1, &["160 of 182", "damaged"]);
    assert_fails(&sluice(&["run", &path, "--prompt-ids", "1,2,3", "-n", "1", "--ids"]), 1, &["expert", "checksum"]);
    path
}

#[test]
fn a_simulated_drive_counts_what_a_real_one_would() {
    let folder = tempfile::tempdir().unwrap();
    let path = without_experts(folder.path());
    let bench = |more: &[&str]| {
        let args = ["bench", "decode", &path, "--drive", "100GB/s,1us", "-n", "10", "--warm-up", "3", "--no-prefetch"];
        json(&sluice(&[&args[..], &["--json"], more].concat()))
    };
    let run = bench(&[])[0].clone();
    let number = |run: &Value, name: &str| run[name].as_u64().unwrap();
    let (experts, expert_bytes) = (number(&run, "experts"), number(&run, "expert_bytes"));
    assert_eq!((number(&run, "slots"), number(&run, "sequences")), (experts, 1));
    let least = number(&run, "memory_used") - experts * expert_bytes;
    let budgets = [least + experts / 2 * expert_bytes, least + experts * expert_bytes].map(|budget| budget.to_string());
    for sequences in ["1", "3"] {
        let runs = bench(&["--budgets", &budgets.join(","), "--sequences", sequences]);
        for run in runs.as_array().unwrap() {
            let float = |name: &str| run[name].as_f64().unwrap();
            let (tokens, steps) = (number(run, "tokens"), number(run, "steps"));
            assert_eq!((steps, tokens.to_string()), (10, format!("{}", 10 * sequences.parse::<u64>().unwrap())));
            // Nothing is prefetched, so every miss is one expert's bytes, and the drive moved no others.
            let missed = number(run, "bytes_missed");
            assert_eq!(missed, number(run, "misses") * expert_bytes, "{run}");
            assert!((float("bytes_missed_per_token") * tokens as f64 - missed as f64).abs() < 1e-3, "{run}");
            // Five layers use 4 experts a token.
            let uses = (number(run, "hits") + number(run, "misses")) as f64;
            assert!((float("union_of_experts") * steps as f64 - uses).abs() < 1e-6, "{run}");
            assert!((20.0..=60.0).contains(&float("union_of_experts")), "{run}");
            assert!(sequences != "1" || uses == 200.0, "{run}");
            assert!((float("hit_rate") * uses - number(run, "hits") as f64).abs() < 1e-6, "{run}");
            assert_eq!((&run["prefetched"], run["rounds"].as_array().unwrap().len()), (&json!(0), 8));
            let ratio = float("milliseconds_per_step") / 1e3 * float("tokens_per_second");
            assert!((ratio - tokens as f64 / steps as f64).abs() < 1e-6, "{run}");
            assert_eq!(
                (&run["drive"]["bytes_per_second"], &run["drive"]["latency_microseconds"]),
                (&json!(1e11), &json!(1.0))
            );
            let bound = missed as f64 / steps as f64 / 1e11 * 1e3;
            assert!((run["bounds"]["drive"].as_f64().unwrap() - bound).abs() < 1e-9, "{run}");
        }
        assert!(runs[0]["misses"].as_u64() >= runs[1]["misses"].as_u64(), "{runs}");
    }
    let args = ["bench", "decode", &path, "--drive", "3GiB/s", "-n", "2", "--warm-up", "1"];
    let text = stdout(&sluice(&args));
    for word in ["simulated drive: 3.0 GiB/s and 80 µs asked for", "misses", "computing alone", "times the longer"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    // Dense parts would have to come off the real drive.
    let little = (least + 2 * expert_bytes).to_string();
    assert_fails(&sluice(&[&args[..], &["--budget", &little]].concat()), 2, &["dense parts", "--drive", "Raise"]);
}

#[test]
fn a_simulated_drive_is_described_in_full_or_refused() {
    let with = |drive: &str| sluice(&["bench", "decode", demo_model(), "-n", "1", "--warm-up", "1", "--drive", drive]);
    for (wrong, words) in [
        ("7", &["is not a speed", "3GB/s"][..]),
        ("fast,80us", &["`fast` is not a speed"]),
        ("0GB/s", &["nothing could ever be read"]),
        ("7GB/s,80", &["`80` is not a latency", "80us"]),
        ("7GB/s,", &["is not a latency"]),
    ] {
        assert_fails(&with(wrong), 2, &[&["--drive"], words].concat());
    }
    for option in [&["--compare", "prefetch"][..], &["--plot", "/dev/null"], &["--engine", "pread"]] {
        let args = ["bench", "decode", demo_model(), "--drive", "7GB/s"];
        assert_fails(&sluice(&[&args[..], option].concat()), 2, &["--drive", option[0]]);
    }
    // The demo model's own experts are as good a measure of noise as none.
    assert!(stdout(&with("7GB/s")).contains("simulated drive"));
}

#[test]
fn chunks_and_depth_can_be_asked_for_and_must_be_possible() {
    let with = |more: &[&str]| {
        sluice(&[&["bench", "decode", demo_model(), "-n", "1", "--warm-up", "1", "--json"], more].concat())
    };
    let simulated = |more: &[&str]| json(&with(&[&["--drive", "7GB/s"], more].concat()))[0]["drive"].clone();
    for (options, chunk_bytes, depth) in [
        (&[][..], 1 << 20, 4),
        (&["--chunk", "64KiB"], 1 << 16, 4),
        (&["--depth", "2"], 1 << 20, 2),
        (&["--chunk", "2MiB", "--depth", "3"], 2 << 20, 3),
    ] {
        let drive = simulated(options);
        assert_eq!((&drive["chunk_bytes"], &drive["depth"]), (&json!(chunk_bytes), &json!(depth)), "{options:?}");
    }
    // From the real drive; and a token of so small a model touches nothing that caches do not hold.
    assert_eq!(json(&with(&["--chunk", "64KiB", "--depth", "1"]))[0]["of_reading"], Value::Null);
    assert_fails(&with(&["--chunk", "6KiB"]), 2, &["--chunk", "4096", "16MiB"]);
    assert_fails(&with(&["--depth", "1000"]), 2, &["--depth", "128"]);
}

#[test]
fn run_uses_a_calibration_and_survives_a_broken_one() {
    let cache = tempfile::tempdir().unwrap();
    let run = |extra: &[&str]| {
        let args = [&["run", demo_model(), "--prompt-ids", "1,2,3", "-n", "4", "--json"], extra].concat();
        json(&sluice_with_cache(cache.path(), &args))
    };
    let fresh = run(&[]);
    assert_eq!(fresh["profile"]["read_tuning"]["calibrated"], false);
    // What the bench says about the device is what identifies it.
    let report = json(&bench(&["--seconds", "0.1", "--engine", "pread", "--block", "64KiB", "--depth", "1", "--json"]));
    let drive = json!({
        "device": report["device"], "engine": "pread", "chunk_bytes": 262_144, "depth": 5, "prefetch_depth": 2,
        "bytes_per_second": 1e9,
    });
    fs::create_dir(cache.path().join("sluice")).unwrap();
    let file = cache.path().join("sluice/io.json");
    fs::write(&file, json!({ "version": 1, "drives": [drive] }).to_string()).unwrap();
    let calibrated = run(&[]);
    let tuning = &calibrated["profile"]["read_tuning"];
    assert_eq!((&tuning["calibrated"], &tuning["engine"]), (&json!(true), &json!("pread")));
    assert_eq!((&tuning["chunk_bytes"], &tuning["depth"]), (&json!(262_144), &json!(5)));
    assert_eq!(run(&["--no-calibration"])["profile"]["read_tuning"]["calibrated"], false);
    fs::write(&file, "{ broken").unwrap();
    let broken = run(&[]);
    assert!(broken["profile"]["read_tuning"]["remark"].as_str().unwrap().contains("io.json"));
    for other in [&calibrated, &broken] {
        assert_eq!(other["ids"], fresh["ids"], "the tokens do not depend on it");
    }
}

#[test]
fn a_machine_is_measured_once_and_planned_for_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("there.json").to_str().unwrap().to_owned();
    let measured =
        json(&sluice(&["bench", "machine", "--bytes", "1MiB", "--no-save", "--save-anyway", "--out", &file, "--json"]));
    let products = measured["product_bytes_per_second"].as_object().unwrap();
    assert!(products.len() > 5 && products.values().all(|rate| rate.as_f64().unwrap() > 1.0), "{measured}");
    assert_eq!(measured, serde_json::from_str::<Value>(&fs::read_to_string(&file).unwrap()).unwrap());

    let elsewhere = serde_json::json!({
        "version": 2, "ram": 64u64 << 30, "drive_bytes_per_second": 5e9, "memory_bytes_per_second": 80e9,
        "product_bytes_per_second": {"fp8": 40e9, "bf16": 40e9},
        "beside_reads_bytes_per_second": {"fp8": 38e9, "bf16": 38e9},
        "f32_operations_per_second": 1e12, "section_seconds": 4e-6, "isa": "avx512", "threads": 16,
    });
    fs::write(&file, elsewhere.to_string()).unwrap();
    let plan = |more: &[&str]| json(&sluice(&[&["plan", "deepseek-r1", "--machine", &file, "--json"], more].concat()));
    let there = plan(&[]);
    let machine = |plan: &Value| ["ram", "ssd", "memory_bandwidth"].map(|name| plan["machine"][name].as_u64().unwrap());
    assert_eq!(machine(&there), [64 << 30, 5_000_000_000, 40_000_000_000], "{there}");
    assert!(there["speeds_from"].as_str().unwrap().contains("there.json"), "{there}");
    // What is expected is less than the bound, but no less than if nothing overlapped.
    let number =
        |part: &str, name: &str| there[part][name].as_f64().unwrap_or_else(|| panic!("{part}.{name}: {there}"));
    let expected = number("forecast", "token_seconds");
    let both = number("forecast", "drive_seconds") + number("forecast", "computing_seconds");
    assert!((1.0 / number("speed", "tokens_per_second") * 0.97..both * 40.0 / 38.0).contains(&expected), "{there}");
    let asked = plan(&["--ssd", "7GB/s", "--mem-bandwidth", "50GB/s", "--ram", "32GiB"]);
    assert_eq!(machine(&asked), [32 << 30, 7_000_000_000, 50_000_000_000]);
    assert_eq!(asked["speeds_from"], "drive as requested, memory as requested");
    fs::write(&file, "{}").unwrap();
    assert_fails(&sluice(&["plan", "deepseek-r1", "--machine", &file]), 1, &["there.json", "bench machine"]);
}
