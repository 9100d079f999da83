//! Experiments on how to improve types of few bits, on dense models; `matrices` also takes others, without their experts. The
//! results are in `docs/notes`.
//!
//! `cargo run --release -p sluice-calibrate --example study -- EXPERIMENT CHECKPOINT TEXT`; temporary files lie beside the text.
//!
//! | experiment | asks |
//! |---|---|
//! | `matrices` | what turning columns in blocks does to the errors of single matrices |
//! | `whole` | what it does to the whole model |
//! | `cost` | what turning activations costs (without checkpoint and text) |
//! | `sensitivity` | which matrices deserve more bits, and what that brings |

mod incoherence;
mod model;
mod rotation;
#[path = "../quality/score.rs"]
mod score;
mod sensitivity;

use std::error::Error;
use std::path::Path;

use sluice_converter::{Options, TypeChoice, convert};
use sluice_format::WeightType;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (experiment, source, text) = match arguments[..] {
        ["cost"] => return incoherence::cost(),
        [experiment, source, text] => (experiment, source, text),
        _ => return Err("usage: study matrices|whole|sensitivity CHECKPOINT TEXT, or study cost".into()),
    };
    let path = format!("{text}.study.sluice");
    let path = Path::new(&path);
    let ty = TypeChoice::Type(WeightType::F32);
    let options = Options { expert_type: ty, dense_type: ty, overwrite: true, ..Options::default() };
    convert(Path::new(source), path, &options, &())?;
    let text = std::fs::read_to_string(text)?;
    match experiment {
        "matrices" => incoherence::matrices(path, &text)?,
        "whole" => incoherence::whole(path, &text, 512)?,
        "sensitivity" => sensitivity::run(path, &text)?,
        other => return Err(format!("unknown experiment `{other}`").into()),
    }
    std::fs::remove_file(path)?;
    Ok(())
}
