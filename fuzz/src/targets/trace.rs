//! Routing traces: `sluice trace stats` and `sluice trace replay`.

use std::path::Path;

use sluice_lab::trace::{Replay, Stats, Trace};
use sluice_storage::pool::PolicyKind;

use super::{Seeds, fixture};

pub(crate) fn run(input: &[u8], _folder: &Path) {
    let trace = match Trace::read(input, "trace.jsonl") {
        Ok(trace) => trace,
        Err(error) => return drop(error.to_string()),
    };
    for experts in [None, Some(64)] {
        if let Ok(stats) = Stats::new(&trace, experts) {
            serde_json::to_vec(&stats).expect("figures are JSON");
        }
        match Replay::new(&trace, experts) {
            Ok(replay) => drop(replay.report("trace", &PolicyKind::ONLINE, &[0.03, 0.25, 1.0])),
            Err(error) => drop(error.to_string()),
        }
    }
}

pub(crate) fn seeds(_folder: &Path) -> Seeds {
    let traces: [(&str, &[u8]); 3] = [
        ("gpt-oss", fixture!("traces/gpt-oss-120b.jsonl")),
        ("olmoe", fixture!("traces/olmoe-1b-7b.jsonl")),
        ("qwen3", fixture!("traces/qwen3-30b-a3b.jsonl")),
    ];
    // The beginning: what matters happens within a few tokens.
    let start = |trace: &[u8]| trace.split_inclusive(|&b| b == b'\n').take(12).collect::<Vec<_>>().concat();
    let mut seeds: Seeds = traces.iter().map(|(name, trace)| ((*name).to_owned(), start(trace))).collect();
    let small = br#"{"sluice_trace": 1, "layers": 4, "experts": 64, "top_k": 2, "model": "Example"}
{"tok": 0, "phase": "prefill", "layers": [[], [3, 17], [0, 63], [5, 9]], "weights": [[], [0.7, 0.3], [0.5, 0.5], [0.9, 0.1]]}
{"tok": 1, "phase": "decode", "layers": [[], [3, 20], [1, 63], [5, 8]], "weights": [[], [0.6, 0.4], [0.5, 0.5], [0.8, 0.2]]}
"#;
    seeds.push(("small".to_owned(), small.to_vec()));
    seeds
}
