//! How soon a step ends once it is cancelled: milliseconds, depending on what the step was doing, as JSON lines.
//!
//! `cargo run --release -p sluice-model --example cancel -- FILE PROMPT_TOKENS TRIES [BUDGET_BYTES
//! [INTERVAL]]`. Each try reads a prompt and is cancelled INTERVAL milliseconds later than the one before it (100 unless said), until a
//! try ends before it is cancelled.

use std::error::Error;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use sluice_model::{Cancel, Control, Engine, EngineOptions, Progress, Span, Want};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, tokens, tries, more @ ..] = args.as_slice() else {
        return Err("give a model file, a number of tokens and a number of tries".into());
    };
    let (tokens, tries): (usize, u32) = (tokens.parse()?, tries.parse()?);
    let budget = more.first().map(|b| b.parse()).transpose()?;
    let interval: u64 = more.get(1).map_or(Ok(100), |i| i.parse())?;
    let options = EngineOptions { context: Some(tokens), budget, ..EngineOptions::default() };
    let mut engine = Engine::open(Path::new(file), &options)?;
    let vocab = engine.spec().vocab_size;
    let prompt: Vec<u32> = (0..tokens).map(|i| ((i * 7919 + 13) % vocab) as u32).collect();
    let mut sequence = engine.new_sequence();
    let mut longest = Duration::ZERO;
    for i in 0..tries {
        let cancel = Cancel::new();
        let (switch, (send, receive)) = (cancel.clone(), mpsc::channel());
        let timer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(interval * u64::from(i) + 37));
            switch.cancel();
            let _ = send.send(Instant::now());
        });
        sequence.clear();
        let mut layers = 0;
        let mut progress = |p: Progress| layers = p.layers;
        let mut control = Control { cancel: Some(&cancel), progress: Some(&mut progress), ..Control::default() };
        let outcome =
            engine.step(&mut [Span::prompt(&mut sequence, &prompt, Want::Last)], &mut control, &mut |_, _, _| ());
        let ended = Instant::now();
        timer.join().map_err(|_| "the timer has panicked")?;
        let took = ended.saturating_duration_since(receive.recv()?);
        if outcome.is_ok() {
            println!("{{\"try\": {i}, \"finished\": true}}");
            break;
        }
        longest = longest.max(took);
        println!("{{\"try\": {i}, \"layers\": {layers}, \"milliseconds\": {:.2}}}", 1e3 * took.as_secs_f64());
    }
    println!("{{\"longest_milliseconds\": {:.2}}}", 1e3 * longest.as_secs_f64());
    Ok(())
}
