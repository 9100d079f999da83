//! `sluice logits`: the model's predictions at every position, as a NumPy array.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use sluice_format::ModelFile;
use sluice_model::Engine;

use crate::engine_args::EngineArgs;
use crate::error::CliError;
use crate::feed::feed;
use crate::ids::{TokenIds, check_ids};
use crate::npy;

const EXAMPLES: &str = "\
Examples:
  sluice logits model.sluice --ids 1,2,3 --out logits.npy --exact
  sluice logits model.sluice --ids 1,2,3 --out steps.npy --exact --step
  python3 -c 'import numpy; print(numpy.load(\"logits.npy\").argmax(1))'";

/// Write the logits of every position: f32, [tokens, vocabulary], NumPy format
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model file, its name in the folder of models, or hf:NAME
    pub(crate) file: PathBuf,

    /// Token ids, such as 1,2,3
    #[arg(long, value_name = "IDS")]
    ids: TokenIds,

    /// The array file to write
    #[arg(long, value_name = "FILE.npy")]
    out: PathBuf,

    /// One token at a time through the key-value cache, as in generation, instead of all at once; always so with
    /// --expert-preference
    #[arg(long)]
    step: bool,

    #[command(flatten)]
    engine: EngineArgs,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let TokenIds(ids) = &args.ids;
    CliError::refuse_output(&args.out, &[&args.file])?;
    let file = ModelFile::open(&args.file)?;
    let spec = file.spec();
    check_ids(ids, spec.vocab_size)?;
    if ids.len() > spec.max_positions {
        let (given, most) = (ids.len(), spec.max_positions);
        return Err(CliError::Usage(format!("there are {given} tokens, the model takes at most {most}")));
    }
    let mut engine = args.engine.open(&args.file, ids.len())?;
    let out = Rows::create(&args.out, ids.len(), spec.vocab_size)?;
    let outcome = compute(&mut engine, &args.file, ids, args.step, out);
    // A header that promises more than follows would be noticed much later.
    if outcome.is_err() && args.out.is_file() {
        let _ = fs::remove_file(&args.out);
    }
    outcome
}

fn compute(engine: &mut Engine, model: &Path, ids: &[u32], step: bool, mut out: Rows<'_>) -> Result<(), CliError> {
    let mut sequence = engine.new_sequence();
    let mut finite = true;
    for part in ids.chunks(if step { 1 } else { ids.len() }) {
        feed(engine, &mut sequence, part, &mut |_, row| {
            finite &= row.iter().all(|x| x.is_finite());
            out.push(row);
        })?;
    }
    out.finish()?;
    if finite { Ok(()) } else { Err(CliError::NotANumber { file: model.to_owned() }) }
}

/// The array, written row by row. The first error is kept until it can be reported.
struct Rows<'a> {
    path: &'a Path,
    file: BufWriter<File>,
    failed: Option<io::Error>,
}

impl<'a> Rows<'a> {
    fn create(path: &'a Path, rows: usize, cols: usize) -> Result<Self, CliError> {
        let mut file = BufWriter::new(File::create(path).map_err(CliError::file(path, "create it"))?);
        file.write_all(&npy::f32_header(rows, cols)).map_err(CliError::file(path, "write it"))?;
        Ok(Rows { path, file, failed: None })
    }

    fn push(&mut self, row: &[f32]) {
        if self.failed.is_none() {
            self.failed = row.iter().try_for_each(|x| self.file.write_all(&x.to_le_bytes())).err();
        }
    }

    fn finish(mut self) -> Result<(), CliError> {
        let outcome = self.failed.take().map_or_else(|| self.file.flush(), Err);
        outcome.map_err(CliError::file(self.path, "write it"))
    }
}
