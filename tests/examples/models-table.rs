//! Updates the tables of `docs/MODELS.md` that follow from configurations.
//!
//!     cargo run --release -p sluice-tests --example models-table

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use sluice_tests::models_table::renewed;

fn main() -> ExitCode {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/MODELS.md");
    let doc = fs::read_to_string(&path).expect("the document can be read");
    match renewed(&doc) {
        Ok(renewed) => {
            fs::write(&path, renewed).expect("the document can be written");
            ExitCode::SUCCESS
        }
        Err(problem) => {
            eprintln!("{}: {problem}", path.display());
            ExitCode::FAILURE
        }
    }
}
