//! What an eviction policy has learned: read beside the model, then used by the policy.

use std::fs;
use std::path::Path;

use sluice_format::StateId;
use sluice_lab::trace::{Replay, Trace};
use sluice_model::counts;
use sluice_storage::pool::PolicyKind;
use sluice_storage::pool::policy::Shape;

use super::Seeds;

/// The model that the counts belong to.
pub(crate) const MODEL: StateId = StateId([7; 16]);
const TRACE: &str = r#"{"sluice_trace": 1, "experts": 6}
{"layers": [[0, 1], [2, 3]]}
{"layers": [[0, 5], [2, 4]]}
{"layers": [[1, 5], [2, 3]]}
{"layers": [[0, 1], [0, 5]]}
"#;

fn replay() -> Replay {
    let trace = Trace::read(TRACE.as_bytes(), "trace").expect("the trace is sound");
    Replay::new(&trace, None).expect("the trace has routing")
}

pub(crate) fn run(input: &[u8], folder: &Path) {
    let model = folder.join("model.sluice");
    fs::write(counts::path_of(&model), input).expect("the folder can be written");
    let Some(counts) = counts::load(&model, MODEL) else { return };
    let replay = replay();
    assert_eq!(replay.shape(), Shape { layers: 2, experts: 6 });
    for kind in PolicyKind::ONLINE {
        let mut policy = kind.build(replay.shape()).expect("it does not need the future");
        match policy.import(&counts) {
            Ok(()) => drop(replay.run_with(policy.as_mut(), 3)),
            Err(error) => drop(error.to_string()),
        }
    }
}

pub(crate) fn seeds(folder: &Path) -> Seeds {
    let model = folder.join("model.sluice");
    // Nothing but counts is replaced, and a run may have left something else.
    let _ = fs::remove_file(counts::path_of(&model));
    let mut seeds = Seeds::new();
    for kind in PolicyKind::ONLINE {
        let replay = replay();
        let mut policy = kind.build(replay.shape()).expect("it does not need the future");
        replay.run_with(policy.as_mut(), 3);
        counts::save(&model, MODEL, &policy.export()).expect("the folder can be written");
        seeds.push((kind.name().to_owned(), fs::read(counts::path_of(&model)).expect("it was written")));
    }
    seeds
}
