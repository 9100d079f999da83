//! Scores a model on a text, and compares it with another model.

use std::error::Error;
use std::path::Path;

use sluice_model::{Engine, EngineOptions};
use sluice_text::Tokenizer;

/// The predictions of a model for the tokens of a text.
pub struct Score {
    /// `exp` of the mean of `−ln p` of the tokens.
    pub perplexity: f64,
    /// Mean Kullback-Leibler divergence from the reference, in nats; 0 for the reference itself.
    pub divergence: f64,
    /// Share of the tokens for which both find the same token the likeliest.
    pub agreement: f64,
    /// Log probabilities `[vocab]` after each token, for the reference alone.
    pub rows: Vec<Vec<f32>>,
}

/// The tokens of a text, as the model in `path` reads it.
pub fn tokens(path: &Path, text: &str) -> Result<Vec<u32>, Box<dyn Error>> {
    let file = sluice_format::ModelFile::open(path)?;
    let tokenizer = Tokenizer::of(file.metadata())?.ok_or("the model has no tokenizer")?;
    Ok(tokenizer.encode(text, true)?)
}

/// Lets the model in `path` predict the tokens in windows, all except the first of each; without a reference it becomes the
/// reference.
pub fn score(path: &Path, ids: &[u32], window: usize, reference: Option<&Score>) -> Result<Score, Box<dyn Error>> {
    let options =
        EngineOptions { no_calibration: true, forget: true, context: Some(window), ..EngineOptions::default() };
    let mut engine = Engine::open(path, &options)?;
    let mut sequence = engine.new_sequence();
    let mut found = Score { perplexity: 0.0, divergence: 0.0, agreement: 0.0, rows: Vec::new() };
    let mut count = 0;
    for start in (0..ids.len() - 1).step_by(window) {
        let ids = &ids[start..ids.len().min(start + window + 1)];
        sequence.clear();
        engine.forward_all(&mut sequence, &ids[..ids.len() - 1], &mut |i, row| {
            let log = log_probabilities(row);
            found.perplexity -= f64::from(log[ids[i + 1] as usize]);
            match reference {
                None => found.rows.push(log),
                Some(reference) => {
                    let of_reference = &reference.rows[count];
                    let pairs = of_reference.iter().zip(&log);
                    found.divergence += pairs.map(|(p, q)| f64::from(p.exp() * (p - q))).sum::<f64>();
                    found.agreement += f64::from(likeliest(of_reference) == likeliest(&log));
                }
            }
            count += 1;
        })?;
    }
    let n = f64::from(count as u32);
    let Score { perplexity, divergence, agreement, rows } = found;
    Ok(Score { perplexity: (perplexity / n).exp(), divergence: divergence / n, agreement: agreement / n, rows })
}

fn log_probabilities(row: &[f32]) -> Vec<f32> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&l| f64::from((l - max).exp())).sum();
    row.iter().map(|&l| l - max - sum.ln() as f32).collect()
}

/// The first of the largest numbers.
fn likeliest(row: &[f32]) -> usize {
    row.iter().enumerate().fold(0, |best, (i, &l)| if l > row[best] { i } else { best })
}
