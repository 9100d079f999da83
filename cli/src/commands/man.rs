//! `sluice man`: manual pages.

use std::fs;
use std::path::PathBuf;

use clap_mangen::{Man, generate_to};

use crate::error::CliError;
use crate::terminal::print_as_is;

const EXAMPLES: &str = "\
Examples:
  sluice man | man -l -
  sluice man ~/.local/share/man/man1";

/// Print the manual page, or write a page for each command into a folder
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder for the pages, which is created if necessary; pages with the same names are replaced
    dir: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, program: clap::Command) -> Result<(), CliError> {
    // The long version describes one machine.
    let program = program.long_version(None::<&'static str>);
    let Some(dir) = &args.dir else {
        let mut page = Vec::new();
        Man::new(program).render(&mut page).map_err(CliError::Output)?;
        return print_as_is(&String::from_utf8_lossy(&page));
    };
    fs::create_dir_all(dir).map_err(CliError::file(dir, "create it"))?;
    generate_to(program, dir).map_err(CliError::file(dir, "write the pages"))
}
