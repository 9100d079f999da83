//! `sluice logits`: what the model thinks of every position, as a NumPy array.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use sluice_runtime::Engine;

use crate::engine_args::EngineArgs;
use crate::error::CliError;
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
    /// The model file
    file: PathBuf,

    /// Token ids, such as 1,2,3
    #[arg(long, value_name = "IDS")]
    ids: TokenIds,

    /// The array file to write
    #[arg(long, value_name = "FILE.npy")]
    out: PathBuf,

    /// One token at a time through the key-value cache, as text is generated, instead of all at once
    #[arg(long)]
    step: bool,

    #[command(flatten)]
    engine: EngineArgs,
}

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let TokenIds(ids) = &args.ids;
    let mut engine = Engine::open(&args.file, &args.engine.options(ids.len()))?;
    check_ids(ids, engine.spec().vocab_size)?;
    if ids.len() > engine.spec().max_positions {
        return Err(CliError::Usage(format!(
            "there are {} tokens, the model takes at most {}",
            ids.len(),
            engine.spec().max_positions
        )));
    }
    let mut out = Rows::create(&args.out, ids.len(), engine.spec().vocab_size)?;
    let mut session = engine.new_session();
    // All at once is one chunk of the prompt; a step is a chunk of one token.
    let chunk = if args.step { 1 } else { ids.len() };
    for chunk in ids.chunks(chunk) {
        engine.forward_all(&mut session, chunk, &mut |_, row| out.push(row))?;
    }
    out.finish()
}

/// The array, written row by row. The first failure is kept until somebody can be told.
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
