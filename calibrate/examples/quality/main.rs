//! The cost of quantising: converts a checkpoint to types, with plain rounding and with measurement, and scores a text with each.
//!
//! `cargo run --release -p sluice-calibrate --example quality -- [--window N] CHECKPOINT TEXT [TYPE[/EFFORT]...]` prints perplexity
//! in windows of 512 or N, the mean divergence from the f32 model, how often both find the same token the likeliest, and the time
//! of the conversion: on the clock, and of all processors if the system reports it. `recipe:FILE` stands for the types that a
//! recipe chooses, with `q4` where it chooses none, and `NAME.sluice` for a model file that is scored as it is. Temporary files lie
//! beside the text.

mod score;

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use score::{score, tokens};
use sluice_calibrate::{Effort, Measurement, TEXT, digest};
use sluice_converter::measure::Measure;
use sluice_converter::{Options, Recipe, TypeChoice, convert_measured, plan};
use sluice_format::WeightType;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (window, arguments) = match &arguments[..] {
        [option, window, rest @ ..] if option == "--window" => (window.parse()?, rest),
        all => (512, all),
    };
    let [source, text, types @ ..] = arguments else {
        return Err(
            "usage: quality [--window N] CHECKPOINT TEXT [TYPE|recipe:FILE[/plain|/fast|/default|/best]...]".into()
        );
    };
    let path = format!("{text}.quality.sluice");
    let path = Path::new(&path);
    convert(source, path, "f32", None)?;
    let ids = tokens(path, &std::fs::read_to_string(text)?)?;
    let reference = score(path, &ids, window, None)?;
    println!("f32: perplexity {:.4} over {} tokens", reference.perplexity, reference.rows.len());
    for ty in types {
        let (name, effort) = match ty.rsplit_once('/') {
            Some((name, "plain")) => (name, None),
            Some((name, effort)) if effort.parse::<Effort>().is_ok() => (name, Some(effort.parse()?)),
            _ => (ty.as_str(), Some(Effort::default())),
        };
        let (started, used) = (Instant::now(), processor_seconds());
        let ready = Path::new(name).extension().is_some_and(|extension| extension == "sluice");
        if !ready {
            convert(source, path, name, effort)?;
        }
        let seconds = started.elapsed().as_secs_f64();
        let used = processor_seconds()
            .zip(used)
            .map_or_else(String::new, |(now, before)| format!(", {:.1} s of all processors", now - before));
        let found = score(if ready { Path::new(name) } else { path }, &ids, window, Some(&reference))?;
        let change = 100.0 * (found.perplexity / reference.perplexity - 1.0);
        println!(
            "{ty}: perplexity {:.4} ({change:+.2} %), divergence {:.5}, same first choice {:.1} %; converted in {seconds:.1} s{used}",
            found.perplexity,
            found.divergence,
            100.0 * found.agreement
        );
    }
    std::fs::remove_file(path)?;
    Ok(())
}

fn convert(source: &str, path: &Path, types: &str, effort: Option<Effort>) -> Result<(), Box<dyn Error>> {
    let measured = effort.map(|effort| digest(TEXT, effort));
    let (ty, recipe) = match types.strip_prefix("recipe:") {
        Some(file) => (TypeChoice::Type(WeightType::Q4), Some(Recipe::load(Path::new(file))?)),
        None => (types.parse()?, None),
    };
    let options = Options { expert_type: ty, dense_type: ty, recipe, measured, overwrite: true, ..Options::default() };
    let plan = plan(Path::new(source), &options)?;
    let effort = effort.filter(|_| plan.is_measured());
    let mut measurement = effort.map(|effort| Measurement::new(&plan, TEXT, effort)).transpose()?.flatten();
    let measure = measurement.as_mut().map(|m| m as &mut dyn Measure);
    convert_measured(&plan, path, measure, &())?;
    Ok(())
}

/// Processor time of all threads so far, from Linux: it counts hundredths of a second.
fn processor_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // User and system time are the 14th and 15th field; the name in the second can have spaces.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / 100.0)
}
