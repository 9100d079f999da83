//! What quantising costs: converts a checkpoint to types, plainly and measured, and scores a text with each.
//!
//! `cargo run --release -p sluice-calibrate --example quality -- CHECKPOINT TEXT [TYPE[/EFFORT]...]` prints perplexity in windows of 512 and the
//! mean divergence from what the f32 model says. Temporary files lie beside the text.

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use sluice_calibrate::{Effort, Measurement, TEXT, digest};
use sluice_converter::measure::Measure;
use sluice_converter::{Options, TypeChoice, convert_measured, plan};
use sluice_format::WeightType;
use sluice_model::{Engine, EngineOptions};
use sluice_text::Tokenizer;

const WINDOW: usize = 512;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, text, types @ ..] = &arguments[..] else {
        return Err("usage: quality CHECKPOINT TEXT [TYPE[/plain|/fast|/default|/best]...]".into());
    };
    let path = format!("{text}.quality.sluice");
    let text = std::fs::read_to_string(text)?;
    convert(source, &path, TypeChoice::Type(WeightType::F32), None)?;
    let truth = score(&path, &text, None)?;
    println!("f32: perplexity {:.4} over {} tokens", truth.perplexity, truth.rows.len());
    for ty in types {
        let (name, effort) = match ty.split_once('/') {
            None => (ty.as_str(), Some(Effort::default())),
            Some((name, "plain")) => (name, None),
            Some((name, effort)) => (name, Some(effort.parse()?)),
        };
        let started = Instant::now();
        convert(source, &path, name.parse()?, effort)?;
        let seconds = started.elapsed().as_secs_f64();
        let found = score(&path, &text, Some(&truth))?;
        let change = 100.0 * (found.perplexity / truth.perplexity - 1.0);
        println!(
            "{ty}: perplexity {:.4} ({change:+.2} %), divergence {:.5}, {seconds:.1} s",
            found.perplexity, found.divergence
        );
    }
    std::fs::remove_file(&path)?;
    Ok(())
}

fn convert(source: &str, path: &str, ty: TypeChoice, effort: Option<Effort>) -> Result<(), Box<dyn Error>> {
    let measured = effort.map(|effort| digest(TEXT, effort));
    let options = Options { expert_type: ty, dense_type: ty, measured, overwrite: true, ..Options::default() };
    let plan = plan(Path::new(source), &options)?;
    let effort = effort.filter(|_| plan.is_measured());
    let mut measurement = effort.map(|effort| Measurement::new(&plan, TEXT, effort)).transpose()?.flatten();
    let measure = measurement.as_mut().map(|m| m as &mut dyn Measure);
    convert_measured(&plan, Path::new(path), measure, &())?;
    Ok(())
}

struct Score {
    perplexity: f64,
    divergence: f64,
    /// Log probabilities behind each token, if they are to be compared with.
    rows: Vec<Vec<f32>>,
}

fn score(path: &str, text: &str, truth: Option<&Score>) -> Result<Score, Box<dyn Error>> {
    let options = EngineOptions { no_calibration: true, context: Some(WINDOW), ..EngineOptions::default() };
    let mut engine = Engine::open(Path::new(path), &options)?;
    let tokenizer = Tokenizer::of(engine.file().metadata())?.ok_or("the model has no tokenizer")?;
    let ids = tokenizer.encode(text, true)?;
    let (mut nll, mut divergence, mut rows, mut count) = (0.0, 0.0, Vec::new(), 0);
    let mut sequence = engine.new_sequence();
    for start in (0..ids.len() - 1).step_by(WINDOW) {
        let ids = &ids[start..ids.len().min(start + WINDOW + 1)];
        sequence.clear();
        engine.forward_all(&mut sequence, &ids[..ids.len() - 1], &mut |i, row| {
            let log = log_probabilities(row);
            nll -= f64::from(log[ids[i + 1] as usize]);
            match truth {
                None => rows.push(log),
                Some(truth) => {
                    let pairs = truth.rows[count].iter().zip(&log);
                    divergence += pairs.map(|(p, q)| f64::from(p.exp()) * f64::from(p - q)).sum::<f64>();
                }
            }
            count += 1;
        })?;
    }
    let n = count as f64;
    Ok(Score { perplexity: (nll / n).exp(), divergence: divergence / n, rows })
}

fn log_probabilities(row: &[f32]) -> Vec<f32> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&l| f64::from(l - max).exp()).sum();
    row.iter().map(|&l| l - max - sum.ln() as f32).collect()
}
